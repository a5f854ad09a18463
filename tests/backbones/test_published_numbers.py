"""Every variant of every page has the parameters and multiply-accumulates that were published for it.

`golden/<page>.json` holds the numbers, where they come from and how they were counted. Everything is counted on
the meta device. `nano` is ours, for tests and laptops: nobody published its numbers.
"""

import json
from pathlib import Path

import pytest
import torch

from vertebra.paper import Page, pages
from vertebra.spec import Spec
from vertebra.training.cost import count

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES = 1000
BACKBONES = [page for page in pages() if page.kind == "backbones"]


def published(page: Page) -> list[str]:
    return [name for name, options in page.variants.items() if name != "nano" or "timm" in options] or [""]


VARIANTS = [(page.name, variant) for page in BACKBONES for variant in published(page)]


def golden(page: str) -> dict:
    file = GOLDEN / f"{page}.json"
    assert file.is_file(), f"{file} is missing: each backbone page owes its published numbers"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page.name for page in BACKBONES])
def test_every_variant_has_published_numbers(page):
    variants = published(next(p for p in BACKBONES if p.name == page))
    assert set(golden(page)["variants"]) == set(variants)
    assert golden(page)["source"] and golden(page)["counted"]


@pytest.mark.parametrize(("page", "variant"), VARIANTS)
def test_parameters_and_macs_are_the_published_ones(page, variant):
    numbers = golden(page)
    expected = numbers["variants"][variant]
    with torch.device("meta"):
        backbone = Spec(f"{page}/{variant}".rstrip("/")).build()
    sides = expected["resolution"]
    cost = count(backbone, size=tuple(sides) if isinstance(sides, list) else (sides, sides))
    classes = numbers.get("classes", CLASSES)
    classifier = backbone.width * classes
    assert (cost.params + classifier + numbers["heads"] * classes) / 1e6 == pytest.approx(
        expected["params_m"], rel=0.01
    )
    tolerance = expected.get("gmacs_tolerance", 0.01)
    assert tolerance == 0.01 or expected["why"], "a wider tolerance needs its reason"
    assert (cost.macs + classifier) / 1e9 == pytest.approx(expected["gmacs"], rel=tolerance)
