"""Messages between the processes of a group, and errors that name a process that fails, dies or hangs.

The processes communicate through the store of the group (``torch.distributed.Store``), which every backend has and whose
timeout can be set. A collective with a dead process hangs, or fails without naming the process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, cast

import torch.distributed as dist

from quantflow.distributed.group import grouped
from quantflow.errors import QuantflowError

_BEAT = 1.0  # seconds between two heartbeats
_SILENCE = 30.0  # seconds without a heartbeat after which a process counts as dead
_LONGEST_PAUSE = 0.1  # seconds between two reads of the store

_verbs = itertools.count()  # equal in all processes, since all make the same calls


class Peers:
    """A context in which all processes raise an error that names a process that fails, dies or hangs.

    A killed process is named after 30 seconds, and a hanging process after the timeout of the group (that of
    ``init_process_group``; torch's default is 10 minutes with NCCL, else 30). All processes enter the context and make the same
    calls in the same order. Without a group the context does nothing.

    Args:
        stage: The stage named in errors.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._store: Any = None
        self._step = 0
        self._told: QuantflowError | None = None  # the error that names another process

    def __enter__(self) -> Self:
        if not grouped():
            return self
        from torch.distributed.distributed_c10d import PrefixStore  # torch may be built without it

        store = cast(Any, dist.group.WORLD).get_group_store()
        self._bound = store.timeout.total_seconds()
        self._silence = min(_SILENCE, self._bound)
        self._rank, self._ranks = dist.get_rank(), range(dist.get_world_size())
        self._beats: dict[int, tuple[bytes, float]] = {}
        prefix = f"quantflow/{next(_verbs)}"
        self._store = PrefixStore(prefix, store)
        self._over = threading.Event()
        own = PrefixStore(prefix, store.clone())  # a store serves one thread at a time
        self._life = threading.Thread(target=_beat, args=(own, f"beat/{self._rank}", self._over), daemon=True)
        self._life.start()
        return self

    def answers(self, word: object) -> list[Any]:
        """Exchange ``word`` (JSON data) with all processes at this point, and return the words in the order of the ranks.

        Raises:
            QuantflowError: when another process has failed, was killed, or does not answer within the timeout.
        """
        if self._store is None:
            return [word]
        step, self._step = self._step, self._step + 1
        keys = [f"{step}/{rank}" for rank in self._ranks]
        with self._reaching_the_store():
            self._store.set(keys[self._rank], json.dumps(word))
            self._wait(keys)
            words = self._store.multi_get(keys)
            if step > 1:  # all processes have reached this step, so all have read that key
                self._store.delete_key(f"{step - 2}/{self._rank}")
        return [json.loads(word) for word in words]

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._store is None:
            return
        try:
            if error is None:
                with self._reaching_the_store():
                    self._leave()
            elif error is self._told:
                return
            elif _lost_connection(error):
                raise self._culprit(error) from error
            else:
                with contextlib.suppress(dist.DistError):
                    self._store.set(f"failed/{self._rank}", f"{type(error).__name__}: {str(error)[:500]}")
                    self._store.add("failures", 1)
        finally:
            self._over.set()
            self._life.join(_BEAT)

    def _leave(self) -> None:
        """Leave the context. Rank 0 leaves last, because it may hold the store."""
        keys = [f"left/{rank}" for rank in self._ranks]
        self._store.set(keys[self._rank], "")
        if self._rank == 0:
            self._wait(keys)

    def _wait(self, keys: list[str]) -> None:
        """Wait until the store has all ``keys``, one of each rank."""
        start, pause = time.monotonic(), 1e-4
        while not self._store.check(keys):
            if pause >= _LONGEST_PAUSE:
                if (gone := self._gone()) is not None:
                    raise gone
                if time.monotonic() - start > self._bound:
                    raise self._tell(self._without(keys), f"no answer within {self._bound:.0f} s: slow, or it hangs")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _culprit(self, error: BaseException) -> QuantflowError:
        """The error that explains the lost connection of ``error``."""
        keys = [f"lost/{rank}" for rank in self._ranks]
        start = time.monotonic()
        with self._reaching_the_store():
            self._store.set(keys[self._rank], "")
            while time.monotonic() - start < self._silence + 2 * _BEAT and not self._store.check(keys):
                if (gone := self._gone()) is not None:
                    return gone
                time.sleep(_LONGEST_PAUSE)
            missing = self._without(keys)
        if missing:
            return self._tell(missing, f"no answer when the others lost the connection ({error}): it hangs")
        return self._tell([], f"the processes lost the connection between them: {error}")

    def _gone(self) -> QuantflowError | None:
        """The error that names the failed or dead processes, or None if there are none."""
        if self._store.add("failures", 0):
            failed = [rank for rank in self._ranks if self._store.check([f"failed/{rank}"])]
            if failed:
                return self._tell(failed, f"it failed: {self._store.get(f'failed/{failed[0]}').decode()}")
        now = time.monotonic()
        for rank in self._ranks:
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = beat, now
        dead = [rank for rank, (_, since) in self._beats.items() if now - since > self._silence and rank != self._rank]
        return self._tell(dead, f"no sign of life for {self._silence:.0f} s: it was killed") if dead else None

    def _without(self, keys: list[str]) -> list[int]:
        """The ranks whose key is not in the store."""
        return [rank for rank, key in zip(self._ranks, keys, strict=True) if not self._store.check([key])]

    def _tell(self, ranks: Iterable[int], reason: str) -> QuantflowError:
        node = ", ".join(f"rank {rank}" for rank in ranks) or None
        remedy = "see its log; start all processes again (with checkpoints, training resumes)"
        self._told = QuantflowError(self.stage, reason, node=node, remedy=remedy)
        return self._told

    @contextlib.contextmanager
    def _reaching_the_store(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            reason = f"the store by which the processes talk is gone: {error}"
            remedy = "see the log of rank 0 (or of torchrun), which holds it"
            self._told = QuantflowError(self.stage, reason, node="rank 0", remedy=remedy)
            raise self._told from error


def _beat(store: Any, key: str, over: threading.Event) -> None:
    """Write heartbeats until ``over`` is set. A lost store ends them; other calls report it."""
    with contextlib.suppress(dist.DistError):
        for count in itertools.count():
            store.set(key, str(count))
            if over.wait(_BEAT):
                return


def _lost_connection(error: BaseException | None) -> bool:
    """Whether a failed collective caused ``error``. gloo raises a plain RuntimeError."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
