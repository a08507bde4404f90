"""The examples in docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import lightning_cl

ROOT = Path(lightning_cl.__file__).parent
MODULES = [
    ".".join(("lightning_cl", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("callbacks", "export", "functional", "data", "evaluation", "integrations", "passes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "\n        >>> " in path.read_text(encoding="utf-8") or "\n    >>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_callback_has_an_example():
    penalties = ("EWC", "KFACEWC", "L2SP", "LwF", "MAS", "RWalk", "SI")
    replay = ("AGEM", "DER", "DERpp", "GeneralReplay", "Replay", "SelfReplay")
    probes = ("GeneralProbe", "KLToBase", "LMEvalProbe", "LossCurves", "PromptSamples", "RecoveryProbe")
    monitoring = ("ForgettingBudget", *probes, "TaskMatrix", "TaskProgress")
    for name in (*penalties, *replay, *monitoring):
        assert ">>>" in getattr(lightning_cl, name).__doc__, name
