"""vertebra: choose a vision backbone for your own images, train it, explain it, ship it.

import vertebra as vb
ranking = vb.battle(data="my_images")        # which backbone should I use?
backbone = vb.backbone("swin/tiny")          # or "timm/<any name>", or "my_lab.nets:big"
features = backbone(images)                  # Features(pyramid, pooled, tokens)

Importing this package imports no torch: each name is loaded when it is first used.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vertebra.battle.contest import battle
    from vertebra.contracts import Backbone, Features
    from vertebra.data import read
    from vertebra.spec import Spec
    from vertebra.training.predicting import load
    from vertebra.training.running import train

__version__ = version("vertebra")
__all__ = ["Backbone", "Features", "Spec", "backbone", "battle", "load", "read", "train"]

_HOMES = {
    "Backbone": "vertebra.contracts",
    "Features": "vertebra.contracts",
    "Spec": "vertebra.spec",
    "battle": "vertebra.battle.contest",
    "load": "vertebra.training.predicting",
    "read": "vertebra.data",
    "train": "vertebra.training.running",
}


def backbone(address: str, **options: Any) -> "Backbone":
    """Build a backbone.

    Args:
        address: `page/variant`, `timm/NAME` or `module:callable`.
        options: what the page's factory takes, such as `weights`, `channels`, `image_size`.

    Returns:
        The backbone in evaluation mode.

    Raises:
        UsageError: an unknown page, variant or option; the message names the nearest ones.
    """
    from vertebra.spec import Spec

    return Spec(address, options).build().eval()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vertebra' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
