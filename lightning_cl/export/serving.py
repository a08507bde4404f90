"""Command lines that serve one base with several adapters, in vLLM, llama.cpp's server and Ollama."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_cl.evaluation.model_card import Base
from lightning_cl.export.modelfile import modelfile_name

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes in all versions
# What vLLM refuses, or reads past: it takes one rank and one strength for all layers.
_NOT_IN_VLLM = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication")


class Served(NamedTuple):
    """An adapter as servers see it."""

    name: str
    task: str | None
    folder: str
    gguf: str | None
    rank: int
    settings: Mapping[str, Any]
    """Its ``adapter_config.json``."""


def commands(
    folder: Path, base: Base, adapters: Sequence[Served], model_gguf: str | Path | None, alone: bool = False
) -> list[str]:
    """Returns the lines for a shell in a folder.

    Args:
        folder: the folder.
        base: the model that the adapters belong to.
        adapters: in the order of their numbers in llama.cpp.
        model_gguf: the base as a GGUF file; None: ``BASE.gguf`` stands for it.
        alone: the lines are for the folder of one adapter, whose GGUF file is next to it, and are short.
    """
    place = Path("..") if alone else Path()
    lines = ["# In the folder of this file:" if alone else "# In the folder of adapters.json:"]
    if base.name is None:
        lines.append(f"# BASE is the model that the adapters were trained on: {base.words}")
    lines += ["", *_vllm(folder, base, adapters, alone), ""]
    with_gguf = [each for each in adapters if each.gguf is not None]
    if not with_gguf:
        return [*lines, "# llama.cpp, Ollama: the adapters have no GGUF files; write_adapters(gguf=True) writes them."]
    model = _inside(folder, model_gguf)
    lines += _llama_server(model, with_gguf, place, alone)
    return lines if alone else [*lines, "", *_ollama(folder, base, with_gguf, model)]


def _vllm(folder: Path, base: Base, adapters: Sequence[Served], alone: bool) -> list[str]:
    reasons = [f"{each.name}: {setting}" for each in adapters for setting in _NOT_IN_VLLM if each.settings.get(setting)]
    rank = max(each.rank for each in adapters)
    if rank > _VLLM_RANKS[-1]:
        reasons.append(f"rank {rank}, at most {_VLLM_RANKS[-1]}")
    if reasons:
        return [f"# vLLM cannot serve these adapters exactly ({', '.join(reasons)}); merge them (merge=True)."]
    saved = folder / "hf" / "config.json"
    model = base.name or ("hf" if saved.is_file() else "BASE")
    allowed = next(each for each in _VLLM_RANKS if each >= rank)
    modules = [shlex.quote(f"{each.name}={'.' if alone else each.folder}") for each in adapters]
    return [
        '# vLLM: a request names its adapter as "model"; with the name of the base it gets no adapter.',
        f"vllm serve {shlex.quote(model)} --enable-lora --max-loras {len(adapters)} --max-lora-rank {allowed}"
        f" --lora-modules {' '.join(modules)}",
    ]


def _llama_server(model: str, adapters: Sequence[Served], place: Path, alone: bool) -> list[str]:
    files = [(place / Path(str(each.gguf)).name if alone else Path(str(each.gguf))).as_posix() for each in adapters]
    lines = [
        f"llama-server -m {shlex.quote(model)} --lora-init-without-apply"
        + "".join(f" --lora {shlex.quote(file)}" for file in files)
    ]
    lines[:0] = ["# llama.cpp: loads all adapters, and applies none until a request asks for it."]
    for i, each in enumerate(adapters):
        if each.task is not None and not alone:
            lines.append(f"# task {json.dumps(each.task, ensure_ascii=False)}:")
        body = json.dumps({"prompt": "Hello", "n_predict": 32, "lora": [{"id": i, "scale": 1.0}]})
        lines.append(
            "curl -s http://localhost:8080/completion -H 'Content-Type: application/json'" + f" -d {shlex.quote(body)}"
        )
    off = json.dumps([{"id": i, "scale": 0.0} for i in range(len(adapters))])
    lines.append(f'# Always send "lora": a request without it can get every adapter at once. The base alone: {off}')
    return lines


def _ollama(folder: Path, base: Base, adapters: Sequence[Served], model: str) -> list[str]:
    start = re.split(r"[/\\]", base.name)[-1] if model == "BASE.gguf" and base.name else Path(model).stem
    names: dict[str, None] = {}
    lines, missing = [], []
    for each in adapters:
        file = modelfile_name(each.task or each.name)
        slug = name = ollama_name(f"{start}-{each.task or each.name}")
        while name in names:
            name = f"{slug}-{len(names) + 1}"
            slug = f"{slug}-"
        names[name] = None
        if (folder / file).is_file():
            lines.append(f"ollama create {name} -f {shlex.quote(file)}")
        else:
            missing.append(file)
    if missing:
        made = json.dumps(missing[0], ensure_ascii=False)
        lines.append(f"# {made} is not there; write_task_modelfiles writes one Modelfile for each task.")
    return ["# Ollama: one name for each task; the base is kept once.", *lines]


def ollama_name(text: str) -> str:
    """Returns a name that Ollama takes: at most 80 Latin letters, digits and ``_.-``, the first one no sign."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._").lower()[:70] or "model"


def _inside(folder: Path, file: str | Path | None) -> str:
    """A file's name in a folder; its path where it is elsewhere."""
    if file is None:
        return "BASE.gguf"
    path = Path(file)
    try:
        return path.absolute().relative_to(folder.absolute()).as_posix()
    except ValueError:
        return str(path)
