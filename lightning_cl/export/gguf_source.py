"""The tensors of a saved folder, some rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_CHUNK = 1 << 24  # numbers in memory at once: 64 MiB in fp32


class SavedTensors:
    """Reads the safetensors files of a folder.

    Args:
        folder: as ``save_pretrained`` writes it, in one file or several.
        single: the file's name, if there is one.

    Raises:
        ValueError: if there is no such file.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors") -> None:
        index = folder / f"{single}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [single]
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            if not (folder / file).is_file():
                raise ValueError(
                    f"folder={str(folder)!r}: has no {file}; expected a folder that save_pretrained wrote (older"
                    " pytorch_model.bin files: load the model and save it again)"
                )
            with _opened(folder / file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    self.files[name] = folder / file
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def whole(self, name: str) -> Tensor:
        """Returns a tensor in fp32."""
        with _opened(self.files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor.float()

    def chunks(self, name: str, whole: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yields a tensor's rows in fp32, as many at a time as fit.

        Args:
            name: of the tensor.
            whole: all at once, since their order changes.
        """
        shape = self.shapes[name]
        rows = shape[0] if shape else 1
        if whole or len(shape) < 2:
            yield slice(0, rows), self.whole(name)
            return
        step = max(1, _CHUNK // max(1, shape[1]))
        with _opened(self.files[name]) as opened:
            part: Any = opened.get_slice(name)
            for start in range(0, rows, step):
                at = slice(start, min(start + step, rows))
                yield at, part[at.start : at.stop].float()

    def same(self, one: str, other: str) -> bool:
        """True if two tensors hold the same numbers."""
        if self.shapes[one] != self.shapes[other]:
            return False
        pairs = zip(self.chunks(one), self.chunks(other), strict=True)
        return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")
