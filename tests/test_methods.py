"""The contract that every file in methods/ keeps, found by looking; and each method's goldens."""

import copy
import inspect
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from tiny import METHODS, REFERENCE, SMALL, generator, gradient_norm, images, make, reference_images, step

from sslbench.evaluate.start import pretrain
from sslbench.losses import recorded_gathers
from sslbench.masking import random_order, random_split, split_kept
from sslbench.recipe import Augment, Optim, compose
from sslbench.train.optim import adamw
from sslbench.train.shard import load_optimizer
from sslbench.vit import VisionTransformer

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
every_method = pytest.mark.parametrize("name", METHODS)


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
    """A restored method goes on bit for bit: momentum copies, memory banks and BatchNorm's statistics included."""

    a, b = make(name, seed=0), make(name, seed=1)
    optimizers = [adamw(m, Optim(lr=1e-3)) for m in (a, b)]
    train(a, optimizers[0], range(3))
    b.load_state_dict(a.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert train(a, optimizers[0], range(3, 6)) == train(b, optimizers[1], range(3, 6))
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@every_method
def test_every_parameter_has_a_dimension_by_which_fsdp_can_divide_it(name):
    assert all(p.ndim for p in make(name).parameters())


def test_a_checkpoint_of_version_0_1_goes_on_bit_for_bit():
    """OCL's scale had no dimension then, nor had its moments."""
    a, b = make("ocl", seed=0), make("ocl", seed=1)
    optimizers = [adamw(m, Optim(lr=1e-3)) for m in (a, b)]
    train(a, optimizers[0], range(3))
    weights, state = a.state_dict(), copy.deepcopy(optimizers[0].state_dict())
    b.load_state_dict({k: x.reshape(()) if k == "log_scale" else x for k, x in weights.items()})
    for moments in state["state"].values():
        moments |= {k: x.reshape(()) for k, x in moments.items() if x.shape == (1,)}
    load_optimizer(optimizers[1], state)
    assert train(a, optimizers[0], range(3, 6)) == train(b, optimizers[1], range(3, 6))
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@every_method
def test_after_step_moves_nothing_that_is_trained(name):
    method = make(name)
    step(method)["loss"].backward()
    trained = {k for k, p in method.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p += 0.01
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.after_step(0.5)
    changed = {k for k, v in method.state_dict().items() if not v.equal(before[k])}
    assert not changed & trained
    assert changed == {k for k in before if k.startswith(("momentum_", "bank.")) and k in changed}
    frozen = {k for k, p in method.named_parameters() if not p.requires_grad and k.startswith("momentum_")}
    assert {k for k in frozen if not k.endswith("pos_embed") and "patch_embed" not in k} <= changed


@every_method
def test_what_a_loss_gathers_is_what_the_method_says(name):
    """What `Batch.of` divides by: features or their statistics leave a device where, and only where, a class says."""
    switches = ({"gather_negatives": on} for on in (True, False))
    for switch in switches if "gather_negatives" in METHODS[name].Config.model_fields else ({},):
        method = make(name, **switch)
        with recorded_gathers() as gathered:
            step(method, n=8)
        config = method.config.model_dump()
        says = method.compares_batch(config) and method.gathers_batch(config)
        assert bool(gathered) == says, switch


@every_method
def test_what_gets_no_gradient_stores_no_activations(name):
    """What a module without trainable parameters, such as a momentum encoder, computes has no graph behind it."""
    method = make(name)
    stored: list[str] = []

    def look(path):
        def hook(module, _, output):
            trained = any(p.requires_grad for p in module.parameters())
            if isinstance(output, torch.Tensor) and output.requires_grad and not trained:
                stored.append(path)

        return hook

    for path, module in method.named_modules():
        if any(True for _ in module.parameters()):
            module.register_forward_hook(look(path))
    step(method)
    assert not stored


@every_method
def test_a_run_restored_from_a_checkpoint_ends_with_the_same_weights(name, home, tiny_arch):
    """Through the trainer and its files: the last checkpoint is lost, the run goes on from the one before."""
    sets = ["science.batch_size=50", "science.epochs=0.1"]  # 8 steps
    sets += ["machine.save_every=3", "machine.tensorboard=false", "machine.meters_every=4"]
    sets += [*tiny_arch[1::2], *(f"science.method.{key}={value}" for key, value in SMALL.get(name, {}).items())]
    recipe = compose(name, science={"arch": "vit_mini4", "data": {"spec": "builtin"}}, sets=sets)
    pretrain(recipe, home / "r", Console(quiet=True), progress=False)
    whole = load_file(home / "r/weights.safetensors")
    last = sorted((home / "r/checkpoints").glob("*.pt"))[-1]
    last.unlink()
    run = json.loads((home / "r/run.json").read_text())
    (home / "r/run.json").write_text(json.dumps({**run, "status": "interrupted"}))
    pretrain(recipe, home / "r", Console(quiet=True), progress=False)
    assert json.loads((home / "r/run.json").read_text())["resumed"] == 1
    resumed = load_file(home / "r/weights.safetensors")
    assert all(whole[k].equal(resumed[k]) for k in whole)
    lines = [json.loads(line) for line in (home / "r/metrics.jsonl").read_text().splitlines()]
    looked = [line for line in lines if "feature_std" in line]
    assert [line["step"] for line in looked] == [4, 8]  # every four steps, and the last
    for line in looked:
        assert 0 < line["feature_std"] <= 1.1 and line["effective_rank"] >= 1 and -4 <= line["uniformity"] <= 0
        norms = [k for k in line if k.startswith("grad_norm_")]
        assert norms and all(line[k] > 0 for k in norms)
        assert len([k for k in line if k.startswith("grad_cos_")]) == len(norms) * (len(norms) - 1) // 2


@every_method
def test_a_config_survives_the_round_trip_and_refuses_what_it_does_not_know(name):
    cls = METHODS[name]
    for preset in cls.presets.values():
        config = cls.Config(**preset)
        assert cls.Config(**config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError):
        cls.Config(no_such_switch=1)


@every_method
def test_a_method_asks_for_no_rank_and_no_device(name):
    source = inspect.getsource(sys.modules[METHODS[name].__module__])
    assert not re.search(r"torch\.distributed|get_rank|world_size|\.cuda\(|manual_seed", source)


@every_method
def test_a_step_draws_from_nothing_but_its_generator(name, monkeypatch):
    """Where torch's global generator is read, by whatever name, its state moves; Python's and numpy's raise."""

    def refused(*_, **__):
        raise AssertionError("a draw that the generator does not make")

    method = make(name).train()
    optimizer = adamw(method, Optim(lr=1e-3))
    for module, names in ((random, ("random", "getrandbits", "randrange")), (np.random, ("rand", "random", "normal"))):
        for draw in names:
            monkeypatch.setattr(module, draw, refused)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for i in range(3):
        step(method, i)["loss"].backward()
        optimizer.step()
        method.after_step(i / 3)
        assert torch.get_rng_state().equal(before)


@every_method
def test_ten_steps_repeat_the_committed_losses(name):
    """To make them again after a change that means to change them: `python tests/test_methods.py`."""
    assert golden_losses(name) == pytest.approx(GOLDENS[name], rel=1e-8)


def golden_losses(name):
    """Ten steps of a tiny ViT on 32 real images, in float64: float32 drifts with the CPU and the number of threads.

    So do resampled views, whose levels round to one side or the other (MoCo v3 moved by 2 % from AVX-512 to AVX2),
    and normal draws: each image of a view is a whole one here, moved and mirrored, and each weight a thousandth.
    """
    method = make(name).double()
    dice = generator()
    drawn = {}
    for key, x in method.state_dict().items():
        if x.is_floating_point() and x.unique().numel() > 1 and "pos_embed" not in key:
            drawn[key] = torch.randint(-200, 201, x.shape, generator=dice).double() / 1000
    assert len(drawn) > 10
    method.load_state_dict(drawn, strict=False)
    return train(method, adamw(method, Optim(lr=1e-3)), range(10), golden_loss)


def golden_loss(method, i):
    pixels = images(32)
    views = method.build_views(pixels, generator(i))
    whole = {}
    for place, (key, view) in enumerate(views.items()):
        if view.shape[-3:] == pixels.shape[-3:]:
            moved = pixels.roll((i, 3 * place), (2, 3)).flip(3) if place % 2 else pixels.roll((3 * place, i), (2, 3))
            view = moved.double() / 64 - 2
        elif view.ndim == 5:  # small crops
            side = view.shape[-1]
            view = torch.stack([pixels[..., j : j + side, j : j + side] for j in range(view.shape[1])], 1) / 64.0 - 2
        whole[key] = view.double() if view.is_floating_point() else view
    assert any(not whole[key].equal(views[key]) for key in views)
    return method.loss(method(whole))


def train(method, optimizer, steps, loss_of=step):
    """The loss of each step."""
    losses = []
    for i in steps:
        loss = loss_of(method, i)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(i / 10)
        losses.append(loss.item())
    return losses


# ---------------------------------------- against the reference implementations' numbers, of which no code is here


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


def test_the_softplus_scale_starts_at_its_published_value():
    method = make("ocl", tau_param="softplus")
    assert method.scale().item() == pytest.approx(1.693, abs=1e-3)
    assert step(method)["loss"].requires_grad


def test_eq_3s_denominator_has_both_groups_and_not_the_positive():
    method = make("ocl", denominator="eq3", tau="fixed", tau_init=2.0)
    outputs = method(method.build_views(images(5), generator()))
    m, n = outputs["m"], outputs["n"]
    e = {pair: (2 * method.similarity(a, b)).exp() for pair, (a, b) in
         {"mn": (m, n), "nm": (n, m), "mm": (m, m), "nn": (n, n)}.items()}  # fmt: skip
    expected = 0.0
    for across, within in (("mn", "mm"), ("nm", "nn")):
        for i in range(5):
            others = sum(e[across][i, k] + e[within][i, k] for k in range(5) if k != i)
            expected -= torch.log(e[across][i, i] / others) / 10
    torch.testing.assert_close(method.loss(outputs)["loss"], expected)


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
