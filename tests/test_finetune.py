"""Fine-tuning and robustness: MAE's layer decay, targets, resume bit for bit, scoring over a set's own classes."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors.torch import load_file
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from tiny import TINY, generator
from torch.nn import functional as F
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy

from sslbench.data import open_split
from sslbench.data.loader import host_seed
from sslbench.draws import seed_of
from sslbench.errors import UserError
from sslbench.evaluate.evaluation import eval_recipe, evaluate
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.finetune import (
    Classifier,
    Distortion,
    Finetune,
    FinetuneJob,
    erase_,
    load_classifier,
    posterize,
    predict,
    resized,
)
from sslbench.paths import recipe_files
from sslbench.recipe import Augment, read_tree
from sslbench.train.diagnose import CollapseMeters
from sslbench.train.optim import layer_groups
from sslbench.views import cut_out
from sslbench.vit import ARCHS, VisionTransformer, initialise

SMOKE = ["eval", "finetune", "untrained:vit_mini4@16", "--data", "builtin", "--recipe", "finetune_smoke",
         "--set", "science.auto_augment=null", "--set", "science.batch_size=500"]  # fmt: skip


def classifier(pool="mean", **science):
    torch.manual_seed(0)
    encoder = VisionTransformer(TINY)
    initialise(encoder)
    return Classifier(Finetune(protocol="finetune", pool=pool, **science), encoder, Augment(), 10)


def test_layer_decay_has_the_groups_and_scales_of_mae_for_vit_b():
    with torch.device("meta"):
        model = Classifier(Finetune(protocol="finetune"), VisionTransformer(ARCHS["vit_b16"]), Augment(), 1000)
    groups = layer_groups(model, 12, 0.05, 0.65)
    assert len(groups) == 28
    assert min(g["lr_scale"] for g in groups) == pytest.approx(0.0036972, abs=1e-7)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(scale) == len([p for p in model.parameters() if p.requires_grad])
    of = lambda p: scale[id(p)]  # noqa: E731
    assert of(model.head.weight) == (1, 0.05) and of(model.head.bias) == (1, 0) and of(model.fc_norm.weight) == (1, 0)
    assert of(model.encoder.blocks[11].mlp.fc1.weight) == (0.65, 0.05)
    lowest = (pytest.approx(0.65**13), 0)
    assert of(model.encoder.pos_embed) == of(model.encoder.cls_token) == lowest
    assert of(model.encoder.patch_embed.proj.weight) == (pytest.approx(0.65**13), 0.05)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_mean_pooling_moves_the_norm_behind_the_mean(pool):
    model = classifier(pool, drop_path=0.1)
    names = {n for n, _ in model.named_parameters()}
    assert ("fc_norm.weight" in names) == (pool == "mean") and ("encoder.norm.weight" in names) == (pool == "cls")
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    tokens = model.encoder(x)
    feature = tokens[:, 0] if pool == "cls" else F.layer_norm(
        tokens[:, 1:].mean(1), (TINY.dim,), model.fc_norm.weight, model.fc_norm.bias, 1e-6
    )  # fmt: skip
    torch.testing.assert_close(model.logits(x), model.head(feature))
    rates = [block.drop_path1.drop_prob for block in model.encoder.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates)


def views_of(model, seed=0):
    data = open_split("builtin", "train")
    generator = torch.Generator().manual_seed(seed)
    return model.build_views(data.images[:8], generator, data.labels[:8]), data.labels[:8]


def test_without_mixing_targets_are_smoothed_labels():
    views, labels = views_of(classifier(mixup=0, cutmix=0, erase_p=0))
    expected = F.one_hot(labels, 10) * 0.9 + 0.01
    torch.testing.assert_close(views["targets"], expected)


def test_mixup_mixes_images_and_targets_by_the_same_share():
    plain, labels = views_of(classifier(mixup=0, cutmix=0, erase_p=0))
    views, _ = views_of(classifier(mixup=0.8, cutmix=0, erase_p=0, mix_batch=4))
    smooth, neighbour, shares = F.one_hot(labels, 10) * 0.9 + 0.01, torch.tensor([1, 0, 3, 2]), []
    for rows in (slice(0, 4), slice(4, 8)):  # what shares a draw
        a, b = plain["images"][rows], plain["images"][rows][neighbour]
        share = ((views["images"][rows] - b) * (a - b)).sum() / ((a - b) ** 2).sum()
        torch.testing.assert_close(views["images"][rows], share * a + (1 - share) * b)
        targets = share * smooth[rows] + (1 - share) * smooth[rows][neighbour]
        torch.testing.assert_close(views["targets"][rows], targets)
        shares.append(share.item())
    assert shares[0] != pytest.approx(shares[1], abs=1e-3)


def test_cutmix_pastes_a_box_and_shares_targets_by_its_area():
    plain, labels = views_of(classifier(mixup=0, cutmix=0, erase_p=0))
    views, _ = views_of(classifier(mixup=0, cutmix=1.0, erase_p=0, label_smoothing=0))
    pasted = (views["images"] != plain["images"]).any(1)[:2]
    assert pasted[0].equal(pasted[1]) and 0 < pasted[0].sum() < pasted[0].numel()
    assert views["images"][0][:, pasted[0]].equal(plain["images"][1][:, pasted[0]])
    (mine, other), share = labels[:2].tolist(), 1 - pasted[0].float().mean().item()
    if mine != other:
        assert views["targets"][0][mine].item() == pytest.approx(share, abs=0.02)


def test_meters_read_features_as_evaluations_do_and_leave_the_model_and_its_draws_alone():
    model, fabric = classifier(drop_path=0.9), Fabric(accelerator="cpu", devices=1)
    meters = CollapseMeters(open_split("builtin", "train"), model, torch.device("cpu"), 32)
    model.forward(views_of(model)[0])  # which leaves draws of eight images
    state = torch.get_rng_state()
    seen = meters.read(fabric)
    assert model.encoder.training and torch.get_rng_state().equal(state)
    model.eval()
    assert meters.read(fabric) == seen and not model.encoder.training


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_an_image_is_erased_as_timm_does_whatever_pass_it_comes_in(mode):
    x = open_split("builtin", "train").images[:8].float()
    erase = RandomErasing(0.5, mode=mode, max_count=1, device="cpu")
    whole, part = x.clone(), x[4:].clone()
    state = torch.get_rng_state()
    erase_(whole, erase, 7, range(8))
    erase_(part, erase, 7, range(4, 8))
    assert part.equal(whole[4:]) and torch.get_rng_state().equal(state)
    changed = (whole != x).flatten(1).any(1).tolist()
    assert 0 < sum(changed) < 8
    for i in range(8):
        random.seed(own := seed_of("erase", 7, i))
        torch.manual_seed(own)
        assert erase(x[i].clone()).equal(whole[i])


def test_views_are_a_function_of_the_generators_seed_and_leave_the_hosts_alone():
    model = classifier()
    before = np.random.get_state()[1].tolist()
    torch.manual_seed(1)
    a = views_of(model)[0]
    torch.manual_seed(1)
    b = views_of(model)[0]
    assert np.random.get_state()[1].tolist() == before
    assert a["images"].equal(b["images"]) and a["targets"].equal(b["targets"])
    assert not a["images"].equal(views_of(model, seed=3)[0]["images"])


def test_rand_augment_is_timms_and_survives_its_greatest_strength():
    image = open_split("builtin", "train").read(3)
    words, mean = "rand-m9-mstd0-inc1", (0.485, 0.456, 0.406)  # without the spread it never gets to 10
    reference = rand_augment_transform(words, {"translate_const": 14, "img_mean": (124, 116, 104),
                                               "interpolation": Image.Resampling.BICUBIC})  # fmt: skip
    ours = Distortion(words, mean)
    for seed in range(50):
        with host_seed(seed):
            expected = reference(image)
        with host_seed(seed):
            assert np.array_equal(np.asarray(ours(image)), np.asarray(expected))
    strongest = Distortion("rand-m10-n15-inc1", mean)
    with host_seed(0):
        strongest(image)
    assert not np.asarray(posterize(image, 0)).any()


def test_every_eval_recipe_resolves_and_says_what_its_source_says():
    found = {
        name: read_tree(path, "eval")["science"]["protocol"].removesuffix("_augmented")
        for name, path in recipe_files("eval").items()
    }
    science = {name: eval_recipe(kind, name).science for name, kind in found.items()}
    base, large, ocl, ccmim = (science[f"finetune{n}"] for n in ("", "_l", "_ocl_b", "_ccmim"))
    assert base == Finetune(protocol="finetune")  # MAE's is what the class defaults to
    assert (large.epochs, large.optim.lr, large.optim.layer_decay, large.drop_path) == (50, 1e-3, 0.75, 0.2)
    assert ocl.optim.betas == (0.9, 0.95) == science["finetune_ocl_l"].optim.betas and ocl.optim.lr == 5e-4
    assert (ccmim.optim.lr, ccmim.optim.layer_decay) == (1e-3, 0.75)
    macrl, subsets = science["finetune_macrl_cifar"], science["finetune_macrl_subsets"]
    assert (macrl.epochs, subsets.epochs) == (200, 400) and not macrl.mixup and not macrl.label_smoothing
    asl, inat, flowers = (science[f"finetune_{n}"] for n in ("asl", "ccmim_inat", "ccmim_flowers"))
    assert asl == base and (inat.epochs, flowers.epochs) == (360, 1000)
    assert inat.optim.lr * inat.batch_size / 256 == pytest.approx(3e-4) and inat.optim == flowers.optim
    assert (science["linprobe_macrl_cifar"].epochs, science["linprobe_macrl_subsets"].epochs) == (200, 1000)


def test_auto_augment_is_timms_original_policy():
    image = open_split("builtin", "train").read(3)
    changed = 0
    for seed in range(10):
        with host_seed(seed):
            changed += not np.array_equal(np.asarray(Distortion("original", (0.5, 0.5, 0.5))(image)), np.asarray(image))
    assert changed > 5


def test_cifars_own_policy_is_torchvisions_and_follows_the_seed_alone():
    image, mean = open_split("builtin", "train").read(3), (0.49, 0.48, 0.45)
    ours, reference = Distortion("cifar10", mean), AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[125, 122, 115])
    assert len(reference.policies) == 25 and reference.policies[0] == (("Invert", 0.1, None), ("Contrast", 0.2, 6))
    before, seen = torch.get_rng_state(), set()
    for seed in range(30):
        with host_seed(seed):
            got = np.asarray(ours(image))
        with host_seed(seed), torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.getrandbits(63))
            assert np.array_equal(got, np.asarray(reference(image)))
        seen.add(got.tobytes())
    assert len(seen) > 10 and torch.get_rng_state().equal(before)  # others' draws from torch stay as they were


@pytest.mark.parametrize("words", ["cifar", "rand-q9", "''"])
def test_an_unknown_policy_is_one_message(run_here, tmp_path, words):
    done = run_here("eval", "finetune", "untrained:vit_mini4", "--data", "builtin", "--set",
                    f"science.auto_augment={words}", home=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "science.auto_augment: expected cifar10, original, or timm" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_cut_out_zeroes_a_square_of_half_a_side_around_any_pixel():
    x = cut_out(torch.ones(4000, 3, 32, 32), 16, 1.0, generator(0))
    hole = x[:, 0] == 0
    assert x.eq(x[:, :1]).all()  # all channels alike
    rows, columns = hole.any(2), hole.any(1)
    assert hole.equal(rows[:, :, None] & columns[:, None, :])  # a rectangle
    heights = rows.sum(1)
    assert heights.max() == 16 and heights.min() == 8  # at the border half of it is outside
    # Rows near the middle are cut as often as 16 of 32 centres reach them, the first as 8 or 9 do.
    share = rows.float().mean(0).numpy()
    assert share[8:24] == pytest.approx(np.full(16, 0.5), abs=0.04) and share[0] == pytest.approx(9 / 32, abs=0.04)
    kept = cut_out(torch.ones(4000, 3, 8, 8), 4, 0.25, generator(0))
    assert (kept == 1).all((1, 2, 3)).float().mean() == pytest.approx(0.75, abs=0.03)


def test_positions_are_resampled_for_another_size():
    encoder = VisionTransformer(TINY)
    larger = resized(encoder, 48)
    assert larger.grid == (48 // TINY.patch, 48 // TINY.patch)
    assert resized(encoder, 32).pos_embed.equal(encoder.pos_embed)


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def finetuned(run_here, tmp_path_factory):
    home = tmp_path_factory.mktemp("finetuned")
    done = run_here(*SMOKE, "--set", "machine.save_every=3", "--json", home=home)
    assert done.returncode == 0, done.stderr
    return home, json.loads(done.stdout.splitlines()[-1]), next((home / "runs").glob("finetune_*"))


def test_the_number_of_images_a_pass_leaves_fine_tuning_alone(run_here, few_images, tmp_path):
    """Mixup, erasing and dropped paths are drawn by an image's place in the step, not in its pass."""
    found = {}
    for micro in (32, 8):
        sets = ["science.batch_size=32", "science.epochs=0.2", "science.mix_batch=16", "machine.precision=32"]
        words = [word for s in (*sets, f"machine.micro_batch={micro}") for word in ("--set", s)]
        done = run_here(*SMOKE[:-2], *words, home=tmp_path)
        assert done.returncode == 0, done.stderr
        (run,) = (tmp_path / "runs").glob("finetune_*")
        found[micro] = load_file(run / "weights.safetensors")
        shutil.rmtree(run)
    for k, x in found[32].items():
        if not k.endswith("qkv.bias"):  # a key's has no gradient but rounding, which Adam makes a step of
            torch.testing.assert_close(found[8][k], x, rtol=0, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}")


def test_how_images_are_mixed_is_in_a_protocols_hash_where_they_are(home):
    def hash(*sets, recipe="finetune"):
        recipe = eval_recipe("finetune", recipe, [f"science.{s}" for s in sets])
        subject, data = open_subject("untrained:vit_mini4@24"), open_split("builtin", "train")
        return FinetuneJob(recipe, subject, "builtin", data, recipe.science.pool, 0).protocol["hash"]

    assert hash() == hash("mix_batch=32") != hash("mix_batch=64")
    lines = (Path(__file__).parents[1] / "results/ledger/ocl.jsonl").read_text().splitlines()
    measured = next(r for r in map(json.loads, lines) if r["metric"] == "finetune_top1")  # without mixing
    assert hash(recipe="finetune_mini") == hash("mix_batch=64", recipe="finetune_mini") == measured["protocol"]["hash"]


def test_a_finished_fine_tuning_gives_its_number_again_and_adds_none(finetuned, run_here):
    home, record, _ = finetuned
    done = run_here(*SMOKE, "--set", "machine.save_every=3", "--json", home=home)
    assert json.loads(done.stdout.splitlines()[-1]) == record and "is finished" in done.stderr
    assert record["metric"] == "finetune_top1" and record["n"] == 1000
    lines = (home / "results" / "ledger" / "untrained.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["metric"] == "finetune_top1" for line in lines) == 1


def class_folders(root, names, per_class=6):
    data = open_split("builtin", "val")
    for name in names:
        folder = root / name
        folder.mkdir(parents=True)
        for i, x in enumerate(data.images[data.labels == data.classes.index(name)][:per_class]):
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


@pytest.mark.slow
def test_from_pre_training_through_fine_tuning_to_robustness(run_here, tmp_path):
    """The newest run is found at each step, and the last number knows the first run and all that was spent."""
    pretrained = run_here("pretrain", "mae", "--recipe", "mae_smoke", "--data", "builtin", "--json", home=tmp_path)
    assert pretrained.returncode == 0, pretrained.stderr
    run = Path(json.loads(pretrained.stdout.splitlines()[-1])["run"])
    quick = ["--recipe", "finetune_smoke", "--set", "science.auto_augment=null"]
    tuned = run_here("eval", "finetune", *quick, "--json", home=tmp_path)
    assert tuned.returncode == 0 and run.name in tuned.stderr, tuned.stderr
    top1 = json.loads(tuned.stdout.splitlines()[-1])
    assert top1["pretrain"]["run"] == run.name and top1["n"] == 1000
    assert top1["value"] > 10 + 3 * top1["stderr"]  # ten classes
    hard = class_folders(tmp_path / "hard", ["cat", "frog", "ship", "truck"], per_class=100)
    scored = run_here("eval", "robustness", "--data", f"folder:{hard}", "--json", home=tmp_path)
    assert scored.returncode == 0, scored.stderr
    record = json.loads(scored.stdout.splitlines()[-1])
    assert (record["method"], record["dataset"], record["n"]) == ("mae", "hard", 400)
    assert record["pretrain"] == top1["pretrain"] and record["weights_sha256"] == top1["weights_sha256"]
    assert record["value"] > 25 + 3 * record["stderr"]  # four classes
    spent = json.loads((tmp_path / "runs" / run.name / "run.json").read_text())["cost"]
    assert record["cost"]["wall_s"] > top1["cost"]["wall_s"] > spent["wall_s"] > 0


def test_robustness_answers_among_the_classes_that_the_set_has(finetuned, run_here, monkeypatch):
    home, _, run = finetuned
    names = ["cat", "dog", "ship"]
    folder = class_folders(home / "hard", names)
    done = run_here("eval", "robustness", "--data", f"folder:{folder}", "--json", home=home)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["metric"], record["dataset"], record["n"]) == ("top1", "hard", 18)
    model, classes, _ = load_classifier(run / "weights.safetensors")
    from sslbench.data import open_test

    test = open_test(f"folder:{folder}")
    at = torch.tensor([classes.index(n) for n in names])
    logits = predict(model, test, torch.device("cpu"), 0)
    expected = 100 * (logits[:, at].argmax(1) == test.labels).float().mean().item()
    assert record["value"] == pytest.approx(expected)
    monkeypatch.setenv("SSLBENCH_HOME", str(home))
    free = evaluate(eval_recipe("robustness", sets=["science.restrict=false"]), str(run), f"folder:{folder}")[0]
    assert free.value == pytest.approx(100 * (logits.argmax(1) == at[test.labels]).float().mean().item())
    assert free.protocol.hash != record["protocol"]["hash"]
    class_folders(home / "odd", ["cat"]).joinpath("cat").rename(home / "odd" / "unicorn")
    with pytest.raises(UserError, match=r"1 class\(es\) that the model was not trained on: unicorn"):
        evaluate(eval_recipe("robustness"), str(run), f"folder:{home / 'odd'}")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["eval", "robustness", "--data", "builtin"], "no finished fine-tuning run"),
        (["eval", "finetune", "untrained:vit_mini4"], "give --data"),
        ([*SMOKE, "--set", "science.batch_size=5"], "must be even"),
        ([*SMOKE, "--set", "science.batch_size=5000"], "science.batch_size="),
        (["eval", "knn", "untrained:vit_mini4@16", "--set", "science.protocol=finetune", "--data", "builtin"], "k"),
    ],
)
def test_bad_input_is_one_message_and_status_2(invoke, args, says):
    done = invoke(*args)
    assert done.exit_code == 2 and says in done.output + done.stderr, done.output


def test_a_fine_tuned_run_is_no_encoder_and_not_the_newest_pre_training(finetuned, monkeypatch):
    home, _, run = finetuned
    monkeypatch.setenv("SSLBENCH_HOME", str(home))
    with pytest.raises(UserError, match="is a finetune run"):
        evaluate(eval_recipe("knn"), str(run), "builtin")


def test_seeds_give_a_mean_and_its_interval(invoke, few_images):
    args = ["eval", "linprobe", "untrained:vit_mini4@16", "--data", "builtin", "--seeds", "2", "--json"]
    done = invoke(*args, "--set", "science.epochs=2")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["seeds"] == [0, 1] and answer["value"] == pytest.approx(sum(answer["values"]) / 2)
    assert "95 % interval over 2 seeds" in done.stderr
