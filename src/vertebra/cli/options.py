"""Options that several verbs take, spelt as users already type them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one final JSON object, and nothing else on stdout."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
edits = click.option(
    "--set",
    "edits",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change any field, as plan.clip=none or lr=1e-3; repeatable.",
)
on_error = click.option(
    "--on-error", type=click.Choice(["raise", "skip"]), help="What an unreadable image does.", default=None
)


def run_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """The run directory that a verb works on."""
    return click.argument("run", type=click.Path(), metavar="RUN")(command)


def plan(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to train, of the verbs that do; what is not given is the recipe's."""
    for option in reversed(
        (
            click.option("--epochs", type=int, help="Passes over the training images."),
            click.option("--lr", type=float, help="Peak learning rate."),
            click.option("-b", "--batch-size", type=int, help="Images a step, over all ranks."),
            click.option("--img-size", "--imgsz", type=int, help="Side in pixels; default: the backbone's own."),
            click.option("--seed", type=int, help="Of weights, order and views."),
            click.option("-j", "--workers", help="Loader processes, or auto."),
            click.option("--precision", help="auto, 32-true, bf16-mixed, 16-mixed or bf16-true."),
        )
    ):
        command = option(command)
    return command


def run_directory(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where a run goes, and whether it is done at all."""
    folder = click.Path(path_type=Path)
    for option in reversed(
        (
            click.option("--name", help="Of the run's folder; default: the backbone's, with -2, -3 ..."),
            click.option("--out", type=folder, default=Path("runs"), show_default=True, help="Folder of all runs."),
            click.option("--overwrite", "--exist-ok", is_flag=True, help="Empty the folder --name first."),
            click.option("--dry-run", is_flag=True, help="Check everything, show the plan, build nothing."),
            click.option("--print-config", is_flag=True, help="Print the resolved run as JSON and stop."),
        )
    ):
        command = option(command)
    return command


checkpoint = click.option(
    "--checkpoint",
    "which",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Which checkpoint.",
)
