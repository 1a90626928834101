"""Sweeps: what is held out, what is refused, what is run and what is not run again.

Most run a stand-in for the entry that takes no time; the slow test runs the entry itself.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_plot import png_size
from test_results import fabricate

import train_gpt
from data import prepare
from tools import ask_source, live, scheduler, sources, sweep
from tools.artifact import end_in_a_line
from tools.events import Event, read_events
from tools.grid import parse_grid
from tools.holdout import caseops_sidecar, make_holdout
from tools.jobs import RUN_SH, Job, make_jobs, training_knobs
from tools.results import load_run

HELD = 300  # of the 1,500 training tokens of tiny_data
OURS = sources.Source("", b"")


# ---- held-out documents -----------------------------------------------------


def training_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([train_gpt.read_shard(path) for path in train_gpt.find_shards(str(folder), "train")])


def tokenizer_of(folder: Path, vocab_size: int = 64) -> train_gpt.Tokenizer:
    return train_gpt.load_tokenizer(train_gpt.RunConfig(data_path=str(folder)), vocab_size)


def test_the_documents_are_the_held_out_ones_and_training_never_reads_them(tiny_data, tiny_run, tmp_path):
    facts = make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, tmp_path / "held")
    whole = training_tokens(tiny_data)
    run = tiny_run(data_path=str(tmp_path / "held"), holdout_tokens=HELD)
    docs = train_gpt.load_validation(run.data_path, 64, tokenizer_of(tmp_path / "held"))
    starts = np.flatnonzero(whole == train_gpt.BOS)
    inside = starts[starts >= len(whole) - HELD]
    assert docs.tokens.tolist() == whole[inside[0] : inside[-1]].tolist()
    assert len(docs) == facts["documents"] == len(inside) - 1 > 3
    stream = train_gpt.TrainingStream(run, 64, train_gpt.Dist())
    assert stream.read(0, 3 * len(whole)).tolist() == np.resize(whole[:-HELD], 3 * len(whole)).tolist()
    text = tokenizer_of(tiny_data).processor.decode(docs.tokens[1 : docs.starts[1]].tolist())
    assert docs.target_bytes()[0] == len(text.encode())
    assert [p for p in (tmp_path / "held").iterdir() if "bytes" in p.name] == []


def test_a_finished_folder_is_kept_and_another_hold_out_replaces_it(tiny_data, tmp_path):
    held = tmp_path / "held"
    tokenizer = tokenizer_of(tiny_data)
    make_holdout(tiny_data, tokenizer, HELD, held)
    before = (held / "manifest.json").stat()
    make_holdout(tiny_data, tokenizer, HELD, held)
    assert (held / "manifest.json").stat() == before
    tokens = len(train_gpt.read_shard(held / "fineweb_val_000000.bin"))
    make_holdout(tiny_data, tokenizer, 2 * HELD, held)
    assert len(train_gpt.read_shard(held / "fineweb_val_000000.bin")) > tokens + HELD / 2
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_with_caseops_a_document_weighs_its_original_bytes(tmp_path):
    chance = random.Random(0)
    words = ["Word", "wORD", "NASA", "\ue001x", "naïve", "\u2581", "one\n two"]
    texts = [f"{i} " + " ".join(chance.choices(words, k=chance.randint(1, 60))) for i in range(120)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "val.jsonl").write_text(json.dumps("A text FOR Validation") + "\n")
    command = ["jsonl", str(tmp_path / "texts.jsonl"), "--val", str(tmp_path / "val.jsonl"), "--vocab-size", "320"]
    assert prepare.main([*command, "--out", str(tmp_path), "--workers", "1"]) == 0
    data = tmp_path / "datasets" / "jsonl"
    held = tmp_path / "held"
    tokenizer = tokenizer_of(data, 320)
    tokens = train_gpt.read_shard(data / "fineweb_val_000000.bin")
    written = train_gpt.read_shard(data / "fineweb_val_bytes_000000.bin")
    assert caseops_sidecar(np.asarray(tokens), tokenizer).tolist() == written.tolist()
    make_holdout(data, tokenizer, 2000, held)
    docs = train_gpt.load_validation(str(held), 320, tokenizer_of(held, 320))
    last = texts[-len(docs) - 1 : -1]
    assert len(docs) > 5 and docs.target_bytes().tolist() == [len(text.encode()) for text in last]


@pytest.mark.parametrize("held, words", [(0, "HOLDOUT_TOKENS=0"), (1501, "holds 1500"), (2, "no whole document")])
def test_a_hold_out_that_cannot_be_made_is_refused(tiny_data, tmp_path, held, words):
    with pytest.raises(train_gpt.UserError, match=words):
        make_holdout(tiny_data, tokenizer_of(tiny_data), held, tmp_path / "held")
    assert not (tmp_path / "held").exists()


def test_a_held_out_token_of_another_tokenizer_is_named_with_its_shard(tiny_data, tmp_path, write_shard):
    path = tiny_data / "fineweb_train_000002.bin"
    write_shard(path, [*train_gpt.read_shard(path)[:-5].tolist(), 64, 3, 3, 3, 3])
    with pytest.raises(train_gpt.DataError, match=f"{path}: token 64 at position 695"):
        make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, tmp_path / "held")


def test_bytes_of_transformed_text_are_not_guessed(tiny_data, tmp_path, write_shard):
    write_shard(tiny_data / "fineweb_val_bytes_000000.bin", [1])
    with pytest.raises(train_gpt.DataError, match="how its text was transformed"):
        make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, tmp_path / "held")


# ---- sweeps of a stand-in ---------------------------------------------------

STAND_IN = """
import fcntl, hashlib, json, os, pathlib, shutil, sys, time

lr, source = os.environ["TTT_LR"], pathlib.Path(__file__).read_bytes()
out = pathlib.Path("logs", os.environ["RUN_ID"])
lock = open(out.with_suffix(".lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open("started", "a") as started:
    print(lr, os.environ.get("SEED", "-"), os.environ.get("CUDA_VISIBLE_DEVICES", "-"), file=started)
out.with_suffix(".txt").write_bytes(source)
if lr == "0.5":
    sys.exit("error: planted failure")
while lr == "0.25" and not os.path.exists("go on"):
    time.sleep(0.01)
made = pathlib.Path("made", lr + "-" + os.environ.get("SEED", "1"))
result = json.loads(made.with_suffix(made.suffix + ".json").read_text())
shutil.copy(f"{made}.docs.npz", f"{out}.docs.npz")
result |= dict(run_id=os.environ["RUN_ID"], code_sha256=hashlib.sha256(source).hexdigest(), code_bytes=len(source))
result["total_bytes"] = result["artifact_bytes"] + len(source)
out.with_suffix(".json").write_text(json.dumps(result))
"""


class StandIn:
    """A folder in which sweeps run the stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder

    def makes(self, lr: str, seed: int = 1, **how) -> None:
        fabricate(self.folder / "made", f"{lr}-{seed}", seed=seed, **how)

    def started(self) -> list[list[str]]:
        path = self.folder / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def artifact(self, config: train_gpt.ModelConfig, **meta) -> str:
        """The path of an artifact without weights: sweeps read its description only."""
        tokenizer = hashlib.sha256((self.folder / "data/tokenizer.model").read_bytes()).hexdigest()
        data = self.folder / "data"
        held = make_holdout(data, tokenizer_of(data), HELD, self.folder / "of the artifact")["sha256"]
        meta = dict(kind="artifact", model=dataclasses.asdict(config), tokenizer=tokenizer, holdout=held) | meta
        (self.folder / "given.ptz").write_bytes(train_gpt.pack(meta, {}, None))
        return "given.ptz"


@pytest.fixture
def stand_in(tmp_path, tiny_data, tiny_config, tiny_run, monkeypatch) -> StandIn:
    for name, value in train_gpt.settings(tiny_config, tiny_run(holdout_tokens=HELD)).items():
        if value and name not in ("TTT_LR", "TTT_OPTIMIZER"):
            monkeypatch.setenv(name, value)
    for name in ("SEED", "ARTIFACT", "RESUME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "entry.py").write_text(STAND_IN)
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "entry.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "code", Path("entry.py").read_bytes)  # anew whenever it is asked for
    return StandIn(tmp_path)


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


def test_runs_of_different_devices_are_marked(stand_in, capsys):
    stand_in.makes("0.1", device="an old GPU")
    assert sweep.main(["TTT_LR=0.1", "--name", "moved"]) == 0
    assert "different devices" not in capsys.readouterr().out
    stand_in.makes("0.2", device="a new GPU")
    assert sweep.main(["TTT_LR=0.1,0.2", "--name", "moved"]) == 0
    assert "**These runs are of different devices (an old GPU: 1; a new GPU: 1).**" in capsys.readouterr().out


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


def test_after_ctrl_c_what_is_done_stays_and_the_rest_is_run_later(stand_in, capsys):
    stand_in.makes("0.1")
    stand_in.makes("0.25")

    def press_ctrl_c():
        while len(stand_in.started()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    (stand_in.folder / "logs/sweeps/cut/.data-1.partial").mkdir(parents=True)  # its making was killed
    threading.Thread(target=press_ctrl_c, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["TTT_LR=0.1,0.25", "--name", "cut"])
    assert time.monotonic() - began < 8, "the run was told to end, not waited for"
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
    monkeypatch.setattr(scheduler, "STOP_SECONDS", 5.0)
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


def test_another_source_another_artifact_and_other_knobs_are_other_combinations(stand_in, tiny_config, monkeypatch):
    stand_in.makes("0.1")
    artifact = stand_in.artifact(tiny_config, holdout_tokens=HELD)
    command = ["TTT_LR=0.1", "--eval", artifact]

    def runs_it() -> bool:
        before = len(stand_in.started())
        assert sweep.main(command) == 0
        return len(stand_in.started()) > before

    assert runs_it() and not runs_it()
    monkeypatch.setenv("MATRIX_LR", "0.5")
    monkeypatch.setenv("TTT_EPOCHS", "1")
    assert not runs_it(), "a knob of training, and a default: nothing differs"
    monkeypatch.setenv("TTT_EPOCHS", "2")
    assert runs_it()
    stand_in.artifact(tiny_config, holdout_tokens=HELD, other=1)
    assert runs_it()
    (stand_in.folder / "entry.py").write_text(STAND_IN + "# changed\n")
    assert runs_it() and not runs_it()


def test_other_training_text_in_shards_of_the_same_size_is_another_combination(stand_in, write_shard, capsys):
    stand_in.makes("0.1")
    assert sweep.main(["TTT_LR=0.1"]) == 0
    shard = stand_in.folder / "data/fineweb_train_000000.bin"
    tokens = train_gpt.read_shard(shard).tolist()
    write_shard(shard, [*tokens[:200], *tokens[200:300][::-1], *tokens[300:]])
    assert sweep.main(["TTT_LR=0.1"]) == 0 and len(stand_in.started()) == 2


def test_seeds_share_a_row_and_values_may_hold_commas(stand_in, monkeypatch, capsys):
    for seed in (0, 2):
        stand_in.makes("0.1", seed=seed, own=seed)
        stand_in.makes("0.2", seed=seed, own=seed, gap=0.1)
    assert sweep.main(["TTT_LR=0.2,0.1", "SEED=0,2", "TTT_LORA_TARGETS=q,v;head"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "TTT_LR=0.1 TTT_LORA_TARGETS=q,v"
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| 0.")]
    assert [(row[0], row[1], row[5]) for row in rows] == [
        ("| 0.1", "q,v", "0 2"),
        ("| 0.1", "head", "0 2"),
        ("| 0.2", "q,v", "0 2"),
        ("| 0.2", "head", "0 2"),
    ]
    done = [
        load_run(path)
        for path in (stand_in.folder / "logs/sweeps").rglob("*.json")
        if path.name[0] in "0123456789abcdef"
    ]
    mean = np.mean(sorted(run.bpb for run in done)[:4])
    assert rows[0][2].startswith(f"{mean:.5f} ± ") and rows[1][3].startswith("+0.00000 [")
    monkeypatch.setenv("TTT_LR", "0.1")
    assert sweep.main(["SEED=0,2"]) == 0
    assert "the best" not in capsys.readouterr().out


def test_a_file_gives_one_combination_a_line(stand_in, capsys):
    stand_in.makes("0.1")
    stand_in.makes("0.2", gap=-0.1)
    (stand_in.folder / "two.txt").write_text("TTT_LR=0.1 TTT_EPOCHS=3\n# none\n\nTTT_LR=0.2 TTT_COSINE=1\n")
    assert sweep.main(["--file", "two.txt"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "TTT_LR=0.2 TTT_COSINE=1"
    assert (
        "| TTT_LR | TTT_EPOCHS | TTT_COSINE | bpb" in out and "| 0.2 |  | 1 | 1." in out and "| 0.1 | 3 |  | 1." in out
    )
    assert (stand_in.folder / "logs/sweeps/two/results.md").exists()


def test_lines_of_a_file_share_a_row_whatever_the_order_of_their_words(stand_in, capsys):
    for seed in (0, 2):
        stand_in.makes("0.1", seed=seed)
    (stand_in.folder / "two.txt").write_text("TTT_LR=0.1 TTT_EPOCHS=3 SEED=0\nSEED=2 TTT_EPOCHS=3 TTT_LR=0.1\n")
    assert sweep.main(["--file", "two.txt"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.1")]
    assert row.split(" | ")[5] == "0 2"


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


def test_validation_is_marked_and_needs_no_hold_out(stand_in, tiny_config, monkeypatch, capsys):
    stand_in.makes("0.1")
    artifact = stand_in.artifact(tiny_config, holdout_tokens=0)
    assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.1", "--eval", artifact])) == 2
    assert "held no training documents back (holdout_tokens is 0)" in capsys.readouterr().err
    assert stand_in.started() == []
    assert sweep.main(["TTT_LR=0.1", "--eval", artifact, "--on", "validation"]) == 0
    out = capsys.readouterr().out
    assert "**VALIDATION. Nothing may be chosen from this table.**" in out and "best" not in out
    assert (stand_in.folder / "logs/sweeps/ttt_lr-eval-validation/results.md").exists()
    make_holdout(stand_in.folder / "data", tokenizer_of(stand_in.folder / "data"), HELD, stand_in.folder / "held")
    monkeypatch.setenv("DATA_PATH", "held")
    assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.1", "--on", "validation"])) == 2
    assert "it holds no validation" in capsys.readouterr().err


def test_held_out_text_that_the_artifact_may_have_learnt_is_refused(stand_in, tiny_config, write_shard, capsys):
    artifact = stand_in.artifact(tiny_config, holdout_tokens=HELD)
    path = sorted((stand_in.folder / "data").glob("fineweb_train_*"))[-1]
    write_shard(path, train_gpt.read_shard(path)[:-50].tolist())
    assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.1", "--eval", artifact])) == 2
    assert "did not learn from" in capsys.readouterr().err and stand_in.started() == []


def test_an_evaluation_is_told_apart_by_every_knob_that_it_reads():
    ours = {field.name.upper() for field in dataclasses.fields(train_gpt.RunConfig)}
    useless = training_knobs(ask_source.knob_groups(train_gpt))
    assert not {name for name in useless if name.startswith(("EVAL_", "TTT_", "MICRO_"))}
    assert {"SEED", "DEVICE", "COMPILE"} <= ours - useless


def test_a_combination_has_the_defaults_of_run_sh_that_go_with_it(monkeypatch):
    for name in train_gpt.KNOBS:
        monkeypatch.delenv(name, raising=False)
    told = subprocess.run([RUN_SH, "small-job-defaults"], capture_output=True, text=True, check=True).stdout
    defaults = dict(line.split("=", 1) for line in told.splitlines())
    for name, value in (defaults | {"RUN_SH_DEFAULTS": " ".join(defaults)}).items():
        monkeypatch.setenv(name, value)

    def made(*grid: str) -> list[dict[str, str]]:
        return [job.env for job in make_jobs(parse_grid(grid), None, 1, [OURS])]

    lora, full = made("TTT_PARAMS=lora,full")
    assert (lora["TTT_LORA_RANK"], lora["TTT_CHUNK_TOKENS"], full["TTT_CHUNK_TOKENS"]) == ("8", "16", "128")
    assert lora["ITERATIONS"] == full["ITERATIONS"] and "TTT_LORA_RANK" not in full
    document, stream = made("TTT_SCOPE=document,stream", "TTT_LR=0.1")
    assert document["TTT_LORA_RANK"] == stream["TTT_LORA_RANK"] and document["TTT_LR"] == stream["TTT_LR"] == "0.1"
    assert "TTT_BATCH_DOCS" in document.keys() - stream.keys()
    monkeypatch.setenv("RUN_SH_DEFAULTS", " ".join(defaults.keys() - {"TTT_LORA_RANK"}))
    with pytest.raises(train_gpt.ConfigError, match="TTT_PARAMS=full: TTT_LORA_RANK has no effect"):
        made("TTT_PARAMS=lora,full")


def test_a_batch_that_the_budget_decides_is_swept_like_one_that_is_set(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("TRAIN_BATCH_TOKENS", "0")
    (job,) = make_jobs([{"SEED": "1"}], None, 4, [OURS])
    assert job.settings["TRAIN_BATCH_TOKENS"] == "786432", "steps alone limit it"
    stand_in.makes("0.1")
    assert sweep.main(["TTT_LR=0.1"]) == 0 and len(stand_in.started()) == 1
    capsys.readouterr()
    assert end_in_a_line(lambda: sweep.main(["TRAIN_BATCH_TOKENS=0,786432"])) == 2
    assert "are the same combination" in capsys.readouterr().err


def test_rules_are_swept_each_with_its_own_defaults(stand_in, monkeypatch):
    monkeypatch.delenv("TTT_WEIGHT_DECAY", raising=False)
    monkeypatch.delenv("TTT_RMS_FLOOR", raising=False)
    jobs = make_jobs(parse_grid(["TTT_OPTIMIZER=auto,rms,adamw,sgd"]), "given.ptz", 1, [OURS])
    runs = [train_gpt.read_env(job.env)[1] for job in jobs]
    assert [run.ttt_lr for run in runs] == [None, 8e-5, 1e-4, 1e-4]  # auto: the artifact, once it is open, decides
    with pytest.raises(train_gpt.ConfigError, match="GRAD_RMS_TOKENS is for training"):
        make_jobs(parse_grid(["GRAD_RMS_TOKENS=0,200"]), "given.ptz", 1, [OURS])


@pytest.mark.parametrize(
    "command, words",
    [
        ("TTT_LRR=0.1", "did you mean TTT_LR?"),
        ("PATH=0.1", "PATH is not a knob"),
        ("TTT_LR=0.1,fast", "TTT_LR=fast"),
        ("TTT_LR=0.1,0.10", "are the same combination"),
        ("TTT_LR=0.1 TTT_LR=0.2", "given twice"),
        ("TTT_LR", "expected NAME=value"),
        ("TTT_LR=0.1 TTT_PARAMS=lora,full", "TTT_PARAMS=full: TTT_"),
        ("TTT_OPTIMIZER=adamw TTT_MOMENTUM=0.9", "TTT_MOMENTUM has no effect"),
        ("TRAIN_BATCH_TOKENS=256,300", "TRAIN_BATCH_TOKENS=300 must be a multiple"),
        ("RUN_ID=a,b", "RUN_ID cannot be swept"),
        ("DATA_PATH=a,b", "must score the same documents"),
        ("HOLDOUT_TOKENS=1,2", "must score the same documents"),
        ("TTT_LR=0.1 --gpus 2", "--gpus 2"),
        ("TTT_LR=0.1 --name ../x", "--name"),
        ("", "give a grid"),
        ("TTT_LR=0.1 --eval absent.ptz", "absent.ptz: cannot be read"),
        ("MATRIX_LR=0.1 --eval absent.ptz", "MATRIX_LR is for training"),
        ("--file absent.txt", "absent.txt: cannot be read"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_before_anything_ran(stand_in, capsys, command, words):
    assert end_in_a_line(lambda: sweep.main(command.split())) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert stand_in.started() == []


@pytest.mark.parametrize(
    "lines, words",
    [
        ("TTT_LR=0.1\nfast\n", ":2: expected NAME=value"),
        ("TTT_LR='0.1\n", ":1: No closing quotation"),
        ("TTT_LR=0.1 SEED=1 TTT_LR=0.2\n", ":1: TTT_LR is given twice"),
        ("TTT_LR=0.1\nTTT_LRR=2\n", "did you mean TTT_LR?"),
        ("# none\n", "no combination"),
    ],
)
def test_a_file_that_is_no_list_of_combinations_is_refused(stand_in, capsys, lines, words):
    (stand_in.folder / "bad.txt").write_text(lines)
    assert end_in_a_line(lambda: sweep.main(["--file", "bad.txt"])) == 2
    assert words in capsys.readouterr().err and stand_in.started() == []


def test_no_two_sweeps_share_a_folder(stand_in, capsys):
    with sweep.locked(stand_in.folder / "logs/sweeps/ttt_lr"):
        assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.1"])) == 2
    assert "another sweep runs there" in capsys.readouterr().err and stand_in.started() == []


def test_a_run_of_a_source_that_was_changed_meanwhile_does_not_count(stand_in, capsys):
    stand_in.makes("0.1")
    job = Job({"TTT_LR": "0.1"}, {}, sources.Source("", b"another"), run_id="one")
    fabricate(stand_in.folder / "logs", "one")
    job.file(".err").touch()
    scheduler.conclude(job, 0)
    assert job.state == "failed" and "changed meanwhile" in job.at


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


@pytest.mark.parametrize("event, values", [("validate", dict(step=50, val_bpb=1.5)), ("score", SCORE)])
def test_the_time_left_of_a_pass_goes_with_it(event, values):
    """Otherwise the job would seem to end with its validation."""
    job = Job({}, {}, OURS)
    scoring = dict(what="validation", targets_done=90, targets=100, eta_s=2.0)
    for name, fields in (("step", STEP), ("scoring", scoring)):
        live.note_progress(job, Event(name, fields))
    assert (job.at, job.eta) == ("validation: 90%", 2.0)
    live.note_progress(job, Event(event, values))
    assert job.eta is None


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


# ---- races of sources -------------------------------------------------------

# A source that takes no time to import. Its runs give what made/{name}-{seed} holds.
SOURCE = """
import os
from dataclasses import field, make_dataclass

NAMES = {names}
CONFIGS = [make_dataclass("C", [(name.lower(), str, field(default="", metadata=dict(group=""))) for name in NAMES])]

def settings(model, run):
    return run

def read_env(env):
    if env.get("TTT_LR") == "9":
        raise ValueError("TTT_LR=9: expected at most 1")
    defaults = dict(DEVICE="cpu", VOCAB_SIZE="64", HOLDOUT_TOKENS="{held}", TRAIN_BATCH_TOKENS="as time allows")
    return None, defaults | {{name: env[name] for name in NAMES if name in env}}

print("a source may print what it likes")
if __name__ == "__main__":
    os.environ["TTT_LR"] = "{name}"
"""
COMMON = (
    "SEED",
    "TTT_LR",
    "DEVICE",
    "DATA_PATH",
    "VOCAB_SIZE",
    "HOLDOUT_TOKENS",
    "TRAIN_BATCH_TOKENS",
    "TRAIN_ROW_TOKENS",
)


def source(stand_in: StandIn, name: str, knobs: tuple[str, ...] = (), held: int = HELD) -> bytes:
    """Write name.py, a source with these knobs beside COMMON -> its content."""
    run = "".join(f"    {line}\n" for line in STAND_IN.splitlines())
    content = SOURCE.format(names=(*COMMON, *knobs), name=name, held=held) + run
    (stand_in.folder / f"{name}.py").write_text(content)
    return content.encode()


@pytest.fixture
def race(stand_in, monkeypatch) -> StandIn:
    for name in train_gpt.KNOBS.keys() - set(COMMON):
        monkeypatch.delenv(name, raising=False)
    return stand_in


def test_sources_race_in_turns_from_copies_and_over_seeds(race, capsys):
    contents = {name: source(race, name) for name in "ab"}
    for seed in (0, 1, 2):
        race.makes("a", seed=seed, own=seed)
        race.makes("b", seed=seed, own=10 + seed, gap=-0.05)
    command = ["--source", "a.py,b.py", "SEED=0,1,2"]
    assert sweep.main(command) == 0
    assert [" ".join(words[:2]) for words in race.started()] == ["a 0", "b 0", "b 1", "a 1", "a 2", "b 2"]

    folder = race.folder / "logs/sweeps/race-seed"
    for content in contents.values():
        digest = hashlib.sha256(content).hexdigest()
        assert (folder / f"sources/{digest[:12]}.py").read_bytes() == content
        assert len(list(folder.glob(f"{digest[:8]}-*.json"))) == 3
        assert digest in (folder / "results.md").read_text()
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["source"], row["SEED"]) for row in rows] == [(f"{name}.py", seed) for seed in "012" for name in "ab"]

    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| source=")]
    assert [line[:3] for line in lines] == [["| source=b.py", "source=a.py", seed] for seed in ("0", "1", "2", "all 3")]
    a, b = (load_run(row["run_id"]) for row in rows[:2])
    assert lines[0][5].startswith(f"{b.bpb - a.bpb:+.5f} [-0.0") and lines[0][3] == "+0.00000"
    assert lines[3][3] == "+0.00000 ± 0.00000", "of a number for all documents there is no interval"
    assert lines[3][4].endswith("]: better") and lines[3][5].endswith("]: better |")

    (race.folder / "a.py").write_bytes(contents["a"] + b"# changed\n")
    assert sweep.main(command) == 0
    assert [words[0] for words in race.started()[6:]] == ["a", "a", "a"], "what is finished is kept"


def test_scores_before_quantisation_are_compared_by_document_where_both_keep_them(race, capsys):
    for name, gap in (("a", 0.0), ("b", -0.05)):
        source(race, name)
        race.makes(name, gap=gap, exact=True)
    assert sweep.main(["--source", "a.py,b.py", "TTT_LR=1"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| source=b.py")]
    assert lines[0][3].startswith("-0.0") and lines[0][3].endswith("]")
    assert lines[1][2] == "all 1" and lines[1][3] == f"{lines[0][3]}: better with this seed"


def test_what_seeds_contradict_is_unresolved_and_a_failed_one_is_left_out(race, capsys):
    for name in "ab":
        source(race, name)
        for seed in (0, 1):
            race.makes(name, seed=seed, own=seed, gap=0.05 * seed * (name == "b") - 0.02 * (name == "b"))
    race.makes("a", seed=2)  # and b fails
    assert sweep.main(["--source", "a.py,b.py", "SEED=0,1,2"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| source=b")]
    assert [line.split(" | ")[2] for line in lines] == ["0", "1", "all 2"]
    assert lines[2].endswith("]: **unresolved** |")


def test_knobs_make_a_grid_with_sources_and_each_is_compared_with_the_first_source(race, capsys):
    for name in "ab":
        source(race, name, ("KNOB_X",))
        race.makes(name)
    assert sweep.main(["KNOB_X=1,2", "--source", "a.py,b.py"]) == 0
    lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| source=")]
    assert lines[::2] == [
        ["| source=b.py KNOB_X=1", "source=a.py KNOB_X=1"],
        ["| source=a.py KNOB_X=2", "source=a.py KNOB_X=1"],
        ["| source=b.py KNOB_X=2", "source=a.py KNOB_X=2"],
    ]


@pytest.mark.parametrize(
    "command, words",
    [
        ("NEW=1,2 --source a.py,new.py", "a.py: it has no knob NEW, which another source has"),
        ("OTHER=1,2 --source a.py,new.py", "OTHER is not a knob"),
        ("PATH=1,2 --source a.py", "PATH is not a knob of this train_gpt.py, but in the environment"),
        ("TTT_LR=1,9 --source a.py", "source=a.py TTT_LR=9: TTT_LR=9: expected at most 1"),
        ("DATA_PATH=1,2 --source a.py", "DATA_PATH cannot be swept"),
        ("--source a.py,a.py", "are the same combination"),
        ("--source a.py,held.py", "HOLDOUT_TOKENS is 300 for source=a.py, 200 for source=held.py"),
        ("--source a.py,absent.py", "'absent.py': neither a file nor a git revision"),
        ("--source=a.py,--output=x", "neither a file nor a git revision"),
        ("--source broken.py", "it cannot be asked for its knobs: ZeroDivisionError"),
        ("--source other.py", "it has no CONFIGS, read_env, settings"),
        ("--source a.py --jobs 0", "--jobs 0: at least 1"),
        ("--source a.py --launcher absent-program", "--launcher 'absent-program'"),
    ],
)
def test_sources_that_cannot_race_are_refused_before_anything_ran(race, monkeypatch, capsys, command, words):
    monkeypatch.delenv("HOLDOUT_TOKENS")
    source(race, "a")
    source(race, "new", ("NEW",))
    source(race, "held", held=200)
    (race.folder / "broken.py").write_text("1 / 0\n")
    (race.folder / "other.py").write_text("print('hello')\n")
    assert end_in_a_line(lambda: sweep.main(command.split())) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert race.started() == []


def test_a_knob_of_the_environment_must_be_one_of_every_source(race, monkeypatch, capsys):
    source(race, "a")
    source(race, "new", ("NEW",))
    monkeypatch.setenv("NEW", "1")
    assert end_in_a_line(lambda: sweep.main(["--source", "a.py,new.py"])) == 2
    assert "a.py: it has no knob NEW" in capsys.readouterr().err


def test_a_source_may_be_a_git_revision(race, monkeypatch):
    repository = race.folder / "repository"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    contents = [source(race, name) for name in "ab"]
    for content in contents:
        (repository / "train_gpt.py").write_bytes(content)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    monkeypatch.setattr(sources, "REPOSITORY", repository)
    found = sources.find_sources("HEAD~1,HEAD,a.py")
    assert [(one.name, one.content) for one in found] == [
        ("HEAD~1", contents[0]),
        ("HEAD", contents[1]),
        ("a.py", contents[0]),
    ]


def test_the_sources_of_this_repository_can_be_asked(tiny_env):
    asked = sources.Source("now", train_gpt.code())
    env = tiny_env(RUN_ID=None)
    question = {"environments": [env, env | {"TTT_LR": "fast"}], "gpus": 1, "trains": True}
    said = sources.ask(asked, question)
    assert said == ask_source.answer(train_gpt, **question)
    assert said["settings"][0]["ITERATIONS"] == "3" and "TTT_LR='fast'" in said["settings"][1]


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
        assert scheduler.command_of(2, ["srun"]) == ["srun", sys.executable, *ranks]


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


def test_turns_alternate_from_seed_to_seed():
    jobs = [Job({"source": name, "SEED": seed}, {}, OURS) for name in "ab" for seed in "0123"]
    order = [job.knobs["source"] + job.knobs["SEED"] for job in scheduler.take_turns(jobs)]
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]


# ---- the entry itself -------------------------------------------------------


def sweep_here(folder: Path, env: dict[str, str], *arguments: str) -> str:
    """A sweep in this process, which need not import torch again; its runs are processes -> what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        for name in os.environ.keys() - env.keys():
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        assert sweep.main([*arguments]) == 0, out.getvalue()
    return out.getvalue()


@contextlib.contextmanager
def sweeping(folder: Path, env: dict[str, str], *arguments: str):
    """`python -m tools.sweep` in a process group of its own; whatever is left of it is ended."""
    env = env | {"PYTHONPATH": str(Path(train_gpt.__file__).parent)}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    process = subprocess.Popen([sys.executable, "-m", "tools.sweep", *arguments], cwd=folder, env=env, **pipe)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


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
        with pytest.raises(ProcessLookupError):  # no run is left behind
            os.killpg(process.pid, 0)
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
