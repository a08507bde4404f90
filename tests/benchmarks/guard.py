"""Operating figures of ForgettingBudget: false alarms under the null, and planted rises that are found.

Run from the repository's root: ``python tests/benchmarks/guard.py [runs=200]``. Each run trains a tiny language model
on a Markov chain three times, as the tasks a, b and c, which have the same training data: nothing is to be forgotten,
and held-out losses change by the noise of training alone. In the middle of c, random changes of the head's weights
raise the held-out loss by 0.05 nats, for the guard's eyes only (in evaluation mode), so that training does not take it
back.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_cl import ForgettingBudget, Task, TaskDataModule, fit_tasks
from lightning_cl.functional.guard import confidence_width, look_error

VOCABULARY, LENGTH = 12, 24
FIRST, STEPS, EVERY, PLANT = 100, 24, 4, 8  # steps of the first task and of the others
PLANTED = FIRST + STEPS + PLANT  # step of the run


class Sequences(Dataset):
    """Sequences of a Markov chain."""

    def __init__(self, chain: Tensor, count: int, generator: torch.Generator) -> None:
        tokens = torch.randint(VOCABULARY, (count, 1), generator=generator)
        while tokens.shape[1] < LENGTH:
            following = torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, following], 1)
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Tiny(L.LightningModule):
    """Predicts a token from the two before it."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.embedding, self.mixed = nn.Embedding(VOCABULARY, 16), nn.Linear(32, 32)
        self.head, self.lr = nn.Linear(32, VOCABULARY), lr
        self.register_buffer("shift", torch.zeros(VOCABULARY, 32))

    def batch_logits(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embedding(batch["input_ids"])
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        hidden = torch.tanh(self.mixed(torch.cat([x, before], 2)))
        return self.head(hidden) if self.training else self.head(hidden) + hidden @ self.shift.T

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.batch_logits(batch)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Plant(L.Callback):
    """Raises the held-out loss of the module by a number of nats, at a step of the third task."""

    def __init__(self, rise: float, data: Sequences, generator: torch.Generator) -> None:
        self.rise, self.data, self.generator = rise, data, generator

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != PLANTED:
            return
        everything = {"input_ids": self.data.tokens, "labels": self.data.tokens}
        direction = torch.randn(VOCABULARY, 32, generator=self.generator)
        pl_module.eval()
        aim = float(pl_module.loss(everything)) + self.rise
        low, high = 0.0, 4.0
        for _ in range(12):
            pl_module.shift.copy_((low + high) / 2 * direction)
            low, high = ((low + high) / 2, high) if pl_module.loss(everything) < aim else (low, (low + high) / 2)
        pl_module.train()


def one_run(seed: int, rise: float = 0.05, budget: float = 0.01, samples: int = 64) -> ForgettingBudget:
    """Trains the three tasks; returns the guard."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.softmax(2.0 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), 1)
    train, held_out, many = (Sequences(chain, count, generator) for count in (2000, 512, 1000))
    torch.manual_seed(seed)
    guard = ForgettingBudget(budget, "nats", every=EVERY, samples=samples, action=["warn"])
    trainer = L.Trainer(
        max_steps=STEPS,
        callbacks=[guard, Plant(rise, many, generator)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    tasks = [Task(name, train, val=held_out, max_steps=FIRST if name == "a" else STEPS) for name in "abc"]
    with tempfile.TemporaryDirectory() as folder:
        trainer._default_root_dir = folder
        fit_tasks(trainer, Tiny(1e-2), TaskDataModule(tasks, batch_size=16, seed=seed))
    return guard


def alarms(guard: ForgettingBudget, budget: float, patience: int) -> tuple[bool, int | None]:
    """Decides again with another budget or patience, by the first 64 sequences' rule.

    Returns:
        True if there is an alarm before the plant, and the looks after the plant until one (None: none).
    """
    count: dict[str, int] = {}
    tasks: dict[int, list[dict]] = {}
    for entry in guard.looks:
        tasks.setdefault(entry["step"], []).append(entry)
    false, found, training = False, None, ""
    for number, (step, entries) in enumerate(sorted(tasks.items()), 1):
        if entries[0]["training"] != training:
            training, count = entries[0]["training"], {}
        for entry in entries:
            n, alpha = entry["n"], 2 * look_error(0.05, number, len(entries))
            margin = entry["SE"] * math.sqrt(n) * confidence_width(n, alpha, guard.samples)
            count[entry["task"]] = count.get(entry["task"], 0) + 1 if entry["D"] - margin > budget else 0
        if max(count.values()) >= patience:
            if step <= PLANTED:
                false = True
            elif found is None:
                found = (step - PLANTED) // EVERY
            count = {}
    return false, found


def main(runs: int = 200) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    start, guards = time.time(), []
    for seed in range(runs):
        guards.append(one_run(seed))
        if seed % 20 == 19:
            print(f"{seed + 1} runs, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    tell(guards)


def tell(guards: list[ForgettingBudget]) -> None:
    """Prints the figures of some runs."""
    runs = len(guards)
    before = [e for g in guards for e in g.looks if e["step"] <= PLANTED]
    after = [e for g in guards for e in g.looks if e["step"] > PLANTED]
    for what, entries in (("before", before), ("after", after)):
        rises = torch.tensor([e["D"] for e in entries])
        errors = torch.tensor([e["SE"] for e in entries]).median()
        counts = torch.tensor([float(e["n"]) for e in entries]).mean()
        print(f"{what} the plant: D {rises.mean():+.4f} ± {rises.std():.4f}, SE {errors:.4f}, n {counts:.0f}")
    acted = [any(e["action"] and e["step"] <= PLANTED for e in g.looks) for g in guards]
    caught = [any(e["action"] and 0 < e["step"] - PLANTED <= 2 * EVERY for e in g.looks) for g in guards]
    print(f"as run (budget 0.01, patience 2): false {sum(acted)}/{runs}, found within two looks {sum(caught)}/{runs}")
    print("| budget, nats | patience | runs with a false alarm | found at the first look | within two looks |")
    print("|---|---|---|---|---|")
    for budget in (0.0, 0.01, 0.02, 0.03):
        for patience in (1, 2):
            found = [alarms(guard, budget, patience) for guard in guards]
            false = sum(one for one, _ in found) / runs
            looks = [sum(at is not None and at <= most for _, at in found) / runs for most in (1, 2)]
            print(f"| {budget} | {patience} | {false:.1%} | {looks[0]:.1%} | {looks[1]:.1%} |")


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
