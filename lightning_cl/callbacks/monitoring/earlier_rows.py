"""Search for the weights after earlier tasks, from which rows of the matrix can be measured again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_cl.core.checkpoint_io import read_checkpoint


def earlier_boundary(
    checkpoint: Path, row: int, tasks: Sequence[str], columns: Sequence[str], rows: Tensor
) -> str | None:
    """Finds the checkpoint for a row of the matrix, next to the checkpoint that a run resumes from.

    Its own matrix must be the beginning of this matrix, because a folder may contain the files of several runs.

    Args:
        checkpoint: the checkpoint that the run resumes from, ``tasks/<index>-<name>.ckpt``.
        row: the row's number of trained tasks.
        tasks: the names of the trained tasks, in order.
        columns: the names of the matrix's columns.
        rows: the matrix before rows are measured again, ``[at least row + 1, columns]``.

    Returns:
        the path; None if there is no such file.
    """
    for path in sorted(checkpoint.parent.glob(f"{row - 1}-*.ckpt")):
        try:
            state = read_checkpoint(path)["lightning_cl"]
            theirs = [entry["state"] for entry in state["methods"].values() if "matrix" in entry["state"]]
            same = state["index"] == row and not state["started"] and list(state["tasks"])[:row] == list(tasks[:row])
            if same and any(_begins(kept["matrix"], kept["tasks"], columns, rows[: row + 1]) for kept in theirs):
                return str(path)
        except (KeyError, ValueError, OSError):
            continue  # not a checkpoint of a sequence, or damaged
    return None


def _begins(matrix: Tensor, names: Sequence[str], columns: Sequence[str], rows: Tensor) -> bool:
    """Compares the entries of one matrix with the first rows of another, column by column."""
    common = [name for name in names if name in columns]
    if len(matrix) != len(rows) or not common:
        return False
    theirs = matrix[:, [list(names).index(name) for name in common]]
    ours = rows[:, [list(columns).index(name) for name in common]]
    return torch.equal(theirs.nan_to_num(nan=torch.pi), ours.nan_to_num(nan=torch.pi))
