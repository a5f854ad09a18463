"""`vertebra reproduce`: a paper's claim beside its baseline, measured on this machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vertebra.cli import options


@click.command("reproduce")
@click.argument("paper_id", metavar="ID")
@click.option("--scale", type=click.Choice(["toy", "gpu"]), default="toy", show_default=True, help="How much to train.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Repeats of every arm, at least 2.")
@click.option("--data", metavar="PATH", help="Your own images in place of the built-in data.")
@click.option("-j", "--jobs", type=int, help="Arms at a time; one a core where not given.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("evidence"), show_default=True, help="Evidence.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Kept cells.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@options.quiet
@options.as_json
def command(paper_id: str, quiet: bool, as_json: bool, out: Path, **choices: Any) -> None:
    """Measure the claim of paper ID beside its baseline, over seeds, and write evidence/ID.json.

    Arms that were measured before are not measured again, so a command that was stopped goes on where it was.
    """
    from vertebra.reproducing import reproduce

    def tell(line: str) -> None:
        if not (quiet or as_json):
            click.echo(line, err=True)

    entry = reproduce(paper_id, out=out, tell=tell, **choices)
    if as_json:
        click.echo(json.dumps(entry))
        return
    click.echo("\n".join([*table(entry), "", f"evidence: {out / (entry['id'] + '.json')}"]))


def table(entry: Mapping[str, Any]) -> list[str]:
    """The evidence of one scale as lines of text."""
    names = [*entry["metrics"], "seconds"]
    rows = [["arm", *(f"{name} ({unit})" if unit else name for name, unit in entry["metrics"].items()), "seconds"]]
    for arm, one in entry["arms"].items():
        mark = " *" if arm == entry["baseline"] else ""
        rows.append([arm + mark, *(_cell(one["metrics"].get(name)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"claim: {entry['claim']}", f"data: {entry['data']['what']}; {entry['seeds']} seeds, mean ± sd", ""]
    lines += ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "* baseline; in brackets the gain over it with its 95 % interval (paired over the seeds)"]
    lines += [
        f"{'holds' if check['holds'] else 'fails'}: {check['name']}: {check['found']}" for check in entry["checks"]
    ]
    return [*lines, f"verdict: {entry['verdict']}", f"limits: {entry['limits']}"]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['mean']:.4g} ± {row['sd']:.2g}"
    if "gain" not in row:
        return text
    low, high = row["gain_ci95"]
    return f"{text} ({row['gain']:+.3g}, {low:+.3g}..{high:+.3g})"
