"""CUDA graphs for a CPU."""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """What runs while it is captured runs again, in the same memory, when it is replayed. Here capturing computes, too,
    so the replay that follows it at once does nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.fresh = [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # which a GPU's replay does not know of either
            for function, args, kwargs, out in () if self.fresh else self.operations:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.fresh = False


def pretend(monkeypatch) -> list[Graph]:
    """Let train_gpt.CUDAGraphs work on this CPU -> the graphs that it captures."""
    captured: list[Graph] = []

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        captured.append(graph)
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
        CUDAGraph=Graph,
        graph=capture,
        graph_pool_handle=lambda: None,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda _: contextlib.nullcontext(),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured
