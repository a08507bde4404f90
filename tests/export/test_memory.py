"""A saved memory: the buffer's samples and no others, for readers who know nothing of slots."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from replaying import Recorder
from tiny_models import byte_bpe
from torch.utils.data import Dataset
from toys import trainer

from lightning_cl import Replay, TaskDataModule, fit_tasks
from lightning_cl.buffers import DiskStore, ReplayBuffer, read_folder, remove_from_folder
from lightning_cl.buffers.disk.layout import RECORD, DamagedFileError
from lightning_cl.data.text.tokenizer import fingerprint
from lightning_cl.export.jsonl import write_jsonl
from lightning_cl.export.memory import read_memory, save_buffer, save_memory
from lightning_cl.export.mlx import import_mlx_lm

pytestmark = pytest.mark.filterwarnings("ignore")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Docs(Dataset):
    """Token records whose ids are their number, which tells the task by its thousands."""

    def __init__(self, task: int):
        self.start = 1000 * task + 1

    def __len__(self):
        return 30

    def __getitem__(self, index):
        length = 4 + 7 * index % 13
        ids = torch.full((length,), self.start + index, dtype=torch.int32)
        return {"input_ids": ids, "loss_mask": torch.arange(length) >= length // 3}


def plain(sample):
    return tuple(sample["input_ids"].tolist()), tuple(sample["loss_mask"].tolist())


def content(buffer):
    """A buffer's samples in its order, with their tasks and positions."""
    infos = [buffer.info(number) for number in buffer.numbers]
    return [
        (plain(sample), info.task, info.position, info.label) for sample, info in zip(buffer.items, infos, strict=True)
    ]


def read(folder):
    return [(plain(each.sample), *each[1:]) for each in read_memory(folder)]


@pytest.fixture(scope="module", params=["disk", "memory"])
def run(request, tmp_path_factory):
    """A run of three tasks that a buffer of 20 has gone through."""
    folder = tmp_path_factory.mktemp(request.param)
    replay = Replay(20, 0.3, policy="task_balanced", fill="training", storage=request.param)
    data = TaskDataModule({"abc"[task]: Docs(task) for task in range(3)}, batch_size=4, collate_fn=list)
    fit_tasks(trainer(folder, [replay, ModelCheckpoint(folder)], max_epochs=1), Recorder(), data)
    return folder, replay


def test_it_is_the_buffer(run, tmp_path):
    folder, replay = run
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    saved = save_memory(folder / "tasks" / "2-c.ckpt", tmp_path / "memory")
    wanted = content(replay.buffer)
    assert read(saved) == wanted
    assert len(wanted) == 20
    assert {task for _, task, *_ in wanted} == set("abc")
    if replay.location.storage == "disk":  # the run's folder does not say which are held
        assert sum(1 for _ in read_folder(folder / "buffers" / "Replay")) > 20
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # An earlier checkpoint has the buffer of that time; the folder is replaced.
    assert save_memory(str(folder / "tasks" / "0-a.ckpt"), saved, callback="Replay") == saved
    assert {task for _, task, *_ in read(saved)} == {"a"}
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_numpy_alone_reads_it(run, tmp_path):
    folder, replay = run
    saved = save_memory(folder / "tasks" / "2-c.ckpt", tmp_path / "memory")
    names = [task["name"] for task in json.loads((saved / "memory.json").read_text())["tasks"]]
    records = np.memmap(saved / "0000" / "records.bin", RECORD, "r", 64)
    tokens = np.memmap(saved / "0000" / "tokens.bin", "<i4", "r", 64)
    bits = np.unpackbits(np.memmap(saved / "0000" / "mask.bin", "u1", "r", 64), bitorder="little")
    found = []
    for record in records:
        part = slice(int(record["start"]), int(record["start"]) + int(record["length"]))
        found.append((tuple(tokens[part].tolist()), tuple(bits[part].astype(bool).tolist()), names[record["task"]]))
    assert found == [(*sample, task) for sample, task, *_ in content(replay.buffer)]
    index = json.loads((saved / "memory.json").read_text())
    assert {t["name"]: t["samples"] for t in index["tasks"]} == replay.buffer.counts()
    assert sum(t["loss_tokens"] for t in index["tasks"]) == sum(sum(mask[1:]) for _, mask, _ in found)
    assert (index["after"], index["callback"]) == (["a", "b", "c"], "Replay")
    assert str(tmp_path) not in "".join(p.read_text("latin-1") for p in saved.rglob("*") if p.is_file())


def test_a_run_that_was_moved(run, tmp_path):
    folder, replay = run
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    checkpoint = moved / "tasks" / "2-c.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    store = state["lightning_cl"]["methods"]["Replay"]["state"]["buffer"]["store"]
    store["segments"] = [f"/nowhere/{path[-4:]}" for path in store.get("segments", [])]
    torch.save(state, checkpoint)
    assert read(save_memory(checkpoint, tmp_path / "m")) == content(replay.buffer)
    if store["segments"]:
        (moved / "buffers").rename(elsewhere)
        with pytest.raises(FileNotFoundError, match="missing"):
            save_memory(checkpoint, tmp_path / "m")
        assert read(save_memory(checkpoint, tmp_path / "m", files=elsewhere / "Replay")) == content(replay.buffer)


def buffer_of(count=12, **settings):
    buffer = ReplayBuffer(count, "fifo", **settings)
    for number in range(count):
        buffer.add(Docs(number % 2)[number], "ab"[number % 2], position=number)
    return buffer


@pytest.mark.parametrize("kind", ["records", "tokens", "mask", "names"])
def test_a_changed_byte_is_found(tmp_path, kind):
    saved = save_buffer(buffer_of(), tmp_path / "memory")
    path = next((saved / "0000").glob(f"{kind}.*"))
    before = path.read_bytes()
    records = np.frombuffer((saved / "0000" / "records.bin").read_bytes()[64:], RECORD)
    place = {
        "records": 64 + 64 * 3 + 36,
        "tokens": 64 + 4 * int(records["start"][3]),
        "mask": 64 + int(records["start"][3]) // 8,
    }
    at = place.get(kind, len(before) - 20)
    path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    with pytest.raises(DamagedFileError, match=kind if kind != "names" else "names"):
        list(read_memory(saved))
    path.write_bytes(before)
    assert read(saved) == content(buffer_of())
    records_file = saved / "0000" / "records.bin"
    records_file.write_bytes(records_file.read_bytes()[:-64])
    with pytest.raises(DamagedFileError, match="11 records, not 12"):
        read_memory(saved)


def test_a_wrong_file_gets_no_name(tmp_path, monkeypatch):
    commit = DiskStore.commit

    def damaged(store):
        commit(store)
        path = store.folder / "0000" / "mask.bin"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(DiskStore, "commit", damaged)
    with pytest.raises(RuntimeError, match="read back"):
        save_buffer(buffer_of(), tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []


def test_samples_removed_later_are_gone(tmp_path):
    saved = save_buffer(buffer_of(), tmp_path / "memory")
    assert remove_from_folder(saved, lambda stored: stored.task == "a") == 6
    assert {task for _, task, *_ in read(saved)} == {"b"}


def test_other_samples_than_tokens(tmp_path):
    buffer = ReplayBuffer(5)
    for number in range(5):
        buffer.add({"image": torch.full((2, 2), float(number)), "label": number}, "a", position=number)
    saved = list(read_memory(save_buffer(buffer, tmp_path / "memory")))
    assert [(each.sample["label"], each.sample["image"].tolist()) for each in saved] == [
        (each["label"], each["image"].tolist()) for each in buffer.items
    ]
    with pytest.raises(ValueError, match="sample 0 of task 'a' is no token sequence"):
        write_jsonl(tmp_path / "memory", byte_bpe(), tmp_path)


def test_refusals(run, tmp_path):
    folder, _ = run
    checkpoint = folder / "tasks" / "2-c.ckpt"
    with pytest.raises(ValueError, match=r"callback='EWC'.*\['Replay'\]"):
        save_memory(checkpoint, tmp_path / "m", callback="EWC")
    state = torch.load(checkpoint, weights_only=True)
    methods = state["lightning_cl"]["methods"]
    methods["Rest"] = methods["Replay"]
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"callback=None.*\['Replay', 'Rest'\]"):
        save_memory(tmp_path / "two.ckpt", tmp_path / "m")
    del state["lightning_cl"]
    torch.save(state, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="weights only"):
        save_memory(tmp_path / "weights.ckpt", tmp_path / "m")
    damaged = checkpoint.read_bytes()
    (tmp_path / "damaged.ckpt").write_bytes(damaged[:-300] + bytes([damaged[-300] ^ 1]) + damaged[-299:])
    with pytest.raises(ValueError, match="the file is damaged"):
        save_memory(tmp_path / "damaged.ckpt", tmp_path / "m")
    with pytest.raises(ValueError, match="no samples yet"):
        save_buffer(ReplayBuffer(3), tmp_path / "m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="other files"):
        save_memory(checkpoint, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"no memory.json"):
        read_memory(tmp_path / "mine")


# ---------------------------------------------------------------------- texts for mlx-lm's trainer


def as_text(line, tokenizer):
    """Ids as mlx-lm's TextDataset makes them."""
    ids = tokenizer.encode(line["text"])
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def texts_of(out):
    return {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid")
    }


@pytest.mark.parametrize("start", [None, "<s>"])
def test_texts_are_read_back_as_the_same_ids(tmp_path, start):
    tokenizer = byte_bpe(start=start)
    buffer, end = ReplayBuffer(100, "fifo"), tokenizer.eos_token_id
    texts = [f"text {i}, naïve 東京\n <think>{'x' * i}" for i in range(20)]
    every = [[*tokenizer.encode(text), end] for text in texts]
    cut = [every[3][:-1], every[4][:-2]]
    for i, ids in enumerate([*every, *cut]):
        buffer.add({"input_ids": torch.tensor(ids).int(), "loss_mask": torch.arange(len(ids)) >= 3}, "ab"[i % 2])
    saved = save_buffer(buffer, tmp_path / "memory", fingerprint(tokenizer))
    written = write_jsonl(saved, tokenizer, tmp_path / "out", valid=0.2)
    assert written == (16, 6, 2, 2 * 22)
    found = texts_of(tmp_path / "out")
    ids = Counter(tuple(as_text(line, tokenizer)) for lines in found.values() for line in lines)
    assert all(ids[tuple(each)] >= 1 for each in every)
    assert sum(ids.values()) == 22
    # The same parts from another order of the same samples.
    turned = ReplayBuffer(100, "fifo")
    for sample, task in reversed(list(zip(buffer.items, buffer.tasks, strict=True))):
        turned.add(sample, task)
    write_jsonl(save_buffer(turned, tmp_path / "turned"), tokenizer, tmp_path / "again", valid=0.2)
    again = texts_of(tmp_path / "again")
    assert {n: sorted(map(str, found[n])) for n in found} == {n: sorted(map(str, again[n])) for n in again}
    with pytest.raises(ValueError, match="another one"):
        write_jsonl(saved, byte_bpe(extra=["<x>"]), tmp_path / "out")


def test_completions_keep_the_prompt_out_of_the_loss(tmp_path):
    tokenizer = byte_bpe()
    tokenizer.chat_template = CHATML
    buffer = ReplayBuffer(100, "fifo")
    chats = [(f"What is {i}?", f" {i} naïve\n") for i in range(6)]
    for prompt, answer in chats:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        begin = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False))
        mask = torch.arange(len(ids)) >= begin
        mask[-1] = False  # the line's end after the answer
        buffer.add({"input_ids": torch.tensor(ids).int(), "loss_mask": mask}, "a")
    saved = save_buffer(buffer, tmp_path / "memory")
    assert write_jsonl(saved, tokenizer, tmp_path, 0, "completions") == (6, 0, 0, 6)
    assert [tuple(line.values()) for line in texts_of(tmp_path)["train"]] == chats
    assert write_jsonl(saved, tokenizer, tmp_path, 0).unmasked > 6 * 10
    written = [(sample["input_ids"].tolist(), int(sample["loss_mask"].int().argmax())) for sample in buffer.items]
    if importlib.util.find_spec("mlx_lm") is not None:  # its own reader gives these ids, and where the answer begins
        import_mlx_lm()
        from mlx_lm.tuner.datasets import load_local_dataset

        write_jsonl(saved, tokenizer, tmp_path, 0.3, "completions")
        sets = load_local_dataset(tmp_path, tokenizer, SimpleNamespace(mask_prompt=True))
        assert sorted(tuple(each.process(each[i])) for each in sets for i in range(len(each))) == sorted(written)
        assert [len(each) for each in sets] == [4, 2, 0]
    buffer.add({"input_ids": torch.tensor([5, 6, 7]).int(), "loss_mask": torch.ones(3).bool()}, "b")
    with pytest.raises(ValueError, match="sample 6 of task 'b' is no prompt and answer"):
        write_jsonl(save_buffer(buffer, saved), tokenizer, tmp_path, 0, "completions")
