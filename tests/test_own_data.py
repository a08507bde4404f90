"""A new user's own data, in every form that it comes in, through one training step from end to end."""

from __future__ import annotations

import csv
import json
import logging

import datasets
import pandas
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from stand_in import chats, save_stand_in, sentence, write_jsonl
from toys import trainer

from lightning_cl import EWC, CausalLM, Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.data.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 12
SAID = [sentence(i) for i in range(COUNT)]
ASKED = [sentence(i + 50, 4) for i in range(COUNT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))


def turns(asked, said, role="role", content="content", names=("user", "assistant")):
    return [{role: names[0], content: asked}, {role: names[1], content: said}]


PAIRS = list(zip(ASKED, SAID, strict=True))
FORMATS = {
    "text": [{"text": said} for said in SAID],
    "completion": [{"prompt": asked, "completion": said} for asked, said in PAIRS],
    "answer": [{"prompt": asked, "answer": said} for asked, said in PAIRS],
    "messages": [{"messages": turns(*pair)} for pair in PAIRS],
    "sharegpt": [{"conversations": turns(*pair, "from", "value", ("human", "gpt"))} for pair in PAIRS],
    "alpaca": [{"instruction": asked, "input": "", "output": said} for asked, said in PAIRS],
    "dolly": [{"instruction": asked, "context": "", "response": said, "category": "qa"} for asked, said in PAIRS],
    "prompt messages": [
        {"prompt": turns(asked, said)[:1], "completion": turns(asked, said)[1:]} for asked, said in PAIRS
    ],
}


def jsonl(form):
    def make(place):
        write_jsonl(place / "mails.jsonl", FORMATS[form])
        return place / "mails.jsonl"

    return make


def json_list(place):
    (place / "mails.json").write_text(json.dumps(FORMATS["alpaca"]))
    return str(place / "mails.json")


def table(place):
    with (place / "mails.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "completion"])
        writer.writeheader()
        writer.writerows({"id": i, **record} for i, record in enumerate(FORMATS["completion"]))
    return str(place / "mails.csv")


def parquet(place):
    pandas.DataFrame(FORMATS["messages"]).to_parquet(place / "mails.parquet")
    return place / "mails.parquet"


def text_file(place):
    (place / "notes.txt").write_text("\n\n".join(SAID))
    return place / "notes.txt"


def mlx_folder(place):
    for name, part in (("train", slice(0, 8)), ("valid", slice(8, 10)), ("test", slice(10, 12))):
        write_jsonl(place / "mlx" / f"{name}.jsonl", FORMATS["messages"][part])
    return place / "mlx"


def source_folder(place):
    for i, said in enumerate(SAID):
        path = place / "project" / f"part{i % 3}" / f"file{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {said}\n")
    (place / "project" / ".git").mkdir()
    (place / "project" / ".git" / "hidden.py").write_text("# never to be read\n")
    return place / "project"


def glob(place):
    return str(source_folder(place) / "**" / "*.py")


def text_glob(place):
    (place / "many").mkdir()
    for i, said in enumerate(SAID):
        (place / "many" / f"{i}.txt").write_text(said)
    return str(place / "many" / "*.txt")


def shards(place):
    for i in range(3):
        write_jsonl(place / "shards" / f"part-{i}.jsonl", FORMATS["text"][i::3])
    return place / "shards"


def stream(place):
    return datasets.Dataset.from_list(FORMATS["messages"]).to_iterable_dataset()


def dataset_dict(place):
    parts = {"train": slice(0, 9), "validation": slice(9, 12)}
    return datasets.DatasetDict({k: datasets.Dataset.from_list(FORMATS["messages"][v]) for k, v in parts.items()})


CONTAINERS = {
    **{f"jsonl of {form}": jsonl(form) for form in FORMATS},
    "txt": text_file,
    "json": json_list,
    "csv": table,
    "parquet": parquet,
    "mlx-lm folder": mlx_folder,
    "source folder": source_folder,
    "glob": glob,
    "glob of texts": text_glob,
    "folder of jsonl": shards,
    "list of texts": lambda place: SAID,
    "list of records": lambda place: FORMATS["messages"],
    "Dataset": lambda place: datasets.Dataset.from_list(FORMATS["alpaca"]),
    "DatasetDict": dataset_dict,
    "IterableDataset": stream,
}


class Learnt(Callback):
    """The texts that bore loss."""

    def __init__(self):
        self.texts = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for labels in batch["labels"]:
            text = pl_module.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
            self.texts.setdefault(trainer.datamodule.current.name, []).append(text)


@pytest.mark.parametrize("container", CONTAINERS)
def test_one_step(tmp_path, folder, container):
    """The first task is the data; a second one follows, with what protects the first."""
    source = CONTAINERS[container](tmp_path)
    first = {"train": source} | ({"val": FORMATS["messages"][:2]} if container == "IterableDataset" else {})
    data = TaskDataModule({"mine": first, "more": chats(6)}, folder, 256, path_header=container == "source folder")
    model, learnt, ewc, matrix = CausalLM(folder), Learnt(), EWC(0.01, samples=2), TaskMatrix()
    before = {name: tensor.clone() for name, tensor in load_weights(folder).items()}
    callbacks = [learnt, ewc, matrix, *([Replay(10, 0.2)] if container != "IterableDataset" else [])]
    summary = fit_tasks(trainer(tmp_path / "run", callbacks, max_steps=1), model, data)

    assert summary["tasks"] == ["mine", "more"]
    assert not matrix.matrix.isnan().any()
    after = model.lm.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj" in name)
    # What was learnt in the first step are the user's own words, and none of those that were asked.
    mine = learnt.texts["mine"]
    assert len(mine) == (1 if container == "txt" else 8)
    for text in mine:
        if container == "source folder":
            header, text = text.split("\n", 1)
            assert header.startswith("# file: part")
        words = text.strip().removeprefix("# ")
        assert words in ("\n\n".join(SAID) if container == "txt" else SAID)


def load_weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("container", ["jsonl of messages", "mlx-lm folder", "csv", "IterableDataset", "glob"])
def test_preflight_shows_what_would_be_trained_on(tmp_path, folder, container, caplog):
    source = CONTAINERS[container](tmp_path)
    data = TaskDataModule({"mine": {"train": source, "max_steps": 3}}, folder, 256)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit_tasks(trainer(tmp_path, fast_dev_run=True), CausalLM(folder), data)
    (plan,) = (record.getMessage() for record in caplog.records if "Preflight" in record.getMessage())
    assert "1. mine: " in plan
    assert ("stream" if container == "IterableDataset" else "samples, ") in plan


@pytest.mark.parametrize("container", ["parquet", "csv", "Dataset", "source folder"])
def test_twice_the_same_is_the_same(tmp_path, folder, container):
    """Made, then read from the cache: one and the same training."""
    source, ends = CONTAINERS[container](tmp_path), []
    for run in range(2):
        torch.manual_seed(0)
        model = CausalLM(folder)
        fit_tasks(trainer(tmp_path / str(run), max_steps=2), model, TaskDataModule({"mine": source}, folder, 256, 4))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "mails.jsonl",
            '{"question": "a", "answer": "b"}\n',
            r"line 1: expected .*\"prompt\", \"answer\".*\['answer', 'question'\]",
        ),
        ("mails.jsonl", '[{"text": "a"}]\n', r"line 1: expected a record .* got a list"),
        ("mails.json", '{"text": "a"}\n{"text": "b"}\n', r"line 2: .*\.jsonl"),
        ("mails.csv", "a,b\n1,2\n", r"line 1: expected a header row .*\['a', 'b'\]"),
        ("mails.docx", "x", r"expected a file ending in \.txt"),
        ("mails.jsonl", "", "the file is empty"),
        ("mails.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', r"line 1: .*no assistant turn"),
        ("mails.jsonl", '{"messages": "a"}', r"line 1: .*messages"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, folder, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"task 'mine', train=.*{name}.*{message}"):
        TaskDataModule({"mine": tmp_path / name}, folder).setup()


def test_a_table_in_memory_says_what_to_do_with_it(folder):
    """The first thing that somebody with pandas tries."""
    with pytest.raises(TypeError, match=r"task 'mine', train: .*DataFrame"):
        TaskDataModule({"mine": pandas.DataFrame(FORMATS["text"])}, folder)


def test_a_file_in_the_place_of_the_tasks_says_what_is_expected(tmp_path, folder):
    with pytest.raises(TypeError, match=r"tasks: expected \{name: data\}"):
        TaskDataModule(jsonl("text")(tmp_path), folder)


def test_the_tokens_are_those_of_the_folders_own_tokenizer(tmp_path, folder):
    """Not merely something that trains: the samples themselves, for one container of each kind."""
    tokenizer = load_tokenizer(folder)
    for container in ("jsonl of messages", "parquet", "list of records"):
        data = TaskDataModule({"mine": {"train": CONTAINERS[container](tmp_path), "val": ["x"]}}, folder, 256)
        data.setup()
        train = data._prepared["mine"].train
        expected = [tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in FORMATS["messages"]]
        assert [train[i]["input_ids"].tolist() for i in range(len(train))] == expected
