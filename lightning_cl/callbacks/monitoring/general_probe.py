"""General abilities of a language model, by a small bundled set of questions with given answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.callbacks.monitoring.boundary_probe import BoundaryProbe, Row
from lightning_cl.data.text.chat import has_template
from lightning_cl.data.text.tokenizer import pad_token_id
from lightning_cl.evaluation.probe_items import CATEGORIES, ProbeItem, bundled_items, fingerprint_of, items_of_file
from lightning_cl.passes.choices import choice_tokens, log_likelihoods


class GeneralProbe(BoundaryProbe):
    """Measures what a model can do besides its tasks, before training and after every task, by given answers.

    It comes with 232 questions in six categories: ``knowledge`` (facts, four choices), ``language`` (a grammatical and
    an ungrammatical sentence), ``arithmetic`` (four choices), ``instructions`` (two answers of which one has the wanted
    form), ``refusals`` (a harmful request: refuse or comply) and ``answers`` (a harmless request that sounds alike:
    comply or refuse). A question is answered right if the right choice is more probable than each wrong one; for this
    the log-probabilities of a choice's tokens are summed and not divided by its length. The margin is the difference of
    the sums to the most probable wrong choice, in nats: it moves before the answer does.

    The choices take turns: except for ``language``, each text is as often right as it is one of a question's wrong
    ones, for the same number of other questions. So a model that ignores the question is right by chance, whatever the
    lengths and frequencies of the texts. Questions of the last three categories are put in the tokenizer's chat
    template if it has one, else after ``Question:`` and ``Answer:``.

    It works with every module that contains a causal model of ``transformers``, under :func:`~lightning_cl.fit_tasks`.
    Training stays the same, bit for bit. Changes since before training are tested in pairs (McNemar's exact test of the
    answers, a permutation test of the margins), and the report names those that are sure. Forty items find large
    losses only: an accuracy has a standard error of about 0.07. A router of adapters sees question and choice.

    Memory: 16 bytes for each question and row. Compute at each boundary: one forward pass over about 17,000 tokens.

    Args:
        categories: some of the bundled categories; an empty list: none.
        items: categories of your own: a name to a JSONL file whose lines have ``prompt``, ``right``, ``wrong`` (a list)
            and perhaps ``"chat": true``. A category of the same name replaces the bundled one.
        chat: None: use the tokenizer's chat template if it has one. True: it must have one. False: do without.
        limit: number of questions of each category that are asked (the first ones, best a multiple of 12, for the
            choices take turns in groups); None: all.
        batch_size: number of texts that are computed together.

    Raises:
        ValueError: if there is no such category or file, nothing to ask, or a line is no question.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import GeneralProbe
        >>> probe = GeneralProbe(categories=["knowledge", "arithmetic"])
        >>> trainer = L.Trainer(callbacks=[probe], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> probe.items["knowledge"][0].prompt, probe.items["knowledge"][0].right
        ('The capital of France is', 'Paris')
    """

    definition = "share of questions whose right choice is the most probable (log-likelihood, not normalised), ± its SE"

    def __init__(
        self,
        categories: Sequence[str] = CATEGORIES,
        items: Mapping[str, str | Path] | None = None,
        chat: bool | None = None,
        limit: int | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        if isinstance(categories, str) or not set(categories) <= set(CATEGORIES):
            raise ValueError(f"categories={categories!r}: expected a list of some of {list(CATEGORIES)}")
        check_integer("batch_size", batch_size, 1)
        if limit is not None:
            check_integer("limit", limit, 1)
        own = {name: items_of_file(path) for name, path in (items or {}).items()}
        self.items: dict[str, list[ProbeItem]] = bundled_items([c for c in categories if c not in own]) | own
        self.items = {name: items[:limit] for name, items in self.items.items()}
        if not self.items:
            raise ValueError("categories=[], items=None: there is nothing to ask; give one of them")
        self.chat, self.batch_size = chat, batch_size

    @override
    def measure(self, trainer: L.Trainer, model: Any, tokenizer: Any) -> tuple[Row, str]:
        chat = has_template(tokenizer) if self.chat is None else self.chat
        if chat and not has_template(tokenizer):
            raise MisconfigurationException(
                "GeneralProbe(chat=True): the tokenizer has no chat template; give TaskDataModule(chat_template=…), or"
                " chat=False"
            )
        asked = {
            name: [_ask(tokenizer, item, chat) for item in (items[:1] if trainer.fast_dev_run else items)]  # type: ignore[attr-defined]
            for name, items in self.items.items()
        }
        rows = [
            row for questions in asked.values() for question in questions for row in choice_tokens(tokenizer, *question)
        ]
        scores = iter(log_likelihoods(model, rows, pad_token_id(tokenizer), self.batch_size))
        row: Row = {}
        for name, questions in asked.items():
            found = [[next(scores) for _ in choices] for _, choices, _ in questions]
            margins = [right - max(wrong) for right, *wrong in found]
            row[name] = {"values": [float(margin > 0) for margin in margins], "margins": margins}
        template = str(tokenizer.chat_template) if chat else None  # some write the date, so not what it makes
        return row, fingerprint_of([[name, self.items[name][: len(each)]] for name, each in asked.items()] + [template])

    @override
    def report(self) -> dict[str, Any]:
        told = super().report()
        if told:
            known = [self.items.get(name, []) for name in self.columns]  # rows of an earlier run can have others
            means = [sum(item.chance for item in items) / len(items) if items else math.nan for items in known]
            told["probe"]["chance"] = means
        return told


def _ask(tokenizer: Any, item: ProbeItem, chat: bool) -> tuple[str, list[str], bool]:
    """The text before the choices, the choices, and True if the tokenizer's start tokens are missing."""
    if item.chat and chat:
        turns = [{"role": "user", "content": item.prompt}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return context, list(item.choices), False
    prompt = f"Question: {item.prompt}\nAnswer:" if item.chat else item.prompt
    return prompt, [f" {choice}" if prompt else choice for choice in item.choices], True
