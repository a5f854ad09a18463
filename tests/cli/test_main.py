import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from vertebra.cli.main import main, vertebra


def _run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(vertebra, words)
    return result.exit_code, result.output


@pytest.mark.parametrize("words", [["--help"], ["papers", "list"], ["models", "list"], ["models", "list", "timm/*"]])
def test_lists_and_help_do_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom vertebra.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit as leave: assert not leave.code, leave.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'plotly'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_of_the_package_does_not_import_torch() -> None:
    code = "import sys, vertebra\nassert not {'torch', 'numpy'} & set(sys.modules)\nassert 'battle' in dir(vertebra)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_verb_explains_itself() -> None:
    code, text = _run("--help")
    assert code == 0
    for verb in ("battle", "check", "doctor", "models", "papers", "predict", "resume", "train", "val"):
        assert verb in text
        assert _run(verb, "--help")[0] == 0


def test_misspelt_verb_and_option_name_the_nearest() -> None:
    code, text = _run("battel")
    assert code == 2 and "did you mean battle" in text
    code, text = _run("models", "list", "--jsn")
    assert code == 2 and "--json" in text


def test_papers_and_models_speak_json() -> None:
    papers = json.loads(_run("papers", "list", "--json")[1])["papers"]
    assert {"swin", "convnext", "bob"} <= {paper["id"] for paper in papers}
    models = json.loads(_run("models", "list", "swin*", "--json")[1])["models"]
    assert models and all(model.startswith("swin") for model in models)


def test_paper_shows_its_card() -> None:
    code, text = _run("papers", "show", "swin")
    assert code == 0 and "Shifted Windows" in text and "swin/tiny" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["papers", "show", "swim"], "did you mean swin"),
        (["models", "show", "swin/tinny"], "did you mean tiny"),
        (["models", "list", "zzzz"], "no backbone matches"),
    ],
)
def test_users_mistake_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        main(words)
    error = capsys.readouterr().err
    assert leave.value.code == 2 and says in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_error_as_json_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["papers", "show", "swim", "--json"])
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
