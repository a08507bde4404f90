"""The methods: one file each, and the base and the coordinator that they share."""

from lightning_cl.callbacks.agem import AGEM
from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.callbacks.derpp import DER, DERpp
from lightning_cl.callbacks.ewc import EWC
from lightning_cl.callbacks.general_replay import GeneralReplay
from lightning_cl.callbacks.kfac import KFACEWC
from lightning_cl.callbacks.kl_to_base import KLToBase
from lightning_cl.callbacks.l2sp import L2SP
from lightning_cl.callbacks.lwf import LwF
from lightning_cl.callbacks.mas import MAS
from lightning_cl.callbacks.memory import MemoryCallback
from lightning_cl.callbacks.progress import TaskProgress
from lightning_cl.callbacks.prompts import PromptSamples
from lightning_cl.callbacks.quadratic import QuadraticPenalty
from lightning_cl.callbacks.replay import Replay
from lightning_cl.callbacks.rwalk import RWalk
from lightning_cl.callbacks.self_replay import SelfReplay
from lightning_cl.callbacks.si import SI
from lightning_cl.callbacks.task_matrix import TaskMatrix

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "KFACEWC",
    "L2SP",
    "MAS",
    "SI",
    "ContinualCallback",
    "DERpp",
    "GeneralReplay",
    "KLToBase",
    "LwF",
    "MemoryCallback",
    "PromptSamples",
    "QuadraticPenalty",
    "RWalk",
    "Replay",
    "SelfReplay",
    "TaskMatrix",
    "TaskProgress",
]
