"""LoRA adapters of peft as GGUF files, which llama.cpp applies to a GGUF file of their base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.export.gguf_source import SavedTensors
from lightning_cl.export.gguf_tensors import EMBEDDING, HEAD, Place, family_of, places, to_pairs
from lightning_cl.export.gguf_types import Type, decode, encode, gguf
from lightning_cl.export.lora_settings import MERGE, base_config, read_settings, scale_of
from lightning_cl.files import replace_file

_TYPES = {"f32": Type.F32, "f16": Type.F16}


def export_adapter_gguf(
    folder: str | Path,
    path: str | Path,
    base: str | Path | None = None,
    type: str = "f32",
    name: str | None = None,
) -> Path:
    """Writes a LoRA adapter as a GGUF file, which ``llama-server --lora FILE`` and Ollama's ``ADAPTER FILE`` take.

    It fits every GGUF file of the very same base, quantised or not. Ranks and strengths that differ from layer to layer
    are written too: the strength is multiplied into the second factor then.

    Args:
        folder: as peft writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.
        path: the file. One that is there is replaced at the end.
        base: the base's folder, or its name on the hub; of it only ``config.json`` is read. Default: the one that
            the adapter names.
        type: of the factors: ``f32`` or ``f16``.
        name: of the adapter, in the file; default: the file's own name.

    Returns:
        the file.

    Raises:
        ValueError: for an adapter that is more than the product of two matrices, with the way round.
        RuntimeError: if what was written is not what the folder holds.
    """
    folder, path = Path(folder), Path(path)
    if type not in _TYPES:
        raise ValueError(f"type={type!r}: expected one of {list(_TYPES)}")
    settings = read_settings(folder, "llama.cpp")
    config = base_config(settings, base)
    pairs = list(_pairs(SavedTensors(folder, "adapter_model.safetensors"), settings, config))
    strengths = {scale * len(first) for _, first, _, scale in pairs}  # llama.cpp divides by the rank
    alpha = strengths.pop() if len(strengths) == 1 else 0.0  # 0: it multiplies by nothing
    tensors = {}
    for place, first, second, scale in pairs:
        strong = second if alpha else second * scale
        turned = strong if place.heads is None else to_pairs(strong, place.heads)
        for part, factor in (("a", first), ("b", turned)):
            tensors[f"{place.name}.lora_{part}"] = encode(factor.contiguous().numpy(), _TYPES[type], place.name)

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, family_of(config).name)
        writer.add_type("adapter")
        writer.add_name(name or path.stem)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for tensor_name, tensor in tensors.items():
            writer.add_tensor(tensor_name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _compare(temporary, tensors)

    replace_file(path, write)
    return path


def _pairs(
    tensors: SavedTensors, settings: Mapping[str, Any], config: Any
) -> Iterator[tuple[Place, Tensor, Tensor, float]]:
    """For each layer its place, the factors (rank × inputs and outputs × rank) and their scale.

    Raises:
        ValueError: for a layer that llama.cpp has no place for.
    """
    tied = bool(config.tie_word_embeddings)
    wanted, left = places(config, tied), set(tensors.shapes)
    for name in tensors.shapes:
        if not name.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        layer = name.rpartition(".lora_")[0]
        other = name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        module = layer.removeprefix("base_model.model.")
        place = wanted.get(f"{module}.weight")
        if place is None or other not in left or (tied and f"{module}.weight" in (EMBEDDING, HEAD)):
            reason = "the base has one matrix for both embeddings" if tied else "llama.cpp has no such layer"
            raise ValueError(f"{module}: {reason}{MERGE}")
        first, second = tensors.whole(name), tensors.whole(other)
        if (len(second), first.shape[1]) != (place.shape if name.endswith(".weight") else place.shape[::-1]):
            raise ValueError(
                f"{module}: the adapter's layer is {len(second)} × {first.shape[1]}, not the base's; wrong base?"
            )
        if not name.endswith(".weight"):
            first = first.T  # llama.cpp looks a token's row up in it
        left -= {name, other}
        yield place, first, second, scale_of(module, settings)
    if left:
        raise ValueError(f"{min(left)}: is no factor of a LoRA adapter{MERGE}")


def _compare(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Reads a file back.

    Raises:
        RuntimeError: if it holds anything else.
    """
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        read = decode(held[name].data, held[name].tensor_type) if name in held else np.zeros(0, np.float32)
        if not torch.equal(torch.from_numpy(np.array(read)), torch.from_numpy(tensor.astype(np.float32))):
            raise RuntimeError(f"{path.name}: {name} is not what was written")
    if held.keys() != tensors.keys():
        raise RuntimeError(f"{path.name}: holds {sorted(held.keys() - tensors.keys())} too")
