"""Copies of a document stay on one side of the validation split, however they are written."""

from __future__ import annotations

import pytest
from stand_in import sentence, write_jsonl

from lightning_cl import TaskDataModule, TrainedBPE
from lightning_cl.data.text.formats import Text, as_document
from lightning_cl.data.text.splitting import said, split_documents

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "hello"}
CALL = {"name": "f", "arguments": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    "copies",
    [
        [{"text": "a b"}, {"text": "a b\n"}, {"text": " a b"}, "a b"],
        [
            {"messages": [ASKED, ANSWERED]},
            {"messages": [dict(reversed(ASKED.items())), dict(reversed(ANSWERED.items()))]},
            {"messages": [ASKED | {"name": "Ann"}, ANSWERED | {"content": "hello\n", "weight": 1}]},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            {"instruction": "hi", "output": "hello"},
            {"prompt": [ASKED], "completion": [ANSWERED]},
            {"prompt": "hi", "completion": " hello"},
            {"prompt": "hi\n", "answer": "hello"},
            {"messages": [ASKED, ANSWERED], "tools": [CALL]},
        ],
        [
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}]}]},
            {
                "messages": [
                    ASKED,
                    {"tool_calls": [{"function": dict(reversed(CALL.items())), "id": "2"}], "role": "assistant"},
                ]
            },
            {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}]},
        ],
    ],
    ids=["text", "dialogue", "calls"],
)
def test_the_same_is_said(copies):
    assert len({said(as_document(copy)) for copy in copies}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "a b"}, {"text": "a  b"}),
        ({"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}),
        ({"messages": [ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED, ASKED]}),
        ({"messages": [ASKED, ANSWERED]}, {"messages": [ASKED | {"role": "system"}, ANSWERED]}),
        ({"messages": [ANSWERED]}, {"messages": [ANSWERED | {"tool_calls": [{"function": CALL}]}]}),
    ],
)
def test_something_else_is_said(one, other):
    assert said(as_document(one)) != said(as_document(other))


def test_front_of_a_single_text_keeps_the_header_of_each_copy():
    copies = [Text("abcdefghij", f"# file: {name}\n") for name in "xy"]
    train, val = split_documents(copies, 0.2, seed=0)
    assert [document.plain for document in train] == ["# file: x\nabcdefgh", "# file: y\nabcdefgh"]
    assert [document.text for document in val] == ["ij"]


@pytest.fixture
def tokenizer(tmp_path):
    return TrainedBPE(257, str(tmp_path / "bpe")).train(["any"])


def sides(source, tokenizer, **settings):
    """What is said on each side, without paths and white space at the ends."""
    data = TaskDataModule({"a": source}, tokenizer, 400, val_fraction=0.2, **settings)
    data.setup()
    found = []
    for samples in (data._prepared["a"].train, data._prepared["a"].val):
        texts = [tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in samples]
        found.append(
            {text.split("\n", 1)[-1].strip() if settings.get("path_header") else text.strip() for text in texts}
        )
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("path_header", [False, True])
def test_copies_of_a_file_under_other_paths(tmp_path, monkeypatch, tokenizer, seed, path_header):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    for i in range(24):
        path = tmp_path / "src" / f"d{i}" / "m.py"
        path.parent.mkdir(parents=True)
        path.write_text(sentence(i % 6) + "\n" * (i % 3))
    train, val = sides(str(tmp_path / "src"), tokenizer, path_header=path_header, seed=seed)
    assert len(train | val) == 6
    assert not train & val


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_dialogue_in_other_formats(tmp_path, monkeypatch, tokenizer, seed):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    pairs = [(sentence(i, 4), sentence(i + 1)) for i in range(8)]
    records = [
        *({"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs),
        *({"messages": [ASKED | {"content": a}, ANSWERED | {"content": b}]} for a, b in pairs),
        *({"instruction": a, "output": b} for a, b in pairs),
    ]
    write_jsonl(tmp_path / "a.jsonl", records)
    lines = "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + '\\n' }}{% endfor %}"
    train, val = sides(str(tmp_path / "a.jsonl"), tokenizer, seed=seed, chat_template=lines)
    assert len(train | val) == 8
    assert not train & val
