"""The benchmarks run, and print what they measured."""

import dataclasses
import re

import pytest
import torch

import train_gpt as g
from tools import bench


def test_steps_are_timed_in_both_loop_modes(tiny_run, tiny_config, capsys):
    trainer = bench.make_trainer(tiny_config, tiny_run(), g.Dist())
    for looping in (False, True):
        bench.steps(trainer, looping, count=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["loop:0", "loop:1"]
    for line in lines:
        measured = {key: float(value) for key, value in re.findall(r"(\w+):([\d.]+)", line)}
        assert measured["step_ms"] > 0 and measured["tokens_per_s"] > 0 and measured["compiled_after_warm_up"] == 0


def test_no_matrix_is_zero_when_a_step_is_timed(tiny_run, tiny_config):
    model = bench.make_model(tiny_config, tiny_run(), g.Dist())
    matrices = [p for name, p in model.named_parameters() if g.param_role(name) == "matrix"]
    assert matrices and all(p.any() for p in matrices)


def test_adaptation_is_timed_for_a_full_batch_and_for_two_documents(tiny_run, tiny_config, capsys):
    bench.adaptation(tiny_config, tiny_run(), g.Dist())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["adaptation", "documents:4", "chunk:8"],
        ["adaptation", "documents:2", "chunk:8"],
    ]


def test_the_entropy_coder_is_timed_and_near_the_entropy(capsys):
    bench.coder(symbols=200_000)
    (line,) = capsys.readouterr().out.splitlines()
    measured = {key: float(value) for key, value in re.findall(r"(\w+):([\d.]+)", line)}
    assert measured["symbols"] == 200_000 and measured["encode_s"] > 0 and measured["decode_s"] > 0
    assert 0 < measured["over_entropy_percent"] < 1


def test_the_compressor_is_timed_for_a_full_batch_and_for_one_document(tiny_run, tiny_config, capsys):
    try:
        bench.compressor(tiny_config, tiny_run(), g.Dist(), tokens=20)
    finally:
        torch.use_deterministic_algorithms(False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["codec", "documents:4", "rows:4", "tokens:80"],
        ["codec", "documents:1", "rows:4", "tokens:20"],
    ]


def test_every_peak_of_memory_is_that_of_its_own_line(tiny_run, tiny_config, monkeypatch, capsys):
    """Otherwise two documents would seem to take what the full batch before them took."""
    done = []
    monkeypatch.setattr(bench, "forget_peak_memory", lambda dist: done.append("forget"))
    monkeypatch.setattr(bench, "peak_memory", lambda dist: done.append("peak") or "")
    bench.adaptation(tiny_config, tiny_run(), g.Dist())
    trainer = bench.make_trainer(tiny_config, tiny_run(), g.Dist())
    for looping in (False, True):
        bench.steps(trainer, looping, count=1)
    try:
        bench.compressor(tiny_config, tiny_run(), g.Dist(), tokens=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert done == ["forget", "peak"] * 6


def test_a_cpu_has_no_peak_of_gpu_memory():
    assert bench.peak_memory(g.Dist()) == "peak_GiB:- reserved_GiB:-"


@pytest.mark.parametrize(
    "arguments, knobs, reason",
    [
        (["--count", "-1"], {}, "at least 1"),
        (["--tokens", "0"], {}, "at least 1"),
        (["--only", "adaptation"], {"TTT_SCOPE": "stream"}, "TTT_SCOPE=document"),
        (["--only", "codec"], {"TTT_PARAMS": "full"}, "TTT_PARAMS=lora"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, knobs, reason, monkeypatch, capsys):
    for name, value in {"DEVICE": "cpu", **knobs}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(g, "prepare_torch", lambda run, device: None)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("attention_kv_backward_kernel", "attention"),
        ("cached_attention_forward_kernel", "attention"),
        ("qk_norm_rope_kernel", "attention"),
        ("loss_kernel", "loss"),
        ("mlp_kernel", "GEMM with activation"),
        ("mix_backward_kernel", "mix and norm, backward"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "GEMM"),
        ("triton_red_fused__fused_rms_norm_mul_0", "elementwise, compiled"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise, eager"),
        ("something else", "other"),
    ],
)
def test_a_kernel_is_counted_under_its_kind(kernel, kind):
    assert bench.category(kernel) == kind


KERNELS = ["mlp", "mix", "loss", "attention", "cached attention"]


def kernels_compared(config: g.ModelConfig, run: g.RunConfig, device: str, capsys) -> list[str]:
    """The names on the lines of `bench.kernels`."""
    config = dataclasses.replace(config, num_heads=2, num_kv_heads=1)  # heads of 16, the least that kernels multiply
    bench.kernels(config, run, g.Dist(device=device))
    return [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off; the test below runs instead")
def test_every_kernel_is_compared_with_its_reference(tiny_run, tiny_config, monkeypatch, capsys):
    pytest.importorskip("triton")

    def call_once(f) -> float:
        f()
        return 1.0

    monkeypatch.setattr(bench, "milliseconds", call_once)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(g, "MIX_PROGRAMS", 3)
    assert kernels_compared(tiny_config, tiny_run(), "cpu", capsys) == KERNELS


@pytest.mark.gpu
def test_every_kernel_is_compared_with_its_reference_on_a_gpu(tiny_run, tiny_config, capsys):
    assert kernels_compared(tiny_config, tiny_run(), "cuda", capsys) == KERNELS
