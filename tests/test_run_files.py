"""What a run leaves on the disk: as many checkpoints as were asked for, in a folder that no other run writes to."""

from __future__ import annotations

import re

import forked
import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_cli import Output
from test_cli_runs import configuration, run, texts  # noqa: F401
from toys import Classifier, classification, trainer

from lightning_cl import TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.sequence.run_files import boundaries_to_keep, only_run_in

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(root, *callbacks, tasks="abc", ckpt_path=None, logger=False, **options):
    L.seed_everything(3, verbose=False)
    module = Classifier()
    data = TaskDataModule({name: classification(i, 16) for i, name in enumerate(tasks)}, batch_size=8)
    checkpoint = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit_tasks(trainer(root, [checkpoint, *callbacks], max_epochs=1, logger=logger), module, data, ckpt_path, **options)
    return module


def names(root):
    boundaries = sorted(path.stem for path in (root / "tasks").glob("*"))
    inside = sorted(path.name for path in (root / "checkpoints").glob("*") if list(path.glob("*.ckpt")))
    return boundaries, inside


# ---------------------------------------------------------------------- how many checkpoints


class Most(Callback):
    """The most boundary checkpoints that there were while a task was trained."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, *_):
        self.count = max(self.count, len(list(self.folder.glob("*.ckpt"))))


@pytest.mark.parametrize(
    ("keep", "left", "inside", "most"),
    [
        ("all", ["0-a", "1-b", "2-c"], ["0-a", "1-b", "2-c"], 2),
        ("last", ["2-c"], ["2-c"], 1),
        (1, ["2-c"], ["2-c"], 1),
        ("none", [], ["2-c"], 1),
        (0, [], ["2-c"], 1),
        (2, ["1-b", "2-c"], ["1-b", "2-c"], 2),
        ("2", ["1-b", "2-c"], ["1-b", "2-c"], 2),
        (9, ["0-a", "1-b", "2-c"], ["0-a", "1-b", "2-c"], 2),
    ],
)
def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path, keep, left, inside, most):
    watch = Most(tmp_path / "tasks")
    fit(tmp_path, watch, keep_checkpoints=keep)
    assert names(tmp_path) == (left, inside)
    assert watch.count == most


def test_a_run_that_keeps_the_last_alone_can_be_continued(tmp_path):
    whole = fit(tmp_path / "whole", tasks="abcd")
    fit(tmp_path / "kept", keep_checkpoints="last")
    (tmp_path / "kept" / "tasks" / "notes.txt").write_text("somebody's own")
    resumed = fit(tmp_path / "kept", tasks="abcd", ckpt_path=tmp_path / "kept/tasks/2-c.ckpt", keep_checkpoints="last")
    assert names(tmp_path / "kept")[0] == ["3-d", "notes"]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("keep", ["lats", -1, 1.5, True, None, "-2"])
def test_what_is_no_number_of_checkpoints_is_an_error_before_training(tmp_path, keep):
    with pytest.raises(ValueError, match=rf"keep_checkpoints={re.escape(repr(keep))}.*'all', 'last', 'none'"):
        fit(tmp_path, keep_checkpoints=keep)
    assert not list(tmp_path.iterdir())
    assert boundaries_to_keep("all") is None


# ---------------------------------------------------------------------- one run in a folder


class SecondRun(Callback):
    """Starts another run in the same folder while the first is training."""

    def __init__(self, folder):
        self.folder, self.message = folder, ""

    def on_train_start(self, *_):
        try:
            fit(self.folder, tasks="x")
        except RuntimeError as error:
            self.message = str(error)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_writes(tmp_path):
    second = SecondRun(tmp_path)
    fit(tmp_path, second, tasks="ab")
    assert f"default_root_dir={str(tmp_path)!r}: another run" in second.message
    assert "logger" in second.message
    assert names(tmp_path)[0] == ["0-a", "1-b"]
    assert not list(tmp_path.glob(".*"))  # the lock is gone with the run


def test_runs_with_a_logger_have_folders_of_their_own(tmp_path):
    with only_run_in(tmp_path):
        fit(tmp_path, tasks="a", logger=CSVLogger(tmp_path))
    assert (tmp_path / "lightning_logs/version_0/tasks/0-a.ckpt").is_file()


HOLD = """
import sys, time
from pathlib import Path
from lightning_cl.sequence.run_files import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_holds_no_folder(tmp_path):
    with forked.start("-c", HOLD, tmp_path) as process:
        process.wait_for_output("held\n")
        with pytest.raises(RuntimeError, match="another run"), only_run_in(tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / ".run.lock").exists()
    with only_run_in(tmp_path):
        pass
    assert not (tmp_path / ".run.lock").exists()


def test_a_later_run_in_the_same_folder_sets_the_earlier_ones_files_aside_and_says_so(tmp_path):
    fit(tmp_path, TaskMatrix(), tasks="ab")
    report = (tmp_path / "report.json").read_bytes()
    with pytest.warns(UserWarning, match=r"an earlier run has written here.*tasks-v1"):
        fit(tmp_path, TaskMatrix(), tasks="x")
    assert sorted(path.stem for path in (tmp_path / "tasks-v1").glob("*.ckpt")) == ["0-a", "1-b"]
    assert (tmp_path / "tasks-v1" / "report.json").read_bytes() == report
    assert names(tmp_path)[0] == ["0-x"]


# ---------------------------------------------------------------------- the command line


def start(tmp_path, texts, **changes):  # noqa: F811
    config = configuration(tmp_path, texts)
    config["data"] |= changes
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path / "start.yaml"


def test_a_failed_start_leaves_no_folder(tmp_path, texts):  # noqa: F811
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    output = Output("fit", "--config", start(tmp_path, texts, tasks={"a": str(tmp_path / "broken.jsonl")}))
    assert output.code == 1
    assert "broken.jsonl" in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "start.yaml"]


def test_a_run_that_fails_after_its_first_step_keeps_its_folder(tmp_path, texts):  # noqa: F811
    config = yaml.safe_load(start(tmp_path, texts).read_text())
    config["trainer"]["callbacks"].append({"class_path": "test_run_files.Fails"})
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(ZeroDivisionError):
        Output("fit", "--config", tmp_path / "start.yaml")
    assert (tmp_path / "runs" / "version_0" / "config.yaml").is_file()
    assert list((tmp_path / "runs").rglob("*.ckpt"))


class Fails(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            raise ZeroDivisionError


def test_predictions_of_a_run_are_written_into_it_and_no_folder_is_made(run):  # noqa: F811
    before = sorted(path.name for path in run.parent.iterdir())
    for subcommand in ("validate", "predict"):
        output = Output(subcommand, "--run", run)
        assert output.code == 0, output.err
    assert sorted(path.name for path in run.parent.iterdir()) == before
    written = len((run / "predictions.jsonl").read_text().splitlines())
    assert f"{run}/predictions.jsonl: all {written} predictions" in output.out
    (run / "predictions.jsonl").unlink()


def test_the_command_line_takes_keep_checkpoints(tmp_path, texts):  # noqa: F811
    output = Output("fit", "--config", start(tmp_path, texts), "--keep_checkpoints=last")
    assert output.code == 0, output.err
    folder = tmp_path / "runs" / "version_0"
    assert [path.name for path in (folder / "tasks").iterdir()] == ["1-ant.ckpt"]
    assert Output("validate", "--run", folder).code == 0
    more = Output("fit", "--run", folder, f"--add=new={texts / 'zoo.txt'}", "--keep_checkpoints", "1")
    assert more.code == 0, more.err
