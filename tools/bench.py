"""Speed on this machine: training steps in both loop modes, where their time goes, and each kernel against its twin.

python -m tools.bench                 the entry's shapes; knobs are environment variables, as for the entry
python -m tools.bench --only steps    or: kernels
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import train_gpt as g

CATEGORIES = {  # by the names that kernels have in a trace; the first that fits
    "attention": r"flash|fmha|attention|varlen",
    "ours": r"^_?(mlp|loss|fused)_\w*kernel",
    "GEMM": r"gemm|nvjet|cutlass|cublas|splitK|sm90_xmma",
    "communication": r"nccl",
    "elementwise, compiled": r"^triton_",
    "copies": r"memcpy|memset",
    "elementwise, eager": r"elementwise|reduce|vectorized|multi_tensor|index|Cat|norm",
}


def category(kernel: str) -> str:
    return next((name for name, pattern in CATEGORIES.items() if re.search(pattern, kernel, re.I)), "other")


def make_trainer(run: g.RunConfig, model_config: g.ModelConfig, dist: g.Dist) -> g.Trainer:
    model = g.GPT(model_config)
    g.init_weights(model, run.seed)
    for name, p in model.named_parameters():  # as if trained: zero matrices would leave out half of the arithmetic
        if g.param_role(name) == "matrix" and not p.any():
            p.data.normal_(0, 0.02)
    model.to(dist.device)
    if dist.device.type == "cuda" and run.compile:
        g.compile_parts(model, dynamic=False)
    return g.Trainer(model, run, dist, "benchmark")


def steps(trainer: g.Trainer, looping: bool, count: int) -> None:
    """Warm up, time `count` steps, then trace two and print where their time went."""
    run, dist = trainer.run, trainer.dist
    batch = g.random_batch(run, trainer.model.config.vocab_size, dist)

    def go(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            trainer.step_on(batch, 0.5, looping)
        dist.finish_kernels()
        return time.perf_counter() - began

    first = go(1)
    go(2)
    seconds = go(count) / count
    print(f"loop:{int(looping)} first_step_s:{first:.1f} step_ms:{1e3 * seconds:.1f} "
          f"tokens_per_s:{run.train_batch_tokens / seconds:.0f} peak_GiB:{peak_gib(dist):.1f}", flush=True)  # fmt: skip
    if dist.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            wall = go(2)
        print_split(trace, wall)


def peak_gib(dist: g.Dist) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if dist.device.type == "cuda" else 0.0


def print_split(trace: profile, wall: float) -> None:
    """Milliseconds a step by kind of kernel, the rest of the wall clock, and the kernels that took longest."""
    by_kernel = Counter({e.key: e.self_device_time_total / 2e3 for e in trace.key_averages()})
    by_kind: Counter = Counter()
    for name, ms in by_kernel.items():
        by_kind[category(name)] += ms
    for kind, ms in by_kind.most_common():
        print(f"  {kind:24} {ms:9.2f} ms")
    print(f"  {'no kernel ran':24} {1e3 * wall / 2 - sum(by_kind.values()):9.2f} ms")
    for name, ms in by_kernel.most_common(25):
        print(f"    {ms:9.2f} ms  {name[:140]}")


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["steps", "kernels"])
    parser.add_argument("--count", type=int, default=4, help="steps to time [4]")
    options = parser.parse_args()
    model_config, run = g.read_env()
    dist = g.Dist.from_env(run.device)
    g.prepare_torch(run, dist.device)
    print(f"{g.device_name(dist.device)} {g.versions()}", flush=True)
    if options.only != "kernels":
        trainer = make_trainer(run, model_config, dist)
        for looping in (False, True):
            steps(trainer, looping, options.count)
    dist.close()


if __name__ == "__main__":
    main()
