"""What a study says of its rows: intervals over seeds and images, paired tests, and no more words than they carry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sslbench.errors import UserError
from sslbench.stats import crossed_interval, holm, mcnemar
from sslbench.study.budget import parse_budget, within
from sslbench.study.rank import Numbers, rank
from sslbench.study.spec import TRIAL_SEED, Study, check, study_of


def rows(*means, seeds=3, n=400, noise=0.5, kept=True):
    """Rows a, b, .. of those accuracies in percent; each seed is off by about `noise` points."""
    r, out = np.random.default_rng(0), []
    for name, mean in zip("abcdef", means, strict=False):
        numbers = Numbers(name, {}, 2.0)
        for s in range(seeds):
            right = np.arange(n) < (mean + noise * r.standard_normal()) * n / 100
            numbers.by_seed[s] = 100 * right.mean()
            if kept:
                numbers.right[s] = right
        out.append(numbers)
    return out


def test_mcnemar_is_the_exact_binomial_test_of_the_images_on_which_two_runs_differ():
    a = np.array([1] * 12 + [0] * 3 + [1] * 5, bool)
    b = np.array([0] * 12 + [1] * 3 + [1] * 5, bool)
    assert mcnemar(a, b) == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5)) == mcnemar(b, a)
    assert mcnemar(a, a) == 1


def test_the_interval_counts_seeds_and_images_both():
    """Against the variance that is known: of seeds, of images, and of both in a table of normal numbers."""
    r = np.random.default_rng(1)
    seeds, images = r.standard_normal((40, 1)), r.standard_normal((1, 300))
    for of_seeds, of_images in ((1.0, 0.0), (0.0, 1.0), (1.0, 3.0)):
        low, high = crossed_interval(of_seeds * seeds + of_images * images)
        expected = np.hypot(of_seeds * seeds.std() / 40**0.5, of_images * images.std() / 300**0.5)
        assert (high - low) / 3.92 == pytest.approx(expected, rel=0.15)
    one = crossed_interval(images)
    assert (one[1] - one[0]) / 3.92 == pytest.approx(images.std() / 300**0.5, rel=0.15)
    assert crossed_interval(images) == one  # the same every time


def test_rows_are_ranked_and_their_differences_tested_over_the_seeds():
    r = rank("10epochs", "knn_mean", rows(40, 50, 40.2), "k-NN, mean")
    assert [s.row for s in r.rows] == ["b", "c", "a"] and r.rows[0].over == "seeds and images"
    given_ = {n.row: np.array([*n.by_seed.values()]) for n in rows(40, 50, 40.2)}
    table = np.stack([*given_.values()])  # rows x seeds, with the error of the two-way table without interaction
    design = np.concatenate([np.kron(np.eye(3), np.ones((3, 1))), np.kron(np.ones((3, 1)), np.eye(3))], axis=1)
    left = table.ravel() - design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
    error = (2 * (left @ left) / 4 / 3) ** 0.5
    ps = {(x, y): 2 * stats.t.sf(abs(given_[x].mean() - given_[y].mean()) / error, 4) for x, y in r.pairs}
    assert {k: d.p for k, d in r.pairs.items()} == pytest.approx(holm(ps))
    two = rank("10epochs", "knn_mean", rows(40, 50)).pairs["b", "a"]
    assert two.p == pytest.approx(stats.ttest_rel(given_["b"], given_["a"]).pvalue) and "paired t" in two.test
    forth, back = r.between("b", "a"), r.between("a", "b")
    assert forth.value == -back.value > 8 and (forth.low, forth.high) == (-back.high, -back.low)
    assert forth.told_apart and not r.between("c", "a").told_apart
    assert r.sentence == (
        "At 10epochs, by k-NN, mean, over 3 seeds, b is above c and a (p < 0.05 after Holm); not told apart: c from a."
    )


def test_fewer_than_three_seeds_do_not_rank():
    for seeds, test in ((2, "paired t, 2 seeds"), (1, "exact McNemar, 1 seed")):
        r = rank("10epochs", "knn_mean", rows(30, 60, seeds=seeds))
        assert "not enough seeds to rank" in r.sentence and "above" not in r.sentence
        assert r.pairs["b", "a"].test == test
    assert rank("", "m", rows(30)).sentence == "One row: nothing to compare."


def test_without_kept_images_the_interval_is_students():
    two = rows(30, 60, kept=False)
    r = rank("10epochs", "knn_mean", two)
    difference = r.pairs["b", "a"]
    expected = stats.ttest_rel([*two[1].by_seed.values()], [*two[0].by_seed.values()]).confidence_interval(0.95)
    assert r.rows[0].over == "seeds" and (difference.low, difference.high) == pytest.approx(expected)


def test_equal_rows_are_not_told_apart_and_the_sentence_says_so():
    r = rank("1PFLOP", "knn_mean", rows(40, 40, 40))
    assert r.sentence == "At 1PFLOP, by knn_mean, over 3 seeds, none of the 3 pairs can be told apart."


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(5, 95), min_size=2, max_size=4), st.integers(3, 5))
def test_no_pair_is_told_apart_against_its_own_interval(means, seeds):
    r = rank("b", "m", rows(*means, seeds=seeds, n=60, noise=3))
    values = [s.value for s in r.rows]
    assert values == sorted(values, reverse=True)
    for d in r.pairs.values():
        assert not d.told_apart or (d.p < 0.05 and (d.low > 0 or d.high < 0))


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("100TFLOP", "flops", 1e14), ("1.5 PFLOP", "flops", 1.5e15), ("10epochs", "epochs", 10),
     ("20min", "device_s", 1200), ("2h", "device_s", 7200), ("5e5images", "images", 5e5)],
)  # fmt: skip
def test_budgets_are_read(text, kind, amount):
    found = parse_budget(text)
    assert (found.kind, found.amount) == (kind, amount)


@pytest.mark.parametrize("text", ["100", "TFLOP", "10 parsecs", "-3epochs", "0min", "1e400TFLOP", ""])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)


def test_equal_flops_are_equal_within_a_step():
    from sslbench.recipe import compose, length
    from sslbench.train.build import flops_per_image

    budget = parse_budget("30TFLOP")
    for method in ("mae", "ocl", "mocov3"):
        recipe = compose(method, science={"data": {"spec": "builtin"}})
        per_image = flops_per_image(recipe)
        found = within(recipe, budget, 0.1, per_image)
        step = per_image * found.science.batch_size
        assert abs(length(found)[2] * step - 30e12) <= step / 2
        assert found.science.optim.warmup_epochs == pytest.approx(0.1 * found.science.epochs)
    with pytest.raises(UserError, match="less than one step"):
        within(recipe, parse_budget("1GFLOP"), 0.1, per_image)
    with pytest.raises(UserError, match="counts no FLOPs"):
        within(recipe, budget, 0.1, 0.0)


def study(**more):
    return check(Study.model_validate({"name": "s", "rows": {"mae": {}, "ocl": {}}, **more}))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"controls": ["mea"]}, "did you mean 'mae'"),
        ({"budgets": ["1epochs", "1 epoch"]}, "stands twice"),
        ({"budgets": ["1epochs", "1TFLOP"]}, "several kinds"),
        ({"rows": {"oci": {}}}, "unknown method 'oci'"),
        ({"tune": {"lr_factors": [1, 1]}}, "a factor twice"),
    ],
)
def test_what_is_wrong_in_a_study_is_one_message(more, says):
    with pytest.raises(UserError, match=says):
        study(**more)


def test_seeds_are_numbers_that_do_not_repeat():
    assert study(seeds=3).seeds_at(None) == [0, 1, 2] and study(seeds=[4, 2]).seeds_at(None) == [4, 2]
    by_budget = study(budgets=["1epochs", "4epochs"], seeds={"1epochs": 5, "4 epochs": 3})
    assert [len(by_budget.seeds_at(parse_budget(b))) for b in by_budget.budgets] == [5, 3]
    for wrong in ([1, 1], [], [-1], [TRIAL_SEED]):
        with pytest.raises(UserError, match="seeds"):
            study(seeds=wrong).seeds_at(None)


def test_rows_of_the_command_line_need_a_budget_and_different_names():
    with pytest.raises(UserError, match="needs a --budget"):
        study_of(["mae"], [], 1, None)
    with pytest.raises(UserError, match="'mae' twice"):
        study_of(["mae", "mae"], ["1epochs"], 1, None)
    assert (
        study_of(["mae", "ocl"], ["1epochs"], 3, None).hash() == study_of(["mae", "ocl"], ["1epochs"], 3, None).hash()
    )
