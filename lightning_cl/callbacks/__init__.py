"""The methods: one file each, and the base and the coordinator that they share."""

from lightning_cl.callbacks.architecture.block_expansion import BlockExpansion
from lightning_cl.callbacks.architecture.inflora import InfLoRA
from lightning_cl.callbacks.architecture.input_freeze import InputFreeze
from lightning_cl.callbacks.architecture.migu import MIGU
from lightning_cl.callbacks.architecture.orthogonal_lora import OrthogonalLoRA
from lightning_cl.callbacks.architecture.packnet import PackNet
from lightning_cl.callbacks.architecture.progressive_adapters import ProgressiveAdapters
from lightning_cl.callbacks.architecture.progressive_network import ProgressiveNetwork
from lightning_cl.callbacks.architecture.subspace_freeze import SubspaceFreeze
from lightning_cl.callbacks.architecture.task_adapters import TaskAdapters
from lightning_cl.callbacks.merging.interpolate import Interpolate
from lightning_cl.callbacks.merging.merge import Merge
from lightning_cl.callbacks.merging.weight_average import WeightAverage
from lightning_cl.callbacks.monitoring.forgetting_budget import ForgettingBudget
from lightning_cl.callbacks.monitoring.general_probe import GeneralProbe
from lightning_cl.callbacks.monitoring.kl_to_base import KLToBase
from lightning_cl.callbacks.monitoring.lm_eval_probe import LMEvalProbe
from lightning_cl.callbacks.monitoring.loss_curves import LossCurves
from lightning_cl.callbacks.monitoring.progress import TaskProgress
from lightning_cl.callbacks.monitoring.prompts import PromptSamples
from lightning_cl.callbacks.monitoring.recovery_probe import RecoveryProbe
from lightning_cl.callbacks.monitoring.task_matrix import TaskMatrix
from lightning_cl.callbacks.regularization.ewc import EWC
from lightning_cl.callbacks.regularization.kfac import KFACEWC
from lightning_cl.callbacks.regularization.kl_budget import KLBudget
from lightning_cl.callbacks.regularization.l2sp import L2SP
from lightning_cl.callbacks.regularization.lwf import LwF
from lightning_cl.callbacks.regularization.mas import MAS
from lightning_cl.callbacks.regularization.quadratic import QuadraticPenalty
from lightning_cl.callbacks.regularization.rwalk import RWalk
from lightning_cl.callbacks.regularization.si import SI
from lightning_cl.callbacks.replay.agem import AGEM
from lightning_cl.callbacks.replay.base import MemoryCallback
from lightning_cl.callbacks.replay.derpp import DER, DERpp
from lightning_cl.callbacks.replay.general_replay import GeneralReplay
from lightning_cl.callbacks.replay.replay import Replay
from lightning_cl.callbacks.replay.self_replay import SelfReplay
from lightning_cl.core.method import ContinualCallback

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "KFACEWC",
    "L2SP",
    "MAS",
    "MIGU",
    "SI",
    "BlockExpansion",
    "ContinualCallback",
    "DERpp",
    "ForgettingBudget",
    "GeneralProbe",
    "GeneralReplay",
    "InfLoRA",
    "InputFreeze",
    "Interpolate",
    "KLBudget",
    "KLToBase",
    "LMEvalProbe",
    "LossCurves",
    "LwF",
    "MemoryCallback",
    "Merge",
    "OrthogonalLoRA",
    "PackNet",
    "ProgressiveAdapters",
    "ProgressiveNetwork",
    "PromptSamples",
    "QuadraticPenalty",
    "RWalk",
    "RecoveryProbe",
    "Replay",
    "SelfReplay",
    "SubspaceFreeze",
    "TaskAdapters",
    "TaskMatrix",
    "TaskProgress",
    "WeightAverage",
]
