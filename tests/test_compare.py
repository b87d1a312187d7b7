"""`report --compare`: pairs by seed, one protocol at a time, and a test that scipy's and a hand's agree with."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from test_report import fields, pretrain, records

from sslbench import ledger
from sslbench.errors import UserError
from sslbench.report.compare import compare
from sslbench.report.equal import alone, as_rows, equal
from sslbench.report.tables import summary, tables
from sslbench.stats import holm

QUIET = Console(quiet=True)
A, B = [40.0, 42.5, 41.0], [38.0, 41.5, 38.5]


@pytest.fixture
def two_methods(home):
    rows = []
    for method, values in (("ocl", A), ("mae", B)):
        for seed, value in enumerate(values):
            run = f"{method}_x_abc" + (f"_s{seed}" if seed else "")
            rows.append(fields(value, method, seed, pretrain=pretrain(recipe_hash=method * 2, run=run)))
    rows.append(fields(99.0, "mae", 7, pretrain=pretrain(recipe_hash="maemae", run="mae_x_abc_s7")))  # no partner
    other = {"name": "knn_cls", "hash": "another"}
    rows.append(fields(10.0, "mae", 0, protocol=other, pretrain=pretrain(recipe_hash="maemae", run="mae_x_abc")))
    return records(*rows)


@pytest.mark.parametrize(("a", "b"), [("ocl", "mae"), ("ocl_x_abc_s2", "runs/mae_x_abc/"), ("oclocl", "maemae")])
def test_seeds_are_paired_and_tested_as_scipy_does(two_methods, a, b):
    (row,) = compare(a, b, two_methods, QUIET)["rows"]
    assert row["seeds"] == [0, 1, 2] and row["test"] == "paired t, 3 seeds"
    assert (row["a"], row["b"]) == (pytest.approx(41.1666667), pytest.approx(39.3333333))
    expected = stats.ttest_rel(A, B)
    assert row["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert row["difference"] - row["half_width"] == pytest.approx(interval.low)
    assert row["difference"] + row["half_width"] == pytest.approx(interval.high)


def test_one_seed_is_tested_by_its_images(home):
    found = records(fields(40, "ocl"), fields(36, "mae"))
    (row,) = compare("ocl", "mae", found, QUIET)["rows"]
    assert row["test"] == "z, 1 seed" and row["half_width"] == pytest.approx(1.959964 * 1.5 * 2**0.5, rel=1e-5)
    assert row["p"] == pytest.approx(2 * stats.norm.sf(4 / (1.5 * 2**0.5)))


def test_equal_differences_have_no_p(home):
    found = records(*(fields(v + 10 * s, m, s) for s in (0, 1) for m, v in (("ocl", 40), ("mae", 39))))
    (row,) = compare("ocl", "mae", found, QUIET)["rows"]
    assert row["p"] is None and row["difference"] == 1 and row["half_width"] == pytest.approx(0)


def test_what_cannot_be_compared_is_said(home, two_methods):
    with pytest.raises(UserError, match="no number of 'oci'; did you mean 'ocl'"):
        compare("oci", "mae", two_methods, QUIET)
    more = records(fields(50, "ocl", pretrain=pretrain(recipe_hash="second", run="ocl_y_def")))
    with pytest.raises(UserError, match="'ocl' is 2 recipes in the ledger; name one by its run: ocl_x_abc, ocl_y_def"):
        compare("ocl", "mae", two_methods + more, QUIET)
    apart = records(fields(1, "asl", protocol={"name": "knn_cls", "hash": "third"}))
    with pytest.raises(UserError, match="no number under the same protocol"):
        compare("asl", "mae", two_methods + apart, QUIET)


def test_the_command_fits_80_columns(invoke, two_methods, tmp_path):
    done = invoke("report", "--compare", "ocl", "mae", columns=80)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "+1.8 ± 1.9" in done.output and "paired t, 3 seeds" in done.output
    answer = json.loads(invoke("report", "--compare", "ocl", "mae", "--json").stdout.splitlines()[-1])
    assert answer["rows"][0]["seeds"] == [0, 1, 2]
    assert invoke("report", "--compare", "ocl", "nobody").exit_code == 2
    assert len(ledger.read()) == 8


# ------------------------------------------------------------------------------------------------ at equal budgets


def runs(method, epochs, seconds, flops, values, device="cpu"):
    return [
        fields(v, method, seed, pretrain=pretrain(recipe_hash=method, epochs=epochs), hardware={"device": device},
               cost={**fields()["cost"], "wall_s": seconds, "device_hours": seconds / 3600, "flops": flops})
        for seed, v in enumerate(values)
    ]  # fmt: skip


def equals(*of_methods):
    (table,) = tables(records(*(f for method in of_methods for f in method), fields(29, "untrained")))
    return table, equal(table)


def test_only_equal_budgets_are_compared_and_the_rest_is_named(home):
    table, (epochs, on_cpu, on_gpu, flops) = equals(
        runs("ocl", 10, 100, 5e12, A), runs("mae", 10, 109, 9e12, B), runs("asl", 20, 300, 5.5e12, A),
        runs("ccmim", 20, 100, None, A, "gpu"),
    )  # fmt: skip
    together = [[[row.label for row in g.rows] for g in e.groups] for e in (epochs, on_cpu, on_gpu, flops)]
    assert together == [[["mae", "ocl"], ["asl", "ccmim"]], [["mae", "ocl"]], [], [["asl", "ocl"]]]
    assert flops.alone == ["ccmim (none known)", "mae (9.0 TFLOP)"] and "asl (300 s)" in alone(on_cpu)
    assert alone(epochs) == "" and "cpu" in on_cpu.title and on_cpu.groups[0].budget == "100 to 109 s"
    assert summary(table) == ["Epochs differ, from 10 to 20: the table ranks no method."]


def test_differences_are_those_of_scipys_paired_test_after_holm(home):
    c = [30.0, 31.0, 35.0]
    _, (epochs, *_) = equals(
        runs("ocl", 10, 100, 5e12, A), runs("mae", 10, 100, 5e12, B), runs("asl", 10, 100, 5e12, c)
    )
    (group,) = epochs.groups
    header, rows = as_rows(group)
    assert header == ["10 ep", "k-NN, cls"] and [row[0] for row in rows] == [
        "asl", "mae", "ocl", "asl - mae", "asl - ocl", "mae - ocl"
    ]  # fmt: skip
    ps = [stats.ttest_rel(x, y).pvalue for x, y in ((c, B), (c, A), (B, A))]
    first, second, third = sorted(ps)
    corrected = [3 * first, max(3 * first, 2 * second), max(3 * first, 2 * second, third)]
    assert [row[1].split("p ")[1] for row in rows[3:]] == [f"{corrected[sorted(ps).index(p)]:.2g}" for p in ps]
    assert rows[5][1].startswith("-1.8 ± 1.9")
    one_seed = equals(runs("ocl", 5, 100, 5e12, A[:1]), runs("mae", 5, 100, 5e12, B[:1]))[1][0].groups[-1]
    assert one_seed.pairs == [("mae - ocl", {"k-NN, cls": "-2.0"})]


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_keeps_the_order_and_never_lowers_a_p(ps):
    out = holm(dict(enumerate(ps)))
    assert all(p <= out[i] <= 1 for i, p in enumerate(ps))
    assert all(out[i] <= out[j] for i, p in enumerate(ps) for j, q in enumerate(ps) if p < q)
    assert out == {} or min(out.values()) == min(1, len(ps) * min(ps))
