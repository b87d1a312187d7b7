"""Recipe = science (all that may change a number) + machine (all that may not). The hash is of science alone."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from .errors import UserError, nearest
from .paths import bundled

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Augment(Strict):
    """How a crop of an image becomes a view. Defaults: MAE's pre-training (crop (.2, 1), flip, ImageNet statistics)."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    # Of crops. The default is not part of the hash: it was the rule before it was a key.
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", exclude_if=lambda kernel: kernel == "bicubic")
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be (low, high) with 0 < low <= high <= 1")
        return self


class Data(Strict):
    spec: str = "imagenet"  # see `sslbench data list`
    image_size: int | None = Field(None, gt=0)  # pixels a side of a view; None: the arch's own


Share = Annotated[float, Field(ge=0, lt=1)]


class Optim(Strict):
    """AdamW and its schedule. Defaults: MAE's pre-training."""

    lr: float = Field(1.5e-4, gt=0)  # base lr: the actual lr is lr x batch_size / 256
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)  # not on biases, norms and other tensors of one dimension
    warmup_epochs: float = Field(40, ge=0)
    min_lr: float = Field(0.0, ge=0)  # where the cosine ends
    clip_grad: float | None = Field(None, gt=0)  # largest gradient norm; None: no clipping


# 800 and 800.0 are one number, and so one hash.
Epochs = Annotated[int | float, AfterValidator(lambda e: int(e) if e == int(e) else e)]


class Science(Strict):
    method: dict[str, Any]  # name, preset, and the method's own config
    arch: str = "vit_b16"
    data: Data = Data()
    augment: Augment = Augment()
    epochs: Epochs = Field(800, ge=0)  # a part of an epoch is that part of its steps
    # The run's length as time on its device; the number of epochs is then the schedule's alone. See train/clock.py.
    device_minutes: float | None = Field(None, gt=0, exclude_if=lambda minutes: minutes is None)
    batch_size: int = Field(4096, gt=0)  # images a step, over all devices and accumulation
    contrastive_batch: int | None = Field(None, gt=0)  # images that one loss compares; None: the whole batch
    optim: Optim = Optim()
    seed: int = Field(0, ge=0, lt=2**31)


# YAML reads 32 and 16 as numbers; the command line gives words.
Precision = Annotated[Literal["auto", "32", "bf16", "16"], BeforeValidator(str)]


class Machine(Strict):
    devices: int = Field(1, gt=0)
    nodes: int = Field(1, gt=0)
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # fsdp: weights in parts; auto: from vit_h14 on several devices
    precision: Precision = "auto"  # auto: bf16 where the device computes it faster, else 32
    # Images a forward pass; None: as many as the batch allows. Fewer than a loss compares: see train/cache.py.
    micro_batch: int | None = Field(None, gt=0)
    workers: int = Field(4, ge=0)  # that decode images; data sets that live in memory need none
    compile: bool = False
    log_every: int = Field(20, gt=0)  # steps; only these wait for the device, and those of meters_every
    meters_every: int = Field(100, gt=0)  # steps between looks at the terms' gradients and at collapse
    save_every: int | None = Field(None, gt=0)  # steps between checkpoints; None: an epoch, or more where that is short
    watch: bool = True  # k-NN on part of train while the run goes on, for at most 2 % of its time: train/watch.py
    keep_at: list[Annotated[float, Field(gt=0, lt=1)]] = []  # shares of the run at which its weights are kept too
    tensorboard: bool = True

    def saves_every(self, per_epoch: int, total: int) -> int:
        """Steps between the checkpoints of a run of `total` steps."""
        return self.save_every or max(per_epoch, min(total // 100, 500), 1)


class Recipe(Strict):
    name: str
    science: Science
    machine: Machine = Machine()
    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What was chosen that neither a file nor the user says, a line each: for the header."""
        return self._notes

    @property
    def method(self) -> str:
        return self.science.method["name"]

    @property
    def method_name(self) -> str:
        """What folders, hashes and numbers call it."""
        return name_of(self.method)

    @property
    def preset(self) -> str:
        return self.science.method["preset"]

    def hash(self) -> str:
        """12 hex digits of SHA-256 over science, without the seed (seeds of one recipe share a hash; the seed stands
        beside it), without the preset's name (its values count) and without the folder that data lies in."""
        science = self.science.model_dump(mode="json")
        science.pop("seed")
        science["method"].pop("preset")
        science["method"]["name"] = self.method_name
        science["data"]["spec"] = data_name(self.science.data.spec)
        return digest(science)


def digest(value: Any) -> str:
    """12 hex digits that stand for a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def name_of(method: str) -> str:
    """`ocl` -> `ocl`, `path/to/file.py:Class` -> `file`."""
    path, colon, _ = method.rpartition(":")
    return Path(path).stem if colon else method


def data_name(spec: str) -> str:
    """What a data SPEC is called in names and hashes: without the folder it lies in. `npz:/a/b.npz` -> `b`."""
    parts = []
    for part in spec.split("+"):
        kind, _, where = part.partition(":")
        if kind == "packed":
            parts.append(_packed_name(Path(where).expanduser()))
            continue
        name = Path(where).stem if kind in ("npz", "folder", "wds", "hfds") and where else kind
        if kind in ("folder", "imagenet") and "@" in where:  # PATH@FILE: what FILE lists
            name = Path(where.rpartition("@")[2]).stem
        name = re.sub(r"_(train|test|val)$", "", name)
        parts.append(re.sub(r"[^A-Za-z0-9.-]+", "-", name) or kind)
    return "+".join(parts)


def _packed_name(path: Path) -> str:
    """The name of the set that `sslbench data pack` put there, with its size where images were shrunk for it."""
    try:
        return json.loads((path / "pack.json").read_text())["name"]
    except (OSError, ValueError, KeyError, TypeError):  # opening the set says what is wrong
        return path.stem


def unpacked_name(name: str) -> str:
    """imagenet-256px -> imagenet"""
    return re.sub(r"(-\d+px)+$", "", name)


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
        from .method import get_method

        s, m = recipe.science, recipe.machine
        world = m.devices * m.nodes
        couples = get_method(recipe.method).compares_batch(s.method)
        gathers = couples and s.method.get("gather_negatives", False)
        compared = s.contrastive_batch or s.batch_size
        if not couples:
            return cls._exact(
                s.batch_size, m.micro_batch or s.batch_size // world, world, compared, "machine.micro_batch"
            )
        if gathers and compared % world:
            raise UserError(
                f"{recipe.method} compares {compared} images over all devices, which {world} device(s) do not divide; "
                f"change science.contrastive_batch, --batch-size or machine.devices"
            )
        group = compared // world if gathers else compared  # images of a device that one loss compares
        batch = cls._exact(s.batch_size, group, world, compared, "science.contrastive_batch")
        if m.micro_batch in (None, group):
            return batch
        if not get_method(recipe.method).compared:
            raise UserError(
                f"machine.micro_batch={m.micro_batch}: {recipe.method} compares the images of a batch, and the recipe "
                f"says {compared} of them; it has no `embed` and `compare` for a gradient cache, and a smaller pass "
                f"would be another loss. Leave micro_batch out, or set science.contrastive_batch={m.micro_batch} (a "
                f"different number)"
            )
        if m.micro_batch > group or group % m.micro_batch:
            raise UserError(
                f"machine.micro_batch={m.micro_batch} does not divide {group}, the images of one device that "
                f"{recipe.method} compares; set it to a divisor of that"
            )
        return batch.model_copy(update={"micro": m.micro_batch, "passes": group // m.micro_batch})

    @classmethod
    def divide(cls, total: int, machine: Machine) -> Batch:
        """For what looks at each image alone."""
        world = machine.devices * machine.nodes
        micro = machine.micro_batch or total // world
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


# ----------------------------------------------------------------------------------------------- reading and composing


def recipe_files(kind: str = "pretrain") -> dict[str, Path]:
    """Bundled recipes by name: `ocl/vit_l16_imagenet` in pretrain/, `knn` in eval/."""
    root = bundled("recipes") / kind
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str, kind: str = "pretrain") -> Path:
    """A recipe file, by path or by the name (or the last part of the name) of one that ships with the suite."""
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"no recipe file {name}")
    known = recipe_files(kind)
    matches = [p for n, p in known.items() if name in (n, n.rsplit("/", 1)[-1], f"{kind}/{n}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"recipe '{name}' is ambiguous: {', '.join(n for n, p in known.items() if p in matches)}")
    raise UserError(f"unknown recipe '{name}'{nearest(name, known)}; `sslbench list recipes` shows all")


def load_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date that there is not is a ValueError
        raise UserError(f"{path} is not a YAML file: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a recipe: expected a mapping with 'science' and 'machine'")
    return tree


def read_tree(path: Path, kind: str = "pretrain", seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's mapping with `extends:` composed in. The child's keys win."""
    if path in seen:
        raise UserError(f"{path}: `extends` runs in a circle")
    tree = load_yaml(path)
    base = tree.pop("extends", None)
    if base:
        tree = merge(read_tree(find_recipe(str(base), kind), kind, (*seen, path)), tree)
    science, machine = (tree.get(key, {}) for key in ("science", "machine"))
    method = science.get("method", {}) if isinstance(science, dict) else {}
    for key, value in {"science": science, "machine": machine, "science.method": method}.items():
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} must be a mapping, found {value!r}")
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def parse_sets(pairs: list[str]) -> dict[str, Any]:
    """['science.optim.lr=1e-3'] -> {'science': {'optim': {'lr': ...}}}"""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: expected KEY=VALUE, such as science.optim.lr=1e-3")
        try:
            leaf: Any = yaml.safe_load(value) if value.strip() else None
        except (yaml.YAMLError, ValueError) as e:
            raise UserError(f"--set {pair}: the value is not YAML ({' '.join(str(e).split())[:120]})") from None
        for part in reversed(key.strip().split(".")):
            leaf = {part: leaf}
        tree = merge(tree, leaf)
    return tree


def resolve(tree: dict[str, Any], name: str) -> Recipe:
    """A checked recipe with every default written out, the method's config included."""
    recipe = validate(Recipe, {**tree, "name": name}, name)
    from .method import get_method

    given = dict(recipe.science.method)
    if "name" not in given:
        raise UserError(f"recipe {name}: science.method.name is missing")
    method = get_method(str(given.pop("name")))
    preset = str(given.pop("preset", "paper"))
    if preset not in method.presets:
        raise UserError(f"recipe {name}: {recipe.method} has no preset '{preset}'{nearest(preset, method.presets)}")
    config = validate(method.Config, {**method.presets[preset], **given}, name, "science.method.")
    recipe.science.method = {"name": recipe.method, "preset": preset, **config.model_dump(mode="json")}
    from .vit import get_arch

    arch = get_arch(recipe.science.arch)
    recipe.science.data.image_size = recipe.science.data.image_size or arch.image
    if recipe.science.data.image_size % arch.patch:
        raise UserError(
            f"recipe {name}: science.data.image_size={recipe.science.data.image_size} is not a multiple of "
            f"{recipe.science.arch}'s patch, {arch.patch}"
        )
    return recipe


def validate(model: type[T], tree: dict[str, Any], name: str, prefix: str = "") -> T:
    """`tree` as `model`, or a UserError that names every wrong key and the nearest known one."""
    try:
        return model.model_validate(tree)
    except ValidationError as e:
        lines = []
        for error in e.errors():
            path, known = _follow(model, error["loc"])
            key = prefix + ".".join(path)
            if error["type"] == "extra_forbidden":
                lines.append(f"unknown key '{key}'{nearest(path[-1], known)}")
            else:
                lines.append(f"{key}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})")
        raise UserError(f"recipe {name}: " + "; ".join(lines)) from None


def _follow(model: type[BaseModel] | None, loc: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """(the key that `loc` is, as a user writes it, and the keys that there are beside it).

    Of a union of models pydantic names the one it took, which is no part of the key.
    """
    path: list[str] = []
    union: tuple[Any, ...] = ()
    known: list[str] = []
    for part in map(str, loc):
        chosen = next((m for m in union if any(part in get_args(f.annotation) for f in m.model_fields.values())), None)
        if chosen:
            model, union = chosen, ()
            continue
        known = list(model.model_fields) if model else []
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        union = tuple(m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, BaseModel))
        path.append(part)
    return path, known


def choose(method: str, arch: str | None, spec: str | None) -> Path:
    """The bundled recipe that `pretrain METHOD --arch --data` means.

    The exact `<arch>_<data>`; else, without an arch, the method's recipe for that data (small data, so small settings);
    else the arch's recipe for ImageNet, the papers' settings, or whichever it has. Arch and data given by the user then
    replace the recipe's own.
    """
    method = name_of(method)
    known = {n.split("/", 1)[1]: p for n, p in recipe_files().items() if n.startswith(f"{method}/")}
    data = unpacked_name(data_name(spec)) if spec else None
    if arch and (exact := known.get(f"{arch}_{data or 'imagenet'}")):
        return exact
    if data and not arch and data != "imagenet":
        # Of several archs for small data: the one that every method has, else the method's own, else a plain ViT.
        names = sorted(known, key=lambda n: [not n.startswith(start) for start in ("vit_ti4", method, "vit_")])
        named = [known[n] for n in names if n.endswith("_" + data)]
        small = known.get("vit_mini4_builtin")
        if data != "builtin" and named:
            return named[0]
        if small or named:
            return small or named[0]
    if arch:
        of_arch = [f"{arch}_imagenet", *(name for name in known if name.startswith(arch + "_"))]
        if found := next((known[name] for name in of_arch if name in known), None):
            return found
    fallback = known.get("vit_b16_imagenet") or next(iter(known.values()), None)
    if fallback is None:
        raise UserError(
            f"no recipe for {method}: write recipes/pretrain/{method}/<arch>_<data>.yaml, or give --recipe PATH"
        )
    return fallback


def dump(recipe: BaseModel) -> str:
    """The recipe as YAML, every value resolved."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
