"""What a report says, and the report as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field

from ..study.printed import PAPERS
from . import milestones, studies
from .equal import EQUAL, alone, as_rows, equal
from .paper_figures import PaperFigure
from .papers import Deviation, Disagreement, PaperTable
from .results import Result
from .tables import Cell, Row, Table, summary

NOTHING = "Nothing is measured yet. `sslbench quickstart` measures in minutes; `sslbench eval knn` adds a number."
HOW = (
    "A cell is top-1 accuracy in percent with the half-width of its 95 % interval: over seeds (Student t) where there "
    "are several, of the pre-training or, of one, of the evaluation, else over the test images (binomial). In brackets "
    "the difference to the untrained ViT."
)
UNITLESS = (
    "Of the features of val, without labels, and without a unit: RankMe and the effective rank of centred features (at "
    "most their width), their spread (0 in collapse, 1 over the sphere), uniformity (0 in collapse, else lower), "
    "alignment of two random crops (0: crops do not matter), and CKA with another encoder (1: alike). Intervals are "
    "over seeds, else over images where that is known."
)
BESIDE = (
    "As printed; `-` where the paper prints no number. After the bar, what was measured by the recipe and the protocol "
    "that `sslbench report --missing` names for this number, mean over seeds, and in brackets its difference to the "
    "printed number, then the method and the epochs where they are not as printed. MiCL's rows are run as OCL, whose "
    "earlier version it is. MoCo in MACRL's tables is MoCo v1, which is not in the suite: MoCo v3 is run in its place."
)
FIGURES = (
    "What is printed and what was measured, drawn anew. Curves, attention and token similarity come from the run "
    "folders that are still under `runs/`."
)
DISAGREE = (
    "What is printed in one place of a paper and contradicted in another, or by another of these papers. The tables "
    "above have each number as printed."
)
DEVIATE = "Where paper and released code part, or the paper is silent, and what each preset does."


@dataclass
class Content:
    """All of a report."""

    title: str
    notes: list[str]
    main: list[Table]
    other: list[Table]  # of metrics that are not the usual ones; those without a unit apart from percentages
    beside: list[PaperTable]
    alone: bool  # nothing but `beside`
    studies: list[Result] = field(default_factory=list)
    study_figures: dict[str, list[str]] = field(default_factory=dict)  # study -> what of it is drawn
    milestones: bool = False  # whether there is a figure of them
    figures: list[PaperFigure] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)

    @property
    def lead(self) -> str:
        return HOW if self.main else "" if self.alone else NOTHING


def cost(row: Row) -> list[str]:
    """Epochs, images seen, wall time and compute of pre-training, the last two means over seeds; blank if not known."""
    wall, flops, p = row.wall_s(), row.flops(), row.first.pretrain
    return [
        f"{p.epochs:.4g}" if p.epochs else "",
        f"{p.images_seen:,}" if p.images_seen else "",
        f"{wall:,.0f}" if wall else "",
        f"{flops / 1e12:,.1f}" if flops else "",
    ]


COST_HEADS = ["epochs", "images", "wall s", "TFLOP"]


def cell_text(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell}{cell.gain_text()}"


# ------------------------------------------------------------------------------------------------------------ Markdown


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows])


def markdown(c: Content) -> str:
    parts = [f"# {c.title}", *c.notes]
    for study in c.studies:
        pictures = [f"figures/{study.name}_{name}.png" for name in c.study_figures[study.name]]
        parts += studies.markdown(study, pictures, _grid)
    parts += [studies.HOW] if c.studies else []
    parts.append(c.lead)
    for t in c.main:
        parts += [f"## {t.title}", "\n".join(f"* {line}" for line in summary(t)), _grid(*measured(t))]
        budgets = equal(t)
        parts += ["### At equal budgets", EQUAL] if budgets else []
        for e in budgets:
            parts += [f"#### {e.title}", *(_grid(*as_rows(group)) for group in e.groups), alone(e)]
    if c.milestones:
        title = milestones.TITLE
        parts += [f"## {title}", f"![{title}](figures/milestones.png)", milestones.CAPTION]
    parts += ["## The papers' figures", FIGURES] if c.figures else []
    for f in c.figures:
        names = [f.name] if f.figure else [f"{f.name}_{method}" for method in f.pictures]
        pictures = [f"![{f.title}](figures/{name}.png)" for name in names]
        parts += [f"### {f.title}", *pictures, f.caption, missing_text(f)]
    parts += ["## The papers' tables, reported | measured", BESIDE] if c.beside else []
    for paper, title in PAPERS.items():
        its = [t for t in c.beside if t.name.startswith(f"{paper}_")]
        parts += [f"### {title}"] if its else []
        for shown in its:
            remarks = "\n".join(f"* {note}" for note in shown.notes)
            parts += [f"#### {shown.name}", shown.common, _grid(shown.header, shown.rows), remarks]
    if c.disagreements:
        rows = [[d.table, d.where, d.printed, d.against] for d in c.disagreements]
        parts += ["## What the papers disagree on", DISAGREE, _grid(["table", "where", "printed", "against"], rows)]
    parts += ["## Deviations", DEVIATE] if c.deviations else []
    for d in c.deviations:
        settings = _grid(["setting", *d.presets], d.settings) if d.settings else ""
        parts += [f"### {d.method}", f"```text\n{d.head}\n```", settings]
    return "\n\n".join(part for part in parts if part) + "\n"


def missing_text(f: PaperFigure) -> str:
    return (
        f"Not measured yet; what measures it: {', '.join(f'`{command}`' for command in f.missing)}" if f.missing else ""
    )


def measured(t: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of measured numbers."""
    rows = [[row.label, *(cell_text(row.cells.get(c)) for c in t.columns), *cost(row)] for row in t.rows]
    return ["method", *t.columns, *COST_HEADS], rows


# --------------------------------------------------------------------------------------------------------------- LaTeX

ESCAPES = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
           "<": "$<$", ">": "$>$", **{c: f"\\{c}" for c in "&%$#_{}"}}  # fmt: skip


def latex(c: Content) -> str:
    """Every table as a booktabs `table`, to be cut and pasted; all of it compiles as it stands."""
    parts = [r"\documentclass{article}", r"\usepackage{booktabs,graphicx}", r"\begin{document}"]
    for t in c.main:
        parts.append(_tabular(t.title, *measured(t)))
    for paper in c.beside:
        parts.append(_tabular(f"{paper.name}: {paper.common}", paper.header, paper.rows, paper.notes))
    return "\n\n".join([*parts, r"\end{document}"]) + "\n"


def _tabular(caption: str, header: list[str], rows: list[list[str]], notes: list[str] | None = None) -> str:
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (header, *rows)]
    body = "\n".join(["\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"])
    under = "\n".join(rf"\par\footnotesize {_escaped(note)}" for note in notes or [])
    columns = "l" + "r" * (len(header) - 1)
    return (
        f"\\begin{{table}}[p]\n\\caption{{{_escaped(caption)}}}\n\\resizebox{{\\textwidth}}{{!}}{{%\n"
        f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}}}\n{under}\n\\end{{table}}"
    )


def _escaped(text: str) -> str:
    return re.sub(r"[\\±~^<>&%$#_{}]", lambda m: ESCAPES[m[0]], text)


# ----------------------------------------------------------------------------------------------------------------- CSV


def table_csv(t: PaperTable) -> str:
    """A paper's table as it is shown, without its notes."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([t.header, *t.rows])
    return buffer.getvalue()


def as_csv(all_tables: list[Table]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["scale", "dataset", "data_fingerprint", "pretrain_data", "arch", "method", "recipe_hash",
                     "protocol", "protocol_hash", "metric", "value", "half_width", "interval_over", "seeds", "gain",
                     "record_ids"])  # fmt: skip
    for t in all_tables:
        for row in t.rows:
            for cell in row.cells.values():
                r = cell.records[0]
                writer.writerow([*t.key, row.label, r.pretrain.recipe_hash or "", r.protocol.name, r.protocol.hash,
                                 r.metric, f"{cell.value:.4f}",
                                 "" if cell.half is None else f"{cell.half:.4f}", cell.over,
                                 " ".join(map(str, cell.seeds())),
                                 "" if cell.gain is None else f"{cell.gain:.4f}",
                                 " ".join(x.id for x in cell.records)])  # fmt: skip
    return buffer.getvalue()
