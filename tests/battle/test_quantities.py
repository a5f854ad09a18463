import pytest

from vertebra.battle.quantities import MEGABYTES, MILLIONS, MILLISECONDS, SECONDS, amount, duration
from vertebra.errors import UsageError


@pytest.mark.parametrize(
    ("text", "units", "bare", "expected"),
    [
        ("10m", SECONDS, "s", 600),
        ("1.5h", SECONDS, "s", 5400),
        (90, SECONDS, "s", 90),
        ("20ms", MILLISECONDS, "ms", 20),
        ("20 MS", MILLISECONDS, "ms", 20),
        ("30M", MILLIONS, "M", 30),
        ("800k", MILLIONS, "M", 0.8),
        ("2GB", MEGABYTES, "MB", 2000),
        ("512MiB", MEGABYTES, "MB", 536.870912),
    ],
)
def test_amounts(text: str | int, units: dict[str, float], bare: str, expected: float) -> None:
    assert amount(text, units, bare, "--x", "1") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "ten", "-3s", "0", "5 parsecs", "nan"])
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--budget is .*; write a number above 0 with one of ms, s, m.* as 10m"):
        amount(text, SECONDS, "s", "--budget", "10m")


def test_duration_reads_well() -> None:
    assert [duration(s) for s in (4.4, 1380, 4320)] == ["4 s", "23 min", "1 h 12 min"]
