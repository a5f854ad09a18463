"""Options that several verbs take, spelt as users already type them."""

from collections.abc import Callable
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
