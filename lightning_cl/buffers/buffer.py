"""The buffer: samples in memory, chosen by a policy."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Literal

from lightning_cl.buffers import samples as storage
from lightning_cl.buffers.policies import Policy, Reservoir, TaskBalanced

POLICIES: dict[str, type[Reservoir] | type[TaskBalanced]] = {"reservoir": Reservoir, "task_balanced": TaskBalanced}


class ReplayBuffer:
    """Samples of earlier tasks, as many as `capacity`, each with the name of its task.

    A sample is anything that a data set returns, as long as it is made of tensors, arrays, numbers, texts and plain
    containers. Insertion is O(1). With the same seed and the same stream the content is the same in every process.

    Args:
        capacity: the largest number of samples.
        policy: ``reservoir`` (uniform over everything seen) or ``task_balanced`` (equal shares for the tasks).
        seed: seed of the random choices.

    Attributes:
        items: the samples.
        tasks: for each sample the name of its task.
        seen: how many samples were offered so far.

    Raises:
        ValueError: if capacity or policy is not one of the above.
    """

    def __init__(
        self, capacity: int, policy: Literal["reservoir", "task_balanced"] = "reservoir", seed: int = 0
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"buffer_size={capacity!r}: expected a positive number of samples")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: expected one of {sorted(POLICIES)}")
        self.capacity = capacity
        self.policy_name = policy
        self._policy: Policy = POLICIES[policy]()
        self._rng = random.Random(seed)
        self.items: list[Any] = []
        self.tasks: list[str] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def add(self, sample: Any, task: str) -> None:
        """Offers one sample of the stream."""
        slot = self.choose_slot(task)
        if slot is not None:
            self.put(slot, sample, task)

    def choose_slot(self, task: str) -> int | None:
        """Decides on the next sample of the stream before it is loaded: its slot, or None."""
        self.seen += 1
        return self._policy.place(self.capacity, task, self._rng)

    def put(self, slot: int, sample: Any, task: str) -> None:
        """Writes a copy of a sample to the slot that :meth:`choose_slot` gave.

        Raises:
            TypeError: if the sample cannot be stored without pickle.
        """
        sample = storage.own(sample)
        if slot == len(self.items):
            self.items.append(sample)
            self.tasks.append(task)
        else:
            self.items[slot], self.tasks[slot] = sample, task

    def counts(self) -> dict[str, int]:
        """How many samples of each task are stored."""
        return dict(Counter(self.tasks))

    def size_in_bytes(self) -> int:
        """The bytes of the stored samples."""
        return sum(storage.size_in_bytes(sample) for sample in self.items)

    def state_dict(self) -> dict[str, Any]:
        """Samples, tasks, count and random state, as tensors and plain containers."""
        return {
            "capacity": self.capacity,
            "policy_name": self.policy_name,
            "policy": self._policy.state_dict(),
            "rng": self._rng.getstate(),
            "seen": self.seen,
            "tasks": list(self.tasks),
            "samples": storage.pack(self.items),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: if the state is of a buffer with another capacity or policy.
        """
        for name, ours in (("capacity", self.capacity), ("policy_name", self.policy_name)):
            if state[name] != ours:
                argument = {"capacity": "buffer_size", "policy_name": "policy"}[name]
                raise ValueError(
                    f"{argument}={ours!r} does not fit the checkpoint, which was written with {state[name]!r}"
                )
        self._policy.load_state_dict(state["policy"])
        self._rng.setstate(state["rng"])
        self.seen = state["seen"]
        self.tasks = list(state["tasks"])
        self.items = storage.unpack(state["samples"])
