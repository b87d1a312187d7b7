"""Losses against hand values, in float32 whatever the autocast, and over two processes as over one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import METHODS, images, make
from torch.nn import functional as F

from sslbench.losses import cosine_matrix, cross_entropy_to, info_nce_with_bank, normalise_patches, patch_mse, tsp
from sslbench.siamese import BatchNorm, MemoryBank, cosine_momentum, ema_, momentum_copy


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


# -------------------------------------------------------------------------------- two processes, every method

CASES = {
    **{(name, None): {} for name in METHODS},
    ("ocl", True): {"gather_negatives": True, "mlp_head": "2-layer"},
    ("ocl", False): {"gather_negatives": False},
    ("ocl", "eq3"): {"gather_negatives": True, "denominator": "eq3"},
    ("ccmim", True): {"gather_negatives": True},
    ("ccmim", False): {"gather_negatives": False},
    ("ccmim", "official"): {"gather_negatives": True, "contrast": "official"},
    ("ccmim", "align"): {"gather_negatives": True, "contrast": "align"},
    ("mocov3", True): {"gather_negatives": True},
    ("mocov3", False): {"gather_negatives": False},
    ("siameseim", True): {"gather_negatives": True},
    ("siameseim", False): {"gather_negatives": False},
    ("cmae", None): {"contrast_weight": 0.1},  # rounding grows with its weight / tau
    ("cmae", True): {"gather_negatives": True, "mask_ratio": 0.65, "mask_unit": 2, "two_tau": True},
    ("cmae", False): {"gather_negatives": False, "contrast_weight": 0.1},
    ("macrl", True): {"gather_negatives": True, "memory_bank": False, "proj_norm": "bn"},
    ("macrl", False): {"gather_negatives": False, "memory_bank": False, "proj_norm": "bn"},
}


def per_device(name, case):
    """Whether, by its documentation, each device of this case contrasts its own part alone."""
    return case is False or (name == "ocl" and case is None)


def losses_and_state(case, *parts):
    """Of the mean over `parts` of one batch: the loss, each gradient, and what after_step leaves in buffers."""
    method = make(case[0], **CASES[case])
    views = method.build_views(images(32), torch.Generator().manual_seed(0))
    loss = sum(method.loss(method({k: v[p] for k, v in views.items()}))["loss"] for p in parts) / len(parts)
    loss.backward()
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    method.after_step(0.5)
    return [loss.detach(), *gradients], [v for k, v in method.state_dict().items() if k.startswith("bank.")]


def _process(rank, rendezvous, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        reduced, bank = losses_and_state(case, slice(16 * rank, 16 * rank + 16))
        for t in reduced:  # what data parallelism does to gradients
            dist.all_reduce(t)
            t /= 2
        found[case] = reduced, bank
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_whole_batchs_loss_and_gradients_or_the_mean_of_halves_where_documented(tmp_path):
    mp.spawn(_process, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert {name for name, _ in CASES} == set(METHODS)
    for case in CASES:
        halves, _ = losses_and_state(case, slice(0, 16), slice(16, 32))
        whole, bank = losses_and_state(case, slice(0, 32))
        expected = halves if per_device(*case) else whole
        (found, found_bank), (_, other_bank) = ranks[0][case], ranks[1][case]
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=lambda m, case=case: f"{case}: {m}")
        for got, other, want in zip(found_bank, other_bank, bank, strict=True):  # in the order of the whole batch
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
            assert got.equal(other)
        if per_device(*case):
            assert abs(whole[0] - halves[0]) > 1e-3, case  # the two are not the same thing


def test_batch_norm_over_one_process_is_torchs():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5, everywhere=True).double(), torch.nn.BatchNorm1d(5).double()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b)
    (a**3).sum().backward(), (b**3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(y))


def test_a_bank_is_a_ring_and_the_positive_stands_first():
    torch.manual_seed(0)
    bank = MemoryBank(5, 2)
    assert bank.keys.norm(dim=1).allclose(torch.ones(5))
    keys = F.normalize(torch.randn(7, 2), dim=1)
    old = bank.keys.clone()
    bank.push(keys[:3])
    assert bank.keys.equal(torch.cat([keys[:3], old[3:]]))
    bank.push(keys[3:7])  # wraps: the two oldest of the first three go
    assert bank.keys.equal(torch.stack([keys[5], keys[6], keys[2], keys[3], keys[4]])) and bank.next == 2
    bank.push(keys)  # more than fit: the last five stay
    assert {tuple(k) for k in bank.keys.tolist()} == {tuple(k) for k in keys[2:].tolist()}
    q, k = torch.randn(4, 2), torch.randn(4, 2)
    logits = torch.cat([F.cosine_similarity(q, k)[:, None], F.normalize(q) @ bank.keys.T], 1) / 0.2
    expected = -logits.log_softmax(1)[:, 0].mean()
    torch.testing.assert_close(info_nce_with_bank(q, k, bank.keys, 0.2), expected)


def test_momentum_is_the_average_of_the_formula_and_its_schedule_ends_at_one():
    torch.manual_seed(0)
    source = torch.nn.Linear(3, 2)
    target = momentum_copy(source)
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        source.weight += 1
    ema_(target, source, 0.9)
    for new, old, theirs in zip(target.parameters(), before, source.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * theirs)
        assert not new.requires_grad
    assert cosine_momentum(0.99, 0) == pytest.approx(0.99) and cosine_momentum(0.99, 1) == 1
    assert cosine_momentum(0.99, 0.5) == pytest.approx(0.995)
