"""SIGTERM and Ctrl-C during a sequence of tasks: heeded wherever they come, with an exit code that says so.

Lightning looks at SIGTERM between two batches only, forgets it when the next ``fit`` or ``validate`` begins, and leaves
the process with exit code 0. So the signal is kept here for the whole sequence. Lightning makes of Ctrl-C an exit with
code 1, and ignores every later one; here it is a ``KeyboardInterrupt`` again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C has stopped."""


class _Stop:
    """Keeps whether a SIGTERM has come since a sequence began."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: Any = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if callable(self.previous):
            self.previous(number, frame)


_running: list[_Stop] = []


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Keeps a SIGTERM that comes inside until :func:`heed` finds it. Lightning's own handlers are called too.

    Raises:
        SIGTERMException: an exit with code 143.
        KeyboardInterrupt: for Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be set in the main thread only
        return
    stop = _Stop()
    previous = signal.signal(signal.SIGTERM, stop)
    stop.previous = previous if previous not in (signal.SIG_DFL, signal.SIG_IGN) else None
    _running.append(stop)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException as error:
        error.code = EXIT_CODE
        raise
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, interrupt if interrupt is not None else signal.SIG_DFL)
        _running.remove(stop)
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def heed(trainer: L.Trainer, all_ranks: bool = False) -> None:
    """Stops where a SIGTERM has come.

    Args:
        trainer: the Trainer.
        all_ranks: whether all processes call this at once; without it several processes continue, since one that stops
            alone would leave the others waiting.

    Raises:
        SIGTERMException: an exit with code 143.
    """
    asked = bool(_running) and _running[-1].asked
    if trainer.world_size > 1:
        if not all_ranks:
            return
        flag = torch.tensor(float(asked), device=trainer.strategy.root_device)
        asked = float(trainer.strategy.reduce(flag, reduce_op="sum")) > 0
    if asked:
        error = SIGTERMException()
        error.code = EXIT_CODE
        raise error
