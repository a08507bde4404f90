"""One adapter for each task around a base that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.callbacks.architecture.adapter_checks import check_task_name, foreign_adapters
from lightning_cl.callbacks.architecture.adapter_router import AdapterRouter, Kind, RoutedRows, sentences
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Need, Trait
from lightning_cl.data.module import TaskDataModule
from lightning_cl.models.adapters import (
    Init,
    Train,
    adapter_bytes,
    adapter_parameters,
    allocate_adapter,
    find_peft_model,
    list_adapters,
    remove_adapter,
    train_adapter,
    use_adapter,
    using_adapter,
)
from lightning_cl.passes.passes import forward_context
from lightning_cl.tasks import TaskPosition

_INITS, _TRAINS = ("fresh", "previous", "mean"), ("AB", "B")


class TaskAdapters(ContinualCallback):
    """Trains a LoRA adapter of its own for each task, around a base that stays frozen; nothing is forgotten.

    ::

        y = W x + s · B_k A_k x        k: the task

    Task t trains ``A_t`` and ``B_t`` alone, and the earlier ones rest. So the outputs of an earlier task stay the same
    to the last bit, whatever comes later (progressive networks without laterals: Rusu et al. 2016, arXiv:1606.04671;
    LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3). Its price is in what a task learns: a low-rank change of a frozen
    base learns less than full tuning does. It works on any LightningModule that contains one ``PeftModel`` with LoRA,
    also around a base in 4 or 8 bits. ``CausalLM(lora={"r": 8})`` is one. The adapter that the module comes with is the
    template of all others, and is deleted when the first task has its own.

    Outside of a fit the model computes with the adapter of the task that it is asked about: in the columns of the
    matrix, ``evaluate_tasks`` and ``predict_tasks``. A task that is not trained yet gets what `unseen` says, and before
    any training that is the base. At the end of a sequence the last task's adapter is in use;
    ``CausalLM.use_task(name)`` changes that, and ``CausalLM.save_pretrained(folder, task=…)`` saves one, all, or their
    mean as one model.

    With a `router`, prompts of which nobody says the task find their adapter by themselves: in validation, test and
    prediction of tasks that the run has not, and wherever else the model is asked inside of :meth:`deployed`, as in
    ``with method.deployed(trainer, module, None): module.generate(…)``. Each row of a batch gets its own, chosen once
    at its prompt. ``embedding`` needs no pass of the model: a prompt is the mean of its token embeddings, a task the
    mean of its prompts, with one covariance for all (linear discriminant analysis; at most 768 training prompts a task,
    when it ends); a prompt that is like none of them is answered by the base. ``likelihood`` takes the adapter under
    which the prompt is most likely, after one pass over it for each task. It can tell tasks apart that share their
    words, but it is weak where prompts bear no loss: their adapters have not learnt them. The report says how many
    validation prompts of the tasks so far find their own adapter.

    Everything outside of the adapters is frozen, a head too: tasks that need a head of their own have it by
    ``modules_to_save`` of the LoRA configuration.

    Memory: for each task rank · Σ (inputs + outputs) parameters of the adapted layers, in checkpoints too; gradients
    and optimizer states for those of one task. Compute: that of LoRA. The router ``embedding`` keeps 8·d² bytes and for
    each task 8·d for each of 512 prompts, with d the model's width (512 for one above 1024).

    Args:
        rank: of the adapters; None: that of the template.
        init: of a new task's adapter: ``fresh`` starts from the base, ``previous`` from a copy of the last task's
            adapter, ``mean`` from the mean of all earlier products ``B A``, at the same rank.
        router: ``embedding`` or ``likelihood``; None: who asks must say which task it is.
        router_tokens: tokens of a prompt that the router looks at, from its beginning.
        unseen: what answers a task of the run that is not trained yet, a prompt that is too short for the router, and
            without a router any other task: ``latest``, the adapter of the last trained task, or ``base``, none.
        train: ``AB`` trains both factors, ``B`` leaves the random one as it is (about half of the trained parameters).
        seed: of the random factors, which depend on the task's name too; None: that of the run's random state.

    Attributes:
        parameters: task name to the number of its adapter's parameters.
        routed: after each task, for each task so far the share of its validation prompts that got each adapter.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import TaskAdapters
        >>> method = TaskAdapters(rank=8, init="previous")
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["init"]
        'previous'
    """

    owns = "the trainable parameters"
    takes_away: Mapping[Trait, str] = MappingProxyType(
        {
            "shared parameters": "each task trains an adapter of its own, and no later task changes it; nothing is left"
            " to hold. Leave one of the two out",
            "earlier outputs": "an earlier task's outputs come from its own adapter, which no later task changes; there"
            " is nothing to hold. Leave one of the two out",
            "earlier samples": "samples of earlier tasks would train the new task's adapter, and theirs rest. Leave one"
            " of the two out; GeneralReplay, with data of no task, goes together with it",
        }
    )

    def __init__(
        self,
        rank: int | None = None,
        init: Init = "fresh",
        router: Kind | None = None,
        router_tokens: int = 64,
        unseen: Literal["latest", "base"] = "latest",
        train: Train = "AB",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if rank is not None:
            check_integer("rank", rank, 1, "a positive integer, or None for the template's")
        if seed is not None:
            check_integer("seed", seed)
        self.rank, self.seed = rank, seed
        self.init: Init = check_choice("init", init, _INITS)  # type: ignore[assignment]
        if router is not None:
            check_choice("router", router, ("embedding", "likelihood"), "'embedding', 'likelihood' or None")
        check_integer("router_tokens", router_tokens, 1)
        self.router, self.router_tokens = router, router_tokens
        self.unseen = check_choice("unseen", unseen, ("latest", "base"))
        self.train_factors: Train = check_choice("train", train, _TRAINS)  # type: ignore[assignment]
        self.parameters: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._drawn_from: int | None = seed
        self.routed: dict[int, dict[str, dict[str, float]]] = {}
        self._router = AdapterRouter(router, router_tokens) if router is not None else None
        self._sequence: list[str] = []
        self._rows: RoutedRows | None = None  # while rows are routed
        self._told = False  # that a part of the module is frozen

    # ------------------------------------------------------------------ structure

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and self._router is not None and isinstance(data, TaskDataModule) and data.packing:
            watched = [task.name for task in data.tasks if task.watched]
            if watched:
                raise MisconfigurationException(
                    f"{type(self).__name__}(router={self.router!r}) with TaskDataModule(packing=True): the watched task"
                    f" {watched[0]!r} has no adapter, and of documents that share a row none can be routed by itself;"
                    " use packing=False, router=None, or do not watch it"
                )

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        check_task_name(type(self).__name__, task)
        if self._router is not None:
            self._router.check_loader(type(self).__name__, loader, task)

    @override
    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        if self._drawn_from is None:
            self._drawn_from = torch.initial_seed()
        others = foreign_adapters(type(self).__name__, pl_module, tasks, self.run.loading)
        dora = [config for config in find_peft_model(pl_module).peft_config.values() if config.use_dora]
        if self._router is not None and dora:
            raise MisconfigurationException(
                f"{type(self).__name__}(router={self.router!r}): adapters with use_dora=True work on whole batches, not"
                " on single rows; leave DoRA or the router out"
            )
        self._sequence = list(self.run.names) or self._sequence
        for task in tasks:
            # What is about to be loaded needs no start.
            init: Init = "fresh" if self.run.loading else self.init
            allocate_adapter(pl_module, task, init, self.rank, self._drawn_from)
        for task in others if tasks else ():
            remove_adapter(pl_module, task)

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        if not self._told:
            self._told = True
            inside = {id(parameter) for parameter in find_peft_model(pl_module).parameters()}
            outside = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in inside]
            if outside:
                rank_zero_warn(
                    f"{type(self).__name__}: {outside[0]!r} (and {len(outside) - 1} more) is outside of the adapters:"
                    " all tasks share it, and it is frozen from now on; modules_to_save of the LoRA configuration gives"
                    " each task a copy of a layer"
                )
            counting = [n for n, m in pl_module.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
            if counting:
                rank_zero_warn(
                    f"{type(self).__name__}: {counting[0]!r} keeps running statistics, which every task changes for all"
                    " tasks: earlier ones do not stay as they are; give it momentum=0, or use norms without statistics"
                )
        train_adapter(pl_module, task.name, self.train_factors)

    # ------------------------------------------------------------------ the model is asked

    @override
    def deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None
    ) -> AbstractContextManager[None]:
        """Returns a context in which the module computes with the adapter of a task.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            task: the task's name; None, or a task without an adapter: what the router chooses, or `unseen` says.
        """
        known = list_adapters(pl_module)
        if task in known:
            return using_adapter(pl_module, task)
        unseen = known[-1] if known and self.unseen == "latest" else None
        if self._router is None or not self._router.tasks or (task is not None and task in self._sequence):
            return using_adapter(pl_module, unseen)
        return self._routing(pl_module, self._router, known, unseen)

    @contextmanager
    def _routing(
        self, pl_module: L.LightningModule, router: AdapterRouter, known: Sequence[str], unseen: str | None
    ) -> Iterator[None]:
        before = self._rows
        rows = RoutedRows(pl_module, lambda prompts: router.route(pl_module, prompts, known, unseen), unseen)
        with rows.entered() as self._rows:
            try:
                yield
            finally:
                self._rows = before

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._rows is not None:
            self._rows.begin(batch)

    @override
    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._rows is not None:
            self._rows.begin(batch)

    @override
    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._rows is not None:
            self._rows.begin(batch)

    @override
    def at_boundary(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        data: TaskDataModule,
        trained: int,
        ckpt_path: str | None = None,
    ) -> None:
        if self._router is None or trained == 0 or ckpt_path is not None or trained in self.routed:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        device = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        with forward_context(trainer):
            known = list_adapters(pl_module)
            found = {
                task.name: self._router.shares(pl_module, data.val_loader(task), known)
                for task in data.trained_tasks[:trained]
            }
        pl_module.to(device)
        self.routed[trained] = trainer.strategy.broadcast(found)

    @override
    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = list_adapters(pl_module)
        if known:
            use_adapter(pl_module, known[-1])

    # ------------------------------------------------------------------ state and report

    @override
    def on_sequence_start(self) -> None:
        self.parameters, self._bytes, self._drawn_from = {}, {}, self.seed
        self.routed, self._sequence = {}, []
        if self.router is not None:
            self._router = AdapterRouter(self.router, self.router_tokens)

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        name = self.task.name
        self.parameters[name] = sum(p.numel() for p in adapter_parameters(pl_module, name).values())
        self._bytes[name] = adapter_bytes(pl_module, name)
        if self._router is not None:
            self._router.fit(trainer, pl_module, name)

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "parameters": dict(self.parameters),
            "bytes": dict(self._bytes),
            "seed": self._drawn_from,
            "sequence": list(self.run.names) or list(self._sequence),
            "routed": {
                trained: {name: dict(shares) for name, shares in table.items()}
                for trained, table in self.routed.items()
            },
            "router": self._router.state() if self._router is not None else None,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.parameters, self._bytes = dict(state["parameters"]), dict(state["bytes"])
        self._drawn_from, self._sequence = state["seed"], list(state["sequence"])
        self.routed = {int(trained): dict(table) for trained, table in state["routed"].items()}
        if self._router is not None and state["router"] is not None:
            self._router.load_state(state["router"])

    @override
    def state_bytes(self) -> int:
        return sum(self._bytes.values()) + (self._router.state_bytes() if self._router is not None else 0)

    @override
    def report(self) -> dict[str, Any]:
        routed = self.routed[max(self.routed)] if self.routed else {}
        return {
            "rank": self.rank,
            "init": self.init,
            "router": self.router,
            "routed": routed,
            "unseen": self.unseen,
            "train": self.train_factors,
            "parameters": dict(self.parameters),
            "bytes": dict(self._bytes),
            "sentences": [
                f"{type(self).__name__}, {name}: an adapter of {count:,} parameters, {self._bytes[name] / 1e6:.3g} MB"
                for name, count in self.parameters.items()
            ]
            + [f"{type(self).__name__}, {told}" for told in sentences(routed)],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need != "learn":
            return None
        rank = "a higher rank" if self.rank is None else f"a higher rank, {self.rank} now"
        return f"{rank}, in {type(self).__name__}(rank=…)" + (", or init='previous'" if self.init == "fresh" else "")
