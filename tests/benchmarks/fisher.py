"""The Fisher engine: time, error and memory against a loop over single samples and against plain training passes.

    python tests/benchmarks/fisher.py

The yardstick: a Llama-type model of 20 million parameters, 8 sequences of 128 and of 16 tokens, one thread. "Passes"
are forward and backward passes over the same sequences in one batch, run right before each figure; medians of ratios.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl.functional import SampleGradients, fisher_diagonal

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
ROUNDS = 7


def losses_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The sum of all tokens' losses."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_of(work: object) -> int:
    """The largest growth of resident memory while `work` runs."""
    start, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()  # type: ignore[operator]
    finally:
        done.set()
        thread.join()
    return peak[0]


def figures(model: nn.Module, ids: torch.Tensor) -> str:
    """The line of the table for some sequences."""
    parameters = dict(model.named_parameters())
    copy = sum(4 * p.numel() for p in parameters.values())
    engine = SampleGradients(model, parameters)

    def plain() -> None:
        losses_of(model, ids).backward()

    def batched() -> None:
        engine.add(len(ids), lambda: [losses_of(model, ids)])

    def loop() -> dict[str, torch.Tensor]:
        return fisher_diagonal((([(1.0, losses_of(model, row[None]))], 1) for row in ids), parameters)[0]

    batched()
    error = max(float((engine.total[name] - value).norm() / value.norm()) for name, value in loop().items())
    times: dict[str, list[float]] = {"batched": [], "loop": []}
    for _ in range(ROUNDS):
        for name, work in (("batched", batched), ("loop", loop)):
            start = time.process_time()
            plain()
            middle = time.process_time()
            work()
            times[name].append((time.process_time() - middle) / (middle - start))
    # Gradients are there already, and the engine's own total: what is left are temporaries.
    extra = (peak_of(batched) - peak_of(plain)) / copy
    ratios = ", ".join(f"{name} {statistics.median(values):.2f} passes" for name, values in times.items())
    return (
        f"{ids.shape[1]:>3} tokens: {ratios}; largest relative error {error:.0e}; the total takes 1.00 copies of the"
        f" model, temporaries beyond those of a training pass {extra:+.2f}"
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for tied in (False, True):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG, tie_word_embeddings=tied)).eval()
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, embeddings {'tied' if tied else 'untied'}")
        for length in (128, 16):
            print(" ", figures(model, torch.randint(0, CONFIG["vocab_size"], (8, length))), flush=True)


if __name__ == "__main__":
    main()
