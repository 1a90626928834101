"""The progress of a sweep: what its runs report as they go, and the table that shows it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path

from tools.events import Event, read_events
from tools.jobs import Job
from tools.progress import INTERVAL_S
from tools.values import printable
from train_gpt import DataError

ENDS_OF_PHASES = {"trained", "validate", "readout", "before_quantisation", "score"}  # of those that tell their ETA


class GrowingEvents:
    """The events of a run in progress, as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.rest = b""  # beginning of a line that is not complete yet

    def new(self) -> list[Event]:
        """The events since the last call. A damaged line is skipped; it is an error when the finished run is read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                content = file.read()
        except FileNotFoundError:
            return []
        self.position += len(content)
        *lines, self.rest = (self.rest + content).split(b"\n")

        events = []
        for line in lines:
            with contextlib.suppress(DataError):
                events += read_events(line, self.path.name)
        return events


def note_progress(job: Job, event: Event) -> None:
    """Update a job's progress from one event of its run."""
    values = event.values
    match event.name:
        case "validation":
            job.at = "scoring" if job.artifact else "set-up"
        case "setting_up":
            job.at = f"set-up: {values['stage']}"
        case "set_up":
            job.at = "training"
        case "trained" | "readout":
            job.at = "scoring"
        case "step" | "validate":
            job.at = f"step {values['step']}"
            job.bpb = values.get("val_bpb", job.bpb)
        case "scoring":
            job.at = f"scoring {values['what']}: {values['targets_done'] / max(1, values['targets']):.0%}"
        case "before_quantisation":
            job.at = "packing"
            job.bpb = values["prequant_bpb"]
        case "adapted":
            job.at = f"{values['documents_done']}/{values['documents']} documents"
            job.bpb = values["bpb"]
        case "score":
            job.at = "scored"
            job.bpb = values["static_bpb"] if values["val_bpb"] is None else values["val_bpb"]
    note_phase(job, event)


def note_phase(job: Job, event: Event) -> None:
    """Update when the current phase of a job is expected to end."""
    if event.known and "eta_s" in event.values:
        job.phase_ends = time.monotonic() + event.values["eta_s"]
    elif event.name in ENDS_OF_PHASES:
        job.phase_ends = None


class Screen:
    """The live table: redrawn on a terminal; elsewhere one line per change (progress at most every ten seconds per
    job)."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.terminal = sys.stdout.isatty()
        self.lines_drawn = 0
        self.drawn_at = 0.0
        self.printed: dict[str, tuple[str, str, float]] = {}  # run_id -> state, progress, when
        self.summarised = (0, False)  # at the last summary printed: jobs ended, and whether the time left was known

    def show(self, time_left: str, last: bool = False) -> None:
        """Show how far the jobs are, and the time left in words, "" if unknown."""
        if not self.terminal:
            self.print_changes(time_left)
        elif last or time.monotonic() - self.drawn_at > 0.5:
            self.redraw(time_left)

    def print_changes(self, time_left: str) -> None:
        for job in self.jobs:
            state, at, when = self.printed.get(job.run_id, ("waiting", "", 0.0))
            now = time.monotonic()
            if job.state != state or (job.at != at and now - when > INTERVAL_S):
                self.printed[job.run_id] = job.state, job.at, now
                print(self.line(job), flush=True)
        known = self.ended, self.summarised[1] or time_left != ""
        if known != self.summarised:
            self.summarised = known
            print(self.summary(time_left), flush=True)

    @property
    def ended(self) -> int:
        return sum(job.state in {"done", "failed"} for job in self.jobs)

    def summary(self, time_left: str) -> str:
        text = f"{self.ended} of {len(self.jobs)} combinations"
        return f"{text}, {time_left}" if time_left else text

    def line(self, job: Job) -> str:
        parts = [job.label, job.state]
        if job.bpb is not None:
            parts.append(f"bpb {job.bpb:.5f}")
        if job.eta is not None:
            parts.append(f"ETA {job.eta:.0f} s")
        return "  ".join(map(printable, [*parts, job.at]))

    def redraw(self, time_left: str) -> None:
        """Draw the whole table. If not all lines fit, running and failed jobs come first."""
        width, height = shutil.get_terminal_size()
        room = max(1, height - 3)
        shown = self.jobs
        if len(shown) > room:
            order = ("running", "failed", "done", "ready", "waiting")
            shown = sorted(shown, key=lambda job: order.index(job.state))[:room]
        lines = [self.summary(time_left), *map(self.line, shown)]
        if len(shown) < len(self.jobs):
            lines.append(f"... and {len(self.jobs) - len(shown)} more")
        up = f"\x1b[{self.lines_drawn}A" if self.lines_drawn else ""
        print(up + "".join(f"\x1b[2K{line[: width - 1]}\n" for line in lines) + "\x1b[J", end="", flush=True)
        self.lines_drawn = len(lines)
        self.drawn_at = time.monotonic()
