"""The attentive probe by hand and against attention with heads; and probing and fine-tuning with few labels."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from sslbench import ledger, right
from sslbench.data import open_split, subset
from sslbench.errors import UserError
from sslbench.evaluate.attentive import Attentive, AttentiveJob, AttentiveProbe, Head, gather
from sslbench.evaluate.evaluation import eval_recipe, evaluate
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.finetune import FinetuneJob
from sslbench.evaluate.labels import list_facts, list_of
from sslbench.evaluate.linprobe import linear_right
from sslbench.evaluate.probe import ProbeJob
from sslbench.recipe import Augment
from sslbench.vit import Arch, VisionTransformer, split_heads

RUN, SMALL = "untrained:vit_mini4@16", "untrained:vit_micro4@8"  # of 16 patches, of 4
QUICK = ["science.epochs=1", "science.batch_size=50", "science.warmup_epochs=0", "machine.workers=0",
         "machine.tensorboard=false"]  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe_of(dim, queries, rates=(1e-2,), classes=4):
    """Attentive heads on an encoder of that width."""
    encoder = VisionTransformer(Arch(patch=8, dim=dim, depth=1, heads=1, image=16))
    return AttentiveProbe(Attentive(protocol="attentive", queries=queries, lr=rates), encoder, Augment(), classes)


@pytest.mark.parametrize("training", [True, False])
def test_attentive_logits_are_the_hand_calculation(training):
    """Two heads of four queries, loop by loop, and BatchNorm of three images or by what it has seen."""
    (B, N, D), (L, M, K) = (3, 5, 8), (2, 4, 4)
    model = probe_of(D, M, (1e-2, 1e-3), K).double().train(training)
    for seed, p in enumerate(model.heads.parameters(), 1):
        p.data.copy_(drawn(*p.shape, seed=seed))
    model.norm.running_mean.copy_(drawn(L * D, seed=20))
    model.norm.running_var.copy_(drawn(L * D, seed=21).square() + 0.1)
    x, means, variances = drawn(B, N, D), model.norm.running_mean.tolist(), model.norm.running_var.tolist()
    got = model.read(x)
    for number, head in enumerate(model.heads):
        q, v, w, b = (t.detach() for t in (head.queries, head.values, head.weight, head.bias))
        z = []
        for image in range(B):
            z.append([])
            for m in range(M):
                scores = [sum(float(q[m, d] * x[image, n, d]) for d in range(D)) / math.sqrt(D) for n in range(N)]
                share = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
                gathered = [sum(share[n] * float(x[image, n, d]) for n in range(N)) for d in range(D)]
                z[-1] += [sum(float(v[m, e, d]) * gathered[d] for d in range(D)) for e in range(D // M)]
        for image in range(B):
            normal = []
            for d in range(D):
                mean = sum(z[i][d] for i in range(B)) / B if training else means[number * D + d]
                var = sum((z[i][d] - mean) ** 2 for i in range(B)) / B if training else variances[number * D + d]
                normal.append((z[image][d] - mean) / math.sqrt(var + 1e-6))
            for k in range(K):
                expected = sum(float(w[k, d]) * normal[d] for d in range(D)) + float(b[k])
                assert abs(got[number, image, k].item() - expected) < 1e-8


def test_it_is_cross_attention_with_one_query_of_as_many_heads():
    """The key projection, of which the module's head says that it is redundant, goes into the queries."""
    B, N, D, M = 3, 7, 12, 4
    x, query, keys, values = drawn(B, N, D), drawn(D, seed=1), drawn(D, D, seed=2), drawn(D, D, seed=3)
    heads = [split_heads(t, M) for t in (query.expand(B, 1, D), x @ keys.T, x @ values.T)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1)
    ours = torch.einsum("me,med->md", query.view(M, -1), keys.view(M, -1, D)) * M**0.5
    found = torch.einsum("bmd,med->bme", gather(x, ours[None])[:, 0], values.view(M, -1, D)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def in_one_patch(n, seed):
    """Tokens (n, 16, 32), labels (n,): every patch shows a class, and the one that is marked, anywhere, the image's."""
    draws = torch.Generator().manual_seed(seed)
    shown = torch.randint(10, (n, 16), generator=draws)
    at = torch.randint(16, (n, 1), generator=draws)
    tokens = torch.zeros(n, 16, 32)
    tokens[..., :10] = F.one_hot(shown, 10).float()
    tokens[..., 10].scatter_(1, at, 1.0)
    return 2 * tokens + 0.2 * torch.randn(n, 16, 32, generator=draws), shown.gather(1, at)[:, 0]


def test_a_label_in_one_patch_is_read_and_a_linear_probe_of_the_mean_reads_little_of_it():
    (x, y), (val, truth) = in_one_patch(2000, 0), in_one_patch(500, 1)
    torch.manual_seed(0)
    model = probe_of(32, 4, classes=10).train()
    optimizer = torch.optim.AdamW(model.heads.parameters(), lr=3e-2)
    for step in range(200):
        index = torch.randint(2000, (200,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model.read(x[index])[0], y[index]).backward()
        optimizer.step()
    found = model.eval().read(val)[0].argmax(1) == truth
    settings = {"lrs": [0.1, 1.0], "epochs": 20, "batch_size": 200, "momentum": 0.9, "weight_decay": 0.0, "seed": 0}
    linear, _ = linear_right(x.mean(1), y, val.mean(1), truth, **settings)
    assert found.float().mean() > 0.95 and linear.float().mean() < 0.5


def test_heads_start_alike_and_the_encoder_stays_as_it_was():
    subject, data = open_subject(RUN), open_split("builtin", "train")
    before = {k: v.clone() for k, v in subject.encoder.state_dict().items()}
    model = AttentiveProbe(Attentive(protocol="attentive"), subject.encoder, Augment(), 10).train()
    logits = model.logits(torch.zeros(2, 3, 16, 16))
    assert logits.shape == (7, 2, 10) and all(x.equal(logits[0]) for x in logits) and not model.encoder.training
    views = model.build_views(data.images[:8], torch.Generator().manual_seed(0), data.labels[:8])
    model.loss(model(views))["loss"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.heads.parameters())
    assert all(before[k].equal(v) for k, v in model.encoder.state_dict().items())


def test_the_command_learns_keeps_what_it_had_right_and_gives_its_number_again(invoke, few_images):
    sets = [x for pair in zip(["--set"] * len(QUICK), QUICK, strict=True) for x in pair]
    command = ["eval", "attentive", SMALL, "--data", "builtin", *sets, "--set", "science.epochs=10", "--json"]
    done, again = invoke(*command), invoke(*command)
    assert done.exit_code == 0 and again.stdout == done.stdout and "is finished" in again.stderr, done.stderr
    record = ledger.checked(json.loads(done.stdout.splitlines()[-1]))
    assert record.metric == "attentive_top1" and record.protocol.name == "attentive_tokens" and record.n == 125
    assert record.value > 10 + 2.5 * record.stderr and record.condition["lr"] in Attentive(protocol="attentive").lr
    assert right.read([record.id])[record.id].mean() == pytest.approx(record.value / 100)
    assert record.head_sha256 and record.cost.flops > 0 and record.pretrain.run is None


def test_flops_are_the_encoders_forward_and_the_heads_both_ways(few_images):
    def flops(*sets):
        recipe = eval_recipe("attentive", sets=list(sets))
        train = open_split("builtin", "train")
        return AttentiveJob(recipe, open_subject(RUN), "builtin", train, "tokens", 0).flops_per_image()

    one, two = flops("science.lr=[1e-3]"), flops("science.lr=[1e-3,1e-2]")
    n, d, m, k = 17, 192, 32, 10
    products = 2 * (2 * m * n * d + d * d + k * d)  # of one head, forward: scores, gathering, values, classes
    assert 2 * products < two - one < 3.1 * products  # backward: twice as much, but no gradient of tokens
    assert one > 2 * 12 * n * d * d * 6  # six blocks


def test_the_rate_is_chosen_by_a_tenth_of_train_val_is_read_once_and_the_seed_is_all_that_is_drawn(
    few_images, home, monkeypatch
):
    from sslbench.evaluate import probe

    read, score = [], probe._right
    monkeypatch.setattr(probe, "_right", lambda model, data, **more: read.append(data) or score(model, data, **more))
    found = []
    for seed in (0, 0, 1):
        record = evaluate(eval_recipe("attentive", sets=QUICK), SMALL, "builtin", seed)[0]
        run = home / "runs" / record.condition["eval_run"]
        found.append(load_file(run / "weights.safetensors"))
        shutil.rmtree(run)
    assert [(d.split, len(d)) for d in read[:2]] == [("train", 50), ("val", 125)]
    heads = {f"heads.{i}.{k}" for i in range(7) for k in ("queries", "values", "weight", "bias")}
    assert found[0].keys() == heads | {f"norm.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(x.equal(found[1][k]) for k, x in found[0].items())
    assert not any(x.equal(found[2][k]) for k, x in found[0].items() if k.endswith("queries"))


def test_a_study_measures_by_it(invoke, few_images, tmp_path):
    path = tmp_path / "small.yaml"
    evaluations = "[{protocol: attentive, set: [science.epochs=1, science.batch_size=50]}]"
    path.write_text(
        "question: Is it measured?\nmetric: attentive_tokens\nrows: {mae: {recipe: mae_smoke}}\nuntrained: true\n"
        "science: {arch: vit_micro4, data: {image_size: 8}, batch_size: 64}\nbudgets: [128images]\n"
        f"evaluations: {evaluations}\n"
    )
    done = invoke("study", path, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {(e["row"], e["metric"]) for e in found["ranking"]} == {
        (r, "attentive_tokens") for r in ("mae", "untrained")
    }
    assert {r.metric for r in ledger.read()} == {"attentive_top1"} and invoke("report").exit_code == 0
    page = (tmp_path / "results/report/report.html").read_text()
    assert ">attentive, tokens<" in page and "by attentive, tokens" in page


# ------------------------------------------------------------------------------------------------- a part of the labels


def test_a_list_has_as_many_of_each_class_and_is_a_function_of_share_and_seed():
    train = open_split("builtin", "train")
    first, again, other = (list_of(train, 0.01, seed, "builtin") for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other) and first.equal(first.unique())
    assert train.labels[first].bincount().tolist() == [4] * 10
    assert set(first.tolist()) < set(list_of(train, 0.1, 0, "builtin").tolist())  # more labels: the same and others
    assert list_of(train, None, 0, "builtin") is None


def test_classes_of_different_sizes_give_as_many_images_and_a_small_one_all_it_has():
    train = open_split("builtin", "train")
    index = torch.cat([(train.labels == c).nonzero()[:, 0][:n] for c, n in enumerate((300, 200, 50, 5))])
    part = subset(train, index)
    assert part.labels[list_of(part, 0.1, 0, "x")].bincount().tolist() == [14, 14, 14, 5]  # a tenth of 555, by four
    with pytest.raises(UserError, match=r"0.56 of each of its 4 classes; take 0.00721 or more"):
        list_of(part, 0.004, 0, "x")


@pytest.mark.parametrize(
    ("kind", "sets"),
    [
        ("linprobe", ["science.epochs=5"]),
        ("finetune", [*QUICK[:2], "science.optim.warmup_epochs=0", "science.auto_augment=null"]),
    ],
)
def test_a_tenth_of_the_labels_is_another_protocol_with_a_list_that_is_recorded(kind, sets, few_images, home):
    recipe, whole = (eval_recipe(kind, sets=[*sets, *more]) for more in (["science.labels=0.1"], []))
    assert "labels" not in whole.science.model_dump() and recipe.science.model_dump()["labels"] == 0.1
    first, sister = (evaluate(recipe, SMALL, "builtin", seed=seed)[0] for seed in (0, 1))
    assert first.protocol.name.startswith(f"{kind}_10pct_") and first.protocol == sister.protocol
    train = open_split("builtin", "train")
    for record in (first, sister):
        chosen = list_of(train, 0.1, record.seed, "builtin")
        facts = {k: v for k, v in record.condition.items() if k in ("labels", "labelled", "list")}
        assert facts == list_facts(train, 0.1, chosen) and facts["labelled"] == 50
    assert first.condition["list"] != sister.condition["list"]
    full = evaluate(whole, SMALL, "builtin", seed=0)[0] if kind == "linprobe" else None
    assert full is None or (full.protocol.hash != first.protocol.hash and "list" not in full.condition)


def test_every_method_and_protocol_has_one_list(few_images):
    train = open_split("builtin", "train")
    jobs = [
        kind(eval_recipe(protocol, recipe, ["science.labels=0.2"]), open_subject(run), "builtin", train, "cls", 3)
        for kind, protocol, recipe in ((FinetuneJob, "finetune", None), (ProbeJob, "linprobe", "linprobe_mae"),
                                       (AttentiveJob, "attentive", None))
        for run in (RUN, SMALL)
    ]  # fmt: skip
    assert len({job.labelled_part["list"] for job in jobs}) == 1 and len({job.protocol["hash"] for job in jobs}) == 6
    other = AttentiveJob(jobs[-1].recipe, jobs[-1].subject, "builtin", train, "cls", 4)
    assert other.labelled_part["list"] != jobs[-1].labelled_part["list"] and other.folder_name != jobs[-1].folder_name


def test_what_a_probe_is_trained_on_are_the_listed_images(few_images, home):
    recipe = eval_recipe("attentive", sets=[*QUICK, "science.labels=0.2", "science.batch_size=10"])
    train = open_split("builtin", "train")
    job = AttentiveJob(recipe, open_subject(RUN), "builtin", train, "tokens", 3)
    listed = subset(train, list_of(train, 0.2, 3, "builtin"))
    seen = torch.cat([job.train.images, job.select.images]).flatten(1)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, listed.images.flatten(1).tolist()))
    assert len(job.select) == 10 and len(job.train) == 90


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("attentive", "--set", "science.queries=7"), "science.queries=7 does not divide the encoder's width of 192"),
        (("attentive", "--set", "science.pool=mean"), "science.pool: Input should be 'tokens'"),
        (("attentive", "--set", "science.lr=[]"), "science.lr: List should have at least 1 item"),
        (("attentive", "--set", "science.batch_size=1000"), "more than the 450 images of 'builtin'"),
        (("linprobe", "--set", "science.labels=0.01"), "is 0.5 of each of its 10 classes; take 0.02 or more"),
        (("finetune", "--set", "science.labels=1"), "science.labels: Input should be less than 1"),
        (("knn", "--set", "science.labels=0.1"), "unknown key 'science.labels'"),
    ],
)
def test_what_is_wrong_is_said(invoke, few_images, words, says):
    done = invoke("eval", words[0], RUN, "--data", "builtin", *words[1:])
    assert done.exit_code == 2 and says in done.stderr, done.stderr


def test_a_head_has_the_parameters_that_the_paper_counts():
    """Psomas et al.: of ViT-B on ImageNet 1,383,400 with 32 queries."""
    head = Head(768, 32, 1000)
    assert sum(p.numel() for p in head.parameters()) == 1_383_400
