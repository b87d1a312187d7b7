"""`sslbench report`: the ledger and the papers' tables as one page; in other formats by text.py."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from .. import ledger
from ..errors import UserError, nearest
from ..ledger import GEOMETRY, Cost, Record
from ..paths import home
from ..study.results import Result, results
from ..train.state import write_atomically
from . import figures, studies
from .equal import EQUAL, alone, equal
from .paper_figures import PaperFigure, curves, paper_figures
from .papers import (
    Deviation,
    Disagreement,
    PaperTable,
    deviations,
    disagreements,
    reported_beside_measured,
)
from .printed import PAPERS, paper_tables
from .tables import MAIN_METRICS, Cell, Table, form_of, is_unitless, summary, tables
from .terminal import show
from .text import (
    BESIDE,
    COST_HEADS,
    DEVIATE,
    DISAGREE,
    FIGURES,
    UNITLESS,
    Content,
    as_csv,
    cost,
    latex,
    markdown,
    missing_text,
    table_csv,
)

FORMATS = ("html", "md", "csv", "tex")
TITLE = "sslbench report"
DRAWN: dict[str, tuple[Callable[[Table], Figure | None], str]] = {
    "accuracy": (figures.accuracy, "Accuracy by protocol"),
    "compute": (figures.compute, "Accuracy against compute"),
    "curves": (curves, "Training curves"),
}


def report(names: list[str], out: Path | None, formats: str, console: Console) -> dict[str, Any]:
    """All of the ledger as a page in `out`; where tables are named, those alone, in the terminal without `out`."""
    records = ledger.read()
    if names and not out:
        wanted_formats(formats)
        for name in names:
            show(reported_beside_measured(name, records), console)
        return {"tables": names}
    written = write_page(records, out or home() / "results" / "report", formats, papers=names or True,
                         shown=[] if names else results())  # fmt: skip
    console.print(written["report"], markup=False)
    return written


def wanted_formats(formats: str) -> list[str]:
    wanted = [f.strip() for f in formats.split(",") if f.strip()]
    for f in wanted or [""]:
        if f not in FORMATS:
            raise UserError(f"unknown report format '{f}'{nearest(f, FORMATS)}")
    return wanted


def write_page(
    records: list[Record],
    out: Path,
    formats: str = "html,md,csv",
    notes: list[str] | None = None,
    title: str = TITLE,
    papers: bool | list[str] = False,
    shown: list[Result] | None = None,
) -> dict[str, Any]:
    """Write report.{html,md,csv} and figures/ into `out`. Returns {"report", "files", "numbers"}.

    shown: the studies that open the page. papers: the papers' tables too; a list of names: those and nothing else.
    """
    wanted = wanted_formats(formats)
    alone = papers if isinstance(papers, list) else []
    beside = [reported_beside_measured(name, records) for name in alone or paper_tables()] if papers else []
    main = [] if alone else tables(records)
    rest = {r.metric for r in records} - {*MAIN_METRICS, *GEOMETRY}
    other = [] if alone else tables(records, tuple(rest)) + tables(records, GEOMETRY)
    content = Content(title, notes or [], main, other, beside, bool(alone), shown or [])
    if papers and not alone:
        content.figures, content.disagreements, content.deviations = paper_figures(main), disagreements(), deviations()
    drawn: dict[str, Figure | None] = {f.name: f.figure for f in content.figures}
    for study in content.studies:
        of_study = {name: draw(study) for name, (draw, _) in studies.FIGURES.items()}
        content.study_figures[study.name] = [name for name, figure in of_study.items() if figure]
        drawn |= {f"{study.name}_{name}": figure for name, figure in of_study.items()}
    for i, t in enumerate(main, 1):
        drawn |= {f"{name}_{i}": draw(t) for name, (draw, _) in DRAWN.items()}
    files = {
        f"figures/{name}.{kind}": figures.picture(figure, kind)
        for name, figure in drawn.items()
        for kind in ("svg", "png")
        if figure is not None
    }
    files |= {f"figures/{f.name}_{m}.png": png for f in content.figures for m, png in f.pictures.items()}
    if "html" in wanted:
        files["report.html"] = _html(content, files, records).encode()
    if "md" in wanted:
        files["report.md"] = markdown(content).encode()
    if "csv" in wanted and alone:
        files |= {f"{t.name}.csv": table_csv(t).encode() for t in beside}
    elif "csv" in wanted:
        files["report.csv"] = as_csv(main + other).encode()
    if "tex" in wanted:
        files["report.tex"] = latex(content).encode()
    for name, blob in files.items():
        write_atomically(out / name, blob)
    numbers = sum(len(row.cells) for t in main for row in t.rows)
    first = next((out / f"report.{f}" for f in FORMATS if f"report.{f}" in files), out)
    return {"report": str(first), "files": [str(out / f) for f in sorted(files)], "numbers": numbers}


# ---------------------------------------------------------------------------------------------------------------- HTML

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --line: #d9d9d9; --paper: #fff; --shade: #f5f5f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a5a5a0; --line: #3a3a3a; --paper: #161616; --shade: #222; }
  figure { background: #fff; color: #1a1a1a; border-radius: 6px; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 72rem; padding: 0 1rem; }
p, ul { max-width: 54rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.note { background: var(--shade); border-left: 3px solid var(--soft); padding: .5rem .9rem; margin: .6rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: 5px .5rem; line-height: 24px; text-align: right; vertical-align: top; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--soft); }
th:first-child, td:first-child { text-align: left; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.base { color: var(--soft); } td a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
.gain { color: var(--soft); font-size: .85em; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: .5rem 0; padding: .5rem; box-sizing: border-box; max-width: 100%; }
.papers figure { flex: 1 1 24rem; max-width: 34rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; } figure svg { max-width: 100%; height: auto; display: block; }
th.key, td.key { text-align: left; } .paper th, .paper td { white-space: normal; }
.paper td:not(.key) { min-width: 5rem; } ul.notes { list-style: none; padding: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .3rem 0 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.4; } .columns { columns: 26rem; }
details { margin: 0; padding: .2rem 0; } summary { cursor: pointer; }
"""


def _html(c: Content, files: dict[str, bytes], records: list[Record]) -> str:
    body = [f"<h1>{escape(c.title)}</h1>", *(f'<p class="note">{_prose(n)}</p>' for n in c.notes)]
    for study in c.studies:
        svgs = {name: _html_svg(files[f"figures/{study.name}_{name}.svg"], studies.FIGURES[name][1])
                for name in c.study_figures[study.name]}  # fmt: skip
        body.append(studies.html(study, svgs))
    body += [f'<p class="soft">{_prose(studies.HOW)}</p>'] if c.studies else []
    how = f"{c.lead} A number opens its provenance." if c.main else c.lead
    body.append(f'<p class="soft">{_prose(how)}</p>')
    body += [_html_measured(t, files, i) for i, t in enumerate(c.main, 1)]
    body += _html_paper_figures(c.figures, files)
    if c.other:
        inner = "".join(_html_other(t) for t in c.other)
        body.append(f"<details><summary>Other numbers</summary>{inner}</details>")
    if c.beside:
        body.append(f'<h2>The papers\' tables, reported | measured</h2><p class="soft">{_prose(BESIDE)}</p>')
    for paper, title in PAPERS.items():
        its = [_html_paper_table(t, " open" if c.alone else "") for t in c.beside if t.name.startswith(f"{paper}_")]
        body += [f"<h3>{escape(title)}</h3>", *its] if its else []
    body += _html_disagreements(c.disagreements) + _html_deviations(c.deviations)
    linked = {id for t in c.beside for id in t.sources.values()}
    linked |= {r.id for t in c.main + c.other for row in t.rows for cell in row.cells.values() for r in cell.records}
    body += _html_provenance([r for r in records if r.id in linked])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(c.title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html_disagreements(found: list[Disagreement]) -> list[str]:
    if not found:
        return []
    parts = [f'<h2>What the papers disagree on</h2><p class="soft">{_prose(DISAGREE)}</p>']
    for paper, title in PAPERS.items():
        rows = "".join(
            f'<tr><td class="key">{escape(d.table.partition("_")[2])}</td><td class="key">{escape(d.where)}</td>'
            f'<td class="key">{escape(d.printed)}</td><td class="key">{escape(d.against)}</td></tr>'
            for d in found
            if d.table.startswith(f"{paper}_")
        )
        head = "".join(f'<th class="key">{h}</th>' for h in ("table", "where", "printed", "against"))
        parts.append(
            f"<details><summary>{escape(title)}</summary>"
            f'<div class="scroll paper"><table><tr>{head}</tr>{rows}</table></div></details>'
        )
    return parts


def _html_deviations(found: list[Deviation]) -> list[str]:
    parts = [f'<h2>Deviations</h2><p class="soft">{_prose(DEVIATE)}</p>'] if found else []
    for d in found:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(x)}</td>' for x in row)}</tr>" for row in d.settings)
        head = "".join(f"<th>{escape(h)}</th>" for h in ("setting", *d.presets))
        table = f"<table><tr>{head}</tr>{rows}</table>" if rows else ""
        parts.append(f"<details><summary>{escape(d.method)}</summary><pre>{escape(d.head)}</pre>{table}</details>")
    return parts


def _prose(text: str) -> str:
    """Escaped, with `code` set as such, and no line that begins with a percent sign."""
    code = re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))
    return code.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _html_measured(t: Table, files: dict[str, bytes], i: int) -> str:
    """Who leads, the table, and its pictures side by side where the page is wide."""
    leads = "".join(f"<li>{_prose(line)}</li>" for line in summary(t))
    pictures = ""
    for name, (_, what) in DRAWN.items():
        if svg := files.get(f"figures/{name}_{i}.svg"):
            pictures += f"<figure><figcaption>{what}</figcaption>{_html_svg(svg, what)}</figure>"
    shown = f'{_html_table(t)}<div class="figures">{pictures}</div>{_html_equal(t)}'
    return f"<h2>{escape(t.title)}</h2><ul>{leads}</ul>{shown}"


def _html_other(t: Table) -> str:
    note = f'<p class="soft">{_prose(UNITLESS)}</p>' if is_unitless(t) else ""
    return f"<h3>{escape(t.title)}</h3>{note}{_html_table(t)}"


def _html_svg(svg: bytes, what: str) -> str:
    text = svg.decode()
    return f'<div role="img" aria-label="{escape(what)}">{text[text.index("<svg") :]}</div>'


def _html_paper_figures(found: list[PaperFigure], files: dict[str, bytes]) -> list[str]:
    if not found:
        return []
    title = f'<h2>The papers\' figures</h2><p class="soft">{_prose(FIGURES)}</p>'
    parts = [title, '<div class="figures papers">']
    for f in found:
        drawing = _html_svg(svg, f.title) if (svg := files.get(f"figures/{f.name}.svg")) else ""
        for method, png in f.pictures.items():
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            drawing += f'<div class="scroll"><img alt="{escape(f.title)}: {escape(method)}" src="{source}"></div>'
        run = f"<p>{_prose(missing_text(f))}</p>" if f.missing else ""
        parts.append(
            f"<figure><figcaption>{escape(f.title)}</figcaption>{drawing}"
            f'<div class="soft"><p>{_prose(f.caption)}</p>{run}</div></figure>'
        )
    return [*parts, "</div>"]


def _html_equal(t: Table) -> str:
    found = equal(t)
    parts = [f'<h3>At equal budgets</h3><p class="soft">{_prose(EQUAL)}</p>'] if found else []
    for e in found:
        parts.append(f"<h4>{escape(e.title)}</h4>")
        for group in e.groups:
            head = "".join(f"<th>{escape(h)}</th>" for h in [group.budget, *group.columns])
            rows = [[row.label, *(_html_cell(row.cells.get(c)) for c in group.columns)] for row in group.rows]
            rows += [[pair, *(f"<td>{escape(x)}</td>" for x in texts.values())] for pair, texts in group.pairs]
            lines = "".join(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>" for name, *cells in rows)
            parts.append(f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>')
        parts.append(f'<p class="soft">{escape(alone(e))}</p>' if e.alone else "")
    return "".join(parts)


def _html_provenance(shown: list[Record]) -> list[str]:
    parts = ["<h2>Provenance</h2>"] if shown else []
    for method in sorted({r.method for r in shown}):
        numbers = [_provenance(r) for r in sorted(shown, key=_reading_order) if r.method == method]
        parts.append(f'<h3>{escape(method)}</h3><div class="columns">{"".join(numbers)}</div>')
    return parts


def _html_paper_table(t: PaperTable, opened: str = "") -> str:
    def line(tag: str, cells: list[str]) -> str:
        kinds = [' class="key"'] * t.keys + [""] * (len(cells) - t.keys)
        return "<tr>" + "".join(f"<{tag}{kind}>{c}</{tag}>" for kind, c in zip(kinds, cells, strict=True)) + "</tr>"

    def cell(i: int, j: int) -> str:
        if not (id := t.sources.get((i, j))):
            return escape(t.rows[i][j])
        printed, measured = map(escape, t.rows[i][j].split(" | "))
        return f'{printed} | <a href="#{id}">{measured}</a>'

    columns = range(len(t.header))
    table = line("th", [escape(h) for h in t.header])
    table += "".join(line("td", [cell(i, j) for j in columns]) for i in range(len(t.rows)))
    notes = "".join(f"<li>{escape(n)}</li>" for n in t.notes)
    return (
        f'<details{opened}><summary>{escape(t.name)} <span class="soft">{escape(t.common)}</span></summary>'
        f'<div class="scroll paper"><table>{table}</table></div><ul class="soft notes">{notes}</ul></details>'
    )


def _html_table(t: Table) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in ["method", *t.columns, *COST_HEADS])
    rows = []
    for row in t.rows:
        cells = "".join(_html_cell(row.cells.get(c)) for c in t.columns)
        spent = "".join(f"<td>{escape(c)}</td>" for c in cost(row))
        base = ' class="base"' if row is t.base else ""
        settings = "random weights" if row is t.base else f"preset {row.first.preset or 'unknown'}"
        rows.append(f'<tr{base}><td title="{escape(settings)}">{escape(row.label)}</td>{cells}{spent}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    gain = "" if cell.gain is None else f' <span class="gain">{cell.gain_text().strip()}</span>'
    seeds = ", ".join(map(str, cell.seeds()))
    interval = "no interval known" if cell.half is None else f"95 % interval over {cell.over}"
    hover = f"{interval}; seed {seeds}; n = {cell.records[0].n}"
    return f'<td title="{escape(hover)}"><a href="#{cell.records[0].id}">{cell}</a>{gain}</td>'


def _reading_order(r: Record) -> tuple[str, ...]:
    """The seeds of a number one after the other."""
    return r.dataset, r.pretrain.recipe_hash or "", r.protocol.name, r.metric, f"{r.run_seed:9}", f"{r.seed:9}", r.id


def _commit(code: dict[str, Any]) -> str:
    commit = code.get("commit")
    return f"{commit[:12]}{' with changes' if code.get('dirty') else ''}" if commit else "not a git checkout"


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in facts.items())


def _spent(cost: Cost) -> str:
    joules = "" if cost.joules is None else f", {cost.joules:,.0f} J"
    return (
        f"{cost.wall_s:,.0f} s wall, {cost.device_hours:.4f} device hours, {cost.flops or 0:.3g} FLOP, "
        f"{cost.peak_memory_gib or 0:.2f} GiB at its peak{joules}"
    )


def _provenance(r: Record) -> str:
    unit = "" if r.metric in GEOMETRY else " %"
    error = "standard error unknown" if r.stderr is None else f"standard error {r.stderr:.2f}"
    p = r.pretrain
    trained_on = f"{p.data or 'nothing'}" + (f", fingerprint {p.data_fingerprint}" if p.data_fingerprint else "")
    facts = {
        "number": f"{r.metric} {r.value:.2f}{unit}, {error}, n = {r.n}, {r.dataset}",
        "protocol": f"{r.protocol.name} {r.protocol.hash}",
        "recipe": f"{p.recipe_hash or 'none'}, preset {r.preset or 'none'}, seed {r.run_seed}",
        "run": p.run or "none",
        "data": f"pre-trained on {trained_on}; test fingerprint {r.data_fingerprint}",
        "weights": r.weights_sha256 + (f"; trained on top {r.head_sha256}" if r.head_sha256 else ""),
        "code": _commit(r.code),
        "hardware": _listed(r.hardware),
        "versions": _listed(r.versions),
        "cost": _spent(r.cost),
        "when": r.created,
    }
    if p.cost:
        by = f"code {_commit(p.code or {})}; {_listed(p.hardware or {})}; {_listed(p.versions or {})}"
        facts["pre-training"] = f"{_spent(p.cost)}; {by}"
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    by = "" if r.seed == r.run_seed else f", evaluated by seed {r.seed}"
    head = f"{r.protocol.name} {r.metric}: {r.value:{form_of(r.metric)}}{unit}, {r.dataset}, seed {r.run_seed}{by}"
    return f'<details id="{r.id}"><summary>{escape(head)}</summary><dl>{lines}</dl></details>'
