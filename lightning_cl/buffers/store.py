"""The interface of a store of samples, as a buffer uses it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_cl.buffers.disk.encoding import Encoded, encode


class Info(NamedTuple):
    """Facts about a record that are known without reading its content.

    Attributes:
        task: the name of its task.
        length: tokens; 0 for a sample that is no token sequence.
        loss_tokens: those that bear loss; −1 for a sample that is no token sequence.
        size: bytes of its content.
        position: its position in its task's data; −1: unknown.
        label: its class; −1: none.
    """

    task: str
    length: int
    loss_tokens: int
    size: int
    position: int
    label: int


class Store(Protocol):
    """Immutable records under growing numbers.

    Attributes:
        writes: False on ranks for which another one writes.
    """

    writes: bool

    def append(
        self, sample: Any, task: str, position: int = -1, label: int = -1, extra: dict[str, Tensor] | None = None
    ) -> int:
        """Stores a sample and gives its number."""

    def get(self, number: int) -> Any:
        """The sample of a record; RemovedError if it was erased."""

    def extra(self, number: int) -> dict[str, Tensor]:
        """The tensors that were stored next to it."""

    def info(self, number: int) -> Info:
        """Returns what is known of a record without its content."""

    def columns(self, numbers: Sequence[int]) -> dict[str, Sequence[int]]:
        """``length`` and ``loss_tokens`` of many records."""

    def every(self) -> Iterator[int]:
        """The numbers of all records that are not erased."""

    def is_erased(self, number: int) -> bool:
        """Returns True if its content is gone."""

    def copies(self) -> Sequence[Store]:
        """Names what lies next to the records of this store and may have the same samples."""

    def erase(self, keys: dict[int, bytes]) -> None:
        """Overwrites the content of records, given by :func:`keys_of`, and never stores the same content again."""

    def refuse(self, keys: Iterable[bytes]) -> None:
        """Never stores these contents from now on."""

    def evict(self, number: int) -> None:
        """The buffer has let a record go."""

    def hold(self, numbers: Iterable[int]) -> None:
        """Keeps these records readable until the next call, also if they are evicted."""

    @property
    def removed(self) -> set[bytes]:
        """The keys of everything that was erased."""

    def flush(self) -> None:
        """Lets other processes see what was appended."""

    def commit(self) -> None:
        """Makes what was appended outlive a crash."""

    def state_dict(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Returns what a checkpoint needs to find these records again."""

    def load_state_dict(self, state: dict[str, Any], folders: Sequence[Path] = ()) -> Tensor:
        """Restores :meth:`state_dict`; gives the numbers of its records."""


def wait_for_all_ranks() -> None:
    """Returns when every rank has come here, if there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def keys_of(store: Store, numbers: Iterable[int]) -> dict[int, bytes]:
    """16 bytes that stand for the content of records, without what was stored next to them."""
    return {number: digest(encode(store.get(number))) for number in numbers}


def was_removed(store: Store, sample: Any) -> bool:
    """Returns True if a sample of this content was erased, and is not to come back."""
    return bool(store.removed) and digest(encode(sample)) in store.removed


def digest(sample: Encoded) -> bytes:
    """16 bytes that stand for a sample's content."""
    content = hashlib.blake2b(digest_size=16)
    for part in (sample.form.encode(), sample.ids, sample.mask, sample.blob):
        content.update(len(part).to_bytes(8, "little"))
        content.update(part)
    return content.digest()


def as_numbers(numbers: Sequence[int]) -> Tensor:
    """Record numbers as a tensor."""
    return torch.tensor(list(numbers), dtype=torch.int64)
