"""A fingerprint of a task's validation data: one column of the matrix must be measured on the same data throughout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_cl.data.module import TaskDataModule
from lightning_cl.data.stream import StreamLoader
from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.tasks import Task

_LOOKED_AT = 8  # samples that are read of a data set that is not made of tensors
_SETTINGS = {
    "limit": "limit_val_batches",
    "batch_size": "the batch size",
    "processes": "the number of processes",
    "packing": "packing",
    "max_length": "max_length",
    "template": "the chat template",
}


def measured_on(data: TaskDataModule, task: Task, limit: int | float, processes: int = 1) -> dict[str, Any]:
    """Describes what a task's column of the matrix is measured on, as numbers, texts and hashes.

    Args:
        data: the tasks, set up.
        task: one of its tasks.
        limit: ``Trainer(limit_val_batches=…)``.
        processes: the number of processes that share the batches.

    Returns:
        ``data``, ``samples``, ``batches``, and the settings ``limit``, ``batch_size``, ``processes``, ``packing``,
        ``max_length`` and ``template``. ``data`` is a hash of the samples, for text of their tokens; it is None if they
        cannot be read by index.
    """
    loaders = _flat(data.val_loader(task))
    sets = [getattr(loader, "dataset", None) for loader in loaders]
    text = any(isinstance(one, (TokenDataset, StreamLoader)) for one in [*sets, *loaders])
    template = getattr(data.tokenizer, "chat_template", None) if text else None
    return {
        "data": _hash_all(sets),
        "samples": [_length(one) for one in sets],
        "batches": [_batches(loader, limit) for loader in loaders],
        "limit": repr(limit),  # 1.0 means all batches, and 1 means one batch
        "batch_size": [getattr(loader, "batch_size", None) for loader in loaders],
        "processes": processes,
        "packing": data.packing if text else None,
        "max_length": data.max_length if text else None,
        "template": _digest(repr(template)) if template else None,
    }


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Names the differences between two fingerprints in words; None if both have the same data in the same batches.

    `max_length`, the template and the limit count only if they change the tokens or the batches.
    """
    compared = ["data", "samples", "batches", "batch_size", "processes", "packing"]
    if now["data"] is None or now["packing"]:
        compared += ["max_length", "template"]
    if all(then[key] == now[key] for key in compared):
        return None
    causes = [f"{words}{_from_to(then[key], now[key])}" for key, words in _SETTINGS.items() if then[key] != now[key]]
    own = then["data"] != now["data"] and all(then[key] == now[key] for key in ("max_length", "template"))
    return ", ".join(causes + ["the validation samples"] * (own or not causes))


def fingerprint(
    columns: Mapping[str, Mapping[str, Any]], names: Sequence[str], settings: Mapping[str, Any]
) -> str | None:
    """A hash of what several columns are measured on, and of settings; the folders and the order do not count.

    Args:
        columns: for each task the answer of :func:`measured_on`.
        names: the tasks that count.
        settings: what else counts.

    Returns:
        16 hexadecimal digits; None if a column is missing, or its samples cannot be read by index.
    """
    if any(name not in columns or columns[name]["data"] is None for name in names):
        return None
    compared = ("data", "samples", "batches", "batch_size", "processes", "packing")
    return _digest([[name, *(columns[name][key] for key in compared)] for name in names], dict(settings))


def _from_to(then: Any, now: Any) -> str:
    shown = [", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in (then, now)]
    return f" {shown[0]} → {shown[1]}" if all(len(text) <= 12 for text in shown) else ""


def _flat(loader: Any) -> list[Any]:
    if isinstance(loader, CombinedLoader):
        return list(loader.flattened)
    if isinstance(loader, Mapping):
        loader = list(loader.values())
    if isinstance(loader, (list, tuple)):
        return [part for one in loader for part in _flat(one)]
    return [] if loader is None else [loader]


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _batches(loader: Any, limit: int | float) -> int | None:
    """Returns the number of batches to measure; without a known length, the limit if it is a number of batches."""
    length = _length(loader)
    if isinstance(limit, int):
        return limit if length is None else min(length, limit)
    return length if length is None else int(length * limit)


# ---------------------------------------------------------------------- content


def _hash_all(sets: Sequence[Any]) -> str | None:
    hashes = [content_hash(one) for one in sets]
    return None if not hashes or any(one is None for one in hashes) else _digest(*hashes)


def content_hash(dataset: Any) -> str | None:
    """A hash of a data set's samples: of all if they are tensors, else of a few spread over the data set.

    None if samples cannot be read by index, or differ when they are read again (random crops).
    """
    if isinstance(dataset, TokenDataset):
        return _digest(*dataset.tensors.values())
    if isinstance(dataset, TensorDataset):
        return _digest(*dataset.tensors)
    if isinstance(dataset, Subset):
        inner = content_hash(dataset.dataset)
        return None if inner is None else _digest(inner, list(dataset.indices))
    length = _length(dataset)
    if length is None or not hasattr(dataset, "__getitem__"):
        return None
    indices = sorted({round(i * (length - 1) / (_LOOKED_AT - 1)) for i in range(_LOOKED_AT)}) if length else []
    try:
        once, again = (_digest(*(dataset[index] for index in indices)) for _ in range(2))
    except (KeyError, TypeError, IndexError):
        return None  # the data set cannot be read by numbers
    return once if once == again else None


def _digest(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        for piece in _pieces(value):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(value: Any) -> Iterable[bytes]:
    """A value as bytes, after its type and shape or length."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes() if value.dtype != object else repr(value).encode()
    elif isinstance(value, Mapping):
        for key in value:
            yield from _pieces(key)
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}[".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        yield f"{type(value).__name__}:{value!r};".encode()
    elif hasattr(value, "tobytes"):
        yield value.tobytes()  # an image
    else:
        yield type(value).__qualname__.encode()
