"""`vertebra pretrain`: a backbone's weights from images without labels."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vertebra.cli import options
from vertebra.cli.train import assignments, summary, summary_text
from vertebra.config import Run, spec_of, to_json
from vertebra.spec import Spec

if TYPE_CHECKING:
    from vertebra.training.running import Material


@click.command("pretrain")
@click.argument("data")
@click.option("--method", required=True, help="A page of vertebra.methods, as simclr_v2, or module:callable.")
@click.option("-m", "--backbone", "--model", required=True, help="page/variant, timm/NAME or module:callable.")
@click.option("--recipe", help="A module of vertebra.recipes; default: the one with the method's name.")
@click.option("--epochs", type=int, help="Passes over the images.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("-b", "--batch-size", type=int, help="Images a step, over all ranks.")
@click.option("--img-size", "--imgsz", type=int, help="Side in pixels; default: the backbone's own.")
@click.option("--seed", type=int, help="Of weights, order and views.")
@click.option("-j", "--workers", help="Loader processes, or auto.")
@click.option("--precision", help="auto, 32-true, bf16-mixed, 16-mixed or bf16-true.")
@click.option("--weights", help="To start from: a file, a folder, hf-hub:owner/name, or a tag of timm's.")
@click.option("--name", help="Of the run's folder; default: the backbone's, with -2, -3 ...")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of all runs."
)
@click.option("--overwrite", "--exist-ok", is_flag=True, help="Empty the folder --name first.")
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, build nothing.")
@click.option("--print-config", is_flag=True, help="Print the resolved run as JSON and stop.")
@options.device
@options.on_error
@options.edits
@options.as_json
@options.quiet
def command(
    data: str,
    method: str,
    backbone: str,
    recipe: str | None,
    weights: str | None,
    name: str | None,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    print_config: bool,
    device: str,
    edits: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Pretrain a backbone on the images at DATA, which need no labels.

    DATA is what `vertebra check` reads; a flat folder of images will do. Labels, where there are some, judge the
    features by their neighbours and train nothing. Afterwards the weights are a backbone's:

    vertebra train DATA --backbone NAME --weights runs/pretrain/NAME/checkpoints/last
    """
    spec, chosen = spec_of(backbone), spec_of(method, "methods")
    if weights:
        spec = Spec(spec.address, {**spec.options, "weights": weights})
    from vertebra.data import read
    from vertebra.training import pretraining, rundir, running

    dataset = read(data)
    count = len(running.material(dataset, labels="optional").train)
    proposed = pretraining.propose(data, spec, count, chosen, recipe)
    run = pretraining.edited(proposed, [*assignments(flags), *edits])
    material = running.material(dataset, seed=run.plan.seed, labels="optional")
    running.check(run, material, device)
    if print_config:
        click.echo(json.dumps(to_json(run), indent=None if as_json else 2))
        return
    shown = describe(run, material)
    if dry_run:
        click.echo(json.dumps({"run": to_json(run), "plan": shown}) if as_json else "\n".join(shown))
        return
    first = os.environ.get("RANK", "0") == "0"
    folder = rundir.create(out, "pretrain", name, spec.name, overwrite=overwrite) if first else None
    quiet = quiet or as_json or not first
    if not quiet:
        click.echo("\n".join([*shown, f"run: {folder}"]))
    from vertebra.training.console import meter

    with meter(sys.stdout, quiet=quiet) as watcher:
        history = running.train(run, folder, data=material, device=device, meter=watcher)
    if first:
        click.echo(json.dumps(summary(history, folder)) if as_json else summary_text(history, folder))
        if not as_json:
            weights_at = f"{folder}/checkpoints/last"
            click.echo(f"go on with: vertebra train DATA --backbone {backbone} --weights {weights_at}")


def describe(run: Run, data: "Material") -> list[str]:
    """What is about to happen, in lines."""
    plan = run.plan
    assert run.method is not None
    judged = f", {len(data.val)} to judge by their neighbours" if len(data.val) else ""
    return [
        f"data: {run.data} ({data.dataset.layout}), {len(data.train)} to train on without labels{judged}",
        *(f"note: {note}" for note in data.notes),
        f"backbone: {run.backbone.name}, method {run.method.name}, recipe {run.recipe}",
        f"plan: {plan.epochs} epochs of {max(1, len(data.train) // plan.batch)} steps of {plan.batch} images in"
        f" {1 + len(plan.more_views)} views, {plan.optimizer} at {plan.lr:g}, {plan.schedule},"
        f" precision {plan.precision}",
    ]
