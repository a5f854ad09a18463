"""Adapters: few new parameters on a frozen backbone."""

from collections.abc import Mapping
from typing import Any

from vertebra.contracts import Backbone
from vertebra.spec import Spec


def adapted(*, backbone: Mapping[str, Any], adapter: Mapping[str, Any]) -> Backbone:
    """A backbone with an adapter on it, from the JSON forms of their specs: how a checkpoint names the two at once."""
    return Spec(**adapter).build(Spec(**backbone).build())
