"""An exam: a task's exercises answered by a module, and each answer's scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.deployment import deployed
from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.data.exercises import Exercise
from lightning_cl.data.module import TaskDataModule
from lightning_cl.data.text.answer_ends import ends_of_answers
from lightning_cl.data.text.tokenizer import pad_token_id
from lightning_cl.metrics.text import BY_LIKELIHOOD, answer_score, choice_score
from lightning_cl.passes.choices import sums_of_batch
from lightning_cl.passes.generation import continue_tokens, generator_of
from lightning_cl.passes.heads import SplitHead, evaluated
from lightning_cl.passes.passes import progress
from lightning_cl.passes.task_samples import groups_of_like_length
from lightning_cl.tasks import Task

_MORE = 8  # tokens that an answer may have more than the longest reference
_MOST_ROWS = 64  # exercises that are answered together


@dataclass
class Exam:
    """The answers to a task's exercises.

    Args:
        answers: of each exercise, what was written; empty where only choices were compared.
        scores: of each metric, the score of each exercise.
        generated_tokens: how many tokens were written.
        scored_tokens: how many tokens of choices were scored.
        cut_off: how many answers had no end after the most tokens that they may have; their rest was never written.
        seconds: the time that it took.
    """

    answers: list[str]
    scores: dict[str, list[float]]
    generated_tokens: int
    scored_tokens: int
    cut_off: int
    seconds: float


def new_tokens(task: Task, exercises: Sequence[Exercise]) -> int:
    """The most tokens of an answer: ``Task.max_new_tokens``, or those of the longest reference, and 8."""
    return task.max_new_tokens or max((one.longest for one in exercises), default=0) + _MORE


def answering_model(trainer: L.Trainer, pl_module: L.LightningModule, task: Task) -> Any:
    """The model in a module that writes answers.

    Raises:
        MisconfigurationException: if there is none, or its parameters are sharded.
    """
    refuse_sharded(trainer, f"task {task.name!r}, metrics={task.metrics}: no answers can be written with")
    model = generator_of(pl_module)
    if model is None:
        raise MisconfigurationException(
            f"task {task.name!r}, metrics={task.metrics}: nothing in {type(pl_module).__name__} can write answers: the"
            " module needs a transformers causal language model (with `generate`) as an attribute, as CausalLM has it"
        )
    return model


def hold_exam(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    data: TaskDataModule,
    task: Task,
    exercises: Sequence[Exercise],
    max_new_tokens: int,
) -> Exam:
    """Lets a module answer exercises as its user would get the answers, and scores each answer.

    Answers are written greedily, in batches of prompts of similar length, until an end token. The processes of a run
    share the exercises; all of them return everything.

    Args:
        trainer: the Trainer, between its loops.
        pl_module: its module, with a ``transformers`` model in it.
        data: the tasks, set up.
        task: the task that the exercises are of, with metrics.
        exercises: the exercises; at least one.
        max_new_tokens: the most tokens of an answer.

    Raises:
        MisconfigurationException: see :func:`answering_model`.
    """
    start, model = time.monotonic(), answering_model(trainer, pl_module, task)
    metrics = task.metrics or []
    own = list(range(trainer.global_rank, len(exercises), trainer.world_size))
    device = next(model.parameters()).device
    pl_module.to(trainer.strategy.root_device)
    rows = task.batch_size or data.batch_size
    answers: dict[int, str] = {}
    likelihoods: dict[int, list[float]] = {}
    written = scored = cut_off = 0
    try:
        with deployed(trainer, pl_module, task.name), trainer.precision_plugin.forward_context():
            if any(metric not in BY_LIKELIHOOD for metric in metrics):
                groups = _groups([len(exercises[i].prompt) for i in own], rows, data.max_length)
                for group in progress(trainer, groups, f"Answers: {task.name}", len(groups)):
                    chosen = [own[position] for position in group]
                    prompts = [exercises[i].prompt for i in chosen]
                    ids, most = _written(model, data.tokenizer, prompts, max_new_tokens)
                    written += sum(map(len, ids))
                    cut_off += sum(len(one) == most for one in ids)
                    texts = [data.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
                    answers |= dict(zip(chosen, texts, strict=True))
            if any(metric in BY_LIKELIHOOD for metric in metrics):
                likelihoods = _choose(trainer, model, exercises, own, rows, data, task)
                scored = sum(len(row) - at for i in own for row, at in _choices(exercises[i]))
    finally:
        pl_module.to(device)
    scores = {i: _scores(exercises[i], metrics, answers.get(i, ""), likelihoods.get(i, [])) for i in own}
    parts = from_all_ranks((answers, scores, written, scored, cut_off))
    everything = {i: (part[0].get(i, ""), part[1][i]) for part in parts for i in part[1]}
    ordered = [everything[i] for i in range(len(exercises))]
    return Exam(
        [answer for answer, _ in ordered],
        {metric: [each[metric] for _, each in ordered] for metric in metrics},
        sum(part[2] for part in parts),
        sum(part[3] for part in parts),
        sum(part[4] for part in parts),
        time.monotonic() - start,
    )


def _scores(exercise: Exercise, metrics: Sequence[str], answer: str, likelihoods: Sequence[float]) -> dict[str, float]:
    references, choices = exercise.references, exercise.choices
    return {
        metric: choice_score(metric, likelihoods, choices, exercise.right)
        if metric in BY_LIKELIHOOD
        else answer_score(metric, answer, references, exercise.text, choices)
        for metric in metrics
    }


def _written(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int) -> tuple[list[list[int]], int]:
    """The new tokens of each prompt, and how many it could have: as many as the model has positions for."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        most = max(1, min(most, positions - max(map(len, prompts))))
    return continue_tokens(model, prompts, most, pad_token_id(tokenizer), ends_of_answers(tokenizer)), most


def _choices(exercise: Exercise) -> list[tuple[list[int], int]]:
    return list(zip(exercise.rows, exercise.starts, strict=True))


def _groups(lengths: Sequence[int], rows: int, longest: int) -> list[list[int]]:
    return list(groups_of_like_length(lengths, rows, longest, _MOST_ROWS))


def _choose(
    trainer: L.Trainer,
    model: Any,
    exercises: Sequence[Exercise],
    own: Sequence[int],
    rows: int,
    data: TaskDataModule,
    task: Task,
) -> dict[int, list[float]]:
    """The log-likelihood of each choice of these exercises."""
    asked = [(i, row, at) for i in own for row, at in _choices(exercises[i])]
    found: dict[int, list[float]] = {i: [] for i in own}
    values = [0.0] * len(asked)
    head = SplitHead(model, quiet=True)
    groups = _groups([len(row) for _, row, _ in asked], rows, data.max_length)
    for group in progress(trainer, groups, f"Choices: {task.name}", len(groups)):
        chosen = [(row[:at], row[at:]) for _, row, at in (asked[position] for position in group)]
        with evaluated(model):
            sums = sums_of_batch(model, head, chosen)
        for position, value in zip(group, sums, strict=True):
            values[position] = value
    for (i, _, _), value in zip(asked, values, strict=True):
        found[i].append(value)
    return found
