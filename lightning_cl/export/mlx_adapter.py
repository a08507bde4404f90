"""LoRA adapters of peft as folders that mlx-lm applies to the folder of their base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lightning_cl.export.folders import replace_folder
from lightning_cl.export.gguf_source import SavedTensors
from lightning_cl.export.lora_settings import MERGE, base_config, read_settings, scale_of

WEIGHTS = "adapters.safetensors"
"""The file of mlx-lm's adapters that has the factors."""

_SETTINGS = "adapter_config.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def export_adapter_mlx(folder: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Writes a LoRA adapter for mlx-lm: ``mlx_lm.load(base, adapter_path=out)``, ``mlx_lm.generate --adapter-path``.

    mlx-lm knows one rank and one strength for all layers. Where they differ from layer to layer, smaller factors are
    filled up with zeros, and the strength is multiplied into the second factor. Dropout is left out. The factors are
    written in 32 bits.

    Args:
        folder: as peft writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the new folder; an earlier adapter of mlx-lm there is replaced.
        base: the base's folder, or its name on the hub; of it only ``config.json`` is read. Default: the one that
            the adapter names.

    Returns:
        the folder.

    Raises:
        ValueError: for an adapter that is more than the product of two matrices, with the way round.
        RuntimeError: if what was written is not what the folder holds.
    """
    folder = Path(folder)
    settings = read_settings(folder, "mlx-lm")
    config = base_config(settings, base)
    pairs = {
        module: (first, second, scale_of(module, settings))
        for module, first, second in _pairs(SavedTensors(folder, "adapter_model.safetensors"), config)
    }
    rank = max(len(first) for first, _, _ in pairs.values())
    scales = {scale for _, _, scale in pairs.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors: dict[str, Tensor] = {}
    for module, (first, second, mine) in pairs.items():
        missing = rank - len(first)
        strong = second if mine == scale else second * mine
        tensors[f"{module}.lora_a"] = F.pad(first.T, (0, missing)).contiguous()
        tensors[f"{module}.lora_b"] = F.pad(strong.T, (0, 0, 0, missing)).contiguous()
    keys = sorted({found[2] if (found := _LAYER.fullmatch(module)) else module for module in pairs})
    content = {
        "fine_tune_type": "lora",
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / WEIGHTS, {"format": "mlx"})
        (temporary / _SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _compare(temporary, pairs)

    return replace_folder(Path(out), write, WEIGHTS)


def _pairs(tensors: SavedTensors, config: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each layer its name and factors (rank × inputs and outputs × rank).

    Raises:
        ValueError: for a layer that mlx-lm has no place for.
    """
    left = set(tensors.shapes)
    for name in tensors.shapes:
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        other = name.replace(".lora_A.", ".lora_B.")
        found = _LAYER.fullmatch(module)
        if found and int(found[1]) >= config.num_hidden_layers:
            raise ValueError(f"{module}: the base has {config.num_hidden_layers} layers; wrong base?")
        tied = module == "lm_head" and config.tie_word_embeddings
        if other not in left or tied or not (found or module == "lm_head"):
            reason = "the base has one matrix for both embeddings" if tied else "mlx-lm has no such layer"
            raise ValueError(f"{module}: {reason}{MERGE}")
        left -= {name, other}
        yield module, tensors.whole(name), tensors.whole(other)
    if left or not tensors.shapes:
        name = min(left, default="adapter_model.safetensors")
        reason = "the embedding is not adapted here" if "embedding" in name else "is no factor of a layer"
        raise ValueError(f"{name}: {reason}{MERGE}")


def _compare(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Reads an adapter back.

    Raises:
        RuntimeError: if its products are not those of the factors.
    """
    held = load_file(folder / WEIGHTS)
    parameters = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))["lora_parameters"]
    for module, (first, second, scale) in pairs.items():
        a, b = (held.pop(f"{module}.lora_{part}", torch.zeros(0, 0)) for part in "ab")
        rank = len(first)
        whole = parameters["scale"] == scale
        same = torch.equal(a[:, :rank].T, first) and torch.equal(b[:rank].T, second if whole else second * scale)
        if not same or a[:, rank:].any() or b[rank:].any() or a.shape[1] != parameters["rank"]:
            raise RuntimeError(f"{WEIGHTS}: {module} is not what was written")
    if held:
        raise RuntimeError(f"{WEIGHTS}: holds {sorted(held)} too")
