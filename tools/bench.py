"""Speed on this machine: training steps in both loop modes, where their time goes, and each kernel against its twin.

python -m tools.bench                     the entry's shapes; knobs are environment variables, as for the entry, and on
                                          a CPU DEVICE=cpu is one of them
python -m tools.bench --only steps        or: kernels, adaptation
python -m tools.bench --only agreement    train on DATA_PATH for ITERATIONS steps with our kernels, and again with
                                          torch's: what both have learnt. On a CPU ours want TRITON_INTERPRET=1, and
                                          shapes as small as a test's
python -m tools.bench --only race         the same for MAX_WALLCLOCK_SECONDS, on a GPU
"""

import argparse
import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity, profile

import train_gpt as g
from tools.artifact import end_in_a_line

CATEGORIES = {  # by the names that kernels have in a trace; the first that fits
    "attention": r"flash|fmha|attention|varlen|^prepare_",
    "loss": r"^loss_",
    "GEMM with activation": r"^mlp_",
    "mix and norm, back": r"^mix_",
    "GEMM": r"gemm|nvjet|cutlass|cublas|splitK|sm90_xmma",
    "communication": r"nccl",
    "elementwise, compiled": r"^triton_",
    "copies": r"memcpy|memset",
    "elementwise, eager": r"elementwise|reduce|vectorized|multi_tensor|index|Cat|norm",
}


def category(kernel: str) -> str:
    return next((name for name, pattern in CATEGORIES.items() if re.search(pattern, kernel, re.I)), "other")


def make_model(model_config: g.ModelConfig, run: g.RunConfig, dist: g.Dist) -> g.GPT:
    model = g.GPT(model_config)
    g.init_weights(model, run.seed)
    for name, p in model.named_parameters():  # as if trained: zero matrices would leave out half of the arithmetic
        if g.param_role(name) == "matrix" and not p.any():
            p.data.normal_(0, 0.02)
    return model.to(dist.device)


def make_trainer(run: g.RunConfig, model: g.GPT, dist: g.Dist) -> g.Trainer:
    if dist.device.type == "cuda" and run.compile:
        g.compile_parts(model)
    return g.Trainer(model, run, dist, {})


def steps(trainer: g.Trainer, looping: bool, count: int) -> None:
    """Warm up, time `count` steps, then trace two and print where their time went."""
    run, dist = trainer.run, trainer.dist
    batch = g.random_batch(run, trainer.model.config.vocab_size, dist)

    def go(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            trainer.train_step(batch, 0.5, looping)
        dist.finish_kernels()
        return time.perf_counter() - began

    first = go(1)
    go(2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = go(count) / count
    late = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    print(
        f"loop:{int(looping)} first_step_s:{first:.1f} step_ms:{1e3 * seconds:.1f} "
        f"tokens_per_s:{run.train_batch_tokens / seconds:.0f} {peak_memory()} "
        f"compiled_after_warm_up:{late}",
        flush=True,
    )
    if dist.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            wall = go(2)
        print_split(trace, wall)


def adaptation(run: g.RunConfig, model_config: g.ModelConfig, dist: g.Dist) -> None:
    """Time chunks of documents that adapt side by side, at the start of documents and with a full context behind."""
    model = make_model(model_config, run, dist).requires_grad_(False)
    chunk = run.ttt_chunk_tokens
    for documents in (run.ttt_batch_docs, 2):
        learners = g.BatchedTTT(model, run, documents, dist.device)
        tokens = torch.randint(2, model_config.vocab_size, (documents, chunk), device=dist.device)
        counted = torch.ones_like(tokens, dtype=torch.bool)

        def go(n: int, learners=learners, tokens=tokens, counted=counted) -> float:
            began = time.perf_counter()
            for _ in range(n):
                learners.score(tokens, tokens, to_learn=True)
                learners.learn(counted)
                learners.advance()
            dist.finish_kernels()
            return time.perf_counter() - began

        go(2)
        early = go(4) / 4
        go(run.eval_seq_len // chunk)
        late = go(4) / 4
        print(
            f"adaptation documents:{documents} chunk:{chunk} step_ms:{1e3 * early:.1f} at the start, "
            f"{1e3 * late:.1f} with a full context; {peak_memory()}",
            flush=True,
        )
        if dist.device.type == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                wall = go(2)
            print_split(trace, wall)


def attention_twin(qkv, gain, gate, cos, sin, segments, heads) -> torch.Tensor:
    """The arguments and the result of g.FusedAttention."""
    rope = cos[:, None], sin[:, None]
    return g.attention_reference(qkv[None], gain, gate[None], rope, segments, heads)[0]


class Bounded(NamedTuple):
    """Segments of a packed row as torch's kernel wants them, too."""

    positions: torch.Tensor
    ends: torch.Tensor
    bounds: torch.Tensor  # (MOST_SEGMENTS + 1,) int32, where segments begin, then the row's end: one shape for all rows


MOST_SEGMENTS = 512


@contextlib.contextmanager
def torch_kernels(longest: int) -> Iterator[None]:
    """The entry without its own kernels and replays: all in plain torch, attention on packed rows by torch's kernel."""
    plain_pack = g.make_micro_batch

    def make_micro_batch(
        tokens: np.ndarray, targets: np.ndarray, starts: np.ndarray, device: torch.device
    ) -> g.MicroBatch:
        packed = plain_pack(tokens, targets, starts, device)
        g.require(len(starts) <= MOST_SEGMENTS, f"a row of {len(starts)} segments: lower MICRO_BATCH_TOKENS")
        bounds = np.full(MOST_SEGMENTS + 1, len(tokens), np.int32)
        bounds[: len(starts)] = starts
        return packed._replace(segments=Bounded(*packed.segments, torch.from_numpy(bounds).to(device)))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place: Bounded) -> torch.Tensor:
        k, v = (t[0].repeat_interleave(q.size(2) // k.size(2), 1) for t in (k, v))
        bounds = place.bounds, place.bounds, longest, longest
        return varlen_attn(q[0], k, v, *bounds, window_size=(-1, 0))[None]

    plain = {
        "use_kernels": lambda _: False,
        "Replay": lambda: None,
        "make_micro_batch": make_micro_batch,
        "attend": attend,
    }
    with mock.patch.multiple(g, **plain):
        yield


def two_paths(run: g.RunConfig, dist: g.Dist) -> Iterator[str]:
    """The names of the fast path and of the plain one, each while the entry is so."""
    if dist.device.type == "cuda":
        paths = {"our kernels": contextlib.nullcontext(), "torch's kernels": torch_kernels(run.train_seq_len)}
    else:  # ours in Triton's interpreter
        paths = {
            name: mock.patch.object(g, "use_kernels", lambda _, ours=ours: ours)
            for name, ours in (("our kernels", True), ("plain torch", False))
        }
    for name, path in paths.items():
        torch._dynamo.reset()
        with path:
            yield name


def new_trainer(run: g.RunConfig, c: g.ModelConfig, dist: g.Dist) -> g.Trainer:
    model = g.GPT(c)
    g.init_weights(model, run.seed)
    return make_trainer(run, model.to(dist.device), dist)


def loss_at_the_end(run: g.RunConfig, c: g.ModelConfig, dist: g.Dist) -> float:
    """Train for ITERATIONS steps -> mean loss on one batch of held-out text after each of the last 20, nats a
    token."""
    trainer = new_trainer(run, c, dist)
    stream, losses = g.TrainingStream(run, c.vocab_size, dist), []
    text, n = stream.held_out().tokens, run.micro_batch_tokens // run.train_row_tokens * run.train_row_tokens
    starts = range(0, run.train_batch_tokens, n)
    g.require(len(text) > starts[-1] + n, f"HOLDOUT_TOKENS={run.holdout_tokens} must be a batch and more")
    fixed = [g.text_micro_batch(text[start : start + n + 1], run, dist.device) for start in starts]
    for step in range(run.iterations):
        progress = step / run.iterations
        loss = trainer.train_step(stream.batch(step), progress, trainer.looping(progress))
        if step % run.train_log_every == 0:
            print(f"  step:{step} loss:{loss.item():.4f}", flush=True)
        if step >= run.iterations - 20:
            with torch.no_grad():
                losses.append(sum(trainer.model(*part).sum().item() for part in fixed) / (n * len(fixed)))
    return sum(losses) / len(losses)


def agreement(run: g.RunConfig, c: g.ModelConfig, dist: g.Dist) -> None:
    """Our kernels learn what torch's do, same seed, text and steps, up to what rounding alone changes."""
    g.require(run.iterations > 0, "the two learn for ITERATIONS steps: set it")
    losses: list[float] = []
    for name in two_paths(run, dist):
        began = time.perf_counter()
        losses.append(loss_at_the_end(run, c, dist))
        print(
            f"agreement steps:{run.iterations} loss:{losses[-1]:.5f} difference:{losses[-1] - losses[0]:+.5f} "
            f"seconds:{time.perf_counter() - began:.0f} (compiler and all) {name}",
            flush=True,
        )


def race(run: g.RunConfig, c: g.ModelConfig, dist: g.Dist) -> None:
    """What our kernels and torch's learn in the same time: mean loss on the held-out text, nats a token."""
    g.require(run.max_wallclock_seconds > 0, "the two learn for MAX_WALLCLOCK_SECONDS: set it")
    for name in two_paths(run, dist):
        trainer, stream, watch = new_trainer(run, c, dist), g.TrainingStream(run, c.vocab_size, dist), g.Stopwatch(dist)
        initial_state = trainer.copy_state()
        g.warm_up(trainer, g.random_batch(run, c.vocab_size, dist))
        trainer.load_state(initial_state, step=0)
        with watch.phase("train"):
            g.train(
                trainer,
                stream,
                g.Log(screen=g.print_now if dist.main else None),
                watch,
                0.0,
                lambda: float("nan"),
                Path("unused"),
            )
        held, found = stream.held_out(), {}
        for readout, weights in (("last", contextlib.nullcontext()), ("average", trainer.average.applied())):
            with weights:
                tally = g.ScoreTable(held)
                g.score_static(trainer.model, held, range(len(held)), run, dist, tally)
                found[readout] = tally.all_reduced(dist).nats.sum() / held.lengths.sum()
        seconds = watch.total("train")
        print(
            f"race seconds:{seconds:.1f} steps:{trainer.step} "
            f"tokens_per_s:{trainer.step * run.train_batch_tokens / seconds:.0f} "
            f"last:{found['last']:.5f} average:{found['average']:.5f} {name}",
            flush=True,
        )


def kernels(run: g.RunConfig, c: g.ModelConfig, dist: g.Dist) -> None:
    """Each kernel's time, forward and backward, beside those of its twin in plain torch."""
    packed = g.random_batch(run, c.vocab_size, dist)[0]
    tokens, D, hidden, slope = packed.tokens.size(1), c.model_dim, c.mlp_mult * c.model_dim, c.mlp_leaky_slope

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=dist.device, dtype=dtype, requires_grad=True)

    mlp = torch.compile(lambda x, up, down, slope: F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down))
    compare("mlp", g.FusedMLP.apply, mlp, (normal(tokens, D), normal(hidden, D), normal(D, hidden)), slope)
    learnt = normal(1, tokens, D), normal(1, tokens, D), normal(2, D, dtype=torch.float32)
    given = torch.ones((), device=dist.device), c.attn_gate_width
    compare("mix", torch.compile(g.FusedMix.apply), torch.compile(g.mix_reference), learnt, *given)
    given = packed.targets[0], c.logit_softcap
    compare("loss", g.FusedLoss.apply, torch.compile(g.loss_reference), (normal(tokens, c.vocab_size),), *given)
    learnt = normal(tokens, D + 2 * c.kv_dim), normal(c.num_heads, dtype=torch.float32), normal(tokens, c.num_heads)
    heads = g.HeadLayout(True, c.num_heads, c.num_kv_heads, c.head_dim)
    cos, sin = (t[:, 0] for t in g.rope_angles(packed.segments.positions, c.rope_dims, c.rope_base))
    compare("attention", g.FusedAttention.apply, attention_twin, learnt, cos, sin, packed.segments, heads)


def compare(name: str, ours: Callable, twin: Callable, learnt: tuple[torch.Tensor, ...], *given: object) -> None:
    times = []
    for f in (ours, twin):
        out = f(*learnt, *given)
        slopes = [torch.randn_like(y) for y in (out if isinstance(out, tuple) else (out,))]
        forward = milliseconds(lambda f=f: f(*learnt, *given))
        both = milliseconds(lambda f=f, slopes=slopes: torch.autograd.grad(f(*learnt, *given), learnt, slopes))
        times.append((forward, both))
    (a, b), (x, y) = times
    print(f"{name}: forward {a:.3f} ms, with backward {b:.3f}; twin {x:.3f}, {y:.3f}; ratio {x / a:.2f}, {y / b:.2f}")


def peak_memory() -> str:
    """What tensors took at the most, and what the process held for them: that of graphs is held beside the rest."""
    most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return "peak_GiB:{:.1f} reserved_GiB:{:.1f}".format(*(n / 2**30 for n in most))


def print_split(trace: profile, wall: float) -> None:
    """Milliseconds a step by kind of kernel, the rest of the wall clock, and the kernels that took longest."""
    events = {e.key: e for e in trace.key_averages()}
    by_kernel = Counter({name: e.self_device_time_total / 2e3 for name, e in events.items()})
    by_kind: Counter = Counter()
    for name, ms in by_kernel.items():
        by_kind[category(name)] += ms
    for kind, ms in by_kind.most_common():
        print(f"  {kind:24} {ms:9.2f} ms")
    print(f"  {'no kernel ran':24} {1e3 * wall / 2 - sum(by_kind.values()):9.2f} ms")
    for name, ms in by_kernel.most_common(40):
        print(f"    {ms:9.2f} ms in {events[name].count / 2:5.0f} calls  {name[:140]}")


def milliseconds(f: Callable[[], object], repeats: int = 20) -> float:
    """Of one call on the GPU, after a warm-up."""
    for _ in range(3):
        f()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["steps", "kernels", "adaptation", "agreement", "race"], help="see above")
    parser.add_argument("--count", type=int, default=4, help="steps to time [4]")
    options = parser.parse_args()
    model_config, run = g.read_env()
    dist = g.Dist.from_env(run.device)
    g.prepare_torch(run, dist.device)
    if not dist.main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, rank 0 speaks
    if dist.device.type == "cpu" and run.device != "cpu":
        parser.error("no GPU, and a CPU takes hours for these shapes: if you mean it, set DEVICE=cpu and smaller ones")
    if options.only in ("kernels", "race") and dist.device.type == "cpu":
        parser.error(f"{options.only}: timed on a GPU only")
    print(f"{g.device_name(dist.device)} {g.versions()}", flush=True)
    if options.only in ("agreement", "race"):
        if dist.device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
            parser.error("on a CPU kernels run in Triton's interpreter only: set TRITON_INTERPRET=1")
        (agreement if options.only == "agreement" else race)(run, model_config, dist)
    if options.only in (None, "kernels") and dist.device.type == "cuda":
        kernels(run, model_config, dist)
    if options.only in (None, "adaptation"):
        adaptation(run, model_config, dist)
    if options.only in (None, "steps"):
        trainer = make_trainer(run, make_model(model_config, run, dist), dist)
        for looping in (False, True):
            steps(trainer, looping, options.count)
    dist.close()
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
