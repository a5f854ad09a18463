"""Every layout and edge case of `layouts.py` is recognised by itself, or refused in words that name the fault."""

import pytest
from layouts import CASES, Case

from vertebra.data import read
from vertebra.errors import VertebraError


def test_the_corpus_is_as_large_as_it_claims():
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layout(case: Case, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    path = case.fill(root) or root
    if case.error:
        with pytest.raises(VertebraError, match=case.error):
            look_at(read(path, **case.options or {}))
        return
    dataset = read(path, **case.options or {})
    assert dataset.layout == case.layout
    assert {name: len(split) for name, split in dataset.splits.items()} == case.images
    if case.classes is not None:
        assert dataset.classes == tuple(case.classes)
    if case.note:
        assert any(case.note in note for note in dataset.notes), dataset.notes
    look_at(dataset)


def look_at(dataset):
    """Decode every image, and make every target."""
    for split in dataset.splits.values():
        for index in range(len(split)):
            assert split.image(index).size[0] > 0
            if split.annotations is not None:
                assert tuple(split.target(index)) == split.annotations.names
