"""What holds for every test: no network, one thread, no user's settings."""

import os
import socket
from typing import Any

import pytest

os.environ.update(
    {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VERTEBRA_OFFLINE": "1", "COLUMNS": "100", "NO_COLOR": "1"}
)

_connect = socket.socket.connect


def _local_only(self: socket.socket, address: Any) -> None:
    if self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost") or _own(str(address[0])):
        _connect(self, address)
        return
    raise RuntimeError(f"a test reached for the network: {address}")


def _own(host: str) -> bool:
    """Whether an address is this machine's: Ray's parts talk to each other over it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    socket.socket.connect = _local_only  # type: ignore[method-assign]
    yield
    socket.socket.connect = _connect  # type: ignore[method-assign]
