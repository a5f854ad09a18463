"""`vertebra train`: a classifier on your images."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from vertebra.cli import options
from vertebra.cli._runs import assignments, carry_out, parted
from vertebra.config import Run, edit, spec_of
from vertebra.spec import Spec

if TYPE_CHECKING:
    from vertebra.training.running import Material


@click.command("train")
@click.argument("data")
@click.option("-m", "--backbone", "--model", required=True, help="page/variant, timm/NAME or module:callable.")
@click.option("--recipe", help="finetune or scratch, or another module of vertebra.recipes; default: by the weights.")
@click.option("--curriculum", help="What is seen when: a page of curricula, as efficienttrain or efficienttrain/plus.")
@click.option("--adapter", help="Few new parameters on a frozen backbone: a page of adapters, as frozen or lora.")
@options.plan
@click.option("--pretrained/--no-pretrained", default=None, help="With published weights (may download), or without.")
@click.option("--weights", help="A file, a folder, hf-hub:owner/name, or a tag of timm's.")
@options.run_directory
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
    device: str,
    edits: tuple[str, ...],
    **rest: Any,
) -> None:
    """Train a classifier on the images at DATA.

    DATA is what `vertebra check` reads: a folder a class, with or without train/val/test, a table, or `digits`.
    """
    how, flags = parted(rest)
    spec = spec_of(backbone)
    from vertebra import recipes
    from vertebra.data import read
    from vertebra.training import running

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
    carry_out("train", run, material, describe(run, material), device=device, **how)


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
