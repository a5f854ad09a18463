"""Probes: model to evidence."""

from vertebra.errors import VertebraError


class NotApplicable(VertebraError):
    """A probe that has nothing to say of these data; the message says why. A battle leaves its cell empty."""
