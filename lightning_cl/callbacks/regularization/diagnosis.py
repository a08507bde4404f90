"""Numbers that describe an importance, so that a penalty without effect is noticed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cl.core.placement import whole
from lightning_cl.core.questions import Need

_SAMPLED_VALUES = 1_000_000
_NOTHING = 1e-5  # a penalty with a smaller share of the task's pull does nothing
_LITTLE = 0.01  # with a smaller share it does not slow a task down
_FAINT = 1e-3  # an importance below this share of an earlier task's is far smaller


@torch.no_grad()
def describe_importance(importance: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the number of parameters, total, share of zeros, and quantiles (of at most a million values)."""
    count = sum(t.numel() for t in importance.values())
    if count == 0:
        return {"parameters": 0, "total": 0.0, "share_of_zeros": 1.0, "quantiles": {}, "layers": {}}
    stride = max(1, count // _SAMPLED_VALUES)
    values = torch.cat([whole(t).flatten()[::stride].float().cpu() for t in importance.values()])
    values = values.sort().values
    quantiles = {str(q): float(values[min(int(q * len(values)), len(values) - 1)]) for q in (0.0, 0.5, 0.9, 0.99, 1.0)}
    return {
        "parameters": count,
        "total": sum(float(whole(t.sum(dtype=torch.float64))) for t in importance.values()),
        "share_of_zeros": float((values == 0).float().mean()),
        "quantiles": quantiles,
        "layers": mean_by_layer(importance),
    }


@torch.no_grad()
def mean_by_layer(importance: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Returns the mean importance of each kind of tensor in each layer, for the picture.

    Returns:
        kind (a name with ``*`` for its layer's number, as ``model.layers.*.self_attn.q_proj.weight``) to layer to mean.
        The layer is its number, or an empty text outside of the numbered layers.
    """
    sums: dict[str, dict[str, float]] = {}
    for name, tensor in importance.items():
        found = re.search(r"(^|\.)(\d+)\.", name)
        layer = found.group(2) if found else ""
        kind = f"{name[: found.start(2)]}*{name[found.end(2) :]}" if found else name
        sums.setdefault(kind, {})[layer] = float(whole(tensor.float().mean()))
    return sums


# ---------------------------------------------------------------------- in words

_SPOILT = {
    "spoilt_steps": "in {} steps a gradient was NaN or infinite; the weights concerned were not followed in them",
    "left_out": "the loss of {} samples was NaN or infinite; the importance is that of the others",
    "not_finite": "the importance of {} weights was not finite; they are not protected",
}


def compare_with_earlier(mean: float | None, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Notes a measured importance far below an earlier task's; once normalized, it may be mostly noise.

    Args:
        mean: the number that the importance was divided by; None if it was not divided.
        earlier: the diagnoses of earlier tasks.

    Returns:
        ``faint``: the task that the importance is compared with, the ratio of the means, and a sentence about them; an
        empty dictionary if the importance is large enough.
    """
    means = [(entry["normalized_by"], str(entry["task"])) for entry in earlier if entry.get("normalized_by")]
    if not mean or not means or mean >= _FAINT * max(means)[0]:
        return {}
    largest, task = max(means)
    words = (
        f"the measured importance is {mean:.1e} on average, {mean / largest:.0e} times that of {task!r}: normalize=True"
        " brings both to one mean, and with it what may be noise (a task learnt nearly perfectly, or hardly at all);"
        " normalize=False keeps their ratio"
    )
    return {"faint": {"task": task, "ratio": mean / largest, "words": words}}


def warning_of(entry: Mapping[str, Any], apply: str, auto: bool) -> str | None:
    """Returns the warning at a task's end if a penalty did nothing, or pulled harder than the task.

    Args:
        entry: ``strength``, ``largest_share``, ``too_strong`` and ``excess`` of the task.
        apply: ``gradient`` or ``proximal``.
        auto: True if the strength was chosen automatically.
    """
    share, strength = entry["largest_share"], f"strength={entry['strength']:.3g}"
    pull = "the penalty's gradient was" if apply == "gradient" else "the penalty's pull was"
    task = "the task's" if apply == "gradient" else "the optimizer's step"
    other = "" if auto else ", or strength='auto'"
    if share is None:
        return None
    if share == 0:
        return f"{pull} zero: no parameter that is important was trained, or none has moved"
    if share < _NOTHING:
        return (
            f"{pull} at most {share:.0e} of {task}: at {strength} it does nothing. Try a strength about"
            f" {0.1 / share:.0e} times as large{other}"
        )
    if entry["too_strong"]:
        excess = entry["excess"]
        lower = "a lower share" if auto else f"a strength about {0.1 / excess:.0e} times as large{other}"
        return (
            f"{pull} up to {excess:.2g} times the largest of {task}: {strength} is too strong, it holds the task back."
            f" Try {lower}"
        )
    return None


def sentences_of(name: str, entry: Mapping[str, Any], apply: str) -> list[str]:
    """Returns sentences on a penalty's effect during a task, and on problems of the measurement at its end."""
    said = []
    if "strength" in entry:
        share = entry["largest_share"]
        pull = "its gradient" if apply == "gradient" else "its pull"
        task = "the task's" if apply == "gradient" else "the optimizer's step"
        pulled = f", {pull} at most {share:.2g} times {task}" if share is not None else ""
        verdict = ": too strong" if entry.get("too_strong") else ""
        verdict = ": it did nothing" if share is not None and share < _NOTHING else verdict
        held = f"strength {entry['strength']:.3g}, penalty {entry['penalty']:.3g} at the end{pulled}{verdict}"
        said.append(f"{name}, {entry['task']}: {held}")
    odd = [entry["faint"]["words"]] if "faint" in entry else []
    odd += [words.format(entry[key]) for key, words in _SPOILT.items() if entry.get(key)]
    return said + [f"{name}, {entry['task']}: {words}" for words in odd]


def advice_of(name: str, need: Need, diagnoses: Sequence[Mapping[str, Any]], what: str, value: float) -> str | None:
    """Returns advice on the arguments of a penalty, from its effect during the tasks.

    Args:
        name: the method's name.
        need: ``keep`` or ``learn``.
        diagnoses: the diagnoses of all tasks.
        what: the argument that sets how strong the penalty is, ``strength`` or ``share``.
        value: the value of that argument.
    """
    excess = [entry["excess"] for entry in diagnoses if entry.get("too_strong")]
    if excess:
        pulled = f"pulled up to {max(excess):.2g} times as hard as the task itself"
        if need == "learn":
            return f"a lower {name}({what}=…), {value:g} now, which is too strong: it {pulled}"
        return f"stored samples next to {name}, and no higher {what}: it {pulled}, which is too strong already"
    held = [entry["largest_share"] for entry in diagnoses if entry.get("largest_share") is not None]
    if need == "learn" and held and max(held) < _LITTLE:
        return None  # the penalty is not what slows the task down
    if value == 0:
        return f"{name}(strength='auto'): at 0 it protects nothing" if need == "keep" else None
    return f"a {'higher' if need == 'keep' else 'lower'} {name}({what}=…), {value:g} now, as long as the average gains"
