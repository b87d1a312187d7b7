"""The report as a page: its sections, and the templates that set them. The markup is in templates/."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..files import digest
from ..ledger import Record
from ..study.printed import PAPERS
from . import milestones, studies
from .equal import EQUAL, alone, equal
from .papers import PaperTable
from .provenance import provenance
from .results import Result
from .tables import Cell, Row, Table, is_unitless, summary
from .text import BESIDE, COST_HEADS, DEVIATE, DISAGREE, FIGURES, NOTHING, UNITLESS, Content, cost, missing_text

DRAWN = {  # the figures of a table of measured numbers
    "accuracy": "Accuracy by protocol",
    "compute": "Accuracy against compute",
    "curves": "Training curves",
}
OPENS = "A number opens its provenance."
MEASURED = (
    "Each table opens with how many of its numbers were measured, of those that a recipe and a protocol of this suite "
    "stand for."
)


@dataclass
class Section:
    """A part of the page under a heading, set by a template of its own."""

    title: str
    template: str
    given: dict[str, Any] = field(default_factory=dict)
    within: list[str] = field(default_factory=list)  # titles of headings in it, for the table of contents

    @property
    def id(self) -> str:
        return slug(self.title)


@dataclass
class Headline:
    """A finding in words. section: the id of the one that it is from."""

    section: str
    about: str
    finding: str


@dataclass
class Drawing:
    """A figure. alt: what it shows, for those who do not see it."""

    title: str
    alt: str
    svg: Markup
    caption: str = ""


def page(c: Content, files: dict[str, bytes], records: list[Record]) -> str:
    """The whole page. files: the figures that are drawn, `figures/NAME.svg`; records: behind the numbers."""
    return render("report.html.j2", title=c.title, notes=c.notes, headlines=headlines(c),
                  sections=sections(c, files, records), lead=NOTHING if c.lead == NOTHING else "")  # fmt: skip


def render(template: str, **given: Any) -> str:
    return TEMPLATES.get_template(template).render(given)


def headlines(c: Content) -> list[Headline]:
    """Return each study's answer at its largest budget; where there is no study, what each table says first."""
    if c.studies:
        return [Headline(slug(_of_study(s)), s.study.question or s.name, studies.finding(s)) for s in c.studies]
    return [Headline(slug(t.title), t.title, lines[0]) for t in c.main if (lines := summary(t))]


def sections(c: Content, files: dict[str, bytes], records: list[Record]) -> list[Section]:
    """All of the page, in order; each has a heading and a line in the table of contents."""
    known = {r.id for r in records}
    out = [_study(s, c.study_figures[s.name], files, known) for s in c.studies]
    how = [studies.HOW] * bool(c.studies) + [f"{c.lead} {OPENS}"] * bool(c.main)
    out += [Section("How to read these numbers", "prose.html.j2", {"paragraphs": how})] if how else []
    out += [_measured(t, files, i) for i, t in enumerate(c.main, 1)]
    if svg := files.get("figures/milestones.svg"):
        drawing = Drawing("", milestones.TITLE, inline(svg), milestones.CAPTION)
        out.append(Section(milestones.TITLE, "drawings.html.j2", {"drawings": [drawing]}))
    if c.figures:
        out.append(_paper_figures(c, files))
    if c.other:
        out.append(Section("Other numbers", "other.html.j2", {"tables": c.other}))
    if c.beside:
        out.append(_paper_tables(c))
    if c.disagreements:
        given = {"intro": DISAGREE, "papers": _by_paper([(d.table, d) for d in c.disagreements])}
        out.append(Section("What the papers disagree on", "disagreements.html.j2", given))
    if c.deviations:
        out.append(Section("Deviations", "deviations.html.j2", {"intro": DEVIATE, "deviations": c.deviations}))
    linked = _linked(c, known)
    if behind := [r for r in records if r.id in linked]:
        out.append(Section("Provenance", "provenance.html.j2", {"count": len(behind), "all": provenance(behind)}))
    return out


def _linked(c: Content, known: set[str]) -> set[str]:
    """The ids of the records behind the numbers of the page."""
    ids = {id for t in c.beside for ids in t.sources.values() for id in ids}
    ids |= {r.id for t in c.main + c.other for row in t.rows for cell in row.cells.values() for r in cell.records}
    return ids | {id for s in c.studies for ids in studies.sources(s, known).values() for id in ids}


def _of_study(s: Result) -> str:
    return f"Study: {s.name}"


def _study(s: Result, drawn: list[str], files: dict[str, bytes], known: set[str]) -> Section:
    drawings = []
    for name in drawn:
        title = studies.FIGURES[name][1]
        drawings.append(Drawing(title, f"{title}, {s.name}", inline(files[f"figures/{s.name}_{name}.svg"])))
    given = {"study": s, "words": studies.words(s), "sources": studies.sources(s, known), "drawings": drawings,
             "spent": studies.spent(s), "notes": studies.notes(s)}  # fmt: skip
    return Section(_of_study(s), "study.html.j2", given)


def _measured(t: Table, files: dict[str, bytes], i: int) -> Section:
    drawings = [
        Drawing(title, f"{title}, {t.title}", inline(svg))
        for name, title in DRAWN.items()
        if (svg := files.get(f"figures/{name}_{i}.svg"))
    ]
    given = {"table": t, "lines": summary(t), "drawings": drawings, "equal": equal(t), "about_equal": EQUAL}
    return Section(t.title, "measured.html.j2", given)


def _paper_figures(c: Content, files: dict[str, bytes]) -> Section:
    shown = []
    for f in c.figures:
        svg = files.get(f"figures/{f.name}.svg")
        pictures = {method: base64.b64encode(png).decode() for method, png in f.pictures.items()}
        shown.append({"figure": f, "svg": inline(svg) if svg else "", "pictures": pictures, "missing": missing_text(f)})
    return Section("The papers' figures", "paper_figures.html.j2", {"intro": FIGURES, "figures": shown})


def _paper_tables(c: Content) -> Section:
    by_paper = _by_paper([(t.name, t) for t in c.beside])
    given = {"intro": [BESIDE, MEASURED], "papers": by_paper, "alone": c.alone}
    return Section("The papers' tables, reported | measured", "paper_tables.html.j2", given, [*by_paper])


def _by_paper(named: list[tuple[str, Any]]) -> dict[str, list[Any]]:
    """{the paper's title: what is of its tables}. named: (table, what)."""
    grouped = {title: [x for table, x in named if table.startswith(f"{p}_")] for p, title in PAPERS.items()}
    return {title: its for title, its in grouped.items() if its}


# ----------------------------------------------------------------------------------------------- what templates ask for


def slug(title: str) -> str:
    """`Study: ocl_t5` -> study-ocl_t5, to be an id."""
    return re.sub(r"[^\w.]+", "-", title.lower()).strip("-")


def inline(svg: bytes) -> Markup:
    """A drawing within the page: without its head, its indents, and the ids that nothing in it points to, which another
    drawing has too.

    What clips is named by what it is: matplotlib names it by floats whose last digits differ from layout to layout.
    """
    text = svg.decode()
    text = re.sub(r"\n\s+", "\n", text[text.index("<svg") :])
    for id, shape in re.findall(r'<clipPath id="(\w+)">(.*?)</clipPath>', text, re.S):
        text = text.replace(id, f"clip{digest(shape)}")
    pointed_at = set(re.findall(r"#(\w+)", text))
    return Markup(re.sub(r' id="(\w+)"', lambda m: m[0] if m[1] in pointed_at else "", text))


def unbroken(text: str) -> str:
    """No line begins with a percent sign or with what follows ±."""
    return text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def hover(cell: Cell) -> str:
    """What an interval is over."""
    interval = "no interval known" if cell.half is None else f"95 % interval over {cell.over}"
    return f"{interval}; seed {', '.join(map(str, cell.seeds()))}; n = {cell.records[0].n}"


def settings(row: Row, table: Table) -> str:
    return "random weights" if row is table.base else f"preset {row.first.preset or 'unknown'}"


def share(t: PaperTable) -> str:
    """`3 of 14 measured`."""
    return f"{len(t.sources)} of {t.measurable} measured" if t.measurable else "none to measure"


def ids(records: Iterable[Record]) -> list[str]:
    return [r.id for r in records]


TEMPLATES = Environment(
    loader=PackageLoader("sslbench.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {f.__name__: f for f in (alone, cost, hover, ids, is_unitless, settings, share, slug, unbroken)}
TEMPLATES.filters |= {"compared": studies.compared, "more": studies.more}
TEMPLATES.globals |= {"COST_HEADS": COST_HEADS, "UNITLESS": UNITLESS, "PAIRWISE": studies.PAIRWISE}
