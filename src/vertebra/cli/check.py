"""`vertebra check`: is this data fit to compare backbones on?"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vertebra.data.checking import CheckReport, Finding

_SHOWN = 5


@click.command("check")
@click.argument("path")
@click.option("--workers", type=click.IntRange(1), help="Threads that decode; default: one a processor.")
@click.option("--layout", help="What the data is, where more than one reading makes sense.")
@click.option("--images", help="Column or member of the images, where the usual names do not tell.")
@click.option("--labels", help="Column, member or field of the labels, where the usual names do not tell.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    context: click.Context,
    path: str,
    workers: int | None,
    layout: str | None,
    images: str | None,
    labels: str | None,
    as_json: bool,
) -> None:
    """Decode every image at PATH and report what would make results wrong.

    Exit code 3 where there are defects: unreadable images, the same image in two splits, one class only.
    """
    from vertebra.data import read
    from vertebra.data.checking import check

    report = check(read(path, layout=layout, images=images, labels=labels), workers)
    click.echo(json.dumps(report.to_json()) if as_json else report_text(report))
    if report.defects:
        context.exit(3)


def report_text(report: "CheckReport") -> str:
    """A check's report as lines of text."""
    labels = {"single": "one label an image", "multi": "many labels an image", "none": "no labels"}[report.label]
    lines = [f"{report.path}: {report.layout}, {report.images} images, {labels}, {report.seconds:.1f} s"]
    for split, counts in report.counts.items():
        total, classes = sum(counts.values()), sum(count > 0 for name, count in counts.items() if name)
        of = f" of {classes} classes, {min(counts.values())} to {max(counts.values())} each" if classes else ""
        lines.append(f"  {split}: {total} {'labels' if report.label == 'multi' else 'images'}{of}")
    lines += _findings("defect", report.defects)
    lines += _findings("warning", report.warnings)
    if not report.defects:
        lines.append("no defects")
    return "\n".join(lines)


def _findings(rank: str, findings: "Sequence[Finding]") -> list[str]:
    """Findings by kind, the first few of each."""
    totals = Counter(finding.kind for finding in findings)
    lines = []
    for kind, total in totals.items():
        lines.append(f"{rank} {kind}: {total}")
        shown = [finding for finding in findings if finding.kind == kind][:_SHOWN]
        lines += [f"  {finding.where}: {finding.message}" for finding in shown]
        if total > _SHOWN:
            lines.append(f"  ... and {total - _SHOWN} more; --json lists all")
    return lines
