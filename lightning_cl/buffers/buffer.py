"""The buffer: samples of earlier tasks within a budget, chosen by a policy, in memory or on disk."""

from __future__ import annotations

import json
import random
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cl.buffers.disk.encoding import encode
from lightning_cl.buffers.disk.folder import Stored, found_in
from lightning_cl.buffers.disk.layout import ALIGNMENT, RECORD, DamagedFileError
from lightning_cl.buffers.disk.store import DiskStore
from lightning_cl.buffers.memory import MemoryStore
from lightning_cl.buffers.policies import POLICIES, PolicyName, draw_key
from lightning_cl.buffers.selection import Selection, spread
from lightning_cl.buffers.store import Info, Store, as_numbers, wait_for_all_ranks, was_removed
from lightning_cl.buffers.tokens import label_of, token_count
from lightning_cl.files import replace_file
from lightning_cl.random_state import seed_of

Unit = Literal["samples", "tokens", "bytes"]
_EMPTY, _WAITING = -1, -2
_STATE = "buffer.pt"
_RECORD_BYTES = RECORD.itemsize  # what a record takes next to its content


class ReplayBuffer:
    """Samples of earlier tasks, each with the name of its task.

    A sample is anything that a data set returns, as long as it is made of tensors, arrays, numbers, texts and plain
    containers. A token sequence takes 4 bytes and a bit per token, and 64 bytes. Insertion takes O(log n), a rejection
    O(1). With the same seed and the same stream the content is the same in every process.

    Args:
        capacity: the budget.
        policy: ``reservoir``: uniform over everything seen. ``task_balanced``, ``class_balanced``: equal shares for the
            tasks or classes, uniform within each; what a small one does not need, the others get. ``fifo``: the newest.
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
        if unit not in ("samples", "tokens", "bytes"):
            raise ValueError(f"unit={unit!r}: expected 'samples', 'tokens' or 'bytes'")
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"buffer_size={capacity!r}: expected a positive number of {unit}")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: expected one of {sorted(POLICIES)}")
        self.capacity, self.policy_name, self.unit = capacity, policy, unit
        self.policy = POLICIES[policy]
        self.store: Store = MemoryStore() if store is None else store
        self._rng = random.Random(seed)
        self.seen_of: Counter[str] = Counter()
        self._clear()

    def _clear(self) -> None:
        self._selection = Selection(self.capacity)
        # One entry per slot of it: the record's number, or one of the marks, and the task.
        self._numbers, self._tasks = array("q"), array("i")
        self._task_names: list[str] = []
        self._count = 0
        self._per_task: Counter[str] = Counter()
        self._held: array[int] | None = None

    # ------------------------------------------------------------------ looking

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self.store.get(self.numbers[index])

    @property
    def numbers(self) -> Sequence[int]:
        """The record numbers of the stored samples."""
        if self._count == len(self._numbers):
            return self._numbers
        return array("q", (number for number in self._numbers if number >= 0))

    @property
    def held(self) -> Sequence[int]:
        """The records that a task's batches are planned from: those of :meth:`hold`, or without it all that are stored.

        Among them may be some that were removed since.
        """
        return self.numbers if self._held is None else self._held

    @property
    def items(self) -> list[Any]:
        """The stored samples, all of them in memory."""
        return [self.store.get(number) for number in self.numbers]

    @property
    def tasks(self) -> list[str]:
        """For each stored sample the name of its task."""
        return [self._task_names[self._tasks[slot]] for slot in self._slots()]

    @property
    def task_names(self) -> list[str]:
        """The tasks of all samples that ever were in the buffer, in order."""
        return list(self._task_names)

    @property
    def slots(self) -> int:
        """Places for records, filled or not."""
        return len(self._numbers)

    def pick(self, value: int, task: str | None = None, slots: int | None = None) -> int | None:
        """The record that a large random number stands for, in O(1); of a task, as many tries as it is rare.

        Args:
            value: equally likely numbers give equally likely records.
            task: only of this task.
            slots: only of the first so many (:attr:`slots`); all, by default.
        """
        wanted = None if task is None else self._task_names.index(task)
        slots = min(slots or len(self._numbers), len(self._numbers))
        for place in chain((seed_of(value, i) % slots for i in range(256)), range(slots)):
            if self._numbers[place] >= 0 and wanted in (None, self._tasks[place]):
                return self._numbers[place]
        return None

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
        """Of records: ``length``, ``loss_tokens`` and ``task`` (its place in :attr:`task_names`)."""
        if array("q", numbers) == array("q", self.numbers):
            tasks = array("i", (self._tasks[slot] for slot in self._slots()))
        else:
            places = {name: place for place, name in enumerate(self._task_names)}
            tasks = array("i", (places[self.store.info(number).task] for number in numbers))
        return {**self.store.columns(numbers), "task": tasks}

    def counts(self) -> dict[str, int]:
        """Counts the stored samples of each task."""
        return {task: count for task, count in self._per_task.items() if count}

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
            position: its place in the task's data.
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
        if self.unit == "samples":
            return 1
        if self.unit == "tokens":
            tokens = token_count(sample)
            if tokens == 0:
                raise ValueError("unit='tokens': a sample is no token sequence; give unit='samples' or 'bytes'")
            return tokens
        encoded = encode(sample)
        return encoded.size + 4 * (-encoded.length % ALIGNMENT) + _RECORD_BYTES

    def cost_of_tokens(self, length: int) -> int:
        """Returns the cost of a token sequence of this length in the budget."""
        blocks = -(-length // ALIGNMENT)  # each takes a byte of the mask
        return {"samples": 1, "tokens": length, "bytes": blocks * (4 * ALIGNMENT + 1) + _RECORD_BYTES}[self.unit]

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
        if cost > self.capacity:
            raise ValueError(
                f"buffer_size={self.capacity}: a sample of task {task!r} takes {cost} {self.unit}, more than the whole"
                f" budget; give at least {cost}"
            )
        key = draw_key(self.policy, self._rng, self.seen, weight, rank)
        self.seen_of[task] += 1
        slot, gone = self._selection.choose(self._group(task, label), key, cost)
        for left in gone:
            self._let_go(left)
        if slot is None:
            return None
        if task not in self._task_names:
            self._task_names.append(task)
        if slot == len(self._numbers):
            self._numbers.append(_WAITING)
            self._tasks.append(0)
        self._numbers[slot], self._tasks[slot] = _WAITING, self._task_names.index(task)
        return slot

    def put(
        self,
        slot: int,
        sample: Any,
        task: str,
        *,
        position: int = -1,
        extra: dict[str, Tensor] | None = None,
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
        self._numbers[slot] = number
        self._count += 1
        self._per_task[self._task_names[self._tasks[slot]]] += 1

    def is_waiting(self, slot: int) -> bool:
        """True if a slot of :meth:`choose_slot` is still to be filled: a later sample may have taken its place."""
        return self._numbers[slot] == _WAITING

    def give_back(self, slot: int) -> None:
        """Leaves a slot of :meth:`choose_slot` empty after all."""
        self._drop([slot])

    def _group(self, task: str, label: int | None) -> str:
        kind = self.policy.group
        if kind == "class" and label is None:
            raise ValueError(
                f"policy='class_balanced': a sample of task {task!r} has no class; expected (input, class) or a"
                " dictionary with `label` or `labels`, a whole number"
            )
        return {"all": "", "task": task, "class": str(label)}[kind]

    def _let_go(self, slot: int) -> None:
        number = self._numbers[slot]
        if number >= 0:
            self._count -= 1
            self._per_task[self._task_names[self._tasks[slot]]] -= 1
            self.store.evict(number)
        self._numbers[slot] = _EMPTY

    # ------------------------------------------------------------------ removing

    def remove(self, predicate: Callable[[Stored], bool]) -> int:
        """Removes samples for good: from now on they are not drawn, and their content is overwritten on the disk.

        They are not stored again, also not by a run that resumes from an older checkpoint. What no buffer can reach:
        the data sets, their cache of tokens, batches that are already on their way, and for a buffer in memory the
        checkpoints that were written before. Call it on all ranks.

        Args:
            predicate: gets a :class:`Stored`, says whether it shall go.

        Returns:
            how many records were removed, with copies that other or earlier runs have left in the folder.
        """
        self.store.commit()
        wait_for_all_ranks()
        # Everything that is on the disk, and not only what may still be drawn.
        stores = [self.store, *self.store.copies()]
        found = [found_in(store, predicate) for store in stores]
        wait_for_all_ranks()  # they have read what is about to be erased
        for store, keys in zip(stores, found, strict=True):
            store.erase(keys)
        self._drop([slot for slot in self._slots() if self._numbers[slot] in found[0]])
        self.write_index()
        return sum(map(len, found))

    def _slots(self) -> Iterator[int]:
        return (slot for slot, number in enumerate(self._numbers) if number >= 0)

    def _drop(self, slots: Sequence[int]) -> None:
        self._selection.release(slots)
        for slot in slots:
            self._let_go(slot)

    def clear(self) -> None:
        """Lets all samples go; what was seen is forgotten too."""
        for slot in list(self._slots()):
            self.store.evict(self._numbers[slot])
        self.seen_of.clear()
        self._clear()

    # ------------------------------------------------------------------ keeping

    def hold(self) -> None:
        """Plans are made from what is stored now, until the next call: whatever comes in, and after a resume too.

        For a buffer that takes in samples while its others are replayed by a plan.
        """
        self._held = array("q", self.numbers)
        self.store.hold(self._held)

    def move_to(self, store: DiskStore) -> None:
        """Keeps samples in another store from now on; what is there goes along."""
        old, self.store = self.store, store
        store.refuse(old.removed)
        slots = list(self._slots())
        before = [self._numbers[slot] for slot in slots]
        if store.writes:
            for slot, number in zip(slots, before, strict=True):
                info, extra = old.info(number), old.extra(number)
                self._numbers[slot] = store.append(old.get(number), info.task, info.position, info.label, extra)
            store.commit()
        else:
            self._number(slots, store.expect(len(slots)))
        self._renumber_held(before, [self._numbers[slot] for slot in slots])

    def _number(self, slots: Sequence[int], numbers: Sequence[int]) -> None:
        for slot, number in zip(slots, numbers, strict=True):
            self._numbers[slot] = number

    def _renumber_held(self, before: Sequence[int], after: Sequence[int]) -> None:
        if self._held is not None:
            new = dict(zip(before, after, strict=True))
            self._held = array("q", (new[number] for number in self._held if number in new))
            self.store.hold(self._held)

    def adopt(self) -> None:
        """Goes on with what an earlier run has left in the folder, if anything.

        Raises:
            ValueError: if it was of another budget, policy or tokenizer.
            DamagedFileError: if a file is damaged; it is named.
        """
        if isinstance(self.store, DiskStore) and (self.store.folder / _STATE).is_file():
            path = self.store.folder / _STATE
            try:
                with zipfile.ZipFile(path) as archive:
                    part = archive.testzip()  # by their checksums, which torch.load does not look at
                if part is not None:
                    raise ValueError(f"the checksum of {part} does not fit")
                state = torch.load(path, weights_only=True)
            except Exception as error:  # of any kind, from a damaged archive
                raise DamagedFileError(f"{path}: damaged ({error})") from error
            try:
                self.load_state_dict(state)
            except ValueError as error:
                raise type(error)(f"folder={str(self.store.folder)!r}: {error}") from error

    def flush(self) -> None:
        """Lets other processes see what was stored."""
        self.store.flush()

    def commit(self) -> None:
        """Makes what was stored outlive a crash."""
        self.store.commit()

    def compact(self, least: int = 1 << 20, agreed: Callable[[bool], bool] = bool) -> None:
        """Gives room on the disk back, if most of it is taken by samples that were let go; between tasks.

        What is replaced is deleted the next time: checkpoints from before cannot be gone on with then.

        Args:
            least: bytes that are worth it.
            agreed: gets whether this process would do it, and gives whether all do.
        """
        if not isinstance(self.store, DiskStore):
            return
        self.store.delete_replaced()
        slots = list(self._slots())
        before = [self._numbers[slot] for slot in slots]
        if not agreed(self.store.is_wasteful(before, least)):
            return
        numbers = self.store.rewrite(before)
        self._number(slots, numbers)
        self._renumber_held(before, numbers)
        self.write_index()

    def write_index(self) -> None:
        """Writes next to the segments which records are in the buffer: ``live.json``, and what :meth:`adopt` reads."""
        store = self.store
        if not isinstance(store, DiskStore) or not store.writes or not store.has_folder:
            return
        content = json.dumps(store.describe(self.numbers))
        replace_file(store.folder / "live.json", lambda path: path.write_text(content, encoding="utf-8"))
        state = self.state_dict()
        replace_file(store.folder / _STATE, lambda path: torch.save(state, path))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain containers; of a buffer on disk, which records are in it."""
        slots = list(self._slots())
        numbers = [self._numbers[slot] for slot in slots]
        stored = set(numbers)
        held = [number for number in self._held or () if number in stored or not self.store.is_erased(number)]
        numbers += [number for number in held if number not in stored]
        places = {number: place for place, number in enumerate(numbers)}

        return {
            "capacity": self.capacity,
            "unit": self.unit,
            "policy_name": self.policy_name,
            "rng": self._rng.getstate(),
            "seen_of": dict(self.seen_of),
            **self._selection.state_dict(slots),
            "tasks": torch.tensor([self._tasks[slot] for slot in slots], dtype=torch.int32),
            "task_names": list(self._task_names),
            "held": None if self._held is None else as_numbers([places[number] for number in held]),
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
                raise ValueError(
                    f"{argument}={ours!r} does not fit the checkpoint, which was written with {state[name]!r}"
                )
        numbers = self.store.load_state_dict(state["store"], folders)
        self._clear()
        self._rng.setstate(state["rng"])
        self.seen_of = Counter(state["seen_of"])
        self._selection.load_state_dict(state)
        self._count = len(state["slots"])  # behind them are some that are only held
        self._numbers = spread("q", state, numbers[: self._count], _EMPTY)
        self._tasks, self._task_names = spread("i", state, state["tasks"]), list(state["task_names"])
        if state["held"] is not None:
            self._held = array("q", numbers[state["held"]].tolist())
            self.store.hold(self._held)
        self._per_task = Counter(self.tasks)
        # What was removed after the checkpoint was written.
        self._drop([slot for slot in self._slots() if self.store.is_erased(self._numbers[slot])])
