"""A score table that remembers what tests compare, and networks whose every mechanism has an effect."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import train_gpt as g

SMALL_MODEL = g.ModelConfig(
    vocab_size=48,
    num_layers=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2,
    rope_dims=4,
    attn_gate_width=8,
    smear_width=8,
    unet_skips=1,
    parallel_start_layer=1,
    num_loops=1,
    loop_start=0,
    loop_end=0,
)


class Recorder(g.ScoreTable):
    """Keeps the nats of every target in the order in which they are added, and what `state` returns each time."""

    def __init__(self, docs: g.Documents, state: Callable[[], Any] = lambda: None):
        super().__init__(docs)
        self.by_document = [np.zeros(0) for _ in range(len(docs))]
        self.state = state
        self.states = []

    def add(self, documents: np.ndarray, nats: np.ndarray) -> None:
        super().add(documents, nats)
        self.states.append(self.state())
        for i in np.unique(documents):
            self.by_document[i] = np.append(self.by_document[i], nats[documents == i])


def random_gpt(config: g.ModelConfig) -> g.GPT:
    """Every parameter away from its neutral start, the same each time."""
    model = g.GPT(config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        start = p.detach() if g.param_role(name) == "scalar" else 0.0
        p.data = start + 0.2 * torch.randn(p.shape, generator=generator)
    return model
