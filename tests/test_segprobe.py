"""Dense probes of patch tokens: each part against another formula, and the commands on real label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsRegressor
from torch import nn
from torch.nn import functional as F
from transfer_data import OWN_CLASSES, ade20k_part, own_maps, unpack

from sslbench import ledger
from sslbench.data.dense import open_dense
from sslbench.data.loader import held_out
from sslbench.errors import UserError
from sslbench.evaluate import patches
from sslbench.evaluate.evaluation import eval_recipe
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.finetune import resized
from sslbench.evaluate.linprobe import train_heads
from sslbench.evaluate.patches import (
    Frozen,
    answer,
    at_pixels,
    count_pixels,
    drawn_pixels,
    mean_iou,
    patch_labels,
    pixel_accuracy,
)
from sslbench.evaluate.segprobe import Linear, learn, remember, standardise, vote
from sslbench.stats import image_interval
from sslbench.vit import Parts, resample_positions

SUBJECT = "untrained:vit_micro4"
SMALL = ["--set", "science.crop=48"]
PIXELS = ["--set", "science.pixels=200"]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return own_maps(tmp_path_factory.mktemp("own") / "streets")


@pytest.fixture(scope="module")
def ade20k(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("ade")
    return ade20k_part(unpack(shared, "ade20k_real6", root), root / "ade3", train=3)


def frozen(crop=48, subject=SUBJECT):
    return Frozen(open_subject(subject), crop, torch.device("cpu"), 0)


# --------------------------------------------------------------------------------------------------- pixels and patches


@pytest.mark.parametrize("size", [(37, 50), (7, 5), (3, 20)])
def test_tokens_at_pixels_are_those_of_the_enlarged_map(size):
    maps = draws(6, 5, 7)
    rows, columns = (torch.randint(n, (40,)) for n in size)
    whole = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(at_pixels(maps, rows, columns, size), whole[:, rows, columns].T, atol=1e-5, rtol=1e-5)


def test_answers_are_those_of_the_enlarged_scores_in_any_blocks(monkeypatch):
    scores, size = draws(4, 5, 7), (61, 83)
    expected = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert answer(scores, size).equal(expected)
    monkeypatch.setattr(patches, "BLOCK", 4 * 83 * 7)
    assert answer(scores, size).equal(expected)


def test_only_pixels_that_count_are_drawn_and_none_where_there_are_none():
    classes = torch.full((9, 11), 255, dtype=torch.uint8)
    classes[2, 3:6] = 1
    rows, columns = drawn_pixels(classes, 50, torch.Generator().manual_seed(0))
    assert set(rows.tolist()) == {2} and set(columns.tolist()) == {3, 4, 5} and len(rows) == 50
    assert not len(drawn_pixels(torch.full((2, 2), 255), 50, torch.Generator())[0])


def test_labels_of_patches_are_shares_of_their_pixels():
    classes = torch.randint(0, 4, (13, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    classes[classes == 3] = 255
    classes[:5, :4] = 255
    found = patch_labels(classes, (3, 4), 3)
    for i in range(3):
        for j in range(4):
            its = [classes[r, c].item() for r in range(13) for c in range(10) if (r * 3 // 13, c * 4 // 10) == (i, j)]
            counted = [c for c in its if c != 255]
            expected = [counted.count(k) / len(counted) if counted else 0 for k in range(3)]
            assert found[4 * i + j].tolist() == pytest.approx(expected)
    assert not found[0].any()


# -------------------------------------------------------------------------------------------------------------- numbers


def test_counts_give_scikit_learns_iou_and_leave_out_what_does_not_count():
    draw = np.random.default_rng(0)
    truth, answered = draw.integers(0, 5, (2, 40, 50))
    truth[truth == 4] = 255
    counts = count_pixels(torch.from_numpy(answered), torch.from_numpy(truth), 7)
    counted = truth != 255
    expected = jaccard_score(truth[counted], answered[counted], average=None, labels=range(5))
    assert mean_iou(counts[0], counts[1]) == pytest.approx(100 * expected.mean())  # 4 is answered, 5 and 6 are not
    right = (truth == answered)[counted].mean()
    assert pixel_accuracy(counts[0], counts[2]) == pytest.approx(100 * right)


def test_the_interval_is_that_of_drawing_images_anew():
    draw = np.random.default_rng(0)
    truth = draw.integers(200, 400, (30, 4))
    both = (truth * draw.uniform(0.2, 0.9, (30, 1))).astype(int)
    stderr, (low, high) = image_interval(pixel_accuracy, both, truth)
    values = [pixel_accuracy(both[i].sum(0), truth[i].sum(0)) for i in draw.integers(0, 30, (4000, 30))]
    assert stderr == pytest.approx(np.std(values), rel=0.1)
    assert (low, high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.3 * stderr)
    assert image_interval(pixel_accuracy, both, truth) == (stderr, [low, high])
    assert image_interval(pixel_accuracy, both[:1], truth[:1]) == (None, None)


# --------------------------------------------------------------------------------------------------------------- linear


def test_a_head_learns_as_batch_norm_a_1x1_convolution_and_cross_entropy_of_the_enlarged_logits_do():
    """Three steps on all pixels of an image: momentum SGD by hand and torch's autograd, through F.interpolate."""
    maps, size, k, lr, steps = 2 + 3 * draws(6, 4, 5), (8, 10), 3, 50.0, 3
    classes = torch.randint(k, size, generator=torch.Generator().manual_seed(1))
    rows, columns = (at.flatten() for at in torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij"))
    x = at_pixels(maps, rows, columns, size)
    mean, std = standardise(x)
    n = len(x)
    rate = lr * n / 256
    (weight,), (bias,) = train_heads(x, classes[rows, columns], k, [lr / 100], steps, n, 0.9, 0.0, seed=0)
    conv = nn.Conv2d(6, k, 1)
    start = train_heads(x, classes[rows, columns], k, [0.0], 1, n, 0.9, 0.0, seed=0)
    with torch.no_grad():
        conv.weight.copy_(start[0][0].T[..., None, None])
        conv.bias.zero_()
    optimizer = torch.optim.SGD(conv.parameters(), rate / 100, momentum=0.9)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate / 100 * 0.5 * (1 + np.cos(np.pi * step / steps))
        logits = conv(((maps - mean[:, None, None]) / std[:, None, None])[None])
        loss = F.cross_entropy(F.interpolate(logits, size, mode="bilinear", align_corners=False), classes[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weight, conv.weight[:, :, 0, 0].T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(bias[0], conv.bias, atol=1e-4, rtol=1e-3)
    head = Linear(weight, bias[0], mean, std)
    torch.testing.assert_close(head(maps), logits_of(conv, maps, mean, std), atol=1e-3, rtol=1e-3)


def logits_of(conv, maps, mean, std):
    return conv(((maps - mean[:, None, None]) / std[:, None, None])[None])[0]


def test_standardising_is_batch_norm_over_all_pixels():
    x = 5 + 2 * draws(1000, 8)
    norm = nn.BatchNorm1d(8, eps=1e-12, affine=False)
    expected, before = norm(x), x.clone()
    mean, std = standardise(x)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((before - mean) / std, expected, atol=1e-4, rtol=1e-4)


def test_the_rate_is_chosen_on_a_tenth_of_train_by_a_head_that_has_not_seen_it(streets, monkeypatch):
    train, _ = open_dense("ade20k", streets)
    s = eval_recipe("segprobe", sets=["science.crop=48", "science.pixels=100", "science.lr=[1.0e-6,0.1]"]).science
    seen = []
    count = Frozen.count
    monkeypatch.setattr(Frozen, "count", lambda self, split, index, scores: (
        seen.append((split.source, index)), count(self, split, index, scores))[1])  # fmt: skip
    scores, condition = learn(frozen(), train, s, seed=0)
    ((source, index),) = seen
    assert source == train.source and len(index) == 1 and condition == {"lr": 0.1, "pixels": 600}
    tokens, classes = next(frozen().tokens(train, [0]))
    assert scores(tokens)[0].shape == (3, 12, 12) and classes.shape == (40, 48)


# ----------------------------------------------------------------------------------------------------------- neighbours


def test_votes_are_scikit_learns_neighbours_by_cosine():
    bank, shares, tokens = draws(80, 9), draws(80, 4, seed=1).softmax(1), draws(9, 3, 5, seed=2)
    near = KNeighborsRegressor(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1)).fit(bank, shares)
    expected = near.predict(tokens.flatten(1).T.numpy()).T.reshape(4, 3, 5)
    found = vote(tokens, F.normalize(bank, dim=1), shares, 7, 0.1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_the_bank_is_a_part_of_trains_patches_drawn_by_the_seed(streets):
    train, _ = open_dense("ade20k", streets)

    def bank(size, seed):
        s = eval_recipe("segknn", sets=["science.crop=48", f"science.bank={size}"]).science
        scores, condition = remember(frozen(), train, s, seed)
        return condition["bank"], scores(next(frozen().tokens(train, [0]))[0])[0]

    whole, part, again, other = bank(10**6, 0), bank(200, 0), bank(200, 0), bank(200, 1)
    assert whole[0] == 6 * 12 * 12 and part[0] == 200
    assert part[1].equal(again[1]) and not part[1].equal(other[1])
    torch.testing.assert_close(whole[1].sum(0), torch.ones(12, 12))


# ------------------------------------------------------------------------------------------------------------- commands


def test_the_encoder_sees_the_crop_of_the_recipe_with_its_positions_resampled(streets):
    subject, (train, _) = open_subject(SUBJECT), open_dense("ade20k", streets)
    small, large = frozen(24), frozen(48)
    assert small.encoder.grid == (6, 6) and large.encoder.grid == (12, 12)
    expected = resample_positions(subject.encoder.pos_embed, (6, 6), (12, 12))
    assert large.encoder.pos_embed.equal(expected) and small.encoder.pos_embed.equal(subject.encoder.pos_embed)
    tokens, _ = next(large.tokens(train, [0]))
    with Image.open(train.files[0]) as image:
        square = torch.from_numpy(np.array(image.convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (subject.mean, subject.std))
    with torch.inference_mode():
        x = resized(subject.encoder, 48)((square.permute(2, 0, 1)[None] / 255 - mean) / std)
    torch.testing.assert_close(tokens.flatten(1).T, x[0, 1:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("protocol", ["segprobe", "segknn"])
def test_a_probe_finds_what_its_tokens_tell_and_its_record_says_all_of_it(protocol, streets, invoke, tmp_path):
    command = [
        "eval",
        protocol,
        SUBJECT,
        "--data",
        streets,
        *SMALL,
        *(PIXELS if protocol == "segprobe" else []),
        "--json",
    ]
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    miou, aacc = ledger.read(tmp_path / "results/ledger")
    assert (miou.metric, aacc.metric) == (f"{protocol}_miou", f"{protocol}_aacc")
    assert miou.value > 45 and aacc.value > 60  # how bright a patch is; the largest class alone has 17 and 34
    assert miou.condition["interval"][0] < miou.value < miou.condition["interval"][1] and 0 < miou.stderr < 20
    assert miou.dataset == "streets" and miou.n == 3 and miou.protocol.name == protocol and miou.scale == "tiny"
    assert miou.condition["classes"] == len(OWN_CLASSES) and miou.weights_sha256 and miou.cost.wall_s > 0
    assert {k: v for k, v in found.items() if k != "pictures"} == miou.model_dump(mode="json")
    pictures = sorted(Path(found["pictures"]).glob("*.png"))
    assert len(pictures) == 3 and Path(found["pictures"]).parent == Path("results/pictures")
    with Image.open(pictures[0]) as picture:
        assert picture.width > 3 * 384 and picture.height > 320
    again = json.loads(invoke(*command).stdout)
    assert again["value"] == found["value"] and again["protocol"] == found["protocol"]
    other = json.loads(invoke(*command, "--set", "science.crop=24").stdout)
    assert other["protocol"]["hash"] != found["protocol"]["hash"]


def test_the_probes_read_ade20k_as_it_is_published(ade20k, invoke):
    for protocol in ("segprobe", "segknn"):
        done = invoke(
            "eval", protocol, "untrained:vit_ti16", "--data", f"ade20k:{ade20k}", "--set", "science.crop=64", "--json"
        )
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["dataset"] == "ade3" and 0 < found["value"] < 100 and found["n"] == 2
        assert found["data_fingerprint"] == open_dense("ade20k", ade20k)[1].fingerprint


def test_what_cannot_be_is_one_message_with_status_2(streets, invoke, tmp_path):
    one, blank = own_maps(tmp_path / "one", train=1), own_maps(tmp_path / "blank", train=2)
    tenth = sorted((blank / "annotations/train").rglob("*.png"))[int(held_out(2)[1])]
    Image.fromarray(np.full((40, 48), 255, np.uint8)).save(tenth)
    for words, says in (
        (["--data", streets, "--set", "science.crop=50"], "science.crop=50 is not a multiple of the patch, 4"),
        (["--data", "nowhere"], "no ade20k data set (looked for nowhere)"),
        ([], "SSLBENCH_DATA is not set"),
        (["--data", one, *SMALL], "has one image; to choose a learning rate takes two or more"),
        (["--data", blank, *SMALL], "no pixel counts in the tenth that is held out, 1 images"),
        (["--data", streets, "--set", "science.lr=[]"], "science.lr"),
    ):
        done = invoke("eval", "segprobe", SUBJECT, *words)
        assert done.exit_code == 2 and says in done.stderr.replace("\n", " "), done.stderr
        assert not (tmp_path / "results").exists()


def test_an_encoder_of_relative_positions_keeps_its_size():
    subject = open_subject(SUBJECT)
    subject.encoder.parts = Parts(relative=True)
    with pytest.raises(UserError, match=r"relative positions are for images of 24 pixels, not 48; set science.crop=24"):
        Frozen(subject, 48, torch.device("cpu"), 0)
