"""`vertebra predict`: what a trained model says of images."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from vertebra.cli import options
from vertebra.errors import UsageError

if TYPE_CHECKING:
    from vertebra.training.predicting import Answer


@click.command("predict")
@options.run_argument
@click.argument("images", nargs=-1, required=True)
@click.option("--format", "style", type=click.Choice(["json", "csv"]), help="Default: by --out's suffix, else csv.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A file instead of stdout.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes an image.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images at once.")
@options.checkpoint
@options.device
@options.as_json
@click.pass_context
def command(
    context: click.Context,
    run: str,
    images: tuple[str, ...],
    style: str | None,
    out: Path | None,
    top: int,
    batch_size: int,
    which: Literal["best", "last"],
    device: str,
    as_json: bool,
) -> None:
    """Classify IMAGES (files, folders, patterns) with the model in RUN.

    An unreadable image is reported by name and does not stop the others; the exit code is then 3.
    """
    if out and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    from vertebra.training.predicting import load

    answers = load(run, device=device, which=which).predict(images, top=top, batch=batch_size)
    style = "json" if as_json else style or ("json" if out and out.suffix == ".json" else "csv")
    text = json_text(answers) if style == "json" else csv_text(answers)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)
    unreadable = [answer for answer in answers if answer.error]
    for answer in unreadable:
        click.echo(f"warning: {answer.error}", err=True)
    if unreadable:
        context.exit(3)


def json_text(answers: "list[Answer]") -> str:
    """One JSON object."""
    return json.dumps({"images": [answer.to_json() for answer in answers]}) + "\n"


def csv_text(answers: "list[Answer]") -> str:
    """One line a class of each image, best first; an unreadable image has one line with its error."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["image", "rank", "label", "score", "error"])
    for answer in answers:
        found = zip(answer.labels, answer.scores, strict=True)
        table.writerows([answer.name, rank, label, f"{score:.6f}", ""] for rank, (label, score) in enumerate(found, 1))
        if answer.error:
            table.writerow([answer.name, "", "", "", answer.error])
    return file.getvalue()
