"""`sslbench inspect`: a run in pictures. What its method does to images, and what its encoder looks at."""

from __future__ import annotations

import base64
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from ..attention import last_block_attention, relevance, token_similarity
from ..data import ImageSet, data_name, open_split
from ..data.loader import evaluation_sample, seed_of
from ..device import default_device
from ..errors import UserError
from ..evaluate.features import Subject, load_exactly, newest_run, open_subject
from ..evaluate.told import NOTHING, PUBLIC, Told
from ..files import write_atomically
from ..method import Method
from ..paths import home, inspected
from ..recipe import load_yaml, resolve
from ..report.figures import STYLE, picture
from ..report.html import render
from ..train.build import build
from ..train.folder import read_run
from ..train.state import newest_checkpoint
from ..views import normalise

SAMPLE = 256  # images that the token similarity and the mean feature are taken over
CHUNK = 4  # images whose relevance is in memory at once: some 2 GiB of it for ViT-B


@dataclass
class Column:
    title: str
    about: str
    images: Tensor  # (B, 3, H, W) in 0..255


def inspect(
    run: str | None, spec: str | None, images: int, out: Path | None, console: Console, told: Told = NOTHING
) -> dict[str, Any]:
    """Write inspect.{html,png,json} into `out`, into RUN/inspect/, or, of public weights, into a folder of
    results/inspect/, where the report finds it. Returns where, and the token similarity. told: what public weights are.
    """
    if run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    subject = open_subject(run, told=told)
    if note := subject.note():
        console.print(note, markup=False)
    method = trained_method(subject, console)
    if not (spec := spec or subject.data):
        spec = "builtin"
        console.print(f"'{run}' does not say what data it was trained on: these are the built-in images")
    data = any_split(spec)
    device = default_device()
    similar, columns = look(subject, method, data, images, device)
    folder = out or folder_of(subject)
    png = draw(columns)
    page = write_page(subject, method, data, similar, columns, png)
    facts = {
        "token_similarity": similar.mean().item(),
        "token_similarity_std": similar.std(correction=0).item(),
        "n": len(similar),
    }
    contents = {"inspect.png": png, "inspect.html": page.encode(), "inspect.json": json.dumps(facts).encode()}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    console.print(f"token similarity {similar.mean():.3f} +- {similar.std(correction=0):.3f}, n={len(similar)}")
    console.print(str(folder / "inspect.html"), markup=False)
    return {
        "run": str(subject.path.parent if subject.run and subject.path else run),
        "page": str(folder / "inspect.html"),
        "picture": str(folder / "inspect.png"),
        **facts,
        "data": data.name,
        "split": data.split,
        "method": subject.method,
        "arch": subject.arch,
        "columns": [c.title for c in columns],
    }


def folder_of(subject: Subject) -> Path:
    if subject.path:
        return subject.path.parent / "inspect"
    return inspected(subject.sha256) if subject.public is not None else home() / "results" / "inspect"


def trained_method(subject: Subject, console: Console) -> Method | None:
    """The method as training left it, decoder and all; None where RUN has no recipe or no checkpoint beside it."""
    if subject.path is None or not (subject.path.parent / "recipe.yaml").is_file():
        return None
    folder = subject.path.parent
    recipe = resolve(load_yaml(folder / "recipe.yaml"), folder.name)
    torch.manual_seed(seed_of("weights", recipe.science.seed))  # a run of no steps ends with what it began with
    method = build(recipe)
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        try:
            method.load_state_dict(checkpoint[1]["method"])
        except RuntimeError as e:
            raise UserError(
                f"the checkpoint of step {checkpoint[0]} in {folder} does not fit this version of {recipe.method}: "
                f"{' '.join(str(e).split())[:200]}"
            ) from None
    elif read_run(folder).get("step"):
        console.print(f"{folder} has no checkpoint left, so only its encoder is shown")
        return None
    load_exactly(method.encoder, subject.encoder.state_dict(), subject.path)
    return method


def any_split(spec: str) -> ImageSet:
    """Val, or train where there is no val."""
    try:
        return open_split(spec, "val")
    except UserError:
        return open_split(spec, "train")


# --------------------------------------------------------------------------------------------------------- the columns


@torch.no_grad()
def look(
    subject: Subject, method: Method | None, data: ImageSet, n: int, device: torch.device
) -> tuple[Tensor, list[Column]]:
    """Token similarity of each of a sample of images (S,), and the columns for n of them."""
    encoder, size = subject.encoder.to(device).eval(), subject.encoder.image[0]
    alike, features = [], []
    for batch in evaluation_sample(data, SAMPLE, size).split(64):
        tokens = encoder(normalise(batch.to(device), subject.mean, subject.std))
        alike.append(token_similarity(tokens[:, 1:]))
        features.append(encoder.feature(tokens, subject.pool))
    mean = torch.cat(features).mean(0)

    shown = evaluation_sample(data, n, size).to(device)
    x = normalise(shown, subject.mean, subject.std)
    patches = F.normalize(encoder(x)[:, 1:], dim=-1)
    rows, cols = encoder.grid
    centre = rows // 2 * cols + cols // 2
    columns = [Column("input", "the image as evaluations see it", shown)]
    if method is not None:
        columns += [Column(k, explain(k), coloured(v)) for k, v in pictures(method.to(device).eval(), shown).items()]
    feature = {"cls": "CLS", "mean": "the mean of patches", "mean_all": "the mean of all tokens"}[subject.pool]
    maps: list[tuple[str, str, Tensor]] = []
    if encoder.parts.cls:
        about = "of CLS to each patch in the last block, mean over heads"
        maps.append(("attention", about, last_block_attention(encoder, x)))
    if not encoder.parts.pooled_norm:  # whose head is not linear in the tokens
        about = (
            f"how much each patch speaks for what sets the image's feature ({feature}) apart from the mean feature: "
            "attention of all blocks, weighted by gradient and relevance (Chefer, Gur, Wolf 2021)"
        )
        relevances = torch.cat([relevance(encoder, part, subject.pool, mean) for part in x.split(CHUNK)])
        maps.append(("relevance", about, relevances))
    about = "cosine of each patch's token in the last layer and that of the centre patch, which is itself 1"
    maps.append(("similarity to the centre", about, (patches @ patches[:, centre, :, None])[..., 0]))
    columns += [Column(title, about, coloured(v.unflatten(1, encoder.grid)[:, None])) for title, about, v in maps]
    return torch.cat(alike).cpu(), columns


def pictures(method: Method, images: Tensor) -> dict[str, Tensor]:
    """The method's own pictures of images (B, 3, S, S) in 0..255, the same at every call.

    A method of one view sees the images whole, so that its pictures lie beside the input; of two, its random views.
    """
    if len(method.crop_list()) == 1:
        method.augment = method.augment.model_copy(update={"crop_scale": (1.0, 1.0), "flip": False})
    generator = torch.Generator(images.device).manual_seed(seed_of("inspect"))
    return method.pictures(method.build_views(images.to(torch.uint8), generator))


# Words that methods' titles share, so that the page can say what they mean without knowing the method.
WORDS = {
    "reconstruction": "what the decoder predicts, in its place (normalised patches: with the true mean and deviation)",
    "branch": "the same from the method's second branch",
    "visible": "the patches that the encoder sees, grey elsewhere",
    "masked": "the patches that are hidden from it",
    "group": "the patches of one group, which is encoded without the others",
    "importance": "the score of each patch by which the method divides them",
    "view": "a random view, as in training",
    "context": "the patches that the encoder sees, grey elsewhere",
    "target": "the patches whose features are to be predicted, grey elsewhere",
}


def explain(title: str) -> str:
    return next((about for word, about in WORDS.items() if word in title), "from the method")


def coloured(values: Tensor) -> Tensor:
    """Heat maps (B, 1, h, w), each from its least value to its largest, in viridis; images (B, 3, H, W) as they are."""
    if values.shape[1] == 3:
        return values
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    unit = ((values - low) / (high - low).clamp_min(1e-12))[:, 0].float().cpu().numpy()
    return torch.from_numpy(mpl.colormaps["viridis"](unit, bytes=True)[..., :3]).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------- picture and page

GAP, MARGIN, LINE = 14, 18, 34  # pixels of the PNG, which the page shows at half its size
PANEL = 224


def panel_size(columns: list[Column]) -> int:
    """A whole number of pixels of the PNG for a pixel of the image: all squares are equal."""
    side = columns[0].images.shape[-1]
    return side * max(1, round(PANEL / side))


def draw(columns: list[Column]) -> bytes:
    """The grid as a PNG: a row an image, pixels and patches as squares, titles above."""
    n, panel = len(columns[0].images), panel_size(columns)
    titles = [textwrap.wrap(c.title, 14) for c in columns]
    top = MARGIN + LINE * max(map(len, titles))
    width = 2 * MARGIN + len(columns) * (panel + GAP) - GAP
    height = top + MARGIN + n * (panel + GAP) - GAP
    canvas = torch.full((3, height, width), 255, dtype=torch.uint8)
    dpi = 160  # of `picture`
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
        for i, column in enumerate(columns):
            x = MARGIN + i * (panel + GAP)
            drawn = F.interpolate(column.images.float().cpu(), size=(panel, panel), mode="nearest").round().byte()
            for j in range(n):
                y = top + j * (panel + GAP)
                canvas[:, y : y + panel, x : x + panel] = drawn[j]
            figure.text(
                (x + panel / 2) / width,
                1 - (top - 8) / height,
                "\n".join(titles[i]),
                ha="center",
                va="bottom",
                size=12.5,
            )
        figure.figimage(canvas.permute(1, 2, 0).numpy())
    return picture(figure, "png")


ENCODERS = ("input", "attention", "relevance", "similarity to the centre")  # columns that any encoder may have
RAMP = [mpl.colors.to_hex(mpl.colormaps["viridis"](i / 8)) for i in range(9)]


def write_page(
    subject: Subject, method: Method | None, data: ImageSet, similar: Tensor, columns: list[Column], png: bytes
) -> str:
    """The page as HTML, the picture within it."""
    if method is None:
        views = "There is no checkpoint beside these weights: the method's own columns are left out."
    elif not any(c.title not in ENCODERS for c in columns):
        views = "The method draws no pictures of its own."
    elif len(method.crop_list()) == 1:
        views = "The method's own columns are of the whole image; training cuts a random crop of it first."
    else:
        views = "The method's own columns are of random views of the image, drawn as in training."
    facts = facts_of(subject, data)
    pooled = subject.encoder.parts.pooled_norm
    after = "the last block, which no norm follows in this model" if pooled else "the last layer's norm"
    return render(
        "inspect.html.j2",
        title=f"{subject.method} {subject.arch} in pictures",
        trained=facts.get("pre-training", "not recorded" if subject.path else "none, the weights are random"),
        similarity=similar.mean().item(),
        deviation=similar.std(correction=0).item(),
        n=len(similar),
        columns=columns,
        png=base64.b64encode(png).decode(),
        width=(2 * MARGIN + len(columns) * (panel_size(columns) + GAP) - GAP) // 2,
        ramp=RAMP,
        views=views,
        after=after,
        run=facts,
    )


def facts_of(subject: Subject, data: ImageSet) -> dict[str, str]:
    """Where the pictures come from, as far as that is known."""
    metadata: dict[str, str] = {}
    if subject.path:
        with safe_open(subject.path, "pt") as f:
            metadata = f.metadata()
    trained = f"{counted(subject.epochs)} of {data_name(subject.data)}" if subject.data else None
    if subject.public is not None:
        trained = f"{PUBLIC}, {subject.public}" if subject.public else f"{PUBLIC}, of unknown origin"
    facts = {
        "run": subject.path.parent.name if subject.run and subject.path else None,
        "method": subject.method,
        "preset": subject.run.get("preset"),
        "arch": f"{subject.arch}, {subject.encoder.image[0]} pixels, {subject.encoder.n_patches} patches",
        "pre-training": trained,
        "recipe": metadata.get("recipe_hash"),
        "seed": subject.run.get("seed"),
        "weights": subject.sha256,
        "images": f"{data.name}, split {data.split}, evenly spaced over it",
    }
    return {k: str(v) for k, v in facts.items() if v is not None}


def counted(epochs: float | None) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs:g} epochs"
