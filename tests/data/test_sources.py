"""Where data is: folders of splits, folders of source files, globs, names on the hub; and whether it changed."""

from __future__ import annotations

import json
import os
import warnings

import datasets
import pytest

from lightning_cl.data.text.formats import Text
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import check_text_source, is_text_source, read_documents
from lightning_cl.data.text.sources import content_key, resolve_splits


def read(source, role="train", **settings):
    return list(read_documents(source, "t", role, **settings))


def write(path, text):
    """One record with that text."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(path)
    else:
        record = json.dumps({"text": text})
        contents = {".txt": text, ".csv": f"text\n{text}\n", ".json": f"[{record}]", ".jsonl": record}
        path.write_text(contents[path.suffix])


class Stream:
    column_names = ("text",)

    def __iter__(self):
        yield {"text": "a"}


# ---------------------------------------------------------------------- folders of splits


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "valid.jsonl", "test.jsonl"),  # mlx-lm
        ("train.json", "eval.json", "test.json"),  # TRACE
        ("train.csv", "dev.csv", None),
        ("train.parquet", "validation.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", None),  # the hub
        ("train.txt", None, "test.txt"),
    ],
)
def test_folder_of_splits_supplies_all_roles(tmp_path, names):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "notes.py").write_text("not = 'data'")
    for role, name in zip(("train", "val", "test"), names, strict=True):
        if name is not None:
            write(tmp_path / name, role)
    splits = resolve_splits(str(tmp_path))
    for role, name in zip(("train", "val", "test"), names, strict=True):
        if name is None:
            assert splits[role] is None
            with pytest.raises(ValueError, match=rf"task 't', {role}: there is no data for {role}.*train"):
                read(tmp_path, role)
        else:
            assert read(splits[role], role) == read(tmp_path, role) == [Text(role)]


def test_shards_are_read_in_order(tmp_path):
    for i in range(11):
        write(tmp_path / f"train-{i:05}-of-00011.parquet", str(i))
    assert [document.text for document in read(tmp_path)] == [str(i) for i in range(11)]


def test_two_files_for_one_role_are_an_error(tmp_path):
    for name in ("train.jsonl", "train.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=r"task 't', train=.*two files for train.*train\.json.*train\.jsonl"):
        check_text_source(tmp_path, "t", "train")


def test_empty_split_is_found_before_training(tmp_path):
    write(tmp_path / "train.jsonl", "a")
    (tmp_path / "valid.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"valid\.jsonl.*empty"):
        check_text_source(tmp_path, "t", "train")


def test_dataset_dict_supplies_all_roles():
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation", "test", "extra")}
    splits = resolve_splits(datasets.DatasetDict(parts))
    assert splits == {"train": parts["train"], "val": parts["validation"], "test": parts["test"]}
    assert read(datasets.DatasetDict(parts), "val") == [Text("validation")]


def test_splits_without_training_data_are_an_error(tmp_path):
    write(tmp_path / "test.jsonl", "a")
    with pytest.raises(ValueError, match=rf"{tmp_path.name}'.*no split to train on.*train or training"):
        resolve_splits(tmp_path)
    assert read(tmp_path, "test") == [Text("a")]  # a task that is only watched
    with pytest.raises(ValueError, match=r"the splits \['extra'\].*no split to train on"):
        resolve_splits(datasets.DatasetDict(extra=datasets.Dataset.from_dict({"text": ["a"]})))


@pytest.mark.parametrize("source", [["a"], "sample:prose", "a.jsonl", None])
def test_other_sources_are_training_data_alone(source):
    assert resolve_splits(source) == {"train": source, "val": None, "test": None}


def test_folder_of_record_files_is_read_as_records(tmp_path):
    (tmp_path / "README.md").write_text("about")
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", name)
    assert read(tmp_path) == [Text("a"), Text("b")]
    assert resolve_splits(tmp_path) == {"train": tmp_path, "val": None, "test": None}


def test_suffixes_in_upper_case_are_the_same(tmp_path):
    for name in ("a.JSONL", "b.jsonl", "c.Csv"):
        write(tmp_path / name.lower(), name)
        (tmp_path / name.lower()).rename(tmp_path / name)
    expected = [Text("a.JSONL"), Text("b.jsonl"), Text("c.Csv")]
    assert read(tmp_path) == read(f"{tmp_path}/*") == expected
    assert read(tmp_path / "a.JSONL") == expected[:1]
    (tmp_path / "b.jsonl").rename(tmp_path / "TRAIN.JSONL")
    assert resolve_splits(tmp_path)["train"] == str(tmp_path / "TRAIN.JSONL")


# ---------------------------------------------------------------------- files of two kinds


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("pattern", ["", "/*", "/**/*"])
@pytest.mark.parametrize("below", ["", "sub/"])
def test_text_and_records_together_are_an_error(tmp_path, suffix, pattern, below):
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    write(tmp_path / f"{below}chat{suffix}", "a")
    if below and pattern == "/*":
        assert read(f"{tmp_path}/*") == [Text("notes")]
        return
    with pytest.raises(ValueError, match=r"task 't', train=") as error:
        check_text_source(f"{tmp_path}{pattern}", "t", "train")
    words = [f"chat{suffix}", "notes.txt", "two tasks", f"{tmp_path}/**/*{suffix}'", f"{tmp_path}/**/*.txt'"]
    assert all(word in str(error.value) for word in words), str(error.value)
    # What the message says does it.
    assert read(f"{tmp_path}/**/*{suffix}") == [Text("a")]
    assert read(f"{tmp_path}/**/*.txt") == [Text("notes")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("package.json", '{"name": "x"}'),
        ("list.json", "[1, 2]"),
        ("others.json", '[{"id": 1}]'),
        ("empty.json", ""),
        ("table.csv", "id,name\n1,2\n"),
        ("log.jsonl", '{"time": 1}\n'),
        ("not.parquet", "PAR"),
    ],
)
def test_configurations_and_tables_among_sources_are_no_records(tmp_path, name, content):
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / name).write_text(content)
    assert read(tmp_path) == [Text("a = 1")]


def test_broken_records_among_sources_are_not_passed_over(tmp_path):
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "chat.jsonl").write_text('{"text": "a\n')
    with pytest.raises(ValueError, match=r"chat\.jsonl.*a\.py.*mixed"):
        check_text_source(tmp_path, "t", "train")


@pytest.mark.parametrize("direct", [True, False])
def test_records_in_a_folder_below_are_not_passed_over(tmp_path, direct):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/b.jsonl", "b")
    if direct:
        write(tmp_path / "a.jsonl", "a")
    with pytest.raises(ValueError, match=r"task 't', train=.*sub/b\.jsonl.*'.*/\*\*/\*\.jsonl'"):
        check_text_source(tmp_path, "t", "train")
    assert read(f"{tmp_path}/**/*.jsonl") == [Text("a"), Text("b")][not direct :]


def test_records_beside_splits_are_warned_about(tmp_path):
    write(tmp_path / "train.jsonl", "a")
    (tmp_path / "dataset_infos.json").write_text('[{"text": "no"}]')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_text_source(tmp_path, "t", "train")
    write(tmp_path / "more.jsonl", "b")
    with pytest.warns(UserWarning, match=r"task 't', train=.*only .*train\.jsonl are read; .*more\.jsonl"):
        assert read(tmp_path) == [Text("a")]


# ---------------------------------------------------------------------- folders of source files


@pytest.fixture
def project(tmp_path):
    files = {
        "src/b.py": "b = 1\r\n",
        "src/a/z.cpp": "int z;\n",
        "src/a.py": "größe = 1\n",
        "src/NOTES.MD": "notes\n",
        "src/empty.py": "",
        "src/data.json": "{}",
        "src/picture.png": b"\x89PNG\x00",
        "src/latin.py": "größe = 1".encode("latin-1"),
        "src/zero.py": "a\0b",
        "src/a.min.js": "x",
        "src/.hidden.py": "hidden",
        "src/.git/config.py": "hidden",
        "src/__pycache__/a.py": "junk",
        "src/node_modules/x/a.js": "junk",
        "src/.venv/a.py": "junk",
        "src/build/a.py": "junk",
        "src/x.egg-info/a.txt": "junk",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


SOURCES = {"NOTES.MD": "notes\n", "a.py": "größe = 1\n", "a/z.cpp": "int z;\n", "b.py": "b = 1\n"}


def test_folder_is_one_document_a_file_sorted_by_path(project):
    tally = Tally()
    assert read(project / "src", tally=tally) == [Text(text) for text in SOURCES.values()]
    assert tally.dropped == 1  # the empty file


def test_documents_start_with_their_path_if_asked_for(project):
    expected = [f"# file: {name}\n{text}" for name, text in SOURCES.items()]
    found = [document.plain for document in read(f"{project}/src/", path_header=True)]
    assert [text for text in found if "empty.py" not in text] == expected


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("src/**/*.py", ["src/a.py", "src/b.py"]),
        ("src/*.py", ["src/a.py", "src/b.py"]),
        ("src/**/*.[ch]pp", ["src/a/z.cpp"]),
        ("*/a/*", ["src/a/z.cpp"]),
        ("src/**/*.json", None),
    ],
)
def test_glob_is_one_document_a_file(project, monkeypatch, pattern, names):
    monkeypatch.chdir(project)
    if names is None:  # files of records: {} is none
        with pytest.raises(ValueError, match=r"src/data\.json.*list of records"):
            read(pattern)
        return
    fixed = "src/" if pattern.startswith("src") else ""
    expected = [f"# file: {name.removeprefix(fixed)}\n" for name in names]
    for found in (pattern, f"{project}/{pattern}"):
        texts = [document.plain for document in read(found, path_header=True)]
        assert [text[: text.index("\n") + 1] for text in texts if "empty.py" not in text] == expected


def test_name_with_brackets_that_exists_is_no_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert read(tmp_path / "a[1].txt") == [Text("one")]


def test_glob_without_files_says_where_it_looked(project):
    with pytest.raises(ValueError, match=rf"\*\.rs'.*no file matches.*{project.name}/src"):
        check_text_source(f"{project}/src/*.rs", "t", "train")


def test_folder_without_anything_usable_says_what_is_expected(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"task 't', val=.*folder.*train, valid and test.*\.jsonl.*source code"):
        check_text_source(tmp_path, "t", "val")


def test_single_source_file_says_how_to_read_it(project):
    with pytest.raises(ValueError, match=r"a\.py'.*\.jsonl.*glob"):
        check_text_source(project / "src/a.py", "t", "train")


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    calls = []

    def load(name, config=None):
        calls.append((name, config))
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} is not there")
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"text": ["a"]}), test=datasets.Dataset.from_dict({"text": ["b"]})
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(("source", "config"), [("owner/name", None), ("owner/name:main-1", "main-1")])
def test_name_on_the_hub_supplies_its_splits(hub, source, config):
    assert is_text_source(source)
    check_text_source(source, "t", "train")
    assert hub == []  # nothing is loaded before the data is needed
    splits = resolve_splits(source)
    assert hub == [("owner/name", config)]
    assert splits["val"] is None
    assert read(splits["train"]) == read(source) == [Text("a")]
    assert read(splits["test"], "test") == [Text("b")]
    with pytest.raises(ValueError, match="no data for val in it; there is some for train, test"):
        read(source, "val")


def test_path_that_exists_is_not_looked_up(hub, tmp_path):
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/a.py").write_text("local")
    assert read("owner/name") == [Text("local")]
    assert hub == []


@pytest.mark.parametrize(
    "source", ["owner/name.jsonl", "owner/name.py", "a/b/c", "name", "/owner/name", "owner/", "./a"]
)
def test_other_forms_are_missing_files(hub, source):
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_text_source(source, "t", "train")
    assert hub == []


def test_name_that_is_neither_file_nor_on_the_hub(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"task 't', train='data/chat': no such file.*{tmp_path}.*not there"):
        read("data/chat")


# ---------------------------------------------------------------------- keys of what was computed


def test_key_depends_on_content_and_relative_names(project, tmp_path):
    key = content_key(project / "src")
    assert len(key) == 64
    assert key == content_key(f"{project}/src/")
    assert key != content_key(project / "src", path_header=True)
    (project / "src").rename(project / "moved")
    assert key == content_key(project / "moved")
    os.utime(project / "moved/b.py", (1, 1))
    assert key == content_key(project / "moved")
    (project / "moved/b.py").write_text("b = 2\n")
    changed = content_key(project / "moved")
    assert changed != key
    (project / "moved/b.py").rename(project / "moved/c.py")
    assert content_key(project / "moved") not in (key, changed)


def test_key_of_a_folder_of_splits_is_that_of_the_role(tmp_path):
    for name in ("train", "valid"):
        write(tmp_path / f"{name}.jsonl", name)
    train, val = (content_key(tmp_path, role=role) for role in ("train", "val"))
    assert train == content_key(tmp_path / "train.jsonl")
    assert val == content_key(tmp_path / "valid.jsonl") != train
    (tmp_path / "valid.jsonl").write_text('{"text": "other"}')
    assert content_key(tmp_path, role="train") == train
    assert content_key(tmp_path, role="val") != val
    assert content_key(tmp_path, role="test") is None


def test_key_of_lists_and_tables():
    table = datasets.Dataset.from_dict({"text": ["a", "b"]})
    sources = [["a", "b"], ["ab"], ["b", "a"], [{"text": "a"}], table, table.select([1, 0]), "sample:prose"]
    keys = [content_key(source) for source in sources]
    assert len(set(keys)) == len(keys)
    assert None not in keys
    assert keys == [content_key(source) for source in sources]
    assert content_key([{"text": object()}]) is None
    assert content_key(Stream()) is None
    assert content_key(table.to_iterable_dataset()) is None
    assert content_key(datasets.DatasetDict(train=table)) == content_key(table)
