"""Models as GGUF files, which llama.cpp and Ollama run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.export.gguf_source import SavedTensors
from lightning_cl.export.gguf_tensors import (
    EMBEDDING,
    HEAD,
    ROPE_FREQS,
    UNUSED,
    Place,
    context_length,
    family_of,
    metadata,
    places,
    rope_frequencies,
    to_halves,
    to_pairs,
)
from lightning_cl.export.gguf_tokenizer import Vocabulary, live_tokenizer, read_vocabulary, write_vocabulary
from lightning_cl.export.gguf_types import FileType, Type, decode, encode, file_type, gguf, largest_error
from lightning_cl.export.llama_cpp import check_ids, is_installed
from lightning_cl.files import replace_file


def export_gguf(
    folder: str | Path,
    path: str | Path,
    type: str = "f16",
    name: str | None = None,
    tokenizer: Any = None,
    pre: str | None = None,
    context_length: int | None = None,
    check: bool = True,
) -> Path:
    """Writes a saved model with its tokenizer as one GGUF file.

    Models of the families Llama (also SmolLM), Mistral, Qwen2 and Qwen3 with a byte-level BPE tokenizer are written,
    whoever trained them. The file is read back, each tensor is compared with the folder's, and then it gets its name.
    Where the package ``xllamacpp`` is installed, llama.cpp must also give the tokenizer's ids for texts that are hard
    to cut. Nothing in the file says where it was made.

    Memory: one packed tensor and 64 MiB of fp32 numbers, whatever the model's size. Time: the folder is read twice.

    Args:
        folder: as ``save_pretrained`` writes it: weights (safetensors), ``config.json``, tokenizer. An adapter must be
            merged (``save_pretrained(folder, merge=True)``), or written on its own (:func:`export_adapter_gguf`).
        path: the file. One that is there is replaced at the end.
        type: of the matrices: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1``, ``q4_0``; with the
            package ``libgguf`` also ``q6_k``, ``q5_k``, ``q4_k``, ``q3_k``, ``q2_k``. Vectors stay in fp32. Under types
            of fewer than 6 bits the output matrix has ``q8_0`` or ``q6_k``. Rows that a type's block does not divide
            get the next longer type that fits.
        name: of the model, in the file; default: the file's own name.
        tokenizer: the one that the model was trained with, if the folder has none or another.
        pre: llama.cpp's name for the way in which the tokenizer cuts texts, if it is not found by itself.
        context_length: positions that the file names; default: as many as the model has.
        check: compare the tokenizer's ids with llama.cpp's, where that is installed.

    Returns:
        the file.

    Raises:
        ValueError: for a model or tokenizer that llama.cpp would not compute exactly; the message has the reason and
            what to do.
        RuntimeError: if what was written is not what the folder holds, or llama.cpp gives other ids.
        ImportError: if a package is missing, with the extra that installs it.
    """
    folder, path = Path(folder), Path(path)
    kind = file_type(type)
    model = SavedModel(folder, context_length)
    tokenizer = live_tokenizer(folder) if tokenizer is None else tokenizer
    vocabulary = read_vocabulary(tokenizer, model.config.vocab_size, model.ends, pre)
    if check and is_installed():
        check_ids(tokenizer, vocabulary)

    def write(temporary: Path) -> None:
        write_model(temporary, model, vocabulary, kind, name or path.stem)
        _compare(temporary, model)

    replace_file(path, write)
    return path


class SavedModel:
    """A saved folder, as far as it can be written.

    Args:
        folder: the folder.
        length: positions that the file names, or None.

    Attributes:
        config: its configuration in ``transformers``.
        ends: ids of the tokens that end a text.
        keys: metadata, without the architecture in front.
        tensors: what it holds.
        places: for each of its tensors the place in the file.
        tied: the embedding is the output matrix too.

    Raises:
        ValueError: if it is no such folder, or llama.cpp cannot run the model.
    """

    def __init__(self, folder: Path, length: int | None = None) -> None:
        from transformers import AutoConfig, GenerationConfig

        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise ValueError(
                f"folder={str(folder)!r}: is an adapter's; write it with export_adapter_gguf, or merge it first"
                " (save_pretrained(folder, merge=True))"
                if adapter
                else f"folder={str(folder)!r}: has no config.json; expected a folder that save_pretrained wrote"
            )
        self.config: Any = AutoConfig.from_pretrained(folder)
        self.family = family_of(self.config)
        self.keys = metadata(self.config, context_length(self.config, length))
        ends = self.config.eos_token_id
        if (folder / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(folder).eos_token_id or ends
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.tensors = SavedTensors(folder)
        self.tied = self._tied()
        self.places = self._places()

    def _tied(self) -> bool:
        tied = bool(self.config.tie_word_embeddings)
        held = self.tensors.shapes
        if tied and HEAD in held and EMBEDDING in held and not self.tensors.same(EMBEDDING, HEAD):
            raise ValueError(
                "tie_word_embeddings=True, but lm_head differs from the embedding; set it to False in config.json if"
                " the model was trained with both"
            )
        return tied

    def _places(self) -> dict[str, Place]:
        """The tensors that are there, in the order of the file."""
        wanted, held = places(self.config, self.tied), self.tensors.shapes
        for name in held:
            if name not in wanted and not name.endswith(UNUSED) and not (self.tied and name == HEAD):
                raise ValueError(
                    f"{name}: llama.cpp has no place for this tensor in the architecture {self.family.name!r}; train"
                    " without it, or merge it into the others"
                )
        missing = [name for name, place in wanted.items() if name not in held and not place.optional]
        if missing:
            raise ValueError(f"{missing[0]}: not in the folder ({len(missing)} tensors are missing); save it again")
        for name, place in wanted.items():
            if name in held and held[name] != place.shape:
                raise ValueError(f"{name}: has the shape {held[name]}; config.json says {place.shape}")
        return {name: place for name, place in wanted.items() if name in held}


def write_model(path: Path, model: SavedModel, vocabulary: Vocabulary, kind: FileType, name: str) -> None:
    """Writes a file without looking at it again.

    Args:
        path: the file.
        model: what to write.
        vocabulary: its tokenizer.
        kind: the type of the file.
        name: of the model.
    """
    writer = gguf.GGUFWriter(path, model.family.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(kind.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in model.keys.items():
        add: Any = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{model.family.name}.{key}", value)
    write_vocabulary(writer, vocabulary)
    kinds = {name: kind.of(place.name, place.shape, model.tied) for name, place in model.places.items()}
    rope = rope_frequencies(model.config)
    if rope is not None:
        writer.add_tensor_info(ROPE_FREQS, rope.shape, rope.dtype, rope.nbytes, Type.F32)
    for hf_name, place in model.places.items():
        shape, dtype = _stored(place.shape, kinds[hf_name])
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(place.name, shape, dtype, size, kinds[hf_name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope is not None:
            writer.write_tensor_data(rope)
        for hf_name, place in model.places.items():
            writer.write_tensor_data(_packed(model.tensors, hf_name, place, kinds[hf_name]))
    finally:
        writer.close()


def _stored(shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a packed tensor in memory."""
    if kind in (Type.F32, Type.F16):
        return shape, np.dtype(np.float32 if kind == Type.F32 else np.float16)
    return gguf.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


def _packed(tensors: SavedTensors, name: str, place: Place, kind: Any) -> np.ndarray[Any, Any]:
    """A tensor as the file holds it, made some rows at a time."""
    shape, dtype = _stored(place.shape, kind)
    packed: np.ndarray[Any, Any] = np.empty(shape, dtype)
    for at, rows in tensors.chunks(name, whole=place.heads is not None):
        turned = rows if place.heads is None else to_pairs(rows, place.heads)
        packed[at] = encode(turned.numpy(), kind, name)
    return packed


def gguf_weights(path: str | Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of a file as ``transformers`` names and orders them, in fp32 and as llama.cpp unpacks them.

    Args:
        path: a file that :func:`export_gguf` wrote.
        config: the model's configuration in ``transformers``.

    Yields:
        name and tensor, one at a time.

    Raises:
        ValueError: if the file holds another model.
    """
    reader = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {place.name: (name, place) for name, place in places(config, "output.weight" not in held).items()}
    for file_name, tensor in held.items():
        if file_name == ROPE_FREQS:
            continue
        name, place = wanted.get(file_name, (None, None))
        if name is None or place is None or tuple(tensor.shape[::-1].tolist()) != place.shape:
            raise ValueError(f"{Path(path).name}: its tensor {file_name!r} is not one of this model")
        rows = torch.from_numpy(np.array(decode(tensor.data, tensor.tensor_type), dtype=np.float32))
        yield name, rows if place.heads is None else to_halves(rows, place.heads)


def load_gguf_weights(model: Any, path: str | Path) -> Any:
    """Puts a file's weights into a model, so that it computes what the exported file does, up to rounding.

    Quantised numbers are unpacked. llama.cpp also rounds activations to 8 bits in products with quantised matrices,
    which this does not.

    Args:
        model: of ``transformers``, of the folder that was exported (``AutoModelForCausalLM.from_pretrained``); its
            weights are overwritten. In fp32 nothing is rounded again.
        path: a file that :func:`export_gguf` wrote.

    Returns:
        the model.

    Raises:
        ValueError: if the file holds another model.
    """
    parameters = dict(model.named_parameters())
    unset = set(parameters)
    with torch.no_grad():
        for name, tensor in gguf_weights(path, model.config):
            if name not in parameters:
                raise ValueError(f"{Path(path).name}: the model has no parameter {name!r}")
            parameters[name].copy_(tensor)
            unset.discard(name)
    if unset:
        raise ValueError(f"{Path(path).name}: has no tensor for {min(unset)!r}")
    return model


def _compare(path: Path, model: SavedModel) -> None:
    """Reads a file back, and compares it with the folder.

    Raises:
        RuntimeError: if a number is not what its type makes of the folder's.
    """
    reader = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    names = {place.name for place in model.places.values()} | ({ROPE_FREQS} & held.keys())
    if names != held.keys():
        raise RuntimeError(f"{path.name}: lacks {sorted(names - held.keys())}, or holds {sorted(held.keys() - names)}")
    for name, place in model.places.items():
        tensor = held[place.name]
        for at, rows in model.tensors.chunks(name, whole=place.heads is not None):
            read = torch.from_numpy(np.array(decode(tensor.data[at], tensor.tensor_type)))
            read = read if place.heads is None else to_halves(read, place.heads)
            if not _close(read, rows, tensor.tensor_type):
                raise RuntimeError(
                    f"{path.name}: {place.name} is not {name} of the folder, as {tensor.tensor_type.name}"
                )


def _close(read: Tensor, rows: Tensor, kind: Any) -> bool:
    """True if numbers are what their type makes of others: the nearest of a plain type, within a step of a packed one.

    The rounding is torch's own, which shares no code with the writing.
    """
    plain = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(kind)
    if plain is not None:
        return torch.equal(read, rows.to(plain).float())
    bound = torch.from_numpy(largest_error(rows.numpy(), kind))
    return bool(((read - rows).reshape(*bound.shape[:-1], -1).abs() <= bound).all())
