"""Counts of a task's records that did not become samples, for warnings, plan and report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.tally import Tally

_NAMES = {"train": "training", "val": "validation", "test": "test"}


def left_out(texts: Mapping[str, Any]) -> dict[str, int]:
    """Returns the counts of dropped and cut-off samples and of malformed records, as ``train_dropped`` and so on.

    Args:
        texts: a task's data by role: token data sets, and streams (as far as they were read in their last pass).
    """
    counts: dict[str, int] = {}
    for role, data in texts.items():
        tally: Tally = data.tally
        counts |= {
            f"{role}_dropped": tally.dropped,
            f"{role}_cut_off": tally.truncated,
            f"{role}_malformed": tally.bad,
        }
        counts |= {f"{role}_without {what}": count for what, count in sorted(tally.left_out.items())}
    return counts


def warn_left_out(task: str, texts: Mapping[str, Any], max_length: int) -> None:
    """Says in one warning what of a task's samples was dropped and cut off, and what to do.

    Args:
        task: its name.
        texts: its data by role; streams are not read yet.
        max_length: the most tokens in a sample.
    """
    whole = {role: data for role, data in texts.items() if isinstance(data, TokenDataset)}
    for role, data in whole.items():
        for what, count in sorted(data.tally.left_out.items()):
            rank_zero_warn(f"task {task!r}, {_NAMES[role]}: not used: {what}: {count:,}")
    said = [f"{_NAMES[role]}: {words}" for role, data in whole.items() if (words := _words(data))]
    if not said:
        return
    longer = any(data.tally.truncated or data.tally.too_long for data in whole.values())
    advice = f"; a larger max_length than {max_length} keeps more" if longer else ""
    rank_zero_warn(f"task {task!r}, {'; '.join(said)}{advice}")


def warn_odd_split(task: str, train: TokenDataset, fraction: float, batch_size: int) -> None:
    """Says that a validation split left next to nothing to train on, or is far from what was asked for.

    Args:
        task: its name.
        train: what is left to train on.
        fraction: the share of the records that was asked for.
        batch_size: samples in a batch.
    """
    tally = train.tally
    words = f"task {task!r}: {tally.held_out:,} of {tally.records:,} records are held out for validation"
    wanted = fraction * tally.records
    if len(train) < batch_size:
        rank_zero_warn(f"{words}; {len(train):,} samples are left to train on, less than a batch of {batch_size}")
    elif abs(tally.held_out - wanted) > 1:
        said = (
            f"{words}, where val_fraction={fraction:g} of them is {wanted:,.1f}: their lengths differ, and characters"
            " count as well as records; give Task(val=…) to choose"
        )
        (rank_zero_warn if tally.held_out > 3 * wanted + 3 else rank_zero_info)(said)


def warn_validated_on_training_data(task: str, val: TokenDataset, max_length: int) -> None:
    """Says that nothing is left of what was held out, and why.

    Args:
        task: its name.
        val: what was held out, empty.
        max_length: the most tokens in a sample.
    """
    if val.tally.dropped:
        why = f"all {val.tally.dropped} samples that were held out were dropped"
        why += f" (nothing to learn within max_length={max_length})" if val.tally.too_long else ""
    else:
        why = "it is too little to hold something out"
    rank_zero_warn(f"task {task!r}: validation uses the training data, since {why}: give Task(val=…)")


def _words(data: TokenDataset) -> str:
    tally = data.tally
    parts = {
        "cut off": tally.truncated,
        "dropped, since what is to be learnt comes after the cut": tally.too_long,
        "dropped, since there is nothing to learn": tally.dropped - tally.too_long,
    }
    said = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    return f"of {len(data) + tally.dropped:,} samples {said}" if said else ""
