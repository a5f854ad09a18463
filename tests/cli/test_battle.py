import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vertebra.cli.main import main

TINY = "tiny_nets:narrow?training=pretrained,tiny_nets:wide?training=pretrained"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "battle")


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(["battle", *words])
    out, err = capsys.readouterr()
    return int(leave.value.code or 0), out, err


def test_a_battle_ends_with_the_path_of_its_report(capsys: Any, tmp_path: Path) -> None:
    words = ("digits", "-m", TINY, "--probes", "knn,linear", "--jobs", "1", "--name", "first")
    code, out, err = run(capsys, *words)
    assert code == 0
    last = out.splitlines()[-1]
    assert last == "runs/battle/first/report.html" and Path(last).is_file()
    assert "pick: tiny_nets:" in out and "linear top-1" in out and "best" in out
    assert "2 contenders x 2 probes on digits: 4 cells" in err
    code, out, err = run(capsys, *words)
    assert code == 2 and "runs/battle/first exists" in err
    code, out, _ = run(capsys, "--resume", "runs/battle/first", "-q")
    assert code == 0 and out.splitlines()[-1] == last


def test_json_is_one_object_and_nothing_else(capsys: Any) -> None:
    code, out, err = run(capsys, "digits", "-m", TINY, "--probes", "knn", "--jobs", "1", "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    assert found["pick"]["score"] == "knn_top1" and found["settings"]["primary"] == "knn_top1"
    assert found["report"] == "runs/battle/digits/report.html" and len(found["table"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "give DATA"),
        (("digits", "-m", "timm/convnext_tinny"), 2, "did you mean convnext_tiny"),
        (("digits", "--probes", "linaer"), 2, "did you mean linear"),
        (("digits", "--seeds", "many"), 2, "--seeds is 'many'"),
        (("digits", "-m", ","), 2, "--models is empty"),
        (("digits", "--weights", "w.safetensors"), 2, "write CONTENDER=WEIGHTS"),
        (("digits", "--max-latencyy", "3"), 2, "--max-latency"),
        (("nowhere", "-m", TINY), 3, "nowhere"),
        (("--resume", "nowhere"), 2, "nowhere"),
    ],
)
def test_mistakes(capsys: Any, words: tuple[str, ...], code: int, says: str) -> None:
    found, out, err = run(capsys, *words)
    assert found == code and says in err and out == ""
    assert not Path("runs").exists()


def test_help_needs_no_torch() -> None:
    import subprocess

    code = "import sys; from vertebra.cli.main import main\ntry: main(['battle', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "--max-latency" in found.stdout and "?weights=FILE" in found.stdout
