"""What packing costs: the tool's figures against plain ones, and its table."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import stored_tensors

import train_gpt as g
from tools import packing
from tools.artifact import end_in_a_line


def randomised(model: g.GPT, seed: int = 0) -> g.GPT:
    """With weights whose predictions are far from even."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if g.param_role(name) != "scalar":
                p.copy_(torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5)
    return model


@pytest.fixture
def setup(tiny_data, tiny_config, tiny_run, tiny_env, monkeypatch, tmp_path) -> g.Setup:
    """A prepared folder, and an environment in which the tool finds it."""
    for name, value in tiny_env(HOLDOUT_TOKENS="600", ARTIFACT_BYTES=str(len(g.code()) + 22_000)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return g.make_setup(tiny_config, tiny_run(holdout_tokens=600), g.Dist())


@pytest.fixture
def checkpoint(setup, tmp_path) -> Path:
    trainer = g.make_trainer(setup, setup.stream.held_out())
    randomised(trainer.model)
    path = tmp_path / "weights.ckpt"
    trainer.save_checkpoint(path, seconds=1.0)
    return path


def table(capsys, *arguments: str | Path) -> dict[str, list[float]]:
    """What the tool prints -> {way: its figures}"""
    assert packing.main([str(argument) for argument in arguments]) == 0
    counts, heading, rule, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ documents, \d+ targets, [\d,]+ bytes; calibration took \d+\.\d s", counts)
    assert heading == "| way | bytes | KL, bpb | penalty, bpb | pack, s | unpack, s |" and rule == "|---" * 6 + "|"
    found = {}
    for line in lines:
        pattern = r"\| (\S+) \| ([\d,]+) \| (\S+) ± (\S+) \| (\S+) ± (\S+) \| (\S+) \| (\S+) \|"
        name, *figures = re.fullmatch(pattern, line).groups()
        found[name] = [float(figure.replace(",", "")) for figure in figures]
    return found


# ---- figures ----------------------------------------------------------------


def test_figures_are_those_of_plain_arithmetic(setup, tiny_config, tiny_run):
    exact = randomised(g.GPT(tiny_config), 1)
    other = randomised(g.GPT(tiny_config), 2)
    docs = setup.validation
    judge = packing.Judge(exact, docs, tiny_run())
    penalty, divergence = judge.compare(other)
    assert penalty.shape == divergence.shape == (len(docs),) and divergence.min() > 0

    checked = 0
    for i, start in enumerate(docs.starts[:-1]):
        length = int(docs.lengths[i])
        if start // 64 != (start + length - 1) // 64 or length > 32:
            continue  # in several rows or segments: see below
        checked += 1
        tokens = docs.tokens[start : start + length]
        batch = g.make_micro_batch(tokens, docs.tokens[start + 1 :][:length], [0], torch.device("cpu"))
        log_p, log_q = (log_probabilities(model, batch) for model in (exact, other))
        assert divergence[i] == pytest.approx(((log_p - log_q) * log_p.exp()).sum().item() / math.log(2), rel=1e-3)
        added = (log_p - log_q).gather(1, batch.targets.mT).sum().item() / math.log(2)
        assert penalty[i] == pytest.approx(added, abs=1e-3)
    assert checked >= 3


@torch.no_grad()
def log_probabilities(model: g.GPT, batch: g.MicroBatch) -> torch.Tensor:
    states, _ = model.hidden(batch.tokens, batch.segments)
    return model.head.logits(states, model.embed, None)[0].log_softmax(-1)


def test_a_network_differs_from_itself_by_nothing_and_from_another_by_the_opposite(setup, tiny_config, tiny_run):
    """Documents in several rows and longer than a context count whole."""
    one, two = (randomised(g.GPT(tiny_config), seed) for seed in (1, 2))
    judges = [packing.Judge(model, setup.validation, tiny_run()) for model in (one, two)]
    penalty, divergence = judges[0].compare(one)
    assert not penalty.any() and abs(divergence).max() < 1e-5
    torch.testing.assert_close(*(torch.tensor(x) for x in (judges[0].compare(two)[0], -judges[1].compare(one)[0])))

    targets = len(setup.validation.tokens) - 1
    everything = judges[0].compare(two)[0].sum() * math.log(2) / targets
    batches = [batch for batch, _ in judges[0].rows]
    assert sum(batch.tokens.numel() for batch in batches) == targets
    mean = [sum(model(*batch).sum().item() for batch in batches) / targets for model in (one, two)]
    assert everything == pytest.approx(mean[1] - mean[0], abs=1e-4)


def test_the_standard_error_is_that_of_a_ratio(setup, tiny_config, tiny_run):
    judge = packing.Judge(randomised(g.GPT(tiny_config)), setup.validation, tiny_run())
    sizes = setup.validation.target_bytes()
    ratio, error = judge.per_byte(0.25 * sizes)
    assert ratio == 0.25 and error == 0
    ratio, error = judge.per_byte(0.25 * sizes + torch.linspace(-1, 1, len(sizes)).numpy())
    assert ratio == pytest.approx(0.25) and error > 0
    assert judge.cell(0.25 * sizes) == "0.25000 ± 0.00000"
    few = g.split_documents(setup.validation.tokens[:40], setup.validation.bytes[:40])
    assert len(few) == 1, "whose error is always 0"
    judge = packing.Judge(randomised(g.GPT(tiny_config)), few, tiny_run())
    assert judge.cell(few.target_bytes() / 4) == "0.25000"


# ---- the table --------------------------------------------------------------


def test_ways_to_pack_are_compared(checkpoint, capsys):
    limit = 22_000
    found = table(capsys, checkpoint, "--only", "default,nearest,equal-rows,unweighted,one-table")
    assert list(found) == ["default", "nearest", "equal-rows", "unweighted", "one-table"]
    for size, kl, kl_error, _, added_error, pack_seconds, unpack_seconds in found.values():
        assert 0.9 * limit < size <= limit
        assert 0 < kl < 0.2 and 0 < kl_error < kl and added_error > 0
        assert pack_seconds > 0 and unpack_seconds >= 0
    assert found["default"][:4] == found["nearest"][:4]  # what a small network has by default
    assert len({tuple(figures[:4]) for figures in found.values()}) == 4  # the others make a difference


def test_it_calibrates_on_as_much_text_as_the_training_did(checkpoint, tiny_config, tmp_path, monkeypatch):
    def batch() -> int:
        _, training = packing.load_checkpoint(str(checkpoint))
        return packing.open_text("holdout", tmp_path / "held", tiny_config, training).run.train_batch_tokens

    monkeypatch.setenv("TRAIN_BATCH_TOKENS", "0")  # which here, without a limit in seconds, would be 786,432
    assert batch() == 256
    monkeypatch.setenv("TRAIN_BATCH_TOKENS", "512")
    assert batch() == 512


def test_rows_and_batches_that_nobody_sets_are_those_of_the_training(checkpoint, tiny_config, tmp_path, monkeypatch):
    for name in ("TRAIN_ROW_TOKENS", "TRAIN_BATCH_TOKENS"):
        monkeypatch.delenv(name)
    _, training = packing.load_checkpoint(str(checkpoint))
    run = packing.open_text("holdout", tmp_path / "held", tiny_config, training).run
    assert (run.train_row_tokens, run.train_batch_tokens) == (64, 256)


def test_knobs_that_the_environment_does_not_set_are_those_of_the_run_beside(
    checkpoint, tiny_config, tmp_path, monkeypatch
):
    _, training = packing.load_checkpoint(str(checkpoint))
    names = ("DATA_PATH", "TOKENIZER_PATH", "TRAIN_ROW_TOKENS", "EVAL_SEQ_LEN")
    knobs = {name: os.environ[name] for name in names if name in os.environ}
    checkpoint.with_suffix(".json").write_text(json.dumps({"knobs": knobs | {"EVAL_SEQ_LEN": "8"}}))
    for name in {*knobs} - {"EVAL_SEQ_LEN"}:
        monkeypatch.delenv(name)
    run = packing.open_text("validation", tmp_path / "held", tiny_config, training).run
    assert (run.data_path, run.train_batch_tokens) == (knobs["DATA_PATH"], training.batch_tokens)
    assert str(run.eval_seq_len) == knobs["EVAL_SEQ_LEN"], "the environment's"


def test_it_compares_on_what_the_training_held_out_and_refuses_other_text(
    checkpoint, setup, tiny_config, tiny_data, train_tokenizer, write_shard, tmp_path, monkeypatch
):
    def opened() -> g.Setup:
        _, training = packing.load_checkpoint(str(checkpoint))
        return packing.open_text("holdout", tmp_path / "held", tiny_config, training)

    held_out = setup.stream.held_out().tokens.tolist()
    monkeypatch.setenv("HOLDOUT_TOKENS", "900")  # of which the training has learned 300
    assert opened().validation.tokens.tolist() == held_out and opened().stream.total == setup.stream.total

    shard = tiny_data / "fineweb_train_000002.bin"
    text = g.read_shard(shard).tolist()
    write_shard(shard, [*text[:300], 5, *text[301:]])
    with pytest.raises(g.DataError, match=r"its last 600 training tokens are not those that .*weights.ckpt held out"):
        opened()

    write_shard(shard, text)
    (tiny_data / "tokenizer.model").write_bytes(train_tokenizer(model_type="unigram"))
    with pytest.raises(g.DataError, match=r"weights.ckpt: made for another tokenizer than"):
        opened()


def test_a_patch_is_taken_back(checkpoint, capsys):
    def patched():
        methods = g.ContextModel.contexts, g.MatrixPlan.grid, g.GradientSums.add
        return *methods, g.RARE_TOKEN_CAUTION, g.LOOPED_FACTOR

    before = patched()
    found = table(capsys, checkpoint, "--only", "one-table,unweighted,looped-2")
    assert patched() == before
    assert len(found) == 3


@pytest.mark.parametrize("name", sorted(set(packing.WAYS) - {"text-quarter", "text-4"}))
def test_every_way_changes_what_it_names(name):
    """A name of train_gpt.py that is gone would be noticed after an hour on a GPU."""
    way = packing.WAYS[name]
    assert way.knobs.keys() <= {field.name for field in g.fields(g.RunConfig)}
    g.RunConfig(**way.knobs)
    for knob, value in way.knobs.items():
        field, kind = g.KNOBS[knob.upper()]
        g.parse_knob(knob.upper(), str(value), kind, field.metadata)
    with packing.patched(way.patches):
        for patch, value in way.patches.items():
            owner, _, attribute = patch.rpartition(".")
            assert getattr(getattr(g, owner) if owner else g, attribute) is value


def test_an_artifact_of_the_same_weights_is_compared_on_validation(checkpoint, setup, tiny_config, tmp_path, capsys):
    model, _ = packing.load_checkpoint(str(checkpoint))
    assert g.read_header(g.read_file(checkpoint), "it")[0]["meta"]["kind"] == "checkpoint"
    path = tmp_path / "fine.ptz"
    stored = stored_tensors(model, octave=-10.0)
    meta = {"kind": "artifact", "model": g.dataclasses.asdict(tiny_config), "tokenizer": setup.tokenizer.sha256}
    path.write_bytes(g.pack(meta, stored, 3))
    found = table(capsys, checkpoint, "--only", "default", "--on", "validation", "--artifact", path)
    assert list(found) == [str(path), "default"]
    assert found[str(path)][0] == path.stat().st_size
    assert 0 <= found[str(path)][1] < 0.01 * found["default"][1]


def test_all_ways_are_listed(capsys):
    assert packing.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(packing.WAYS)
    assert all(len(line.split()) > 1 for line in lines)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["w.ckpt", "--only", "default,best"], "--only best: no such way; --list names them"),
        ([], "name a checkpoint, logs/RUN.ckpt"),
        (["none.ckpt"], "none.ckpt: there is none; a run removes its checkpoint once its artifact is written"),
        (["data/fineweb_val_000000.bin"], "not a file of this program"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(setup, capsys, arguments, expected):
    assert end_in_a_line(lambda: packing.main(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and expected in err and len(err.splitlines()) == 1


def test_an_artifact_is_no_checkpoint(setup, tiny_config, tmp_path, capsys):
    path = tmp_path / "model.ptz"
    meta = {"kind": "artifact", "model": g.dataclasses.asdict(tiny_config), "tokenizer": setup.tokenizer.sha256}
    path.write_bytes(g.pack(meta, stored_tensors(randomised(g.GPT(tiny_config))), 3))
    assert end_in_a_line(lambda: packing.main([str(path)])) == 2
    assert str(path) in capsys.readouterr().err
