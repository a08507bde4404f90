"""How much replay helps: shares of 0, 1, 5, 25 and 50 percent, and what else could explain it.

    python tests/benchmarks/dose_response.py [seeds=3] [steps=160] [out=dose_response.jsonl] [only=replay-0.05,…]

The quickstart's model and tasks (prose, Python, C++), paired seeds: of one seed all runs begin with the same weights
and see new samples in the same order. Figures are mean losses in nats on held-out text at the end of the sequence.

* ``replay-r``: the share r of each batch is replayed, as many steps and as many samples a step as without.
* ``add-0.5``: as many replayed samples on top of each batch. ``pad-0.5``: its control, as many more samples of the
  *new* task: what helps must be the old samples, and not more samples.
* ``self-0.25``: nothing is stored; the model writes what is replayed.
* ``derpp-0.25``: replay with the logits of the time of storing.
* ``joint``: all tasks mixed, as many steps in all: the bound.

Results go to a file, one line per run; runs that are there already are not repeated.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf

from lightning_cl import (
    CausalLM,
    DERpp,
    Replay,
    SelfReplay,
    TaskDataModule,
    TaskMatrix,
    TrainedBPE,
    WarmupDecay,
    fit_tasks,
)
from lightning_cl.data.text.formats import Text
from lightning_cl.data.text.sample_texts import SAMPLES
from lightning_cl.data.text.splitting import split_documents

CONFIG = OmegaConf.load(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
TASKS = dict(CONFIG.data.tasks)
ARMS = (
    "replay-0",
    "replay-0.01",
    "replay-0.05",
    "replay-0.25",
    "replay-0.5",
    "add-0.5",
    "pad-0.5",
    "self-0.25",
    "derpp-0.25",
    "joint",
)


def callbacks_of(arm: str) -> list[Any]:
    """The methods of an arm."""
    kind, _, share = arm.partition("-")
    ratio = float(share or 0)
    kept = {"buffer_size": 1000, "policy": "task_balanced"}
    if kind == "self":
        return [SelfReplay(samples=200, ratio=ratio, max_new_tokens=128)]
    if kind == "derpp":
        return [DERpp(ratio=ratio, **kept)]
    if kind == "add":
        return [Replay(ratio=ratio, mode="add", **kept)]
    return [Replay(ratio=ratio, **kept)] if kind == "replay" else []


def data_of(arm: str, steps: int) -> TaskDataModule:
    """The tasks of an arm."""
    settings = {"tokenizer": TrainedBPE(2048), "max_length": 128, "length_buckets": False}
    if arm == "joint":
        # The documents that are held out of each task are held out here, too.
        texts = {task: SAMPLES[source.removeprefix("sample:")]() for task, source in TASKS.items()}
        parts = {
            task: split_documents([Text(text) for text in all_texts], 0.05, 0) for task, all_texts in texts.items()
        }
        train = [document.plain for kept, _ in parts.values() for document in kept]
        watched = {task: {"val": [document.plain for document in held]} for task, (_, held) in parts.items()}
        return TaskDataModule(
            {"joint": {"train": train, "val": watched["prose"]["val"], "max_steps": steps * len(TASKS)}, **watched},
            batch_size=8,
            **settings,
        )
    return TaskDataModule(TASKS, batch_size=16 if arm.startswith("pad") else 8, **settings)


def run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: the matrix and what it cost."""
    L.seed_everything(seed, verbose=False)
    model = CausalLM(
        OmegaConf.to_container(CONFIG.model.init_args.model),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=lambda optimizer, total_steps: WarmupDecay(
            optimizer, total_steps, warmup=0.05, decay="cosine", final=0.1
        ),
    )
    matrix = TaskMatrix()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=24,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            val_check_interval=10_000,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*callbacks_of(arm), matrix],
        )
        fit_tasks(trainer, model, data_of(arm, steps))
    return {"arm": arm, "seed": seed, "matrix": matrix.matrix.tolist()}


def main() -> None:
    """Runs what is missing, and prints the table."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    seeds, steps = int(given.get("seeds", 3)), int(given.get("steps", 160))
    out = Path(given.get("out", "dose_response.jsonl"))
    arms = given["only"].split(",") if "only" in given else list(ARMS)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in range(seeds):
        for arm in arms:
            if not any(r["arm"] == arm and r["seed"] == seed for r in done):
                done.append(run(arm, seed, steps))
                with out.open("a") as file:
                    file.write(json.dumps(done[-1], default=str) + "\n")
    print_table(done, arms)


def scores(result: dict[str, Any]) -> tuple[float, float, float]:
    """Mean at the end, forgetting, and mean when learnt, in nats."""
    rows = result["matrix"]
    if result["arm"] == "joint":
        mean = sum(rows[-1][1:]) / len(rows[-1][1:])  # the first column is that of the mixture
        return mean, 0.0, mean
    final, tasks = rows[-1], len(rows[-1])
    learnt = [rows[i + 1][i] for i in range(tasks)]
    forgetting = sum(final[i] - min(row[i] for row in rows[i + 1 :]) for i in range(tasks - 1)) / max(tasks - 1, 1)
    return sum(final) / tasks, forgetting, sum(learnt) / tasks


def print_table(done: list[dict[str, Any]], arms: list[str]) -> None:
    """Means and standard deviations over the seeds, and the paired difference to no replay."""
    print("| arm | mean at the end | forgetting | mean when learnt | at the end, less no replay's | seeds |")
    print("|---|---|---|---|---|---|")
    base = {r["seed"]: scores(r)[0] for r in done if r["arm"] == "replay-0"}
    for arm in arms:
        mine = {r["seed"]: scores(r) for r in done if r["arm"] == arm}
        if not mine:
            continue
        columns = [_spread([values[i] for values in mine.values()]) for i in range(3)]
        paired = _spread([values[0] - base[seed] for seed, values in mine.items() if seed in base])
        print(f"| `{arm}` | {' | '.join(columns)} | {paired} | {len(mine)} |")


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    main()
