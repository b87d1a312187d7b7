"""Where images come from: a SPEC names a data set, `open_split` opens one split of it."""

from .images import FolderImages, ImageSet, MemoryImages, subset
from .names import data_name, unpacked_name
from .sources import known_size, open_both, open_split, open_test, used_classes

__all__ = [
    "FolderImages",
    "ImageSet",
    "MemoryImages",
    "data_name",
    "known_size",
    "open_both",
    "open_split",
    "open_test",
    "subset",
    "unpacked_name",
    "used_classes",
]
