import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vertebra.errors import VertebraError
from vertebra.training.checkpoint import Checkpoint, flatten, load, save, unflatten

KILLER = """
import os, random, signal, sys, time, torch
from itertools import count
from pathlib import Path
from vertebra.training.checkpoint import Checkpoint, load, save

folder, moments, seen = Path(sys.argv[1]), random.Random(0), 0
for attempt in range(20):
    writer = os.fork()  # killed at a random moment of writing one checkpoint after the other
    if writer == 0:
        for step in count(seen):
            tensors = {stem: {"w": torch.full((9_000,), float(step))} for stem in ("model", "optimizer")}
            save(folder, Checkpoint(tensors, {"step": step}), best=step % 3 == 0)
    while not (folder / "last").exists():
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.08))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    last, best = load(folder / "last"), load(folder / "best")
    step = last.state["step"]
    assert step >= seen - 1 and best.state["step"] % 3 == 0
    assert all((t == step).all() for group in last.tensors.values() for t in group.values())
    seen = step + 1
print(seen)
"""


def _checkpoint(step: int) -> Checkpoint:
    shared = torch.arange(4.0) + step
    tensors = {
        "model": {"a": shared, "tied": shared, "half": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(step)}
    }
    return Checkpoint(tensors, {"step": step}, {"labels.json": ["cat", "dog"]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, _checkpoint(3), best=True)
    found = load(tmp_path / "best")
    assert found.state == {"step": 3} and found.documents == {"labels.json": ["cat", "dog"]}
    assert {name: (t.tolist(), t.dtype) for name, t in found.tensors["model"].items()} == {
        name: (t.tolist(), t.dtype) for name, t in _checkpoint(3).tensors["model"].items()
    }


def test_last_and_best_are_kept_and_nothing_else(tmp_path: Path) -> None:
    for step, best in ((1, True), (2, False), (3, True), (4, False), (4, False)):
        save(tmp_path, _checkpoint(step), best=best)
    assert load(tmp_path / "best").state["step"] == 3 and load(tmp_path / "last").state["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-000000003", "step-000000004-2"]


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove", "manifest"])
def test_a_corrupt_file_is_named(tmp_path: Path, spoil: str) -> None:
    path = save(tmp_path, _checkpoint(1), best=False)
    file = path / ("MANIFEST.json" if spoil == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    {
        "flip": lambda: file.write_bytes(content),
        "cut": lambda: file.write_bytes(content[:-5]),
        "remove": file.unlink,
        "manifest": lambda: file.write_text('{"files": 3}'),
    }[spoil]()
    with pytest.raises(VertebraError, match=file.name):
        load(tmp_path / "last")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, _checkpoint(1), best=True)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(VertebraError, match=f"{tmp_path}: No space left on device; .*last is as it was; make room"):
            save(tmp_path, _checkpoint(2), best=True)
    assert load(tmp_path / "last").state["step"] == load(tmp_path / "best").state["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step-000000001"]
    save(tmp_path, _checkpoint(2), best=True)
    assert load(tmp_path / "last").state["step"] == 2


def test_a_kill_at_any_moment_leaves_a_good_last(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(tmp_path / "checkpoints")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 3


def test_optimiser_state_survives_json() -> None:
    state = {0: {"step": torch.tensor(3.0), "moments": [torch.ones(2), None], "beta": (0.9, 0.99)}, 1: {}}
    tensors: dict[str, torch.Tensor] = {}
    flat = flatten(state, tensors)
    back = unflatten(flat, tensors)
    assert list(back) == [0, 1] and back[0]["step"] == 3 and back[0]["beta"] == [0.9, 0.99]
    assert torch.equal(back[0]["moments"][0], torch.ones(2)) and back[0]["moments"][1] is None
