"""Contents of a buffer's folder, for somebody without a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_cl.buffers.disk.segment import RemovedError
from lightning_cl.buffers.disk.store import DiskStore
from lightning_cl.buffers.store import Store, keys_of, wait_for_all_ranks


class Stored(NamedTuple):
    """A stored sample, as a predicate of :meth:`~lightning_cl.buffers.ReplayBuffer.remove` sees it.

    Attributes:
        sample: the sample.
        task: the name of its task.
        position: its position in its task's training data; −1: unknown.
        label: its class; −1: none.
    """

    sample: Any
    task: str
    position: int
    label: int


def stored_in(store: Store) -> Iterator[tuple[int, Stored]]:
    """Every record that is still in a store, with its number; also those that no buffer draws any more."""
    for number in store.every():
        info = store.info(number)
        try:
            yield number, Stored(store.get(number), info.task, info.position, info.label)
        except RemovedError:
            continue


def found_in(store: Store, predicate: Callable[[Stored], bool]) -> dict[int, bytes]:
    """The records that a predicate wants to go, each with the bytes that stand for its content."""
    return keys_of(store, [number for number, stored in stored_in(store) if predicate(stored)])


def erase_found(store: Store, predicate: Callable[[Stored], bool]) -> list[dict[int, bytes]]:
    """Erases what a predicate wants to go from a store and from its copies; on all ranks.

    Returns:
        for the store, and then for each copy, what :func:`found_in` found.
    """
    wait_for_all_ranks()
    # Everything that is on the disk, and not only what may still be drawn.
    stores = [store, *store.copies()]
    found = [found_in(each, predicate) for each in stores]
    wait_for_all_ranks()  # they have read what is about to be erased
    for each, keys in zip(stores, found, strict=True):
        each.erase(keys)
    return found


def remove_from_folder(folder: str | Path, predicate: Callable[[Stored], bool]) -> int:
    """Removes samples for good from the folder of a buffer on disk, without a run.

    No run that resumes from a checkpoint finds them (:meth:`~lightning_cl.buffers.ReplayBuffer.remove`). Samples that
    lie in the folder of an earlier run are removed there, too.

    Args:
        folder: with the buffer's segments, as ``<run>/buffers/Replay``.
        predicate: gets a :class:`Stored`, returns True if it is to be removed.

    Returns:
        how many were removed.

    Raises:
        FileNotFoundError: if there is no buffer in the folder.
    """
    store = DiskStore(Path(folder))
    store.attach()
    keys = found_in(store, predicate)
    store.erase(keys)
    return len(keys)


def read_folder(folder: str | Path) -> Iterator[Stored]:
    """The samples of a buffer's folder, also those that were let go and still lie there.

    Raises:
        FileNotFoundError: if there is no buffer in the folder.
    """
    store = DiskStore(Path(folder))
    store.attach()
    return (stored for _, stored in stored_in(store))
