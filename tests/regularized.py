"""What the tests of the regularising methods share: runs, spies and a small language model. None of it is a method."""

from __future__ import annotations

import copy

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from toys import TINY_LLAMA, Classifier, classification, trainer

from lightning_cl import TaskDataModule, fit_tasks

TASKS = {"a": classification(1), "b": classification(2)}
VOCABULARY, LENGTH = 11, 7


def logits_of(module, batch):
    return module(batch[0])


def seeded(kind=Classifier, **settings):
    torch.manual_seed(0)
    return kind(**settings)


def fit(root, callbacks, module=None, tasks=TASKS, batch_size=8, ckpt_path=None, **settings):
    """A sequence of tasks through `fit_tasks`, on the same samples in the same order every time."""
    module = module if module is not None else seeded()
    run = trainer(root, callbacks, **{"max_epochs": 2} | settings)
    torch.manual_seed(1)
    fit_tasks(run, module, TaskDataModule(tasks, batch_size=batch_size, seed=0), ckpt_path)
    return module


def plain_fit(root, callbacks, module, seed, batch_size=8, **settings):
    """One fit on a loader that is not shuffled: one task."""
    run = trainer(root, callbacks, **{"max_epochs": 1} | settings)
    run.fit(module, DataLoader(classification(seed), batch_size=batch_size))
    return module


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def assert_same(actual, expected, rtol=1e-5, atol=1e-8):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_each(actual, expected, error=1e-4):
    """The same to a relative error of each tensor's largest value: for importances, whose sizes differ by far."""
    assert actual.keys() == expected.keys()
    for name in expected:
        off = (actual[name].double() - expected[name].double()).abs().max() / expected[name].double().abs().max()
        assert off <= error, f"{name}: off by {off:.1e}"


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr / 5, weight_decay=0.1)


class Ends(L.Callback):
    """Weights at the start and at the end of each task, and the data set that it was trained on."""

    def __init__(self):
        self.starts, self.weights, self.datasets = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.starts.append(weights(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.weights.append(weights(pl_module))
        self.datasets.append(trainer.train_dataloader.dataset)


class Steps(L.Callback):
    """The batches of each task, and the weights and gradients of each step as no method has touched them."""

    def __init__(self):
        self.batches, self.before = [], []

    def on_train_start(self, trainer, pl_module):
        self.batches.append([])
        self.before.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches[-1].append(copy.deepcopy(batch))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before[-1].append({n: (p.detach().clone(), p.grad.clone()) for n, p in pl_module.named_parameters()})


class AtStep(L.Callback):
    """Calls a function before a step of a task: when training has begun, and no weight of that step has changed."""

    def __init__(self, function, task=1, step=0):
        self.function, self.at, self.task = function, (task, step), -1

    def on_train_start(self, trainer, pl_module):
        self.task, self.step = self.task + 1, -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step += 1
        if (self.task, self.step) == self.at:
            self.function(pl_module)


class Growing(Classifier):
    """A classifier whose head gets more classes between two tasks."""

    def widen_head(self):
        old, self.net[4] = self.net[4], torch.nn.Linear(16, 5)
        with torch.no_grad():
            self.net[4].weight[:3], self.net[4].bias[:3] = old.weight, old.bias


# ---------------------------------------------------------------------- language models


class SomebodysLM(L.LightningModule):
    """A third-party language model; it knows nothing of this library."""

    def __init__(self, tie=True, lr=1e-2, optimizer=torch.optim.AdamW, kind="llama", **config):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.lr, self.optimizer = lr, optimizer
        sizes = TINY_LLAMA | {"vocab_size": VOCABULARY, "tie_word_embeddings": tie, "initializer_range": 0.2}
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | {"model_type": kind} | config))

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Sequences(Dataset):
    """Token sequences of one length; the first `masked[i]` labels bear no loss."""

    def __init__(self, seed, masked, low=0, high=VOCABULARY):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(low, high, (len(masked), LENGTH), generator=generator)
        self.labels = self.ids.clone()
        for row, count in enumerate(masked):
            self.labels[row, :count] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}

    def positions(self, index):
        """The positions that predict a token with loss."""
        return [t for t in range(LENGTH - 1) if self.labels[index, t + 1] != -100]


MASKED = [0, 1, 3, 5, 2, LENGTH, 0, 6]
