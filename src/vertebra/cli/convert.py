"""`vertebra convert`: a dataset in another layout."""

from pathlib import Path

import click

LAYOUTS = ("imagefolder", "coco", "voc", "yolo", "masks", "panoptic", "pairs", "image_text", "videos")
"""Those of `vertebra.data.writing.WRITERS`, which is not imported for the help."""


@click.command("convert")
@click.argument("data")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "layout", required=True, help=f"What to write: {', '.join(LAYOUTS)}.")
@click.option("--layout", "given", help="What DATA is, where it does not tell by itself.")
@click.option("--on-error", type=click.Choice(["raise", "skip"]), default="raise", show_default=True)
def command(data: str, out: Path, layout: str, given: str | None, on_error: str) -> None:
    """Read DATA and write it to the folder OUT in another layout.

    The built-in worlds are data too: vertebra convert sprites ./scenes --to coco
    """
    from vertebra.data import read
    from vertebra.data.writing import write

    dataset = read(data, layout=given, on_error=on_error)  # type: ignore[arg-type] # click checks the words
    folder = write(dataset, out, layout)
    images = sum(map(len, dataset.splits.values()))
    click.echo(f"{folder}: {images} images of {dataset.path} ({dataset.layout}) as {layout}")
