"""What is kept of earlier tasks: selection policies and the buffer that holds what they select."""

from lightning_cl.buffers.buffer import ReplayBuffer
from lightning_cl.buffers.policies import Reservoir, TaskBalanced

__all__ = ["ReplayBuffer", "Reservoir", "TaskBalanced"]
