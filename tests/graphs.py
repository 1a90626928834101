"""CUDA graphs that work on a CPU."""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt


class FakeGraph(TorchDispatchMode):
    """Records the operations that run while it is captured; a replay runs them again and writes to the same memory.

    Unlike on a GPU, operations compute while they are captured. So the first replay, which follows at once, does
    nothing."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.fresh = True  # captured, not replayed yet

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def replay(self):
        if self.fresh:
            self.fresh = False
            return
        with torch._C._AutoDispatchBelowAutograd():  # a replay on a GPU knows nothing of autograd either
            for function, args, kwargs, out in self.operations:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def fake_cuda_graphs(monkeypatch) -> list[FakeGraph]:
    """Let train_gpt.CUDAGraphs work on this CPU -> the list that captured graphs are added to."""
    captured: list[FakeGraph] = []

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        captured.append(graph)
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return captured


def replays_of(learner: type, monkeypatch) -> list[FakeGraph]:
    """Let a class of train_gpt.py believe that it is on a GPU, as `fake_cuda_graphs` -> the captured graphs."""
    plain = learner.__init__

    def begin(self, *given):
        plain(self, *given)
        self.graphs = train_gpt.CUDAGraphs()

    monkeypatch.setattr(learner, "__init__", begin)
    return fake_cuda_graphs(monkeypatch)
