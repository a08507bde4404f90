"""The common part of methods that keep samples of earlier tasks: a buffer, its filling and its location."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.buffers import DiskStore, ReplayBuffer
from lightning_cl.buffers.buffer import Unit
from lightning_cl.buffers.disk.encoding import encode
from lightning_cl.buffers.policies import PolicyName
from lightning_cl.buffers.tokens import label_of
from lightning_cl.callbacks.replay.filling import Extras, cost_of, offer_batch, offer_task
from lightning_cl.callbacks.replay.mix import check_plannable
from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import EndCost
from lightning_cl.core.run_state import named
from lightning_cl.data.batch_source import is_stream
from lightning_cl.data.foreign_loader import task_indices
from lightning_cl.data.mixing.contents import Trained
from lightning_cl.data.mixing.plan import seed_of
from lightning_cl.passes.passes import to_device
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import TaskPosition

_WORTH_COMPACTING = 1 << 30  # bytes: a buffer of text never comes so far, and all its checkpoints stay good
_FORWARD = 1 / 3  # a forward pass takes so much of a training pass
_ORDERED = 4096  # records that are laid out in random order at once
Fill = Literal["task_end", "training"]
Storage = Literal["disk", "memory"]


class MemoryCallback(ContinualCallback):
    """Base of methods with a :class:`~lightning_cl.buffers.ReplayBuffer`.

    The buffer is the callback's own, or that of another callback of the same Trainer, which fills and keeps it. What is
    kept is decided by index from one seed: all ranks hold the same buffer, and its budget is global. On disk, one rank
    writes, and the others read its files.

    Args:
        buffer_size: the budget, in `unit`.
        policy: which samples are kept (:class:`~lightning_cl.buffers.ReplayBuffer`).
        unit: ``samples``, ``tokens`` or ``bytes``.
        fill: ``task_end``: a task's training set is offered at its end. ``training``: each sample is offered when it is
            trained on for the first time, for streams and for tasks that may be cut short.
        storage: ``disk``: in the run's folder, ``buffers/<callback>``, and checkpoints hold which samples are in the
            buffer. ``memory``: in RAM, and checkpoints hold the samples. A Trainer that keeps no checkpoints has no
            files here either.
        folder: where the files go instead. A buffer that an earlier run left there is used again.
        buffer: the name of another callback of the Trainer, whose buffer is used; nothing else is set then.
        seed: seed of what is kept.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    takes_in = True
    """True if the tasks' own samples go into the buffer."""

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
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed={seed!r}: expected an integer")
        self.fill = check_choice("fill", fill, ("task_end", "training"))
        self.storage = check_choice("storage", storage, ("disk", "memory"))
        if folder is not None and storage == "memory":
            raise ValueError(f"folder={folder!r}: storage='memory' keeps no files; give storage='disk'")
        self._own = ReplayBuffer(buffer_size, policy, seed, unit=unit)
        self._hold()
        if self.fill == "training" and self._own.policy.looks != "nothing":
            raise ValueError(
                f"fill='training': policy={policy!r} chooses among all samples of a task at its end; give"
                " fill='task_end' or another policy"
            )
        self.seed, self.folder, self.shares = seed, folder, buffer
        self._owner: MemoryCallback | None = None
        self._offered = 0  # the number of the batch, of the first pass, that was offered last while training
        self._located = False
        self._needed: dict[str, int] = {}  # bytes that a task's samples take at most
        self._run: weakref.ref[L.Trainer] | None = None

    @property
    def buffer(self) -> ReplayBuffer:
        """The buffer: its own, or the one that it shares."""
        return self._own if self._owner is None else self._owner.buffer

    @property
    def owns(self) -> str | None:  # type: ignore[override]
        """Two callbacks of one class would keep the same samples twice."""
        return None if self.shares is not None else f"the buffer of {type(self).__name__}"

    @property
    @override
    def mixes(self) -> bool:
        return self.shares is None and self.fill == "training"  # a loader that knows its samples is needed

    @property
    def ends_long(self) -> bool:  # type: ignore[override]
        """A policy that looks at all samples, or tensors that are stored next to some, take passes of the model."""
        return self._looks_at_end or (self.shares is None and type(self).extras is not MemoryCallback.extras)

    @property
    def _looks_at_end(self) -> bool:
        return self.shares is None and self.takes_in and self._own.policy.looks != "nothing"

    @override
    def end_cost(self, trainer: L.Trainer, loader: Any, task: TaskPosition) -> EndCost | None:
        if not self._looks_at_end:
            return None
        samples = TaskSamples(trainer, len(task_indices(loader)), 0, "", loader=loader)
        return EndCost("ranking", samples.count_samples(), samples.count_batches(), _FORWARD)

    # ------------------------------------------------------------------ where it lies

    @override
    def on_run_start(self, trainer: L.Trainer) -> None:
        if self._run is None or self._run() is not trainer:  # another run: a folder of its own
            self._run, self._located = weakref.ref(trainer), False
        if self.shares is not None:
            self._owner = self._find_owner()

    def _name(self) -> str:
        """Of this callback in its Trainer."""
        return self.run.name_of(self)

    def _find_owner(self) -> MemoryCallback:
        methods = named(self.run.methods)
        owners = {
            name: m for m, name in methods if isinstance(m, MemoryCallback) and m.shares is None and m is not self
        }
        if self.shares not in owners:
            instead = f"expected one of {sorted(owners)}" if owners else "add one, or leave buffer out"
            raise MisconfigurationException(
                f"{type(self).__name__}(buffer={self.shares!r}): there is no such callback with a buffer of its own in"
                f" Trainer(callbacks=[…]); {instead}"
            )
        return owners[self.shares]

    def _check_apart(self, folder: Path) -> None:
        for method, name in named(self.run.methods):
            if method is self or not isinstance(method, MemoryCallback) or method.shares is not None:
                continue
            store = method._own.store
            if isinstance(store, DiskStore) and method._located and store.folder.resolve() == folder.resolve():
                raise MisconfigurationException(
                    f"{type(self).__name__}(folder={str(folder)!r}): {name} has its buffer there; two callbacks cannot"
                    " own one buffer. Give another folder; methods with an argument `buffer` can share it on purpose,"
                    f" by buffer={name!r}"
                )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.run.driven:
            self.on_run_start(trainer)
        if self.shares is None and stage == "fit":  # between tasks the loggers, whose folder it is, are silent
            located = self.locate(trainer)
            fresh = self.run.checkpoint_path is None and len(self._own) == 0
            if located and self.folder is not None and self.takes_in and fresh:
                self._own.adopt()
                self._check_lengths()
                self._hold()
                trainer.strategy.barrier("adopt")  # nobody writes before all have looked
            if self._own.policy.looks != "nothing":
                refuse_sharded(
                    trainer, f"{type(self).__name__}(policy={self._own.policy_name!r}) looks at single samples with"
                )

    def locate(self, trainer: L.Trainer) -> bool:
        """Finds out where the buffer lies, once in a run; what is in it already goes there. On all ranks.

        Returns:
            whether it was found out now.
        """
        store = self._own.store
        wanted = _keeps_files(trainer) or (self.folder is not None and not trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._located or self.storage == "memory" or not (isinstance(store, DiskStore) or wanted):
            return False
        self._located = True
        base = run_folder(trainer)
        folder = Path(self.folder) if self.folder is not None else base / "buffers" / self._name()
        self._check_apart(folder)
        first = trainer.strategy.broadcast(DiskStore.first_free(folder))
        data = self.run.data
        fingerprint = data.fingerprint() if data is not None else None
        # One that a checkpoint has opened has no folder yet; one of an earlier run keeps its own.
        target = store if isinstance(store, DiskStore) and not store.is_placed else DiskStore(None)
        target.place(folder, first, trainer.is_global_zero)
        if fingerprint is not None:
            target.expect_tokenizer(fingerprint)
        if trainer.world_size > 1:
            # Another run may have taken the number: the ranks hear where the records really go.
            target.expect_in(trainer.strategy.broadcast(target.begin() if trainer.is_global_zero else folder))
        if target is not store:
            self._own.move_to(target)
        return True

    def _check_lengths(self) -> None:
        """Samples that an earlier run has left must fit this one's."""
        data = self.run.data
        longest = max(self._own.columns(self._own.numbers)["length"], default=0)
        if data is not None and data.fingerprint() is not None and longest > data.max_length:
            raise ValueError(
                f"{type(self).__name__}(folder={self.folder!r}): a sample there has {longest} tokens, more than"
                f" TaskDataModule(max_length={data.max_length}); give at least {longest}, or another folder"
            )

    def _hold(self) -> None:
        """Keeps back samples that are stored while a task is trained: in map-style data the next task replays them."""
        if self.fill == "training":
            self._own.hold()

    # ------------------------------------------------------------------ checks

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        if self.shares is not None or not self.takes_in:
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
        self._needed[task] = size * min(kept, len(loader.dataset))

    def _check_room(self) -> None:
        """A disk that is sure to be too full is found before training."""
        store = self._own.store
        if not isinstance(store, DiskStore) or not store.writes or not self._needed:
            return
        task = max(self._needed, key=lambda name: self._needed[name])
        needed, free = self._needed[task], store.free_bytes()
        self._needed.clear()
        if needed > free:
            raise OSError(
                f"{type(self).__name__}: the buffer of task {task!r} takes about {needed:,} bytes, and {store.folder}"
                f" has {free:,} left; give a smaller buffer_size, another folder, or make room"
            )

    # ------------------------------------------------------------------ filling

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_room()
        self._offered = 0

    @override
    def on_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, trained: Trained) -> None:
        if self.shares is not None or not self.takes_in or self.fill != "training" or trained.epoch > 0:
            return
        if trained.number <= self._offered:
            return  # a batch that is trained on again, after an exception
        assert self.task is not None
        self._offered = trained.number
        with untouched_random_state():  # a data set may draw
            offer_batch(trainer, self._own, self.task.name, trained, self._extras(trainer, pl_module))
        if trainer.world_size > 1:
            self._own.flush()  # the other ranks read it

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.shares is not None:
            return
        if self.takes_in and self.fill == "task_end":
            assert self.task is not None
            loader: Any = trainer.train_dataloader
            name, seed = type(self).__name__, self.seed + self.tasks_done
            check_plannable(loader, name)
            with untouched_random_state():
                offer_task(
                    trainer, pl_module, loader, self._own, self.task, seed, name, self._extras(trainer, pl_module)
                )
        self._own.commit()
        self._hold()
        trainer.strategy.barrier("buffer")
        self._own.compact(_WORTH_COMPACTING, trainer.strategy.broadcast)
        self._own.write_index()
        trainer.strategy.barrier("buffer")

    def _extras(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Extras | None:
        if type(self).extras is MemoryCallback.extras:
            return None
        return lambda samples: self.extras(trainer, pl_module, samples)

    def extras(
        self, trainer: L.Trainer, pl_module: L.LightningModule, samples: Sequence[Any]
    ) -> list[dict[str, Tensor]]:
        """Tensors to be stored next to samples that were chosen."""
        return [{} for _ in samples]

    # ------------------------------------------------------------------ reading

    def memory_batches(self, trainer: L.Trainer, count: int | Sequence[int], seed: int) -> Iterator[Any]:
        """Batches of stored samples on the device: the buffer in random order, pass after pass.

        Args:
            trainer: inside ``fit``.
            count: samples of a batch, over all ranks, without end; or those of each of some batches. A rank gets every
                ``world_size``-th of them, and one where there is none for it.
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
        """The records in the buffer in random order; of many, some thousands."""
        numbers = self.buffer.numbers
        if len(numbers) <= _ORDERED:
            order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist()
            return [numbers[place] for place in order if not self.buffer.store.is_erased(numbers[place])]
        drawn = (self.buffer.pick(seed_of(seed, i)) for i in range(_ORDERED))
        return list(dict.fromkeys(number for number in drawn if number is not None))

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        if self.shares is not None:
            return {"shares": self.shares}
        return {"buffer": self._own.state_dict(), "offered": self._offered}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        if ("shares" in state) != (self.shares is not None):
            raise ValueError(
                f"{type(self).__name__}(buffer={self.shares!r}) does not fit the checkpoint, which was written with"
                f" buffer={state.get('shares')!r}"
            )
        if self.shares is None:
            if self.storage == "disk" and state["buffer"]["store"]["kind"] == "disk" and not self._located:
                self._own.store = DiskStore(None)
            self._own.load_state_dict(state["buffer"], self._look_in())
            self._offered = state["offered"]

    def _look_in(self) -> list[Path]:
        """Returns folders where the buffer's files may be if they are gone: a run's folder can be moved."""
        trainer = None if self._run is None else self._run()
        if trainer is None:
            return []
        path = self.run.checkpoint_path or trainer.ckpt_path
        name = self._name()
        above = [] if path is None else list(Path(path).absolute().parents)[:4]
        given = [] if self.folder is None else [Path(self.folder)]
        return [*given, *(folder / "buffers" / name for folder in above)]

    @override
    def state_bytes(self) -> int:
        return 0 if self.shares is not None else self._own.size_in_bytes()

    @override
    def report(self) -> dict[str, Any]:
        if self.shares is not None:
            return {"buffer": self.shares}
        store = self._own.store
        return {
            "policy": self._own.policy_name,
            "buffer_size": self._own.capacity,
            "unit": self._own.unit,
            "storage": "disk" if isinstance(store, DiskStore) else "memory",
            "folders": [str(f) for f in store.folders if f.is_dir()] if isinstance(store, DiskStore) else [],
            "stored": self._own.counts(),
            "seen": self._own.seen,
        }


def _keeps_files(trainer: L.Trainer) -> bool:
    return bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run  # type: ignore[attr-defined]
