"""Run directories: made exclusively, locked while they are written, complete enough to start the run again."""

import fcntl
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vertebra.errors import UsageError, VertebraError

LIBRARIES = ("vertebra", "torch", "torchvision", "timm", "lightning-fabric", "numpy", "safetensors")


def create(out: Path, verb: str, name: str | None, default: str, *, overwrite: bool = False) -> Path:
    """Make `out/verb/name`, which nobody else has.

    Args:
        out: folder of all runs.
        verb: "train", ...
        name: as the user gave it; None takes `default`, with -2, -3 ... where that exists.
        default: made safe for a file system.
        overwrite: empties an existing `name`.

    Raises:
        UsageError: `name` exists and is not to be overwritten, or is no name of a folder.
        VertebraError: the folder cannot be made, or another process works in it.
    """
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise UsageError(f"--name is {name!r}; it must be the name of a folder, as baseline-1")
    stem = name or re.sub(r"[^\w.-]+", "-", default).strip("-.") or "run"
    parent = out / verb
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name is None:
            return _first_free(parent, stem)
        if (parent / stem).exists():
            _empty(parent / stem, overwrite)
        (parent / stem).mkdir(exist_ok=overwrite)
    except FileExistsError as error:
        raise UsageError(f"{parent / stem} exists; choose another --name or say --overwrite") from error
    except OSError as error:
        raise VertebraError(
            f"cannot make a run directory in {parent}: {error.strerror}; choose another --out"
        ) from error
    return parent / stem


def _first_free(parent: Path, stem: str) -> Path:
    """Mkdir decides, so that two runs that start together get two folders."""
    count = 1
    while True:
        path = parent / (stem if count == 1 else f"{stem}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            count += 1
        else:
            return path


def _empty(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{path} exists; choose another --name, say --overwrite, or `vertebra resume {path}`")
    if any(path.iterdir()) and not (path / "run.json").is_file():
        raise UsageError(f"{path} is no run directory (it has no run.json), so --overwrite leaves it alone")
    with locked(path):
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory; the system lets go of it however the process ends.

    Raises:
        VertebraError: another process holds it; the message names its pid.
    """
    with (path / "LOCK").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise VertebraError(
                f"{path} is in use by process {pid}; wait for it, or stop it with kill {pid}"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    beside = path.with_name(f"{path.name}.unfinished")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def surroundings() -> dict[str, Any]:
    """What a run depends on beside its configuration: versions, the machine, the commit. Nothing of the environment."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the working directory, where that is a git checkout, with "+" where tracked files have changed."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+"], capture_output=True, text=True)
    return found.stdout.strip() or None if found.returncode == 0 else None


def read_run(path: Path) -> dict[str, Any]:
    """What `run.json` in a run directory says.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    file = path / "run.json"
    if not file.is_file():
        raise UsageError(f"{path} is no run directory: it has no run.json; runs are made by `vertebra train`")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise VertebraError(f"{file} is corrupt: {error}") from error


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write what vertebra logs into `log.txt` of the run directory too."""
    handler = logging.FileHandler(path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("vertebra")
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
