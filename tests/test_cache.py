"""Gradient caching and tiled losses: the numbers of the plain way, in the memory of a small batch."""

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from tiny import generator, gradients, images, make

from sslbench import losses
from sslbench.losses import cross_entropy_to, info_nce
from sslbench.train.cache import cached_backward

METHODS = [
    ("ocl", {}),
    ("ocl", {"mlp_head": "2-layer", "gather_negatives": True, "denominator": "eq3"}),
    ("ccmim", {}),
    ("ccmim", {"contrast": "official", "divide": "random"}),
    ("ccmim", {"contrast": "align"}),
    ("mocov3", {}),
    ("siameseim", {}),
    ("cmae", {"mask_ratio": 0.65, "mask_unit": 2, "two_tau": True}),
    ("lejepa", {}),
]


@pytest.mark.parametrize(("name", "config"), METHODS)
def test_a_cached_batch_has_the_gradients_of_the_batch_in_one_pass(name, config):
    """With a dropout in the encoder: the second pass over a micro-batch draws as the first did."""
    method, twin = make(name, **config), make(name, **config)
    for m in (method, twin):
        m.encoder.blocks[0].drop_path1 = torch.nn.Dropout(0.2)
    whole, seen = images(12), []

    def views(i):
        seen.append(i)
        torch.manual_seed(i)
        with torch.no_grad():
            return method.build_views(whole[4 * i : 4 * i + 4], generator(i))

    got = cached_backward(method, views, 3, Fabric(accelerator="cpu", devices=1))
    assert seen == [0, 1, 2, 0, 1, 2]  # one forward pass more
    parts = [twin.embed(views(i)) for i in range(3)]
    expected = twin.loss(twin.compare({k: torch.cat([part[k] for part in parts]) for k in parts[0]}))
    assert got.keys() == expected.keys()
    for k, x in expected.items():
        torch.testing.assert_close(got[k], x.detach(), rtol=1e-6, atol=1e-6)
    for k, g in gradients(twin, expected["loss"]).items():
        torch.testing.assert_close(
            method.get_parameter(k).grad, g, rtol=1e-6, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}"
        )
    for (k, a), b in zip(method.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=k)  # BatchNorm's statistics: of the whole batch, once


def test_accumulated_cached_batches_average():
    method, fabric = make("ocl").double(), Fabric(accelerator="cpu", devices=1)
    views = [method.build_views(images(16)[4 * i : 4 * i + 4], generator(i)) for i in range(4)]
    views = [{**v, "images": v["images"].double()} for v in views]
    for first in (0, 2):
        cached_backward(method, lambda i, first=first: views[first + i], 2, fabric, accumulation=2)
    got = {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
    halves = [{k: torch.cat([views[i][k], views[i + 1][k]]) for k in views[0]} for i in (0, 2)]
    expected = gradients(method, sum(method.loss(method(half))["loss"] for half in halves) / 2)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- tiled losses


@pytest.mark.parametrize(("name", "config"), METHODS[:4])
def test_a_tiled_loss_has_the_value_and_gradients_of_the_full_matrix(name, config, monkeypatch):
    method = make(name, **config)
    x = {k: v.detach().requires_grad_() for k, v in method(method.build_views(images(12), generator())).items()}

    def found():
        loss = method.loss(x)["loss"]
        trained = [v for v in (*x.values(), *method.parameters()) if v.requires_grad]
        return loss, torch.autograd.grad(loss, trained, allow_unused=True)

    full = found()
    monkeypatch.setattr(losses, "TILE", 5 * 12)  # 5, 5 and 2 anchors; half of that where a row has 24 logits
    tiled = found()
    for a, b in zip((full[0], *full[1]), (tiled[0], *tiled[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_info_nce_is_the_cross_entropy_of_cosines():
    a, b = torch.randn(4, 8), torch.randn(6, 8)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(info_nce(a, b, 0.2, 2), cross_entropy_to(cosine / 0.2, 2))


# ---------------------------------------------------------------------------------------------- through the command


@pytest.mark.parametrize(
    "name", ["asl", "asl dle", "ccmim", "cmae", "lejepa", "macrl", "mae", "mocov3", "ocl", "siameseim"]
)
def test_a_run_in_small_passes_is_the_run_in_one(name, invoke, tiny_arch, tmp_path):
    """The draws too: accumulation, or gradient caching where a loss compares images, changes only the rounding."""
    weights, (name, *branch) = [], name.split()
    more = [word for value in branch for word in ("--set", f"science.method.augmentation={value}")]
    for micro in (32, 8):
        args = ["pretrain", name, "--recipe", f"{name}_smoke", *tiny_arch, *more]
        args += ["--batch-size", 32, "--epochs", 0.032, "--out", micro]
        for key in (f"micro_batch={micro}", "precision=32", "tensorboard=false", "log_every=1"):
            args += ["--set", f"machine.{key}"]
        done = invoke(*args)
        assert done.exit_code == 0, done.output
        weights.append(load_file(tmp_path / str(micro) / "weights.safetensors"))
    for k, x in weights[0].items():
        # Two have no gradient but rounding, which Adam makes a step of: a key's bias, and a shift before BatchNorm.
        if not k.endswith("qkv.bias") and (name, k) not in [("mocov3", "norm.bias"), ("lejepa", "norm.bias")]:
            torch.testing.assert_close(weights[1][k], x, rtol=0, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}")
