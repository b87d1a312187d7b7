"""Losses against hand values, in float32 whatever the autocast, and over two processes as over one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from sslbench.losses import cosine_matrix, cross_entropy_to, normalise_patches, patch_mse, tsp
from sslbench.masking import random_split
from sslbench.method import get_method
from sslbench.recipe import Augment
from sslbench.vit import Arch, VisionTransformer


@pytest.mark.parametrize(
    ("form", "expected"),
    [("divide", [1, 0.995, 0.949, 0.744, 0.492, 0.244]), ("multiply", [1, 0.607, 0.128, 0.023, 0.008, 0.003])],
)
def test_tsp_has_the_values_of_both_readings_of_kappa(form, expected):
    got = tsp(torch.tensor([1, 0.99, 0.9, 0.5, 0, -0.5]), 64, form)
    torch.testing.assert_close(got, torch.tensor(expected), atol=6e-4, rtol=0)


def test_tsp_is_t_vmf_shifted_to_the_unit_interval():
    c = torch.linspace(-1, 1, 101)
    t_vmf = (1 + c) / (1 + 16 * (1 - c)) - 1
    torch.testing.assert_close(2 * tsp(c, 16) - 1, t_vmf)


def test_norm_pix_targets_use_the_unbiased_variance():
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=True) + 1e-6) ** 0.5
    torch.testing.assert_close(normalise_patches(x), expected)


def test_patch_mse_is_the_mean_over_pixels_then_patches():
    prediction, target = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    assert patch_mse(prediction, target) == ((1 + 4) / 2 + (9 + 0) / 2) / 2


def test_the_positive_of_row_i_is_column_offset_plus_i():
    logits = torch.randn(2, 5)
    expected = -(logits[0].log_softmax(0)[3] + logits[1].log_softmax(0)[4]) / 2
    torch.testing.assert_close(cross_entropy_to(logits, 3), expected)


def test_losses_stay_float32_inside_autocast():
    a, b = torch.randn(8, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = cosine_matrix(a, b)
        losses = [similarity, tsp(similarity, 64.0), cross_entropy_to(similarity), patch_mse(a[None], b[None])]
        losses.append(normalise_patches(a[None]))
    assert all(x.dtype == torch.float32 for x in losses)
    expected = F.normalize(a.float()) @ F.normalize(b.float()).T
    torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)


def ocl(gathering):
    torch.manual_seed(0)
    cls = get_method("ocl")
    vit = VisionTransformer(Arch(patch=8, dim=48, depth=1, heads=3, image=32))
    return cls(cls.Config(gather_negatives=gathering, freeze_patch_embed=False), vit, Augment()).double()


def loss_and_gradient(method, *batches):
    """Of the mean over batches; the temperature's gradient is among the gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 32, 32, generator=g, dtype=torch.float64)
    keep = random_split(8, 16, 0.3, g)
    losses = [method.loss(method({"images": x[b], "keep": keep[b]}))["loss"] for b in batches]
    loss = sum(losses) / len(losses)
    loss.backward()
    return [loss.detach(), *(p.grad for p in method.parameters() if p.requires_grad)]


def _process(rank, rendezvous, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for gathering in (True, False):
        found = loss_and_gradient(ocl(gathering), slice(4 * rank, 4 * rank + 4))
        for t in found:  # what data parallelism does to gradients
            dist.all_reduce(t)
            t /= 2
        if rank == 0:
            torch.save(found, out / f"{gathering}.pt")
    dist.destroy_process_group()


def test_two_processes_give_ocls_whole_batch_when_gathering_and_the_mean_of_halves_when_not(tmp_path):
    mp.spawn(_process, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    whole = loss_and_gradient(ocl(True), slice(0, 8))
    halves = loss_and_gradient(ocl(False), slice(0, 4), slice(4, 8))
    assert abs(whole[0] - halves[0]) > 0.1
    for gathering, expected in ((True, whole), (False, halves)):
        found = torch.load(tmp_path / f"{gathering}.pt")
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
