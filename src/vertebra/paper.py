"""Cards and discovery: what the pages say about themselves, read without importing them.

A page is a module in one of the folders of `KINDS`. Its card (`PAPER`) and its variants (`VARIANTS`) are
literals, so both are read from the source with `ast`: listing a hundred pages imports neither torch nor
the pages. Adding a page adds one file; nothing is registered anywhere.
"""

import ast
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vertebra.errors import UsageError, near

KINDS = (
    "backbones",
    "blocks",
    "necks",
    "tasks",
    "methods",
    "curricula",
    "adapters",
    "surgery",
    "search",
    "probes",
    "studies",
)
"""Folders that hold pages, in the order in which lists show them."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The card at the top of a page.

    Attributes:
        id: the atlas id, equal to the module's name.
        title: the paper's title.
        year: year of the first public version.
        arxiv: arXiv identifier, or "" where there is none.
        reference: `owner/name` of the authors' public code, or "".
        licence: licence of that code as its repository states it.
        claim: what the paper says it gains, with the yardstick.
        builds_on: ids of pages that this page may import.
        numbers: which published numbers a test holds, where they are not those of the page's own variants.
        parity: what a test holds its outputs to, where that is no golden file of its own.
        note: where this page departs from the paper, or what it leaves to another page.
    """

    id: str
    title: str
    year: int
    arxiv: str = ""
    reference: str = ""
    licence: str = ""
    claim: str = ""
    builds_on: tuple[str, ...] = ()
    numbers: str = ""
    parity: str = ""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """One page as its source describes it.

    Attributes:
        kind: the folder, one of `KINDS`.
        name: the module's name; the page's id.
        path: the source file.
        summary: first line of the module's docstring.
        paper: the card, or None for a part of ours that no paper claims.
        variants: variant name -> the options it stands for; the first is the default.
    """

    kind: str
    name: str
    path: Path
    summary: str
    paper: Paper | None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Import path of the page."""
        return f"vertebra.{self.kind}.{self.name}"


def _literal(node: ast.expr, where: str) -> Any:
    """The value of a literal expression; `dict(a=1)` and `Paper(...)` count as literals."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("dict", "Paper"):
        values = {keyword.arg: _literal(keyword.value, where) for keyword in node.keywords if keyword.arg}
        return Paper(**values) if node.func.id == "Paper" else values
    if isinstance(node, ast.Dict):
        return {
            _literal(key, where): _literal(value, where)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(item, where) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{where}, line {node.lineno}: PAPER and VARIANTS hold literals only") from None


def read_page(path: Path, kind: str) -> Page | None:
    """Read one module's card and variants, or None where the module is no page.

    A page has a `PAPER` or a `VARIANTS` at its top level.

    Raises:
        ValueError: the card is no literal, or its id is not the module's name.
    """
    name = path.parent.name if path.name == "__init__.py" else path.stem
    source = path.read_text(encoding="utf-8")
    if "PAPER" not in source and "VARIANTS" not in source:
        return None
    tree = ast.parse(source, filename=str(path))
    values: dict[str, Any] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in ("PAPER", "VARIANTS"):
            values[target.id] = _literal(node.value, str(path))  # type: ignore[attr-defined]
    if not values:
        return None
    paper = values.get("PAPER")
    if paper is not None and paper.id != name:
        raise ValueError(f"{path}: the card's id is {paper.id!r}, the module is {name!r}; they must agree")
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Page(kind, name, path, summary, paper, values.get("VARIANTS", {}))


@cache
def pages() -> tuple[Page, ...]:
    """Every page of the installed package, by kind and then by name."""
    root = Path(__file__).parent
    found = []
    for kind in KINDS:
        files = (
            [e for e in os.scandir(root / kind) if not e.name.startswith(("_", "."))] if (root / kind).is_dir() else []
        )
        for entry in sorted(files, key=lambda e: e.name):
            path = Path(entry.path) / "__init__.py" if entry.is_dir() else Path(entry.path)
            if path.suffix == ".py" and path.is_file() and (page := read_page(path, kind)):
                found.append(page)
    return tuple(found)


def find_page(name: str, kind: str | None = None) -> Page:
    """The page called `name`, in one folder or in any.

    Raises:
        UsageError: no such page; the message names the nearest ones.
    """
    candidates = [page for page in pages() if kind is None or page.kind == kind]
    for page in candidates:
        if page.name == name:
            return page
    what = f"page of {kind}" if kind else "page"
    listing = "vertebra models list" if kind == "backbones" else "vertebra papers list"
    raise UsageError(f"no {what} is called {name!r}{near(name, [p.name for p in candidates])}; `{listing}` shows all")


def entries(path: Path) -> list[dict[str, Any]]:
    """The measurements in an evidence file; none where there is no file.

    Raises:
        UsageError: the file is no evidence.
    """
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["evidence"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UsageError(f"{path} is no evidence of `vertebra reproduce`: {error!r}; move it away") from error


@cache
def _shipped() -> Path:
    """Folder of the evidence that comes with vertebra: beside the sources, or in the package."""
    package = Path(__file__).parent
    beside = package.parent.parent / "evidence"
    return beside if (package.parent.parent / "pyproject.toml").is_file() else package / "evidence"


def evidence(paper_id: str) -> list[dict[str, Any]]:
    """What `vertebra reproduce` measured of a page, an entry a scale and data; empty where nothing was."""
    return entries(_shipped() / f"{paper_id}.json")
