"""Two runs never share a RUN_ID at a time, and whoever dies leaves it free."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train_gpt as g


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


LOCK = Path("logs/a/b.lock")


def in_a_child(work: Callable[[], None]) -> int:
    """Start another process, and wait until it has written the file "there"."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not Path("there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_a_name_in_use_is_refused_with_who_uses_it_and_is_free_afterwards():
    with g.reserve_run_id("a/b") as path:
        assert path == LOCK
        told = rf"RUN_ID=a/b is in use: process {os.getpid()} on {re.escape(platform.node())} .*set another RUN_ID"
        with pytest.raises(g.ConfigError, match=told), g.reserve_run_id("a/b"):
            pass
        with pytest.raises(g.ConfigError, match=told):
            g.require_free("a/b")
        with g.reserve_run_id("a/c"):
            g.require_free("a/d")
    assert [path for path in Path("logs").rglob("*") if path.is_file()] == []
    g.require_free("a/b")
    with g.reserve_run_id("a/b"):
        pass


def test_a_run_that_fails_frees_its_name():
    with pytest.raises(KeyboardInterrupt), g.reserve_run_id("a/b"):
        raise KeyboardInterrupt
    assert not LOCK.exists()


def test_a_killed_run_frees_its_name_though_a_child_of_it_goes_on():
    def work() -> None:
        with g.reserve_run_id("a/b"):
            sleeper = subprocess.Popen(["sleep", "60"])
            Path("sleeper").write_text(str(sleeper.pid))
            Path("there").touch()
            time.sleep(60)

    child = in_a_child(work)
    try:
        with pytest.raises(g.ConfigError, match=f"process {child} on"):
            g.require_free("a/b")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        assert LOCK.exists()  # and is in nobody's way
        g.require_free("a/b")
        with g.reserve_run_id("a/b"):
            assert LOCK.read_text() == f"process {os.getpid()} on {platform.node()}\n"
        assert not LOCK.exists()
    finally:
        os.kill(int(Path("sleeper").read_text()), signal.SIGKILL)


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(monkeypatch):
    """Two processes would hold locks on two files of one name."""
    lock = fcntl.flock

    def after_the_owner_is_done(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        LOCK.unlink()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", after_the_owner_is_done)
    with g.reserve_run_id("a/b"), pytest.raises(g.ConfigError, match=f"process {os.getpid()} on"):
        g.require_free("a/b")


def test_a_file_system_without_locks_is_told_of(monkeypatch, capsys):
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with g.reserve_run_id("a/b"):
        assert "logs/a/b.lock cannot be locked: No locks available; do not run RUN_ID=a/b twice" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize("content", [b"", b"\x1b[2Jprocess 1 on x", b"process 7 on \x1b[2J", b"\xff" * 1000])
def test_what_another_program_wrote_there_is_not_shown(content):
    LOCK.parent.mkdir(parents=True)
    LOCK.write_bytes(content)
    handle = os.open(LOCK, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(g.ConfigError, match="is in use: another process runs under it") as error:
        g.require_free("a/b")
    assert str(error.value).isprintable()
    os.close(handle)
    with g.reserve_run_id("a/b"):
        assert LOCK.read_text().startswith(f"process {os.getpid()} on ")


def test_an_artifact_that_was_replaced_while_it_was_scored_gives_no_result():
    Path("a.ptz").write_bytes(b"of another run")
    with pytest.raises(g.DataError, match=r"a\.ptz: was replaced while it was scored"):
        g.describe_artifact(Path("a.ptz"), "0" * 64)


def test_a_name_made_from_the_time_is_never_one_that_a_run_has(monkeypatch):
    """As when the clock was set back, or when two runs start in the same second."""
    monkeypatch.setattr(time, "strftime", lambda form: "20260101_020000")
    named = []
    for suffix in (".txt", ".lock", ".docs.npz"):
        named.append(g.choose_run_id(g.RunConfig(), g.Dist()))
        with g.reserve_run_id(named[-1], new=True):
            Path(f"logs/{named[-1]}{suffix}").touch()
        Path(f"logs/{named[-1]}{suffix}").touch()
    assert named == ["20260101_020000", "20260101_020000_2", "20260101_020000_3"]
    assert g.choose_run_id(g.RunConfig(run_id="mine"), g.Dist()) == "mine"

    with pytest.raises(g.ConfigError, match="another run has just been named 20260101_020000"):
        with g.reserve_run_id(named[0], new=True):
            pass
    with g.reserve_run_id(named[0]):
        pass


# ---- signals ----------------------------------------------------------------

RUN = """
import sys, time
import train_gpt as g

def work(check_only, ending):
    with g.reserve_run_id("a/b"):
        open("there", "w").close()
        time.sleep(60)

g.run_experiment = work
sys.exit(g.main([]))
"""
TOOL = """
import sys, tempfile, time
from tools.artifact import end_in_a_line

def work():
    with tempfile.TemporaryDirectory(dir="."):
        open("there", "w").close()
        time.sleep(60)

sys.exit(end_in_a_line(work))
"""


@contextlib.contextmanager
def started(program: str, ignored: bool):
    """The program once it has written "there"; `ignored`: as nohup starts it."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    env = os.environ | {"PYTHONPATH": str(Path(g.__file__).parent)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=ignore)
    try:
        deadline = time.monotonic() + 60
        while not Path("there").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("program", [RUN, TOOL], ids=["run", "tool"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_ends_a_process_leaves_no_half_written_file(program, number):
    with started(program, ignored=False) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == g.INTERRUPTED and errors == "interrupted\n"
    assert [path.name for path in Path().rglob("*") if path.name not in ("logs", "a")] == ["there"]


@pytest.mark.parametrize("program", [RUN, TOOL], ids=["run", "tool"])
def test_under_nohup_a_process_goes_on_when_its_terminal_closes(program):
    with started(program, ignored=True) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == g.INTERRUPTED
