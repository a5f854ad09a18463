"""`vertebra explain`: where a trained model finds what speaks for a class."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from vertebra.cli import options
from vertebra.errors import UsageError

if TYPE_CHECKING:
    from vertebra.probes.grad_cam.showing import Shown
    from vertebra.training.predicting import Loaded

How = Literal["grad_cam", "counterfactual", "guided", "guided_backprop", "gradient_input"]
LISTING = "explained.json"


@click.command("explain")
@options.run_argument
@click.argument("images", nargs=-1, required=True)
@click.option("--method", type=click.Choice(get_args(How)), default="grad_cam", show_default=True, help="What to show.")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Ask for this class; repeatable.")
@click.option("--layer", metavar="NAME", help="A module of the backbone in place of the one that is found.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="A folder; default runs/explain/NAME.")
@click.option("--overwrite", is_flag=True, help="Write into --out although it has earlier explanations.")
@options.checkpoint
@options.device
@options.as_json
@click.pass_context
def command(
    context: click.Context,
    run: str,
    images: tuple[str, ...],
    method: How,
    classes: tuple[str, ...],
    layer: str | None,
    out: Path | None,
    overwrite: bool,
    which: Literal["best", "last"],
    device: str,
    as_json: bool,
) -> None:
    """Show what the model in RUN goes by in IMAGES (files, folders, patterns).

    Each image gets a picture: itself, and beside it itself under the map of the class that the model says, or of
    --class NAME. RUN is a run directory, a checkpoint, or the address of a network whose published weights have a
    classifier, as timm/resnet50.a1_in1k. An unreadable image is reported by name; the exit code is then 3.
    """
    from vertebra.probes.grad_cam.maps import class_indices
    from vertebra.probes.grad_cam.showing import show
    from vertebra.training.predicting import expand

    expand(images)  # a wrong path is refused before a model is loaded
    loaded = _loaded(run, which, device)
    class_indices(classes, loaded.classes)  # and a wrong class before a folder is made
    folder = _folder(out, overwrite, Path(images[0]).stem)
    shown = list(show(loaded, images, folder, method=method, classes=classes, layer=layer))
    document = {"model": run, "method": method, "images": [one.to_json() for one in shown]}
    (folder / LISTING).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps({**document, "out": str(folder)}))
    else:
        click.echo("\n".join([*table(shown), f"pictures and {LISTING}: {folder}"]))
    unreadable = [one for one in shown if one.error]
    for one in unreadable:
        click.echo(f"warning: {one.error}", err=True)
    if unreadable:
        context.exit(3)


def _loaded(run: str, which: Literal["best", "last"], device: str) -> "Loaded":
    """The model in a run directory, or at an address."""
    from vertebra.probes.grad_cam.showing import published
    from vertebra.spec import timm_names
    from vertebra.training.predicting import load

    page, _, rest = run.partition("?")[0].partition("/")
    known = page == "timm" and rest.partition(".")[0] in timm_names()
    if Path(run).exists() or not (known or "?" in run or _is_page(page)):
        return load(run, device=device, which=which)
    return published(run, device)


def _is_page(name: str) -> bool:
    from vertebra.paper import pages

    return any(page.kind == "backbones" and page.name == name for page in pages())


def _folder(out: Path | None, overwrite: bool, default: str) -> Path:
    """Where the pictures go.

    Raises:
        UsageError: the folder has earlier ones.
    """
    if out is None:
        from vertebra.training.rundir import create

        return create(Path("runs"), "explain", None, default)
    if (out / LISTING).exists() and not overwrite:
        raise UsageError(f"--out {out} has earlier explanations; choose another folder or say --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    return out


def table(shown: "list[Shown]") -> list[str]:
    """One line a map."""
    rows = [("image", "class", "probability", "rank", "centre (x, y)", "picture")]
    for one in shown:
        centre = "nowhere" if one.centre is None else f"{one.centre[0]:.0f}, {one.centre[1]:.0f}"
        if not one.error:
            rows.append((one.image, one.label, f"{one.score:.1%}", str(one.rank), centre, Path(one.picture).name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
