"""`sslbench report`: the ledger and the papers' tables as one page, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from .. import ledger
from ..errors import UserError, nearest
from ..ledger import Record
from ..paths import home
from ..train.state import write_atomically
from . import figures
from .tables import Cell, Row, Table, paper_tables, reported_beside_measured, summary, tables

FORMATS = ("html", "md", "csv")
TITLE = "sslbench report"
NOTHING = "Nothing is measured yet. `sslbench quickstart` measures in minutes; `sslbench eval knn` adds a number."
HOW = (
    "A cell is top-1 accuracy in percent with the half-width of its 95 % interval: over seeds (Student t) where there "
    "are several, else over the test images (binomial). In brackets: the difference to the untrained ViT."
)


def report(names: list[str], out: Path | None, formats: str, console: Console) -> dict[str, Any]:
    """All of the ledger as a page in `out`; or, where tables are named, those in the terminal."""
    records = ledger.read()
    if names:
        for name in names:
            _show_paper_table(name, records, console)
        return {"tables": names}
    written = write_page(records, out or home() / "results" / "report", formats, papers=True)
    console.print(written["report"], markup=False)
    return written


def write_page(
    records: list[Record],
    out: Path,
    formats: str = "html,md,csv",
    notes: list[str] | None = None,
    title: str = TITLE,
    papers: bool = False,
) -> dict[str, Any]:
    """Write report.{html,md,csv} and figures/ into `out`. Returns {"report", "files", "numbers"}."""
    wanted = [f.strip() for f in formats.split(",") if f.strip()]
    for f in wanted:
        if f not in FORMATS:
            raise UserError(f"unknown report format '{f}'{nearest(f, FORMATS)}; known: {', '.join(FORMATS)}")
    main, other = tables(records), tables(records, tuple(sorted({r.metric for r in records if "_k" in r.metric})))
    names = list(paper_tables()) if papers else []
    drawn = [(t, figures.accuracy(t), figures.compute(t)) for t in main]
    files: dict[str, bytes] = {}
    for i, (_, *pair) in enumerate(drawn, 1):
        for name, figure in zip(("accuracy", "compute"), pair, strict=True):
            for kind in ("svg", "png"):
                if figure is not None:
                    files[f"figures/{name}_{i}.{kind}"] = figures.picture(figure, kind)
    if "html" in wanted:
        page = _html(title, drawn, other, names, records, notes or [], files)
        files["report.html"] = page.encode()
    if "md" in wanted:
        files["report.md"] = _markdown(title, main, names, records, notes or []).encode()
    if "csv" in wanted:
        files["report.csv"] = _csv(main + other).encode()
    for name, content in files.items():
        write_atomically(out / name, content)
    numbers = sum(len(row.cells) for t in main for row in t.rows)
    first = next((out / f"report.{f}" for f in FORMATS if f in wanted), out)
    return {"report": str(first), "files": [str(out / f) for f in sorted(files)], "numbers": numbers}


def _cost(row: Row) -> list[str]:
    """Epochs, images seen, wall time and compute of pre-training; blanks for the untrained ViT."""
    r = row.first
    if r.pretrain.epochs is None:
        return ["", "", "", ""]
    flops = f"{r.cost.flops / 1e12:,.1f}" if r.cost.flops else ""
    return [f"{r.pretrain.epochs:g}", f"{r.pretrain.images_seen or 0:,}", f"{r.cost.wall_s:,.0f}", flops]


COST_HEADS = ["epochs", "images", "wall s", "TFLOP"]


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell} ({cell.gain:+.1f})" if cell.gain is not None else str(cell)


# ------------------------------------------------------------------------------------------------------------ terminal


def _show_paper_table(name: str, records: list[Record], console: Console) -> None:
    header, rows, notes = reported_beside_measured(name, records)
    table = RichTable(title=f"{name}: reported | measured", title_justify="left", box=None, pad_edge=False)
    for head in header:
        key = head in ("where", "setting", "method", "arch", "epochs", "condition")
        table.add_column(head.replace("_", " "), justify="left" if key else "right", overflow="fold", no_wrap=key)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)


# ------------------------------------------------------------------------------------------------------------ Markdown


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows])


def _markdown(title: str, main: list[Table], names: list[str], records: list[Record], notes: list[str]) -> str:
    parts = [f"# {title}", *(notes or []), HOW if main else NOTHING]
    for t in main:
        rows = [[row.label, *(_text(row.cells.get(c)) for c in t.columns), *_cost(row)] for row in t.rows]
        parts += [f"## {t.title}", _grid(["method", *t.columns, *COST_HEADS], rows)]
        parts += ["\n".join(f"* {line}" for line in summary(t))]
    for name in names:
        header, cells, remarks = reported_beside_measured(name, records)
        parts += [f"## {name}: reported | measured", _grid(header, cells), "\n".join(f"* {n}" for n in remarks)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _csv(all_tables: list[Table]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["scale", "dataset", "pretrain_data", "arch", "method", "recipe_hash", "protocol", "protocol_hash",
                     "metric", "value", "half_width", "interval_over", "seeds", "gain", "record_ids"])  # fmt: skip
    for t in all_tables:
        for row in t.rows:
            for cell in row.cells.values():
                r = cell.records[0]
                writer.writerow([*t.key, row.label, r.pretrain.recipe_hash or "", r.protocol.name, r.protocol.hash,
                                 r.metric, f"{cell.value:.4f}", f"{cell.half:.4f}", cell.over,
                                 " ".join(str(x.seed) for x in cell.records),
                                 "" if cell.gain is None else f"{cell.gain:.4f}",
                                 " ".join(x.id for x in cell.records)])  # fmt: skip
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- HTML

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --line: #d9d9d9; --paper: #fff; --shade: #f5f5f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a5a5a0; --line: #3a3a3a; --paper: #161616; --shade: #222; }
  .figure { background: #fff; border-radius: 6px; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 66rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.note { background: var(--shade); border-left: 3px solid var(--soft); padding: .5rem .9rem; margin: .6rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid var(--soft); } th:first-child, td:first-child { text-align: left; }
td.wrap { white-space: normal; }
tr.base { color: var(--soft); } td a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
.gain { color: var(--soft); font-size: .85em; }
.figure svg { max-width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .3rem 0 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def _html(
    title: str, drawn: list[Any], other: list[Table], names: list[str], records: list[Record], notes: list[str],
    files: dict[str, bytes],
) -> str:  # fmt: skip
    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="note">{escape(n)}</p>' for n in notes)]
    body.append(
        f'<p class="soft">{escape(HOW)} A number opens its provenance.</p>' if drawn else f"<p>{escape(NOTHING)}</p>"
    )
    for i, (t, *_) in enumerate(drawn, 1):
        body.append(f"<h2>{escape(t.title)}</h2>")
        body.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in summary(t)) + "</ul>")
        body.append(_html_table(t))
        for name, what in (("accuracy", "Accuracy by protocol"), ("compute", "Accuracy against compute")):
            if svg := files.get(f"figures/{name}_{i}.svg"):
                inline = svg.decode()
                body.append(
                    f'<div class="figure" role="img" aria-label="{what}">{inline[inline.index("<svg") :]}</div>'
                )
    if other:
        inner = "".join(f"<h3>{escape(t.title)}</h3>{_html_table(t)}" for t in other)
        body.append(f"<details><summary>Other numbers of neighbours</summary>{inner}</details>")
    if names:
        body.append("<h2>The papers' tables, reported | measured</h2>")
        body.append(
            '<p class="soft">As printed. A measured number stands beside a reported one only where the ledger has the '
            "same method, arch, epochs, data and protocol at the paper's scale.</p>"
        )
    for name in names:
        header, rows, remarks = reported_beside_measured(name, records)
        head = "".join(f"<th>{escape(h.replace('_', ' '))}</th>" for h in header)
        lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        remark = "".join(f"<li>{escape(n)}</li>" for n in remarks)
        body.append(
            f"<details><summary>{escape(name)}</summary>"
            f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'
            f'<ul class="soft">{remark}</ul></details>'
        )
    shown = {
        r.id: r for t in [d[0] for d in drawn] + other for row in t.rows for c in row.cells.values() for r in c.records
    }
    if shown:
        body.append("<h2>Provenance</h2>")
        body += [_provenance(r) for r in sorted(shown.values(), key=_reading_order)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(t: Table) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in ["method", *t.columns, *COST_HEADS])
    rows = []
    for row in t.rows:
        cells = "".join(_html_cell(row.cells.get(c)) for c in t.columns)
        cost = "".join(f"<td>{escape(c)}</td>" for c in _cost(row))
        base = "" if row.first.pretrain.epochs is not None else ' class="base"'
        settings = escape(row.first.preset or "random weights")
        rows.append(f'<tr{base}><td title="{settings}">{escape(row.label)}</td>{cells}{cost}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    gain = "" if cell.gain is None else f' <span class="gain">({cell.gain:+.1f})</span>'
    seeds = ", ".join(str(r.seed) for r in cell.records)
    hover = f"95 % interval over {cell.over}; seed {seeds}; n = {cell.records[0].n}"
    return f'<td title="{escape(hover)}"><a href="#{cell.records[0].id}">{cell}</a>{gain}</td>'


def _reading_order(r: Record) -> tuple[str, str, int, str, str]:
    return r.method, r.protocol.name, r.seed, r.metric, r.id


def _provenance(r: Record) -> str:
    commit = r.code.get("commit")
    code = f"{commit[:12]}{' with changes' if r.code.get('dirty') else ''}" if commit else "not a git checkout"
    facts = {
        "number": f"{r.metric} {r.value:.2f} % ± {r.stderr or 0:.2f} (standard error), n = {r.n}, {r.dataset}",
        "protocol": f"{r.protocol.name} {r.protocol.hash}",
        "recipe": f"{r.pretrain.recipe_hash or 'none'}, preset {r.preset or 'none'}, seed {r.seed}",
        "run": r.pretrain.run or "none",
        "data": f"pre-trained on {r.pretrain.data or 'nothing'}; test fingerprint {r.data_fingerprint}",
        "weights": r.weights_sha256,
        "code": code,
        "hardware": ", ".join(f"{k} {v}" for k, v in r.hardware.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in r.versions.items()),
        "cost": f"{r.cost.wall_s:,.0f} s wall, {r.cost.device_hours:.4f} device hours, "
        f"{r.cost.flops or 0:.3g} FLOP, {r.cost.peak_memory_gib or 0:.2f} GiB at its peak",
        "when": r.created,
    }
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    head = f"{r.method} {r.protocol.name} {r.metric}: {r.value:.1f} %, seed {r.seed}"
    return f'<details id="{r.id}"><summary>{escape(head)}</summary><dl>{lines}</dl></details>'
