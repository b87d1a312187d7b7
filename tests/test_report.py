"""The report: hand-computed cells, protocols apart, no number lost, the same bytes twice, nothing fetched."""

import csv
import json
import re
import resource
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from sslbench import ledger
from sslbench.errors import RunFailed, UserError
from sslbench.report import figures
from sslbench.report.milestones import lines_of, milestones
from sslbench.report.page import report, write_page
from sslbench.report.paper_figures import curves, paper_figures
from sslbench.report.tables import summary, tables
from sslbench.study.printed import paper_tables

METHODS = ["asl", "ccmim", "macrl", "mae", "mocov3", "ocl"]
PROTOCOLS = {name: name.split("_")[0] + "_top1" for name in ("knn_cls", "knn_mean", "linprobe_cls", "linprobe_mean")}
ALL_TABLES = list(paper_tables())


def fields(value=40.0, method="ocl", seed=0, **over):
    trained = method != "untrained"
    base = {
        "created": "2026-01-01T00:00:00+00:00", "metric": "knn_top1", "dataset": "builtin", "value": value,
        "stderr": 1.5, "n": 1000, "method": method, "preset": "paper" if trained else None, "arch": "vit_mini4",
        "protocol": {"name": "knn_cls", "hash": "aaaaaaaaaaaa"},
        "pretrain": {"recipe_hash": method * 2 if trained else None, "run": "r", "data": "builtin" if trained else None,
                     "epochs": 10 if trained else None, "images_seen": 40000, "batch": 64},
        "weights_sha256": f"{method}{seed}{value}", "data_fingerprint": "f", "seed": seed,
        "code": {"commit": "c" * 40, "dirty": False}, "versions": {"torch": "2"}, "hardware": {"device": "cpu"},
        "cost": {"wall_s": 9.0, "device_hours": 0.1, "flops": 1e12, "peak_memory_gib": 1.0, "joules": None},
        "scale": "tiny", "condition": {"k": 20},
    }  # fmt: skip
    return {**base, **over}


def pretrain(**over):
    return {**fields()["pretrain"], **over}


def cost(wall_s, flops=None):
    return {**fields()["cost"], "wall_s": wall_s, "flops": flops}


def records(*all_fields):
    return [ledger.append(f) for f in all_fields]


def test_seeds_of_the_evaluation_are_averaged_within_a_seed_of_the_pre_training(home):
    """A run probed by seeds 0 to 2, and its sister run by its own seed: two seeds, of 41 and of 50."""
    of_first = [fields(v, seed=s, weights_sha256="w0", condition={"pretrain_seed": 0} if s else {})
                for s, v in enumerate((40, 41, 42))]  # fmt: skip
    (cell,) = cells(*tables(records(*of_first)))
    assert (cell.value, cell.over, cell.seeds()) == (41, "evaluation seeds", [0, 1, 2])
    assert cell.half == pytest.approx(4.3027 / 3**0.5, rel=1e-3)  # Student's t, 2 degrees of freedom
    (cell,) = cells(*tables(records(fields(50, seed=1, weights_sha256="w1")) + ledger.read()[:3]))
    assert (cell.value, cell.over, cell.by_seed()) == (45.5, "seeds", {0: 41, 1: 50})


def quickstart_records(seeds=1, recipe=""):
    """Six methods and the untrained ViT under four protocols; the methods of a protocol within 0.6 points."""
    return records(
        *(
            fields(
                30 + i / 10 + 2 * j + seed / 2, method, seed, metric=metric, weights_sha256=f"{method}{seed}{recipe}",
                protocol={"name": protocol, "hash": f"{j}" * 12}, cost=cost(90, 10e12 * i or None),
                pretrain=pretrain(recipe_hash=f"{recipe}{method}hash") if i else fields(method=method)["pretrain"],
            )
            for i, method in enumerate(["untrained", *METHODS])
            for j, (protocol, metric) in enumerate(PROTOCOLS.items())
            for seed in range(seeds)
        )
    )  # fmt: skip


def cells(table):
    return [cell for row in table.rows for cell in row.cells.values()]


# ------------------------------------------------------------------------------------------------------- the cells


def test_a_cell_is_the_mean_over_seeds_with_students_interval_and_the_gain_over_untrained(home):
    (table,) = tables(records(*(fields(v, seed=s) for s, v in enumerate((40, 42, 47))), fields(29.0, "untrained")))
    untrained, ocl = table.rows
    cell = ocl.cells["k-NN, cls"]
    assert untrained.method == "untrained" and cell.over == "seeds"
    assert cell.value == pytest.approx(43) and cell.gain == pytest.approx(14)
    assert cell.half == pytest.approx(4.302653 * (13 / 3) ** 0.5)  # t(.975, 2) sqrt(13) / sqrt(3)
    assert untrained.cells["k-NN, cls"].half == pytest.approx(1.96 * 1.5)


def test_two_protocol_hashes_never_share_a_column_nor_two_recipes_a_row(home):
    other = {"protocol": {"name": "knn_cls", "hash": "bbbbbbbbbbbb"}}
    third = {"pretrain": pretrain(recipe_hash="z")}
    (table,) = tables(records(fields(40), fields(50, **other), fields(60, **third)))
    assert table.columns == ["k-NN, cls [aaaaaa]", "k-NN, cls [bbbbbb]"]
    assert [row.label for row in table.rows] == ["ocl, 10 ep [oclocl]", "ocl, 10 ep [z]"]
    assert sorted(c.value for c in cells(table)) == [40, 50, 60]


def test_rows_of_one_method_are_told_apart_by_no_more_than_it_takes(home):
    longer = {"pretrain": pretrain(epochs=20.5, recipe_hash="b")}
    official = {"pretrain": pretrain(recipe_hash="c"), "preset": "official+tau_max=50.0"}
    (table,) = tables(records(fields(40), fields(41, **longer), fields(42, **official), fields(43, "mae")))
    assert [row.label for row in table.rows] == ["mae", "ocl (official)", "ocl, 10 ep", "ocl, 20.5 ep"]


def test_other_test_images_scales_and_pretraining_data_are_other_tables(home):
    over = [{}, {"data_fingerprint": "g"}, {"scale": "cifar"}, {"pretrain": pretrain(data="cifar10")}]
    bases = fields(29, "untrained"), fields(28, "untrained", data_fingerprint="g")
    found = tables(records(*(fields(40 + i, **o) for i, o in enumerate(over)), *bases))
    assert [[cell.value for cell in cells(t)] for t in found] == [[29, 42], [29, 40], [28, 41], [29, 43]]
    assert [t.key[0] for t in found] == ["cifar", "tiny", "tiny", "tiny"] and len({t.title for t in found}) == 4


def test_the_untrained_vit_stands_in_every_table_of_its_test_images_and_alone_where_there_is_none(home):
    small = fields(29, "untrained")
    beside, alone = tables(records(fields(40), small, fields(20, "untrained", arch="vit_s4")))
    assert [row.label for row in beside.rows] == ["untrained ViT", "ocl"] and beside.base.cells["k-NN, cls"].value == 29
    assert [row.label for row in alone.rows] == ["untrained ViT"] and "pre-trained on nothing" in alone.title
    assert figures.accuracy(alone) is None and figures.compute(alone) is None and summary(alone) == []


def test_of_a_number_measured_twice_the_newest_counts(home):
    again = fields(41, created="2026-01-02T00:00:00+00:00", weights_sha256="w")
    (table,) = tables(records(fields(40, weights_sha256="w"), again))
    assert table.rows[0].cells["k-NN, cls"].value == 41 and len(table.rows[0].cells["k-NN, cls"].records) == 1


def test_a_number_without_an_error_has_no_interval_and_no_verdict(home, tmp_path):
    rows = records(fields(40, stderr=None), fields(30, "mae", stderr=None), fields(29, "untrained", stderr=None))
    (table,) = tables(rows)
    assert {(cell.half, str(cell)) for cell in cells(table)} == {(None, "40.0"), (None, "30.0"), (None, "29.0")}
    assert summary(table) == ["k-NN, cls: ocl leads with 40.0 %, 10.0 points above mae."]
    write_page(rows, tmp_path)
    assert "no interval known" in (tmp_path / "report.html").read_text()
    assert {line["half_width"] for line in csv.DictReader((tmp_path / "report.csv").open())} == {""}


def test_who_leads_is_said_with_the_noise_and_never_against_the_untrained_vit(home):
    def said(*values):
        methods = ("ocl", "mae", "untrained")
        return summary(tables([ledger.Record(id=m, **fields(v, m)) for v, m in zip(values, methods, strict=True)])[0])

    assert said(40, 30, 29) == ["k-NN, cls: ocl leads with 40.0 ± 2.9 %, 10.0 points above mae, "
                                "more than the 95 % noise of the two."]  # fmt: skip
    assert "1.0 points above mae, within the 95 % noise" in said(40, 39, 29)[0]
    assert said(28, 27, 29) == ["k-NN, cls: no method is above the untrained ViT's 29.0 ± 2.9 %."]


def test_what_pretraining_cost_is_a_mean_over_seeds_without_the_evaluations(home):
    slow = {"metric": "linprobe_top1", "protocol": {"name": "linprobe_cls", "hash": "c"}}
    (table,) = tables(
        records(
            fields(40, cost=cost(100, 1e12)), fields(41, cost=cost(150, 1e12), **slow),
            fields(42, seed=1, cost=cost(120, 3e12)), fields(29, "untrained"),
            fields(50, "mae", pretrain=pretrain(recipe_hash=None, epochs=None, data="builtin")),
        )
    )  # fmt: skip
    untrained, mae, ocl = table.rows
    assert (ocl.wall_s(), ocl.flops()) == (110, 2e12)
    assert [row.wall_s() for row in (untrained, mae)] == [None, None]  # no run of ours is behind these weights


# -------------------------------------------------------------------------------------------------------- the page


def test_the_same_ledger_gives_the_same_bytes_and_asks_for_nothing_from_outside(home, tmp_path):
    rows = records(fields(40), fields(30, "mae"), fields(29, "untrained"), fields(33, "<script>x"),
                   fields(39, metric="knn_top1_k10", condition={"k": 10}))  # fmt: skip
    for out in ("a", "b"):
        write_page(rows if out == "a" else rows[::-1], tmp_path / out, notes=["a <b>note</b>"], papers=True)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {"report.html", "report.md", "report.csv"} <= {str(n) for n in names} and len(names) >= 7
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<script") == 1 and "&lt;script&gt;x" in page and "&lt;b&gt;" in page  # one, which is the page's
    assert not re.search(r"""(?:src|href)=["']?https?:|url\(['"]?http|@import""", page)
    assert "40.0 ± 2.9" in page and "(+11.0)" in page and "leads" in page


@pytest.mark.parametrize("seeds", [1, 3])
def test_quickstarts_page_has_every_method_protocol_and_number(home, tmp_path, seeds):
    done = write_page(quickstart_records(seeds), tmp_path, notes=["`sslbench quickstart` <made> this"])
    page = (tmp_path / "report.html").read_text()
    assert done["numbers"] == 7 * 4 and page.count("<svg") == 2
    for name in (*METHODS, "untrained ViT"):
        assert f">{name}</td>" in page
    assert "<code>sslbench quickstart</code> &lt;made&gt; this" in page
    lines = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(lines) == 28 and {line["interval_over"] for line in lines} == {"images" if seeds == 1 else "seeds"}
    assert all(f'<details id="{i}">' in page for line in lines for i in line["record_ids"].split())


SNAPSHOT = """\
## builtin, vit_mini4 pre-trained on builtin (tiny scale)

* k-NN, cls: ocl leads with 41.0 ± 2.5 %, 5.0 points above mae, more than the 95 % noise of the two.

| method | k-NN, cls | linear, mean | epochs | images | wall s | TFLOP |
|---|---|---|---|---|---|---|
| untrained ViT | 29.0 ± 2.9 |  |  |  |  |  |
| mae | 36.0 ± 2.5 (+7.0) |  | 10 | 40,000 | 9 | 1.0 |
| ocl | 41.0 ± 2.5 (+12.0) | 50.0 ± 2.9 | 10 | 40,000 | 9 | 1.0 |

### At equal budgets
"""


def test_a_small_ledgers_table_to_the_letter(home, tmp_path):
    linear = {"metric": "linprobe_top1", "protocol": {"name": "linprobe_mean", "hash": "m"}}
    untrained = fields(29, "untrained", pretrain=dict.fromkeys(pretrain()))
    seeds = [fields(v + 5 * (m == "ocl"), m, s) for m in ("ocl", "mae") for s, v in enumerate((35, 36, 37))]
    write_page(records(*seeds, fields(50, **linear), untrained), tmp_path)
    assert SNAPSHOT in (tmp_path / "report.md").read_text()


def test_a_number_of_any_metric_is_on_the_page(home, tmp_path):
    ap = {"metric": "bbox_ap", "dataset": "coco", "protocol": {"name": "coco", "hash": "d"}}
    write_page(records(fields(40), fields(51.5, **ap)), tmp_path)
    assert "coco bbox_ap" in (tmp_path / "report.html").read_text() and "51.5" in (tmp_path / "report.csv").read_text()


def test_an_empty_ledger_says_what_measures(home):
    done = report([], None, "html,md,csv", Console(stderr=True))
    assert "quickstart" in (home / "results/report/report.html").read_text() and done["numbers"] == 0


def test_bad_names_and_bad_lines_are_named(home):
    with pytest.raises(UserError, match="known: csv, html, md, tex"):
        report([], None, "pdf", Console(stderr=True))
    with pytest.raises(UserError, match="unknown table"):
        report(["nothing_t1"], None, "html", Console(stderr=True))
    records(fields())
    path = home / "results/ledger/ocl.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match=r"ocl\.jsonl, line 2 repeats"):
        ledger.read()
    path.write_text(path.read_text().splitlines()[0].replace('"knn_top1"', "3") + "\n")
    with pytest.raises(UserError, match=r"line 1 is not a ledger record .*metric"):
        ledger.read()
    path.write_text(path.read_text().replace("3,", '"knn_top5",', 1))
    with pytest.raises(UserError, match=r"ocl\.jsonl, line 1 .*'knn_top5' is no metric of this suite"):
        ledger.read()


# ----------------------------------------------------------------------------------------------------- the figures

labels = st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.4)), min_size=1, max_size=12)


@given(labels)
def test_labels_keep_their_order_do_not_overlap_and_stay_inside_where_they_fit(drawn):
    wanted, heights = sorted(y for y, _ in drawn), [h for _, h in drawn]
    placed = figures._spread(wanted, heights, -0.05, 1.05)
    for (y1, h1), (y2, h2) in pairwise(zip(placed, heights, strict=True)):
        assert y2 - y1 >= (h1 + h2) / 2 - 1e-9
    if sum(heights) <= 1.1:
        assert placed[0] - heights[0] / 2 >= -0.05 - 1e-9 and placed[-1] + heights[-1] / 2 <= 1.05 + 1e-9


@given(labels)
def test_a_label_that_has_room_stands_at_its_point(drawn):
    heights = [0.1 * h for _, h in drawn]
    wanted = [(i + 0.5) / len(drawn) for i in range(len(drawn))]
    assert figures._spread(wanted, heights, -0.05, 1.05) == pytest.approx(wanted)


@pytest.fixture
def overlap(monkeypatch):
    """overlap(figure): its texts, after a look that no two of them overlap and all are inside."""

    def look(figure):
        boxes = {}

        def draw(self, renderer):
            if self.get_visible() and self.get_text():
                boxes[self] = Text.get_window_extent(self, renderer)  # an annotation's own extent has its arrow in it

        monkeypatch.setattr(Text, "draw", draw)
        figures.picture(figure, "png")
        seen = [(text.get_text(), box) for text, box in boxes.items()]
        for (a, box), (b, other) in combinations(seen, 2):
            assert not box.overlaps(other), (a, b)
        width, height = figure.get_size_inches() * 160
        for text, box in seen:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        return [text for text, _ in seen]

    return look


@pytest.mark.parametrize("figure", [figures.accuracy, figures.compute])
@pytest.mark.parametrize(("seeds", "recipes"), [(1, [""]), (3, [""]), (1, ["one", "another"])])
def test_no_two_texts_of_a_figure_overlap_and_all_are_inside_it(home, figure, seeds, recipes, overlap):
    (table,) = tables([r for recipe in recipes for r in quickstart_records(seeds, recipe)])
    seen = overlap(figure(table))
    assert all(sum(text.startswith(method) for text in seen) >= 2 * len(recipes) for method in METHODS)


def test_the_papers_figures_without_run_folders_have_what_is_printed_and_say_what_to_run(home, tmp_path, overlap):
    rows = quickstart_records()
    found = {f.name: f for f in paper_figures(tables(rows))}
    texts = {name: overlap(f.figure) for name, f in found.items() if f.figure}
    assert {"batch 2048", "batch 512", "ocl", "mocov3"} <= {*texts["ocl_fig3"]}
    assert {"mae 67.8", "iBOT 79.5"} <= {*texts["asl_fig1"]} and {"41.1", "67.4"} <= {*texts["ccmim_fig3"]}
    for name, command in {"ocl_fig3": "ablate ocl_t3", "asl_fig1": "inspect", "ccmim_fig2": "ablate ccmim_f2",
                          "ccmim_fig3": "ablate ccmim_t5", "macrl_fig3": "inspect"}.items():  # fmt: skip
        assert command in found[name].missing[0]
    write_page(rows, tmp_path / "out", papers=True)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("Not measured yet; what measures it: <code>sslbench") == 5 and page.count("<svg") == 2 + len(
        texts
    )


def test_curves_similarity_and_attention_are_those_of_the_run_folders(home, tmp_path, overlap):
    for method in METHODS:
        folder = tmp_path / "runs" / method / "inspect"
        folder.mkdir(parents=True)
        lines = [{"step": i, "epoch": i / 2, "loss": 3 - i, "recon": 1 - i / 4} for i in range(3)]
        (folder.parent / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "inspect.json").write_text('{"token_similarity": 0.75, "token_similarity_std": 0.1, "n": 8}')
        (folder / "inspect.png").write_bytes(figures.picture(Figure(), "png"))
    recipes = {"ccmim": ["paper", "paper+contrast_weight=0.5", "paper+divide=random"]}
    rows = records(*(
        fields(30 + i + j, m, preset=preset, metric="linprobe_top1", protocol={"name": "linprobe_cls", "hash": "l"},
               pretrain=pretrain(recipe_hash=m + preset, run=m))
        for i, m in enumerate(METHODS) for j, preset in enumerate(recipes.get(m, ["paper"]))
    ))  # fmt: skip
    (table,) = tables(rows)
    assert {*METHODS} - {"ccmim"} <= {*overlap(curves(table))}
    found = {f.name: f for f in paper_figures([table])}
    for f in found.values():
        assert f.missing == (["sslbench ablate ocl_t3 --scale paper"] if f.name == "ocl_fig3" else [])
    sweep = next(c[0] for c in found["ccmim_fig2"].figure.axes[0].containers)
    assert sweep.get_xydata().tolist() == [[0.2, 31.0], [0.5, 32.0]]
    assert {"31.0", "33.0", "random"} <= {*overlap(found["ccmim_fig3"].figure)}
    assert [line.get_xdata()[0] for line in found["asl_fig1"].figure.axes[1].lines] == [0.75] * 8
    assert [*found["macrl_fig3"].pictures] == ["macrl", "mae", "mocov3"]
    write_page(rows, tmp_path / "out", papers=True)
    assert (tmp_path / "out/report.html").read_text().count('src="data:image/png;base64,') == 3


def milestone(value, share, method="ocl", seed=0, **over):
    """Of the weights that a run kept at that share of itself."""
    return fields(value, method, seed, **{"weights_sha256": f"{method}{seed}@{share}",
                                          "condition": {"k": 20, "milestone": share}, **over})  # fmt: skip


def test_a_line_of_milestones_ends_with_the_finished_runs_number_and_is_of_the_same_seeds(home):
    """Seed 2 has no milestone at 0.5: no point of ocl's line counts it. asl has no milestone, and no line."""
    kept = [milestone(20 + s, 0.25, seed=s) for s in (0, 1, 2)] + [milestone(30 + 2 * s, 0.5, seed=s) for s in (0, 1)]
    rows = records(*kept, *(fields(40 + 4 * s, seed=s) for s in (0, 1, 2)), fields(50, "asl"), milestone(9, 0.5, "mae"))
    lines = {recipe[0]: line for (_, recipe), line in lines_of(rows).items()}
    assert lines == {"ocl": [(0.25, 20.5), (0.5, 31), (1, 42)], "mae": [(0.5, 9)]}
    (table,) = tables(rows)
    assert {row.label for row in table.rows} == {"asl", "ocl"} and len(table.rows[1].cells["k-NN, cls"].records) == 3


def test_milestones_have_a_panel_a_protocol_and_data_set_and_a_caption(home, tmp_path, overlap):
    other = {"metric": "linprobe_top1", "protocol": {"name": "linprobe_mean", "hash": "l"}}
    official = {"preset": "official", "pretrain": pretrain(recipe_hash="official")}
    rows = [milestone(10 * x + i, x, m, **over, **more, weights_sha256=f"{m}{x}{over}{more}")
            for i, m in enumerate(METHODS) for x in (0.25, 0.5) for over in ({}, other, {"dataset": "cifar10"})
            for more in ([{}, official] if m == "ocl" else [{}])]  # fmt: skip
    rows = records(*rows, *(fields(20 + i, m) for i, m in enumerate(METHODS)))
    figure = milestones(rows)
    seen = overlap(figure)
    assert [a.get_title(loc="left") for a in figure.axes] == ["k-NN, cls, builtin, %", "linear, mean, builtin, %",
                                                              "k-NN, cls, cifar10, %"]  # fmt: skip
    assert seen.count("ocl") == seen.count("ocl (official)") == seen.count("mae") == 3
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3] * 6 + [2]  # official has not finished
    write_page(rows, tmp_path)
    page, text = ((tmp_path / f"report.{f}").read_text() for f in ("html", "md"))
    for told in (page, text):
        assert "Accuracy at milestones" in told and "A milestone's schedule had not ended" in told.replace("&#39;", "'")
    assert (tmp_path / "figures/milestones.svg").is_file() and "figures/milestones.png" in text


def test_without_milestones_there_is_no_figure_of_them(home, tmp_path):
    rows = records(fields(40))
    assert milestones(rows) is None
    write_page(rows, tmp_path)
    assert "milestone" not in (tmp_path / "report.html").read_text()


def test_flops_and_seconds_never_share_an_axis(home):
    counted = records(fields(40), fields(30, "mae"))
    assert "FLOP" in figures.compute(tables(counted)[0]).get_supxlabel()
    mixed = [*counted, *records(fields(35, "asl", cost=cost(20)))]
    assert "seconds" in figures.compute(tables(mixed)[0]).get_supxlabel()


@given(st.lists(st.floats(1, 1e21), min_size=1, max_size=6))
def test_the_cost_axis_has_a_label_on_either_side_of_the_points(costs):
    ticks = figures._ticks(costs)
    assert ticks[0] < min(costs) and max(costs) < ticks[-1] and ticks == sorted(ticks)


def test_latex_escapes_what_it_must(home, tmp_path):
    write_page(records(fields(40), fields(33, "a_b&c%")), tmp_path, "tex", papers=True)
    text = (tmp_path / "report.tex").read_text()
    assert r"a\_b\&c\%" in text and r"$\pm$" in text and "±" not in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1 + len(ALL_TABLES)


def test_a_line_for_which_the_disk_has_no_room_is_not_half_written(home):
    first = ledger.append(fields())
    path = home / "results" / "ledger" / "ocl.jsonl"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(RunFailed, match="no room"):
            ledger.append(fields(41))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    second = ledger.append(fields(41))
    assert [record.id for record in ledger.read()] == [first.id, second.id]
