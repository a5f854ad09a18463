"""Checkpoints: folders of safetensors and JSON that are whole or absent.

A checkpoint is written beside, flushed to the disk, read back against its hashes and only then named. `last`
and `best` are links to such folders, exchanged in one operation of the file system: whatever happens, and
whenever, each names a good one.

    checkpoints/step-000000120/{model,ema,optimizer}.safetensors, state.json, ..., MANIFEST.json
    checkpoints/last -> step-000000120
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from vertebra import __version__
from vertebra.contracts import Batch
from vertebra.errors import VertebraError

MANIFEST = "MANIFEST.json"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        tensors: file stem ("model", "ema", "optimizer") -> tensors by name.
        state: where training stands, as JSON.
        documents: file name -> JSON value: what the artefact must not lose (classes, preprocessing, configuration).
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    documents: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, *, best: bool) -> Path:
    """Write a checkpoint into `folder` and make it `last`, and `best` too if asked.

    Returns:
        The folder of the checkpoint.

    Raises:
        VertebraError: it could not be written or does not read back; the previous one is untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        written = _write(folder, checkpoint)
        for name in ("last", "best") if best else ("last",):
            _link(folder / name, written.name)
        _flush(folder)
        clear(folder)
    except OSError as error:
        raise VertebraError(_unwritable(folder, error)) from error
    return written


def _unwritable(folder: Path, error: OSError) -> str:
    with contextlib.suppress(OSError):
        clear(folder)
    kept = f"{folder / 'last'} is as it was" if (folder / "last").exists() else "there was none before"
    remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return f"cannot write a checkpoint into {folder}: {error.strerror or error}; {kept}; {remedy} and resume the run"


def _write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write, flush, verify, rename."""
    step = int(checkpoint.state["step"])
    target = _free_name(folder, f"step-{step:09d}")
    beside = folder / f"{target.name}{UNFINISHED}"
    beside.mkdir()
    files = {name: _write_file(beside / name, content) for name, content in _contents(checkpoint)}
    manifest = {"version": __version__, "step": step, "files": files}
    _write_file(beside / MANIFEST, _json(manifest))
    _flush(beside)
    verify(beside)
    beside.rename(target)
    _flush(folder)
    return target


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """File names and bytes, one file in memory at a time."""
    for stem, tensors in checkpoint.tensors.items():
        yield f"{stem}.safetensors", to_bytes(_independent(tensors))
    yield "state.json", _json(checkpoint.state)
    for name, document in checkpoint.documents.items():
        yield name, _json(document)


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors; those that share memory (tied weights) are copied apart, as safetensors wants."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(folder: Path, name: str) -> Path:
    """`name`, or where a checkpoint of that step exists `name-2`, `name-3` ..."""
    target, count = folder / name, 1
    while target.exists():
        count += 1
        target = folder / f"{name}-{count}"
    return target


def _link(link: Path, name: str) -> None:
    """Point a link at `name`: made beside and renamed over the old one, which no observer can miss."""
    beside = link.with_name(f"{link.name}{UNFINISHED}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(name, target_is_directory=True)
    beside.replace(link)


def clear(folder: Path) -> None:
    """Remove what was not finished and the checkpoints that nothing points at."""
    kept = {(folder / name).resolve() for name in ("last", "best")}
    for path in folder.glob("step-*"):
        if path.resolve() not in kept:
            shutil.rmtree(path)
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()


def verify(path: Path) -> dict[str, Any]:
    """Read a checkpoint's files against the manifest.

    Returns:
        The manifest.

    Raises:
        VertebraError: a file is missing or is not what was written; the message names it.
    """
    manifest = _manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise VertebraError(f"{file} is missing; {_remedy(path)}")
        size, written = file.stat().st_size, entry["bytes"]
        if size != written:
            raise VertebraError(f"{file} is corrupt: it has {size} bytes and {written} were written; {_remedy(path)}")
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:
                raise VertebraError(f"{file} is corrupt: its hash is not the one in {MANIFEST}; {_remedy(path)}")
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise VertebraError(f"{path} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_bytes())
        assert isinstance(manifest["files"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise VertebraError(f"{file} is corrupt ({error}); {_remedy(path)}") from error
    return manifest


def _remedy(path: Path) -> str:
    other = next(
        (p for name in ("best", "last") if (p := path.parent / name).exists() and p.resolve() != path.resolve()), None
    )
    return f"use {other}" if other else "train again or restore it from a copy"


def load(path: Path, *, only: tuple[str, ...] | None = None) -> Checkpoint:
    """Read a checkpoint, after checking all of it.

    Args:
        path: its folder, or a link to it.
        only: stems of the tensor files to read; None reads all.

    Raises:
        VertebraError: it is missing or corrupt; the message names the file.
    """
    manifest = verify(path)
    stems = [name.removesuffix(".safetensors") for name in manifest["files"] if name.endswith(".safetensors")]
    tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems if only is None or stem in only}
    texts = {name: json.loads((path / name).read_bytes()) for name in manifest["files"] if name.endswith(".json")}
    state = texts.pop("state.json")
    return Checkpoint(tensors, state, texts)


def save_batch(folder: Path, batch: Batch, note: Mapping[str, Any]) -> None:
    """Keep a batch for a look: `batch.safetensors` and `batch.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = {"targets": batch.targets} if isinstance(batch.targets, Tensor) else {}
    (folder / "batch.safetensors").write_bytes(
        to_bytes(_independent({"images": batch.images, "ids": batch.ids, **targets}))
    )
    (folder / "batch.json").write_bytes(_json(note))


def flatten(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Nested optimiser state as JSON: tensors move into `tensors` and leave `{"tensor": name}` behind."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):
        # keys may be integers (parameter positions), which JSON would turn into text
        return {"items": [[key, flatten(item, tensors, f"{place}.{key}".lstrip("."))] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [flatten(item, tensors, f"{place}.{i}") for i, item in enumerate(value)]
    return value


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`; tuples come back as lists."""
    if isinstance(value, Mapping):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: unflatten(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    return value
