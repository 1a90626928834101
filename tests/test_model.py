"""The network: causal bit by bit, documents kept apart, every mechanism there or off, and equal to its formula."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as g

# Every mechanism is on: 7 layer passes through blocks 0,1,2,1,2,3,4, of which three push skips and three pop them; the
# last two have parallel streams.
TINY = dict(vocab_size=64, model_dim=32, num_layers=5, num_heads=4, num_kv_heads=2, mlp_mult=2, rope_dims=4)
TINY |= dict(xsa_last_n=3, attn_gate_width=6, smear_width=6, unet_skips=8, parallel_start_layer=3)
TINY |= dict(num_loops=1, loop_start=1, loop_end=2)
OFF = ("smear_width", "attn_gate_width", "xsa_last_n", "rope_dims", "num_loops", "unet_skips", "parallel_start_layer")
OFF += ("logit_softcap", "ln_scale_power", "mlp_leaky_slope", "attn_gate_scale")


def lively(**changes) -> g.GPT:
    """A model of which no part is neutral, as the start of training would leave many."""
    model = g.GPT(g.ModelConfig(**TINY | changes))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        matrix = g.param_role(name) == "matrix"
        p.data = noise / p.size(1) ** 0.5 if matrix else noise if name == "embed" else p.data + 0.4 * noise
    return model.requires_grad_(False)


def some_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Rows of random pieces without BOS."""
    return torch.randint(2, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(tokens: torch.Tensor, starts: list[int]) -> g.Segments:
    """The segments of a packed row (1, N)."""
    text = tokens[0].numpy()
    return g.make_micro_batch(text, text, np.array(starts), torch.device("cpu")).segments


def states(model: g.GPT, *arguments, **options) -> torch.Tensor:
    """What enters the output head."""
    return model.hidden(*arguments, **options)[0]


def embedded(model: g.GPT, tokens: torch.Tensor) -> torch.Tensor:
    """What enters the first block."""
    seen: list[torch.Tensor] = []
    with model.input.register_forward_hook(lambda module, arguments, output: seen.append(output)):
        states(model, tokens)
    return seen[0]


# ---- kernels and references -----------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("off", [{}, dict(attn_gate_width=0, logit_softcap=0.0)], ids=["all", "no gate, no cap"])
def test_the_network_learns_the_same_through_kernels_and_through_their_references(monkeypatch, off):
    """Loss and gradient of every parameter, with the kernels where a GPU has them."""
    pytest.importorskip("triton")
    small = dict(
        num_layers=2, loop_start=0, loop_end=0, xsa_last_n=1, parallel_start_layer=1
    )  # the interpreter is slow
    model = lively(num_heads=2, num_kv_heads=1, **small, **off).requires_grad_()
    tokens = some_tokens(1, 90)
    starts = [0, 3, 70]
    tokens[0, starts] = g.BOS
    segments = packed(tokens, starts)

    def nll_and_gradients() -> list[torch.Tensor]:
        nll = model(tokens, tokens.roll(-1, 1), segments)
        return [nll.detach(), *torch.autograd.grad(nll.square().sum(), list(model.parameters()))]

    expected = nll_and_gradients()
    monkeypatch.setattr(g, "use_kernels", lambda x: True)
    monkeypatch.setattr(g, "MIX_PROGRAMS", 8)  # not as many as fill a GPU, with nothing to do
    for reference in ("attention_reference", "loss_reference"):
        monkeypatch.delattr(g, reference)
    for name, a, b in zip(["nll", *dict(model.named_parameters())], nll_and_gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


# ---- who sees what ----------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 20, 31])
@pytest.mark.parametrize("looping", [True, False])
def test_a_row_does_not_see_what_comes_later(cut, looping):
    model = lively()
    tokens = some_tokens(3, 32)
    changed = torch.cat([tokens[:, :cut], some_tokens(3, 32, seed=1)[:, cut:]], 1)
    before, after = (states(model, t, looping=looping) for t in (tokens, changed))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert (before[:, cut] != after[:, cut]).any()


@pytest.mark.parametrize("cut", [1, 12, 13, 14, 20, 28, 29, 30, 47])
def test_a_packed_row_does_not_see_what_comes_later(cut):
    model = lively()
    tokens = some_tokens(1, 48)
    starts = [0, 13, 29]
    tokens[0, starts] = g.BOS
    changed = tokens.clone()
    changed[0, cut:] = some_tokens(1, 48, seed=1)[0, cut:]
    before, after = (states(model, t, packed(tokens, starts)) for t in (tokens, changed))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert (before[:, cut] != after[:, cut]).any()


def test_a_document_in_a_packed_row_is_as_it_is_alone():
    model = lively()
    tokens = some_tokens(1, 48)
    starts = [0, 13, 29]
    ends = [13, 29, 48]
    tokens[0, starts] = g.BOS
    together = states(model, tokens, packed(tokens, starts))
    for begin, end in zip(starts, ends, strict=True):
        alone = states(model, tokens[:, begin:end])
        torch.testing.assert_close(together[:, begin:end], alone, rtol=0, atol=2e-6)
    changed = tokens.clone()
    changed[0, 14:29] = some_tokens(1, 48, seed=1)[0, 14:29]  # the document in the middle
    other = states(model, changed, packed(tokens, starts))
    assert torch.equal(together[:, :14], other[:, :14]) and torch.equal(together[:, 29:], other[:, 29:])


@pytest.mark.parametrize("before_cut", [15, 31])
def test_a_segment_cut_at_the_context_length_does_not_see_before(before_cut):
    """A segment may begin in the middle of a document: what stands before it may be another document's."""
    model = lively()
    tokens = some_tokens(1, 48)
    starts = g.segment_starts(tokens[0].numpy(), 48, 16).tolist()
    assert starts == [0, 16, 32]
    changed = tokens.clone()
    changed[0, before_cut] = 2 + (tokens[0, before_cut] - 1) % 62
    first, second = (states(model, t, packed(t, starts)) for t in (tokens, changed))
    assert (first[:, before_cut] != second[:, before_cut]).any()
    assert torch.equal(first[:, before_cut + 1 :], second[:, before_cut + 1 :])


def test_bos_never_smears_the_document_before():
    model = lively()
    tokens = some_tokens(2, 20)
    tokens[:, 9] = g.BOS
    changed = tokens.clone()
    changed[:, :9] = some_tokens(2, 20, seed=1)[:, :9]
    same = changed[:, 8] == tokens[:, 8]
    assert not same.any()
    first, second = (embedded(model, t) for t in (tokens, changed))
    assert torch.equal(first[:, 9:], second[:, 9:])
    changed[:, 10] = 2 + (tokens[:, 10] - 1) % 62  # any other token does see the one before it
    third = embedded(model, changed)
    assert (third[:, 11] != second[:, 11]).any(-1).all() and torch.equal(third[:, 12:], second[:, 12:])


def test_the_targets_of_the_last_tokens_are_a_slice_of_all():
    model = lively()
    text = some_tokens(2, 33)
    whole = model(text[:, :-1], text[:, 1:])
    assert whole.shape == (2, 32)
    for n in (1, 9, 32):
        torch.testing.assert_close(model(text[:, :-1], text[:, -n:]), whole[:, -n:], rtol=0, atol=5e-6)


# ---- the parts, against their formulas --------------------------------------


def attention_reference(q, k, v, first):
    """Softmax over an explicit mask; first[t]: where token t's segment begins. (T, H, h), (T, K, h) twice, float64."""
    T, H, h = q.shape
    out = np.zeros_like(q)
    for t in range(T):
        for head in range(H):
            kv = head // (H // k.shape[1])
            scores = k[first[t] : t + 1, kv] @ q[t, head] / np.sqrt(h)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ v[first[t] : t + 1, kv] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("starts", [None, [0, 5, 6, 17]])
def test_attention_is_a_masked_softmax(kv_heads, starts):
    T = 24
    rows = 3 if starts is None else 1
    q, k, v = (torch.randn(rows, T, heads, 8) for heads in (4, kv_heads, kv_heads))
    got = g.attend(q, k, v, None if starts is None else packed(some_tokens(1, T), starts))
    first = [max(s for s in starts or [0] if s <= t) for t in range(T)]
    for row in range(rows):
        want = attention_reference(*(x[row].double().numpy() for x in (q, k, v)), first)
        np.testing.assert_allclose(got[row].numpy(), want, atol=2e-6)


def test_rotation_is_a_complex_product():
    x = torch.randn(2, 7, 3, 10)
    positions = torch.tensor([0, 1, 2, 0, 1, 5, 1000])
    dims = 6
    base = 100.0
    got = g.apply_rope(x, *g.rope_angles(positions, dims, base)).double().numpy()
    z = x[..., :3].double().numpy() + 1j * x[..., 3:6].double().numpy()
    angle = positions.numpy()[:, None, None] * base ** (-np.arange(3) / 3)
    z = z * np.exp(1j * angle)
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag, x[..., 6:]], -1), atol=1e-4)
    np.testing.assert_array_equal(got[:, [0, 3]], x.double().numpy()[:, [0, 3]])


@pytest.mark.parametrize("xsa", [True, False])
def test_xsa_removes_the_component_along_the_own_value(xsa):
    attention = lively(xsa_last_n=5 if xsa else 0).blocks[0].attention
    attention.o.weight.data = torch.eye(32)
    n = torch.randn(2, 12, 32)
    rope = g.rope_angles(torch.arange(12), 4, 10000.0)
    y = attention(n, n[..., : attention.gate_width], torch.ones(32), rope, None, g.NO_LORA)[0].view(2, 12, 4, 8)
    own = attention.v(n).view(2, 12, 2, 8).repeat_interleave(2, 2)
    said = (y * own).sum(-1).abs()
    assert (said.max() < 1e-5) if xsa else (said.mean() > 0.1)


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def block_reference(block, c, index, a, m, x0):
    """One layer pass in numpy, float64, by the formulas: streams (T, D) -> (a, m); m is None in a plain block."""
    p = SimpleNamespace(**{n.replace(".", "_"): t.double().numpy() for n, t in block.named_parameters()})
    T = len(a)
    H = c.num_heads
    K = c.num_kv_heads
    h = c.head_dim
    x = p.input_mix[0] * a + p.input_mix[1] * x0
    n = rms(x) / (index + 1) ** c.ln_scale_power
    q, k, v = (n @ w.T for w in (p.attention_q_weight, p.attention_k_weight, p.attention_v_weight))
    q = rms(q.reshape(T, H, h))
    k = rms(k.reshape(T, K, h))
    v = v.reshape(T, K, h)
    half = c.rope_dims // 2
    turn = np.exp(1j * np.arange(T)[:, None, None] * c.rope_base ** (-np.arange(half) / half))
    for z in (q, k):
        pair = (z[..., :half] + 1j * z[..., half : 2 * half]) * turn
        z[..., :half] = pair.real
        z[..., half : 2 * half] = pair.imag
    y = attention_reference(q * p.attention_q_gain[:, None], k, v, [0] * T)
    if index >= c.num_layers - c.xsa_last_n:
        own = np.repeat(v, H // K, 1)
        y = y - (y * own).sum(-1, keepdims=True) / (own * own).sum(-1, keepdims=True) * own
    y = y * sigmoid(c.attn_gate_scale * n[:, : c.attn_gate_width] @ p.attention_gate.T)[..., None]
    attn = p.attn_scale * (y.reshape(T, -1) @ p.attention_o_weight.T)

    def mlp(x):
        u = rms(x) / (index + 1) ** c.ln_scale_power @ p.mlp_up_weight.T
        return p.mlp_scale * (np.where(u > 0, u, c.mlp_leaky_slope * u) ** 2 @ p.mlp_down_weight.T)

    if m is None:
        x = x + attn
        return x + mlp(x), None
    mlp_out = mlp(m)
    keep = p.lane_keep
    mix = p.lane_mix
    return keep[0] * a + mix[0, 0] * attn + mix[0, 1] * mlp_out, keep[1] * m + mix[1, 0] * attn + mix[1, 1] * mlp_out


@pytest.mark.parametrize("index", [1, 2, 4])  # plain; with XSA; with XSA and parallel streams
def test_a_block_is_its_formula(index):
    model = lively()
    block = model.blocks[index]
    c = model.config
    a, m, x0 = torch.randn(3, 1, 20, 32)
    rope = g.rope_angles(torch.arange(20), c.rope_dims, c.rope_base)
    streams = (a, m) if block.parallel else (a,)
    *got, new_kv = block(*streams, x0, rope, None, g.NO_LORA)
    assert new_kv is None
    exact = [None if x is None else x[0].double().numpy() for x in (a, m if block.parallel else None, x0)]
    want = block_reference(block, c, index, *exact)
    assert block.parallel == (index >= 3)
    for one, other in zip(got if block.parallel else [*got, None], want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one[0].numpy(), other, rtol=1e-4, atol=1e-4)


def test_the_input_is_its_formula():
    model = lively()
    tokens = some_tokens(1, 12)
    tokens[0, [0, 5]] = g.BOS
    e = model.embed[tokens[0]].double().numpy()
    w = model.input.smear.double().numpy()
    gate = model.input.smear_gain.item() * sigmoid(e[:, :6] @ w) * (tokens[0].numpy() != g.BOS)
    want = rms(e + gate[:, None] * np.concatenate([e[:1] * 0, e[:-1]]))
    np.testing.assert_allclose(embedded(model, tokens)[0].numpy(), want, atol=1e-5)


def test_the_head_is_its_formula():
    model = lively()
    x = 8 * torch.randn(1, 9, 32)
    targets = some_tokens(1, 9)
    z = 30 * np.tanh(x[0].double().numpy() @ model.embed.double().numpy().T / 30)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    nll = model.head(x, targets, model.embed)
    entropy = model.head.entropy(x, model.embed)
    np.testing.assert_allclose(nll[0].numpy(), -log_p[np.arange(9), targets[0].numpy()], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy[0].numpy(), -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_trunk_is_wired_as_planned():
    """The seven layer passes of this configuration, written out."""
    model = lively()
    tokens = some_tokens(2, 16)
    blocks = model.blocks
    rope = g.rope_angles(torch.arange(16), 4, 10000.0)
    x0 = embedded(model, tokens)

    def taken_back(x, saved, row):
        part = model.skip_gate[row].sigmoid()
        return part * x + (1 - part) * model.skip_weight[row] * saved

    def run(index, *streams):
        *streams, _ = blocks[index](*streams, x0, rope, None, g.NO_LORA)
        return streams

    (one,) = run(0, x0)
    (two,) = run(1, one)
    (three,) = run(2, two)
    (a,) = run(1, taken_back(three, three, 0))
    (a,) = run(2, taken_back(a, two, 1))
    a, m = run(3, taken_back(a, one, 2), a)
    a, m = run(4, a, m)
    torch.testing.assert_close(states(model, tokens), g.norm((a + m) / 2), rtol=1e-4, atol=1e-5)


# ---- the layer plan -----------------------------------------------------


def test_the_plan_of_the_default_network():
    looped, plain = (g.layer_plan(g.ModelConfig(), looping) for looping in (True, False))
    assert [layer.block for layer in looped] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [i for i, layer in enumerate(looped) if layer.pushes_skip] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [layer.pops_skip for layer in looped] == [None] * 8 + [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [layer.block for layer in plain] == list(range(11))
    assert [i for i, layer in enumerate(plain) if layer.pushes_skip] == [0, 1, 2, 3, 4]
    assert [layer.pops_skip for layer in plain] == [None] * 5 + [0, 1, 2, 3, 4, None]


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("skips", [0, 1, 2, 8])
@pytest.mark.parametrize("loops", [0, 1, 3])
def test_every_plan_gives_back_what_it_saves(layers, skips, loops):
    config = g.ModelConfig(num_layers=layers, unet_skips=skips, num_loops=loops, loop_start=0, loop_end=layers // 2)
    for looping in (True, False):
        plan = g.layer_plan(config, looping)
        saved = []
        assert len(plan) == layers + looping * loops * (layers // 2 + 1)
        for i, layer in enumerate(plan):
            if layer.pops_skip is not None:
                assert i > saved.pop()
            if layer.pushes_skip:
                saved.append(i)
        assert saved == []
        taken = [layer.pops_skip for layer in plan if layer.pops_skip is not None]
        assert taken == list(range(min(skips, len(plan) // 2)))


# ---- mechanisms and parameters ----------------------------------------------


@pytest.mark.parametrize("knob", OFF)
def test_every_mechanism_has_an_effect_and_0_turns_it_off(knob):
    on = lively()
    off = lively(**{knob: 0})
    for name, p in off.named_parameters():  # the same weights in both, as far as both have them
        theirs = dict(on.named_parameters()).get(name)
        if theirs is not None:
            p.data = theirs[: len(p)].clone()
    text = some_tokens(2, 33)
    with_it, without = (m(text[:, :-1], text[:, 1:]) for m in (on, off))
    assert without.isfinite().all()
    assert (with_it - without).abs().max() > 1e-3
    assert states(off, text, looping=False).isfinite().all()


def test_everything_off_is_a_plain_transformer():
    model = lively(**dict.fromkeys(OFF, 0))
    assert [layer.block for layer in g.layer_plan(model.config, looping=True)] == [0, 1, 2, 3, 4]
    x = x0 = g.norm(model.embed[some_tokens(1, 9)])
    for block in model.blocks:
        x, _ = block(x, x0, g.rope_angles(torch.arange(9), 0, 10000.0), None, g.NO_LORA)
    torch.testing.assert_close(states(model, some_tokens(1, 9)), g.norm(x))


def test_the_default_network_has_its_35_945_623_parameters():
    with torch.device("meta"):
        model = g.GPT(g.ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 35_945_623


@pytest.mark.parametrize("off", [None, *OFF])
def test_every_parameter_learns(off):
    model = lively(**{off: 0} if off else {})
    text = some_tokens(2, 33)
    model.requires_grad_(True)
    model(text[:, :-1], text[:, 1:]).mean().backward()
    silent = [n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]
    assert silent == ([f"blocks.{i}.attention.gate" for i in range(5)] if off == "attn_gate_scale" else [])
    if off is None:
        assert model.skip_weight.grad.any(1).all() and model.skip_gate.grad.any(1).all()


def test_every_parameter_has_exactly_one_role():
    model = lively()
    roles = {name: g.param_role(name) for name, _ in model.named_parameters()}
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, g.Linear)}
    assert {n for n, role in roles.items() if role == "matrix"} == matrices
    assert {n for n, role in roles.items() if role == "embedding"} == {"embed"}
    assert set(Counter(roles.values())) == {"embedding", "matrix", "scalar"}
    assert all(p.ndim == 2 for n, p in model.named_parameters() if roles[n] != "scalar")


def test_initial_weights_follow_from_the_seed_alone():
    models = [g.GPT(g.ModelConfig(**TINY)) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.rand(1)  # the global generator has no say
        g.init_weights(model, seed)
    one, two, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["embed"], other["embed"])
    for name, p in one.items():
        if name.endswith(("attention.o.weight", "mlp.down.weight")):
            assert not p.any(), name
        elif g.param_role(name) == "matrix":
            small = p if p.size(0) <= p.size(1) else p.mT
            torch.testing.assert_close(small @ small.mT, torch.eye(len(small)), rtol=0, atol=1e-5)
    assert 0.004 < one["embed"].std() < 0.006


# ---- compilation and adapters -----------------------------------------------


def some_lora(rows: int, config: g.ModelConfig, rank: int = 3) -> g.LayerLoRA:
    width = {"k": config.kv_dim, "v": config.kv_dim}

    def of(target: str) -> g.LoRA:
        return g.LoRA(torch.randn(rows, 32, rank) / 6, torch.randn(rows, rank, width.get(target, 32)) / 6, 0.7)

    return g.LayerLoRA(*map(of, g.LayerLoRA._fields))


@pytest.mark.parametrize("index", [2, 4])
def test_blocks_compile_without_a_graph_break(index):
    model = lively()
    block = model.blocks[index]
    rope = g.rope_angles(torch.arange(10), 4, 10000.0)
    streams = torch.randn(3 if block.parallel else 2, 2, 10, 32).unbind()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for lora in (g.NO_LORA, some_lora(2, model.config)):
        got, expected = (run(*streams, rope, None, lora)[:-1] for run in (compiled, block))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("capability, tma", [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_before_hopper_compiled_blocks_do_without_the_copy_engine(monkeypatch, capability, tma):
    """Else the compiler would break their graphs at its descriptors."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert g.has_tma(torch.device("cuda", 0)) == tma and not g.has_tma(torch.device("cpu"))
    model = lively()
    assert all(block.mlp.may_fuse for block in model.blocks)
    monkeypatch.setattr(g, "has_tma", lambda device: tma)
    g.compile_parts(model)
    assert all(block.mlp.may_fuse == tma for block in model.blocks)


def new_adapter(model: g.GPT, rows: int) -> g.Adapter:
    return g.Adapter(model.config, g.RunConfig(ttt_lora_rank=3, ttt_lora_alpha=6.0), rows, torch.device("cpu"))


def test_a_new_adapter_changes_nothing():
    model = lively()
    text = some_tokens(3, 25)
    plain = model(text[:, :-1], text[:, 1:])
    assert torch.equal(plain, model(text[:, :-1], text[:, 1:], adapter=new_adapter(model, 3)))


def test_every_correction_is_used():
    model = lively()
    text = some_tokens(3, 25)
    adapter = new_adapter(model, 3)
    ups = {f"pass {i} {t}": getattr(layer, t).up for i, layer in enumerate(adapter.passes) for t in g.LayerLoRA._fields}
    ups |= {"head": adapter.head.up}
    assert len(ups) == 7 * 5 + 1
    model(text[:, :-1], text[:, 1:], adapter=adapter).sum().backward()
    assert [name for name, up in ups.items() if up.grad is None or not up.grad.flatten(1).any(1).all()] == []


@pytest.mark.parametrize("index", [2, 4])
@pytest.mark.parametrize("target", ["q", "k", "v", "o"])
def test_a_correction_is_a_change_of_the_weight(index, target):
    model = lively()
    block = model.blocks[index]
    rope = g.rope_angles(torch.arange(10), 4, 10000.0)
    streams = torch.randn(3 if block.parallel else 2, 2, 10, 32).unbind()
    lora = getattr(some_lora(2, model.config), target)
    corrected = torch.stack(block(*streams, rope, None, g.LayerLoRA(**{target: lora}))[:-1]).view(-1, 2, 10, 32)
    weight = getattr(block.attention, target).weight
    original = weight.clone()
    for row in range(2):  # each row has a correction of its own
        weight.data = original + 0.7 * (lora.down[row] @ lora.up[row]).mT
        merged = torch.stack(block(*streams, rope, None, g.NO_LORA)[:-1]).view(-1, 2, 10, 32)
        torch.testing.assert_close(corrected[:, row], merged[:, row], rtol=1e-4, atol=1e-4)


def test_corrections_of_mlp_and_head_stand_beside_them():
    model = lively()
    x = torch.randn(2, 10, 32)
    targets = some_tokens(2, 10)
    lora = some_lora(2, model.config).mlp
    beside = torch.einsum("bro,bir,bti->bto", lora.up, lora.down, x) * 0.7
    mlp = model.blocks[0].mlp
    scale = torch.rand(32)
    torch.testing.assert_close(mlp(x, scale, lora), mlp(x, scale) + scale * beside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mlp(x, scale), mlp(x, torch.ones(32)) * scale, rtol=1e-4, atol=1e-4)
    head_lora = g.LoRA(lora.down, torch.randn(2, 3, 64) / 6, 0.7)
    for row in range(2):
        merged = model.embed + 0.7 * (head_lora.down[row] @ head_lora.up[row]).mT
        got = model.head(x, targets, model.embed, head_lora)[row]
        want = model.head(x, targets, merged)[row]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
