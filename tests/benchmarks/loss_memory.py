"""Peak memory and time of the loss of a large vocabulary: transformers' own against CausalLM's.

    python tests/benchmarks/loss_memory.py

A Llama-type model (2 layers, 256 wide) with the vocabulary of Llama 3, 4 sequences of 512 tokens, fp32, half of the
tokens bearing loss. One forward and backward pass; each variant in a process of its own. Counted is what the pass needs
beyond the model, its gradients included. Needs Linux (the kernel's high-water mark of resident memory) and 8 GB.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from lightning_cl import CausalLM

BATCH, LENGTH, VOCABULARY = 4, 512, 128_256
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCABULARY,
}
STEPS = 3


def memory(entry: str) -> int:
    """Bytes of an entry of the process's status: VmRSS, resident now; VmHWM, the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(entry)


def measure(variant: str, tied: bool, share: float) -> dict[str, float]:
    """Additional peak bytes and seconds of one forward and backward pass."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = CausalLM(CONFIG | {"tie_word_embeddings": tied}, schedule=None)
    module.configure_model()
    module.log_dict = module.log = lambda *args, **settings: None
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels = ids.masked_fill(torch.rand(ids.shape) >= share, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    step = {
        "own": lambda: module.lm(**batch, use_cache=False).loss,
        "CausalLM": lambda: module.training_step(dict(batch), 0),
        # The floor: all that is not head and loss.
        "none": lambda: module.lm.get_decoder()(ids, use_cache=False).last_hidden_state.square().mean(),
    }[variant]
    with torch.no_grad():
        module.training_step({key: value[:1, :8] for key, value in batch.items()}, 0)  # looks at the model first
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    times, loss = [], 0.0
    for number in range(STEPS):
        start = time.process_time()
        made = step()
        made.backward()
        times.append(time.process_time() - start)
        if number == 0:
            peak, loss = memory("VmHWM") - before, float(made.detach())
        del made
        module.zero_grad()
    gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return {"peak": peak, "seconds": statistics.median(times), "loss": loss, "gradients": gradients}


def main() -> None:
    """Prints ratios."""
    for tied, share in ((False, 1.0), (False, 0.5), (False, 0.1), (True, 0.5)):
        results = {
            variant: json.loads(
                subprocess.run(
                    [sys.executable, __file__, variant, str(int(tied)), str(share)],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout.splitlines()[-1]
            )
            for variant in ("own", "CausalLM", "none")
        }
        own, ours, floor = results["own"], results["CausalLM"], results["none"]
        assert abs(own["loss"] - ours["loss"]) < 1e-4, (own, ours)
        print(
            f"{'tied' if tied else 'untied'}, {share:.0%} of the tokens bear loss: additional peak"
            f" {own['peak'] / 2**20:.0f} MiB own, {ours['peak'] / 2**20:.0f} MiB CausalLM ="
            f" {ours['peak'] / own['peak']:.2f} (gradients alone {ours['gradients'] / 2**20:.0f} MiB, without head"
            f" and loss {floor['peak'] / 2**20:.0f} MiB); time {own['seconds']:.2f} s own,"
            f" {ours['seconds'] / own['seconds']:.2f} of it CausalLM",
            flush=True,
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], sys.argv[2] == "1", float(sys.argv[3]))))
    else:
        main()
