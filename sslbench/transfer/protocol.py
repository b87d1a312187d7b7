"""What a transfer recipe may say. Values and their sources are in recipes/transfer/; this imports no mm library."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import UserError
from ..files import digest
from ..recipe import Machine, find_recipe, merge, parse_sets, read_tree
from ..recipe.schema import without_auto
from ..strict import Strict, validate
from ..vit import VisionTransformer, rebuilt_positions


class Encoder(Strict):
    """The ViT as a backbone. Block indices are those of a ViT of 12 blocks; deeper and shallower ones scale them."""

    window: int | None = Field(None, gt=0)  # tokens a side that attend to each other; None: all tokens
    global_blocks: list[int] = [2, 5, 8, 11]  # whose tokens all attend to each other where there are windows
    # table: a bias a head and offset, in each block. decomposed: rows and columns apart, times the query, in each
    # block. shared: one table for all windowed blocks, one for all global ones.
    relative_positions: Literal["table", "decomposed", "shared"] | None = None
    rebuild_positions: bool = False  # sin-cos at position_grid in place of those of pre-training
    position_grid: tuple[int, int] | None = None  # that the positions are kept at; None: that of pre-training
    train_positions: bool = True
    keep_cls: bool = False  # CLS passes through the blocks and is dropped at the taps
    layer_scale: float | None = None  # initial value of a factor a channel behind attention and MLP; None: no factor
    taps: list[int] = Field([3, 5, 7, 11], min_length=1)  # blocks whose output the neck reads
    drop_path: float = Field(0.1, ge=0, lt=1)  # of the last block; grows linearly from 0

    @model_validator(mode="after")
    def _possible(self) -> Encoder:
        if self.window and self.keep_cls:
            raise ValueError("a window has no room for CLS: with window, set keep_cls=false")
        if self.relative_positions == "decomposed" and self.keep_cls:
            raise ValueError("CLS has no row and column: with decomposed relative positions, set keep_cls=false")
        if self.rebuild_positions and not self.position_grid:
            raise ValueError("rebuild_positions needs position_grid, the [rows, columns] to rebuild them at")
        if odd := [b for b in (*self.global_blocks, *self.taps) if not 0 <= b < 12]:
            raise ValueError(f"blocks {odd} are not of a ViT of 12 blocks, 0 to 11")
        return self


def check_encoder(encoder: VisionTransformer, config: Encoder) -> None:
    """UserError where the encoder cannot be that backbone: blocks, windows and positions are those of a plain ViT."""
    if encoder.parts.relative or encoder.parts.registers:
        raise UserError(f"transfer takes plain ViTs: this one has {encoder.parts}, which the backbone has no place for")
    if config.keep_cls and not encoder.parts.cls:
        raise UserError("the encoder has no CLS to keep: --set science.encoder.keep_cls=false")
    if config.rebuild_positions:
        assert config.position_grid is not None
        rebuilt_positions(encoder.pos_embed.detach(), encoder.grid, config.position_grid)


class IterationOptim(Strict):
    """AdamW and its schedule, by iteration."""

    lr: float = Field(gt=0)  # as it is: no rule of the batch applies
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(ge=0)  # not on norms, positions, CLS and other tensors of one dimension
    decay_biases: bool = False  # weight decay on biases too, but those of norms
    # Weight decay on tables of relative positions. True, as it was before it was a key, is not part of the hash.
    decay_relative: bool = Field(True, exclude_if=lambda decays: decays)
    layer_decay: float = Field(1.0, gt=0, le=1)  # 1: one lr for all layers
    warmup: int = Field(ge=0)  # iterations
    warmup_factor: float = Field(0.001, gt=0, le=1)  # of lr, where the linear warm-up starts
    decay: Literal["steps", "cosine", "linear"] = "steps"  # how lr falls after it; steps: to a tenth at each milestone
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = []  # shares of the schedule


class Schedule(Strict):
    """What both protocols say of training."""

    batch_size: int = Field(gt=0)  # images an iteration, over all devices and accumulation
    iterations: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)  # in place of iterations
    optim: IterationOptim
    encoder: Encoder = Encoder()
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _one_length(self) -> Schedule:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("give iterations or epochs, and set the other to null")
        return self


class Lsj(Strict):
    """Large-scale jitter: resize by a random factor, crop or pad to a square."""

    kind: Literal["lsj"] = "lsj"
    size: int = Field(1024, gt=0)  # pixels a side, in training and test
    scale: tuple[float, float] = (0.1, 2.0)


class MultiScale(Strict):
    """A random short side, or, half of the time, a resize, a random crop and then that (DETR); no side over `long`."""

    kind: Literal["multiscale"]
    short: list[int] = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    long: int = 1333
    first: list[int] = [400, 500, 600]  # short sides before the crop
    crop: tuple[int, int] = (384, 600)  # least and largest side of it
    recompute_boxes: bool = False  # a box that was cropped shrinks to what is left of its mask; False: it is only cut


class Coco(Schedule):
    """Mask R-CNN."""

    protocol: Literal["coco"]
    input: Lsj | MultiScale = Field(Lsj(), discriminator="kind")
    neck: Literal["simple", "taps"] = "simple"  # from the last map (ViTDet), or from four taps (MIMDet, CAE)
    neck_norm: Literal["LN", "GN", "SyncBN"] = "LN"  # taps: of the transposed convolutions
    fpn_norm: Literal["SyncBN"] | None = None  # taps only
    rpn_convs: int = Field(2, gt=0)
    box_norm: Literal["LN", "SyncBN"] = "LN"
    mask_norm: Literal["LN", "SyncBN"] | None = "LN"
    box_loss: Literal["l1", "giou"] = "l1"  # giou: on decoded boxes, weight 10
    proposals: tuple[int, int] = (1000, 1000)  # that leave the RPN in training and test
    # The proposal that overlaps an object most is that object's, though it may overlap another one more. False, as it
    # was before it was a key, is not part of the hash.
    match_low_quality: bool = Field(False, exclude_if=lambda matches: not matches)
    rois: int = Field(512, gt=0)  # of them and the ground truth, drawn for the heads to learn from in each image
    width: int = Field(256, gt=0)  # channels of pyramid and heads

    @model_validator(mode="after")
    def _neck(self) -> Coco:
        if self.neck == "simple" and self.neck_norm != "LN":
            raise ValueError("the simple pyramid has LayerNorm: set neck_norm=LN")
        if self.neck == "taps" and (self.neck_norm == "LN" or len(self.encoder.taps) != 4):
            raise ValueError("the neck of taps reads four of them, and its neck_norm is GN or SyncBN")
        whole = self.encoder.global_blocks or not self.encoder.window
        if self.encoder.relative_positions and whole and isinstance(self.input, MultiScale):
            raise ValueError("relative positions of global blocks are for one size of image: set input.kind=lsj")
        return self


class Ade20k(Schedule):
    """UPerNet with an auxiliary FCN head."""

    protocol: Literal["ade20k"]
    crop: int = Field(512, gt=0)  # pixels a side; images are resized so that the short side is about this
    stride: int = Field(341, gt=0)  # of the sliding window in test
    channels: int | None = Field(None, gt=0)  # of the decoder; None: the encoder's width

    @model_validator(mode="after")
    def _taps(self) -> Ade20k:
        if len(self.encoder.taps) != 4:
            raise ValueError("UPerNet reads four taps")
        if self.stride > self.crop:
            raise ValueError("a stride larger than the crop leaves gaps")
        return self


class TransferMachine(Machine):
    activation_checkpointing: bool = False  # compute the blocks again in the backward pass: less memory, more time
    pictures: int = Field(6, ge=0)  # validation images drawn beside their ground truth

    @model_validator(mode="after")
    def _eager(self) -> TransferMachine:
        if self.compile:
            raise ValueError("compile: detection's shapes change with every image; leave it out")
        without_auto(self)
        return self


class TransferRecipe(Strict):
    name: str
    science: Coco | Ade20k = Field(discriminator="protocol")
    machine: TransferMachine = TransferMachine()

    def protocol_hash(self) -> str:
        """12 hex digits over all that may change a number but the run and the seed."""
        return digest(self.science.model_dump(mode="json", exclude={"seed"}))


DEFAULT = {"coco": "coco_vitdet", "ade20k": "ade20k_mae"}


def transfer_recipe(kind: str, name: str | None = None, sets: list[str] | None = None) -> TransferRecipe:
    """The transfer recipe of that name, or `kind`'s own, checked."""
    path = find_recipe(name or DEFAULT[kind], "transfer")
    tree = merge(read_tree(path, "transfer"), parse_sets(sets or []))
    recipe = validate(TransferRecipe, {**tree, "name": path.stem}, path.stem)
    if recipe.science.protocol != kind:
        raise UserError(f"recipe {path.stem} is of protocol {recipe.science.protocol}, not {kind}")
    return recipe
