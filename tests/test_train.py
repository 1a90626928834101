"""Training learns, repeats bit by bit, goes on from a checkpoint as if never interrupted, and stops in time."""

import dataclasses
import errno
import functools
import gc
import math
import os
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from conftest import TINY_MODEL, read_events, start_two_ranks
from graphs import fake_cuda_graphs
from masked import attend_segments

import train_gpt as g
from tools import events as events_of_tools


@pytest.fixture
def settings(tmp_path, tiny_run, write_shard):
    """settings(**overrides): a run of eight steps of 256 tokens, four rows of 64 each, on two shards of documents in
    which every token but the first follows from the one before it."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(150):
        token = int(rng.integers(2, 64))
        documents.append([g.BOS])
        for _ in range(rng.integers(5, 60)):
            token = 2 + (5 * token + 3) % 62
            documents[-1].append(token)
    folder = tmp_path / "data"
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.concatenate(documents), 2)):
        write_shard(folder / f"fineweb_train_{i:06}.bin", part)
    return lambda **overrides: tiny_run(**{"iterations": 8} | overrides)


def new_trainer(run: g.RunConfig, dist: g.Dist | None = None, config: g.ModelConfig = TINY_MODEL, tokenizer="hash"):
    model = g.GPT(config)
    g.init_weights(model, run.seed)
    return g.Trainer(model, run, dist or g.Dist(), {"tokenizer": tokenizer})


def warm_up(trainer: g.Trainer) -> None:
    """As a run does: warm up and restore."""
    initial_state = trainer.copy_state()
    g.warm_up(trainer, g.random_batch(trainer.run, TINY_MODEL.vocab_size, trainer.dist))
    trainer.load_state(initial_state, step=0)


def go(trainer: g.Trainer, reserve: float = 0.0, validate=None, checkpoint: Path = Path("unused"), log=None):
    """Train -> (losses of all steps, the stopwatch)"""
    stream = g.TrainingStream(trainer.run, TINY_MODEL.vocab_size, trainer.dist)
    watch = g.Stopwatch(trainer.dist)
    with watch.phase("train"):
        history = g.train(trainer, stream, log or g.Log(), watch, reserve, validate, checkpoint)
    return [loss for _, _, loss in history], watch


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


# ---- learning ---------------------------------------------------------------


def test_a_few_steps_learn(settings):
    losses, _ = go(new_trainer(settings(iterations=20)))
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)  # a new network knows nothing
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_result(settings):
    runs = []
    for seed in (1, 1, 2):
        trainer = new_trainer(settings(seed=seed))
        torch.rand(3)  # the global generator has no say
        runs.append((go(trainer)[0], trainer.copy_state()))
    (losses, one), (same_losses, same), (_, other) = runs
    assert losses == same_losses and differing(one, same) == []
    assert differing(one, other) != []


def test_micro_batches_do_not_change_what_is_learned(settings):
    whole, parts = (go(new_trainer(settings(micro_batch_tokens=n)))[0] for n in (256, 64))
    assert whole == pytest.approx(parts, rel=1e-3)


def test_the_loop_is_switched_on_by_schedule(settings, tmp_path, monkeypatch):
    trainer = new_trainer(settings(enable_looping_at=0.5, micro_batch_tokens=256))
    plain = trainer.model.forward
    looped = []
    monkeypatch.setattr(
        trainer.model, "forward", lambda *x, looping: (looped.append(looping), plain(*x, None, looping))[1]
    )
    go(trainer, log=g.Log(tmp_path / "run.txt"))
    events = read_events(tmp_path / "run.events.jsonl")
    assert [event["loop"] for event in events] == looped == [0] * 4 + [1] * 4
    off = dataclasses.replace(TINY_MODEL, num_loops=0)
    assert not new_trainer(settings(), config=off).looping(1.0)


def test_each_step_uses_the_schedules_at_its_place_in_the_budget(settings, monkeypatch):
    run = settings()
    seen = []
    trainer = new_trainer(run)
    plain = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda lr, mu: (seen.append((lr, mu)), plain(lr, mu)))
    go(trainer)
    assert seen == [(g.lr_at(step / 8, run), g.momentum_at(step / 8, run)) for step in range(8)]


def test_the_context_grows_by_thirds(settings, monkeypatch):
    run = settings(iterations=10)
    seen = []
    plain = g.TrainingStream.batch
    note = lambda stream, number, context: (seen.append(context), plain(stream, number, context))[1]  # noqa: E731
    monkeypatch.setattr(g.TrainingStream, "batch", note)
    go(new_trainer(run))
    assert run.train_seq_len == 32 and seen == [10] + [21] * 6 + [32] * 3
    assert g.context_at(0.5, g.RunConfig()) == 2048 and g.context_at(1.0, g.RunConfig()) == 3072


def test_the_loss_is_the_mean_over_the_whole_batch(settings):
    run = settings(matrix_lr=0.0, embed_lr=0.0, scalar_lr=0.0, iterations=3)
    trainer = new_trainer(run)
    losses, _ = go(trainer)
    stream = g.TrainingStream(run, 64, g.Dist())
    for step, loss in enumerate(losses):
        batch = stream.batch(step, g.context_at(step / 3, run))
        nats = [trainer.model(p.tokens, p.targets, p.segments, looping=step / 3 >= 0.35) for p in batch]
        assert sum(n.numel() for n in nats) == 256
        assert loss == pytest.approx(torch.cat(nats, 1).mean().item(), rel=1e-5)


# ---- ranks ------------------------------------------------------------------


def rank_main(rank: int, folder: str, run: g.RunConfig) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer = new_trainer(run, g.Dist(rank, 2))
    warm_up(trainer)
    losses, _ = go(trainer, checkpoint=Path(folder, "two.ckpt"))
    assert not g.save_or_warn(trainer, Path(folder, "a file", "two.ckpt"), 1.0, g.Log()), "on no rank"
    torch.save((losses, trainer.copy_state()), f"{folder}/{rank}.pt")
    trainer.dist.close()


def test_two_ranks_train_as_one(settings, tmp_path):
    run = settings(checkpoint_seconds=1e-6)
    (tmp_path / "a file").touch()
    start_two_ranks(rank_main, str(tmp_path), run)
    (losses, state), (losses_there, state_there) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert losses == losses_there and differing(state, state_there) == []
    alone = new_trainer(run)
    assert go(alone, checkpoint=tmp_path / "one.ckpt")[0] == pytest.approx(losses, rel=1e-3)
    for name, t in alone.copy_state().items():
        assert (t - state[name]).norm() <= 0.02 * t.norm() + 1e-6, name
    resumed = new_trainer(run)  # a checkpoint of two ranks goes on with one
    resumed.load_checkpoint(str(tmp_path / "two.ckpt"))
    assert resumed.step == 8 and differing(resumed.copy_state(), state) == []


# ---- warm-up ----------------------------------------------------------------


def test_warming_up_trains_and_loading_the_state_leaves_no_trace_of_it(settings):
    trainer = new_trainer(settings())
    go(trainer)  # moments and averages that are not all zero or alike
    trainer.optimizer.steps_done = 0
    before = trainer.copy_state()
    batch = g.random_batch(trainer.run, TINY_MODEL.vocab_size, trainer.dist)
    assert [tuple(p.tokens.shape) for p in batch] == [(1, 128)] * 2  # the shapes of a real batch

    g.warm_up(trainer, batch)
    assert differing(before, trainer.copy_state()) != []

    trainer.load_state(before, step=0)
    assert differing(before, trainer.copy_state()) == []
    assert trainer.step == trainer.optimizer.steps_done == 0
    assert not any(p.grad.any() for p in trainer.model.parameters())


def test_a_dry_run_follows_the_warm_up_before_the_state_is_restored(settings, monkeypatch, tmp_path):
    """Weights as they are at first, with matrices of zeros, would pack in less time than trained ones."""
    monkeypatch.chdir(tmp_path)
    run = settings(max_wallclock_seconds=100.0, holdout_tokens=300)
    trainer = new_trainer(run)
    seen = []
    before = trainer.copy_state()
    plain = g.make_artifact
    monkeypatch.setattr(
        g, "make_artifact", lambda *given, **named: (seen.append(trainer.copy_state()), plain(*given, **named))[1]
    )
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, trainer.dist)
    setup = g.Setup(TINY_MODEL, run, trainer.dist, None, None, stream)

    reserve = g.prepare_training(trainer, setup, stream.held_out(), g.Log())
    assert 0.5 < reserve < 100 and len(seen) == 2 and differing(before, seen[0]) != []
    assert differing(before, trainer.copy_state()) == []

    tight = setup._replace(run=dataclasses.replace(run, max_wallclock_seconds=0.4))
    with pytest.raises(g.ConfigError, match="MAX_WALLCLOCK_SECONDS=0.4: what follows training takes .* lower HOLDOUT_"):
        g.prepare_training(trainer, tight, stream.held_out(), g.Log())


@pytest.mark.parametrize("reserve, warned", [(49.0, False), (51.0, True)])
def test_a_budget_of_which_little_is_left_for_training_gets_a_warning(settings, monkeypatch, reserve, warned):
    monkeypatch.setattr(g, "dry_run", lambda *_: reserve)
    run = settings(max_wallclock_seconds=100.0)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, g.Dist())
    setup = g.Setup(TINY_MODEL, run, g.Dist(), None, None, stream)
    log = g.Log()
    assert g.prepare_training(new_trainer(run), setup, stream.held_out(), log) == reserve
    assert [("takes 51.0 s of it, more than is left" in text) for text in log.warnings] == [True] * warned


def test_training_is_the_same_with_and_without_warm_up(settings):
    cold = new_trainer(settings())
    warm = new_trainer(settings(warmup_steps=3))
    warm_up(warm)
    assert go(cold)[0] == go(warm)[0] and differing(cold.copy_state(), warm.copy_state()) == []


# ---- CUDA graphs ------------------------------------------------------------


def test_replayed_passes_learn_what_others_do(settings, monkeypatch):
    """Of text with segments of its own in every batch, in both loop modes, and from warm-up into training."""
    monkeypatch.setattr(g, "attend", attend_segments)
    run = settings(iterations=12, enable_looping_at=0.5)
    plain = new_trainer(run)
    replayed = new_trainer(run)
    warm_up(plain)
    expected = go(plain)[0]
    captured = fake_cuda_graphs(monkeypatch)
    replayed.cuda_graphs = g.CUDAGraphs()
    warm_up(replayed)
    assert len(captured) == 2 and go(replayed)[0] == expected and len(captured) == 2
    assert not any(graph.fresh for graph in captured) and differing(plain.copy_state(), replayed.copy_state()) == []


@pytest.mark.gpu
def test_replayed_passes_learn_what_others_do_on_a_gpu(settings):
    """In bf16, and with gradients of embeddings that a GPU adds up in any order: up to rounding."""
    config = dataclasses.replace(TINY_MODEL, num_heads=2, num_kv_heads=1, rope_dims=8)
    found = []
    for again in (0, 1):
        run = settings(compile=again, iterations=12, enable_looping_at=0.5)
        trainer = new_trainer(run, config=config)
        trainer = g.Trainer(trainer.model.cuda(), run, g.Dist(device="cuda"), {})
        assert (trainer.cuda_graphs is not None) == bool(again)
        warm_up(trainer)
        found.append(go(trainer)[0])
    assert found[0] == pytest.approx(found[1], rel=2e-2) and found[0][-1] < 0.9 * found[0][0]


def test_passes_are_captured_before_the_clock_and_after_both_loop_modes_have_run(settings, monkeypatch):
    """What a first pass takes beside the memory of graphs would otherwise be the most there is."""
    monkeypatch.setattr(g, "attend", attend_segments)
    captured = fake_cuda_graphs(monkeypatch)
    ran_before = []
    trainer = new_trainer(settings(micro_batch_tokens=256))
    capture = torch.cuda.graph
    trainer.cuda_graphs = g.CUDAGraphs()

    def graph(*given, **options):
        ran_before.append(len(trainer.cuda_graphs.graphs))
        return capture(*given, **options)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    warm_up(trainer)
    assert ran_before == [2, 2] and len(captured) == 2


def test_inputs_of_another_shape_are_captured_apart(monkeypatch):
    captured = fake_cuda_graphs(monkeypatch)
    replay = g.CUDAGraphs()
    for shape in [(3, 4), (3, 4), (3, 1), (3, 4), (3, 1), (3, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(replay("key", lambda x: 2 * x, x), 2 * x)
    assert len(captured) == 2


@pytest.mark.parametrize("triton", [True, False])
def test_without_triton_passes_are_not_replayed(settings, monkeypatch, triton):
    """Attention of packed rows in plain torch asks the GPU where segments begin, which no capture allows."""
    fake_cuda_graphs(monkeypatch)
    monkeypatch.setattr(g, "triton", g.triton if triton else None)
    model = g.GPT(TINY_MODEL)
    run = settings()
    assert (g.Trainer(model, run, g.Dist(device="cuda"), {}).cuda_graphs is not None) == triton


def test_a_captured_pass_is_freed_at_once(settings, monkeypatch):
    """Not when Python next looks for cycles: a graph that is freed while another is captured ends that capture."""
    monkeypatch.setattr(g, "attend", attend_segments)
    captured = fake_cuda_graphs(monkeypatch)
    trainer = new_trainer(settings())
    trainer.cuda_graphs = g.CUDAGraphs()
    warm_up(trainer)
    held = [weakref.ref(graph) for graph in captured]
    captured.clear()
    gc.disable()
    try:
        del trainer
        assert len(held) == 2 and not any(graph() for graph in held)
    finally:
        gc.enable()


# ---- checkpoints ------------------------------------------------------------


def lost() -> float:
    """In place of a validation."""
    raise ConnectionError("the machine is gone")


def interrupted(settings, path: Path) -> None:
    """A run that is lost after step 5 of 8; its last checkpoint is of step 4."""
    with pytest.raises(ConnectionError):
        go(
            new_trainer(settings(checkpoint_seconds=1e-6, val_loss_every=5)),
            validate=lost,
            checkpoint=path,
        )
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]  # nothing half-written


def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path):
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    whole = new_trainer(settings())
    resumed = new_trainer(settings())
    warm_up(resumed)
    resumed.load_checkpoint(str(path))
    assert resumed.step == 4 and resumed.seconds_before > 0
    assert go(resumed)[0] == go(whole)[0][4:]
    assert differing(resumed.copy_state(), whole.copy_state()) == []
    assert resumed.optimizer.steps_done == whole.optimizer.steps_done == 8


def test_the_clock_goes_on_after_a_resume(settings, tmp_path):
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    run = settings(iterations=0, max_wallclock_seconds=100.0)
    trainer = new_trainer(run)
    trainer.load_checkpoint(str(path))
    trainer.seconds_before = 100.0  # the time had run out
    log = g.Log()
    assert go(trainer, log=log)[0] == [] and trainer.progress >= 1.0
    (warning,) = log.warnings
    assert warning.startswith("no step is left to train: 4 steps and 100 s have spent the budget")


def test_the_next_checkpoint_after_a_resume_is_due_as_long_after_it_as_any_other(settings, tmp_path):
    interrupted(settings, tmp_path / "run.ckpt")
    trainer = new_trainer(settings(checkpoint_seconds=50.0))
    trainer.load_checkpoint(str(tmp_path / "run.ckpt"))
    trainer.seconds_before = 100.0
    go(trainer, checkpoint=tmp_path / "next.ckpt")
    assert trainer.step == 8 and not (tmp_path / "next.ckpt").exists()


def test_the_speed_after_a_resume_is_that_of_the_steps_since(settings, tmp_path):
    interrupted(settings, tmp_path / "run.ckpt")
    trainer = new_trainer(settings(train_log_every=3))
    trainer.load_checkpoint(str(tmp_path / "run.ckpt"))  # of step 4
    go(trainer, log=g.Log(tmp_path / "run.txt"))
    (event,) = [event for event in read_events(tmp_path / "run.events.jsonl") if event["event"] == "step"]
    assert event["step"] == 6
    assert event["tokens_per_s"] == pytest.approx(2 * 256 / (event["train_s"] - trainer.seconds_before))


def test_a_resumed_run_with_a_larger_budget_keeps_its_average(settings, tmp_path):
    """The spent part of the budget falls from a half to a quarter: that must not drive the average away."""
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    trainer = new_trainer(settings(iterations=16, val_loss_every=5))
    trainer.load_checkpoint(str(path))
    before = [v.clone() for v in trainer.average.values]
    with pytest.raises(ConnectionError):  # one step on, before the average takes it in
        go(trainer, validate=lost)
    assert all(torch.equal(v, w) for v, w in zip(trainer.average.values, before, strict=True))


@pytest.mark.parametrize("what", ["model", "tokenizer", "train_batch_tokens", "train_row_tokens"])
def test_a_checkpoint_of_another_run_is_refused(settings, tmp_path, what):
    path = tmp_path / "run.ckpt"
    run = settings()
    new_trainer(run).save_checkpoint(path, seconds=1.0)
    new_trainer(run).load_checkpoint(str(path))
    if what == "model":
        other = new_trainer(run, config=dataclasses.replace(TINY_MODEL, mlp_leaky_slope=0.25))
    elif what == "tokenizer":
        other = new_trainer(run, tokenizer="another")
    else:
        other = new_trainer(settings(**{what: {"train_batch_tokens": 512, "train_row_tokens": 32}[what]}))
    before = other.copy_state()
    with pytest.raises(g.DataError, match=f"RESUME={path}: its {what} is ") as error:
        other.load_checkpoint(str(path))
    remedy = {"train_batch_tokens": ": set TRAIN_BATCH_TOKENS=256", "train_row_tokens": ": set TRAIN_ROW_TOKENS=64"}
    assert str(error.value).endswith(remedy.get(what, "")), "the batch may follow from another budget"
    assert differing(before, other.copy_state()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "artifact", "shard", "absent"])
def test_a_damaged_checkpoint_is_refused(settings, tmp_path, damage):
    path = tmp_path / "run.ckpt"
    trainer = new_trainer(settings())
    trainer.save_checkpoint(path, seconds=1.0)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "artifact":
        data = g.pack({"kind": "artifact"}, {}, None)
    elif damage == "shard":
        data = (tmp_path / "data" / "fineweb_train_000000.bin").read_bytes()
    path.unlink() if damage == "absent" else path.write_bytes(data)
    before = trainer.copy_state()
    with pytest.raises(g.DataError, match=str(path)):
        trainer.load_checkpoint(str(path))
    assert differing(before, trainer.copy_state()) == []


FORGED = {  # what is changed in the table and the tensors of a checkpoint, whose checksum is then right again
    "no step": ({"step": None}, {}, "its step is None"),
    "a step that is text": ({"step": "4"}, {}, "its step is '4'"),
    "a step that is a fraction": ({"step": 4.5}, {}, "its step is 4.5"),
    "a step that is true": ({"step": True}, {}, "its step is True"),
    "a step before the first": ({"step": -1}, {}, "its step is -1, expected a whole number from 0 to ITERATIONS=8"),
    "a step after the last": ({"step": 9}, {}, "its step is 9, expected a whole number from 0 to ITERATIONS=8"),
    "a step over every number": ({"step": 10**400}, {}, "its step is 1000.* characters"),
    "no seconds": ({"seconds": None}, {}, "its seconds are None"),
    "seconds that are text": ({"seconds": "1"}, {}, "its seconds are '1'"),
    "seconds that are no number": ({"seconds": math.nan}, {}, "its seconds are nan"),
    "seconds without end": ({"seconds": math.inf}, {}, "its seconds are inf"),
    "seconds before the first": ({"seconds": -1.0}, {}, "its seconds are -1.0"),
    "seconds over every number": ({"seconds": 10**400}, {}, "its seconds are 1000"),
    "another kind": ({"kind": "artifact"}, {}, "its kind is 'artifact', not 'checkpoint'"),
    "a network that is none": ({"model": [1]}, {}, r"its model is \[1\], not "),
    "a network with a field more": (
        {"model": dataclasses.asdict(TINY_MODEL) | {"x\x1b": None}},
        {},
        r"its model is another: x\\x1b is None, not None",
    ),
    "a network of another width": (
        {"model": dataclasses.asdict(TINY_MODEL) | {"model_dim": 64}},
        {},
        "its model is another: model_dim is 64, not 32",
    ),
    "another tokenizer": ({"tokenizer": "\x1b[2J"}, {}, r"its tokenizer is '\\x1b\[2J', not 'hash'"),
    "other training shards": ({"training_shards": "x"}, {}, "its training_shards is 'x', not ''"),
    "a tensor is missing": ({}, {"model.embed": None}, "model.embed is None"),
    "a tensor too many": ({}, {"extra": torch.zeros(1)}, "extra is .*expected None"),
    "a tensor that is flat": ({}, {"model.embed": torch.zeros(64 * 32)}, "model.embed is "),
    "a tensor of another type": ({}, {"model.embed": torch.zeros(64, 32).half()}, "model.embed is .*float16"),
    "a tensor of integers": ({}, {"model.embed": torch.zeros(64, 32, dtype=torch.int8)}, "model.embed is .*int8"),
    "a weight that is no number": ({}, {"model.embed": torch.full((64, 32), math.nan)}, "model.embed holds"),
    "an average without end": ({}, {"average.0": torch.full((64, 32), math.inf)}, "average.0 holds"),
    "a moment that is no number": ({}, {"optimizer.exp_avg.0": torch.full((64, 32), math.nan)}, "exp_avg.0 holds"),
    "squares below zero": ({}, {"optimizer.exp_avg_sq.0": torch.full((64, 32), -1.0)}, "negative squares"),
}


def forge(path: Path, meta: dict, tensors: dict, level: int | None = None) -> None:
    """Change these entries of a checkpoint; None takes a tensor out."""
    old_meta, old = g.unpack(path.read_bytes(), "it")
    kept = {name: t for name, t in (old | tensors).items() if t is not None}
    path.write_bytes(g.pack(old_meta | meta, kept, level))


@pytest.mark.parametrize("case", FORGED)
def test_a_checkpoint_edited_by_hand_is_refused(settings, tmp_path, case):
    meta, tensors, message = FORGED[case]
    path = tmp_path / "run.ckpt"
    trainer = new_trainer(settings())
    trainer.save_checkpoint(path, seconds=1.0)
    forge(path, meta, tensors)
    before = trainer.copy_state()
    with pytest.raises(g.DataError, match=message) as error:
        trainer.load_checkpoint(str(path))
    assert str(path) in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 600
    assert differing(before, trainer.copy_state()) == [] and trainer.step == trainer.optimizer.steps_done == 0


def test_tensors_of_a_checkpoint_are_compared_before_they_are_unpacked(settings, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    trainer = new_trainer(settings())
    trainer.save_checkpoint(path, seconds=1.0)
    forge(path, {}, {"extra": torch.zeros(1 << 20)}, level=19)
    monkeypatch.setattr(g, "read_tensor", lambda *_: pytest.fail("a tensor was unpacked"))
    with pytest.raises(g.DataError, match="extra is"):
        trainer.load_checkpoint(str(path))


def test_what_a_checkpoint_says_of_the_budget_is_not_believed(settings, tmp_path):
    """It decided how much of the average was forgotten."""
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    whole = new_trainer(settings())
    losses = go(whole)[0]
    for progress in (0.0, 7.0, -1e9, math.nan, "much", None):
        resumed = new_trainer(settings())
        forge(path, {"progress": progress}, {})
        resumed.load_checkpoint(str(path))
        assert go(resumed)[0] == losses[4:], progress
        assert differing(resumed.copy_state(), whole.copy_state()) == [], progress


def test_a_checkpoint_is_read_before_anything_is_compiled_and_survives_the_warm_up(settings, tmp_path, monkeypatch):
    """A bad one was refused after minutes of compilation."""
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    run = settings(resume=str(path), holdout_tokens=300)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, g.Dist())
    setup = g.Setup(TINY_MODEL, run, g.Dist(), None, None, stream)
    expected = new_trainer(run)
    expected.load_checkpoint(str(path))
    trainer = new_trainer(run)
    g.prepare_training(trainer, setup, stream.held_out(), g.Log())
    assert trainer.step == trainer.optimizer.steps_done == 4
    assert trainer.seconds_before == expected.seconds_before
    assert differing(trainer.copy_state(), expected.copy_state()) == []

    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(g, "warm_up", lambda *_: pytest.fail("it was warmed up"))
    with pytest.raises(g.DataError, match="damaged or cut short"):
        g.prepare_training(new_trainer(run), setup, stream.held_out(), g.Log())


@pytest.fixture
def make_setup(settings, write_shard, train_tokenizer):
    """make_setup(**overrides): all that a run needs, with a tokenizer and one short document to score"""
    data = Path(settings().data_path)
    (data / "tokenizer.model").write_bytes(train_tokenizer())
    write_shard(data / "fineweb_val_000000.bin", [g.BOS, 5, 6])

    def make(**overrides) -> g.Setup:
        run = settings(tokenizer_path=str(data / "tokenizer.model"), **overrides)
        return g.make_setup(TINY_MODEL, run, g.Dist())

    return make


def test_a_trainer_takes_seed_and_horizon_from_the_run(make_setup):
    setup = make_setup(seed=7, ema_horizon_frac=0.5)
    trainer = g.make_trainer(setup, setup.stream.held_out())
    assert differing(trainer.weights(), new_trainer(setup.run).weights()) == []
    assert differing(trainer.weights(), new_trainer(make_setup(seed=8).run).weights()) != []
    trainer.average.params[0].add_(1.0)
    trainer.average.update(0.5)
    difference = trainer.average.params[0] - trainer.average.values[0]
    assert difference.mean().item() == pytest.approx(math.exp(-0.5 / 0.5), rel=1e-4)


def test_the_chosen_blend_is_what_is_scored_and_packed(make_setup, monkeypatch, tmp_path):
    setup = make_setup()
    trainer = new_trainer(setup.run)
    trainer.average.values[0].add_(1.0)
    own = trainer.average.params[0].clone()
    shares = []  # of the average, when validation is scored and when weights are packed

    def note(*given, **named) -> g.ScoreTable:
        shares.append(round((trainer.average.params[0] - own).mean().item(), 4))
        table = g.ScoreTable(setup.validation)
        table.targets[:] = 1
        table.nats[:] = len(shares)
        return table

    monkeypatch.setattr(g, "choose_weights", lambda *given: 0.25)
    monkeypatch.setattr(g, "score_all_static", note)
    monkeypatch.setattr(g, "pack_weights", note)
    held_out = setup.stream.held_out()
    watch = g.Stopwatch(trainer.dist)
    result, nats = g.read_out_and_pack(trainer, setup, held_out, g.Log(), watch, tmp_path / "it.ptz")
    assert shares == [0.0, 0.25, 0.25]
    assert result["readout"] == 0.25 and result["prequant_bpb"] == 2 * result["last_bpb"] and nats.tolist() == [2.0]


def test_a_blend_that_diverged_is_not_packed(make_setup, monkeypatch, tmp_path):
    """Though the last weights, whose loss ended training, have not."""
    setup = make_setup()
    trainer = new_trainer(setup.run)
    table = g.ScoreTable(setup.validation)
    table.targets[:] = setup.validation.lengths
    table.nats[:] = 2.01 * math.log(TINY_MODEL.vocab_size) * table.targets
    monkeypatch.setattr(g, "choose_weights", lambda *given: 0.5)
    monkeypatch.setattr(g, "score_all_static", lambda *given, **named: table)
    given = (setup.stream.held_out(), g.Log(), g.Stopwatch(trainer.dist), tmp_path / "it.ptz")
    with pytest.raises(g.UserError, match="training diverged: the score of the trained weights is 8.359 nats"):
        g.read_out_and_pack(trainer, setup, *given)
    assert not (tmp_path / "it.ptz").exists()


def test_a_checkpoint_goes_on_with_its_own_training_shards(make_setup, write_shard, tmp_path):
    path = tmp_path / "run.ckpt"
    data = tmp_path / "data"

    def trainer() -> g.Trainer:
        setup = make_setup()
        return g.make_trainer(setup, setup.stream.held_out())

    trainer().save_checkpoint(path, seconds=1.0)
    trainer().load_checkpoint(str(path))
    write_shard(data / "fineweb_train_000002.bin", [g.BOS] * 99)
    with pytest.raises(g.DataError, match="its training_shards is "):
        trainer().load_checkpoint(str(path))


def test_a_smaller_budget_does_not_drive_the_average_away(settings, tmp_path):
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    trainer = new_trainer(settings(iterations=4))
    trainer.load_checkpoint(str(path))
    before = [v.clone() for v in trainer.average.values]
    assert go(trainer)[0] == []  # its four steps are done
    assert all(torch.equal(v, w) for v, w in zip(trainer.average.values, before, strict=True))


def no_room(monkeypatch, path: Path) -> Path:
    usage = shutil.disk_usage(path.parent)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return path


def full_disk(monkeypatch, path: Path) -> Path:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    return path


def no_folder(monkeypatch, path: Path) -> Path:
    path.touch()
    return path / "run.ckpt"


def no_memory(monkeypatch, path: Path) -> Path:
    def full(*given, **named):
        raise MemoryError

    monkeypatch.setattr(g, "pack", full)
    return path


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (no_room, "the disk has no room for 0 MiB beside the artifact"),
        (full_disk, "No space left on device"),
        (no_folder, "Not a directory"),
        (no_memory, "MemoryError"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_warning_and_training_goes_on(
    settings, tmp_path, monkeypatch, fault, reason
):
    expected = go(new_trainer(settings()))[0]
    shown = []
    path = fault(monkeypatch, tmp_path / "run.ckpt")
    trainer = new_trainer(settings(checkpoint_seconds=1e-6))
    assert go(trainer, checkpoint=path, log=g.Log(screen=shown.append))[0] == expected
    (warning,) = [line for line in shown if line.startswith("warning: ")]
    assert warning.startswith("warning: no checkpoint is written: ") and reason in warning
    assert list(tmp_path.glob(".*")) == [] and not path.exists()


def test_a_folder_of_checkpoints_that_was_deleted_is_made_again(settings, tmp_path):
    trainer = new_trainer(settings())
    trainer.save_checkpoint(tmp_path / "logs" / "run.ckpt", seconds=1.0)
    assert (tmp_path / "logs" / "run.ckpt").exists()


def test_a_checkpoint_of_a_finished_training_holds_all_that_follows_and_no_more(settings, tmp_path):
    path = tmp_path / "run.ckpt"
    trainer = new_trainer(settings())
    go(trainer)
    trainer.save_checkpoint(path, seconds=3.0, finished=True)
    resumed = new_trainer(settings())
    resumed.load_checkpoint(str(path))
    assert resumed.finished and resumed.step == 8 and resumed.seconds_before == 3.0
    assert differing(resumed.weights(), trainer.weights()) == []
    weights = sum(p.nbytes for p in trainer.model.parameters())
    assert 2 * weights < path.stat().st_size < 2 * weights + 5000

    trainer.save_checkpoint(path, seconds=3.0)
    resumed.load_checkpoint(str(path))
    assert not resumed.finished
    for kind, name in ((g.FINISHED, "optimizer"), ("checkpoint of another kind", "its kind is ")):
        forge(path, {"kind": kind}, {})
        with pytest.raises(g.DataError, match=name):
            resumed.load_checkpoint(str(path))


def test_a_finished_training_is_not_warmed_up_again(settings, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    trainer = new_trainer(settings())
    trainer.save_checkpoint(path, seconds=3.0, finished=True)
    monkeypatch.setattr(g, "warm_up", lambda *_: pytest.fail("it was warmed up"))
    run = settings(resume=str(path), max_wallclock_seconds=1.0)  # no more than what follows training may take
    setup = g.Setup(TINY_MODEL, run, g.Dist(), None, None, None)
    assert g.prepare_training(trainer, setup, None, g.Log()) == 0.0 and trainer.finished


def test_the_dry_run_writes_a_checkpoint_whose_seconds_are_reserved(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = settings(max_wallclock_seconds=100.0, holdout_tokens=300)
    trainer = new_trainer(run)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, trainer.dist)
    setup = g.Setup(TINY_MODEL, run, trainer.dist, None, None, stream)
    plain = trainer.save_checkpoint

    def slow(path: Path, seconds: float, finished: bool) -> None:
        assert finished
        plain(path, seconds, finished)
        time.sleep(2.0)

    monkeypatch.setattr(trainer, "save_checkpoint", slow)
    assert g.prepare_training(trainer, setup, stream.held_out(), g.Log()) > 1.15 * 2.0 + 0.5
    assert list((tmp_path / "logs").iterdir()) == []


def test_calibration_text_is_as_many_batches_as_asked_for_and_follows_what_was_trained_on(
    settings, monkeypatch, tmp_path
):
    run = settings(gptq_calibration_batches=2, grad_rms_tokens=0)
    trainer = new_trainer(run)
    trainer.step = 3
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, trainer.dist)
    setup = g.Setup(TINY_MODEL, run, trainer.dist, None, None, stream)
    read = []
    monkeypatch.setattr(g, "calibrate", lambda model, batches, dist, run: read.extend(batches))
    monkeypatch.setattr(g, "make_artifact", lambda *given: b"")
    g.pack_weights(trainer, setup, g.Log(), g.Stopwatch(trainer.dist), tmp_path / "it.ptz")
    text = torch.cat([micro_batch.tokens[0] for batch in read for micro_batch in batch])
    assert text.tolist() == stream.read(3 * run.train_batch_tokens, 2 * run.train_batch_tokens).tolist()


# ---- which weights are read out ---------------------------------------------


@pytest.fixture
def choosing(settings, monkeypatch, tmp_path):
    """choosing(cost): choose_weights where cost(share of the average) is the score on held-out text, nats a token
    -> the chosen share, every share that was scored, and the event."""

    def choose(cost) -> tuple[float, list[float], dict]:
        run = settings(holdout_tokens=300)
        trainer = new_trainer(run)
        trainer.average.values[0].add_(1.0)
        own, averaged = (weights[0].mean().item() for weights in (trainer.average.params, trainer.average.values))
        stream = g.TrainingStream(run, TINY_MODEL.vocab_size, trainer.dist)
        held_out = stream.held_out()
        setup = g.Setup(TINY_MODEL, run, trainer.dist, None, None, stream)
        scored = []

        def score(model, setup, looping=True, docs=None, progress=None) -> g.ScoreTable:
            scored.append((trainer.average.params[0].mean().item() - own) / (averaged - own))
            table = g.ScoreTable(docs)
            table.nats[:] = cost(scored[-1]) * (len(docs.tokens) - 1) / len(docs)
            return table

        monkeypatch.setattr(g, "score_all_static", score)
        share = g.choose_weights(trainer, setup, held_out, g.Log(tmp_path / "run.txt"))
        assert trainer.average.params[0].mean().item() == own  # the model keeps its own weights
        (event,) = read_events(tmp_path / "run.events.jsonl")
        return share, scored, event

    return choose


@pytest.mark.parametrize("lowest", [0.31, 0.8])
def test_the_blend_that_is_read_out_is_where_the_score_is_lowest(choosing, lowest):
    share, scored, event = choosing(lambda share: 3.0 + 0.04 * (share - lowest) ** 2)
    assert share == event["readout"] == pytest.approx(lowest, abs=1e-4)
    assert scored == pytest.approx([0.0, 0.5, 1.0, lowest], abs=1e-4)
    assert event["best"] == pytest.approx(3.0, abs=1e-6)
    assert event["average"] == pytest.approx(3.0 + 0.04 * (1 - lowest) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    "cost, best",
    [
        (lambda share: 3.0 - 0.1 * share, 1.0),  # a line
        (lambda share: 3.0 + 0.1 * share, 0.0),
        (lambda share: 3.0 + (share - 1.5) ** 2, 1.0),  # lowest beyond the average
        (lambda share: 3.0 + (share + 0.5) ** 2, 0.0),  # or beyond the last weights
        (lambda share: 3.0 - (share - 0.4) ** 2, 1.0),  # a hill
        (lambda share: 3.0 if share == 0.5 else 4.0 if 0.5 < share < 1 else 3.1 if share == 0 else 3.05, 0.5),
    ],
)
def test_where_no_blend_is_better_the_best_of_last_half_and_average_is_read_out(choosing, cost, best):
    share, scored, event = choosing(lambda share: cost(round(share, 3)))
    assert share == event["readout"] == best
    assert event["best"] == min(event["last"], event["half"], event["average"])
    assert set(np.round(scored[:3], 3)) == {0.0, 0.5, 1.0}


def test_without_held_out_text_half_of_the_average_is_read_out(settings):
    run = settings(holdout_tokens=0)
    trainer = new_trainer(run)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, trainer.dist)
    setup = g.Setup(TINY_MODEL, run, trainer.dist, None, None, stream)
    assert g.choose_weights(trainer, setup, stream.held_out(), g.Log()) == 0.5


def test_the_time_to_score_every_readout_is_reserved(settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = settings(max_wallclock_seconds=100.0, holdout_tokens=300)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, g.Dist())
    setup = g.Setup(TINY_MODEL, run, g.Dist(), None, None, stream)
    monkeypatch.setattr(g, "make_artifact", lambda *given, **named: b"")
    monkeypatch.setattr(g, "score_all_static", lambda *given, **named: time.sleep(1.0))
    reserve = g.prepare_training(new_trainer(run), setup, stream.held_out(), g.Log())
    assert 1.15 * 4.0 + 0.5 < reserve < 1.15 * 5.0 + 0.5


def test_the_time_of_all_that_follows_training_is_reserved(settings, monkeypatch, tmp_path):
    """Three batches to calibrate on, four blends to score and two tries to fit the bytes, each as long as in the dry
    run."""
    monkeypatch.chdir(tmp_path)
    run = settings(max_wallclock_seconds=1000.0, holdout_tokens=300, gptq_calibration_batches=3)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, g.Dist())
    setup = g.Setup(TINY_MODEL, run, g.Dist(), None, None, stream)
    took = {"checkpoint": 1.0, "gradients": 2.0, "calibrate": 4.0, "choose": 8.0, "quantise": 16.0, "pack": 32.0}
    took |= {"factorise": 64.0}
    monkeypatch.setattr(g.Stopwatch, "total", lambda watch, *names: sum(took[name] for name in names))
    log = tmp_path / "run.txt"
    reserve = g.prepare_training(new_trainer(run), setup, stream.held_out(), g.Log(log))
    assert reserve == pytest.approx(1.15 * (1 + 2 + 3 * 4 + 4 * 8 + 2 * (16 + 32) + 64) + 0.5)
    said = "choose 32.0, gradients 2.0, calibrate 12.0, factorise 64.0, quantise 32.0, pack 64.0"
    assert said in log.read_text()
    events = events_of_tools.read_events((tmp_path / "run.events.jsonl").read_bytes(), "the run")
    assert all(event.known for event in events) and events_of_tools.first_difference(log.read_text(), events) is None


def test_what_only_a_first_call_costs_is_not_reserved(settings, monkeypatch, tmp_path):
    """Loading and compiling kernels, say: here, each first call takes 1000 seconds."""
    monkeypatch.chdir(tmp_path)
    run = settings(max_wallclock_seconds=100.0, holdout_tokens=300)
    stream = g.TrainingStream(run, TINY_MODEL.vocab_size, g.Dist())
    setup = g.Setup(TINY_MODEL, run, g.Dist(), None, None, stream)
    called = set()
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000.0 * len(called))
    names = {"calibrate", "Quantiser", "encode_matrices", "score_all_static", "measure_gradient_rms"}

    def slow_at_first(name, plain, *given, **named):
        called.add(name)
        return plain(*given, **named)

    for name in names:
        monkeypatch.setattr(g, name, functools.partial(slow_at_first, name, getattr(g, name)))
    batch = g.random_batch(run, TINY_MODEL.vocab_size, g.Dist())
    reserve = g.dry_run(new_trainer(run), batch, setup, stream.held_out(), g.Log())
    assert called == names and 0.5 < reserve < 100


# ---- when to stop -----------------------------------------------------------


@pytest.mark.parametrize(
    "iterations, limit, step, seconds, expected",
    [
        (8, 0.0, 2, 1e9, 0.25),  # steps alone
        (8, 0.0, 8, 0.0, 1.0),
        (0, 100.0, 7, 20.0, 0.25),  # time alone, less what quantisation needs
        (0, 100.0, 7, 80.0, 1.0),
        (8, 100.0, 2, 60.0, 0.75),  # both: whichever is further on
        (8, 100.0, 7, 8.0, 0.875),
        (0, 100.0, 0, 0.0, 0.0),
    ],
)
def test_progress(iterations, limit, step, seconds, expected):
    run = g.RunConfig(iterations=iterations, max_wallclock_seconds=limit)
    assert g.progress_at(run, step, seconds, reserve=20.0) == pytest.approx(expected)


def test_without_time_beyond_the_reserve_training_stops_at_once():
    run = g.RunConfig(iterations=0, max_wallclock_seconds=10.0)
    assert g.progress_at(run, 1, 0.01, reserve=30.0) >= 1.0


def test_training_ends_in_time(settings):
    began = time.perf_counter()
    trainer = new_trainer(settings(iterations=0, max_wallclock_seconds=3.0))
    losses, watch = go(trainer, reserve=2.0)
    assert 1.0 <= watch.total("train") < 3.0 and time.perf_counter() - began < 4.0
    assert len(losses) == trainer.step > 3 and trainer.progress >= 1.0


def test_the_first_of_both_budgets_ends_training(settings):
    trainer = new_trainer(settings(iterations=3, max_wallclock_seconds=1000.0))
    assert len(go(trainer)[0]) == 3


def test_validation_is_off_the_clock(settings):
    calls: list[int] = []
    trainer = new_trainer(settings(val_loss_every=3))
    _, watch = go(trainer, validate=lambda: (calls.append(trainer.step), time.sleep(0.4))[1] or 1.0)
    assert calls == [3, 6]
    assert watch.seconds["validate"] >= 0.8
    assert watch.total(*g.TRAINING_CLOCK) == pytest.approx(watch.seconds["train"], abs=0.05)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("last", [True, False])
def test_a_diverged_run_stops_with_a_clear_message(settings, poison, last):
    trainer = new_trainer(settings(iterations=1 if last else 8))
    trainer.model.embed.data[2:] = poison
    with pytest.raises(g.UserError, match="training diverged: the loss of step 1 is .*lower MATRIX_LR"):
        go(trainer)


def test_a_loss_above_twice_guessing_is_divergence_if_it_stays_there():
    """A high rate may throw the loss up at first, and training recovers."""
    check = g.DivergenceCheck(64)
    high = 2.1 * math.log(64)
    low = 1.9 * math.log(64)
    for step in range(1, g.PATIENCE):
        check(high, step)
    check(low, g.PATIENCE)
    for step in range(g.PATIENCE + 1, 2 * g.PATIENCE):
        check(high, step)
    with pytest.raises(g.UserError, match=f"the loss of step {2 * g.PATIENCE} is 8.734 nats"):
        check(high, 2 * g.PATIENCE)


@pytest.mark.parametrize("loss", [2.1 * math.log(64), math.nan, math.inf])
def test_training_may_not_end_with_such_a_loss(loss):
    check = g.DivergenceCheck(64)
    check.at_the_end(1.9 * math.log(64), "the loss")
    with pytest.raises(g.UserError, match="training diverged: the loss is .* lower MATRIX_LR"):
        check.at_the_end(loss, "the loss")


def test_the_time_left_is_known_from_the_first_step_on(settings):
    """Progress was that of the step before: none, and the time left a hundred years."""
    events = []
    trainer = new_trainer(settings(iterations=4, train_log_every=1))
    log = g.Log()
    log.event = lambda event, template="", /, **values: events.append(values)
    stream = g.TrainingStream(trainer.run, trainer.model.config.vocab_size, trainer.dist)
    watch = g.Stopwatch(trainer.dist)
    with watch.phase("train"):
        g.train(trainer, stream, log, watch, 0.0, lambda: 1.0, trainer.run.data_path)
    for values in events:
        assert values["eta_s"] == pytest.approx(values["train_s"] * (4 - values["step"]) / values["step"], rel=1e-6)


# ---- compilation ------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): how many were compiled so far; the compiler is one that only traces."""
    torch._dynamo.reset()
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: plain(module, backend="eager"))
    monkeypatch.setattr(g, "attend", attend_segments)
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_nothing_is_compiled_after_the_set_up(settings, graphs):
    """Neither when the loop starts, nor at a validation in between, nor for other text."""
    trainer = new_trainer(settings(val_loss_every=3))
    stream = g.TrainingStream(trainer.run, TINY_MODEL.vocab_size, trainer.dist)
    g.compile_parts(trainer.model)
    before = graphs()

    @torch.no_grad()
    def score(batch) -> float:
        return trainer.model(*batch[0]).mean().item()

    initial_state = trainer.copy_state()
    batch = g.random_batch(trainer.run, TINY_MODEL.vocab_size, trainer.dist)
    g.warm_up(trainer, batch)
    score(batch)
    trainer.load_state(initial_state, step=0)
    ready = graphs()
    assert ready - before >= 5  # the input, the head, two kinds of block, the skips
    losses, _ = go(trainer, validate=lambda: score(stream.batch(9)))
    assert len(losses) == 8 and graphs() == ready
