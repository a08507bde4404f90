"""Samples that are dropped, cut off or skipped: said in the run, counted in plan and report."""

from __future__ import annotations

import json
import warnings

import datasets
import pytest
from stand_in import save_stand_in, sentence
from toys import trainer

from lightning_cl import CausalLM, TaskDataModule, TaskMatrix, fit_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))


def chat(asked, answered):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


SHORT, LONG, CUT = chat("a", "b"), chat(sentence(0, 60), "b"), chat("a", sentence(0, 60))
LENGTH = 40
RECORDS = [SHORT] * 3 + [LONG] * 2 + [CUT] * 4 + [{"text": " "}]


def said(data):
    """The warnings about a task while its data is set up."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup()
    return [str(warning.message) for warning in caught if str(warning.message).startswith("task ")]


def test_one_line_for_each_task_with_counts_and_what_to_do(folder):
    tasks = {
        "chat": {"train": RECORDS, "val": [SHORT, LONG]},
        "fine": {"train": [SHORT], "val": [SHORT]},
        "blank": {"train": [SHORT, {"text": ""}], "val": [SHORT]},
    }
    for _ in range(2):  # and again from the cache
        assert said(TaskDataModule(tasks, folder, LENGTH)) == [
            "task 'chat', training: of 10 samples 4 cut off, 2 dropped, since what is to be learnt comes after the cut,"
            " 1 dropped, since there is nothing to learn; validation: of 2 samples 1 dropped, since what is to be"
            " learnt comes after the cut; a larger max_length than 40 keeps more",
            "task 'blank', training: of 2 samples 1 dropped, since there is nothing to learn",
        ]


def test_validation_that_vanishes_is_said_with_the_reason(folder):
    data = TaskDataModule({"a": [chat(sentence(i, 60), "b") for i in range(30)] + [SHORT]}, folder, LENGTH)
    (left_out, lost) = said(data)
    assert "validation: of 2 samples 2 dropped" in left_out
    assert lost.startswith("task 'a': validation uses the training data, since all 2 samples that were held out")
    assert "max_length=40" in lost
    assert "Task(val=…)" in lost
    assert data.validated_on_training_data(data.current)
    assert data.left_out(data.current)["val_dropped"] == 2
    (lost,) = said(TaskDataModule({"a": [SHORT]}, folder, LENGTH))
    assert "too little to hold something out" in lost


def test_validation_data_that_is_too_long_says_so(folder):
    data = TaskDataModule({"a": {"train": [SHORT], "val": [LONG]}}, folder, LENGTH)
    with pytest.raises(ValueError, match=r"task 'a', val: .*no token to predict.* 1 samples .*max_length=40"):
        data.setup()


@pytest.mark.filterwarnings("ignore")
def test_counts_are_in_the_report(tmp_path, folder, caplog):
    records = [*RECORDS, {"messages": 5}, {"messages": []}]
    tasks = {"chat": {"train": records, "val": [SHORT, LONG]}, "fine": {"train": [SHORT], "val": [SHORT]}}
    data = TaskDataModule(tasks, folder, LENGTH, on_bad_record="skip")
    with caplog.at_level("INFO"):
        fit_tasks(trainer(tmp_path, [TaskMatrix()], max_steps=1), CausalLM(folder), data)
    counted, fine = json.loads((tmp_path / "report.json").read_text())["costs"]["tasks"]
    expected = {"train_dropped": 3, "train_cut_off": 4, "train_malformed": 2}
    expected |= {"val_dropped": 1, "val_cut_off": 0, "val_malformed": 0}
    assert {name: counted[name] for name in expected} == expected
    assert all(fine[name] == 0 for name in expected)
    line = "left out: chat: 3 samples dropped (training), 4 samples cut off (training), 2 malformed records (training),"
    assert f"{line} 1 samples dropped (validation)\n" in caplog.text
    assert "left out: fine" not in caplog.text


def test_a_stream_says_so_once_and_counts_what_it_was_trained_on(tmp_path, folder):
    def data():
        stream = datasets.Dataset.from_list([*RECORDS[:-1], {"messages": None}]).to_iterable_dataset()
        task = {"train": stream, "val": [SHORT]}
        return TaskDataModule({"a": task}, folder, LENGTH, batch_size=2, on_bad_record="skip")

    with pytest.warns(UserWarning, match="a sample is") as caught:
        fit_tasks(trainer(tmp_path, [TaskMatrix()], max_steps=8), CausalLM(folder), data())
    (line,) = [str(warning.message) for warning in caught if "a sample is" in str(warning.message)]
    assert line.startswith("task 'a', train: a sample is cut off (max_length=40); a stream is read as it is trained on")
    (counted,) = json.loads((tmp_path / "report.json").read_text())["costs"]["tasks"]
    # Four batches a pass: this is the second one as a whole.
    assert (counted["train_dropped"], counted["train_cut_off"], counted["train_malformed"]) == (2, 4, 1)
