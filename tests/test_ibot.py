"""iBOT: against its released code's numbers, of which no code is here; what it hides."""

import pytest
import torch
from tiny import REFERENCE, generator, gradient_norm, images, make, thousandths

from sslbench.vit import Arch


def test_it_gives_the_released_codes_losses_gradient_and_centres():
    """bytedance/ibot da316d8: its ViT, head and loss on these weights gave these losses; gradients within 2e-6."""
    method = make("ibot", REFERENCE, small_size=32)
    dice = thousandths(method)
    for centre in (method.momentum_centre, method.momentum_patch_centre):
        centre.mean.copy_(torch.randint(-200, 201, (32,), generator=dice).float() / 1000)
    g = generator(1)
    x1, x2 = (torch.randn(8, 3, 64, 64, generator=g) for _ in range(2))
    small, hidden = torch.randn(8, 2, 3, 32, 32, generator=g), torch.rand(8, 2, 16, generator=g) < 0.4
    hidden[0] = False
    losses = method.loss(method({"x1": x1, "x2": x2, "small": small, "hidden": hidden}))
    losses["loss"].backward()
    assert losses["cls"].item() == pytest.approx(6.184659, abs=5e-6)
    assert losses["patches"].item() == pytest.approx(5.249237, abs=5e-6)
    assert gradient_norm(method) == pytest.approx(38.869007, rel=1e-5)


def test_it_hides_no_patch_or_a_share_around_three_tenths_in_blocks():
    arch = Arch(patch=4, dim=48, depth=1, heads=3, image=56)  # 14 x 14 patches
    method = make("ibot", arch, small_crops=0)
    hidden = torch.cat([method._hidden(200, generator(s)) for s in range(5)])
    share = hidden.float().mean(1)
    assert 0.45 < (share == 0).float().mean() < 0.55
    some = share[share > 0]
    assert some.max() <= 0.5 and 0.25 < some.mean() < 0.31  # never more than is asked for
    rows = hidden[share > 0].view(-1, 14, 14)
    beside = (rows[:, :, 1:] & rows[:, :, :-1]).sum() / rows.sum()
    assert beside > 0.6  # at random it would be the share itself


def test_a_hidden_patch_is_not_seen_and_the_teacher_sees_all():
    method = make("ibot").eval()
    views = method.build_views(images(), generator())
    views["hidden"][:] = False
    views["hidden"][:, :, 3] = True
    other = {k: v.clone() for k, v in views.items()}
    other["x1"][:, :, :8, 24:32] += 1  # patch 3 of 16
    a, b = method(views), method(other)
    assert a["student_patches"][:, 0].equal(b["student_patches"][:, 0])
    assert not a["teacher_patches"][:, 0].equal(b["teacher_patches"][:, 0])
    assert a["student_patches"][:, 1].equal(b["student_patches"][:, 1])
