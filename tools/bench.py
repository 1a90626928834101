"""Speed on this machine: training steps in both loop modes, adaptation, each kernel against its reference, the entropy
coder and the compressor.

./run.sh bench                     everything, in the entry's shapes; knobs are environment variables, as for the entry
./run.sh bench --only steps        training steps, and where their time goes: a profile by kind of kernel. They
                                   use the longest context, TRAIN_SEQ_LEN; TRAIN_BATCH_TOKENS=0 follows the
                                   budget, MAX_WALLCLOCK_SECONDS
./run.sh bench --only adaptation   chunks of test-time training, and where their time goes
./run.sh bench --only kernels      forward and backward passes of kernels and references; needs a GPU
./run.sh bench --only coder        seconds and bytes of the entropy coder, always on one CPU core
./run.sh bench --only codec        tokens per second of compress and decompress, TTT_BATCH_DOCS documents and one

On a CPU, set DEVICE=cpu and smaller shapes; profiles and kernels are then skipped.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import train_gpt as g
from data.prepare import whole_number
from tools import codec
from tools.artifact import end_in_a_line
from tools.progress import Progress

CATEGORIES = {  # patterns of kernel names in a profile; the first match counts
    "attention": r"flash|fmha|attention|varlen|^qk_norm_rope_",
    "loss": r"^loss_",
    "GEMM with activation": r"^mlp_",
    "mix and norm, backward": r"^mix_",
    "GEMM": r"gemm|nvjet|cutlass|cublas|splitK|sm90_xmma",
    "communication": r"nccl",
    "elementwise, compiled": r"^triton_",
    "copies": r"memcpy|memset",
    "elementwise, eager": r"elementwise|reduce|vectorized|multi_tensor|index|Cat|norm",
}
PROFILED_RUNS = 2


def category(kernel: str) -> str:
    for name, pattern in CATEGORIES.items():
        if re.search(pattern, kernel, re.I):
            return name
    return "other"


def make_model(model_config: g.ModelConfig, run: g.RunConfig, dist: g.Dist) -> g.GPT:
    """A network with initial weights, but no all-zero matrices, with which a step would skip half of its arithmetic."""
    model = g.GPT(model_config)
    g.init_weights(model, run.seed)
    for name, p in model.named_parameters():
        if g.param_role(name) == "matrix" and not p.any():
            p.data.normal_(0, 0.02)
    columns = [torch.ones(count) for _, count in g.lora_outputs(model_config)]
    model.gradient_rms = g.GradientRMS(columns, torch.zeros(len(columns)), run.ttt_chunk_tokens)
    return model.to(dist.device)


def make_trainer(model_config: g.ModelConfig, run: g.RunConfig, dist: g.Dist) -> g.Trainer:
    model = make_model(model_config, run, dist)
    if dist.device.type == "cuda" and run.compile:
        g.compile_parts(model)
    return g.Trainer(model, run, dist, {})


def timer(step: Callable[[], object], dist: g.Dist) -> Callable[[int], float]:
    """-> a function that runs the step n times, waits for the GPU, and returns the seconds per step."""

    def seconds_per_step(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            step()
        dist.finish_kernels()
        return (time.perf_counter() - start) / n

    return seconds_per_step


# ---- Training steps ----


def steps(trainer: g.Trainer, looping: bool, count: int) -> None:
    """Warm up, time `count` steps, then profile."""
    run = trainer.run
    forget_peak_memory(trainer.dist)
    batch = g.random_batch(run, trainer.model.config.vocab_size, trainer.dist)
    seconds_per_step = timer(lambda: trainer.train_step(batch, 0.5, looping), trainer.dist)

    first = seconds_per_step(1)
    seconds_per_step(2)
    compiled_before = graphs_compiled()
    seconds = seconds_per_step(count)
    compiled_late = graphs_compiled() - compiled_before
    print(
        f"loop:{int(looping)} first_step_s:{first:.1f} step_ms:{1e3 * seconds:.1f} "
        f"tokens_per_s:{run.train_batch_tokens / seconds:.0f} {peak_memory(trainer.dist)} "
        f"compiled_after_warm_up:{compiled_late}",
        flush=True,
    )
    print_profile(seconds_per_step, trainer.dist)


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---- Adaptation ----


def adaptation(model_config: g.ModelConfig, run: g.RunConfig, dist: g.Dist) -> None:
    """Time chunks of documents that adapt side by side: the largest batch, then two."""
    model = make_model(model_config, run, dist).requires_grad_(False)
    for documents in (run.ttt_batch_docs, 2):
        adapt(model, run, documents, dist)


def adapt(model: g.GPT, run: g.RunConfig, documents: int, dist: g.Dist) -> None:
    """Time chunks at the start of documents and with a full context, then profile."""
    chunk_tokens = run.ttt_chunk_tokens
    forget_peak_memory(dist)
    learners = g.BatchedTTT(model, run, documents, dist.device)
    tokens = torch.randint(2, model.config.vocab_size, (documents, chunk_tokens), device=dist.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def step() -> None:
        chunk = learners.score(tokens, tokens, to_learn=True)
        chunk = learners.learn(chunk, mask)
        learners.advance(chunk)

    seconds_per_step = timer(step, dist)
    seconds_per_step(2)
    early = seconds_per_step(4)
    seconds_per_step(run.eval_seq_len // chunk_tokens)
    late = seconds_per_step(4)
    print(
        f"adaptation documents:{documents} chunk:{chunk_tokens} step_ms:{1e3 * early:.1f} at the start, "
        f"{1e3 * late:.1f} with a full context; {peak_memory(dist)}",
        flush=True,
    )
    print_profile(seconds_per_step, dist)


# ---- Kernels ----


def kernels(c: g.ModelConfig, run: g.RunConfig, dist: g.Dist) -> None:
    """Time each kernel, forward and with backward, against its reference in plain torch, compiled. The references of
    attention are not compiled: one makes a call per segment, and adaptation, which uses the cache, runs eagerly."""
    micro_batch = g.random_batch(run, c.vocab_size, dist)[0]
    N = micro_batch.tokens.size(1)
    D = c.model_dim
    W = c.mlp_mult * D

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=dist.device, dtype=dtype, requires_grad=True)

    inputs = (normal(N, D), normal(W, D), normal(D, W))
    compare("mlp", g.FusedMLP.apply, torch.compile(mlp_reference), inputs, c.mlp_leaky_slope)

    inputs = (normal(1, N, D), normal(1, N, D), normal(2, D, dtype=torch.float32))
    scale = torch.ones((), device=dist.device)
    mix = torch.compile(g.FusedMix.apply)
    compare("mix", mix, torch.compile(g.mix_reference), inputs, scale, c.attn_gate_width)

    logits = normal(N, c.vocab_size)
    loss_reference = torch.compile(g.loss_reference)
    compare("loss", g.FusedLoss.apply, loss_reference, (logits,), micro_batch.targets[0], c.logit_softcap)

    inputs = (normal(N, D + 2 * c.kv_dim), normal(c.num_heads, dtype=torch.float32), normal(N, c.num_heads))
    segments = micro_batch.segments
    cos, sin = g.rope_angles(segments.positions, c.rope_dims, c.rope_base)
    heads = g.HeadLayout(True, c.num_heads, c.num_kv_heads, c.head_dim)
    compare("attention", g.FusedAttention.apply, attention_reference, inputs, cos[:, 0], sin[:, 0], segments, heads)

    chunk = (run.ttt_batch_docs, run.ttt_chunk_tokens)
    inputs = tuple(normal(*chunk, count, c.head_dim) for count in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
    slots = run.eval_seq_len - run.ttt_chunk_tokens
    buffer = normal(2, run.ttt_batch_docs, c.num_kv_heads, slots, c.head_dim).detach()
    filled = torch.tensor(slots, device=dist.device)
    compare("cached attention", g.FusedCachedAttention.apply, attend_with_cache, inputs, filled, buffer)


def attention_reference(
    qkv: torch.Tensor,
    gain: torch.Tensor,
    gate: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    segments: g.Segments,
    heads: g.HeadLayout,
) -> torch.Tensor:
    """g.attention_reference with the arguments and the result of g.FusedAttention."""
    y, _ = g.attention_reference(qkv[None], gain, gate[None], (cos[:, None], sin[:, None]), segments, heads)
    return y[0]


def attend_with_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: torch.Tensor, buffer: torch.Tensor
) -> torch.Tensor:
    """g.attend_with_cache with the arguments of g.FusedCachedAttention."""
    return g.attend_with_cache(q, k, v, g.CachedLayer(filled, buffer))


def mlp_reference(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, slope: float) -> torch.Tensor:
    """What g.FusedMLP computes: (N, D), (W, D), (D, W) -> (N, D)"""
    return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)


def compare(name: str, fused: Callable, reference: Callable, inputs: tuple[torch.Tensor, ...], *fixed: object) -> None:
    """Print the times of both, on `inputs` with gradients and `fixed` arguments without."""
    forward, both = times(fused, inputs, fixed)
    reference_forward, reference_both = times(reference, inputs, fixed)
    print(
        f"{name}: forward {forward:.3f} ms, with backward {both:.3f}; "
        f"reference {reference_forward:.3f}, {reference_both:.3f}; "
        f"ratio {reference_forward / forward:.2f}, {reference_both / both:.2f}"
    )


def times(f: Callable, inputs: tuple[torch.Tensor, ...], fixed: tuple) -> tuple[float, float]:
    """-> milliseconds of the forward pass, and of the forward and backward passes together."""
    outputs = f(*inputs, *fixed)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    d_outputs = [torch.randn_like(y) for y in outputs]

    forward = milliseconds(lambda: f(*inputs, *fixed))
    both = milliseconds(lambda: torch.autograd.grad(f(*inputs, *fixed), inputs, d_outputs))
    return forward, both


def milliseconds(f: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of one call on the GPU, after a warm-up."""
    for _ in range(3):
        f()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


# ---- Entropy coder ----


def coder(symbols: int = 36_000_000) -> None:
    """Time the coder on Gaussian integers of about 3.4 bits, in calls of 5,000 to 34,000 symbols, like the rows of
    matrices, and compare the bytes with the entropy of the counts."""
    calls, counts = gaussian_calls(symbols)
    start = time.perf_counter()
    tables = g.FrequencyTables.from_counts(counts)
    tables_made = time.perf_counter()
    encoder = g.RansEncoder(tables)
    for call in calls:
        encoder.put(*call)
    data = encoder.finish()
    encoded = time.perf_counter()
    decoder = g.RansDecoder(data, tables)
    wrong = sum(int((decoder.take(contexts) != put).sum()) for put, contexts in calls)
    decoder.finish()
    decoded = time.perf_counter()
    g.require(wrong == 0, f"{wrong} of {symbols} symbols came back as others", g.DataError)

    shares = counts / counts.sum(1, keepdims=True).clip(1)
    entropy = -float((counts * np.log2(np.where(shares > 0, shares, 1))).sum()) / 8
    print(
        f"coder symbols:{symbols} calls:{len(calls)} tables_s:{tables_made - start:.3f} "
        f"encode_s:{encoded - tables_made:.2f} decode_s:{decoded - encoded:.2f} bytes:{len(data)} "
        f"over_entropy_percent:{100 * (len(data) / entropy - 1):.3f} table_bytes:{len(tables.to_bytes())}",
        flush=True,
    )


def gaussian_calls(symbols: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """-> (symbols and contexts of each call; their counts (contexts, alphabet)). Context c is 0.35 * 2^(c / 9) wide."""
    contexts = 64
    middle = 340  # seven times the widest
    alphabet = 2 * middle + 1
    chance = np.random.default_rng(0)
    calls = []
    counts = np.zeros(contexts * alphabet, np.int64)
    while symbols:
        n = min(symbols, int(chance.integers(5_000, 34_001)))
        context = np.rint(chance.normal(25, 5, n)).clip(0, contexts - 1).astype(np.int64)
        values = np.rint(chance.standard_normal(n) * 0.35 * 2 ** (context / 9)).astype(np.int64) + middle
        calls.append((values.astype(np.int16), context.astype(np.uint8)))
        counts += np.bincount(context * alphabet + values, minlength=len(counts))
        symbols -= n
    return calls, counts.reshape(contexts, alphabet)


# ---- Compressor ----


def compressor(model_config: g.ModelConfig, run: g.RunConfig, dist: g.Dist, tokens: int) -> None:
    """Time the coding of random documents, the largest batch and a single one, with kernels already compiled; CUDA
    graphs are captured again, as for every file. Leaves torch deterministic."""
    codec.make_deterministic(torch.get_num_threads())
    model = make_model(model_config, run, dist).requires_grad_(False)
    for count in (run.ttt_batch_docs, 1):
        forget_peak_memory(dist)
        text = torch.randint(2, model_config.vocab_size, (count, tokens - 1)).tolist()
        predictor = codec.with_rows_for(codec.Predictor(model, run, None, "", dist.device), count)
        there_and_back(predictor, [document[: 4 * run.ttt_chunk_tokens] + [g.BOS] for document in text])
        size, encoded, decoded = there_and_back(predictor, [[*document, g.BOS] for document in text])
        print(
            f"codec documents:{count} rows:{predictor.run.ttt_batch_docs} tokens:{count * tokens} "
            f"encoded_per_s:{count * tokens / encoded:.1f} decoded_per_s:{count * tokens / decoded:.1f} "
            f"bits_per_token:{8 * size / (count * tokens):.3f} {peak_memory(dist)}",
            flush=True,
        )


def there_and_back(predictor: codec.Predictor, documents: list[list[int]]) -> tuple[int, float, float]:
    """Encode and decode documents -> bytes, seconds to encode, seconds to decode."""
    tokens = sum(map(len, documents))
    start = time.perf_counter()
    data = codec.encode(predictor, documents, Progress("encoding", tokens))
    encoded = time.perf_counter()
    found = codec.decode(predictor, len(documents), tokens, data, Progress("decoding", tokens))
    decoded = time.perf_counter()
    g.require(found == documents, "documents came back as others", g.DataError)
    return len(data), encoded - start, decoded - encoded


# ---- Memory and profiles ----


def forget_peak_memory(dist: g.Dist) -> None:
    """Begin a measurement whose `peak_memory` holds nothing of those before."""
    if dist.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(dist: g.Dist) -> str:
    """On a GPU: peak memory allocated by tensors since `forget_peak_memory`, and peak memory reserved for them: CUDA
    graphs count only in the second."""
    if dist.device.type != "cuda":
        return "peak_GiB:- reserved_GiB:-"
    allocated = torch.cuda.max_memory_allocated() / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    return f"peak_GiB:{allocated:.1f} reserved_GiB:{reserved:.1f}"


def print_profile(seconds_per_step: Callable[[int], float], dist: g.Dist) -> None:
    """On a GPU: milliseconds of a step by kind of kernel, the idle time, and the slowest kernels."""
    if dist.device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        wall_ms = 1e3 * seconds_per_step(PROFILED_RUNS)

    by_kernel: Counter = Counter()
    by_kind: Counter = Counter()
    calls = {}
    for event in trace.key_averages():
        ms = event.self_device_time_total / 1e3 / PROFILED_RUNS
        by_kernel[event.key] = ms
        by_kind[category(event.key)] += ms
        calls[event.key] = event.count / PROFILED_RUNS

    for kind, ms in by_kind.most_common():
        print(f"  {kind:24} {ms:9.2f} ms")
    print(f"  {'no kernel ran':24} {wall_ms - by_kind.total():9.2f} ms")
    for name, ms in by_kernel.most_common(40):
        print(f"    {ms:9.2f} ms in {calls[name]:5.0f} calls  {name[:140]}")


def why_not(only: str | None, run: g.RunConfig, on_gpu: bool) -> str:
    """Why this cannot be timed; empty if it can."""
    if not on_gpu and run.device != "cpu" and only != "coder":
        return "no GPU, and a CPU takes hours for these shapes: if you mean it, set DEVICE=cpu and smaller ones"
    if not on_gpu and only == "kernels":
        return "kernels: timed on a GPU only"
    if not run.batched_ttt and only in (None, "adaptation", "codec"):
        return "adaptation, codec: documents side by side need TTT_PARAMS=lora and TTT_SCOPE=document"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["steps", "adaptation", "kernels", "coder", "codec"], help="see above")
    parser.add_argument("--count", type=whole_number, default=4, help="training steps to time [4]")
    parser.add_argument(
        "--tokens", type=whole_number, default=1024, help="tokens of a document that is compressed [1024]"
    )
    options = parser.parse_args(arguments)
    model_config, run = g.read_env()
    dist = g.Dist.from_env(run.device)
    dist.join()
    run = g.with_batch(run, dist.world)
    g.prepare_torch(run, dist.device)
    if not dist.main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  only rank 0 prints

    on_gpu = dist.device.type == "cuda"
    if reason := why_not(options.only, run, on_gpu):
        parser.error(reason)
    print(f"{g.device_name(dist.device)} {g.versions()}", flush=True)

    if options.only in (None, "coder"):
        coder()
    if options.only in (None, "kernels") and on_gpu:
        kernels(model_config, run, dist)
    if options.only in (None, "adaptation"):
        adaptation(model_config, run, dist)
    if options.only in (None, "steps"):
        trainer = make_trainer(model_config, run, dist)
        for looping in (False, True):
            steps(trainer, looping, options.count)
        del trainer
    if options.only in (None, "codec"):
        compressor(model_config, run, dist, options.tokens)
    dist.close()
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
