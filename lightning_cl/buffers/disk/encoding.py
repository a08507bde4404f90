"""Samples as bytes without pickle: token sequences as ids and bits, everything else as ``safetensors``."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_SCALARS = {"int": int, "float": float, "bool": bool}
_IGNORE = -100  # Hugging Face's label where there is no loss


class Encoded(NamedTuple):
    """A sample as it is stored.

    Attributes:
        ids: token ids as int32 bytes; empty for a sample that is no token sequence.
        mask: one bit per token.
        blob: ``safetensors`` bytes of what else there is; empty if nothing.
        form: how the parts make up the sample, as JSON.
        length: tokens.
        loss_tokens: those that bear loss under next-token prediction; −1 for a sample that is no token sequence.
    """

    ids: bytes
    mask: bytes
    blob: bytes
    form: str
    length: int
    loss_tokens: int

    @property
    def size(self) -> int:
        """Bytes of its content."""
        return len(self.ids) + len(self.mask) + len(self.blob)


_PLAIN_FORM = json.dumps({"tokens": "plain"})


def encode(sample: Any, extra: dict[str, Tensor] | None = None) -> Encoded:
    """A sample as bytes.

    Token sequences take 4 bytes and one bit per token: this library's (``input_ids``, int32, and ``loss_mask``, bool)
    and Hugging Face's (``input_ids`` and ``labels``, which are the ids or −100, perhaps with an ``attention_mask`` of
    ones), as tensors or lists.

    Args:
        sample: tensors, arrays, numbers and texts in plain containers.
        extra: tensors to be kept next to it.

    Raises:
        TypeError: if the sample has anything else in it, which the message names.
    """
    tokens = _as_tokens(sample)
    leaves: dict[str, Tensor] = {}
    if tokens is None:
        form = json.dumps({"tree": _take_apart(sample, leaves)})
        ids, mask, length, loss = b"", b"", 0, -1
    else:
        form, id_array, mask_array = tokens
        ids, mask = id_array.tobytes(), np.packbits(mask_array, bitorder="little").tobytes()
        length = len(id_array)
        loss = int(np.count_nonzero(mask_array[1:]))
    for name, tensor in (extra or {}).items():
        leaves[f"extra.{name}"] = tensor.detach().cpu().contiguous()
    return Encoded(ids, mask, save_tensors(leaves) if leaves else b"", form, length, loss)


def decode(form: str, ids: bytes, mask: bytes, blob: bytes) -> Any:
    """The sample of :func:`encode`, equal in values, types and containers."""
    if form == _PLAIN_FORM:
        length = len(ids) // 4
        return {
            "input_ids": torch.frombuffer(bytearray(ids), dtype=torch.int32) if length else torch.empty(0).int(),
            "loss_mask": torch.from_numpy(_bits(mask, length)),
        }
    description = json.loads(form)
    if "tree" in description:
        return _put_together(description["tree"], load_tensors(blob) if blob else {})
    array = np.frombuffer(ids, dtype="<i4")
    learnt = _bits(mask, len(array))
    values = {
        "input_ids": array,
        "labels": np.where(learnt, array, _IGNORE),
        "attention_mask": np.ones(len(array), dtype=np.int64),
        "loss_mask": learnt,
    }
    return {key: _as_container(values[key], kind) for key, kind in description["tokens"].items()}


def decode_extra(blob: bytes) -> dict[str, Tensor]:
    """The tensors that were kept next to a sample."""
    if not blob:
        return {}
    return {
        name.removeprefix("extra."): tensor for name, tensor in load_tensors(blob).items() if name.startswith("extra.")
    }


# ---------------------------------------------------------------------- token sequences


def _bits(mask: bytes, length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=length, bitorder="little").view(np.bool_)


def _as_tokens(sample: Any) -> tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Form, int32 ids and bool mask of a token sequence; None for another sample."""
    if type(sample) is not dict or "input_ids" not in sample:
        return None
    if list(sample) == ["input_ids", "loss_mask"]:
        ids, mask = sample["input_ids"], sample["loss_mask"]
        plain = isinstance(ids, Tensor) and ids.dtype == torch.int32 and ids.ndim == 1
        if plain and isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == ids.shape:
            return _PLAIN_FORM, ids.numpy(), mask.numpy()
    if not set(sample) <= {"input_ids", "labels", "attention_mask", "loss_mask"}:
        return None
    kinds = {key: _kind_of(value) for key, value in sample.items()}
    if None in kinds.values():
        return None
    arrays = {key: np.asarray(value) for key, value in sample.items()}
    ids = arrays["input_ids"]
    if len(ids) == 0 or any(len(array) != len(ids) for array in arrays.values()):
        return None
    if ids.min() < 0 or ids.max() >= 2**31 or ("attention_mask" in arrays and (arrays["attention_mask"] != 1).any()):
        return None
    mask = arrays["loss_mask"] != 0 if "loss_mask" in arrays else arrays.get("labels", ids) != _IGNORE
    if "labels" in arrays and not np.array_equal(arrays["labels"], np.where(mask, ids, _IGNORE)):
        return None
    if "loss_mask" in arrays and not np.array_equal(arrays["loss_mask"], mask):
        return None  # numbers other than 0 and 1
    return json.dumps({"tokens": kinds}), ids.astype("<i4"), mask


def _kind_of(value: Any) -> str | None:
    """``list``, ``tensor:<dtype>`` or ``array:<dtype>`` for a sequence of integers; None for anything else."""
    if type(value) is list:
        return "list" if value and all(type(item) is int for item in value) else None
    if isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex():
        return f"tensor:{str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "biu":
        return f"array:{value.dtype.name}"
    return None


def _as_container(values: np.ndarray[Any, Any], kind: str) -> Any:
    if kind == "list":
        return values.astype(np.int64).tolist()
    container, dtype = kind.split(":")
    if container == "array":
        return values.astype(dtype)
    return torch.from_numpy(values.copy()).to(getattr(torch, dtype))


# ---------------------------------------------------------------------- everything else


def _take_apart(sample: Any, leaves: dict[str, Tensor]) -> Any:
    """The structure of a sample as JSON; its tensors go into `leaves` under their numbers."""

    def leaf(kind: str, tensor: Tensor) -> list[str]:
        leaves[str(len(leaves))] = tensor
        return [kind]

    if isinstance(sample, Tensor):
        if sample.layout is not torch.strided or sample.is_quantized:
            raise TypeError(f"a tensor of layout {sample.layout}")
        tensor = sample.detach().cpu().contiguous().clone()
        _check_dtype(tensor, f"a tensor of dtype {sample.dtype}")
        return leaf("tensor", tensor)
    if isinstance(sample, (np.ndarray, np.generic)):
        name = "scalar" if isinstance(sample, np.generic) else "array"
        if sample.dtype.kind not in "biuf":
            raise TypeError(f"a numpy {name} of dtype {sample.dtype}")
        try:
            tensor = torch.from_numpy(np.array(sample, order="C"))
        except (TypeError, ValueError) as error:  # ValueError: in the other byte order
            raise TypeError(f"a numpy {name} of dtype {sample.dtype}") from error
        return leaf(f"numpy {name}", tensor)
    # Not a subclass: an enum is an int, and could not be restored.
    if sample is None:
        return ["none"]
    if type(sample) is bool:
        return leaf("bool", torch.tensor(sample))
    if type(sample) is int and -(2**63) <= sample < 2**63:
        return leaf("int", torch.tensor(sample))
    if type(sample) is float:
        return leaf("float", torch.tensor(sample, dtype=torch.float64))
    if type(sample) in (str, bytes, int):
        kind = type(sample).__name__
        content = sample if type(sample) is bytes else str(sample).encode("utf-8", "surrogatepass")
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return leaf("long int" if kind == "int" else kind, text)
    if isinstance(sample, dict):
        return {"keys": [_key(key) for key in sample], "values": [_take_apart(v, leaves) for v in sample.values()]}
    if type(sample) is tuple or isinstance(sample, list):
        kind = "tuple" if type(sample) is tuple else "list"
        return {kind: [_take_apart(value, leaves) for value in sample]}
    raise TypeError(f"an object of type {type(sample).__name__}")


def _key(key: Any) -> Any:
    if type(key) in (str, int, float, bool, type(None)):
        return key
    if type(key) is tuple:
        return {"tuple": [_key(part) for part in key]}
    raise TypeError(f"a dictionary with a key of type {type(key).__name__}")


def _as_key(node: Any) -> Any:
    return tuple(_as_key(part) for part in node["tuple"]) if isinstance(node, dict) else node


def _check_dtype(tensor: Tensor, description: str) -> None:
    try:
        save_tensors({"0": tensor.flatten()[:1]})
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise TypeError(description) from error


def _put_together(tree: Any, leaves: dict[str, Tensor]) -> Any:
    numbers = iter(range(len(leaves)))

    def build(node: Any) -> Any:
        if isinstance(node, dict):
            if "keys" in node:
                return dict(zip(map(_as_key, node["keys"]), [build(value) for value in node["values"]], strict=True))
            if "tuple" in node:
                return tuple(build(value) for value in node["tuple"])
            return [build(value) for value in node["list"]]
        kind = node[0]
        if kind == "none":
            return None
        tensor = leaves[str(next(numbers))]
        if kind == "tensor":
            return tensor
        if kind.startswith("numpy"):
            return tensor.numpy()[()] if kind.endswith("scalar") else tensor.numpy()
        if kind in _SCALARS:
            return _SCALARS[kind](tensor.item())
        content = tensor.numpy().tobytes()
        if kind == "bytes":
            return content
        text = content.decode("utf-8", "surrogatepass")
        return int(text) if kind == "long int" else text

    return build(tree)
