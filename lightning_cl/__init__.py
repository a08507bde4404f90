"""Continual learning for large language models as PyTorch Lightning callbacks.

The names below are loaded when they are first used, so that ``lightning_cl.functional`` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_cl.version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_cl.callbacks import (
        AGEM,
        DER,
        EWC,
        KFACEWC,
        L2SP,
        MAS,
        MIGU,
        SI,
        BlockExpansion,
        DERpp,
        ForgettingBudget,
        GeneralProbe,
        GeneralReplay,
        InfLoRA,
        InputFreeze,
        Interpolate,
        KLBudget,
        KLToBase,
        LMEvalProbe,
        LossCurves,
        LwF,
        Merge,
        OrthogonalLoRA,
        PackNet,
        ProgressiveAdapters,
        ProgressiveNetwork,
        PromptSamples,
        RecoveryProbe,
        Replay,
        RWalk,
        SelfReplay,
        SubspaceFreeze,
        TaskAdapters,
        TaskMatrix,
        TaskProgress,
        WeightAverage,
    )
    from lightning_cl.cli.command import ContinualCLI
    from lightning_cl.data import TaskDataModule, TrainedBPE
    from lightning_cl.export.callback import Export
    from lightning_cl.metrics import (
        AverageAccuracy,
        AverageOverRows,
        BackwardTransfer,
        Forgetting,
        ForwardTransfer,
        Intransigence,
        LargestDrop,
        MeanWhenLearnt,
        ShareKept,
        WorstTask,
    )
    from lightning_cl.models import CausalLM, InfiniteLR, WarmupDecay
    from lightning_cl.sequence import fit_tasks
    from lightning_cl.tasks import Task


_HOME = {
    "AGEM": "callbacks",
    "AverageAccuracy": "metrics",
    "AverageOverRows": "metrics",
    "BackwardTransfer": "metrics",
    "BlockExpansion": "callbacks",
    "CausalLM": "models",
    "ContinualCLI": "cli",
    "DER": "callbacks",
    "DERpp": "callbacks",
    "EWC": "callbacks",
    "Export": "export.callback",
    "Forgetting": "metrics",
    "ForgettingBudget": "callbacks",
    "ForwardTransfer": "metrics",
    "GeneralProbe": "callbacks",
    "GeneralReplay": "callbacks",
    "InfiniteLR": "models",
    "InfLoRA": "callbacks",
    "InputFreeze": "callbacks",
    "Interpolate": "callbacks",
    "Intransigence": "metrics",
    "KFACEWC": "callbacks",
    "KLBudget": "callbacks",
    "KLToBase": "callbacks",
    "LMEvalProbe": "callbacks",
    "L2SP": "callbacks",
    "LargestDrop": "metrics",
    "LossCurves": "callbacks",
    "LwF": "callbacks",
    "MAS": "callbacks",
    "MIGU": "callbacks",
    "MeanWhenLearnt": "metrics",
    "Merge": "callbacks",
    "OrthogonalLoRA": "callbacks",
    "PackNet": "callbacks",
    "ProgressiveAdapters": "callbacks",
    "ProgressiveNetwork": "callbacks",
    "PromptSamples": "callbacks",
    "RWalk": "callbacks",
    "RecoveryProbe": "callbacks",
    "Replay": "callbacks",
    "SI": "callbacks",
    "SelfReplay": "callbacks",
    "ShareKept": "metrics",
    "SubspaceFreeze": "callbacks",
    "Task": "tasks",
    "TaskAdapters": "callbacks",
    "TaskDataModule": "data",
    "TaskMatrix": "callbacks",
    "TaskProgress": "callbacks",
    "TrainedBPE": "data",
    "WarmupDecay": "models",
    "WeightAverage": "callbacks",
    "WorstTask": "metrics",
    "fit_tasks": "sequence",
}

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "KFACEWC",
    "L2SP",
    "MAS",
    "MIGU",
    "SI",
    "AverageAccuracy",
    "AverageOverRows",
    "BackwardTransfer",
    "BlockExpansion",
    "CausalLM",
    "ContinualCLI",
    "DERpp",
    "Export",
    "Forgetting",
    "ForgettingBudget",
    "ForwardTransfer",
    "GeneralProbe",
    "GeneralReplay",
    "InfLoRA",
    "InfiniteLR",
    "InputFreeze",
    "Interpolate",
    "Intransigence",
    "KLBudget",
    "KLToBase",
    "LMEvalProbe",
    "LargestDrop",
    "LossCurves",
    "LwF",
    "MeanWhenLearnt",
    "Merge",
    "OrthogonalLoRA",
    "PackNet",
    "ProgressiveAdapters",
    "ProgressiveNetwork",
    "PromptSamples",
    "RWalk",
    "RecoveryProbe",
    "Replay",
    "SelfReplay",
    "ShareKept",
    "SubspaceFreeze",
    "Task",
    "TaskAdapters",
    "TaskDataModule",
    "TaskMatrix",
    "TaskProgress",
    "TrainedBPE",
    "WarmupDecay",
    "WeightAverage",
    "WorstTask",
    "fit_tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
