"""Files of ours that were changed by a bad disk or a bad copy: each is refused, and named."""

from __future__ import annotations

import random
import re
import struct
import warnings
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from toys import Classifier, classification, trainer

from lightning_cl import TaskDataModule, fit_tasks
from lightning_cl.buffers import DiskStore, ReplayBuffer
from lightning_cl.buffers.disk import layout
from lightning_cl.core.checkpoint_io import DurableCheckpointIO, find_last_checkpoint, is_whole
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.token_cache import cached
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


def changes(content: bytes, seed: int, count: int):
    """Ways in which a file changes: a bit, a byte, a run of bytes, blocks swapped, repeated or lost, an end."""
    chance = random.Random(seed)
    for number in range(count):
        place, size = chance.randrange(len(content)), chance.randrange(1, 80)
        head, block, tail = content[:place], content[place : place + size], content[place + size :]
        changed = [
            head + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :],
            head + bytes([chance.randrange(256)]) + content[place + 1 :],
            head + bytes(len(block)) + tail,
            head + chance.randbytes(len(block)) + tail,
            head + block + block + tail,
            head + tail,
            head + tail[:size] + block + tail[size:],
            head,
            content + block,
        ][number % 9]
        if changed != content:
            yield changed


# ---------------------------------------------------------------------- checkpoints


def data():
    return TaskDataModule({name: classification(i, 16) for i, name in enumerate("ab")}, batch_size=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    L.seed_everything(1, verbose=False)
    fit_tasks(trainer(root, [L.pytorch.callbacks.ModelCheckpoint(root)], max_epochs=1), Classifier(), data())
    return root


def test_no_changed_checkpoint_is_taken_for_whole(run, tmp_path):
    content, path = (run / "tasks" / "0-a.ckpt").read_bytes(), tmp_path / "changed.ckpt"
    tried = 0
    for changed in changes(content, 0, 900):
        path.write_bytes(changed)
        assert not is_whole(path)
        tried += 1
    assert tried > 700
    for place in [*range(40), *range(len(content) - 400, len(content))]:  # its ends, every byte
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert not is_whole(path), place
    path.write_bytes(content)
    assert is_whole(path)


def flip_weight(source: Path, target: Path) -> None:
    """Changes one bit of a weight; ``torch.load`` reads the file as if nothing were wrong."""
    before = torch.load(source, weights_only=True)["state_dict"]["net.0.weight"]
    content = source.read_bytes()
    place = content.index(before.numpy().tobytes()) + 3
    target.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
    assert not torch.equal(torch.load(target, weights_only=True)["state_dict"]["net.0.weight"], before)


def test_a_flipped_bit_in_a_weight_is_neither_trained_on_nor_evaluated(run, tmp_path):
    flip_weight(run / "tasks" / "0-a.ckpt", tmp_path / "flipped.ckpt")
    with pytest.raises(ValueError, match=r"flipped\.ckpt.*damaged.*checksum does not fit"):
        fit_tasks(trainer(tmp_path / "1", max_epochs=1), Classifier(), data(), tmp_path / "flipped.ckpt")
    with pytest.raises(ValueError, match=r"flipped\.ckpt.*damaged"):
        evaluate_tasks(trainer(tmp_path / "1"), Classifier(), data(), "validate", tmp_path / "flipped.ckpt")


def test_the_last_checkpoint_is_the_last_one_without_damage(run, tmp_path):
    good = tmp_path / "tasks" / "0-a.ckpt"
    good.parent.mkdir()
    good.write_bytes((run / "tasks" / "0-a.ckpt").read_bytes())
    flip_weight(run / "tasks" / "1-b.ckpt", tmp_path / "tasks" / "1-b.ckpt")
    with pytest.warns(UserWarning, match=r"1-b\.ckpt is damaged"):
        assert find_last_checkpoint(tmp_path) == good


def test_every_reader_of_torchs_files_reads_a_checkpoint_with_its_checksum(tmp_path):
    content = {"a": torch.randn(1000), "b": {"c": [1, 2.5, "x"]}}
    DurableCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    for settings in ({}, {"mmap": True}):
        again = torch.load(tmp_path / "a.ckpt", weights_only=True, **settings)
        assert torch.equal(again["a"], content["a"])
        assert again["b"] == content["b"]
    with (tmp_path / "b.ckpt").open("wb") as file:
        torch.save(content, file)
    assert (tmp_path / "a.ckpt").stat().st_size - (tmp_path / "b.ckpt").stat().st_size < 40


@pytest.mark.parametrize("parts_have_checksums", [True, False])
def test_a_checkpoint_without_a_checksum_of_ours_is_read_and_its_parts_are_compared(tmp_path, parts_have_checksums):
    """Lightning's own, an older one, or one of somebody who has switched torch's checksums off."""
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(Classifier(), DataLoader(classification(0), 8))
    torch.serialization.set_crc32_options(parts_have_checksums)
    try:
        plain.save_checkpoint(tmp_path / "plain.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_whole(tmp_path / "plain.ckpt")
    if parts_have_checksums:
        flip_weight(tmp_path / "plain.ckpt", tmp_path / "flipped.ckpt")
        with pytest.raises(ValueError, match=r"flipped\.ckpt.*damaged.*data/"):
            evaluate_tasks(trainer(tmp_path), Classifier(), data(), "validate", tmp_path / "flipped.ckpt")


# ---------------------------------------------------------------------- the cache of tokens


def test_no_changed_file_in_the_cache_is_learnt_from(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randint(9, (40,), generator=generator).int(), torch.arange(40) > i) for i in range(5)]
    right = TokenDataset.from_samples(samples, Tally("skip", bad=1, reasons=["line 7"]))
    made = cached({"content": "x"}, lambda: right)
    (path,) = tmp_path.rglob("*.safetensors")
    content, whole = path.read_bytes(), load_file(path)
    silent = 0
    for changed in changes(content, 1, 300):
        path.write_bytes(changed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = cached({"content": "x"}, lambda: right)
        assert all(torch.equal(found.tensors[name], made.tensors[name]) for name in whole)
        assert found.tally == right.tally
        if not said:  # blanks between the header and the data, which say nothing
            silent += 1
            assert {**load_file(path)}.keys() == whole.keys()
        else:
            assert path.name in str(said[0].message)
            assert "damaged" in str(said[0].message)
    assert silent <= 3


# ---------------------------------------------------------------------- a buffer's records


def record(number: int) -> dict:
    ids = torch.arange(8, dtype=torch.int32) + 100 * number
    return {"input_ids": ids, "loss_mask": ids > 0}


@pytest.fixture
def buffer(tmp_path):
    made = ReplayBuffer(50, "fifo", store=DiskStore(tmp_path))
    for number in range(4):
        made.add(record(number), f"task {number}", position=number)
    made.commit()
    return made


def everything(state, folder):
    again = ReplayBuffer(50, "fifo", store=DiskStore(folder))
    again.load_state_dict(state)
    return [
        (int(sample["input_ids"][0]), again.info(n).task) for sample, n in zip(again.items, again.numbers, strict=True)
    ]


@pytest.mark.parametrize("change", ["inserted", "repeated", "swapped", "lost"])
def test_a_record_at_another_records_place_is_found(buffer, tmp_path, change):
    path, state = tmp_path / "0000" / "records.bin", buffer.state_dict()
    content = path.read_bytes()
    head, rows = content[:64], [content[64 + 64 * i : 128 + 64 * i] for i in range(4)]
    other = {
        "inserted": [rows[0], rows[3], *rows[1:]],
        "repeated": [rows[0], *rows],
        "swapped": [rows[1], rows[0], *rows[2:]],
        "lost": [*rows[1:], rows[3]],
    }[change]
    path.write_bytes(head + b"".join(other))
    with pytest.raises(layout.DamagedFileError, match=re.escape(str(path))):
        everything(state, tmp_path)


@pytest.mark.parametrize("change", ["repeated", "swapped", "lost"])
def test_a_name_at_another_names_place_is_found(buffer, tmp_path, change):
    path, state = tmp_path / "0000" / "names.jsonl", buffer.state_dict()
    first, *lines = path.read_bytes().splitlines(keepends=True)
    other = {
        "repeated": [lines[0], *lines],
        "swapped": [*lines[1:], lines[0]],
        "lost": lines[1:],
    }[change]
    path.write_bytes(first + b"".join(other))
    with pytest.raises(layout.DamagedFileError, match=re.escape(str(path))):
        everything(state, tmp_path)


def test_the_checksum_of_a_record_is_the_documented_one(buffer, tmp_path):
    content = (tmp_path / "0000" / "records.bin").read_bytes()[64:]
    for number in range(4):
        row = content[64 * number : 64 * number + 64]
        assert struct.unpack("<I", row[60:])[0] == zlib.crc32(struct.pack("<Q", number) + row[:60])


def test_a_buffer_of_version_1_is_read_and_erased_from(buffer, tmp_path):
    """As written before records' checksums covered their numbers."""
    state = buffer.state_dict()
    right = everything(state, tmp_path)
    for path in (tmp_path / "0000").glob("*.bin"):
        content = bytearray(path.read_bytes())
        content[8:12] = struct.pack("<I", 1)
        content[60:64] = struct.pack("<I", zlib.crc32(content[:60]))
        if path.name == "records.bin":
            for start in range(64, len(content), 64):
                content[start + 60 : start + 64] = struct.pack("<I", zlib.crc32(content[start : start + 60]))
        path.write_bytes(content)
    assert everything(state, tmp_path) == right
    again = ReplayBuffer(50, "fifo", store=DiskStore(tmp_path))
    again.load_state_dict(state)
    again.add(record(9), "more")  # a segment of its own, of the new version
    again.remove(lambda stored: stored.position == 1)
    assert everything(again.state_dict(), tmp_path) == [right[0], *right[2:], (900, "more")]
    flags = np.frombuffer((tmp_path / "0000" / "records.bin").read_bytes()[64:], layout.RECORD)["flags"]
    assert flags.tolist() == [0, 1, 0, 0]
