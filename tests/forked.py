"""Processes for tests, forked from one that has imported everything: a start costs half a second instead of ten.

Pictures are not rendered in them, and only the first of a kind is composed.

``start("script.py", "argument")`` is ``python script.py argument``; ``-c CODE`` and ``-m MODULE`` are understood, too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from pictures import nobody_looks

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the process that all others are forked from. It imports and does nothing else: no thread runs in it.
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "lightning",
        "lightning.pytorch.cli",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "transformers.models.llama.modeling_llama",
        "lightning_cl.cli.command",
        "lightning_cl.sequence.fit",
    ]
)


def _run(command: list[str], environment: dict[str, str], cwd: str, own_session: bool, files: list[str]) -> None:
    """In the new process: becomes ``python *command``."""
    if own_session:
        os.setsid()
    nobody_looks(setattr)
    for stream, file in zip((1, 2), files, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    multiprocessing.set_start_method(None, force=True)  # what a fresh process has
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    first, *rest = command
    # Where a fresh process would look first, and then in PYTHONPATH; the rest is the tests' own.
    sys.path[:0] = [
        str(Path(first).resolve().parent) if first not in ("-c", "-m") else "",
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(first, run_name="__main__")


class Started:
    """A process that has been started: what of `subprocess.Popen` the tests use."""

    def __init__(self, command, env=None, cwd=None, own_session=False):
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._files = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        arguments = (list(map(str, command)), environment, str(cwd or Path.cwd()), own_session, self._files)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        # Who ends a whole group of processes must not take the tests for a part of it.
        while own_session and self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def terminate(self):
        self._process.terminate()

    def send_signal(self, number):
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._read(self._files[0])

    @property
    def stderr(self) -> str:
        return self._read(self._files[1])

    @staticmethod
    def _read(file: str) -> str:
        return Path(file).read_text() if Path(file).exists() else ""

    def wait_for_output(self, text: str, timeout: float = 60.0) -> None:
        """Waits until `text` has been written to the standard output."""
        end = time.monotonic() + timeout
        while text not in self.stdout:
            assert self.poll() is None, self.stderr
            assert time.monotonic() < end, f"{text!r} did not come"
            time.sleep(0.01)

    def close(self) -> None:
        """Ends the process, if it still runs, and removes what it has written."""
        if self.poll() is None:
            self.kill()
        self.wait()
        self._folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def start(*command, env=None, cwd=None) -> Started:
    """Starts ``python *command`` and returns at once."""
    return Started(command, env, cwd)


def popen(command, env=None) -> Started:
    """In place of `subprocess.Popen`, for commands that start with this Python."""
    assert command[0] == sys.executable
    return Started(command[1:], env)


SUBPROCESS = SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)


def run(*command, env=None, cwd=None, timeout: float = 300.0) -> subprocess.CompletedProcess:
    """``python *command`` from its start to its end."""
    (done,) = _run_together([env], command, cwd, timeout)
    return done


def run_ranks(ranks: int, *command, env=None, cwd=None, timeout: float = 300.0) -> None:
    """``python *command`` as so many ranks on this machine, which find each other as Lightning's launcher has it.

    Raises:
        AssertionError: if one of them fails, with what it said.
    """
    environments = [dict(os.environ if env is None else env)]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
        group["WORLD_SIZE"] = str(ranks)
        environments = [environments[0] | group | {"LOCAL_RANK": str(rank)} for rank in range(ranks)]
    for rank, done in enumerate(_run_together(environments, command, cwd, timeout)):
        assert done.returncode == 0, f"rank {rank} of {ranks}: {done.stderr[-3000:]}"


def _run_together(environments, command, cwd, timeout) -> list[subprocess.CompletedProcess]:
    processes = [Started(command, env, cwd) for env in environments]
    end = time.monotonic() + timeout
    try:
        # The first that fails ends all: the others would wait for it.
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > end:
                time.sleep(1.0)  # for what the others have to say
                break
            time.sleep(0.02)
        assert time.monotonic() <= end, "".join(process.stderr[-3000:] for process in processes)
        for process in processes:
            if process.poll() is None:
                process.kill()
        return [
            subprocess.CompletedProcess(list(command), process.wait(), process.stdout, process.stderr)
            for process in processes
        ]
    finally:
        for process in processes:
            process.close()
