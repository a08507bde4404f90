"""Records in memory; checkpoints have them too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.buffers.disk.encoding import Encoded, decode, decode_extra, encode
from lightning_cl.buffers.disk.segment import RemovedError
from lightning_cl.buffers.store import Info, Store, as_numbers

_PARTS = ("ids", "mask", "blob")


class MemoryStore:
    """Samples in RAM, as bytes. A sample that the buffer evicts is deleted at once, unless :meth:`hold` protects it.

    ``erase`` deletes samples from RAM, so later checkpoints do not contain them. Checkpoints that were written before
    still do.
    """

    writes = True

    def __init__(self) -> None:
        self._samples: dict[int, Encoded] = {}
        self._info: dict[int, Info] = {}
        self._removed: set[bytes] = set()
        self._held: set[int] = set()
        self._evicted: set[int] = set()  # held records that the buffer has evicted
        self._next = 0

    def append(
        self, sample: Any, task: str, position: int = -1, label: int = -1, extra: dict[str, Tensor] | None = None
    ) -> int:
        """Stores a sample.

        Raises:
            TypeError: if it cannot be stored without pickle.
        """
        return self._keep(encode(sample, extra), task, position, label)

    def _keep(self, encoded: Encoded, task: str, position: int, label: int) -> int:
        number = self._next
        self._next += 1
        self._samples[number] = encoded
        self._info[number] = Info(task, encoded.length, encoded.loss_tokens, encoded.size, position, label)
        return number

    def get(self, number: int) -> Any:
        """The sample of a record."""
        encoded = self._of(number)
        return decode(encoded.form, encoded.ids, encoded.mask, encoded.blob)

    def extra(self, number: int) -> dict[str, Tensor]:
        """The tensors that were stored next to it."""
        return decode_extra(self._of(number).blob)

    def info(self, number: int) -> Info:
        """Returns what is known of a record without its content."""
        self._of(number)
        return self._info[number]

    def columns(self, numbers: Sequence[int]) -> dict[str, Sequence[int]]:
        """``length`` and ``loss_tokens`` of many records."""
        infos = [self._info[number] for number in numbers]
        return {"length": [info.length for info in infos], "loss_tokens": [info.loss_tokens for info in infos]}

    def every(self) -> Iterator[int]:
        """The numbers of all records."""
        return iter(list(self._samples))

    def is_erased(self, number: int) -> bool:
        """Returns True if its content is gone."""
        return number not in self._samples

    def copies(self) -> Sequence[Store]:
        """None: checkpoints cannot be reached."""
        return []

    def erase(self, keys: dict[int, bytes]) -> None:
        """Forgets records, and never stores the same content again."""
        self.refuse(keys.values())
        for number in keys:
            self._forget(number)

    def refuse(self, keys: Iterable[bytes]) -> None:
        """Never stores these contents from now on."""
        self._removed.update(keys)

    def evict(self, number: int) -> None:
        """Deletes a record: now, or as soon as :meth:`hold` no longer protects it."""
        if number in self._held:
            self._evicted.add(number)
        else:
            self._forget(number)

    def hold(self, numbers: Iterable[int]) -> None:
        """Keeps these records readable until the next call, also if they are evicted."""
        self._held = set(numbers)
        for number in self._evicted - self._held:
            self._forget(number)
        self._evicted &= self._held

    def _forget(self, number: int) -> None:
        self._samples.pop(number, None)
        self._info.pop(number, None)

    @property
    def removed(self) -> set[bytes]:
        """The keys of everything that was erased."""
        return self._removed

    def flush(self) -> None:
        """Nothing."""

    def commit(self) -> None:
        """Nothing: checkpoints have the samples."""

    def state_dict(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The samples themselves: many small ones joined into few large tensors, which are saved much faster."""
        samples, infos = [self._samples[n] for n in numbers], [self._info[n] for n in numbers]
        forms = {form: index for index, form in enumerate(dict.fromkeys(sample.form for sample in samples))}
        parts = {name: [getattr(sample, name) for sample in samples] for name in _PARTS}
        return {
            "kind": "memory",
            **{
                name: torch.frombuffer(bytearray(b"".join(p) + b"."), dtype=torch.uint8)[:-1]
                for name, p in parts.items()
            },
            "sizes": torch.tensor([[len(getattr(s, name)) for name in _PARTS] for s in samples]).reshape(-1, 3),
            "forms": list(forms),
            "form": as_numbers([forms[sample.form] for sample in samples]),
            "loss_tokens": as_numbers([sample.loss_tokens for sample in samples]),
            "length": as_numbers([sample.length for sample in samples]),
            "tasks": [info.task for info in infos],
            "position": as_numbers([info.position for info in infos]),
            "label": as_numbers([info.label for info in infos]),
            "removed": sorted(self._removed),
            "numbers": as_numbers(numbers),
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any], folders: Sequence[Path] = ()) -> Tensor:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: if the checkpoint's buffer is on disk.
        """
        if state["kind"] != "memory":
            raise ValueError(
                "storage='memory' does not fit the checkpoint, whose buffer is on disk; give storage='disk'"
            )
        self.__init__()  # type: ignore[misc]
        content = {name: memoryview(state[name].numpy()) for name in _PARTS}
        ends = np.cumsum(np.concatenate([np.zeros((1, 3), np.int64), state["sizes"].numpy()]), axis=0).tolist()
        columns = [state[name].tolist() for name in ("form", "length", "loss_tokens", "position", "label", "numbers")]
        for index, (form, length, loss, position, label, number) in enumerate(zip(*columns, strict=True)):
            self._next = number  # the old number: other objects may have stored it
            begin, end = ends[index], ends[index + 1]
            ids, mask, blob = (bytes(content[name][begin[i] : end[i]]) for i, name in enumerate(_PARTS))
            encoded = Encoded(ids, mask, blob, state["forms"][form], length, loss)
            self._keep(encoded, state["tasks"][index], position, label)
        self._removed, self._next = set(state["removed"]), state["next"]
        result: Tensor = state["numbers"]
        return result

    def _of(self, number: int) -> Encoded:
        if number not in self._samples:
            raise RemovedError(f"record {number} was removed")
        return self._samples[number]
