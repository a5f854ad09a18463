"""A battle as it is to be run: every choice made, every name checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vertebra.battle.contenders import Contender
from vertebra.battle.ranking import Constraints
from vertebra.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A battle, checked and complete: what its cells depend on, and what the pick does.

    Attributes:
        contenders: all of them.
        lineup: a sentence on the default contenders, or "".
        probes: name -> what is asked.
        seeds: of trainings and of probes that draw.
        primaries: scores that may decide: the first that every contender has, does.
        image_size: as given.
        epochs: as given.
        on_error: what an unreadable image does.
        budget: seconds.
        constraints: of the pick.
    """

    contenders: tuple[Contender, ...]
    lineup: str
    probes: Mapping[str, Spec]
    seeds: tuple[int, ...]
    primaries: tuple[str, ...]
    image_size: int | None
    epochs: int | None
    on_error: Literal["raise", "skip"]
    budget: float | None
    constraints: Constraints

    @property
    def primary(self) -> str:
        """The score that is meant to decide."""
        return self.primaries[0]
