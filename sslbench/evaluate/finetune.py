"""Fine-tuning of all weights with labels, as MAE's main_finetune.py runs it, on the loop of pre-training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageOps
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..data import ImageSet
from ..data.loader import evaluation_batches, host_seed
from ..draws import numbered, rand, seed_of
from ..errors import UserError
from ..method import Method
from ..recipe import Augment, Batch, Epochs, Optim
from ..strict import Strict
from ..train.optim import adamw, layer_groups
from ..views import cut_out, normalise, one_view
from ..vit import VisionTransformer, get_arch, parts_of, pool_tokens, resample_positions
from ..weights import write_weights
from .features import Subject, read_safetensors
from .job import LabelledJob
from .labels import LabelShare

if TYPE_CHECKING:  # timm and torchvision are imported where they are used: k-NN need not wait for them
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing

WORDS = ("cifar10", "original", "rand-m9-mstd0.5-inc1")  # of auto_augment, that need not be tried with timm
HEAD_STD = 2e-5  # of the head's initial weights


class FinetuneOptim(Optim):
    """AdamW with layer-wise lr decay. Defaults: MAE's for ViT-B."""

    lr: float = Field(5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = Field(5, ge=0)
    min_lr: float = Field(1e-6, ge=0)
    layer_decay: float = Field(0.65, gt=0, le=1)  # 1: one lr for all layers


class Finetune(Strict):
    """The protocol's every switch. Defaults: MAE's for ViT-B on ImageNet."""

    protocol: Literal["finetune"]
    epochs: Epochs = Field(100, ge=0)
    batch_size: int = Field(1024, gt=0)
    optim: FinetuneOptim = FinetuneOptim()
    image_size: int | None = Field(None, gt=0)  # None: that of pre-training
    pool: Literal["cls", "mean"] = "mean"  # mean: of patches, a LayerNorm after it and none before
    drop_path: float = Field(0.1, ge=0, lt=1)  # of the last block; grows linearly from 0
    train_positions: bool = True
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    # timm's words, of which `original` is AutoAugment's policy for ImageNet; `cifar10`: that for CIFAR; None: neither.
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase_p: float = Field(0.25, ge=0, le=1)
    erase_mode: Literal["pixel", "cutout"] = "pixel"  # timm's rectangle of noise, or CutOut's square of half a side
    mix_batch: int = Field(32, gt=0, multiple_of=2)  # images that share a draw of mixup or CutMix; MAE's images a GPU
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    mix_p: float = Field(1.0, ge=0, le=1)
    mix_switch: float = Field(0.5, ge=0, le=1)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    labels: LabelShare = None  # a share of train's: see labels.py

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, tree: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Where nothing is mixed, mix_batch is no part of the protocol, nor of its hash."""
        science = tree(self)
        if not (self.mixup or self.cutmix):
            science.pop("mix_batch")
        return science

    @field_validator("auto_augment")
    @classmethod
    def _known(cls, words: str | None) -> str | None:
        if words not in (None, *WORDS):
            try:
                Distortion(words, (0.5, 0.5, 0.5)).make(32)
            except (AssertionError, ValueError, KeyError, IndexError):  # what timm raises
                raise ValueError("expected cifar10, original, or timm's words such as rand-m9-mstd0.5-inc1") from None
        return words


@dataclass
class Distortion:
    """RandAugment or AutoAugment of a PIL crop, by timm or, for CIFAR's policy, torchvision; draws from `random` and
    `numpy.random`. Made where it is used, since loader processes are sent this and not timm's closures."""

    words: str
    mean: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Image.Image:
        if not hasattr(self, "_transform"):
            self._transform: Any = self.make(min(image.size))
        return self._transform(image)

    def make(self, side: int) -> Any:
        """The transform, for images of which that is the shorter side, in pixels."""
        fill = tuple(min(255, round(255 * m)) for m in self.mean)
        if self.words == "cifar10":
            from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy

            policy = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=list(fill))
            return partial(with_torch_seeded, policy)
        from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

        parameters = {
            "translate_const": int(side * 0.45),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        make = rand_augment_transform if self.words.startswith("rand") else auto_augment_transform
        transform = make(self.words, parameters)
        for op in getattr(transform, "ops", []):
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
        return transform


def with_torch_seeded(transform: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    """The transform of an image, its draws from torch's global generator set by one from `random`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.getrandbits(63))
        return transform(image)


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep `bits` of each channel. At its greatest strength timm's RandAugment keeps none: Pillow once made that black,
    and now refuses."""
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


class DrawnPath(nn.Module):
    """Drop path (Huang et al. 2016) by draws (B,) in 0..1 that it is given, so that they are each image's own."""

    draws: Tensor | None = None

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draws is None or not self.drop_prob:
            return x
        keep = (self.draws >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        return x * keep[:, None, None]


def erase_(x: Tensor, erase: RandomErasing, seed: int, numbers: range) -> None:
    """timm's random erasing of images (B, 3, H, W) in place, drawn by a seed for each: the step's, and its number."""
    with host_seed(seed), torch.random.fork_rng([x.device] if x.is_cuda else []):  # what timm draws from
        for image, number in zip(x, numbers, strict=True):
            own = seed_of("erase", seed, number)
            random.seed(own)
            torch.manual_seed(own)
            erase(image)


def mixed(x: Tensor, targets: Tensor, mix: Mixup, together: int, seed: int, numbers: range) -> tuple[Tensor, Tensor]:
    """timm's mixup or CutMix of images 2 i and 2 i + 1 of the step: images (B, 3, H, W), targets (B, classes).

    One draw for every `together` images of the step, in whichever passes they come. Of a batch in random order, these
    pairs are as good as timm's, which are the first with the last.
    """
    from timm.data.mixup import cutmix_bbox_and_lam

    other, others = (a.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) for a in (x, targets))
    x, targets = x.clone(), targets.clone()
    begin = 0
    while begin < len(x):
        group, place = divmod(numbers[begin], together)
        rows = slice(begin, min(len(x), begin + together - place))
        with host_seed(seed_of("mix", seed, group)):
            share, cuts = mix._params_per_batch()
            if cuts:
                (top, bottom, left, right), share = cutmix_bbox_and_lam(x.shape, share)
                x[rows, :, top:bottom, left:right] = other[rows, :, top:bottom, left:right]
            else:
                x[rows] = x[rows].lerp(other[rows], 1 - share)
        targets[rows] = targets[rows].lerp(others[rows], 1 - share)
        begin = rows.stop
    return x, targets


class Classifier(Method):
    """An encoder with a head, trained end to end. pool mean: fc_norm on the mean of patches, no final norm (MAE)."""

    def __init__(self, science: Finetune, encoder: VisionTransformer, augment: Augment, classes: int) -> None:
        super().__init__(None, encoder, augment)
        self.science, self.classes, self.pool = science, classes, science.pool  # type: ignore[misc]
        self.fc_norm: nn.Module = nn.Identity()
        if encoder.parts.pooled_norm:  # a published model's own: it goes on from there
            self.fc_norm, encoder.pooled_norm = encoder.pooled_norm, nn.Identity()
        elif science.pool == "mean":
            encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(encoder.arch.dim, eps=1e-6)
        self.head = nn.Linear(encoder.arch.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        encoder.requires_grad_(True)
        encoder.pos_embed.requires_grad_(science.train_positions and encoder.parts.absolute)
        blocks: Any = encoder.blocks
        for i, block in enumerate(blocks):
            rate = science.drop_path * i / max(1, len(blocks) - 1)
            block.drop_path1, block.drop_path2 = DrawnPath(rate), DrawnPath(rate)
        self.mix: Mixup | None = None
        if science.mixup or science.cutmix:
            from timm.data.mixup import Mixup

            self.mix = Mixup(
                science.mixup,
                science.cutmix,
                prob=science.mix_p,
                switch_prob=science.mix_switch,
            )

    def build_views(
        self, images: Tensor, generator: torch.Generator, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """images (B, 3, H, W) or PIL-made crops (B, 1, 3, S, S), labels (B,) -> {"images", "targets" (B, classes)}."""
        assert labels is not None
        s = self.science
        x = one_view(images, self.encoder.image[0], self.augment, generator)
        off = s.label_smoothing / self.classes
        targets = F.one_hot(labels, self.classes) * (1.0 - s.label_smoothing) + off
        seed, numbers = numbered(len(x), generator)
        if s.erase_p and s.erase_mode == "cutout":
            x = cut_out(x, x.shape[-1] // 2, s.erase_p, generator)
        elif s.erase_p:
            from timm.data.random_erasing import RandomErasing

            erase_(x, RandomErasing(s.erase_p, mode=s.erase_mode, max_count=1, device=x.device.type), seed, numbers)
        if self.mix:
            x, targets = mixed(x, targets, self.mix, s.mix_batch, seed, numbers)
        paths = rand((len(x), len(self.encoder.blocks), 2), generator).to(x.device) if s.drop_path else None
        return {"images": x, "targets": targets, **({} if paths is None else {"paths": paths})}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        if "paths" in views:
            blocks: Any = self.encoder.blocks
            for block, draws in zip(blocks, views["paths"].unbind(1), strict=True):
                block.drop_path1.draws, block.drop_path2.draws = draws.unbind(1)
        return {"logits": self.logits(views["images"]), "targets": views["targets"]}

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> (B, classes)."""
        return self.head(self.fc_norm(pool_tokens(self.encoder(images), self.pool)))

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            return {"loss": F.cross_entropy(outputs["logits"].float(), outputs["targets"])}


class FinetuneJob(LabelledJob):
    kind = "finetune"
    metric = "finetune_top1"

    def __init__(self, recipe: Any, subject: Subject, spec: str, train: ImageSet, *about: Any) -> None:
        super().__init__(recipe, subject, spec, train, *about)
        s: Finetune = self.science
        self.distort = Distortion(s.auto_augment, subject.mean) if s.auto_augment else None
        self.augment = Augment(crop_scale=s.crop_scale, flip=s.flip, mean=subject.mean, std=subject.std)

    def batch(self) -> Batch:
        batch = super().batch()
        if (self.science.mixup or self.science.cutmix) and batch.micro % 2:
            raise UserError(
                f"mixup pairs the images of a pass, so their number must be even, not {batch.micro}: change "
                f"science.batch_size or machine.micro_batch"
            )
        return batch

    def build(self) -> Classifier:
        encoder = resized(self.subject.encoder, self.image_size)
        return Classifier(self.science, encoder, self.augment, len(self.train.classes))

    def optimizer(self, method: Method) -> torch.optim.Optimizer:
        o, depth = self.science.optim, len(method.encoder.blocks)
        return adamw(method, o, layer_groups(method, depth, o.weight_decay, o.layer_decay))

    def flops_per_image(self) -> float:
        with torch.device("meta"):
            encoder = VisionTransformer(self.subject.encoder.arch, self.image_size, self.subject.encoder.parts)
            model = Classifier(self.science, encoder, self.augment, len(self.train.classes))
            with FlopCounterMode(display=False) as counter:
                model.logits(torch.zeros(2, 3, *encoder.image)).sum().backward()
        return counter.get_total_flops() / 2

    def score(self, weights: Path, val: ImageSet, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        assert val.labels is not None
        model, _, _ = load_classifier(weights)
        answer = predict(model, val, device, self.machine.workers).argmax(1)
        return answer == val.labels, {"epochs": self.epochs}

    def save_weights(self, path: Path, method: Method) -> None:
        """Encoder and head under timm's names, with what rebuilds and explains them."""
        assert isinstance(method, Classifier)
        metadata = {
            "kind": "classifier",
            "arch": self.subject.arch,
            "image_size": str(self.image_size),
            "science": self.science.model_dump_json(),
            "classes": json.dumps(self.train.classes),
            "mean": json.dumps(self.subject.mean),
            "std": json.dumps(self.subject.std),
        }
        state = {k.removeprefix("encoder."): v for k, v in method.state_dict().items()}
        write_weights(path, {k: v.float() for k, v in state.items()}, metadata)


def resized(encoder: VisionTransformer, image: int, key: str = "science.image_size") -> VisionTransformer:
    """A copy of the encoder for images of another size, its positions resampled. key: what a recipe calls the size.

    UserError: the positions are relative, or the size is no multiple of the patch.
    """
    if encoder.parts.relative and image != encoder.image[0]:
        raise UserError(
            f"the encoder's relative positions are for images of {encoder.image[0]} pixels, not {image}; "
            f"set {key}={encoder.image[0]}"
        )
    if image % encoder.arch.patch:
        raise UserError(f"{key}={image} is not a multiple of the patch, {encoder.arch.patch}")
    new = VisionTransformer(encoder.arch, image, encoder.parts)
    state = dict(encoder.state_dict())
    state["pos_embed"] = resample_positions(state["pos_embed"], encoder.grid, new.grid)
    new.load_state_dict(state)
    return new


def load_classifier(path: Path) -> tuple[Classifier, list[str], str]:
    """The fine-tuned model in `path`, the names of its classes, and its arch."""
    tensors, meta = read_safetensors(path)
    if meta.get("kind") != "classifier":
        raise UserError(f"{path} is not a fine-tuned model; `sslbench eval finetune` makes one of an encoder")
    classes = json.loads(meta["classes"])
    encoder = VisionTransformer(get_arch(meta["arch"]), int(meta["image_size"]), parts_of(tensors))
    augment = Augment(mean=json.loads(meta["mean"]), std=json.loads(meta["std"]))
    model = Classifier(Finetune.model_validate_json(meta["science"]), encoder, augment, len(classes))
    model.load_state_dict({k if k.startswith(("head.", "fc_norm.")) else f"encoder.{k}": v for k, v in tensors.items()})
    return model.eval(), classes, meta["arch"]


@torch.inference_mode()
def predict(model: Classifier, data: ImageSet, device: torch.device, workers: int, batch: int = 250) -> Tensor:
    """(N, classes) logits of every image's evaluation view, on the CPU."""
    model = model.to(device).eval()
    augment, out = model.augment, []
    for images in evaluation_batches(data, model.encoder.image[0], batch, device, workers):
        out.append(model.logits(normalise(images, augment.mean, augment.std)).float().cpu())
    return torch.cat(out)
