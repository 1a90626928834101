"""A rank that dies, is stopped or never comes: the others end soon, each with one line that says which it was."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as g

# Seconds. A rank ends sooner even on a busy machine. One that noticed nothing but silence would go on for SILENCE_S,
# and one that noticed nothing at all for WORK.
SOON = 60.0
WORK = 600.0
assert SOON < g.RankWatch.SILENCE_S < WORK


class Ranks:
    """Ranks of a run, each a fork of this process in which `g.main` runs: an experiment takes the place of all that
    follows the meeting of the ranks."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder = folder
        self.env = env
        self.running: dict[int, int] = {}  # rank -> process

    def start(
        self,
        experiment: Callable[[g.Dist], None],
        world: int = 2,
        absent: tuple[int, ...] = (),
        of_rank_1: dict[str, str] | None = None,
    ) -> None:
        """`of_rank_1` is what only rank 1 has in its environment."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = dict(WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for rank in set(range(world)).difference(absent):
            process = os.fork()
            if process == 0:
                own = (of_rank_1 or {}) if rank == 1 else {}
                self.run(experiment, rank, self.env | place | {"RANK": str(rank)} | own)
            self.running[rank] = process

    def run(self, experiment: Callable[[g.Dist], None], rank: int, env: dict[str, str]) -> None:
        """In a child: the program from its start to its exit status."""
        os.environ.clear()
        os.environ.update(env)
        os.chdir(self.folder)
        output = os.open(f"{rank}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest's own go elsewhere
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        g.prepare_torch = lambda run, device: None  # it imports for seconds
        g.make_setup = lambda model, run, dist: experiment(dist)
        status = g.main([])
        sys.stderr.flush()
        os._exit(status)

    def wait_for(self, name: str) -> None:
        """Until an experiment has written a file."""
        deadline = time.monotonic() + SOON
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, self.output(0)
            time.sleep(0.01)

    def output(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def ended(self, rank: int) -> SimpleNamespace:
        """How a rank ended: status and output."""
        deadline = time.monotonic() + SOON
        while True:
            found, status = os.waitpid(self.running[rank], os.WNOHANG)
            if found:
                del self.running[rank]
                return SimpleNamespace(status=os.waitstatus_to_exitcode(status), output=self.output(rank))
            assert time.monotonic() < deadline, f"rank {rank} goes on: {self.output(rank)}"
            time.sleep(0.01)

    def end(self) -> None:
        for process in self.running.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


@pytest.fixture
def ranks(tmp_path, tiny_env, monkeypatch) -> Iterator[Ranks]:
    monkeypatch.setattr(g.RankWatch, "GRACE_S", 0.3)
    monkeypatch.setattr(g.RankWatch, "PAUSE_S", 0.1)
    ranks = Ranks(tmp_path, tiny_env())
    yield ranks
    ranks.end()


def is_busy(dist: g.Dist) -> None:
    time.sleep(WORK)


def waits(dist: g.Dist) -> None:
    dist.barrier()


def is_stuck(dist: g.Dist) -> None:
    """As in a kernel that waits for another GPU: signals do not interrupt it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(WORK)


def names(line: str, rank: int) -> bool:
    """Whether an output is one line, which says that this rank was lost and where to look."""
    pattern = rf"error: rank {rank} on \S+ ended or stopped answering; its own message is above, or on .*\n"
    return re.fullmatch(pattern, line) is not None


def assert_missed(ranks, lost: int, number: int, meanwhile: Callable[[g.Dist], None]) -> None:
    """One rank sends itself this signal; the other one, whatever it does meanwhile, must end with one line."""

    def experiment(dist: g.Dist) -> None:
        if dist.rank == lost:
            os.kill(os.getpid(), number)
        meanwhile(dist)

    ranks.start(experiment)
    other = ranks.ended(1 - lost)
    assert other.status == g.RANK_LOST and names(other.output, lost), other.output


@pytest.mark.parametrize("meanwhile", [is_busy, waits, is_stuck])
@pytest.mark.parametrize("lost", [0, 1])
def test_the_other_rank_ends_with_one_line_when_one_is_killed(ranks, lost, meanwhile):
    assert_missed(ranks, lost, signal.SIGKILL, meanwhile)


@pytest.mark.parametrize("meanwhile", [is_busy, waits])
def test_the_line_is_followed_by_the_advice_of_what_was_going_on(ranks, meanwhile):
    def experiment(dist: g.Dist) -> None:
        if dist.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with g.advice("the trained weights are in x.ckpt"):
            meanwhile(dist)

    ranks.start(experiment)
    line, advice = ranks.ended(0).output.splitlines(keepends=True)
    assert names(line, 1) and advice == "the trained weights are in x.ckpt\n"


def test_all_others_name_the_same_rank(ranks):
    def experiment(dist: g.Dist) -> None:
        if dist.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        waits(dist)

    ranks.start(experiment, world=4)
    for rank in (0, 1, 3):
        other = ranks.ended(rank)
        assert other.status == g.RANK_LOST and names(other.output, 2), other.output


@pytest.mark.parametrize(
    "error, status, said",
    [
        (g.DataError("x.bin: damaged"), 2, r"error: x.bin: damaged\n"),
        (OSError("no space"), 2, r"error: no space\n"),
        (ZeroDivisionError("of the program"), 1, r"(?s).*Traceback.*ZeroDivisionError: of the program\n"),
        (torch.OutOfMemoryError("tried 9 GiB"), 2, r"error: out of GPU memory: lower MICRO_BATCH_.*; tried 9 GiB\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_rank_that_fails_says_why_and_the_other_one_that_it_is_gone(ranks, error, status, said):
    def experiment(dist: g.Dist) -> None:
        if dist.rank == 1:
            raise error
        waits(dist)

    ranks.start(experiment)
    failed = ranks.ended(1)
    assert failed.status == status and re.fullmatch(said, failed.output), failed.output
    other = ranks.ended(0)
    assert other.status == g.RANK_LOST and names(other.output, 1), other.output


def test_an_error_of_all_ranks_is_said_by_all(ranks):
    def experiment(dist: g.Dist) -> None:
        dist.barrier()
        time.sleep(0.2 * dist.rank)
        raise g.UserError("training diverged")

    ranks.start(experiment)
    for rank in (0, 1):
        assert vars(ranks.ended(rank)) == dict(status=2, output="error: training diverged\n")


@pytest.mark.parametrize("knob", ["ARTIFACT", "RESUME"])
def test_a_rank_that_would_do_something_else_is_refused_before_one_waits_for_another(ranks, knob):
    """It waited for half an hour: rank 0 compared knobs and data, and rank 1 waited for the artifact."""
    ranks.start(is_busy, of_rank_1={knob: "x"})
    for rank in (0, 1):
        ended = ranks.ended(rank)
        assert ended.status == 2
        assert re.search(r"error: rank 1 on \S+ has other choices of ARTIFACT, RESUME and ", ended.output), ended.output


@pytest.mark.parametrize(
    "name, of_rank, said",
    [
        (
            "versions",
            ["torch:2.11 cuda:12.8 numpy:2", "torch:2.11.1+cpu numpy:2"],
            "torch:2.11.1+cpu|torch:2.11, cuda:12.8",
        ),
        ("versions", ["torch:2.11 cuda:12.8", "torch:2.11"], "none of that|cuda:12.8"),
        ("versions", ["torch:2.11", "torch:2.11 cuda:12.8"], "cuda:12.8|none of that"),
        ("triton", [SimpleNamespace(__version__="3.5"), None], "triton:none|triton:3.5"),
        ("device_name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"], "NVIDIA H100 80GB HBM3|NVIDIA H200"),
    ],
)
def test_ranks_that_would_round_differently_are_refused(ranks, monkeypatch, name, of_rank, said):
    """The run went on, and its result named the versions and the GPU of rank 0."""

    def on_a_machine_of_its_own(dist: g.Dist, *_: object) -> None:
        mine = of_rank[dist.rank]
        monkeypatch.setattr(g, name, mine if name == "triton" else lambda *_: mine)

    monkeypatch.setattr(g, "check_ranks_begin_alike", on_a_machine_of_its_own)
    ranks.start(is_busy)
    theirs, first = said.split("|")
    for rank in (0, 1):
        ended = ranks.ended(rank)
        assert ended.status == 2
        expected = rf"error: rank 1 on \S+ has {re.escape(theirs)}, rank 0 on \S+ has {re.escape(first)}, and they "
        assert re.match(expected, ended.output), ended.output


def test_a_collective_that_fails_while_all_ranks_live_shows_its_error(ranks, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("tensors must have one shape")

    def experiment(dist: g.Dist) -> None:
        monkeypatch.setattr(g.torch_dist, "all_reduce", fail)
        waits(dist)

    ranks.start(experiment)
    for rank in (0, 1):
        ended = ranks.ended(rank)
        assert ended.status in {1, g.RANK_LOST}
        assert "RuntimeError: tensors must have one shape" in ended.output or names(ended.output, 1 - rank)
    assert "RuntimeError" in ranks.output(0) + ranks.output(1)


@pytest.mark.parametrize("meanwhile", [is_busy, waits])
def test_sigterm_is_told_in_one_line_that_names_torchrun(ranks, meanwhile):
    """torchrun sends it to all ranks of a machine once one has failed."""

    def experiment(dist: g.Dist) -> None:
        if dist.main:
            Path("waiting").touch()
            meanwhile(dist)
        time.sleep(WORK)

    ranks.start(experiment)
    ranks.wait_for("waiting")
    time.sleep(0.3)  # a rank in a collective hears no signal
    os.kill(ranks.running[0], signal.SIGTERM)
    ended = ranks.ended(0)
    assert ended.status == g.INTERRUPTED
    assert re.fullmatch(r"error: ended by SIGTERM, as by torchrun once a rank has failed; .*\n", ended.output)
    other = ranks.ended(1)
    assert other.status == g.RANK_LOST and names(other.output, 0), other.output


def test_ctrl_c_is_told_by_every_rank_as_that(ranks):
    def experiment(dist: g.Dist) -> None:
        Path(f"at it {dist.rank}").touch()
        waits(dist) if dist.main else is_busy(dist)

    ranks.start(experiment)
    for rank in (0, 1):
        ranks.wait_for(f"at it {rank}")
    time.sleep(0.3)
    for process in ranks.running.values():
        os.kill(process, signal.SIGINT)
    assert vars(ranks.ended(1)) == dict(status=g.INTERRUPTED, output="interrupted\n")
    assert vars(ranks.ended(0)) == dict(status=g.INTERRUPTED, output="interrupted\n")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stops_answering_is_missed(ranks, monkeypatch, stopped):
    """As on a machine that has lost power: its connections stay open."""
    monkeypatch.setattr(g.RankWatch, "SILENCE_S", 0.7)
    assert_missed(ranks, stopped, signal.SIGSTOP, waits)


def test_a_rank_may_stop_for_a_while_and_all_leave_together(ranks):
    def experiment(dist: g.Dist) -> None:
        if dist.rank == 1:
            Path("stopping").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()
        dist.close()
        raise g.UserError("the end")

    ranks.start(experiment)
    ranks.wait_for("stopping")
    time.sleep(1.0)
    os.kill(ranks.running[1], signal.SIGCONT)
    for rank in (0, 1):
        assert vars(ranks.ended(rank)) == dict(status=2, output="error: the end\n")


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for_without_end(ranks, monkeypatch, absent):
    monkeypatch.setattr(g.Dist, "MEETING_S", 1)
    ranks.start(is_busy, absent=(absent,))
    ended = ranks.ended(1 - absent)
    last = ended.output.splitlines()[-1]  # before it, torch may tell of its attempts
    assert ended.status == 2 and f"error: rank {1 - absent} of 2 does not meet the others within 1 s" in last
    assert "MASTER_ADDR" in last and "Traceback" not in ended.output
