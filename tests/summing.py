"""What the tests of methods share that sum the adapters of all tasks: a module, tasks, and a run."""

from __future__ import annotations

import lightning as L
import torch
from adapting import VOCABULARY, peft_model
from toys import trainer

from lightning_cl import Task, TaskDataModule, TaskMatrix, fit_tasks

NAMES = ["a", "second task", "c"]


class Adapted(L.LightningModule):
    """A third-party module with a PeftModel in it; it knows nothing of this library."""

    def __init__(self, dropout=0.0, optimizer=None, **lora):
        super().__init__()
        self.model = peft_model(**{"lora_dropout": dropout, "target_modules": ["q_proj", "v_proj", "up_proj"]} | lora)
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Rows(torch.utils.data.Dataset):
    """Rows whose next token follows a rule of the task."""

    def __init__(self, seed, count=12, length=8):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCABULARY, (count, 1), generator=generator)
        self.rows = (start + torch.arange(length) * (2 * seed + 1)) % VOCABULARY

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def data(names=NAMES, batch_size=4):
    tasks = [Task(name, Rows(i), val=Rows(i, 4)) for i, name in enumerate(names)]
    return TaskDataModule(tasks, batch_size=batch_size, seed=0)


def run(root, method, module=None, names=NAMES, more=(), ckpt_path=None, batch_size=4, **settings):
    L.seed_everything(5, verbose=False)
    module = Adapted() if module is None else module
    callbacks = [*([method] if method else []), TaskMatrix(), *more]
    fit_tasks(trainer(root, callbacks, **{"max_epochs": 1} | settings), module, data(names, batch_size), ckpt_path)
    return module, callbacks


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one, other, why=None):
    assert one.keys() == other.keys(), why
    assert [name for name in one if not torch.equal(one[name], other[name])] == [], why


class EachStep(L.Callback):
    """Calls a function after each step, and keeps what it gives."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(self.function(pl_module))
