"""Every kernel against its plain twin, forward and backward: on a CPU in Triton's interpreter, on a GPU as compiled."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
LOSSES = [
    pytest.param(7, 64, 30.0, id="a power of two"),
    pytest.param(5, 1000, 3.0, id="a vocabulary of any size, a narrow cap"),
    pytest.param(3, 17, 0.0, id="no cap"),
]


def close(ours, twin, names: str, tolerance: float) -> None:
    """Within the tolerance, relative to the largest of what is compared. The gradient of a gain gets tenfold: it is a
    sum over tokens and scores that nearly cancel."""
    for name, a, b in zip(names.split(), ours, twin, strict=True):
        atol = tolerance * max(1.0, b.detach().abs().max().item()) * (10 if name == "d_gain" else 1)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def attention_pair(N, H, K, h, dims, starts, device, dtype, exclusive=True):
    """Output and gradients of kernel and twin."""
    random = torch.Generator().manual_seed(N)
    shapes = (N, (H + 2 * K) * h), (H,), (N, H), (N, H * h)
    qkv, gain, gate, slope = (torch.randn(shape, generator=random) for shape in shapes)
    gain, slope = gain.to(device) + 2.0, slope.to(device, dtype)
    inputs = [qkv.to(device, dtype), gain, gate.sigmoid().to(device, dtype)]
    row, heads = np.zeros(N, np.uint16), g.Heads(exclusive, H, K, h)
    segments = g.pack_row(row, row, np.array(starts), torch.device(device)).segments
    rope = g.rotary(segments.positions, dims, 100.0)

    def ours(qkv, gain, gate):
        return g.PackedAttention.apply(qkv, gain, gate, *(t[:, 0] for t in rope), segments, heads)

    def twin(qkv, gain, gate):
        return g.attend_plainly(qkv[None], gain, gate[None], rope, segments, heads)[0]

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
    for f in (g.CappedLoss.apply, g.loss_plainly):
        nll = f(z, targets, cap)
        found.append([nll, *torch.autograd.grad(nll, [z], slope.float())])
    return *found, "nll d_z"


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


@pytest.mark.parametrize("capability, head_dim, triton, said", [
    ((9, 0), 16, True, "kernels: Triton"),
    ((8, 0), 8, True, "MODEL_DIM / NUM_HEADS = 8"),
    ((8, 0), 8, False, "no Triton: all runs in plain torch"),
    ((7, 5), 16, True, "DEVICE=cpu"),
], ids=["a Hopper", "heads too narrow", "narrow, but no kernel", "a GPU without bf16"])  # fmt: skip
def test_what_the_kernels_cannot_do_is_said_at_the_start(
    tiny_data, tiny_config, tiny_run, monkeypatch, capability, head_dim, triton, said
):
    config = dataclasses.replace(tiny_config, model_dim=head_dim * tiny_config.num_heads)
    plan = g.make_plan(config, tiny_run(), g.Dist())._replace(dist=g.Dist(device="cuda"), stream=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(g, "triton", g.triton if triton else None)
    lines: list[str] = []
    if "=" in said:
        with pytest.raises(g.UserError, match=said):
            g.check_setup(plan, lines.append)
    else:
        g.check_setup(plan, lines.append)
        assert said in lines[0] and len(lines) == 3


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
    g.PackedAttention.apply(*given, g.Segments(t, t), g.Heads(True, 4, 2, width)).sum().backward()
z = made(2, 8192)
g.CappedLoss.apply(z, torch.zeros(2, dtype=torch.int64), 30.0).sum().backward()
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
    assert len(sizes) == 14 and max(size for _, size in sizes) > 40_000
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
@pytest.mark.parametrize("tokens, vocab, cap", [*LOSSES, pytest.param(512, 8192, 30.0, id="large")])
def test_the_loss_is_its_twin_on_a_gpu(tokens, vocab, cap):
    close(*loss_pair(tokens, vocab, cap, "cuda", torch.bfloat16), 1e-2)
