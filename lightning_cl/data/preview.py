"""A preview of tasks as text: one sample of each task, with marks around what bears loss, and counts."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lightning_cl.data.text.dataset import TokenDataset
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.text_tasks import TokenStream
from lightning_cl.tasks import Task

_GREEN, _PLAIN = "\033[32m", "\033[0m"
_HEAD, _TAIL = 700, 200  # characters that are shown of a part, at its beginning and end
_PARTS = 16  # parts that are shown of a sample; parts with and without loss alternate
LEGEND = "⟦…⟧ bears loss (a sample's first token never does: nothing predicts it)"


class Described(Protocol):
    """The part of a DataModule with tasks that a preview needs."""

    tasks: list[Task]
    tokenizer: Any

    @property
    def is_set_up(self) -> bool:
        """True if the data sets are made."""

    def prepare_data(self) -> None:
        """Reads the texts."""

    def setup(self) -> None:
        """Makes the data sets."""

    def describe(self, task: Task) -> list[str]:
        """Returns lines with the counts of a task's training data, one count each."""

    def training_data(self, task: Task) -> Any:
        """Returns the data set that a task is trained on."""

    def text_data(self, task: Task) -> dict[str, Any]:
        """Returns the data sets that were made from text, by role."""


def preview(data: Described, colour: bool = False) -> str:
    """Shows each task's first training sample as text, and how many samples and records were left out.

    Args:
        data: the tasks. If they are not set up yet, their text is read and tokenised. No model is needed.
        colour: True also writes the tokens that bear loss in green, by ANSI codes.
    """
    if not data.is_set_up:
        data.prepare_data()
        data.setup()
    lines = [LEGEND]
    for index, task in enumerate(data.tasks):
        kind = " (watched: never trained on)" if task.watched else ""
        lines += ["", f"{index + 1}. {task.name}{kind}"]
        lines += [f"   {line}" for line in [*data.describe(task), *_other_roles(data, task)]]
        lines += [f"   {line}" for line in sample_lines(data, task, colour)]
    return "\n".join(lines)


def sample_lines(data: Described, task: Task, colour: bool = False) -> list[str]:
    """A task's first training sample as lines of text; for a watched task, its first validation sample.

    If the sample is not text, the lines name its type.

    Args:
        data: the tasks, set up.
        task: one of its tasks.
        colour: see :func:`preview`.
    """
    source = data.training_data(task)
    if task.watched:
        source = data.text_data(task).get("val", task.val)
    if isinstance(source, TokenStream):
        sample, tally = source.peek()
        read = [f"a stream; at its beginning {_counts(tally)}"]
        if tally.untemplated:
            read.append(
                "prompts with completions, joined without the chat template (TaskDataModule(template=True) uses it)"
            )
        return [*read, *(["there is nothing to learn in it"] if sample is None else _shown(data, sample, 1, colour))]
    if isinstance(source, TokenDataset):
        return _shown(data, source[0], len(source), colour) if len(source) else []
    sample = source[0] if hasattr(source, "__getitem__") and hasattr(source, "__len__") and len(source) else None
    if isinstance(sample, Mapping) and "input_ids" in sample and hasattr(data.tokenizer, "decode"):
        return _shown(data, sample, len(source), colour)
    return [f"no text: {type(source).__name__}"]


def wants_colour(stream: Any) -> bool:
    """Tells if a stream is a terminal whose owner has not set ``NO_COLOR``."""
    return bool(stream is not None and stream.isatty() and not os.environ.get("NO_COLOR"))


def printable(text: str, stream: Any) -> str:
    """The text with replacements for the marks and characters that a stream's encoding cannot write."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace("⟦", "[[").replace("⟧", "]]").replace("…", "...")
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text


def marked(ids: list[int], learnt: list[bool], tokenizer: Any, colour: bool = False) -> str:
    """The text of tokens, with ``⟦`` and ``⟧`` around what bears loss.

    Args:
        ids: the tokens.
        learnt: for each token, True if it bears loss.
        tokenizer: a ``transformers`` tokenizer.
        colour: see :func:`preview`.
    """
    parts = list(_parts(ids, learnt, tokenizer))
    texts = [_marked_part(text, bears, colour) for text, bears in parts[:_PARTS]]
    rest = len(parts) - _PARTS
    return "".join(texts) + (f" … and {rest} more parts" if rest > 0 else "")


def _shown(data: Described, sample: Mapping[str, Any], count: int, colour: bool) -> list[str]:
    ids = [int(token) for token in sample["input_ids"]]
    if "loss_mask" in sample:
        learnt = [bool(bears) for bears in sample["loss_mask"]]
    else:
        learnt = [int(label) != -100 for label in sample.get("labels", ids)]
    learnt = [False, *learnt[1:]]
    head = f"sample 1 of {count:,}" if count > 1 else "sample 1"
    head += f": {len(ids):,} tokens, {sum(learnt):,} of them bear loss"
    text = marked(ids, learnt, data.tokenizer, colour)
    return [head, *(f"| {line}" for line in text.split("\n"))]


def _parts(ids: list[int], learnt: list[bool], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text cut into parts with and without loss.

    The borders are found in the text of all tokens. A part that is decoded alone can lack a space, or begin inside a
    character.
    """
    borders = [i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]] + [len(ids)]
    whole, start, begun = _decoded(ids, tokenizer), 0, 0
    for border in borders:
        before = _decoded(ids[:border], tokenizer)
        before = before if border == len(ids) else before.rstrip("\ufffd")
        if not whole.startswith(before) or len(before) < start:
            yield _decoded(ids[begun:border], tokenizer), learnt[begun]
            start = min(len(before), len(whole))
        else:
            yield whole[start : len(before)], learnt[begun]
            start = len(before)
        begun = border


def _decoded(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _marked_part(text: str, bears_loss: bool, colour: bool) -> str:
    if len(text) > _HEAD + _TAIL + 50:
        text = f"{text[:_HEAD]} … {len(text) - _HEAD - _TAIL:,} characters … {text[-_TAIL:]}"
    text = "".join(_visible(character) for character in text)
    if not bears_loss:
        return text
    return f"{_GREEN}⟦{text}⟧{_PLAIN}" if colour else f"⟦{text}⟧"


def _visible(character: str) -> str:
    """A character, escaped if it could control a terminal."""
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def _other_roles(data: Described, task: Task) -> list[str]:
    """The counts of validation and test data."""
    return [
        f"{role}: {len(made):,} samples, {len(made.ids):,} tokens; {_counts(made.tally)}"
        for role, made in data.text_data(task).items()
        if role != "train" and isinstance(made, TokenDataset)
    ]


def _counts(tally: Tally) -> str:
    counts = {"dropped": tally.dropped, "cut off": tally.truncated, "malformed": tally.bad}
    said = [f"{count:,} {what}" for what, count in counts.items()]
    return ", ".join(said + [f"{count:,} without {what}" for what, count in tally.left_out.items()])
