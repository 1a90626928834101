"""Every kernel against its plain twin, forward and backward: on a CPU in Triton's interpreter, on a GPU as compiled."""

import numpy as np
import pytest
import torch

import train_gpt as g

pytest.importorskip("triton")
SHAPES = [  # tokens, query heads, key heads, head width, starts of segments
    pytest.param(300, 4, 2, 16, [0, 3, 4, 130, 200, 299], id="tiles that hold several segments, one that is not full"),
    pytest.param(128, 2, 1, 32, [0], id="one segment, one key head"),
    pytest.param(257, 2, 2, 16, [0, 100, 256], id="a token beyond the last full tile, no sharing of heads"),
    pytest.param(40, 3, 1, 16, list(range(40)), id="every token a segment"),
    pytest.param(5, 8, 4, 64, [0, 2], id="fewer tokens than a tile"),
]


def close(ours, twin, tolerance: float) -> None:
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def attention_pair(N, H, K, h, starts, device, dtype):
    """Output and gradients of kernel and twin."""
    random = torch.Generator().manual_seed(N)
    q, k, v, slope = (torch.randn(1, N, heads, h, generator=random).to(device, dtype) for heads in (H, K, K, H))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    row = np.zeros(N, np.uint16)
    segments = g.pack_row(row, row, np.array(starts), torch.device(device)).segments
    found = []
    for f in (lambda q, k, v, s: g.PackedAttention.apply(q[0], k[0], v[0], *s)[None], g.attend_plainly):
        out = f(*inputs, segments)
        found.append([out, *torch.autograd.grad(out, inputs, slope)])
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's twin test follows")
@pytest.mark.parametrize("N, H, K, h, starts", SHAPES)
def test_packed_attention_is_its_twin(N, H, K, h, starts):
    close(*attention_pair(N, H, K, h, starts, "cpu", torch.float32), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("N, H, K, h, starts", [*SHAPES, pytest.param(4096, 8, 4, 64, [0, 1, 900, 2948], id="large")])
def test_packed_attention_is_its_twin_on_a_gpu(N, H, K, h, starts):
    close(*attention_pair(N, H, K, h, starts, "cuda", torch.bfloat16), 3e-2)


@pytest.mark.gpu
def test_packed_attention_repeats_to_the_last_bit():
    one, two = (attention_pair(4096, 8, 4, 64, [0, 1, 900, 2948], "cuda", torch.bfloat16)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
