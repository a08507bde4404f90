"""``predict`` of every task, against what a module that is no language model must answer."""

from __future__ import annotations

import json
import sys

import lightning as L
import pytest
import torch
from test_cli import Output
from torch.utils.data import DataLoader, TensorDataset
from toys import trainer

from lightning_cl import TaskDataModule
from lightning_cl.sequence import predict as cli_predict
from lightning_cl.sequence.predict import predict_tasks


class Answering(L.LightningModule):
    """Answers each number with its product with a weight; `form` is how the answers are handed over."""

    def __init__(self, form="list"):
        super().__init__()
        self.weight, self.form = torch.nn.Parameter(torch.tensor(2.0)), form

    def predict_step(self, batch, batch_idx):
        if self.form == "tensor":
            return batch[0] * self.weight
        numbers = [float(number) for number in batch[0]]
        answers = [
            {"task": "?", "prompt": f"{n:g}ä", "generated": f"{n * float(self.weight):g}", "reference": "r"}
            for n in numbers
        ]
        return answers if self.form == "list" else answers[0]


class Data(TaskDataModule):
    """As the DataModule of a sequence: the loader of the task that is watched."""

    def predict_dataloader(self):
        assert self.driven
        return DataLoader(self.tasks[self.watch].train, batch_size=1 if self.current.batch_size == 1 else 2)


def numbers(*values):
    return TensorDataset(torch.tensor(values))


def data(**more):
    return Data([{"name": "one", "train": numbers(1.0, 2.0, 3.0), **more}, {"name": "two", "train": numbers(5.0)}])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


EXPECTED = [
    {"task": task, "prompt": f"{n}ä", "generated": str(2 * n), "reference": "r"}
    for task, n in [("one", 1), ("one", 2), ("one", 3), ("two", 5)]
]


def test_every_sample_of_every_task_in_order(tmp_path, capsys):
    tasks = data()
    path = predict_tasks(trainer(tmp_path), Answering(), tasks)
    assert path == tmp_path / "predictions.jsonl"
    assert lines(path) == EXPECTED
    assert (tasks.watch, tasks.driven) == (None, False)
    shown = capsys.readouterr().out
    assert "'1ä' …" in shown
    assert "generated | 10" in shown
    assert "all 4 predictions" in shown


def test_a_dictionary_per_batch_is_one_sample(tmp_path):
    path = predict_tasks(trainer(tmp_path), Answering("dict"), data(batch_size=1))
    assert lines(path) == EXPECTED


def test_only_a_few_are_printed(tmp_path, capsys):
    tasks = Data({"many": numbers(*map(float, range(10)))})
    assert len(lines(predict_tasks(trainer(tmp_path), Answering(), tasks))) == 10
    assert capsys.readouterr().out.count("generated |") == 3


def test_other_outputs_stay_with_the_callbacks(tmp_path):
    """As with Lightning: a writer gets them, and nothing else happens."""
    seen = []

    class Writer(L.pytorch.callbacks.BasePredictionWriter):
        def write_on_batch_end(self, trainer, pl_module, prediction, *_):
            seen.extend(prediction.tolist())

    assert predict_tasks(trainer(tmp_path, [Writer("batch")]), Answering("tensor"), data()) is None
    assert seen == [2.0, 4.0, 6.0, 10.0]
    assert not list(tmp_path.rglob("predictions.jsonl"))


def test_nothing_is_kept_if_nothing_is_returned(tmp_path):
    assert predict_tasks(trainer(tmp_path), Answering(), data(), return_predictions=False) is None
    assert not list(tmp_path.rglob("predictions.jsonl"))


def test_the_weights_are_those_of_the_checkpoint(tmp_path):
    module = Answering()
    module.weight.data.fill_(7.0)
    trained = trainer(tmp_path)
    trained.strategy.connect(module)
    trained.save_checkpoint(tmp_path / "a.ckpt")
    path = predict_tasks(trainer(tmp_path), Answering(), data(), tmp_path / "a.ckpt")
    assert [line["generated"] for line in lines(path)] == ["7", "14", "21", "35"]


def test_an_error_leaves_the_data_as_it_was(tmp_path):
    class Broken(Answering):
        def predict_step(self, batch, batch_idx):
            raise KeyError("somebody's bug")

    tasks = data()
    with pytest.raises(KeyError, match="somebody's bug"):
        predict_tasks(trainer(tmp_path), Broken(), tasks)
    assert (tasks.watch, tasks.driven) == (None, False)


def test_the_shares_of_all_ranks_are_joined(monkeypatch):
    """Rank 1's are made up here."""

    def gather(parts, ours):
        parts[:] = [ours, {"a": [{"prompt": "2"}], "b": None}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    joined = cli_predict._of_all_ranks({"a": [{"prompt": "1"}], "b": []})
    assert joined == {"a": [{"prompt": "1"}, {"prompt": "2"}], "b": None}


THEIRS = """
import lightning as L

class Counting(L.LightningModule):
    def predict_step(self, batch, batch_idx):
        return [{"prompt": str(len(ids)), "generated": "x", "reference": ""} for ids in batch["input_ids"]]
"""


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_to_the_runs_folder(tmp_path, monkeypatch):
    (tmp_path / "a_counting_module.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        TaskDataModule, "predict_dataloader", lambda self: self.train_loader(self.tasks[self.watch]), raising=False
    )
    (tmp_path / "text.txt").write_text("some text to learn, not much of it. " * 20)
    arguments = ["predict", "--model=a_counting_module.Counting", "--trainer.accelerator=cpu", "--data.max_length=16"]
    arguments += [f"--data.tasks.{name}={tmp_path / 'text.txt'}" for name in "ab"]
    arguments += ["--data.tokenizer=TrainedBPE", "--data.tokenizer.vocab_size=280", "--trainer.logger=CSVLogger"]
    arguments += [f"--data.tokenizer.cache_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    output = Output(*arguments, f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false")
    assert output.code == 0, output.err
    (path,) = tmp_path.rglob("predictions.jsonl")
    assert path.parent.name == "version_0"
    assert (path.parent / "config.yaml").exists()
    found = lines(path)
    assert {line["task"] for line in found} == {"a", "b"}
    assert str(path) in output.out
    del sys.modules["a_counting_module"]
