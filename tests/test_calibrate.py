"""An artifact gets the RMS of gradients from the text that it was trained on, and from no other."""

import dataclasses
import hashlib
import json

import pytest
import torch
from conftest import TINY_MODEL, stored_tensors
from recorder import random_gpt

import train_gpt
from tools import calibrate
from tools.artifact import end_in_a_line, open_artifact

HELD = 600  # tokens held out


@pytest.fixture
def artifact(tiny_data, tiny_env, tmp_path, monkeypatch):
    """An artifact without the RMS of gradients, in the environment of a tiny run -> its path."""
    undecided = dict.fromkeys(("TTT_OPTIMIZER", "TTT_LR", "TTT_RMS_FLOOR", "RUN_ID", "ARTIFACT", "RESUME"))
    for name in undecided:
        monkeypatch.delenv(name, raising=False)
    for name, value in tiny_env(HOLDOUT_TOKENS=str(HELD), **undecided).items():
        monkeypatch.setenv(name, value)
    run = train_gpt.read_env()[1]
    held_out = train_gpt.TrainingStream(run, 64, train_gpt.Dist()).held_out()
    tokenizer = hashlib.sha256((tiny_data / "tokenizer.model").read_bytes()).hexdigest()
    meta = {"kind": "artifact", "model": dataclasses.asdict(TINY_MODEL), "tokenizer": tokenizer, "holdout_tokens": HELD}
    meta["holdout"] = hashlib.sha256(held_out.tokens.astype("<u2").tobytes()).hexdigest()
    path = tmp_path / "old.ptz"
    path.write_bytes(train_gpt.pack(meta, stored_tensors(random_gpt(TINY_MODEL)), level=3))
    return path


def command(*arguments) -> int:
    return end_in_a_line(lambda: calibrate.main([*map(str, arguments)]))


def test_an_artifact_gets_the_rms_of_gradients_and_nothing_else_changes(artifact, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "SECONDS_BETWEEN_REPORTS", 0.0)
    assert open_artifact(artifact).setup.run.ttt_optimizer == "adamw"
    new = tmp_path / "new.ptz"
    assert command(artifact, "--out", new) == 0
    told, progress = capsys.readouterr()
    assert "training text for its gradients, in chunks of 8: " in progress
    assert "this is training" in told and f"new.ptz: {new.stat().st_size} bytes" in told

    old_meta, old = train_gpt.unpack(artifact.read_bytes(), "old")
    meta, stored = train_gpt.unpack(new.read_bytes(), "new")
    added = {name for name in stored if name.startswith(train_gpt.GRADIENT_PREFIX)}
    assert meta == old_meta and stored.keys() - added == old.keys() and added
    assert all(torch.equal(stored[name], old[name]) for name in old)
    opened = open_artifact(new)
    assert (opened.setup.run.ttt_optimizer, opened.setup.run.ttt_lr) == ("rms", 8e-5)
    assert opened.model.gradient_rms.chunk_tokens == 8


def test_it_is_what_training_would_have_stored(artifact, tmp_path):
    """But for the weights, which are rounded here, and exact there."""
    command(artifact, "--out", tmp_path / "new.ptz")
    found = open_artifact(tmp_path / "new.ptz")
    setup = train_gpt.make_setup(TINY_MODEL, train_gpt.read_env()[1], train_gpt.Dist())
    docs = train_gpt.gradient_documents(setup)
    model = found.model
    stored = train_gpt.encode_gradient_rms(model)
    model.gradient_rms = train_gpt.measure_gradient_rms(model, docs, setup.run, train_gpt.Dist())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in train_gpt.encode_gradient_rms(model).items())


def test_chunks_of_another_length_are_measured_again(artifact, tmp_path, monkeypatch):
    command(artifact, "--out", tmp_path / "new.ptz")
    monkeypatch.setenv("TTT_CHUNK_TOKENS", "16")
    assert command(tmp_path / "new.ptz", "--out", tmp_path / "newer.ptz") == 0
    assert open_artifact(tmp_path / "newer.ptz").model.gradient_rms.chunk_tokens == 16


def test_what_is_too_large_is_written_only_if_that_is_asked_for(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARTIFACT_BYTES", "1000")
    new = tmp_path / "new.ptz"
    assert command(artifact, "--out", new) == 2 and not new.exists()
    assert "over ARTIFACT_BYTES=1000" in capsys.readouterr().err
    assert command(artifact, "--out", new, "--over-limit") == 0 and new.exists()


def test_text_that_the_artifact_was_not_trained_on_is_refused(artifact, tiny_data, write_shard, tmp_path, capsys):
    path = sorted(tiny_data.glob("fineweb_train_*.bin"))[-1]
    tokens = train_gpt.read_shard(path).copy()
    place = len(tokens) - HELD // 2  # among those that were held out
    tokens[place] = 3 if tokens[place] != 3 else 4
    write_shard(path, tokens)
    assert command(artifact, "--out", tmp_path / "new.ptz") == 2
    error = capsys.readouterr().err
    assert f"its last {HELD} training tokens are not those that {artifact} held out" in error


def test_other_held_out_tokens_than_the_artifacts_are_never_read(artifact, tmp_path, monkeypatch):
    command(artifact, "--out", tmp_path / "new.ptz")
    monkeypatch.setenv("HOLDOUT_TOKENS", "0")
    command(artifact, "--out", tmp_path / "same.ptz")
    assert (tmp_path / "same.ptz").read_bytes() == (tmp_path / "new.ptz").read_bytes()


@pytest.mark.parametrize(
    "knobs, message", [({"GRAD_RMS_TOKENS": "0"}, "GRAD_RMS_TOKENS=0"), ({"GRAD_RMS_TOKENS": "4"}, "none has 8")]
)
def test_too_little_text_is_refused(artifact, tmp_path, monkeypatch, capsys, knobs, message):
    for name, value in knobs.items():
        monkeypatch.setenv(name, value)
    assert command(artifact, "--out", tmp_path / "new.ptz") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("held", [None, -1, "many", 1.5])
def test_an_artifact_that_does_not_say_what_it_held_out_is_refused(artifact, tmp_path, capsys, held):
    meta, stored = train_gpt.unpack(artifact.read_bytes(), "old")
    artifact.write_bytes(train_gpt.pack(meta | {"holdout_tokens": held}, stored, level=3))
    assert command(artifact, "--out", tmp_path / "new.ptz") == 2
    assert "holdout_tokens is" in capsys.readouterr().err


def test_the_run_beside_an_artifact_says_with_which_knobs(artifact, tmp_path, monkeypatch):
    """All but the number of tokens: a run without the RMS of gradients says 0."""
    model, run = train_gpt.read_env()
    run = dataclasses.replace(run, grad_rms_tokens=0, ttt_optimizer="adamw", ttt_chunk_tokens=16)
    knobs = train_gpt.settings(model, run)
    artifact.with_suffix(".json").write_text(json.dumps({"knobs": knobs}))
    for name in knobs:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRAD_RMS_TOKENS", "200")
    assert command(artifact, "--out", tmp_path / "new.ptz") == 0
    assert train_gpt.unpack((tmp_path / "new.ptz").read_bytes(), "new")[1]["gradients.chunk_tokens"].item() == 16
