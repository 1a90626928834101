"""Jobs of `sweep --train-only`: they train as the entry does, begin when they are told, and are no scores."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import leave_process_alone
from stand_in import HELD, sweep_here, tokenizer_of

import train_gpt
from tools import check, record, scheduler, sweep, train_only
from tools.artifact import end_in_a_line
from tools.events import first_difference
from tools.holdout import make_holdout
from tools.jobs import Job
from tools.results import load_run

ENTRY = Path(train_gpt.__file__)


@pytest.fixture
def held_env(tiny_data, tiny_env, tmp_path):
    """held_env(RUN_ID="x", ...): the environment of a tiny run that scores held-out training documents."""
    folder = tmp_path / "held"
    make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, folder)
    return lambda **changes: tiny_env(DATA_PATH=str(folder), HOLDOUT_TOKENS=str(HELD), **changes)


def start(folder: Path, env: dict[str, str], *options: str, source: Path = ENTRY) -> subprocess.Popen:
    command = [sys.executable, "-P", train_only.__file__, str(source), *options]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


@pytest.fixture
def job_here(tmp_path, monkeypatch, capsys):
    """job_here(env, *options, source=ENTRY): a job in this process, which need not import torch again -> its exit
    status, or the words of its exit, and its messages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "train_gpt", train_gpt)  # goes back in the end: the job puts its source there

    def load(path: str):
        entry = plain(path)
        leave_process_alone(entry, monkeypatch)
        return entry

    plain = train_only.load
    monkeypatch.setattr(train_only, "load", load)

    def run(env: dict[str, str], *options: str, source: Path = ENTRY) -> tuple[int | str, str]:
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            try:
                status = train_only.main(str(source), *options)
            except SystemExit as end:
                status = end.code
        return status, capsys.readouterr().err

    return run


def finish(process: subprocess.Popen, said: str = "") -> str:
    """Tell it something, and wait for its end -> its error output; it must have succeeded."""
    _, errors = process.communicate(said, timeout=120)
    assert process.returncode == 0, errors
    return errors


def test_it_learns_what_a_whole_run_learns_bit_for_bit_and_is_no_score(
    held_env, run_here, tmp_path, monkeypatch, capsys
):
    finish(start(tmp_path, held_env(RUN_ID="alone")))
    whole = run_here(env=held_env(RUN_ID="whole", TTT_ENABLED="0", TTT_OPTIMIZER=None))
    assert whole.returncode == 0, whole.stderr
    logs = tmp_path / "logs"
    trained = load_run("alone", logs, train_only=True)
    scored = load_run("whole", logs)
    assert trained.prequant_nats.tolist() == scored.prequant_nats.tolist(), "every document, every bit"
    assert trained.validation == scored.validation and trained.bpb == scored.result["prequant_bpb"]
    assert [loss for *_, loss in trained.result["history"]] == [loss for *_, loss in scored.result["history"]]
    assert trained.result["readout"] == scored.result["readout"] and trained.result["steps"] == 3
    assert trained.result["train_loss"] == pytest.approx(np.mean([loss for *_, loss in trained.result["history"]]))
    assert first_difference(trained.log_text, trained.events) is None
    left = sorted(path.name for path in logs.iterdir() if path.name.startswith("alone"))
    assert left == ["alone.docs.npz", "alone.events.jsonl", "alone.json", "alone.txt"], "and no artifact"

    for name, read in (("alone", load_run), ("whole", lambda *words: load_run(*words, train_only=True))):
        with pytest.raises(train_gpt.DataError, match=r"its run only trained|it lacks train_only"):
            read(name, logs)
    monkeypatch.chdir(tmp_path)
    assert record.find_finished(train_gpt.ModelConfig(), train_gpt.RunConfig(run_id="alone")) is None
    assert "its run only trained" in capsys.readouterr().out
    kept = tmp_path / "record"
    kept.mkdir()
    for suffix, name in ((".json", "train_seed42.json"), (".docs.npz", "train_seed42.docs.npz")):
        (kept / name).write_bytes((logs / f"alone{suffix}").read_bytes())
    (kept / "train_seed42.log").write_bytes((logs / "alone.txt").read_bytes())
    with pytest.raises(train_gpt.DataError, match="its run only trained"):
        check.read_runs(kept)


PROBE = """
import torch

def noting(call):
    def noted(*words):
        open("touched", "a").close()
        return call(*words)
    return noted

for name in ("is_available", "_lazy_init", "set_device", "device_count"):
    setattr(torch.cuda, name, noting(getattr(torch.cuda, name)))
"""


def test_it_waits_until_it_is_told_and_touches_no_gpu_before(held_env, tmp_path, job_here, monkeypatch):
    source = tmp_path / "probed.py"
    main = '\nif __name__ == "__main__":'
    assert main in ENTRY.read_text()
    source.write_text(ENTRY.read_text().replace(main, PROBE + main))
    process = start(tmp_path, held_env(RUN_ID="later", DEVICE="auto"), "--wait", source=source)
    assert process.stdout.readline() == "waits\n"
    assert not (tmp_path / "touched").exists() and not (tmp_path / "logs").exists()
    finish(process, "\n")
    assert (tmp_path / "touched").exists() and load_run("later", tmp_path / "logs", train_only=True).trained

    (tmp_path / "logs/later.json").unlink()
    monkeypatch.setattr(os, "read", lambda file, count: b"")  # the end of its input is no word
    said, _ = job_here(held_env(RUN_ID="later"), "--wait")
    assert "never told" in said and not (tmp_path / "logs/later.json").exists()


@pytest.mark.parametrize("name", ["ARTIFACT", "RESUME"])
def test_it_trains_from_the_start_alone(held_env, tmp_path, job_here, name):
    status, errors = job_here(held_env(RUN_ID="x", **{name: "logs/other"}))
    assert status == 2 and f"error: {name}=logs/other: this trains from the start" in errors
    assert not (tmp_path / "logs/x.txt").exists()


def test_a_source_that_cannot_be_trained_alone_is_refused(held_env, tmp_path, job_here, monkeypatch, capsys):
    source = tmp_path / "older.py"
    source.write_text(ENTRY.read_text().replace("def warm_up(", "def warm_up_as_before("))
    status, errors = job_here(held_env(RUN_ID="x"), source=source)
    assert status == 2 and errors.endswith("it has no warm_up: it cannot be trained alone\n")

    monkeypatch.chdir(tmp_path)
    for name, value in held_env(RUN_ID="").items():
        monkeypatch.setenv(name, value)
    refused = (
        (["SEED=0,1", "--source", f"{ENTRY},older.py"], "older.py: it has no warm_up"),
        (["TTT_EPOCHS=1,2"], "TTT_EPOCHS changes nothing before quantisation"),
        (["EVAL_SECONDS=1,2"], "EVAL_SECONDS changes nothing before quantisation"),
        (["SEED=0,1", "--eval", "a.ptz"], "--train-only trains, and --eval does not"),
        (["SEED=0,1", "--on", "validation"], "leave --on out"),
    )
    for words, message in refused:
        assert end_in_a_line(lambda words=words: sweep.main(["--train-only", *words])) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("slot, seconds, ahead", [(None, "0.0", True), (None, "60.0", False), ("0", "60.0", True)])
def test_no_import_takes_steps_from_a_run_whose_seconds_count(tmp_path, monkeypatch, slot, seconds, ahead):
    jobs = [Job({}, {}, None, {"MAX_WALLCLOCK_SECONDS": seconds}) for _ in range(2)]
    running = scheduler.Running(jobs[0], None, slot, 0.0, None, trains=True)
    jobs[0].state = "running"
    whole = scheduler.Sweep(jobs, [slot], scheduler.Command([], train_only=True, ahead=True), tmp_path)
    whole.running = [running]
    monkeypatch.setattr(whole, "start", lambda job, slot, wait: (job, slot, wait))
    whole.prepare_successor(running)
    assert running.successor == ((jobs[1], slot, True) if ahead else None)


@pytest.mark.slow
@pytest.mark.longest
def test_a_race_of_training_alone_is_ranked_kept_and_gone_on_with(tiny_data, tiny_env, tmp_path):
    env = tiny_env(HOLDOUT_TOKENS=str(2 * HELD), RUN_ID=None, MATRIX_LR=None, SEED=None)
    words = ["--train-only", "--name", "race", "--keep", "kept", "MATRIX_LR=0.02,0.05"]

    out = sweep_here(tmp_path, env, *words, "SEED=0,1")
    assert out.count("  ready  waits for its place") == 3, "every job but the first"
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| MATRIX_LR=0.05")]
    assert [line[2] for line in lines] == ["0", "1", "all 2"] and all("[" in line[3] for line in lines)
    assert "| MATRIX_LR | before quantisation | difference | seeds | read-out | steps | tokens/s" in out
    rows = list(csv.DictReader((tmp_path / "kept/results.csv").read_text().splitlines()))
    runs = [load_run(row["run_id"], tmp_path / "logs", train_only=True) for row in rows]
    assert [float(row["prequant_bpb"]) for row in rows] == [run.bpb for run in runs] and "val_bpb" not in rows[0]
    assert len({run.bpb for run in runs}) == 4 and (tmp_path / "kept/results.png").exists()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.json")}
    assert not list((tmp_path / "kept").glob("*.txt")), "each would hold the source"
    os.rename(tmp_path / "logs", tmp_path / "logs of another machine")
    assert "running" not in sweep_here(tmp_path, env, *words, "SEED=1,0") and len(before) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert json.loads(next(iter(before)).read_text())["train_only"] is True
