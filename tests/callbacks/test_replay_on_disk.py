"""Replay from files: the same batches as from memory, through kills, resumes, removals and other runs."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from toys import Classifier, classification, trainer

from lightning_cl import Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.buffers import DiskStore, ReplayBuffer, remove_from_folder
from lightning_cl.callbacks.replay.base import MemoryCallback
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data import TrainedBPE
from lightning_cl.data.mixing.ratio import Curve
from lightning_cl.data.mixing.replayed import Mix
from lightning_cl.data.stream import StreamLoader
from lightning_cl.evaluation import build_report, format_report

pytestmark = pytest.mark.filterwarnings("ignore")


class Docs(Dataset):
    """Token records of different lengths; all ids of one are its number, which tells its task by the thousands."""

    def __init__(self, task: int, count: int = 30, short: int = 4, long: int = 16):
        self.start = 1000 * task + 1
        generator = torch.Generator().manual_seed(task)
        self.lengths = torch.randint(short, long + 1, (count,), generator=generator).tolist()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        length = self.lengths[index]
        ids = torch.full((length,), self.start + index, dtype=torch.int32)
        return {"input_ids": ids, "loss_mask": torch.arange(length) >= length // 3}


class Learner(LightningModule):
    """Keeps what it sees, per batch a list of (number, loss-bearing tokens), and learns something of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.seen = []

    @property
    def weight(self):
        return self.layer.weight

    def rows(self, batch):
        return [(int(s["input_ids"][0]), int(s["loss_mask"][1:].sum())) for s in batch]

    def training_step(self, batch, batch_idx):
        rows = self.rows(batch)
        self.seen.append(rows)
        numbers = torch.tensor([float(number) for number, _ in rows])
        features = torch.sin(numbers[:, None] * torch.arange(1, 9))
        return ((self.layer(features)[:, 0] - torch.cos(numbers)) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Watch(Callback):
    """Calls something at the end of some training batches; keeps the kinds of all."""

    def __init__(self, **at):
        self.at, self.kinds, self.steps = {int(step[1:]): do for step, do in at.items()}, [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kinds.append(TaskCoordinator.of(trainer).kinds)
        self.steps += 1
        if trainer.global_step in self.at:
            self.at.pop(trainer.global_step)()


def checkpoints(every: int = 4) -> ModelCheckpoint:
    return ModelCheckpoint(every_n_train_steps=every, save_top_k=-1, filename="{step}")


def run(root, replay, tasks=3, callbacks=(), ckpt_path=None, module=None, every=4, data=None, **settings):
    module = module or Learner()
    if isinstance(tasks, int):
        tasks = {"abc"[task]: Docs(task) for task in range(tasks)}
    data = data or TaskDataModule(tasks, batch_size=4, collate_fn=list)
    methods = [replay] if isinstance(replay, Callback) else list(replay)
    settings = {"max_epochs": 2} | settings
    fit_tasks(trainer(root, [*methods, *callbacks, checkpoints(every)], **settings), module, data, ckpt_path)
    return module


def stored(replay) -> list:
    """What is in a buffer, in its order."""
    buffer = replay.buffer
    return [
        (int(sample["input_ids"][0]), sample["loss_mask"].tolist(), task, buffer.info(number).position)
        for sample, task, number in zip(buffer.items, buffer.tasks, buffer.numbers, strict=True)
    ]


def task_of(number: int) -> int:
    return number // 1000


# ---------------------------------------------------------------------- memory and disk


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "reservoir", "fill": "training"},
        {"policy": "task_balanced", "unit": "tokens", "buffer_size": 150, "draw": "task"},
        {"policy": "fifo", "unit": "bytes", "buffer_size": 1500, "mode": "add"},
    ],
    ids=["while training", "tokens", "bytes"],
)
def test_the_disk_gives_the_batches_of_memory_bit_for_bit(tmp_path, settings):
    runs = {}
    for storage in ("memory", "disk"):
        replay = Replay(**{"buffer_size": 15, "ratio": 0.3} | settings, storage=storage)
        module = run(tmp_path / storage, replay)
        runs[storage] = module.seen, module.weight.detach(), stored(replay), replay.buffer.seen
        files = list((tmp_path / storage).rglob("records.bin"))
        assert len(files) == (storage == "disk")
    assert any(task_of(number) == 0 for rows in runs["disk"][0][20:] for number, _ in rows)
    assert runs["memory"][0] == runs["disk"][0]
    assert torch.equal(runs["memory"][1], runs["disk"][1])
    assert runs["memory"][2:] == runs["disk"][2:]


def test_samples_lie_in_the_runs_folder_and_checkpoints_say_which_are_wanted(tmp_path):
    tasks = {"ab"[task]: Docs(task, 60, 500, 1000) for task in range(2)}
    replay = Replay(50, 0.2)
    run(tmp_path, replay, tasks, max_epochs=1)
    files = list((tmp_path / "buffers" / "Replay").rglob("tokens.bin"))
    assert sum(path.stat().st_size for path in files) > 50 * 4 * 500
    for path in (tmp_path / "tasks").glob("*.ckpt"):
        assert path.stat().st_size < 30_000
        torch.load(path, weights_only=True)


def test_a_trainer_that_keeps_no_checkpoints_keeps_no_files(tmp_path):
    replay = Replay(20, 0.2)
    data = TaskDataModule({"a": Docs(0), "b": Docs(1)}, batch_size=4, collate_fn=list)
    fit_tasks(trainer(tmp_path, [replay], max_epochs=1), Learner(), data)
    assert len(replay.buffer) == 20
    assert not (tmp_path / "buffers").exists()


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "settings",
    [
        {"fill": "task_end"},
        {"fill": "training"},
        {"fill": "training", "storage": "memory"},
        {"fill": "training", "draw": "interfered", "storage": "memory"},
        {"fill": "task_end", "draw": "interfered"},
        {"fill": "task_end", "policy": "herding", "ratio": [[0, 0.5], [1, 0.1]]},
    ],
    ids=["task end", "training", "in memory", "interfered in memory", "interfered", "herding, schedule"],
)
def test_a_resume_from_the_middle_of_any_task_is_as_if_never_stopped(tmp_path, settings):
    settings = {"buffer_size": 15, "ratio": 0.3} | settings
    reference = Replay(**settings)
    module = run(tmp_path / "whole", reference, every=7)
    found = sorted((tmp_path / "whole" / "checkpoints").rglob("*.ckpt"))
    assert {path.parent.name for path in found} == {"0-a", "1-b", "2-c"}
    for path in found[::3]:
        replay = Replay(**settings)
        resumed = run(tmp_path / "resumed" / path.parent.name / path.stem, replay, every=7, ckpt_path=path)
        steps = int(path.stem.split("=")[1])
        assert resumed.seen == module.seen[steps:], path
        assert torch.equal(resumed.weight, module.weight)
        assert stored(replay) == stored(reference)
        assert replay.buffer.seen_of == reference.buffer.seen_of


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize("step", [6, 21, 31])
@pytest.mark.parametrize("fill", ["task_end", "training"])
def test_killed_at_a_step_and_gone_on_with_in_the_same_folder(tmp_path, fill, step):
    reference = Replay(15, 0.3, fill=fill)
    module = run(tmp_path / "whole", reference)
    with pytest.raises(Killed):
        run(tmp_path / "killed", Replay(15, 0.3, fill=fill), callbacks=[Watch(**{f"s{step}": kill})])
    # What was written since the last checkpoint lies in the folder, and is nobody's.
    replay = Replay(15, 0.3, fill=fill)
    resumed = run(tmp_path / "killed", replay, ckpt_path="last")
    assert 0 < len(resumed.seen) < len(module.seen)
    assert resumed.seen == module.seen[len(module.seen) - len(resumed.seen) :]
    assert torch.equal(resumed.weight, module.weight)
    assert stored(replay) == stored(reference)


def test_a_checkpoint_whose_samples_are_missing_says_where_they_were(tmp_path):
    run(tmp_path / "first", Replay(15, 0.3), tasks=2)
    shutil.rmtree(tmp_path / "first" / "buffers")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "first" / "buffers" / "Replay" / "0000"))):
        run(tmp_path / "second", Replay(15, 0.3), ckpt_path=tmp_path / "first" / "tasks" / "1-b.ckpt")


def test_a_run_that_has_the_first_ones_file_names_does_not_read_another_runs_samples(tmp_path):
    # The folder of the first run is gone, and the new run's own folder has segments of the same names.
    run(tmp_path / "first", Replay(15, 0.3), tasks=2)
    run(tmp_path / "second", Replay(15, 0.3), tasks={"x": Docs(7), "y": Docs(8)})
    checkpoint = tmp_path / "1-b.ckpt"
    shutil.copy(tmp_path / "first" / "tasks" / "1-b.ckpt", checkpoint)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="0000"):
        run(tmp_path / "second", Replay(15, 0.3), ckpt_path=checkpoint)


# ---------------------------------------------------------------------- streams


def text(letter: str, number: int) -> dict:
    """A document whose first five characters are its name."""
    return {"text": f"{letter}{number:04d}" + "xyz " * (1 + (number * 7) % 5)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    os.environ["LIGHTNING_CL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    texts = [text(letter, number)["text"] for letter in "abc" for number in range(30)]
    data = TaskDataModule({"a": texts}, tokenizer=TrainedBPE(257, str(tmp_path_factory.mktemp("bpe"))))
    data.prepare_data()
    data.setup()
    return data.tokenizer


class Reader(Learner):
    """Reads documents out of batches of text, packed ones too, by their names."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def rows(self, batch):
        found = []
        positions = batch.get("position_ids")
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            starts = [0] if positions is None else (positions[row] == 0).nonzero().flatten().tolist()
            for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                loss = int((labels[begin + 1 : end] != -100).sum())
                name = self.tokenizer.decode(ids[begin:end]).replace(" ", "")[:5]
                if loss:
                    found.append((1000 * "abc".index(name[0]) + int(name[1:]), loss))
        return found


def stream(letter: str, count: int):
    import datasets

    return datasets.IterableDataset.from_generator(lambda: (text(letter, number) for number in range(count)))


def text_run(root, replay, tokenizer, kind="stream", counts=(26, 26, 26), **settings):
    packing, workers = settings.pop("packing", False), settings.pop("num_workers", 0)
    tasks = {
        letter: stream(letter, count)
        if kind == "stream"
        else {"train": [text(letter, number) for number in range(count)], "val": [text(letter, 0)]}
        for letter, count in zip("abc", counts, strict=False)
    }
    data = TaskDataModule(tasks, tokenizer, 64, batch_size=2, packing=packing, num_workers=workers)
    return run(root, replay, module=Reader(tokenizer), data=data, num_sanity_val_steps=0, **settings)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_that_is_stored_while_it_trains_resumes_bit_for_bit(tmp_path, tokenizer, packing):
    settings = {"packing": packing, "every": 3, "max_epochs": 1, "counts": (26, 26)}
    reference = Replay(12, 0.3, fill="training")
    module = text_run(tmp_path / "whole", reference, tokenizer, **settings)
    assert any(task_of(number) == 0 for rows in module.seen[-8:] for number, _ in rows)
    # A buffer that fills while it trains is replayed as it fills: from the first task on.
    for step in (4, len(module.seen) - 4):
        watch = Watch(**{f"s{step}": kill})
        with pytest.raises(Killed):
            text_run(tmp_path / str(step), Replay(12, 0.3, fill="training"), tokenizer, callbacks=[watch], **settings)
        replay = Replay(12, 0.3, fill="training")
        resumed = text_run(tmp_path / str(step), replay, tokenizer, ckpt_path="last", **settings)
        assert 0 < len(resumed.seen) < len(module.seen)
        assert resumed.seen == module.seen[len(module.seen) - len(resumed.seen) :]
        assert torch.equal(resumed.weight, module.weight)
        assert [task for *_, task, _ in stored(replay)] == [task for *_, task, _ in stored(reference)]
        assert stored(replay) == stored(reference)


def test_a_stream_without_filling_while_it_trains_is_an_error_that_says_so(tmp_path, tokenizer):
    with pytest.raises(MisconfigurationException, match=r"stream.*Replay\(fill='training'\)"):
        text_run(tmp_path, Replay(12, 0.3), tokenizer)


# ---------------------------------------------------------------------- gone on with


def test_a_second_run_goes_on_with_the_folder_of_the_first(tmp_path):
    folder = str(tmp_path / "kept")
    run(tmp_path / "first", Replay(30, 0.3, folder=folder), tasks={"a": Docs(0), "b": Docs(1)}, max_epochs=1)
    first = Replay(30, 0.3, folder=folder)
    module = run(tmp_path / "second", first, tasks={"c": Docs(2)}, max_epochs=1)
    tokens = Counter()
    for rows in module.seen:
        for number, loss in rows:
            tokens[task_of(number)] += loss
    assert tokens[0] > 0 < tokens[1]
    assert (tokens[0] + tokens[1]) / tokens.total() == pytest.approx(0.3, abs=0.04)
    assert first.buffer.seen_of == {"a": 30, "b": 30, "c": 30}
    assert set(first.buffer.counts()) == {"a", "b", "c"}
    assert len(first.buffer) == 30
    # And a third one sees what both have left.
    third = Replay(30, 0.3, folder=folder)
    module = run(tmp_path / "third", third, tasks={"d": Docs(3)}, max_epochs=1)
    assert {task_of(number) for rows in module.seen for number, _ in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("argument", "settings"),
    [("buffer_size=", {"buffer_size": 31}), ("policy=", {"policy": "fifo"}), ("unit=", {"unit": "tokens"})],
)
def test_a_folder_of_another_kind_of_buffer_is_refused_before_any_step(tmp_path, argument, settings):
    folder = str(tmp_path / "kept")
    run(tmp_path / "first", Replay(30, 0.3, folder=folder), tasks=1, max_epochs=1)
    module = Learner()
    with pytest.raises(ValueError, match=argument) as error:
        run(tmp_path / "second", Replay(**{"buffer_size": 30} | settings, folder=folder), module=module)
    assert folder in str(error.value)
    assert module.seen == []


def test_a_folder_of_another_tokenizer_is_refused_before_any_step(tmp_path, tokenizer):
    folder = str(tmp_path / "kept")
    settings = {"kind": "lists", "counts": (10,), "max_epochs": 1}
    text_run(tmp_path / "first", Replay(30, 0.3, folder=folder), tokenizer, **settings)
    texts = ["a long text of other words, which make other tokens"] * 9
    data = TaskDataModule({"a": texts}, TrainedBPE(300, str(tmp_path / "bpe")), 64, batch_size=2)
    module = Learner()
    with pytest.raises(ValueError, match=r"another tokenizer.*same tokenizer"):
        run(tmp_path / "second", Replay(30, 0.3, folder=folder), data=data, module=module, max_epochs=1)
    assert module.seen == []


# ---------------------------------------------------------------------- owners


class Second(Replay):
    """Somebody's replay beside ours."""


class Remembering(MemoryCallback):
    """A method that only reads."""

    batches = ()

    def on_task_start(self, trainer, pl_module):
        super().on_task_start(trainer, pl_module)
        drawn = self.memory_batches(trainer, 6, seed=3)
        self.batches = [batch for batch, _ in zip(drawn, range(20), strict=False)]


@pytest.mark.parametrize("order", [0, 1])
def test_a_buffer_is_shared_on_purpose_by_name(tmp_path, order):
    replay, other = Replay(15, 0.3), Remembering(buffer="Replay")
    module = run(tmp_path / "both", [replay, other][:: 1 - 2 * order])
    assert other.buffer is replay.buffer
    alone = Replay(15, 0.3)
    assert run(tmp_path / "alone", alone).seen == module.seen
    assert stored(replay) == stored(alone)  # nobody stored anything twice
    assert [len(batch) for batch in other.batches] == [6] * 20
    drawn = [int(sample["input_ids"][0]) for batch in other.batches for sample in batch]
    passes = [drawn[begin : begin + 15] for begin in range(0, len(drawn), 15)]
    assert all(len(set(once)) == 15 for once in passes)  # each stored sample once, in another order
    assert len({tuple(once) for once in passes}) == len(passes)
    assert {task_of(number) for number in drawn} == {0, 1}
    # The one that shares is resumed with the one that owns.
    path = tmp_path / "both" / "tasks" / "1-b.ckpt"
    again = [Replay(15, 0.3), Remembering(buffer="Replay")]
    resumed = run(tmp_path / "again", again, ckpt_path=path)
    assert resumed.seen == module.seen[-len(resumed.seen) :]
    assert stored(again[0]) == stored(replay)


@pytest.mark.parametrize("name", ["Replay-2", "DERpp", "Second"])
def test_a_shared_buffer_that_nobody_owns_is_an_error_that_says_who_could(tmp_path, name):
    module = Learner()
    with pytest.raises(MisconfigurationException, match=rf"buffer='{name}'.*\['Replay'\]"):
        run(tmp_path, [Replay(15, 0.3), Remembering(buffer=name)], module=module)
    assert module.seen == []


def test_two_owners_of_one_folder_are_an_error_that_says_how_to_share(tmp_path):
    folder, module = str(tmp_path / "kept"), Learner()
    pair = [Replay(15, 0.3, folder=folder), Second(15, 0.1, folder=folder)]
    with pytest.raises(MisconfigurationException, match=r"Second\(.*Replay has its buffer there.*buffer='Replay'"):
        run(tmp_path, pair, module=module)
    assert module.seen == []


def test_a_checkpoint_with_a_buffer_of_its_own_is_not_gone_on_with_by_one_that_shares(tmp_path):
    run(tmp_path / "first", [Replay(15, 0.3), Second(15, 0.1)], tasks=2, max_epochs=1)
    path, pair = tmp_path / "first" / "tasks" / "0-a.ckpt", [Replay(15, 0.3), Second(15, 0.1, buffer="Replay")]
    with pytest.raises(ValueError, match=r"Second\(buffer='Replay'\).*buffer=None"):
        run(tmp_path / "second", pair, ckpt_path=path, max_epochs=1)


def test_two_sources_have_their_shares_and_every_part_says_whose_it_is(tmp_path):
    watch, pair = Watch(), [Replay(15, 0.2), Second(20, 0.3, policy="fifo")]
    tasks = {"a": Docs(0, 60), "b": Docs(1, 200)}
    module = run(tmp_path, pair, tasks, callbacks=[watch], every=1000)
    tokens, owners = Counter(), {None: "new", pair[0].buffer: "first", pair[1].buffer: "second"}
    assert watch.kinds[:30] == [None] * 30
    for rows, kinds in zip(module.seen[30:], watch.kinds[30:], strict=True):
        assert len(rows) == len(kinds)
        for (number, loss), (part,) in zip(rows, kinds, strict=True):
            tokens[owners[part.owner]] += loss
            assert part.replayed == (task_of(number) == 0) == (part.owner is not None)
            if part.owner is not None:
                assert int(part.owner.get(part.number)["input_ids"][0]) == number
    shares = {name: count / tokens.total() for name, count in tokens.items()}
    assert shares == {
        "new": pytest.approx(0.5, abs=0.005),
        "first": pytest.approx(0.2, abs=0.005),
        "second": pytest.approx(0.3, abs=0.005),
    }


def test_sources_that_leave_no_room_are_an_error_before_any_step(tmp_path):
    module = Learner()
    with pytest.raises((MisconfigurationException, ValueError), match=r"add up to 1\.1"):
        run(tmp_path, [Replay(15, 0.6), Second(15, 0.5)], module=module)
    assert len(module.seen) <= 16  # at the latest when there is something to replay


# ---------------------------------------------------------------------- shares


def shares_of(seen, weights=True) -> dict[int, float]:
    tokens = Counter()
    for rows in seen:
        for number, loss in rows:
            tokens[task_of(number)] += loss if weights else 1
    return {task: count / tokens.total() for task, count in sorted(tokens.items())}


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        ("uniform", lambda stored, seen: stored),
        ("task", lambda stored, seen: [1.0, 1.0, 1.0]),
        ("proportional", lambda stored, seen: seen),
        ("recency", lambda stored, seen: [1.0, 2.0, 4.0]),
    ],
)
def test_tasks_are_drawn_at_their_shares(tmp_path, draw, expected):
    # Few long documents, many short ones, and some of both: by samples, the shares would be others.
    tasks = {"a": Docs(0, 20, 30, 40), "b": Docs(1, 90, 4, 8), "c": Docs(2, 40, 8, 30), "d": Docs(3, 400, 8, 16)}
    replay = Replay(60, 0.4, policy="task_balanced", draw=draw)
    seen_by_d = []

    class Looking(Callback):
        def on_train_start(self, trainer, pl_module):
            if TaskCoordinator.of(trainer).position.name == "d":
                seen_by_d.extend([len(pl_module.seen), [number for number, *_ in stored(replay)]])

    module = run(tmp_path, replay, tasks, max_epochs=1, every=10_000, callbacks=[Looking()])

    def loss(docs, index):
        return int(docs[index]["loss_mask"][1:].sum())

    start, held = seen_by_d
    held = {task: {number for number in held if task_of(number) == task} for task in range(3)}
    assert [len(held[task]) for task in range(3)] == [20, 20, 20]
    docs = list(tasks.values())
    kept = [sum(loss(docs[task], number % 1000 - 1) for number in held[task]) for task in range(3)]
    seen = [len(docs[task]) * kept[task] / 20 for task in range(3)]
    sizes = expected(kept, seen)
    found = shares_of([[row for row in rows if task_of(row[0]) < 3] for rows in module.seen[start:]])
    for task, size in enumerate(sizes):
        assert found[task] == pytest.approx(size / sum(sizes), abs=0.02)
    total = shares_of(module.seen[start:])
    assert 1 - total[3] == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize(
    ("draw", "sizes"), [("task", [1, 1]), ("recency", [1, 2]), ("proportional", [40 * 25, 80 * 10])]
)
def test_tasks_are_drawn_from_at_their_shares_into_a_stream(tmp_path, tokenizer, draw, sizes):
    class Stream(Docs):
        def __iter__(self):
            return (self[i] for i in range(len(self)))

    buffer = ReplayBuffer(30, "task_balanced")
    for task, docs in enumerate((Docs(0, 40, 26, 26), Docs(1, 80, 11, 11))):
        for index in range(len(docs)):
            sample = docs[index] | {"loss_mask": torch.ones(len(docs[index]["input_ids"]), dtype=torch.bool)}
            buffer.add(sample, "ab"[task])
    loader = StreamLoader(lambda epoch: iter(Stream(2, 990)), 4, list)
    loader.mix_in(Mix(buffer, Curve.constant(0.4), "replace", 1, draw))
    seen = [[(int(s["input_ids"][0]), int(s["loss_mask"][1:].sum())) for s in batch] for batch in loader]
    found = shares_of([[row for row in rows if task_of(row[0]) < 2] for rows in seen])
    for task, size in enumerate(sizes):
        assert found[task] == pytest.approx(size / sum(sizes), abs=0.04)
    assert 1 - shares_of(seen)[2] == pytest.approx(0.4, abs=0.005)


def windows(seen, expected, size, largest):
    """Every window's share of replayed tokens is within 0.5 points of what is expected, or one record.

    Progress is the share of the task's new samples that were seen.
    """
    new = sum(task_of(number) > 0 for rows in seen for number, _ in rows)
    done, table = 0, []
    for rows in seen:
        fresh = sum(task_of(number) > 0 for number, _ in rows)
        tokens = sum(loss for _, loss in rows)
        table.append((tokens, sum(loss for n, loss in rows if task_of(n) == 0), expected((done + fresh / 2) / new)))
        done += fresh
    for begin in range(0, len(table) - size + 1):
        total = sum(tokens for tokens, _, _ in table[begin : begin + size])
        replayed = sum(old for _, old, _ in table[begin : begin + size])
        goal = sum(tokens * share for tokens, _, share in table[begin : begin + size])
        assert abs(replayed - goal) <= max(0.005 * total, largest), begin


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.2, lambda progress: 0.2),
        ([[0, 0.5], [1, 0.05]], lambda progress: 0.5 - 0.45 * progress),
        ([[0, 0.0], [0.5, 0.4], [1, 0.4]], lambda progress: min(0.8 * progress, 0.4)),
    ],
    ids=["constant", "falling", "rising, then constant"],
)
def test_the_share_follows_its_schedule_over_any_hundred_steps(tmp_path, ratio, expected, epochs):
    tasks = {"a": Docs(0, 60), "b": Docs(1, 780 // epochs)}
    module = run(tmp_path, Replay(40, ratio), tasks, max_epochs=epochs, every=10_000)
    start = next(i for i, rows in enumerate(module.seen) if any(task_of(number) == 1 for number, _ in rows))
    second = module.seen[start:]
    assert len(second) > 200
    new = Counter(number for rows in second for number, _ in rows if task_of(number) == 1)
    assert len(new) == len(tasks["b"])
    assert set(new.values()) == {epochs}
    windows(second, expected, 100, largest=12)


def test_one_over_t_gives_every_task_the_same_share(tmp_path):
    tasks = {"abcd"[task]: Docs(task, 120) for task in range(4)}
    module = run(tmp_path, Replay(1000, "1/t", draw="task"), tasks, max_epochs=1, every=10_000)
    starts = [
        next(i for i, rows in enumerate(module.seen) if any(task_of(number) == task for number, _ in rows))
        for task in range(4)
    ]
    for task, (begin, end) in enumerate(zip(starts, [*starts[1:], len(module.seen)], strict=True)):
        found = shares_of(module.seen[begin:end])
        assert found.keys() == set(range(task + 1))
        for share in found.values():
            assert share == pytest.approx(1 / (task + 1), abs=0.01)


# ---------------------------------------------------------------------- policies in a sequence


def hidden(module, dataset) -> torch.Tensor:
    """What goes into the last layer of the toy classifier, in evaluation mode."""
    with torch.no_grad():
        return module.eval().net[:-1](dataset.tensors[0])


def fit_one(root, replay, tasks, **settings):
    torch.manual_seed(0)
    module = Classifier(dropout=0.5)
    data = TaskDataModule(tasks, batch_size=8)
    fit_tasks(trainer(root, [replay, checkpoints(1000)], **{"max_epochs": 1} | settings), module, data)
    return module


def positions(replay, task) -> set[int]:
    buffer = replay.buffer
    infos = [buffer.info(number) for number in buffer.numbers]
    return {info.position for info in infos if info.task == task}


@pytest.mark.parametrize("policy", ["herding", "k_center"])
def test_what_stands_for_a_task_is_chosen_by_its_hidden_states(tmp_path, policy):
    dataset, replay = classification(0, 60), Replay(12, 0.3, policy=policy)
    states = hidden(fit_one(tmp_path, replay, {"a": dataset}), dataset).double()
    if policy == "herding":
        unit = states / states.norm(dim=1, keepdim=True)
        chosen, total = [], torch.zeros_like(unit[0])
        for k in range(1, 13):
            distance = (unit.mean(0) - (unit + total) / k).norm(dim=1)
            distance[chosen] = torch.inf
            chosen.append(int(distance.argmin()))
            total += unit[chosen[-1]]
    else:
        chosen = [int((states - states.mean(0)).norm(dim=1).argmin())]
        while len(chosen) < 12:
            chosen.append(int(torch.cdist(states, states[chosen]).min(1).values.argmax()))
    assert positions(replay, "a") == set(chosen)


@pytest.mark.parametrize("policy", ["herding", "k_center", "task_balanced"])
def test_what_a_small_task_does_not_need_a_later_one_gets(tmp_path, policy):
    counts = []

    class Counting(Replay):
        def on_task_end(self, trainer, pl_module):
            super().on_task_end(trainer, pl_module)
            counts.append(self.buffer.counts())

    tasks = {"small": classification(0, 6), "a": classification(1, 50), "b": classification(2, 50)}
    fit_one(tmp_path, Counting(24, 0.3, policy=policy), tasks)
    assert counts == [{"small": 6}, {"small": 6, "a": 18}, {"small": 6, "a": 9, "b": 9}]


@pytest.mark.parametrize("policy", ["herding", "k_center", "fifo"])
def test_a_budget_in_bytes_with_room_for_all_keeps_all(tmp_path, policy):
    replay = Replay(1_000_000, 0.3, policy=policy, unit="bytes")
    fit_one(tmp_path, replay, {"ab"[task]: classification(task, 20) for task in range(2)})
    assert replay.buffer.counts() == {"a": 20, "b": 20}


def test_classes_have_equal_shares(tmp_path):
    x = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0] * 60 + [1] * 25 + [2] * 5)
    replay = Replay(25, 0.3, policy="class_balanced")
    fit_one(tmp_path, replay, {"a": TensorDataset(x, y)})
    assert Counter(int(label) for _, label in replay.buffer.items) == {0: 10, 1: 10, 2: 5}


class Knowing(Classifier):
    """Has a loss on one sample in six only."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (nn.functional.cross_entropy(self(x), y % 3, reduction="none") * (y >= 3)).mean()


def test_what_surprises_at_the_end_of_the_task_is_kept(tmp_path):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 3 + 3 * (torch.arange(60) % 6 == 5).long()
    for size in (10, 30):
        replay = Replay(size, 0.3, policy="surprise")
        torch.manual_seed(0)
        data = TaskDataModule({"a": TensorDataset(x, y)}, batch_size=8)
        settings = {"max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
        fit_tasks(trainer(tmp_path / str(size), [replay, checkpoints(1000)], **settings), Knowing(), data)
        assert positions(replay, "a") >= set(range(5, 60, 6))
        assert len(replay.buffer) == size  # what has no loss fills the room that is left


# ---------------------------------------------------------------------- removal in the middle of a run


def on_disk(root, number: int) -> bool:
    """Whether a document of :class:`Docs` lies anywhere below a folder: its number, again and again."""
    for path in Path(root, "buffers").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        same = np.frombuffer(content[: len(content) // 4 * 4], dtype="<i4") == number
        if len(same) and np.convolve(same, np.ones(4, dtype=int)).max() == 4:
            return True
    return False


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fill", ["task_end", "training"])
def test_a_removed_sample_is_not_seen_again_in_this_epoch_or_any_other(tmp_path, fill, workers):
    replay = Replay(30, 0.5, fill=fill)
    gone = set()

    def remove():
        # Half of what is stored of a, and what is stored of b: also from being stored again.
        gone.update(number for number, *_ in stored(replay) if number % 2 == 0)
        assert replay.buffer.remove(lambda s: int(s.sample["input_ids"][0]) % 2 == 0) >= len(gone)

    data = TaskDataModule({"abc"[t]: Docs(t) for t in range(3)}, batch_size=4, num_workers=workers, collate_fn=list)
    module = run(tmp_path, replay, callbacks=[Watch(s21=remove)], data=data)
    assert len(gone) > 4
    old = {number for number in gone if task_of(number) == 0}
    assert old
    assert any(number in old for rows in module.seen[16:21] for number, _ in rows)
    on_its_way = 1 if workers == 0 else 2 * 2 + 1
    assert not any(number in old for rows in module.seen[21 + on_its_way :] for number, _ in rows)
    assert any(task_of(number) == 0 for rows in module.seen[40:] for number, _ in rows)
    assert not {number for number, *_ in stored(replay)} & gone
    assert not any(on_disk(tmp_path, number) for number in gone)
    # From every checkpoint, also from those that were written before.
    for path in [tmp_path / "tasks" / "0-a.ckpt", *sorted((tmp_path / "checkpoints" / "1-b").glob("*.ckpt"))[:2]]:
        again = Replay(30, 0.5, fill=fill)
        resumed = run(tmp_path, again, ckpt_path=path)
        assert not any(number in old for rows in resumed.seen for number, _ in rows)
        assert not {number for number, *_ in stored(again)} & gone
    assert not any(on_disk(tmp_path, number) for number in gone)


@pytest.mark.parametrize("kind", ["lists", "stream"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_removed_document_is_not_seen_again_in_streams_and_blocks(tmp_path, tokenizer, kind, packing):
    replay, old, removed_at = Replay(20, 0.5, fill="training"), set(), []
    module_of = {}

    def remove():
        names = {tokenizer.decode(item["input_ids"]).replace(" ", "")[:5] for item in replay.buffer.items}
        chosen = sorted(name for name in names if name[0] == "a")[::2]
        old.update(int(name[1:]) for name in chosen)
        replay.buffer.remove(lambda s: tokenizer.decode(s.sample["input_ids"]).replace(" ", "")[:5] in chosen)
        removed_at.append(len(module_of["module"].seen))

    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            module_of["module"] = pl_module

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if TaskCoordinator.of(trainer).position.name == "b" and batch_idx == 3 and not removed_at:
                remove()

    settings = {"kind": kind, "packing": packing, "counts": (26, 26), "max_epochs": 2, "every": 1000}
    module = text_run(tmp_path, replay, tokenizer, callbacks=[Early()], **settings)
    assert len(old) >= 3
    # A stream's blocks that are being filled, and the batch that Lightning fetches ahead, are on their way.
    on_its_way = 6 if kind == "stream" and packing else 2
    later = module.seen[removed_at[0] + on_its_way :]
    assert len(later) > 4
    assert not any(number in old for rows in later for number, _ in rows)
    assert any(task_of(number) == 0 for rows in later for number, _ in rows)
    files = [path.read_bytes() for path in (tmp_path / "buffers").rglob("*") if path.is_file()]
    for number in old:
        ids = tokenizer(text("a", number)["text"])["input_ids"]
        wanted = torch.tensor(ids[:5], dtype=torch.int32).numpy().tobytes()
        assert not any(wanted in content for content in files)


def test_a_removal_between_two_runs_reaches_the_second(tmp_path):
    folder = str(tmp_path / "kept")
    first = Replay(30, 0.3, folder=folder)
    run(tmp_path / "first", first, tasks=2, max_epochs=1)
    gone = {number for number, *_ in stored(first) if task_of(number) == 0}
    assert remove_from_folder(folder, lambda s: s.task == "a") >= len(gone)
    second = Replay(30, 0.3, folder=folder)
    module = run(tmp_path / "second", second, tasks={"c": Docs(2), "a again": Docs(0)}, max_epochs=1)
    assert not any(number in gone for rows in module.seen[:8] for number, _ in rows)
    assert any(task_of(number) == 1 for rows in module.seen for number, _ in rows)
    assert not {number for number, *_ in stored(second)} & gone


# ---------------------------------------------------------------------- full disks


def test_a_disk_that_is_sure_to_be_too_full_is_found_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    module = Learner()
    with pytest.raises(OSError, match=r"Replay: the buffer of task '[ab]'.*1,000 left.*buffer_size"):
        run(tmp_path, Replay(20, 0.3), module=module)
    assert module.seen == []


@pytest.mark.parametrize("fill", ["task_end", "training"])
def test_a_disk_that_gets_full_stops_the_run_which_goes_on_when_there_is_room(tmp_path, monkeypatch, fill):
    reference = Replay(15, 0.3, fill=fill)
    module = run(tmp_path / "whole", reference)
    opened, tasks = Path.open, []

    def full(path, mode="r", *args, **settings):
        if set(mode) & set("wa+") and "buffers" in path.parts and len(tasks) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *args, **settings)

    class Tasks(Callback):
        def on_train_start(self, trainer, pl_module):
            tasks.append(trainer.global_step)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"buffers.Replay.*the disk is full.*make room"):
            run(tmp_path / "stopped", Replay(15, 0.3, fill=fill), callbacks=[Tasks()])
    replay = Replay(15, 0.3, fill=fill)
    resumed = run(tmp_path / "stopped", replay, ckpt_path="last")
    assert resumed.seen == module.seen[len(module.seen) - len(resumed.seen) :]
    assert torch.equal(resumed.weight, module.weight)
    assert stored(replay) == stored(reference)


def test_a_run_that_goes_on_in_another_folder_leaves_the_first_ones_files_alone(tmp_path):
    run(tmp_path / "first", Replay(15, 0.3), tasks=2)
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    replays = []
    for name in ("second", "third"):
        replays.append(Replay(15, 0.3))
        run(tmp_path / name, replays[-1], ckpt_path=tmp_path / "first" / "tasks" / "1-b.ckpt")
        assert DiskStore.first_free(tmp_path / name / "buffers" / "Replay") > 0
    assert stored(replays[0]) == stored(replays[1])
    after = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    assert before == after


def test_the_buffer_lies_in_the_folder_of_its_own_run_and_the_report_says_where(tmp_path):
    """Also where tasks are evaluated first: loggers, whose folder it is, are silent then."""
    logger = CSVLogger(tmp_path / "logs", name="run")
    data = TaskDataModule({name: classification(seed) for seed, name in enumerate("ab")})
    replay, matrix = Replay(15, 0.3), TaskMatrix()
    run(tmp_path, replay, callbacks=[matrix], module=Classifier(), data=data, logger=logger)
    folder = tmp_path / "logs" / "run" / "version_0"
    assert sorted(path.name for path in (folder / "buffers" / "Replay").iterdir()) == ["0000", "buffer.pt", "live.json"]
    assert not (tmp_path / "buffers").exists()
    costs = [{"steps": 1, "train_seconds": 1.0, "end_seconds": 1.0}] * 2
    text = format_report(build_report(matrix, costs, [(replay, "Replay"), (matrix, "TaskMatrix")]), folder)
    assert f"{folder / 'buffers' / 'Replay'}: the 15 samples that Replay keeps" in text
