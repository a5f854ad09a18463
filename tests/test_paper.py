import ast
from pathlib import Path

import pytest

import vertebra
from vertebra.errors import UsageError
from vertebra.paper import KINDS, find_page, pages, read_page

ROOT = Path(vertebra.__file__).parent


def _page(folder: Path, name: str, text: str):
    path = folder / f"{name}.py"
    path.write_text(text)
    return read_page(path, "backbones")


def test_card_and_variants_are_read_without_import(tmp_path: Path) -> None:
    page = _page(
        tmp_path,
        "toy",
        '"""A toy. \n\nMore."""\nraise SystemExit\nPAPER = Paper(id="toy", title="T", year=2020, builds_on=("swin",))\n'
        'VARIANTS = {"small": dict(depths=(1, 2), norm="layer"), "big": {"depths": [3]}}\n',
    )
    assert page.paper.title == "T" and page.paper.builds_on == ("swin",)
    assert page.variants == {"small": {"depths": (1, 2), "norm": "layer"}, "big": {"depths": (3,)}}


def test_module_without_card_is_no_page(tmp_path: Path) -> None:
    assert _page(tmp_path, "plain", "x = 1\n") is None


def test_card_must_be_literal_and_carry_the_modules_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="literals only"):
        _page(tmp_path, "toy", "PAPER = Paper(id=name(), title='T', year=2020)\n")
    with pytest.raises(ValueError, match="must agree"):
        _page(tmp_path, "toy", "PAPER = Paper(id='ty', title='T', year=2020)\n")


def test_every_module_of_a_kind_with_a_card_is_found() -> None:
    carded = {
        (kind, path.stem if path.stem != "__init__" else path.parent.name)
        for kind in KINDS
        for path in (*(ROOT / kind).glob("*.py"), *(ROOT / kind).glob("*/__init__.py"))
        if any(
            isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAPER"
            for node in ast.parse(path.read_text()).body
        )
    }
    assert carded == {(page.kind, page.name) for page in pages() if page.paper}
    assert len(carded) >= 16


@pytest.mark.parametrize("page", [p for p in pages() if p.paper], ids=lambda p: p.name)
def test_card_is_complete(page) -> None:
    assert page.summary and page.paper.title and page.paper.claim
    assert 1990 < page.paper.year < 2030
    for other in page.paper.builds_on:
        assert find_page(other)


def test_misspelt_page_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean swin"):
        find_page("swim", "backbones")
