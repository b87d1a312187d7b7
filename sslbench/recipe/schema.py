"""Recipe = science (all that may change a number) + machine (all that may not). The hash is of science alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from ..data import data_name
from ..files import digest
from ..method import name_of
from ..strict import Strict, validate
from ..views import Augment
from ..vit import arch_name


class Data(Strict):
    spec: str = "imagenet"  # see `sslbench data list`
    image_size: int | None = Field(None, gt=0)  # pixels a side of a view; None: the arch's own


Share = Annotated[float, Field(ge=0, lt=1)]


class Optim(Strict):
    """AdamW and its schedule. Defaults: MAE's pre-training."""

    lr: float = Field(1.5e-4, gt=0)  # base lr: the actual lr is lr x batch_size / 256
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)  # not on biases, norms and other tensors of one dimension
    # Where the weight decay ends, along half a cosine (DINO); None: it stays, which the hash does not know of.
    weight_decay_end: float | None = Field(None, ge=0, exclude_if=lambda end: end is None)
    warmup_epochs: float = Field(40, ge=0)
    min_lr: float = Field(0.0, ge=0)  # where the cosine ends
    clip_grad: float | None = Field(None, gt=0)  # largest gradient norm; None: no clipping

    @model_validator(mode="after")
    def _decays(self) -> Optim:
        if self.weight_decay_end is not None and not self.weight_decay:
            raise ValueError("weight_decay_end is where weight_decay goes to: set that above 0, where it begins")
        return self


# 800 and 800.0 are one number, and so one hash.
Epochs = Annotated[int | float, AfterValidator(lambda e: int(e) if e == int(e) else e)]


class Init(Strict):
    """Weights that pre-training starts from. Their hash is part of science's, the place where they lie is not."""

    source: str  # RUN, FILE or timm:NAME, as `sslbench eval` takes them
    sha256: str | None = None  # of their tensors; None: nobody has looked yet (evaluate/start.py)


def _init(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _arch(value: Any) -> Any:
    """`{patch: 8, dim: 384, depth: 12, heads: 6}` -> the name that says so."""
    if not isinstance(value, dict):
        return value
    return arch_name(**validate(Sizes, value, "of an arch of your own", "science.arch.").model_dump())


class Sizes(Strict):
    """A ViT of one's own."""

    patch: int
    dim: int
    depth: int
    heads: int
    image: int | None = None  # pixels a side of its views; None: 32 for patches of up to 4 pixels, else 224


class Science(Strict):
    method: dict[str, Any]  # name, preset, and the method's own config
    arch: Annotated[str, BeforeValidator(_arch)] = "vit_b16"  # a name of vit.ARCHS, or its sizes
    data: Data = Data()
    augment: Augment = Augment()
    epochs: Epochs = Field(800, ge=0)  # a part of an epoch is that part of its steps
    # The run's length as time on its device; the number of epochs is then the schedule's alone. See train/clock.py.
    device_minutes: float | None = Field(None, gt=0, exclude_if=lambda minutes: minutes is None)
    batch_size: int = Field(4096, gt=0)  # images a step, over all devices and accumulation
    contrastive_batch: int | None = Field(None, gt=0)  # images that one loss compares; None: the whole batch
    optim: Optim = Optim()
    # None: random ones.
    init: Annotated[Init | None, BeforeValidator(_init)] = Field(None, exclude_if=lambda init: init is None)
    seed: int = Field(0, ge=0, lt=2**31)


# YAML reads 32 and 16 as numbers; the command line gives words.
Precision = Annotated[Literal["auto", "32", "bf16", "16"], BeforeValidator(str)]


class Machine(Strict):
    devices: int = Field(1, gt=0)
    nodes: int = Field(1, gt=0)
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # fsdp: weights in parts; auto: from vit_h14 on several devices
    precision: Precision = "auto"  # auto: bf16 where the device computes it faster, else 32
    # Images a forward pass; None: as many as the batch allows; auto: as many as the device's memory does
    # (train/memory.py). Fewer than a loss compares: see train/cache.py.
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    workers: int = Field(4, ge=0)  # that decode images; data sets that live in memory need none
    compile: bool = False
    log_every: int = Field(20, gt=0)  # steps; only these wait for the device, and those of meters_every
    meters_every: int = Field(100, gt=0)  # steps between looks at the terms' gradients and at collapse
    save_every: int | None = Field(None, gt=0)  # steps between checkpoints; None: an epoch, or more where that is short
    watch: bool = True  # k-NN on part of train while the run goes on, for at most 2 % of its time: train/watch.py
    keep_at: list[Annotated[float, Field(gt=0, lt=1)]] = []  # shares of the run at which its weights are kept too
    tensorboard: bool = True
    track: Literal["wandb", "trackio", "mlflow"] | None = None  # gets what TensorBoard gets: train/track.py

    @property
    def images_a_pass(self) -> int | None:
        """`micro_batch`, where it is a number. An `auto` that nobody has counted yet is as many as the batch allows."""
        return None if self.micro_batch == "auto" else self.micro_batch

    def saves_every(self, per_epoch: int, total: int) -> int:
        """Steps between the checkpoints of a run of `total` steps."""
        return self.save_every or max(per_epoch, min(total // 100, 500), 1)


def without_auto(machine: Machine) -> Machine:
    if machine.micro_batch == "auto":
        raise ValueError("micro_batch: auto counts the memory of a pre-training; give a number here, or leave it out")
    return machine


SetMachine = Annotated[Machine, AfterValidator(without_auto)]  # of what is not pre-training


class Recipe(Strict):
    name: str
    science: Science
    machine: Machine = Machine()
    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What was chosen that neither a file nor the user says, a line each: for the header."""
        return self._notes

    @property
    def method(self) -> str:
        return self.science.method["name"]

    @property
    def method_name(self) -> str:
        """What folders, hashes and numbers call it."""
        return name_of(self.method)

    @property
    def preset(self) -> str:
        return self.science.method["preset"]

    def on(self, machine: Machine) -> Recipe:
        """The same science on another machine."""
        return self.model_copy(update={"machine": machine})

    def hash(self) -> str:
        """12 hex digits of SHA-256 over science, without the seed (seeds of one recipe share a hash; the seed stands
        beside it), without the preset's name (its values count) and without the folders that data and weights to start
        from lie in."""
        science = self.science.model_dump(mode="json")
        science.pop("seed")
        science["method"].pop("preset")
        science["method"]["name"] = self.method_name
        science["data"]["spec"] = data_name(self.science.data.spec)
        if init := self.science.init:
            science["init"] = init.sha256 or init.source
        return digest(science)
