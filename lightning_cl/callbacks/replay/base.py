"""Base of methods that keep samples of earlier tasks in a buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.buffers import ReplayBuffer
from lightning_cl.buffers.buffer import Unit
from lightning_cl.buffers.disk.encoding import encode
from lightning_cl.buffers.policies import PolicyName
from lightning_cl.buffers.tokens import label_of
from lightning_cl.callbacks.replay.filling import Extras, cost_of, offer_batch, offer_task
from lightning_cl.callbacks.replay.location import Storage as Storage
from lightning_cl.callbacks.replay.mixer import check_plannable
from lightning_cl.callbacks.replay.stored import BufferCallback
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.questions import EndCost, Trait
from lightning_cl.core.run_state import named
from lightning_cl.data.batch_source import is_stream
from lightning_cl.data.foreign_loader import task_indices
from lightning_cl.data.mixing.contents import Trained
from lightning_cl.data.mixing.plan import seed_of
from lightning_cl.passes.passes import to_device
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import TaskPosition

_FORWARD = 1 / 3  # cost of a forward pass, in training passes
_ORDERED = 4096  # number of records that get a random order at once
Fill = Literal["task_end", "training"]


class MemoryCallback(BufferCallback):
    """Base of methods that keep samples of the tasks in a :class:`~lightning_cl.buffers.ReplayBuffer`.

    The buffer is the callback's own, or that of another callback of the same Trainer. One seed and the samples' indices
    decide which samples are kept, so all ranks have the same buffer, and its budget is global. On disk, one rank
    writes, and the others read its files.

    Args:
        buffer_size: the budget, in `unit`.
        policy: the choice of the samples that are kept (:class:`~lightning_cl.buffers.ReplayBuffer`).
        unit: ``samples``, ``tokens`` or ``bytes``.
        fill: ``task_end``: a task's training set is offered at its end. ``training``: each sample is offered when it is
            trained on for the first time. Streams need this, and so do tasks that may be cut short.
        storage: ``disk``: in the run's folder, ``buffers/<callback>``; checkpoints list the samples in the buffer.
            ``memory``: in RAM; checkpoints contain the samples. A Trainer that keeps no checkpoints writes no files for
            the buffer either.
        folder: folder for the files; default: the run's folder. A buffer that an earlier run left there is used again.
        buffer: the name of another callback of the Trainer, whose buffer is used. The other arguments have no effect
            then.
        seed: seed for the choice of samples.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    relies_on: frozenset[Trait] = frozenset({"earlier samples"})

    def __init__(
        self,
        buffer_size: int = 10_000,
        policy: PolicyName = "reservoir",
        *,
        unit: Unit = "samples",
        fill: Fill = "task_end",
        storage: Storage = "disk",
        folder: str | None = None,
        buffer: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(ReplayBuffer(buffer_size, policy, check_integer("seed", seed), unit=unit), storage, folder)
        self.fill = check_choice("fill", fill, ("task_end", "training"))
        self.hold()
        if self.fill == "training" and self._own.policy.looks != "nothing":
            raise ValueError(
                f"fill='training': policy={policy!r} chooses among all samples of a task at its end; give"
                " fill='task_end' or another policy"
            )
        self.seed, self.shares = seed, buffer
        self._owner: BufferCallback | None = None
        self._offered = 0  # number of the last batch of the first epoch that was offered in training

    @property
    @override
    def buffer(self) -> ReplayBuffer:
        return self._own if self._owner is None else self._owner.buffer

    @property
    @override
    def has_own_buffer(self) -> bool:
        return self.shares is None

    @property
    def owns(self) -> str | None:  # type: ignore[override]
        """Returns the name of the own buffer; two callbacks of one class would keep the same samples twice."""
        return None if self.shares is not None else f"the buffer of {type(self).__name__}"

    @property
    @override
    def mixes(self) -> bool:
        return self.shares is None and self.fill == "training"  # it needs a loader that knows its samples

    @property
    def ends_long(self) -> bool:  # type: ignore[override]
        """True if the end needs passes of the model, for a policy that looks at samples or for stored tensors."""
        return self._looks_at_end or (self.shares is None and type(self).extras is not MemoryCallback.extras)

    @property
    def _looks_at_end(self) -> bool:
        return self.shares is None and self._own.policy.looks != "nothing"

    @override
    def end_cost(self, trainer: L.Trainer, loader: Any, task: TaskPosition) -> EndCost | None:
        if not self._looks_at_end:
            return None
        samples = TaskSamples(trainer, len(task_indices(loader)), 0, "", loader=loader)
        return EndCost("ranking", samples.count_samples(), samples.count_batches(), _FORWARD)

    # ------------------------------------------------------------------ location

    @override
    def on_run_start(self, trainer: L.Trainer) -> None:
        super().on_run_start(trainer)
        if self.shares is not None:
            self._owner = self._find_owner()

    def _find_owner(self) -> BufferCallback:
        methods = named(self.run.methods)
        owners = {
            name: m for m, name in methods if isinstance(m, BufferCallback) and m.has_own_buffer and m is not self
        }
        if self.shares not in owners:
            instead = f"expected one of {sorted(owners)}" if owners else "add one, or leave buffer out"
            raise MisconfigurationException(
                f"{type(self).__name__}(buffer={self.shares!r}): there is no such callback with a buffer of its own in"
                f" Trainer(callbacks=[…]); {instead}"
            )
        return owners[self.shares]

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.has_own_buffer and stage == "fit" and self._own.policy.looks != "nothing":
            refuse_sharded(
                trainer, f"{type(self).__name__}(policy={self._own.policy_name!r}) looks at single samples with"
            )

    @override
    def locate(self, trainer: L.Trainer) -> bool:
        located = super().locate(trainer)
        fresh = self.run.checkpoint_path is None and len(self._own) == 0
        if located and self.location.folder is not None and fresh:
            self.location.use_earlier(trainer, self.run, type(self).__name__)
            self.hold()
        return located

    @override
    def hold(self) -> None:
        # Samples that are stored in training are replayed from the next task on, in map-style data.
        if self.fill == "training":
            self._own.hold()

    # ------------------------------------------------------------------ checks

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        if self.shares is not None:
            return
        name = type(self).__name__
        if is_stream(loader):
            if self.fill == "task_end":
                raise MisconfigurationException(
                    f"{name}: the training data of task {task!r} is a stream, which cannot be looked at again at its"
                    f" end; give {name}(fill='training')"
                )
            return
        check_plannable(loader, name, task)
        if len(loader.dataset) == 0:
            return
        sample = loader.dataset[0]
        try:
            encode(sample)
            cost = self._own.cost(sample)
        except TypeError as error:
            raise TypeError(
                f"task {task!r}: {name} cannot store its samples: they hold {error}. Samples may be made of tensors,"
                " numpy arrays, numbers, texts, dictionaries, lists and tuples"
            ) from error
        except ValueError as error:
            raise ValueError(f"task {task!r}: {name}({error})") from error
        if self._own.policy.group == "class" and label_of(sample) is None:
            raise ValueError(
                f"{name}(policy='class_balanced'): a sample of task {task!r} has no class; expected (input, class) or a"
                " dictionary with `label` or `labels`, a whole number"
            )
        if self._own.unit != "samples":
            length_of = getattr(loader.dataset, "length", None)
            if length_of is not None:
                indices = range(len(loader.dataset))
                cost = max((cost_of(self._own, loader.dataset, i) for i in indices), default=cost)
            if cost > self._own.capacity:
                raise ValueError(
                    f"{name}(buffer_size={self._own.capacity}): a sample of task {task!r} takes {cost}"
                    f" {self._own.unit}, more than the whole budget; give at least {cost}"
                )
        size = encode(sample).size + 64
        kept = {"samples": self._own.capacity, "bytes": self._own.capacity // size}.get(self._own.unit, 0)
        self.location.needs(task, size * min(kept, len(loader.dataset)))

    # ------------------------------------------------------------------ filling

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_start(trainer, pl_module)
        self._offered = 0

    @override
    def on_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, trained: Trained) -> None:
        if self.shares is not None or self.fill != "training" or trained.epoch > 0:
            return
        if trained.number <= self._offered:
            return  # the batch is trained on again, after an exception
        assert self.task is not None
        self._offered = trained.number
        with untouched_random_state():  # a data set may draw random numbers
            offer_batch(trainer, self._own, self.task.name, trained, self._extras(trainer, pl_module))
        if trainer.world_size > 1:
            self._own.flush()  # the other ranks read it

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.shares is not None:
            return
        if self.fill == "task_end":
            assert self.task is not None
            loader: Any = trainer.train_dataloader
            name, seed = type(self).__name__, self.seed + self.tasks_done
            check_plannable(loader, name)
            with untouched_random_state():
                offer_task(
                    trainer, pl_module, loader, self._own, self.task, seed, name, self._extras(trainer, pl_module)
                )
        self.write_down(trainer)

    def _extras(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Extras | None:
        if type(self).extras is MemoryCallback.extras:
            return None
        return lambda samples: self.extras(trainer, pl_module, samples)

    def extras(
        self, trainer: L.Trainer, pl_module: L.LightningModule, samples: Sequence[Any]
    ) -> list[dict[str, Tensor]]:
        """Returns tensors to be stored next to each chosen sample."""
        return [{} for _ in samples]

    # ------------------------------------------------------------------ reading

    def memory_batches(self, trainer: L.Trainer, count: int | Sequence[int], seed: int) -> Iterator[Any]:
        """Yields batches of stored samples on the device; each pass over the buffer has a random order.

        Args:
            trainer: inside ``fit``.
            count: number of samples of every batch, over all ranks, for endless batches; or the numbers for each of
                some batches. Each rank gets every ``world_size``-th sample, and at least one.
            seed: seed of the order, the same on all ranks.
        """
        loader: Any = trainer.train_dataloader
        order: list[int] = []
        for step, wanted in enumerate(itertools.repeat(count) if isinstance(count, int) else count):
            size = min(wanted, len(self.buffer))
            while len(order) < size:
                more = self._some_order(seed_of(seed, step, len(order)))
                if not more:
                    return
                order += more
            numbers, order = order[:size], order[size:]
            mine = numbers[trainer.global_rank :: trainer.world_size] or numbers[:1]
            samples = [self.buffer.get(number) for number in mine]
            block = getattr(loader, "block_length", None)
            yield to_device(trainer, loader.collate_fn(samples if block is None else [[s] for s in samples]))

    def _some_order(self, seed: int) -> list[int]:
        """Returns the buffer's records in random order; only some thousands if there are many."""
        numbers = self.buffer.numbers
        if len(numbers) <= _ORDERED:
            order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
            return [numbers[index] for index in order if not self.buffer.store.is_erased(numbers[index])]
        drawn = (self.buffer.pick(seed_of(seed, i)) for i in range(_ORDERED))
        return list(dict.fromkeys(number for number in drawn if number is not None))

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        if self.shares is not None:
            return {"shares": self.shares}
        return {**super().continual_state(), "offered": self._offered}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        if ("shares" in state) != (self.shares is not None):
            raise ValueError(
                f"{type(self).__name__}(buffer={self.shares!r}) does not fit the checkpoint, which was written with"
                f" buffer={state.get('shares')!r}"
            )
        if self.shares is None:
            super().load_continual_state(state)
            self._offered = state["offered"]

    @override
    def report(self) -> dict[str, Any]:
        return super().report() if self.shares is None else {"buffer": self.shares}
