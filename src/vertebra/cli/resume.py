"""`vertebra resume`: go on with a run, exactly."""

import json
import os
import sys
from pathlib import Path

import click

from vertebra.cli import options
from vertebra.errors import UsageError


def _resume_battle(run: str, edits: tuple[str, ...], *, quiet: bool, as_json: bool, dry_run: bool) -> None:
    if edits or dry_run:
        raise UsageError(
            f"{run} is a battle: --set and --dry-run are for trainings; `vertebra battle --resume` takes options"
        )
    from vertebra.battle.contest import battle
    from vertebra.cli.battle import show

    show(battle(run_dir=run, resume=True, quiet=quiet or as_json), as_json=as_json)


@click.command("resume")
@options.run_argument
@click.option("--dry-run", is_flag=True, help="Show what would change, and stop.")
@options.edits
@options.device
@options.as_json
@options.quiet
def command(run: str, dry_run: bool, edits: tuple[str, ...], device: str, as_json: bool, quiet: bool) -> None:
    """Go on with the training or the battle in the folder RUN.

    A training goes on from its last checkpoint: without --set the weights come out as if it had never stopped; with
    --set each change says whether they still do. A battle runs the cells that are not finished.
    """
    from vertebra.training.rundir import read_run

    if read_run(Path(run)).get("verb") == "battle":
        _resume_battle(run, edits, quiet=quiet, as_json=as_json, dry_run=dry_run)
        return
    from vertebra.cli._runs import summary, summary_text
    from vertebra.training import running
    from vertebra.training.console import meter

    folder, first = Path(run), os.environ.get("RANK", "0") == "0"
    before, after, recorded = running.reread(folder, edits)
    changes = running.changes(before, after, recorded) or [
        "nothing changes: the weights come out as if the run had never stopped"
    ]
    quiet = quiet or as_json or not first
    if dry_run or not quiet:
        click.echo(json.dumps({"changes": changes}) if as_json else "\n".join(changes))
    if dry_run:
        return
    with meter(sys.stdout, quiet=quiet) as watcher:
        history = running.resume(folder, edits, device=device, meter=watcher)
    if first:
        found = {**summary(history, folder), "changes": changes}
        click.echo(json.dumps(found) if as_json else summary_text(history, folder))
