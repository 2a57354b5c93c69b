"""Tasks that may crash or hang, each in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Died:
    """A process that ended without an answer.

    Attributes:
        how: ``"crash"``, or ``"hang"`` for one that was ended because its time was over.
        says: The signal or exit code, or the seconds that it was given.
    """

    how: str
    says: str


@dataclass
class _Running(Generic[T]):
    task: T
    process: Any
    answer: Connection
    deadline: float


def run_isolated(
    function: Callable[[T], Any], tasks: Iterable[T], *, jobs: int = 1, seconds: float = 120.0
) -> Iterator[tuple[T, Any]]:
    """``function`` of each of ``tasks``, at most ``jobs`` at a time.

    Args:
        function: What a child process computes; its result must pickle. An exception that it raises counts as a crash.
        tasks: What to call it with.
        jobs: How many processes run at once.
        seconds: After how long a process is ended.

    Returns:
        Pairs of a task and its result, or the :class:`Died` of its process, as they come.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = iter(tasks), list[_Running[T]]()
    while True:
        for task in waiting:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(function, task, sender), daemon=True)
            process.start()
            sender.close()
            running.append(_Running(task, process, receiver, time.monotonic() + seconds))
            if len(running) >= jobs:
                break
        if not running:
            return
        nearest = min(r.deadline for r in running) - time.monotonic()
        ready = wait([r.answer for r in running], max(nearest, 0.0))
        for r in list(running):
            if r.answer in ready or time.monotonic() >= r.deadline:
                running.remove(r)
                yield r.task, _ended(r, answered=r.answer in ready, seconds=seconds)


def _answer(function: Callable[[T], Any], task: T, sender: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # a runtime that fails writes its log there, between those of others
        os.dup2(silence, output)
    sender.send(function(task))
    sender.close()


def _ended(running: _Running, *, answered: bool, seconds: float) -> Any:
    try:
        if answered:
            return running.answer.recv()
        running.process.kill()
        return Died("hang", f"no end in {seconds:.0f} s")
    except EOFError:
        running.process.join()
        code = running.process.exitcode
        return Died("crash", f"signal {-code}" if code < 0 else f"exit code {code}")
    finally:
        running.process.join()
        running.answer.close()
