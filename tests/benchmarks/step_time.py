"""Time of a training step with each method, as ratios to a plain step, and of the Fisher pass.

    python tests/benchmarks/step_time.py [Replay …]

With names, only the methods whose names begin so.

The yardstick: a Llama-type model of 20 million parameters, 8 sequences of 128 tokens, AdamW, one thread. Every method's
step is run right after a plain step of the same kind, and the figure is the median of the ratios: machines are noisy.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings

import lightning as L
import torch
from torch.utils.data import Dataset

from lightning_cl import AGEM, DER, EWC, KFACEWC, L2SP, MAS, SI, CausalLM, DERpp, LwF, Replay, RWalk
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.functional import add_penalty_gradient_

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
STEPS = 14


class Tokens(Dataset):
    """Random sequences."""

    def __init__(self, samples: int, length: int = 128) -> None:
        self.ids = torch.randint(0, 8192, (samples, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Clock(L.Callback):
    """CPU seconds of each batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.process_time() - self.start)


def seconds_per_step(methods: list) -> tuple[list[float], float]:
    """Steps of a second task, with everything that the first one left; and the seconds of the first task's end."""
    model = CausalLM(CONFIG, schedule=None)
    clock = Clock()
    for steps in (2, STEPS):
        clock.seconds.clear()
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[*methods, clock],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tempfile.mkdtemp(),
        )
        loader = torch.utils.data.DataLoader(Tokens(256), batch_size=8)
        trainer.fit(model, loader)
        if steps == 2:
            end = TaskCoordinator.of(trainer).costs[0]["end_seconds"] if methods else 0.0
    return clock.seconds[2:], end


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    makers = {
        "EWC": lambda: [EWC(0.01, samples=16)],
        "EWC proximal": lambda: [EWC(1.0, samples=16, apply="proximal")],
        "SI": lambda: [SI(0.01)],
        "EWC auto": lambda: [EWC("auto", samples=16)],
        "MAS": lambda: [MAS(0.01, samples=16)],
        "RWalk": lambda: [RWalk(0.01)],
        "L2SP": lambda: [L2SP(0.01)],
        "KFACEWC": lambda: [KFACEWC(0.01, samples=16)],
        "LwF": lambda: [LwF(1.0)],
        "LwF top 64": lambda: [LwF(1.0, top_k=64)],
        "Replay 25 %": lambda: [Replay(64, 0.25)],
        "Replay in training": lambda: [Replay(64, 0.25, fill="training")],
        "Replay interfered": lambda: [Replay(64, 0.25, draw="interfered")],
        "DERpp 25 %": lambda: [DERpp(ratio=0.25, buffer_size=64)],
        "DER 25 %": lambda: [DER(ratio=0.25, buffer_size=64)],
        "AGEM": lambda: [AGEM(64)],
        "EWC + SI + Replay": lambda: [EWC(0.01, samples=16), SI(0.01), Replay(64, 0.25)],
    }
    plain, _ = seconds_per_step([])
    base = statistics.median(plain)
    print(f"plain step: {base:.2f} CPU s (1.00)")
    for name, make in makers.items():
        if sys.argv[1:] and not name.startswith(tuple(sys.argv[1:])):
            continue
        before, _ = seconds_per_step([])
        steps, end = seconds_per_step(make())
        after, _ = seconds_per_step([])
        reference = statistics.median(before + after)
        line = f"{name:>18}: {statistics.median(steps) / reference:.3f} of a plain step"
        if name.startswith(("EWC", "MAS", "KFAC")) and "+" not in name:
            line += f"; end of task, with 16 sequences: {end / (2 * reference):.2f} steps over them"
        print(line, flush=True)
    parameters = dict(_model().named_parameters())
    anchor = {name: p.detach() + 0.01 for name, p in parameters.items()}
    importance = {name: torch.rand_like(p) for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    times = []
    for _ in range(15):
        start = time.process_time()
        add_penalty_gradient_(parameters, anchor, importance, 0.01)
        times.append(time.process_time() - start)
    print(f"the penalty alone: {statistics.median(times) / base:.1%} of a plain step")


def _model() -> torch.nn.Module:
    model = CausalLM(CONFIG)
    model.configure_model()
    return model


if __name__ == "__main__":
    main()
