"""Training's optimizer: equal to its formulas written out, whatever the number of ranks."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from conftest import start_two_ranks

import train_gpt as g

CONFIG = g.ModelConfig(
    vocab_size=64,
    model_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2,
    rope_dims=4,
    attn_gate_width=6,
    smear_width=6,
    parallel_start_layer=2,
    num_loops=0,
)
CLIPS = (0.0, 0.3)  # no limit, and one that bites


def a_model() -> g.GPT:
    model = g.GPT(CONFIG)
    g.init_weights(model, seed=3)
    return model


def set_gradients(model: g.GPT, step: int, part: float = 1.0) -> None:
    """The gradients of a step, all of one seed; a rank may hold only a part of them."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.grad is None:  # without an optimizer
            p.grad = torch.zeros_like(p)
        p.grad.copy_(torch.randn(p.shape, generator=generator) * part)


STEPS = 8


def some_steps(dist: g.Dist, clip: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Every rank holds its share of the gradients, a power of two, so that their sum over ranks is exact."""
    model = a_model()
    optimizer = g.MuonAdam(model, g.RunConfig(grad_clip_norm=clip), dist)
    norms = []
    for step in range(STEPS):
        set_gradients(model, step, part=1 / dist.world)
        norms.append(optimizer.step(lr_scale=1.0, mu=0.9).item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights | {f"state {name}": t for name, t in optimizer.state().items()}, norms


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    dist = g.Dist(rank, world)
    results = {clip: some_steps(dist, clip) for clip in CLIPS}
    alone = {clip: some_steps(g.Dist(), clip) for clip in CLIPS}
    torch.save((results, alone), f"{folder}/{rank}.pt")
    dist.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[tuple[dict, dict]]:
    """What each of two processes found together and alone."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    start_two_ranks(rank_main, 2, folder)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


# ---- Muon -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16), (1, 9)])
def test_orthogonalise_brings_every_singular_value_near_1(shape):
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    nearest = u @ vt
    x = (u * torch.linspace(0.1, 1, min(shape), dtype=torch.float64) @ vt).float()
    got = g.orthogonalise(x, steps=5)
    values = torch.linalg.svdvals(got.double())
    assert got.shape == x.shape and got.dtype == x.dtype
    assert 0.8 < values.min() and values.max() < 1.2
    assert ((got - nearest).norm(dim=(1, 2)) / nearest.norm(dim=(1, 2))).max() < 0.2
    torch.testing.assert_close(g.orthogonalise(1e3 * x, 5), got, rtol=1e-3, atol=1e-3)  # only the direction counts


def test_orthogonalise_leaves_zeros_alone():
    assert not g.orthogonalise(torch.zeros(2, 8, 4), 5).any()


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """The iteration on the singular values alone: p(s) = a s + b s^3 + c s^5, (r, c) float64."""
    u, s, vt = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
    for a, b, c in g.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_muon_update_is_its_formula(shape):
    rng = np.random.default_rng(0)
    mu = 0.8
    momentum = np.zeros(shape)
    kept = torch.zeros(1, *shape)
    for _ in range(3):
        gradient = rng.standard_normal(shape)
        momentum = mu * momentum + gradient
        u = gradient + mu * momentum
        u = u / np.linalg.norm(u, axis=1, keepdims=True)
        want = newton_schulz(u)
        got = g.muon_update(torch.tensor(gradient[None], dtype=torch.float32), kept, mu, 5)
        np.testing.assert_allclose(got[0].numpy(), want, atol=1e-4)
        np.testing.assert_allclose(kept[0].numpy(), momentum, atol=1e-5)


# ---- AdamW and the whole step -----------------------------------------------


def test_adam_params_follow_torchs_adamw():
    run = g.RunConfig(grad_clip_norm=0.0, beta1=0.8, beta2=0.95, embed_wd=0.3, scalar_wd=0.1)
    model = a_model()
    reference_model = a_model()
    adam_params = [(n, p) for n, p in reference_model.named_parameters() if g.param_role(n) != "matrix"]
    groups = [
        dict(
            params=[p],
            lr=run.embed_lr if n == "embed" else run.scalar_lr,
            weight_decay=run.embed_wd if n == "embed" else run.scalar_wd,
        )
        for n, p in adam_params
    ]
    reference = torch.optim.AdamW(groups, betas=(run.beta1, run.beta2), eps=run.adam_eps)
    optimizer = g.MuonAdam(model, run, g.Dist())
    for step in range(4):
        set_gradients(model, step)
        set_gradients(reference_model, step)
        optimizer.step(lr_scale=1.0, mu=0.9)
        reference.step()
    ours = dict(model.named_parameters())
    for name, p in adam_params:
        torch.testing.assert_close(ours[name], p, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_matrices_follow_muon():
    run = g.RunConfig(grad_clip_norm=0.0)
    model = a_model()
    optimizer = g.MuonAdam(model, run, g.Dist())
    want = {n: p.detach().double().numpy() for n, p in model.named_parameters() if g.param_role(n) == "matrix"}
    momentum = {n: torch.zeros(1, *p.shape) for n, p in want.items()}
    for step in range(3):
        set_gradients(model, step)
        for n, p in model.named_parameters():
            if n in want:
                update = g.muon_update(p.grad[None].clone(), momentum[n], 0.7, run.muon_ns_steps)[0].double().numpy()
                lr = 0.5 * run.matrix_lr
                aspect = max(1, len(update) / len(update[0])) ** 0.5
                want[n] = want[n] * (1 - lr * run.muon_wd) - lr * aspect * update
        optimizer.step(lr_scale=0.5, mu=0.7)
    for n, p in model.named_parameters():
        if n in want:
            np.testing.assert_allclose(p.detach().numpy(), want[n], atol=1e-5, err_msg=n)
    assert not any(p.grad.any() for p in model.parameters())


def test_decay_is_decoupled_from_the_gradient():
    """Without a gradient a weight shrinks by lr * decay, and nothing else happens; without a rate nothing does."""
    run = g.RunConfig(muon_wd=0.5, embed_wd=0.25, scalar_wd=0.125)
    model = a_model()
    optimizer = g.MuonAdam(model, run, g.Dist())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for scale in (0.0, 0.4):
        optimizer.step(lr_scale=scale, mu=0.9)
        shrink = {"matrix": run.matrix_lr * 0.5, "embedding": run.embed_lr * 0.25, "scalar": run.scalar_lr * 0.125}
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] * (1 - scale * shrink[g.param_role(name)]))


def test_every_parameter_has_exactly_one_optimizer():
    model = a_model()
    optimizer = g.MuonAdam(model, g.RunConfig(), g.Dist())
    matrices = [p for ps in optimizer.matrices for p in ps]
    assert identities(matrices + optimizer.adam_params) == identities(model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {g.param_role(names[id(p)]) for p in matrices} == {"matrix"}
    assert all(len({p.shape for p in ps}) == 1 for ps in optimizer.matrices)
    model.extra = torch.nn.Linear(3, 3)  # a parameter that comes later is covered too
    optimizer = g.MuonAdam(model, g.RunConfig(), g.Dist())
    covered = [p for ps in optimizer.matrices for p in ps] + optimizer.adam_params
    assert identities(covered) == identities(model.parameters())


def identities(parameters) -> list[int]:
    return sorted(id(p) for p in parameters)


# ---- where parameters lie ---------------------------------------------------


def storages(tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("world", [1, 2, 5])
def test_parameters_and_gradients_lie_in_the_optimizers_tensors(world):
    """One tensor for each shape of matrices, and one for Adam, where parameters begin at multiples of 256 bytes."""
    model = a_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = g.MuonAdam(model, g.RunConfig(), g.Dist(world - 1, world))
    assert all(id(p) in names and torch.equal(p, before[names[id(p)]]) for p in model.parameters())
    assert storages(model.parameters()) == storages([*optimizer.stacks, optimizer.adam_values])
    gradients = [p.grad for p in model.parameters()]
    assert storages(gradients) == storages([*optimizer.stack_grads, optimizer.adam_grads])

    for p in model.parameters():
        p.grad.fill_(1.0)
    for ps, stack, grads in zip(optimizer.matrices, optimizer.stacks, optimizer.stack_grads, strict=True):
        assert len(stack) % world == 0 and stack.is_contiguous()
        assert torch.equal(stack[: len(ps)], torch.stack(ps)) and not stack[len(ps) :].any()
        assert (grads[: len(ps)] == 1.0).all() and not grads[len(ps) :].any()
    assert optimizer.adam_grads.sum() == sum(p.numel() for p in optimizer.adam_params)
    start = optimizer.adam_values.data_ptr()
    assert all((p.data_ptr() - start) % 256 == 0 for p in optimizer.adam_params)


def test_a_step_through_the_model_changes_it_and_leaves_padding_zero(tiny_config, tiny_run):
    model = g.GPT(tiny_config)
    g.init_weights(model, seed=0)
    trainer = g.Trainer(model, tiny_run(), g.Dist(), {})
    optimizer = trainer.optimizer
    gradients = [p.grad for p in model.parameters()]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = g.random_batch(trainer.run, tiny_config.vocab_size, g.Dist())
    for _ in range(2):  # after one, what writes to the residual stream is no longer zero
        trainer.train_step(batch, 0.0, looping=True)
    assert [n for n, p in model.named_parameters() if p.numel() and torch.equal(p, before[n])] == []
    assert all(p.grad is grad and not grad.any() for p, grad in zip(model.parameters(), gradients, strict=True))
    assert storages(model.parameters()) == storages([*optimizer.stacks, optimizer.adam_values])
    assert storages(trainer.average.params) == storages(model.parameters())

    used = torch.zeros_like(optimizer.adam_values, dtype=torch.bool)
    for part in optimizer.adam_views(used):
        part.fill_(True)
    for flat in (optimizer.adam_values, optimizer.adam_grads, optimizer.exp_avg, optimizer.exp_avg_sq):
        assert not flat[~used].any()


def test_a_checkpoint_has_one_tensor_per_shape_and_two_per_adam_parameter():
    """Names and shapes as they have always been, so that old checkpoints load."""
    model = a_model()
    state = g.MuonAdam(model, g.RunConfig(), g.Dist()).state()
    adam = [p.shape for n, p in model.named_parameters() if g.param_role(n) == "embedding"]
    adam += [p.shape for n, p in model.named_parameters() if g.param_role(n) == "scalar"]
    expected = {f"{moment}.{i}": shape for moment in ("exp_avg", "exp_avg_sq") for i, shape in enumerate(adam)}
    stacks = [(6, 16, 16), (3, 32, 16), (3, 16, 32), (6, 8, 16)]  # q and o, up, down, k and v
    expected |= {f"momentum.{i}": torch.Size(shape) for i, shape in enumerate(stacks)}
    assert {name: t.shape for name, t in state.items()} == expected


OFF = ("unet_skips", "smear_width", "attn_gate_width", "parallel_start_layer", "num_loops")


@pytest.mark.parametrize(
    "changes", [*({knob: 0} for knob in OFF), dict(num_layers=1, loop_start=0, loop_end=0)], ids=str
)
def test_what_a_pass_does_not_use_needs_no_gradient(changes):
    """A mechanism that is off; and the skips of a single block, which come with its loop."""
    config = dict(vocab_size=64, model_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_mult=2, rope_dims=4)
    config |= dict(parallel_start_layer=2, num_loops=1, loop_start=1, loop_end=1)
    model = g.GPT(g.ModelConfig(**config | changes))
    g.init_weights(model, seed=0)
    optimizer = g.MuonAdam(model, g.RunConfig(), g.Dist())
    text = torch.randint(2, 64, (1, 17))
    for looping in (False, True):
        model(text[:, :-1], text[:, 1:], looping=looping).mean().backward()
        assert 0 < optimizer.step(1.0, 0.9) < math.inf


# ---- clipping ---------------------------------------------------------------


def test_the_norm_is_that_of_the_whole_gradient_and_clipping_scales_all_of_it():
    """Clipped gradients give what gradients scaled by hand give."""
    whole = math.sqrt(sum(p.numel() for p in a_model().parameters()))  # nearly, of normal deviates
    limit = 0.01 * whole
    clipped = a_model()
    by_hand = a_model()
    one = g.MuonAdam(clipped, g.RunConfig(grad_clip_norm=limit, adam_eps=1e-2), g.Dist())
    two = g.MuonAdam(by_hand, g.RunConfig(grad_clip_norm=0.0, adam_eps=1e-2), g.Dist())
    for step in range(2):
        set_gradients(clipped, step)
        exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in clipped.parameters()))
        set_gradients(by_hand, step, part=limit / exact)
        norm = one.step(1.0, 0.9)
        two.step(1.0, 0.9)
        assert norm.item() == pytest.approx(exact, rel=1e-5)
    for p, q in zip(clipped.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for a, b in zip([*one.momentum, one.exp_avg], [*two.momentum, two.exp_avg], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_small_gradient_is_not_clipped():
    clipped = a_model()
    free = a_model()
    for model, clip in ((clipped, 1e6), (free, 0.0)):
        optimizer = g.MuonAdam(model, g.RunConfig(grad_clip_norm=clip), g.Dist())
        set_gradients(model, 0)
        optimizer.step(1.0, 0.9)
    assert all(torch.equal(p, q) for p, q in zip(clipped.parameters(), free.parameters(), strict=True))


# ---- ranks ------------------------------------------------------------------


def test_some_stacks_do_not_divide_by_the_ranks():
    assert any(len(ps) % 2 for ps in g.MuonAdam(a_model(), g.RunConfig(), g.Dist()).matrices)


@pytest.mark.parametrize("clip", CLIPS)
def test_two_ranks_update_exactly_as_one(two_ranks, clip):
    """Weights, momentum and moments, bit for bit, in fp32 on a CPU: clipping happens after the sum over ranks."""
    for together, alone in two_ranks:
        (got, norms), (want, norms_alone) = together[clip], alone[clip]
        assert norms == norms_alone
        assert set(got) == set(want)
        assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_the_state_of_two_ranks_goes_on_with_one(two_ranks):
    """state() is whole on every rank, so that a checkpoint fits any number of ranks."""
    state = {n.removeprefix("state "): t for n, t in two_ranks[1][0][0.0][0].items() if n.startswith("state ")}
    optimizer = g.MuonAdam(a_model(), g.RunConfig(), g.Dist())
    optimizer.load_state(state, STEPS)
    assert optimizer.steps_done == STEPS
    loaded = optimizer.state()
    assert set(loaded) == set(state) and all(torch.equal(loaded[n], state[n]) for n in state)
    assert all(t.any() for t in loaded.values())
    for rank in range(2):  # and one rank's fits each of two
        part = g.MuonAdam(a_model(), g.RunConfig(), g.Dist(rank, 2))
        part.load_state(state, STEPS)
        for n, momentum, i in zip(part.share, part.momentum, range(len(part.share)), strict=True):
            whole = state[f"momentum.{i}"]
            mine = whole[rank * n : (rank + 1) * n]
            assert torch.equal(momentum[: len(mine)], mine) and not momentum[len(mine) :].any()


# ---- schedules and the average ----------------------------------------------


@pytest.mark.parametrize(
    "progress, expected",
    [(0.0, 1.0), (0.2, 1.0), (0.3, 0.875), (0.6, 0.5), (0.9, 0.125), (0.95, 0.1), (1.0, 0.1), (1.1, 0.1)],
)
def test_learning_rate(progress, expected):
    assert g.lr_at(progress, g.RunConfig(warmdown_frac=0.8, min_lr=0.1)) == pytest.approx(expected)


def test_learning_rate_without_warm_down():
    assert g.lr_at(0.99, g.RunConfig(warmdown_frac=0.0)) == 1.0


@pytest.mark.parametrize("progress, expected", [(0.0, 0.8), (0.1, 0.825), (0.2, 0.85), (0.4, 0.9), (0.9, 0.9)])
def test_momentum(progress, expected):
    run = g.RunConfig(muon_momentum_start=0.8, muon_momentum=0.9, muon_momentum_warmup_frac=0.4)
    assert g.momentum_at(progress, run) == pytest.approx(expected)
    assert g.momentum_at(progress, g.RunConfig(muon_momentum_warmup_frac=0.0)) == g.RunConfig().muon_momentum


def averaged(steps: int, horizon: float) -> float:
    """The average at the end of weights that went from 0 to 1 in a line."""
    model = a_model().requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    average = g.WeightAverage(model, horizon)
    for step in range(steps):
        for p in model.parameters():
            p.fill_((step + 1) / steps)
        average.update(1 / steps)
    assert all(v.std(correction=0) < 1e-6 for v in average.values)
    return float(average.values[0].flatten()[0])


@pytest.mark.parametrize("horizon", [0.05, 0.2])
def test_the_horizon_of_the_average_is_a_part_of_the_run(horizon):
    exact = 1 - horizon * (1 - math.exp(-1 / horizon))
    assert averaged(400, horizon) == pytest.approx(exact, abs=0.003)
    assert averaged(4000, horizon) == pytest.approx(averaged(400, horizon), abs=0.003)


def test_without_a_horizon_the_average_is_the_last_weight():
    assert averaged(7, 0.0) == 1.0


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_part_of_the_average_is_applied(weight):
    model = a_model()
    average = g.WeightAverage(model, 0.1)
    for p in model.parameters():
        p.data += torch.randn(p.shape)
    last = [p.detach().clone() for p in model.parameters()]
    with average.applied(weight):
        for p, w, v in zip(model.parameters(), last, average.values, strict=True):
            torch.testing.assert_close(p.detach(), (1 - weight) * w + weight * v)
            assert weight != 0.0 or torch.equal(p, w)
            assert weight != 1.0 or torch.equal(p, v)


def test_applying_the_average_restores_exactly():
    model = a_model()
    average = g.WeightAverage(model, 0.1)
    for p in model.parameters():
        p.data += torch.randn(p.shape)
    average.update(0.03)
    before = [p.detach().clone() for p in model.parameters()]
    values = [v.clone() for v in average.values]
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        raise RuntimeError("inside")  # restored all the same
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(v, w) for v, w in zip(average.values, values, strict=True))
