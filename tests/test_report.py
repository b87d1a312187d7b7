"""The report: hand-computed cells, protocols apart, the same bytes twice, and nothing fetched from outside."""

import re

import pytest
from rich.console import Console

from sslbench import ledger
from sslbench.errors import UserError
from sslbench.report.page import report, write_page
from sslbench.report.tables import tables


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


def records(*all_fields):
    return [ledger.append(f) for f in all_fields]


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
    third = {"pretrain": {**fields()["pretrain"], "recipe_hash": "z"}}
    (table,) = tables(records(fields(40), fields(50, **other), fields(60, **third)))
    assert len(table.columns) == 2 and len({row.label for row in table.rows}) == 2
    assert sorted(c.value for row in table.rows for c in row.cells.values()) == [40, 50, 60]


def test_of_a_number_measured_twice_the_newest_counts(home):
    again = fields(41, created="2026-01-02T00:00:00+00:00", weights_sha256="w")
    (table,) = tables(records(fields(40, weights_sha256="w"), again))
    assert table.rows[0].cells["k-NN, cls"].value == 41 and len(table.rows[0].cells["k-NN, cls"].records) == 1


def test_the_same_ledger_gives_the_same_bytes_and_asks_for_nothing_from_outside(home, tmp_path):
    rows = records(fields(40), fields(30, "mae"), fields(29, "untrained"), fields(33, "<script>x"),
                   fields(39, metric="knn_top1_k10", condition={"k": 10}))  # fmt: skip
    for out in ("a", "b"):
        write_page(rows, tmp_path / out, notes=["a <b>note</b>"], papers=True)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {"report.html", "report.md", "report.csv"} <= {str(n) for n in names} and len(names) >= 7
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert not re.search(r"""(?:src|href)=["']?https?:|url\(['"]?http|@import""", page)
    assert "40.0 ± 2.9" in page and "(+11.0)" in page and "leads" in page


def test_an_empty_ledger_says_what_measures(home):
    done = report([], None, "html,md,csv", Console(stderr=True))
    assert "quickstart" in (home / "results/report/report.html").read_text() and done["numbers"] == 0


def test_bad_names_and_bad_lines_are_named(home):
    with pytest.raises(UserError, match="known: html, md, csv"):
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
