"""Write docs/papers/: one page a card and an index, from cards, golden numbers and evidence. `make docs` runs it."""

import json
import sys
from pathlib import Path
from typing import Any

from vertebra.cli.reproduce import table
from vertebra.paper import Page, evidence, pages

ROOT = Path(__file__).parent.parent


def render(page: Page) -> str:
    """One paper's page in Markdown."""
    paper = page.paper
    assert paper is not None
    lines = [f"# {page.name}", "", page.summary, "", f"*{paper.title}* ({paper.year})", ""]
    if paper.arxiv:
        lines.append(f"- Paper: [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})")
    if paper.reference:
        lines.append(f"- Reference code: `{paper.reference}`" + (f", {paper.licence}" if paper.licence else ""))
    if paper.claim:
        lines.append(f"- Claim: {paper.claim}")
    if paper.builds_on:
        carded = {other.name for other in pages() if other.paper}
        named = (f"[{other}]({other}.md)" if other in carded else f"`{other}`" for other in paper.builds_on)
        lines.append("- Builds on: " + ", ".join(named))
    if paper.numbers:
        lines.append(f"- Published numbers held by a test: {paper.numbers}")
    if paper.parity:
        lines.append(f"- Outputs held by a test to: {paper.parity}")
    if paper.note:
        lines.append(f"- Here: {paper.note}")
    lines += _variants(page)
    for entry in evidence(page.name):
        lines += ["", f"## Measured: {entry['verdict']}", "", f"    {entry['command']}", ""]
        lines += [f"    {line}".rstrip() for line in table(entry)]
    return "\n".join(lines) + "\n"


def _variants(page: Page) -> list[str]:
    if not page.variants:
        return []
    numbers = _golden(page).get("variants", {})
    lines = ["", "| address | parameters (M) | GMACs | at | options |", "|---|---|---|---|---|"]
    for name, options in page.variants.items():
        known = numbers.get(name, {})
        sides = known.get("resolution") or ""
        at = " x ".join(map(str, sides)) if isinstance(sides, list) else str(sides)
        cells = [*(str(known.get(key) or "") for key in ("params_m", "gmacs")), at]
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        lines.append(f"| `{page.name}/{name}` | {' | '.join(cells)} | {listed} |")
    return lines


def _golden(page: Page) -> dict[str, Any]:
    golden = ROOT / "tests" / "golden" / f"{page.name}.json"
    return json.loads(golden.read_text(encoding="utf-8")) if golden.is_file() else {}


def proofs(page: Page) -> tuple[str, str, str]:
    """The state of the three proofs that a page owes: numbers, parity, effect; "" where one is still owed.

    Networks of timm are timm's own, so that their parity is that the page builds the network it names.
    """
    golden = _golden(page)
    variants, parity = golden.get("variants", {}), golden.get("parity")
    numbers = f"{len(variants)} variant{'s' * (len(variants) > 1)}" if variants else ""
    on_timm = any("timm" in options for options in page.variants.values())
    measured = ", ".join(f"{entry['verdict']} ({entry['scale']})" for entry in evidence(page.name))
    assert page.paper
    held = "golden outputs" if parity else page.paper.parity or ("timm's own" if on_timm else "")
    return numbers or page.paper.numbers, held, measured


def documents() -> dict[str, str]:
    """File name -> text of everything in docs/papers/."""
    carded = [page for page in pages() if page.paper]
    index = [
        "# Papers",
        "",
        "Made by `make docs` from the cards; do not edit.",
        "",
        "Every page owes three proofs: published *numbers* (parameters, MACs) in a test, *parity* with the reference's",
        "outputs in a test, and the claimed *effect*, measured by `vertebra reproduce ID`. Empty: still owed.",
        "",
        "| id | kind | year | title | numbers | parity | effect |",
        "|---|---|---|---|---|---|---|",
    ]
    for page in carded:
        assert page.paper
        cells = (f"[{page.name}]({page.name}.md)", page.kind, str(page.paper.year), page.paper.title, *proofs(page))
        index.append(f"| {' | '.join(cells)} |")
    return {"index.md": "\n".join(index) + "\n", **{f"{page.name}.md": render(page) for page in carded}}


def main() -> int:
    """Write the files, or with --check say which are stale."""
    folder = ROOT / "docs" / "papers"
    folder.mkdir(exist_ok=True)
    texts = documents()
    stale = [n for n, text in texts.items() if not (folder / n).is_file() or (folder / n).read_text("utf-8") != text]
    stale += [path.name for path in folder.glob("*.md") if path.name not in texts]
    if "--check" in sys.argv:
        print("\n".join(f"stale: docs/papers/{name}" for name in stale))
        return int(bool(stale))
    for path in folder.glob("*.md"):
        path.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
