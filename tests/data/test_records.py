"""Records from every container: the same documents from all of them, and places in messages."""

from __future__ import annotations

import csv
import itertools
import json

import datasets
import pytest

from lightning_cl.data.text.formats import Chat, Completion, Text
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import is_text_source, read_documents, read_texts
from lightning_cl.data.text.sources import is_stream


def read(source, role="train", **settings):
    return list(read_documents(source, "t", role, **settings))


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# ---------------------------------------------------------------------- containers


def write(folder, suffix, records):
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif suffix == ".csv":
        names = list(dict.fromkeys(name for record in records for name in record))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for record in records:
                row = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items() if v is not None}
                writer.writerow(row)
    return path


class Stream:
    """An iterable of records that says which columns it has, and how far it was read."""

    def __init__(self, records, column_names):
        self.records, self.column_names, self.taken = records, column_names, 0

    def __iter__(self):
        for record in self.records:
            self.taken += 1
            yield record


def contained(kind, folder, records):
    if kind.startswith("."):
        return write(folder, kind, records)
    if kind == "folder":
        write(folder, ".jsonl", records).rename(folder / "train.jsonl")
        return str(folder)
    if kind == "glob":
        write(folder, ".parquet", records)
        return f"{folder}/*.parquet"
    return {
        "list": lambda: records,
        "dataset": lambda: datasets.Dataset.from_list(records),
        "iterable": lambda: datasets.Dataset.from_list(records).to_iterable_dataset(),
        "dict": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(records)),
        "stream": lambda: Stream(records, list(records[0])),
        "generator": lambda: (record for record in records),
    }[kind]()


CONTAINERS = [".jsonl", ".json", ".csv", ".parquet", "folder", "glob"]
CONTAINERS += ["list", "dataset", "iterable", "dict", "stream", "generator"]

UNICODE = [
    "Größe 10 µm\r\n\tfoo( x ) , bar .",
    "日本語 🐍🏽‍🔬 \u200b",
    'He said "no", twice\n\n',
    "e\u0301 \u2028 \u0085 x",
    "x" * 200_000,
]
RECORDS = {
    "text": ([{"text": text} for text in UNICODE], [Text(text) for text in UNICODE]),
    "prompt": (
        [{"prompt": text, "completion": text[::-1], "id": str(i)} for i, text in enumerate(UNICODE)],
        [Completion(text, text[::-1]) for text in UNICODE],
    ),
    "messages": (
        [{"messages": turns(text, "ok", "b", "")} for text in UNICODE],
        [Chat(tuple(turns(text, "ok", "b", ""))) for text in UNICODE],
    ),
    "optional": (
        [{"prompt": "a", "completion": "c", "tools": None}, {"prompt": "", "completion": "b", "tools": None}],
        [Completion("a", "c"), Completion("", "b")],
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("name", list(RECORDS))
def test_every_container_gives_the_same_documents(tmp_path, kind, name):
    records, documents = RECORDS[name]
    assert read(contained(kind, tmp_path, records)) == documents


BAD = [{"text": "fine"}, {"text": "  "}, {"text": "more"}, {"text": None}, {"text": "last"}]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (".jsonl", r"data\.jsonl', line 4"),
        (".json", r"data\.json', record 3"),
        (".parquet", r"data\.parquet', row 3"),
        ("folder", r"train\.jsonl', line 4"),
        ("list", ", item 3"),
        ("dataset", ", row 3"),
        ("iterable", ", row 3"),
        ("dict", ", row 3"),
        ("stream", ", row 3"),
        ("generator", ", row 3"),
    ],
)
def test_bad_record_is_named_by_its_place_or_skipped_and_counted(tmp_path, kind, place):
    with pytest.raises(ValueError, match=rf"^task 't', train.*{place}: .*'text' without a value"):
        read(contained(kind, tmp_path, BAD))
    tally = Tally("skip")
    assert read(contained(kind, tmp_path, BAD), tally=tally) == [Text("fine"), Text("more"), Text("last")]
    assert (tally.bad, tally.dropped, len(tally.reasons)) == (1, 1, 1)
    assert "3" in tally.reasons[0] or "4" in tally.reasons[0]


def test_only_the_first_reasons_are_kept():
    tally = Tally("skip")
    read([{"text": "fine"}, *[{"bad": i} for i in range(100)]], tally=tally)
    assert tally.bad == 100
    assert len(tally.reasons) == 5
    assert "item 1:" in tally.reasons[0]


def test_source_of_bad_records_alone_says_so():
    with pytest.raises(ValueError, match=r"no text in it; 2 bad records were skipped, the first: .*item 0"):
        read([{"bad": 1}, {"bad": 2}], tally=Tally("skip"))


def test_on_bad_record_is_one_of_two():
    with pytest.raises(ValueError, match='on_bad_record=\'ignore\': expected "error" or "skip"'):
        Tally("ignore")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b'\n{"text": "b"}\n', "line 2: not readable as JSON"),
        ("a.csv", b"text,id\na,1\nb,2,3\nb,4\n", "line 3: 3 fields under a header of 2"),
        ("a.csv", b'text,id\n"a",1\n"b"x,2\n"b",4\n', "line 3: not valid CSV"),
        ("a.csv", b'prompt,completion\n"a","x\ny"\n"b"\nb,x\n', "line 4: expected .*prompt"),
    ],
)
def test_unreadable_line_is_one_bad_record(tmp_path, name, content, place):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}', {place}"):
        read(tmp_path / name)
    tally = Tally("skip")
    assert [document.plain[0] for document in read(tmp_path / name, tally=tally)] == ["a", "b"]
    assert tally.bad == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "line 2: not valid JSON.*called .jsonl"),
        ("a.csv", b"id,name\n1,x\n", r"line 1: expected a header row.*\['id', 'name'\]"),
        ("a.csv", b"text\nna\xefve\n", "not UTF-8"),
        ("a.csv", b'text\n"open\nline\n', "line 2: not valid CSV"),
        ("a.parquet", b"PAR1 no table", "not a readable Parquet file"),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)task 't', train='.*{name}'.*{words}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '\ufeff{"text": "one"}\r\n\r\n{"text": "two"}\r\n  \n'),
        ("a.json", '\ufeff[{"text": "one"},\r\n {"text": "two"}]'),
        ("a.csv", '\ufefftext\r\none\r\n\r\n"two"\r\n'),
        ("a.csv", "id, text\n1,one\n2,two\n"),
    ],
)
def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == [Text("one"), Text("two")]


def test_text_file_without_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ufefftwo".encode())
    assert read(tmp_path / "a.txt") == [Text("one\n\ufefftwo")]


def test_pandas_writes_tables_that_can_be_read(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"messages": [turns("a", "b"), turns("c", "d")], "tools": [None, float("nan")]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    expected = [Chat(tuple(turns("a", "b"))), Chat(tuple(turns("c", "d")))]
    assert read(tmp_path / "a.csv") == expected
    assert read(tmp_path / "a.parquet") == expected
    assert read(pd.read_parquet(tmp_path / "a.parquet").to_dict("records")) == expected


def test_keys_that_a_table_fills_up_are_left_out(tmp_path):
    # One schema for all rows: a tool without a parameter would have one that is None.
    tools = [
        [{"name": "f", "parameters": {"a": {"type": "int"}}}],
        [{"name": "g", "parameters": {"b": {"type": "str"}}}],
    ]
    records = [{"messages": turns("a", "b"), "tools": tool} for tool in tools]
    for kind in (".parquet", "dataset", "iterable"):
        assert [list(chat.tools) for chat in read(contained(kind, tmp_path, records))] == tools
    streamed = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    assert [list(chat.tools) for chat in read(streamed)] == tools


def test_messages_that_datasets_writes_into_a_csv_file_say_what_to_do(tmp_path):
    datasets.Dataset.from_list([{"messages": turns("a", "b")}]).to_csv(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"a\.csv', line 2: messages: .*to_json or to_parquet"):
        read(tmp_path / "a.csv")


def test_tools_that_pandas_writes_into_a_csv_file(tmp_path):
    pd = pytest.importorskip("pandas")
    tools = [{"name": "f", "strict": True, "default": None}]
    pd.DataFrame([{"messages": turns("a", "b"), "tools": tools}]).to_csv(tmp_path / "a.csv", index=False)
    assert read(tmp_path / "a.csv") == [Chat(tuple(turns("a", "b")), tuple(tools))]


def test_plain_text_of_every_format():
    records = ["a", {"prompt": "b ", "completion": "c"}, {"messages": turns("d", "e")}]
    assert read_texts(records, "t", "train") == ["a", "b c", "d\ne"]


# ---------------------------------------------------------------------- streams


def test_endless_stream_is_read_as_it_comes():
    stream = Stream(({"text": str(i)} for i in itertools.count()), ["text"])
    documents = read_documents(stream, "t", "train")
    assert [next(documents).text for _ in range(3)] == ["0", "1", "2"]
    assert stream.taken == 3


def test_big_file_is_read_as_it_comes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nbroken')
    documents = read_documents(tmp_path / "a.jsonl", "t", "train")
    assert [next(documents).text, next(documents).text] == ["a", "b"]
    with pytest.raises(ValueError, match="line 3"):
        next(documents)


def test_what_is_a_stream_and_what_is_text():
    table = datasets.Dataset.from_dict({"text": ["a"]})
    other = datasets.Dataset.from_dict({"input_ids": [[1]]})

    def records():
        yield {"text": "a"}

    unknown = datasets.IterableDataset.from_generator(records)  # no columns known yet
    both = datasets.DatasetDict(train=table)
    cases = [
        (table, True, False),
        (table.to_iterable_dataset(), True, True),
        (unknown, True, True),
        (Stream([], ["messages"]), True, True),
        (Stream([], ["image"]), False, False),
        (other, False, False),
        (both, True, False),
        (datasets.DatasetDict(train=other), False, False),
        (["a"], True, False),
        ([{"input_ids": [1]}], False, False),
        ("a.txt", True, False),
        (None, False, False),
        ({"train": "a.txt"}, False, False),
    ]
    assert [(is_text_source(case), is_stream(case)) for case, _, _ in cases] == [(a, b) for _, a, b in cases]
    assert read(unknown) == [Text("a")]
