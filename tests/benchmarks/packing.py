"""Loss-bearing tokens per second of padded, length-bucketed and packed batches, as ratios in one run.

    python tests/benchmarks/packing.py

Instruction-like lengths (log-normal, median 110 tokens, cut at 512; loss on the answer), a Llama-type model of 3
million parameters, AdamW, one thread. A padded batch has 8 samples, a packed one 2 blocks of 512 tokens. The three take
turns, and the figure is the sum over all their steps: single batches differ in length.
"""

from __future__ import annotations

import random
import time
import warnings

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl.data.loader import TaskLoader
from lightning_cl.data.text.collator import TokenCollator

LONGEST, STEPS = 512, 16


class Instructions(Dataset):
    """Random tokens of instruction-like lengths."""

    def __init__(self, samples: int) -> None:
        rng = random.Random(0)
        self.lengths = [min(LONGEST, max(16, int(rng.lognormvariate(4.7, 0.8)))) for _ in range(samples)]
        self.prompts = [int(length * rng.uniform(0.2, 0.6)) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = torch.arange(self.lengths[index]) >= self.prompts[index]
        return {"input_ids": torch.randint(0, 4096, mask.shape, dtype=torch.int32), "loss_mask": mask}

    def length(self, index: int) -> int:
        """Tokens of a sample."""
        return self.lengths[index]

    def loss_tokens(self, index: int) -> int:
        """Those that bear loss."""
        return self.lengths[index] - self.prompts[index]


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = Instructions(8000)
    loaders = {
        "padded, random": TaskLoader(data, 8, TokenCollator(0)),
        "length buckets": TaskLoader(data, 8, TokenCollator(0), length_buckets=True),
        "packed": TaskLoader(data, 2, TokenCollator(0), block_length=LONGEST),
    }
    start = time.perf_counter()
    TaskLoader(data, 2, block_length=LONGEST)
    print(f"{len(data):,} samples are packed in {time.perf_counter() - start:.2f} s")
    batches = {name: iter(loader) for name, loader in loaders.items()}
    tokens, seconds = dict.fromkeys(loaders, 0), dict.fromkeys(loaders, 0.0)
    for step in range(STEPS + 1):
        for name in loaders:
            batch = next(batches[name])
            start = time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:  # the first warms up
                seconds[name] += time.process_time() - start
                tokens[name] += int((batch["labels"][:, 1:] != -100).sum())
    rate = {name: tokens[name] / seconds[name] for name in loaders}
    for name, loader in loaders.items():
        print(
            f"{name:>15}: {loader.padding_share():6.1%} padding, {rate[name]:6.0f} loss-bearing tokens/s,"
            f" {rate[name] / rate['padded, random']:.2f} of padded, random"
        )


if __name__ == "__main__":
    main()
