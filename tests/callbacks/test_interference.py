"""Maximally interfered retrieval: what the last steps have hurt is replayed next."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import Dataset
from toys import Classifier, classification, trainer

from lightning_cl import Replay, TaskDataModule, fit_tasks
from lightning_cl.callbacks.replay.interference import CANDIDATES, EVERY
from lightning_cl.core.coordinator import TaskCoordinator


class Points(Dataset):
    """Samples ``(group, value)``: the loss of a group depends on that group's weight alone."""

    def __init__(self, groups):
        self.groups = groups

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        return torch.tensor(self.groups[index])


class OneWeightPerGroup(L.LightningModule):
    """Loss of a sample of group g: w_g². New samples (group 2) push w_0 up, and leave w_1 where it is."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))

    def training_step(self, groups, batch_idx):
        own = self.w[groups].square()
        pushed = torch.where(groups == 2, own - 3.0 * self.w[0], own)
        return pushed.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Replayed(L.Callback):
    """The groups of the replayed samples, by step."""

    def __init__(self):
        self.groups = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.datamodule.index == 1:
            self.groups.append([int(g) for g in batch if g != 2])


def fit(tmp_path, draw, epochs=4):
    seen, module = Replayed(), OneWeightPerGroup()
    tasks = {"old": Points([0] * 20 + [1] * 60), "new": Points([2] * 160)}
    replay = Replay(80, 0.5, draw=draw, seed=3)
    data = TaskDataModule(tasks, batch_size=8)
    fit_tasks(trainer(tmp_path, [seen, replay], max_epochs=epochs), module, data)
    return seen.groups


def test_what_training_hurts_is_replayed_more_than_its_share(tmp_path):
    uniform, interfered = ([g for step in fit(tmp_path, draw) for g in step] for draw in ("uniform", "interfered"))
    share = [groups.count(0) / len(groups) for groups in (uniform, interfered)]
    assert share[0] == pytest.approx(0.25, abs=0.03)  # as many as are stored
    assert share[1] > share[0] + 0.03
    assert len(uniform) == len(interfered)  # another choice, not another number


def test_only_those_whose_loss_rises_are_chosen(tmp_path):
    """In the first batch behind each look, all that were chosen are of the group that is hurt, as many as there are."""
    groups = fit(tmp_path, "interfered", epochs=1)
    hurt = [sum(g == 0 for g in step) / len(step) for step in groups[1::EVERY] if step]
    # Of 16 candidates a quarter are of group 0; four rows of a batch are replayed: nearly all of them are.
    assert sum(hurt) / len(hurt) > 0.6
    assert CANDIDATES == 16


def test_the_share_of_the_tokens_stays_the_plans(tmp_path, monkeypatch):
    class Tokens(Dataset):
        def __init__(self, seed, count):
            lengths = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
            self.rows = [torch.full((length,), seed, dtype=torch.int32) for length in lengths]

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            row = self.rows[index]
            return {"input_ids": row, "loss_mask": torch.ones(len(row), dtype=torch.bool)}

    class Counter(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.w, self.rows = nn.Parameter(torch.ones(50)), []

        def training_step(self, batch, batch_idx):
            if self.training:
                parts = [part for row in TaskCoordinator.of(self.trainer).kinds or [] for part in row]
                lengths = (batch["labels"][:, 1:] != -100).sum(1).tolist()
                pairs = list(zip(parts, lengths, strict=True)) if parts else []
                self.rows.append((sum(n for part, n in pairs if part.replayed), sum(lengths)))
            ids = batch["input_ids"].clamp_max(49)
            return (self.w[ids] * (1 + ids)).mean() ** 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    from lightning_cl.data.text.collator import TokenCollator

    module = Counter()
    data = TaskDataModule({"a": Tokens(7, 80), "b": Tokens(9, 600)}, batch_size=8, collate_fn=TokenCollator(0))
    replay = Replay(80, 0.3, draw="interfered")
    fit_tasks(trainer(tmp_path, [replay], max_epochs=1), module, data)
    rows = torch.tensor(module.rows[10:]).double()
    for start in range(len(rows) - 40):
        replayed, everything = rows[start : start + 40].sum(0).tolist()
        assert abs(replayed - 0.3 * everything) <= 2 * 40


@pytest.mark.parametrize("step", [13, 20])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, step):
    def run(folder, stop=None, ckpt_path=None):
        L.seed_everything(1, verbose=False)
        module = Classifier(dropout=0.2)
        save = L.pytorch.callbacks.ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1)
        callbacks = [Replay(30, 0.4, draw="interfered"), save]
        tasks = {name: classification(seed, 60) for seed, name in enumerate("ab")}
        made = trainer(tmp_path / folder, callbacks, max_epochs=3, enable_checkpointing=True)
        fit_tasks(made, module, TaskDataModule(tasks, batch_size=6), ckpt_path=ckpt_path)
        return module, callbacks[0]

    whole, replay = run("whole")
    steps = sorted((tmp_path / "whole").rglob(f"*step={30 + step}.ckpt"))
    resumed, again = run("resumed", ckpt_path=steps[0])
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert list(again.buffer.tasks) == list(replay.buffer.tasks)


def test_training_leaves_no_trace_of_the_looks(tmp_path):
    """Dropout, batch norm and the global random state go on as if nobody had looked, while nothing is chosen."""

    def run(draw, monkey):
        L.seed_everything(2, verbose=False)
        module = Classifier(dropout=0.3, batch_norm=True)
        tasks = {name: classification(seed) for seed, name in enumerate("ab")}
        if monkey is not None:
            monkey.setattr(
                "lightning_cl.callbacks.replay.interference.Interference.choose", lambda self, s, index, most: index
            )
        fit_tasks(trainer(tmp_path, [Replay(30, 0.4, draw=draw)], max_epochs=2), module, TaskDataModule(tasks))
        return module.state_dict()

    plain = run("uniform", None)
    with pytest.MonkeyPatch.context() as monkey:
        looked = run("interfered", monkey)
    assert all(torch.equal(plain[name], looked[name]) for name in plain)


def test_a_stream_is_refused(tmp_path):
    import datasets

    from lightning_cl.data import TrainedBPE

    stream = datasets.Dataset.from_dict({"text": ["some text"] * 9}).to_iterable_dataset()
    data = TaskDataModule(
        {"a": ["some text"] * 9, "b": {"train": stream, "val": ["text"]}}, tokenizer=TrainedBPE(257, str(tmp_path))
    )
    with pytest.raises(MisconfigurationException, match=r"draw='interfered'.*task 'b'.*uniform"):
        fit_tasks(
            trainer(tmp_path, [Replay(9, 0.2, draw="interfered", fill="training")], max_epochs=1), Classifier(), data
        )
