"""The live table of a sweep: what it reads from the events of the runs, and how it is drawn."""

import json
import os

import pytest
from stand_in import OURS

from tools import live
from tools.events import read_events
from tools.jobs import Job

STEP = dict(step=50, loss=3.1, progress=0.5, loop=0, tokens_per_s=1.0, epoch=0.1, train_s=9.5, eta_s=12.5)
OPENED = dict(documents=64, tokens=900, bytes=2000)
ADAPTED = dict(documents_done=12, documents=64, bpb=1.3, eval_s=20.0, eta_s=30.0)
SCORE = dict(artifact="logs/a.ptz", static_bpb=1.41, val_bpb=1.39)


@pytest.mark.parametrize(
    "event, values, at, bpb, eta",
    [
        ("validation", OPENED, "set-up", None, None),
        ("step", STEP, "step 50", None, 12.5),
        ("validate", dict(step=50, val_bpb=1.5), "step 50", 1.5, None),
        ("before_quantisation", dict(prequant_bpb=1.4, last_bpb=1.45), "packing", 1.4, None),
        ("adapted", ADAPTED, "12/64 documents", 1.3, 30.0),
        ("score", SCORE, "scored", 1.39, None),
        ("score", SCORE | {"val_bpb": None}, "scored", 1.41, None),
        ("device", dict(world_size=1, device="CPU"), "", None, None),
        ("later", dict(eta_s="soon"), "", None, None),
    ],
)
def test_progress_is_read_from_the_events_as_they_come(tmp_path, event, values, at, bpb, eta):
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


def test_on_a_terminal_the_table_is_redrawn_within_the_screen(monkeypatch, capsys):
    jobs = [Job({"TTT_LR": str(i)}, {}, OURS, state="done" if i < 9 else "running") for i in range(10)]
    screen = live.Screen(jobs)
    screen.terminal = True
    monkeypatch.setattr(live.shutil, "get_terminal_size", lambda fallback=None: os.terminal_size((40, 8)))
    screen.show(12.0)
    screen.show(12.0)  # too soon
    screen.show(0.0, last=True)
    first, second = capsys.readouterr().out.split("\x1b[J")[:2]
    assert first.count("\n") == second.count("\n") == 7 and second.startswith("\x1b[7A")
    assert "9 of 10 combinations, 12 s left" in first and "TTT_LR=9  running" in first and "... and 5 more" in first
    assert all(len(line.replace("\x1b[2K", "")) < 40 for line in first.splitlines())
