"""Folders in the layouts of published benchmarks: what is asked, in which order, and with which metrics."""

from __future__ import annotations

import json

import pytest

from lightning_cl import TaskDataModule, TrainedBPE
from lightning_cl.cli.earlier_run import _add
from lightning_cl.cli.task_order import order_for, set_order, trained_names
from lightning_cl.data.benchmarks import CL_BENCHMARK_ORDERS, SUPERNI_ORDERS, TRACE_TASKS, cl_benchmark, superni, trace
from lightning_cl.data.exercises import exercises_of


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="module")
def trace_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("LLM-CL-Benchmark_500")
    for name in [*TRACE_TASKS, "Lima"]:
        for file, count in (("train", 6), ("eval", 2), ("test", 3)):
            records = [{"prompt": f"{name} {file} {i}?\n", "answer": f"{i}. Antwort ü"} for i in range(count)]
            write(root / name / f"{file}.json", records)
    return root


@pytest.fixture
def cl_folder(tmp_path):
    root = tmp_path / "CL_Benchmark"
    for category, name, labels in (
        ("TC", "dbpedia", ["Company", "Plant"]),
        ("SC", "amazon", ["very negative", "negative"]),
        ("TC", "yahoo", ["Sports", "Health"]),
        ("TC", "agnews", ["World", "Sports"]),
        ("COPA", "COPA", ["A", "B"]),
    ):
        write(root / category / name / "labels.json", labels)
        for file, count in (("train", 4), ("dev", 2), ("test", 2)):
            shift = 0 if name == "amazon" else len(file)  # amazon's dev.json is its test.json
            items = [{"label": labels[i % 2], "sentence": f"{name} {i + shift} {{x}}"} for i in range(count)]
            write(root / category / name / f"{file}.json", items)
    zero = {"instruction_type": "zero-shot"}
    few = {"instruction_type": "few-shot", "instruction": "wrong"}
    config = {"TC": [few, {**zero, "instruction": "Topic?\n"}], "SC": [{**zero, "instruction": "Mood?\n"}]}
    write(tmp_path / "configs" / "instruction_config.json", config)
    return root


def superni_task(outputs):
    return {
        "Definition": [" Say it. "],
        "Positive Examples": [{"input": " 1 ", "output": "one", "explanation": "-"}, {"input": "2", "output": "two"}],
        "Instances": [{"id": f"t-{i}", "input": f"in {i}", "output": outputs} for i in range(4)],
        "Categories": ["x"],
    }


def set_up(tasks, tmp_path, **settings):
    data = TaskDataModule(tasks, tokenizer=TrainedBPE(280, str(tmp_path)), max_length=200, **settings)
    data.prepare_data()
    data.setup()
    return data


def test_trace_through_a_configuration(trace_folder, tmp_path):
    data = set_up({"benchmark": "trace", "folder": str(trace_folder), "epochs": True}, tmp_path)
    assert [task.name for task in data.tasks] == list(TRACE_TASKS)
    assert [task.max_epochs for task in data.tasks] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert [task.metrics[0] for task in data.tasks] == (
        ["accuracy"] * 2 + ["rouge_l", "edit_similarity", "accuracy"] + ["exact_match"] * 2 + ["sari"]
    )
    task = data.tasks[2]
    assert len(data.training_data(task)) == 6
    asked = {split: exercises_of(data, task, split) for split in ("val", "test")}
    assert [one.text for one in asked["val"]] == ["MeetingBank eval 0?\n", "MeetingBank eval 1?\n"]
    assert [one.references for one in asked["test"]] == [[f"{i}. Antwort ü"] for i in range(3)]
    sample = data.training_data(task)[0]
    assert data.tokenizer.decode(sample["input_ids"][~sample["loss_mask"]]) == "MeetingBank train 0?\n"


def test_more_tasks_come_after_those_of_the_folder(trace_folder):
    given = {"benchmark": "trace", "folder": str(trace_folder), "order": ["FOMC"], "more": {"mails": "sample:chat"}}
    config = {"data": {"tasks": given}}
    assert _add(config, "notes=sample:prose") == "notes"
    data = TaskDataModule(config["data"]["tasks"], tokenizer=TrainedBPE(280))
    assert [task.name for task in data.tasks] == ["FOMC", "mails", "notes"]


def test_other_tasks_in_the_layout_of_trace(trace_folder):
    (task,) = trace(trace_folder, ["Lima"], {"Lima": ["exact_match"]})
    assert (task.metrics, task.max_epochs) == (["exact_match"], None)
    with pytest.raises(FileNotFoundError, match=r"no .*nope.train\.json; .*'20Minuten'.*Give order="):
        trace(trace_folder, ["nope"])
    with pytest.raises(ValueError, match="metrics: unknown 'Lima'"):
        trace(trace_folder, metrics={"Lima": ["exact_match"]})


def test_cl_benchmark(cl_folder, tmp_path):
    with pytest.warns(UserWarning, match="same file as test.json for amazon:"):
        tasks = cl_benchmark(cl_folder, 2)
    assert [task.name for task in tasks] == ["dbpedia", "amazon", "agnews", "yahoo"] == CL_BENCHMARK_ORDERS[2]
    assert tasks[1].train[0] == {
        "prompt": "Mood?\nOption: very negative, negative \namazon 0 {x}\nAnswer:",
        "answer": " very negative",
    }
    data = set_up(tasks, tmp_path / "cache")
    one = exercises_of(data, data.tasks[0], "test")[1]
    assert (one.choices, one.right, one.references) == (["Company", "Plant"], 1, [" Plant"])
    rows = zip(one.rows, one.starts, strict=True)
    assert [data.tokenizer.decode(row[at:]) for row, at in rows] == [" Company", " Plant"]
    assert cl_benchmark(cl_folder, ["COPA"])[0].train[0]["prompt"] == "COPA 5 {x}\nAnswer:"
    assert all(len(CL_BENCHMARK_ORDERS[i]) == len(set(CL_BENCHMARK_ORDERS[i])) == 15 for i in (4, 5, 6))


def test_cl_benchmark_names_what_is_wrong(cl_folder):
    with pytest.raises(FileNotFoundError, match=r"no <category>/MNLI/train\.json in it; there are \['COPA', "):
        cl_benchmark(cl_folder, 4)
    with pytest.raises(ValueError, match=r"order=7: expected one of \[1, 2, 3, 4, 5, 6\]"):
        cl_benchmark(cl_folder, 7)
    write(cl_folder / "TC" / "yahoo" / "test.json", [{"label": "Cars", "sentence": "x"}])
    with pytest.raises(ValueError, match=r"test\.json, item 0: the label 'Cars' is not in labels\.json"):
        cl_benchmark(cl_folder, ["yahoo"])
    (cl_folder.parent / "configs" / "instruction_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="give the benchmark's instruction_config"):
        cl_benchmark(cl_folder, ["agnews"])


def test_superni_in_splits_and_as_single_files(tmp_path):
    folder = tmp_path / "SuperNI"
    for name in SUPERNI_ORDERS[2]:
        for file in ("train", "dev", "test"):
            write(folder / f"{name}_some_thing" / f"{file}.json", superni_task(["a", "b"]))
    tasks = superni(folder, 2)
    assert [task.name for task in tasks] == [f"{name}_some_thing" for name in SUPERNI_ORDERS[2]]
    assert sorted(SUPERNI_ORDERS[1]) == sorted(SUPERNI_ORDERS[2])
    assert tasks[0].test[1] == {
        "prompt": "Definition: Say it.\n\nNow complete the following example -\nInput: in 1\nOutput: ",
        "answer": "a",
        "references": ["a", "b"],
    }
    write(folder / "task9_single.json", superni_task("only"))
    (single,) = superni(folder, ["task9"], examples=1)
    assert (single.val, single.test, single.metrics) == (None, None, ["rouge_l", "normalized_match"])
    assert single.train[0] == {
        "prompt": "Definition: Say it.\n\nPositive Example 1 -\nInput: 1\nOutput: one\n"
        "Now complete the following example -\nInput: in 0\nOutput: ",
        "answer": "only",
    }
    data = set_up([tasks[0]], tmp_path / "cache")
    assert exercises_of(data, data.tasks[0])[0].references == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="no task 'task8' in it"):
        superni(folder, ["task8"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"benchmark": "glue", "folder": "."}, ValueError, r"benchmark='glue': expected one of"),
        ({"benchmark": "trace", "folder": "nowhere"}, FileNotFoundError, "folder='nowhere': no such folder"),
        (
            {"benchmark": "trace", "folder": ".", "orders": 1},
            ValueError,
            "unknown 'orders'; there are .'folder', 'order'",
        ),
    ],
)
def test_wrong_configurations(given, error, message):
    with pytest.raises(error, match=message):
        TaskDataModule(given, tokenizer=TrainedBPE(280))


def test_the_order_of_a_folder_can_be_another_for_each_seed(trace_folder, tmp_path):
    settings = {"tasks": {"benchmark": "trace", "folder": str(trace_folder)}}
    assert trained_names(settings["tasks"]) == list(TRACE_TASKS)
    order = order_for(trained_names(settings["tasks"]), 1)
    assert order != list(TRACE_TASKS)
    set_order(settings, order)
    data = set_up(settings["tasks"], tmp_path)
    assert [task.name for task in data.tasks] == order
    more = {**settings["tasks"], "more": {"x": ["text"]}}
    with pytest.raises(ValueError, match="more"):
        set_order({"tasks": more}, [*order, "x"])
