"""From weights to integers and back: what errors cost, GPTQ and the trellis against plain references, the streams of an
artifact, and the fit to the limit of bytes."""

import contextlib
import functools
import itertools
import math
import resource

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
import zstandard
from conftest import rows_of_integers, start_two_ranks, stored_tensors

import train_gpt as g

CONFIG = g.ModelConfig(
    vocab_size=128,
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
DAMPING = 0.01
NEAREST = g.Trellis(0)
ALL_STATES = sorted(g.TRELLISES)


def a_model(seed: int = 0, config: g.ModelConfig = CONFIG) -> g.GPT:
    model = g.GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = p.data + 0.1 * noise if g.param_role(name) == "scalar" else noise / p.size(1) ** 0.5
    return model


def a_batch(seed: int, rows: int = 2, vocab: int = CONFIG.vocab_size) -> list[g.MicroBatch]:
    """Micro-batches of packed text, three documents in each."""
    rng = np.random.default_rng(seed)
    packs = []
    for _ in range(rows):
        text = rng.integers(2, vocab, 65).astype(np.uint16)
        text[[0, 20, 50]] = g.BOS
        starts = g.segment_starts(text[:-1], 64, 32)
        packs.append(g.make_micro_batch(text[:-1], text[1:], starts, torch.device("cpu")))
    return packs


def matrices(model: g.GPT) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if g.param_role(n) != "scalar"}


# ---- GPTQ -------------------------------------------------------------------


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs of which each resembles the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ (np.eye(columns) + 2 * rng.random((columns, columns)) / columns)
    x = x * np.linspace(0.5, 2, columns) + rng.standard_normal((4 * columns, 1))
    weight = torch.tensor(rng.standard_normal((rows, columns)), dtype=torch.float32)
    return weight, torch.tensor(x.T @ x / len(x), dtype=torch.float32)


def a_plan(weight, hessian, rows=None, damping=DAMPING) -> g.MatrixPlan:
    rows = torch.ones(len(weight)) if rows is None else rows
    return g.MatrixPlan(weight, g.Sensitivity(hessian, rows), damping, NEAREST.noise)


def steps_of(grid: g.Grid) -> np.ndarray:
    """(out, in) float64"""
    return 2.0 ** ((grid.row_steps[:, None].astype(int) + grid.column_steps) / 8)


def gptq(plan: g.MatrixPlan, octave: float = -1.0, trellis=NEAREST, **options) -> tuple[np.ndarray, np.ndarray]:
    """-> integers and steps"""
    grid = plan.grid(octave)
    (integers,) = g.gptq([plan], [grid], trellis, **options)
    return integers, steps_of(grid)


def gptq_reference(weight, hessian, steps, damping, ordered=True) -> np.ndarray:
    """Round a column, correct those that follow by the inverse hessian, strike it out; in numpy, float64."""
    w, h = (t.double().numpy().copy() for t in (weight, hessian))
    order = np.argsort(-np.diag(h), kind="stable") if ordered else np.arange(len(h))
    inverse = np.linalg.inv(h + np.eye(len(h)) * damping * np.diag(h).mean())
    q = np.zeros_like(w)
    left = list(order)
    for j in order:
        q[:, j] = np.round(w[:, j] / steps[:, j])
        w[:, left] -= np.outer((w[:, j] - q[:, j] * steps[:, j]) / inverse[j, j], inverse[j, left])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.remove(j)
    return q


def harm(weight, hessian, q, steps) -> float:
    """Squared error of the outputs over the calibration inputs."""
    error = weight.double().numpy() - q * steps
    return float((error @ hessian.double().numpy() * error).sum())


@pytest.mark.parametrize("rows, columns, block", [(12, 40, 128), (12, 40, 8), (6, 150, 128), (5, 33, 32), (3, 7, 1)])
def test_gptq_matches_the_reference(rows, columns, block):
    weight, hessian = correlated(rows, columns)
    got, steps = gptq(a_plan(weight, hessian, torch.rand(rows) + 0.1), block=block)
    want = gptq_reference(weight, hessian, steps, DAMPING)
    assert got.dtype == np.int16 and len(np.unique(got)) > 5
    assert (got == want).mean() > 0.98  # fp32 may tip a value that lies between two integers
    assert harm(weight, hessian, got, steps) == pytest.approx(harm(weight, hessian, want, steps), rel=0.02)


@pytest.mark.parametrize("trellis", [NEAREST, g.Trellis(8)], ids=["nearest", "trellis"])
def test_matrices_of_one_shape_are_rounded_side_by_side_as_each_alone(trellis):
    plans = [a_plan(*correlated(9, 21, seed), torch.rand(9) + 0.1) for seed in range(3)]
    grids = [plan.grid(-1.0) for plan in plans]
    together = g.gptq(plans, grids, trellis)
    for plan, grid, integers in zip(plans, grids, together, strict=True):
        (alone,) = g.gptq([plan], [grid], trellis)
        assert integers.shape == (9, 21) and (integers == alone).mean() > 0.98


def test_gptq_beats_rounding_and_an_order_by_chance():
    gains = []
    for seed in range(5):
        weight, hessian = correlated(16, 48, seed)
        got, steps = gptq(a_plan(weight, hessian))
        ours = harm(weight, hessian, got, steps)
        unordered = harm(weight, hessian, gptq_reference(weight, hessian, steps, DAMPING, ordered=False), steps)
        assert ours < 0.8 * harm(weight, hessian, np.round(weight.numpy() / steps), steps)
        gains.append(unordered / ours)
    assert np.mean(gains) > 1.0


def test_errors_of_a_trellis_are_spread_too():
    for seed in range(3):
        weight, hessian = correlated(40, 30, seed)
        got, steps = gptq(a_plan(weight, hessian), -2.0, g.Trellis(8))
        v = torch.tensor(weight.numpy() / steps, dtype=torch.float32).mT.contiguous()
        alone = g.viterbi_reference(v, torch.ones_like(v, dtype=torch.bool), g.Trellis(8)).mT.numpy()
        assert harm(weight, hessian, got, steps) < 0.9 * harm(weight, hessian, alone, steps)


def test_gptq_orders_columns_by_their_weight_alone():
    weight, hessian = correlated(8, 30)
    shuffle = torch.randperm(30)
    direct, _ = gptq(a_plan(weight, hessian))
    shuffled, _ = gptq(a_plan(weight[:, shuffle], hessian[shuffle][:, shuffle]))
    assert (shuffled == direct[:, shuffle]).mean() > 0.98


def test_gptq_rounds_where_inputs_are_independent():
    weight, _ = correlated(8, 30)
    got, steps = gptq(a_plan(weight, torch.eye(30)))
    assert np.array_equal(got, np.round(weight.numpy() / steps))
    assert len(np.unique(steps)) == 1


def test_inputs_that_are_always_zero_change_nothing_for_the_others():
    """Their own steps are the coarsest."""
    weight, hessian = correlated(8, 30)
    dead = torch.tensor([0, 7, 29])
    alive = torch.tensor([i for i in range(30) if i not in dead])
    hessian[dead] = 0
    hessian[:, dead] = 0
    got, steps = gptq(a_plan(weight, hessian))
    damping = DAMPING * 27 / 30  # of the mean diagonal
    without = gptq_reference(weight[:, alive], hessian[alive][:, alive], steps[:, alive], damping)
    assert (got[:, alive] == without).mean() > 0.98
    assert steps[:, dead].min() > steps[:, alive].max()


def test_a_matrix_without_effect_is_rounded_like_any_other():
    """Nothing that it computes reached the predictions: all zeros come out of calibration."""
    weight, _ = correlated(8, 30)
    got, steps = gptq(a_plan(weight, torch.zeros(30, 30), torch.zeros(8)), -12.0)
    assert np.isfinite(steps).all()
    assert (np.abs(weight.numpy() - got * steps) <= 0.5001 * steps).all()


def test_damping_rises_until_the_hessian_is_positive_definite():
    """A Cholesky that fails ended runs whose training was paid for."""
    weight, _ = correlated(8, 30)
    hessian = torch.eye(30)
    hessian[0, 1] = hessian[1, 0] = 1.05  # as rounding may leave it: an eigenvalue is -0.05
    plan = a_plan(weight, hessian, damping=1e-6)
    assert plan.damping == pytest.approx(0.1) and gptq(plan)[0].any()
    assert a_plan(weight, torch.eye(30)).damping == DAMPING
    with pytest.raises(g.UserError, match="not positive definite"):
        a_plan(weight, torch.full((30, 30), math.nan))


def test_gptq_leaves_its_arguments_alone():
    weight, hessian = correlated(8, 30)
    sensitivity = g.Sensitivity(hessian, torch.rand(8), hessian.clone())
    before = [t.clone() for t in (weight, *sensitivity)]
    plan = g.MatrixPlan(weight, sensitivity, DAMPING, NEAREST.noise)
    first, _ = gptq(plan)
    again, _ = gptq(plan)
    assert np.array_equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip((weight, *sensitivity), before, strict=True))


# ---- the trellis ------------------------------------------------------------


@pytest.mark.parametrize("states", ALL_STATES)
def test_predecessors_undo_advances(states):
    trellis = g.Trellis(states)
    before = trellis.predecessors().numpy()
    came_from = {s: [] for s in range(states)}
    for state, bit in itertools.product(range(states), (0, 1)):
        after = int(trellis.advance(np.uint8(state), np.uint8(bit)))
        assert before[bit, after] == state
        assert after // (states // 2) == state & 1  # its highest bit is the parity of the integer
        came_from[after].append(state)
    assert all(len(set(found)) == 2 for found in came_from.values())
    followers = [{int(trellis.advance(np.uint8(s), np.uint8(b))) for b in (0, 1)} for s in range(states)]
    assert all(len(found) == 2 for found in followers)


def assert_allowed(integers: np.ndarray, live: np.ndarray, trellis: g.Trellis) -> None:
    """Columns (n, L): the parity of each integer is the one that its state demands; zeros where it is not live."""
    for column, mask in zip(integers.astype(int), live, strict=True):
        state = np.uint8(0)
        for k in column[mask]:
            assert k % 2 == state & 1
            state = trellis.advance(state, np.uint8(k >> 1 & 1))
        assert not column[~mask].any()


@pytest.mark.parametrize("states", ALL_STATES)
def test_every_path_is_allowed(states):
    v = 20 * torch.randn(6, 40)
    live = torch.rand(6, 40) > 0.3
    live[0] = False
    live[1] = True
    integers = g.viterbi_reference(v, live, g.Trellis(states))
    assert_allowed(integers.numpy(), live.numpy(), g.Trellis(states))
    assert ((v - integers).abs()[live] <= 2).all()  # the nearest of a coset


@pytest.mark.parametrize("states", [8, 32])
@pytest.mark.parametrize("masked", [False, True])
def test_the_path_is_the_best_of_all(states, masked):
    trellis = g.Trellis(states)
    v = 3 * torch.randn(4, 8)
    live = torch.rand(4, 8) > 0.3 if masked else torch.ones(4, 8, dtype=torch.bool)
    found = g.viterbi_reference(v, live, trellis)
    for column, mask, integers in zip(v.double().numpy(), live.numpy(), found.numpy(), strict=True):
        targets = column[mask]
        best = math.inf
        for bits in itertools.product((0, 1), repeat=len(targets)):
            state = np.uint8(0)
            cost = 0.0
            for target, bit in zip(targets, bits, strict=True):
                coset = int(state & 1) + 2 * bit
                cost += (target - coset - 4 * np.floor((target - coset) / 4 + 0.5)) ** 2
                state = trellis.advance(state, np.uint8(bit))
            best = min(best, cost)
        assert ((targets - integers[mask]) ** 2).sum() == pytest.approx(best, rel=1e-5)


ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the same on a GPU instead"))
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.skipif(g.triton is None, reason="needs Triton")
@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("states, columns, rows", [(8, 1, 1), (8, 3, 7), (32, 5, 20), (32, 2, 33)])
def test_the_kernel_equals_its_reference(device, states, columns, rows):
    trellis = g.Trellis(states)
    v = 5 * torch.randn(columns, rows)
    for live in (torch.ones_like(v), torch.rand_like(v) > 0.4, torch.zeros_like(v)):
        live = live.bool()
        expected = g.viterbi_reference(v, live, trellis)
        found = g.viterbi(v.to(device), live.to(device), trellis).cpu()
        assert_allowed(found.numpy(), live.numpy(), trellis)
        costs = [((v - k).square() * live).sum(1) for k in (found, expected)]
        torch.testing.assert_close(*costs)
        assert device == "cuda" or torch.equal(found, expected)  # a GPU may break a tie in another way


@pytest.mark.gpu
@pytest.mark.parametrize("states", ALL_STATES)
def test_the_kernel_finds_as_good_paths_in_whole_strips(states):
    v = 3 * torch.randn(200, 512)
    live = torch.rand_like(v) > 0.1
    expected = g.viterbi_reference(v, live, g.Trellis(states))
    found = g.viterbi(v.cuda(), live.cuda(), g.Trellis(states)).cpu()
    assert_allowed(found[::20].numpy(), live[::20].numpy(), g.Trellis(states))
    torch.testing.assert_close(*(((v - k).square() * live).sum(1) for k in (found, expected)))
    assert (found == expected).float().mean() > 0.99


def bits_above_the_bound(v: torch.Tensor, integers: torch.Tensor) -> float:
    """What integers take, coded with a table for each parity, beyond the least that any code of Gaussian numbers v of
    their squared error can take: 1/2 log2(variance / error), Shannon 1948."""
    rate = 0.0
    for parity in (0, 1):
        counts = np.unique(integers[integers % 2 == parity].numpy(), return_counts=True)[1]
        rate -= float((counts * np.log2(counts / counts.sum())).sum()) / v.numel()
    return rate - 0.5 * math.log2(v.double().var().item() / (v - integers).double().square().mean().item())


@pytest.mark.parametrize("states, expected", [(8, 0.074), (32, 0.053)])
def test_a_trellis_comes_near_the_bound_for_gaussian_weights(states, expected):
    """Rounding to nearest stays 1/2 log2(2 pi e / 12) = 0.254 bits above it."""
    v = 12 * torch.randn(64, 512)
    integers = g.viterbi_reference(v, torch.ones_like(v, dtype=torch.bool), g.Trellis(states))
    assert bits_above_the_bound(v, integers) == pytest.approx(expected, abs=0.01)
    assert (v - integers).square().mean() == pytest.approx(g.Trellis(states).noise, rel=0.03)


def test_rounding_to_nearest_stays_above_the_bound():
    v = 4 * torch.randn(64, 512)
    parts = g.round_columns(v, torch.ones_like(v, dtype=torch.bool), NEAREST)
    assert torch.equal(parts, v.round())
    counts = np.unique(parts.numpy(), return_counts=True)[1] / v.numel()
    rate = -(counts * np.log2(counts)).sum()
    distance = rate - 0.5 * math.log2(v.double().var().item() / (v - parts).double().square().mean().item())
    assert distance == pytest.approx(0.254, abs=0.01)
    assert (v - parts).square().mean() == pytest.approx(NEAREST.noise, rel=0.02)


@pytest.mark.parametrize("rows", [3, 8, 9, 21])
def test_a_path_covers_a_strip_of_rows(monkeypatch, rows):
    """Each begins in state 0, so that decoders need not know those before."""
    monkeypatch.setattr(g, "STRIP_ROWS", 8)
    trellis = g.Trellis(8)
    v = 3 * torch.randn(5, rows)
    live = torch.rand(5, rows) > 0.2
    whole = g.round_columns(v, live, trellis)
    for start in range(0, rows, 8):
        part = slice(start, start + 8)
        expected = g.viterbi_reference(v[:, part], live[:, part], trellis)
        assert torch.equal(whole[:, part], expected)


@pytest.mark.skipif(g.triton is None or torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_the_kernel_searches_where_kernels_run(monkeypatch):
    """In columns whose rows lie apart in memory, too."""
    v = 3 * torch.randn(10, 3).mT
    live = torch.rand(10, 3).mT > 0.2
    with monkeypatch.context() as without_kernels:
        without_kernels.delattr(g, "viterbi_kernel")
        expected = g.round_columns(v, live, g.Trellis(8))
    monkeypatch.setattr(g, "use_kernels", lambda x: True)
    monkeypatch.delattr(g, "viterbi_reference")
    assert torch.equal(g.round_columns(v, live, g.Trellis(8)), expected)


# ---- steps ------------------------------------------------------------------


def test_powers_of_two_are_those_of_every_machine():
    eighths = np.arange(-2 * g.GRID_LIMIT, 2 * g.GRID_LIMIT + 1)
    powers = g.power_of_two(eighths)
    assert powers.dtype == np.float32 and (np.diff(powers) > 0).all()
    np.testing.assert_allclose(powers, 2.0 ** (eighths / 8), rtol=1e-7)
    assert np.array_equal(powers[eighths % 8 == 0], np.ldexp(np.float32(1), eighths[eighths % 8 == 0] // 8))
    assert np.array_equal(powers[8:], 2 * powers[:-8])


def test_octaves_are_rounded_to_eighths_alike_on_both_sides():
    octaves = torch.cat([torch.linspace(-3, 3, 997), torch.tensor([100.0, 1e30])])
    eighths = g.to_eighths(octaves)
    assert eighths.dtype == np.int16 and np.array_equal(g.to_eighths(-octaves), -eighths)
    assert np.abs(eighths[:-2] / 8 - octaves[:-2].numpy()).max() <= 1 / 16 + 1e-6
    assert eighths[-2:].tolist() == [g.GRID_LIMIT] * 2


def test_steps_follow_from_rows_and_columns():
    """Equal costs for equal bits: in proportion to the error that no later column mends, and to 1 / sqrt(weight)."""
    weight, hessian = correlated(8, 30)
    rows = torch.logspace(-3, 1, 8)
    grid = a_plan(weight, hessian, rows).grid(-7.0)
    damped = hessian.double().numpy()
    order = np.argsort(-np.diag(damped), kind="stable")
    damped = damped + DAMPING * np.diag(damped).mean() * np.eye(30)
    mended = [np.linalg.inv(damped[np.ix_(order[i:], order[i:])])[0, 0] ** 0.5 for i in range(30)]  # Schur complements
    expected = -7 - 0.5 * np.log2(rows.numpy())[:, None] + np.log2(mended)
    np.testing.assert_allclose(np.log2(steps_of(grid))[:, order], expected, atol=0.13)  # rounded twice
    assert abs(np.median(grid.column_steps)) < 1  # small numbers, which take few bytes
    finer = a_plan(weight, hessian, rows).grid(-8.0)
    assert np.array_equal(finer.row_steps, grid.row_steps - 8)
    assert np.array_equal(finer.column_steps, grid.column_steps)


def test_sizes_are_the_deviations_of_rows_and_columns():
    rows = torch.logspace(-3, 2, 200)
    columns = torch.logspace(-2, 1, 300)
    weight = torch.randn(200, 300) * rows[:, None] * columns
    grid = a_plan(weight, torch.eye(300)).grid(0.0)
    sizes = (grid.row_sizes[:, None] + grid.column_sizes) / 8
    np.testing.assert_allclose(sizes, torch.outer(rows, columns).log2().numpy(), atol=0.6)
    assert not np.concatenate([grid.row_sizes % 2, grid.column_sizes % 2]).any()  # quarters of an octave


@pytest.mark.parametrize("weight", [torch.zeros(5, 7), torch.full((5, 7), 1e-30), torch.eye(7)[:5]])
def test_weights_of_which_many_are_zero_have_sizes_too(weight):
    grid = a_plan(weight, torch.eye(7)).grid(-3.0)
    assert all(np.abs(part).max() <= g.GRID_LIMIT for part in grid)
    (integers,) = g.gptq([a_plan(weight, torch.eye(7))], [grid], NEAREST)
    assert np.array_equal(integers * steps_of(grid), np.where(weight == 1, 1.0, 0.0))


EXTREMES = {
    "a column with large inputs": (1.0, 1e6, 1.0),
    "a row of large weights": (1e4, 1.0, 1.0),
    "a row that counts": (1.0, 1.0, 1e6),
    "all at once": (1e4, 1e6, 1e6),
    "tiny ones": (1e-4, 1e-6, 1e-6),
}


@pytest.mark.parametrize("octave", [-40.0, -14.0, -3.0, 20.0])
@pytest.mark.parametrize("trellis", [NEAREST, g.Trellis(8)], ids=["nearest", "trellis"])
@pytest.mark.parametrize("case", EXTREMES)
def test_integers_are_never_too_large(case, trellis, octave):
    """Where steps would have to be too fine for that, they are coarser: a weight that was cut off would be wrong."""
    row, column, importance = EXTREMES[case]
    weight, hessian = correlated(12, 20)
    weight[3] *= row
    hessian[5] *= column**0.5
    hessian[:, 5] *= column**0.5
    rows = torch.ones(12)
    rows[3] = importance
    got, steps = gptq(a_plan(weight, hessian, rows), octave, trellis)
    assert np.isfinite(steps).all() and np.abs(got).max() < g.LARGEST_INTEGER - 3
    if trellis is NEAREST and octave <= -14:
        assert harm(weight, hessian, got, steps) < 1e-3 * harm(weight, hessian, 0 * got, steps)


@pytest.mark.parametrize("trellis", [NEAREST, g.Trellis(8)], ids=["nearest", "trellis"])
def test_what_exceeds_the_largest_integer_is_cut_off_and_does_not_wrap_round(trellis):
    """As errors of many columns could, added up in one; here steps are too fine by ten octaves."""
    weight, hessian = correlated(12, 20)
    plan = a_plan(weight, hessian)
    grid = plan.grid(-40.0)
    (integers,) = g.gptq([plan], [grid._replace(row_steps=grid.row_steps - 80)], trellis)
    assert g.LARGEST_INTEGER - 6 <= np.abs(integers).max() <= g.LARGEST_INTEGER


def test_lambert_w_is_the_inverse():
    y = torch.cat([torch.zeros(1), torch.logspace(-9, 20, 200)])
    w = g.lambert_w(y)
    torch.testing.assert_close(w * w.exp(), y, rtol=2e-5, atol=1e-12)


def test_the_steps_of_rare_tokens_are_bounded():
    """A row of weight b has the step that costs the least, where an error of variance v costs P (e^(v/2) - 1) and not
    P v / 2: found here by trying."""
    weight, hessian = correlated(6, 20)
    rows = torch.logspace(-5, 1, 6)
    inputs = torch.linspace(0.1, 2.0, 20).diag()
    plan = g.MatrixPlan(weight, g.Sensitivity(hessian, rows, inputs), DAMPING, noise=1 / 12)
    damped = hessian.double() + DAMPING * hessian.diagonal().mean() * torch.eye(20)
    explained = (damped.inverse() @ inputs.double()).trace()
    for octave in (-4.0, 0.0):
        x = 10 / 12 * float(explained) * 4**octave / rows.double()
        factors = torch.logspace(-8, 0, 40_001, dtype=torch.float64)[:, None]  # on squared steps
        costs = -0.5 * factors.log() + (factors * x / 2).expm1() / x
        best = 0.5 * factors[costs.argmin(0), 0].log2()
        unbounded = octave + plan.level - 0.5 * rows.log2()
        torch.testing.assert_close(plan.row_octaves(octave) - unbounded, best.float(), atol=2e-3, rtol=0)
    coarse = plan.row_octaves(0.0)
    assert (coarse.diff() < 0).all() and coarse[0] < 0.8 * unbounded[0]  # still the coarsest, but much finer


# ---- what is stored ---------------------------------------------------------

ODD_SHAPES = {  # heads, strips and leftovers of all kinds, families of several matrices
    "embed": (37, 10),
    "blocks.0.attention.o.weight": (10, 10),
    "blocks.11.attention.o.weight": (10, 10),
    "blocks.0.mlp.up.weight": (16, 10),
    "blocks.0.mlp.down.weight": (3, 16),
    "one": (1, 1),
}


CODED = ("integers", "integer_tables", "trellis")


def odd_matrices(states: int, octave: float = -1.5) -> tuple[g.Matrices, g.Trellis]:
    """Rounded matrices of odd shapes, with rows and columns that deviate much and little."""
    rng = torch.Generator().manual_seed(0)
    weights, sensitivities = {}, {}
    for name, (rows, columns) in ODD_SHAPES.items():
        deviations = 8 * torch.rand(rows, generator=rng) - 5
        weights[name] = torch.randn(rows, columns, generator=rng) * deviations.exp2()[:, None]
        x = torch.randn(2 * columns, columns, generator=rng)
        importance = torch.rand(rows, generator=rng) + 0.1
        sensitivities[name] = g.Sensitivity(x.mT @ x / len(x), importance, x.mT @ x if name == "embed" else None)
    run = g.RunConfig(trellis_states=str(states))
    quantiser = g.Quantiser(weights, sensitivities, run, g.Dist())
    return quantiser.round(octave), quantiser.trellis


def stream(stored: dict[str, torch.Tensor], name: str) -> bytes:
    return stored[g.PREFIX + name].numpy().tobytes()


@pytest.mark.parametrize("height", [8, 512])
@pytest.mark.parametrize("states", [0, 8, 32])
def test_matrices_come_back_as_they_were(monkeypatch, states, height):
    monkeypatch.setattr(g, "STRIP_ROWS", height)
    found, trellis = odd_matrices(states)
    silent = [(grid.row_classes[:, None] + grid.column_classes < g.SILENT_CLASS).any() for grid in found.grids.values()]
    assert any(silent) and not all(silent)
    stored = g.encode_matrices(found, trellis)
    assert set(stored) == {g.PREFIX + name for name in (*CODED, *g.Grid._fields)}
    assert all(stored[g.PREFIX + name].dtype == torch.uint8 for name in CODED)
    assert all(stored[g.PREFIX + name].dtype == torch.int8 for name in g.Grid._fields)

    streams = stream(stored, "integers"), stream(stored, "integer_tables")
    integers = g.decode_integers(*streams, found.grids, trellis)
    restored = g.decode_matrices(stored, ODD_SHAPES)
    assert set(integers) == set(restored) == set(ODD_SHAPES)
    for name, shape in ODD_SHAPES.items():
        assert np.array_equal(integers[name], found.integers[name]) and integers[name].shape == shape
        assert integers[name].dtype == np.int16
        assert restored[name].dtype == torch.float32 and torch.equal(restored[name], found.restore(name))
        np.testing.assert_allclose(restored[name], found.integers[name] * steps_of(found.grids[name]), rtol=3e-7)


@pytest.mark.parametrize("states", [0, 8])
def test_the_order_of_matrices_does_not_matter(states):
    found, trellis = odd_matrices(states)
    names = list(ODD_SHAPES)[::-1]
    turned = g.Matrices(*({name: part[name] for name in names} for part in found))
    again = g.encode_matrices(turned, trellis)
    assert all(torch.equal(t, again[name]) for name, t in g.encode_matrices(found, trellis).items())


@pytest.mark.parametrize("octave", [-60.0, 60.0])
@pytest.mark.parametrize("states", [0, 8])
def test_the_finest_and_the_coarsest_steps_can_be_stored(states, octave):
    found, trellis = odd_matrices(states, octave)
    largest = [np.abs(found.integers[name]).max() for name in ODD_SHAPES if name != "embed"]  # whose steps are bounded
    assert min(largest) > 2000 if octave < 0 else max(largest) == 0
    restored = g.decode_matrices(g.encode_matrices(found, trellis), ODD_SHAPES)
    assert all(torch.equal(restored[name], found.restore(name)) for name in ODD_SHAPES)


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e4])
def test_weights_of_any_size_can_be_stored(states, scale):
    """Zeros are what output matrices are initialised to."""
    weights = {name: scale * torch.randn(shape) for name, shape in ODD_SHAPES.items()}
    weights["embed"] = torch.randn(37, 10)
    weights["embed"][[0, 9]] *= scale
    alike = {name: g.Sensitivity(torch.eye(w.size(1)), torch.ones(len(w))) for name, w in weights.items()}
    quantiser = g.Quantiser(weights, alike, g.RunConfig(trellis_states=str(states)), g.Dist())
    for octave in (-20.0, -3.0):
        found = quantiser.round(octave)
        restored = g.decode_matrices(g.encode_matrices(found, quantiser.trellis), ODD_SHAPES)
        assert all(torch.equal(restored[name], found.restore(name)) for name in ODD_SHAPES)
        errors = [(weights[name] - restored[name]).abs().max() / max(1, scale) for name in ODD_SHAPES]
        assert max(errors) < (2**-9 if octave == -20 else 2**-1)


def test_more_equal_integers_take_fewer_bytes():
    sizes = []
    for octave in (-7.0, -5.0, -3.0, -1.0):
        stored = stored_tensors(a_model(), octave)
        sizes.append(sum(t.nbytes for name, t in stored.items() if name.startswith(g.PREFIX)))
    numbers = sum(w.numel() for w in matrices(a_model()).values())
    assert (np.diff(sizes) < -0.7 * 2 * numbers / 8).all()  # nearly a bit an octave


def test_what_is_stored_is_restored():
    model = a_model()
    stored = stored_tensors(model, octave=-6.0)
    restored = g.restore(a_model(seed=9), stored, "it")
    for (name, p), q in zip(model.named_parameters(), restored.parameters(), strict=True):
        if g.param_role(name) == "scalar":
            assert torch.equal(q, p.half().float()), name
        else:
            assert (p - q).abs().max() <= 2**-7 + 1e-6, name


def test_a_path_of_the_trellis_is_restored():
    model = a_model()
    restored = g.restore(a_model(seed=9), stored_tensors(model, octave=-6.0, states=8), "it")
    for name, p in matrices(model).items():
        error = p - matrices(restored)[name]
        assert error.abs().max() < 3 * 2**-6 and error.square().mean() < 0.35 * 2**-12, name


def test_which_weights_a_path_skips_is_the_same_for_rounding_and_storage():
    """Also where the class is the very first that is not skipped."""
    weight, hessian = correlated(12, 20)
    zeros = np.zeros(20, np.int16)
    steps = np.full(12, -8, np.int16)
    classes = g.SILENT_CLASS + np.arange(12, dtype=np.int16) % 5 - 2
    grid = g.Grid(steps, zeros, steps + classes, zeros)
    trellis = g.Trellis(8)
    (integers,) = g.gptq([a_plan(weight, hessian)], [grid], trellis)
    assert [row.any() for row in integers] == (classes >= g.SILENT_CLASS).tolist()
    stored = g.encode_matrices(g.Matrices({"a": integers}, {"a": grid}), trellis)
    assert np.array_equal(g.decode_matrices(stored, {"a": (12, 20)})["a"], integers * steps_of(grid))


def test_artifacts_of_the_first_version_are_still_read():
    model = a_model()
    stored = rows_of_integers(model)
    restored = g.restore(a_model(seed=9), stored, "it")
    for (name, p), q in zip(model.named_parameters(), restored.parameters(), strict=True):
        if g.param_role(name) == "scalar":
            assert torch.equal(q, stored[name].float()), name
        else:
            assert torch.equal(q, stored[name].mT.float() * stored[f"{name}.scale"].float()[:, None]), name
            assert (p - q).abs().max() < 0.01 * p.abs().max(), name


# ---- streams from outside ---------------------------------------------------


def read(stored: dict[str, torch.Tensor], model: g.GPT | None = None) -> g.GPT | None:
    """The network; None where it is refused with the file's name, which is the only other way."""
    try:
        model = g.restore(model or g.GPT(CONFIG), stored, "it.ptz")
    except g.DataError as error:
        assert str(error).startswith("it.ptz: ")
        return None
    assert all(p.isfinite().all() for p in model.parameters())
    return model


def changed(stored: dict[str, torch.Tensor], name: str, data: bytes) -> dict[str, torch.Tensor]:
    """With these bytes as the stream or the numbers of this name."""
    array = np.frombuffer(data, np.int8 if name in g.Grid._fields else np.uint8)
    return stored | {g.PREFIX + name: torch.from_numpy(array.copy())}


@pytest.fixture(scope="module", params=[0, 8], ids=["nearest", "trellis"])
def streams(request) -> dict[str, torch.Tensor]:
    return stored_tensors(a_model(), states=request.param)


@pytest.mark.parametrize("name", [*CODED, *g.Grid._fields])
def test_a_stream_that_is_cut_short_or_goes_on_is_refused(streams, name):
    whole = stream(streams, name)
    assert read(streams) is not None
    ends = {0, 1, 2, len(whole) // 2, len(whole) - 2, len(whole) - 1} & set(range(len(whole)))
    for data in [*(whole[:end] for end in ends), whole + b"\0", whole + b"\0\0", whole + whole, b"\0" + whole]:
        assert read(changed(streams, name, data)) is None


@pytest.mark.parametrize("name", [*CODED, *g.Grid._fields])
def test_a_flipped_bit_is_noticed_or_gives_another_network(streams, name):
    """A container's checksum notices it before, in files that were not made to deceive."""
    whole = stream(streams, name)
    chance = np.random.default_rng(0)
    for at in {0, *chance.integers(0, len(whole), 15).tolist()}:
        data = bytearray(whole)
        data[at] ^= 1 << int(chance.integers(8))
        read(changed(streams, name, bytes(data)))


def test_streams_in_each_others_places_are_refused(streams):
    for a, b in itertools.combinations(CODED, 2):
        assert read(changed(changed(streams, a, stream(streams, b)), b, stream(streams, a))) is None
    for a, b in (("row_steps", "column_steps"), ("row_sizes", "column_sizes")):
        assert read(changed(changed(streams, a, stream(streams, b)), b, stream(streams, a))) is None


def test_streams_of_another_network_are_refused(streams):
    other = stored_tensors(a_model(config=g.dataclasses.replace(CONFIG, mlp_mult=3)))
    for name in ("row_steps", "column_sizes", "integers"):
        assert read(changed(streams, name, stream(other, name))) is None


def test_a_stream_of_fewer_lanes_than_its_integers_ask_for_is_refused(monkeypatch):
    """With one lane, integers are decoded one by one: ten million would take minutes."""
    monkeypatch.setattr(g, "MAX_LANES", 2)
    few = stored_tensors(a_model())
    assert read(few) is not None
    monkeypatch.undo()
    assert read(few) is None


@pytest.mark.parametrize("states", [1, 7, 9, 16, 64, 255])
def test_an_unknown_trellis_is_refused(streams, states):
    assert read(changed(streams, "trellis", bytes([states]))) is None


@pytest.mark.parametrize("part", g.Grid._fields)
def test_steps_beyond_the_limit_are_refused(streams, part):
    numbers = np.frombuffer(stream(streams, part), np.int8).copy()
    for i in (0, len(numbers) // 2, len(numbers) - 1):
        forged = numbers.copy()
        forged[i] = -128
        assert read(changed(streams, part, forged.tobytes())) is None


def test_the_largest_steps_and_integers_are_finite():
    """What a file could claim at most."""
    limits = [np.full(n, g.GRID_LIMIT, np.int16) for n in (4, 3, 4, 3)]
    found = g.Matrices({"it": np.full((4, 3), g.LARGEST_INTEGER, np.int16)}, {"it": g.Grid(*limits)})
    assert g.decode_matrices(g.encode_matrices(found, NEAREST), {"it": (4, 3)})["it"].isfinite().all()


def test_tables_without_end_take_no_memory(streams):
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(changed(streams, "integer_tables", bomb)) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


WRONG_STREAMS = {
    "a stream is missing": lambda s: {n: t for n, t in s.items() if n != "matrices.integer_tables"},
    "no integers": lambda s: {n: t for n, t in s.items() if n != "matrices.integers"},
    "no steps": lambda s: {n: t for n, t in s.items() if n != "matrices.row_steps"},
    "a stream of another type": lambda s: s | {"matrices.integers": s["matrices.integers"].to(torch.int8)},
    "steps that are floats": lambda s: s | {"matrices.row_steps": s["matrices.row_steps"].float()},
    "steps without a sign": lambda s: s | {"matrices.row_steps": s["matrices.row_steps"].to(torch.uint8)},
    "a stream of two dimensions": lambda s: s | {"matrices.integers": s["matrices.integers"][None]},
    "steps of two dimensions": lambda s: s | {"matrices.row_steps": s["matrices.row_steps"][None]},
    "a trellis that is a number": lambda s: s | {"matrices.trellis": s["matrices.trellis"][0]},
    "two trellises": lambda s: s | {"matrices.trellis": s["matrices.trellis"].repeat(2)},
    "one too many": lambda s: s | {"matrices.more": torch.zeros(3, dtype=torch.uint8)},
    "rows of the first version beside them": lambda s: s | rows_of_integers(a_model()),
    "a gain is missing": lambda s: {n: t for n, t in s.items() if n != "blocks.0.attention.q_gain"},
    "a gain of integers": lambda s: s | {"blocks.0.attention.q_gain": torch.ones(4, dtype=torch.int8)},
    "nothing": lambda s: {},
}


@pytest.mark.parametrize("case", WRONG_STREAMS)
def test_other_tensors_than_those_of_the_network_are_refused(streams, case):
    assert read(WRONG_STREAMS[case](streams)) is None


def test_a_network_that_its_bytes_cannot_hold_takes_no_memory(streams):
    """A configuration is a few bytes, and its network may be of any size."""
    huge = g.ModelConfig(vocab_size=65536, model_dim=16384, num_heads=128, num_kv_heads=128)
    found = {name: (t.dtype, t.shape) for name, t in streams.items() if name.startswith(g.PREFIX)}
    with torch.device("meta"):
        sketch = g.GPT(huge)
    for name, p in sketch.named_parameters():
        if g.param_role(name) == "scalar":
            found[name] = torch.float16, p.shape
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(g.DataError, match=r"it\.ptz: its configuration has \d+ weights, which \d+ bytes"):
        g.check_layout(huge, found, "it.ptz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


# ---- the fit to the limit ---------------------------------------------------

LARGER = g.ModelConfig(
    vocab_size=256,
    model_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=4,
    rope_dims=4,
    attn_gate_width=6,
    smear_width=6,
    parallel_start_layer=1,
    xsa_last_n=1,
    unet_skips=0,
    num_loops=0,
)
ORIGIN = {"tokenizer": "0123456789abcdef" * 4, "holdout_tokens": 0, "holdout": "fedcba9876543210" * 4}


def calibrated(model: g.GPT, *batches: list[g.MicroBatch], seed: int = 0) -> dict[str, g.Sensitivity]:
    return g.calibrate(model, batches, g.Dist(), g.RunConfig(seed=seed, train_row_tokens=64))


@functools.cache
def sensitivities_of(model: g.GPT) -> dict[str, g.Sensitivity]:
    return calibrated(model, *(a_batch(seed, vocab=model.config.vocab_size) for seed in (1, 2)))


@pytest.fixture(scope="module")
def larger() -> g.GPT:
    """400,000 weights: enough that the noise of rounding is less than the fit allows."""
    return a_model(config=LARGER)


def artifact(model: g.GPT, room: float, **knobs) -> tuple[bytes, list[dict]]:
    """Packed into so many bytes beside the code -> (the artifact, what its roundings reported)"""
    run = g.RunConfig(artifact_bytes=len(g.code()) + int(room), **knobs)
    dist = g.Dist()
    roundings = []

    class Events(g.Log):
        def event(self, name, template, **values):
            assert name == "rounding"
            roundings.append(values)

    blob = g.make_artifact(model, sensitivities_of(model), run, dist, g.Stopwatch(dist), ORIGIN, Events())
    assert roundings[-1]["artifact_bytes"] == len(blob)
    assert [values["attempt"] for values in roundings] == list(range(1, len(roundings) + 1))
    return blob, roundings


@pytest.mark.parametrize("wrong", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("bits", [3.0, 4.5])
def test_an_artifact_fills_its_limit(larger, monkeypatch, bits, wrong):
    """From a guess that is right, too coarse or too fine."""
    guess = g.Quantiser.first_guess
    monkeypatch.setattr(g.Quantiser, "first_guess", lambda *given: guess(*given) + wrong)
    room = int(bits / 8 * sum(w.numel() for w in matrices(larger).values()))
    blob, roundings = artifact(larger, room)
    assert 0.998 * room < len(blob) <= room
    assert len(roundings) <= 3
    meta, stored = g.unpack(blob, "it")
    assert meta == {"kind": "artifact", "model": g.dataclasses.asdict(LARGER)} | ORIGIN
    g.restore(g.GPT(LARGER), stored, "it")


@pytest.mark.parametrize("room", [18_000, 21_000, 24_000])
def test_a_small_artifact_fits_too(room):
    """The container and its tables weigh as much as the integers, and the noise of rounding is large."""
    blob, _ = artifact(a_model(), room)
    assert 0.97 * room < len(blob) <= room


def fitted(*sizes: int) -> bytes:
    """What is packed into 1,000 bytes where the octaves that are tried result in these sizes, one after another."""
    ahead = iter(sizes)
    size_at = {}

    def pack_at(octave: float) -> tuple[bytes, int]:
        size = size_at[octave] if octave in size_at else size_at.setdefault(octave, next(ahead))
        return bytes(size), size

    budget = g.Budget(limit=1000, fixed=0.0, weights=8000)
    return g.fit_to_limit(pack_at, 0.0, budget, g.Log(), once=False)


@pytest.mark.parametrize(
    "sizes, taken",
    [((999,), 999), ((900, 1001, 998), 998), ((900, 1001, 1001, 998), 998), ((1300, 900, 1001, 1001), 900)],
)
def test_an_artifact_that_fits_is_taken_though_later_ones_do_not(sizes, taken):
    assert len(fitted(*sizes)) == taken


def test_an_artifact_that_does_not_fit_is_refused_with_its_size_and_the_limit():
    with pytest.raises(g.UserError) as refusal:
        fitted(1300, 1200, 1100, 1050, 1007)
    code_bytes = len(g.code())
    assert str(refusal.value) == (
        f"the artifact of 1007 bytes and {code_bytes} bytes of code are 7 bytes over "
        f"ARTIFACT_BYTES={1000 + code_bytes}: raise it or use a smaller model"
    )


def test_the_first_guess_is_near(larger):
    weights = matrices(larger)
    for states in (0, 8):
        run = g.RunConfig(trellis_states=str(states))
        quantiser = g.Quantiser(weights, sensitivities_of(larger), run, g.Dist())
        octaves = [quantiser.first_guess(bits) for bits in (2, 3, 4, 5)]
        assert (np.diff(octaves) < -0.8).all() and (np.diff(octaves) > -1.3).all()  # about an octave a bit
    quantiser = g.Quantiser(weights, sensitivities_of(larger), g.RunConfig(), g.Dist())
    stored = g.encode_matrices(quantiser.round(octaves[2] + 1), NEAREST)  # a trellis has a bit less
    bits = 8 * stored["matrices.integers"].numel() / sum(w.numel() for w in weights.values())
    assert bits == pytest.approx(4, abs=0.2)


def test_more_bytes_than_are_of_use_stay_unused(larger):
    numbers = sum(w.numel() for w in matrices(larger).values())
    blob, (only,) = artifact(larger, numbers)
    assert only["bits"] == pytest.approx(g.ENOUGH_BITS, abs=0.3)
    assert artifact(larger, 2 * numbers)[0] == blob


def test_an_artifact_that_cannot_fit_says_by_how_much():
    room = 2000
    with pytest.raises(g.UserError, match=f"ARTIFACT_BYTES={len(g.code()) + room}") as error:
        artifact(a_model(), room)
    size, code, over = (int(word) for word in str(error.value).split() if word.isdigit())
    assert code == len(g.code()) and over == size - room > 0


def test_a_limit_that_nothing_can_meet_is_refused_at_the_start(tiny_data, tiny_run, tiny_config):
    budget = g.Budget.of(g.GPT(tiny_config), tiny_run())
    least = len(g.code()) + math.ceil(budget.least)
    for limit in (1, len(g.code()), least - 1):
        setup = g.make_setup(tiny_config, tiny_run(artifact_bytes=limit), g.Dist())
        with pytest.raises(
            g.UserError, match=f"ARTIFACT_BYTES={limit}: .* bytes of code, .* raise it or use a smaller"
        ):
            g.check_setup(setup)
    g.check_setup(g.make_setup(tiny_config, tiny_run(artifact_bytes=least), g.Dist()))


def test_small_networks_are_rounded_to_nearest():
    auto = g.RunConfig()
    assert g.trellis_states(auto, 1_000_000) == 0 and g.trellis_states(auto, 30_000_000) == 32
    assert [g.trellis_states(g.RunConfig(trellis_states=str(n)), 10) for n in (0, 8, 32)] == [0, 8, 32]
    stored = g.unpack(artifact(a_model(), 1e6)[0], "it")[1]
    assert stream(stored, "trellis") == b"\0"


def test_a_trellis_can_be_asked_for():
    stored = g.unpack(artifact(a_model(), 1e6, trellis_states="8")[0], "it")[1]
    assert stream(stored, "trellis") == b"\x08"
    g.restore(g.GPT(CONFIG), stored, "it")


def test_the_damping_is_the_knobs():
    model = a_model()
    for damping in (0.02, 0.2):
        quantiser = g.Quantiser(matrices(model), sensitivities_of(model), g.RunConfig(gptq_damping=damping), g.Dist())
        assert {plan.damping for plans in quantiser.plans.values() for plan in plans.values()} == {damping}


def test_gains_and_gates_are_stored_as_the_nearest_fp16():
    model = a_model()
    stored = g.unpack(artifact(model, 1e6)[0], "it")[1]
    for name, p in model.named_parameters():
        assert g.param_role(name) != "scalar" or torch.equal(stored[name], p.half()), name


def test_a_dry_run_rounds_once_and_takes_what_comes():
    dist = g.Dist()
    lines: list[str] = []
    model = a_model()
    run = g.RunConfig(artifact_bytes=len(g.code()) + 6000)
    log = g.Log(screen=lines.append)
    blob = g.make_artifact(model, sensitivities_of(model), run, dist, g.Stopwatch(dist), ORIGIN, log, once=True)
    assert len(blob) > 6000 and sum(line.startswith("pack ") for line in lines) == 1


def test_a_quantised_network_predicts_nearly_as_before():
    model = a_model()
    batch = a_batch(3)[0]
    exact = model(*batch)
    errors = []
    for room in (40_000, 24_000, 17_000):
        _, stored = g.unpack(artifact(model, room)[0], "it")
        restored = g.restore(g.GPT(CONFIG), stored, "it")
        errors.append((restored(*batch) - exact).abs().mean().item())
    assert 0 < 2 * errors[0] < errors[1] < errors[2] / 2 and errors[0] < 0.05


# ---- calibration ------------------------------------------------------------

SMALLEST = g.ModelConfig(
    vocab_size=9,
    model_dim=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=1,
    rope_dims=2,
    attn_gate_width=2,
    smear_width=2,
    xsa_last_n=1,
    unet_skips=1,
    parallel_start_layer=2,
    num_loops=1,
    loop_start=0,
    loop_end=0,
    logit_softcap=3.0,
)
LOOPED = "blocks.0."


def copies_of(text: np.ndarray, copies: int) -> g.MicroBatch:
    """A packed row of documents that are all the same text."""
    row = np.tile(text, copies).astype(np.uint16)
    targets = np.append(row[1:], row[0])
    return g.make_micro_batch(row, targets, len(text) * np.arange(copies), torch.device("cpu"))


class Watched:
    """The inputs of every matrix in a forward pass, and perturbations (1, T, out) added to every output."""

    def __init__(self, model: g.GPT):
        self.model = model
        self.uses: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.handles = [
            module.register_forward_hook(functools.partial(self.use, name)) for name, module in model.named_modules()
        ]

    def use(self, name, module, args, output):
        names = {g.Lookup: ["lookup"], g.Linear: [f"{name}.weight"]}.get(type(module), [])
        if isinstance(module, g.JointProjection):
            names = [f"{name.rpartition('.')[0]}.{part}.weight" for part in "qkv"]
        if not names:
            return output
        widths = [self.model.get_parameter(n).size(0) for n in names if n != "lookup"] or [output.size(-1)]
        parts = []
        for n, part in zip(names, output.split(widths, -1), strict=True):
            perturbation = torch.zeros_like(part, requires_grad=True)
            scale = args[2].detach() if isinstance(module, g.Linear) and len(args) > 2 else 1.0
            self.uses.setdefault(n, []).append((args[0].detach(), perturbation))
            parts.append(part + scale * perturbation)
        return torch.cat(parts, -1)


def expected_squares(model: g.GPT, part: g.MicroBatch) -> tuple[dict[str, list], torch.Tensor, torch.Tensor]:
    """By brute force over all labels of all positions, each as likely as the model says.

    -> {matrix: [(inputs (T, in), expected squared gradients at the outputs (T, out)) of every use]}, the Fisher
    information of every row of the embedding as the output matrix (V, D, D), and the expected sum of g g^T over
    gradients g of looked-up embeddings (D, D)"""
    watched = Watched(model)
    head = model.embed.detach().clone().requires_grad_()
    states, _ = model.hidden(part.tokens, part.segments)
    for handle in watched.handles:
        handle.remove()
    log_p = g.softcap(states[0] @ head.mT, model.config.logit_softcap).log_softmax(-1)
    uses = [(name, x, p) for name, found in watched.uses.items() for x, p in found]
    squares = [torch.zeros_like(p[0]) for _, _, p in uses]
    fisher = torch.zeros(*head.shape, head.size(1))
    lookup = torch.zeros(head.size(1), head.size(1))
    for t, label in itertools.product(*map(range, log_p.shape)):
        chance = log_p[t, label].exp().item()
        gradients = torch.autograd.grad(log_p[t, label], [head, *(p for _, _, p in uses)], retain_graph=True)
        fisher += chance * gradients[0][:, :, None] * gradients[0][:, None]
        for (name, _, _), total, gradient in zip(uses, squares, gradients[1:], strict=True):
            total += chance * gradient[0].square()
            if name == "lookup":
                lookup += chance * gradient[0].mT @ gradient[0]
    by_name: dict[str, list] = {}
    for (name, x, _), total in zip(uses, squares, strict=True):
        by_name.setdefault(name, []).append((x[0].float(), total))
    return by_name, fisher, lookup


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative to the norm."""
    assert (found - expected).norm() < tolerance * expected.norm()


def test_sensitivities_are_the_fisher_information():
    """Against all labels at all positions, which calibration samples."""
    torch.manual_seed(1)
    model = a_model(config=SMALLEST)
    text = np.array([g.BOS, 4, 8, 2, 5, 4, 3])
    part = copies_of(text, 1)
    exact, head, lookup = expected_squares(model, part)
    row = 100 * len(text)
    run = g.RunConfig(train_row_tokens=row, train_batch_tokens=row)
    found = g.calibrate(model, [[copies_of(text, 100)]] * 30, g.Dist(), run)
    assert set(found) == set(matrices(model))
    for name, uses in exact.items():
        if name == "lookup":
            continue
        hessian = sum((x * squares.mean(1)[:, None]).mT @ x for x, squares in uses) / len(text)
        rows = sum(squares.sum(0) for _, squares in uses)
        assert len(uses) == (2 if name.startswith(LOOPED) else 1)
        factor = g.LOOPED_FACTOR if name.startswith(LOOPED) else 1.0
        assert_near(found[name].hessian, factor * hessian, 0.1)
        assert_near(found[name].row_weights, rows / rows.mean(), 0.1)
        assert found[name].row_weights.mean() == pytest.approx(1.0, rel=1e-4) and found[name].inputs is None

    output = head.sum(0) / len(text)
    lookup = lookup / len(text)
    assert_near(found["embed"].hessian, (output + lookup) / 9, 0.05)
    states = model.hidden(part.tokens, part.segments)[0][0].detach()
    assert_near(found["embed"].inputs, states.mT @ states / len(text), 1e-4)
    frequencies = torch.bincount(torch.tensor(text), minlength=9) / len(text)
    predicted = probability_curvature(model, states).sum(0)
    rows = predicted / predicted.sum() * output.trace() + frequencies * lookup.trace()
    assert_near(found["embed"].row_weights, rows / rows.mean(), 0.05)
    assert_near(
        head,
        probability_curvature(model, states).mT[:, :, None, None].mul(states[:, :, None] * states[:, None]).sum(1),
        1e-3,
    )


@torch.no_grad()
def probability_curvature(model: g.GPT, states: torch.Tensor) -> torch.Tensor:
    """p (1 - p) c^2 at states (T, D), where c is the slope of the soft cap: (T, V)"""
    cap = model.config.logit_softcap
    z = (states @ model.embed.mT / cap).tanh()
    p = (cap * z).softmax(-1)
    return p * (1 - p) * (1 - z.square()).square()


def test_calibration_sees_every_matrix():
    model = a_model()
    found = sensitivities_of(model)
    assert set(found) == set(matrices(model))
    for name, (hessian, rows, _) in found.items():
        out, width = matrices(model)[name].shape
        assert hessian.shape == (width, width) and hessian.diagonal().min() > 0, name
        assert rows.shape == (out,) and rows.mean() == pytest.approx(1, rel=1e-4) and rows.min() >= 0, name


def test_looped_blocks_count_more(monkeypatch):
    model = a_model()
    plain = calibrated(model, a_batch(1))
    monkeypatch.setattr(g, "LOOPED_FACTOR", 3.0)
    more = calibrated(model, a_batch(1))
    for name in matrices(model):
        looped = name.startswith(("blocks.1.", "blocks.2."))
        torch.testing.assert_close(more[name].hessian, (2.0 if looped else 1.0) * plain[name].hessian)
        assert torch.equal(more[name].row_weights, plain[name].row_weights)


def test_a_token_that_calibration_never_saw_counts_too():
    """Where rows differ only by how often they are looked up."""
    calibration = g.Calibration(a_model(), seed=0)
    calibration.run(a_batch(1))
    calibration.head.hessian.zero_()
    calibration.counts[:2] = torch.tensor([0.0, 1.0])
    never, once = calibration.of_embedding().row_weights[:2].tolist()
    assert never / once == pytest.approx(0.3 / 1.3, rel=1e-3)


def test_the_seed_decides_the_labels():
    model = a_model()
    first, again, other = (calibrated(model, a_batch(1), seed=seed) for seed in (3, 3, 4))
    for name, found in first.items():
        assert torch.equal(found.hessian, again[name].hessian) and torch.equal(
            found.row_weights, again[name].row_weights
        )
        assert not torch.equal(found.row_weights, other[name].row_weights)


@pytest.mark.parametrize("fails", [False, True])
def test_calibration_leaves_no_trace(fails):
    model = a_model()
    model.blocks[1].attention.gate.requires_grad_(False)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()

    def batches():
        yield a_batch(1)
        if fails:
            raise RuntimeError("no more text")

    with pytest.raises(RuntimeError, match="no more text") if fails else contextlib.nullcontext():
        g.calibrate(model, batches(), g.Dist(), g.RunConfig(train_row_tokens=64))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(torch.equal(p, before[name]) and (p.grad == 3.0).all() for name, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_calibration_works_without_gradients_around_it():
    model = a_model()
    with torch.no_grad():
        inside = calibrated(model, a_batch(1))
    outside = calibrated(model, a_batch(1))
    assert all(torch.equal(inside[name].hessian, outside[name].hessian) for name in outside)


class Functional(g.MLP):
    """Uses the weight of a module that it never calls."""

    def forward(self, x, scale, lora=None):
        hidden = torch.nn.functional.linear(x, self.up.weight)
        return self.down(hidden.square(), None, scale)


def test_a_matrix_that_saw_no_input_is_refused_by_name():
    """Nobody could say what its errors cost."""
    model = a_model()
    weights = model.blocks[2].mlp.state_dict()
    model.blocks[2].mlp = Functional(CONFIG)
    model.blocks[2].mlp.load_state_dict(weights)
    with pytest.raises(g.UserError, match=r"no input of blocks\.2\.mlp\.up\.weight:"):
        calibrated(model, a_batch(1))


BUDGETS = [dict(iterations=2, max_wallclock_seconds=0.0), dict(max_wallclock_seconds=600.0)]


@pytest.mark.parametrize("budget", BUDGETS, ids=["steps", "time"])
def test_it_is_refused_before_training(tiny_data, tiny_config, tiny_run, monkeypatch, budget):
    monkeypatch.setattr(g, "MLP", Functional)
    setup = g.make_setup(tiny_config, tiny_run(**budget), g.Dist())
    held_out = setup.stream.held_out()
    trainer = g.make_trainer(setup, held_out)
    with pytest.raises(g.UserError, match=r"no input of blocks\.0\.mlp\.up\.weight, .*: the forward pass never calls"):
        g.prepare_training(trainer, setup, held_out, g.Log())


def test_an_input_that_is_always_zero_is_no_reason_to_refuse():
    """Single columns of a Hessian may be zero."""
    model = a_model()
    model.blocks[1].mlp.up.weight.data[:5] = 0.0
    found = calibrated(model, a_batch(1))
    assert not found["blocks.1.mlp.down.weight"].hessian.diagonal()[:5].any()
    quantiser = g.Quantiser(matrices(model), found, g.RunConfig(), g.Dist())
    assert all(np.isfinite(steps_of(grid)).all() for grid in quantiser.grids(-8.0).values())


def test_a_network_as_it_is_initialised_can_be_packed(tiny_config):
    """Output matrices of zeros keep all gradients from the matrices before them: what these compute has no effect."""
    model = g.GPT(tiny_config)
    g.init_weights(model, 0)
    found = calibrated(model, a_batch(1, vocab=tiny_config.vocab_size))
    quantiser = g.Quantiser(matrices(model), found, g.RunConfig(), g.Dist())
    for octave in (-14.0, -6.0):
        coded = g.encode_matrices(quantiser.round(octave), quantiser.trellis)
        restored = g.decode_matrices(coded, {name: tuple(w.shape) for name, w in matrices(model).items()})
        assert all(w.isfinite().all() for w in restored.values())


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dist = g.Dist(rank, 2)
    model = a_model()
    found = g.calibrate(model, [a_batch(rank)], dist, g.RunConfig(seed=0, train_row_tokens=64))
    quantiser = g.Quantiser(matrices(model), found, g.RunConfig(trellis_states="8"), dist)
    rounded = quantiser.round(-6.0)
    run = g.RunConfig(artifact_bytes=len(g.code()) + 25_000)
    blob = g.make_artifact(model, found, run, dist, g.Stopwatch(dist), ORIGIN, g.Log())
    torch.save(([tuple(s) for s in found.values()], [dict(part) for part in rounded], blob), f"{folder}/{rank}.pt")
    dist.close()


def test_two_ranks_calibrate_on_all_text_and_share_the_rounding(tmp_path):
    start_two_ranks(rank_main, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    model = a_model()
    found = {name: g.Sensitivity(*parts) for name, parts in zip(sensitivities_of(model), one[0], strict=True)}
    parts = [g.Calibration(model, rank) for rank in range(2)]
    for rank, calibration in enumerate(parts):
        calibration.run(a_batch(rank))
    for i, (name, sensitivity) in enumerate(found.items()):
        for here, there in zip(sensitivity, two[0][i], strict=True):
            assert here is there is None or torch.equal(here, there)
        if name != "embed":
            factor = g.LOOPED_FACTOR if name.startswith(("blocks.1.", "blocks.2.")) else 1.0
            total = sum(calibration.matrices[name].hessian for calibration in parts) / 256
            torch.testing.assert_close(sensitivity.hessian, factor * total, rtol=1e-4, atol=1e-9)

    quantiser = g.Quantiser(matrices(model), found, g.RunConfig(trellis_states="8"), g.Dist())
    alone = quantiser.round(-6.0)
    (integers, grids), (integers_there, grids_there) = one[1], two[1]
    assert list(integers) == list(integers_there) == list(alone.integers)
    for name, k in alone.integers.items():
        assert np.array_equal(integers[name], integers_there[name]) and integers[name].dtype == k.dtype
        assert all(np.array_equal(a, b) for a, b in zip(grids[name], grids_there[name], strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(grids[name], alone.grids[name], strict=True))
        assert (integers[name] == k).mean() > 0.95, name  # threads may tip a value, and a path that follows
    assert two[2] == b"" and len(one[2]) <= 25_000
    g.restore(g.GPT(CONFIG), g.unpack(one[2], "it")[1], "it")
