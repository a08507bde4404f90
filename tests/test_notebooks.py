"""The notebooks run from top to bottom, and what they tell about their results is what comes out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
local_provisioner = pytest.importorskip("jupyter_client.provisioning.local_provisioner")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FORGETTING = ROOT / "notebooks" / "01_catastrophic_forgetting.ipynb"
_executed = {}
# Numbers of training steps and of samples, of which every cell runs a few: what is told of results is held for the
# stored outputs, and for what the first notebook, whose model is only smaller, gives anew.
STEPS = re.compile(r"((?:max_steps\"?|\bsteps|\bSTEPS|\bsamples)\s*[=:]\s*)(\d{2,})")
SMALLER = {
    '"hidden_size": 96': '"hidden_size": 48',
    '"intermediate_size": 384': '"intermediate_size": 96',
    '"num_hidden_layers": 2': '"num_hidden_layers": 1',
    '"max_steps": 250': '"max_steps": 100',
    "max_steps=100": "max_steps=50",
    "lr=3e-3": "lr=1e-2",
    "max_length=64": "max_length=48",
    "limit_val_batches=16": "limit_val_batches=4",
}
# What the cells of other notebooks repeat over many values, over a few of them.
FEWER = {
    "03_regularisation": {
        "[0.0, 1e-3, 1e-2, 1e-1, 1.0]": "[0.0, 1e-2, 1.0]",
        "[1.0, 10.0, 100.0]": "[100.0]",
        "(0.1, 0.3, 1.0)": "(0.3,)",
        "(3e-3, 1e-2)": "(1e-2,)",
        '"num_hidden_layers": 4': '"num_hidden_layers": 2',
    },
    "04_replay": {"10_000": "1_000", "(0.0, 0.01, 0.05, 0.25, 0.5)": "(0.0, 0.25)"},
    "05_architecture": {
        '    "Replay(0.25) + Interpolate(0.5)": [Replay(400, 0.25), Interpolate(0.5)],\n': "",
        "count=160": "count=64",
    },
    "08_from_run_to_llama_cpp": {'"--epochs", 8': '"--epochs", 1', "for share in (0.0, 0.5)": "for share in (0.5,)"},
    "06_measuring": {"(0, 1, 2)": "(0, 1)", "(0.05, 0.6, 0.9)": "(0.05,)"},
}
EVALUATED = re.compile(r"(limit_val_batches\s*=\s*)\d+")
# The cells of the first notebook that define a run: before its solutions they come again, with fewer steps.
DEFINITIONS = ("cell-05", "cell-07")
FOLDED = re.compile(r"<details><summary>Solution</summary>\n\n(.*?)</details>", re.DOTALL)
CODE = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)

# The kernel names its backend in the environment, which matplotlib has read before.
PICTURES_IN_CELLS = 'get_ipython().run_line_magic("matplotlib", "inline")\n'


class Kernel(forked.Started):
    stdin = stdout = stderr = None  # there is no pipe to close


def launch(cmd, **settings):
    """A kernel as a process that has already imported what the notebooks import."""
    assert cmd[0] == sys.executable, cmd
    return Kernel(cmd[1:], settings["env"], settings["cwd"], own_session=True)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook, once in a session, in a copy outside the repository; and then, in its kernel, its solutions."""

    def execute(path):
        if path not in _executed:
            search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search))
            monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
            monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            monkeypatch.setattr(local_provisioner, "launch_kernel", launch)
            start = tmp_path / "ipython" / "profile_default" / "startup" / "pictures.py"
            start.parent.mkdir(parents=True)
            start.write_text(PICTURES_IN_CELLS)
            notebook = nbformat.read(shutil.copy(path, tmp_path), as_version=4)
            for data in (ROOT / "notebooks").glob("*.gz"):
                shutil.copy(data, tmp_path)
            told = len(notebook.cells)
            again = [cell.source for cell in notebook.cells if path == FORGETTING and cell.id in DEFINITIONS]
            notebook.cells += map(nbformat.v4.new_code_cell, [*again, *solutions(notebook)])
            replaced = SMALLER if path == FORGETTING else FEWER.get(path.stem, {})
            found = set()
            for number, cell in enumerate(notebook.cells):
                if cell.cell_type == "code":
                    cell.outputs = []  # what is found below must be new
                    for much, little in replaced.items():
                        found |= {much} if much in cell.source else set()
                        cell.source = cell.source.replace(much, little)
                    if path != FORGETTING or number >= told:
                        cell.source = STEPS.sub(lambda found: f"{found[1]}{max(int(found[2]) // 8, 4)}", cell.source)
                        cell.source = EVALUATED.sub(r"\g<1>2", cell.source)
            assert found == set(replaced)
            resources = {"metadata": {"path": str(tmp_path)}}
            client = nbclient.NotebookClient(
                notebook, timeout=900, kernel_name="python3", allow_errors=True, resources=resources
            )
            client.execute()
            notebook.cells, solved = notebook.cells[:told], notebook.cells[told:]
            _executed[path] = notebook, solved
        return _executed[path]

    return execute


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def errors(notebook):
    return ["\n".join(output.traceback) for output in outputs(notebook) if output.output_type == "error"]


def images(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def printed(notebook, stream="stdout"):
    return "".join(output.text for output in outputs(notebook) if output.get("name") == stream)


def markdown(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def solutions(notebook):
    """The code of each folded solution."""
    folded = [CODE.findall(text) for text in FOLDED.findall(markdown(notebook))]
    return ["\n".join(textwrap.dedent(code) for _, code in blocks) for blocks in folded]


def scores_of_methods(notebook):
    """The table at the end: method to final mean, forgetting, loss on new tasks."""
    row = r"^(.+?) +(-?\d+\.\d\d) +(-?\d+\.\d\d) +(-?\d+\.\d\d)$"
    return {name: tuple(map(float, values)) for name, *values in re.findall(row, printed(notebook), re.MULTILINE)}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, execute):
    notebook, solved = execute(path)
    assert errors(notebook) == []
    assert images(notebook)
    assert printed(notebook)
    for cell in solved:
        assert errors(SimpleNamespace(cells=[cell])) == [], cell.source
    assert all(printed(SimpleNamespace(cells=[cell])) for cell in solved[-len(solutions(notebook)) :])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_says_what_to_expect_and_has_exercises(path, tmp_path):
    """A time and a number at the top, questions before the cells that answer them, exercises with folded solutions."""
    notebook = nbformat.read(path, as_version=4)
    top, text = notebook.cells[0].source, markdown(notebook)
    assert re.search(
        r"^\*\*Time\*\*: about \d+ minutes? on one CPU core\. \*\*Number to expect\*\*: ", top, re.MULTILINE
    )
    expected = re.split(r"\n\n", top.split("**Number to expect**: ")[1])[0]
    numbers = re.findall(r"\d+\.\d+|\d+(?= ?%)", re.sub(r"`[^`]*`", "", expected))
    assert numbers
    found = [float(number) for number in re.findall(r"\d+\.\d+|\d+(?= ?%)", printed(notebook))]
    for number in numbers:
        decimals = len(number.partition(".")[2])
        assert any(f"{value:.{decimals}f}" == number for value in found), f"{number} was not printed"

    question = "**Before you run it: what do you expect?** "
    asked = [i for i, cell in enumerate(notebook.cells) if question in cell.source]
    assert len(asked) >= 2
    assert all(notebook.cells[i + 1].cell_type == "code" for i in asked)

    exercises = re.search(r"^## (?:\d+ )?Exercises\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert exercises
    solved = [code for code in solutions(notebook) if code]
    assert 2 <= len(solved) == exercises[1].count("<details>") == exercises[1].count("</details>")
    assert not re.search(r"@\d@", text)
    for number, code in enumerate(solved):
        compile(code, f"solution {number + 1} of {path.name}", "exec")
        (tmp_path / f"solution_{number + 1}.py").write_text(code)
    options = ["--check", "--diff", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    ruff = subprocess.run([sys.executable, "-m", "ruff", "format", *options], capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_with_clean_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert errors(notebook) == []
    assert images(notebook)
    assert printed(notebook, "stderr") == ""
    assert re.findall(r"/(?:tmp|home|root|Users|work)/", printed(notebook)) == []
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("source", ["stored", "executed"])
def test_forgetting_and_what_helps(source, execute):
    notebook = execute(FORGETTING)[0] if source == "executed" else nbformat.read(FORGETTING, as_version=4)
    scores = scores_of_methods(notebook)
    assert list(scores) == ["naive", "EWC", "SI", "Replay", "EWC + Replay", "frozen"]
    mean, forgetting, new_tasks = scores.pop("naive")
    frozen = scores.pop("frozen")
    # Forgotten by naive training; left of it at most; gained at least. A smaller model shows less of all.
    much, left, gained = (0.5, 0.5, 0.1) if source == "stored" else (0.3, 0.75, 0.05)
    assert forgetting > much
    for method in scores.values():
        assert method[0] < mean - gained
        assert method[1] < forgetting * left
    # The table's own lesson: who learns nothing forgets nothing, and is worst.
    assert frozen[0] > mean
    assert frozen[1] == 0
    assert frozen[2] > new_tasks
    assert len(images(notebook)) == 6


def test_the_text_quotes_the_stored_numbers():
    """Every number with two decimals in the text was printed or drawn from what was printed."""
    notebook = nbformat.read(FORGETTING, as_version=4)
    text = markdown(notebook)
    comparison = text[text.index("**Every method helps.**") : text.index("**What this picture does not show.**")]
    quoted = set(re.findall(r"\d\.\d\d\b", comparison))
    assert quoted
    assert quoted <= set(re.findall(r"\d\.\d\d\b", printed(notebook)))
