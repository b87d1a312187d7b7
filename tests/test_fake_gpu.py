"""A whole step on a GPU that there is not: fake tensors have its device and no values. What stays on the CPU fails, and
what is float64, which Apple's GPUs have not. (Fake tensors of theirs need a torch that was built for them.)"""

import functools
import sys

import pytest
import torch
from tiny import METHODS, TINY, make
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from sslbench.device import bf16_is_fast, default_device
from sslbench.errors import UserError
from sslbench.evaluate.attentive import AttentiveProbe
from sslbench.evaluate.evaluation import eval_recipe
from sslbench.evaluate.finetune import Classifier
from sslbench.evaluate.probe import Probe
from sslbench.recipe import Augment
from sslbench.train.memory import moved
from sslbench.vit import VisionTransformer

GPU = torch.device("cuda", 0)


class GpuGenerator(torch.Generator):
    """Says that it is on the GPU; `Undrawn` keeps it from what would draw by it."""

    device = GPU


class Undrawn(TorchFunctionMode):
    """Without generators, which need a real GPU, and without float64, which Apple's have not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("generator", None)
        made = function(*args, **kwargs)
        if isinstance(made, torch.Tensor) and made.device == GPU and made.dtype == torch.float64:
            raise TypeError("an Apple GPU has no float64")
        return made


def forget():
    """Constants that are made once a device: fake ones are for no other test."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sslbench"):
            for made in vars(module).values():
                if isinstance(made, functools._lru_cache_wrapper):
                    made.cache_clear()


@pytest.fixture
def gpu():
    """gpu(build): what `build` builds on the host, there."""
    forget()
    fake = FakeTensorMode()
    with fake, Undrawn():

        def build(make_it):
            with unset_fake_temporarily():
                made = make_it()
            return moved(made, GPU)

        yield build
    forget()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_leaves_nothing_on_the_host(name, gpu):
    method, pixels = gpu(lambda: make(name)), torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=GPU)
    views = method.build_views(pixels, GpuGenerator())
    assert {v.device for v in views.values()} == {GPU}
    losses = method.loss(method(views))
    method.after_step(0.5)
    assert all(x.device == GPU for x in losses.values()), losses
    assert all(x.device == GPU for x in method.state_dict().values())


FINETUNE = ["mixup=0.8", "cutmix=1.0", "erase_p=0.25", "erase_mode=cutout", "drop_path=0.1"]


@pytest.mark.parametrize(
    ("kind", "recipe", "sets", "build"),
    [
        ("finetune", "finetune", FINETUNE, lambda s, encoder: Classifier(s, encoder, Augment(), 10)),
        ("linprobe", "linprobe_mae", [], lambda s, encoder: Probe(s, encoder, Augment(), 10, "cls")),
        ("attentive", "attentive", ["queries=4"], lambda s, encoder: AttentiveProbe(s, encoder, Augment(), 10)),
    ],
)
def test_a_step_with_labels_leaves_nothing_on_the_host(kind, recipe, sets, build, gpu):
    science = eval_recipe(kind, recipe, [f"science.{x}" for x in sets]).science
    model, pixels = gpu(lambda: build(science, VisionTransformer(TINY))), torch.empty(4, 3, 32, 32, device=GPU)
    labels = torch.empty(4, dtype=torch.long, device=GPU)
    views = model.build_views(pixels.to(torch.uint8), GpuGenerator(), labels)
    assert {v.device for v in views.values()} == {GPU}
    assert model.loss(model(views))["loss"].device == GPU


@pytest.mark.parametrize("config", [{}, {"window": 2, "relative_positions": "table"}, {"relative_positions": "shared"},
                                    {"relative_positions": "decomposed", "layer_scale": 0.1}])  # fmt: skip
def test_a_transfers_backbone_leaves_nothing_on_the_host(config, gpu):
    transfer = pytest.importorskip("sslbench.transfer.backbone")
    from sslbench.transfer.protocol import Encoder

    encoder = Encoder(drop_path=0.1, keep_cls=not config, **config)
    model = gpu(lambda: transfer.Backbone(VisionTransformer(TINY), encoder, (4, 4)))
    maps = model.train()(torch.empty(2, 3, 32, 32, device=GPU))
    assert {x.device for x in maps} == {GPU}


def test_what_stays_on_the_host_fails(gpu):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3) + torch.zeros(3, device=GPU)


def test_what_apples_gpus_have_not_fails(gpu):
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, device=GPU).double()


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["machine.precision=bf16"], "machine.precision=bf16 is not offered on Apple's GPU: set machine.precision=32"),
        (["machine.precision=16"], "set machine.precision=32"),
        (["machine.devices=2"], "set machine.devices=1"),
        (["machine.compile=true"], "set machine.compile=false, or SSLBENCH_DEVICE=cpu"),
    ],
)
def test_what_is_not_offered_on_apples_gpu_is_said(sets, says, invoke, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    words = [word for x in sets for word in ("--set", x)]
    done = invoke("pretrain", "mae", "--recipe", "mae_smoke", "--data", "builtin", *words)
    assert done.exit_code == 2 and says in " ".join(done.stderr.split()), done.stderr


def test_the_device_is_a_gpu_where_there_is_one_and_the_users_if_it_is_here(monkeypatch):
    monkeypatch.delenv("SSLBENCH_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device().type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device().type == "mps" and not bf16_is_fast("mps")
    monkeypatch.setenv("SSLBENCH_DEVICE", "cpu")
    assert default_device().type == "cpu"
    monkeypatch.setenv("SSLBENCH_DEVICE", "cuda")
    with pytest.raises(UserError, match="SSLBENCH_DEVICE=cuda: this machine has mps and cpu"):
        default_device()
