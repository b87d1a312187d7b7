"""COCO: Mask R-CNN over the suite's ViT, from layout to AP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO as Api
from mmdet.evaluation import CocoMetric
from mmdet.visualization import DetLocalVisualizer
from pycocotools.cocoeval import COCOeval

from ..data.dense import open_dense
from ..data.instances import mend, read_instances
from ..data.labelled import Labelled, accept
from ..errors import UserError
from ..pictures import palette
from . import loading  # noqa: F401 - registers how a photograph is read
from .backbone import backbone_config, pixels
from .job import Split
from .necks import norm_cfg
from .protocol import Coco, Lsj, MultiScale
from .runner import pictures, test

SCOPE = "mmdet"
NAMES = ("ap", "ap50", "ap75")


def image_size(s: Coco) -> int:
    return s.input.size if isinstance(s.input, Lsj) else max(s.input.short)


# ------------------------------------------------------------------------------------------------------------- the data


class COCO(Api):
    """pycocotools' index of an instance file, mended (`instances.mend`). tree: its content, where it was read."""

    def __init__(self, file: str, classes: Sequence[str], tree: dict[str, Any] | None = None) -> None:
        super().__init__()
        if tree is None:
            tree = read_instances(Path(file))
            mend(tree, classes)
        self.dataset = tree
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


class Instances(CocoDataset):
    """mmdet's data set over a file that was read, checked and mended."""

    def __init__(self, labelled: Labelled, **more: Any) -> None:
        self.tree = labelled.tree
        if labelled.own:
            more["metainfo"] = {"classes": tuple(labelled.classes), "palette": palette(len(labelled.classes))}
        super().__init__(ann_file=str(labelled.source), data_prefix={"img": str(labelled.images)}, **more)
        del self.tree

    def COCOAPI(self, file: str) -> COCO:  # mmdet's name for what it opens the file with
        return COCO(file, self.metainfo["classes"], self.tree)


def open_data(root: Path, s: Coco) -> tuple[Split, Split]:
    """Train and val in COCO's format, of its categories or others. UserError: what was expected, and what is there."""
    splits = open_dense("coco", root)
    accept(*splits)
    out = []
    for split, labelled in zip(("train", "val"), splits, strict=True):
        dataset = Instances(
            labelled,
            pipeline=_train_pipeline(s, labelled) if split == "train" else _test_pipeline(s, labelled),
            filter_cfg={"filter_empty_gt": True, "min_size": 32} if split == "train" else None,
            test_mode=split == "val",
        )
        labelled.tree = {}
        out.append(Split(labelled.name, split, dataset, labelled.fingerprint, labelled.said))
    if not len(out[0]):
        raise UserError(f"{splits[0].source} has no image with an object that is to be learnt")
    return out[0], out[1]


def _train_pipeline(s: Coco, labelled: Labelled) -> list[dict[str, Any]]:
    if isinstance(s.input, Lsj):
        size = (s.input.size, s.input.size)
        resize = [
            {"type": "RandomResize", "scale": size, "ratio_range": s.input.scale, "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": size, "crop_type": "absolute", "recompute_bbox": True,
             "allow_negative_crop": True},
        ]  # fmt: skip
    else:
        resize = [_detr(s.input)]
    return [
        {"type": "SslbenchLoadImage", "turned": labelled.turned},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomFlip", "prob": 0.5},
        *resize,
        {"type": "FilterAnnotations", "min_gt_bbox_wh": (1e-2, 1e-2), "keep_empty": True},
        {"type": "PackDetInputs"},
    ]


def _detr(m: MultiScale) -> dict[str, Any]:
    def sides(short: list[int]) -> dict[str, Any]:
        return {"type": "RandomChoiceResize", "scales": [(side, m.long) for side in short], "keep_ratio": True}

    crop = {"type": "RandomCrop", "crop_type": "absolute_range", "crop_size": m.crop,
            "recompute_bbox": m.recompute_boxes, "allow_negative_crop": True}  # fmt: skip
    return {"type": "RandomChoice", "transforms": [[sides(m.short)], [sides(m.first), crop, sides(m.short)]]}


def _test_pipeline(s: Coco, labelled: Labelled) -> list[dict[str, Any]]:
    scale = (s.input.size, s.input.size) if isinstance(s.input, Lsj) else (s.input.long, max(s.input.short))
    return [
        {"type": "SslbenchLoadImage", "turned": labelled.turned},
        {"type": "Resize", "scale": scale, "keep_ratio": True},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]


# ------------------------------------------------------------------------------------------------------------ the model


def model(s: Coco, subject: Any, machine: Any, synchronised: bool, classes: int) -> dict[str, Any]:
    """mmdet's config of the detector of so many classes."""
    dim, patch = subject.encoder.arch.dim, subject.encoder.arch.patch
    # Fixed squares are padded to their size; others to what both the patch and the smallest map divide.
    multiple = s.input.size if isinstance(s.input, Lsj) else 2 * patch
    if multiple % (2 * patch):
        raise UserError(
            f"science.input.size={multiple} is not a multiple of {2 * patch}, twice the patch of {subject.arch}"
        )
    grid = (multiple // patch, multiple // patch)
    strides = [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]
    norm = {name: norm_cfg(name, synchronised) for name in ("LN", "GN", "SyncBN")}
    neck: dict[str, Any] = {"type": "SslbenchSimplePyramid", "dim": dim, "norm": norm["LN"], "out": s.width}
    if s.neck == "taps":
        fpn = norm[s.fpn_norm] if s.fpn_norm else None
        neck = {"type": "SslbenchTapPyramid", "dim": dim, "norm": norm[s.neck_norm], "fpn_norm": fpn, "out": s.width}
    box_coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4}
    box_loss = {"type": "GIoULoss", "loss_weight": 10.0} if s.box_loss == "giou" else {"type": "L1Loss"}
    cross_entropy = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
    nms = {"type": "nms", "iou_threshold": 0.7}

    def roi(size: int) -> dict[str, Any]:
        return {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
            "out_channels": s.width,
            "featmap_strides": strides[:4],
            "finest_scale": 56 * patch // 16,
        }

    def assign(positive: float, negative: float, least: float, low_quality: bool) -> dict[str, Any]:
        return {"type": "MaxIoUAssigner", "pos_iou_thr": positive, "neg_iou_thr": negative, "min_pos_iou": least,
                "match_low_quality": low_quality, "ignore_iof_thr": -1}  # fmt: skip

    def sample(n: int, share: float, truth: bool) -> dict[str, Any]:
        return {
            "type": "RandomSampler",
            "num": n,
            "pos_fraction": share,
            "neg_pos_ub": -1,
            "add_gt_as_proposals": truth,
        }

    train, test = s.proposals
    return {
        "type": "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            **pixels(subject),
            "pad_mask": True,
            "pad_size_divisor": multiple,
        },
        "backbone": backbone_config(subject, s, grid, machine),
        "neck": neck,
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": s.width,
            "feat_channels": s.width,
            "num_convs": s.rpn_convs,
            "anchor_generator": {"type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1, 2], "strides": strides},
            "bbox_coder": {**box_coder, "target_stds": [1.0] * 4},
            "loss_cls": {**cross_entropy, "use_sigmoid": True},
            "loss_bbox": {"type": "L1Loss"},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": roi(7),
            "bbox_head": {
                "type": "Shared4Conv1FCBBoxHead",
                "in_channels": s.width,
                "conv_out_channels": s.width,
                "fc_out_channels": 4 * s.width,
                "roi_feat_size": 7,
                "num_classes": classes,
                "norm_cfg": norm[s.box_norm],
                "bbox_coder": {**box_coder, "target_stds": [0.1, 0.1, 0.2, 0.2]},
                "reg_class_agnostic": False,
                "reg_decoded_bbox": s.box_loss == "giou",
                "loss_cls": cross_entropy,
                "loss_bbox": box_loss,
            },
            "mask_roi_extractor": roi(14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": s.width,
                "conv_out_channels": s.width,
                "num_classes": classes,
                "norm_cfg": norm[s.mask_norm] if s.mask_norm else None,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {"assigner": assign(0.7, 0.3, 0.3, True), "sampler": sample(256, 0.5, False), "allowed_border": -1,
                    "pos_weight": -1, "debug": False},
            "rpn_proposal": {"nms_pre": 2000, "max_per_img": train, "nms": nms, "min_bbox_size": 0},
            "rcnn": {"assigner": assign(0.5, 0.5, 0.5, s.match_low_quality), "sampler": sample(s.rois, 0.25, True),
                     "mask_size": 28, "pos_weight": -1, "debug": False},
        },
        "test_cfg": {
            "rpn": {"nms_pre": 1000, "max_per_img": test, "nms": nms, "min_bbox_size": 0},
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100,
                     "mask_thr_binary": 0.5},
        },
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the numbers


def score(job: Any, net: Any, folder: Path, fabric: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """({metric: percent}, condition). Predictions go to `folder`/predictions.{bbox,segm}.json, in COCO's format."""
    dataset, prefix = job.val.dataset, str(folder / "predictions")
    truth = COCO(dataset.ann_file, dataset.metainfo["classes"])
    metric = CocoMetric(metric=["bbox", "segm"], format_only=True, outfile_prefix=prefix, backend_args=None)
    metric._coco_api = truth  # whose categories are in the order of the class numbers
    test(job, net, folder, fabric, metric)
    values: dict[str, float] = {}
    for kind, name in (("bbox", "bbox"), ("segm", "mask")):
        answers = json.loads(Path(f"{prefix}.{kind}.json").read_text())
        stats = _average_precision(truth, answers, kind)
        values |= {f"{name}_{n}": 100 * max(0.0, x) for n, x in zip(NAMES, stats, strict=False)}
    return values, {"iterations": job.total}


def _average_precision(truth: COCO, answers: list[dict[str, Any]], kind: str) -> list[float]:
    """pycocotools' stats: AP, AP50, AP75, ...; nothing found is 0."""
    if not answers:
        return [0.0] * 12
    if kind == "segm":  # areas are those of the masks
        answers = [{k: v for k, v in f.items() if k != "bbox"} for f in answers]
    evaluation = COCOeval(truth, truth.loadRes(answers), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def draw(job: Any, net: Any, folder: Path) -> None:
    pictures(job, net, folder, DetLocalVisualizer(), pred_score_thr=0.3)
