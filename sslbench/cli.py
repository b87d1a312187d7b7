"""The command line: one short function a command; what it does lives in the module that it calls."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .errors import Failure, Interrupted, RunFailed, UserError, full, is_full, is_unusable, lost_loader, nearest
from .paths import bundled, expand, recipe_files
from .plugin import is_plugin
from .train.launch import first_process, leave_to_first, refuse_several

# What torchrun and srun may start as several processes; and what is more than one training, or times one. All else is
# done by the first of them.
SEVERAL_PROCESSES = ("pretrain", "eval", "transfer")
ONE_PROCESS = ("ablate", "quickstart", "study", "plan", "bench")


class Group(TyperGroup):
    """Turns the suite's errors into one message on standard error and the exit status that fits."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in ONE_PROCESS:
            refuse_several(name)
        elif ctx.parent is None and name not in SEVERAL_PROCESSES:
            leave_to_first()
        return name, command, rest

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Every path of every command, before any of them sees it."""
        return super().parse_args(ctx, [expand(word) for word in args])

    def invoke(self, ctx: Any) -> Any:
        err = Console(stderr=True, highlight=False, soft_wrap=True)
        try:
            return super().invoke(ctx)
        except UserError as e:
            err.print(f"[bold red]error:[/] {_plain(e)}")
            raise typer.Exit(2) from None
        except OSError as e:
            if is_unusable(e):
                where = "; give another folder by --out or SSLBENCH_HOME" if e.errno == errno.EROFS else ""
                err.print(f"[bold red]error:[/] {_plain(e.filename)} cannot be used: {str(e.strerror).lower()}{where}")
                raise typer.Exit(2) from None
            if not is_full(e):
                raise
            err.print(f"[bold red]run failed:[/] {_plain(full(e.filename or 'a result'))}")
            raise typer.Exit(1) from None
        except RunFailed as e:
            err.print(f"[bold red]run failed:[/] {_plain(e)}")
            raise typer.Exit(1) from None
        except RuntimeError as e:
            if (said := lost_loader(e)) is None:
                raise
            err.print(f"[bold red]run failed:[/] {_plain(said)}")
            raise typer.Exit(1) from None
        except Interrupted as e:
            err.print(f"[bold yellow]interrupted:[/] {_plain(e)}")
            raise typer.Exit(130) from None
        except KeyboardInterrupt:
            err.print("[bold yellow]interrupted[/]")
            raise typer.Exit(130) from None


def _plain(e: object) -> str:
    return str(e).replace("[", "\\[")


app = typer.Typer(
    cls=Group,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Compare self-supervised methods for Vision Transformers, every number with its provenance and interval.",
)
START = """Compare self-supervised methods for Vision Transformers. To start with:

  sslbench quickstart                 six methods on built-in images, 5 minutes
  sslbench pretrain mae --data builtin  one method; the same command resumes
  sslbench eval knn                   measure the newest run
  sslbench report                     all that was measured, as a page

sslbench --help lists all commands, and sslbench COMMAND --help what each takes."""


@app.callback()
def start(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(START)


class EvalGroup(Group):
    """`eval path/to/file.py:NAME` is `eval function`, told which."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if is_plugin(args[0]):
            args = ["function", *args[1:], "--set", f"science.function={args[0]}"]
        return super().resolve_command(ctx, args)


eval_app = typer.Typer(cls=EvalGroup, no_args_is_help=True, help="Evaluate a pre-trained encoder.")
data_app = typer.Typer(cls=Group, no_args_is_help=True, help="Look at data sets.")
recipe_app = typer.Typer(cls=Group, no_args_is_help=True, help="Write and check recipes of your own.")
transfer_app = typer.Typer(cls=Group, no_args_is_help=True, help="Train an encoder for dense prediction, and score it.")
app.add_typer(eval_app, name="eval")
app.add_typer(transfer_app, name="transfer")
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line; all else on standard error.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe, such as science.optim.lr=1e-3")]
Run = Annotated[
    str | None,
    typer.Argument(help="Run folder, weights file, timm:NAME, untrained:ARCH; the newest run if left out."),
]
As = Annotated[str | None, typer.Option("--as", metavar="METHOD", help="Of public weights: the method, such as mae.")]
PretrainedOn = Annotated[
    str | None, typer.Option("--pretrained-on", metavar="DATA", help="Of public weights: their data, such as imagenet.")
]
ToldEpochs = Annotated[
    float | None, typer.Option("--epochs", min=0, metavar="N", help="Of public weights: epochs of pre-training.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The folder to write to.")]


def console(as_json: bool = False) -> Console:
    """Where a command talks: standard output, unless that belongs to JSON."""
    return Console(stderr=as_json, highlight=False, soft_wrap=True, quiet=not first_process())


def answer(as_json: bool, value: Any) -> None:
    if as_json and first_process():
        print(json.dumps(value))


@contextlib.contextmanager
def answer_of_failed(as_json: bool) -> Iterator[None]:
    """What there is to say in JSON of a command that failed, such as the runs of a study that did not."""
    try:
        yield
    except Failure as e:
        if e.answer is not None:
            answer(as_json, e.answer)
        raise


Seed = Annotated[int, typer.Option("--seed", min=0, help="Of all that is drawn.")]


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(help="Wall time to spend, about; shared equally by the methods.")] = 5.0,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="all, or some; the four hybrids and two controls if left out.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Pre-train methods on built-in images, evaluate each, write a report. Minutes on a laptop CPU."""
    from .commands.quickstart import quickstart as run

    with answer_of_failed(as_json):
        answered = run(minutes, seed, out, console(as_json), methods)
    answer(as_json, answered)


def _methods(incomplete: str) -> list[str]:
    """For the shell to complete: the names of the files in methods/, none of which is imported."""
    return sorted(path.stem for path in bundled("methods").glob(f"{incomplete}*.py"))


def _recipes(incomplete: str) -> list[str]:
    return [name for name in recipe_files() if name.startswith(incomplete)]


def _known(method: str) -> str:
    """A wrong name is refused before torch is imported, which takes seconds."""
    if method in (names := _methods("")) or is_plugin(method) or entry_points(group="sslbench.methods"):
        return method
    raise UserError(f"unknown method '{method}'{nearest(method, names)}")


MethodName = Annotated[
    str,
    typer.Argument(
        help="A name of `sslbench list methods`, or path/to/file.py:Class.", autocompletion=_methods, callback=_known
    ),
]
Arch = Annotated[str | None, typer.Option("--arch", help="Such as vit_b16; `sslbench list archs`.")]
Data = Annotated[
    str | None, typer.Option("--data", help="builtin, npz:PATH, folder:DIR, imagenet:DIR, packed:DIR, a name.")
]
PretrainRecipe = Annotated[
    str | None,
    typer.Option("--recipe", help="Name or path; `sslbench list recipes`.", autocompletion=_recipes),
]
Preset = Annotated[str | None, typer.Option("--preset", help="paper or official, where the two part.")]
Epochs = Annotated[float | None, typer.Option("--epochs", min=0, help="Of pre-training; the schedule ends with them.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images a step, over all devices.")]
Devices = Annotated[int | None, typer.Option("--devices", min=1, help="GPUs, or processes on a CPU, of each node.")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines, each started by torchrun or srun.")]
Precision = Annotated[str | None, typer.Option("--precision", help="32, bf16, 16 or auto.")]
PretrainSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Of weights, order and views.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Whether to use torch.compile.")]
InitFrom = Annotated[
    str | None,
    typer.Option("--init", help="Weights to start from: a run folder, RUN@0.5, a weights file, timm:NAME."),
]


@app.command()
def pretrain(
    method: MethodName,
    arch: Arch = None,
    data: Data = None,
    recipe: PretrainRecipe = None,
    preset: Preset = None,
    init: InitFrom = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    sets: Sets = None,
    seed: PretrainSeed = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs, one after the other, with seeds from --seed on, each in its folder."),
    ] = None,
    devices: Devices = None,
    nodes: Nodes = None,
    precision: Precision = None,
    compile: Compile = None,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE,...", help="Submit a job with sbatch's options: partition, nodes, time."),
    ] = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, at no cost.")] = False,
    as_json: Json = False,
) -> None:
    """Pre-train an encoder. The same command again resumes an unfinished run."""
    from .commands.pretrain import dry, start
    from .commands.seeds import dry_seeds, start_seeds
    from .evaluate.start import settle
    from .recipe import compose

    science = {"arch": arch, "data": {"spec": data}, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    resolved = compose(
        method,
        recipe=recipe,
        preset=preset,
        sets=sets or [],
        science={**science, "init": init},
        machine={"devices": devices, "nodes": nodes, "precision": precision, "compile": compile},
    )
    resolved = settle(resolved)
    talk = console(as_json)
    if seeds is None:
        answer(as_json, dry(resolved, talk) if dry_run else start(resolved, out, talk, slurm))
        return
    with answer_of_failed(as_json):
        answered = dry_seeds(resolved, seeds, out, talk) if dry_run else start_seeds(resolved, seeds, out, talk, slurm)
    answer(as_json, answered)


@app.command()
def plan(
    method: MethodName,
    arch: Arch = None,
    data: Data = None,
    recipe: PretrainRecipe = None,
    preset: Preset = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    sets: Sets = None,
    seed: PretrainSeed = None,
    devices: Devices = None,
    nodes: Nodes = None,
    precision: Precision = None,
    compile: Compile = None,
    on: Annotated[str | None, typer.Option(help="Another machine, such as A100x4: from FLOPs, not measured.")] = None,
    link: Annotated[str | None, typer.Option(help="Between devices, such as 100Gb/s: their scaling, on paper.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="To calibrate for, about.")] = 20.0,
    as_json: Json = False,
) -> None:
    """What a pre-training will take: hours, memory, disk, from a short run of it."""
    from .commands.plan import plan as run
    from .recipe import compose

    resolved = compose(
        method,
        recipe=recipe,
        preset=preset,
        sets=sets or [],
        science={"arch": arch, "data": {"spec": data}, "epochs": epochs, "batch_size": batch_size, "seed": seed},
        machine={"devices": devices, "nodes": nodes, "precision": precision, "compile": compile},
    )
    talk = console(as_json)
    for line in resolved.notes:
        talk.print(line, markup=False)
    answer(as_json, run(resolved, seconds, on, talk, link))


EvalData = Annotated[str | None, typer.Option("--data", help="Labelled data; the run's own if left out.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="Name or path of an eval recipe.")]
EvalSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Of the evaluation; the run's own if left out.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Evaluate with so many seeds; mean and interval.")]


def _eval_command(kind: str, help: str) -> None:
    @eval_app.command(kind, help=help)
    def command(
        run: Run = None,
        data: EvalData = None,
        recipe: RecipeName = None,
        sets: Sets = None,
        seed: EvalSeed = None,
        seeds: Seeds = 1,
        as_: As = None,
        pretrained_on: PretrainedOn = None,
        epochs: ToldEpochs = None,
        as_json: Json = False,
    ) -> None:
        from .evaluate.evaluation import eval_recipe, evaluate_named
        from .evaluate.told import tell

        told, protocol = tell(as_, pretrained_on, epochs), eval_recipe(kind, recipe, sets or [])
        answer(as_json, evaluate_named(protocol, run, data, seed, seeds, console(as_json), told))


_eval_command("knn", "Weighted k-nearest neighbours on frozen features.")
_eval_command("linprobe", "A linear classifier on frozen features.")
_eval_command("attentive", "Learned queries gather a frozen encoder's tokens. The same command resumes.")
_eval_command("finetune", "Train all weights with labels. The same command again resumes an unfinished one.")
_eval_command("function", "Your own, by its place: `eval path/to/file.py:NAME`. See the README.")
_eval_command("robustness", "A fine-tuned model on images from elsewhere: ImageNet-A, -R, -Sketch, a folder a class.")


@eval_app.command("geometry")
def geometry(
    run: Run = None,
    other: Annotated[
        str | None, typer.Option("--with", metavar="RUN", help="Another RUN: how alike the two are, by CKA.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Needs no labels; the run's own if left out.")] = None,
    recipe: RecipeName = None,
    sets: Sets = None,
    seed: EvalSeed = None,
    as_json: Json = False,
) -> None:
    """Rank, spread, uniformity and alignment of a frozen encoder's features, without labels."""
    from .evaluate.describe import describe
    from .evaluate.evaluation import eval_recipe

    answer(as_json, describe(eval_recipe("geometry", recipe, sets or []), run, other, data, seed, console(as_json)))


def _segment_command(kind: str, help: str) -> None:
    @eval_app.command(kind, help=help)
    def command(
        run: Run = None,
        data: Annotated[
            str | None, typer.Option("--data", help="Folder of photographs and label maps; $SSLBENCH_DATA's ADE20K.")
        ] = None,
        recipe: RecipeName = None,
        sets: Sets = None,
        seed: EvalSeed = None,
        as_: As = None,
        pretrained_on: PretrainedOn = None,
        epochs: ToldEpochs = None,
        as_json: Json = False,
    ) -> None:
        from .evaluate.evaluation import eval_recipe
        from .evaluate.segment import segment
        from .evaluate.told import tell

        told, protocol = tell(as_, pretrained_on, epochs), eval_recipe(kind, recipe, sets or [])
        answer(as_json, segment(protocol, run, data, seed, console(as_json), told))


_segment_command("segprobe", "A linear head on frozen patch tokens, by pixel labels: mIoU.")
_segment_command("segknn", "Neighbours of frozen patch tokens, by pixel labels: mIoU.")


def _transfer_command(kind: str, help: str) -> None:
    @transfer_app.command(kind, help=help)
    def command(
        run: Run = None,
        data: Annotated[str | None, typer.Option("--data", help="Folder; $SSLBENCH_DATA's if left out.")] = None,
        recipe: Annotated[str | None, typer.Option("--recipe", help="Name or path of a transfer recipe.")] = None,
        sets: Sets = None,
        as_: As = None,
        pretrained_on: PretrainedOn = None,
        epochs: ToldEpochs = None,
        as_json: Json = False,
    ) -> None:
        from .evaluate.told import tell
        from .transfer.protocol import transfer_recipe
        from .transfer.transfer import transfer

        told, protocol = tell(as_, pretrained_on, epochs), transfer_recipe(kind, recipe, sets or [])
        answer(as_json, transfer(protocol, run, data, console(as_json), told=told))


_transfer_command(
    "coco",
    "Mask R-CNN: box and mask AP, on COCO or a set in its format. The same command resumes.",
)
_transfer_command(
    "ade20k",
    "UPerNet: mIoU, on ADE20K or label maps with classes.txt. The same command resumes.",
)


@app.command()
def study(
    name: Annotated[
        str | None,
        typer.Argument(help="hybrids_cifar10 or another of `sslbench list recipes`, a file, or a paper's table."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Methods to compare without a file; path/to/file.py:Class too."),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Of each run: 100TFLOP, 10epochs, 20min; may be given again.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each row and budget.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="This row alone; may be given again.")] = None,
    scale: Annotated[str | None, typer.Option(help="tiny, cifar or paper, where the study has scales.")] = None,
    data: Data = None,
    sets: Sets = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each with its GPU or its share of the cores.")] = 1,
    slurm: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE,...", help="Submit an array of jobs with sbatch's options.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every run and what it takes.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods at equal budgets: train, measure, rank. The same command goes on where it was stopped."""
    from .commands.study import study as run

    methods = [m.strip() for m in rows.split(",") if m.strip()] if rows else None
    with answer_of_failed(as_json):
        answered = run(name, console(as_json), rows=methods, budgets=budget, seeds=seeds, only=only, scale=scale,
                    data=data, sets=sets, jobs=jobs, slurm=slurm, dry_run=dry_run)  # fmt: skip
    answer(as_json, answered)


@app.command()
def ablate(
    table: Annotated[str, typer.Argument(help="Such as ocl_t5, asl_t7, ccmim_t5; `sslbench list recipes`.")],
    scale: Annotated[str, typer.Option(help="tiny, cifar or paper.")] = "tiny",
    data: Annotated[str | None, typer.Option("--data", help="Data SPEC; the scale's own if left out.")] = None,
    sets: Sets = None,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the rows' plans, at no cost.")] = False,
    as_json: Json = False,
) -> None:
    """Every row of a paper's ablation table: pre-train, evaluate, print beside what the paper reports."""
    from .commands.ablate import ablate as run

    with answer_of_failed(as_json):
        answered = run(table, scale, seed, data, sets or [], dry_run, console(as_json))
    answer(as_json, answered)


@app.command()
def report(
    tables: Annotated[list[str] | None, typer.Argument(help="Such as ocl_t6; all if left out.")] = None,
    out: Out = None,
    format: Annotated[str, typer.Option("--format", help="Any of html,md,csv,tex.")] = "html,md,csv",
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Two runs or methods, tested seed by seed."),
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="The commands that would fill the tables.")] = False,
    as_json: Json = False,
) -> None:
    """Every measured number beside the reported one, as a page; or one table in the terminal."""
    from .report.page import report as run

    if missing:
        from .ledger import read
        from .report.missing import missing as find

        answer(as_json, {"missing": find(tables or [], read(), console(as_json))})
        return
    if compare:
        from .ledger import read
        from .report.compare import compare as test

        answer(as_json, test(*compare, read(), console(as_json)))
        return
    answer(as_json, run(tables or [], out, format, console(as_json)))


@app.command()
def bench(
    methods: Annotated[list[str] | None, typer.Argument(help="All if left out.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="vit_ti4 if left out; may be given again.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images a step; the recipe's if left out.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="auto if left out; may be given again.")] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Whether to use torch.compile.")] = False,
    seconds: Annotated[float, typer.Option(help="Time to measure each for.")] = 10.0,
    against: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Run in turn with ours; its last line of output ends in its images/s."),
    ] = None,
    targets: Annotated[
        bool, typer.Option("--targets", help="Measure what the suite promises; writes results/speed.md.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For --targets: a clone of MAE's code, facebookresearch/mae."),
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Images a second, share of this machine's matmul peak, memory, data wait."""
    from .commands.bench import bench as run
    from .commands.speed import measure_targets

    if targets:
        given = {"METHOD": methods, "--arch": arch, "--batch-size": batch_size, "--precision": precision, "--set": sets,
                 "--compile": compile, "--against": against}  # fmt: skip
        if wrong := [name for name, value in given.items() if value]:
            raise UserError(f"bench --targets measures a fixed list; leave {wrong[0]} out")
        answer(as_json, measure_targets(reference, seconds, console(as_json)))
        return
    if reference:
        raise UserError("--reference is for bench --targets; to compare with any command, give --against")
    archs, precisions, talk = arch or ["vit_ti4"], precision or ["auto"], console(as_json)
    answer(as_json, run(methods or [], archs, batch_size, precisions, compile, seconds, sets or [], talk, against))


@app.command()
def inspect(
    run: Run = None,
    data: Annotated[str | None, typer.Option("--data", help="Images to show; the run's own data if left out.")] = None,
    images: Annotated[int, typer.Option(min=1, max=64, help="How many to show.")] = 6,
    out: Out = None,
    as_: As = None,
    pretrained_on: PretrainedOn = None,
    epochs: ToldEpochs = None,
    as_json: Json = False,
) -> None:
    """A page of pictures: what the method does to images, what the encoder looks at, how alike its tokens are."""
    from .commands.inspect import inspect as look
    from .evaluate.told import tell

    answer(as_json, look(run, data, images, out, console(as_json), tell(as_, pretrained_on, epochs)))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder, weights file, timm:NAME, untrained:ARCH.")],
    format: Annotated[
        str, typer.Option("--format", help="timm or safetensors, a file; hf, a folder that transformers loads.")
    ] = "timm",
    out: Out = None,
    push: Annotated[
        str | None, typer.Option(metavar="NAME/MODEL", help="With --format hf: upload to the Hugging Face hub.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The encoder as a file or folder that others load."""
    from .commands.export import export as do

    answer(as_json, do(run, format, out, push, console(as_json)))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, recipes, archs, tables or runs.")],
    as_json: Json = False,
) -> None:
    """What there is."""
    from .commands.listing import listing

    answer(as_json, {what: listing(what, console(as_json))})


@app.command()
def doctor(
    try_: Annotated[bool, typer.Option("--try", help="Train a little on all devices, and say what is off.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine has, what is missing, and what to do about it; --try: whether its numbers can be trusted."""
    if try_:
        from .commands.trial import try_out

        with answer_of_failed(as_json):
            tried = try_out(console(as_json))
        answer(as_json, tried)
        return
    from .commands.doctor import doctor as run

    answer(as_json, run(console(as_json)))


@app.command()
def clean(as_json: Json = False) -> None:
    """Remove cached features and lists of files; what needs them makes them again."""
    from .data import listing
    from .evaluate import feature_cache

    (files, size), (lists, more) = feature_cache.clean(), listing.clean()
    files, size = files + lists, size + more
    where = f"{feature_cache.folder()} and {listing.folder()}"
    console(as_json).print(f"removed {files} files, {size / 2**30:.2f} GiB, from {where}", markup=False)
    answer(as_json, {"removed_files": files, "freed_gib": round(size / 2**30, 3)})


@recipe_app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="Of `sslbench list recipes`, of any kind; or a file.")],
    file: Annotated[Path | None, typer.Argument(help="To write; NAME.yaml in this folder if left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there already.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe as a file to edit: it stands alone, with its comments and all that it extends merged in."""
    from .commands.recipe import copy

    answer(as_json, copy(name, file, force, console(as_json)))


@recipe_app.command("check")
def recipe_check(
    file: Annotated[str, typer.Argument(help="A recipe's or a study's file, or a name.")], as_json: Json = False
) -> None:
    """Say all that is wrong with a recipe, exit status 2, or what it comes to. Nothing is trained."""
    from .commands.recipe import check

    with answer_of_failed(as_json):
        checked = check(file, console(as_json))
    answer(as_json, checked)


Spec = Annotated[str, typer.Argument(help="builtin, npz:PATH, folder:DIR, ...; `sslbench data list`.")]


@data_app.command("check")
def data_check(spec: Spec, as_json: Json = False) -> None:
    """Decode every image; say what was found and what cannot be read. Exit status 2 where a run would refuse it."""
    from .commands.listing import show_check

    checked = show_check(spec, console(as_json))
    answer(as_json, checked)
    if not checked["ok"]:
        raise typer.Exit(2)


@data_app.command("pack")
def data_pack(
    spec: Spec,
    out: Annotated[Path | None, typer.Option("--out", help="The new folder; the set's name if left out.")] = None,
    size: Annotated[int, typer.Option(min=8, help="Pixels of the short side; smaller images stay as they are.")] = 256,
    as_json: Json = False,
) -> None:
    """Write a data set as raw pixels, to be read as `--data packed:OUT`, several times as fast as image files."""
    from .data.pack import pack

    answer(as_json, pack(spec, out, size, console(as_json)))


@data_app.command("list")
def data_list(
    spec: Annotated[str | None, typer.Argument(help="One set; all kinds if left out.")] = None, as_json: Json = False
) -> None:
    """The kinds of data SPEC, and what $SSLBENCH_DATA holds; or the splits of one set."""
    from .commands.listing import show_data, show_splits

    talk = console(as_json)
    answer(as_json, {"data": show_splits(spec, talk) if spec else show_data(talk)})


def main() -> None:
    """The `sslbench` command."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPU cannot do, the CPU does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what sockets wait for is said in one message
    app()
