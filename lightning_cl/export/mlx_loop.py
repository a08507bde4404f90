"""Training loop in MLX that replays a saved memory next to new data, to be copied and changed.

``python -m lightning_cl.export.mlx_loop MODEL NEW.jsonl MEMORY OUT``: NEW.jsonl has lines ``{"text": ...}`` or
``{"prompt": ..., "completion": ...}``, MEMORY is a folder of ``save_memory``. MODEL and OUT are as ``save_pretrained``
writes them. The share of replay counts tokens that bear loss; over any beginning it is exact to one sample.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from transformers import AutoTokenizer

from lightning_cl.buffers.disk.layout import ERASED, HEADER_SIZE, RECORD
from lightning_cl.export.mlx import load_mlx, save_mlx


def new_samples(args: Any, tokenizer: Any, rng: np.random.Generator) -> Iterator[Any]:
    """The ids of the new data, in another order in each epoch, and which of them bear loss."""
    rows = [json.loads(line) for line in Path(args.new).read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in (rows[i] for _ in range(args.epochs) for i in rng.permutation(len(rows))):
        keys = [key for key in ("prompt", "completion", "text") if key in row]
        parts = [tokenizer.encode(row[key], add_special_tokens=key != "completion") for key in keys]
        ids = np.concatenate([*parts, [tokenizer.eos_token_id]]).astype(np.int32)
        yield ids, np.arange(len(ids)) >= (len(parts[0]) if "prompt" in row else 0)


def stored_samples(folder: str, rng: np.random.Generator) -> Iterator[Any]:
    """The same of random samples in the memory, without an end; only what is drawn is read from its files."""
    kinds = {"records": RECORD, "tokens": np.dtype("<i4"), "mask": np.dtype("u1")}
    records, tokens, mask = (np.memmap(Path(folder, "0000", f"{k}.bin"), kinds[k], "r", HEADER_SIZE) for k in kinds)
    usable = np.flatnonzero((records["flags"] & ERASED == 0) & (records["loss_tokens"] > 0))
    while True:
        record = records[rng.choice(usable)]
        start, end = int(record["start"]), int(record["start"] + record["length"])
        yield tokens[start:end], np.unpackbits(mask[start // 8 : -(-end // 8)], bitorder="little")[: end - start]


def mixed(new: Iterator[Any], old: Iterator[Any], share: float, counts: dict[str, int]) -> Iterator[Any]:
    """Error diffusion: a stored sample while their share is too small, else a new one, until these end."""
    while (sample := next(old if (is_old := counts["old"] < share * sum(counts.values())) else new, None)) is not None:
        counts["old" if is_old else "new"] += int(sample[1][1:].sum())
        yield sample


def loss(model: Any, batch: Sequence[Any]) -> mx.array:
    """Mean over the tokens of a batch that bear loss; position i predicts token i + 1."""
    width = -(-max(len(ids) for ids, _ in batch) // 32) * 32  # MLX compiles for each new shape
    ids, learnt = (mx.array(np.stack([np.pad(s[i], (0, width - len(s[i]))) for s in batch])) for i in (0, 1))
    losses = nn.losses.cross_entropy(model(ids[:, :-1]).astype(mx.float32), ids[:, 1:])
    return (losses * learnt[:, 1:]).sum() / mx.maximum(learnt[:, 1:].sum(), 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains on all new samples, and saves."""
    parser = argparse.ArgumentParser("python -m lightning_cl.export.mlx_loop", description=__doc__)
    options = {"--share": 0.5, "--epochs": 1, "--batch-size": 4, "--lr": 1e-5, "--seed": 0}
    for name, default in ({"model": "", "new": "", "memory": "", "out": ""} | options).items():
        parser.add_argument(name, type=type(default), default=default)
    args, counts = parser.parse_args(argv), {"new": 0, "old": 0}
    assert 0 <= args.share < 1, f"--share {args.share}: expected a number in [0, 1)"
    Path(args.out).mkdir(parents=True)  # an error, before anything is trained, if it is there
    model, tokenizer = load_mlx(args.model).train(), AutoTokenizer.from_pretrained(args.model)
    rng, optimizer = np.random.default_rng(args.seed), optimizers.AdamW(args.lr)
    samples = mixed(new_samples(args, tokenizer, rng), stored_samples(args.memory, rng), args.share, counts)
    while batch := [sample for _, sample in zip(range(args.batch_size), samples, strict=False)]:
        value, gradients = nn.value_and_grad(model, loss)(model, batch)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        print(f"loss {value.item():.3f}, share of replay so far {counts['old'] / max(1, sum(counts.values())):.4f}")
    save_mlx(model, args.model, args.out)


if __name__ == "__main__":
    main()
