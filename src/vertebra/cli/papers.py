"""`vertebra papers`: the cards of all pages."""

import dataclasses
import json

import click

from vertebra.cli.reproduce import table
from vertebra.paper import KINDS, Page, evidence, find_page, pages


def _carded() -> list[Page]:
    return [page for page in pages() if page.paper]


@click.group("papers")
def command() -> None:
    """Show the papers that vertebra carries."""


@command.command("list")
@click.option("--kind", type=click.Choice(KINDS), help="Only one folder of pages.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_papers(kind: str | None, as_json: bool) -> None:
    """List all papers, by kind."""
    shown = [page for page in _carded() if kind in (None, page.kind)]
    if as_json:
        cards = [{"kind": page.kind, **dataclasses.asdict(page.paper)} for page in shown if page.paper]
        click.echo(json.dumps({"papers": cards}))
        return
    width = max((len(page.name) for page in shown), default=0)
    for page in shown:
        assert page.paper
        click.echo(f"{page.name:{width}}  {page.kind:9}  {page.paper.year}  {page.paper.title}")


@command.command("show")
@click.argument("paper_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_paper(paper_id: str, as_json: bool) -> None:
    """Show one paper: its card, its variants, its claim, and what was measured of it."""
    page = find_page(paper_id)
    if as_json:
        card = dataclasses.asdict(page.paper) if page.paper else None
        variants = {name: dict(options) for name, options in page.variants.items()}
        found = {"kind": page.kind, "summary": page.summary, "paper": card, "variants": variants}
        click.echo(json.dumps({**found, "evidence": evidence(paper_id)}))
        return
    click.echo(card_text(page))
    for entry in evidence(paper_id):
        click.echo(f"  measured   {entry['verdict']} ({entry['scale']} scale): {entry['command']}")
        click.echo("\n".join(f"    {line}".rstrip() for line in table(entry)))


def card_text(page: Page) -> str:
    """A page's card as lines of text."""
    lines = [f"{page.name}: {page.summary}"]
    if page.paper:
        paper = page.paper
        facts = {
            "title": f"{paper.title} ({paper.year})",
            "arxiv": paper.arxiv,
            "reference": " ".join(
                part for part in (paper.reference, f"({paper.licence})" * bool(paper.licence)) if part
            ),
            "claim": paper.claim,
            "builds on": ", ".join(paper.builds_on),
            "numbers": paper.numbers,
            "parity": paper.parity,
            "note": paper.note,
        }
        lines += [f"  {name:10} {value}" for name, value in facts.items() if value]
    if page.variants:
        lines.append("  variants")
        lines += [
            f"    {page.name}/{name:16} {', '.join(f'{key}={value}' for key, value in options.items())}"
            for name, options in page.variants.items()
        ]
    return "\n".join(lines)
