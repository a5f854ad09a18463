import io

from vertebra.contracts import Progress
from vertebra.training import console

ROW = {"epoch": 2, "step": 38, "loss": 0.73568, "lr": 0.0026, "seconds": 1.0, "top1": 44.7236, "nll": 1.59}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _watched(stream: io.StringIO, quiet: bool = False) -> str:
    with console.meter(stream, quiet=quiet) as meter:
        meter.step(Progress(3, 10, 1, 4), 0.5, 1e-3)
        meter.epoch(ROW)
    return stream.getvalue()


def test_a_pipe_gets_one_plain_line_an_epoch() -> None:
    assert _watched(io.StringIO()) == "epoch 2  loss 0.7357  lr 2.60e-03  1.0 s  top1 44.72  nll 1.59\n"


def test_a_long_epoch_says_something_every_half_minute(monkeypatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.meter(stream) as meter:
        for second in range(0, 100, 10):
            now[0] = second
            meter.step(Progress(second, 100, 0, 2), 0.5, 1e-3)
    assert stream.getvalue().splitlines() == [f"step {step}/100  epoch 1/2  loss 0.5000" for step in (30, 60, 90)]


def test_a_terminal_gets_a_bar_and_rows_without_colour() -> None:
    text = _watched(Terminal())
    assert "3/10" in text and "top1 44.72" in text and "\x1b[3" not in text  # NO_COLOR is set for the tests


def test_quiet_is_silent() -> None:
    assert _watched(io.StringIO(), quiet=True) == "" == _watched(Terminal(), quiet=True)
