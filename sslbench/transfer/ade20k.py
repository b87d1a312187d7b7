"""ADE20K: UPerNet over the suite's ViT, from layout to mIoU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets import ADE20KDataset
from mmseg.evaluation import IoUMetric
from mmseg.visualization import SegLocalVisualizer

from ..data.labelled import ADE20K_CLASSES, Labelled, accept, open_ade20k
from ..errors import UserError
from . import loading  # noqa: F401 - registers how a photograph is read
from .backbone import backbone_config, pixels
from .job import Split
from .necks import norm_cfg
from .protocol import Ade20k
from .runner import pictures, test

SCOPE = "mmseg"
OFFICIAL = {"train": 20_210, "val": 2_000}


def image_size(s: Ade20k) -> int:
    return s.crop


# ------------------------------------------------------------------------------------------------------------- the data


def open_data(root: Path, s: Ade20k) -> tuple[Split, Split]:
    """Train and val of ADEChallengeData2016's layout. UserError: what was expected, and what is there."""
    splits = {split: open_ade20k(root, split) for split in OFFICIAL}
    accept(*splits.values())
    official = {split: len(f.files) // 2 for split, f in splits.items()} == OFFICIAL
    out = []
    for split, labelled in splits.items():
        dataset = ADE20KDataset(
            data_prefix={"img_path": str(labelled.images), "seg_map_path": str(labelled.source)},
            pipeline=_train_pipeline(s, labelled) if split == "train" else _test_pipeline(s, labelled),
            test_mode=split == "val",
        )
        listing = "".join(f"{p.parent.name}/{p.name}\0{p.stat().st_size}\n" for p in labelled.files)
        fingerprint = hashlib.sha256(listing.encode()).hexdigest()[:12]
        name = "ade20k" if official else labelled.images.parents[1].resolve().name
        out.append(Split(name, split, dataset, fingerprint, labelled.said))
    return out[0], out[1]


def _train_pipeline(s: Ade20k, labelled: Labelled) -> list[dict[str, Any]]:
    return [
        {"type": "SslbenchLoadImage", "turned": labelled.turned},
        {"type": "LoadAnnotations", "reduce_zero_label": True},
        {"type": "RandomResize", "scale": (4 * s.crop, s.crop), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (s.crop, s.crop), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]


def _test_pipeline(s: Ade20k, labelled: Labelled) -> list[dict[str, Any]]:
    return [
        {"type": "SslbenchLoadImage", "turned": labelled.turned},
        {"type": "Resize", "scale": (4 * s.crop, s.crop), "keep_ratio": True},
        {"type": "LoadAnnotations", "reduce_zero_label": True},
        {"type": "PackSegInputs"},
    ]


# ------------------------------------------------------------------------------------------------------------ the model


def model(s: Ade20k, subject: Any, machine: Any, synchronised: bool) -> dict[str, Any]:
    """mmseg's config of the segmentor."""
    dim, patch = subject.encoder.arch.dim, subject.encoder.arch.patch
    if s.crop % (2 * patch):
        raise UserError(f"science.crop={s.crop} is not a multiple of {2 * patch}, twice the patch of {subject.arch}")
    grid, norm = (s.crop // patch, s.crop // patch), norm_cfg("SyncBN", synchronised)
    head = {
        "num_classes": ADE20K_CLASSES,
        "dropout_ratio": 0.1,
        "norm_cfg": norm,
        "align_corners": False,
    }
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            **pixels(subject),
            "pad_val": 0,
            "seg_pad_val": 255,
            "size": (s.crop, s.crop),
            "test_cfg": {"size": (s.crop, s.crop)},  # at least: a window of the test is never smaller
        },
        "backbone": backbone_config(subject, s, grid, machine),
        "neck": {"type": "SslbenchRescale", "dim": dim, "norm": norm},
        "decode_head": {
            **head,
            "type": "UPerHead",
            "in_channels": [dim] * 4,
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": s.channels or dim,
            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        },
        "auxiliary_head": {
            **head,
            "type": "FCNHead",
            "in_channels": dim,
            "in_index": 2,
            "channels": 256,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.4},
        },
        "train_cfg": {},
        "test_cfg": {"mode": "slide", "crop_size": (s.crop, s.crop), "stride": (s.stride, s.stride)},
    }


# -------------------------------------------------------------------------------------------------------- the numbers


class MeanIoU(IoUMetric):
    """mmseg's counts of pixels an image, summed, and the three numbers of them with all their digits."""

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        both, either, _, truth = (sum(counts).double().numpy() for counts in zip(*results, strict=True))
        with np.errstate(invalid="ignore"):  # a class that neither image nor answer has counts nowhere
            iou, recall = both / either, both / truth
        return {
            "miou": 100 * float(np.nanmean(iou)),
            "aacc": 100 * float(both.sum() / truth.sum()),
            "macc": 100 * float(np.nanmean(recall)),
            "classes": int(np.isfinite(iou).sum()),
        }


def score(job: Any, net: Any, folder: Path, fabric: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """({metric: percent}, condition)."""
    scores = test(job, net, folder, fabric, MeanIoU())
    values = {name: scores[name] for name in ("miou", "aacc", "macc")}
    return values, {"iterations": job.total, "classes": scores["classes"]}


def draw(job: Any, net: Any, folder: Path) -> None:
    pictures(job, net, folder, SegLocalVisualizer(save_dir=str(folder / "mmengine")), with_labels=False)
