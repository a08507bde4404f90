"""The memory of a run as files for other programs: the samples in a buffer, and no others.

A run's own buffer folder also holds records that the buffer has let go; the checkpoint says which ones it still has.
:func:`save_memory` writes those alone, in the order of the buffer, as one segment in the layout of
:mod:`lightning_cl.buffers.disk.layout`. A reader needs ``<folder>/0000`` and numpy. ``<folder>/memory.json`` names the
tasks in the order of the numbers in the field ``task``, with their samples and tokens.

The files hold the training texts themselves, as token ids: whoever gets them can read what the run was trained on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_cl.buffers import DiskStore, MemoryStore, ReplayBuffer, Stored
from lightning_cl.buffers.disk.encoding import encode
from lightning_cl.buffers.disk.layout import DamagedFileError
from lightning_cl.buffers.disk.segment import RemovedError, Segment
from lightning_cl.buffers.store import digest
from lightning_cl.checksum import find_damage
from lightning_cl.core.checkpoint_io import read_checkpoint
from lightning_cl.core.coordinator import CHECKPOINT_KEY
from lightning_cl.export.folders import replace_folder

INDEX = "memory.json"
"""The file of a saved memory that says what is in it."""

SEGMENT = "0000"
"""The folder of a saved memory that has the records."""

_FORMAT = "lightning_cl memory 1"


def save_memory(
    checkpoint: str | Path, folder: str | Path, callback: str | None = None, files: str | Path | None = None
) -> Path:
    """Writes the samples that a run's buffer holds at a checkpoint into a folder of their own.

    Everything is read back and compared before the folder gets its name. The run's files stay as they are. Tensors that
    a method keeps next to a sample (logits of DER++) are left out. Memory: one sample at a time for a buffer on disk.

    Args:
        checkpoint: a checkpoint of a run, as ``<run>/tasks/0-<task>.ckpt``.
        folder: the new folder; an earlier saved memory there is replaced.
        callback: the callback whose buffer it is, by its name in the run (``Replay``); not needed if there is only one.
        files: the folder of the buffer's files, if they are neither where they were nor in the checkpoint's run.

    Returns:
        the folder.

    Raises:
        FileNotFoundError: if the checkpoint, or a file of the buffer, is missing.
        ValueError: if the checkpoint has no such buffer, or the buffer has no samples; or if a file is damaged.
        RuntimeError: if what was written is not what the buffer holds.
    """
    checkpoint = Path(checkpoint)
    state = _read(checkpoint)
    states = _buffers(state)
    name = _choose(states, callback, checkpoint)
    near = [above / "buffers" / name for above in list(checkpoint.absolute().parents)[:4]]
    return save_buffer(
        _buffer(states[name], [*([] if files is None else [Path(files)]), *near]),
        folder,
        state.get("fingerprint"),
        callback=name,
        after=state["tasks"][: state["index"]],
    )


def list_memories(checkpoint: str | Path) -> list[str]:
    """Returns the names of the callbacks that have a buffer in a checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if it is no checkpoint of a run.
    """
    return list(_buffers(_read(Path(checkpoint))))


def _buffers(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: method["state"]["buffer"]
        for name, method in state["methods"].items()
        if isinstance(method["state"].get("buffer"), dict) and "store" in method["state"]["buffer"]
    }


def save_buffer(buffer: ReplayBuffer, folder: str | Path, tokenizer: str | None = None, **about: Any) -> Path:
    """Writes the samples of a buffer that is in use, as :func:`save_memory` does from a checkpoint.

    Args:
        buffer: the buffer.
        folder: the new folder; an earlier saved memory there is replaced.
        tokenizer: fingerprint of the tokenizer, if it is known.
        about: more entries of ``memory.json``.

    Returns:
        the folder.

    Raises:
        ValueError: if the buffer has no samples.
        RuntimeError: if what was written is not what the buffer holds.
    """
    if len(buffer) == 0:
        raise ValueError(f"folder={str(folder)!r}: the buffer holds no samples yet; give a checkpoint after a task")

    def write(temporary: Path) -> None:
        store = DiskStore(temporary, {} if tokenizer is None else {"tokenizer": tokenizer})
        counts: dict[str, Counter[str]] = {}
        for number in buffer.numbers:
            info = buffer.info(number)
            store.append(buffer.get(number), info.task, info.position, info.label)
            counts.setdefault(info.task, Counter()).update(
                samples=1, tokens=info.length, loss_tokens=max(0, info.loss_tokens)
            )
        store.commit()
        index = {
            "format": _FORMAT,
            "samples": len(buffer),
            "tasks": [{"name": task, **count} for task, count in counts.items()],
            "policy": buffer.policy_name,
            "seen": dict(buffer.seen_of),
            "tokenizer": tokenizer,
            **about,
        }
        (temporary / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _compare(buffer, temporary)

    return replace_folder(Path(folder), write, INDEX)


def read_index(folder: str | Path) -> dict[str, Any]:
    """Returns what ``memory.json`` says of a saved memory.

    Raises:
        FileNotFoundError: if there is no saved memory in the folder.
        DamagedFileError: if the file cannot be read.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"folder={str(folder)!r}: no {INDEX}; expected a folder that save_memory wrote")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']!r}, expected {_FORMAT!r}")
        return index
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path}: damaged ({error})") from error


def read_memory(folder: str | Path) -> Iterator[Stored]:
    """Reads the samples of a saved memory, in order; each is compared with its checksum.

    Samples that :func:`~lightning_cl.buffers.remove_from_folder` has erased since are left out.

    Args:
        folder: of :func:`save_memory`.

    Raises:
        FileNotFoundError: if there is no saved memory in the folder.
        DamagedFileError: if a record is damaged or missing; the file is named.
    """
    index = read_index(folder)
    segment = Segment(Path(folder) / SEGMENT)
    count = segment.number_of_records()
    if count != index["samples"]:
        raise DamagedFileError(f"{segment.path('records')}: it has {count} records, not {index['samples']}")
    names = [task["name"] for task in index["tasks"]]
    store = DiskStore(Path(folder), writes=False)
    store.attach()

    def stored() -> Iterator[Stored]:
        for number in range(count):
            record = segment.record(number)
            task = segment.task_of(record)
            if names[record.task : record.task + 1] != [task]:
                raise DamagedFileError(f"{Path(folder) / INDEX}: does not name task {record.task}, {task!r}")
            try:
                yield Stored(store.get(number), task, record.position, record.label)
            except RemovedError:
                continue

    return stored()


# ---------------------------------------------------------------------- of a checkpoint


def _read(checkpoint: Path) -> dict[str, Any]:
    if checkpoint.is_file():
        damage = find_damage(checkpoint)
        if damage is not None:
            raise ValueError(f"checkpoint={str(checkpoint)!r}: the file is {damage}; give an earlier checkpoint")
    state: dict[str, Any] | None = read_checkpoint(checkpoint).get(CHECKPOINT_KEY)
    if state is None:
        raise ValueError(
            f"checkpoint={str(checkpoint)!r}: holds weights only; expected one of a sequence, as <run>/tasks/0-a.ckpt"
        )
    return state


def _choose(states: dict[str, Any], callback: str | None, checkpoint: Path) -> str:
    if not states:
        raise ValueError(f"checkpoint={str(checkpoint)!r}: no callback of its run has a buffer")
    if callback is None and len(states) == 1:
        return next(iter(states))
    if callback not in states:
        raise ValueError(f"callback={callback!r}: the run's buffers are of {list(states)}; give one of them")
    return callback


def _buffer(state: dict[str, Any], folders: list[Path]) -> ReplayBuffer:
    store = DiskStore(None, writes=False) if state["store"]["kind"] == "disk" else MemoryStore()
    buffer = ReplayBuffer(state["capacity"], state["policy_name"], unit=state["unit"], store=store)
    buffer.load_state_dict(state, folders)
    return buffer


def _compare(buffer: ReplayBuffer, folder: Path) -> None:
    """Reads a saved memory back.

    Raises:
        RuntimeError: if it is not the buffer's content.
    """
    try:
        for place, (number, stored) in enumerate(zip(buffer.numbers, read_memory(folder), strict=True)):
            info, sample = buffer.info(number), encode(buffer.get(number))
            if digest(sample) != digest(encode(stored.sample)) or stored[1:] != (info.task, info.position, info.label):
                raise RuntimeError(f"{folder.name}: sample {place} is not what the buffer holds")
    except ValueError as error:  # damaged, or of another number
        raise RuntimeError(f"{folder.name}: cannot be read back ({error})") from error
