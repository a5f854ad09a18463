"""Spec: a checked call that has not happened yet.

An address names what will be called:

    swin/tiny             a page and one of its variants (`swin` alone: its first variant)
    timm/resnet18         any of timm's networks
    my_lab.nets:big       any importable callable

Names are checked at once from the sources, options against the signature; nothing is built or downloaded
before `Spec.build`.
"""

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vertebra.errors import UsageError, near
from vertebra.paper import find_page, pages

Json = Mapping[str, Any]


@cache
def timm_names() -> tuple[str, ...]:
    """Names of timm's networks, read from its sources: importing timm costs seconds."""
    found = find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return ()
    entry = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
    files = sorted((Path(found.submodule_search_locations[0]) / "models").glob("*.py"))
    return tuple(sorted(name for file in files for name in entry.findall(file.read_text(encoding="utf-8"))))


def addresses(kind: str = "backbones") -> tuple[str, ...]:
    """Every `page/variant` of a kind."""
    return tuple(
        f"{page.name}/{variant}" if variant else page.name
        for page in pages()
        if page.kind == kind
        for variant in (page.variants or ("",))
    )


def _check_address(address: str, kind: str) -> None:
    if ":" in address:
        module, _, name = address.partition(":")
        if not module or not name:
            raise UsageError(f"address {address!r}: a callable is written module:callable, as my_lab.nets:big")
        return
    page_name, _, variant = address.partition("/")
    if page_name == "timm" and kind == "backbones":
        name = variant.partition(".")[0]
        if name not in timm_names():
            hint = near(name, timm_names()) or "; `vertebra models list 'timm/*'` shows all"
            raise UsageError(f"timm has no network called {name!r}{hint}")
        return
    if page_name not in {p.name for p in pages() if p.kind == kind} and kind == "backbones" and not variant:
        known = [p.name for p in pages() if p.kind == kind]
        if page_name in timm_names():
            raise UsageError(f"no page of {kind} is called {page_name!r}; timm's network is written timm/{page_name}")
        raise UsageError(f"no page of {kind} is called {page_name!r}{near(page_name, [*known, *timm_names()])}")
    page = find_page(page_name, kind)
    if variant and variant not in page.variants:
        raise UsageError(
            f"{page_name} has no variant {variant!r}{near(variant, page.variants)}; it has {', '.join(page.variants)}"
        )


def options_of(call: Callable[..., Any]) -> dict[str, Any]:
    """Keyword options that a callable takes -> their annotations.

    `**options: Unpack[SomeTypedDict]` counts as the keys of that TypedDict (PEP 692). An empty name ("")
    stands for a callable that takes any keyword.
    """
    hints = typing.get_type_hints(inspect.unwrap(call) if not inspect.isclass(call) else call.__init__)
    found: dict[str, Any] = {}
    for parameter in inspect.signature(call).parameters.values():
        hint = hints.get(parameter.name, Any)
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            found[parameter.name] = hint
        elif parameter.kind is parameter.VAR_KEYWORD:
            if typing.get_origin(hint) is typing.Unpack:
                found.update(typing.get_type_hints(typing.get_args(hint)[0]))
            else:
                found[""] = Any
    return found


def check_options(what: str, call: Callable[..., Any], options: Iterable[str]) -> None:
    """Refuse option names that `call` does not take.

    Raises:
        UsageError: the message names the option and the nearest ones.
    """
    known = options_of(call)
    if "" in known:
        return
    for name in options:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise UsageError(f"{what} has no option {name!r}{near(name, known)}; options: {allowed}")


@dataclass(frozen=True)
class Spec:
    """A checked call that has not happened yet.

    Attributes:
        address: `page/variant`, `timm/NAME` or `module:callable`.
        options: keyword arguments, JSON values.
        kind: folder in which a page is looked up.
    """

    address: str
    options: Json = field(default_factory=dict)
    kind: str = "backbones"

    def __post_init__(self) -> None:
        _check_address(self.address, self.kind)
        if self.options:
            check_options(self.address, self.resolve()[0], self.options)

    def resolve(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The callable and its keyword arguments; imports the page, builds nothing.

        Raises:
            UsageError: a `module:callable` that cannot be imported.
        """
        if ":" in self.address:
            module, _, name = self.address.partition(":")
            try:
                return getattr(importlib.import_module(module), name), dict(self.options)
            except (ImportError, AttributeError) as error:
                raise UsageError(f"address {self.address!r}: {error}") from error
        page, _, variant = self.address.partition("/")
        call = getattr(importlib.import_module(f"vertebra.{self.kind}.{page}"), page)
        if page == "timm" and self.kind == "backbones":
            return call, {"name": variant, **self.options}
        return call, {"variant": variant, **self.options} if variant else dict(self.options)

    def build(self, *parts: Any) -> Any:
        """Make the call; `parts` (live objects such as levels) come first."""
        call, options = self.resolve()
        return call(*parts, **options)

    @property
    def name(self) -> str:
        """Short name for tables and folders: `swin/tiny`, `timm/resnet18`."""
        return self.address

    def to_json(self) -> dict[str, Any]:
        """JSON form, read back by `Spec(**json)`."""
        return {"address": self.address, "options": dict(self.options), "kind": self.kind}
