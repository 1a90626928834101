"""Attention under an explicit mask, which the program's own attention is compared with."""

import torch
import torch.nn.functional as F


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T, H, h), (B, T, K, h), (B, T, K, h), mask (T, T), True where a query attends to a key -> (B, T, H, h)"""
    group = q.size(2) // k.size(2)
    k = k.repeat_interleave(group, 2)
    v = v.repeat_interleave(group, 2)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return y.transpose(1, 2)


def attend_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments) -> torch.Tensor:
    """Causal within segments, by the same operations wherever the segments begin: one graph captures or compiles it."""
    key = torch.arange(q.size(1))
    query = key[:, None]
    segment_start = (key - segments.positions)[:, None]
    return attend_masked(q, k, v, (key <= query) & (key >= segment_start))


def chunk_mask(tokens: int, chunk: int, context: int) -> torch.Tensor:
    """Which token (T, T) attends to which in a document scored in chunks: to earlier ones, as far back as the window
    reaches that ends with the query's chunk."""
    key = torch.arange(tokens)
    query = key[:, None]
    window_start = (query // chunk + 1) * chunk - context
    return (key <= query) & (key >= window_start)
