"""COCO and ADE20K with mmdet and mmsegmentation, the one place that imports them; see `run.transfer`."""
