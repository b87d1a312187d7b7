"""mmengine's Runner tests a model on validation images; and pictures of what the model finds there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..data.loader import decoders

OURS = ("runtime_info", "timer", "sampler_seed", "logger", "checkpoint")  # hooks whose work the suite does itself


class Tester(Runner):
    """Runner without a log file. mmengine writes into that of the newest Runner when it draws the weights of the next
    model, where torch.compile may have closed it."""

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        return MMLogger.get_instance(self.experiment_name, log_level=log_level, **kwargs)


def test(job: Any, net: nn.Module, folder: Path, fabric: Any, metric: Any) -> dict[str, float]:
    """What mmengine's `metric` says of the job's validation images, in order."""
    loader = DataLoader(job.val.dataset, 1, collate_fn=pseudo_collate, **decoders(job.machine.workers, fabric.device))
    runner = Tester(
        model=net,
        work_dir=str(folder / "mmengine"),
        test_dataloader=loader,
        test_cfg={"type": "TestLoop"},
        test_evaluator=Evaluator([metric]),
        default_hooks=dict.fromkeys(OURS),
        visualizer={"type": "Visualizer"},
        log_level="ERROR",
        default_scope="mmengine",
        experiment_name=f"{folder.name}_{time.time_ns()}",
    )
    return runner.test()


def pictures(job: Any, net: Any, folder: Path, visualizer: Any, **show: Any) -> None:
    """`folder`/pictures: of some validation images, ground truth left, predictions right."""
    visualizer.dataset_meta = job.val.dataset.metainfo
    load = job.val.dataset.pipeline.transforms[0]
    count = min(job.machine.pictures, len(job.val))
    for index in np.linspace(0, len(job.val) - 1, count).astype(int).tolist():
        item = job.val.dataset[index]
        (sample,) = net.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
        image = load.read(sample.img_path)[..., ::-1]
        out = folder / "pictures" / f"{index}_{Path(sample.img_path).stem}.png"
        visualizer.add_datasample("val", image, sample.cpu(), out_file=str(out), **show)
