"""Accuracy at milestones: of the weights that runs kept on their way, up to that of the finished run."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

from ..ledger import Record
from .figures import LINE, STYLE, WIDTH, colour_of, name_points, wrapped
from .tables import MAIN_METRICS, cell_of, newest, plain_name

TITLE = "Accuracy at milestones"
CAPTION = (
    "The weights that a run kept at a share of its length, evaluated as those it ended with, at 1.0; means over the "
    "seeds that all points of a line have. A milestone's schedule had not ended, so it is not the number of a run of "
    "that length."
)

Recipe = tuple[str, str, str, str]  # method, preset, arch, recipe hash
Panel = tuple[str, str, str, str, str]  # data set, its fingerprint, protocol's name, metric, protocol's hash


def milestones(records: list[Record]) -> Figure | None:
    """A panel a data set and protocol, a line a recipe over the shares of its runs. None: no milestone is measured."""
    lines = lines_of(records)
    if not lines:
        return None
    panels = sorted({panel for panel, _ in lines}, key=lambda p: (p[0], MAIN_METRICS.index(p[3]), p))
    names = recipe_names([recipe for _, recipe in lines])
    colours = {name: colour_of(i) for i, name in enumerate(sorted(names.values()))}
    drawn = [{names[recipe]: line for (p, recipe), line in lines.items() if p == panel} for panel in panels]
    heights = [0.45 + max(0.9, LINE * sum(name.count("\n") + 1 for name in of_panel)) for of_panel in drawn]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axis, title, of_panel in zip(axes, _titles(panels), drawn, strict=True):
            for name, points in sorted(of_panel.items()):
                axis.plot(*zip(*points, strict=True), "o-", color=colours[name], markersize=4)
            axis.set_xlim(0, 1.02)
            axis.margins(y=0.15)
            axis.set_title(title)
        figure.supxlabel("share of the run", fontsize=9)
        figure.draw_without_rendering()  # lays the panels out: their heights are known from here
        for axis, of_panel in zip(axes, drawn, strict=True):
            name_points(axis, [(*points[-1], name, colours[name]) for name, points in of_panel.items()])
    return figure


def lines_of(records: list[Record]) -> dict[tuple[Panel, Recipe], list[tuple[float, float]]]:
    """[(share, accuracy)] of each recipe that has a milestone, the finished run's number last, at 1.0."""
    at: dict[tuple[Panel, Recipe], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    kept = [r for r in records if "milestone" in r.condition]
    for r in (r for r in [*kept, *newest(records)] if r.metric in MAIN_METRICS and r.pretrain.recipe_hash):
        panel = r.dataset, r.data_fingerprint, r.protocol.name, r.metric, r.protocol.hash
        recipe = r.method, r.preset or "", r.arch, r.pretrain.recipe_hash or ""
        at[panel, recipe][float(r.condition.get("milestone", 1.0))].append(r)
    return {key: _line(shares) for key, shares in sorted(at.items()) if {*shares} - {1.0}}


def _line(shares: dict[float, list[Record]]) -> list[tuple[float, float]]:
    by_seed = {share: cell_of(numbers).by_seed() for share, numbers in sorted(shares.items())}
    common = set.intersection(*({*values} for values in by_seed.values()))
    return [
        (share, fmean(v for seed, v in values.items() if seed in common or not common))
        for share, values in by_seed.items()
    ]


def recipe_names(recipes: list[Recipe]) -> dict[Recipe, str]:
    """Name each by as much of method, preset, arch and hash as tells it apart, in lines of at most 18 letters."""
    levels = {recipe: _named(recipe) for recipe in recipes}
    names = {}
    for recipe, named in levels.items():
        unshared = (n for i, n in enumerate(named) if [other[i] for other in levels.values()].count(n) == 1)
        names[recipe] = wrapped(next(unshared, named[-1]))
    return names


def _named(recipe: Recipe) -> list[str]:
    """Return names for a recipe's line, from short to exact; the figure takes the shortest that tells it apart."""
    method, preset, arch, hash = recipe
    preset = preset.partition("+")[0]  # what a recipe sets otherwise is too long to name a line by
    label = method if preset in ("", "paper") else f"{method} ({preset})"
    return [label, f"{label}, {arch}", f"{label} [{hash[:6]}]"]


def _titles(panels: list[Panel]) -> list[str]:
    """`k-NN, cls, cifar10, %`; the hash is added where two protocols bear one name, or two data sets."""
    plain = [f"{plain_name(name, metric)}, {dataset}" for dataset, _, name, metric, _ in panels]
    exact = [
        f"{title} [{hash[:6]}, images {images[:6]}]" for title, (_, images, *_, hash) in zip(plain, panels, strict=True)
    ]
    return [f"{p if plain.count(p) == 1 else e}, %" for p, e in zip(plain, exact, strict=True)]
