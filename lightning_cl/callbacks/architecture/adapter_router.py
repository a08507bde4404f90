"""The choice of an adapter for each prompt, where nobody says which task it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.data.foreign_loader import task_indices, why_not_plannable
from lightning_cl.data.text.prompts import answer_in
from lightning_cl.functional.prompt_means import prompt_beginnings, prompt_means
from lightning_cl.functional.routing import TaskRouter
from lightning_cl.models.adapter_rows import adapters_per_row
from lightning_cl.models.adapters import find_peft_model, use_adapter, using_adapter
from lightning_cl.passes.heads import evaluated
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.random_state import untouched_random_state

Kind = Literal["embedding", "likelihood"]
Prompt = Sequence[int]

FITTED_ON = 768
"""Training prompts of a task that the router is fitted on, at most."""

_SHOWN = 128  # validation prompts of a task that the report is about, at most
_BASE = "none (the base)"
_TOGETHER = 8  # prompts of one pass


class AdapterRouter:
    """Finds for each prompt the task whose adapter is to answer.

    Args:
        kind: ``embedding``: linear discriminant analysis of the mean token embeddings
            (:mod:`lightning_cl.functional.routing`), without a pass of the model; a prompt that is like no task's is of
            the base. ``likelihood``: the adapter under which the prompt is most likely; one pass for each task.
        tokens: how many tokens of a prompt count, at most.

    Attributes:
        tasks: those that it was fitted on, in order.
    """

    def __init__(self, kind: Kind, tokens: int) -> None:
        self.kind, self.tokens = kind, tokens
        self.tasks: list[str] = []
        self._lda: TaskRouter | None = None

    def check_loader(self, name: str, loader: Any, task: str) -> None:
        """Raises an error if there are no prompts in a task's training data; streams are not looked at."""
        if self.kind != "embedding" or why_not_plannable(loader) is not None:
            return
        indices = task_indices(loader)
        batch = loader.collate_fn([loader.dataset[indices[0]]]) if indices else None
        if batch is not None and not has_tokens(batch):
            raise MisconfigurationException(
                f"{name}(router='embedding'): the batches of task {task!r} have no `input_ids`, from which prompts are"
                " read; leave the router out, and say which task it is"
            )

    def fit(self, trainer: L.Trainer, pl_module: L.LightningModule, task: str) -> None:
        """Learns what a task's prompts are like, from its training data; on all ranks together.

        Args:
            trainer: inside ``fit``, with the task's training data.
            pl_module: contains a ``PeftModel``.
            task: its name.
        """
        self.tasks.append(task)
        if self.kind != "embedding":
            return
        weight = _embeddings(pl_module)
        found = TaskRouter(weight.shape[1])
        count = 1 if trainer.fast_dev_run else FITTED_ON  # type: ignore[attr-defined]
        with untouched_random_state():
            for _, batch in TaskSamples(trainer, count, 0, f"Router: prompts of {task}").batches():
                prompts = [prompt for row in prompts_in(batch) for prompt in row if len(prompt)]
                if prompts:
                    vectors, mask = self._vectors(weight, prompts)
                    features = prompt_means(vectors, mask, self.tokens)
                    beginnings = prompt_beginnings(vectors, mask, self.tokens)
                    found.update(features, len(self.tasks) - 1, mask.sum(1), beginnings)
        if self._lda is None:
            self._lda = TaskRouter(weight.shape[1])
        for state in from_all_ranks(found.state()):
            self._lda.merge(state)

    def route(
        self, module: L.LightningModule, prompts: Sequence[Prompt], known: Sequence[str], otherwise: str | None
    ) -> list[str | None]:
        """The task of each prompt; None: the base.

        Args:
            module: contains a ``PeftModel``.
            prompts: token ids.
            known: the tasks that have an adapter.
            otherwise: what a prompt gets that is too short to tell.
        """
        enough = 1 if self.kind == "embedding" else 2
        chosen: list[str | None] = [otherwise] * len(prompts)
        places = [place for place, prompt in enumerate(prompts) if len(prompt) >= enough]
        for start in range(0, len(places), _TOGETHER):
            some = places[start : start + _TOGETHER]
            for place, task in zip(some, self._route(module, [prompts[p] for p in some], known), strict=True):
                chosen[place] = task
        return chosen

    def _route(self, module: L.LightningModule, prompts: Sequence[Prompt], known: Sequence[str]) -> list[str | None]:
        if self.kind == "likelihood":
            return [known[index] for index in self._losses(module, prompts, known).argmin(0).tolist()]
        assert self._lda is not None
        vectors, mask = self._vectors(_embeddings(module), prompts)
        indices = self._lda.route(prompt_means(vectors, mask, self.tokens), lengths=mask.sum(1)).tolist()
        return [self.tasks[index] if index >= 0 else None for index in indices]

    def _vectors(self, weight: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Token embeddings of each prompt's first tokens, and the mask of padding."""
        ids, mask = self._padded(prompts, weight.device)
        with torch.no_grad():
            return embedding(ids, weight), mask

    def _losses(self, module: L.LightningModule, prompts: Sequence[Prompt], known: Sequence[str]) -> Tensor:
        """Mean loss of each prompt under each adapter: ``[tasks, prompts]``."""
        model = find_peft_model(module).get_base_model()
        ids, mask = self._padded(prompts, next(model.parameters()).device)
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        losses = []
        with evaluated(model):
            for task in known:
                with using_adapter(module, task):
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                each = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
                losses.append(each.sum(1) / (targets != -100).sum(1))
        return torch.stack(losses)

    def _padded(self, prompts: Sequence[Prompt], device: torch.device) -> tuple[Tensor, Tensor]:
        cut = [list(prompt[: self.tokens]) for prompt in prompts]
        longest = max(map(len, cut))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in cut], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in cut], device=device)
        return ids, mask

    def shares(self, module: L.LightningModule, loader: Any, known: Sequence[str]) -> dict[str, float]:
        """Returns for each adapter the share of a loader's prompts that get it; of several loaders, the first."""
        prompts: list[list[int]] = []
        if isinstance(loader, (dict, list, tuple)):
            loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
        for batch in loader if loader is not None else ():
            if not has_tokens(batch) or len(prompts) >= _SHOWN:
                break
            prompts += [prompt for row in prompts_in(batch) for prompt in row]
        prompts = prompts[:_SHOWN]
        chosen = self.route(module, prompts, known, None)
        return {name or _BASE: chosen.count(name) / len(prompts) for name in [*known, None] if name in chosen}

    def state(self) -> dict[str, Any]:
        """Returns the statistics that it was fitted to, for a checkpoint."""
        lda = None if self._lda is None else {"width": self._lda.width, **self._lda.state()}
        return {"tasks": list(self.tasks), "lda": lda}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state`."""
        self.tasks, self._lda = list(state["tasks"]), None
        if state["lda"] is not None:
            self._lda = TaskRouter(state["lda"]["width"])
            self._lda.load_state(state["lda"])

    def state_bytes(self) -> int:
        """Returns the bytes of its state."""
        tensors = self._lda.state().values() if self._lda is not None else ()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sentences(routed: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each task on where the router sends its prompts.

    Args:
        routed: for each task its :meth:`AdapterRouter.shares`.
    """
    told = []
    for name, shares in routed.items():
        others = [f", {share:.0%} {other}" for other, share in shares.items() if other != name and share >= 0.005]
        own = f"the router gives {shares.get(name, 0.0):.0%} of its validation prompts their own adapter"
        if shares:
            told.append(f"{name}: {own}{''.join(others)}")
    return told


def _embeddings(module: L.LightningModule) -> Tensor:
    """The base's token embeddings, without what an adapter makes of them: they never change."""
    layer: Any = find_peft_model(module).get_base_model().get_input_embeddings()
    while hasattr(layer, "original_module") or hasattr(layer, "base_layer"):
        layer = layer.original_module if hasattr(layer, "original_module") else layer.base_layer
    weight: Tensor = layer.weight.detach()
    return weight


# ---------------------------------------------------------------------- prompts


def has_tokens(batch: Any) -> bool:
    """Returns True for a batch of token ids."""
    return isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor)


def prompts_in(batch: Mapping[str, Any]) -> list[list[list[int]]]:
    """The prompts of each row of a batch of token ids; more than one where documents share a row.

    A prompt is what comes before the last stretch of tokens that bear loss, and of a text without prompt its beginning
    (:func:`~lightning_cl.data.text.prompts.answer_in`). Without labels it is all of the row. Padding is left out.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    rows = []
    for row in range(len(ids)):
        kept = mask[row].bool() if mask is not None else torch.ones_like(ids[row], dtype=torch.bool)
        tokens = ids[row][kept].tolist()
        learnt = (labels[row][kept] != -100).tolist() if labels is not None else None
        starts = [0]
        if mask is None and positions is not None:
            starts = sorted({0, *(positions[row] == 0).nonzero().flatten().tolist()})
        parts = [slice(start, end) for start, end in pairwise([*starts, len(tokens)])]
        found = [_prompt(tokens[part], learnt[part] if learnt is not None else None) for part in parts]
        rows.append([prompt for prompt in found if prompt is not None])
    return rows


def _prompt(tokens: list[int], learnt: list[bool] | None) -> list[int] | None:
    """The prompt of a document; None for padding, where nothing is learnt."""
    if learnt is None or len(tokens) < 2:
        return tokens
    if not any(learnt[1:]):
        return None
    # Nothing predicts the first token: what its label says is a matter of taste.
    return tokens[: answer_in([learnt[1], *learnt[1:]])[0]]


# ---------------------------------------------------------------------- rows


class RoutedRows:
    """A module while each row of each batch is computed with the adapter that is chosen for it.

    The choice for a row is made once, at its prompt: all that follows in the cache is computed with the same adapter.

    Args:
        module: contains a ``PeftModel`` around a language model.
        choose: returns the task of each of some prompts, or None for the base.
        otherwise: the task of passes that are not of the batch, as of checks.
    """

    def __init__(
        self,
        module: L.LightningModule,
        choose: Callable[[Sequence[Prompt]], list[str | None]],
        otherwise: str | None,
    ) -> None:
        self._module, self._choose, self._otherwise = module, choose, otherwise
        self._rows: list[str | None] | None = None  # of the batch, where it is one of token ids
        self._now: list[str | None] | None = None  # in use
        self._chooses = False
        self._stack = ExitStack()

    @contextmanager
    def entered(self) -> Iterator[Self]:
        """The context in which rows are routed."""
        base = find_peft_model(self._module).get_base_model()
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
        handle = decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        with using_adapter(self._module, self._otherwise):
            try:
                yield self
            finally:
                handle.remove()
                self._stack.close()

    def begin(self, batch: Any) -> None:
        """Tells of the Trainer's next batch: with labels its prompts are known.

        Raises:
            ValueError: if documents share a row.
        """
        self._rows = None
        if not has_tokens(batch):
            return
        rows = prompts_in(batch)
        if any(len(row) > 1 for row in rows):
            raise ValueError(
                "router: several documents share a row of this batch, and a row has one adapter; use"
                " TaskDataModule(packing=False) where tasks are not known"
            )
        self._rows = self._route([row[0] if row else [] for row in rows])

    def _route(self, prompts: Sequence[Prompt]) -> list[str | None]:
        self._stack.close()  # the choice may need passes of its own
        self._now, self._chooses = None, True
        try:
            return self._choose(prompts)
        finally:
            self._chooses = False

    def _before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._chooses:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor):
            raise ValueError("router: the model was called without `input_ids`, from which prompts are read")
        if self._rows is not None:
            self._use(self._rows if len(ids) == len(self._rows) else [self._otherwise])
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and self._now is not None:
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            form = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"router: attention_mask is {form}, input_ids {list(ids.shape)}: expected the same shape, so that"
                " padding is known; use an ordinary (dynamic) cache, and begin with an empty one"
            )
        self._use(self._route([row[0] for row in prompts_in({"input_ids": ids, "attention_mask": mask})]))

    def _use(self, tasks: list[str | None]) -> None:
        if tasks == self._now:
            return
        self._stack.close()
        self._now = tasks
        if len(set(tasks)) > 1:
            self._stack.enter_context(adapters_per_row(self._module, tasks))
        else:
            use_adapter(self._module, tasks[0])
