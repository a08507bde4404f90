"""Published results of the classical methods, from this library's callbacks on one small network.

    python tests/benchmarks/known_results.py folder=/usr/share/datasets/fashion-mnist

The settings, with their source, are in ``configs/known_results.yaml``; each can be set on the command line. The module
is nobody's but its own: a LightningModule of two hidden layers that knows nothing of continual learning.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_cl
from lightning_cl import TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.evaluation.seeds import t_quantile

CONFIG = Path(__file__).parents[2] / "configs" / "known_results.yaml"


class MLP(L.LightningModule):
    """Two hidden layers of ReLUs and one head for all contexts."""

    def __init__(self, hidden: int, classes: int, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def read_idx(folder: str, kind: str) -> tuple[Tensor, Tensor]:
    """Images ``[n, 784]`` in [0, 1] and labels, from idx files as they are published, compressed or not."""
    arrays = []
    for part, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
        found = sorted(Path(folder).glob(f"{kind}-{part}*"))
        if not found:
            raise FileNotFoundError(f"folder={folder}: there is no {kind}-{part} or {kind}-{part}.gz")
        content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        arrays.append(torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8))
    return arrays[0].view(-1, 784).float() / 255, arrays[1].long()


def contexts(settings: DictConfig, kind: str) -> dict[str, TensorDataset]:
    """The contexts of a protocol, in the domain-incremental setting: the same classes in each."""
    images, labels = read_idx(settings.folder, kind)
    result = {}
    for context in range(settings.contexts):
        if settings.protocol == "split":
            chosen = labels // 2 == context
            result[f"context {context + 1}"] = TensorDataset(images[chosen], labels[chosen] % 2)
        else:
            # The first context is the pixels as they are.
            order = torch.randperm(784, generator=torch.Generator().manual_seed(context)) if context else slice(None)
            result[f"context {context + 1}"] = TensorDataset(images[:, order], labels)
    return result


def run(settings: DictConfig, method: dict[str, Any], seed: int, data: dict[str, dict[str, Any]]) -> dict[str, float]:
    """One sequence: the accuracy at its end, in percent, and what was forgotten."""
    method = dict(method)
    joint, kind = method.pop("joint", False), method.pop("class", None)
    tasks = data
    if joint:
        parts = [task["train"].tensors for task in data.values()]
        whole = TensorDataset(*(torch.cat(column) for column in zip(*parts, strict=True)))
        watched = {name: {"val": task["val"]} for name, task in data.items()}
        tasks = {"all": {"train": whole, "val": next(iter(data.values()))["val"]}, **watched}
    if kind in ("EWC", "KFACEWC", "MAS", "LwF"):
        method["outputs"] = lambda module, batch: module(batch[0])
    callbacks = [getattr(lightning_cl, kind)(**method)] if kind else []
    matrix = TaskMatrix(monitor="val_acc", mode="max")
    torch.manual_seed(seed)
    module = MLP(settings.hidden, 2 if settings.protocol == "split" else 10, settings.lr)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=settings.iterations * (settings.contexts if joint else 1),
            callbacks=[*callbacks, matrix],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=10**6,
            check_val_every_n_epoch=None,
        )
        start = time.process_time()
        loaders = TaskDataModule(tasks, batch_size=settings.batch_size, seed=seed)
        fit_tasks(trainer, module, loaders)
    last = [value for name, value in zip(matrix.tasks, matrix.matrix[-1].tolist(), strict=True) if name != "all"]
    forgetting = float("nan") if joint else matrix.summary()["forgetting"] * 100
    return {"accuracy": 100 * sum(last) / len(last), "forgetting": forgetting, "cpu": time.process_time() - start}


def search(settings: DictConfig, data: dict[str, dict[str, Any]]) -> None:
    """Each method's strength by decades, on seed 1."""
    for name, method in OmegaConf.to_container(settings.methods).items():
        strength = method.get("strength")
        if isinstance(strength, (int, float)):
            for factor in settings.decades:
                result = run(settings, method | {"strength": strength * factor}, 1, data)
                print(f"{name:24s} strength {strength * factor:8.1e}  {result['accuracy']:6.2f}", flush=True)


def main() -> None:
    settings: Any = OmegaConf.merge(OmegaConf.load(CONFIG), OmegaConf.from_cli(sys.argv[1:]))
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # Denormal numbers in Adam's moments, behind pixels that are always black, take half of the time.
    torch.set_flush_denormal(True)
    train, test = (contexts(settings, kind) for kind in ("train", "t10k"))
    data = {name: {"train": train[name], "val": test[name]} for name in train}
    if settings.search:
        search(settings, data)
        return
    print(f"{settings.protocol}, {settings.contexts} contexts, {settings.iterations} iterations each, mean ± SEM")
    results = {}
    for name, method in OmegaConf.to_container(settings.methods).items():
        runs = [run(settings, method, seed, data) for seed in settings.seeds]
        results[name] = runs
        cells = []
        for key in ("accuracy", "forgetting", "cpu"):
            values = torch.tensor([r[key] for r in runs], dtype=torch.float64)
            sem = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")
            cells.append(f"{float(values.mean()):6.2f} ± {sem:4.2f}")
        print(f"{name:24s} accuracy {cells[0]}   forgetting {cells[1]}   CPU s {cells[2]}", flush=True)
    interval = t_quantile(len(settings.seeds) - 1) if len(settings.seeds) > 1 else float("nan")
    print(f"(95 % interval: ± {interval:.2f} SEM)")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
