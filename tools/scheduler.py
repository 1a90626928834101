"""Runs the jobs of a sweep: which come when and where, their processes, and what becomes of each."""

from __future__ import annotations

import contextlib
import heapq
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt
from tools.finished import KEPT, copy_run, load_finished
from tools.jobs import Job
from tools.live import GrowingEvents, Screen, note_progress
from tools.processes import ends_with_its_parent
from train_gpt import UserError, require

STOP_SECONDS = 10.0  # how long a run has to end after it is told to


def device_slots(device: str, gpus: int, env: Mapping[str, str] = os.environ) -> list[str | None]:
    """One slot per job that can run at the same time: its CUDA_VISIBLE_DEVICES, or None for the CPU."""
    found = 0 if device == "cpu" else torch.cuda.device_count()
    if not found:
        require(gpus == 1, f"--gpus {gpus}: there is no GPU here, or DEVICE=cpu")
        return [None]
    require(gpus <= found, f"--gpus {gpus}: there are {found} here")
    visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
    names = visible.split(",")[:found]
    return [",".join(names[i : i + gpus]) for i in range(0, found - gpus + 1, gpus)]


def take_turns(jobs: list[Job]) -> list[Job]:
    """The order of the runs: seed by seed, every second seed's combinations in reverse (A B, B A, A B, ...), so that
    drift over time, such as a machine that warms up, affects A and B equally."""
    by_seed: dict[str, list[Job]] = {}
    for job in jobs:
        by_seed.setdefault(job.knobs.get("SEED", ""), []).append(job)
    order = []
    for turn, group in enumerate(by_seed.values()):
        order += reversed(group) if turn % 2 else group
    return order


@dataclass(eq=False)
class Running:
    """The process of a job, and the one that takes its slot next."""

    job: Job
    process: subprocess.Popen
    slot: str | None
    started_at: float
    events: GrowingEvents
    trains: bool = False  # its set-up is done
    successor: Running | None = None  # imported and waiting for its signal to begin


class Command(NamedTuple):
    """How the sweep's jobs are started."""

    words: Sequence[str]  # before the path of a source
    train_only: bool = False
    ahead: bool = False  # whether a job may start before its slot is free, and wait


class Sweep:
    """Runs jobs, one per slot at a time, and shows their progress."""

    def __init__(
        self, jobs: list[Job], slots: list[str | None], command: Command, folder: Path, kept: Path | None = None
    ):
        self.jobs = take_turns(jobs)
        self.command = command
        self.folder = folder
        self.kept = kept  # folder that finished runs are copied to
        self.screen = Screen(jobs)
        self.free = list(slots)
        self.slots = len(slots)
        self.running: list[Running] = []
        self.took: list[float] = []  # seconds that each finished job took

    def run_all(self) -> None:
        """Return once every job is done or has failed. A KeyboardInterrupt first ends all runs."""
        try:
            while self.running or any(job.state == "waiting" for job in self.jobs):
                for job in self.jobs:
                    if self.free and job.state == "waiting":
                        self.running.append(self.start(job, self.free.pop(0)))
                for one in list(self.running):
                    self.look_after(one)
                    self.prepare_successor(one)
                self.screen.show(self.time_left())
                time.sleep(0.1)
        finally:
            self.stop()
        self.screen.show("", last=True)

    def start(self, job: Job, slot: str | None, wait: bool = False) -> Running:
        """Start a job's process; with `wait`, it begins only when told to."""
        remove_leftovers(job)
        source = job.source.file(self.folder)
        train_gpt.write_atomically(source, [job.source.content], parents=True)
        env = job.env if slot is None else job.env | {"CUDA_VISIBLE_DEVICES": slot}
        if self.command.train_only:
            env = env | {"PYTHONSAFEPATH": "1"}  # like -P, but also for the ranks that torchrun starts
        with open(job.file(".err"), "wb") as errors:
            process = subprocess.Popen(
                [*self.command.words, str(source.resolve()), *(["--wait"] if wait else [])],
                env=env,
                stdin=subprocess.PIPE if wait else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=ends_with_its_parent(),
            )
        job.state = "ready" if wait else "running"
        job.at = "waits for its place" if wait else "starting"
        events = GrowingEvents(job.file(".events.jsonl"))
        return Running(job, process, slot, time.monotonic(), events)

    def prepare_successor(self, one: Running) -> None:
        """Start the next job while one trains or scores, so that work that needs no GPU is done before its turn."""
        if not self.command.ahead or one not in self.running or not one.trains or one.successor is not None:
            return
        waiting = next((job for job in self.jobs if job.state == "waiting"), None)
        if waiting is not None and not loses_steps(one):
            one.successor = self.start(waiting, one.slot, wait=True)

    def give_place(self, one: Running) -> None:
        """Give a finished job's slot to the job waiting for it, or else free it for any."""
        if one.successor is None:
            self.free.append(one.slot)
            return
        successor = one.successor
        with contextlib.suppress(BrokenPipeError):  # it has failed already; look_after() will notice
            successor.process.stdin.write(b"\n")
            successor.process.stdin.close()
        successor.job.state = "running"
        successor.job.at = "starting"
        successor.started_at = time.monotonic()
        self.running.append(successor)

    def look_after(self, one: Running) -> None:
        """Read a job's events; once its process has ended, settle the job and pass on its slot."""
        status = one.process.poll()
        for event in one.events.new():
            note_progress(one.job, event)
            one.trains = one.trains or event.name == "set_up"
        if status is None:
            return
        self.running.remove(one)
        self.give_place(one)
        spent = time.monotonic() - one.started_at
        conclude(one.job, status, self.command.train_only)
        if one.job.state != "done":
            return
        self.took.append(spent)
        if self.kept is not None:
            copy_run(one.job.file(""), self.kept / Path(one.job.run_id).name, self.command.train_only)

    def time_left(self) -> str:
        """How long the sweep will take, in words; "" if that is unknown, or if it is done."""
        seconds = self.seconds_left()
        return f"{'about' if self.took else 'at least'} {seconds:.0f} s left" if seconds else ""

    def seconds_left(self) -> float | None:
        """Estimated seconds until the sweep is done. A job takes as long as the finished ones did; until one has
        finished, as long as the running ones will at the end of their phases, which is too short if others follow. None
        until one of them has told when that is."""
        now = time.monotonic()
        spent = [now - one.started_at for one in self.running]
        etas = [one.job.eta for one in self.running]
        known = self.took or [s + eta for s, eta in zip(spent, etas, strict=True) if eta is not None]
        if not known:
            return None
        each = sum(known) / len(known)
        left = [max(0.0, each - s, eta or 0.0) for s, eta in zip(spent, etas, strict=True)]
        waiting = sum(job.state in {"waiting", "ready"} for job in self.jobs)
        return seconds_of_schedule(left, waiting, each, self.slots)

    def stop(self) -> None:
        """End all running processes. After Ctrl-C they have received the signal too, and get one second; then they are
        terminated, and finally killed."""
        started = self.running + [one.successor for one in self.running if one.successor is not None]
        processes = [one.process for one in started]
        for seconds, end in ((1.0, subprocess.Popen.terminate), (STOP_SECONDS, subprocess.Popen.kill)):
            deadline = time.monotonic() + seconds
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                time.sleep(0.05)
            for process in processes:
                if process.poll() is None:
                    end(process)
        for one in started:
            one.process.wait()
            one.job.file(".err").unlink(missing_ok=True)
            for partial in one.job.file("").parent.glob(".*.partial"):
                if partial.is_file():  # a folder is data whose preparation was interrupted
                    partial.unlink()


def seconds_of_schedule(left: Sequence[float], waiting: int, each: float, slots: int) -> float:
    """Seconds until all jobs are done: those that run have `left` each, and those that wait take `each`, in the slot
    that is free first."""
    free_in = [*left, *[0.0] * (slots - len(left))]
    heapq.heapify(free_in)
    for _ in range(waiting):
        heapq.heapreplace(free_in, free_in[0] + each)
    return max(free_in)


def loses_steps(one: Running) -> bool:
    """Whether an import beside this run would cost it training steps: on a CPU, with a limit in seconds. If all runs
    but the last had an import beside them, the last would seem to learn faster."""
    return one.slot is None and float(one.job.settings.get("MAX_WALLCLOCK_SECONDS", "0")) > 0


def remove_leftovers(job: Job) -> None:
    """Remove what an interrupted attempt has left. Its run may outlive a sweep that was killed, so wait for it to end.
    Raises UserError if it still runs after STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        try:
            with train_gpt.reserve_run_id(job.run_id):
                for suffix in KEPT:
                    job.file(suffix).unlink(missing_ok=True)
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def conclude(job: Job, status: int, train_only: bool = False) -> None:
    """Settle a job whose process has ended: done if its run can be read; else failed, with the reason in `at`."""
    job.phase_ends = None
    try:
        require(status == 0, reason_of(job.file(".err"), status), UserError)
        run = load_finished(job, train_only)
        result = run.result
        job.finish(run, f"{result['steps']} steps" if train_only else f"{result['eval_seconds']:.0f} s of evaluation")
        job.file(".err").unlink()
    except UserError as error:
        job.state = "failed"
        job.at = str(error)


def reason_of(path: Path, status: int) -> str:
    """The first line of the error output that begins with `error: `, else its last line. When a rank fails, the other
    ranks report that later, so the first such line is the cause."""
    lines = [line for line in train_gpt.read_file(path).decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0]
    return lines[-1] if lines else f"exit status {status}, no message"
