"""The report of a guard at the end: sentences, and the losses of single sequences for ``lightning-cl gate``."""

from __future__ import annotations

import json
import math
from typing import Any, Protocol

from lightning_cl.callbacks.monitoring.guard_sets import GuardSets
from lightning_cl.core.run_state import RunState
from lightning_cl.functional.guard import Rise, allowed_rise, kept_share, look_error, paired_rise

_TOLD = 10  # actions, each with a sentence


class Guard(Protocol):
    """All that is asked of the callback."""

    sets: GuardSets
    looks: list[dict[str, Any]]
    run: RunState
    unit: Any
    budget: float
    confidence: float
    seconds: float


def guard_sentences(guard: Guard) -> list[str]:
    """Returns one sentence for each guarded task, each action, and the time that looks took."""
    told = [words for name in guard.sets.sets if (words := _task_sentence(guard, name)) is not None]
    acted = [entry for entry in guard.looks if entry["action"]]
    for entry in acted[:_TOLD]:
        rise = f"{entry['D']:+.3g} nats" if math.isfinite(entry["D"]) else "a loss that is not finite"
        told.append(
            f"ForgettingBudget, step {entry['step']}, training {entry['training']}: {entry['task']} {rise}, allowed"
            f" {entry['allowed']:.3g}: {entry['action']}"
        )
    if len(acted) > _TOLD:
        told.append(f"ForgettingBudget: {len(acted) - _TOLD} more actions are in report.json")
    if any(entry["action"] not in ("", "warn", "none") for entry in guard.looks):
        told.append(
            "ForgettingBudget: its sequences are a part of the validation data that the matrix is measured on, so that"
            " scores after an action are chosen on them, a little"
        )
    trained = sum(cost.get("train_seconds", 0.0) for cost in guard.run.costs)
    if guard.looks and trained > 0:
        told.append(f"ForgettingBudget: its looks took {guard.seconds / trained:.1%} of the time of training")
    return told


def final_decisions(guard: Guard) -> dict[str, str]:
    """Returns for each guarded task what is sure at the end: ``safe``, ``breach`` or ``uncertain``."""
    found = {name: _final(guard, name) for name in guard.sets.sets}
    return {name: rise.decision for name, rise in found.items() if rise is not None}


def _final(guard: Guard, name: str) -> Rise | None:
    """Compares a task's losses at the end with those when it was learnt; None for the task that was learnt last.

    The error probability is divided among the tasks, so that all verdicts hold together, as those of the gate.
    """
    judged = {
        task: one
        for task, one in guard.sets.sets.items()
        if one.reference is not None and one.now is not None and guard.run.position.name != task
    }
    if name not in judged:
        return None
    one = judged[name]
    assert one.now is not None
    assert one.reference is not None
    allowed = allowed_rise(guard.unit, guard.budget, one.reference, None if one.watched else one.before)
    return paired_rise(one.now, one.reference, allowed, look_error(2.0 * (1.0 - guard.confidence), 1, len(judged)))


def _task_sentence(guard: Guard, name: str) -> str | None:
    one, rise = guard.sets.sets[name], _final(guard, name)
    if rise is None:
        return None
    if not math.isfinite(rise.mean):
        return f"ForgettingBudget, {name}: a loss is not finite"
    verdict = {"safe": "within the budget", "breach": "over the budget", "uncertain": "too close to be sure"}
    since = "the first task began" if one.watched else "it was learnt"
    words = (
        f"ForgettingBudget, {name}: loss {rise.mean:+.3g} ± {rise.rise_margin:.2g} nats since {since} ({rise.size}"
        f" sequences, {guard.confidence:.0%} for all tasks), allowed {rise.allowed:.3g}: {verdict[rise.decision]}"
    )
    assert one.now is not None
    assert one.reference is not None
    kept = kept_share(one.now, one.reference, one.before) if one.before is not None else math.nan
    if not math.isfinite(kept):
        return words
    told = (
        f"{kept:.0%} of what its training gave is kept" if kept >= 0 else "all that its training gave is lost, and more"
    )
    return f"{words}; {told}"


def losses_file(guard: Guard, trained: int) -> str:
    """Returns the content of ``losses.json``: for each task the losses of its sequences, in nats.

    ``before`` its own training (null for a watched task), when ``learnt`` (a watched task: before the first task), and
    ``now``. A loss that is not finite is null.
    """
    tasks = {
        name: {
            "watched": one.watched,
            **{
                key: None if losses is None else [value if math.isfinite(value) else None for value in losses.tolist()]
                for key, losses in (("before", one.before), ("learnt", one.reference), ("now", one.now))
            },
        }
        for name, one in guard.sets.sets.items()
    }
    content = {"format": 1, "trained": trained, "confidence": guard.confidence, "tasks": tasks}
    return json.dumps(content, indent=1) + "\n"
