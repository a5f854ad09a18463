"""`vertebra models`: the backbones that an address can name."""

import json
from fnmatch import fnmatchcase

import click

from vertebra.errors import UsageError, near
from vertebra.spec import Spec, addresses, timm_names


@click.group("models")
def command() -> None:
    """Show the backbones: our pages and timm's networks."""


@command.command("list")
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(pattern: str | None, as_json: bool) -> None:
    """List addresses that match PATTERN, such as 'swin*', '*tiny*' or 'timm/*vit*'.

    Without PATTERN only our own pages are listed.
    """
    own, foreign = addresses(), [f"timm/{name}" for name in timm_names()]
    shown = list(own)
    if pattern:
        wanted = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
        shown = [address for address in (*own, *foreign) if fnmatchcase(address, wanted)]
        if not shown:
            names = {*(a.partition("/")[0] for a in own), *timm_names()}
            raise UsageError(f"no backbone matches {pattern!r}{near(pattern.strip('*?'), names)}")
    if as_json:
        click.echo(json.dumps({"models": shown}))
        return
    for address in shown:
        click.echo(address)
    if not pattern:
        click.echo(f"... and timm's {len(foreign)} networks: vertebra models list 'timm/*'", err=True)


@command.command("show")
@click.argument("address", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_model(address: str, as_json: bool) -> None:
    """Show one backbone: input, pyramid, cost, and the weights there are with their licences."""
    Spec(address)
    from vertebra.shipping.weights import describe

    facts = describe(address)
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            click.echo(name)
            for row in value:
                click.echo("  " + "  ".join(f"{key}={item}" for key, item in row.items()))
        else:
            click.echo(f"{name:{width}}  {value}")
