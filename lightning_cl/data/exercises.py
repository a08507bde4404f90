"""Exercises: prompts with accepted answers and choices, for the metrics of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch

from lightning_cl.data.module import TaskDataModule
from lightning_cl.data.text.answer_ends import ends_of_answers
from lightning_cl.data.text.formats import Chat, Completion, Document, Instruction, choices_in
from lightning_cl.data.text.prompts import answer_in
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.records import is_text_source, read_documents
from lightning_cl.data.text.sources import is_stream
from lightning_cl.data.text.splitting import split_documents
from lightning_cl.data.text.text_tasks import TextSettings, split_sources
from lightning_cl.data.text.tokens import encode
from lightning_cl.tasks import Task

Split = Literal["val", "test"]
_UNCUT = 1 << 30


@dataclass(frozen=True)
class Exercise:
    """A prompt in the form that the model was trained with, and what would be right.

    Args:
        prompt: its token ids.
        text: its text, without a chat template.
        references: the accepted answers; at least one.
        choices: the possible answers; empty if any text may be an answer.
        right: the index of the right choice; -1 without choices.
        rows: for each choice, token ids of the whole sample up to the end of the choice.
        starts: for each choice, the position in its row at which the choice starts.
        longest: tokens of the longest reference.
    """

    prompt: list[int]
    text: str
    references: list[str]
    choices: list[str]
    right: int
    rows: list[list[int]]
    starts: list[int]
    longest: int


def exercises_of(data: TaskDataModule, task: Task, split: Split = "val", most: int | None = None) -> list[Exercise]:
    """The exercises of a task: the same in every run, in the same order.

    They come from the task's validation data, or from what was held out of its training data, or from its test data.
    The last answer of a sample is asked for, and all before it is the prompt; a call of a tool is not asked for. If a
    prompt does not fit into
    ``max_length``, its beginning is cut off.

    Args:
        data: the tasks, set up.
        task: one of its tasks, whose data is text.
        split: ``val`` or ``test``.
        most: the most exercises, drawn with the seed of `data`; None: all.

    Raises:
        ValueError: if there is no such data, or a record's choices cannot be used.
    """
    documents = _documents(data, task, split)
    if most is not None and len(documents) > most:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(data.seed)).tolist()
        documents = [documents[i] for i in sorted(order[:most])]
    by_choice = {"acc", "acc_norm"} & set(task.metrics or ())
    maker = _Maker(data, task, data.text_settings(task), frozenset(ends_of_answers(data.tokenizer)))
    made = [one for document in documents for one in maker.exercises(document)]
    if by_choice and any(not one.choices for one in made):
        raise ValueError(
            f"task {task.name!r}, metrics={task.metrics}: {sorted(by_choice)[0]} needs the possible answers: give"
            ' Task(choices=[…]), or records with "choices": […]'
        )
    return made[:most]


def fingerprint_of(exercises: Sequence[Exercise]) -> str:
    """A hash of the exercises, as they are asked and scored."""
    content = [[one.prompt, one.references, one.choices, one.right, one.rows] for one in exercises]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _documents(data: TaskDataModule, task: Task, split: Split) -> list[Document]:
    """The documents of a split, as training splits them."""
    sources, settings = split_sources(task), data.text_settings(task)
    tally = Tally(settings.on_bad_record)

    def read(role: str) -> list[Document]:
        if not is_text_source(sources[role]) or is_stream(sources[role]):
            what = "a stream" if is_stream(sources[role]) else "no text"
            raise ValueError(
                f"task {task.name!r}, metrics={task.metrics}: its {role} data is {what}; {_TO_GIVE[split]}"
            )
        return list(read_documents(sources[role], task.name, role, tally, settings.path_header, settings.layout))

    if split == "test" and sources["test"] is None:
        raise ValueError(f"task {task.name!r}, metrics={task.metrics}: there is no test data in it; {_TO_GIVE[split]}")
    if sources[split] is not None:
        return read(split)
    training = read("train")
    held_out = split_documents(training, settings.val_fraction, settings.seed)[1]
    return training if data.validated_on_training_data(task) else held_out


_TO_GIVE = {"val": "give Task(val=…) with records", "test": "give Task(test=…), or measure on validation data"}


@dataclass(frozen=True)
class _Maker:
    """Makes the exercises of one task from its documents."""

    data: TaskDataModule
    task: Task
    settings: TextSettings
    ends: frozenset[int]

    def exercises(self, document: Document) -> Iterator[Exercise]:
        """The exercise of a document; for plain text, one for each block of tokens."""
        answer = _answer_of(document)
        if answer is None:
            yield from self._continuations(document)
            return
        if not answer.strip():
            return  # a call of a tool
        references = list(dict.fromkeys([answer, *_listed(document, "references")]))
        choices = _listed(document, "choices") or list(self.task.choices or [])
        samples = [self._sample(document, one) for one in references]
        if samples[0] is None:
            return  # the chat template writes no answer
        prompt, longest = samples[0][0], max(len(sample[1]) for sample in samples if sample is not None)
        right, rows, starts = -1, [], []
        if choices:
            right = self._right(document, answer, choices)
            for choice in choices:
                # With the same white space around it as the answer has.
                own = answer.replace(answer.strip(), choice.strip(), 1)
                before, after = self._sample(document, own) or ([], [])
                kept = before[-max(1, self.data.max_length - len(after)) :]
                rows.append(kept + after)
                starts.append(len(kept))
        cut = prompt[-(self.data.max_length - 1) :]
        yield Exercise(cut, _asked(document), references, choices, right, rows, starts, longest)

    def _continuations(self, document: Document) -> Iterator[Exercise]:
        decode = self.data.tokenizer.decode
        for ids, mask in self._encoded(document, self.data.max_length):
            start, end = answer_in(mask)
            text, rest = (decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:end]))
            yield Exercise(ids[:start], text, [rest], [], -1, [], [], end - start)

    def _right(self, document: Document, answer: str, choices: list[str]) -> int:
        fitting = [i for i, choice in enumerate(choices) if choice.strip() == answer.strip()]
        if len(fitting) != 1:
            where = getattr(document, "where", "") or f"task {self.task.name!r}"
            which = "more than one" if fitting else "none"
            raise ValueError(f"{where}: the answer {answer!r} is {which} of its choices {choices}")
        return fitting[0]

    def _sample(self, document: Document, answer: str) -> tuple[list[int], list[int]] | None:
        """The tokens of the prompt, and those of an answer without what ends it."""
        found = next(self._encoded(_with_answer(document, answer), _UNCUT), None)
        if found is None:
            return None
        ids, mask = found
        start, end = answer_in(mask)
        return ids[:start], list(takewhile(lambda token: token not in self.ends, ids[start:end]))

    def _encoded(self, document: Document, length: int) -> Iterator[tuple[list[int], list[bool]]]:
        template, tally = self.settings.template, Tally("skip")
        for ids, mask in encode([document], self.data.tokenizer, length, tally, template, last_turn=True):
            yield ids.tolist(), mask.tolist()


def _asked(document: Document) -> str:
    if isinstance(document, Completion):
        return document.asked
    if isinstance(document, Instruction):
        return f"{document.instruction}\n\n{document.input}" if document.input else document.instruction
    if isinstance(document, Chat):
        return next((m.get("content", "") for m in reversed(document.messages[: _last(document)])), "")
    return ""


def _answer_of(document: Document) -> str | None:
    if isinstance(document, Completion):
        return document.completion
    if isinstance(document, Instruction):
        return document.output
    return (document.messages[_last(document)].get("content") or "") if isinstance(document, Chat) else None


def _with_answer(document: Document, answer: str) -> Document:
    if isinstance(document, Completion):
        return replace(document, completion=answer)
    if isinstance(document, Instruction):
        return replace(document, output=answer)
    assert isinstance(document, Chat)
    last = _last(document)
    turns = (*document.messages[:last], {**document.messages[last], "content": answer})
    return replace(document, messages=turns)  # what follows the last answer is not asked for


def _last(chat: Chat) -> int:
    return max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")


def _listed(document: Document, key: str) -> list[str]:
    """The texts under `choices` or `references` of a record."""
    value: Any = getattr(document, "extras", {}).get(key)
    if value is None:
        return []
    if key == "references" and isinstance(value, str) and not value.lstrip().startswith("["):
        return [value]
    texts = choices_in(value)
    if texts is None or (key == "choices" and len(set(texts)) < max(2, len(texts))):
        needed = "at least two different texts" if key == "choices" else "texts"
        raise ValueError(f"{getattr(document, 'where', '')}: {key!r}: expected a list of {needed}, got {value!r}")
    return texts
