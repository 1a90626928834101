"""Sweeps as a whole: what is ranked, what is reported, and what is not run again.

Most run a stand-in for the entry that takes no time; the slow tests run the entry itself.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from conftest import group_has_ended, process_group
from stand_in import HELD, sweep_here
from test_plot import png_size

import train_gpt
from tools import sweep
from tools.artifact import end_in_a_line
from tools.results import load_run


def test_a_sweep_ranks_what_it_ran_and_runs_nothing_twice(stand_in, capsys):
    stand_in.makes("0.1", gap=0.01, own=1)
    stand_in.makes("0.2", gap=0.0, own=2)
    assert sweep.main(["TTT_LR=0.1,0.2", "TTT_EPOCHS=1,2", "--name", "first"]) == 0
    out = capsys.readouterr().out
    assert sorted(lr for lr, *_ in stand_in.started()) == ["0.1", "0.1", "0.2", "0.2"]
    assert "held out of training" in out and out.splitlines()[-1] == "TTT_LR=0.2 TTT_EPOCHS=1"
    folder = stand_in.folder / "logs/sweeps/first"
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["TTT_LR"], row["TTT_EPOCHS"], row["state"]) for row in rows] == [
        (lr, epochs, "done") for lr in ("0.1", "0.2") for epochs in ("1", "2")
    ]
    text = (folder / "results.md").read_text()
    assert "Scores are in bits per byte. Differences are those to the first row" in text
    table = [line for line in text.splitlines() if line.startswith("| 0")]
    best = load_run(rows[2]["run_id"])
    worst = load_run(rows[0]["run_id"])
    assert table[0].startswith(f"| 0.2 | 1 | {best.bpb:.5f} |  |")
    assert f"| {worst.bpb - best.bpb:+.5f} [+0.0" in table[3], "the interval excludes zero"
    assert float(rows[0]["val_bpb"]) == worst.bpb and rows[0]["run_id"].startswith("sweeps/first/")
    width, height = png_size(folder / "results.png")
    assert width == 900 and height > 100
    assert sweep.main(["TTT_LR=0.2,0.1,0.3", "TTT_EPOCHS=1", "--name", "first"]) == 1, "0.3 has failed"
    assert len(stand_in.started()) == 5 and stand_in.started()[-1][0] == "0.3"


def test_runs_of_different_devices_are_marked(stand_in, capsys):
    stand_in.makes("0.1", device="an old GPU")
    assert sweep.main(["TTT_LR=0.1", "--name", "moved"]) == 0
    assert "different devices" not in capsys.readouterr().out
    stand_in.makes("0.2", device="a new GPU")
    assert sweep.main(["TTT_LR=0.1,0.2", "--name", "moved"]) == 0
    assert "**These runs are of different devices (an old GPU: 1; a new GPU: 1).**" in capsys.readouterr().out


def test_runs_of_different_versions_are_marked(stand_in, capsys):
    """As when torch was updated before the rest of a race was run."""
    stand_in.makes("0.1", versions="torch:2.11")
    stand_in.makes("0.2", versions="torch:2.12")
    assert sweep.main(["TTT_LR=0.1,0.2", "--name", "updated"]) == 0
    said = capsys.readouterr().out
    assert "**These runs are of different versions (torch:2.11: 1; torch:2.12: 1).**" in said
    assert "different devices" not in said


def test_a_combination_of_which_a_seed_failed_is_not_the_best(stand_in, capsys):
    """Its mean is that of the seeds that went well."""
    stand_in.makes("0.1", seed=0)
    stand_in.makes("0.1", seed=1)
    stand_in.makes("0.2", seed=0, gap=-0.05)  # and seed 1 fails
    assert sweep.main(["TTT_LR=0.1,0.2", "SEED=0,1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| 0.")]
    assert [(row[0], row[4]) for row in rows] == [("| 0.1", "0 1"), ("| 0.2", "0 (1 failed)")]
    assert lines[-1] == "TTT_LR=0.1"


def test_a_failing_combination_is_reported_and_the_rest_goes_on(stand_in, capsys):
    stand_in.makes("0.1")
    stand_in.makes("0.2", gap=-0.01)
    assert sweep.main(["TTT_LR=0.1,0.5,0.2"]) == 1
    out = capsys.readouterr().out
    assert [lr for lr, *_ in stand_in.started()] == ["0.1", "0.5", "0.2"]
    assert "TTT_LR=0.5  failed" in out and "planted failure" in out and out.splitlines()[-1] == "TTT_LR=0.2"
    results = (stand_in.folder / "logs/sweeps/ttt_lr/results.md").read_text()
    assert f"DATA_PATH={os.environ['DATA_PATH']}" in results, "what the environment said is part of the command"
    assert "- `TTT_LR=0.5`: planted failure" in results
    assert sweep.main(["TTT_LR=0.1,0.5,0.2"]) == 1
    assert [lr for lr, *_ in stand_in.started()][3:] == ["0.5"], "a failed one is tried again, the others are not"
    assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.5"])) == 2
    assert "every combination failed, the first: planted failure" in capsys.readouterr().err


def test_no_two_sweeps_share_a_folder(stand_in, capsys):
    with sweep.locked(stand_in.folder / "logs/sweeps/ttt_lr"):
        assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.1"])) == 2
    assert "another sweep runs there" in capsys.readouterr().err and stand_in.started() == []


def test_jobs_says_how_many_run_at_once(monkeypatch):
    def found(*words: str, device: str = "cpu") -> list[str | None]:
        return sweep.places(sweep.command_line().parse_args(["A=1", *words]), device)

    assert found("--jobs", "3") == [None, None, None] and found() == [None]
    assert found("--launcher", "srun", "--gpus", "4") == [None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert found("--jobs", "2", device="auto") == ["0", "1"]
    with pytest.raises(train_gpt.ConfigError, match="GPUs for 2 at once"):
        found("--jobs", "3", "--gpus", "2", device="auto")


# ---- the entry itself -------------------------------------------------------


def sweeping(folder: Path, env: dict[str, str], *arguments: str) -> AbstractContextManager[subprocess.Popen]:
    """`python -m tools.sweep` in a process group of its own."""
    env = env | {"PYTHONPATH": str(Path(train_gpt.__file__).parent)}
    return process_group([sys.executable, "-m", "tools.sweep", *arguments], folder, env)


@pytest.mark.slow
@pytest.mark.longest
def test_a_sweep_of_two_runs_is_cut_off_and_gone_on_with(tiny_data, tiny_env, tmp_path):
    env = tiny_env(HOLDOUT_TOKENS=str(HELD), RUN_ID=None, TTT_LR=None)
    command = ["TTT_LR=0.001,0.01", "--name", "two"]
    with sweeping(tmp_path, env, *command) as process:
        for line in process.stdout:
            if line.startswith("TTT_LR=0.01  running"):
                break
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 130 and "1 of 2 combinations are done" in rest
        assert group_has_ended(process.pid), "a run is left behind"
    assert list(tmp_path.rglob("*.partial")) == []
    (first,) = (tmp_path / "logs/sweeps/two").glob("*.json")
    before = first.stat()
    out = sweep_here(tmp_path, env, *command)
    assert "TTT_LR=0.001  done" in out and "TTT_LR=0.001  running" not in out and first.stat() == before
    trained = {run.result["knobs"]["TTT_LR"]: run for run in map(load_run, first.parent.glob("*.json"))}
    assert set(trained) == {"0.001", "0.01"}
    sweep_here(tmp_path, env, "TTT_LR=0.01", "--eval", str(trained["0.001"].path.with_suffix(".ptz")))
    (scored,) = map(load_run, (tmp_path / "logs/sweeps/ttt_lr-eval").glob("*.json"))
    assert scored.bpb == trained["0.01"].bpb and not scored.trained


@pytest.mark.slow
@pytest.mark.longest
def test_the_entry_races_an_edit_of_itself(tiny_data, tiny_env, tmp_path):
    env = tiny_env(HOLDOUT_TOKENS=str(2 * HELD), RUN_ID=None, MATRIX_LR=None, SEED=None)
    old = "matrix_lr: float = knob(0.026,"
    text = Path(train_gpt.__file__).read_text()
    assert old in text
    (tmp_path / "hot.py").write_text(text.replace(old, "matrix_lr: float = knob(0.05,"))
    out = sweep_here(tmp_path, env, "--source", f"{train_gpt.__file__},hot.py", "SEED=5", "--name", "hot")
    runs = list(map(load_run, (tmp_path / "logs/sweeps/hot").glob("*-*.json")))
    assert sorted((run.result["seed"], run.result["knobs"]["MATRIX_LR"]) for run in runs) == [
        (5, "0.026"),
        (5, "0.05"),
    ]
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| source=hot.py")]
    assert [line[2] for line in lines] == ["5", "all 1"]
    assert all("[" in cell for line in lines for cell in line[3:]), "every figure has its interval"
