"""The contract that every file in methods/ keeps, found by looking; and each method's goldens."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sslbench.data import open_split
from sslbench.masking import random_order, random_split, split_kept
from sslbench.method import methods
from sslbench.recipe import Augment, Optim
from sslbench.train.optim import adamw
from sslbench.vit import Arch, VisionTransformer

METHODS = methods()
GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
TINY = Arch(patch=8, dim=48, depth=2, heads=3, image=32)
every_method = pytest.mark.parametrize("name", METHODS)


def make(name, arch=TINY, seed=0, **config):
    torch.manual_seed(seed)
    cls = METHODS[name]
    return cls(cls.Config(**config), VisionTransformer(arch), Augment())


def images(n=8):
    return open_split("builtin", "train").images[:n]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def step(method, seed=0, n=8):
    with torch.no_grad():
        views = method.build_views(images(n), generator(seed))
    return method.loss(method(views))


@every_method
def test_views_are_a_function_of_the_images_and_the_generator(name):
    method = make(name)
    before = torch.get_rng_state()
    a, b, c = (method.build_views(images(), generator(s)) for s in (1, 1, 2))
    assert torch.get_rng_state().equal(before)
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) and any(not a[k].equal(c[k]) for k in a)
    assert all(len(v) == 8 for v in a.values())


@every_method
def test_the_loss_is_a_finite_float32_scalar_and_reaches_exactly_the_trainable_parameters(name):
    method = make(name)
    losses = step(method)
    assert losses["loss"].shape == () and losses["loss"].dtype == torch.float32 and losses["loss"].isfinite()
    losses["loss"].backward()
    for key, p in method.named_parameters():
        assert (p.grad is not None and bool(p.grad.isfinite().all())) == p.requires_grad, key
        assert p.grad is None or p.grad.abs().sum() > 0 or key.endswith("bias"), key
    assert method.tokens_per_image() > 0


@every_method
def test_all_state_is_in_the_state_dict(name):
    a, b = make(name, seed=0), make(name, seed=1)
    optimizer = adamw(a, Optim(lr=1e-3))
    step(a)["loss"].backward()
    optimizer.step()
    a.after_step(0.5)
    b.load_state_dict(a.state_dict())
    assert step(a, 3)["loss"].equal(step(b, 3)["loss"])


@every_method
def test_a_config_survives_the_round_trip_and_refuses_what_it_does_not_know(name):
    cls = METHODS[name]
    for preset in cls.presets.values():
        config = cls.Config(**preset)
        assert cls.Config(**config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError):
        cls.Config(no_such_switch=1)


@every_method
def test_a_method_asks_for_no_rank_and_no_device_and_draws_from_nothing_but_its_generator(name):
    source = inspect.getsource(sys.modules[METHODS[name].__module__])
    assert not re.search(r"torch\.distributed|get_rank|world_size|\.cuda\(|manual_seed", source)
    for call in re.findall(r"torch\.(?:rand|randn|randperm|randint|bernoulli)\(.*\)", source):
        assert "generator=" in call


@every_method
def test_ten_steps_repeat_the_committed_losses(name):
    """To make them again after a change that means to change them: `python tests/test_methods.py`."""
    assert golden_losses(name) == pytest.approx(GOLDENS[name], rel=1e-4)


def golden_losses(name):
    method = make(name)
    optimizer = adamw(method, Optim(lr=1e-3))
    losses = []
    for i in range(10):
        loss = step(method, i, 32)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(i / 10)
        losses.append(loss.item())
    return losses


# ---------------------------------------- against the reference implementations' numbers, of which no code is here

REFERENCE = Arch(patch=16, dim=48, depth=3, heads=3, image=64)


def gradient_norm(method):
    return torch.nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None]).item()


def reference_images():
    return torch.randn(8, 3, 64, 64, generator=generator(1))


def test_mae_gives_the_reference_loss_and_gradient():
    method = make("mae", REFERENCE, decoder_dim=32, decoder_depth=2, decoder_heads=4)
    loss = method.loss(method({"images": reference_images(), "order": random_order(8, 16, generator(2))}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(1.07743168, abs=2e-6)
    assert gradient_norm(method) == pytest.approx(0.135899, rel=1e-4)


@pytest.mark.parametrize(
    ("form", "expected", "norm"), [("divide", 2.90354538, 22.407344), ("multiply", 2.13646269, 2.037773)]
)
def test_ocl_gives_the_reference_loss_and_gradient(form, expected, norm):
    method = make("ocl", REFERENCE, kappa_form=form, tau="fixed", freeze_patch_embed=False)
    keep = random_split(8, 16, 0.3, generator(2))
    loss = method.loss(method({"images": reference_images(), "keep": keep}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=5e-6)
    assert gradient_norm(method) == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_mae_vit_b_gives_the_reference_loss_and_gradient():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 224, 224)
    from sslbench.vit import ARCHS

    cls = METHODS["mae"]
    method = cls(cls.Config(), VisionTransformer(ARCHS["vit_b16"]), Augment())
    order = torch.rand(4, 196).argsort(1)  # the one draw of the reference's forward, from the same stream
    outputs = method({"images": x, "order": order})
    assert outputs["prediction"].shape == (4, 147, 768)
    loss = method.loss(outputs)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(1.7754898, abs=2e-5)
    assert gradient_norm(method) == pytest.approx(3.9714, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ OCL's own


@pytest.mark.parametrize(("ratio", "k"), [(0.2, 78), (0.3, 68), (0.4, 58), (0.6, 39), (0.8, 19), (0.9, 9)])
def test_the_split_is_disjoint_and_as_large_as_the_released_codes(ratio, k):
    assert split_kept(196, ratio) == k
    keep = random_split(5, 196, ratio, generator())
    assert keep.shape == (5, 2, k)
    order = random_order(5, 196, generator())
    for groups, o in zip(keep, order, strict=True):
        union = groups.flatten().tolist()
        assert len(set(union)) == 2 * k and set(union) == set(o[: 2 * k].tolist())


def test_the_scale_is_learned_from_one_over_tau_and_clamped():
    method = make("ocl")
    assert method.scale().item() == pytest.approx(1 / 0.07) and method.log_scale.requires_grad
    method.log_scale.data.fill_(9.0)
    method.after_step(0)
    assert method.scale().item() == pytest.approx(100)


def test_presets_differ_as_the_file_says():
    presets = METHODS["ocl"].presets
    paper, official = (METHODS["ocl"].Config(**presets[p]) for p in ("paper", "official"))
    assert (paper.kappa_form, paper.tau, paper.freeze_patch_embed) == ("multiply", "learnable", True)
    assert (official.kappa_form, official.tau, official.freeze_patch_embed) == ("divide", "fixed", False)
    assert not paper.gather_negatives and not official.gather_negatives
    assert all(p.requires_grad == (not f) for f in (True, False)
               for p in make("ocl", freeze_patch_embed=f).encoder.patch_embed.parameters())  # fmt: skip


@pytest.mark.parametrize(("head", "width", "layers"), [("none", 48, 0), ("2-layer", 512, 2), ("3-layer", 512, 3)])
def test_the_mlp_heads_of_table_4(head, width, layers):
    method = make("ocl", mlp_head=head)
    outputs = method(method.build_views(images(), generator()))
    assert outputs["m"].shape == outputs["n"].shape == (8, width)
    assert sum(isinstance(m, torch.nn.Linear) for m in method.head.modules()) == layers
    step(method)["loss"].backward()


if __name__ == "__main__":
    path = Path(__file__).parent / "goldens.json"
    path.write_text(json.dumps({name: golden_losses(name) for name in METHODS}, indent=1) + "\n")
