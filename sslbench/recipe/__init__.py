"""What a run is to do: the recipe, how it is read and composed, and what its batch comes to."""

from ..views import Augment
from .batch import Batch, length
from .composition import compose, drop_none, problem_of, problems, resolve
from .read import choose, dump, find_any, find_recipe, load_yaml, merge, parse_sets, read_tree
from .schema import Data, Epochs, Machine, Optim, Recipe, Science, SetMachine

__all__ = [
    "Augment",
    "Batch",
    "Data",
    "Epochs",
    "Machine",
    "Optim",
    "Recipe",
    "Science",
    "SetMachine",
    "choose",
    "compose",
    "drop_none",
    "dump",
    "find_any",
    "find_recipe",
    "length",
    "load_yaml",
    "merge",
    "parse_sets",
    "problem_of",
    "problems",
    "read_tree",
    "resolve",
]
