"""Attention by a mask that is written out: what tests hold the program's own attention against."""

import torch
import torch.nn.functional as F


def attend_seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(B, T, H, h), (B, T, K, h) twice, which token sees which (T, T) bool -> (B, T, H, h)"""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def attend_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments) -> torch.Tensor:
    """Causal in every segment: the same operations, whatever the segments are."""
    at = torch.arange(q.size(1))
    return attend_seen(q, k, v, (at <= at[:, None]) & (at >= (at - segments.positions)[:, None]))


def chunk_band(tokens: int, chunk: int, context: int) -> torch.Tensor:
    """Who sees whom in a document of chunks, (T, T) bool: what is past, back to where the chunk's window begins."""
    at = torch.arange(tokens)
    return (at <= at[:, None]) & (at >= (at[:, None] // chunk + 1) * chunk - context)
