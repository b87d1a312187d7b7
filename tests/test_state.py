"""Checkpoints, the schedule, and the guard that stops a step before it moves the weights."""

import math
import os
import pickle

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from sslbench.errors import UserError
from sslbench.files import sha256_file
from sslbench.recipe import Optim
from sslbench.train.guard import FiniteGuard
from sslbench.train.optim import adamw, learning_rate, parameter_groups
from sslbench.train.state import load_checkpoint, newest_checkpoint, save_checkpoint


def test_a_checkpoint_comes_back_and_only_the_newest_two_stay(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"x": torch.full((3,), step), "cost": {"wall_s": 1.5}})
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["step_000000002.pt", "step_000000030.pt"]
    step, state = newest_checkpoint(tmp_path)
    assert step == 30 and state["x"].tolist() == [30, 30, 30] and state["cost"] == {"wall_s": 1.5}
    assert not list(tmp_path.glob(".*")) and len(list(tmp_path.glob("*.sha256"))) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unfinished"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, damage):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(100)})
    path = save_checkpoint(tmp_path, 2, {"x": torch.zeros(100)})
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.with_suffix(".sha256").unlink()
    with pytest.warns(UserWarning, match="falling back"):
        step, _ = newest_checkpoint(tmp_path)
    assert step == 1


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path):
    path = tmp_path / "step_000000001.pt"
    torch.save({"x": Payload(tmp_path / "pwned")}, path)
    path.with_suffix(".sha256").write_text(sha256_file(path))
    with pytest.raises(UserError, match="could run code"):
        newest_checkpoint(tmp_path)
    path.write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    path.with_suffix(".sha256").write_text(sha256_file(path))
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_the_learning_rate_warms_up_and_follows_half_a_cosine_by_fractional_epoch():
    config = Optim(lr=1.5e-4, warmup_epochs=40, min_lr=1e-6)
    peak = 1.5e-4 * 4096 / 256
    at = lambda e: learning_rate(config, 4096, e, 800)  # noqa: E731
    assert at(0) == 0 and at(10.5) == pytest.approx(peak * 10.5 / 40) and at(40) == pytest.approx(peak)
    assert at(420) == pytest.approx(1e-6 + (peak - 1e-6) / 2) and at(800) == pytest.approx(1e-6)
    assert at(230.25) == pytest.approx(1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * 190.25 / 760)) / 2)


def test_biases_norms_and_scalars_do_not_decay_but_tokens_do():
    module = nn.Module()
    module.linear, module.norm = nn.Linear(3, 3), nn.LayerNorm(3)
    module.cls_token, module.log_scale = nn.Parameter(torch.zeros(1, 1, 3)), nn.Parameter(torch.zeros(()))
    module.pos_embed = nn.Parameter(torch.zeros(1, 2, 3), requires_grad=False)
    decay, plain = ({id(p) for p in g["params"]} for g in parameter_groups(module, 0.05))
    assert decay == {id(module.linear.weight), id(module.cls_token)}
    assert plain == {id(p) for p in (module.linear.bias, module.norm.weight, module.norm.bias, module.log_scale)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU")])])  # fmt: skip
def test_a_non_finite_gradient_moves_neither_weights_nor_moments_and_nothing_moves_after(device):
    fabric = Fabric(accelerator=device, devices=1)
    module = nn.Linear(2, 1)
    module, optimizer = fabric.setup(module, adamw(module, Optim(lr=1)))
    guard = FiniteGuard(fabric.device)
    guard.arm(optimizer)
    weights = []
    for value in (1.0, float("nan"), 1.0):  # once tripped, it stays
        module.weight.grad = torch.full((1, 2), value, device=fabric.device)
        module.bias.grad = torch.zeros(1, device=fabric.device)
        guard.check(nn.utils.get_total_norm([p.grad for p in module.parameters()]))
        optimizer.step()
        moments = [s["exp_avg"].clone() for s in optimizer.state_dict()["state"].values()]
        weights.append([*(p.detach().clone() for p in module.parameters()), *moments])
        assert guard.tripped() == (len(weights) > 1)
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(*weights, strict=True))
    assert all(x.isfinite().all() for x in weights[-1])
