"""`vertebra pretrain`: a backbone's weights from images without labels."""

from typing import TYPE_CHECKING, Any

import click

from vertebra.cli import options
from vertebra.cli._runs import assignments, carry_out, parted
from vertebra.config import Run, spec_of
from vertebra.spec import Spec

if TYPE_CHECKING:
    from vertebra.training.running import Material


@click.command("pretrain")
@click.argument("data")
@click.option("--method", required=True, help="A page of vertebra.methods, as simclr_v2, or module:callable.")
@click.option("-m", "--backbone", "--model", required=True, help="page/variant, timm/NAME or module:callable.")
@click.option("--recipe", help="A module of vertebra.recipes; default: the one with the method's name.")
@options.plan
@click.option("--weights", help="To start from: a file, a folder, hf-hub:owner/name, or a tag of timm's.")
@options.run_directory
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
    device: str,
    edits: tuple[str, ...],
    **rest: Any,
) -> None:
    """Pretrain a backbone on the images at DATA, which need no labels.

    DATA is what `vertebra check` reads; a flat folder of images will do. Labels, where there are some, judge the
    features by their neighbours and train nothing. Afterwards the weights are a backbone's:

    vertebra train DATA --backbone NAME --weights runs/pretrain/NAME/checkpoints/last
    """
    how, flags = parted(rest)
    spec, chosen = spec_of(backbone), spec_of(method, "methods")
    if weights:
        spec = Spec(spec.address, {**spec.options, "weights": weights})
    from vertebra.data import read
    from vertebra.training import pretraining, running

    dataset = read(data)
    count = len(running.material(dataset, labels="optional").train)
    proposed = pretraining.propose(data, spec, count, chosen, recipe)
    run = pretraining.edited(proposed, [*assignments(flags), *edits])
    material = running.material(dataset, seed=run.plan.seed, labels="optional")
    running.check(run, material, device)
    folder = carry_out("pretrain", run, material, describe(run, material), device=device, **how)
    if folder and not how["as_json"]:
        click.echo(f"go on with: vertebra train DATA --backbone {backbone} --weights {folder}/checkpoints/last")


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
