"""Progress of a run: lines without a terminal, one bar over all tasks with one, silence where it was asked for."""

from __future__ import annotations

import re
import time

import pytest
from toys import TINY_LLAMA, Classifier, classification, trainer

from lightning_cl import EWC, CausalLM, Task, TaskDataModule, TaskMatrix, TaskProgress, TrainedBPE, fit_tasks
from lightning_cl.callbacks.monitoring import progress as progress_file

LINE = re.compile(r"\d\d:\d\d:\d\d Task (\d)/(\d) '(\w)', step (\d+) of (\d+)")


def lines_of(caplog):
    return [text for record in caplog.records if LINE.match(text := record.getMessage())]


def tasks():
    """Six batches an epoch each; the second task has three steps of its own."""
    own = {"a": {}, "b": {"max_steps": 3}, "c": {}}
    return TaskDataModule([Task(name, classification(i), **own[name]) for i, name in enumerate(own)], batch_size=8)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes one second at each look."""

    class Clock:
        now = 1_000_000.0

        def time(self):
            self.now += 1.0
            return self.now

    Clock.strftime, Clock.localtime = staticmethod(time.strftime), staticmethod(time.gmtime)
    monkeypatch.setattr(progress_file, "time", Clock())


def run(tmp_path, bar, data=None, module=None, callbacks=(), **settings):
    used = trainer(tmp_path, [bar, *callbacks], **{"enable_progress_bar": True, "max_epochs": 2} | settings)
    fit_tasks(used, module or Classifier(), data or tasks())
    return bar


def test_lines_say_time_task_step_and_time_left(tmp_path, caplog, capsys, clock):
    with caplog.at_level("INFO"):
        run(tmp_path, TaskProgress(every=0), callbacks=[EWC(samples=4), TaskMatrix()])
    lines = lines_of(caplog)
    told = [tuple(LINE.match(line).groups()) for line in lines]
    steps = {"a": 12, "b": 3, "c": 12}
    expected = [
        (str(k), "3", name, str(i + 1), str(n)) for k, (name, n) in enumerate(steps.items(), 1) for i in range(n)
    ]
    assert told == expected
    # One second a step, by the clock: of task a 11 are left after the first, and then 3 and 12.
    assert "0:00:11 left of the task, about 0:00:26 of the run" in lines[0]
    assert "0:00:00 left of the task, about 0:00:12 of the run" in lines[14]
    assert lines[-1].endswith("0:00:00 left of the task")
    out = capsys.readouterr()
    assert "it/s" not in out.out + out.err  # no bars, not of Fisher passes and evaluations either


def test_lines_come_now_and_then(tmp_path, caplog, clock):
    with caplog.at_level("INFO"):
        run(tmp_path, TaskProgress(every=15))
    # A second a step, and one at the start of a task; the first after 10, then every 15.
    assert [LINE.match(line).groups()[2:4] for line in lines_of(caplog)] == [("a", "10"), ("c", "8")]


def test_lines_of_a_language_model_have_its_loss_and_tokens(tmp_path, caplog, clock):
    tokenizer = TrainedBPE(257, str(tmp_path / "bpe")).train(["any"])
    data = TaskDataModule({"t": {"train": ["x" * 29] * 8, "val": ["x"]}}, tokenizer, 64, batch_size=4)
    with caplog.at_level("INFO"):
        run(tmp_path, TaskProgress(every=0), data, CausalLM(TINY_LLAMA), max_epochs=1)
    first = lines_of(caplog)[0]
    # Four samples of 29 bytes and an end token in the one second of a step.
    assert "120 tokens a second" in first
    assert "train_loss 5." in first


def test_no_line_without_a_bar_and_none_in_a_preflight(tmp_path, caplog, clock):
    with caplog.at_level("INFO"):
        fit_tasks(trainer(tmp_path, max_epochs=1), Classifier(), tasks())
        run(tmp_path, TaskProgress(every=0, refresh_rate=0))
        run(tmp_path, TaskProgress(every=0), fast_dev_run=True)
    assert not lines_of(caplog)


def test_in_a_terminal_one_bar_goes_over_all_tasks(tmp_path, caplog, monkeypatch, capsys):
    monkeypatch.setattr(progress_file, "is_terminal", lambda: True)
    seen = []

    class Watched(TaskProgress):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            seen.append((self.train_progress_bar.n, self.train_progress_bar.total))

    with caplog.at_level("INFO"):
        bar = run(tmp_path, Watched(refresh_rate=1))
        assert seen == [(n + 1, 27) for n in range(27)]
        seen.clear()
        run(tmp_path, bar)  # the next run begins at 0 again
        assert seen[0] == (1, 27)
    assert not lines_of(caplog)
    shown = capsys.readouterr().out
    assert "Task 3/3 'c' · epoch 1" in shown
    assert "27/27" in shown


def test_a_resumed_run_counts_what_is_left(tmp_path, monkeypatch, caplog, clock):
    used = trainer(tmp_path, max_epochs=2, enable_checkpointing=True)
    fit_tasks(used, Classifier(), tasks())
    with caplog.at_level("INFO"):
        resumed = trainer(tmp_path, [TaskProgress(every=0)], max_epochs=2, enable_progress_bar=True)
        fit_tasks(resumed, Classifier(), tasks(), ckpt_path=tmp_path / "tasks" / "0-a.ckpt")
    first = lines_of(caplog)[0]
    assert LINE.match(first).groups() == ("2", "3", "b", "1", "3")
    assert "about 0:00:14 of the run" in first


def test_a_plain_fit_is_one_task(tmp_path, caplog, clock):
    from torch.utils.data import DataLoader

    with caplog.at_level("INFO"):
        used = trainer(tmp_path, [TaskProgress(every=0), EWC(samples=4)], max_epochs=1, enable_progress_bar=True)
        used.fit(Classifier(), DataLoader(classification(0), 8))
    assert any("step 6 of 6" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("every", [-1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be(every):
    with pytest.raises(ValueError, match="every="):
        TaskProgress(every=every)


def test_an_imported_kernel_is_no_notebook(monkeypatch):
    import ipykernel.ipkernel

    assert "ipykernel" in ipykernel.__name__
    monkeypatch.setattr("sys.stdout", None)
    assert not progress_file.is_terminal()
