"""Processes that work as one group, for tests: forked from a script that has loaded everything, all within a time limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent


def outcomes(script, *arguments, limit=600):
    """What the processes of ``script`` tell (:func:`tell`), in the order in which they do; at the limit all are killed."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        out, errors = started.communicate(timeout=limit)
    except BaseException:
        os.killpg(started.pid, signal.SIGKILL)  # what it forked is of its session
        started.wait()
        raise
    assert started.returncode == 0, errors[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def tell(**outcome):
    """Write a line of JSON that :func:`outcomes` reads; whole, whoever writes at the same time."""
    os.write(1, (json.dumps(outcome) + "\n").encode())


def in_a_fork(work):
    """The text of what ``work()`` gives in a fork of this process, which has ten seconds; ``""`` where it fails."""
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # without the handler by which a test of its own is timed out
        signal.alarm(10)
        try:
            os.write(writes, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        found = told.read()
    os.waitpid(pid, 0)
    return found


def together(work, *, count=2, limit=60, bound=60):
    """Run ``work(rank)`` in ``count`` processes that are a gloo group with a timeout of ``bound`` seconds.

    Together they have ten times ``limit`` seconds, and once the first has ended the others have ``limit``; then they are
    killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count))
    sys.stdout.flush()
    living = {}
    for rank in range(count):
        child = os.fork()
        if not child:
            _be(rank, work, bound)
        living[child] = rank
    deadline = time.monotonic() + 10 * limit
    while living and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG)
        if (rank := living.pop(child, None)) is not None:
            if os.WIFSIGNALED(status):
                tell(rank=rank, killed_by=signal.Signals(os.WTERMSIG(status)).name)
            deadline = min(deadline, time.monotonic() + limit)
        time.sleep(0.02)
    for child, rank in living.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tell(rank=rank, hung=True)


def _be(rank, work, bound):
    import torch
    import torch.distributed as dist

    # torch makes the thread pool anew that a fork loses, but not safely from two threads at once, as backward has them.
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=bound))
        work(rank)
        dist.destroy_process_group()
    except BaseException:
        tell(rank=rank, error=traceback.format_exc()[-3000:])
    finally:
        os._exit(0)
