"""The buffer: samples of earlier tasks within a budget, chosen by a policy, in memory or on disk."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_cl.arguments import check_choice
from lightning_cl.buffers.budget import Unit as Unit
from lightning_cl.buffers.budget import check_budget, check_fits, cost_of, cost_of_tokens
from lightning_cl.buffers.disk.folder import Stored, erase_found
from lightning_cl.buffers.disk.index import read_state, write_live, write_state
from lightning_cl.buffers.disk.store import DiskStore
from lightning_cl.buffers.memory import MemoryStore
from lightning_cl.buffers.policies import POLICIES, PolicyName, draw_key, group_of
from lightning_cl.buffers.slots import Slots
from lightning_cl.buffers.store import Info, Store, was_removed
from lightning_cl.buffers.tokens import label_of


class ReplayBuffer:
    """Samples of earlier tasks, each with the name of its task.

    A sample is what a data set returns: tensors, arrays, numbers and texts, in plain containers. A token sequence takes
    4 bytes and a bit per token, and 64 bytes. Insertion takes O(log n), a rejection O(1). With the same seed and the
    same stream the content is the same in every process.

    Args:
        capacity: the budget.
        policy: ``reservoir``: uniform over everything seen. ``task_balanced``, ``class_balanced``: equal shares for the
            tasks or classes, uniform within each; the others get what a small one does not need. ``fifo``: the newest.
            ``surprise``: in proportion to a weight. ``herding``, ``k_center``: by a rank within the task, equal shares
            for the tasks.
        seed: seed of the random choices.
        unit: what the budget counts: ``samples``, ``tokens``, or ``bytes`` on disk.
        store: where samples lie: by default, in memory; :class:`~lightning_cl.buffers.disk.store.DiskStore` for files.

    Attributes:
        seen: how many samples were offered so far.
        seen_of: the same for each task.

    Raises:
        ValueError: if capacity, policy or unit is not one of the above.
    """

    def __init__(
        self,
        capacity: int,
        policy: PolicyName = "reservoir",
        seed: int = 0,
        *,
        unit: Unit = "samples",
        store: Store | None = None,
    ) -> None:
        check_budget(capacity, unit)
        check_choice("policy", policy, sorted(POLICIES))
        self.capacity, self.policy_name, self.unit = capacity, policy, unit
        self.policy = POLICIES[policy]
        self.store: Store = MemoryStore() if store is None else store
        self._rng = random.Random(seed)
        self.seen_of: Counter[str] = Counter()
        self._slots = Slots(self.capacity)

    # ------------------------------------------------------------------ looking

    def __len__(self) -> int:
        return self._slots.count

    def __getitem__(self, index: int) -> Any:
        return self.store.get(self.numbers[index])

    @property
    def numbers(self) -> Sequence[int]:
        """The record numbers of the stored samples."""
        return self._slots.numbers

    @property
    def held(self) -> Sequence[int]:
        """The records that a task's batches are planned from: those at the last :meth:`hold`, else all stored ones.

        Some of them may have been removed since.
        """
        return self.numbers if self._slots.held is None else self._slots.held

    @property
    def items(self) -> list[Any]:
        """The stored samples, all of them in memory."""
        return [self.store.get(number) for number in self.numbers]

    @property
    def tasks(self) -> list[str]:
        """For each stored sample the name of its task."""
        return [self._slots.task_names[task] for task in self._slots.tasks]

    @property
    def task_names(self) -> list[str]:
        """The tasks of all samples that ever were in the buffer, in order."""
        return list(self._slots.task_names)

    @property
    def slots(self) -> int:
        """The number of slots, filled or not."""
        return len(self._slots)

    def pick(self, value: int, task: str | None = None, slots: int | None = None) -> int | None:
        """The record that a large random number stands for, in O(1); of a task, as many tries as it is rare.

        Args:
            value: equally likely numbers give equally likely records.
            task: only of this task.
            slots: only of the first so many (:attr:`slots`); all, by default.
        """
        return self._slots.pick(value, task, slots)

    @property
    def seen(self) -> int:
        """The number of samples that were offered so far."""
        return sum(self.seen_of.values())

    def get(self, number: int) -> Any:
        """The sample of a record.

        Raises:
            RemovedError: if it was removed.
        """
        return self.store.get(number)

    def extra(self, number: int) -> dict[str, Tensor]:
        """The tensors that were stored next to a record."""
        return self.store.extra(number)

    def info(self, number: int) -> Info:
        """Returns what is known of a record without reading it."""
        return self.store.info(number)

    def columns(self, numbers: Sequence[int]) -> dict[str, Sequence[int]]:
        """Of records: ``length``, ``loss_tokens`` and ``task`` (its index in :attr:`task_names`)."""
        if array("q", numbers) == array("q", self.numbers):
            tasks = self._slots.tasks
        else:
            index = {name: i for i, name in enumerate(self.task_names)}
            tasks = array("i", (index[self.store.info(number).task] for number in numbers))
        return {**self.store.columns(numbers), "task": tasks}

    def counts(self) -> dict[str, int]:
        """Counts the stored samples of each task."""
        return {task: count for task, count in self._slots.per_task.items() if count}

    def size_in_bytes(self) -> int:
        """The bytes of the stored samples."""
        return sum(self.store.info(number).size for number in self.numbers)

    # ------------------------------------------------------------------ filling

    def add(
        self,
        sample: Any,
        task: str,
        *,
        weight: float = 1.0,
        rank: int | None = None,
        position: int = -1,
        extra: dict[str, Tensor] | None = None,
    ) -> int | None:
        """Offers one sample of the stream.

        Args:
            sample: the sample.
            task: the name of its task.
            weight: for ``surprise``.
            rank: for ``herding`` and ``k_center``.
            position: its position in the task's data.
            extra: tensors to be stored next to it.

        Returns:
            the number of its record; None if it was left out, or removed before.
        """
        if was_removed(self.store, sample):
            return None
        label = label_of(sample) if self.policy.group == "class" else None
        slot = self.choose_slot(task, self.cost(sample), label, weight, rank)
        return None if slot is None else self.put(slot, sample, task, position=position, extra=extra)

    def cost(self, sample: Any) -> int:
        """Returns a sample's cost in the budget."""
        return cost_of(sample, self.unit)

    def cost_of_tokens(self, length: int) -> int:
        """Returns the cost of a token sequence of this length in the budget."""
        return cost_of_tokens(length, self.unit)

    def choose_slot(
        self, task: str, cost: int = 1, label: int | None = None, weight: float = 1.0, rank: int | None = None
    ) -> int | None:
        """Decides on the next sample of the stream before it is loaded: its slot, or None.

        Args:
            task: the name of its task.
            cost: what it takes of the budget.
            label: its class, for ``class_balanced``.
            weight: for ``surprise``.
            rank: for ``herding`` and ``k_center``.

        Raises:
            ValueError: if it is larger than the whole budget, or has no label where one is needed.
        """
        check_fits(cost, task, self.capacity, self.unit)
        key = draw_key(self.policy, self._rng, self.seen, weight, rank)
        self.seen_of[task] += 1
        slot, left = self._slots.choose(group_of(self.policy, task, label), key, cost, task)
        self._evict(left)
        return slot

    def put(
        self, slot: int, sample: Any, task: str, *, position: int = -1, extra: dict[str, Tensor] | None = None
    ) -> int:
        """Stores a sample under the slot that :meth:`choose_slot` gave.

        Returns:
            the number of its record.

        Raises:
            TypeError: if the sample cannot be stored without pickle.
            OSError: if the disk is full. Either way the slot is given back.
        """
        label = label_of(sample) if self.policy.group == "class" else None
        try:
            number = self.store.append(sample, task, position, -1 if label is None else label, extra)
        except (OSError, TypeError):
            self.give_back(slot)
            raise
        self.put_number(slot, number)
        return number

    def put_expected(self, slots: Sequence[int]) -> None:
        """Says that the rank that writes stores samples under these slots, one after the other."""
        assert isinstance(self.store, DiskStore)
        for slot, number in zip(slots, self.store.expect(len(slots)), strict=True):
            self.put_number(slot, number)

    def put_number(self, slot: int, number: int) -> None:
        """Says which record of the store is in a slot."""
        self._slots.put(slot, number)

    def is_waiting(self, slot: int) -> bool:
        """Returns True if a slot of :meth:`choose_slot` still waits for its sample; a later one may have taken it."""
        return self._slots.is_waiting(slot)

    def give_back(self, slot: int) -> None:
        """Leaves a slot of :meth:`choose_slot` empty after all."""
        self._evict(self._slots.release([slot]))

    def _evict(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.store.evict(number)

    # ------------------------------------------------------------------ removing

    def remove(self, predicate: Callable[[Stored], bool]) -> int:
        """Removes samples for good: they are not drawn any more, and their content is overwritten on the disk.

        They are not stored again, also not by a run that resumes from an older checkpoint. No buffer can reach the
        data sets, their cache of tokens, and batches that are already loaded. A buffer in memory cannot reach the
        checkpoints that were written before, either. Call it on all ranks.

        Args:
            predicate: gets a :class:`Stored` and returns True if that sample is to be removed.

        Returns:
            the number of removed records, with copies that other or earlier runs left in the folder.
        """
        self.store.commit()
        found = erase_found(self.store, predicate)
        self._evict(self._slots.release([slot for slot in self._slots.filled() if self._slots[slot] in found[0]]))
        self.write_index()
        return sum(map(len, found))

    def clear(self) -> None:
        """Removes all samples from the buffer, and forgets what was seen."""
        self._evict(self.numbers)
        self.seen_of.clear()
        self._slots = Slots(self.capacity)

    # ------------------------------------------------------------------ keeping

    def hold(self) -> None:
        """Keeps the records stored now for plans, until the next call; meanwhile the buffer may add samples."""
        self._slots.hold()
        self._hold()

    def move_to(self, store: DiskStore) -> None:
        """Moves all samples to another store, which is used from now on."""
        old, self.store = self.store, store
        self._renumber(store.take_over(old, self.numbers))

    def _renumber(self, numbers: Sequence[int]) -> None:
        self._slots.renumber(numbers)
        self._hold()

    def _hold(self) -> None:
        if self._slots.held is not None:
            self.store.hold(self._slots.held)

    def adopt(self) -> None:
        """Resumes from what an earlier run has left in the folder, if anything.

        Raises:
            ValueError: if it was of another budget, policy or tokenizer.
            DamagedFileError: if a file is damaged; it is named.
        """
        if not isinstance(self.store, DiskStore):
            return
        folder = self.store.folder
        state = read_state(folder)
        if state is not None:
            try:
                self.load_state_dict(state)
            except ValueError as error:
                raise type(error)(f"folder={str(folder)!r}: {error}") from error

    def flush(self) -> None:
        """Lets other processes see what was stored."""
        self.store.flush()

    def commit(self) -> None:
        """Makes what was stored outlive a crash."""
        self.store.commit()

    def compact(self, least: int = 1 << 20, agreed: Callable[[bool], bool] = bool) -> None:
        """Frees the disk space of evicted samples, if they take most of it. Call it between tasks.

        Replaced files are deleted at the next call. From then on no run resumes from a checkpoint that needs them.

        Args:
            least: the number of bytes that must be gained.
            agreed: gets True if this process would do it, and returns True if all processes would.
        """
        if not isinstance(self.store, DiskStore):
            return
        self.store.delete_replaced()
        if not agreed(self.store.is_wasteful(self.numbers, least)):
            return
        self._renumber(self.store.rewrite(self.numbers))
        self.write_index()

    def write_index(self) -> None:
        """Writes next to the segments which records are in the buffer: ``live.json``, and what :meth:`adopt` reads."""
        store = self.store
        if not isinstance(store, DiskStore) or not store.writes or not store.has_folder:
            return
        write_live(store.folder, store.describe(self.numbers))
        write_state(store.folder, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as tensors and plain containers; a buffer on disk names its records only."""
        numbers, slots = self._slots.state_dict(self.store.is_erased)
        return {
            "capacity": self.capacity,
            "unit": self.unit,
            "policy_name": self.policy_name,
            "rng": self._rng.getstate(),
            "seen_of": dict(self.seen_of),
            **slots,
            "store": self.store.state_dict(numbers),
        }

    def load_state_dict(self, state: dict[str, Any], folders: Sequence[Path] = ()) -> None:
        """Restores :meth:`state_dict`. What was removed since stays removed.

        Args:
            state: of a buffer with this budget and policy.
            folders: where the files are looked for that are not where they were.

        Raises:
            ValueError: if the state is of a buffer with another budget, policy, storage or tokenizer.
            FileNotFoundError: if a file of the buffer is missing.
            DamagedFileError: if one is damaged; it is named.
        """
        for name, ours in (("capacity", self.capacity), ("unit", self.unit), ("policy_name", self.policy_name)):
            if state[name] != ours:
                argument = {"capacity": "buffer_size", "policy_name": "policy"}.get(name, name)
                theirs = f"the checkpoint, which was written with {state[name]!r}"
                raise ValueError(f"{argument}={ours!r} does not fit {theirs}")
        numbers = self.store.load_state_dict(state["store"], folders)
        self._slots = Slots(self.capacity)
        self._rng.setstate(state["rng"])
        self.seen_of = Counter(state["seen_of"])
        self._slots.load_state_dict(state, numbers)
        self._hold()
        # What was removed after the checkpoint was written.
        self._evict(
            self._slots.release([slot for slot in self._slots.filled() if self.store.is_erased(self._slots[slot])])
        )
