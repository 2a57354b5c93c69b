"""Execution of functions in forked processes that may crash or hang."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_PATIENCE = 10.0


@dataclass(frozen=True)
class Ended(Generic[T]):
    """The outcome of one call.

    Attributes:
        task: The argument of the call.
        kind: ``returned``, ``raised``, ``crash`` or ``hang``.
        value: The returned value.
        text: The traceback of the exception, or the signal and the last output of the process.
        seconds: The time of the call.
    """

    task: T
    kind: str
    value: Any = None
    text: str = ""
    seconds: float = 0.0


@dataclass
class _Running(Generic[T]):
    task: T
    process: Any
    printed: Path
    started: float = field(default_factory=time.monotonic)


def isolated(
    function: Callable[[T], Any], tasks: Iterable[T], *, jobs: int = 1, seconds: float = 120.0
) -> Iterator[Ended[T]]:
    """Call ``function`` on each task in a separate process, ``jobs`` at a time; yields outcomes in the order of completion.

    A process is killed after ``seconds`` of CPU time, or after :data:`_PATIENCE` times as many of wall time, since the machine
    may be busy. Its output does not reach the terminal.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, _Running[T]] = {}
    waiting = iter(tasks)
    exhausted = False
    with tempfile.TemporaryDirectory() as folder:
        number = 0
        try:
            while True:
                while not exhausted and len(running) < jobs:
                    try:
                        task = next(waiting)
                    except StopIteration:
                        exhausted = True
                        break
                    receiver, sender = context.Pipe(duplex=False)
                    printed, number = Path(folder) / str(number), number + 1
                    process = context.Process(target=_call, args=(function, task, sender, printed, seconds))
                    process.start()
                    sender.close()
                    running[receiver] = _Running(task, process, printed)
                if not running:
                    return
                soonest = min(run.started for run in running.values()) + seconds * _PATIENCE - time.monotonic()
                ready = wait(list(running), timeout=max(soonest, 0.0))
                now = time.monotonic()
                for connection, run in list(running.items()):
                    if connection in ready or now - run.started >= seconds * _PATIENCE:
                        del running[connection]
                        yield _ended(connection, run, hang=connection not in ready)
        finally:
            for run in running.values():
                run.process.kill()
                run.process.join()


def _ended(connection: Connection, run: _Running[T], *, hang: bool) -> Ended[T]:
    seconds = round(time.monotonic() - run.started, 2)
    if hang:
        run.process.kill()
        run.process.join()
        return Ended(run.task, "hang", text=_last(run.printed), seconds=seconds)
    try:
        kind, value, text = connection.recv()
    except EOFError:
        run.process.join()
        code = run.process.exitcode or 0
        if code == -signal.SIGXCPU:
            return Ended(run.task, "hang", text=_last(run.printed), seconds=seconds)
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return Ended(run.task, "crash", text=f"{name}: {_last(run.printed)}", seconds=seconds)
    run.process.join(5)
    if run.process.is_alive():
        run.process.kill()
        run.process.join()
    return Ended(run.task, kind, value, text, seconds)


def _last(printed: Path, size: int = 4000) -> str:
    return printed.read_text(errors="replace")[-size:].strip() if printed.exists() else ""


def _call(function: Callable[[T], Any], task: T, sender: Connection, printed: Path, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Recreates torch's thread pool, which a fork corrupts: otherwise autograd's threads race to do it, and abort.
    torch.set_num_threads(1)
    try:
        answer = ("returned", function(task), "")
    except BaseException:
        answer = ("raised", None, traceback.format_exc())
    sender.send(answer)
    sender.close()
    # The runtime's threads can block a normal exit of the interpreter.
    os._exit(0)
