"""Two ranks under torchrun on the CPU train as one does at the same batch."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import PLAN, Memory, supervised

from vertebra.training.loop import fit

RANK = """
import dataclasses, json, os, sys
from pathlib import Path
from tiny import PLAN, Memory, supervised
from vertebra.training.loop import fit

rank = int(os.environ["RANK"])
method = supervised(norm=False)
plan = dataclasses.replace(PLAN, epochs=2, micro_batch=4)
history = fit(method, Memory(rank=rank, world=2), plan, run_dir=Path(sys.argv[1]))
Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(history.losses))
"""


def test_two_ranks_have_one_ranks_losses(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = [*launch, "--master-port", str(port), str(script), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())
    assert found.returncode == 0, found.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    one = fit(supervised(norm=False), Memory(), dataclasses.replace(PLAN, epochs=2)).losses
    assert len(one) == 6 and ranks[0] == ranks[1] == pytest.approx(one, abs=1e-5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]  # the first rank alone writes
    assert (tmp_path / "checkpoints" / "last" / "model.safetensors").exists()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "GLOO_SOCKET_IFNAME": "lo"}
