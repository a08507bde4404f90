"""A controller that brings a KL divergence to a stated value, by the strength of a penalty."""

from __future__ import annotations

import math

_INTEGRAL, _PROPORTIONAL = 0.1, 0.4
_ON_ITS_WAY = 1.1  # a divergence that changes by this factor between two updates needs no further push


def controlled_strength(strength: float, kl: float, last: float | None, target: float) -> float:
    """Returns the next strength of a penalty that is to bring a divergence to `target`.

    It is the multiplicative controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), which multiplies the
    strength by ``1 + K · clip(KL / target − 1)`` at each update. A task has far fewer updates than their training. So
    the error is in logarithms here, the steps are larger, and a proportional part damps them::

        e_k = clip(ln(KL_k / target), −2, 2)
        strength_{k+1} = strength_k · exp(0.1 · e_k + 0.4 · (e_k − e_{k−1}))

    The first part is left out while the divergence moves towards the target by more than a tenth between two updates.
    Right after a switch of tasks, the divergence grows from 0 by itself. With these factors the loop is stable also if
    the divergence follows the strength at once, as ``strength^−2``.

    Args:
        strength: the present strength, above 0.
        kl: the present divergence, in any unit.
        last: the divergence at the update before; None at the first one.
        target: the wanted divergence, above 0, in the same unit.

    Example:
        >>> from lightning_cl.functional.kl_budget import controlled_strength
        >>> controlled_strength(1.0, kl=0.1, last=0.1, target=0.1)
        1.0
        >>> controlled_strength(1.0, kl=0.2, last=0.2, target=0.1) > 1.0
        True
    """
    error = _error(kl, target)
    before = error if last is None else _error(last, target)
    arrives = last is not None and (
        (kl < target and kl > _ON_ITS_WAY * last) or (kl > target and _ON_ITS_WAY * kl < last)
    )
    return strength * math.exp((0.0 if arrives else _INTEGRAL * error) + _PROPORTIONAL * (error - before))


def _error(kl: float, target: float) -> float:
    return max(-2.0, min(2.0, math.log(kl / target))) if kl > 0 else -2.0
