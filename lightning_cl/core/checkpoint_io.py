"""Checkpoints that are never half written, and the search for the last whole one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_cl.checksum import find_damage, save_checked
from lightning_cl.files import locked_for_writing, naming_file, remove_abandoned, sync


def run_folder(trainer: L.Trainer) -> Path:
    """Returns a run's folder: the logger's, or ``default_root_dir``; call it on all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file, syncs and renames it, so that a kill never leaves half a checkpoint.

    The temporary file is next to the target. Lightning's own writer also uses one, but in another folder and without a
    sync, and it needs RAM for the whole checkpoint once more.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with naming_file(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with locked_for_writing(temporary) as file:
                    save_checked(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, target)
            finally:
                with suppress(OSError):
                    temporary.unlink()
            sync(target.parent)  # the new name itself


def remove_killed_writes(checkpoint: Path) -> None:
    """Removes files that killed writers left in a checkpoint's run; each is as large as a checkpoint.

    Args:
        checkpoint: a checkpoint of the run, in its folder, in ``tasks`` or below ``checkpoints``.
    """
    above = checkpoint.absolute().parents
    folder = next((path for path in above[:3] if (path / "tasks").is_dir()), above[0])
    freed = remove_abandoned(folder, ".*.ckpt.*.tmp")
    if freed:
        rank_zero_info(f"{folder}: {freed:,} bytes that killed writes had left are removed")


def resolve_checkpoint(
    ckpt_path: str | Path | None, folder: str | Path, methods: set[str] | None = None
) -> Path | None:
    """Returns a checkpoint's path; ``"last"`` is the newest below `folder` that a sequence can resume from.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged.
    """
    if ckpt_path is None:
        return None
    if str(ckpt_path) == "last":
        return find_last_checkpoint(folder, methods)
    if Path(ckpt_path).is_file():  # otherwise a folder of shards, or a word that Lightning knows
        check_checkpoint(ckpt_path)
    return Path(ckpt_path)


def check_checkpoint(path: str | Path) -> None:
    """Compares the checksums of a checkpoint with its content.

    Raises:
        ValueError: if the file is damaged; the message names it.
    """
    damage = find_damage(Path(path))
    if damage is not None:
        raise ValueError(f"ckpt_path={str(path)!r}: the file is {damage}; resume from an earlier checkpoint")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint with memory-mapped tensors; :func:`resolve_checkpoint` has compared its checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={str(path)!r}: no such file")
    try:
        result: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return result
    except Exception as error:
        raise ValueError(f"ckpt_path={str(path)!r}: cannot be read as a checkpoint ({error})") from error


def is_whole(path: Path) -> bool:
    """Returns True if a checkpoint is undamaged; reads all of it."""
    return find_damage(path) is None


def find_last_checkpoint(folder: str | Path, methods: set[str] | None = None) -> Path:
    """Finds the newest whole checkpoint below a folder that a sequence wrote with all its state.

    Args:
        folder: the folder to search.
        methods: the callbacks' names of the run to resume; checkpoints with others are skipped. None: any.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = sorted(Path(folder).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        if not is_whole(path):
            rank_zero_warn(f"{path} is damaged or cut off; an earlier checkpoint is used")
            continue
        state = read_checkpoint(path).get("lightning_cl")
        if state is None:
            rank_zero_warn(f"{path} holds weights only, or is not of a sequence; an earlier checkpoint is used")
        elif methods is not None and set(state["methods"]) != methods:
            rank_zero_warn(f"{path} is of a run with {sorted(state['methods'])}; an earlier checkpoint is used")
        else:
            return path
    raise FileNotFoundError(f"ckpt_path='last': there is no checkpoint to resume from below {Path(folder).absolute()}")
