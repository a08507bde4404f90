"""Samples as checkpoints can hold them: plain containers and tensors, many small tensors joined into few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (str, bytes, int, float, bool, type(None))


def own(sample: Any) -> Any:
    """A copy of a sample that shares no memory with the data set it came from.

    A tensor that is a view of a large one would keep, and save, all of it.

    Raises:
        TypeError: if the sample holds something that cannot go into a checkpoint without pickle.
    """
    if isinstance(sample, Tensor):
        return sample.detach().to("cpu", copy=True).contiguous()
    if isinstance(sample, np.ndarray):
        if sample.dtype.kind not in "biuf":
            raise TypeError(f"a numpy array of dtype {sample.dtype}")
        return sample.copy()
    if isinstance(sample, np.generic):
        if sample.dtype.kind not in "biuf":
            raise TypeError(f"a numpy scalar of dtype {sample.dtype}")
        return sample
    if type(sample) in _PLAIN:  # not a subclass: an enum is an int, and unreadable in a checkpoint
        return sample
    if isinstance(sample, dict):
        return {own(key): own(value) for key, value in sample.items()}
    if type(sample) is tuple:
        return tuple(own(value) for value in sample)
    if isinstance(sample, list):
        return [own(value) for value in sample]
    raise TypeError(f"an object of type {type(sample).__name__}")


def size_in_bytes(sample: Any) -> int:
    """The bytes of the arrays and texts in a sample."""
    if isinstance(sample, Tensor):
        return sample.numel() * sample.element_size()
    if isinstance(sample, (np.ndarray, np.generic)):
        return sample.nbytes
    if isinstance(sample, (str, bytes)):
        return len(sample)
    if isinstance(sample, dict):
        return sum(size_in_bytes(value) for value in sample.values())
    if isinstance(sample, (tuple, list)):
        return sum(size_in_bytes(value) for value in sample)
    return 8


def pack(samples: Sequence[Any]) -> dict[str, Any]:
    """Samples as plain containers and tensors for ``torch.save``.

    Dictionaries and tuples of tensors with the same keys, dtypes and numbers of axes are joined into one flat tensor
    and one tensor of shapes per field: a checkpoint with 10,000 small tensors takes seconds, with two large ones
    nothing.
    """
    structure = _structure(samples[0]) if samples else None
    if structure is None or any(_structure(sample) != structure for sample in samples[1:]):
        return {"kind": "list", "samples": [_encode(sample) for sample in samples]}
    kind, keys = structure[0], [field[0] for field in structure[1]]
    fields = []
    for key in keys:
        tensors = [sample[key] for sample in samples]
        fields.append(
            {
                "key": key,
                "values": torch.cat([tensor.flatten() for tensor in tensors]),
                "shapes": torch.tensor([list(tensor.shape) for tensor in tensors], dtype=torch.int32),
            }
        )
    return {"kind": kind, "count": len(samples), "fields": fields}


def unpack(state: dict[str, Any]) -> list[Any]:
    """The samples of :func:`pack`."""
    if state["kind"] == "list":
        return [_decode(sample) for sample in state["samples"]]
    columns = []
    for field in state["fields"]:
        shapes = [tuple(shape) for shape in field["shapes"].tolist()]
        sizes = [int(torch.Size(shape).numel()) for shape in shapes]
        parts = field["values"].split(sizes)
        columns.append([part.clone().view(shape) for part, shape in zip(parts, shapes, strict=True)])
    keys = [field["key"] for field in state["fields"]]
    rows = zip(*columns, strict=True)
    return [dict(zip(keys, row, strict=True)) if state["kind"] == "dict" else tuple(row) for row in rows]


def _structure(sample: Any) -> tuple[str, list[tuple[Any, torch.dtype, int]]] | None:
    """What two samples must share to be joined; None for a sample with anything but tensors."""
    if isinstance(sample, dict) and sample:
        kind, items = "dict", list(sample.items())
    elif type(sample) is tuple and sample:
        kind, items = "tuple", list(enumerate(sample))
    else:
        return None
    if not all(isinstance(value, Tensor) for _, value in items):
        return None
    return kind, [(key, value.dtype, value.ndim) for key, value in items]


def _encode(sample: Any) -> Any:
    if isinstance(sample, (np.ndarray, np.generic)):
        # Unsigned types beyond uint8 are known to torch, but numpy scalars are not allowed in a checkpoint.
        return {"__numpy__": torch.from_numpy(np.array(sample)), "scalar": isinstance(sample, np.generic)}
    if isinstance(sample, dict):
        return {key: _encode(value) for key, value in sample.items()}
    if isinstance(sample, tuple):
        return tuple(_encode(value) for value in sample)
    if isinstance(sample, list):
        return [_encode(value) for value in sample]
    return sample


def _decode(sample: Any) -> Any:
    if isinstance(sample, dict) and "__numpy__" in sample:
        array = sample["__numpy__"].numpy()
        return array[()] if sample["scalar"] else array
    if isinstance(sample, dict):
        return {key: _decode(value) for key, value in sample.items()}
    if isinstance(sample, tuple):
        return tuple(_decode(value) for value in sample)
    if isinstance(sample, list):
        return [_decode(value) for value in sample]
    return sample
