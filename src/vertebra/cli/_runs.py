"""What `train` and `pretrain` share: flags as edits of a run, and doing the run."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vertebra.config import Run, to_json

if TYPE_CHECKING:
    from vertebra.training.loop import History
    from vertebra.training.running import Material


def assignments(flags: dict[str, Any]) -> list[str]:
    """Flags as `--set` edits; those not given leave the recipe's value."""
    fields = {"batch_size": "plan.batch", "img_size": "image_size", "on_error": "on_error"}
    return [f"{fields.get(flag, f'plan.{flag}')}={value}" for flag, value in flags.items() if value is not None]


HOW = ("name", "out", "overwrite", "dry_run", "print_config", "as_json", "quiet")
"""Options of both verbs that say how a run is done, not what it is."""


def parted(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `HOW`, and the flags that are edits of the run."""
    how = {name: options[name] for name in HOW}
    return how, {name: value for name, value in options.items() if name not in how}


def carry_out(
    verb: str,
    run: Run,
    material: "Material",
    shown: list[str],
    *,
    device: str,
    name: str | None,
    out: Path,
    overwrite: bool,
    print_config: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> Path | None:
    """Print a run, or do it in a directory of its own.

    Args:
        verb: the folder of the run's directory below `out`.
        run: what to do, with what it is done on in `material`.
        material: read and checked.
        shown: the run in lines.
        device: as the option; so are the others.
        name: of the run's folder.
        out: folder of all runs.
        overwrite: empty the folder first.
        print_config: print the run as JSON and stop.
        dry_run: print the plan and stop.
        as_json: one JSON object on stdout.
        quiet: no progress.

    Returns:
        The run's directory, on the first rank, where the run was done.
    """
    if print_config:
        click.echo(json.dumps(to_json(run), indent=None if as_json else 2))
        return None
    if dry_run:
        click.echo(json.dumps({"run": to_json(run), "plan": shown}) if as_json else "\n".join(shown))
        return None
    from vertebra.training import rundir, running
    from vertebra.training.console import meter

    first = os.environ.get("RANK", "0") == "0"
    folder = rundir.create(out, verb, name, run.backbone.name, overwrite=overwrite) if first else None
    quiet = quiet or as_json or not first
    if not quiet:
        click.echo("\n".join([*shown, f"run: {folder}"]))
    with meter(sys.stdout, quiet=quiet) as watcher:
        history = running.train(run, folder, data=material, device=device, meter=watcher)
    if first:
        click.echo(json.dumps(summary(history, folder)) if as_json else summary_text(history, folder))
    return folder


def summary(history: "History", folder: Path | None) -> dict[str, Any]:
    """The result of a run as JSON."""
    final = history.rows[-1] if history.rows else {}
    return {"run": str(folder), "steps": history.step, "final": final, "best": history.best}


def summary_text(history: "History", folder: Path | None) -> str:
    """The result of a run in lines."""
    from vertebra.training.console import row_text

    lines = [f"best: {row_text(history.best)}"] if history.best else []
    return "\n".join([*lines, f"run: {folder}"])
