"""Every kernel against its reference, forward and backward: in Triton's interpreter on a CPU, compiled on a GPU."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as g
from tools import bench

tl = pytest.importorskip("triton.language")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the same on a GPU instead")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

ATTENTION = [  # tokens, query heads, key heads, head width, rotated dimensions, starts of segments
    pytest.param(300, 4, 2, 16, 8, [0, 3, 4, 130, 200, 299], id="tiles that hold several segments, one not full"),
    pytest.param(128, 2, 1, 32, 32, [0], id="one segment, one key head, all dimensions rotate"),
    pytest.param(257, 2, 2, 16, 6, [0, 100, 256], id="a token beyond the last full tile, no sharing of heads"),
    pytest.param(40, 6, 2, 16, 0, list(range(40)), id="every token a segment, nothing rotates, groups of three"),
    pytest.param(5, 8, 4, 64, 16, [0, 2], id="fewer tokens than a tile"),
    pytest.param(450, 4, 2, 16, 8, [0, 7, 440], id="whole tiles without a mask, two query heads a key head"),
    pytest.param(333, 8, 2, 16, 8, [0, 300], id="four query heads a key head"),
    pytest.param(200, 6, 1, 16, 8, [0, 150], id="six query heads a key head, an odd number of heads in all"),
]
LARGE_ATTENTION = pytest.param(4096, 8, 4, 64, 16, [0, 1, 900, 2948], id="large")
CACHED_ATTENTION = [  # documents, tokens of the chunk, query heads, key heads, head width, slots, tokens so far
    pytest.param(2, 8, 4, 2, 16, 100, 70, id="a tile of slots and a part of one"),
    pytest.param(1, 12, 2, 1, 32, 64, 64, id="a chunk that is no power of two, a full tile of slots"),
    pytest.param(2, 16, 6, 2, 16, 7, 0, id="an empty cache, three query heads a key head"),
    pytest.param(1, 5, 2, 2, 16, 0, 300, id="no cache, no sharing of heads"),
    pytest.param(1, 1, 16, 1, 16, 5, 3, id="one token, as many heads as rows"),
    pytest.param(1, 64, 4, 2, 16, 100, 230, id="a cache that has wrapped round"),
    pytest.param(1, 128, 2, 1, 64, 64, 9, id="more rows than a program takes, few slots filled"),
    pytest.param(1, 90, 3, 1, 16, 100, 77, id="rows of a token in two programs"),
]
LARGE_CACHED_ATTENTION = pytest.param(64, 64, 8, 4, 64, 1984, 5000, id="large")
MLPS = [  # tokens, width, hidden width, slope
    pytest.param(130, 64, 256, 0.5, id="a token beyond the last full tile"),
    pytest.param(5, 48, 40, 0.0, id="fewer tokens and outputs than a tile, a width that no step divides, plain ReLU"),
    pytest.param(300, 16, 1040, 1.0, id="a width less than a step, no kink"),
]
LARGE_MLP = pytest.param(5000, 512, 2048, 0.5, id="large")
MIXES = [  # rows, tokens, width, columns that open gates
    pytest.param(1, 75, 16, 12, id="more rows than all programs take at once"),
    pytest.param(3, 5, 48, 0, id="a width that is no power of two, no gates"),
    pytest.param(2, 1, 64, 64, id="few rows, all columns open gates"),
]
LARGE_MIX = pytest.param(1, 9000, 512, 12, id="large")
LOSSES = [  # tokens, vocabulary, cap
    pytest.param(7, 64, 30.0, id="a power of two"),
    pytest.param(5, 37, 3.0, id="a vocabulary of any size, a narrow cap"),
    pytest.param(3, 17, 0.0, id="no cap"),
]
LARGE_LOSS = pytest.param(512, 8192, 30.0, id="large")


def on_each_device(names: str, cases: list, large) -> pytest.MarkDecorator:
    """Parametrise by `device` and `names`: all cases on a CPU, or where there is a GPU all of them and the large one
    there."""
    params = [pytest.param("cpu", *case.values, id=f"cpu, {case.id}", marks=on_cpu) for case in cases]
    for case in (*cases, large):
        params.append(pytest.param("cuda", *case.values, id=f"gpu, {case.id}", marks=pytest.mark.gpu))
    return pytest.mark.parametrize(f"device, {names}", params)


def assert_close(results: list[torch.Tensor], expected: list[torch.Tensor], names: str, tolerance: float) -> None:
    """Within the tolerance, relative to the largest of what is compared. The gradient of a gain gets tenfold: it is a
    sum over tokens and scores that nearly cancel."""
    for name, a, b in zip(names.split(), results, expected, strict=True):
        largest = b.detach().abs().amax().item() if b.numel() else 0.0
        atol = tolerance * max(1.0, largest)
        if name == "d_gain":
            atol *= 10
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, with gaps in memory."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


def results_and_gradients(f, inputs, fixed, d_outputs) -> list[torch.Tensor]:
    """f(*inputs, *fixed) and the gradients of the inputs, given those of the outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs, *fixed)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    d_outputs = [d_y.to(y.dtype) for d_y, y in zip(d_outputs, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, d_outputs)]


def compare(fused, reference, inputs, fixed, d_outputs, names: str, tolerance: float) -> None:
    """The reference computes in fp32: rounded like the kernel, it would be further from the truth."""
    results = results_and_gradients(fused, inputs, fixed, d_outputs)
    expected = results_and_gradients(reference, [x.float() for x in inputs], fixed, d_outputs)
    expected = [t.to(like.dtype) for t, like in zip(expected, (*d_outputs, *inputs), strict=True)]
    assert_close(results, expected, names, tolerance)


def make_segments(tokens: int, starts: list[int], device: str) -> g.Segments:
    row = np.zeros(tokens, np.uint16)
    return g.make_micro_batch(row, row, np.array(starts), torch.device(device)).segments


# ---- Attention ----


def attention_case(device, N, H, K, h, dims, starts, xsa) -> tuple[list, list, list]:
    """Inputs, fixed arguments and gradients of the outputs for `FusedAttention`."""
    random = torch.Generator().manual_seed(N)
    shapes = (N, (H + 2 * K) * h), (H,), (N, H), (N, H * h)
    qkv, gain, gate, d_out = (torch.randn(shape, generator=random).to(device) for shape in shapes)
    dtype = DTYPES[device]
    inputs = [qkv.to(dtype), gain + 2.0, gate.sigmoid().to(dtype)]

    segments = make_segments(N, starts, device)
    cos, sin = g.rope_angles(segments.positions, dims, 100.0)
    fixed = [cos[:, 0], sin[:, 0], segments, g.HeadLayout(xsa, H, K, h)]
    return inputs, fixed, [strided(d_out.to(dtype))]


def check_attention(device, *case) -> None:
    names = "out d_qkv d_gain d_gate"
    tolerance = {"cpu": 1e-5, "cuda": 5e-2}[device]
    compare(g.FusedAttention.apply, bench.attention_reference, *attention_case(device, *case), names, tolerance)


@on_each_device("N, H, K, h, dims, starts", ATTENTION, LARGE_ATTENTION)
def test_packed_attention_equals_its_reference(device, N, H, K, h, dims, starts):
    check_attention(device, N, H, K, h, dims, starts, True)


@on_cpu
def test_packed_attention_without_xsa_equals_its_reference():
    check_attention("cpu", 70, 4, 2, 16, 8, [0, 9], False)


@pytest.mark.gpu
@pytest.mark.parametrize("N, H, K, h, dims, starts", [*ATTENTION, LARGE_ATTENTION])
def test_packed_attention_without_xsa_equals_its_reference_on_a_gpu(N, H, K, h, dims, starts):
    check_attention("cuda", N, H, K, h, dims, starts, False)


@pytest.mark.gpu
def test_packed_attention_repeats_to_the_last_bit():
    case = attention_case("cuda", *LARGE_ATTENTION.values, True)
    once = results_and_gradients(g.FusedAttention.apply, *case)
    again = results_and_gradients(g.FusedAttention.apply, *case)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@on_cpu
def test_packed_attention_of_tokens_near_zero_equals_its_reference():
    """Where what norms add to squares shows; one token is all zeros."""
    inputs, *rest = attention_case("cpu", 20, 2, 1, 16, 8, [0], True)
    inputs[0] *= 1e-3
    inputs[0][7] = 0
    compare(g.FusedAttention.apply, bench.attention_reference, inputs, *rest, "out d_qkv d_gain d_gate", 1e-5)


@on_cpu
def test_a_token_alone_gets_its_own_value_whatever_the_score():
    (qkv, _, gate), fixed, _ = attention_case("cpu", 5, 2, 2, 16, 8, list(range(5)), False)
    q, k, v = qkv.split(2 * 16, 1)
    q.copy_(k)
    out = g.FusedAttention.apply(qkv, torch.tensor([-60.0, 60.0]), torch.ones_like(gate), *fixed)
    torch.testing.assert_close(out, v)


@g.jit
def tile_loops_kernel(positions_ptr, ends_ptr, found_ptr, tokens, queries: tl.constexpr):
    """Begin and end of the loops of each tile: over keys without a mask and with one, over queries likewise."""
    first = tl.program_id(0) * g.TILE
    for masked in tl.static_range(2):
        loop_ptr = found_ptr + tl.program_id(0) * 8 + 2 * masked
        begin, end = g.keys_of_tile(positions_ptr, first, tokens, masked)
        tl.store(loop_ptr, begin)
        tl.store(loop_ptr + 1, end)
        begin, end, _ = g.queries_of_tile(ends_ptr, first, tokens, queries, masked)
        tl.store(loop_ptr + 4, begin)
        tl.store(loop_ptr + 5, end)


@on_cpu
@pytest.mark.parametrize("queries", [16, 64])
def test_loops_visit_no_tile_in_vain_and_mask_only_those_that_need_it(queries):
    tokens = 1000
    starts = [0, 64, 67, 131, 192, 256, 448, 449, 642]
    segments = make_segments(tokens, starts, "cpu")
    begins = torch.arange(tokens) - segments.positions
    attends = (begins[:, None] == begins) & torch.ones(tokens, tokens, dtype=torch.bool).tril()  # (queries, keys)

    expected = []
    for first in range(0, tokens, 64):
        tile = attends[first : first + 64]  # of queries
        begin = first_key = int(begins[first])
        while first_key + 64 <= first + 1 and tile[:, first_key : first_key + 64].all():
            first_key += 64
        loops = [begin, first_key, first_key, first + len(tile)]

        tile = attends[:, first : first + 64]  # of keys
        end = int(tile[:, -1].nonzero().max()) + 1
        after = first_query = first + 64
        while first_query + queries <= end and tile[first_query : first_query + queries].all():
            first_query += queries
        expected.append([*loops, after, first_query, first, end - (first_query - after)])

    found = torch.empty(len(expected), 8, dtype=torch.int32)
    tile_loops_kernel[(len(found),)](segments.positions, segments.ends, found, tokens, queries)
    assert found.tolist() == expected


@on_cpu
def test_attention_refuses_what_it_cannot_count():
    with pytest.raises(AssertionError, match="MICRO_BATCH_TOKENS"):
        g.FusedAttention.apply(torch.zeros(1).expand(2**31, 1), *6 * [None])


# ---- Cached attention ----


def cached_attention_case(device, B, C, H, K, h, L, position) -> tuple[list, list, list]:
    """Inputs, fixed arguments and gradients of the output for `FusedCachedAttention`. Slots that are not filled hold
    numbers, too."""
    random = torch.Generator().manual_seed(C)
    shapes = (B, C, H, h), (B, C, K, h), (B, C, K, h), (2, B, K, L, h), (B, C, H, h)
    q, k, v, buffer, d_y = (torch.randn(shape, generator=random).to(device, DTYPES[device]) for shape in shapes)
    filled = torch.tensor(position, device=device).clamp(max=L)
    return [strided(q), strided(k), strided(v)], [filled, buffer], [strided(d_y)]


def run_cached_attention(inputs, fixed, d_outputs) -> list[torch.Tensor]:
    return results_and_gradients(g.FusedCachedAttention.apply, inputs, fixed, d_outputs)


def assert_same_bits(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@on_each_device("B, C, H, K, h, L, position", CACHED_ATTENTION, LARGE_CACHED_ATTENTION)
def test_cached_attention_equals_its_reference(device, B, C, H, K, h, L, position):
    tolerance = {"cpu": 1e-5, "cuda": 5e-2}[device]
    case = cached_attention_case(device, B, C, H, K, h, L, position)
    compare(g.FusedCachedAttention.apply, bench.attend_with_cache, *case, "y d_q d_k d_v", tolerance)


def test_cached_attention_refuses_a_cache_of_another_dtype():
    inputs, (filled, buffer), _ = cached_attention_case("cpu", *CACHED_ATTENTION[0].values)
    with pytest.raises(AssertionError, match="dtype"):
        g.FusedCachedAttention.apply(*inputs, filled, buffer.half())


@pytest.mark.parametrize("rows, width, size", [(1, 64, 16), (17, 64, 32), (65, 64, 128), (200, 64, 128), (65, 128, 64)])
def test_a_tile_has_as_many_rows_as_it_needs_and_fit(rows, width, size):
    """A GPU multiplies no fewer than 16."""
    assert g.cached_attention_tile_rows(rows, width) == size
    assert g.cached_attention_launch(size, width)["num_warps"] == max(4, size // 16)


@on_each_device("B, C, H, K, h, L, position", CACHED_ATTENTION[:1], LARGE_CACHED_ATTENTION)
def test_cached_attention_survives_scores_far_below_zero(device, B, C, H, K, h, L, position):
    """Those of empty slots would then have an infinite exponential."""
    (q, k, v), (filled, buffer), d_outputs = cached_attention_case(device, B, C, H, K, h, L, position)
    inputs = [torch.full_like(q, 40.0), torch.full_like(k, -1.0), v]
    buffer[0] = -1.0
    tolerance = {"cpu": 1e-5, "cuda": 5e-2}[device]
    compare(
        g.FusedCachedAttention.apply,
        bench.attend_with_cache,
        inputs,
        [filled, buffer],
        d_outputs,
        "y d_q d_k d_v",
        2 * tolerance,
    )


@on_each_device("B, C, H, K, h, L, position", CACHED_ATTENTION[:1], LARGE_CACHED_ATTENTION)
def test_a_document_attends_to_the_same_bits_alone_and_in_a_larger_cache(device, B, C, H, K, h, L, position):
    """In slots that are not filled, a larger cache may hold what no number survives."""
    inputs, (filled, buffer), (d_y,) = cached_attention_case(device, B, C, H, K, h, L, position)
    together = run_cached_attention(inputs, [filled, buffer], [d_y])
    assert_same_bits(run_cached_attention(inputs, [filled, buffer], [d_y]), together)

    larger = torch.cat([buffer, torch.full_like(buffer[..., :27, :], float("nan"))], 3)
    assert_same_bits(run_cached_attention(inputs, [filled, larger], [d_y]), together)

    last = slice(B - 1, B)
    alone = run_cached_attention([x[last] for x in inputs], [filled, buffer[:, last].contiguous()], [d_y[last]])
    assert_same_bits(alone, [x[last] for x in together])


@on_each_device("B, C, H, K, h, L, position", CACHED_ATTENTION[-2:], LARGE_CACHED_ATTENTION)
def test_cached_attention_to_later_tokens_has_no_effect(device, B, C, H, K, h, L, position):
    """Not on earlier outputs, nor, where these alone have gradients, on theirs; later tokens get none."""
    inputs, fixed, (d_y,) = cached_attention_case(device, B, C, H, K, h, L, position)
    t = C // 2
    d_y[:, t:] = 0
    changed = [torch.cat([x[:, :t], 2 - x[:, t:]], 1) for x in inputs]
    results = run_cached_attention(inputs, fixed, [d_y])
    results_of_changed = run_cached_attention(changed, fixed, [d_y])
    assert_same_bits([x[:, :t] for x in results_of_changed], [x[:, :t] for x in results])
    assert not any(gradient[:, t:].any() for gradient in results[1:])


@on_cpu
def test_a_cache_may_hold_more_numbers_than_32_bits_count(tmp_path):
    slots = 2**27
    size = 2 * slots * 16  # of two documents
    cache = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    buffer = cache.view(1, 2, 1, slots, 16).expand(2, -1, -1, -1, -1)  # keys and values are the same
    first_slots = torch.randn(2, 1, 5, 16).half()
    buffer[0, :, :, :5] = first_slots
    *inputs, d_y = torch.randn(4, 2, 1, 1, 16).half()
    results = run_cached_attention(inputs, [torch.tensor(5), buffer], [d_y])
    small = first_slots.expand(2, -1, -1, -1, -1)
    assert_same_bits(results, run_cached_attention(inputs, [torch.tensor(5), small], [d_y]))


# ---- MLP, mix and loss ----


@on_each_device("N, D, W, slope", MLPS, LARGE_MLP)
def test_the_mlp_equals_its_reference(device, N, D, W, slope):
    random = torch.Generator().manual_seed(N)
    shapes = (N, D), (W, D), (D, W), (N, D)
    x, up, down, d_y = (
        torch.randn(shape, generator=random).to(device, DTYPES[device]) / shape[1] ** 0.5 for shape in shapes
    )
    tolerance = {"cpu": 1e-5, "cuda": 2e-2}[device]
    compare(
        g.FusedMLP.apply, bench.mlp_reference, [x, up, down], [slope], [strided(d_y)], "y d_x d_up d_down", tolerance
    )


@on_each_device("B, T, D, gate_width", MIXES, LARGE_MIX)
def test_the_mix_equals_its_reference(device, B, T, D, gate_width, monkeypatch):
    random = torch.Generator().manual_seed(D)
    dtype = DTYPES[device]
    x, x0, d_mixed, d_normalised = (torch.randn(B, T, D, generator=random).to(device, dtype) for _ in range(4))
    d_gate_input = torch.randn(B, T, gate_width, generator=random).to(device, dtype)
    mix = torch.randn(2, D, generator=random).to(device)
    fixed = [torch.tensor(0.7, device=device), gate_width]
    d_outputs = [strided(d_y) for d_y in (d_mixed, d_normalised, d_gate_input)]
    names = "mixed normalised gate_input d_x d_x0 d_mix"
    if device == "cpu":
        monkeypatch.setattr(g, "MIX_PROGRAMS", 7)  # the interpreter runs them one after another
    inputs = [strided(x), strided(x0), mix]
    compare(g.FusedMix.apply, g.mix_reference, inputs, fixed, d_outputs, names, 2e-5 if device == "cpu" else 2e-2)


@on_cpu
def test_sums_over_narrow_numbers_are_of_fp32(monkeypatch):
    """fp16 instead of bf16, which the interpreter does not round to nearest."""
    monkeypatch.setattr(g, "MIX_PROGRAMS", 7)
    x, x0, d_mixed, d_normalised = torch.randn(4, 1, 75, 48).half()
    d_outputs = [d_mixed, d_normalised, torch.randn(1, 75, 12).half()]
    inputs = [x, x0, torch.randn(2, 48)]
    found = results_and_gradients(g.FusedMix.apply, inputs, [torch.tensor(0.7), 12], d_outputs)[-1]
    inputs = [t.float() for t in inputs]
    expected = results_and_gradients(g.mix_reference, inputs, [torch.tensor(0.7), 12], d_outputs)[-1]
    assert_close([found], [expected], "d_mix", 2e-6)

    z = (8 * torch.randn(5, 37)).half()
    targets = torch.randint(37, (5,))
    assert_close([g.FusedLoss.apply(z, targets, 3.0)], [g.loss_reference(z.float(), targets, 3.0)], "nll", 2e-6)


@on_each_device("tokens, vocab, cap", LOSSES, LARGE_LOSS)
def test_the_loss_equals_its_reference(device, tokens, vocab, cap):
    random = torch.Generator().manual_seed(tokens)
    z = (8 * torch.randn(tokens, vocab, generator=random)).to(device, DTYPES[device])
    z[0] += 100  # their exponentials are beyond fp32
    targets = torch.randint(vocab, (tokens,), generator=random).to(device)
    d_nll = strided(torch.arange(1, tokens + 1, device=device).float())
    tolerance = {"cpu": 1e-5, "cuda": 1e-2}[device]
    compare(g.FusedLoss.apply, g.loss_reference, [z], [targets, cap], [d_nll], "nll d_z", tolerance)


# ---- In the network ----


def note_use(monkeypatch, *functions: type[torch.autograd.Function]) -> set[str]:
    """The names of those that have run, from now on."""
    used: set[str] = set()
    for function in functions:

        def forward(*arguments, name=function.__name__, real=function.forward):
            used.add(name)
            return real(*arguments)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    return used


@on_cpu
def test_the_network_has_the_same_gradients_with_kernels_as_without(tiny_config, monkeypatch):
    """Of every parameter: whatever lies beside a kernel in memory, and whichever gradients add up."""
    model = g.GPT(dataclasses.replace(tiny_config, num_heads=2, num_kv_heads=1))
    g.init_weights(model, seed=1)
    tokens, targets = torch.randint(2, 64, (2, 1, 70))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    segments = make_segments(70, [0, 9, 64], "cpu")
    monkeypatch.setattr(g, "MIX_PROGRAMS", 3)
    used = note_use(monkeypatch, g.FusedAttention, g.FusedMLP, g.FusedMix, g.FusedLoss)

    def loss_and_gradients(with_kernels: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(g, "use_kernels", lambda x: with_kernels)
        nll = model(tokens, targets, segments)
        return [nll, *torch.autograd.grad(nll.sum(), list(model.parameters()))]

    names = " ".join(["nll", *(name for name, _ in model.named_parameters())])
    expected = loss_and_gradients(False)
    assert not used
    assert_close(loss_and_gradients(True), expected, names, 1e-4)
    assert used == {"FusedAttention", "FusedMLP", "FusedMix", "FusedLoss"}


@on_cpu
def test_a_document_is_learned_from_alike_with_kernels_and_without(tiny_config, tiny_run, monkeypatch):
    """Chunks that find the cache empty, filled in part, and wrapped round, each scored, learned from and cached."""
    small = dict(num_layers=2, loop_start=0, loop_end=0, xsa_last_n=1, unet_skips=1, parallel_start_layer=1)
    model = g.GPT(dataclasses.replace(tiny_config, num_heads=2, num_kv_heads=1, **small)).requires_grad_(False)
    g.init_weights(model, seed=1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    run = tiny_run(ttt_optimizer="adamw", eval_seq_len=20)
    tokens = torch.randint(2, 64, (2, 32))
    mask = torch.ones(2, 8, dtype=torch.bool)
    used = note_use(monkeypatch, g.FusedCachedAttention, g.FusedMLP, g.FusedMix)

    def nats_and_adapter(with_kernels: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(g, "use_kernels", lambda x: with_kernels)
        learner = g.BatchedTTT(model, run, 2, torch.device("cpu"))
        nats = []
        for inputs in tokens.split(8, 1):
            chunk = learner.score(inputs, inputs, to_learn=True)
            nats.append(chunk.nats)
            learner.advance(learner.learn(chunk, mask))
        return nats

    expected = nats_and_adapter(False)
    assert not used
    assert_close(nats_and_adapter(True), expected, "first second third fourth", 1e-4)
    assert used == {"FusedCachedAttention"}  # the others are for training


@on_cpu
def test_an_mlp_that_may_not_fuse_runs_in_plain_torch(tiny_config, monkeypatch):
    monkeypatch.setattr(g, "use_kernels", lambda x: True)
    monkeypatch.delattr(g, "FusedMLP")
    mlp = g.MLP(tiny_config)
    mlp.may_fuse = False
    mlp(torch.ones(1, 3, tiny_config.model_dim), torch.ones(tiny_config.model_dim))


def test_kernels_run_where_both_a_gpu_and_triton_are(monkeypatch):
    on_a_gpu = SimpleNamespace(is_cuda=True)
    assert g.use_kernels(on_a_gpu) and not g.use_kernels(torch.zeros(1))
    monkeypatch.setattr(g, "triton", None)
    assert not g.use_kernels(on_a_gpu)


@on_cpu
def test_the_kernels_of_training_run_in_training_only(monkeypatch):
    """Without gradients, and where only LoRAs adapt, MLP and mix run in plain torch, which calibration can hook."""
    x = torch.zeros(1)
    weight = torch.nn.Parameter(torch.zeros(1))
    assert not g.use_training_kernels(x, weight)
    monkeypatch.setattr(g, "use_kernels", lambda x: True)
    assert g.use_training_kernels(x, weight)
    assert not g.use_training_kernels(x, weight.detach())
    with torch.no_grad():
        assert not g.use_training_kernels(x, weight)


# ---- What the log says of them ----


@pytest.mark.parametrize(
    "capability, head_dim, triton, said",
    [
        ((9, 0), 16, True, "kernels: Triton"),
        ((8, 9), 16, True, "but cuBLAS for the MLP: no TMA"),
        ((8, 0), 8, True, "MODEL_DIM / NUM_HEADS = 8"),
        ((8, 0), 8, False, "no Triton: all runs in plain torch"),
        ((7, 5), 16, True, "DEVICE=cpu"),
    ],
    ids=["a Hopper", "before Hopper", "heads too narrow", "narrow, but no kernel", "a GPU without bf16"],
)
def test_what_the_kernels_cannot_do_is_said_at_the_start(
    tiny_data, tiny_config, tiny_run, monkeypatch, capability, head_dim, triton, said
):
    config = dataclasses.replace(tiny_config, model_dim=head_dim * tiny_config.num_heads)
    setup = g.make_setup(config, tiny_run(), g.Dist())._replace(dist=g.Dist(device="cuda"), stream=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(g, "triton", g.triton if triton else None)
    lines: list[str] = []
    if "=" in said:
        with pytest.raises(g.UserError, match=said):
            g.check_setup(setup)
    else:
        g.check_setup(setup)
        g.describe_setup(setup, g.Log(screen=lines.append))
        assert said in lines[0] and len(lines) == 3 and ("TMA" in lines[0]) == (triton and capability < (9, 0))
        uncompiled: list[str] = []
        eager = setup._replace(run=dataclasses.replace(setup.run, compile=0))
        g.describe_setup(eager, g.Log(screen=uncompiled.append))
        assert "TMA" not in uncompiled[0]


# ---- Compiled for GPUs that are not here ----


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
import train_gpt as g

class AbsentGPU:  # kernels are compiled for it, but not run
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)

def compile_only(kernel, grid):
    def launch(*arguments, **options):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        print(kernel.__name__, compiled.metadata.shared)
    return launch

def tensor(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

triton.runtime.driver.set_active(AbsentGPU())
JITFunction.__getitem__ = compile_only

for width in map(int, sys.argv[2:]):
    qkv, gain, gate = tensor(128, 8 * width), torch.ones(4, requires_grad=True), tensor(128, 4)
    angles, positions = torch.zeros(128, 8), torch.zeros(128, dtype=torch.int32)
    segments, heads = g.Segments(positions, positions), g.HeadLayout(True, 4, 2, width)
    g.FusedAttention.apply(qkv, gain, gate, angles, angles, segments, heads).sum().backward()

    for chunk in (8, 64, 128):
        q, kv, cache = tensor(2, chunk, 4, width), tensor(2, chunk, 2, width), tensor(2, 2, 2, 100, width)
        g.FusedCachedAttention.apply(q, kv, kv, torch.tensor(70), cache).sum().backward()

g.FusedMLP.apply(tensor(256, 512), tensor(2048, 512), tensor(512, 2048), 0.5).sum().backward()
mix = torch.ones(2, 512, requires_grad=True)
outputs = g.FusedMix.apply(tensor(1, 64, 512), tensor(1, 64, 512), mix, torch.ones(()), 12)
sum(y.sum() for y in outputs).backward()
g.FusedLoss.apply(tensor(2, 8192), torch.zeros(2, dtype=torch.int64), 30.0).sum().backward()
"""


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("capability, room", [(86, 101_376), (90, 232_448)])
def test_kernels_compile_for_a_gpu_and_fit_its_shared_memory(capability, room, tmp_path):
    """What is compiled for 8.0 takes as much as for 8.6, and there is more room (166,912 bytes)."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(g.__file__).parent)}
    command = [sys.executable, "-c", COMPILE, str(capability), "64", "128"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [(name, int(size)) for name, size in map(str.split, done.stdout.splitlines())]
    assert len(sizes) == 35 and max(size for _, size in sizes) > 40_000
    assert [(name, size) for name, size in sizes if size > room] == []
