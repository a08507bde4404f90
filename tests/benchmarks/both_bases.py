"""All families on two bases: one that knows the domains of the tasks already, and one that does not.

    python tests/benchmarks/both_bases.py [seeds=1] [base=knows,new] [out=both_bases.jsonl] [only="naive;Replay 25 %;…"]

A Llama of half a million parameters learns three tasks one after another: prose, Python, C++. The base that ``knows``
was trained on the first half of each domain and on general text (Perl sources and licences); the tasks train on the
second halves. The ``new`` base was trained on the general text alone. Which method ends best depends on that.

Figures are mean losses in nats on held-out blocks: **average** over the tasks at the end, **learnt** over the tasks
when each was learnt, **forgetting** the rise of the first two since, **base** the rise of the general text. Of one seed
all runs see the same samples in the same order. ``*``: the task is known when the model is asked.

Results go to a file, one line per run; runs that are there already are not repeated.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

import lightning_cl as cl
from lightning_cl import CausalLM, Task, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.data.text.sample_texts import SAMPLES

DOMAINS = ("prose", "python", "cpp")
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
STEPS, BLOCKS, LENGTH = 130, 8, 64
PRETRAINING = {"knows": 1500, "new": 900}


class Arm(NamedTuple):
    """A method: its callbacks, and how it trains."""

    callbacks: Callable[[Any], list[Any]] = lambda general: []
    lora: bool = False
    lr: float = 1e-3
    knows_task: bool = False
    embeddings_frozen: bool = False


def _adapters(**settings: Any) -> Arm:
    return Arm(lambda general: [cl.TaskAdapters(unseen="base", **settings)], lora=True, lr=5e-3, knows_task=True)


ARMS: dict[str, Arm] = {
    "naive": Arm(),
    "naive, a quarter of the learning rate": Arm(lr=2.5e-4),
    "naive, embeddings frozen": Arm(embeddings_frozen=True),
    "joint": Arm(),
    "one LoRA": Arm(lora=True, lr=5e-3),
    "EWC(10)": Arm(lambda general: [cl.EWC(10.0, normalize=False, samples=256)]),
    "EWC(30)": Arm(lambda general: [cl.EWC(30.0, normalize=False, samples=256)]),
    "SI": Arm(lambda general: [cl.SI()]),
    "LwF(1)": Arm(lambda general: [cl.LwF(1.0)]),
    "Replay 5 %": Arm(lambda general: [cl.Replay(256 * 3, 0.05, policy="task_balanced")]),
    "Replay 25 %": Arm(lambda general: [cl.Replay(256 * 3, 0.25, policy="task_balanced")]),
    "GeneralReplay 10 %": Arm(lambda general: [cl.GeneralReplay(general, 0.1)]),
    "Interpolate(0.3)": Arm(lambda general: [cl.Interpolate(0.3)]),
    "Interpolate(0.5)": Arm(lambda general: [cl.Interpolate(0.5)]),
    "Interpolate(0.7)": Arm(lambda general: [cl.Interpolate(0.7)]),
    "Interpolate(0.5, during=0.25)": Arm(lambda general: [cl.Interpolate(0.5, during=0.25)]),
    "Replay 5 % and Interpolate(0.5)": Arm(
        lambda general: [cl.Replay(256 * 3, 0.05, policy="task_balanced"), cl.Interpolate(0.5)]
    ),
    "Replay 25 % and Interpolate(0.5)": Arm(
        lambda general: [cl.Replay(256 * 3, 0.25, policy="task_balanced"), cl.Interpolate(0.5)]
    ),
    "EWC(10) and Interpolate(0.7)": Arm(
        lambda general: [cl.EWC(10.0, normalize=False, samples=256), cl.Interpolate(0.7)]
    ),
    "one LoRA and Interpolate(0.5)": Arm(lambda general: [cl.Interpolate(0.5)], lora=True, lr=5e-3),
    "Merge(mean)": Arm(lambda general: [cl.Merge("mean")]),
    "Merge(magmax)": Arm(lambda general: [cl.Merge("magmax")]),
    "Merge(ties, independent)": Arm(lambda general: [cl.Merge("ties", tasks="independent")]),
    "WeightAverage(0.98)": Arm(lambda general: [cl.WeightAverage(0.98)]),
    "TaskAdapters": _adapters(),
    "TaskAdapters(init=previous)": _adapters(init="previous"),
    "ProgressiveAdapters": Arm(lambda general: [cl.ProgressiveAdapters()], lora=True, lr=5e-3, knows_task=True),
    "ProgressiveNetwork": Arm(lambda general: [cl.ProgressiveNetwork()], knows_task=True),
    "OrthogonalLoRA(0.5)": Arm(lambda general: [cl.OrthogonalLoRA(0.5)], lora=True, lr=5e-3),
    "OrthogonalLoRA(hard)": Arm(lambda general: [cl.OrthogonalLoRA(0.0, hard=True)], lora=True, lr=5e-3),
    "InfLoRA": Arm(lambda general: [cl.InfLoRA()], lora=True, lr=5e-3),
    "SubspaceFreeze(0.5)": Arm(lambda general: [cl.SubspaceFreeze(0.5)]),
    "SubspaceFreeze(0.5, others=trained)": Arm(lambda general: [cl.SubspaceFreeze(0.5, others="trained")]),
    "InputFreeze(0.9)": Arm(lambda general: [cl.InputFreeze(0.9, general=general)]),
    "BlockExpansion(2)": Arm(lambda general: [cl.BlockExpansion(2)]),
    "PackNet": Arm(lambda general: [cl.PackNet()], knows_task=True),
    "MIGU": Arm(lambda general: [cl.MIGU()]),
}


class Texts(NamedTuple):
    """Parts of all domains and of the general text."""

    early: dict[str, list[str]]
    late: dict[str, list[str]]
    held: dict[str, list[str]]
    general: list[str]
    general_held: list[str]


class FrozenEmbeddings(CausalLM):
    """A model whose embeddings stay, and with them its head: the weights are tied."""

    def configure_model(self) -> None:
        """Builds the model, and freezes the embeddings."""
        super().configure_model()
        self.lm.get_input_embeddings().requires_grad_(False)


def read_texts() -> Texts:
    """Splits each domain into a first half, a second half and a held-out part, by pieces of 4,000 characters."""
    early, late, held = {}, {}, {}
    for name in DOMAINS:
        pieces = _pieces("\n\n".join(SAMPLES[name]()))
        held[name] = pieces[::12]
        rest = [piece for i, piece in enumerate(pieces) if i % 12]
        early[name], late[name] = rest[::2], rest[1::2]
    roots = [Path("/usr/share/perl"), Path("/usr/share/perl5"), *Path("/usr/lib").glob("*/perl*")]
    perl = sorted(file for root in roots if root.is_dir() for file in root.rglob("*.p[ml]") if file.is_file())
    licences = sorted(Path("/usr/share/common-licenses").glob("*"))
    files = [*licences, *perl[:200]]
    if len(files) < 50:
        raise SystemExit("general text: there are no Perl sources and licences in /usr/share on this machine")
    pieces = _pieces("\n\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files))[:400]
    return Texts(early, late, held, [p for i, p in enumerate(pieces) if i % 12], pieces[::12])


def _pieces(text: str) -> list[str]:
    return [text[i : i + 4000] for i in range(0, min(len(text), 600_000), 4000)]


def data_of(tasks: list[Task], tokenizer: Any, seed: int = 0) -> TaskDataModule:
    """Packed blocks of the tasks."""
    return TaskDataModule(
        tasks, tokenizer=tokenizer, max_length=LENGTH, batch_size=BLOCKS, packing=True, seed=seed, val_fraction=0.05
    )


def trainer_of(folder: str, callbacks: list[Any], steps: int) -> L.Trainer:
    """A quiet Trainer without files."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=8,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=100_000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )


def base_of(kind: str, texts: Texts, folder: Path) -> Path:
    """Pretrains a base once, and keeps it as a folder of Hugging Face's."""
    target = folder / f"base-{kind}"
    if (target / "config.json").exists():
        return target
    L.seed_everything(0, verbose=False)
    mixed = [*texts.general, *([p for part in texts.early.values() for p in part] if kind == "knows" else [])]
    # One vocabulary for both bases, made of everything that either sees.
    vocabulary = TrainedBPE(1024)
    vocabulary.train([*texts.general, *(p for part in texts.early.values() for p in part)])
    data = data_of([Task("base", train=mixed, val=texts.general_held)], vocabulary)
    model = CausalLM(dict(MODEL), optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3))
    with tempfile.TemporaryDirectory() as scratch:
        fit_tasks(trainer_of(scratch, [], PRETRAINING[kind]), model, data)
    model.save_pretrained(target)
    return target


def run(name: str, kind: str, seed: int, texts: Texts, base: Path) -> dict[str, Any]:
    """One run: the matrix and what it cost."""
    arm = ARMS[name]
    L.seed_everything(seed, verbose=False)
    kind_of_model = FrozenEmbeddings if arm.embeddings_frozen else CausalLM
    model = kind_of_model(
        str(base), lora=LORA if arm.lora else None, optimizer=lambda p: torch.optim.AdamW(p, lr=arm.lr), schedule=None
    )
    watched = Task("general", val=texts.general_held)
    if name == "joint":
        mixed = [piece for pieces in texts.late.values() for piece in pieces]
        tasks = [Task("joint", train=mixed, val=texts.held["prose"], max_steps=STEPS * len(DOMAINS))]
        tasks += [Task(domain, val=texts.held[domain]) for domain in DOMAINS]
    else:
        tasks = [Task(domain, train=texts.late[domain], val=texts.held[domain]) for domain in DOMAINS]
    matrix, start = TaskMatrix(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(scratch, [*arm.callbacks(texts.general[:100]), matrix], STEPS)
        fit_tasks(trainer, model, data_of([*tasks, watched], str(base), seed))
    seconds = time.monotonic() - start
    return {
        "arm": name,
        "base": kind,
        "seed": seed,
        "tasks": matrix.tasks,
        "matrix": matrix.matrix.tolist(),
        "seconds": seconds,
    }


def scores(result: dict[str, Any]) -> tuple[float, float, float, float]:
    """Average, learnt, forgetting and the rise of the general text, in nats."""
    rows, column = result["matrix"], {task: i for i, task in enumerate(result["tasks"])}
    last = [rows[-1][column[domain]] for domain in DOMAINS]
    learnt = last if result["arm"] == "joint" else [rows[i + 1][column[d]] for i, d in enumerate(DOMAINS)]
    rise = [now - then for now, then in zip(last[:-1], learnt[:-1], strict=True)]
    general = rows[-1][column["general"]] - rows[0][column["general"]]
    return statistics.mean(last), statistics.mean(learnt), statistics.mean(rise), general


def print_table(done: list[dict[str, Any]], kind: str) -> None:
    """One row per method, the best average first; ± is half the range over the seeds."""
    title = "base that knows the domains" if kind == "knows" else "base that does not know them"
    print(f"\n| {title} | average | learnt | forgetting | base |")
    print("|---|---|---|---|---|")
    found: dict[str, list[tuple[float, ...]]] = {}
    for result in done:
        if result["base"] == kind:
            found.setdefault(result["arm"], []).append(scores(result))
    for name, values in sorted(found.items(), key=lambda item: statistics.mean(v[0] for v in item[1])):
        means = [statistics.mean(column) for column in zip(*values, strict=True)]
        spread = (max(v[0] for v in values) - min(v[0] for v in values)) / 2
        around = f" ± {spread:.3f}" if len(values) > 1 else ""
        star = "*" if ARMS[name].knows_task else ""
        print(f"| {name}{star} | {means[0]:.3f}{around} | {means[1]:.3f} | {means[2]:+.3f} | {means[3]:+.3f} |")


def main() -> None:
    """Runs what is missing, and prints the tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    out, bases = Path(given.get("out", "both_bases.jsonl")), given.get("base", "knows,new").split(",")
    arms = given["only"].split(";") if "only" in given else list(ARMS)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    texts = read_texts()
    for kind in bases:
        base = base_of(kind, texts, out.parent)
        for seed in range(int(given.get("seeds", 1))):
            for name in arms:
                if any((r["arm"], r["base"], r["seed"]) == (name, kind, seed) for r in done):
                    continue
                done.append(run(name, kind, seed, texts, base))
                print(f"{kind}, seed {seed}: {name}: {done[-1]['seconds']:.0f} s", file=sys.stderr)
                with out.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
        print_table(done, kind)


if __name__ == "__main__":
    main()
