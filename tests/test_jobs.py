"""The jobs of a sweep: their settings and documents, which are the same combination, and what is refused."""

import dataclasses
import subprocess

import pytest
from stand_in import HELD, OURS, STAND_IN, tokenizer_of

import train_gpt
from tools import ask_source, sweep
from tools.artifact import end_in_a_line
from tools.grid import parse_grid
from tools.holdout import make_holdout
from tools.jobs import RUN_SH, make_jobs, training_knobs


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


@pytest.mark.parametrize("option", ["--eval", "--keep", "--launcher"])
def test_an_option_that_a_variable_left_empty_is_refused(stand_in, capsys, option):
    """It was as if it had not been given: instead of scoring an artifact, every combination was trained."""
    assert end_in_a_line(lambda: sweep.main(["TTT_LR=0.1", option, ""])) == 2
    assert "an argument is empty" in capsys.readouterr().err and stand_in.started() == []


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
        ("TTT_LR=0.1 --eval .", ".: cannot be read"),
        ("TTT_LR=0.1 --eval=", "an argument is empty"),
        ("--file absent.txt", "absent.txt: cannot be read"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_before_anything_ran(stand_in, capsys, command, words):
    assert end_in_a_line(lambda: sweep.main(command.split())) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert stand_in.started() == []
