"""What public weights are: as the command line tells it, or as it is known of a name of timm's."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from ..data import data_name
from ..errors import UserError

PUBLIC = "public weights"  # what a number of theirs is marked with


@dataclass(frozen=True)
class Told:
    """None: not told."""

    method: str | None = None
    data: str | None = None
    epochs: float | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(self))

    def __str__(self) -> str:
        """`mae, imagenet, 1600 epochs`"""
        epochs = None if self.epochs is None else f"{self.epochs:g} epochs"
        return ", ".join(part for part in (self.method, self.data, epochs) if part)


NOTHING = Told()


def tell(method: str | None, data: str | None, epochs: float | None) -> Told:
    """Keep what --as, --pretrained-on and --epochs say. UserError: --as reads like no method's name."""
    if method is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ,._+-]*", method):
        raise UserError(f"--as {method}: expected a method's name, such as mae or DINO")
    return Told(method, data_name(data) if data else None, epochs)


# Method and data are in timm's names, whose pretrained_cfg links the authors' files. Epochs: the MAE README offers the
# checkpoints of the paper, which compares those of 1600 (He et al. 2022, section 4.1); DINO trained ViT-S for 800,
# ViT-B/16 for 400, ViT-B/8 for 300 (Caron et al. 2021); DeiT 300 (Touvron et al. 2021); DeiT III 800 on ImageNet-1K
# (README_revenge.md of its code); I-JEPA's are in its files' names; DINOv2 counts iterations. All of timm's BEiT and
# BEiT v2 were fine-tuned with labels afterwards, so that no row that a paper prints is of them.
TIMM = {
    **{f"vit_{name}.mae": Told("mae", "imagenet", 1600)
       for name in ("base_patch16_224", "large_patch16_224", "huge_patch14_224")},
    **{f"vit_small_patch{patch}_224.dino": Told("DINO", "imagenet", 800) for patch in (16, 8)},
    "vit_base_patch16_224.dino": Told("DINO", "imagenet", 400),
    "vit_base_patch8_224.dino": Told("DINO", "imagenet", 300),
    **{f"vit_{size}_patch14_{registers}dinov2.lvd142m": Told("DINOv2", "lvd142m")
       for size in ("small", "base", "large", "giant") for registers in ("", "reg4_")},
    "vit_huge_patch14_gap_224.in1k_ijepa": Told("I-JEPA", "imagenet", 300),
    "vit_huge_patch16_gap_448.in1k_ijepa": Told("I-JEPA", "imagenet", 300),
    "vit_huge_patch14_gap_224.in22k_ijepa": Told("I-JEPA", "imagenet22k", 900),
    **{f"deit_{size}_{kind}patch16_224.fb_in1k": Told("DeiT", "imagenet", 300)
       for size in ("tiny", "small", "base") for kind in ("", "distilled_")},
    **{f"deit3_{size}_224.fb_in1k": Told("DeiT III", "imagenet", 800)
       for size in ("small_patch16", "base_patch16", "large_patch16", "huge_patch14")},
    **{f"beit_{size}_patch16_224.{after}": Told("BEiT fine-tuned", "imagenet22k")
       for size in ("base", "large") for after in ("in22k_ft_in22k", "in22k_ft_in22k_in1k")},
    **{f"beitv2_{size}_patch16_224.{after}": Told("BEiT v2 fine-tuned", "imagenet")
       for size in ("base", "large") for after in ("in1k_ft_in1k", "in1k_ft_in22k", "in1k_ft_in22k_in1k")},
}  # fmt: skip


def of_timm(name: str, config: dict[str, object]) -> Told:
    """What the model of that name is: by its name, or by timm's own of what was asked for (`vit_base_patch16_224_dino`
    is an old one)."""
    return TIMM.get(name) or TIMM.get(f"{config.get('architecture')}.{config.get('tag')}") or NOTHING


def both(known: Told, told: Told, where: str) -> Told:
    """What is known, filled in by what is told. UserError where they disagree."""
    merged = {}
    for f in fields(Told):
        a, b = getattr(known, f.name), getattr(told, f.name)
        alike = a.casefold() == b.casefold() if isinstance(a, str) and isinstance(b, str) else a == b
        if None not in (a, b) and not alike:
            raise UserError(f"{where} is known to be {known}: leave out what says otherwise ({told})")
        merged[f.name] = b if a is None else a
    return Told(**merged)
