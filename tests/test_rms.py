"""How large gradients are: measured as they are, converted to any adapter, stored in an artifact, and asked for by name
where they are lacking. How steps are divided by them is tested with the other rules of test-time training."""

import dataclasses
import functools
import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
from conftest import any_gradient_rms, start_two_ranks, stored_tensors
from graphs import replays_of
from recorder import SMALL_MODEL, random_gpt

import train_gpt as g

CONFIG = dataclasses.replace(SMALL_MODEL, num_layers=3, parallel_start_layer=2, loop_start=1, loop_end=1)
CPU = torch.device("cpu")
CONTEXT = 32
OUTPUTS = g.lora_outputs(CONFIG)


def run_config(**knobs) -> g.RunConfig:
    small = dict(device="cpu", train_row_tokens=64, train_batch_tokens=64, micro_batch_tokens=64, eval_seconds=0)
    small |= dict(train_seq_len=CONTEXT, eval_seq_len=CONTEXT, eval_stride=8, ttt_chunk_tokens=8, ttt_lora_rank=4)
    small["grad_rms_tokens"] = 4096
    return g.RunConfig(**small | knobs)


def documents(texts: np.ndarray) -> g.Documents:
    """Texts without BOS, (documents, tokens) -> documents."""
    tokens = np.pad(texts, ((0, 0), (1, 0)), constant_values=g.BOS).ravel().astype(np.uint16)
    return g.split_documents(tokens, np.ones(len(tokens), np.int64))


def rows_of(docs: g.Documents) -> torch.Tensor:
    """The first context of every document and the token after it, (documents, CONTEXT + 1)."""
    return torch.from_numpy(np.stack([docs.span(i)[: CONTEXT + 1] for i in range(len(docs))]).astype(np.int64))


@functools.cache
def model() -> g.GPT:
    return random_gpt(CONFIG).requires_grad_(False)


@functools.cache
def own_text(count: int) -> g.Documents:
    """So many documents that the model itself has written: what it predicts is true of them."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.full((count, 1), g.BOS)
    with torch.no_grad():
        for _ in range(CONTEXT):
            states, _ = model().hidden(tokens)
            p = model().head.logits(states[:, -1:], model().embed, None)[:, 0].softmax(-1)
            p[:, g.BOS] = 0
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=random)], 1)
    return documents(tokens[:, 1:].numpy())


def chunk_gradients(docs: g.Documents, run: g.RunConfig, downs: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Mean squares, over chunks and the rows of `up`, of the gradients at every `up` of a fresh adapter, (out,) each;
    with other values of every `down` where they are given."""
    rows = len(docs)
    learner = g.BatchedTTT(model(), run, rows, CPU)
    loras = [lora for layer in learner.adapter.passes for lora in layer] + [learner.adapter.head]
    for lora, down in zip(loras, downs or [], strict=bool(downs)):
        lora.down.copy_(down)
    text = rows_of(docs)
    squares = 0
    chunks = CONTEXT // run.ttt_chunk_tokens
    for first in range(0, chunks * run.ttt_chunk_tokens, run.ttt_chunk_tokens):
        end = first + run.ttt_chunk_tokens
        chunk = learner.score(text[:, first:end], text[:, first + 1 : end + 1], to_learn=True)
        found = learner.gradients(chunk, torch.ones(rows, run.ttt_chunk_tokens, dtype=torch.bool))
        squares = [total + x.square().mean((0, 1)) for total, x in zip(squares or [0] * len(found), found, strict=True)]
        learner.advance(chunk)
    return [total / chunks for total in squares]


# ---- measured ---------------------------------------------------------------


def test_numbers_are_those_of_the_matrices_own_gradients():
    """With `down` the identity, a gradient at `up` is that of the matrix itself, transposed."""
    docs = own_text(6)
    run = run_config(ttt_optimizer="rms", ttt_lora_rank=CONFIG.model_dim, ttt_lora_alpha=float(CONFIG.model_dim))
    model().gradient_rms = g.GradientRMS([torch.ones(n) for _, n in OUTPUTS], torch.zeros(len(OUTPUTS)), 8)
    identities = [torch.eye(CONFIG.model_dim)] * len(OUTPUTS)
    squares = chunk_gradients(docs, run, identities)  # of mean losses, and means over rows
    measured = g.measure_gradient_rms(model(), docs, run, g.Dist())
    assert measured.chunk_tokens == 8
    for (target, _), numbers, square in zip(OUTPUTS, measured.columns, squares, strict=True):
        if target != "head":
            torch.testing.assert_close(numbers.square(), square * CONFIG.model_dim * 8, rtol=1e-3, atol=1e-9)


def test_the_heads_numbers_are_means_over_all_targets_that_there_might_be():
    docs = own_text(3)
    run = run_config()
    measured = g.measure_gradient_rms(model(), docs, run, g.Dist())
    expected = torch.zeros(CONFIG.vocab_size)
    learner = g.BatchedTTT(model(), run_config(ttt_optimizer="adamw"), len(docs), CPU)
    text = rows_of(docs)
    for first in range(0, CONTEXT, 8):
        chunk = learner.score(text[:, first : first + 8], text[:, first + 1 : first + 9], to_learn=False)
        learner.advance(chunk)
        z = model().head.uncapped_logits(chunk.states, model().embed, None).flatten(0, 1).requires_grad_()
        p = g.softcap(z, model().head.cap).softmax(-1).detach()
        for target in range(CONFIG.vocab_size):
            nats = g.loss_reference(z, torch.full((len(z),), target), model().head.cap)
            (gradient,) = torch.autograd.grad(nats.sum(), z)
            weight = p[:, target] * chunk.states.flatten(0, 1).square().sum(-1)
            expected += (weight[:, None] * gradient.square()).sum(0)
    torch.testing.assert_close(measured.columns[-1].square(), expected / (len(docs) * CONTEXT), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "chunk, knobs",
    [(8, dict(ttt_lora_rank=4, ttt_lora_alpha=9.0)), (16, dict(ttt_lora_rank=12, ttt_lora_alpha=2.0))],
)
def test_what_was_measured_is_converted_to_any_rank_alpha_and_chunk(chunk, knobs):
    docs = own_text(300)
    model().gradient_rms = g.measure_gradient_rms(model(), docs, run_config(), g.Dist())
    run = run_config(ttt_optimizer="rms", ttt_chunk_tokens=chunk, **knobs)
    converted = g.rms_of_gradients(model(), run)
    seeds = range(5)
    each = [chunk_gradients(docs, dataclasses.replace(run, seed=seed)) for seed in seeds]
    direct = [torch.stack(squares).mean(0).sqrt() for squares in zip(*each, strict=True)]
    ratios = torch.tensor([float(a.norm() / b.norm()) for a, b in zip(converted, direct, strict=True)])
    assert abs(ratios.mean() - 1) < 0.03 and (abs(ratios - 1) < 0.15).all()
    columns = torch.cat(converted) / torch.cat(direct)
    assert (abs(columns - 1) < 0.25).float().mean() > 0.97


def same(a: g.GradientRMS, b: g.GradientRMS, rtol: float = 1e-5) -> bool:
    columns = all(torch.allclose(x, y, rtol=rtol) for x, y in zip(a.columns, b.columns, strict=True))
    return columns and torch.allclose(a.growth, b.growth, rtol=0, atol=1e-4) and a.chunk_tokens == b.chunk_tokens


UNEQUAL = (3, 40, 17, 8, 25, 64, 0, 33, 16)  # tokens of documents; a chunk is 8, a longer one 32


def unequal_documents() -> g.Documents:
    random = np.random.default_rng(0)
    texts = [[g.BOS, *random.integers(2, CONFIG.vocab_size, count)] for count in UNEQUAL]
    tokens = np.concatenate(texts).astype(np.uint16)
    return g.split_documents(tokens, np.ones(len(tokens), np.int64))


def test_documents_are_measured_alike_in_any_groups(monkeypatch):
    together = g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist())
    monkeypatch.setattr(g, "PROBED_DOCUMENTS", 2)
    assert same(together, g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist()))


def test_what_follows_a_chunk_and_what_is_no_whole_chunk_does_not_count():
    """Nor does a context's end: TRAIN_SEQ_LEN tokens of a document are measured."""
    docs = unequal_documents()
    expected = g.measure_gradient_rms(model(), docs, run_config(), g.Dist())
    tokens = docs.tokens.copy()
    for start, count in zip(docs.starts[:-1], docs.lengths, strict=True):
        whole = start + min(CONTEXT, count) // 8 * 8  # the last target that counts
        end = start + count
        tokens[whole + 1 : end] = 2
    changed = g.Documents(tokens, docs.bytes, docs.starts)
    assert not np.array_equal(tokens, docs.tokens)
    found = g.measure_gradient_rms(model(), changed, run_config(), g.Dist())
    assert all(torch.allclose(x, y, rtol=1e-5) for x, y in zip(found.columns, expected.columns, strict=True))


def test_measuring_leaves_no_trace_and_repeats_to_the_last_bit():
    network = random_gpt(CONFIG)
    network.embed.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in network.named_parameters()}
    first, second = (g.measure_gradient_rms(network, unequal_documents(), run_config(), g.Dist()) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.columns, second.columns, strict=True))
    for name, p in network.named_parameters():
        value, required = before[name]
        assert torch.equal(p, value) and p.requires_grad == required and p.grad is None, name


def test_replayed_chunks_are_measured_like_others(monkeypatch):
    monkeypatch.setattr(g, "PROBED_DOCUMENTS", 4)
    monkeypatch.setattr(g.KVCache, "SMALLEST", 8)
    expected = g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist())
    captured = replays_of(g.ProbedDocuments, monkeypatch)
    assert same(expected, g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist()))
    assert captured and not any(graph.fresh for graph in captured)


def test_measuring_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(g, "SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr(g, "PROBED_DOCUMENTS", 4)
    docs = unequal_documents()
    said = []
    told = g.measure_gradient_rms(model(), docs, run_config(), g.Dist(), g.Log(screen=said.append))
    assert same(told, g.measure_gradient_rms(model(), docs, run_config(), g.Dist()))

    done = {}
    line = r"scoring training text for its gradients, in chunks of (\d+): (\d+)/(\d+) targets eta_s:\d+"
    for size, *counts in (map(int, re.fullmatch(line, text).groups()) for text in said):
        done.setdefault(size, []).append(tuple(counts))
    assert done.keys() == {8, 32}
    for size, counts in done.items():
        whole = int(sum(np.minimum(docs.lengths, CONTEXT) // size) * size)
        assert counts == sorted(counts) and counts[0] > (0, whole) and counts[-1] == (whole, whole)


def test_what_is_captured_is_freed_at_once(monkeypatch):
    """Not when Python next looks for cycles: a graph that is freed while another is captured ends that capture."""
    held = []
    plain = g.ProbedDocuments.__init__
    monkeypatch.setattr(
        g.ProbedDocuments, "__init__", lambda self, *given: held.append(weakref.ref(self)) or plain(self, *given)
    )
    gc.disable()
    try:
        g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist())
        assert len(held) == 2 and not any(probed() for probed in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("knobs, size", [(dict(ttt_chunk_tokens=12), 12), (dict(ttt_params="full"), 16)])
def test_chunks_are_as_long_as_those_to_learn_from_if_these_are_short(knobs, size):
    knobs = dict(ttt_lora_rank=80) | knobs
    assert g.rms_chunk_tokens(run_config(**knobs, train_seq_len=1024)) == size
    assert g.rms_chunk_tokens(run_config(**knobs, train_seq_len=10)) == 10


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist(rank, 2))
    torch.save(tuple(found), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    start_two_ranks(one_rank, str(tmp_path))
    first, second = (g.GradientRMS(*torch.load(tmp_path / f"{rank}.pt")) for rank in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.columns, second.columns, strict=True))
    assert same(first, g.measure_gradient_rms(model(), unequal_documents(), run_config(), g.Dist()))


# ---- the text ---------------------------------------------------------------


def test_the_text_ends_where_the_held_out_text_begins(tiny_data, tiny_run):
    run = tiny_run(holdout_tokens=300, grad_rms_tokens=250)
    stream = g.TrainingStream(run, 64, g.Dist())
    docs = stream.last_documents(run.grad_rms_tokens)
    shards = np.concatenate([g.read_shard(path) for path in g.find_shards(str(tiny_data), "train")])
    text = shards[-550:-300]
    starts = np.flatnonzero(text == g.BOS)
    assert np.array_equal(docs.tokens, text[starts[0] : starts[-1]]) and len(docs) == len(starts) - 1 > 3
    assert len(stream.last_documents(10**9).tokens) <= stream.total


def test_the_floor_is_a_fraction_of_the_rms_of_all_columns_of_the_same_output():
    network = random_gpt(CONFIG)
    network.gradient_rms = any_gradient_rms(CONFIG, 8)
    plain, raised = (
        g.rms_of_gradients(network, run_config(ttt_optimizer="rms", ttt_rms_floor=floor)) for floor in (0.0, 0.25)
    )
    for rms, with_floor in zip(plain, raised, strict=True):
        torch.testing.assert_close(with_floor, rms + 0.25 * rms.square().mean().sqrt())


# ---- stored -----------------------------------------------------------------


def stored() -> dict[str, torch.Tensor]:
    model().gradient_rms = g.measure_gradient_rms(model(), own_text(6), run_config(), g.Dist())
    return g.encode_gradient_rms(model())


def test_numbers_are_stored_in_quarters_of_an_octave_and_growth_in_64ths():
    """Artifacts outlive the code: other units would misread those that exist."""
    tensors = stored()
    tensors["gradients.q"].fill_(6)
    tensors["gradients.growth"].fill_(16)
    found = g.decode_gradient_rms(tensors, CONFIG, "a file")
    assert (found.growth == 0.25).all()
    for (target, _), columns in zip(OUTPUTS, found.columns, strict=True):
        assert target != "q" or torch.allclose(columns, torch.tensor(2.0**1.5))


def test_numbers_come_back_to_within_the_steps_of_their_logarithms():
    tensors = stored()
    measured = model().gradient_rms
    found = g.decode_gradient_rms(tensors, CONFIG, "a file")
    assert found.chunk_tokens == measured.chunk_tokens
    torch.testing.assert_close(found.growth, measured.growth, rtol=0, atol=0.5 / g.GROWTH_STEPS)
    for new, old in zip(found.columns, measured.columns, strict=True):
        assert (abs((new / old).log2()) <= 0.5 / g.LEVELS + 1e-5).all()
    assert all(tensor.dtype in (torch.int8, torch.float32) for tensor in tensors.values())
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    assert layout == g.layout_of_gradient_rms(CONFIG)


def test_numbers_beyond_what_can_be_stored_are_the_nearest_that_can():
    extreme = g.GPT(CONFIG)
    for number, exponent in ((1e-18, -g.GRID_LIMIT), (1e18, g.GRID_LIMIT)):
        columns = [torch.full((n,), number) for _, n in OUTPUTS]
        extreme.gradient_rms = g.GradientRMS(columns, torch.zeros(len(OUTPUTS)), 8)
        found = g.decode_gradient_rms(g.encode_gradient_rms(extreme), CONFIG, "a file")
        for columns in found.columns:
            torch.testing.assert_close(columns, torch.full_like(columns, 2.0 ** (exponent / g.LEVELS)))


def test_nothing_is_stored_of_nothing():
    assert g.encode_gradient_rms(random_gpt(CONFIG)) == {}


def test_the_default_networks_take_few_bytes():
    config = g.ModelConfig()
    columns = sum(n for _, n in g.lora_outputs(config))
    assert columns == 43_008
    with torch.device("meta"):
        sketch = g.GPT(config)
    assert g.gradient_rms_bytes(sketch, g.RunConfig(grad_rms_tokens=4096)) < 20_000
    assert g.gradient_rms_bytes(sketch, g.RunConfig(grad_rms_tokens=0)) == 0


def without(name: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n != f"gradients.{name}"}


def instead(name: str, value: torch.Tensor):
    return lambda tensors: tensors | {f"gradients.{name}": value}


HOSTILE = {
    "no head": without("head"),
    "no chunk": without("chunk_tokens"),
    "no growth": without("growth"),
    "one more": instead("w", torch.zeros(3, dtype=torch.int8)),
    "flat": instead("q", torch.zeros(32 * 4, dtype=torch.int8)),
    "of fractions": instead("growth", torch.zeros(len(OUTPUTS))),
    "of another network": instead("head", torch.zeros(1, 49, dtype=torch.int8)),
    "no tokens in a chunk": instead("chunk_tokens", torch.tensor([0.0])),
    "half a token": instead("chunk_tokens", torch.tensor([16.5])),
    "less than no tokens": instead("chunk_tokens", torch.tensor([-16.0])),
    "not a number": instead("chunk_tokens", torch.tensor([math.nan])),
    "without end": instead("chunk_tokens", torch.tensor([math.inf])),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_run_stores_is_refused_with_the_name_of_the_file(case):
    tensors = stored_tensors(model()) | stored()
    restored = g.restore(g.GPT(CONFIG), tensors, "fine.ptz")
    assert same(restored.gradient_rms, g.decode_gradient_rms(tensors, CONFIG, "fine.ptz"), rtol=0)
    with pytest.raises(g.DataError, match="^bad.ptz: "):
        g.restore(g.GPT(CONFIG), HOSTILE[case](tensors), "bad.ptz")


@pytest.mark.parametrize("level", [-128, 127])
def test_levels_that_no_run_stores_still_are_numbers(level):
    tensors = stored() | {"gradients.head": torch.full((1, 48), level, dtype=torch.int8)}
    head = g.decode_gradient_rms(tensors, CONFIG, "a file").columns[-1]
    assert (head > 0).all() and head.isfinite().all()


# ---- who has it, and who needs it -------------------------------------------


def with_gradients(yes: bool) -> dict:
    """The header of an artifact."""
    tensors = stored() if yes else {}
    return g.read_header(g.pack({}, tensors, None), "a.ptz")[0]


@pytest.mark.parametrize(
    "has, knobs, expected",
    [
        (True, dict(), dict(ttt_optimizer="rms", ttt_lr=8e-5)),
        (False, dict(), dict(ttt_optimizer="adamw", ttt_lr=1e-4)),
        (True, dict(ttt_lr=0.25, ttt_rms_floor=0.5), dict(ttt_optimizer="rms", ttt_lr=0.25, ttt_rms_floor=0.5)),
        (False, dict(ttt_beta2=0.9), dict(ttt_optimizer="adamw", ttt_lr=1e-4, ttt_beta2=0.9)),
        (True, dict(ttt_optimizer="adamw"), dict(ttt_optimizer="adamw", ttt_lr=1e-4)),
        (True, dict(ttt_optimizer="sgd"), dict(ttt_optimizer="sgd", ttt_lr=1e-4)),
        (True, dict(ttt_scope="stream"), dict(ttt_optimizer="adamw", ttt_lr=1e-4)),
        (True, dict(ttt_params="full"), dict(ttt_optimizer="sgd", ttt_lr=0.005)),
    ],
)
def test_an_artifact_decides_what_auto_means(has, knobs, expected):
    run = g.RunConfig(artifact="a.ptz", **knobs)
    decided = g.decide_optimizer(run, with_gradients(has), "a.ptz")
    assert {name: vars(decided)[name] for name in expected} == expected
    named = {name.lower() for name in g.settings(decided)}
    assert {
        f.name for f in dataclasses.fields(decided) if f.name.startswith("ttt") and g.has_effect(f, decided)
    } <= named


@pytest.mark.parametrize(
    "has, knobs, mentioned",
    [
        (False, dict(ttt_optimizer="rms"), ["a.ptz", "TTT_OPTIMIZER=rms", "does not hold", "./run.sh calibrate"]),
        (True, dict(ttt_beta2=0.9), ["TTT_BETA2 has no effect", "TTT_OPTIMIZER=adamw"]),
        (True, dict(ttt_weight_decay=0.25), ["TTT_WEIGHT_DECAY has no effect", "TTT_OPTIMIZER=sgd or adamw"]),
        (False, dict(ttt_rms_floor=0.5), ["TTT_RMS_FLOOR has no effect", "TTT_OPTIMIZER=rms"]),
    ],
)
def test_what_an_artifact_makes_impossible_is_refused_by_name(has, knobs, mentioned):
    with pytest.raises(g.UserError) as error:
        g.decide_optimizer(g.RunConfig(artifact="a.ptz", **knobs), with_gradients(has), "a.ptz")
    assert all(part in str(error.value) for part in mentioned), error.value


@pytest.mark.parametrize("chunk, ok", [(4, True), (3, False), (64, True), (65, False)])
def test_chunks_that_are_too_far_from_what_was_measured_are_refused(chunk, ok):
    measured = g.GradientRMS([], torch.zeros(0), 8)
    run = run_config(ttt_optimizer="rms", eval_seq_len=128, micro_batch_tokens=128, ttt_chunk_tokens=chunk)
    if ok:
        g.check_gradient_rms(measured, run, "a.ptz")
        return
    with pytest.raises(g.UserError, match=f"a.ptz: .*TTT_CHUNK_TOKENS={chunk}: choose 4 to 64.*TTT_OPTIMIZER=adamw"):
        g.check_gradient_rms(measured, run, "a.ptz")


def test_so_are_late_chunks():
    measured = g.GradientRMS([], torch.zeros(0), 8)
    run = run_config(ttt_optimizer="rms", eval_seq_len=128, micro_batch_tokens=128, ttt_late_chunk_tokens=65)
    with pytest.raises(g.UserError, match="TTT_LATE_CHUNK_TOKENS=65: choose 4 to 64"):
        g.check_gradient_rms(measured, run, "a.ptz")


def test_a_network_without_statistics_cannot_adapt_by_them():
    with pytest.raises(g.UserError, match="a.ptz: .*does not hold the RMS of gradients"):
        g.check_gradient_rms(None, run_config(ttt_optimizer="rms"), "a.ptz")
