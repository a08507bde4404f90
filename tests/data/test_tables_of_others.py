"""Files as other programs write them: encodings, delimiters, names of columns, compression, and damaged files."""

from __future__ import annotations

import gzip
import json
import logging
import warnings

import datasets
import pytest

from lightning_cl import Task, TaskDataModule, TrainedBPE
from lightning_cl.data.text.formats import Chat, Completion
from lightning_cl.data.text.layout import Layout
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import read_documents
from lightning_cl.data.text.splitting import split_documents

ROWS = [("Was ist größer?", 'Ä, sagte er; "ja"'), ("zwei\nZeilen", "日本")]
EXPECTED = [Completion(*row) for row in ROWS]


def read(source, tally=None, layout=None):
    return list(read_documents(str(source), "t", "train", tally, layout=layout or Layout()))


def table(delimiter=",", header=("prompt", "completion"), rows=ROWS):
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    return "\r\n".join([delimiter.join(header), *(delimiter.join(row) for row in quoted), ""])


def write(path, text, encoding="utf-8"):
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".csv.gz", "\t")])
def test_tables_as_spreadsheets_write_them(tmp_path, encoding, suffix, delimiter):
    mark = "\ufeff" if encoding.endswith("be") else ""
    assert read(write(tmp_path / f"t{suffix}", mark + table(delimiter), encoding)) == EXPECTED


def test_the_line_in_which_excel_names_the_delimiter_is_no_header(tmp_path):
    assert read(write(tmp_path / "t.csv", "sep=;\r\n" + table(";"))) == EXPECTED


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt", "t.json"])
def test_another_encoding_is_named(tmp_path, name):
    record = '{"text": "größer"}'
    texts = {"t.csv": table(rows=[("größer", "b")]), "t.txt": "größer", "t.json": f"[{record}]", "t.jsonl": record}
    write(tmp_path / name, texts[name], "cp1252")
    with pytest.raises(ValueError, match=rf"{name}.*not UTF-8.*Windows-1252.*'ö'.*UTF-8"):
        read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_records_on_lines_under_any_name(tmp_path, name, encoding):
    lines = "\n  \r\n".join(json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in ROWS)
    assert read(write(tmp_path / name, lines, encoding)) == EXPECTED  # blank lines say nothing


def test_text_and_parquet_can_be_compressed(tmp_path):
    assert [document.text for document in read(write(tmp_path / "a.txt.gz", "ä\r\nb"))] == ["ä\nb"]
    plain = tmp_path / "b.parquet"
    datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in ROWS]).to_parquet(str(plain))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read(tmp_path / "a.parquet.gz") == EXPECTED


def test_a_folder_of_compressed_splits(tmp_path):
    for role, row in zip(("train", "valid"), ROWS, strict=True):
        write(tmp_path / f"{role}.jsonl.gz", json.dumps({"prompt": row[0], "completion": row[1]}))
    assert read(tmp_path) == EXPECTED[:1]
    assert list(read_documents(str(tmp_path), "t", "val")) == EXPECTED[1:]


# ---------------------------------------------------------------------- names

NAMED = Layout.of({"prompt": "Question", "completion": "Answer", "system": "Role"}, None)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json", ".parquet", "list", "dataset", "dict", "stream"])
def test_columns_of_other_names(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    records = [{"Question": p, "Answer": c, "Role": "Be kind.", "prompt": "an id"} for p, c in ROWS]
    whole, path = datasets.Dataset.from_list(records), tmp_path / f"a{kind}"
    if kind == ".csv":
        write(path, table(header=("Question", "Answer", "Role"), rows=[(*row, "Be kind.") for row in ROWS]))
    elif kind == ".jsonl":
        write(path, "\n".join(map(json.dumps, records)))
    elif kind == ".json":
        write(path, json.dumps(records))
    elif kind == ".parquet":
        whole.to_parquet(str(path))
    source = {"list": records, "dataset": whole, "dict": datasets.DatasetDict(train=whole)}.get(kind, str(path))
    source = whole.to_iterable_dataset() if kind == "stream" else source
    if kind.startswith("."):
        assert read(source, layout=NAMED) == [Completion(p, c, "Be kind.") for p, c in ROWS]
    tokenizer = TrainedBPE(300, str(tmp_path)).train(["the cat"])
    task = Task("a", source, val=[{"Question": "a", "Answer": "b"}], columns=dict(NAMED.columns))
    data = TaskDataModule([task], tokenizer, 128)
    data.setup()
    train = data._prepared["a"].train
    first = next(iter(train(0))) if kind == "stream" else train[0]
    assert tokenizer.decode(first["input_ids"]).startswith("Be kind.\n\nWas ist größer?")


@pytest.mark.parametrize("header", [("Prompt", "COMPLETION"), (" prompt ", "Completion")])
def test_the_case_of_a_header_does_not_matter(tmp_path, header):
    assert read(write(tmp_path / "a.csv", table(header=header))) == EXPECTED
    lines = "\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in ROWS)
    assert read(write(tmp_path / "a.jsonl", lines)) == EXPECTED


def test_a_header_that_says_nothing_is_answered_by_names_and_the_way_to_give_others(tmp_path):
    path = write(tmp_path / "a.csv", "Question,Answer\na,b\n")
    with pytest.raises(ValueError, match=r"a\.csv.*line 1.*prompt.*completion.*'Question', 'Answer'.*columns="):
        read(path)
    with pytest.raises(ValueError, match=r"columns: there is no 'Frage'; the columns are \['Question', 'Answer'\]"):
        read(path, layout=Layout.of({"prompt": "Frage"}, None))
    with pytest.raises(ValueError, match="columns: 'question' is no name"):
        TaskDataModule({"a": {"train": str(path), "columns": {"question": "Question"}}}, TrainedBPE(300))


def test_records_under_a_key(tmp_path):
    records = [{"prompt": p, "completion": c} for p, c in ROWS]
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": {"train": records}, "more": [1]}))
    assert read(path, layout=Layout.of(None, "data.train")) == EXPECTED
    with pytest.raises(ValueError, match=r"a list of records.*give field='more'"):
        read(path)
    with pytest.raises(ValueError, match=r"field='data.test': there is no 'test' in it, but \['train'\]"):
        read(path, layout=Layout.of(None, "data.test"))


def test_speakers_in_any_case(tmp_path):
    turns = [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}, {"from": " user", "value": "c"}]
    (chat,) = read(write(tmp_path / "a.jsonl", json.dumps({"conversations": turns})))
    assert isinstance(chat, Chat)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user"]


# ---------------------------------------------------------------------- nulls

SCHEMA = {"name": "x", "parameters": {"properties": {"a": {"type": "string", "default": None, "enum": ["b", None]}}}}


@pytest.mark.parametrize("kind", ["jsonl", "load_dataset", "json column", "stream"])
def test_nulls_in_schemas_of_tools_survive(tmp_path, kind):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = {"name": "y", "parameters": {"properties": {"c": {"type": "integer", "minimum": 0}}}}
    records = [{"messages": messages, "tools": [schema]} for schema in (SCHEMA, other)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    if kind == "jsonl":
        documents = read(path)
    else:
        streaming, cache = kind == "stream", str(tmp_path / "cache")
        data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache, streaming=streaming)
        if kind == "json column":
            data = datasets.Dataset.from_list([record | {"tools": json.dumps(record["tools"])} for record in records])
        documents = list(read_documents(data, "t", "train"))
    assert [list(document.tools) for document in documents] == [[SCHEMA], [other]]


# ---------------------------------------------------------------------- splits and folders


def test_one_long_record_does_not_have_all_others_held_out():
    documents = [f"{i:04} " + "x" * 40 for i in range(1000)] + ["y" * 5_000_000]
    for seed in range(5):
        train, val = split_documents(documents, 0.05, seed)
        assert 40 <= len(val) <= 60
        assert len(train) + len(val) == 1001


def test_a_split_that_leaves_less_than_a_batch_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    tokenizer = TrainedBPE(300, str(tmp_path)).train(["the cat"])
    data = TaskDataModule({"a": [f"text {i}" for i in range(9)]}, tokenizer, 32, val_fraction=0.25)
    with pytest.warns(UserWarning, match=r"task 'a': 2 of 9 records are held out.*7 samples.*less than a batch of 8"):
        data.setup()
    assert any("held out for validation: 2 of 9 records, 22.2%" in line for line in data.describe(data.tasks[0]))


@pytest.mark.parametrize(("long", "said"), [(0, None), (3, logging.INFO), (12, logging.WARNING)])
def test_a_split_far_from_what_was_asked_for_is_said(tmp_path, monkeypatch, caplog, long, said):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    tokenizer = TrainedBPE(300, str(tmp_path)).train(["the cat"])
    # A few texts are so long that they are not held out: many short ones are, for as many characters.
    texts = [f"{i:03} " + "x " * (4000 if i < long else 40) for i in range(200)]
    data = TaskDataModule({"a": texts}, tokenizer, 32, batch_size=2, val_fraction=0.02, seed=1)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        data.setup()
    tally, words = data._prepared["a"].train.tally, "their lengths differ"
    found = logging.WARNING if any(words in str(warning.message) for warning in caught) else None
    found = logging.INFO if any(words in message for message in caplog.messages) else found
    assert found == said, tally.held_out


def test_data_that_a_folder_passes_over_is_counted(tmp_path):
    write(tmp_path / "train.jsonl", json.dumps({"text": "a"}))
    for name in ("more.pdf", "other.PDF", "table.xlsx", "README.md", "image.png"):
        write(tmp_path / name, "x")
    tally = Tally()
    assert len(read(tmp_path, tally)) == 1
    assert tally.left_out == {"files of the folder ending in .pdf": 2, "files of the folder ending in .xlsx": 1}


# ---------------------------------------------------------------------- damage and malice


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.gz", "a.txt.gz"])
def test_a_damaged_archive_is_named(tmp_path, name):
    content = gzip.compress("\n".join(json.dumps({"text": f"text {i}"}) for i in range(500)).encode())
    for damaged in (content[: len(content) // 2], b"no gzip", content[:200] + b"\0\1\2" + content[203:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"text": f"text {i}"} for i in range(500)]).to_parquet(str(path))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:40] + bytes(60) + content[100:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet"):
            read(path)


@pytest.mark.parametrize("wrong", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"a":' * 50_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_no_parser_takes_is_an_error_also_where_records_are_skipped(tmp_path, name, wrong):
    good = json.dumps({"text": "good"})
    write(tmp_path / name, f"{good}\n{wrong}\n" if name == "a.jsonl" else f"[{good},{wrong}]")
    with pytest.raises(ValueError, match=rf"{name}'.*(not readable as|not valid) JSON"):
        read(tmp_path / name)
    if name == "a.jsonl":
        tally = Tally("skip")
        assert len(read(tmp_path / name, tally)) == 1
        assert tally.bad == 1


def test_records_nested_too_deeply_are_named():
    deep = "x"
    for _ in range(3000):
        deep = [deep]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"item 0: .*nested too deeply"):
        list(read_documents([{"messages": turns, "tools": [{"x": deep}]}], "t", "train"))


def test_a_name_that_no_file_can_have_is_an_error():
    with pytest.raises(ValueError, match="a name of 300 characters"):
        Task("x" * 300, ["a"])
    Task("日本" * 20, ["a"])
