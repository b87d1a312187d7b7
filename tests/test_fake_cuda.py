"""A whole step on a GPU that there is not: fake tensors have its device and no values. What stays on the CPU fails."""

import functools
import sys

import pytest
import torch
from tiny import METHODS, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


class CudaGenerator(torch.Generator):
    """Says that it is on the GPU; `Undrawn` keeps it from what would draw by it."""

    device = CUDA


class Undrawn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("generator", None)
        return function(*args, **kwargs)


def moved(module):
    """`module.to("cuda")`, whose parameters fake tensors do not let `to` exchange: what `to` leaves behind stays here."""
    there = {}

    def move(x):
        if id(x) not in there:
            fake = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
            there[id(x)] = torch.nn.Parameter(fake, x.requires_grad) if isinstance(x, torch.nn.Parameter) else fake
        return there[id(x)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({key: move(x) for key, x in held.items() if x is not None})
    return module


def forget():
    """Constants that are made once a device: fake ones are for no other test."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sslbench"):
            for made in vars(module).values():
                if isinstance(made, functools._lru_cache_wrapper):
                    made.cache_clear()


@pytest.fixture
def real(name):
    return make(name)


@pytest.fixture
def gpu():
    forget()
    with FakeTensorMode(), Undrawn():
        yield
    forget()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_leaves_nothing_on_the_host(name, real, gpu):
    method, pixels = moved(real), torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    views = method.build_views(pixels, CudaGenerator())
    assert {v.device for v in views.values()} == {CUDA}
    losses = method.loss(method(views))
    method.after_step(0.5)
    assert all(x.device == CUDA for x in losses.values()), losses
    assert all(x.device == CUDA for x in method.state_dict().values())


def test_what_stays_on_the_host_fails(gpu):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3) + torch.zeros(3, device=CUDA)
