"""Finished runs of a sweep: which are kept and found again, and which do not count."""

import contextlib
import csv
import hashlib
import json
import os
import shutil

import pytest
from stand_in import HELD
from test_results import SOURCE, fabricate

from tools import scheduler, sources, sweep
from tools.finished import require_as_started
from tools.jobs import Job
from tools.results import load_run
from train_gpt import DataError


def test_a_sweep_that_is_kept_goes_on_where_its_logs_and_data_are_not_the_same(stand_in, monkeypatch, capsys):
    stand_in.makes("0.1", gap=0.01)
    stand_in.makes("0.2")
    kept = stand_in.folder / "races/first"
    command = ["--name", "first", "--keep", str(kept)]
    assert sweep.main(["TTT_LR=0.1,0.2", *command]) == 0
    table = (kept / "results.md").read_text()
    left = sorted(path.suffix for path in kept.iterdir() if not path.name.startswith("results"))
    assert left == [".json", ".json", ".npz", ".npz", ".txt", ".txt"], "and no weights"

    shutil.rmtree(stand_in.folder / "logs")  # another machine, with the data elsewhere
    moved = stand_in.folder / "elsewhere"
    shutil.copytree(os.environ["DATA_PATH"], moved)
    monkeypatch.setenv("DATA_PATH", str(moved))
    assert sweep.main(["TTT_LR=0.2,0.1", *command]) == 0
    assert len(stand_in.started()) == 2, "nothing ran twice"
    assert [line for line in (kept / "results.md").read_text().splitlines() if line.startswith("| 0")] == [
        line for line in table.splitlines() if line.startswith("| 0")
    ]

    shutil.rmtree(stand_in.folder / "logs")
    damaged = next(kept.glob("*.docs.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    capsys.readouterr()
    assert sweep.main(["TTT_LR=0.2,0.1", *command]) == 0
    assert len(stand_in.started()) == 3, "what is damaged is run again"
    assert f"will be run again: logs/sweeps/first/{damaged.name}: not the scores of" in capsys.readouterr().out


def test_a_run_that_was_given_the_name_of_another_does_not_count(stand_in, capsys):
    stand_in.makes("0.1", gap=0.01)
    stand_in.makes("0.2")
    assert sweep.main(["TTT_LR=0.1,0.2", "--name", "first"]) == 0
    folder = stand_in.folder / "logs/sweeps/first"
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    better, worse = (stand_in.folder / "logs" / row["run_id"] for row in reversed(rows))
    for suffix in (".json", ".docs.npz", ".txt"):
        shutil.copy(f"{better}{suffix}", f"{worse}{suffix}")
    capsys.readouterr()
    assert sweep.main(["TTT_LR=0.1,0.2", "--name", "first"]) == 0
    assert (
        f"TTT_LR=0.1: will be run again: logs/sweeps/first/{worse.name}.json: its run_id is" in capsys.readouterr().out
    )
    assert [lr for lr, *_ in stand_in.started()] == ["0.1", "0.2", "0.1"]


def test_an_artifact_that_is_replaced_meanwhile_is_noticed(stand_in, tiny_config, capsys):
    path = stand_in.artifact(tiny_config, holdout_tokens=HELD)
    digest = hashlib.sha256((stand_in.folder / path).read_bytes()).hexdigest()
    stand_in.makes("0.1", artifact_sha256=digest)
    stand_in.makes("0.2", artifact_sha256="0" * 64, gap=-0.1)
    assert sweep.main(["TTT_LR=0.1,0.2", "--eval", path]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("- `TTT_LR=0.2`") and "it scored another artifact" in line for line in lines)
    assert lines[-1] == "TTT_LR=0.1"


def test_a_run_that_its_launcher_gave_other_knobs_does_not_count(stand_in, capsys):
    """The table named the rate that was asked for, and had the score of another."""
    stand_in.makes("0.1")
    stand_in.makes("0.2", gap=-0.1)
    assert sweep.main(["TTT_LR=0.1,0.2", "--launcher", "env TTT_LR=0.2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("- `TTT_LR=0.1`") and "it ran with TTT_LR=0.2, expected 0.1" in line for line in lines)
    assert lines[-1] == "TTT_LR=0.2"


def test_a_run_that_scored_other_documents_does_not_count(stand_in):
    """As under a launcher that sets DATA_PATH: the choice was then made on validation."""
    path = fabricate(stand_in.folder / "logs", "one")
    code, scored = (json.loads(path.read_text())[key] for key in ("code_sha256", "validation"))
    job = Job({}, {}, sources.Source("", SOURCE), run_id="one")
    assert job.source.sha256 == code
    for documents, state in ((scored, "done"), ("0" * 64, "failed")):
        job.documents = {"validation": documents}
        job.file(".err").touch()
        scheduler.conclude(job, 0)
        assert job.state == state, job.at
    assert "it scored other documents" in job.at


def test_a_run_that_its_launcher_gave_other_ranks_does_not_count(tmp_path):
    """It was taken for a run on one GPU, or refused for a batch that follows from the number of ranks."""
    path = fabricate(tmp_path, "one")
    result = json.loads(path.read_text()) | {"world_size": 2}
    result["knobs"]["TRAIN_BATCH_TOKENS"] = "2048"
    path.write_text(json.dumps(result))
    job = Job({}, {}, sources.Source("", SOURCE), run_id="one", deciding={"TRAIN_BATCH_TOKENS": "1024"})
    with pytest.raises(DataError, match="it ran on 2 ranks, expected --gpus 1: give"):
        require_as_started(job, load_run(path))


@pytest.mark.parametrize("asked, counts", [("auto", True), ("rms", True), ("adamw", False)])
def test_what_a_run_decides_itself_is_no_other_knob(tmp_path, asked, counts):
    """By its artifact: a result never says TTT_OPTIMIZER=auto."""
    path = fabricate(tmp_path, "one")
    result = json.loads(path.read_text())
    result["knobs"] |= {"TTT_OPTIMIZER": "rms"}
    path.write_text(json.dumps(result))
    job = Job({}, {}, sources.Source("", SOURCE), run_id="one", deciding={"TTT_OPTIMIZER": asked})
    with contextlib.nullcontext() if counts else pytest.raises(DataError, match="it ran with TTT_OPTIMIZER=rms"):
        require_as_started(job, load_run(str(path)))


def test_a_result_that_was_edited_does_not_count(stand_in, capsys):
    stand_in.makes("0.1")
    assert sweep.main(["TTT_LR=0.1", "--name", "first"]) == 0
    (path,) = [path for path in (stand_in.folder / "logs/sweeps/first").glob("*.json")]
    result = json.loads(path.read_text())
    path.with_suffix(".events.jsonl").write_text(json.dumps({"event": "result", **result}) + "\n")
    assert sweep.main(["TTT_LR=0.1", "--name", "first"]) == 0
    path.write_text(json.dumps(result | {"steps": result["steps"] + 1}))
    capsys.readouterr()
    assert sweep.main(["TTT_LR=0.1", "--name", "first"]) == 0
    assert f"{path.name}: it is not the result that its events report" in capsys.readouterr().out
    assert len(stand_in.started()) == 2


def test_a_run_of_a_source_that_was_changed_meanwhile_does_not_count(stand_in, capsys):
    stand_in.makes("0.1")
    job = Job({"TTT_LR": "0.1"}, {}, sources.Source("", b"another"), run_id="one")
    fabricate(stand_in.folder / "logs", "one")
    job.file(".err").touch()
    scheduler.conclude(job, 0)
    assert job.state == "failed" and "changed meanwhile" in job.at
