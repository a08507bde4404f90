"""``lightning-cl runs``: which run needs another one's files, and that those are not deleted."""

from __future__ import annotations

import shutil

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from test_cli import Output
from toys import Classifier, classification, trainer

from lightning_cl import Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.cli.run_list import find_runs

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(root, tasks, ckpt_path=None, storage="disk"):
    L.seed_everything(3, verbose=False)
    data = TaskDataModule({name: classification(i, 16) for i, name in enumerate(tasks)}, batch_size=8)
    methods = [Replay(20, 0.3, storage=storage), TaskMatrix(), ModelCheckpoint(every_n_train_steps=1)]
    fit_tasks(trainer(root, methods, max_epochs=1), Classifier(), data, ckpt_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tasks, one more on them in another folder, and a run by itself."""
    root = tmp_path_factory.mktemp("runs")
    fit(root / "first", "ab")
    fit(root / "second", "abc", root / "first" / "tasks" / "1-b.ckpt")
    fit(root / "alone", "a")
    return root


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """They lie where they were made: a run that was copied elsewhere needs nothing of where it is now."""
    copy = tmp_path / "kept"
    shutil.copytree(made, copy)
    yield made
    shutil.rmtree(made)
    shutil.copytree(copy, made)


def rows(output):
    return {line.split()[0].split("/")[-1]: line.split()[1:] for line in output.out.splitlines() if line.strip()}


def test_the_list_says_how_many_tasks_and_who_needs_whom(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    output = Output("runs", runs.name)
    assert output.code == 0, output.err
    found = rows(output)
    assert found["run"] == ["tasks", "MB", "needs"]
    assert [found[name][0] for name in ("first", "second", "alone")] == ["2", "3", "1"]
    assert found["second"][2:] == [f"{runs.name}/first"]
    assert found["first"][2:] == found["alone"][2:] == ["nothing"]
    size = sum(path.stat().st_size for path in (runs / "first").rglob("*") if path.is_file())
    assert float(found["first"][1]) == pytest.approx(size / 1e6, abs=0.06)


def test_a_run_that_is_needed_is_not_forgotten(runs):
    before = sorted(path for path in runs.rglob("*"))
    output = Output("runs", "--forget", runs / "first")
    assert output.code == 1
    line = output.err.splitlines()[-1]
    assert all(word in line for word in ("--forget=", "second needs", "first/buffers/Replay/0000"))
    assert sorted(path for path in runs.rglob("*")) == before
    # What it needs, it really needs.
    (runs / "first").rename(runs / "gone")
    with pytest.raises(FileNotFoundError, match="0000"):
        fit(runs / "third", "abcd", runs / "second" / "tasks" / "2-c.ckpt")
    (runs / "gone").rename(runs / "first")


def test_a_run_that_nobody_needs_is_forgotten(runs):
    (runs / "second" / "notes.txt").write_text("somebody's own")
    output = Output("runs", "--forget", runs / "second")
    assert output.code == 0, output.err
    assert [path.name for path in (runs / "second").iterdir()] == ["notes.txt"]
    assert "notes.txt" in output.out
    output = Output("runs", runs, "--forget", runs / "first")  # now nobody needs it
    assert output.code == 0, output.err
    assert not (runs / "first").exists()
    assert [run.folder.name for run in find_runs(runs)] == ["alone"]


def test_where_a_checkpoint_cannot_be_read_nothing_is_forgotten(runs):
    (runs / "second" / "tasks" / "2-c.ckpt").write_bytes(b"damaged")
    output = Output("runs", "--forget", runs / "alone")
    assert output.code == 1
    assert "2-c.ckpt cannot be read" in output.err
    assert "2-c.ckpt cannot be read" in Output("runs", runs).out
    assert (runs / "alone" / "tasks").is_dir()


def test_a_buffer_in_memory_needs_nothing_of_the_run_before(tmp_path):
    fit(tmp_path / "first", "a", storage="memory")
    fit(tmp_path / "second", "ab", tmp_path / "first" / "tasks" / "0-a.ckpt", storage="memory")
    assert [run.needs for run in find_runs(tmp_path)] == [set(), set()]


@pytest.mark.parametrize("arguments", [["runs", "{empty}"], ["runs", "--forget", "{empty}"]])
def test_where_there_is_no_run_that_is_said(tmp_path, arguments):
    (tmp_path / "empty").mkdir()
    output = Output(*(argument.format(empty=tmp_path / "empty") for argument in arguments))
    assert output.code == 1
    assert "no run" in output.err
