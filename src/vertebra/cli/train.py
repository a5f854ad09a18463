"""`vertebra train`: a classifier on your images."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vertebra.cli import options
from vertebra.config import Run, edit, spec_of, to_json
from vertebra.spec import Spec

if TYPE_CHECKING:
    from vertebra.training.loop import History
    from vertebra.training.running import Material


@click.command("train")
@click.argument("data")
@click.option("-m", "--backbone", "--model", required=True, help="page/variant, timm/NAME or module:callable.")
@click.option("--recipe", help="finetune or scratch, or another module of vertebra.recipes; default: by the weights.")
@click.option("--curriculum", help="What is seen when: a page of curricula, as efficienttrain or efficienttrain/plus.")
@click.option("--adapter", help="Few new parameters on a frozen backbone: a page of adapters, as frozen or lora.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("-b", "--batch-size", type=int, help="Images a step, over all ranks.")
@click.option("--img-size", "--imgsz", type=int, help="Side in pixels; default: the backbone's own.")
@click.option("--seed", type=int, help="Of weights, order and views.")
@click.option("-j", "--workers", help="Loader processes, or auto.")
@click.option("--precision", help="auto, 32-true, bf16-mixed, 16-mixed or bf16-true.")
@click.option("--pretrained/--no-pretrained", default=None, help="With published weights (may download), or without.")
@click.option("--weights", help="A file, a folder, hf-hub:owner/name, or a tag of timm's.")
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
    backbone: str,
    recipe: str | None,
    curriculum: str | None,
    adapter: str | None,
    pretrained: bool | None,
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
    """Train a classifier on the images at DATA.

    DATA is what `vertebra check` reads: a folder a class, with or without train/val/test, a table, or `digits`.
    """
    spec = spec_of(backbone)
    from vertebra import recipes
    from vertebra.data import read
    from vertebra.training import rundir, running

    if recipe:
        recipes.find(recipe)
    if pretrained is not None:
        spec = running.pretrained(spec, pretrained)
    if weights:
        spec = Spec(spec.address, {**spec.options, "weights": weights})
    pages: dict[str, Any] = {
        "curriculum": spec_of(curriculum, "curricula") if curriculum else None,
        "adapter": spec_of(adapter, "adapters") if adapter else None,
    }
    spec = edit(Run(data=data, backbone=spec, **pages), edits).backbone  # its weights choose the recipe
    dataset = read(data)
    count = len(running.material(dataset).train)
    run = edit(replace(running.propose(data, spec, count, recipe), **pages), [*assignments(flags), *edits])
    material = running.material(dataset, task=run.task, seed=run.plan.seed)
    running.check(run, material, device)
    if print_config:
        click.echo(json.dumps(to_json(run), indent=None if as_json else 2))
        return
    shown = describe(run, material)
    if dry_run:
        click.echo(json.dumps({"run": to_json(run), "plan": shown}) if as_json else "\n".join(shown))
        return
    first = os.environ.get("RANK", "0") == "0"
    folder = rundir.create(out, "train", name, spec.name, overwrite=overwrite) if first else None
    quiet = quiet or as_json or not first
    if not quiet:
        click.echo("\n".join([*shown, f"run: {folder}"]))
    from vertebra.training.console import meter

    with meter(sys.stdout, quiet=quiet) as watcher:
        history = running.train(run, folder, data=material, device=device, meter=watcher)
    if first:
        click.echo(json.dumps(summary(history, folder)) if as_json else summary_text(history, folder))


def assignments(flags: dict[str, Any]) -> list[str]:
    """Flags as `--set` edits; those not given leave the recipe's value."""
    fields = {"batch_size": "plan.batch", "img_size": "image_size", "on_error": "on_error"}
    return [f"{fields.get(flag, f'plan.{flag}')}={value}" for flag, value in flags.items() if value is not None]


def describe(run: Run, data: "Material") -> list[str]:
    """What is about to happen, in lines."""
    plan = run.plan
    return [
        f"data: {run.data} ({data.dataset.layout}), {len(data.train)} to train on, {len(data.val)} to choose by,"
        f" {len(data.train.classes)} classes",
        *(f"note: {note}" for note in data.notes),
        f"backbone: {run.backbone.name}, recipe {run.recipe}",
        f"plan: {plan.epochs} epochs of {max(1, len(data.train) // plan.batch)} steps of {plan.batch} images,"
        f" {plan.optimizer} at {plan.lr:g}, {plan.schedule}, precision {plan.precision}",
    ]


def summary(history: "History", folder: Path | None) -> dict[str, Any]:
    """The result of a run as JSON."""
    final = history.rows[-1] if history.rows else {}
    return {"run": str(folder), "steps": history.step, "final": final, "best": history.best}


def summary_text(history: "History", folder: Path | None) -> str:
    """The result of a run in lines."""
    from vertebra.training.console import row_text

    lines = [f"best: {row_text(history.best)}"] if history.best else []
    return "\n".join([*lines, f"run: {folder}"])
