"""`vertebra battle`: which backbone should I use for these images?"""

import json
from typing import TYPE_CHECKING, Any

import click

from vertebra.errors import UsageError
from vertebra.spec import Spec

if TYPE_CHECKING:
    from vertebra.battle.ranking import Ranking


def _listed(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str] | None:
    """`-m a,b -m c` as one list; None where the option is not given."""
    found = [word.strip() for value in values for word in value.split(",") if word.strip()]
    if values and not found:
        raise UsageError(f"{parameter.opts[-1]} is empty; give one name or more, separated by commas")
    return found or None


def _seeds(context: click.Context, parameter: click.Parameter, value: str | None) -> int | list[int] | None:
    """`3` is three seeds, `0,4` are these two."""
    if value is None:
        return None
    try:
        return [int(word) for word in value.split(",") if word] if "," in value else int(value)
    except ValueError:
        raise UsageError(f"--seeds is {value!r}; give how many, as 3, or which, as 0,1,2") from None


def _weights(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    found = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            raise UsageError(f"--weights {value!r}: write CONTENDER=WEIGHTS, as timm/resnet18=weights.safetensors")
        found[name] = path
    return found or None


def show(ranking: "Ranking", *, as_json: bool) -> None:
    """The end of a battle on stdout."""
    from vertebra.battle.board import conclusion

    if as_json:
        click.echo(json.dumps({**ranking.to_json(), "report": str(ranking.report)}))
    else:
        conclusion(ranking)


@click.command("battle")
@click.argument("data", required=False)
@click.option("--test", metavar="PATH", help="Test on these data instead; classes are matched by name.")
@click.option(
    "-m",
    "--contenders",
    "--models",
    multiple=True,
    callback=_listed,
    metavar="A,B,...",
    help="Backbones: page/variant, timm/NAME, timm/NAME.TAG (with those weights) or module:callable, each with options "
    "as 'timm/resnet18?weights=FILE&image_size=160'. Default: networks of different families.",
)
@click.option(
    "--probes",
    multiple=True,
    callback=_listed,
    metavar="A,B,...",
    help="What to measure. Default: all but fine-tuning.",
)
@click.option("--seeds", callback=_seeds, metavar="N", help="How many seeds, or which (0,1,2). Default: 3.")
@click.option("--budget", metavar="TIME", help="Time for all of it, as 10m; what does not fit is left out and listed.")
@click.option("--max-latency", metavar="TIME", help="Of the pick: one image on this machine, as 20ms.")
@click.option("--max-params", metavar="N", help="Of the pick: parameters, as 30M.")
@click.option("--max-memory", metavar="SIZE", help="Of the pick: peak memory of inference, as 500MB.")
@click.option(
    "--licence",
    "--license",
    type=click.Choice(["any", "commercial"]),
    help="Of the pick: 'commercial' wants weights whose licence is known to allow it.",
)
@click.option(
    "--primary", metavar="SCORE", help="Score that decides. Default: finetune_top1 if probed, else linear_top1."
)
@click.option(
    "--weights",
    multiple=True,
    callback=_weights,
    metavar="NAME=WEIGHTS",
    help="Weights of one contender: a file, a tag or 'pretrained'.",
)
@click.option("--img-size", "image_size", type=int, metavar="PIXELS", help="Image side for every contender.")
@click.option("--epochs", type=int, help="Of training contenders without weights. Default: by data and budget.")
@click.option("--jobs", type=int, metavar="N", help="Processes. Default: by cores and work.")
@click.option(
    "--ray", metavar="ADDRESS", help="Run on a Ray cluster; 'auto' finds or starts one (pip install 'vertebra[ray]')."
)
@click.option(
    "--pretrained",
    "--download",
    "pretrained",
    is_flag=True,
    help="Fetch published weights: of the default contenders, and of those named without any.",
)
@click.option("--offline", is_flag=True, help="Fetch nothing at all.")
@click.option("--out", metavar="DIR", help="Folder of all runs. Default: runs.")
@click.option("--name", help="Of the run directory, OUT/battle/NAME. Default: the data's name.")
@click.option("--overwrite", is_flag=True, help="Replace the run directory NAME.")
@click.option("--resume", metavar="DIR", help="Go on with the battle in DIR; finished cells are kept.")
@click.option("--on-error", type=click.Choice(["raise", "skip"]), help="What an unreadable image does. Default: raise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, the report, and nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def command(data: str | None, as_json: bool, resume: str | None, **given: Any) -> None:
    r"""Find the backbone for the labelled images in DATA.

    DATA is a folder, a table or any layout that `vertebra check` knows, or 'digits', which is built in. Every
    contender is probed on the same images; the answer comes with intervals, paired tests and its reasons.

    \b
      vertebra battle my_images
      vertebra battle my_images -m timm/resnet18,timm/convnext_atto --budget 10m
      vertebra battle my_images --pretrained --max-latency 20ms --licence commercial
      vertebra battle --resume runs/battle/my_images
    """
    if data is None and resume is None:
        raise UsageError("give DATA, a folder of labelled images or 'digits', or --resume DIR")
    for address in given["contenders"] or ():
        Spec(address.partition("?")[0])  # a misspelt name is refused before torch is loaded
    from vertebra.battle.contest import battle

    contenders, probes = given.pop("contenders"), given.pop("probes")
    options = {name: value for name, value in given.items() if value not in (None, False)}
    options["quiet"] = given["quiet"] or as_json
    ranking = battle(contenders, probes, data, run_dir=resume, resume=resume is not None, **options)
    show(ranking, as_json=as_json)
