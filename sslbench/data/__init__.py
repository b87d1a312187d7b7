"""Where images come from: a SPEC names a data set, `open_split` opens one split of it."""

from .sources import FolderImages, ImageSet, MemoryImages, known_size, open_split, open_test, subset

__all__ = ["FolderImages", "ImageSet", "MemoryImages", "known_size", "open_split", "open_test", "subset"]
