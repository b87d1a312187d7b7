"""Recipes: composed, checked, hashed by their science, and divided into devices without a remainder."""

import pytest
import yaml

from sslbench.data import data_name
from sslbench.errors import UserError
from sslbench.paths import bundled, recipe_files
from sslbench.recipe import Batch, choose, compose, find_recipe, merge, parse_sets, read_tree, resolve
from sslbench.train.job import run_name


def test_extends_composes_and_the_child_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("science: {method: {name: ocl}, epochs: 3, optim: {lr: 1, weight_decay: 0.2}}")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path / 'a.yaml'}\nscience: {{epochs: 5, optim: {{lr: 2}}}}")
    recipe = resolve(read_tree(tmp_path / "b.yaml"), "b")
    assert (recipe.science.epochs, recipe.science.optim.lr, recipe.science.optim.weight_decay) == (5, 2, 0.2)
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path / 'b.yaml'}")
    with pytest.raises(UserError, match="circle"):
        read_tree(tmp_path / "b.yaml")


def test_set_overrides_flags_and_file_with_yaml_values():
    recipe = compose("ocl", recipe="ocl_smoke", science={"epochs": 7}, sets=["science.epochs=9",
                     "science.optim.lr=1e-3",
                     "science.augment.crop_scale=[0.3, 0.9]", "science.method.kappa=16"])  # fmt: skip
    s = recipe.science
    assert (s.epochs, s.optim.lr, s.augment.crop_scale, s.method["kappa"]) == (9, 1e-3, (0.3, 0.9), 16.0)
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_sets(["science.epochs"])


@pytest.mark.parametrize(
    ("pair", "message"),
    [("science.epoch=1", "science.epoch.*'epochs'"), ("machine.device=1", "machine.device.*'devices'"),
     ("science.method.mask_ration=.3", "science.method.mask_ration.*'mask_ratio'"), ("science.epochs=-1", "greater"),
     ("science.augment.crop_scale=[0.9, 0.3]", "low, high"), ("science.data.image_size=30", "multiple")],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named_with_what_was_meant(pair, message):
    with pytest.raises(UserError, match=message):
        compose("ocl", recipe="ocl_smoke", sets=[pair])


def test_the_hash_is_of_science_alone():
    base = compose("ocl", recipe="ocl_smoke")
    same = [["machine.workers=3", "machine.precision=bf16"], ["science.seed=4"]]
    for sets in same:
        assert compose("ocl", recipe="ocl_smoke", sets=sets).hash() == base.hash()
    for sets in (
        ["science.optim.lr=1"],
        ["science.method.kappa=1"],
        ["science.epochs=2"],
        ["science.augment.flip=false"],
    ):
        assert compose("ocl", recipe="ocl_smoke", sets=sets).hash() != base.hash()
    # A preset's name is no number; its values are.
    spelled = ["kappa_form=divide", "tau=fixed", "freeze_patch_embed=false"]
    official = compose("ocl", recipe="ocl_smoke", preset="official")
    assert official.hash() == compose("ocl", recipe="ocl_smoke", sets=[f"science.method.{s}" for s in spelled]).hash()
    # Nor is the folder that data lies in.
    a, b = (
        compose("ocl", recipe="ocl_smoke", science={"data": {"spec": f"imagenet:{d}"}}).hash() for d in ("/a", "/b")
    )
    assert a == b
    assert data_name("npz:/x/cifar10_train.npz") == data_name("npz:/y/cifar10") == "cifar10"


def test_the_batch_equation_divides_or_refuses():
    def batch(method, *sets):
        return Batch.of(compose(method, recipe=f"{method}_smoke", sets=list(sets)))

    assert str(Batch.of(compose("ocl", science={"arch": "vit_l16"}))).startswith(
        "2048 = 512 per device x 1 device(s) x 4"
    )
    four = Batch.of(compose("ocl", science={"arch": "vit_b16"}, machine={"devices": 4}))
    assert (four.micro, four.world, four.accumulation) == (2400, 4, 1)
    assert batch("mae", "machine.micro_batch=32", "machine.devices=2").accumulation == 4
    gathered = batch("ocl", "machine.devices=2", "science.method.gather_negatives=true")
    assert (gathered.micro, gathered.accumulation) == (128, 1)
    cached = batch("ocl", "machine.micro_batch=32", "science.contrastive_batch=64")
    assert (cached.micro, cached.passes, cached.accumulation) == (32, 2, 4)
    assert str(cached) == "256 = 32 per pass x 2 cached passes x 1 device(s) x 4 accumulation"
    for bad in (
        ["machine.devices=3"],
        ["science.contrastive_batch=100"],
        ["machine.devices=2"],
        ["machine.micro_batch=48"],
    ):
        with pytest.raises(UserError):
            batch("ocl", *bad)
    with pytest.raises(UserError, match="no `embed` and `compare`"):
        batch("macrl", "science.method.memory_bank=false", "machine.micro_batch=8")
    with pytest.raises(UserError, match="does not divide"):
        batch("mae", "machine.micro_batch=100")


def test_a_method_may_gather_under_a_switch_of_its_own(tmp_path):
    """Two devices: of 256 images that are compared each has 128 where they are gathered, else all 256."""
    path = tmp_path / "crowd.py"
    path.write_text(CROWD)

    def micro(**config):
        science = {"method": {"name": f"{path}:Crowd", **config}, "batch_size": 512, "contrastive_batch": 256}
        return Batch.of(resolve({"science": science, "machine": {"devices": 2}}, "crowd")).micro

    assert micro(everybody=True) == 128
    assert micro() == 256


CROWD = """
from sslbench.method import Method, MethodConfig

class CrowdConfig(MethodConfig):
    everybody: bool = False
    gather_negatives: bool = True  # of something else

class Crowd(Method):
    Config = CrowdConfig
    couples_batch = True

    @classmethod
    def gathers_batch(cls, config):
        return config["everybody"]
"""


def test_paper_recipes_say_what_the_papers_say():
    b, l = (compose("ocl", science={"arch": a}).science for a in ("vit_b16", "vit_l16"))  # noqa: E741
    for s, ratio, batch in ((b, 0.3, 9600), (l, 0.4, 2048)):
        assert (s.method["mask_ratio"], s.batch_size, s.epochs, s.optim.warmup_epochs) == (ratio, batch, 800, 40)
        assert (s.optim.lr, s.optim.betas, s.optim.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
        assert (s.method["kappa"], s.method["kappa_form"], s.method["freeze_patch_embed"]) == (64, "multiply", True)
    mae = compose("mae", science={"arch": "vit_b16"}).science
    assert (mae.batch_size, mae.epochs, mae.method["mask_ratio"], mae.method["norm_pix_loss"]) == (
        4096,
        1600,
        0.75,
        True,
    )


@pytest.mark.parametrize("name", recipe_files())
def test_every_recipe_resolves_and_opens_with_its_command(name):
    path = recipe_files()[name]
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# sslbench pretrain {name.split('/')[0]}")
    recipe = resolve(read_tree(path), name)
    Batch.of(recipe)
    assert merge(yaml.safe_load(path.read_text()), {})


@pytest.mark.parametrize(
    ("method", "arch", "data", "expected"),
    [("ocl", None, None, "vit_b16_imagenet"), ("ocl", "vit_l16", None, "vit_l16_imagenet"),
     ("ocl", None, "builtin", "vit_mini4_builtin"), ("mae", "vit_b16", "builtin", "vit_b16_builtin"),
     ("mae", "vit_l16", "imagenet:/x", "vit_l16_imagenet"),
     ("mae", None, "npz:/x/cifar10_train.npz", "vit_ti4_cifar10"),
     ("ocl", None, "folder:/x", "vit_mini4_builtin"), ("ocl", "vit_b16", "folder:/x", "vit_b16_imagenet"),
     ("ccmim", "vit_b16", "coco", "vit_b16_imagenet"), ("mae", "vit_b16", "packed:/x", "vit_b16_imagenet"),
     ("asl", "vit_ti4", "folder:/x", "vit_ti4_builtin")],
)  # fmt: skip
def test_the_recipe_that_a_command_means(method, arch, data, expected):
    assert choose(method, arch, data).stem == expected


def test_a_method_by_its_path_is_hashed_and_named_as_by_its_name():
    path = bundled("methods") / "mae.py"
    tree = read_tree(recipe_files()["mae/mae_smoke"])
    named = resolve(tree, "x")
    tree["science"]["method"]["name"] = f"{path}:MAE"
    by_path = resolve(tree, "x")
    assert by_path.method.endswith("mae.py:MAE") and by_path.method_name == named.method_name == "mae"
    assert by_path.hash() == named.hash() and run_name(by_path) == run_name(named)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="ocl/vit_l16_imagenet"):
        find_recipe("ocl/vit_l16_imagnet")


def test_a_weight_decay_that_ends_somewhere_begins_above_zero():
    ends = ["science.optim.weight_decay_end=0.4"]
    assert compose("mae", sets=ends).science.optim.weight_decay_end == 0.4
    with pytest.raises(UserError, match="set that above 0, where it begins"):
        compose("mae", sets=[*ends, "science.optim.weight_decay=0"])
