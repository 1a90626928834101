"""The processes of a sweep: where and in which order they run, and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from stand_in import OURS

import train_gpt
from tools import scheduler, sweep
from tools.jobs import Job
from tools.processes import python_command


@pytest.mark.parametrize(
    "output, reason",
    [
        ("a warning\nerror: no disk\nerror: rank 1 ended\n====\n", "no disk"),
        ("Traceback:\nZeroDivisionError\n\n", "ZeroDivisionError"),
        ("", "exit status 7, no message"),
    ],
)
def test_a_run_fails_for_the_reason_that_was_told_first(tmp_path, output, reason):
    """What the other ranks say of it later is no reason."""
    (tmp_path / "x.err").write_text(output)
    assert scheduler.reason_of(tmp_path / "x.err", 7) == reason


def test_after_ctrl_c_what_is_done_stays_and_the_rest_is_run_later(stand_in, monkeypatch, capsys):
    stand_in.makes("0.1")
    stand_in.makes("0.25")

    def press_ctrl_c():
        while len(stand_in.started()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    (stand_in.folder / "logs/sweeps/cut/.data-1.partial").mkdir(parents=True)  # its making was killed
    threading.Thread(target=press_ctrl_c, daemon=True).start()
    monkeypatch.setattr(scheduler, "STOP_SECONDS", 60.0)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["TTT_LR=0.1,0.25", "--name", "cut"])
    assert time.monotonic() - began < 50, "the run was told to end, not waited for"
    assert "1 of 2 combinations are done" in capsys.readouterr().out
    folder = stand_in.folder / "logs/sweeps/cut"
    files = {path: path.stat() for path in folder.glob("*.json")}
    assert len(files) == 1 and list(folder.glob("*.err")) == []
    assert [path.name for path in folder.glob(".*")] == [".data-1.partial"]
    (stand_in.folder / "go on").touch()
    assert sweep.main(["TTT_LR=0.1,0.25", "--name", "cut"]) == 0
    assert [lr for lr, *_ in stand_in.started()] == ["0.1", "0.25", "0.25"]
    assert all(path.stat() == before for path, before in files.items())


def test_a_run_ends_with_the_sweep_that_was_killed(stand_in, monkeypatch, capsys):
    stand_in.makes("0.25")
    command = (
        f"import train_gpt; train_gpt.__file__ = 'entry.py'; from tools import sweep; sweep.main({['TTT_LR=0.25']})"
    )
    env = os.environ | {"PYTHONPATH": str(Path(sweep.__file__).parents[1])}
    killed = subprocess.Popen([sys.executable, "-c", command], env=env, stdout=subprocess.DEVNULL)
    try:
        (path,) = wait_for(lambda: list((stand_in.folder / "logs/sweeps/ttt_lr").glob("*.txt")))
    finally:
        killed.kill()
        killed.wait()
    monkeypatch.setattr(scheduler, "STOP_SECONDS", 60.0)
    job = Job(
        {}, {}, OURS, run_id=str(path.relative_to("logs" if not path.is_absolute() else Path("logs").resolve()))[:-4]
    )
    scheduler.remove_leftovers(job)  # no run holds its name any more
    (stand_in.folder / "go on").touch()
    assert sweep.main(["TTT_LR=0.25"]) == 0 and len(stand_in.started()) == 2


def test_where_a_run_outlives_its_sweep_its_name_stays_taken(stand_in, monkeypatch):
    """As it may where a system cannot be asked to end it."""
    job = Job({}, {}, OURS, run_id="x")
    with train_gpt.reserve_run_id("x"):
        log = stand_in.folder / "logs/x.txt"
        log.write_text("of the run that goes on")
        monkeypatch.setattr(scheduler, "STOP_SECONDS", 0.2)
        with pytest.raises(train_gpt.UserError, match=f"RUN_ID=x is in use: process {os.getpid()} on "):
            scheduler.remove_leftovers(job)
        assert log.exists()
    scheduler.remove_leftovers(job)
    assert not log.exists()


def wait_for(find, seconds: float = 30.0):
    """What `find` finds, once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_gpus_are_dealt_to_jobs(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert scheduler.device_slots("auto", 1, {}) == ["0", "1", "2"]
    assert scheduler.device_slots("auto", 1, {"CUDA_VISIBLE_DEVICES": "4,6,7"}) == ["4", "6", "7"]
    assert scheduler.device_slots("cuda", 2, {"CUDA_VISIBLE_DEVICES": "4,6,7"}) == ["4,6"]
    assert scheduler.device_slots("cpu", 1, {}) == [None]
    with pytest.raises(train_gpt.ConfigError, match="there are 3"):
        scheduler.device_slots("auto", 4, {})
    monkeypatch.setenv("DEVICE", "auto")
    for lr in ("0.1", "0.2", "0.3"):
        stand_in.makes(lr)
    assert sweep.main(["TTT_LR=0.1,0.2,0.3"]) == 0
    assert sorted(stand_in.started()) == [["0.1", "-", "0"], ["0.2", "-", "1"], ["0.3", "-", "2"]]
    assert "3 at a time" in capsys.readouterr().out


LAUNCHER = """#!/bin/sh
echo "$@" >> launched
shift
exec "$@"
"""


def test_a_launcher_stands_before_every_command_and_jobs_says_how_many_run(stand_in, monkeypatch, capsys):
    path = stand_in.folder / "launcher"
    path.write_text(LAUNCHER)
    path.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # those of the cluster are others
    monkeypatch.setenv("DEVICE", "auto")
    for lr in ("0.1", "0.25"):
        stand_in.makes(lr)
    threading.Thread(target=lambda: wait_for(lambda: len(stand_in.started()) == 2) and Path("go on").touch()).start()
    assert sweep.main(["TTT_LR=0.25,0.1", "--jobs", "2", "--launcher", f"{path} --gpus=1"]) == 0
    assert "2 at a time" in capsys.readouterr().out
    assert all(words[2] == "-" for words in stand_in.started()), "no GPU is chosen for them"
    (copy,) = (stand_in.folder / "logs/sweeps/ttt_lr/sources").iterdir()
    launched = (stand_in.folder / "launched").read_text().splitlines()
    assert launched == [f"--gpus=1 {sys.executable} {copy.resolve()}"] * 2
    for action, more in ((signal.SIG_DFL, []), (signal.SIG_IGN, ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"])):
        monkeypatch.setattr(signal, "getsignal", lambda number, action=action: action)
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more]
        assert python_command(2) == [sys.executable, *ranks]


def test_the_seconds_left_of_a_sweep_are_estimated_before_its_first_job_has_ended(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    jobs = [Job({"SEED": str(seed)}, {}, OURS) for seed in range(5)]
    plan = scheduler.Sweep(jobs, ["0", "1"], scheduler.Command([]), tmp_path)
    plan.running = [scheduler.Running(job, None, None, now, None) for job in jobs[:2]]
    for job in jobs[:2]:
        job.state = "running"
    assert plan.seconds_left() is None and plan.time_left() == "", "neither has said anything"
    now = 110.0
    jobs[0].phase_ends = now + 30.0
    assert plan.seconds_left() == 30.0 + 40.0 + 40.0, "each takes 40 s, and three wait for two places"
    assert plan.time_left() == "at least 110 s left", "other phases may follow"
    now = 150.0  # both take longer than the first had said
    assert plan.seconds_left() == 0.0 + 50.0 + 50.0
    plan.took = [60.0]
    assert plan.seconds_left() == 10.0 + 60.0 + 60.0
    assert plan.time_left() == "about 130 s left"


@pytest.mark.parametrize(
    "left, waiting, seconds", [([70.0], 0, 70.0), ([70.0, 10.0], 1, 70.0), ([70.0, 10.0], 3, 120.0), ([], 0, 0.0)]
)
def test_a_place_that_stays_free_shortens_nothing(left, waiting, seconds):
    assert scheduler.seconds_of_schedule(left, waiting, each=50.0, slots=2) == seconds


def test_a_job_that_fails_at_once_does_not_shorten_the_estimate(stand_in, monkeypatch):
    stand_in.makes("0.1")
    plans = []
    monkeypatch.setattr(scheduler.Sweep, "stop", lambda plan: plans.append(plan))
    assert sweep.main(["TTT_LR=0.5,0.1"]) == 1
    assert len(plans[0].took) == 1


def test_turns_alternate_from_seed_to_seed():
    jobs = [Job({"source": name, "SEED": seed}, {}, OURS) for name in "ab" for seed in "0123"]
    order = [job.knobs["source"] + job.knobs["SEED"] for job in scheduler.take_turns(jobs)]
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]
