"""Published results of the classical methods, from this library's callbacks on one small network.

    python tests/benchmarks/known_results.py folder=/usr/share/datasets/fashion-mnist [protocol=split|long|permuted]
                                             [search=true] [only="EWC;SI"] [out=runs/known_results.jsonl] [table=true]

The settings, with their source, are in ``configs/known_results.yaml``; each can be set on the command line. The module
is nobody's but its own: a LightningModule of two hidden layers that knows nothing of continual learning.

Classes are put into contexts (or pixels into their order) by the seed, and strengths are chosen on training images that
were held out. The test images are read for the final figures only: the accuracy at the end, the mean over contexts, and
what was lost since each was learnt, the mean over all but the last. Results go to `out`, one line per run; runs that
are there already are not repeated, and ``table=true`` prints the table of those.
"""

from __future__ import annotations

import gzip
import json
import logging
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
from torch.utils.data import ConcatDataset, Dataset

import lightning_cl
from lightning_cl import TaskDataModule, fit_tasks
from lightning_cl.evaluation.seeds import interval

CONFIG = Path(__file__).parents[2] / "configs" / "known_results.yaml"
SEARCH_SEED = 1
HELD_OUT = 0.1  # of the training images of a context, for the choice of strengths


class MLP(L.LightningModule):
    """Two hidden layers of ReLUs and one head for all contexts."""

    def __init__(self, hidden: int, classes: int, lr: float, reset: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        self.lr, self.reset = lr, reset
        self.adam: torch.optim.Optimizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # It is called at the start of each context; one that was made before still has its moments.
        if self.adam is None or self.reset:
            self.adam = torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)
        return self.adam


class Context(Dataset[tuple[Tensor, int]]):
    """Images of some indices, their pixels in an order of its own."""

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor, order: Tensor | None = None) -> None:
        self.images, self.labels = images, labels[indices].tolist()
        self.indices, self.order = indices.tolist(), order

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[self.indices[index]]
        return image if self.order is None else image[self.order], self.labels[index]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images and labels."""
        images = self.images[self.indices]
        return images if self.order is None else images[:, self.order], torch.tensor(self.labels)


class Accuracies(L.Callback):
    """Measures each context when it was learnt, and all contexts at the end."""

    def __init__(self, data: list[Context], joint: bool) -> None:
        self.data, self.joint = data, joint
        self.learnt: list[float] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.joint:
            self.learnt.append(accuracy(pl_module, self.data[len(self.learnt)]))


@torch.no_grad()
def accuracy(module: nn.Module, data: Context) -> float:
    """Share of the images that the module classifies right, in percent."""
    images, labels = data.tensors()
    return 100 * (module(images).argmax(-1) == labels).float().mean().item()


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


def contexts(kind: str, number: int, images: Tensor, labels: Tensor, seed: int, part: str = "all") -> list[Context]:
    """The contexts of a protocol and a seed, in the domain-incremental setting: the same classes in each.

    Args:
        kind: ``split``: contexts of two classes; ``permuted``: contexts of all classes.
        number: of contexts.
        images: of all classes, ``[n, 784]``.
        labels: their classes.
        seed: draws the classes that meet in a context, or the order of its pixels. Training and test images of one seed
            have the same ones.
        part: of each context's images: ``all``, the first 90 % (``train``), or the last 10 % (``held out``).
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(10, generator=generator)[labels] if kind == "split" else labels
    found = []
    for context in range(number):
        order = None if kind == "split" else torch.randperm(784, generator=generator)
        indices = (place // 2 == context).nonzero()[:, 0] if kind == "split" else torch.arange(len(labels))
        cut = len(indices) - round(HELD_OUT * len(indices))
        indices = {"all": indices, "train": indices[:cut], "held out": indices[cut:]}[part]
        found.append(Context(images, place % 2 if kind == "split" else place, indices, order))
    return found


def run(
    settings: DictConfig, method: dict[str, Any], seed: int, train: list[Context], test: list[Context]
) -> dict[str, float]:
    """One sequence: the accuracy at its end, in percent, and what was lost since each context was learnt."""
    method = dict(method)
    joint, kind = method.pop("joint", False), method.pop("class", None)
    tasks: dict[str, Any] = {f"context {number + 1}": context for number, context in enumerate(train)}
    if joint:
        tasks = {"all": ConcatDataset(train)}
    if kind in ("EWC", "KFACEWC", "MAS", "LwF", "DERpp"):
        method["outputs"] = lambda module, batch: module(batch[0])
    callbacks = [getattr(lightning_cl, kind)(**method)] if kind else []
    measured = Accuracies(test, joint)
    torch.manual_seed(seed)
    module = MLP(settings.hidden, 2 if settings.kind == "split" else 10, settings.lr, settings.reset_optimizer)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=settings.iterations * (len(train) if joint else 1),
            callbacks=[*callbacks, measured],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        parts = {name: {"train": data} for name, data in tasks.items()}
        loaders = TaskDataModule(parts, batch_size=settings.batch_size, seed=seed)
        fit_tasks(trainer, module, loaders, keep_checkpoints="none")
    last = [accuracy(module, context) for context in test]
    lost = [then - now for then, now in zip(measured.learnt, last, strict=False)][:-1]
    return {
        "accuracy": sum(last) / len(last),
        "lost": sum(lost) / len(lost) if lost else float("nan"),
        "cpu": time.process_time() - start,
    }


def of_protocol(method: dict[str, Any], protocol: str) -> dict[str, Any]:
    """A method's arguments in one protocol."""
    return {key: value[protocol] if isinstance(value, dict) else value for key, value in method.items()}


def table(done: list[dict[str, Any]]) -> str:
    """One row per method: the mean, and with several seeds half the 95 % interval."""
    lines = ["| method | n | accuracy, % | lost since learnt, % | CPU s |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(one["method"] for one in done):
        runs = [one for one in done if one["method"] == name]
        cells = []
        for key in ("accuracy", "lost"):
            found = interval([one[key] for one in runs])
            mean, high = found["mean"], found["high"]
            cells.append("" if mean is None else f"{mean:.1f}" + ("" if high is None else f" ± {high - mean:.1f}"))
        seconds = sum(one["cpu"] for one in runs) / len(runs)
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def read_settings(arguments: list[str]) -> Any:
    """The file's settings, with those of the protocol, and of the command line on top."""
    given = OmegaConf.from_cli(arguments)
    settings: Any = OmegaConf.merge(OmegaConf.load(CONFIG), given)
    return OmegaConf.merge(settings, settings.protocols[settings.protocol], given)


def main() -> None:
    """Runs what is missing, and prints the table."""
    settings = read_settings(sys.argv[1:])
    methods: Any = OmegaConf.to_container(settings.methods)
    names = settings.only.split(";") if settings.only else list(methods)
    plan = []
    for seed in [SEARCH_SEED] if settings.search else settings.seeds:
        for name in names:
            method = of_protocol(methods[name], settings.protocol)
            if not settings.search:
                plan.append((seed, name, method))
            elif "strength" in method:
                tried = [float(f"{method['strength'] * factor:.3g}") for factor in settings.decades]
                plan += [(seed, name, {**method, "strength": strength}) for strength in tried]
    number = settings.search_contexts if settings.search else settings.contexts
    same = {key: settings[key] for key in ("protocol", "search", "iterations", "hidden", "lr", "reset_optimizer")}
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    pictures = read_idx(settings.folder, "train")
    final = pictures if settings.search else read_idx(settings.folder, "t10k")
    done = []
    for seed, name, method in plan:
        key = {"method": name, "seed": seed, "contexts": number, "arguments": method, **same}
        known = [one for one in before if all(one.get(k) == v for k, v in key.items())]
        if not known and settings.table:
            continue
        if not known:
            parts = ("train", "held out") if settings.search else ("all", "all")
            train, test = (
                contexts(settings.kind, number, *data, seed, part)
                for data, part in zip((pictures, final), parts, strict=True)
            )
            known = [key | run(settings, method, seed, train, test)]
            with out.open("a") as file:
                file.write(json.dumps(known[0]) + "\n")
        done.append(known[0])
        one = known[0]
        print(
            f"seed {seed} {name:8s} {method.get('strength', ''):>8} accuracy {one['accuracy']:.2f},"
            f" lost {one['lost']:.2f}, {one['cpu']:.0f} CPU s",
            file=sys.stderr,
            flush=True,
        )
    if settings.search:
        for one in done:
            print(f"{one['method']:8s} strength {one['arguments']['strength']:8.1e}  {one['accuracy']:6.2f}")
    else:
        print(f"{settings.protocol}: {number} contexts of {settings.iterations} iterations, ± half the 95 % interval")
        print(table(done))


if __name__ == "__main__":
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # Denormal numbers in Adam's moments, behind pixels that are always black, take half of the time.
    torch.set_flush_denormal(True)
    main()
