"""Answers to the same prompts after every task, which show forgetting as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.callbacks.monitoring.boundary_questions import BoundaryQuestions
from lightning_cl.core.deployment import deployed
from lightning_cl.data.module import TaskDataModule
from lightning_cl.passes.generation import answers, prompt_tokens


class PromptSamples(BoundaryQuestions):
    """Lets the model continue fixed prompts, greedily, before training and after every task.

    Works with any module that contains a ``transformers`` model, under :func:`~lightning_cl.fit_tasks`. The report
    shows the answers next to each other.

    Compute: ``len(prompts) · max_new_tokens`` generated tokens per task.

    Args:
        prompts: texts to continue.
        max_new_tokens: the most tokens of an answer.
        chat: True makes each prompt a user's message and the answer the assistant's, in the tokenizer's chat template.

    Attributes:
        answers: number of trained tasks (0: before training) to the answers.

    Raises:
        ValueError: if there are no prompts or no tokens to generate.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import PromptSamples
        >>> probe = PromptSamples(["The capital of France is"])
        >>> trainer = L.Trainer(callbacks=[probe], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> len(probe.prompts)
        1
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 32, chat: bool = False) -> None:
        super().__init__()
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise ValueError(f"prompts={prompts!r}: expected a list of texts")
        check_integer("max_new_tokens", max_new_tokens, 1)
        self.prompts, self.max_new_tokens, self.chat = list(prompts), max_new_tokens, chat
        self.answers: dict[int, list[str]] = {}

    @override
    def on_sequence_start(self) -> None:
        self.answers = {}

    @override
    def known(self) -> Mapping[int, list[str]]:
        return self.answers

    @override
    def ask(self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, trained: int) -> None:
        model = self.model_of(pl_module, data, "can generate text; it needs a transformers model")
        length = 1 if trainer.fast_dev_run else self.max_new_tokens  # type: ignore[attr-defined]
        device = next(model.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        prompts = [prompt_tokens(data.tokenizer, prompt, self.chat) for prompt in self.prompts]
        with deployed(trainer, pl_module):
            self.answers[trained] = answers(model, data.tokenizer, prompts, length)
        pl_module.to(device)

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"answers": {trained: list(given) for trained, given in self.answers.items()}}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.answers = {int(trained): list(given) for trained, given in state["answers"].items()}

    @override
    def report(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "answers": {str(k): v for k, v in self.answers.items()}}
