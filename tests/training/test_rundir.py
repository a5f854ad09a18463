import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vertebra.errors import UsageError, VertebraError
from vertebra.training import rundir


def test_unnamed_runs_count_up(tmp_path: Path) -> None:
    made = [rundir.create(tmp_path, "train", None, "timm/resnet18.a1") for _ in range(3)]
    assert [path.name for path in made] == ["timm-resnet18.a1", "timm-resnet18.a1-2", "timm-resnet18.a1-3"]


def test_a_named_run_is_never_taken_twice_unless_asked(tmp_path: Path) -> None:
    path = rundir.create(tmp_path, "train", "mine", "x")
    rundir.write_json(path / "run.json", {"a": 1})
    (path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match=r"mine exists.*--overwrite.*vertebra resume"):
        rundir.create(tmp_path, "train", "mine", "x")
    assert rundir.create(tmp_path, "train", "mine", "x", overwrite=True) == path
    assert [p.name for p in path.iterdir()] in ([], ["LOCK"])


def test_overwrite_leaves_folders_alone_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "train" / "photos").mkdir(parents=True)
    (tmp_path / "train" / "photos" / "a.jpg").touch()
    with pytest.raises(UsageError, match=r"no run directory.*leaves it alone"):
        rundir.create(tmp_path, "train", "photos", "x", overwrite=True)
    assert (tmp_path / "train" / "photos" / "a.jpg").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="must be the name of a folder"):
        rundir.create(tmp_path, "train", name, "x")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VertebraError, match=r"cannot make a run directory in .*file/train: Not a directory"):
        rundir.create(tmp_path / "file", "train", None, "x")


def test_a_run_in_use_names_the_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vertebra.training.rundir import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(VertebraError, match=f"in use by process {holder.pid}"), rundir.locked(tmp_path):
            raise AssertionError
        holder.kill()
    with rundir.locked(tmp_path):  # the system let go of it
        assert (tmp_path / "LOCK").read_text() == str(os.getpid())


def test_no_secret_of_the_environment_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    assert "hf_secret123" not in json.dumps(rundir.surroundings())


def test_log_file_takes_what_vertebra_logs_and_then_lets_go(tmp_path: Path) -> None:
    logger = logging.getLogger("vertebra.training")
    with rundir.logged(tmp_path):
        logger.info("inside")
    logger.info("outside")
    text = (tmp_path / "log.txt").read_text()
    assert "INFO vertebra.training: inside" in text and "outside" not in text
    assert not logging.getLogger("vertebra").handlers


def test_a_folder_without_run_json_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run\.json"):
        rundir.read_run(tmp_path)
