"""What no recipe states: settings that fit a data set, and a warm-up that fits the epochs."""

import json

import pytest
import torch
from PIL import Image
from tiny import METHODS, images

from sslbench.data import open_split
from sslbench.evaluate.evaluation import eval_recipe
from sslbench.paths import recipe_files
from sslbench.recipe import Batch, compose, length, merge, read_tree, resolve
from sslbench.recipe.settings import WARMUP_SHARE, settings_for
from sslbench.train.build import build


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def photographs(tmp_path):
    """SPEC of 40 images of 160 pixels, without labels or folders of classes."""
    folder = tmp_path / "photos/train"
    folder.mkdir(parents=True)
    for i, x in enumerate(images(40)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((200, 160)).save(folder / f"{i}.jpg")
    return f"folder:{tmp_path / 'photos'}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arch", "n", "pixels", "chosen", "size", "steps"),
    [(None, 40, 32, "vit_mini4", 32, 5), (None, 5_000, 96, "vit_mini4", 64, 16), (None, 3_000, 500, "vit_s16", 224, 16),
     (None, 2_000_000, 500, "vit_s16", 224, 16), ("vit_ti16", 4_000, 32, "vit_ti16", 224, 16),
     ("vit_b4", 999, 28, "vit_b4", 32, 16)],
)  # fmt: skip
def test_every_method_gets_settings_that_fit_any_set(method, arch, n, pixels, chosen, size, steps):
    fit = settings_for(method, arch, n, pixels)
    recipe = resolve(merge(read_tree(fit.recipe), fit.tree), "x")
    s = recipe.science
    assert (s.arch, s.data.image_size) == (chosen, size)
    assert Batch.of(recipe).total == s.batch_size and n // s.batch_size >= steps and s.batch_size >= 8
    assert s.optim.warmup_epochs <= WARMUP_SHARE * s.epochs
    with torch.device("meta"):
        build(recipe)
    said = "\n".join(fit.why)
    assert chosen in said and f"{s.batch_size:,}" in said and f"{fit.recipe.parent.name}/{fit.recipe.stem}" in said
    theirs = resolve(read_tree(fit.recipe), "x").science
    assert (s.optim, s.epochs, s.method) == (theirs.optim, theirs.epochs, theirs.method)


@pytest.mark.parametrize("batch", [1, 6, 100, 4096])
def test_a_batch_that_is_asked_for_is_taken_and_the_contrast_divides_it(batch, photographs):
    recipe = compose("ocl", science={"data": {"spec": photographs}, "batch_size": batch})
    assert recipe.science.batch_size == batch and batch % recipe.science.contrastive_batch == 0
    assert compose("ocl", science={"data": {"spec": photographs}}, sets=[f"science.batch_size={batch}"]) == recipe


def test_an_arch_without_a_recipe_trains_on_the_built_in_images_and_says_what_was_chosen(run_here, tmp_path):
    done = run_here("pretrain", "ocl", "--arch", "vit_ti16", "--data", "builtin", "--epochs", "0.02",
                    "--set", "machine.tensorboard=false", "--json", home=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("no recipe of ocl is for vit_ti16 on builtin", "vit_ti16: asked for", "batch size  32: ocl/vit_b16_"):
        assert words in done.stderr
    run = json.loads((tmp_path / last_json(done)["run"] / "run.json").read_text())
    assert (run["step"], run["arch"], run["steps_per_epoch"]) == (2, "vit_ti16", 125)


def test_photographs_get_a_vit_for_photographs_and_not_the_quickstarts(run_here, tmp_path, photographs):
    for spec in (photographs, "coco:nowhere"):
        done = run_here("pretrain", "ocl", "--data", spec, "--dry-run", "--json", home=tmp_path)
        assert done.returncode == 0, done.stderr
        plan = last_json(done)
        assert plan["recipe"]["science"]["arch"] == "vit_s16" and plan["recipe"]["science"]["data"]["image_size"] == 224
        assert plan["notes"] and all(line in done.stderr for line in plan["notes"])
        assert "vit_s16: for photographs; --arch for another" in done.stderr
    planned = run_here("plan", "ocl", "--data", "coco:nowhere", "--on", "A100x4", home=tmp_path)
    assert planned.returncode == 0 and "vit_s16: for photographs" in planned.stdout
    none = run_here("pretrain", "ocl", "--data", "folder:nowhere", "--dry-run", home=tmp_path)
    assert none.returncode == 2 and "no such folder" in none.stderr


@pytest.mark.parametrize(
    ("method", "arch", "data", "base"),
    [("mae", "vit_b16", "imagenet", "mae/vit_b16_imagenet"), ("ocl", "vit_l16", "imagenet:/x", "ocl/vit_l16_imagenet"),
     ("mae", "vit_b16", "imagenet100+coco", "mae/vit_b16_imagenet"), ("mae", None, "coco:/x", "mae/vit_b16_coco"),
     ("macrl", None, "imagenette", "macrl/macrl4_imagenette"), ("ocl", "vit_s16", "imagenet", "ocl/vit_b16_imagenet")],
)  # fmt: skip
def test_the_papers_sets_keep_the_papers_settings(method, arch, data, base):
    given = {"data": {"spec": data}, **({"arch": arch} if arch else {})}
    paper = resolve(merge(read_tree(recipe_files()[base]), {"science": given}), "x")
    assert compose(method, science={"arch": arch, "data": {"spec": data}}).hash() == paper.hash()


def test_fewer_epochs_have_a_shorter_warm_up_and_another_hash():
    whole, one = compose("mae", science={"data": {"spec": "builtin"}}), compose("mae", recipe="mae/vit_mini4_builtin",
                                                                                science={"epochs": 1})  # fmt: skip
    assert (whole.science.optim.warmup_epochs, one.science.optim.warmup_epochs) == (1.2, WARMUP_SHARE)
    assert not whole.notes and "warm-up     0.4 of 1 epochs" in one.notes[0] and "says 1.2" in one.notes[0]
    asked = compose("mae", recipe="mae/vit_mini4_builtin", sets=["science.epochs=1", "science.optim.warmup_epochs=1.2"])
    assert asked.science.optim.warmup_epochs == 1.2 and asked.hash() != one.hash() and not asked.notes
    for given in ({"epochs": 100}, {"epochs": 300}, {}):  # the papers' own
        assert compose("ccmim", science={"arch": "vit_b16", **given}).science.optim.warmup_epochs == 40
    assert eval_recipe("finetune", sets=["science.epochs=5"]).science.optim.warmup_epochs == 2
    assert eval_recipe("linprobe", "linprobe_mae", ["science.epochs=10"]).science.warmup_epochs == 4
    assert eval_recipe("finetune").science.optim.warmup_epochs == 5


def test_a_short_run_reaches_the_peak_that_its_plan_prints(run_here, tmp_path):
    words = ["pretrain", "mae", "--data", "builtin", "--epochs", "0.2", "--set", "science.data.image_size=8",
             "--set", "machine.log_every=1", "--set", "machine.tensorboard=false", "--json"]  # fmt: skip
    plan = run_here(*words, "--dry-run", home=tmp_path)
    facts = last_json(plan)
    assert f"reaches {facts['lr_reached']:.4g}, after a warm-up of 0.08 of 0.2 epochs" in plan.stderr
    done = run_here(*words, home=tmp_path)
    assert "warm-up     0.08 of 0.2 epochs: 40% of a run at most" in done.stderr
    lines = (tmp_path / last_json(done)["run"] / "metrics.jsonl").read_text().splitlines()
    reached = max(json.loads(line)["lr"] for line in lines)
    assert reached == pytest.approx(facts["lr_reached"]) == pytest.approx(facts["lr"], rel=0.02)
    assert length(compose("mae", science={"data": {"spec": "builtin"}}))[0] == len(open_split("builtin", "train"))
