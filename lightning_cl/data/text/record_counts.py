"""Counts of the records of one source that were left out, dropped or cut off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_cl.arguments import check_choice

_KEPT = 5  # messages kept for a warning


@dataclass
class Tally:
    """Counts what was left out between records and samples, and decides if a bad record is an error.

    Args:
        on_bad_record: ``"error"`` raises at the first bad record; ``"skip"`` leaves it out and counts it.

    Attributes:
        bad: malformed records that were skipped.
        dropped: records without any text, and samples without a token to predict.
        too_long: those of the dropped samples whose first token to predict comes after ``max_length``.
        truncated: samples that lost tokens to ``max_length``.
        reasons: the messages of the first few bad records.
        left_out: parts of records that are in no sample, with the number of records that had them. These are fields
            that are not used, and parts that a chat template does not write.
        records: records of the source before some were held out for validation.
        held_out: records that were held out for validation.
        untemplated: prompts with completions that were written without the tokenizer's chat template.

    Raises:
        ValueError: if `on_bad_record` is something else.
    """

    on_bad_record: str = "error"
    bad: int = 0
    dropped: int = 0
    too_long: int = 0
    truncated: int = 0
    reasons: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    untemplated: int = 0
    records: int = 0
    held_out: int = 0

    def __post_init__(self) -> None:
        check_choice("on_bad_record", self.on_bad_record, ("error", "skip"), '"error" or "skip"')

    def refuse(self, reason: str) -> None:
        """Counts a bad record, or raises.

        Args:
            reason: the position of the record, and its fault.

        Raises:
            ValueError: with the reason, if bad records are errors.
        """
        if self.on_bad_record == "error":
            raise ValueError(reason)
        self.bad += 1
        if len(self.reasons) < _KEPT:
            self.reasons.append(reason)

    def leave_out(self, what: Iterable[str]) -> None:
        """Counts the parts of one record that are left out."""
        for name in sorted(set(what)):
            self.left_out[name] = self.left_out.get(name, 0) + 1
