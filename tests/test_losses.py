"""Losses against hand values, in float32 whatever the autocast, and over two processes as over one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from sslbench.losses import cosine_matrix, cross_entropy_to, gather, normalise_patches, patch_mse, tsp


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


def test_losses_stay_float32_inside_autocast():
    a, b = torch.randn(8, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = cosine_matrix(a, b)
        losses = [similarity, tsp(similarity, 64.0), cross_entropy_to(similarity), patch_mse(a[None], b[None])]
    assert all(x.dtype == torch.float32 for x in losses)
    expected = F.normalize(a.float()) @ F.normalize(b.float()).T
    torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)


def contrast(weight, x, y, gathering):
    a, b = x @ weight, y @ weight
    if gathering:
        (all_a, first), (all_b, _) = gather(a), gather(b)
    else:
        all_a, all_b, first = a, b, 0
    s = lambda p, q: tsp(cosine_matrix(p, q), 64.0) * 14.3  # noqa: E731
    return (cross_entropy_to(s(a, all_b), first) + cross_entropy_to(s(b, all_a), first)) / 2


def inputs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 5), (8, 6), (8, 6))]


def _process(rank, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weight, x, y = inputs()
    results = []
    for gathering in (True, False):
        w = weight.clone().requires_grad_()
        loss = contrast(w, x[4 * rank :][:4], y[4 * rank :][:4], gathering)
        loss.backward()
        for t in (loss.data, w.grad):  # what data parallelism does to gradients
            dist.all_reduce(t)
            t /= 2
        results += [loss.detach(), w.grad]
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_the_whole_batch_when_gathering(tmp_path):
    mp.spawn(_process, (29511 + os.getpid() % 1000, tmp_path / "out.pt"), nprocs=2)
    loss, grad, local_loss, local_grad = torch.load(tmp_path / "out.pt")
    weight, x, y = inputs()
    whole = weight.clone().requires_grad_()
    contrast(whole, x, y, False).backward()
    torch.testing.assert_close(loss, contrast(weight, x, y, False), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad, whole.grad, atol=1e-6, rtol=0)
    halves = weight.clone().requires_grad_()
    mean = (contrast(halves, x[:4], y[:4], False) + contrast(halves, x[4:], y[4:], False)) / 2
    mean.backward()
    torch.testing.assert_close(local_loss, mean.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(local_grad, halves.grad, atol=1e-6, rtol=0)
