"""What a buffer costs: bytes on disk, resident memory, time to store and to draw; 10,000 samples, and a million.

    python tests/benchmarks/buffer.py [samples=10000,1000000]

Samples are of Dolly's size (100 to 300 tokens, about 200). Times are CPU seconds of one thread, and as ratios to a
plain python list of tensors in the same process; memory is what the process has grown by since before the first sample.
Each size runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BATCHES, ROWS = 1000, 16


def resident() -> float:
    """Resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(count: int) -> None:
    """Prints one size."""
    from lightning_cl.buffers import DiskStore, ReplayBuffer
    from lightning_cl.data.text.collator import TokenCollator

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2000):
        length = int(torch.randint(100, 300, (), generator=generator))
        ids = torch.randint(0, 49_152, (length,), generator=generator, dtype=torch.int32)
        samples.append({"input_ids": ids, "loss_mask": torch.arange(length) >= 40})
    collate = TokenCollator(0)
    collate(samples[:16])
    places = torch.randint(count, (BATCHES, ROWS), generator=generator).tolist()

    plain: list[Any] = []
    few = min(count, 10_000)

    def fill_list() -> None:
        for i in range(few):
            sample = samples[i % 2000]
            plain.append({name: tensor.clone() for name, tensor in sample.items()})

    list_fill = seconds(fill_list)
    list_draw = seconds(lambda: [collate([plain[i % few] for i in batch]) for batch in places])
    plain.clear()

    with tempfile.TemporaryDirectory() as folder:
        before = resident()
        buffer = ReplayBuffer(count, store=DiskStore(Path(folder)))

        def fill(start: int, end: int) -> None:
            for i in range(start, end):
                buffer.add(samples[i % 2000], "a")

        first = seconds(lambda: fill(0, few))
        rest = seconds(lambda: fill(few, count)) if count > few else None
        buffer.commit()
        numbers = buffer.numbers
        drawn = seconds(lambda: [collate([buffer.get(numbers[i]) for i in batch]) for batch in places])
        grown = resident() - before
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.bin"))
        tokens = 4 * sum(len(samples[i % 2000]["input_ids"]) for i in range(count)) / 4
        again = seconds(lambda: fill(0, few))  # a full buffer
        state = seconds(buffer.state_dict)
        print(f"{count:,} samples, {tokens / 1e6:.1f} M tokens")
        print(f"  on disk              {size / 1e6:8.1f} MB, {size / tokens:.2f} bytes per token")
        print(f"  resident             {grown:8.1f} MB, after {BATCHES * ROWS:,} draws")
        print(f"  10,000 insertions    {first:8.3f} s, {first / list_fill:.1f} × a list of copies")
        if rest is not None:
            print(f"  10,000 of the last   {rest / (count - few) * 10_000:8.3f} s")
        print(f"  10,000 offered, full {again:8.3f} s")
        print(f"  1,000 batches of 16  {drawn:8.3f} s, {drawn / list_draw:.1f} × a list")
        print(f"  state for checkpoint {state:8.3f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "one" in given:
        measure(int(given["one"]))
    else:
        for number in given.get("samples", "10000,1000000").split(","):
            subprocess.run([sys.executable, __file__, f"one={number}"], check=True)
