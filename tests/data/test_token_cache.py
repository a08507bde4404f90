"""The cache of tokenised data: read again when nothing has changed, made anew when anything has, never in the way."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import warnings

import datasets
import pytest
import torch
from stand_in import CHATML, chats, save_stand_in, sentence, write_jsonl

from lightning_cl import TaskDataModule
from lightning_cl.data.text import text_tasks
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.sources import content_key
from lightning_cl.data.text.token_cache import cached
from lightning_cl.data.text.tokenizer import fingerprint, load_tokenizer

NAMES = ("ids", "loss_mask", "ends")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """A list that grows by one with each call of the encoder."""
    calls, real = [], text_tasks.encode

    def counting(documents, *arguments, **settings):
        calls.append(1)
        return real(documents, *arguments, **settings)

    monkeypatch.setattr(text_tasks, "encode", counting)
    return calls


def set_up(source, tokenizer, **settings):
    data = TaskDataModule({"a": source}, tokenizer=tokenizer, **{"max_length": 64, "val_fraction": 0.3} | settings)
    data.setup()
    return data


def parts(data):
    """Training and validation data, copied out of what may be mapped from a file."""
    made = data._prepared["a"]
    return {
        f"{role}.{name}": tensor.clone()
        for role in ("train", "val")
        if getattr(made, role) is not None
        for name, tensor in getattr(made, role).tensors.items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def mails(tmp_path):
    path = tmp_path / "mails.jsonl"
    write_jsonl(path, [{"text": sentence(i)} for i in range(12)] + chats(4))
    return path


# ---------------------------------------------------------------------- read again


def test_second_setup_reads_and_gives_equal_tensors(mails, tokenizer, folder, encoded):
    first = parts(set_up(mails, tokenizer))
    assert len(encoded) == 2  # what is trained on, what is held out
    second = parts(set_up(str(mails), folder))  # a tokenizer of the same content, loaded anew
    assert len(encoded) == 2
    assert_equal(first, second)
    assert all(len(first[f"{role}.ids"]) > 0 for role in ("train", "val"))


def test_what_was_read_cannot_be_told_from_what_was_made(mails, tokenizer):
    made, read = (set_up(mails, tokenizer)._prepared["a"].train for _ in range(2))
    for name in NAMES:
        assert made.tensors[name].dtype == read.tensors[name].dtype
    assert [made.loss_tokens(i) for i in range(len(made))] == [read.loss_tokens(i) for i in range(len(read))]
    assert torch.equal(made[1]["input_ids"], read[1]["input_ids"])


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"packing": True}, {"length_buckets": False}])
def test_settings_of_the_batches_do_not_matter(mails, tokenizer, encoded, settings):
    set_up(mails, tokenizer)
    set_up(mails, tokenizer, **settings)
    assert len(encoded) == 2


def test_content_counts_not_the_place(mails, tokenizer, encoded, tmp_path):
    first = parts(set_up(mails, tokenizer))
    moved = tmp_path / "elsewhere" / mails.name
    moved.parent.mkdir()
    mails.rename(moved)
    assert_equal(first, parts(set_up(moved, tokenizer)))
    assert len(encoded) == 2
    # A name is part of the content: with path_header it is in the text.
    set_up(moved.rename(moved.with_name("other.jsonl")), tokenizer)
    assert len(encoded) == 4


def test_a_list_and_a_table_are_kept_too(tokenizer, encoded):
    texts = [sentence(i) for i in range(12)]
    for source in (texts, lambda: datasets.Dataset.from_dict({"text": texts})):
        before = len(encoded)
        for _ in range(2):
            set_up(source() if callable(source) else list(source), tokenizer)
        assert len(encoded) == before + 2


# ---------------------------------------------------------------------- made anew


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({"max_length": 63}, 2),
        ({"val_fraction": 0.2}, 2),
        ({"seed": 1}, 2),
        ({"on_bad_record": "skip"}, 2),
        ({"path_header": True}, 2),
        ({"chat_template": CHATML + " "}, 2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_decides_about_samples(mails, tokenizer, encoded, change, calls):
    set_up(mails, tokenizer)
    set_up(mails, tokenizer, **change)
    assert len(encoded) == 2 + calls
    set_up(mails, tokenizer)  # the old one is still there
    assert len(encoded) == 2 + calls


def test_one_byte_in_a_file_of_the_same_size_and_time(mails, tokenizer, encoded):
    first, stat = parts(set_up(mails, tokenizer)), mails.stat()
    content = mails.read_bytes()
    mails.write_bytes(content.replace(b"quick", b"quack", 1))
    os.utime(mails, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = parts(set_up(mails, tokenizer))
    assert len(encoded) == 4
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def sources(tmp_path):
    place = tmp_path / "project"
    (place / "sub").mkdir(parents=True)
    for i in range(6):
        (place / "sub" / f"module{i}.py").write_text(f"def f{i}(): return '{sentence(i)}'\n")
    return place


def test_a_file_more_in_a_folder(sources, tokenizer, encoded):
    set_up(sources, tokenizer)
    set_up(sources, tokenizer)
    assert len(encoded) == 2
    (sources / "more.py").write_text("more = 1\n")
    set_up(sources, tokenizer)
    assert len(encoded) == 4
    (sources / "more.py").unlink()
    set_up(sources, tokenizer)
    assert len(encoded) == 4


def test_a_file_renamed_in_a_folder_and_two_that_swap_names(sources, tokenizer, encoded):
    keys = {content_key(sources)}
    one, two = sources / "sub" / "module1.py", sources / "sub" / "module2.py"
    one.rename(sources / "x.py")
    keys.add(content_key(sources))
    two.rename(one)
    (sources / "x.py").rename(two)
    keys.add(content_key(sources))
    assert len(keys) == 3


def test_a_folder_of_splits_asks_each_file_by_itself(tmp_path, tokenizer, encoded):
    place = tmp_path / "splits"
    for i, split in enumerate(("train", "valid", "test")):
        write_jsonl(place / f"{split}.jsonl", [{"text": sentence(10 * i + j)} for j in range(4)])
    set_up(place, tokenizer)
    assert len(encoded) == 3
    write_jsonl(place / "valid.jsonl", [{"text": sentence(50)}])
    data = set_up(place, tokenizer)
    assert len(encoded) == 4
    assert len(data._prepared["a"].val) == 1


def other_merges(tokenizer):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    other = copy.deepcopy(tokenizer)
    other._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(content))
    return other


def more_special_tokens(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    return other


def other_end(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|im_start|>"
    return other


@pytest.mark.parametrize("change", [other_merges, more_special_tokens, other_end])
def test_another_tokenizer(mails, tokenizer, encoded, change):
    set_up(mails, tokenizer)
    set_up(mails, change(tokenizer))
    assert len(encoded) == 4


def test_a_template_that_the_users_tokenizer_got_since(mails, tokenizer, encoded):
    set_up(mails, tokenizer)
    tokenizer.chat_template = CHATML.replace("user", "User") + "\n"
    set_up(mails, tokenizer)
    assert len(encoded) == 4


@pytest.mark.parametrize("how", ["padding", "truncation"])
def test_what_a_call_leaves_in_the_tokenizer_does_not_matter(mails, tokenizer, encoded, how):
    """``tokenizer(…, padding=True)`` and a ``tokenizer.json`` with a truncation are of no effect here."""
    first = set_up(mails, tokenizer)
    before = fingerprint(tokenizer)
    settings = {"padding": True} if how == "padding" else {"truncation": True, "max_length": 5}
    tokenizer(["some text", "of somebody"], **settings)
    assert fingerprint(tokenizer) == before  # a resume compares it too
    assert_equal(parts(first), parts(set_up(mails, tokenizer)))
    assert len(encoded) == 2


# ---------------------------------------------------------------------- what cannot be kept


def test_a_stream_is_not_kept(tokenizer, cache):
    stream = datasets.Dataset.from_dict({"text": [sentence(i) for i in range(4)]}).to_iterable_dataset()
    data = set_up(stream, tokenizer)
    assert len(list(data.train_loader(data.current))) == 1
    assert not list(cache.rglob("*.safetensors"))


def test_a_list_that_nobody_can_hash_is_made_each_time(tokenizer, encoded, cache):
    records = [{"text": sentence(i), "when": {1, 2}} for i in range(12)]
    one, other = (parts(set_up(records, tokenizer)) for _ in range(2))
    assert len(encoded) == 4
    assert not list(cache.rglob("*.safetensors"))
    assert_equal(one, other)


# ---------------------------------------------------------------------- files


def only_file(cache, kind="*.safetensors"):
    (path,) = cache.rglob(kind)
    return path


KEY = {"content": "x"}


def make_small():
    tally = Tally("skip", bad=2, dropped=3, truncated=4, reasons=["line 7: é"])
    samples = [(torch.arange(i, i + 5, dtype=torch.int32), torch.arange(5) > i) for i in range(3)]
    return TokenDataset.from_samples(samples, tally)


def counts(data):
    return data.tally.bad, data.tally.dropped, data.tally.truncated, data.tally.reasons


def test_counts_survive():
    made, read = cached(KEY, make_small), cached(KEY, lambda: pytest.fail("it is there"))
    assert counts(made) == counts(read) == (2, 3, 4, ["line 7: é"])
    assert_equal(made.tensors, read.tensors)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_a_cut_file_is_made_again_with_a_warning(cache, kept):
    made = cached(KEY, make_small)
    path = only_file(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.warns(UserWarning, match=f"{path.name}.*damaged.*made again"):
        again = cached(KEY, make_small)
    assert_equal(made.tensors, again.tensors)
    assert path.stat().st_size == len(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(KEY, lambda: pytest.fail("it is whole again"))


@pytest.mark.parametrize("content", [b"not safetensors at all", b"\0" * 4096, b"\xff" * 64])
def test_another_file_in_its_place_is_made_again_with_a_warning(cache, content):
    cached(KEY, make_small)
    only_file(cache).write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert counts(cached(KEY, make_small))[0] == 2


def test_tensors_that_do_not_fit_each_other_are_made_again(cache):
    from safetensors import safe_open
    from safetensors.torch import save_file

    made = cached(KEY, make_small)
    path = only_file(cache)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    save_file({**made.tensors, "ends": made.ends + 1}, path, metadata=meta)
    with pytest.warns(UserWarning, match="damaged"):
        assert_equal(cached(KEY, make_small).tensors, made.tensors)


def test_metadata_without_the_counts_is_made_again(cache):
    from safetensors import safe_open
    from safetensors.torch import save_file

    made = cached(KEY, make_small)
    path = only_file(cache)
    with safe_open(path, framework="pt") as file:
        key = file.metadata()["key"]
    save_file(made.tensors, path, metadata={"key": key})
    with pytest.warns(UserWarning, match="damaged"):
        assert counts(cached(KEY, make_small)) == counts(made)


def test_a_folder_that_cannot_be_written_only_warns(tmp_path, monkeypatch, mails, tokenizer):
    (tmp_path / "file").write_text("a file where the folder would be: even an administrator cannot write below it")
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be kept there .*made anew in each run"):
        data = set_up(mails, tokenizer)
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "good"))
    assert_equal(parts(data), parts(set_up(mails, tokenizer)))


def test_a_full_disk_only_warns_and_leaves_nothing_behind(cache, monkeypatch):
    from lightning_cl.data.text import token_cache

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "save_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert counts(cached(KEY, make_small))[0] == 2
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_full_disk_as_safetensors_tells_it(cache, monkeypatch):
    """Its own writing raises its own error."""
    from safetensors import SafetensorError

    from lightning_cl.data.text import token_cache

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(token_cache, "save_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert counts(cached(KEY, make_small))[0] == 2


def _process(barrier, queue):
    for round_ in range(20):
        barrier.wait(30)
        data = cached({"content": round_}, make_small)
        queue.put((round_, data.ids.tolist(), data.loss_mask.tolist(), list(counts(data))))


def test_several_processes_at_once(cache):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_process, args=(barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in range(60)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    made = make_small()
    expected = (made.ids.tolist(), made.loss_mask.tolist(), list(counts(made)))
    assert all(result[1:] == expected for result in found)
    assert len(list(cache.rglob("*"))) == 1 + 20  # the folder and one file for each: no temporary ones
