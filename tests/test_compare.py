"""`report --compare`: pairs by seed, one protocol at a time, and a test that scipy's and a hand's agree with."""

import json

import pytest
from rich.console import Console
from scipy import stats
from test_report import fields, pretrain, records

from sslbench import ledger
from sslbench.errors import UserError
from sslbench.report.compare import compare

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
