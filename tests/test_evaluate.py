"""k-NN and linear probe against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from sslbench.data import open_split
from sslbench.data.images import MemoryImages
from sslbench.evaluate.evaluation import eval_recipe, evaluate
from sslbench.evaluate.features import extract, open_subject, view_of
from sslbench.evaluate.linprobe import linear_right
from sslbench.knn import knn_top1
from sslbench.views import VIEW

PROBE = {
    "lrs": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    "epochs": 90,
    "batch_size": 1024,
    "momentum": 0.9,
    "weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    import os

    os.environ["SSLBENCH_HOME"] = str(tmp_path_factory.mktemp("features"))
    subject = open_subject("untrained:vit_mini4", 0, 16)
    train, val = open_split("builtin", "train"), open_split("builtin", "val")
    x, y = (extract(subject, d, torch.device("cpu"), 0, "mean") for d in (train, val))
    again = extract(subject, val, torch.device("cpu"), 0, "mean")  # from the cache
    del os.environ["SSLBENCH_HOME"]
    assert again.equal(y)
    return x, train.labels, y, val.labels


@pytest.mark.parametrize("k", [10, 20])
def test_knn_is_scikit_learns_with_dinos_weights(features, k):
    x, labels, y, truth = features
    distance_to_weight = lambda d: np.exp((1 - d) / 0.07)  # noqa: E731
    model = KNeighborsClassifier(k, metric="cosine", weights=distance_to_weight, algorithm="brute")
    expected = 100 * model.fit(normalize(x.numpy()), labels).score(normalize(y.numpy()), truth)
    assert knn_top1(x, labels, y, truth, [k])[k] == pytest.approx(expected, abs=0.2)  # ties round differently
    assert knn_top1(x, labels, y, truth, [k], chunk=77) == knn_top1(x, labels, y, truth, [k])


def linear_top1(*args, **settings):
    right, lr = linear_right(*args, **settings)
    return 100 * right.double().mean().item(), lr


def test_the_linear_probe_reaches_logistic_regression_within_its_standard_error(features):
    x, labels, y, truth = features
    mean, std = x.mean(0), x.std(0)
    reference = LogisticRegression(C=0.1, max_iter=2000).fit((x - mean) / std, labels)
    expected = 100 * reference.score((y - mean) / std, truth)
    got, _ = linear_top1(x, labels, y, truth, seed=0, **PROBE)
    assert got > expected - 100 * (0.4 * 0.6 / 1000) ** 0.5


def test_the_learning_rate_is_chosen_without_a_look_at_val(features):
    x, labels, y, truth = features
    settings = {**PROBE, "epochs": 5}
    _, a = linear_top1(x, labels, y, truth, seed=0, **settings)
    _, b = linear_top1(x, labels, y, truth.roll(1), seed=0, **settings)
    assert a == b
    assert linear_top1(x, labels, y, truth, seed=0, **settings) == linear_top1(x, labels, y, truth, seed=0, **settings)


@pytest.mark.slow
def test_the_law_of_the_view_is_in_a_protocols_hash_where_its_versions_differ(image_folder, few_images, home):
    """The ledger's numbers of CIFAR, 32 pixels seen at 24 or as they are, keep the hash that they have."""
    ours = [evaluate(eval_recipe("knn"), f"untrained:vit_mini4@{n}", "builtin")[0].protocol.hash for n in (24, 32, 40)]
    assert ours[:2] == ["6ffc6d953bfc", "20d6f4ea4f1f"] and len(set(ours)) == 3
    files, memory = open_split(f"folder:{image_folder}", "val"), open_split("builtin", "val")
    wide = MemoryImages("wide", "val", memory.images[:, :, :20], memory.labels, memory.classes)
    assert view_of(32, files, memory) == view_of(24, files, wide) == {}
    assert view_of(40, files) == view_of(32, memory, wide) == view_of(224, memory) == {"view": VIEW}
