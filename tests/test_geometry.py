"""Label-free numbers of features: each against another formula, and from the command into the ledger and the report."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslbench import ledger
from sslbench.data import open_split, subset
from sslbench.evaluate.evaluation import eval_recipe, protocol_of
from sslbench.geometry import alignment, cka, effective_rank, spread, uniformity
from sslbench.report.page import write_page
from sslbench.train.diagnose import collapse

RUN, OTHER = "untrained:vit_micro4@8", "untrained:vit_mini4@8"


@pytest.fixture(scope="module")
def features():
    """Of a wide spectrum and a mean far from 0, as features have them."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=draws, dtype=torch.float64)
    return x * torch.linspace(0.1, 3, 12, dtype=torch.float64) + 2


def test_rankme_is_the_entropy_of_singular_values_by_numpy(features):
    singular = np.linalg.svd(features.numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7  # as published
    assert effective_rank(features).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-4)


def test_the_rank_of_equal_directions_is_their_number_and_a_shared_mean_counts_only_uncentred():
    x = torch.eye(6, dtype=torch.float64).repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(6)[:, None]
    assert effective_rank(x).item() == pytest.approx(6)
    moved = x + 1000
    assert effective_rank(moved).item() < 1.1 and effective_rank(moved - moved.mean(0)).item() == pytest.approx(6)


def test_linear_cka_is_hsic_of_gram_matrices(features):
    draws = torch.Generator().manual_seed(1)
    other = features @ torch.randn(12, 7, generator=draws, dtype=torch.float64) + torch.randn(60, 7, generator=draws)
    n = len(features)
    centring = np.eye(n) - 1 / n
    k, m = (centring @ (x.numpy() @ x.numpy().T) @ centring for x in (features, other))
    expected = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert 0.05 < expected < 0.95 and cka(features, other).item() == pytest.approx(expected, abs=1e-10)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=draws, dtype=torch.float64))[0]
    assert cka(features, 3 * features @ rotation + 5).item() == pytest.approx(1, abs=1e-10)


def test_uniformity_and_alignment_are_loops_over_pairs(features, monkeypatch):
    unit, n = F.normalize(features, dim=1), len(features)
    pairs = [(-2 * (unit[i] - unit[j]).square().sum()).exp() for i in range(n) for j in range(i)]
    value, _ = uniformity(features)
    assert value.item() == pytest.approx(torch.stack(pairs).mean().log().item(), abs=1e-10)
    monkeypatch.setattr("sslbench.geometry.PAIRS", 7 * n)  # in blocks of seven rows
    assert uniformity(features)[0].item() == pytest.approx(value.item(), abs=1e-12)
    near = features + 0.3
    own = [(F.normalize(a, dim=0) - F.normalize(b, dim=0)).square().sum() for a, b in zip(features, near, strict=True)]
    mean, error = alignment(features, near)
    assert mean.item() == pytest.approx(torch.stack(own).mean().item(), abs=1e-12)
    assert error.item() == pytest.approx(torch.stack(own).std().item() / n**0.5, abs=1e-12)


def test_the_error_of_uniformity_is_the_spread_over_sets_of_images():
    """The standard deviation over 400 draws of 80 images, of which it knows one."""
    draws = torch.Generator().manual_seed(3)
    found = [uniformity(torch.randn(80, 3, generator=draws) + 1) for _ in range(400)]
    values, errors = (torch.stack(x) for x in zip(*found, strict=True))
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)


def test_a_runs_meters_are_the_ledgers_numbers(features):
    meters = collapse(features)
    expected = {
        "feature_std": spread(features),
        "effective_rank": effective_rank(features - features.mean(0)),
        "uniformity": (-2 * torch.pdist(F.normalize(features, dim=1)) ** 2).exp().mean().log(),
    }
    assert meters.keys() == expected.keys()
    for name, value in expected.items():
        assert meters[name].item() == pytest.approx(value.item(), abs=1e-10), name


def test_the_command_measures_without_labels_and_the_report_has_no_percent_of_it(invoke, few_images, monkeypatch, home):
    unlabelled = lambda spec, split: replace(open_split(spec, split), labels=None)  # noqa: E731
    monkeypatch.setattr("sslbench.evaluate.describe.open_split", unlabelled)
    done = invoke("eval", "geometry", RUN, "--with", OTHER, "--data", "builtin", "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    records = {r.metric: r for r in ledger.read()}
    assert {m: r.value for m, r in records.items()} == answer["numbers"] and answer["metric"] == "rankme"
    assert records.keys() == {*ledger.GEOMETRY} and all(r.n == 125 for r in records.values())
    assert 1 <= records["effective_rank"].value <= 96 and records["uniformity"].value < 0 <= records["alignment"].value
    assert records["uniformity"].stderr > 0 and records["alignment"].stderr > 0
    assert records["cka"].stderr is records["rankme"].stderr is None and 0 < records["cka"].value < 1
    assert records["cka"].condition["with"] == OTHER and "random crops" in records["alignment"].condition["views"]
    of_one, of_two = (records[m].protocol for m in ("rankme", "cka"))
    assert of_one.name == "geometry_cls" and of_two.name == f"geometry_cls_with_{OTHER}" and of_one.hash != of_two.hash
    invoke("eval", "knn", RUN, "--data", "builtin", "--set", "science.k=[5,20]")
    write_page(ledger.read(), home / "report")
    page = (home / "report" / "report.html").read_text()
    other = page[page.index('id="other-numbers"') : page.index('id="provenance"')]
    assert "Of the features of val" in other and f">{records['rankme'].value:.2f}<" in other and "k=5" in other
    shown = page[page.index(f'id="{records["rankme"].id}"') :].split("</details>")[0]
    assert f"rankme {records['rankme'].value:.2f}, standard error unknown" in shown and "%" not in shown
    csv = (home / "report" / "report.csv").read_text()
    assert ",uniformity," in csv and ",cka," in csv
    again = invoke("eval", "geometry", RUN, "--with", OTHER, "--data", "builtin", "--json")
    assert json.loads(again.stdout.splitlines()[-1])["numbers"] == answer["numbers"]


def test_another_crop_is_another_protocol_and_val_alone_is_looked_at(home):
    recipes = [eval_recipe("geometry", sets=s) for s in ([], ["science.crop_scale=[0.5,1]"], ["science.pool=mean"])]
    val = open_split("builtin", "val")
    assert len({protocol_of(r, "cls", 32, val)["hash"] for r in recipes}) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((RUN,), "does not say what data"),
        ((RUN, "--data", "builtin", "--with", "nothing"), "no run folder and no weights file at nothing"),
        ((RUN, "--data", "builtin", "--recipe", "knn"), "is of protocol knn, not geometry"),
        ((RUN, "--data", "builtin", "--set", "science.crop=1"), "unknown key 'science.crop'"),
        ((RUN, "--data", "builtin", "--set", "science.crop_scale=[0,1]"), "crop_scale"),
    ],
)
def test_what_is_wrong_is_said(invoke, few_images, words, says):
    done = invoke("eval", "geometry", *words)
    assert done.exit_code == 2 and says in done.stderr, done.stderr


def test_one_image_alone_has_no_geometry(invoke, monkeypatch):
    monkeypatch.setattr("sslbench.evaluate.describe.open_split", lambda *a: subset(open_split(*a), torch.tensor([3])))
    done = invoke("eval", "geometry", RUN, "--data", "builtin")
    assert done.exit_code == 2 and "val has 1 image" in done.stderr
