"""`vertebra val`: how good a trained model is on data."""

import json
from pathlib import Path
from typing import Literal

import click

from vertebra.cli import options


@click.command("val")
@options.run_argument
@click.argument("data")
@click.option("--split", help="Default: test, else val, else what there is.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images at once.")
@options.checkpoint
@options.device
@options.as_json
def command(
    run: str, data: str, split: str | None, batch_size: int, which: Literal["best", "last"], device: str, as_json: bool
) -> None:
    """Measure the model in RUN on DATA; classes are matched by name."""
    from vertebra.data import read
    from vertebra.training.predicting import load, locate

    checkpoint = locate(Path(run), which)
    dataset = read(data)
    name = split or next(candidate for candidate in ("test", "val", *dataset.splits) if candidate in dataset.splits)
    chosen = dataset.split(name)
    loaded = load(checkpoint, device=device)
    found = loaded.evaluate(chosen, batch=batch_size)
    absent = [label for label in loaded.classes if label not in chosen.classes]
    if as_json:
        click.echo(json.dumps({"run": run, "split": name, "n": len(chosen), "absent": absent, "metrics": found}))
        return
    click.echo(f"{data}, split {name}, {len(chosen)} images")
    if absent:
        click.echo(f"note: the data has no class {', '.join(absent)}, which the model knows")
    for metric, value in found.items():
        click.echo(f"  {metric:12} {value:.4g}{'' if metric == 'nll' else ' %'}")
