"""The equation of the batch, and the length of a run."""

from __future__ import annotations

from pydantic import BaseModel

from ..data import known_size, open_split
from ..errors import UserError
from ..method import get_method
from .schema import Machine, Recipe


class Batch(BaseModel):
    """global batch = micro-batch x passes x devices x accumulation, exactly."""

    total: int
    micro: int  # images a forward pass
    world: int
    accumulation: int
    passes: int = 1  # micro-batches that one loss compares on a device, by gradient caching

    def __str__(self) -> str:
        each = "per device" if self.passes == 1 else f"per pass x {self.passes} cached passes"
        return f"{self.total} = {self.micro} {each} x {self.world} device(s) x {self.accumulation} accumulation"

    @classmethod
    def of(cls, recipe: Recipe) -> Batch:
        """The batch of a pre-training. UserError where it does not divide, or a pass would be another loss."""
        s, m, method = recipe.science, recipe.machine, get_method(recipe.method)
        world = m.devices * m.nodes
        compared = s.contrastive_batch or s.batch_size
        if not method.compares_batch(s.method):
            return cls._exact(
                s.batch_size, m.images_a_pass or s.batch_size // world, world, compared, "machine.micro_batch"
            )
        gathers = method.gathers_batch(s.method)
        if gathers and compared % world:
            raise UserError(
                f"{recipe.method} compares {compared} images over all devices, which {world} device(s) do not divide; "
                f"change science.contrastive_batch, --batch-size or machine.devices"
            )
        group = compared // world if gathers else compared  # images of a device that one loss compares
        batch = cls._exact(s.batch_size, group, world, compared, "science.contrastive_batch")
        micro = m.images_a_pass
        if micro is None or micro == group:
            return batch
        if not method.compared:
            raise UserError(
                f"machine.micro_batch={micro}: {recipe.method} compares the images of a batch, and the recipe "
                f"says {compared} of them; it has no `embed` and `compare` for a gradient cache, and a smaller pass "
                f"would be another loss. Leave micro_batch out, or set science.contrastive_batch={micro} (a "
                f"different number)"
            )
        if micro > group or group % micro:
            raise UserError(
                f"machine.micro_batch={micro} does not divide {group}, the images of one device that "
                f"{recipe.method} compares; set it to a divisor of that"
            )
        return batch.model_copy(update={"micro": micro, "passes": group // micro})

    @classmethod
    def divide(cls, total: int, machine: Machine) -> Batch:
        """The batch of what looks at each image by itself, so that any division of it computes the same."""
        world = machine.devices * machine.nodes
        micro = machine.images_a_pass or total // world
        return cls._exact(total, micro, world, total, "machine.micro_batch")

    @classmethod
    def _exact(cls, total: int, micro: int, world: int, compared: int, key: str) -> Batch:
        accumulation = total // (micro * world) if micro else 0
        if not micro or micro * world * accumulation != total:
            raise UserError(
                f"a batch of {total} does not divide into {micro or compared} per device x {world} device(s) x "
                f"a whole number of accumulation steps; change science.batch_size, machine.devices or {key}"
            )
        return cls(total=total, micro=micro, world=world, accumulation=accumulation)


def length(recipe: Recipe) -> tuple[int, int, int]:
    """(images, steps an epoch, steps); needs no data where the set's size is known."""
    spec, batch = recipe.science.data.spec, recipe.science.batch_size
    images = known_size(spec)
    if images is None:
        images = len(open_split(spec, "train"))
    if images < batch:
        raise UserError(f"a batch of {batch} is more than the {images} images of '{spec}'; use --batch-size")
    return images, images // batch, round(images // batch * recipe.science.epochs)
