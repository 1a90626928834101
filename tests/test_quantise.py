"""From weights to integers and back: GPTQ against a plain reference, ranges that fit, calibration on all text."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

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
PASSED_TWICE = "blocks.1.attention.q.weight"
DAMPING = 0.01


def a_model(seed: int = 0) -> g.GPT:
    model = g.GPT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = p.data + 0.1 * noise if g.param_role(name) == "scalar" else noise / p.size(1) ** 0.5
    return model


def a_batch(seed: int, rows: int = 2) -> list[g.MicroBatch]:
    """Micro-batches of packed text, three documents in each."""
    rng = np.random.default_rng(seed)
    packs = []
    for _ in range(rows):
        text = rng.integers(2, CONFIG.vocab_size, 65).astype(np.uint16)
        text[[0, 20, 50]] = g.BOS
        starts = g.segment_starts(text[:-1], 64, 32)
        packs.append(g.make_micro_batch(text[:-1], text[1:], starts, torch.device("cpu")))
    return packs


def matrices(model: g.GPT) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if g.param_role(n) != "scalar"}


# ---- GPTQ -------------------------------------------------------------------


def gptq(*arguments) -> torch.Tensor:
    """The integers alone."""
    return g.gptq(*arguments)[0]


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Hessian of inputs of which each resembles the others, and the scale of every row."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * columns, columns)) @ (np.eye(columns) + 2 * rng.random((columns, columns)) / columns)
    x = x * np.linspace(0.5, 2, columns) + rng.standard_normal((4 * columns, 1))
    weight = torch.tensor(rng.standard_normal((rows, columns)), dtype=torch.float32)
    return weight, torch.tensor(x.T @ x, dtype=torch.float32), 3 * weight.std(1) / 7


def gptq_reference(weight, hessian, scale, qmax, damping, ordered=True):
    """Round a column, correct those that follow by the inverse hessian, strike it out; in numpy, float64."""
    w, h, scale = (t.double().numpy().copy() for t in (weight, hessian, scale))
    dead = np.flatnonzero(np.diag(h) == 0)
    w[:, dead] = 0
    h[dead, dead] = 1
    h += np.eye(len(h)) * damping * np.diag(h).mean()
    order = np.argsort(-hessian.diagonal().double().numpy(), kind="stable") if ordered else np.arange(len(h))
    inverse = np.linalg.inv(h)
    q = np.zeros_like(w)
    left = list(order)
    for j in order:
        q[:, j] = np.clip(np.round(w[:, j] / scale), -qmax, qmax)
        w[:, left] -= np.outer((w[:, j] - q[:, j] * scale) / inverse[j, j], inverse[j, left])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.remove(j)
    return q


def harm(weight, hessian, q, scale) -> float:
    """Squared error of the outputs over the calibration inputs."""
    error = (weight - torch.as_tensor(q).float() * scale[:, None]).double()
    return (error @ hessian.double() * error).sum().item()


@pytest.mark.parametrize("rows, columns, block", [(12, 40, 128), (12, 40, 8), (6, 150, 128), (5, 33, 32), (3, 7, 1)])
def test_gptq_matches_the_reference(rows, columns, block):
    weight, hessian, scale = correlated(rows, columns)
    got = gptq(weight, hessian, scale, 7, DAMPING, block)
    want = gptq_reference(weight, hessian, scale, 7, DAMPING)
    assert got.dtype == torch.int8 and got.abs().max() <= 7
    assert (got.numpy() == want).mean() > 0.99  # fp32 may tip a value that lies between two integers
    assert harm(weight, hessian, got, scale) == pytest.approx(harm(weight, hessian, want, scale), rel=0.02)


def test_gptq_beats_rounding_and_an_order_by_chance():
    gains = []
    for seed in range(5):
        weight, hessian, scale = correlated(16, 48, seed)
        rounded = (weight / scale[:, None]).round().clamp(-7, 7)
        ours = harm(weight, hessian, gptq(weight, hessian, scale, 7, DAMPING), scale)
        unordered = harm(weight, hessian, gptq_reference(weight, hessian, scale, 7, DAMPING, ordered=False), scale)
        assert ours < 0.8 * harm(weight, hessian, rounded, scale)
        gains.append(unordered / ours)
    assert np.mean(gains) > 1.0


def test_gptq_orders_columns_by_their_weight_alone():
    weight, hessian, scale = correlated(8, 30)
    shuffle = torch.randperm(30)
    direct = gptq(weight, hessian, scale, 7, DAMPING)
    assert torch.equal(gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], scale, 7, DAMPING), direct[:, shuffle])


def test_gptq_rounds_where_inputs_are_independent():
    weight, _, scale = correlated(8, 30)
    rounded = (weight / scale[:, None]).round().clamp(-7, 7)
    assert torch.equal(gptq(weight, torch.eye(30), scale, 7, DAMPING).float(), rounded)


def test_gptq_of_inputs_that_are_always_zero():
    weight, hessian, scale = correlated(8, 30)
    dead = torch.tensor([0, 7, 29])
    hessian[dead] = 0
    hessian[:, dead] = 0
    got = gptq(weight, hessian, scale, 7, DAMPING)
    assert not got[:, dead].any() and got.any()
    assert (got.numpy() == gptq_reference(weight, hessian, scale, 7, DAMPING)).mean() > 0.99
    assert not gptq(weight, torch.zeros(30, 30), scale, 7, DAMPING).any()


def test_damping_rises_until_the_hessian_is_positive_definite():
    """A Cholesky that fails ended runs whose training was paid for."""
    weight, _, scale = correlated(8, 30)
    hessian = torch.eye(30)
    hessian[0, 1] = hessian[1, 0] = 1.05  # as rounding may leave it: an eigenvalue is -0.05
    q, damping = g.gptq(weight, hessian, scale, 7, 1e-6)
    assert damping == pytest.approx(0.1) and q.any()
    _, damping = g.gptq(weight, torch.eye(30), scale, 7, DAMPING)
    assert damping == DAMPING
    with pytest.raises(g.UserError, match="not positive definite"):
        g.gptq(weight, torch.full((30, 30), math.nan), scale, 7, DAMPING)


def test_gptq_leaves_its_arguments_alone():
    arguments = correlated(8, 30)
    before = [t.clone() for t in arguments]
    gptq(*arguments, 7, DAMPING)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


# ---- ranges and bytes -------------------------------------------------------


MLP = "blocks.0.mlp.up.weight"


def test_the_range_of_a_row_is_so_many_of_its_deviations():
    weight = torch.randn(5, 300) * torch.tensor([[1e-9], [0.01], [1.0], [0.0], [50.0]])
    steps = g.RowQuantiser(g.RunConfig(matrix_bits=6, mlp_clip_sigmas=8.0), clip_scale=1.5).steps(MLP, weight)
    expected = np.maximum(12 * weight.double().numpy().std(1, ddof=1) / 31, 2.0**-14)
    assert steps.dtype == torch.float16
    np.testing.assert_allclose(steps.float().numpy(), expected, rtol=1e-3)


def test_every_kind_of_matrix_has_its_integers_and_its_range():
    run = g.RunConfig(matrix_bits=5, embed_bits=8, attn_clip_sigmas=10.0, mlp_clip_sigmas=9.0, embed_clip_sigmas=8.0)
    quantiser = g.RowQuantiser(run, clip_scale=1.5)
    expected = {"embed": (127, 12.0), "blocks.0.attention.o.weight": (15, 15.0), MLP: (15, 13.5)}
    assert {name: (quantiser.qmax(name), quantiser.clip(name)) for name in expected} == expected


def test_entropy_bytes_count_what_a_perfect_coder_needs():
    quantiser = g.RowQuantiser(g.RunConfig(), clip_scale=1.3)
    weights = {"embed": torch.randn(40, 50), MLP: torch.randn(20, 30)}
    expected = 0.0
    for w, clip, qmax in zip(weights.values(), (14.0, 11.5), (63, 31), strict=True):
        steps = (w.std(1) * clip * 1.3 / qmax).half().double().numpy()
        q = np.clip(np.round(w.double().numpy() / steps[:, None]), -qmax, qmax)
        counts = np.unique(q, return_counts=True)[1]
        expected += -(counts * np.log2(counts / q.size)).sum() / 8 + 2 * len(w)
    assert g.entropy_bytes(weights, quantiser) == pytest.approx(expected, rel=1e-4)
    assert g.entropy_bytes({"embed": torch.zeros(40, 50)}, quantiser) == 80  # the steps alone


def test_gaussian_bytes_foretell_the_entropy_of_gaussian_weights():
    quantiser = g.RowQuantiser(g.RunConfig())
    weight = torch.randn(200, 400)
    for name in ("embed", MLP):
        expected = quantiser.entropy_bytes(name, weight)
        assert quantiser.gaussian_bytes(name, weight.shape) == pytest.approx(expected, rel=0.01)


def natural_bytes(weights: dict[str, torch.Tensor], clip_scale: float = 1.0) -> float:
    return g.entropy_bytes(weights, g.RowQuantiser(g.RunConfig(), clip_scale))


def test_wider_ranges_need_fewer_bytes():
    sizes = [natural_bytes(matrices(a_model()), clip_scale) for clip_scale in (0.5, 0.7, 1.0, 2.0, 8.0, 64.0)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 6


def test_ranges_fit_the_budget_and_no_more():
    weights = matrices(a_model())
    run = g.RunConfig()
    scales = []
    for part in (1.2, 1.0, 0.8, 0.5):
        budget = part * natural_bytes(weights)
        scales.append(g.fit_clip_scale(weights, run, budget))
        assert 0.99 * budget < natural_bytes(weights, scales[-1]) <= budget
    assert scales == sorted(scales) and scales[0] < 1 < scales[-1]


def test_no_range_is_narrower_than_the_floor():
    run = g.RunConfig(quant_clip_floor=6.0, attn_clip_sigmas=13.0, mlp_clip_sigmas=10.0, embed_clip_sigmas=14.0)
    weights = matrices(a_model())
    quantiser = g.RowQuantiser(run, g.fit_clip_scale(weights, run, 1e12))
    assert min(map(quantiser.clip, weights)) == pytest.approx(6.0)


# ---- the artifact -----------------------------------------------------------


def hessians_of(model: g.GPT) -> dict[str, torch.Tensor]:
    return g.calibrate(model, [a_batch(1), a_batch(2)], g.Dist())


ORIGIN = {"tokenizer": "hash", "holdout_tokens": 0, "holdout": ""}


def artifact(model: g.GPT, **overrides) -> tuple[bytes, list[str]]:
    """-> (the packed model, the lines that were logged)"""
    lines: list[str] = []
    run = g.RunConfig(**overrides)
    dist = g.Dist()
    log = g.Log(screen=lines.append)
    return g.make_artifact(model, hessians_of(model), run, dist, g.Stopwatch(dist), ORIGIN, log), lines


@pytest.mark.parametrize("part", [1.1, 0.9, 0.7])
def test_an_artifact_fits_within_two_packs(part):
    model = a_model()
    scalars = sum(2 * p.numel() for n, p in model.named_parameters() if g.param_role(n) == "scalar")
    room = int(part * natural_bytes(matrices(model))) + scalars
    blob, lines = artifact(model, artifact_bytes=len(g.code()) + room)
    assert 0.9 * room < len(blob) <= room
    assert 1 <= sum(line.startswith("pack ") for line in lines) <= 2
    meta, stored = g.unpack(blob, "it")
    assert meta["kind"] == "artifact" and g.ModelConfig(**meta["model"]) == CONFIG and meta["tokenizer"] == "hash"
    g.restore(g.GPT(CONFIG), stored, "it")


def test_an_artifact_that_cannot_fit_says_by_how_much():
    limit = len(g.code()) + 3000
    with pytest.raises(g.UserError, match=f"ARTIFACT_BYTES={limit}") as error:
        artifact(a_model(), artifact_bytes=limit)
    size, code, over = (int(word) for word in str(error.value).split() if word.isdigit())
    assert code == len(g.code()) and over == size + code - limit > 0


def test_what_is_stored_is_restored():
    model = a_model()
    quantiser = g.RowQuantiser(g.RunConfig())
    stored = g.quantise(model, hessians_of(model), quantiser, g.Dist())
    restored = g.restore(a_model(seed=9), stored, "it")
    for (name, p), q in zip(model.named_parameters(), restored.parameters(), strict=True):
        if g.param_role(name) == "scalar":
            assert torch.equal(q, p.half().float()), name
            continue
        integers = stored[name]
        scale = stored[f"{name}.scale"].float()
        assert (
            integers.dtype == torch.int8
            and integers.shape == p.mT.shape
            and integers.abs().max() <= quantiser.qmax(name)
        )
        assert torch.equal(q, integers.mT.float() * scale[:, None]), name
        assert (p - q).square().mean().sqrt() < 2 * scale.mean(), name  # the weights themselves, not a mix-up


def test_a_quantised_network_predicts_nearly_as_before():
    model = a_model()
    batch = a_batch(3)[0]
    hessians = hessians_of(model)
    errors = []
    for bits in (8, 4):
        quantiser = g.RowQuantiser(g.RunConfig(matrix_bits=bits, embed_bits=bits), clip_scale=0.5)
        stored = g.quantise(model, hessians, quantiser, g.Dist())
        _, unpacked = g.unpack(g.pack({}, stored, level=3), "it")
        restored = g.restore(a_model(), unpacked, "it")
        errors.append((restored(*batch) - model(*batch)).abs().mean().item())
    assert 0 < 5 * errors[0] < errors[1] and errors[0] < 0.1


class NearestQuantiser(g.RowQuantiser):
    """Rounds to nearest, and stores integers as they lie, with the steps under another name."""

    @staticmethod
    def layout(name, shape):
        return {name: (torch.int8, shape), f"{name}.step": (torch.float16, shape[:1])}

    def encode(self, name, weight, hessian):
        steps = self.steps(name, weight)
        qmax = self.qmax(name)
        q = (weight / steps.float()[:, None]).round().clamp(-qmax, qmax)
        return {name: q.to(torch.int8), f"{name}.step": steps}

    @staticmethod
    def decode(name, stored):
        return stored[name].float() * stored[f"{name}.step"].float()[:, None]

    @staticmethod
    def kind_of(stored_name):
        return "steps" if stored_name.endswith(".step") else g.RowQuantiser.kind_of(stored_name)


def test_another_quantiser_is_one_class(monkeypatch, tmp_path):
    """Whatever stores, checks, restores and reports matrices asks the class that `Quantiser` names."""
    monkeypatch.setattr(g, "Quantiser", NearestQuantiser)
    model = a_model()
    blob, _ = artifact(model)
    path = tmp_path / "it.ptz"
    path.write_bytes(blob)
    parts = g.part_bytes(path)
    assert "scales" not in parts and parts["steps"] > 0

    _, stored = g.unpack(blob, "it")
    restored = dict(g.restore(a_model(seed=9), stored, "it").named_parameters())
    for name, weight in matrices(model).items():
        half_steps = stored[f"{name}.step"].float()[:, None] / 2
        assert ((weight - restored[name]).abs() <= 1.001 * half_steps).all(), name

    monkeypatch.undo()
    with pytest.raises(g.DataError, match=r"^it: "):
        g.restore(a_model(), stored, "it")


# ---- calibration ------------------------------------------------------------


def test_calibration_sees_every_matrix():
    model = a_model()
    hessians = hessians_of(model)
    assert set(hessians) == set(matrices(model))
    for name, h in hessians.items():
        assert h.shape == (matrices(model)[name].size(1),) * 2 and h.diagonal().min() > 0, name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hessians_are_sums_over_all_tokens_and_layer_passes():
    model = a_model()
    batches = [a_batch(1), a_batch(2)]
    hessians = g.calibrate(model, batches, g.Dist())
    seen: dict[str, list] = {n: [] for n in (PASSED_TWICE, "blocks.0.mlp.down.weight", "blocks.3.attention.o.weight")}
    for name, inputs in seen.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        if name == PASSED_TWICE:  # q, k and v are multiplied together, by the attention that holds them
            module = model.get_submodule(name.removesuffix(".q.weight"))
        plain = module.forward
        module.forward = lambda x, *rest, plain=plain, inputs=inputs: (inputs.append(x.detach()), plain(x, *rest))[1]
    seen["embed"] = [model.hidden(p.tokens, p.segments)[0].detach() for batch in batches for p in batch]
    for name, inputs in seen.items():
        assert len(inputs) == 4 * (2 if name == PASSED_TWICE else 1)  # four micro-batches
        x = torch.cat(inputs, 1)[0].double()
        torch.testing.assert_close(hessians[name].double(), x.T @ x, rtol=1e-5, atol=1e-4)


class Functional(g.MLP):
    """Uses the weight of a module that it never calls."""

    def forward(self, x, scale, lora=None):
        hidden = torch.nn.functional.linear(x, self.up.weight)
        return self.down(hidden.square(), None, scale)


def test_a_matrix_that_saw_no_input_is_refused_by_name():
    """GPTQ would store it as zeros, and say nothing."""
    model = a_model()
    weights = model.blocks[2].mlp.state_dict()
    model.blocks[2].mlp = Functional(CONFIG)
    model.blocks[2].mlp.load_state_dict(weights)
    with pytest.raises(g.UserError, match=r"no input of blocks\.2\.mlp\.up\.weight:"):
        hessians_of(model)


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
    assert not hessians_of(model)["blocks.1.mlp.down.weight"].diagonal()[:5].any()


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dist = g.Dist(rank, 2)
    model = a_model()
    hessians = g.calibrate(model, [a_batch(rank)], dist)
    stored = g.quantise(model, hessians, g.RowQuantiser(g.RunConfig()), dist)
    torch.save((hessians, stored), f"{folder}/{rank}.pt")
    dist.close()


def test_two_ranks_calibrate_on_all_text_and_share_the_rounding(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    (hessians, stored), (others, stored_there) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = a_model()
    parts = [g.calibrate(model, [a_batch(rank)], g.Dist()) for rank in range(2)]
    alone = g.quantise(model, hessians, g.RowQuantiser(g.RunConfig()), g.Dist())
    for name, h in hessians.items():
        assert torch.equal(h, others[name])
        torch.testing.assert_close(h, parts[0][name] + parts[1][name], rtol=1e-5, atol=1e-4)
    assert list(stored) == list(alone) == list(stored_there)
    for name, t in alone.items():
        assert torch.equal(stored[name], stored_there[name]) and stored[name].dtype == t.dtype
        assert (stored[name] == t).float().mean() > 0.99, name  # threads may tip a value between two integers
