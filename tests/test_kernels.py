"""Every kernel against its plain twin, forward and backward: on a CPU in Triton's interpreter, on a GPU as compiled."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as g

pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's twin test follows")
ATTENTION = [  # tokens, query heads, key heads, head width, rotated dimensions, starts of segments
    pytest.param(300, 4, 2, 16, 8, [0, 3, 4, 130, 200, 299], id="tiles that hold several segments, one not full"),
    pytest.param(128, 2, 1, 32, 32, [0], id="one segment, one key head, all dimensions turn"),
    pytest.param(257, 2, 2, 16, 6, [0, 100, 256], id="a token beyond the last full tile, no sharing of heads"),
    pytest.param(40, 3, 1, 16, 0, list(range(40)), id="every token a segment, no dimension turns"),
    pytest.param(5, 8, 4, 64, 16, [0, 2], id="fewer tokens than a tile"),
]
LARGE = pytest.param(4096, 8, 4, 64, 16, [0, 1, 900, 2948], id="large")
MLPS = [  # tokens, width, hidden width, slope
    pytest.param(130, 64, 256, 0.5, id="a token beyond the last full tile"),
    pytest.param(5, 48, 40, 0.0, id="fewer tokens and outputs than a tile, a width that no step divides, plain ReLU"),
    pytest.param(300, 16, 1040, 1.0, id="a width less than a step, no kink"),
]
MIXES = [  # rows, tokens, width, columns that open gates
    pytest.param(1, 75, 16, 12, id="more rows than all programs take at once"),
    pytest.param(3, 5, 48, 0, id="a width that is no power of two, no gates"),
    pytest.param(2, 1, 64, 64, id="few rows, all columns open gates"),
]
LOSSES = [
    pytest.param(7, 64, 30.0, id="a power of two"),
    pytest.param(5, 1000, 3.0, id="a vocabulary of any size, a narrow cap"),
    pytest.param(3, 17, 0.0, id="no cap"),
]


def close(ours, twin, names: str, tolerance: float) -> None:
    """Within the tolerance, relative to the largest of what is compared. The gradient of a gain gets tenfold: it is a
    sum over tokens and scores that nearly cancel."""
    for name, a, b in zip(names.split(), ours, twin, strict=True):
        atol = (
            tolerance * max(1.0, b.detach().abs().amax().item() if b.numel() else 0.0) * (10 if name == "d_gain" else 1)
        )
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def attention_pair(N, H, K, h, dims, starts, device, dtype, exclusive=True):
    """Output and gradients of kernel and twin."""
    random = torch.Generator().manual_seed(N)
    shapes = (N, (H + 2 * K) * h), (H,), (N, H), (N, H * h)
    qkv, gain, gate, slope = (torch.randn(shape, generator=random) for shape in shapes)
    gain, slope = gain.to(device) + 2.0, slope.to(device, dtype)
    inputs = [qkv.to(device, dtype), gain, gate.sigmoid().to(device, dtype)]
    row, heads = np.zeros(N, np.uint16), g.HeadLayout(exclusive, H, K, h)
    segments = g.make_micro_batch(row, row, np.array(starts), torch.device(device)).segments
    rope = g.rope_angles(segments.positions, dims, 100.0)

    def ours(qkv, gain, gate):
        return g.FusedAttention.apply(qkv, gain, gate, *(t[:, 0] for t in rope), segments, heads)

    def twin(qkv, gain, gate):
        return g.attention_reference(qkv[None], gain, gate[None], rope, segments, heads)[0]

    found = []
    for f, kind in ((ours, dtype), (twin, torch.float32)):  # rounded like ours, the twin would err more than it
        given = [x.detach().to(kind).requires_grad_() for x in inputs]
        given[1] = gain.requires_grad_()
        out = f(*given)
        found.append([t.to(dtype) for t in (out, *torch.autograd.grad(out, given, slope.to(kind)))])
    return *found, "out d_qkv d_gain d_gate"


def loss_pair(tokens, vocab, cap, device, dtype):
    random = torch.Generator().manual_seed(tokens)
    z = (8 * torch.randn(tokens, vocab, generator=random)).to(device, dtype).requires_grad_()
    targets, slope = torch.randint(vocab, (tokens,), generator=random).to(device), torch.arange(tokens, device=device)
    found = []
    for f in (g.FusedLoss.apply, g.loss_reference):
        nll = f(z, targets, cap)
        found.append([nll, *torch.autograd.grad(nll, [z], slope.float())])
    return *found, "nll d_z"


def both(ours, twin, inputs, slopes, fixed, names):
    """Results and gradients of both, the twin's in fp32: `slopes` of the results, `fixed` what needs no gradient."""
    found = []
    for f, kind in ((ours, None), (twin, torch.float32)):
        given = [x.detach().to(kind or x.dtype).requires_grad_() for x in inputs]
        out = f(*given, *fixed)
        out = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(out, given, [slope.to(y.dtype) for slope, y in zip(slopes, out, strict=True)])
        found.append([t.to(like.dtype) for t, like in zip((*out, *grads), (*slopes, *inputs), strict=True)])
    return *found, names


def mlp_pair(N, D, W, slope, device, dtype):
    random = torch.Generator().manual_seed(N)
    shapes = (N, D), (W, D), (D, W), (N, D)
    x, up, down, d_y = (torch.randn(s, generator=random).to(device, dtype) / s[1] ** 0.5 for s in shapes)

    def twin(x, up, down, slope):
        return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)

    return both(g.FusedMLP.apply, twin, (x, up, down), (d_y,), (slope,), "y d_x d_up d_down")


def mix_pair(B, T, D, gating, device, dtype):
    random = torch.Generator().manual_seed(D)
    x, x0, d_y, d_n = (torch.randn(B, T, D, generator=random).to(device, dtype) for _ in range(4))
    d_first, mix = torch.randn(B, T, gating, generator=random).to(device, dtype), torch.randn(2, D, generator=random)
    given = (x, x0, mix.to(device)), (d_y, d_n, d_first), (torch.tensor(0.7, device=device), gating)
    return both(g.FusedMix.apply, g.mix_reference, *given, "y n gating d_x d_x0 d_mix")


@on_cpu
@pytest.mark.parametrize("N, D, W, slope", MLPS)
def test_the_mlp_is_its_twin(N, D, W, slope):
    close(*mlp_pair(N, D, W, slope, "cpu", torch.float32), 1e-5)


@on_cpu
@pytest.mark.parametrize("B, T, D, gating", MIXES)
def test_the_mix_is_its_twin(B, T, D, gating, monkeypatch):
    monkeypatch.setattr(g, "MIX_PROGRAMS", 7)  # the interpreter runs them one after another
    close(*mix_pair(B, T, D, gating, "cpu", torch.float32), 2e-5)


@on_cpu
def test_a_pass_with_all_kernels_learns_what_one_without_learns(tiny_config, monkeypatch):
    """Whatever is learnt from, what lies beside a kernel in memory, and which gradients add up where."""
    model, (tokens, targets) = g.GPT(tiny_config), torch.randint(2, 64, (2, 1, 70))
    g.init_weights(model, seed=1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    row = np.zeros(70, np.uint16)
    segments = g.make_micro_batch(row, row, np.array([0, 9, 64]), torch.device("cpu")).segments
    found, names = [], [name for name, _ in model.named_parameters()]
    monkeypatch.setattr(g, "MIX_PROGRAMS", 3)
    for ours in (True, False):
        monkeypatch.setattr(g, "use_kernels", lambda _, ours=ours: ours)
        nll = model(tokens, targets, segments)
        found.append([nll, *torch.autograd.grad(nll.sum(), list(model.parameters()))])
    close(*found, "nll " + " ".join(names), 1e-4)


@on_cpu
def test_the_kernels_of_training_serve_nobody_else(tiny_config, monkeypatch):
    """Without gradients, and where corrections alone adapt, the MLP and the mix are those that calibration hears."""
    monkeypatch.setattr(g, "use_kernels", lambda _: True)
    x, weight = torch.zeros(1), torch.nn.Parameter(torch.zeros(1))
    assert g.use_training_kernels(x, weight) and not g.use_training_kernels(x, weight.detach())
    with torch.no_grad():
        assert not g.use_training_kernels(x, weight)


@on_cpu
@pytest.mark.parametrize("N, H, K, h, dims, starts", ATTENTION)
def test_packed_attention_is_its_twin(N, H, K, h, dims, starts):
    close(*attention_pair(N, H, K, h, dims, starts, "cpu", torch.float32), 1e-5)


@on_cpu
def test_packed_attention_without_xsa_is_its_twin():
    close(*attention_pair(70, 4, 2, 16, 8, [0, 9], "cpu", torch.float32, exclusive=False), 1e-5)


@on_cpu
@pytest.mark.parametrize("tokens, vocab, cap", LOSSES)
def test_the_loss_is_its_twin(tokens, vocab, cap):
    close(*loss_pair(tokens, vocab, cap, "cpu", torch.float32), 1e-5)


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


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
import train_gpt as g

class Absent:  # a GPU that kernels are compiled for, but not run on
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)

def launcher(kernel, grid):
    def launch(*given, **options):
        made = kernel.warmup(*given, grid=grid, **options)
        print(kernel.__name__, made.metadata.shared)
    return launch

triton.runtime.driver.set_active(Absent())
JITFunction.__getitem__ = launcher
made = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
for width in map(int, sys.argv[2:]):
    t, angles = torch.zeros(128, dtype=torch.int32), torch.zeros(128, 8)
    given = made(128, 8 * width), torch.ones(4, requires_grad=True), made(128, 4), angles, angles
    g.FusedAttention.apply(*given, g.Segments(t, t), g.HeadLayout(True, 4, 2, width)).sum().backward()
g.FusedMLP.apply(made(256, 512), made(2048, 512), made(512, 2048), 0.5).sum().backward()
mix = torch.ones(2, 512, requires_grad=True)
sum(t.sum() for t in g.FusedMix.apply(made(1, 64, 512), made(1, 64, 512), mix, torch.ones(()), 12)).backward()
z = made(2, 8192)
g.FusedLoss.apply(z, torch.zeros(2, dtype=torch.int64), 30.0).sum().backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability, room", [(80, 166_912), (86, 101_376), (90, 232_448)])
def test_kernels_compile_for_a_gpu_and_fit_its_shared_memory(capability, room, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(g.__file__).parent)}
    command = [sys.executable, "-c", COMPILE, str(capability), "64", "128"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [(name, int(size)) for name, size in map(str.split, done.stdout.splitlines())]
    assert len(sizes) == 17 and max(size for _, size in sizes) > 40_000
    assert [(name, size) for name, size in sizes if size > room] == []


@pytest.mark.gpu
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("N, H, K, h, dims, starts", [*ATTENTION, LARGE])
def test_packed_attention_is_its_twin_on_a_gpu(N, H, K, h, dims, starts, exclusive):
    close(*attention_pair(N, H, K, h, dims, starts, "cuda", torch.bfloat16, exclusive), 5e-2)


@pytest.mark.gpu
def test_packed_attention_repeats_to_the_last_bit():
    one, two = (attention_pair(*LARGE.values, "cuda", torch.bfloat16)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("N, D, W, slope", [*MLPS, pytest.param(5000, 512, 2048, 0.5, id="large")])
def test_the_mlp_is_its_twin_on_a_gpu(N, D, W, slope):
    close(*mlp_pair(N, D, W, slope, "cuda", torch.bfloat16), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("B, T, D, gating", [*MIXES, pytest.param(1, 9000, 512, 12, id="large")])
def test_the_mix_is_its_twin_on_a_gpu(B, T, D, gating):
    close(*mix_pair(B, T, D, gating, "cuda", torch.bfloat16), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, vocab, cap", [*LOSSES, pytest.param(512, 8192, 30.0, id="large")])
def test_the_loss_is_its_twin_on_a_gpu(tokens, vocab, cap):
    close(*loss_pair(tokens, vocab, cap, "cuda", torch.bfloat16), 1e-2)
