"""The picture and the answers of a run for loggers that can show them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_cl.evaluation.figure import matrix_figure
from lightning_cl.evaluation.sentences import row_names


def log_evidence(loggers: Iterable[Any], report: dict[str, Any], step: int) -> None:
    """Gives TensorBoard the matrix as a picture, the sentences, and the answers to prompts as a table.

    Args:
        loggers: of the Trainer; others than TensorBoard get nothing.
        report: of :func:`~lightning_cl.evaluation.build_report`.
        step: the number of optimizer steps.
    """
    boards = [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
    if not boards:
        return
    canvas = matrix_figure(report).canvas
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    answers = _answers(report)
    for board in boards:
        board.add_image("continual/matrix", picture, step, dataformats="HWC")
        board.add_text("continual/report", "\n\n".join(report["sentences"]), step)
        if answers:
            board.add_text("continual/answers", answers, step)


def _answers(report: dict[str, Any]) -> str:
    """For each prompt a Markdown table: after which task, and what the model answered."""
    names, tables = row_names(report), []
    for method in report["methods"].values():
        for index, prompt in enumerate(method.get("prompts", [])):
            given = sorted(method["answers"].items(), key=lambda item: int(item[0]))
            rows = [f"| {_cell(names[int(trained)])} | {_cell(answers[index])} |" for trained, answers in given]
            tables.append("\n".join([f"| after | {_cell(prompt)} |", "|---|---|", *rows]))
    return "\n\n".join(tables)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "(blank)"
