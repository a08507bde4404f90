"""Everything that wants a GPU, in one script: one table, and the same as JSON, in at most 8 minutes.

    python tests/benchmarks/gpu.py                      all parts
    python tests/benchmarks/gpu.py recipe numbers       some of them
    python tests/benchmarks/gpu.py --small              small shapes, also without a GPU: does it run at all?

Nothing is downloaded: models have the shape of those that people use, and random weights. The parts:

* ``recipe``: ``configs/recipes/llama31-8b-codebase-replay.yaml`` with Llama 3.1 8B's shape, in bf16 and (with
  bitsandbytes) in nf4, held to the 24 GB of an RTX 4090, with its peak.
* ``steps``: a step of every method as a ratio to a plain step right before it, on a model of 1 billion parameters.
* ``fisher``: EWC's pass over samples as a ratio to training passes over as many, at 128 and 2,048 tokens.
* ``numbers``: losses and importance in fp32, bf16-mixed and fp16 with its scaler against the CPU's, on a small model.
* ``resume``: a run that is stopped and resumed against one that is not.
* ``compile``: the same training with ``torch.compile``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cl import (
    AGEM,
    EWC,
    KFACEWC,
    L2SP,
    MAS,
    SI,
    CausalLM,
    DERpp,
    LwF,
    Replay,
    RWalk,
    TaskDataModule,
    TrainedBPE,
    fit_tasks,
)
from lightning_cl.cli.command import main as command_line
from lightning_cl.core.coordinator import TaskCoordinator

RECIPE = Path(__file__).parents[2] / "configs/recipes/llama31-8b-codebase-replay.yaml"
CARD = 24564 * 2**20  # bytes of an RTX 4090
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2304,
    },
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Bench:
    """What all parts share: the device, the shapes, the time that is left, and the rows of the table."""

    def __init__(self, small: bool, minutes: float) -> None:
        self.small, self.rows = small, list[dict[str, Any]]()
        self.gpu = torch.cuda.is_available()
        self.deadline = time.monotonic() + 60 * minutes

    def shape(self, name: str) -> dict[str, Any]:
        """A configuration for ``CausalLM``."""
        shape = SHAPES["small" if self.small else name]
        return {"model_type": "llama", "max_position_embeddings": 8192, **shape}

    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.monotonic()

    def add(self, part: str, what: str, value: Any, unit: str = "") -> None:
        """Adds a row, and prints it at once: a run may be cut off."""
        self.rows.append({"part": part, "what": what, "value": value, "unit": unit})
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"  {part:<8} {what:<46} {shown:>12} {unit}", flush=True)

    @contextmanager
    def attempt(self, part: str, what: str, seconds: float) -> Iterator[None]:
        """Runs a piece that may fail; one that does not fit into the time is left out, with a row that says so."""
        if self.left() < seconds:
            self.add(part, what, "not run", f"(needs about {seconds:.0f} s)")
            raise _LeftOutError
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self.add(part, what, "out of memory")
        except _LeftOutError:
            raise
        except Exception as error:
            traceback.print_exc()
            self.add(part, what, "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
        finally:
            gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()

    def trainer(self, folder: str, callbacks: list[Any], **settings: Any) -> L.Trainer:
        """A quiet Trainer on the device."""
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"enable_checkpointing": saves, "num_sanity_val_steps": 0, "default_root_dir": folder}
        accelerator = "gpu" if self.gpu else "cpu"
        return L.Trainer(callbacks=callbacks, **{"accelerator": accelerator, "devices": 1, **quiet} | settings)


class _LeftOutError(Exception):
    """There is no time left for a piece."""


class Tokens(Dataset):
    """Random sequences: every token bears loss."""

    def __init__(self, samples: int, length: int, vocabulary: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, vocabulary, (samples, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Clock(L.Callback):
    """Seconds and loss of each batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.start = self._now()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        self.seconds.append(self._now() - self.start)
        self.losses.append(float(outputs["loss"]))

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


# ---------------------------------------------------------------------- the recipe


def write_model(folder: Path, config: dict[str, Any], tokenizer: Any, gpu: bool) -> None:
    """A Hugging Face folder with random bf16 weights, written one layer at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config | {"dtype": "bfloat16"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    made.architectures = [type(model).__name__]
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        number = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = parameter.shape
    index: dict[str, str] = {}
    for file, shapes in shards.items():
        device = "cuda" if gpu else "cpu"
        tensors = {
            name: (torch.ones if "norm" in name else torch.randn)(shape, dtype=torch.bfloat16, device=device)
            for name, shape in shapes.items()
        }
        scaled = {name: (t if "norm" in name else t.mul_(0.02)).cpu() for name, t in tensors.items()}
        save_file(scaled, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def chat_tokenizer(folder: Path) -> Any:
    """A vocabulary of our own with a chat template."""
    from transformers import PreTrainedTokenizerFast

    from lightning_cl.data.text.sample_texts import prose

    trained = TrainedBPE(2048, str(folder)).train(prose()[:40])
    trained._tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def recipe(bench: Bench) -> None:
    """The recipe as it is, but for its data, its length in steps, and where it writes."""
    from lightning_cl.data.text.sample_texts import prose, python

    with tempfile.TemporaryDirectory() as name, bench.attempt("recipe", "written model", 100):
        folder, start = Path(name), time.monotonic()
        (folder / "src").mkdir()
        for number, text in enumerate(python()[: 4 if bench.small else 40]):
            (folder / "src" / f"file{number}.py").write_text(text[: 4000 if bench.small else None])
        texts = [" ".join(text.split()[:60]) for text in prose()[:80]]
        dolly = [{"instruction": text[:60], "context": "", "response": text} for text in texts]
        (folder / "dolly.jsonl").write_text("".join(json.dumps(record) + "\n" for record in dolly))
        (folder / "held-out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in dolly[:8]))
        write_model(folder / "model", bench.shape("8B"), chat_tokenizer(folder), bench.gpu)
        bench.add("recipe", "written model", time.monotonic() - start, "s")
        four_bits = importlib.util.find_spec("bitsandbytes") is not None
        for quantization in (None, "nf4") if four_bits else (None,):
            what = f"{quantization or 'bf16'}, held to {CARD / 2**30:.1f} GiB"
            with bench.attempt("recipe", what, 90):
                _run_recipe(bench, folder, quantization, what)


def _run_recipe(bench: Bench, folder: Path, quantization: str | None, what: str) -> None:
    callbacks = yaml.safe_load(RECIPE.read_text())["trainer"]["callbacks"]
    for callback in callbacks:
        if callback["class_path"].endswith("GeneralReplay"):
            callback["init_args"]["data"] = str(folder / "dolly.jsonl")
        if callback["class_path"].endswith("PromptSamples"):
            callback["init_args"]["max_new_tokens"] = 8
    tasks = {
        "code": {"train": str(folder / "src"), "max_steps": 3},
        "general": {"val": str(folder / "held-out.jsonl")},
    }
    overlay = {
        "model": {"init_args": {"model": str(folder / "model"), "quantization": quantization}},
        "data": {"tasks": tasks, "tokenizer": str(folder / "model"), **({"max_length": 128} if bench.small else {})},
        "trainer": {
            "accelerator": "gpu" if bench.gpu else "cpu",
            "logger": False,
            "default_root_dir": str(folder / f"run-{quantization}"),
            "accumulate_grad_batches": 2,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "callbacks": callbacks,
        },
    }
    path = folder / f"overlay-{quantization}.yaml"
    path.write_text(yaml.safe_dump(overlay))
    if bench.gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    try:
        command_line(["fit", "--config", str(RECIPE), "--config", str(path)])
    finally:
        if bench.gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    bench.add("recipe", f"{what}: 3 steps and all else", time.monotonic() - start, "s")
    if bench.gpu:
        bench.add("recipe", f"{what}: peak in use", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        bench.add("recipe", f"{what}: peak reserved", torch.cuda.max_memory_reserved() / 2**30, "GiB")


# ---------------------------------------------------------------------- steps and passes


def methods(samples: int) -> dict[str, Callable[[], list[Any]]]:
    """Every method by name; a strength of their own where that saves measuring."""
    return {
        "EWC": lambda: [EWC(0.01, samples=samples)],
        "EWC auto": lambda: [EWC(samples=samples)],
        "EWC proximal": lambda: [EWC(1.0, samples=samples, apply="proximal")],
        "SI": lambda: [SI(0.01)],
        "MAS": lambda: [MAS(0.01, samples=samples)],
        "RWalk": lambda: [RWalk(0.01)],
        "L2SP": lambda: [L2SP(0.01)],
        "LwF": lambda: [LwF(1.0)],
        "Replay 25 %": lambda: [Replay(32, 0.25, storage="memory")],
        "DERpp 25 %": lambda: [DERpp(ratio=0.25, buffer_size=32, storage="memory")],
        "AGEM": lambda: [AGEM(32, storage="memory")],
        "KFACEWC": lambda: [KFACEWC(0.01, samples=samples, largest=2048)],
    }


def _two_tasks(
    bench: Bench, model: CausalLM, callbacks: list[Any], loader: DataLoader, steps: int
) -> tuple[Clock, float]:
    """Steps of a second task, after a short first one; and the seconds of the first task's end."""
    clock, end = Clock(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for count in (2, steps):
            clock.seconds.clear()
            run = bench.trainer(folder, [*callbacks, clock], max_steps=count, precision="bf16-mixed")
            run.fit(model, loader)
            if count == 2 and callbacks:
                end = TaskCoordinator.of(run).costs[0]["end_seconds"]
    return clock, end


def steps(bench: Bench) -> None:
    """A step of every method, as a ratio to plain steps right before it."""
    config = bench.shape("1B")
    model = CausalLM(config, schedule=None)
    length, batch, count = (32, 2, 6) if bench.small else (512, 4, 12)
    loader = DataLoader(Tokens(64, length, config["vocab_size"]), batch_size=batch)
    for name, make in methods(4).items():
        try:
            with bench.attempt("steps", name, 20):
                plain, _ = _two_tasks(bench, model, [], loader, count)
                clock, _ = _two_tasks(bench, model, make(), loader, count)
                ratio = statistics.median(clock.seconds[2:]) / statistics.median(plain.seconds[2:])
                bench.add("steps", name, ratio, "plain steps")
        except _LeftOutError:
            continue


def fisher(bench: Bench) -> None:
    """EWC's pass, as a ratio to training passes over as many samples."""
    config = bench.shape("1B")
    model = CausalLM(config, schedule=None)
    for length, batch in ((16, 4), (64, 2)) if bench.small else ((128, 16), (2048, 2)):
        with bench.attempt("fisher", f"{length} tokens", 30):
            loader = DataLoader(Tokens(64, length, config["vocab_size"]), batch_size=batch)
            plain, _ = _two_tasks(bench, model, [], loader, 8)
            samples = 4 * batch
            _, end = _two_tasks(bench, model, [EWC(0.0, samples=samples)], loader, 2)
            ratio = end / (statistics.median(plain.seconds[2:]) * samples / batch)
            bench.add("fisher", f"{length} tokens, {samples} samples", ratio, "training passes")


# ---------------------------------------------------------------------- the same numbers


def _sequence(
    bench: Bench, folder: str, precision: str = "32-true", ckpt_path: Path | None = None, **settings: Any
) -> tuple[CausalLM, EWC, list[float]]:
    """A small sequence of two tasks with a penalty, a path integral and replay."""
    L.seed_everything(0, verbose=False)
    config = {"model_type": "llama", **SHAPES["small"], "vocab_size": 64}
    model, clock = CausalLM(config, schedule=None), Clock()
    ewc = EWC(0.1, samples=8, estimator="empirical", normalize=False)
    callbacks = [ewc, SI(0.01), Replay(16, 0.25), clock, ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)]
    run = bench.trainer(folder, callbacks, max_steps=6, precision=precision, **settings)
    data = TaskDataModule({"a": Tokens(32, 24, 64), "b": Tokens(32, 24, 64, seed=1)}, batch_size=4)
    fit_tasks(run, model, data, ckpt_path)
    return model, ewc, clock.losses


def numbers(bench: Bench) -> None:
    """Losses and importance against the CPU's."""
    with tempfile.TemporaryDirectory() as folder:
        _, reference, losses = _sequence(bench, folder, accelerator="cpu")
    expected = torch.cat([f.flatten().double() for _, f in sorted(reference.importance.items())])
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if bench.gpu else [])]
    for precision in precisions:
        with bench.attempt("numbers", precision, 10), tempfile.TemporaryDirectory() as folder:
            _, ewc, found = _sequence(bench, folder, precision)
            off = max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True))
            bench.add("numbers", f"{precision}: losses, largest difference", off, "of the CPU's")
            importance = torch.cat([f.flatten().double().cpu() for _, f in sorted(ewc.importance.items())])
            distance = float((importance - expected).norm() / expected.norm())
            bench.add("numbers", f"{precision}: importance, distance", distance, "of the CPU's")


def resume(bench: Bench) -> None:
    """A resumed run against one that was not stopped: 0 is bit for bit."""
    with bench.attempt("resume", "weights and importance", 10), tempfile.TemporaryDirectory() as folder:
        reference, ewc, _ = _sequence(bench, f"{folder}/a", deterministic="warn")
        checkpoints = sorted(Path(folder, "a").rglob("*.ckpt"))
        for checkpoint in (checkpoints[0], checkpoints[-2]):
            root = f"{folder}/{checkpoint.stem}"
            other, again, _ = _sequence(bench, root, ckpt_path=checkpoint, deterministic="warn")
            pairs = [*zip(reference.parameters(), other.parameters(), strict=True)]
            pairs += [(ewc.importance[name], again.importance[name]) for name in ewc.importance]
            off = max(float((a.detach().cpu() - b.detach().cpu()).abs().max()) for a, b in pairs)
            name = checkpoint.relative_to(Path(folder, "a"))
            bench.add("resume", f"from {name}: largest difference", off)


def compiled(bench: Bench) -> None:
    """The same training with and without ``torch.compile``."""
    config = bench.shape("1B") | ({} if bench.small else {"num_hidden_layers": 4})
    loader = DataLoader(Tokens(64, 32 if bench.small else 512, config["vocab_size"]), batch_size=4)
    found: dict[bool, Clock] = {}
    with bench.attempt("compile", "step and loss", 60), tempfile.TemporaryDirectory() as folder:
        for wrapped in (False, True):
            L.seed_everything(0, verbose=False)
            model, clock = CausalLM(config, schedule=None), Clock()
            callbacks = [EWC(0.01, samples=2), SI(0.01), clock]
            run = bench.trainer(folder, callbacks, max_steps=8, precision="bf16-mixed")
            if wrapped:
                model.configure_model()
                model.lm.compile()
            run.fit(model, loader)
            found[wrapped] = clock
        plain, fast = found[False], found[True]
        ratio = statistics.median(fast.seconds[4:]) / statistics.median(plain.seconds[4:])
        bench.add("compile", "step with EWC and SI", ratio, "steps without it")
        off = max(abs(a - b) / abs(b) for a, b in zip(fast.losses, plain.losses, strict=True))
        bench.add("compile", "losses, largest difference", off)


PARTS: dict[str, Callable[[Bench], None]] = {
    "numbers": numbers,
    "resume": resume,
    "recipe": recipe,
    "fisher": fisher,
    "steps": steps,
    "compile": compiled,
}


def main() -> None:
    """Runs the parts, prints the table, writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--small", action="store_true", help="small shapes, also without a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out (default: 8)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for the rows (default: gpu.json)")
    asked = parser.parse_args()
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not asked.small:
        parser.error("there is no GPU; --small runs small shapes on the CPU")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    bench = Bench(asked.small, asked.minutes)
    card = torch.cuda.get_device_name(0) if bench.gpu else "no GPU"
    print(f"{card}, torch {torch.__version__}{', small shapes' if asked.small else ''}", flush=True)
    for name, part in PARTS.items():
        if name in asked.parts or not asked.parts:
            try:
                part(bench)
            except _LeftOutError:
                continue
    content = {"card": card, "torch": torch.__version__, "small": asked.small, "rows": bench.rows}
    asked.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{asked.json}: the same as JSON")


if __name__ == "__main__":
    main()
