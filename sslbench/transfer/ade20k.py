"""ADE20K: UPerNet over the suite's ViT, from layout to mIoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.visualization import SegLocalVisualizer

from ..data.dense import open_dense
from ..data.labelled import Labelled, accept
from ..errors import UserError
from ..evaluate.patches import mean_iou, pixel_accuracy
from ..pictures import palette
from . import loading  # noqa: F401 - registers how a photograph is read
from .backbone import backbone_config, pixels
from .job import Split
from .necks import norm_cfg
from .protocol import Ade20k
from .runner import pictures, test

SCOPE = "mmseg"


def image_size(s: Ade20k) -> int:
    return s.crop


# ------------------------------------------------------------------------------------------------------------- the data


class OwnMaps(BaseSegDataset):
    """mmseg's data set over photographs and label maps that were found and checked, of a set's own classes."""

    def __init__(self, labelled: Labelled, **more: Any) -> None:
        self.pairs = labelled.pairs
        names = {"classes": tuple(labelled.classes), "palette": palette(len(labelled.classes))}
        super().__init__(metainfo=names, reduce_zero_label=False, **more)

    def load_data_list(self) -> list[dict[str, Any]]:
        more = {"label_map": None, "reduce_zero_label": False}
        return [{"img_path": str(a), "seg_map_path": str(b), "seg_fields": [], **more} for a, b in self.pairs]


def open_data(root: Path, s: Ade20k) -> tuple[Split, Split]:
    """Train and val of ADEChallengeData2016's layout, or of label maps with a class list. UserError: what was expected,
    and what is there."""
    splits = open_dense("ade20k", root)
    accept(*splits)
    out = []
    for split, labelled in zip(("train", "val"), splits, strict=True):
        pipeline = _train_pipeline(s, labelled) if split == "train" else _test_pipeline(s, labelled)
        more: dict[str, Any] = {"pipeline": pipeline, "test_mode": split == "val"}
        if labelled.own:
            dataset = OwnMaps(labelled, **more)
        else:
            folders = {"img_path": str(labelled.images), "seg_map_path": str(labelled.source)}
            dataset = ADE20KDataset(data_prefix=folders, **more)
        out.append(Split(labelled.name, split, dataset, labelled.fingerprint, labelled.said))
    return out[0], out[1]


def _train_pipeline(s: Ade20k, labelled: Labelled) -> list[dict[str, Any]]:
    return [
        {"type": "SslbenchLoadImage", "turned": labelled.turned},
        {"type": "LoadAnnotations", "reduce_zero_label": not labelled.own},
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
        {"type": "LoadAnnotations", "reduce_zero_label": not labelled.own},
        {"type": "PackSegInputs"},
    ]


# ------------------------------------------------------------------------------------------------------------ the model


def model(s: Ade20k, subject: Any, machine: Any, synchronised: bool, classes: int) -> dict[str, Any]:
    """mmseg's config of the segmentor of so many classes."""
    dim, patch = subject.encoder.arch.dim, subject.encoder.arch.patch
    if s.crop % (2 * patch):
        raise UserError(f"science.crop={s.crop} is not a multiple of {2 * patch}, twice the patch of {subject.arch}")
    grid, norm = (s.crop // patch, s.crop // patch), norm_cfg("SyncBN", synchronised)
    head = {
        "num_classes": classes,
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
        with np.errstate(invalid="ignore"):  # a class that no image has counts nowhere
            recall = both / truth
        return {
            "miou": float(mean_iou(both, either)),
            "aacc": float(pixel_accuracy(both, truth)),
            "macc": 100 * float(np.nanmean(recall)),
            "classes": int((either > 0).sum()),
        }


def score(job: Any, net: Any, folder: Path, fabric: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """({metric: percent}, condition)."""
    scores = test(job, net, folder, fabric, MeanIoU())
    values = {name: scores[name] for name in ("miou", "aacc", "macc")}
    return values, {"iterations": job.total, "classes": scores["classes"]}


def draw(job: Any, net: Any, folder: Path) -> None:
    pictures(job, net, folder, SegLocalVisualizer(save_dir=str(folder / "mmengine")), with_labels=False)
