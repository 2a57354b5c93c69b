"""Programs that run in a process of their own: whatever happens to a process, an answer is that of the program that was asked.

The server is a fork of this process and a program a word, so that a test takes no seconds.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings

import pytest
from processes import in_a_fork

import quantflow as qf
from quantflow.runtime import fork_server, isolated, worker

pytestmark = pytest.mark.timeout(method="thread")  # the tests use SIGALRM themselves

START = fork_server.start


def execute(program, name, inputs):
    """What the word ``program`` says."""
    word, _, argument = program.decode().partition(" ")
    if word == "sleep":
        time.sleep(float(argument))
    if word == "signal":
        os.kill(os.getpid(), int(argument))
    return [program.decode()]


def forked(requests, log):
    """A server like that of :func:`fork_server.start`."""
    if pid := os.fork():
        return pid
    kept = sorted((requests.fileno(), log.fileno()))
    for first, last in zip((2, *kept), (*kept, 1024), strict=True):
        os.closerange(first + 1, last)
    os.dup2(log.fileno(), 2)
    try:
        worker.listen(requests)
    finally:
        os._exit(0)


@pytest.fixture(autouse=True)
def _server(monkeypatch):
    monkeypatch.setattr(isolated, "_shared", None)
    monkeypatch.setattr(isolated, "_own", None)
    monkeypatch.setattr(fork_server, "start", forked)
    monkeypatch.setattr("quantflow.runtime.load_program", lambda buffer: buffer)
    monkeypatch.setattr("quantflow.runtime.load_method", lambda program, name, buffer: program)
    monkeypatch.setattr("quantflow.runtime.execute", execute)
    yield
    isolated._at_exit()


def answer(program):
    trial = isolated.run(program.encode(), [[]])
    return trial.failure or trial.outputs[0][0]


class InterruptError(Exception):
    """As a person or a time limit interrupts."""


@contextlib.contextmanager
def interrupted(error, seconds=0.2):
    def interrupt(*_):
        raise error

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(error):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def there(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def crash_the_server():
    os.kill(isolated._shared.pid, signal.SIGKILL)
    until(isolated._shared.gone)


def opened():
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("error", [InterruptError, KeyboardInterrupt, TimeoutError])
def test_an_interrupted_program_ends_and_does_not_answer_the_next(error):
    held = isolated._worker()
    with interrupted(error):
        answer("sleep 100")
    assert held.gone()
    assert answer("next") == "next"


def test_a_program_interrupted_between_its_messages_does_not_spoil_the_next(monkeypatch):
    connection = isolated._worker().connection
    send = connection.send_bytes

    def interrupted_send(message):
        send(message)
        raise InterruptError

    monkeypatch.setattr(connection, "send_bytes", interrupted_send)
    with pytest.raises(InterruptError):
        answer("half")
    assert answer("next") == "next"


def test_a_program_that_is_interrupted_twice_does_not_answer_the_next(monkeypatch):
    held = isolated._worker()
    monkeypatch.setattr(held, "kill", lambda: (_ for _ in ()).throw(InterruptError))
    with interrupted(InterruptError):
        answer("sleep 100")
    assert answer("next") == "next"


def test_a_request_that_is_interrupted_leaves_nothing():
    assert answer("first") == "first"
    isolated._drop_worker()
    before, server = opened(), isolated._shared
    os.kill(server.pid, signal.SIGSTOP)
    with interrupted(InterruptError):
        answer("next")
    assert opened() == before
    os.kill(server.pid, signal.SIGCONT)
    assert answer("next") == "next"
    assert isolated._shared is server


def test_what_runs_ends_with_the_process_that_asked():
    def asks():
        held = isolated._worker()
        threading.Thread(target=answer, args=["sleep 100"], daemon=True).start()
        time.sleep(0.1)
        return held.pid

    isolated.warm_up()
    pid = int(in_a_fork(asks))
    until(lambda: not there(pid))


def test_programs_run_after_the_server_was_killed():
    assert answer("first") == "first"
    crash_the_server()
    assert answer("second") == "second"  # the child is there still
    threading.Timer(0.2, os.kill, [isolated._own.pid, signal.SIGABRT]).start()
    assert "so did the fork server" in answer("sleep 100")
    assert answer("third") == "third"


def test_forks_run_programs_after_the_server_was_killed():
    assert answer("first") == "first"
    crash_the_server()
    assert in_a_fork(lambda: [answer("a"), answer("b")]) == "['a', 'b']"
    assert answer("next") == "next"


def test_what_runs_is_ended_also_without_a_server():
    held = isolated._worker()
    crash_the_server()
    with interrupted(InterruptError):
        answer("sleep 100")
    until(held.gone)


def test_a_server_that_ends_as_it_is_asked_is_replaced(monkeypatch):
    isolated.warm_up()
    monkeypatch.setattr(isolated._shared, "gone", lambda: False)
    os.kill(isolated._shared.pid, signal.SIGKILL)
    assert answer("next") == "next"


def test_forks_keep_the_server_when_the_process_that_started_it_ends():
    def owner():
        isolated.warm_up()
        server, here = isolated._shared.pid, os.getpid()
        if os.fork():
            isolated._at_exit()
            return ""
        until(lambda: os.getppid() != here)
        return [answer("orphan"), isolated._shared.pid == server]

    assert in_a_fork(owner) == "['orphan', True]"


def test_a_server_ends_once_nobody_shares_it():
    assert answer("first") == "first"
    pid = isolated._shared.pid
    isolated._at_exit()
    assert os.waitpid(pid, 0)[1] == 0


def test_clients_that_vanish_leave_the_server_to_the_others():
    assert answer("first") == "first"
    server = isolated._shared
    os.kill(server.pid, signal.SIGSTOP)
    server._requests.send(b"+")  # without files
    (ours, control), (mine, theirs), log = socket.socketpair(), socket.socketpair(), fork_server.Log()
    server.ask(control, theirs, log)
    for end in (ours, control, mine, theirs, log):
        end.close()
    os.kill(server.pid, signal.SIGCONT)
    isolated._drop_worker()
    assert answer("next") == "next"
    assert isolated._shared is server


def test_a_fork_runs_programs_while_another_thread_of_its_parent_did():
    thread = threading.Thread(target=answer, args=["sleep 0.5"])
    thread.start()
    time.sleep(0.1)
    assert in_a_fork(lambda: answer("fork")) == "fork"
    thread.join()


def test_a_child_that_ended_when_idle_is_replaced(monkeypatch):
    monkeypatch.setattr(worker, "IDLE", 0.05)
    held = isolated._worker()
    until(held.gone)
    assert answer("next") == "next"


def test_crashes_and_new_servers_leave_no_file_open():
    assert answer("first") == "first"
    before = opened()
    for crash in (lambda: answer(f"signal {signal.SIGABRT:d}"), crash_the_server, isolated._worker):
        crash()
        isolated._drop_worker()
        assert answer("next") == "next"
        assert opened() == before


def test_nothing_lies_in_the_folder_for_temporary_files_however_long_its_name(monkeypatch, tmp_path):
    folder = tmp_path.joinpath(*["long" * 25] * 2)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert answer("next") == "next"
    assert not list(folder.iterdir())


def test_the_end_of_a_process_leaves_no_warning():
    gc.collect()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert answer("next") == "next"
        isolated._at_exit()
        gc.collect()
    assert not [str(w.message) for w in found if w.category is ResourceWarning]


def test_a_server_that_can_not_start_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(fork_server, "start", START)
    (tmp_path / "torch.py").write_text("raise ImportError('no such luck')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(qf.QuantflowError, match="ImportError: no such luck"):
        answer("next")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    isolated.warm_up()
    with pytest.raises(qf.QuantflowError, match=r"does not start: .*No such file"):
        answer("next")


def test_signals_of_the_terminal_do_not_reach_the_server():
    requests, theirs = socket.socketpair()
    with requests, theirs, contextlib.closing(fork_server.Log()) as log:
        pid = START(theirs, log)
        assert os.getsid(pid) == pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
