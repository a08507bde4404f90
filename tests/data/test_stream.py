"""Streams: the batches of a list without shuffling, shared by ranks, resumed at their place, counted as trained."""

from __future__ import annotations

import itertools
import json

import datasets
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from stand_in import chats, save_stand_in, sentence
from toys import trainer

from lightning_cl import EWC, CausalLM, KLToBase, Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data.stream import StreamLoader
from lightning_cl.data.text.tokenizer import load_tokenizer
from lightning_cl.data.text.tokens import tokenize

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"), attention_dropout=0.1)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))


def records(count=23, start=0):
    """Texts of different lengths."""
    return [{"text": sentence(i, 3 + i * 5 % 11)} for i in range(start, start + count)]


def stream(items):
    return datasets.Dataset.from_list(items).to_iterable_dataset()


def generated(items):
    return datasets.IterableDataset.from_generator(lambda: iter(items))


def samples_of(lengths):
    """Samples whose tokens are their number; the first half of each bears no loss."""
    return [
        {"input_ids": torch.full((n,), i, dtype=torch.int32), "loss_mask": torch.arange(n) >= n // 2}
        for i, n in enumerate(lengths)
    ]


LENGTHS = [4, 9, 3, 12, 7, 2, 16, 5, 5, 8, 11, 3, 6, 2, 14, 9, 4]


def loader_of(lengths=LENGTHS, batch_size=4, **settings):
    """Batches as lists of numbers, and with packing as lists of lists."""

    def numbers(rows):
        number = [[int(s["input_ids"][0]) for s in (row if isinstance(row, list) else [row])] for row in rows]
        return number if "block_length" in settings else [n for (n,) in number]

    return StreamLoader(lambda epoch: iter(samples_of(lengths)), batch_size, numbers, **settings)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("make", [stream, generated], ids=["to_iterable_dataset", "from_generator"])
def test_batches_are_those_of_the_list_in_its_order(make, tokenizer):
    items = records()
    blocks = tokenize([item["text"] for item in items], tokenizer, 16)  # independent of the loader
    data = TaskDataModule({"a": make(items)}, tokenizer=tokenizer, max_length=16, batch_size=4)
    data.setup()
    found = list(data.train_loader(data.current))
    rows = [
        row[mask.bool()].tolist()
        for batch in found
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == [block for block in blocks if len(block) > 1]
    assert [len(batch["input_ids"]) for batch in found[:-1]] == [4] * (len(found) - 1)


def packed_documents(batches):
    """Tokens and labels of the documents in packed batches, in the order of the rows."""
    found = []
    for batch in batches:
        for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
            starts = [i for i, position in enumerate(positions.tolist()) if position == 0] + [len(ids)]
            for begin, end in itertools.pairwise(starts):
                # The padding is a run of its own without any loss.
                if (labels[begin:end] != -100).any():
                    found.append((tuple(ids[begin:end].tolist()), tuple(labels[begin:end].tolist())))
    return found


def test_packed_blocks_hold_each_sample_once_as_it_is(tokenizer):
    items = records() + chats(6)
    whole = TaskDataModule({"a": {"train": items, "val": ["x"]}}, tokenizer=tokenizer, max_length=64)
    data = TaskDataModule({"a": stream_of(items)}, tokenizer=tokenizer, max_length=64, batch_size=2, packing=True)
    for module in (whole, data):
        module.setup()
    expected = []
    for sample in (whole._prepared["a"].train[i] for i in range(len(whole._prepared["a"].train))):
        labels = sample["input_ids"].masked_fill(~sample["loss_mask"], -100).tolist()
        expected.append((tuple(sample["input_ids"].tolist()), (-100, *labels[1:])))
    batches = list(data.train_loader(data.current))
    assert sorted(packed_documents(batches)) == sorted(expected)
    assert all(batch["input_ids"].shape[1] <= 64 for batch in batches)
    assert sum(batch["input_ids"].shape[0] for batch in batches) < len(expected) / 2


def stream_of(items):
    """As a stream of records with different keys, which a table would not keep."""
    return datasets.IterableDataset.from_generator(lambda: iter(items))


def test_first_fit_by_hand():
    # Blocks of 16: 4 9 3 fill one; 12 2 (16 fills its own at once) …
    blocks = [row for batch in loader_of([4, 9, 3, 12, 2, 16, 7], batch_size=1, block_length=16) for row in batch]
    assert blocks == [[0, 1, 2], [5], [3, 4], [6]]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_lose_and_repeat_nothing_and_overflow_never(seed):
    lengths = torch.randint(1, 17, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
    blocks = [row for batch in loader_of(lengths, block_length=16) for row in batch]
    assert sorted(i for block in blocks for i in block) == list(range(300))
    assert all(sum(lengths[i] for i in block) <= 16 for block in blocks)
    assert sum(lengths) / (16 * len(blocks)) > 0.85  # next to no padding
    # What comes late is not held back for long: at most the eight open blocks lie between.
    assert all(max(block) - min(block) < 150 for block in blocks)


# ---------------------------------------------------------------------- ranks


@pytest.mark.parametrize("settings", [{}, {"block_length": 16}], ids=["rows", "blocks"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(settings, world):
    one = list(loader_of(batch_size=2 * world, **settings))
    ranks = [list(loader_of(batch_size=2, rank=rank, world_size=world, **settings)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # the same number of steps on each, or they would hang
    for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert len({len(part) for part in parts}) == 1
        joined = [row for part in parts for row in part]
        # The last batch wraps around: nothing is missing, and only there may something come twice.
        assert {str(row) for row in joined} == {str(row) for row in batch}
        assert len(batch) < 2 * world or len(joined) == len(batch)


# ---------------------------------------------------------------------- place and counts


@pytest.mark.parametrize("settings", [{}, {"block_length": 16}], ids=["rows", "blocks"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_place_is_found_again(settings, epoch):
    whole = loader_of(**settings)
    whole.set_epoch(epoch)
    batches = list(whole)
    for stop in range(len(batches) + 1):
        stopped = loader_of(**settings)
        stopped.set_epoch(epoch)
        iterator = iter(stopped)
        for _ in range(stop):
            next(iterator)
            stopped.begin()
        resumed = loader_of(**settings)
        resumed.resume_from(stopped.position())
        resumed.set_epoch(epoch)
        rest = []
        for batch in resumed:
            resumed.begin()
            rest.append(batch)
        # At the end of a pass the next one follows: this stream is the same in each.
        assert rest == (batches[stop:] or batches)
        if stop < len(batches):
            assert resumed.counts == counts_of(loader_of(**settings))


def counts_of(loader):
    """What a whole pass gives out."""
    for _ in loader:
        loader.begin()
    return loader.counts


def test_counts_are_those_of_the_samples_less_what_is_in_flight():
    loader = loader_of(batch_size=3)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
        loader.begin()
    next(iterator)  # fetched, and not begun with
    # By hand: lengths 4 9 3 | 12 7 2, loss on the second half, never on the first token.
    assert loader.counts == {
        "new_samples": 6,
        "replayed_samples": 0,
        "new_tokens": 2 + 5 + 2 + 6 + 4 + 1,
        "replayed_tokens": 0,
    }
    assert loader.position(1)["counts"]["new_samples"] == 3
    assert loader.position(1)["counts"]["new_tokens"] == 9
    place = loader.position(1)
    assert (place["epoch"], place["position"], [len(rows) for rows in place["pending"]]) == (0, 1, [3, 3])


def test_a_pass_apart_disturbs_neither_place_nor_counts():
    loader = loader_of(block_length=16)
    iterator = iter(loader)
    first = next(iterator)
    before = loader.position()
    apart = loader.apart()
    apart.collate_fn = lambda rows: [int(row["input_ids"][0]) for row in rows]
    assert [i for rows in apart for i in rows] == list(range(len(LENGTHS)))  # unpacked, from the beginning
    assert loader.position() == before
    assert [first, *iterator] == list(loader_of(block_length=16))


# ---------------------------------------------------------------------- under fit_tasks


class Kill(Callback):
    """Raises in the middle of a task, as Ctrl-C or an error would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class Seen(Callback):
    """What the model was really trained on."""

    def __init__(self):
        self.samples = self.tokens = 0
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        labels = batch["labels"][:, 1:]
        self.samples += len(labels)
        self.tokens += int((labels != -100).sum())
        self.batches.append(batch["input_ids"].tolist())


def tasks_of(folder, kind="stream", **settings):
    make = stream if kind == "stream" else generated
    tasks = {
        name: {"train": make(records(23, 50 * i)), "val": [sentence(900 + i)], "batch_size": 4 + i}
        for i, name in enumerate("ab")
    }
    return TaskDataModule(tasks, tokenizer=folder, max_length=24, **settings)


def run(root, folder, callbacks=(), ckpt_path=None, data=None, model=None, **settings):
    L.seed_everything(3, verbose=False)
    data = tasks_of(folder) if data is None else data
    used = trainer(root, [*callbacks], **({"max_steps": 4, "max_epochs": -1} | settings))
    module = CausalLM(folder) if model is None else model
    fit_tasks(used, module, data, ckpt_path)
    costs = [
        {key: value for key, value in cost.items() if not key.endswith("seconds")}
        for cost in TaskCoordinator.of(used).costs
    ]
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}, costs


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("kind", ["stream", "generator"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "blocks"])
def test_trains_in_order_and_counts_what_it_trained_on(tmp_path, folder, kind, packing):
    seen = Seen()
    data = tasks_of(folder, kind, packing=packing)
    _, costs = run(tmp_path, folder, [seen], data=data)
    expected = [
        batch["input_ids"].tolist()
        for task in data.trained_tasks
        for batch in itertools.islice(data.train_loader(task), 4)
    ]
    assert seen.batches == expected
    assert [cost["steps"] for cost in costs] == [4, 4]
    assert sum(cost["new_tokens"] for cost in costs) == seen.tokens
    assert packing or [cost["new_samples"] for cost in costs] == [16, 20]
    assert all(cost["replayed_samples"] == cost["replayed_tokens"] == 0 for cost in costs)


@pytest.mark.parametrize("limits", [{"max_steps": 9}, {"max_epochs": 2, "max_steps": 100}], ids=["steps", "epochs"])
def test_more_than_one_epoch(tmp_path, folder, limits):
    seen = Seen()
    data = tasks_of(folder)
    _, costs = run(tmp_path, folder, [seen], data=data, **limits)
    epoch = [batch["input_ids"].tolist() for batch in data.train_loader(data.trained_tasks[0])]
    steps = 9 if "max_epochs" not in limits else 2 * len(epoch)
    assert seen.batches[:steps] == [*epoch, *epoch][:steps]
    assert costs[0]["steps"] == steps
    assert costs[0]["new_samples"] == sum(len(batch) for batch in seen.batches[:steps])


def test_a_stream_that_shuffles_is_told_the_epoch(tmp_path, folder):
    """And a resume in the second epoch gets the second epoch's order."""
    items = records(23)

    def data():
        shuffled = stream(items).shuffle(seed=1, buffer_size=23)
        return TaskDataModule({"a": {"train": shuffled, "val": ["x"]}}, tokenizer=folder, max_length=24, batch_size=4)

    seen = Seen()
    save = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    weights, costs = run(tmp_path / "1", folder, [seen, save], data=data(), max_steps=11)
    assert seen.batches[:5] != seen.batches[6:11]
    for step in range(5, 9):  # also from the end of the first epoch
        (checkpoint,) = (tmp_path / "1").rglob(f"step={step}.ckpt")
        again = Seen()
        resumed, same_costs = run(tmp_path / str(step), folder, [again], checkpoint, data=data(), max_steps=11)
        assert again.batches == seen.batches[step:]
        assert_same(weights, resumed)
        assert costs == same_costs


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_resumed_from_any_checkpoint_equals_never_stopped(tmp_path, folder, packing, settings):
    def callbacks():
        return [EWC(0.1, samples=3), ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")]

    def data():
        return tasks_of(folder, packing=packing)

    weights, costs = run(tmp_path / "whole", folder, callbacks(), data=data(), max_steps=3, **settings)
    checkpoints = sorted(tmp_path.rglob("*.ckpt"))
    names = {f"{path.parent.name}/{path.name}" for path in checkpoints}
    assert {"0-a/step=2.ckpt", "1-b/step=5.ckpt", "tasks/0-a.ckpt"} <= names
    for number, checkpoint in enumerate(checkpoints):
        resumed = run(tmp_path / str(number), folder, callbacks(), checkpoint, data=data(), max_steps=3, **settings)
        assert_same(weights, resumed[0])
        assert costs == resumed[1], checkpoint


@pytest.mark.parametrize("step", [2, 5])
def test_killed_inside_a_task_and_resumed(tmp_path, folder, step):
    """With the checkpoint that Lightning writes while the error is handled: a batch is in flight then."""
    save = L.pytorch.callbacks.OnExceptionCheckpoint(tmp_path, filename="killed")
    weights, costs = run(tmp_path / "whole", folder)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", folder, [Kill(step), save])
    state = torch.load(tmp_path / "killed.ckpt", weights_only=True)["lightning_cl"]
    assert state["loader"]["position"] == step % 4
    resumed = run(tmp_path / "resumed", folder, [], tmp_path / "killed.ckpt")
    assert_same(weights, resumed[0])
    assert costs == resumed[1]


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "blocks"])
def test_passes_for_fisher_and_kl_disturb_nothing(tmp_path, folder, packing):
    """Strength 0 still measures: training, its counts and its order are as without. Both read the training stream."""

    def data():
        tasks = {name: stream(records(23, 50 * i)) for i, name in enumerate("ab")}
        return TaskDataModule(tasks, tokenizer=folder, max_length=24, batch_size=3, packing=packing)

    plain, measured = Seen(), Seen()
    without = run(tmp_path / "1", folder, [plain], data=data())
    ewc, kl = EWC(0.0, samples=5), KLToBase(samples=5)
    with_ = run(tmp_path / "2", folder, [measured, ewc, kl], data=data())
    assert_same(without[0], with_[0])
    assert without[1] == with_[1]
    assert plain.batches == measured.batches
    assert sum(float(t.sum()) for t in ewc.importance.values()) > 0
    assert all(value > 0 for value in kl.kl.values())


def test_fisher_of_a_stream_is_that_of_its_first_samples_as_a_list(tmp_path, folder):
    """Also with packing, and whatever the batch size: each sample counts by itself."""

    def importance(source, **settings):
        ewc = EWC(0.0, samples=100, estimator="empirical")
        tasks = {"a": {"train": source, "val": ["x"]}}
        data = TaskDataModule(tasks, tokenizer=folder, max_length=24, batch_size=4, **settings)
        # No step changes the weights: both are measured at the same place.
        frozen = CausalLM(folder, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), schedule=None)
        run(tmp_path, folder, [ewc], data=data, model=frozen, max_steps=1)
        return ewc.importance

    whole = importance(records())
    for found in (importance(stream(records())), importance(stream(records()), packing=True)):
        assert max(float((found[n] - whole[n]).abs().max() / whole[n].abs().max()) for n in whole) < 1e-4


def test_the_matrix_is_measured_on_the_validation_data(tmp_path, folder):
    matrix = TaskMatrix()
    run(tmp_path, folder, [matrix])
    assert matrix.matrix.shape == (3, 2)
    assert not matrix.matrix.isnan().any()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [task["new_samples"] for task in report["costs"]["tasks"]] == [16, 20]


def test_without_validation_data_the_matrix_says_what_to_give(tmp_path, folder):
    data = TaskDataModule({"a": stream(records())}, tokenizer=folder, max_length=24)
    with pytest.raises(MisconfigurationException, match=r"'a'.*Task\(val=…\)"):
        run(tmp_path, folder, [TaskMatrix()], data=data)


def test_replay_is_refused_before_training_and_names_the_stream(tmp_path, folder):
    seen = Seen()
    data = TaskDataModule(
        {"a": [sentence(i) for i in range(9)], "b": {"train": stream(records()), "val": ["x"]}},
        tokenizer=folder,
        max_length=24,
    )
    with pytest.raises(MisconfigurationException, match=r"Replay: .*task 'b'.*stream.*fill='training'"):
        run(tmp_path, folder, [seen, Replay(10, 0.2)], data=data)
    assert seen.batches == []


def test_reloading_the_loader_each_epoch_keeps_the_counts(tmp_path, folder):
    seen = Seen()
    limits = {"max_epochs": 2, "max_steps": 100, "reload_dataloaders_every_n_epochs": 1}
    _, costs = run(tmp_path, folder, [seen], **limits)
    assert sum(cost["new_samples"] for cost in costs) == seen.samples


def test_batches_beyond_a_limit_are_not_counted(tmp_path, folder):
    """At the end of each epoch one was fetched ahead that nobody trains on."""
    seen = Seen()
    _, costs = run(tmp_path, folder, [seen], max_epochs=3, max_steps=100, limit_train_batches=3)
    assert [cost["steps"] for cost in costs] == [9, 9]
    assert sum(cost["new_samples"] for cost in costs) == seen.samples
    assert sum(cost["new_tokens"] for cost in costs) == seen.tokens


def test_streams_by_split(tmp_path, folder):
    """As ``load_dataset(…, streaming=True)`` gives them."""
    splits = datasets.IterableDatasetDict({"train": stream(records()), "validation": stream(records(4, 80))})
    seen, matrix = Seen(), TaskMatrix()
    data = TaskDataModule({"a": splits}, tokenizer=folder, max_length=24, batch_size=4)
    run(tmp_path, folder, [seen, matrix], data=data, max_steps=2)
    tasks = {"a": {"train": ["x y z"], "val": records(4, 80)}}
    whole = TaskDataModule(tasks, tokenizer=folder, max_length=24, batch_size=4)
    whole.setup()
    val = [batch["input_ids"].tolist() for batch in data.val_loader(data.current)]
    assert val == [batch["input_ids"].tolist() for batch in whole.val_loader(whole.current)]
    assert not matrix.matrix.isnan().any()


# ---------------------------------------------------------------------- what is wrong with a stream


BAD = [*records(5), {"text": None}, *records(5, 20)]


def test_a_bad_record_stops_the_run_with_its_place(tmp_path, folder):
    data = TaskDataModule({"a": {"train": generated(BAD), "val": ["x"]}}, tokenizer=folder, max_length=24)
    with pytest.raises(ValueError, match=r"task 'a', train, row 5"):
        run(tmp_path, folder, data=data)


def test_a_bad_record_that_is_skipped_is_warned_about(tmp_path, folder):
    data = TaskDataModule(
        {"a": {"train": generated(BAD), "val": ["x"]}},
        tokenizer=folder,
        max_length=24,
        batch_size=2,
        on_bad_record="skip",
    )
    with pytest.warns(UserWarning, match=r"task 'a', train.*row 5"):
        _, costs = run(tmp_path, folder, data=data, max_steps=5)
    assert costs[0]["new_samples"] == 10


class Endless(Callback):
    """So many epochs of one task are a loop without an end."""

    def __init__(self):
        self.epochs = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs += 1
        if self.epochs > 3:
            raise KeyError("would go on for ever")


def test_a_stream_without_a_token_to_learn_does_not_go_on_for_ever(tmp_path, folder):
    """As where each prompt is longer than `max_length`; a list of the same is an error, too."""
    items = [{"prompt": sentence(i, 20), "completion": "yes"} for i in range(5)]
    for source in (items, stream(items)):
        data = TaskDataModule({"a": {"train": source, "val": ["x y z"]}}, tokenizer=folder, max_length=8)
        with pytest.raises((ValueError, RuntimeError), match=r"task 'a'.*no token to predict"):
            run(tmp_path, folder, [Endless()], data=data, max_steps=2)
