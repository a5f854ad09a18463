"""Data: readers, views, order, and what is built in."""

from vertebra.data.dataset import Dataset, Split
from vertebra.data.digits import digits
from vertebra.data.reading import read

__all__ = ["Dataset", "Split", "digits", "read"]
