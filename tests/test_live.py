"""The live table of a sweep: what it reads from the events of the runs, and how it is drawn."""

import json
import os
import time

import pytest
from stand_in import OURS

from tools import live
from tools.events import Event, read_events
from tools.jobs import Job

STEP = dict(step=50, loss=3.1, progress=0.5, loop=0, tokens_per_s=1.0, epoch=0.1, train_s=9.5, eta_s=12.5)
OPENED = dict(documents=64, tokens=900, bytes=2000)
ADAPTED = dict(documents_done=12, documents=64, bpb=1.3, eval_s=20.0, eta_s=30.0)
SCORING = dict(what="validation", targets_done=300, targets=900, eta_s=7.0)
SCORE = dict(artifact="logs/a.ptz", static_bpb=1.41, val_bpb=1.39)


@pytest.mark.parametrize(
    "event, values, at, bpb, eta",
    [
        ("validation", OPENED, "set-up", None, None),
        ("setting_up", dict(stage="compiling"), "set-up: compiling", None, None),
        ("step", STEP, "step 50", None, 12.5),
        ("validate", dict(step=50, val_bpb=1.5), "step 50", 1.5, None),
        ("trained", dict(step=50, file="logs/a.ckpt", bytes=9), "scoring", None, None),
        ("scoring", SCORING, "scoring validation: 33%", None, 7.0),
        ("before_quantisation", dict(prequant_bpb=1.4, last_bpb=1.45), "packing", 1.4, None),
        ("adapted", ADAPTED, "12/64 documents", 1.3, 30.0),
        ("score", SCORE, "scored", 1.39, None),
        ("score", SCORE | {"val_bpb": None}, "scored", 1.41, None),
        ("device", dict(world_size=1, device="CPU"), "", None, None),
        ("later", dict(eta_s="soon"), "", None, None),
    ],
)
def test_progress_is_read_from_the_events_as_they_come(tmp_path, monkeypatch, event, values, at, bpb, eta):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    job = Job({}, {}, OURS)
    path = tmp_path / "run.events.jsonl"
    growing = live.GrowingEvents(path)
    assert growing.new() == []
    line = json.dumps({"event": event, **values}) + "\n"
    for part in ('{"damaged\n' + line[:9], line[9:]):
        with open(path, "a") as file:
            file.write(part)
        found = growing.new()
        for one in found:
            live.note_progress(job, one)
    assert [one.name for one in found] == [event] and growing.new() == []
    assert (job.at, job.bpb, job.eta) == (at, bpb, eta)


def test_a_job_that_scores_an_artifact_says_so_once_its_data_is_open():
    job = Job({}, {}, OURS, artifact="0" * 64)
    (event,) = read_events(json.dumps({"event": "validation", **OPENED}).encode() + b"\n", "it")
    live.note_progress(job, event)
    assert job.at == "scoring"


def test_the_seconds_left_of_a_phase_are_counted_down_between_its_events(monkeypatch):
    job = Job({}, {}, OURS, state="running")
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    live.note_progress(job, Event("scoring", SCORING))
    for now, told in ((100.0, "ETA 7 s"), (105.0, "ETA 2 s"), (110.0, "ETA 0 s")):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        assert told in live.Screen([job]).line(job)
    live.note_progress(job, Event("validate", dict(step=50, val_bpb=1.5)))
    assert job.eta is None, "it was the validation's, and training goes on"


def test_a_log_tells_the_seconds_of_the_whole_sweep_once_they_are_known_and_whenever_a_job_ends(capsys):
    jobs = [Job({"TTT_LR": lr}, {}, OURS, run_id=lr, state="running") for lr in ("1", "2")]
    screen = live.Screen(jobs)
    for left in ("", "at least 50 s left", "at least 49 s left", ""):
        screen.show(left)
    jobs[0].state = "done"
    screen.show("about 20 s left")
    summaries = [line for line in capsys.readouterr().out.splitlines() if "combinations" in line]
    assert summaries == ["0 of 2 combinations, at least 50 s left", "1 of 2 combinations, about 20 s left"]


def test_on_a_terminal_the_table_is_redrawn_within_the_screen(monkeypatch, capsys):
    jobs = [Job({"TTT_LR": str(i)}, {}, OURS, state="done" if i < 9 else "running") for i in range(10)]
    screen = live.Screen(jobs)
    screen.terminal = True
    monkeypatch.setattr(live.shutil, "get_terminal_size", lambda fallback=None: os.terminal_size((40, 8)))
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    screen.show("about 12 s left")
    screen.show("about 12 s left")  # too soon
    screen.show("", last=True)
    first, second, _ = capsys.readouterr().out.split("\x1b[J")
    assert first.count("\n") == second.count("\n") == 7 and second.startswith("\x1b[7A")
    assert (
        "9 of 10 combinations, about 12 s left" in first and "TTT_LR=9  running" in first and "... and 5 more" in first
    )
    assert all(len(line.replace("\x1b[2K", "")) < 40 for line in first.splitlines())
