"""Training learns, repeats bit by bit, goes on from a checkpoint as if never interrupted, and stops in time."""

import dataclasses
import gc
import math
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from graphs import pretend
from masked import attend_seen, attend_segments

import train_gpt as g

CONFIG = g.ModelConfig(
    vocab_size=64,
    model_dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2,
    rope_dims=4,
    attn_gate_width=6,
    smear_width=6,
    parallel_start_layer=3,
    num_loops=1,
    loop_start=1,
    loop_end=2,
)


def write_data(folder: Path) -> Path:
    """Two shards of documents in which every token but the first follows from the one before it."""
    rng, documents = np.random.default_rng(0), []
    for _ in range(150):
        x = int(rng.integers(2, 64))
        documents.append([g.BOS, *((x := 2 + (5 * x + 3) % 62) for _ in range(rng.integers(5, 60)))])
    tokens = np.concatenate(documents).astype("<u2")
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(np.array_split(tokens, 2)):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (folder / f"fineweb_train_{i:06}.bin").write_bytes(header.tobytes() + part.tobytes())
    return folder


@pytest.fixture
def settings(tmp_path):
    """settings(**overrides): a run of eight steps of 256 tokens, four rows of 64 each."""
    tiny = dict(data_path=str(write_data(tmp_path / "data")), iterations=8, max_wallclock_seconds=0.0)
    tiny |= dict(
        train_batch_tokens=256, train_row_tokens=64, micro_batch_tokens=128, train_seq_len=32, holdout_tokens=0
    )
    tiny |= dict(eval_seq_len=32, eval_stride=8, ttt_chunk_tokens=8, train_log_every=1, warmup_steps=1)
    return lambda **overrides: g.RunConfig(**tiny | overrides)


def new_trainer(run: g.RunConfig, dist: g.Dist | None = None, config: g.ModelConfig = CONFIG, tokenizer="hash"):
    model = g.GPT(config)
    g.init_weights(model, run.seed)
    return g.Trainer(model, run, dist or g.Dist(), {"tokenizer": tokenizer})


def go(trainer: g.Trainer, reserve: float = 0.0, validate=None, checkpoint: Path = Path("unused"), log=None):
    """Train -> (losses of all steps, the stopwatch)"""
    stream, watch = g.TrainingStream(trainer.run, CONFIG.vocab_size, trainer.dist), g.Stopwatch(trainer.dist)
    with watch.phase("train"):
        history = g.train(trainer, stream, log or g.Log(None), watch, reserve, validate, checkpoint)
    return [loss for _, _, loss in history], watch


def everything(trainer: g.Trainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in trainer.tensors().items()}


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
        runs.append((go(trainer)[0], everything(trainer)))
    (losses, one), (same_losses, same), (_, other) = runs
    assert losses == same_losses and differing(one, same) == []
    assert differing(one, other) != []


def test_micro_batches_do_not_change_what_is_learned(settings):
    whole, parts = (go(new_trainer(settings(micro_batch_tokens=n)))[0] for n in (256, 64))
    assert whole == pytest.approx(parts, rel=1e-3)


def test_the_loop_is_switched_on_by_schedule(settings):
    lines: list[str] = []
    go(new_trainer(settings(enable_looping_at=0.5)), log=lines.append)
    assert ["loop:1" in line for line in lines] == [False] * 4 + [True] * 4
    off = dataclasses.replace(CONFIG, num_loops=0)
    assert not new_trainer(settings(), config=off).looping(1.0)


def test_each_step_uses_the_schedules_at_its_place_in_the_budget(settings, monkeypatch):
    run, seen = settings(), []
    trainer = new_trainer(run)
    plain = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda lr, mu: (seen.append((lr, mu)), plain(lr, mu)))
    go(trainer)
    assert seen == [(g.lr_at(step / 8, run), g.momentum_at(step / 8, run)) for step in range(8)]


def test_the_loss_is_the_mean_over_the_whole_batch(settings):
    run = settings(matrix_lr=0.0, embed_lr=0.0, scalar_lr=0.0, iterations=3)
    trainer = new_trainer(run)
    losses, _ = go(trainer)
    stream = g.TrainingStream(run, 64, g.Dist())
    for step, loss in enumerate(losses):
        nats = [trainer.model(p.tokens, p.targets, p.segments, looping=step / 3 >= 0.35) for p in stream.batch(step)]
        assert sum(n.numel() for n in nats) == 256
        assert loss == pytest.approx(torch.cat(nats, 1).mean().item(), rel=1e-5)


# ---- ranks ------------------------------------------------------------------


def rank_main(rank: int, folder: str, run: g.RunConfig) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer = new_trainer(run, g.Dist(rank, 2))
    g.warm_up(trainer, lambda batch: 0.0)
    losses, _ = go(trainer, checkpoint=Path(folder, "two.ckpt"))
    torch.save((losses, everything(trainer)), f"{folder}/{rank}.pt")
    trainer.dist.close()


def test_two_ranks_train_as_one(settings, tmp_path):
    run = settings(checkpoint_seconds=1e-6)
    mp.spawn(rank_main, args=(str(tmp_path), run), nprocs=2)
    (losses, state), (losses_there, state_there) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert losses == losses_there and differing(state, state_there) == []
    alone = new_trainer(run)
    assert go(alone, checkpoint=tmp_path / "one.ckpt")[0] == pytest.approx(losses, rel=1e-3)
    for name, t in everything(alone).items():
        assert (t - state[name]).norm() <= 0.02 * t.norm() + 1e-6, name
    resumed = new_trainer(run)  # a checkpoint of two ranks goes on with one
    resumed.load(str(tmp_path / "two.ckpt"))
    assert resumed.step == 8 and differing(everything(resumed), state) == []


# ---- warm-up ----------------------------------------------------------------


def test_warming_up_leaves_no_trace(settings):
    trainer, rehearsed = new_trainer(settings()), []
    go(trainer)  # moments and averages that are not all zero or alike
    trainer.optimizer.steps_done = 0
    before = everything(trainer)

    def dry_run(batch: list[g.MicroBatch]) -> float:
        rehearsed.extend(batch)
        assert differing(before, everything(trainer)) != []  # it did train
        return 3.5

    assert g.warm_up(trainer, dry_run) == 3.5
    assert [tuple(p.tokens.shape) for p in rehearsed] == [(1, 128)] * 2  # the shapes of a real batch
    assert differing(before, everything(trainer)) == []
    assert trainer.optimizer.steps_done == 0 and not any(p.grad.any() for p in trainer.model.parameters())


def test_training_is_the_same_with_and_without_warm_up(settings):
    cold, warm = new_trainer(settings()), new_trainer(settings(warmup_steps=3))
    g.warm_up(warm, lambda batch: 0.0)
    assert go(cold)[0] == go(warm)[0] and differing(everything(cold), everything(warm)) == []


# ---- replayed as on a GPU ---------------------------------------------------


def test_replayed_passes_learn_what_others_do(settings, monkeypatch):
    """Of text with segments of its own in every batch, in both loop modes, and from warm-up into training."""
    monkeypatch.setattr(g, "attend", attend_segments)
    run = settings(iterations=12, enable_looping_at=0.5)
    plain, replayed = new_trainer(run), new_trainer(run)
    g.warm_up(plain, lambda batch: 0.0)
    expected = go(plain)[0]
    captured = pretend(monkeypatch)
    replayed.replay = g.CUDAGraphs()
    g.warm_up(replayed, lambda batch: 0.0)
    assert len(captured) == 2 and go(replayed)[0] == expected and len(captured) == 2
    assert not any(graph.fresh for graph in captured) and differing(everything(plain), everything(replayed)) == []


@pytest.mark.gpu
def test_replayed_passes_learn_what_others_do_on_a_gpu(settings):
    """In bf16, and with gradients of embeddings that a GPU adds up in any order: up to rounding."""
    config, found = dataclasses.replace(CONFIG, num_heads=2, num_kv_heads=1, rope_dims=8), []
    for again in (0, 1):
        run = settings(compile=again, iterations=12, enable_looping_at=0.5)
        trainer = new_trainer(run, config=config)
        trainer = g.Trainer(trainer.model.cuda(), run, g.Dist(device="cuda"), {})
        assert (trainer.replay is not None) == bool(again)
        g.warm_up(trainer, lambda batch: 0.0)
        found.append(go(trainer)[0])
    assert found[0] == pytest.approx(found[1], rel=2e-2) and found[0][-1] < 0.9 * found[0][0]


def test_passes_are_captured_before_the_clock_and_after_both_loop_modes_have_run(settings, monkeypatch):
    """What a first pass takes beside the memory of graphs would otherwise be the most there is."""
    monkeypatch.setattr(g, "attend", attend_segments)
    captured, ran_before = pretend(monkeypatch), []
    trainer, capture = new_trainer(settings(micro_batch_tokens=256)), torch.cuda.graph
    trainer.replay = g.CUDAGraphs()

    def graph(*given, **options):
        ran_before.append(len(trainer.replay.graphs))
        return capture(*given, **options)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    g.warm_up(trainer, lambda batch: 0.0)
    assert ran_before == [2, 2] and len(captured) == 2


def test_inputs_of_another_shape_are_captured_apart(monkeypatch):
    captured = pretend(monkeypatch)
    replay = g.CUDAGraphs()
    for shape in [(3, 4), (3, 4), (3, 1), (3, 4), (3, 1), (3, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(replay("key", lambda x: 2 * x, x), 2 * x)
    assert len(captured) == 2


@pytest.mark.parametrize("triton", [True, False])
def test_without_triton_passes_are_not_replayed(settings, monkeypatch, triton):
    """Attention of packed rows in plain torch asks the GPU where segments begin, which no capture allows."""
    pretend(monkeypatch)
    monkeypatch.setattr(g, "triton", g.triton if triton else None)
    model, run = g.GPT(CONFIG), settings()
    assert (g.Trainer(model, run, g.Dist(device="cuda"), {}).replay is not None) == triton


def test_a_captured_pass_is_freed_at_once(settings, monkeypatch):
    """Not when Python next looks for cycles: a graph that is freed while another is captured ends that capture."""
    monkeypatch.setattr(g, "attend", attend_segments)
    captured, trainer = pretend(monkeypatch), new_trainer(settings())
    trainer.replay = g.CUDAGraphs()
    g.warm_up(trainer, lambda batch: 0.0)
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
    whole, resumed = new_trainer(settings()), new_trainer(settings())
    g.warm_up(resumed, lambda batch: 0.0)
    resumed.load(str(path))
    assert resumed.step == 4 and resumed.progress == 0.5 and resumed.seconds_before > 0
    assert go(resumed)[0] == go(whole)[0][4:]
    assert differing(everything(resumed), everything(whole)) == []
    assert resumed.optimizer.steps_done == whole.optimizer.steps_done == 8


def test_the_clock_goes_on_after_a_resume(settings, tmp_path):
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    run = settings(iterations=0, max_wallclock_seconds=100.0)
    trainer = new_trainer(run)
    trainer.load(str(path))
    trainer.seconds_before = 100.0  # the time had run out
    assert go(trainer)[0] == [] and trainer.progress >= 1.0


def test_a_resumed_run_with_a_larger_budget_keeps_its_average(settings, tmp_path):
    """The spent part of the budget falls from a half to a quarter: that must not drive the average away."""
    path = tmp_path / "run.ckpt"
    interrupted(settings, path)
    trainer = new_trainer(settings(iterations=16, val_loss_every=5))
    trainer.load(str(path))
    before = [v.clone() for v in trainer.average.values]
    with pytest.raises(ConnectionError):  # one step on, before the average takes it in
        go(trainer, validate=lost)
    assert all(torch.equal(v, w) for v, w in zip(trainer.average.values, before, strict=True))


@pytest.mark.parametrize("what", ["model", "tokenizer", "train_batch_tokens", "train_row_tokens"])
def test_a_checkpoint_of_another_run_is_refused(settings, tmp_path, what):
    path, run = tmp_path / "run.ckpt", settings()
    new_trainer(run).save(path, seconds=1.0)
    new_trainer(run).load(str(path))
    if what == "model":
        other = new_trainer(run, config=dataclasses.replace(CONFIG, mlp_leaky_slope=0.25))
    elif what == "tokenizer":
        other = new_trainer(run, tokenizer="another")
    else:
        other = new_trainer(settings(**{what: {"train_batch_tokens": 512, "train_row_tokens": 32}[what]}))
    before = everything(other)
    with pytest.raises(g.DataError, match=f"RESUME={path}: its {what} is "):
        other.load(str(path))
    assert differing(before, everything(other)) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "artifact", "shard", "absent"])
def test_a_damaged_checkpoint_is_refused(settings, tmp_path, damage):
    path, trainer = tmp_path / "run.ckpt", new_trainer(settings())
    trainer.save(path, seconds=1.0)
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
    before = everything(trainer)
    with pytest.raises(g.DataError, match=str(path)):
        trainer.load(str(path))
    assert differing(before, everything(trainer)) == []


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
    began, trainer = time.perf_counter(), new_trainer(settings(iterations=0, max_wallclock_seconds=3.0))
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


def test_a_loss_worse_than_guessing_twice_over_is_divergence():
    g.check_loss(1.9 * math.log(64), 5, 64)
    with pytest.raises(g.UserError, match="the loss of step 5 is 8.734 nats"):
        g.check_loss(2.1 * math.log(64), 5, 64)


# ---- compilation ------------------------------------------------------------


def attend_by_mask(q, k, v, place):
    """Attention in segments as one graph, like a GPU's kernels: the plain one has a call for every segment."""
    at = torch.arange(q.size(1))
    return attend_seen(q, k, v, (at <= at[:, None]) & (at >= (at - place.positions)[:, None]))


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): how many were compiled so far; the compiler is one that only traces."""
    torch._dynamo.reset()
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: plain(module, backend="aot_eager"))
    monkeypatch.setattr(g, "attend", attend_by_mask)
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_nothing_is_compiled_after_the_set_up(settings, graphs):
    """Neither when the loop starts, nor at a validation in between, nor for other text."""
    trainer = new_trainer(settings(val_loss_every=3))
    stream = g.TrainingStream(trainer.run, CONFIG.vocab_size, trainer.dist)
    g.compile_parts(trainer.model)
    before = graphs()

    @torch.no_grad()
    def score(batch) -> float:
        return trainer.model(*batch[0]).mean().item()

    g.warm_up(trainer, score)
    ready = graphs()
    assert ready - before >= 5  # the input, the head, two kinds of block, the skips
    losses, _ = go(trainer, validate=lambda: score(stream.batch(9)))
    assert len(losses) == 8 and graphs() == ready
