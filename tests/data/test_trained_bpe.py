"""A vocabulary of our own: byte level, trained once, on the first task alone."""

from __future__ import annotations

import json
import os
import random

import pytest

from lightning_cl.data import TaskDataModule, TrainedBPE
from lightning_cl.data.text.tokenizer import fingerprint, load_tokenizer

TEXTS = [f"The number {i} and {i * i} are written as {i:b}. Nothing else is said of them." for i in range(200)]


def test_any_text_survives(tmp_path):
    tokenizer = TrainedBPE(300, str(tmp_path)).train(TEXTS)
    rng = random.Random(0)
    for _ in range(50):
        points = (
            rng.choice([rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(40)
        )
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_spaces_before_punctuation_survive(tmp_path):
    tokenizer = TrainedBPE(300, str(tmp_path)).train(TEXTS)
    text = " foo ( x ) , bar . do n't ! ?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("size", [257, 300, 400])
def test_vocabulary_has_the_size_asked_for(tmp_path, size):
    tokenizer = TrainedBPE(size, str(tmp_path)).train(TEXTS)
    assert len(tokenizer) == size
    assert max(tokenizer.get_vocab().values()) == size - 1


def test_end_token_is_one_token(tmp_path):
    tokenizer = TrainedBPE(300, str(tmp_path)).train(TEXTS)
    assert tokenizer(TrainedBPE.END)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("size", [0, 256])
def test_vocabulary_too_small_for_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size={size}.*257"):
        TrainedBPE(size)


def test_cached_vocabulary_is_used_again(tmp_path):
    TrainedBPE(300, str(tmp_path)).train(TEXTS)
    (file,) = tmp_path.iterdir()
    os.utime(file, (1, 1))
    TrainedBPE(300, str(tmp_path)).train(TEXTS)
    assert [path.stat().st_mtime for path in tmp_path.iterdir()] == [1]


def test_other_texts_and_sizes_do_not_share_a_cache_entry(tmp_path):
    for size, texts in ((300, TEXTS), (301, TEXTS), (300, TEXTS[1:]), (300, ["".join(TEXTS)])):
        TrainedBPE(size, str(tmp_path)).train(texts)
    assert len(list(tmp_path.iterdir())) == 4


def test_cache_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "below"))
    TrainedBPE(300).train(TEXTS)
    assert len(list((tmp_path / "below").iterdir())) == 1


def test_vocabulary_trained_anew_is_the_same(tmp_path):
    # Else a run could not go on after the cache was cleared.
    first = TrainedBPE(400, str(tmp_path / "a")).train(TEXTS)
    assert fingerprint(TrainedBPE(400, str(tmp_path / "b")).train(TEXTS)) == fingerprint(first)


def prepared(tasks, folder):
    data = TaskDataModule(tasks, tokenizer=TrainedBPE(300, str(folder)), max_length=32)
    data.prepare_data()
    data.setup()
    return data


def test_task_that_is_added_does_not_change_the_vocabulary(tmp_path):
    one = prepared({"a": TEXTS}, tmp_path)
    two = prepared({"a": TEXTS, "b": ["completely different " * 20] * 3}, tmp_path)
    assert two.fingerprint() == one.fingerprint()


def test_other_first_task_changes_the_fingerprint(tmp_path):
    one = prepared({"a": TEXTS}, tmp_path)
    assert prepared({"b": ["completely different " * 20] * 3, "a": TEXTS}, tmp_path).fingerprint() != one.fingerprint()


def test_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    data = TaskDataModule({"a": TEXTS}, tokenizer=TrainedBPE(300, str(tmp_path)))
    data.expected_fingerprint = "something else"
    with pytest.raises(ValueError, match="tokenizer"):
        data.setup()


def test_vocabulary_that_is_watched_first_is_still_trained_on_the_first_trained_task(tmp_path):
    from lightning_cl import Task

    watched = prepared([Task("w", val=["watched text"] * 3), Task("a", TEXTS)], tmp_path)
    assert watched.fingerprint() == prepared({"a": TEXTS}, tmp_path).fingerprint()


def test_unknown_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"tokenizer='.*nowhere'"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_cached_file_is_a_whole_one(tmp_path):
    TrainedBPE(300, str(tmp_path)).train(TEXTS)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".json"
    assert json.loads(file.read_text(encoding="utf-8"))["model"]["type"] == "BPE"
