"""Killed writes, a full disk, a read-only cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import forked
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Classifier, classification, trainer

from lightning_cl import TaskDataModule, fit_tasks
from lightning_cl.core.checkpoint_io import DurableCheckpointIO
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.token_cache import cached
from lightning_cl.data.text.tokenizer import TrainedBPE
from lightning_cl.files import locked_for_writing, remove_abandoned, replace_file

ROOT = Path(__file__).parents[1]
WRITER = """
import os, sys, time
from pathlib import Path
from lightning_cl.files import locked_for_writing
with locked_for_writing(Path(sys.argv[1])) as file:
    file.write(bytes(1000)); file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def data(tasks="ab"):
    return TaskDataModule({name: classification(i, 16) for i, name in enumerate(tasks)}, batch_size=8)


def full(*args):
    raise OSError(28, "No space left on device")


def test_a_resume_removes_what_a_killed_write_has_left_and_nothing_that_is_being_written(tmp_path):
    fit_tasks(trainer(tmp_path, [ModelCheckpoint()], max_epochs=1), Classifier(), data("a"))
    killed, alive = tmp_path / "tasks" / ".1-b.ckpt.123.tmp", tmp_path / "checkpoints" / ".x.ckpt.124.tmp"
    writers = [forked.start("-c", WRITER, path) for path in (killed, alive)]
    try:
        for writer in writers:
            writer.wait_for_output("written\n")
        writers[0].kill()
        writers[0].wait()
        assert killed.stat().st_size == alive.stat().st_size == 1000
        fit_tasks(
            trainer(tmp_path, [ModelCheckpoint()], max_epochs=1), Classifier(), data(), tmp_path / "tasks/0-a.ckpt"
        )
        assert not killed.exists()
        assert alive.exists()
    finally:
        for writer in writers:
            writer.close()
    assert remove_abandoned(tmp_path, ".*.ckpt.*.tmp") == 1000


def test_a_file_that_is_removed_in_the_moment_before_the_lock_is_begun_anew(tmp_path, monkeypatch):
    import lightning_cl.files as files

    lock, path = files.fcntl.flock, tmp_path / "x"

    def removed_first(file, how):
        monkeypatch.setattr(files.fcntl, "flock", lock)
        path.unlink()
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", removed_first)
    with locked_for_writing(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all"


@pytest.mark.parametrize("when", ["write", "sync"])
def test_a_full_disk_is_named_with_the_checkpoint_and_leaves_nothing_behind(tmp_path, monkeypatch, when):
    """It was `[enforce fail at inline_container.cc:672]`, or `No space left on device` without any file."""
    if when == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        import lightning_cl.checksum as checksum

        monkeypatch.setattr(checksum._Counted, "write", full)
    with pytest.raises(OSError, match=r"x\.ckpt: cannot be written: No space left.*[\d,]+ bytes are free") as caught:
        DurableCheckpointIO().save_checkpoint({"weights": torch.zeros(10)}, tmp_path / "x.ckpt")
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_error_of_the_disk_is_not_made_one(tmp_path):
    def broken(path):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        replace_file(tmp_path / "x", broken)
    with pytest.raises(OSError, match=r"report\.json: cannot be written: No space left"):
        replace_file(tmp_path / "report.json", full)


@pytest.fixture
def unusable_cache(tmp_path, monkeypatch):
    """A cache in which nothing can be made, also for root: it is below a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "file" / "cache"))


def test_a_read_only_cache_is_a_warning_with_its_path(unusable_cache):
    made = TokenDataset([[1, 2, 3]])
    with pytest.warns(UserWarning, match=r"file/cache/tokens/.*cannot be written: Not a directory"):
        assert cached({"a": 1}, lambda: made) is made
    with pytest.warns(UserWarning, match=r"file/cache/bpe-300-.*trained in each run"):
        tokenizer = TrainedBPE(300).train(["some text, and some more text"])
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"
    assert tokenizer.eos_token == tokenizer.pad_token == TrainedBPE.END


def test_the_cache_loses_what_killed_writers_have_left(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    folder = tmp_path / "tokens"
    folder.mkdir()
    old, young = folder / ".1.old.safetensors", folder / ".2.young.safetensors"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    cached({"a": 1}, lambda: TokenDataset([[1, 2, 3]]))
    assert not old.exists()
    assert young.exists()
