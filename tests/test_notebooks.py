"""The notebooks run from top to bottom, and what they tell about their results is what comes out."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

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
# stored outputs, and for what the first notebook, whose model is only narrower, gives anew.
STEPS = re.compile(r"((?:max_steps\"?|\bsteps|\bSTEPS|\bsamples)\s*[=:]\s*)(\d{2,})")
NARROWER = {
    '"hidden_size": 96': '"hidden_size": 48',
    '"intermediate_size": 384': '"intermediate_size": 192',
    '"max_steps": 250': '"max_steps": 150',
    "max_steps=100": "max_steps=60",
    "limit_val_batches=16": "limit_val_batches=8",
}
EVALUATED = re.compile(r"(limit_val_batches\s*=\s*)\d+")

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
    """Runs a notebook, once in a session, in a copy outside the repository."""

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
            narrowed = set()
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs = []  # what is found below must be new
                    for wide, narrow in NARROWER.items() if path == FORGETTING else ():
                        narrowed |= {wide} if wide in cell.source else set()
                        cell.source = cell.source.replace(wide, narrow)
                    if path != FORGETTING:
                        cell.source = STEPS.sub(lambda found: f"{found[1]}{max(int(found[2]) // 8, 4)}", cell.source)
                        cell.source = EVALUATED.sub(r"\g<1>2", cell.source)
            assert path != FORGETTING or narrowed == set(NARROWER)
            resources = {"metadata": {"path": str(tmp_path)}}
            client = nbclient.NotebookClient(
                notebook, timeout=900, kernel_name="python3", allow_errors=True, resources=resources
            )
            _executed[path] = client.execute()
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


def scores_of_methods(notebook):
    """The table at the end: method to final mean, forgetting, loss on new tasks."""
    row = r"^(.+?) +(-?\d+\.\d\d) +(-?\d+\.\d\d) +(-?\d+\.\d\d)$"
    return {name: tuple(map(float, values)) for name, *values in re.findall(row, printed(notebook), re.MULTILINE)}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, execute):
    notebook = execute(path)
    assert errors(notebook) == []
    assert images(notebook)
    assert printed(notebook)


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
    notebook = execute(FORGETTING) if source == "executed" else nbformat.read(FORGETTING, as_version=4)
    scores = scores_of_methods(notebook)
    assert list(scores) == ["naive", "EWC", "SI", "Replay", "EWC + Replay", "frozen"]
    mean, forgetting, new_tasks = scores.pop("naive")
    frozen = scores.pop("frozen")
    # Forgotten by naive training; left of it at most; gained at least. A narrower model shows less of all.
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
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    comparison = text[text.index("**Every method helps.**") : text.index("**What this picture does not show.**")]
    quoted = set(re.findall(r"\d\.\d\d\b", comparison))
    assert quoted
    assert quoted <= set(re.findall(r"\d\.\d\d\b", printed(notebook)))
