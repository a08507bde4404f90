"""Samples of earlier tasks: how they are chosen, and where they lie."""

from lightning_cl.buffers.buffer import ReplayBuffer
from lightning_cl.buffers.disk.folder import Stored, read_folder, remove_from_folder
from lightning_cl.buffers.disk.store import DiskStore
from lightning_cl.buffers.memory import MemoryStore

__all__ = ["DiskStore", "MemoryStore", "ReplayBuffer", "Stored", "read_folder", "remove_from_folder"]
