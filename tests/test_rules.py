"""Rules of test-time training side by side: the tool's figures against plain arithmetic, and its table."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, any_gradient_rms, stored_tensors
from recorder import random_gpt

import train_gpt as g
from tools import rules
from tools.artifact import end_in_a_line
from tools.holdout import make_holdout

HELD = 900  # training tokens that the artifact has not learned from
FULL = "TTT_PARAMS=full TTT_FREEZE_BLOCKS=1 TTT_EPOCHS=1"


class Row(NamedTuple):
    bpb: float
    gain: tuple[float, float]  # and half of its interval, NaN where there is none
    context: tuple[float, float]
    rule: tuple[float, float]
    classes: dict[str, tuple[float, float]]
    independent: str


@pytest.fixture
def artifact(tiny_data, tiny_env, monkeypatch, tmp_path) -> str:
    """An artifact with statistics of gradients, and an environment in which it is scored."""
    for name, value in tiny_env(RESUME=None, ARTIFACT=None).items():
        if not name.startswith("TTT_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("TTT_CHUNK_TOKENS", "8")
    monkeypatch.chdir(tmp_path)
    return str(write_artifact(tmp_path / "model.ptz", tiny_data))


def write_artifact(path: Path, data: Path, rms: bool = True) -> Path:
    model = random_gpt(TINY_MODEL)
    model.gradient_rms = any_gradient_rms(TINY_MODEL, 8) if rms else None
    tokenizer = g.load_tokenizer(g.RunConfig(data_path=str(data)), TINY_MODEL.vocab_size)
    held = make_holdout(data, tokenizer, HELD, path.parent / "held")
    meta = {"kind": "artifact", "model": dataclasses.asdict(TINY_MODEL), "tokenizer": tokenizer.sha256}
    meta |= {"holdout_tokens": HELD, "holdout": held["sha256"]}
    path.write_bytes(g.pack(meta, stored_tensors(model) | g.encode_gradient_rms(model), 3))
    return path


def run_tool(*arguments: object) -> int:
    return rules.main([str(argument) for argument in arguments])


def test_what_the_environment_does_not_say_is_as_in_the_run_beside_the_artifact(artifact, monkeypatch, capsys):
    """But for what another rule would make meaningless."""
    _, run = g.read_env(os.environ | {"ARTIFACT": ""})
    knobs = g.settings(TINY_MODEL, dataclasses.replace(run, ttt_optimizer="rms", ttt_lr=0.02, ttt_rms_floor=0.5))
    for name in knobs:
        monkeypatch.delenv(name, raising=False)
    Path(artifact).with_suffix(".json").write_text(json.dumps({"knobs": knobs}))
    env = rules.environment(artifact, {})
    assert (env["DATA_PATH"], env["TTT_LR"], env["TTT_RMS_FLOOR"]) == (knobs["DATA_PATH"], "0.02", "0.5")
    other = rules.environment(artifact, {"TTT_OPTIMIZER": "adamw"})
    assert other["DATA_PATH"] == knobs["DATA_PATH"] and not {"TTT_LR", "TTT_RMS_FLOOR"} & other.keys()
    published = rules.environment(artifact, {"TTT_LR": "0.5"}, with_ttt=False)
    assert {name for name in published if name.startswith("TTT_")} == {"TTT_LR"}
    monkeypatch.setenv("TTT_LR", "0.03")
    assert rules.environment(artifact, {})["TTT_LR"] == "0.03"
    assert run_tool(artifact, "default", "TTT_OPTIMIZER=adamw", "--context", 32, "--documents", 4) == 0
    assert list(read_table(capsys.readouterr().out)) == ["static", "default", "TTT_OPTIMIZER=adamw"]


def figure(cell: str) -> tuple[float, float]:
    value, _, half = cell.partition(" ± ")
    return float(value), float(half or "nan")


def read_table(text: str) -> dict[str, Row | str]:
    """What the tool prints -> {setting: its figures, or why it has none}"""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head[:5] == ["setting", "bpb", "gain", "context", "rule"] and set(rule) == {"---"}
    assert head[-5:] == ["warm-up, s", "score, s", "tokens/s", "peak, GiB", "doc_independent"]
    found = {}
    for label, *cells in rows:
        assert len(cells) == len(head) - 1 and label not in found
        if not any(cells[1:]):
            found[label] = cells[0]
            continue
        classes = dict(zip(head[5:-5], map(figure, cells[4:-5]), strict=True))
        assert all(float(cell.replace(",", "")) >= 0 for cell in cells[-5:-2]) and cells[-2] == "-"
        found[label] = Row(float(cells[0]), *map(figure, cells[1:4]), classes, cells[-1])
    return found


# ---- figures ----------------------------------------------------------------


def test_figures_are_those_of_plain_arithmetic(artifact, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "CLASSES", (20, 40))
    longer = "TTT_OPTIMIZER=adamw TTT_LR=0.02 EVAL_SEQ_LEN=48"
    assert (
        run_tool(artifact, longer, "EVAL_SEQ_LEN=48,TTT_ENABLED=0", "--context", 24, "--out", tmp_path / "n.npz") == 0
    )
    found = read_table(capsys.readouterr().out)
    assert list(found) == ["static", longer, "EVAL_SEQ_LEN=48 TTT_ENABLED=0"]

    stored = np.load(tmp_path / "n.npz")
    assert stored["settings"].tolist() == list(found)
    yardstick, adapted, still = stored["nats"] / math.log(2)
    size = stored["bytes"]
    row = found[longer]
    assert row.bpb == pytest.approx(adapted.sum() / size.sum(), abs=1e-5)
    difference = yardstick - adapted
    ratio = difference.sum() / size.sum()
    half = 1.96 * math.sqrt(sum((d - ratio * n) ** 2 for d, n in zip(difference, size, strict=True))) / size.sum()
    assert row.gain == pytest.approx((ratio, half), abs=1e-5)
    assert row.context[0] == pytest.approx((yardstick - still).sum() / size.sum(), abs=1e-5)
    assert row.rule[0] == pytest.approx((still - adapted).sum() / size.sum(), abs=1e-5)
    assert row.context[0] != 0 and row.rule[0] != 0

    tokens = stored["tokens"]
    masks = [tokens <= 20, (tokens > 20) & (tokens <= 40), tokens > 40]
    labels = [f"{name} ({mask.sum()})" for name, mask in zip(("up to 20", "up to 40", "over 40"), masks, strict=True)]
    assert list(row.classes) == labels and sum(mask.sum() for mask in masks) == len(tokens)
    for mask, (gain, interval) in zip(masks, row.classes.values(), strict=True):
        assert gain == pytest.approx(difference[mask].sum() / size[mask].sum(), abs=1e-5)
        assert math.isnan(interval) == (mask.sum() < 10)
    assert found["static"].gain == found["static"].rule == (0.0, 0.0)
    assert found["EVAL_SEQ_LEN=48 TTT_ENABLED=0"].gain == row.context


def test_settings_score_as_the_entry_does(artifact, tmp_path):
    """Of the held-out documents all, in their order; and the yardstick is the entry's static score."""
    texts = ["", "TTT_OPTIMIZER=sgd TTT_LR=0.3", f"{FULL} TTT_SCOPE=stream TTT_LR=0.02"]
    assert run_tool(artifact, *texts, "--context", 24, "--out", tmp_path / "n.npz") == 0
    stored = np.load(tmp_path / "n.npz")
    folder = {"DATA_PATH": str(tmp_path / "held")}
    for knobs, nats in zip(
        [{"TTT_ENABLED": "0", "EVAL_SEQ_LEN": "24"}, *map(split, texts)], stored["nats"], strict=True
    ):
        _, run = g.read_env(rules.environment(artifact, knobs | folder))
        setup = g.make_setup(TINY_MODEL, run, g.Dist())
        model = g.load_artifact(Path(artifact), setup)
        docs = setup.validation
        table = g.Evaluation(model, docs, setup.run, g.Dist(), g.Log(), lambda: 0.0).score()
        np.testing.assert_array_equal(table.nats, nats)
        assert stored["tokens"].tolist() == docs.lengths.tolist() and len(docs) == stored["number"][-1] + 1
        assert stored["bytes"].tolist() == docs.target_bytes().tolist()


def split(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split())


def test_a_sample_is_the_same_each_time_and_its_documents_score_as_among_all(artifact, capsys, tmp_path):
    assert run_tool(artifact, "TTT_LR=0.05", "--out", tmp_path / "all.npz", "--context", 32) == 0
    for name in ("one.npz", "two.npz"):
        limits = ("--documents", 5, "--lengths", "9-60")
        assert run_tool(artifact, *limits, "TTT_LR=0.05", "--out", tmp_path / name, "--context", 32) == 0
    everything, one, two = (np.load(tmp_path / name) for name in ("all.npz", "one.npz", "two.npz"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    chosen = one["number"]
    assert (
        len(chosen) == 5 and (np.diff(chosen) > 0).all() and (9 <= one["tokens"]).all() and (one["tokens"] <= 60).all()
    )
    for name in ("tokens", "bytes"):
        assert one[name].tolist() == everything[name][chosen].tolist()
    np.testing.assert_allclose(one["nats"], everything["nats"][:, chosen], rtol=1e-5)
    assert re.search(r"^5 held-out training documents, \d+ targets, \d+ bytes$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 2], [1], [2]])
def test_documents_that_are_picked_keep_all_their_targets(chosen):
    tokens = np.array([1, 5, 6, 1, 7, 1, 8, 9, 10], np.uint16)
    docs = g.split_documents(tokens, tokens.astype(np.int64))
    found = rules.pick(docs, np.array(chosen))
    assert len(found) == len(chosen) and found.lengths.tolist() == docs.lengths[chosen].tolist()
    assert found.target_bytes().tolist() == docs.target_bytes()[chosen].tolist()
    assert [found.span(i).tolist() for i in range(len(chosen))] == [docs.span(i).tolist() for i in chosen]


# ---- settings ---------------------------------------------------------------


def test_no_setting_touches_the_next(artifact, tmp_path, monkeypatch):
    """Whole weights that adapt are put back, also where the setting ends in the middle of a document."""
    options = ("--context", 32, "--documents", 6, "--out")
    assert run_tool(artifact, "TTT_LR=0.05", *options, tmp_path / "alone.npz") == 0
    learn = g.SequentialTTT.learn

    def run_out_of_memory(learner, *given):
        learn(learner, *given)
        raise torch.OutOfMemoryError

    full = [f"{FULL} TTT_LR=0.05", f"{FULL} TTT_LR=0.05 TTT_SCOPE=stream"]
    assert run_tool(artifact, *full, "TTT_LR=0.05", *options, tmp_path / "after.npz") == 0
    monkeypatch.setattr(g.SequentialTTT, "learn", run_out_of_memory)
    assert run_tool(artifact, full[0], "TTT_LR=0.05", *options, tmp_path / "broken.npz") == 1
    alone, after, broken = (np.load(tmp_path / f"{name}.npz")["nats"] for name in ("alone", "after", "broken"))
    assert (len(alone), len(after), len(broken)) == (2, 4, 2)
    np.testing.assert_array_equal(after[[0, -1]], alone)
    np.testing.assert_array_equal(broken, alone)


def test_what_is_refused_or_diverges_has_a_row_and_the_rest_goes_on(artifact, capsys):
    refused = ["TTT_LR=fast", "TTT_CHUNK_TOKENS=4000", "TTT_OPTIMIZER=adamw TTT_MOMENTUM=0.5", "TTT_CHUNK_TOKENS=256 "]
    diverges = "TTT_OPTIMIZER=adamw TTT_LR=1e9 TTT_WEIGHT_DECAY=1e9"
    assert run_tool(artifact, *refused, diverges, "TTT_LR=0.01", "--context", 32) == 1
    found = read_table(capsys.readouterr().out)
    for text in refused:
        assert found[text.strip()].startswith("refused: TTT_")
    assert re.fullmatch(r"diverged: \d+ of \d+ documents have no finite score", found[diverges])
    assert isinstance(found["TTT_LR=0.01"], Row) and found["TTT_LR=0.01"].independent == "1"


def test_a_rule_that_the_artifact_lacks_statistics_for_is_refused_by_name(artifact, tiny_data, tmp_path, capsys):
    path = write_artifact(tmp_path / "old.ptz", tiny_data, rms=False)
    assert run_tool(path, "", "TTT_OPTIMIZER=rms", "--context", 32) == 1
    found = read_table(capsys.readouterr().out)
    assert found["TTT_OPTIMIZER=rms"].startswith(f"refused: {path}: TTT_OPTIMIZER=rms:")
    assert isinstance(found["default"], Row)


def test_every_published_system_runs(artifact, capsys, monkeypatch):
    """With chunks and epochs of the tiny network's size; an environment's own rule is not theirs."""
    shrunk = {"TTT_CHUNK_TOKENS": "8", "EVAL_SEQ_LEN": "40", "TTT_MIN_DOC_TOKENS": "16", "TTT_EPOCHS": "2"}
    shrunk["TTT_LATE_CHUNK_TOKENS"] = "8"
    for name, system in rules.PUBLISHED.items():
        words = [word.split("=") for word in system.knobs.split()]
        knobs = " ".join(f"{knob}={shrunk.get(knob, value)}" for knob, value in words)
        monkeypatch.setitem(rules.PUBLISHED, name, system._replace(knobs=knobs))
    monkeypatch.setenv("TTT_RMS_FLOOR", "0.5")
    assert run_tool(artifact, "--published", "TTT_LR=0.01", "--context", 32, "--documents", 6) == 0
    out = capsys.readouterr().out
    found = read_table(out)
    assert list(found) == ["static", "default", *rules.PUBLISHED, "TTT_LR=0.01"]
    for name, row in found.items():
        if name in rules.PUBLISHED:
            assert f"- {name}: {rules.PUBLISHED[name].source}: " in out
            assert row.rule[0] != 0 and row.independent == str(int("stream" not in rules.PUBLISHED[name].knobs))


@pytest.mark.parametrize("name", rules.PUBLISHED)
def test_published_systems_are_settings_of_a_run(monkeypatch, name):
    for knob in [knob for knob in g.KNOBS if knob in rules.os.environ]:
        monkeypatch.delenv(knob)
    setting = rules.parse_setting(name)
    config, run = g.read_env(rules.environment("x.ptz", setting.knobs))
    said = g.settings(config, run)
    for knob, value in setting.knobs.items():
        assert said[knob] == value or float(said[knob]) == float(value)
    changed = rules.parse_setting(f"{name},TTT_LR=0.5")
    assert changed.knobs == setting.knobs | {"TTT_LR": "0.5"} and changed.published == name


def test_a_context_always_fits_a_micro_batch_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("MICRO_BATCH_TOKENS", raising=False)
    for context, expected in (("2048", 131_072), ("3072", 131_072), ("2560", 131_072), ("262144", 262_144)):
        env = rules.environment("x.ptz", {"EVAL_SEQ_LEN": context})
        assert int(env["MICRO_BATCH_TOKENS"]) == expected
        g.read_env(env)
    monkeypatch.setenv("MICRO_BATCH_TOKENS", "32768")
    with pytest.raises(g.ConfigError, match="MICRO_BATCH_TOKENS=32768 must be at least"):
        g.read_env(rules.environment("x.ptz", {"EVAL_SEQ_LEN": "65536"}))


def test_commas_part_knobs_and_not_the_values_of_one():
    setting = rules.parse_setting("TTT_LORA_TARGETS=q,v,TTT_LR=0.1  TTT_EPOCHS=2")
    assert setting.knobs == {"TTT_LORA_TARGETS": "q,v", "TTT_LR": "0.1", "TTT_EPOCHS": "2"}
    assert rules.parse_setting("") == rules.parse_setting("default") == rules.DEFAULT


def test_no_limit_of_time_degrades_a_document(artifact, capsys, monkeypatch):
    monkeypatch.setenv("EVAL_SECONDS", "0.001")
    assert run_tool(artifact, f"{FULL} TTT_SCOPE=stream TTT_LR=0.05", "TTT_LR=0.05", "--context", 32) == 0
    rows = list(read_table(capsys.readouterr().out).values())
    assert all(row.rule[0] != 0 for row in rows[1:])


def test_the_text_is_named_before_anything_is_scored(artifact, capsys, monkeypatch):
    said = []
    score = rules.Comparison.score

    def watched(comparison, run, label):
        said.append(capsys.readouterr().out)
        return score(comparison, run, label)

    monkeypatch.setattr(rules.Comparison, "score", watched)
    assert run_tool(artifact, "TTT_LR=0.05", "--context", 32, "--documents", 4) == 0
    assert "yardstick: static, EVAL_SEQ_LEN=32" in said[0]


def test_what_takes_long_says_how_far_it_is(artifact, capsys, monkeypatch):
    monkeypatch.setattr("tools.progress.INTERVAL_S", 0.0)
    assert run_tool(artifact, "TTT_LR=0.05", "--context", 32, "--documents", 4) == 0
    lines = capsys.readouterr().err.splitlines()
    for label in ("static, EVAL_SEQ_LEN=32", "TTT_LR=0.05 (1 of 1)"):
        told = [line for line in lines if line.startswith(f"{label}: ")]
        how_far = r".*: [\d,]+ of [\d,]+ targets, [\d,]+\.\d a second, \d+ s left"
        assert told and all(re.fullmatch(how_far, line) for line in told)


# ---- the command ------------------------------------------------------------


def test_published_systems_are_listed(capsys):
    assert run_tool("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"- {name}" for name in rules.PUBLISHED]


def test_validation_can_be_scored_without_training_text(artifact, tiny_data, capsys):
    for path in tiny_data.glob("fineweb_train_*"):
        path.unlink()
    assert run_tool(artifact, "--on", "validation", "--context", 32) == 0
    assert capsys.readouterr().out.startswith("12 validation documents (not for choosing), 325 targets, ")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "name an artifact"),
        (["none.ptz"], "none.ptz: cannot be read"),
        (["data/fineweb_val_000000.bin"], "not a file of this program"),
        (["model.ptz", "fast"], "'fast': expected NAME=value, default, or a name that --list shows"),
        (["model.ptz", "TTT_RATE=1"], "TTT_RATE is not a knob; did you mean TTT_"),
        (["model.ptz", "MATRIX_LR=1"], "MATRIX_LR does not tell rules apart"),
        (["model.ptz", "TTT_LR=1 TTT_LR=2"], "TTT_LR is given twice"),
        (["model.ptz", "", "default"], "default is given twice"),
        (["model.ptz", "--lengths", "many"], "--lengths 'many': expected LOW-HIGH"),
        (["model.ptz", "--lengths", "5000-9000"], "--lengths 5000-9000: none of"),
        (["model.ptz", "--context", "4"], "error: --context 4: EVAL_SEQ_LEN='4'"),
        (["model.ptz", "--context", "9000000"], "error: --context 9000000: MICRO_BATCH_TOKENS="),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(artifact, capsys, arguments, expected):
    assert end_in_a_line(lambda: rules.main(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and expected in err and len(err.splitlines()) == 1


def test_other_text_than_the_artifacts_is_refused(artifact, tiny_data, write_shard, capsys):
    write_shard(tiny_data / "fineweb_train_000002.bin", [1, 5, 6] * 300)
    assert end_in_a_line(lambda: rules.main([artifact])) == 2
    assert "training tokens are not those that model.ptz did not learn from" in capsys.readouterr().err.replace(
        str(Path(artifact).parent) + "/", ""
    )
