"""`sslbench report`: the ledger and the papers' tables as one page; in other formats by text.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from .. import ledger
from ..errors import UserError, nearest
from ..files import write_atomically
from ..ledger import GEOMETRY, Record
from ..paths import home
from ..study.printed import paper_tables
from . import figures, html, studies
from .milestones import milestones
from .paper_figures import curves, paper_figures
from .papers import deviations, disagreements, reported_beside_measured
from .results import Result, results
from .tables import MAIN_METRICS, Table, tables
from .terminal import show
from .text import Content, as_csv, latex, markdown, table_csv

FORMATS = ("html", "md", "csv", "tex")
TITLE = "sslbench report"
DRAWN: dict[str, Callable[[Table], Figure | None]] = {
    "accuracy": figures.accuracy,
    "compute": figures.compute,
    "curves": curves,
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
    content = _content(records, notes or [], title, papers, shown or [])
    drawn = _figures(content, records)
    files = {f"figures/{name}.{kind}": figures.picture(f, kind) for name, f in drawn.items() for kind in ("svg", "png")}
    files |= {f"figures/{f.name}_{m}.png": png for f in content.figures for m, png in f.pictures.items()}
    if "html" in wanted:
        files["report.html"] = html.page(content, files, records).encode()
    if "md" in wanted:
        files["report.md"] = markdown(content).encode()
    if "csv" in wanted and content.alone:
        files |= {f"{t.name}.csv": table_csv(t).encode() for t in content.beside}
    elif "csv" in wanted:
        files["report.csv"] = as_csv(content.main + content.other).encode()
    if "tex" in wanted:
        files["report.tex"] = latex(content).encode()
    for name, blob in files.items():
        write_atomically(out / name, blob)
    numbers = sum(len(row.cells) for t in content.main for row in t.rows)
    report_file = next((out / f"report.{f}" for f in FORMATS if f"report.{f}" in files), out)
    return {"report": str(report_file), "files": [str(out / f) for f in sorted(files)], "numbers": numbers}


def _content(
    records: list[Record], notes: list[str], title: str, papers: bool | list[str], shown: list[Result]
) -> Content:
    only_papers = papers if isinstance(papers, list) else []
    beside = [reported_beside_measured(name, records) for name in only_papers or paper_tables()] if papers else []
    if only_papers:
        return Content(title, notes, [], [], beside, True, shown)
    others = tuple({r.metric for r in records} - {*MAIN_METRICS, *GEOMETRY})
    other = tables(records, others) + tables(records, GEOMETRY)
    content = Content(title, notes, tables(records), other, beside, False, shown)
    if papers:
        content.figures = paper_figures(content.main)
        content.disagreements, content.deviations = disagreements(), deviations()
    return content


def _figures(content: Content, records: list[Record]) -> dict[str, Figure]:
    """Every figure by its name, which `content` is told of."""
    drawn: dict[str, Figure | None] = {f.name: f.figure for f in content.figures}
    for study in content.studies:
        of_study = {name: draw(study) for name, (draw, _) in studies.FIGURES.items()}
        content.study_figures[study.name] = [name for name, figure in of_study.items() if figure]
        drawn |= {f"{study.name}_{name}": figure for name, figure in of_study.items()}
    for i, t in enumerate(content.main, 1):
        drawn |= {f"{name}_{i}": draw(t) for name, draw in DRAWN.items()}
    if not content.alone and (figure := milestones(records)):
        drawn["milestones"], content.milestones = figure, True
    return {name: figure for name, figure in drawn.items() if figure is not None}
