"""
Train a small GPT, pack it into 16 MB, read it back and score it in bits per byte with test-time training.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     the entry: 600 s to train, 600 s to evaluate, 8 GPUs
    python train_gpt.py                                       the same on one device
    python train_gpt.py --help                                every knob; a knob is an environment variable
    python train_gpt.py --check-setup                         what would run, and whether it can
    ARTIFACT=logs/RUN.ptz python train_gpt.py                 score an artifact; no training data needed

A run leaves logs/<RUN_ID>.txt (its source, settings, progress and result), .events.jsonl (progress and result, for
programs), .json (the result), .docs.npz (the score of every document) and .ptz (the artifact). Until the artifact is
written, .ckpt holds the trained weights.

The sections of this file, in order; `run_experiment` at the very end walks through them:

    Config                      every knob with its default, its range and a line of doc; reading and describing them
    Model                       the network, with a plain reference for every kernel
    Distributed and log         ranks, log, stopwatch, files
    Data                        shards, tokenizer, documents, training batches
    Optimizer                   Muon and AdamW
    Entropy coder               rANS: integers in barely more bits than their entropy
    Container                   the file format of artifacts and checkpoints
    Training                    schedules, training step, checkpoints, warm-up, training loop
    Quantiser                   calibration, GPTQ along a trellis, and fitting the byte limit
    Scoring                     bits per byte without adaptation
    Test-time training          bits per byte with adaptation
    Set-up and report           open and check what a run reads; train and pack; evaluate; report
    Appendix: Triton kernels    fast versions of the model's plain references
    Appendix: CUDA graphs       capture and replay
    Main                        the run in one page, signals, exit status

Shapes: B rows or documents, T tokens of each, N tokens of a packed row, S attention segments in it, C tokens of a
chunk, L slots of a cache, D model width, H query heads, K key/value heads, h head width, V vocabulary, R LoRA rank. The
coder and the kernels define their own letters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import io
import json
import math
import mmap
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import sentencepiece
import torch
import torch.distributed as torch_dist
import torch.distributed.nn  # noqa: F401  early: its defaults must hold no process group, whose threads crash the exit
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = None


BOS = 1  # precedes every document; a constant of the data, not a knob


class UserError(ValueError):
    """Something that a user can cause and fix: the message says what was found, what was expected and what to do."""


class ConfigError(UserError):
    """A knob's value, or a combination of values, that cannot be run."""


class DataError(UserError):
    """A file from outside that is not what it should be."""


def require(ok: bool, message: str, error: type[UserError] = ConfigError) -> None:
    """Raise an error with this message unless `ok`."""
    if not ok:
        raise error(message)


MOST_SHOWN = 600  # characters of a line from outside
MOST_OF_AN_ERROR = 4_000  # characters


def printable(text: str, most: int = MOST_SHOWN, kept: str = "") -> str:
    """Make text from outside safe to show on one line: escape what would end the line, move the cursor or is no valid
    character, except for characters in `kept`, and cut out the middle of a long text."""
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def brief(value: Any) -> str:
    """A value from a file, shortened for a message."""
    try:
        return printable(repr(value), 60)
    except RecursionError:  # too deep for repr, though the parser could read it
        return "nested deeply"


FOR_THE_USER = (UserError, OSError, torch.OutOfMemoryError)  # errors that end a process in a line, without a traceback
LESS_MEMORY = "out of GPU memory: lower MICRO_BATCH_TOKENS, or TTT_BATCH_DOCS in test-time training"


def error_line(error: BaseException) -> str:
    """The line in which an error FOR_THE_USER ends a process."""
    text = f"{LESS_MEMORY}; {error}" if isinstance(error, torch.OutOfMemoryError) else str(error)
    return f"error: {printable(text, MOST_OF_AN_ERROR)}"


# ======================================================================================================================
# Config: every knob once, with its default, its unit, its range and a line of doc.


# ---- The knobs ----


def knob(
    default: Any,
    doc: str,
    *,
    group: str = "",
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    full: Any = None,
    rms: Any = None,
    only: Mapping[str, tuple[str, ...]] | None = None,
    absent: Any = None,
) -> Any:
    """A field of a config, and what it says about itself:

    group      starts a new group in --help
    low, high  the least and the largest value; numbers without `high` may reach MAX_KNOB
    full, rms  the defaults under TTT_PARAMS=full and TTT_OPTIMIZER=rms, where they differ
    only       other knobs, and the values of each with which this one has an effect: else, setting it is refused
    absent     for ModelConfig: the value in artifacts written before the field existed
    """
    meta = dict(default=default, doc=doc, group=group, unit=unit, low=low, high=high)
    meta |= dict(full=full, rms=rms, only=only or {}, absent=absent)
    if full is not None or rms is not None:
        default = None  # until `RunConfig._fill_in_defaults` knows which it is
    return field(default=default, metadata=meta)


MAX_PASSES = 1024  # of blocks in one forward pass: a forged artifact could demand any number


@dataclass(frozen=True)
class ModelConfig:
    """What an artifact carries to rebuild its network. A width, count or scale of 0 turns its part off."""

    vocab_size: int = knob(8192, "pieces of the tokenizer", group="Model", unit="tokens", low=4, high=65536)
    num_layers: int = knob(11, "distinct blocks", low=1, high=1024)
    model_dim: int = knob(512, "width of the residual stream", low=8, high=16384)
    num_heads: int = knob(8, "query heads", low=1)
    num_kv_heads: int = knob(4, "key/value heads, each shared by a group of query heads", low=1)
    mlp_mult: int = knob(4, "hidden width of the MLP", unit="x MODEL_DIM", low=1, high=64)
    mlp_leaky_slope: float = knob(0.5, "the activation is LeakyReLU(slope) squared; 0 = ReLU squared", low=0, high=1)
    rope_dims: int = knob(16, "dimensions of a head that RoPE rotates, 0 = none", low=0)
    rope_base: float = knob(10000.0, "base of RoPE's wavelengths", low=1)
    qk_gain_init: float = knob(5.0, "initial value of the learned gain of each query head", low=0)
    xsa_last_n: int = knob(
        11, "last blocks with XSA (attention output without its component along the own value)", low=0
    )
    attn_gate_width: int = knob(12, "inputs of the gate on each head's output, 0 = no gate", low=0)
    attn_gate_scale: float = knob(0.5, "factor on the gate's input", low=0)
    smear_width: int = knob(12, "inputs of the gate that adds the previous token's embedding, 0 = none", low=0)
    ln_scale_power: float = knob(0.5, "block l divides its normed input by (l+1)^power, 0 = no scaling", low=0)
    logit_softcap: float = knob(30.0, "tanh keeps logits within +-cap, 0 = no cap", low=0)
    unet_skips: int = knob(8, "most skips from the first half of the block passes to the second, 0 = none", low=0)
    parallel_start_layer: int = knob(8, "first block with parallel streams for attention and MLP, 0 = none", low=0)
    num_loops: int = knob(2, "extra passes through blocks LOOP_START..LOOP_END, 0 = none", low=0, high=64)
    loop_start: int = knob(3, "first block of the loop", low=0)
    loop_end: int = knob(5, "last block of the loop", low=0)

    def __post_init__(self):
        D = self.model_dim
        H = self.num_heads
        require(D % H == 0, f"MODEL_DIM={D} must be a multiple of NUM_HEADS={H}")
        require(H % self.num_kv_heads == 0, f"NUM_HEADS={H} must be a multiple of NUM_KV_HEADS={self.num_kv_heads}")
        require(
            self.rope_dims % 2 == 0 and self.rope_dims <= D // H,
            f"ROPE_DIMS={self.rope_dims} must be even and at most the head width, {D // H}",
        )
        require(self.attn_gate_width <= D, f"ATTN_GATE_WIDTH={self.attn_gate_width} must be at most MODEL_DIM={D}")
        require(self.smear_width <= D, f"SMEAR_WIDTH={self.smear_width} must be at most MODEL_DIM={D}")
        require(
            self.num_loops == 0 or self.loop_start <= self.loop_end < self.num_layers,
            f"LOOP_START={self.loop_start}..LOOP_END={self.loop_end} must lie within the {self.num_layers} blocks, "
            "unless NUM_LOOPS=0",
        )
        passes = self.num_layers + self.num_loops * (self.loop_end - self.loop_start + 1)
        require(
            self.num_loops == 0 or passes <= MAX_PASSES,
            f"NUM_LAYERS={self.num_layers} and NUM_LOOPS={self.num_loops} make {passes} passes through blocks, "
            f"at most {MAX_PASSES} are allowed",
        )

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.num_kv_heads


# For `only`: what a knob of test-time training needs in order to have an effect.
# `NEEDS_LORA | NEEDS_DOCUMENT` joins two tables: both conditions must hold.
NEEDS_LORA = {"ttt_params": ("lora",)}
NEEDS_FULL = {"ttt_params": ("full",)}
NEEDS_DOCUMENT = {"ttt_scope": ("document",)}
NEEDS_SGD = {"ttt_optimizer": ("sgd",)}
NEEDS_ADAMW = {"ttt_optimizer": ("adamw",)}
NEEDS_RMS = {"ttt_optimizer": ("rms",)}
NEEDS_SGD_OR_ADAMW = {"ttt_optimizer": ("sgd", "adamw")}


MAX_RUN_ID_BYTES = 200  # most file systems allow 255, and a run adds suffixes
MAX_MICRO_BATCH = 1 << 22  # tokens: far more than the memory of a GPU holds; rows and contexts fit into them


@dataclass(frozen=True)
class RunConfig:
    """How one run behaves; never needed to rebuild an artifact's network."""

    run_id: str = knob("", "names the files in logs/; empty = the time of the start", group="Run")
    seed: int = knob(1337, "seed of the initial weights and of LoRA", low=0, high=2**31)
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "where to run; auto = GPUs if there are any")
    data_path: str = knob("data/datasets/fineweb10B_sp8192", "folder of the shards")
    tokenizer_path: str = knob("", "SentencePiece model; empty = the one named in DATA_PATH/manifest.json")
    artifact: str = knob("", "an existing artifact to evaluate, without training")
    artifact_bytes: int = knob(16_000_000, "limit on this file and the packed model together", unit="bytes", low=1)
    checkpoint_seconds: float = knob(0.0, "training time between checkpoints, 0 = none", unit="s", low=0)
    resume: str = knob("", "a checkpoint to continue from; that of a finished training is packed")
    compile: int = knob(1, "1 = compile and capture CUDA graphs on a GPU, 0 = run eagerly", low=0, high=1)

    iterations: int = knob(0, "training steps, 0 = as many as the time allows", group="Budget", unit="steps", low=0)
    max_wallclock_seconds: float = knob(600.0, "from the first batch to the packed file, 0 = no limit", unit="s", low=0)
    eval_seconds: float = knob(600.0, "from opening the artifact to the final score, 0 = no limit", unit="s", low=0)
    warmup_steps: int = knob(
        2, "steps on random tokens off the clock, in each loop mode", unit="steps", low=1, high=1000
    )

    train_batch_tokens: int = knob(
        0,
        "tokens per step over all ranks; 0 = by the budget: 786,432 for 4,800 GPU-seconds or more, fewer for less",
        group="Data",
        unit="tokens",
        low=0,
    )
    train_row_tokens: int = knob(32_768, "size of the rows that a batch consists of", unit="tokens", low=8)
    micro_batch_tokens: int = knob(
        131_072, "most tokens in one forward pass on one device", unit="tokens", low=8, high=MAX_MICRO_BATCH
    )
    train_seq_len: int = knob(
        3072, "longest context in training; a third of it at first, later two thirds", unit="tokens", low=2
    )
    holdout_tokens: int = knob(1 << 20, "end of the training shards, held out to choose weights", unit="tokens", low=0)
    train_log_every: int = knob(50, "steps between lines of progress", unit="steps", low=1)
    val_loss_every: int = knob(0, "steps between validations, off the clock; 0 = only at the end", unit="steps", low=0)

    matrix_lr: float = knob(0.026, "Muon's learning rate", group="Optimizer", low=0)
    embed_lr: float = knob(0.03, "AdamW's learning rate for the tied embedding", low=0)
    scalar_lr: float = knob(0.02, "AdamW's learning rate for gains and gates", low=0)
    muon_momentum: float = knob(0.97, "Muon's momentum", low=0, high=0.9999)
    muon_momentum_start: float = knob(0.92, "Muon's momentum at the first step", low=0, high=0.9999)
    muon_momentum_warmup_frac: float = knob(0.30, "fraction of the budget over which it rises", low=0, high=1)
    muon_ns_steps: int = knob(5, "Newton-Schulz steps", low=1, high=5)
    muon_wd: float = knob(0.095, "decoupled weight decay of matrices", low=0)
    embed_wd: float = knob(0.085, "decoupled weight decay of the embedding", low=0)
    scalar_wd: float = knob(0.02, "decoupled weight decay of gains and gates", low=0)
    beta1: float = knob(0.9, "AdamW's decay rate of the first moment", low=0, high=0.9999)
    beta2: float = knob(0.99, "AdamW's decay rate of the second moment", low=0, high=0.99999)
    adam_eps: float = knob(1e-8, "AdamW's epsilon", low=0)
    grad_clip_norm: float = knob(0.3, "largest norm of the gradient of all parameters, 0 = no limit", low=0)
    warmdown_frac: float = knob(0.85, "last fraction of the budget, where learning rates fall", low=0, high=1)
    min_lr: float = knob(0.10, "learning rate at the end, as a fraction of the full one", low=0, high=1)
    ema_horizon_frac: float = knob(0.06, "part of the budget over which weights are averaged, 0 = none", low=0, high=1)
    enable_looping_at: float = knob(0.35, "fraction of the budget after which the loop runs", low=0, high=0.9)

    gptq_calibration_batches: int = knob(1, "training batches to calibrate on", group="Quantisation", low=1, high=1024)
    gptq_damping: float = knob(0.02, "added to the Hessian's diagonal, as a fraction of its mean", low=1e-6)
    trellis_states: Literal["auto", "0", "8", "32"] = knob(
        "auto",
        "states of the trellis along which integers are chosen; 0 = round to nearest, auto = by the model's size",
    )
    grad_rms_tokens: int = knob(
        1 << 17,
        "last training tokens, on which gradients are measured for TTT_OPTIMIZER=rms; 0 = none",
        unit="tokens",
        low=0,
    )

    eval_seq_len: int = knob(
        3072,
        "longest context in evaluation: without adaptation a token sees so many, less up to EVAL_STRIDE; documents "
        "that adapt see their chunk and as many before it as fit",
        group="Evaluation",
        unit="tokens",
        low=8,
    )
    eval_stride: int = knob(512, "new tokens per window after the first, in packed rows", unit="tokens", low=1)

    ttt_enabled: int = knob(1, "test-time training: 1 = on, 0 = off", group="Test-time training", low=0, high=1)
    ttt_scope: Literal["document", "stream"] = knob("document", "document = start afresh at each; stream = never")
    ttt_params: Literal["lora", "full"] = knob("lora", "what adapts: LoRA, or the weights themselves")
    ttt_optimizer: Literal["auto", "sgd", "adamw", "rms"] = knob(
        "auto", "optimizer; auto = rms if the artifact holds the RMS of gradients, else adamw", full="sgd"
    )
    ttt_lr: float = knob(1e-4, "learning rate", low=0, full=0.005, rms=8e-5)
    ttt_epochs: int = knob(1, "steps on each chunk", unit="steps", low=1, high=1000, full=3)
    ttt_chunk_tokens: int = knob(16, "tokens scored before each update", unit="tokens", low=8, full=32_768)
    ttt_late_chunk_tokens: int = knob(
        0,
        "the same from token EVAL_SEQ_LEN of a document on, at a rate that grows by the root of it; 0 = 64, but at "
        "most EVAL_SEQ_LEN / 32 and at least TTT_CHUNK_TOKENS",
        unit="tokens",
        low=0,
        only=NEEDS_LORA | NEEDS_DOCUMENT,
    )
    ttt_cosine: int = knob(0, "1 = the rate follows a cosine over the epochs of a chunk", low=0, high=1, full=1)
    ttt_momentum: float = knob(0.9, "SGD's momentum", low=0, high=0.9999, only=NEEDS_SGD)
    ttt_beta1: float = knob(0.0, "AdamW's decay rate of the first moment", low=0, high=0.9999, only=NEEDS_ADAMW)
    ttt_beta2: float = knob(0.99, "AdamW's decay rate of the second moment", low=0, high=0.99999, only=NEEDS_ADAMW)
    ttt_rms_floor: float = knob(
        0.0, "added to each RMS, as a fraction of that of all columns of the same output", low=0, only=NEEDS_RMS
    )
    ttt_weight_decay: float = knob(0.5, "decoupled weight decay", low=0, full=0.0, only=NEEDS_SGD_OR_ADAMW)
    ttt_grad_clip: float = knob(0.0, "largest norm of a document's gradient, 0 = no limit", low=0, full=1.0)
    ttt_ns_steps: int = knob(0, "Newton-Schulz steps on each update, 0 = none", low=0, high=5, only=NEEDS_SGD_OR_ADAMW)
    ttt_entropy_low: float = knob(0.0, "predictive entropy below which the rate is scaled down", unit="nats", low=0)
    ttt_entropy_high: float = knob(0.0, "entropy above which the rate is scaled down, 0 = no limit", unit="nats", low=0)
    ttt_min_doc_tokens: int = knob(
        0, "tokens of a document to score before learning starts", low=0, only=NEEDS_DOCUMENT
    )
    ttt_batch_docs: int = knob(
        128, "documents that adapt side by side", low=1, high=65_536, only=NEEDS_LORA | NEEDS_DOCUMENT
    )
    ttt_lora_rank: int = knob(80, "rank of LoRA", low=1, high=16_384, only=NEEDS_LORA)
    ttt_lora_alpha: float = knob(144.0, "LoRA is scaled by alpha / rank", low=0, only=NEEDS_LORA)
    ttt_lora_targets: str = knob("q,k,v,o,mlp,head", "where LoRA is added: any of q,k,v,o,mlp,head", only=NEEDS_LORA)
    ttt_freeze_blocks: int = knob(2, "first blocks that do not adapt", low=0, only=NEEDS_FULL)
    ttt_lr_mult_mlp_out: float = knob(3.0, "factor on the rate of MLP output matrices", low=0, only=NEEDS_FULL)
    ttt_lr_mult_in: float = knob(0.5, "factor on the rate of q, k, v and MLP input matrices", low=0, only=NEEDS_FULL)

    def __post_init__(self):
        self._check_run_id()
        self._fill_in_defaults()
        self._check_training()
        self._check_ttt()

    def _check_run_id(self) -> None:
        """RUN_ID names files in logs/ or in a subfolder of it."""
        parts = self.run_id.split("/")
        visible = self.run_id.isprintable() and all(part != "" and part[0] != "." for part in parts)
        longest = max(len(part.encode(errors="replace")) for part in parts)
        require(
            self.run_id == "" or (visible and longest <= MAX_RUN_ID_BYTES and len(parts) <= 8),
            f"RUN_ID={self.run_id[:80]!r}: it names files in logs/; expected printable characters, no . at the start, "
            f"at most {MAX_RUN_ID_BYTES} bytes, and / only to name a subfolder",
        )

    def _fill_in_defaults(self) -> None:
        """Fill in the defaults that depend on what adapts and on the optimizer. Defaults that depend on the artifact
        stay None until it is opened: see `decide_optimizer`."""
        if self.ttt_optimizer in (None, "auto"):
            object.__setattr__(self, "ttt_optimizer", self._automatic_optimizer())
        for f in fields(self):
            if getattr(self, f.name) is None:
                object.__setattr__(self, f.name, self._default_of(f))

    def _default_of(self, f: dataclasses.Field) -> Any:
        """A knob's default under this TTT_PARAMS and TTT_OPTIMIZER; None if that depends on an artifact not yet
        opened."""
        meta = f.metadata
        if self.ttt_params == "full" and meta["full"] is not None:
            return meta["full"]
        if self.ttt_optimizer == "rms" and meta["rms"] is not None:
            return meta["rms"]
        if self.ttt_optimizer == "auto" and meta["rms"] is not None:
            return None
        return meta["default"]

    def _automatic_optimizer(self) -> str:
        """What TTT_OPTIMIZER=auto means; still "auto" if that depends on an artifact not yet opened."""
        if self.ttt_params == "full":
            return "sgd"
        if self.ttt_scope == "stream":
            return "adamw"
        if self.artifact:
            return "auto"
        return "rms" if self.grad_rms_tokens else "adamw"

    def _check_training(self) -> None:
        batch = self.train_batch_tokens
        row = self.train_row_tokens
        context = self.eval_seq_len
        require(self.iterations + self.max_wallclock_seconds > 0, "ITERATIONS and MAX_WALLCLOCK_SECONDS are 0: set one")
        require(batch % row == 0, f"TRAIN_BATCH_TOKENS={batch} must be a multiple of TRAIN_ROW_TOKENS={row}")
        require(
            self.micro_batch_tokens >= max(row, context),
            f"MICRO_BATCH_TOKENS={self.micro_batch_tokens} must be at least "
            f"a row, TRAIN_ROW_TOKENS={row}, and a context, EVAL_SEQ_LEN={context}",
        )
        require(self.eval_stride <= context, f"EVAL_STRIDE={self.eval_stride} must be at most EVAL_SEQ_LEN={context}")
        require(not (self.artifact and self.resume), "ARTIFACT trains nothing, RESUME continues training: set only one")

    def _check_ttt(self) -> None:
        require(
            self.ttt_chunk_tokens <= self.eval_seq_len or not self.batched_ttt,
            f"TTT_CHUNK_TOKENS={self.ttt_chunk_tokens} must be at most EVAL_SEQ_LEN={self.eval_seq_len} "
            "under TTT_PARAMS=lora and TTT_SCOPE=document",
        )
        late = self.ttt_late_chunk_tokens
        require(
            late == 0 or self.ttt_chunk_tokens <= late <= self.eval_seq_len or not self.batched_ttt,
            f"TTT_LATE_CHUNK_TOKENS={late} must be 0, or between TTT_CHUNK_TOKENS={self.ttt_chunk_tokens} and "
            f"EVAL_SEQ_LEN={self.eval_seq_len}",
        )
        require(
            self.ttt_optimizer != "rms" or self.batched_ttt,
            "TTT_OPTIMIZER=rms needs TTT_PARAMS=lora and TTT_SCOPE=document",
        )
        require(
            self.ttt_optimizer != "rms" or self.artifact != "" or self.grad_rms_tokens > 0,
            "TTT_OPTIMIZER=rms divides by the RMS of gradients, which GRAD_RMS_TOKENS=0 does not measure: raise it",
        )
        require(
            self.ttt_optimizer != "rms" or self.ttt_lora_alpha > 0,
            "TTT_OPTIMIZER=rms divides by a gradient's RMS, which is 0 under TTT_LORA_ALPHA=0: raise it, or set "
            "TTT_OPTIMIZER=adamw",
        )
        require(
            self.ttt_entropy_high == 0 or self.ttt_entropy_low < self.ttt_entropy_high,
            f"TTT_ENTROPY_LOW={self.ttt_entropy_low} must be below TTT_ENTROPY_HIGH={self.ttt_entropy_high}",
        )
        require(
            set(self.lora_targets) <= set(LORA_TARGETS),
            f"TTT_LORA_TARGETS={self.ttt_lora_targets!r}: expected some of {','.join(LORA_TARGETS)}, with commas",
        )

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return tuple(self.ttt_lora_targets.split(","))

    @property
    def batched_ttt(self) -> bool:
        """Whether many documents adapt side by side, each with its own LoRA."""
        return self.ttt_params == "lora" and self.ttt_scope == "document"


# ---- Reading and describing knobs ----

CONFIGS = (ModelConfig, RunConfig)
# {NAME: (its field, its type)}
KNOBS = {
    f.name.upper(): (f, kind)
    for config in CONFIGS
    for f, kind in zip(fields(config), get_type_hints(config).values(), strict=True)
}
MAX_KNOB = 10**9  # where a knob has no limit of its own: fp32 holds products of such numbers, int32 such counts


def parse_knob(name: str, text: str, kind: type, meta: Mapping) -> Any:
    """One environment string -> one checked value."""
    problem = f"{name}={text!r}: {meta['doc']}; expected "
    choices = get_args(kind)
    if choices:
        require(text in choices, problem + allowed_values(kind, meta))
        return text

    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(problem + {int: "a whole number", float: "a number"}[kind]) from None
    # Tools refuse a result with such a knob, as it could pass for other lines of a log.
    require(kind is not str or text.isprintable(), problem + "one line of printable text")
    require(kind is not float or math.isfinite(value), problem + "a finite number")
    require(meta["low"] is None or value >= meta["low"], problem + f"at least {meta['low']}")
    high = MAX_KNOB if meta["high"] is None else meta["high"]
    require(kind is str or value <= high, problem + f"at most {high}")
    return value + 0.0 if kind is float else value  # -0.0 becomes 0.0: equal values are written alike


def allowed_values(kind: type, meta: Mapping) -> str:
    """What a knob may be set to, in words; "" for any text."""
    low = meta["low"]
    high = meta["high"]
    if kind is str:
        return ""
    if get_args(kind):
        return " | ".join(get_args(kind))
    return f"at least {low}" if high is None else f"{low} to {high}"


# A name that begins like one of our knobs but is not one is a mistake, unless other programs use such names too.
COMMON_WORDS = "ARTIFACT CHECKPOINT DATA ENABLE MAX MIN MODEL NUM PARALLEL RUN TOKENIZER".split()
# Knobs of other entries that ours does not have.
OTHER_ENTRIES = ("HEAD_LR", "LQER_", "PHASED_TTT", "QUANT_", "TIED_", "TIE_")
FIRST_WORDS = {name.split("_")[0] for name in KNOBS if "_" in name}
OUR_FAMILIES = (*sorted(f"{word}_" for word in FIRST_WORDS.difference(COMMON_WORDS)), *OTHER_ENTRIES)
BUILD_TOOLS = {"ARTIFACTS", "COMPILER"}  # set by build tools, though they look like misspelt knobs

# Knobs of earlier versions, which change nothing when an artifact is scored, and what decides instead.
BITS_AND_RANGES = "MATRIX_BITS EMBED_BITS ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS EMBED_CLIP_SIGMAS QUANT_CLIP_FLOOR".split()
RETIRED = dict.fromkeys(BITS_AND_RANGES, "the steps of integers follow from ARTIFACT_BYTES alone")


def one_slip_apart(a: str, b: str) -> bool:
    """Whether two names differ in one letter, replaced or left out, or in the order of two neighbours."""
    start = len(os.path.commonprefix([a, b]))
    a, b = a[start:], b[start:]
    end = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - end], b[: len(b) - end]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


def refuse_unknown(names: Iterable[str], knobs: Iterable[str]) -> None:
    """Raises ConfigError if a name looks like a knob but is misspelt or retired; ignores other programs' names, and a
    knob's name in other letters beside the knob itself, as in a script's `SEED=$seed`."""
    names = set(names)
    knobs = set(knobs)
    for name in sorted(names - knobs - BUILD_TOOLS):
        if name in RETIRED:
            raise ConfigError(f"{name} is retired: {RETIRED[name]}; unset it")
        capitals = name.upper()
        if capitals in knobs and capitals not in names:
            raise ConfigError(f"{name} is not a knob; did you mean {capitals}? Knobs are in capitals")
        similarity = 0.0 if name.startswith(OUR_FAMILIES) else 0.85
        near = difflib.get_close_matches(name, sorted(knobs), n=1, cutoff=similarity)
        # A single wrong letter makes a short name less similar than that.
        near = near or [knob for knob in sorted(knobs) if one_slip_apart(name, knob)]
        if near:
            raise ConfigError(f"{name} is not a knob; did you mean {near[0]}? (python train_gpt.py --help lists all)")


NO_EFFECT = "has no effect here: it needs"


def read_knobs(env: Mapping[str, str]) -> dict[str, Any]:
    """{field: value} of the knobs that are set, each checked by itself. Raises ConfigError, also for misspelt names."""
    refuse_unknown(env, KNOBS)
    return {f.name: parse_knob(name, env[name], kind, f.metadata) for name, (f, kind) in KNOBS.items() if name in env}


def read_env(env: Mapping[str, str] = os.environ) -> tuple[ModelConfig, RunConfig]:
    """Build both configs from the environment; only this function and Dist.from_env read it. Raises ConfigError."""
    require(__debug__, "Python runs under -O, without the check that every target is scored once: run it without -O")
    values = read_knobs(env)
    model = ModelConfig(**{f.name: values[f.name] for f in fields(ModelConfig) if f.name in values})
    run = RunConfig(**{f.name: values[f.name] for f in fields(RunConfig) if f.name in values})

    for name, (f, _) in KNOBS.items():
        require(name not in env or has_effect(f, run), f"{name} {NO_EFFECT} {conditions(f)}")
    return model, run


def has_effect(f: dataclasses.Field, config: Any) -> bool:
    """Whether a knob has an effect in this config, or may have one once settings at "auto" are decided."""
    return all(getattr(config, name) in (*values, "auto") for name, values in f.metadata["only"].items())


def conditions(f: dataclasses.Field) -> str:
    """The conditions under which a knob has an effect."""
    return " and ".join(f"{name.upper()}={' or '.join(values)}" for name, values in f.metadata["only"].items())


def settings(*configs: Any) -> dict[str, str]:
    """The knobs of these configs as environment variables, without those that have no effect or whose defaults an
    artifact has yet to decide."""
    return {
        f.name.upper(): str(getattr(c, f.name))
        for c in configs
        for f in fields(c)
        if has_effect(f, c) and getattr(c, f.name) is not None
    }


def describe_knobs() -> str:
    """The text of --help: every knob with its default, meaning, unit, allowed values and conditions, in groups."""
    usage = (__doc__ or "").split("\nA run leaves")[0].strip()  # -OO drops docstrings
    lines = [
        usage,
        f"\nknob, default, meaning [unit, values allowed]; without an upper limit, numbers up to {MAX_KNOB:,}",
    ]
    for name, (f, kind) in KNOBS.items():
        meta = f.metadata
        if meta["group"]:
            lines.append(f"\n{meta['group']}")
        facts = ", ".join(filter(None, (meta["unit"], allowed_values(kind, meta))))
        notes = f" [{facts}]" if facts else ""
        if meta["full"] is not None:
            notes += f" (TTT_PARAMS=full: {meta['full']})"
        if meta["rms"] is not None:
            notes += f" (TTT_OPTIMIZER=rms: {meta['rms']})"
        if meta["only"]:
            notes += f" (with {conditions(f)})"
        lines.append(f"  {name:26} {str(meta['default']) or '-':24} {meta['doc']}{notes}")
    return "\n".join(lines)


# ======================================================================================================================
# Model: one forward pass serves training, scoring and adaptation.
#
# Parameters have the same names in artifacts. Every kernel has a plain reference beside the code that uses the
# kernel; it defines what the kernel computes. The kernels themselves are in an appendix.


# ---- Attention ----


class HeadLayout(NamedTuple):
    """The heads of attention. A row of `qkv` holds H queries, then K keys, then K values, each of width h."""

    xsa: bool  # the output drops its component along the token's own value (XSA)
    query_heads: int  # H
    kv_heads: int  # K
    width: int  # h


class Segments(NamedTuple):
    """Where attention restarts in a packed row of N tokens."""

    positions: Tensor  # (N,) int32, position of every token within its segment
    ends: Tensor  # (N,) int32, index at which every token's segment ends


class CachedLayer(NamedTuple):
    """What a chunk of C tokens attends to in one layer pass: all cached tokens and, causally, itself.

    Only the device knows how many tokens are cached, so that CUDA graphs can be replayed as the cache fills."""

    filled: Tensor  # () int64, how many of the cache's first slots hold tokens, in any order
    buffer: Tensor  # (2, B, K, L, h), keys and values of earlier tokens


class CachedContext(NamedTuple):
    """What a chunk of C tokens attends to in all layer passes."""

    positions: Tensor  # (1 + C,) int64, of the token before the chunk and of the chunk's tokens
    filled: Tensor  # () int64, see CachedLayer
    buffers: list[Tensor]  # one for each layer pass, see CachedLayer


AttentionContext = Segments | CachedLayer | None  # packed segments; a cache; or None: every row is one document
Rope = tuple[Tensor, Tensor]  # cosine and sine of every token's rotation angles, (T, 1, rope_dims / 2) each


def activation_dtype(device: torch.device) -> torch.dtype:
    """The dtype of activations and of cached keys and values; weights are fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def use_kernels(x: Tensor) -> bool:
    """Whether Triton kernels run on this tensor; otherwise their references do."""
    return x.is_cuda and triton is not None


def use_training_kernels(x: Tensor, weight: Tensor) -> bool:
    """Whether the MLP and input mix use kernels: these pay off only on long training rows, with weight gradients."""
    return use_kernels(x) and torch.is_grad_enabled() and weight.requires_grad


def has_tma(device: torch.device) -> bool:
    """Whether the GPU has a tensor memory accelerator (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


NORM_EPSILON = 1e-6  # added to the mean square


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain, over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPSILON)


def rope_angles(positions: Tensor, dims: int, base: float) -> Rope:
    """Cosine and sine of positions: (..., T) -> (..., T, 1, dims / 2) twice, fp32. RoPE, Su et al., arXiv 2104.09864"""
    frequency = base ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / max(dims, 1))
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dims / 2) of the first `dims` dimensions of every head: (B, T, H, h) -> the same."""
    half = cos.size(-1)
    a = x[..., :half].float()
    b = x[..., half : 2 * half].float()
    rest = x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Causal attention within segments (then B is 1), over a cache, or within rows.

    (B, T, H, h), (B, T, K, h), (B, T, K, h) -> (B, T, H, h)
    """
    if context is None:
        return attend_rows(q, k, v)
    if isinstance(context, CachedLayer):
        if use_kernels(q):
            return FusedCachedAttention.apply(q, k, v, *context)
        return attend_with_cache(q, k, v, context)
    sizes = torch.unique_consecutive(context.ends, return_counts=True)[1].tolist()
    segments = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
    return torch.cat([attend_rows(*segment) for segment in segments], 1)


def attend_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within every row; shapes as in `attend`."""
    q = q.transpose(1, 2)  # (B, H, T, h)
    k = k.transpose(1, 2)  # (B, K, T, h)
    v = v.transpose(1, 2)
    group = q.size(1) // k.size(1)
    if not q.is_cuda:  # the CPU's fast kernel does not support grouped queries
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        group = 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1).transpose(1, 2)


def attend_with_cache(q: Tensor, k: Tensor, v: Tensor, context: CachedLayer) -> Tensor:
    """What `FusedCachedAttention` computes: a chunk of C tokens attends to cached tokens, which have no gradient, and
    to itself. Shapes as in `attend`, with T = C."""
    B, C, H, h = q.shape
    K = k.size(2)
    L = context.buffer.size(3)
    is_filled = torch.arange(L, device=q.device) < context.filled
    causal = is_filled.new_ones(C, C).tril()
    mask = torch.cat([is_filled.expand(C, -1), causal], 1)  # (C, L + C), True where a token attends to another

    cached_k, cached_v = context.buffer.float()
    k = k.transpose(1, 2).float()  # (B, K, C, h)
    v = v.transpose(1, 2).float()
    q_by_group = q.view(B, C, K, H // K, h).permute(0, 2, 3, 1, 4).reshape(B, K, -1, h).float()  # (B, K, H / K * C, h)

    scores = torch.cat([q_by_group @ cached_k.mT, q_by_group @ k.mT], -1) * h**-0.5
    p = scores.masked_fill(~mask.repeat(H // K, 1), -math.inf).softmax(-1)
    y = p[..., :L] @ cached_v + p[..., L:] @ v
    return y.view(B, K, H // K, C, h).permute(0, 3, 1, 2, 4).reshape(B, C, H, h).to(q.dtype)


def attention_reference(
    qkv: Tensor, gain: Tensor, gate: Tensor | None, rope: Rope, context: AttentionContext, heads: HeadLayout
) -> tuple[Tensor, Tensor | None]:
    """What `FusedAttention` computes on segments, and the same for a cache and for rows.

    Projections (B, T, (H + 2 K) h), a gain per query head (H,), a gate per token and head (B, T, H)
    -> output (B, T, H h), and with a cache the new keys and values to append to it (2, B, K, T, h), else None
    """
    B, T, _ = qkv.shape
    xsa, H, K, h = heads
    q, k, v = qkv.view(B, T, H + 2 * K, h).split([H, K, K], 2)
    q = apply_rope(norm(q), *rope) * gain.to(q.dtype)[:, None]
    k = apply_rope(norm(k), *rope)
    y = attend(q, k, v, context)
    if xsa:
        unit_value = F.normalize(v, dim=-1)[:, :, :, None]  # (B, T, K, 1, h)
        y = y.reshape(B, T, K, -1, h)
        y = y - (y * unit_value).sum(-1, keepdim=True) * unit_value
    if gate is not None:
        y = y.reshape(B, T, H, h) * gate[..., None]
    new_kv = None
    if isinstance(context, CachedLayer):
        new_kv = torch.stack([k.detach(), v.detach()]).transpose(2, 3)
    return y.reshape(B, T, H * h), new_kv


# ---- Layers ----


class LoRA(NamedTuple):
    """Low-rank corrections of one matrix, one for each document: (B, T, in) -> scale * x down up, (B, T, out).

    Hu et al., arXiv 2106.09685."""

    down: Tensor  # (B, in, R) fp32, or (in, R) where all documents share it
    up: Tensor  # (B, R, out) fp32
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.down.to(x.dtype)) @ self.up.to(x.dtype) * self.scale


class LayerLoRA(NamedTuple):
    """The corrections of one layer pass; None leaves a matrix as it is. `mlp` is parallel to the whole MLP."""

    q: LoRA | None = None
    k: LoRA | None = None
    v: LoRA | None = None
    o: LoRA | None = None
    mlp: LoRA | None = None


NO_LORA = LayerLoRA()
LORA_TARGETS = (*LayerLoRA._fields, "head")


class Linear(nn.Module):
    """A matrix: fp32 master weight (out, in), applied in the dtype of x. An output scale (out,) is folded in."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor, lora: LoRA | None = None, scale: Tensor | None = None) -> Tensor:
        """(B, T, in) -> (B, T, out)"""
        weight = self.weight if scale is None else self.weight * scale[:, None]
        y = F.linear(x, weight.to(x.dtype))
        if lora is None:
            return y
        correction = lora(x)
        return y + (correction if scale is None else correction * scale.to(x.dtype))


class JointProjection(nn.Module):
    """Applies several matrices (out, in) to one input in one matmul; a module, so that hooks see it."""

    def forward(self, x: Tensor, weights: Sequence[Tensor], loras: Sequence[LoRA | None]) -> Tensor:
        """(B, T, in) -> outputs side by side (B, T, sum of out)"""
        y = F.linear(x, torch.cat(weights).to(x.dtype))
        if all(lora is None for lora in loras):
            return y
        corrections = [
            x.new_zeros(*x.shape[:-1], len(weight)) if lora is None else lora(x)
            for weight, lora in zip(weights, loras, strict=True)
        ]
        return y + torch.cat(corrections, -1)


class Attention(nn.Module):
    """Grouped-query attention with QK norm, partial RoPE, XSA and a gate for each head's output.

    XSA: exclusive self-attention, Zhai, arXiv 2603.09078. The gate: Qiu et al., arXiv 2505.06708."""

    def __init__(self, c: ModelConfig, index: int):
        super().__init__()
        self.heads = HeadLayout(index >= c.num_layers - c.xsa_last_n, c.num_heads, c.num_kv_heads, c.head_dim)
        self.gate_width = c.attn_gate_width
        self.gate_scale = c.attn_gate_scale
        self.q = Linear(c.model_dim, c.model_dim)
        self.k = Linear(c.model_dim, c.kv_dim)
        self.v = Linear(c.model_dim, c.kv_dim)
        self.o = Linear(c.model_dim, c.model_dim)
        self.project = JointProjection()
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), c.qk_gain_init))
        self.gate = nn.Parameter(torch.zeros(c.num_heads, c.attn_gate_width)) if c.attn_gate_width else None

    def forward(
        self, x: Tensor, gate_input: Tensor, scale: Tensor, rope: Rope, context: AttentionContext, lora: LayerLoRA
    ) -> tuple[Tensor, Tensor | None]:
        """Normalised input (B, T, D), its first columns (B, T, gate_width), scale of the outputs (D,)
        -> (B, T, D), and new keys and values as `attention_reference` gives them."""
        weights = [self.q.weight, self.k.weight, self.v.weight]
        qkv = self.project(x, weights, [lora.q, lora.k, lora.v])
        gate = None
        if self.gate is not None:
            gate = (self.gate_scale * F.linear(gate_input, self.gate.to(x.dtype))).sigmoid()  # (B, T, H)
        if use_kernels(qkv) and isinstance(context, Segments):
            y, new_kv = self.fused(qkv, gate, rope, context), None
        else:
            y, new_kv = attention_reference(qkv, self.q_gain, gate, rope, context, self.heads)
        return self.o(y, lora.o, scale), new_kv

    def fused(self, qkv: Tensor, gate: Tensor | None, rope: Rope, segments: Segments) -> Tensor:
        """`attention_reference` on one packed row, by kernels."""
        if gate is None:
            gate = qkv.new_ones(1, qkv.size(1), self.heads.query_heads)
        cos, sin = rope
        rows = qkv.flatten(0, 1)  # not qkv[0]: the backward pass of a view is free, but indexing's is a copy
        y = FusedAttention.apply(rows, self.q_gain, gate.flatten(0, 1), cos[:, 0], sin[:, 0], segments, self.heads)
        return y[None]


class MLP(nn.Module):
    """scale * down(LeakyReLU(up(x))^2), with an optional correction parallel to all of it."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.slope = c.mlp_leaky_slope
        self.may_fuse = True  # `compile_parts` clears it where compiled code cannot hold FusedMLP
        self.up = Linear(c.model_dim, c.mlp_mult * c.model_dim)
        self.down = Linear(c.mlp_mult * c.model_dim, c.model_dim)

    def forward(self, x: Tensor, scale: Tensor, lora: LoRA | None = None) -> Tensor:
        """(B, T, D), scale of the outputs (D,) -> (B, T, D)"""
        if self.may_fuse and use_training_kernels(x, self.up.weight):
            up = self.up.weight.to(x.dtype)
            down = (self.down.weight * scale[:, None]).to(x.dtype)
            y = FusedMLP.apply(x.flatten(0, 1), up, down, self.slope).view_as(x)
        else:  # the reference of FusedMLP
            y = self.down(F.leaky_relu(self.up(x), self.slope).square(), None, scale)
        return y if lora is None else y + lora(x) * scale.to(x.dtype)


def mix_reference(x: Tensor, x0: Tensor, mix: Tensor, scale: Tensor, gate_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The start of a block: (B, T, D), (B, T, D), (2, D), ()
    -> mixed = mix[0] x + mix[1] x0, normalised = scale norm(mixed), the latter's first columns (B, T, gate_width)

    These columns are an output of their own for `FusedMix`, whose backward pass then gets their gradient as it is, not
    padded with zeros to the full width."""
    mixed = mix[0].to(x.dtype) * x + mix[1].to(x.dtype) * x0
    normalised = norm(mixed) * scale.to(x.dtype)
    return mixed, normalised, normalised[..., :gate_width]


class Block(nn.Module):
    """Attention, then an MLP, on one residual stream."""

    parallel = False

    def __init__(self, c: ModelConfig, index: int):
        super().__init__()
        self.attention = Attention(c, index)
        self.mlp = MLP(c)
        # A tensor, not a number: blocks then differ only in data and share their compiled code.
        self.register_buffer("input_scale", torch.tensor((index + 1.0) ** -c.ln_scale_power), persistent=False)
        self.attn_scale = nn.Parameter(torch.ones(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(c.model_dim))
        self.input_mix = nn.Parameter(torch.stack([torch.ones(c.model_dim), torch.zeros(c.model_dim)]))  # of x, of x0

    def attention_branch(
        self, x: Tensor, x0: Tensor, rope: Rope, context: AttentionContext, lora: LayerLoRA
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> x mixed with the embeddings x0, the output of attention, new keys and values for a cache"""
        mix = FusedMix.apply if use_training_kernels(x, self.input_mix) else mix_reference
        mixed, normalised, gate_input = mix(x, x0, self.input_mix, self.input_scale, self.attention.gate_width)
        output, new_kv = self.attention(normalised, gate_input, self.attn_scale, rope, context, lora)
        return mixed, output, new_kv

    def mlp_branch(self, x: Tensor, lora: LayerLoRA) -> Tensor:
        return self.mlp(norm(x) * self.input_scale.to(x.dtype), self.mlp_scale, lora.mlp)

    def forward(
        self, x: Tensor, x0: Tensor, rope: Rope, context: AttentionContext, lora: LayerLoRA
    ) -> tuple[Tensor, Tensor | None]:
        """Stream and normalised embeddings, (B, T, D) each -> stream (B, T, D), new keys and values for a cache"""
        x, attention, new_kv = self.attention_branch(x, x0, rope, context, lora)
        x = x + attention
        return x + self.mlp_branch(x, lora), new_kv


class ParallelBlock(Block):
    """Attention and MLP in parallel, on two residual streams: attention reads `a`, the MLP reads `m`, and both write
    to both."""

    parallel = True

    def __init__(self, c: ModelConfig, index: int):
        super().__init__(c, index)
        # A lane is a stream: artifacts and checkpoints hold these names.
        self.lane_keep = nn.Parameter(torch.full((2,), 1.1))  # of a, of m
        self.lane_mix = nn.Parameter(torch.ones(2, 2))  # [stream written][attention, MLP]

    def forward(
        self, a: Tensor, m: Tensor, x0: Tensor, rope: Rope, context: AttentionContext, lora: LayerLoRA
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Streams and normalised embeddings, (B, T, D) each -> both streams, new keys and values for a cache"""
        # Only attention reads the mix with x0; the stream goes on without it, unlike that of a Block.
        _, attention, new_kv = self.attention_branch(a, x0, rope, context, lora)
        mlp = self.mlp_branch(m, lora)
        keep = self.lane_keep.to(a.dtype)
        mix = self.lane_mix.to(a.dtype)
        new_a = keep[0] * a + mix[0, 0] * attention + mix[0, 1] * mlp
        new_m = keep[1] * m + mix[1, 0] * attention + mix[1, 1] * mlp
        return new_a, new_m, new_kv


class Skip(nn.Module):
    """A U-Net connection: x <- lerp(weight * saved, x, sigmoid(gate)). (B, T, D), (B, T, D), (D,), (D,) -> (B, T, D)"""

    def forward(self, x: Tensor, saved: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return torch.lerp(weight.to(x.dtype) * saved, x, gate.sigmoid().to(x.dtype))


class Lookup(nn.Module):
    """Rows of the embedding matrix, one for each token; a module, so that hooks see it."""

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """(B, T), (V, D) -> (B, T, D)"""
        return F.embedding(tokens, embedding)


class TokenEmbedding(nn.Module):
    """Normalised embeddings of tokens; a gate adds ("smears") the previous token's embedding."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.lookup = Lookup()
        self.smear = nn.Parameter(torch.zeros(c.smear_width)) if c.smear_width else None
        self.smear_gain = nn.Parameter(torch.zeros(1)) if c.smear_width else None

    def forward(self, tokens: Tensor, positions: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens (B, T), positions within their segments (T,), embedding matrix (V, D) -> (B, T, D)"""
        e = self.lookup(tokens, embedding)
        if self.smear is not None:
            gate = self.smear_gain * (e[..., : len(self.smear)] @ self.smear).sigmoid()
            gate = gate * ((tokens != BOS) & (positions > 0))  # nothing leaks into a document or segment
            e = torch.cat([e[:, :1], e[:, 1:] + gate[:, 1:, None] * e[:, :-1]], 1)
        return norm(e).to(dtype)


def softcap(z: Tensor, cap: float) -> Tensor:
    """Logits squashed into +-cap by tanh, or unchanged if cap is 0; fp32."""
    return cap * torch.tanh(z.float() / cap) if cap else z.float()


def loss_reference(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """What `FusedLoss` computes: uncapped logits (N, V), targets (N,) -> negative log-likelihoods (N,), nats"""
    return F.cross_entropy(softcap(z, cap), targets, reduction="none")


class OutputHead(nn.Module):
    """Hidden states to predictions: soft-capped logits from the tied embedding, over the whole vocabulary."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.cap = c.logit_softcap

    def uncapped_logits(self, x: Tensor, embedding: Tensor, lora: LoRA | None) -> Tensor:
        """(B, T, D), (V, D) -> (B, T, V) in the dtype of x"""
        z = F.linear(x, embedding.to(x.dtype))
        return z if lora is None else z + lora(x)

    def logits(self, x: Tensor, embedding: Tensor, lora: LoRA | None) -> Tensor:
        """(B, T, D), (V, D) -> (B, T, V) fp32"""
        return softcap(self.uncapped_logits(x, embedding, lora), self.cap)

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What `logits` returns (..., V) -> its probabilities, and the derivative of every logit with respect to its
        uncapped one"""
        slope = 1 - (logits / self.cap).square() if self.cap else torch.ones_like(logits)
        return logits.softmax(-1), slope

    def forward(self, x: Tensor, targets: Tensor, embedding: Tensor, lora: LoRA | None = None) -> Tensor:
        """(B, T, D), (B, T), (V, D) -> negative log-likelihood of every target, (B, T) nats"""
        z = self.uncapped_logits(x, embedding, lora).flatten(0, 1)
        loss = FusedLoss.apply if use_kernels(z) else loss_reference
        return loss(z, targets.flatten(), self.cap).view_as(targets)

    @torch.no_grad()
    def entropy(self, x: Tensor, embedding: Tensor, lora: LoRA | None = None) -> Tensor:
        """(B, T, D), (V, D) -> entropy of every prediction, (B, T) nats"""
        log_p = self.logits(x, embedding, lora).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)


# ---- The whole network ----


class LayerPass(NamedTuple):
    """One application of a block. With looping, a block has several."""

    block: int
    pushes_skip: bool  # its output is saved for a later pass
    pops_skip: int | None  # row of skip_weight and skip_gate that mixes the last saved output into its input


def layer_plan(c: ModelConfig, looping: bool) -> tuple[LayerPass, ...]:
    """The layer passes of a forward pass, in order: loops and skips are decided here and nowhere else.

    As in a U-Net, the last passes of the first half push skips, and the first ones of the second half pop them."""
    order = list(range(c.num_layers))
    if looping and c.num_loops:
        order[c.loop_end + 1 : c.loop_end + 1] = list(range(c.loop_start, c.loop_end + 1)) * c.num_loops
    half = len(order) // 2
    pairs = min(half, c.unet_skips)
    return tuple(
        LayerPass(block, half - pairs <= i < half, i - half if half <= i < half + pairs else None)
        for i, block in enumerate(order)
    )


class GPT(nn.Module):
    """The network: embedding, blocks in the order of `layer_plan`, output head."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.input = TokenEmbedding(c)
        self.head = OutputHead(c)
        self.skip = Skip()
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.model_dim))  # also the output matrix
        first_parallel = c.parallel_start_layer or c.num_layers
        kinds = [ParallelBlock if i >= first_parallel else Block for i in range(c.num_layers)]
        self.blocks = nn.ModuleList(kind(c, i) for i, kind in enumerate(kinds))
        pairs = sum(layer.pushes_skip for layer in layer_plan(c, looping=True))
        self.skip_weight = nn.Parameter(torch.ones(pairs, c.model_dim)) if pairs else None
        self.skip_gate = nn.Parameter(torch.zeros(pairs, c.model_dim)) if pairs else None
        self.gradient_rms: GradientRMS | None = None  # if known; for test-time training with TTT_OPTIMIZER=rms

    def hidden(
        self,
        tokens: Tensor,
        context: Segments | CachedContext | None = None,
        adapter: Adapter | None = None,
        looping: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, T) -> normalised states before the head (B, T, D), and with a cache the new keys and values of
        every layer pass, (2, B, K, C, h) each.

        Attention is causal within segments if there are any (then B is 1), else within rows. With a cache, `tokens`
        is the token before the chunk, needed only to smear its embedding, and then the chunk: T = 1 + C; the states
        are the chunk's, (B, C, D). `adapter` adds LoRA for test-time training; `looping` runs the loop of blocks."""
        cached = isinstance(context, CachedContext)
        positions = torch.arange(tokens.size(1), device=tokens.device) if context is None else context.positions
        x0 = self.input(tokens, positions, self.embed, activation_dtype(tokens.device))
        if cached:
            x0 = x0[:, 1:]
            positions = positions[1:]
        rope = rope_angles(positions, self.config.rope_dims, self.config.rope_base)

        a = x0.clone()  # a copy: the compiler would specialise a block if two of its arguments were one tensor
        m = None  # the second stream, where blocks are parallel
        skips, new_kvs = [], []
        for i, layer in enumerate(layer_plan(self.config, looping)):
            block = self.blocks[layer.block]
            lora = NO_LORA if adapter is None else adapter.passes[i]
            layer_context = CachedLayer(context.filled, context.buffers[i]) if cached else context
            if block.parallel and m is None:
                m = a  # before a skip joins: skips go only to the first stream
            if layer.pops_skip is not None:
                a = self.skip(a, skips.pop(), self.skip_weight[layer.pops_skip], self.skip_gate[layer.pops_skip])
            if block.parallel:
                a, m, new_kv = block(a, m, x0, rope, layer_context, lora)
            else:
                a, new_kv = block(a, x0, rope, layer_context, lora)
            if layer.pushes_skip:
                skips.append(a)
            if cached:
                new_kvs.append(new_kv)
        return norm(a if m is None else 0.5 * (a + m)), new_kvs

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Segments | None = None,
        adapter: Adapter | None = None,
        looping: bool = True,
    ) -> Tensor:
        """Tokens (B, T), targets of the last n (B, n) -> their negative log-likelihoods, (B, n) nats, unreduced"""
        states, _ = self.hidden(tokens, segments, adapter, looping)
        states = states[:, -targets.size(1) :].contiguous()
        return self.head(states, targets, self.embed, None if adapter is None else adapter.head)


def param_role(name: str) -> Literal["embedding", "matrix", "scalar"]:
    """What kind of parameter a name stands for: initialisation, optimizer and quantiser all decide by this."""
    if name == "embed":
        return "embedding"
    return "matrix" if name.endswith(".weight") else "scalar"


def init_weights(model: GPT, seed: int) -> None:
    """Make matrices orthogonal, or zero where they write to the residual stream, and the embedding small. Scalars
    keep the values they were built with. Drawn on the CPU, so that every device starts from the same weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if param_role(name) == "embedding":
            p.data.copy_(torch.empty(p.shape).normal_(0, 0.005, generator=generator))
        elif name.endswith((".o.weight", ".down.weight")):
            p.data.zero_()
        elif param_role(name) == "matrix":
            p.data.copy_(nn.init.orthogonal_(torch.empty(p.shape), generator=generator))


def compile_parts(model: GPT) -> None:
    """Compile the model that is trained, block by block: blocks of a kind share one graph. The model that is read back
    from the artifact runs eagerly."""
    for block in model.blocks:
        block.mlp.may_fuse = has_tma(model.embed.device)  # without TMA, FusedMLP's descriptors would break the graph
    for part in (model.input, model.head, model.skip, *model.blocks):
        part.compile()


# ======================================================================================================================
# Distributed and log: everything here is a no-op, or the obvious thing, when there is one rank.


def collective(method: Callable) -> Callable:
    """A decorator for Dist's methods in which all ranks take part. If a call fails because another rank has died, the
    watch ends the run and names that rank; if all ranks are alive, the error is raised."""

    @functools.wraps(method)
    def call(self: Dist, *values: Any) -> Any:
        try:
            return method(self, *values)
        except RuntimeError:
            if self.watch is not None:
                self.watch.wait_for_verdict()
            raise

    return call


class Dist:
    """The ranks of a run. GPU tensors travel over NCCL, decisions over gloo between hosts, so that no decision waits
    for a GPU."""

    MEETING_S = 300  # between the first and last rank's arrival; a rank may load torch from a slow disk

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"):
        self.rank = rank
        self.world = world
        self.device = torch.device(device)
        self.main = rank == 0
        self.hosts = [platform.node()] * world  # by rank
        self.watch: RankWatch | None = None

    @classmethod
    def from_env(cls, device: str, env: Mapping[str, str] = os.environ) -> Dist:
        """This process's rank as set by torchrun (RANK, WORLD_SIZE and LOCAL_RANK), else the only rank."""
        use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        require(not use_gpu or torch.cuda.is_available(), "DEVICE=cuda, but torch sees no GPU: use DEVICE=cpu or auto")
        world = torchrun_number(env, "WORLD_SIZE", default=1, low=1, high=MAX_RANKS)
        rank = torchrun_number(env, "RANK", default=0, low=0, high=world - 1)
        local_rank = torchrun_number(env, "LOCAL_RANK", default=0, low=0, high=rank)
        torchrun_number(env, "MASTER_PORT", default=1, low=1, high=65535)
        require(
            world == 1 or env.get("MASTER_ADDR", "") != "", f"MASTER_ADDR is empty, but WORLD_SIZE={world}: {TORCHRUN}"
        )

        if use_gpu:
            gpus = torch.cuda.device_count()
            require(
                local_rank < gpus,
                f"local rank {local_rank} has no GPU: this machine has {gpus}; "
                f"start torchrun with --nproc_per_node={gpus} or less",
            )
            torch.cuda.set_device(local_rank)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS sums in no fixed order
        return cls(rank, world, f"cuda:{local_rank}" if use_gpu else "cpu")

    def join(self, on_loss: Callable[[str], None] | None = None) -> None:
        """Meet the other ranks. Raises UserError if one does not show up.

        From then until `close`, a thread notices within seconds if another rank dies, whatever this rank is doing,
        and calls `on_loss` with a line that names the dead rank. NCCL would wait for minutes, and a rank that scores
        documents hears nothing from the others until the end.
        """
        if self.world == 1:
            return
        patience = datetime.timedelta(seconds=self.MEETING_S)
        try:
            store, _, _ = next(torch_dist.rendezvous("env://", self.rank, self.world, timeout=patience))
            store.set(f"host of rank {self.rank}", platform.node())
            self.hosts = [store.get(f"host of rank {rank}").decode() for rank in range(self.world)]
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            torch_dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"rank {self.rank} of {self.world} does not meet the others within {self.MEETING_S} s: {reason}; see "
                "whether one of them has ended, and whether MASTER_ADDR and MASTER_PORT are those of rank 0"
            ) from error
        if on_loss is not None:
            longest = datetime.timedelta(seconds=4 * RankWatch.SILENCE_S)
            group = torch_dist.new_group(backend="gloo", timeout=longest)  # not the group that the main thread uses
            self.watch = RankWatch(self, group, on_loss)

    def send(self, number: int, to: int, group: Any) -> None:
        torch_dist.isend(torch.tensor(number), to, group).wait()

    def receive(self, source: int, group: Any, seconds: float) -> int:
        """A number from rank `source`. Raises RuntimeError if that rank is gone, or silent for `seconds`."""
        number = torch.tensor(0)
        torch_dist.irecv(number, source, group).wait(datetime.timedelta(seconds=seconds))
        return int(number)

    @collective
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            torch_dist.all_reduce(x)
        return x

    @collective
    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum (n, ...) over ranks and keep this rank's n / world rows."""
        if self.world == 1 or not x.is_cuda:  # gloo has no reduce-scatter
            return self.all_reduce(x).chunk(self.world)[self.rank]
        out = x.new_empty(len(x) // self.world, *x.shape[1:])
        torch_dist.reduce_scatter_tensor(out, x)
        return out

    @collective
    def all_gather(self, x: Tensor) -> Tensor:
        """(n, ...) of every rank -> (n * world, ...) on all."""
        if self.world == 1:
            return x
        out = x.new_empty(len(x) * self.world, *x.shape[1:])
        torch_dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @collective
    def broadcast(self, *values: float) -> list[float]:
        """Rank 0's numbers, on every rank."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            torch_dist.broadcast(numbers, src=0)
        return numbers.tolist()

    @collective
    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        if self.world == 1:
            return data
        (size,) = self.broadcast(len(data))
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.main:
            buffer = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        torch_dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, on every rank; all must pass the same number of bytes."""
        everyone = self.all_gather(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
        return [part.numpy().tobytes() for part in everyone.chunk(self.world)]

    def gather_texts(self, text: str) -> list[str]:
        """The text of every rank, on every rank."""
        data = text.encode()
        size = int(self.all_reduce_max(len(data)))
        return [part.rstrip(b"\0").decode() for part in self.gather_bytes(data.ljust(size, b"\0"))]

    @collective
    def all_reduce_max(self, value: float) -> float:
        """The largest of the ranks' numbers, on every rank."""
        number = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            torch_dist.all_reduce(number, op=torch_dist.ReduceOp.MAX)
        return number.item()

    def barrier(self) -> None:
        self.all_reduce_max(0.0)

    def finish_kernels(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group once all ranks do."""
        if self.watch is not None:
            self.watch.stop()
        if self.world > 1:
            torch_dist.destroy_process_group()


class RankWatch:
    """A thread on every rank. In every round the others send rank 0 a message and wait for its reply, so that a rank
    that is gone or long silent is soon noticed: when a process ends, however it ends, its connections close."""

    PAUSE_S = 0.5  # between two rounds
    SILENCE_S = 120.0  # until a rank counts as lost; a machine may pause for a while, as in a live migration
    GRACE_S = 1.0  # for a rank that hits the same error as the lost one to report it itself

    # Rank 0's replies, other than the number of a lost rank.
    GO_ON = -1
    ALL_LEAVE = -2

    def __init__(self, dist: Dist, group: Any, on_loss: Callable[[str], None]):
        self.dist = dist
        self.group = group
        self.on_loss = on_loss
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch of the ranks", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Return when all ranks have called this."""
        self.leaving.set()
        self.thread.join()

    def wait_for_verdict(self) -> None:
        """Give the watch time to notice a lost rank."""
        self.thread.join(4 * (self.PAUSE_S + self.GRACE_S))

    def _run(self) -> None:
        verdict = self.GO_ON
        while verdict == self.GO_ON:
            verdict = self._ask_rank_0() if self.dist.rank else self._ask_the_others()
        if verdict != self.ALL_LEAVE:
            time.sleep(self.GRACE_S)
            self.on_loss(f"rank {verdict} on {self.dist.hosts[verdict]} ended or stopped answering; {WHERE_TO_LOOK}")

    def _ask_rank_0(self) -> int:
        try:
            self.dist.send(int(self.leaving.is_set()), 0, self.group)
            return self.dist.receive(0, self.group, 3 * self.SILENCE_S)  # it may be waiting for another rank
        except RuntimeError:
            return 0

    def _ask_the_others(self) -> int:
        self.leaving.wait(self.PAUSE_S)
        verdict = self.ALL_LEAVE if self.leaving.is_set() else self.GO_ON
        heard = []
        for rank in range(1, self.dist.world):
            # Once a rank is lost, do not wait long for the rest: the ranks already heard must learn of it soon.
            patience = self.SILENCE_S if verdict < 0 else self.PAUSE_S
            try:
                leaves = self.dist.receive(rank, self.group, patience)
                heard.append(rank)
                if verdict == self.ALL_LEAVE and not leaves:
                    verdict = self.GO_ON
            except RuntimeError:
                verdict = rank if verdict < 0 else verdict

        for rank in heard:
            with contextlib.suppress(RuntimeError):  # the next round will notice
                self.dist.send(verdict, rank, self.group)
        return verdict


WHERE_TO_LOOK = (
    "its own message is above, or on the screen of its machine; where there is none it was killed, perhaps for want of "
    "memory (dmesg)"
)


TORCHRUN = "torchrun sets this; start with torchrun, or without it and with these variables unset"
MAX_RANKS = 4096


def torchrun_number(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A variable that torchrun sets. Raises ConfigError unless it is a whole number from `low` to `high`."""
    text = env.get(name, str(default))
    ok = re.fullmatch(r"\d{1,9}", text, re.ASCII) is not None and low <= int(text) <= high
    require(ok, f"{name}={text[:80]!r}: expected a whole number from {low} to {high}: {TORCHRUN}")
    return int(text)


class LogFile:
    """A file that grows line by line. What cannot be written stays in memory until the next line: a full disk may
    have room again by then."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Unbuffered, and one write per line: a killed run leaves whole lines.
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115, open for the whole run
        self.waiting = b""

    def append(self, line: str) -> None:
        """Raises OSError if the line, or one before it, is not in the file."""
        self.waiting += line.encode("utf-8", "backslashreplace") + b"\n"
        while self.waiting:
            written = self.file.write(self.waiting)
            self.waiting = self.waiting[written:]
        self.path.stat()  # raises if the file is deleted: writes would still succeed, unseen


class Log:
    """What a run reports: lines for people, on the screen and in logs/<RUN_ID>.txt, and the same values as events for
    programs, one strict JSON object per line, in logs/<RUN_ID>.events.jsonl. Only rank 0 has files and a screen.

    A line that cannot be written does not end the run; each place causes one warning."""

    def __init__(self, path: Path | None = None, screen: Callable[[str], None] | None = None):
        """`path` is the file of lines; the file of events lies beside it."""
        self.screen = screen
        self.lines_file = None
        self.events_file = None
        if path is not None:
            self.lines_file = LogFile(path)
            self.events_file = LogFile(path.with_suffix(".events.jsonl"))
        self.failed: set[str] = set()  # places where a line could not be written
        self.untold: list[str] = []  # warnings about them, to report after the failed line
        self.warnings: set[str] = set()

    def line(self, text: str, screen: bool = True) -> None:
        """Report text for people that is not an event."""
        if self.screen is not None and screen:
            self._write(self.screen, text, "the screen")
        if self.lines_file is not None:
            self._write(self.lines_file.append, text, str(self.lines_file.path))
        self._tell()

    def event(self, event: str, template: str = "", /, **values: Any) -> None:
        """Report an event. The line for people is `template`, formatted with the values; without a template there is
        no line. The event is written first: whoever sees the line finds the event on disk."""
        if self.events_file is not None:
            # JSON has no NaN and no infinity: a loss that is not finite becomes null.
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()
            }
            text = json.dumps({"event": event, **finite}, allow_nan=False)
            self._write(self.events_file.append, text, str(self.events_file.path))
        if template:
            self.line(template.format(**values))
        self._tell()

    def warn(self, text: str) -> None:
        """Report a problem that need not end the run; the same text only once."""
        if text not in self.warnings:
            self.warnings.add(text)
            self.event("warning", "warning: {text}", text=text)

    def _write(self, write: Callable[[str], None], text: str, place: str) -> None:
        try:
            write(text)
        except (OSError, ValueError) as error:  # ValueError: a closed screen, or one that cannot encode it
            if place not in self.failed:
                self.failed.add(place)
                self.untold.append(printable(f"{place}: a line cannot be written: {error}; the run goes on"))

    def _tell(self) -> None:
        while self.untold:
            self.warn(self.untold.pop())


def print_now(text: str) -> None:
    print(text, flush=True)


SECONDS_BETWEEN_REPORTS = 10.0


class ScoringProgress:
    """Reports every ten seconds how far a pass over documents has got. Short passes end before the first report."""

    def __init__(self, log: Log, what: str):
        """`what` is the log's name for that which is scored."""
        self.log = log
        self.what = what
        self.started = self.reported = time.perf_counter()

    def __call__(self, done: int, targets: int) -> None:
        """Call whenever more targets are scored: `done` of `targets`, or more if it is one rank's guess for all."""
        now = time.perf_counter()
        if now - self.reported < SECONDS_BETWEEN_REPORTS:
            return
        self.reported = now
        done = min(done, targets)
        self.log.event(
            "scoring",
            "scoring {what}: {targets_done}/{targets} targets eta_s:{eta_s:.0f}",
            what=self.what,
            targets_done=done,
            targets=targets,
            eta_s=(now - self.started) * (targets / done - 1),
        )


def no_progress(done: int, targets: int) -> None:
    """In place of a ScoringProgress: reports nothing."""


class Stopwatch:
    """Seconds spent in each phase. Only some count against a limit; to pause the clock, start another phase."""

    def __init__(self, dist: Dist):
        self.dist = dist
        self.seconds = {}  # {phase: seconds so far}
        self.running = []  # phases in progress, innermost last
        self.since = time.perf_counter()  # up to here, all time is in `seconds`

    def _charge(self) -> None:
        """Add the time since the last call to the innermost phase."""
        now = time.perf_counter()
        if self.running:
            phase = self.running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent inside counts towards `name`, not the enclosing phase. Waits for kernels at both ends."""
        self.dist.finish_kernels()
        self._charge()
        self.running.append(name)
        try:
            yield
            self.dist.finish_kernels()
        finally:
            self._charge()
            self.running.pop()

    def total(self, *names: str) -> float:
        """Seconds spent in these phases so far, including the running one."""
        self._charge()
        return sum(self.seconds.get(name, 0.0) for name in names)


# The phases that count against a limit: from the first real batch to the packed file, and from opening the artifact to
# the final score.
TRAINING_CLOCK = ("train", "checkpoint", "choose", "gradients", "calibrate", "factorise", "quantise", "pack")
EVALUATION_CLOCK = ("unpack", "evaluate: warm-up", "evaluate: score")


def write_atomically(path: Path | str, chunks: Iterable[bytes], parents: bool = False) -> None:
    """Write to a temporary file beside `path`, then rename it: a reader sees the whole file or none, and an interrupted
    write leaves nothing behind. With `parents`, missing folders are created. Raises UserError."""
    path = Path(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        if parents and not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            out.writelines(chunks)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; free some disk or write elsewhere") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, there may be nothing to remove
            partial.unlink(missing_ok=True)


def read_on_main(path: str | Path, dist: Dist) -> bytes:
    """The content of rank 0's file, on every rank: another machine may lack it or hold an older version."""
    return dist.broadcast_bytes(read_file(path) if dist.main else b"")


def read_file(path: str | Path, advice: str = "") -> bytes:
    """A file's content. Raises DataError, whose message ends with `advice`."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise DataError(f"{path}: cannot be read: {error.args[-1]}{advice}") from None


# ======================================================================================================================
# Data: shards are memory-mapped and not trusted until checked; a batch is a pure function of its number.


# ---- Shards ----

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


def read_shard(path: Path | str) -> np.ndarray:
    """Memory-map a shard: 256 little-endian int32 (magic, version, count, zeros), then `count` uint16 -> (count,).

    Raises DataError if the file cannot be read, is not a shard, or does not have the size its header promises.
    """
    path = Path(path)
    header_bytes = 4 * SHARD_HEADER_INTS
    hint = "prepare the data again (./run.sh data --help)"

    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {hint}") from None
    if size < header_bytes:
        raise DataError(f"{path}: {size} bytes are too few for a shard's header of {header_bytes}; {hint}")

    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    require(
        (magic, version) == (SHARD_MAGIC, SHARD_VERSION),
        f"{path}: not a shard: magic and version are {magic}, {version}, "
        f"expected {SHARD_MAGIC}, {SHARD_VERSION}; {hint}",
        DataError,
    )
    require(
        count >= 0 and size == header_bytes + 2 * count,
        f"{path}: the header promises {count} tokens, the file's {size} bytes "
        f"hold {(size - header_bytes) / 2:g}: truncated or damaged; {hint}",
        DataError,
    )
    if count == 0:
        return np.zeros(0, "<u2")  # an empty file region cannot be mapped
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


def require_uncut(path: Path, shard: np.ndarray) -> None:
    """Refuse a mapped shard whose file has been cut since: what is missing would read as zeros, or kill the process. A
    file that was replaced, which is how preparation writes, stays whole for whoever has it mapped."""
    if isinstance(shard.base, mmap.mmap):
        size = shard.base.size()  # of the file, now
        expected = 4 * SHARD_HEADER_INTS + shard.nbytes
        require(
            size >= expected,
            f"{path}: was cut from {expected} to {size} bytes while it was in use; prepare the data again",
            DataError,
        )


def check_vocabulary(path: Path, tokens: np.ndarray, vocab_size: int, start: int = 0) -> None:
    """Raise DataError if a token lies outside the vocabulary: the embedding would be read out of bounds.

    Tokens (n,) begin at position `start` of the shard `path`.
    """
    if tokens.max(initial=0) < vocab_size:
        return
    first = int(np.argmax(tokens >= vocab_size))
    raise DataError(
        f"{path}: token {tokens[first]} at position {start + first}, but VOCAB_SIZE={vocab_size} allows 0 to "
        f"{vocab_size - 1}: another tokenizer made this shard, or it is damaged; prepare the data again, or set "
        "VOCAB_SIZE and TOKENIZER_PATH to those of this shard"
    )


SAMPLED_PLACES = 64  # of a shard
SAMPLED_TOKENS = 64  # at each place


def sample_shard(shard: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """About 4,000 tokens spread over the whole shard -> (position, tokens there) for each place.

    Enough to notice a shard of other text or another tokenizer, and cheap: it reads 64 pages from disk.
    """
    places = np.linspace(0, max(0, len(shard) - SAMPLED_TOKENS), SAMPLED_PLACES, dtype=np.int64)
    return [(start, shard[start : start + SAMPLED_TOKENS]) for start in np.unique(places).tolist()]


def check_shard(path: Path, shard: np.ndarray, vocab_size: int, listed: Mapping[str, Any]) -> None:
    """Check a training shard against its manifest entry, and a sample of its tokens against the vocabulary: a run
    should not fail only at the step that reaches the first bad token. Raises DataError."""
    count = listed.get("tokens", len(shard))
    require(
        count == len(shard),
        f"{path}: {len(shard)} tokens, but {str(count)[:20]} by the manifest: it belongs to other data; "
        "prepare the data again",
        DataError,
    )
    for start, tokens in sample_shard(shard):
        check_vocabulary(path, tokens, vocab_size, start)


def find_shards(folder: str, kind: str) -> list[Path]:
    """The shards fineweb_<kind>_NNNNNN.bin of a folder, in order; DataError if there is none."""
    paths = sorted(Path(folder).glob(f"fineweb_{kind}_[0-9]*.bin"))
    require(paths != [], f"DATA_PATH={folder}: no fineweb_{kind}_*.bin; prepare some (./run.sh data --help)", DataError)
    return paths


def manifest_value(folder: Path, *keys: str) -> Any:
    """An entry of a prepared folder's manifest.json; None if there is no such file or entry. Raises DataError if the
    file is not JSON: then nothing tells whether the folder holds what was prepared."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {brief(str(error))}; prepare the data again") from None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- Tokenizer ----


class PieceBytes(NamedTuple):
    """How many bytes each of a tokenizer's V pieces stands for, by the contest's formula."""

    sizes: np.ndarray  # (V,) int64, UTF-8 bytes of the piece without its leading space mark
    leading_space: np.ndarray  # (V,) bool, the piece begins with the space mark
    control: np.ndarray  # (V,) bool, control, unknown or unused: no bytes, and a space right after it is not counted
    excess: np.ndarray  # (V,) int64, bytes in `sizes` beyond the text's: a later space mark is 3 bytes, its space 1


def piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> PieceBytes:
    """Byte pieces are 1 byte, others their UTF-8 length without a leading "▁"; control and unknown pieces 0."""
    vocab_size = processor.get_piece_size()
    sizes = np.zeros(vocab_size, np.int64)
    leading_space = np.zeros(vocab_size, bool)
    control = np.zeros(vocab_size, bool)
    excess = np.zeros(vocab_size, np.int64)

    for i in range(vocab_size):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            control[i] = True
        elif processor.is_byte(i):
            sizes[i] = 1
        else:
            piece = processor.id_to_piece(i)
            sizes[i] = len(piece.removeprefix("▁").encode())
            leading_space[i] = piece.startswith("▁")
            excess[i] = piece[1:].count("▁") * (len("▁".encode()) - len(" "))
    return PieceBytes(sizes, leading_space, control, excess)


def contest_bytes(tokens: np.ndarray, pieces: PieceBytes) -> np.ndarray:
    """Bytes every token stands for: its piece's, plus 1 for a leading space after text. (n,) -> (n,) int64

    The space is not counted after a control token, such as BOS, or at the very first token.
    """
    follows_text = np.concatenate([[False], ~pieces.control[tokens[:-1]]])
    return pieces.sizes[tokens] + (pieces.leading_space[tokens] & follows_text)


class Tokenizer(NamedTuple):
    path: Path
    sha256: str  # of the file
    processor: sentencepiece.SentencePieceProcessor
    pieces: PieceBytes


def load_tokenizer(run: RunConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of the data: TOKENIZER_PATH, else the one that the manifest in DATA_PATH names.

    Raises DataError if there is none, or if it does not have `vocab_size` pieces and the BOS that shards use.
    """
    named = manifest_value(Path(run.data_path), "tokenizer", "path")
    if run.tokenizer_path:
        path = Path(run.tokenizer_path)
    elif isinstance(named, str):
        path = Path(run.data_path) / named
    else:
        require(os.path.isdir(run.data_path), f"DATA_PATH={run.data_path}: no such folder: prepare data", DataError)
        raise DataError(
            f"DATA_PATH={run.data_path}: no manifest.json names a tokenizer: prepare data, or set TOKENIZER_PATH"
        )

    # The manifest may name anything, and reading a device or a pipe might never end.
    require(os.path.isfile(path) or not os.path.exists(path), f"{path}: not a file; set TOKENIZER_PATH", DataError)
    blob = read_file(path, "; set TOKENIZER_PATH")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(blob)
        size = processor.get_piece_size()
        bos = processor.bos_id()
        pieces = piece_bytes(processor)
    except (RuntimeError, ValueError):  # ValueError: a piece is not valid UTF-8
        raise DataError(f"{path}: not a SentencePiece model; set TOKENIZER_PATH to one") from None

    remedy = "set another TOKENIZER_PATH" if run.artifact else f"set VOCAB_SIZE={size} or another TOKENIZER_PATH"
    require(
        size == vocab_size,
        f"{path}: the tokenizer has {size} pieces, the model VOCAB_SIZE={vocab_size}; {remedy}",
        DataError,
    )
    require(bos == BOS, f"{path}: BOS is {bos}, expected {BOS}: use another tokenizer", DataError)
    return Tokenizer(path, hashlib.sha256(blob).hexdigest(), processor, pieces)


# ---- Documents to score ----


class Documents(NamedTuple):
    """A stream of n tokens to score, such as the validation set, and where its documents begin.

    A document's targets are its tokens after BOS and then the next document's BOS, which closes it. So every token of
    the stream but the first is a target of exactly one document; the last document has no closing BOS.
    """

    tokens: np.ndarray  # (n,) uint16, BOS before every document
    bytes: np.ndarray  # (n,) int64, bytes of original text that every token stands for
    starts: np.ndarray  # (documents + 1,) position of every BOS, then n
    by_formula: bool = False  # bytes are counted by the contest's formula (`contest_bytes`), not by side-cars

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Targets of every document, (documents,)."""
        last_targets = np.minimum(self.starts[1:], len(self.tokens) - 1)
        return last_targets - self.starts[:-1]

    def span(self, i: int) -> np.ndarray:
        """Tokens of document i with its closing BOS, (lengths[i] + 1,): all but the last are inputs."""
        return self.tokens[self.starts[i] : self.starts[i + 1] + 1]

    def target_bytes(self) -> np.ndarray:
        """Bytes of every document's targets, (documents,)."""
        cumulative = np.concatenate([[0], np.cumsum(self.bytes[1:], dtype=np.int64)])  # [t]: bytes of tokens 1..t
        begin = self.starts[:-1]
        return cumulative[begin + self.lengths] - cumulative[begin]

    def excess_bytes(self, pieces: PieceBytes) -> int:
        """How many bytes the contest's formula counts beyond the text's own, which flatters bits per byte. 0 for
        tokenizers with spaces only at the start of pieces, and where side-cars give the bytes."""
        return int(pieces.excess[self.tokens].sum()) if self.by_formula else 0

    def sha256(self) -> str:
        """Identifies tokens and bytes."""
        return hashlib.sha256(self.tokens.astype("<u2").tobytes() + self.bytes.astype("<i8").tobytes()).hexdigest()

    def tokens_sha256(self) -> str:
        """Identifies the tokens alone, as for training text, whose bytes are unknown."""
        return hashlib.sha256(self.tokens.astype("<u2").tobytes()).hexdigest()


def split_documents(tokens: np.ndarray, token_bytes: np.ndarray, by_formula: bool = False) -> Documents:
    """Tokens (n,) and their bytes (n,), counted by the contest's formula or not -> documents, one for every BOS."""
    starts = np.append(np.flatnonzero(tokens == BOS), len(tokens))
    return Documents(tokens, token_bytes, starts, by_formula)


def load_validation(folder: str, vocab_size: int, tokenizer: Tokenizer) -> Documents:
    """All validation shards as one stream. Every token is checked: a bad one would cost a whole run. Only the stream
    as a whole must begin with a document: the contest's script cuts shards inside documents and may leave one empty.

    Raises DataError for a damaged shard or side-car, a missing side-car, files that differ from the manifest, and a
    validation set without text.
    """
    shards = {path: read_shard(path) for path in find_shards(folder, "val")}
    check_continuity(shards)
    for path, shard in shards.items():
        check_vocabulary(path, shard, vocab_size)

    check_digests(Path(folder), tokenizer)
    tokens = np.concatenate(list(shards.values()))
    token_bytes = read_sidecars(folder, shards)
    by_formula = token_bytes is None
    if by_formula:
        # Markers are not text, but the formula would count three bytes for each: the score would be too low.
        require(
            transform_of(Path(folder), tokenizer) == "none",
            f"DATA_PATH={folder}: its text was changed by CaseOps, so that only side-cars (fineweb_val_bytes_*.bin) "
            "can count its bytes, and there is none: copy them with manifest.json, or prepare the data again",
            DataError,
        )
        token_bytes = contest_bytes(tokens, tokenizer.pieces)

    docs = split_documents(tokens, token_bytes.astype(np.int64), by_formula)
    require(
        docs.target_bytes().sum() > 0,
        f"DATA_PATH={folder}: validation stands for no text at all; prepare the data again",
        DataError,
    )
    return docs


def check_continuity(shards: Mapping[Path, np.ndarray]) -> None:
    """Validation must begin with BOS and hold a document. A shard that begins inside a document needs the shard
    numbered just before it: after any other, the end of one document would be scored as the end of another."""
    first = next((path for path, shard in shards.items() if len(shard) > 0), next(iter(shards)))
    beginning = shards[first][:4].tolist()
    require(
        beginning[:1] == [BOS] and sum(map(len, shards.values())) > 1,
        f"{first}: validation must begin with BOS ({BOS}) and hold a document: "
        f"found {beginning}; prepare the data again",
        DataError,
    )
    names = {path.name for path in shards}
    for path, shard in shards.items():
        if len(shard) == 0 or shard[0] == BOS:
            continue
        digits = path.stem.rpartition("_")[2]
        before = f"fineweb_val_{int(digits) - 1:0{len(digits)}}.bin" if digits.isdecimal() else "the shard before it"
        require(
            before in names,
            f"{path}: begins inside a document, found {shard[:4].tolist()}, and {before} is missing; "
            "prepare the data again",
            DataError,
        )


def read_sidecars(folder: str, shards: Mapping[Path, np.ndarray]) -> np.ndarray | None:
    """The bytes behind every token of these validation shards, (n,) uint16, from fineweb_val_bytes_NNNNNN.bin.

    None if the folder has no side-car and its manifest lists none: then the contest's formula counts. The formula
    must not replace a missing side-car: it would count the pieces that mark capitals as bytes of text.
    """
    paths = [sidecar_of(path) for path in shards]
    expected = manifest_value(Path(folder), "splits", "val", "sidecars")
    if not expected and not any(path.exists() for path in paths):
        return None

    counts = [read_shard(path) for path in paths]
    for path, shard, count in zip(paths, shards.values(), counts, strict=True):
        require(
            len(shard) == len(count),
            f"{path}: {len(count)} entries for {len(shard)} tokens; prepare the data again",
            DataError,
        )
    return np.concatenate(counts)


def sidecar_of(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("_val_", "_val_bytes_"))


def check_digests(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise DataError unless the tokenizer, the validation shards and their side-cars are those in the manifest: one
    flipped bit in a side-car, or another tokenizer of the same size, would silently change the score."""
    expected = manifest_value(folder, "tokenizer", "sha256")
    require(
        expected in (None, tokenizer.sha256),
        f"{tokenizer.path}: its SHA-256 is {tokenizer.sha256[:12]}…, but the shards of {folder} were made with "
        f"{str(expected)[:12]}…: name that tokenizer with TOKENIZER_PATH, or prepare the data again",
        DataError,
    )
    shards = find_shards(str(folder), "val")
    check_listed(folder, "val", "shards", shards)
    check_listed(folder, "val", "sidecars", [path for path in map(sidecar_of, shards) if path.exists()])
    for name, digest in listed_digests(folder).items():
        found = hashlib.sha256(read_file(folder / name, "; prepare the data again")).hexdigest()
        require(
            found == digest,
            f"{folder / name}: its SHA-256 is {found[:12]}…, the manifest says {digest[:12]}…: "
            "it is damaged, or belongs to other data; prepare the data again",
            DataError,
        )


def listed_digests(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the validation shards and side-cars that a folder's manifest lists."""
    listed = listed_files(folder, "val", "shards") | listed_files(folder, "val", "sidecars")
    return {name: entry["sha256"] for name, entry in listed.items() if isinstance(entry.get("sha256"), str)}


def listed_files(folder: Path, split: str, kind: str) -> dict[str, dict[str, Any]]:
    """{name: entry} of the shards or side-cars of a split that a folder's manifest lists."""
    listed = manifest_value(folder, "splits", split, kind)
    files: dict[str, dict[str, Any]] = {}
    for entry in listed if isinstance(listed, list) else []:
        match entry:
            case {"file": str(name)} if Path(name).name == name:
                files[name] = entry
    return files


def check_listed(folder: Path, split: str, kind: str, paths: Iterable[Path]) -> None:
    """Raise DataError for a shard or side-car missing from the manifest, if the manifest lists the split's shards."""
    if not listed_files(folder, split, "shards"):
        return
    listed = listed_files(folder, split, kind)
    for path in paths:
        require(
            path.name in listed,
            f"{path}: the manifest lists {kind}, but not this one: it belongs to other data; remove it, or prepare the "
            "data again",
            DataError,
        )


MARKERS = frozenset("\ue001\ue002\ue003\ue004")  # CaseOps marks capitals with these


def has_markers(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a tokenizer was made for CaseOps text."""
    return any(MARKERS.intersection(processor.id_to_piece(i)) for i in range(processor.get_piece_size()))


def transform_of(folder: Path, tokenizer: Tokenizer) -> Literal["caseops", "none"]:
    """How a folder's text was transformed before tokenisation: by CaseOps if the manifest says so, or if the
    tokenizer has pieces with its markers. Raises DataError if the manifest names an unknown transform, or "none"
    although pieces have markers."""
    stated = manifest_value(folder, "tokenizer", "transform")
    marked = has_markers(tokenizer.processor)
    require(
        stated in (None, "caseops") or (stated == "none" and not marked),
        f"{folder / 'manifest.json'}: says that text was transformed by {brief(stated)}, but "
        f"{'the tokenizer has pieces of CaseOps' if marked else 'no such transform is known'}; prepare the data again",
        DataError,
    )
    return "caseops" if stated == "caseops" or marked else "none"


# ---- Micro-batches ----


class MicroBatch(NamedTuple):
    """The input of one forward pass: N tokens of packed text on the device."""

    tokens: Tensor  # (1, N) int64
    targets: Tensor  # (1, N) int64
    segments: Segments


def make_micro_batch(tokens: np.ndarray, targets: np.ndarray, starts: np.ndarray, device: torch.device) -> MicroBatch:
    """Tokens (N,), targets (N,) and the start positions of segments (S,) -> tensors on the device.

    The copy to a GPU is asynchronous, from pinned memory.
    """
    sizes = np.diff(starts, append=len(tokens))
    positions = np.arange(len(tokens)) - np.repeat(starts, sizes)
    ends = np.repeat(starts + sizes, sizes)

    def to_device(array: np.ndarray, dtype: type) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    return MicroBatch(
        to_device(tokens, np.int64)[None],
        to_device(targets, np.int64)[None],
        Segments(to_device(positions, np.int32), to_device(ends, np.int32)),
    )


def split_rows(batch: MicroBatch, row_tokens: int) -> Iterator[MicroBatch]:
    """A micro-batch of whole rows -> one micro-batch per row."""
    for start in range(0, batch.tokens.size(1), row_tokens):
        row = slice(start, start + row_tokens)
        positions, ends = batch.segments
        yield MicroBatch(batch.tokens[:, row], batch.targets[:, row], Segments(positions[row], ends[row] - start))


def segment_starts(tokens: np.ndarray, row_tokens: int, seq_len: int) -> np.ndarray:
    """Where attention restarts in consecutive rows: at every row and BOS, and every seq_len tokens after them.

    Tokens (N,) -> positions (S,), ascending.
    """
    restarts = tokens == BOS
    restarts[::row_tokens] = True
    stretches = np.flatnonzero(restarts)

    # A stretch of n tokens is ceil(n / seq_len) segments.
    counts = -(-np.diff(stretches, append=len(tokens)) // seq_len)
    first = np.cumsum(counts) - counts
    index_in_stretch = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.repeat(stretches, counts) + index_in_stretch * seq_len


def text_micro_batch(text: np.ndarray, row_tokens: int, context: int, device: torch.device) -> MicroBatch:
    """Whole training rows of N tokens and the token after them, (N + 1,) -> a micro-batch of N targets, each
    predicted from at most `context` tokens."""
    tokens = text[:-1]
    targets = text[1:]
    starts = segment_starts(tokens, row_tokens, context)
    return make_micro_batch(tokens, targets, starts, device)


# ---- The training stream ----

CONTEST_GPU_SECONDS = 4_800.0
CONTEST_BATCH_TOKENS = 786_432
BATCH_POWER = 2 / 3  # the batch grows as the budget to this power (EXPERIMENTS.md, section 29)


def with_batch(run: RunConfig, world: int) -> RunConfig:
    """The run with its batch size set: TRAIN_BATCH_TOKENS=0 derives it from the budget on `world` ranks.

    A short run needs more steps rather than less gradient noise. Each rank gets 1, 2, 3, 4, 6, 8, 12, ... rows, which
    divide into micro-batches of many sizes. Only the configured budget counts, not a measured speed: the same run has
    the same batch on any machine. A budget beyond the contest's keeps the contest's batch: it may stand for "no limit".
    """
    if run.train_batch_tokens:
        return run
    share = 1.0  # of the contest's budget; a run without a limit in seconds counts as all of it
    if run.max_wallclock_seconds:
        share = min(1.0, run.max_wallclock_seconds * world / CONTEST_GPU_SECONDS)
    wanted = max(1.0, CONTEST_BATCH_TOKENS * share**BATCH_POWER)
    smallest = world * run.train_row_tokens
    sizes = [smallest * rows * 2**doublings for rows in (1, 3) for doublings in range(32)]
    nearest = min(sizes, key=lambda size: abs(math.log(size / wanted)))
    return dataclasses.replace(run, train_batch_tokens=nearest)


def split_batch(run: RunConfig, world: int) -> tuple[int, int]:
    """How each rank processes its share of a batch -> (rows of a micro-batch, gradient accumulation steps).

    A micro-batch is as large as MICRO_BATCH_TOKENS allows. Raises ConfigError if the ranks cannot share the rows
    equally, and names the nearest batch that works.
    """
    rows = run.train_batch_tokens // run.train_row_tokens
    nearest = max(1, round(rows / world)) * world * run.train_row_tokens
    require(
        rows % world == 0,
        f"TRAIN_BATCH_TOKENS={run.train_batch_tokens} is {rows} rows of {run.train_row_tokens} "
        f"tokens, which {world} ranks cannot share equally; the nearest valid batch is {nearest}",
    )
    rank_rows = rows // world
    divisors = [n for n in range(1, rank_rows + 1) if rank_rows % n == 0]
    micro_batch_rows = max(n for n in divisors if n * run.train_row_tokens <= run.micro_batch_tokens)
    return micro_batch_rows, rank_rows // micro_batch_rows


class TrainingStream:
    """The training shards as one endless stream of tokens: the first shard follows the last.

    Batch b starts at token b * TRAIN_BATCH_TOKENS, whatever the number of ranks, and is cut into rows of
    TRAIN_ROW_TOKENS. How it is loaded:

        batch(b)           returns it, and starts loading batch b + 1
        _load(b)           in a thread: this rank's share of the rows, one micro-batch after another
        read(start, n)     checked tokens, from the memory-mapped shards
        text_micro_batch   inputs, targets and segments, copied to the device

    Raises ConfigError if the ranks cannot share a batch, DataError for shards that cannot be trained on.
    """

    def __init__(self, run: RunConfig, vocab_size: int, dist: Dist):
        self.run = run
        self.vocab_size = vocab_size
        self.dist = dist
        self.micro_batch_rows, self.grad_accum_steps = split_batch(run, dist.world)

        self.paths = find_shards(run.data_path, "train")
        self.shards = [read_shard(path) for path in self.paths]
        self.check_shards()
        sizes = [len(shard) for shard in self.shards]
        self.shard_ends = np.cumsum(sizes)
        self.shard_starts = self.shard_ends - sizes

        # The end of the last shard is held out, so that choices are made on text that training never sees.
        all_tokens = int(self.shard_ends[-1])
        self.total = all_tokens - run.holdout_tokens  # tokens of an epoch

        self.loader = ThreadPoolExecutor(1)
        # By batch number and context; holds at most the next batch.
        self.loading: dict[tuple[int, int], Future[list[MicroBatch]]] = {}

        beginning = self.shards[0][: 1 << 24]  # 32 MiB, far more than a document
        require(BOS in beginning, f"{self.paths[0]}: no BOS ({BOS}); prepare the data again", DataError)
        require(
            self.total > run.train_row_tokens,
            f"DATA_PATH={run.data_path}: {all_tokens} training tokens less HOLDOUT_TOKENS={run.holdout_tokens} are no "
            f"more than a row, TRAIN_ROW_TOKENS={run.train_row_tokens}: prepare more data or lower these",
            DataError,
        )

    def check_shards(self) -> None:
        """Raise DataError for a shard that differs from the manifest, or with a sampled token outside the vocabulary.
        `read` later catches what the sample misses."""
        folder = Path(self.run.data_path)
        check_listed(folder, "train", "shards", self.paths)
        listed = listed_files(folder, "train", "shards")
        for path, shard in zip(self.paths, self.shards, strict=True):
            check_shard(path, shard, self.vocab_size, listed.get(path.name, {}))

    def batch(self, number: int, context: int = 0) -> list[MicroBatch]:
        """This rank's grad_accum_steps micro-batches of a batch, with targets predicted from at most `context` tokens
        (0: TRAIN_SEQ_LEN). Meanwhile the next batch is loaded for the same context; it is loaded again if the next
        call asks for another context."""
        context = context or self.run.train_seq_len
        current = self.loading.get((number, context))
        if current is None:
            current = self.loader.submit(self._load, number, context)
        self.loading = {(number + 1, context): self.loader.submit(self._load, number + 1, context)}
        return current.result()

    def _load(self, number: int, context: int) -> list[MicroBatch]:
        """Read this rank's share of a batch: consecutive rows, the r-th of equal shares for rank r."""
        micro_batch_tokens = self.micro_batch_rows * self.run.train_row_tokens
        rank_tokens = self.grad_accum_steps * micro_batch_tokens
        begin = number * self.run.train_batch_tokens + self.dist.rank * rank_tokens

        micro_batches = []
        for start in range(begin, begin + rank_tokens, micro_batch_tokens):
            text = self.read(start, micro_batch_tokens + 1)  # and the last input's target
            micro_batches.append(text_micro_batch(text, self.run.train_row_tokens, context, self.dist.device))
        return micro_batches

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from any position of the endless stream, (count,) uint16.

        Raises DataError for a token outside the vocabulary, and names its shard.
        """
        parts = []
        position = start % self.total
        while count > 0:
            i = int(np.searchsorted(self.shard_ends, position, side="right"))
            begin = int(position - self.shard_starts[i])
            part = self._part(i, begin, begin + min(count, self.total - position))
            parts.append(part)
            count -= len(part)
            position = (position + len(part)) % self.total
        return np.concatenate(parts)

    def _part(self, i: int, begin: int, end: int) -> np.ndarray:
        """Checked tokens of shard i, as many of begin..end as it has."""
        require_uncut(self.paths[i], self.shards[i])
        part = self.shards[i][begin:end]
        check_vocabulary(self.paths[i], part, self.vocab_size, begin)
        return part

    def held_out(self) -> Documents:
        """The whole documents among the held-out tokens."""
        # In each shard; beyond its end where nothing of it is held out.
        begins = [max(0, self.total - start) for start in self.shard_starts.tolist()]
        parts = [self._part(i, begin, len(self.shards[i])) for i, begin in enumerate(begins)]
        return whole_documents(np.concatenate(parts))

    def last_documents(self, tokens: int) -> Documents:
        """The whole documents among the last `tokens` tokens of an epoch, just before the held-out tokens."""
        count = min(tokens, self.total)
        return whole_documents(self.read(self.total - count, count))


def whole_documents(text: np.ndarray) -> Documents:
    """The documents of a stretch of training tokens (n,), from its first BOS to its last. Their bytes are unknown:
    every token counts as one byte."""
    starts = np.flatnonzero(text == BOS)
    if len(starts):
        text = text[starts[0] : starts[-1]]
    else:
        text = text[:0]
    return split_documents(text, np.ones(len(text), np.int64))


# ======================================================================================================================
# Optimizer: Muon for matrices, AdamW for the rest. Matrices of one shape form a stack, split across ranks.


# Coefficients of each Newton-Schulz step: Polar Express, Amsel et al. 2025 (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)


def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix to each: all singular values near 1. (n, r, c) -> (n, r, c), bf16 on a
    GPU, else fp32"""
    x = g.to(torch.bfloat16) if g.is_cuda else g.float()  # the iteration tolerates bf16
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        s = x @ x.mT
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, s, x, beta=a)
    return x.mT if tall else x


def muon_update(g: Tensor, momentum: Tensor, mu: float, steps: int) -> Tensor:
    """Nesterov momentum, row normalisation, orthogonalisation. (n, r, c) -> (n, r, c), of `orthogonalise`'s type

    Muon, Jordan 2024; row normalisation as in MuonEq-R. `momentum` is updated in place."""
    torch.add(g, momentum, alpha=mu, out=momentum)
    nesterov = torch.add(g, momentum, alpha=mu)
    return orthogonalise(F.normalize(nesterov, dim=-1), steps)


def adam_directions(
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    step: int | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Bias-corrected exp_avg / (sqrt(exp_avg_sq) + eps) for every tensor; the moments are updated in place.

    AdamW, Loshchilov & Hutter, arXiv 1711.05101. With beta1 = 0 `exp_avg` may be empty: it would equal the gradient."""
    if beta1:
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
    denominator = torch._foreach_div(exp_avg_sq, 1 - beta2**step)
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, eps)
    if not beta1:
        return torch._foreach_div(grads, denominator)
    return torch._foreach_div(torch._foreach_div(exp_avg, denominator), 1 - beta1**step)


@torch.no_grad()
def move_parameters(params: Sequence[Tensor], places: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Move each parameter into the memory of its place, and make its tensor of zeros in `grads` its gradient."""
    for p, place, grad in zip(params, places, grads, strict=True):
        p.data = place.copy_(p)
        p.grad = grad  # never replaced: CUDA graphs add to it; unused parameters keep zeros


class MuonAdam:
    """Muon and AdamW for all parameters, on any number of ranks.

    The optimizer moves the parameters into tensors of its own: matrices of one shape into a stack, Adam's parameters
    one after another into a flat tensor; and their gradients likewise. An operation on many parameters is thus one
    kernel. From then on p.data and p.grad may be written to, but not replaced; what shared a parameter's memory before
    no longer does.

    Ranks sum their gradients, each computes the updates for its share of every stack of matrices, and all gather
    them. Given equal sums, the result does not depend on the number of ranks."""

    def __init__(self, model: GPT, run: RunConfig, dist: Dist):
        self.run = run
        self.dist = dist
        self.steps_done = 0
        by_role = {"matrix": [], "embedding": [], "scalar": []}
        for name, p in model.named_parameters():
            by_role[param_role(name)].append(p)

        shapes = dict.fromkeys(p.shape for p in by_role["matrix"])  # an ordered set
        matrices = [[p for p in by_role["matrix"] if p.shape == shape] for shape in shapes]
        self.matrices = sorted(matrices, key=lambda ps: -sum(p.numel() for p in ps))  # those of each stack
        self.share = [-(-len(ps) // dist.world) for ps in self.matrices]  # of each stack: matrices per rank, rounded up
        # For each stack, this rank's momentum (share, r, c), and all values (share * world, r, c) and gradients.
        self.momentum = [ps[0].new_zeros(n, *ps[0].shape) for n, ps in zip(self.share, self.matrices, strict=True)]
        self.stacks = [m.new_zeros(len(m) * dist.world, *m.shape[1:]) for m in self.momentum]  # padding stays zero
        self.stack_grads = [torch.zeros_like(stack) for stack in self.stacks]
        for ps, stack, grads in zip(self.matrices, self.stacks, self.stack_grads, strict=True):
            move_parameters(ps, stack[: len(ps)].unbind(), grads[: len(ps)].unbind())

        self.adam_params = by_role["embedding"] + by_role["scalar"]
        self.adam_sizes = [-(-p.numel() // 64) * 64 for p in self.adam_params]  # aligned to 256 bytes
        embedding_size = sum(self.adam_sizes[: len(by_role["embedding"])])
        self.group_sizes = [embedding_size, sum(self.adam_sizes) - embedding_size]  # embedding, scalars
        self.group_rates = [(run.embed_lr, run.embed_wd), (run.scalar_lr, run.scalar_wd)]  # learning rate, weight decay
        self.adam_values = model.embed.new_zeros(sum(self.adam_sizes))
        self.adam_grads = torch.zeros_like(self.adam_values)
        self.exp_avg = torch.zeros_like(self.adam_values)
        self.exp_avg_sq = torch.zeros_like(self.adam_values)
        move_parameters(self.adam_params, self.adam_views(self.adam_values), self.adam_views(self.adam_grads))

        covered = sorted(id(p) for ps in (*self.matrices, self.adam_params) for p in ps)
        assert covered == sorted(map(id, model.parameters())), "every parameter has exactly one optimizer"

    def adam_views(self, flat: Tensor) -> list[Tensor]:
        """The part of a flat tensor that belongs to each of Adam's parameters, in its shape."""
        parts = flat.split(self.adam_sizes)
        return [part[: p.numel()].view_as(p) for part, p in zip(parts, self.adam_params, strict=True)]

    def reduce(self) -> tuple[list[Tensor], Tensor]:
        """Sum the gradients over ranks, Adam's in place -> (this rank's share of every stack, the global norm)."""
        shares = [self.dist.reduce_scatter(grads) for grads in self.stack_grads]
        self.dist.all_reduce(self.adam_grads)

        # Matrix by matrix, so that the order of the sum does not depend on the number of ranks.
        own = torch.stack(torch._foreach_norm([matrix for share in shares for matrix in share]))
        by_rank = self.dist.all_gather(own).view(self.dist.world, -1)  # (world, a rank's matrices)
        by_stack = zip(by_rank.split(self.share, dim=1), self.matrices, strict=True)  # norms (world, share), matrices
        norms = [each.flatten()[: len(ps)] for each, ps in by_stack]  # without padding
        return shares, torch.cat([*norms, self.adam_grads.norm()[None]]).norm()

    @torch.no_grad()
    def step(self, lr_scale: float, mu: float) -> Tensor:
        """One update from the gradients in p.grad, which are then set to zero -> norm of the summed gradient.

        `lr_scale` is a factor on all learning rates, `mu` is Muon's momentum."""
        run = self.run
        self.steps_done += 1
        shares, grad_norm = self.reduce()
        if run.grad_clip_norm:
            factor = (run.grad_clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*shares, self.adam_grads], factor)

        matrix_lr = run.matrix_lr * lr_scale
        for stack, g, momentum in zip(self.stacks, shares, self.momentum, strict=True):
            updates = self.dist.all_gather(muon_update(g, momentum, mu, run.muon_ns_steps))
            aspect = max(1.0, stack.size(-2) / stack.size(-1))  # tall matrices take longer steps, as in Jordan's Muon
            stack.mul_(1 - matrix_lr * run.muon_wd).add_(updates, alpha=-matrix_lr * aspect**0.5)

        flat = [self.adam_grads], [self.exp_avg], [self.exp_avg_sq]  # to `adam_directions`, all is one parameter
        (directions,) = adam_directions(*flat, self.steps_done, run.beta1, run.beta2, run.adam_eps)
        values_by_group = self.adam_values.split(self.group_sizes)
        groups = zip(values_by_group, directions.split(self.group_sizes), self.group_rates, strict=True)
        for values, direction, (lr, wd) in groups:
            values.mul_(1 - lr * lr_scale * wd).sub_(direction, alpha=lr * lr_scale)

        torch._foreach_zero_([*self.stack_grads, self.adam_grads])
        return grad_norm

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint, complete on every rank, so that any number of ranks can load it."""
        state = {}
        for i, (momentum, ps) in enumerate(zip(self.momentum, self.matrices, strict=True)):
            state[f"momentum.{i}"] = self.dist.all_gather(momentum)[: len(ps)]
        return state | self.moments()

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments by their names in a checkpoint; every rank holds all of them."""
        exp_avg = {f"exp_avg.{i}": t for i, t in enumerate(self.adam_views(self.exp_avg))}
        return exp_avg | {f"exp_avg_sq.{i}": t for i, t in enumerate(self.adam_views(self.exp_avg_sq))}

    def load_state(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Continue from what `state` returned after `steps_done` steps, on any number of ranks."""
        self.steps_done = steps_done
        for i, (n, momentum) in enumerate(zip(self.share, self.momentum, strict=True)):
            mine = state[f"momentum.{i}"][self.dist.rank * n : (self.dist.rank + 1) * n]
            momentum[: len(mine)].copy_(mine)  # the rest is padding, always zeros
        for name, t in self.moments().items():
            t.copy_(state[name])


# ======================================================================================================================
# Entropy coder: integers in barely more bits than their entropy, the same bits on every machine.
#
# rANS (Duda 2013, arXiv 1311.2540): one number, the state, holds all symbols coded so far. A symbol of frequency f
# out of M multiplies the state by M / f, so it costs log2(M / f) bits. Symbols come out in reverse order, so the
# encoder begins with the last one. Whenever the state would exceed 32 bits, its low 16 are written out as a word.
#
# Here many states, the lanes, advance side by side and share one stream of words (Giesen 2014, arXiv 1402.3392). A
# call is cut into slices with one symbol per lane: symbol i of a slice belongs to lane i.
#
#   number of lanes (2 bytes; all numbers are little-endian)
#   state of every lane, from which the decoder starts (4 each)
#   words in the order in which the decoder reads them (2 each)


PROBABILITY_BITS = 14  # rounding the frequencies of Gaussian integers to 12 bits costs 0.05 %, to 14 bits 0.01 %
FREQUENCY_SUM = 1 << PROBABILITY_BITS
WORD_BITS = 16
LOWEST_STATE = 1 << WORD_BITS  # of a state between symbols, so that a symbol moves at most one word
MAX_LANES = 1024  # each costs 3 bytes; with fewer, numpy's overhead per call outweighs its work
SYMBOLS_PER_LANE = 4096  # at least, so that lanes cost little in a short stream


class FrequencyTables:
    """Symbol frequencies by context: `frequencies` (T, A) int64 for T contexts and symbols 0 to A - 1, A <=
    FREQUENCY_SUM. Each row, the table of one context, sums to FREQUENCY_SUM, or is zero if the context never
    occurs."""

    def __init__(self, frequencies: np.ndarray):
        self.frequencies = frequencies
        self.in_use = frequencies.any(1)

    @classmethod
    def from_counts(cls, counts: np.ndarray) -> FrequencyTables:
        """The tables that code symbols with these counts, (T, A) int64, in the fewest bits."""
        return cls(np.stack([nearest_frequencies(row) for row in counts.astype(np.int64)]))

    def starts(self) -> np.ndarray:
        """Sum of the frequencies before each symbol, (T, A) int64. Of its table's FREQUENCY_SUM slots, a symbol of
        frequency f owns the f slots that begin there."""
        return self.frequencies.cumsum(1) - self.frequencies

    def to_bytes(self) -> bytes:
        """A zstd frame of all low bytes, then all high bytes: most of them are zero."""
        planes = self.frequencies.astype("<u2").view(np.uint8).reshape(-1, 2).T
        return zstandard.ZstdCompressor(level=22).compress(planes.tobytes())

    @classmethod
    def from_bytes(cls, data: bytes, tables: int, alphabet: int) -> FrequencyTables:
        """Read what `to_bytes` wrote for `tables` tables of `alphabet` symbols. Raises DataError."""
        size = 2 * tables * alphabet
        with untrusted("frequency tables"):
            raw = decompress(data, size)
            require(len(raw) == size, f"{len(raw)} bytes for {tables} tables of {alphabet} symbols")
        low, high = np.frombuffer(raw, np.uint8).astype(np.int64).reshape(2, tables, alphabet)
        frequencies = low + 256 * high

        sums = frequencies.sum(1)
        wrong = np.flatnonzero((sums != 0) & (sums != FREQUENCY_SUM))
        if len(wrong):
            table = wrong[0]
            expected = f"expected {FREQUENCY_SUM}, or 0 where a table is not in use"
            raise DataError(f"frequency tables: the sum of table {table} is {sums[table]}, {expected}")
        return cls(frequencies)


def nearest_frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts (A,) int64 -> frequencies (A,) int64 that sum to FREQUENCY_SUM: as nearly proportional as possible, but
    at least 1 for every symbol that occurs; all zero if no symbol does."""
    total = int(counts.sum())
    if total == 0:
        return np.zeros_like(counts)
    frequencies = np.maximum((counts * FREQUENCY_SUM + total // 2) // total, counts > 0)
    while (missing := FREQUENCY_SUM - int(frequencies.sum())) != 0:
        largest = np.argsort(-frequencies, kind="stable")[: abs(missing)]  # one slot more or less matters least here
        frequencies[largest] += np.sign(missing)
        frequencies = np.maximum(frequencies, counts > 0)
    return frequencies


def all_below(numbers: np.ndarray, end: int) -> bool:
    """Whether all are at least 0 and below `end`."""
    return numbers.size == 0 or (int(numbers.min()) >= 0 and int(numbers.max()) < end)


class RansEncoder:
    """put() symbols with their contexts, in calls of any size, then finish()."""

    def __init__(self, tables: FrequencyTables):
        # (T, A): a symbol's frequency in the upper bits, its start in the lower 16.
        self.intervals = (tables.frequencies << 16 | tables.starts()).astype(np.uint32)
        self.calls: list[np.ndarray] = []

    def put(self, symbols: np.ndarray, contexts: np.ndarray) -> None:
        """Add symbols (n,), each in its context (n,); integers of any type. Raises ValueError if a context's table
        lacks the symbol."""
        if symbols.ndim != 1 or symbols.shape != contexts.shape:
            raise ValueError(f"shapes {symbols.shape} and {contexts.shape}: expected one dimension and one length")
        symbols = symbols.astype(np.int64, casting="same_kind")  # refuses non-integers
        contexts = contexts.astype(np.int64, casting="same_kind")
        tables, alphabet = self.intervals.shape
        if not all_below(symbols, alphabet) or not all_below(contexts, tables):
            raise ValueError(f"a symbol or a context is out of range: there are {tables} tables of {alphabet} symbols")

        intervals = self.intervals.ravel().take(contexts * alphabet + symbols)
        missing = np.flatnonzero(intervals >> 16 == 0)
        if len(missing):
            i = missing[0]
            raise ValueError(f"symbol {symbols[i]} has no frequency in the table of context {contexts[i]}")
        self.calls.append(intervals)

    def finish(self) -> bytes:
        """The stream of all symbols put so far."""
        sizes = [len(call) for call in self.calls]
        lanes = lane_count(sum(sizes), max(sizes, default=0))
        states = np.full(lanes, LOWEST_STATE, np.uint32)
        words = []
        for call in reversed(self.calls):
            for start in reversed(range(0, len(call), lanes)):
                words.append(encode_slice(states, call[start : start + lanes]))
        return b"".join([lanes.to_bytes(2, "little"), states.astype("<u4").tobytes(), *reversed(words)])


def lane_count(symbols: int, widest: int) -> int:
    """Number of lanes for a stream of `symbols` symbols, `widest` of them in its largest call."""
    return max(1, min(MAX_LANES, symbols // SYMBOLS_PER_LANE, widest))


def encode_slice(states: np.ndarray, intervals: np.ndarray) -> bytes:
    """Put a symbol into each of the first states, in place -> the words written out to make room, by lane"""
    states = states[: len(intervals)]
    frequencies = intervals >> 16
    starts = intervals & 0xFFFF

    full = np.flatnonzero(states >> (32 - PROBABILITY_BITS) >= frequencies)  # the next state would exceed 32 bits
    leaving = states[full]
    states[full] = leaving >> WORD_BITS

    # The next state is (state // f) * M + start + state % f; this is the same with one division.
    states += states // frequencies * (FREQUENCY_SUM - frequencies) + starts
    return leaving.astype("<u2").tobytes()  # the low 16 bits


class RansDecoder:
    """take() the symbols of each put(), in the same order, then finish(). The contexts of a call may depend on the
    symbols of earlier calls.

    Damage is noticed by finish() at the latest, unless it happens to give a valid stream of other symbols, which only
    a container's checksum detects. Either way, decoding takes no more work than the requested symbols need."""

    def __init__(self, data: bytes, tables: FrequencyTables):
        """A stream and the tables that it was encoded with. Raises DataError if no stream can begin like this."""
        lanes = int.from_bytes(data[:2], "little")
        end = 2 + 4 * lanes
        require(1 <= lanes <= MAX_LANES, f"coded symbols: {lanes} lanes, expected 1 to {MAX_LANES}", DataError)
        require(len(data) >= end and len(data) % 2 == 0, f"coded symbols: cut short, {len(data)} bytes", DataError)
        self.states = np.frombuffer(data[2:end], "<u4").astype(np.uint32)
        self.words = np.frombuffer(data[end:], "<u2")
        self.words_read = 0
        require(bool((self.states >= LOWEST_STATE).all()), "coded symbols: a state is too small", DataError)

        # For every slot: its symbol; and that symbol's frequency (upper bits) and the slot's place among the symbol's
        # slots (lower 16): slot - start. Unused tables have slots too, so that table t begins at slot
        # t * FREQUENCY_SUM.
        frequencies = tables.frequencies.copy()
        frequencies[~tables.in_use, 0] = FREQUENCY_SUM
        count, alphabet = frequencies.shape
        symbols = np.tile(np.arange(alphabet, dtype=np.int16), count)
        offsets = ((frequencies << 16) - tables.starts()).ravel()  # of every symbol; each of its slots adds itself
        slots = np.tile(np.arange(FREQUENCY_SUM), count)

        self.in_use = tables.in_use
        self.symbols = np.repeat(symbols, frequencies.ravel())
        self.intervals = (np.repeat(offsets, frequencies.ravel()) + slots).astype(np.uint32)

    def take(self, contexts: np.ndarray) -> np.ndarray:
        """The next symbols (n,) int16, each in its context (n,), integers of any type. Raises DataError if a context
        has no table or the stream ends early."""
        contexts = contexts.astype(np.int64, casting="same_kind")
        possible = all_below(contexts, len(self.in_use)) and bool(self.in_use[contexts].all())
        require(possible, "coded symbols: a context for which there is no table", DataError)
        first_slots = contexts << PROBABILITY_BITS
        symbols = np.empty(len(contexts), np.int16)
        lanes = len(self.states)
        for start in range(0, len(contexts), lanes):
            self._take_slice(first_slots[start : start + lanes], symbols[start : start + lanes])
        return symbols

    def _take_slice(self, first_slots: np.ndarray, symbols: np.ndarray) -> None:
        """Take a symbol out of each of the first states, then read a word into every state that became too small."""
        states = self.states[: len(symbols)]
        slots = first_slots + (states & (FREQUENCY_SUM - 1))
        self.symbols.take(slots, out=symbols, mode="clip")  # no slot is out of range: "clip" only avoids a copy
        intervals = self.intervals.take(slots, mode="clip")

        # state // M * f + place
        states >>= PROBABILITY_BITS
        states *= intervals >> 16
        states += intervals & 0xFFFF

        small = np.flatnonzero(states < LOWEST_STATE)
        end = self.words_read + len(small)
        require(end <= len(self.words), "coded symbols: the stream ends early", DataError)
        states[small] = states[small] << WORD_BITS | self.words[self.words_read : end]
        self.words_read = end

    def finish(self) -> None:
        """Raise DataError unless exactly the stream's symbols have been taken."""
        left = len(self.words) - self.words_read
        require(left == 0, f"coded symbols: {left} words are left over", DataError)
        require(bool((self.states == LOWEST_STATE).all()), "coded symbols: the stream is damaged", DataError)


# ======================================================================================================================
# Container: one format for artifacts and checkpoints. It is self-describing, checksummed and read without pickle.
#
#   magic (8 bytes)
#   length of the header (4, little-endian)
#   header: zstd of JSON {"meta", "zstd", "tensors": [[name, type, shape, size], ...]}
#   the tensors' bytes in that order, each a zstd frame if "zstd" is true
#   BLAKE2b-128 of everything before (16)


CONTAINER_MAGIC = b"PGOLF\x00\x01\n"
DIGEST_BYTES = 16
MAX_HEADER_BYTES = 1 << 24
MAX_UNPACKED_BYTES = 1 << 31
MAX_DIMENSIONS = 4
MAX_TENSORS = 1 << 17  # a checkpoint of 1,024 blocks has half as many; a header of 16 MB could list a million
STORED_TYPES = {"f4": torch.float32, "f2": torch.float16, "i1": torch.int8, "u1": torch.uint8}
ALREADY_CODED = torch.uint8  # the type of the entropy coder's output, which zstd cannot shrink further
TYPE_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}


def pack(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], level: int | None) -> bytes:
    """Tensors of STORED_TYPES and a JSON-serialisable table -> a container. zstd compresses the tensors at `level`;
    None stores them as they are."""

    def tensor_bytes(t: Tensor) -> bytes:
        raw = t.detach().cpu().contiguous().numpy().tobytes()
        if level is None or t.dtype == ALREADY_CODED:
            return raw
        return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(raw)

    with ThreadPoolExecutor() as pool:  # one frame per tensor: in parallel, each with its own statistics
        blobs = list(pool.map(tensor_bytes, tensors.values()))
    table = [
        [name, TYPE_NAMES[t.dtype], list(t.shape), len(blob)]
        for (name, t), blob in zip(tensors.items(), blobs, strict=True)
    ]
    header = json.dumps({"meta": dict(meta), "zstd": level is not None, "tensors": table}, separators=(",", ":"))
    header = zstandard.ZstdCompressor(level=19).compress(header.encode())
    body = b"".join([CONTAINER_MAGIC, len(header).to_bytes(4, "little"), header, *blobs])
    return body + blake2b(body)


def blake2b(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def read_header(data: bytes, what: str) -> tuple[dict[str, Any], int]:
    """A container's bytes -> (checked header, offset of the tensors). Raises a DataError that names `what`."""
    body, checksum = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    magic = body[: len(CONTAINER_MAGIC)]
    require(magic == CONTAINER_MAGIC, f"{what}: not a file of this program, begins with {magic!r}", DataError)
    if blake2b(body) != checksum:
        raise DataError(f"{what}: damaged or cut short: the checksum does not fit its {len(data)} bytes; copy it again")
    with untrusted(what):
        start = len(CONTAINER_MAGIC) + 4
        end = start + int.from_bytes(body[start - 4 : start], "little")
        header = json.loads(decompress(body[start:end], MAX_HEADER_BYTES))
        count = len(header["tensors"])
        require(count <= MAX_TENSORS, f"{count} tensors are listed, at most {MAX_TENSORS} are expected")
        require(all(isinstance(size, int) and size >= 0 for _, _, _, size in header["tensors"]), "sizes are wrong")
        require(isinstance(header["meta"], dict), "meta is not a table")
        require(end + sum(size for _, _, _, size in header["tensors"]) == len(body), "sizes do not add up")
        return header, end


def unpack(data: bytes, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A container's bytes -> (meta, tensors by name). Nothing is trusted before it is checked; raises a DataError
    that names `what`."""
    header, at = read_header(data, what)
    return dict(header["meta"]), read_tensors(data, header, at, what)


def read_tensors(data: bytes, header: Mapping[str, Any], at: int, what: str) -> dict[str, Tensor]:
    """A container's bytes and what `read_header` returned for them -> tensors by name. Raises DataError."""
    tensors: dict[str, Tensor] = {}
    with untrusted(what):
        # A limit for all tensors together, so that a small file cannot fill the memory.
        room = MAX_UNPACKED_BYTES if header["zstd"] else len(data)
        sizes = [size for _, _, _, size in header["tensors"]]
        for (name, (dtype, shape)), size in zip(table_layout(header, what).items(), sizes, strict=True):
            tensors[name] = read_tensor(data[at : at + size], dtype, shape, header["zstd"], room)
            room -= tensors[name].nbytes
            at += size
    return tensors


Layout = dict[str, tuple[torch.dtype, torch.Size]]  # {name of a stored tensor: (type, shape)}


def table_layout(header: Mapping[str, Any], what: str) -> Layout:
    """Names, types and shapes that a container's header claims. Raises DataError."""
    with untrusted(what):
        found: Layout = {}
        for name, kind, shape, _ in header["tensors"]:
            if not isinstance(name, str) or name in found:
                raise ValueError(f"tensor {brief(name)} comes twice")
            sides = shape if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
            if not all(type(n) is int and 0 <= n < MAX_UNPACKED_BYTES for n in sides):  # huge ones overflow torch.Size
                raise ValueError(f"{brief(name)}: {brief(shape)} is not a shape")
            found[name] = STORED_TYPES[kind], torch.Size(shape)
        return found


def require_layout(expected: Layout, found: Layout, what: str) -> None:
    """A file must hold exactly the expected tensors. Raises a DataError that names the first that differs."""
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(f"{what}: {printable(name, 60)} is {found.get(name)}, expected {expected.get(name)}")


@contextlib.contextmanager
def untrusted(what: str) -> Iterator[None]:
    """Whatever goes wrong inside, a failed `require` too, becomes a DataError that blames the file `what`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, zstandard.ZstdError) as error:
        raise DataError(f"{what}: the contents are not what the format promises ({error})") from error


def decompress(frame: bytes, most: int) -> bytes:
    """A zstd frame -> its content, at most `most` bytes."""
    size = zstandard.get_frame_parameters(frame).content_size
    require(0 <= size <= most, f"a frame claims {size} bytes, at most {most} are expected")
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)


def read_tensor(blob: bytes, dtype: torch.dtype, shape: torch.Size, compressed: bool, room: int) -> Tensor:
    """Stored bytes -> a tensor of at most `room` bytes, with a type and shape from `table_layout`."""
    expected = math.prod(shape) * dtype.itemsize
    require(expected <= room, f"shape {shape} is too large")
    raw = decompress(blob, expected) if compressed and dtype != ALREADY_CODED else blob
    require(len(raw) == expected, f"{len(raw)} bytes for shape {shape}")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


# ======================================================================================================================
# Training: the budget is time or steps, and every schedule is a pure function of the fraction of the budget spent.


# ---- Schedules ----


def progress_at(run: RunConfig, step: int, seconds: float, reserve: float) -> float:
    """Fraction of the training budget spent after `step` steps and `seconds`; `reserve` seconds of the budget are
    kept for quantisation. At 1 or more, training ends."""
    by_steps = 0.0
    if run.iterations:
        by_steps = step / run.iterations

    by_time = 0.0
    if run.max_wallclock_seconds:
        by_time = seconds / max(run.max_wallclock_seconds - reserve, 1e-9)
    return max(by_steps, by_time)


def lr_at(progress: float, run: RunConfig) -> float:
    """Factor on learning rates: 1, then falling linearly to MIN_LR over the last WARMDOWN_FRAC of the budget."""
    falling = 1.0
    if run.warmdown_frac:
        falling = (1.0 - progress) / run.warmdown_frac
    return max(run.min_lr, min(1.0, falling))


# (until this fraction of the budget, thirds of TRAIN_SEQ_LEN); EXPERIMENTS.md, section 29
CONTEXT_GROWTH = ((0.1, 1), (0.7, 2), (math.inf, 3))


def context_at(progress: float, run: RunConfig) -> int:
    """The longest context in training, in tokens. It grows: distant words help little until near ones are learned,
    and short contexts make faster steps."""
    thirds = next(thirds for until, thirds in CONTEXT_GROWTH if progress < until)
    return max(1, run.train_seq_len * thirds // 3)


def momentum_at(progress: float, run: RunConfig) -> float:
    """Muon's momentum rises linearly over the first MUON_MOMENTUM_WARMUP_FRAC of the budget."""
    fraction = 1.0
    if run.muon_momentum_warmup_frac:
        fraction = min(1.0, progress / run.muon_momentum_warmup_frac)
    return run.muon_momentum_start + fraction * (run.muon_momentum - run.muon_momentum_start)


# ---- The trainer, and its checkpoints ----


class WeightAverage:
    """Exponential moving average of all parameters. Its horizon is a fraction of the budget, so that a short run
    forgets its beginning, too."""

    def __init__(self, model: GPT, horizon: float):
        self.params = [p.detach() for p in model.parameters()]  # they share the model's memory
        self.values = [p.clone() for p in self.params]
        self.horizon = horizon

    def update(self, spent: float) -> None:
        """Call after a step that took the fraction `spent` of the budget."""
        keep = math.exp(-spent / self.horizon) if self.horizon else 0.0
        torch._foreach_lerp_(self.values, self.params, 1.0 - keep)

    @contextlib.contextmanager
    def applied(self, share: float = 1.0) -> Iterator[None]:
        """Inside, the model holds `share` times the average plus 1 - `share` times its own weights (1 and 0: exactly
        one or the other); afterwards, its own weights again."""
        weights = [p.clone() for p in self.params]
        try:
            torch._foreach_lerp_(self.params, self.values, share)
            yield
        finally:
            torch._foreach_copy_(self.params, weights)


class Trainer:
    """Model, optimizer, weight average and progress: all that training changes, and all that a checkpoint holds."""

    def __init__(
        self, model: GPT, run: RunConfig, dist: Dist, provenance: Mapping[str, Any], training_shards: str = ""
    ):
        """`provenance` says what the artifact and every checkpoint depend on: tokenizer and held-out text.
        `training_shards` is the digest of the shards; only checkpoints need it, since they know batches by number."""
        self.model = model
        self.run = run
        self.dist = dist
        self.provenance = provenance
        self.training_shards = training_shards
        self.optimizer = MuonAdam(model, run, dist)
        self.average = WeightAverage(model, run.ema_horizon_frac)

        self.cuda_graphs = None
        if dist.device.type == "cuda" and run.compile and triton:
            self.cuda_graphs = CUDAGraphs()

        self.step = 0
        self.progress = 0.0
        self.seconds_before = 0.0  # training time of the runs that this one continues
        self.finished = False  # whether the checkpoint that this run continues is of a finished training
        self.resumable: Path | None = None  # the last checkpoint that this run has read or written

    def looping(self, progress: float) -> bool:
        """Whether a step at this fraction of the budget goes through the loop of blocks."""
        return self.model.config.num_loops > 0 and progress >= self.run.enable_looping_at

    def spend(self, progress: float) -> None:
        """Record that the fraction `progress` of the budget is spent, and update the average with the last step, since
        only now is it known how much of the budget that step took. Before the first step this changes no average."""
        self.average.update(progress - self.progress)
        self.progress = progress

    def forward_backward(self, micro_batch: MicroBatch, looping: bool) -> Tensor:
        """Add a micro-batch's gradients to p.grad -> its share of the mean loss of the batch, nats."""

        def work(tokens: Tensor, targets: Tensor, *segments: Tensor) -> Tensor:
            loss = self.model(tokens, targets, Segments(*segments), looping=looping).sum() / self.run.train_batch_tokens
            loss.backward()
            return loss.detach()

        inputs = (micro_batch.tokens, micro_batch.targets, *micro_batch.segments)
        if self.cuda_graphs is None:
            return work(*inputs)
        return self.cuda_graphs(looping, work, *inputs)

    def train_step(self, batch: Sequence[MicroBatch], progress: float, looping: bool) -> Tensor:
        """One optimizer step on this rank's micro-batches -> mean loss over all ranks, nats per token, () on device."""
        loss = torch.zeros((), device=self.dist.device)
        for micro_batch in batch:
            loss += self.forward_backward(micro_batch, looping)
        self.optimizer.step(lr_at(progress, self.run), momentum_at(progress, self.run))
        return self.dist.all_reduce(loss)

    def weights(self) -> dict[str, Tensor]:
        """The tensors needed after training, by name; they share the trainer's memory."""
        weights = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return weights | {f"average.{i}": values for i, values in enumerate(self.average.values)}

    def state(self) -> dict[str, Tensor]:
        """All tensors that training changes, by name; most of them share the trainer's memory."""
        return self.weights() | {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}

    def copy_state(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.state().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, t in self.weights().items():
            t.copy_(weights[name])

    def load_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore what `state()` returned after `step` steps."""
        self.load_weights(state)
        of_optimizer = {name.removeprefix("optimizer."): t for name, t in state.items()}
        self.optimizer.load_state(of_optimizer, step)
        self.step = step

    def identity(self, finished: bool = False) -> dict[str, Any]:
        """What a run must have in common with the run it continues."""
        return {
            "kind": FINISHED if finished else "checkpoint",
            "model": dataclasses.asdict(self.model.config),
            **self.provenance,
            "training_shards": self.training_shards,
            "train_batch_tokens": self.run.train_batch_tokens,
            "train_row_tokens": self.run.train_row_tokens,
        }

    def save_checkpoint(self, path: Path, seconds: float, finished: bool = False) -> None:
        """Write a checkpoint: all that training changes or, if training is `finished`, only what the run still needs.
        Every rank must call this; rank 0 writes. Raises UserError on every rank if that fails."""
        meta = self.identity(finished) | {"step": self.step, "seconds": seconds}
        state = self.weights() if finished else self.state()
        problem = ""
        if self.dist.main:
            try:
                require_room(path, sum(t.nbytes for t in state.values()), self.run)
                write_atomically(path, [pack(meta, state, level=None)], parents=True)
            except (UserError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch is out of memory
                problem = printable(str(error) or type(error).__name__)
        problem = self.dist.broadcast_bytes(problem.encode()).decode()
        require(not problem, problem, UserError)

    def load_checkpoint(self, path: str) -> None:
        """Continue from a checkpoint of the same network, data and batches. Raises DataError, changing nothing.

        The fraction of the budget spent is not read: `train` measures it against this run's own budget."""
        data = read_on_main(path, self.dist)
        header, at = read_header(data, path)
        meta = header["meta"]
        finished = meta.get("kind") == FINISHED
        for name, ours in self.identity(finished).items():
            theirs = meta.get(name)
            if theirs != ours:
                remedy = f": set {name.upper()}={brief(theirs)}" if name.upper() in KNOBS else ""
                raise DataError(f"RESUME={path}: its {name} is {difference(theirs, ours)}{remedy}")

        step, seconds = checked_progress(meta, self.run, path)

        needed = self.weights() if finished else self.state()
        expected = {name: (t.dtype, t.shape) for name, t in needed.items()}
        require_layout(expected, table_layout(header, path), path)
        state = read_tensors(data, header, at, path)
        for name, t in state.items():
            require(bool(t.isfinite().all()), f"RESUME={path}: {name} holds values that are not finite", DataError)
            squared = name.startswith("optimizer.exp_avg_sq.")
            require(not squared or bool((t >= 0).all()), f"RESUME={path}: {name} holds negative squares", DataError)

        if finished:
            self.load_weights(state)
            self.step = step
        else:
            self.load_state(state, step)
        self.finished = finished
        self.seconds_before = seconds
        self.resumable = Path(path)


FINISHED = "checkpoint of a finished training"


def checked_progress(meta: Mapping[str, Any], run: RunConfig, path: str) -> tuple[int, float]:
    """Steps and seconds of training that a checkpoint claims, checked. Raises DataError."""
    step = meta.get("step")
    seconds = meta.get("seconds")
    limit = f"ITERATIONS={run.iterations}" if run.iterations else MAX_KNOB
    require(
        type(step) is int and 0 <= step <= (run.iterations or MAX_KNOB),
        f"RESUME={path}: its step is {brief(step)}, expected a whole number from 0 to {limit}",
        DataError,
    )
    require(
        type(seconds) in {int, float} and 0 <= seconds <= MAX_KNOB,
        f"RESUME={path}: its seconds are {brief(seconds)}, expected a number from 0 to {MAX_KNOB}",
        DataError,
    )
    return step, float(seconds)


def require_room(path: Path, size: int, run: RunConfig) -> None:
    """Refuse a checkpoint of `size` bytes that would leave no room for the artifact, which matters more."""
    folder = path.parent if path.parent.exists() else Path()
    room = shutil.disk_usage(folder).free >= size + artifact_room(run)
    require(room, f"{path}: the disk has no room for {size >> 20} MiB beside the artifact; free some", UserError)


def artifact_room(run: RunConfig) -> int:
    """Upper bound on the disk bytes of the artifact, its temporary file, the log and the results."""
    return 3 * run.artifact_bytes


def save_or_warn(trainer: Trainer, path: Path, seconds: float, log: Log, finished: bool = False) -> bool:
    """Write a checkpoint -> whether it is on the disk. If not, a warning is enough: training can go on."""
    try:
        trainer.save_checkpoint(path, seconds, finished)
    except UserError as error:
        log.warn(f"no checkpoint is written: {error}")
        return False
    return True


def difference(theirs: Any, ours: Any) -> str:
    """What a file says and what was expected, in a few words; for tables, only the first entry that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted(theirs.keys() | ours.keys())
        name = next(n for n in names if n not in theirs or n not in ours or theirs[n] != ours[n])
        return f"another: {printable(name, 60)} is {brief(theirs.get(name))}, not {brief(ours.get(name))}"
    return f"{brief(theirs)}, not {brief(ours)}"


# ---- Warm-up and the training loop ----


def random_batch(run: RunConfig, vocab_size: int, dist: Dist) -> list[MicroBatch]:
    """A batch of this run's shapes made of random tokens: compilation and warm-up need no real text."""
    micro_batch_rows, grad_accum_steps = split_batch(run, dist.world)
    generator = np.random.default_rng(run.seed)
    text = generator.integers(2, vocab_size, micro_batch_rows * run.train_row_tokens + 1).astype(np.uint16)
    text[generator.random(len(text)) < 1 / 500] = BOS
    return [text_micro_batch(text, run.train_row_tokens, run.train_seq_len, dist.device)] * grad_accum_steps


def warm_up(trainer: Trainer, batch: Sequence[MicroBatch]) -> None:
    """Train on `batch` in both loop modes, until everything is compiled and captured. This changes the trainer: save
    its state before and restore it afterwards."""
    batches = [batch] * trainer.run.warmup_steps
    if trainer.cuda_graphs is not None:
        batches.insert(0, batch[:1])  # both modes run once before either is captured, which needs less memory

    loop_modes = [False]
    if trainer.model.config.num_loops:
        loop_modes.append(True)
    for micro_batches in batches:
        for looping in loop_modes:
            trainer.train_step(micro_batches, 0.0, looping)


PATIENCE = 100  # steps: at a high learning rate the loss may jump at first, then recover


class DivergenceCheck:
    """Ends training if the loss is not finite, or stays above twice that of uniform guessing for PATIENCE steps."""

    def __init__(self, vocab_size: int):
        self.limit = 2 * math.log(vocab_size)  # nats a token
        self.steps_above = 0

    def __call__(self, loss: float, step: int) -> None:
        """Check the loss of a step. Raises UserError."""
        self.steps_above = self.steps_above + 1 if loss >= self.limit else 0
        require(
            math.isfinite(loss) and self.steps_above < PATIENCE,
            self.message(f"the loss of step {step}", loss),
            UserError,
        )

    def at_the_end(self, loss: float, what: str) -> None:
        """Check the loss that training ends with. Raises UserError."""
        require(loss < self.limit, self.message(what, loss), UserError)

    def message(self, what: str, loss: float) -> str:
        return (
            f"training diverged: {what} is {loss:.3f} nats a token, where twice that of guessing is {self.limit:.3f}; "
            "lower MATRIX_LR, EMBED_LR or SCALAR_LR, or set GRAD_CLIP_NORM"
        )


def train(
    trainer: Trainer,
    stream: TrainingStream,
    log: Log,
    watch: Stopwatch,
    reserve: float,
    validate: Callable[[], float],
    checkpoint: Path,
) -> list[tuple[int, float, float]]:
    """Train until the budget, less `reserve` seconds, is spent -> (step, seconds, loss) of every logged step.
    `validate` returns bits per byte, `checkpoint` is the file that CHECKPOINT_SECONDS writes."""
    run = trainer.run
    report = StepReport(log, trainer, stream)
    loss = torch.zeros(())  # of the last step; before the first, one that passes every check
    check_loss = DivergenceCheck(stream.vocab_size)
    # What earlier runs spent: otherwise the average would charge it to the last step.
    trainer.progress = progress_at(run, trainer.step, trainer.seconds_before, reserve)
    warn_if_spent(trainer, log)
    saved_at = trainer.seconds_before

    def seconds_now() -> float:
        return trainer.seconds_before + watch.total(*TRAINING_CLOCK)

    while True:
        (seconds,) = trainer.dist.broadcast(seconds_now())  # the ranks must agree on when to stop
        trainer.spend(progress_at(run, trainer.step, seconds, reserve))
        if run.checkpoint_seconds and seconds - saved_at >= run.checkpoint_seconds:
            if save_or_warn(trainer, checkpoint, seconds, log):
                trainer.resumable = checkpoint
            saved_at = seconds
        if trainer.progress >= 1.0:
            break

        previous_loss = loss
        batch = stream.batch(trainer.step, context_at(trainer.progress, run))
        loss = trainer.train_step(batch, trainer.progress, trainer.looping(trainer.progress))
        trainer.step += 1
        # The previous loss is read only now, when this step is queued: the GPU never waits for Python.
        check_loss(previous_loss.item(), trainer.step - 1)

        if trainer.step % run.train_log_every == 0:
            value = loss.item()  # waits for the step, whose time then counts
            now = seconds_now()
            report(value, now, progress_at(run, trainer.step, now, reserve))
        if run.val_loss_every and trainer.step % run.val_loss_every == 0:
            with watch.phase("validate"):
                line = "step:{step} val_bpb:{val_bpb:.5f} (last iterate, without adaptation)"
                log.event("validate", line, step=trainer.step, val_bpb=validate())

    check_loss.at_the_end(loss.item(), f"the loss of step {trainer.step}")
    return report.history


def warn_if_spent(trainer: Trainer, log: Log) -> None:
    """Warn if the runs that this one continues have spent its budget."""
    if trainer.progress >= 1.0:
        log.warn(
            f"no step is left to train: {trainer.step} steps and {trainer.seconds_before:.0f} s have spent the budget "
            "of this run; the weights of RESUME are packed as they are, whose rates may not have fallen: raise the "
            "budget"
        )


class StepReport:
    """Reports the progress of training, with the speed since the report before."""

    def __init__(self, log: Log, trainer: Trainer, stream: TrainingStream):
        self.log = log
        self.trainer = trainer
        self.stream = stream
        self.history: list[tuple[int, float, float]] = []  # (step, seconds, loss) of every report
        self.step = trainer.step
        self.seconds = trainer.seconds_before

    def __call__(self, loss: float, seconds: float, spent: float) -> None:
        """Report the latest step after `seconds` of training. `spent` is the fraction of the budget spent, this step
        included."""
        trainer = self.trainer
        batch_tokens = trainer.run.train_batch_tokens
        self.log.event(
            "step",
            "step:{step} loss:{loss:.4f} progress:{progress:.3f} loop:{loop} "
            "tokens_per_s:{tokens_per_s:.0f} epoch:{epoch:.2f} train_s:{train_s:.1f} eta_s:{eta_s:.0f}",
            step=trainer.step,
            loss=loss,
            progress=trainer.progress,
            loop=int(trainer.looping(trainer.progress)),
            tokens_per_s=(trainer.step - self.step) * batch_tokens / max(seconds - self.seconds, 1e-9),
            epoch=trainer.step * batch_tokens / self.stream.total,
            train_s=seconds,
            eta_s=max(0.0, seconds / max(spent, 1e-9) - seconds),
        )
        self.history.append((trainer.step, seconds, loss))
        self.step = trainer.step
        self.seconds = seconds


# ======================================================================================================================
# Quantiser: matrices become integers that an entropy coder packs. One number for the whole network sets how fine the
# steps are; each weight's own step then follows from what an error of that weight does to the predictions.


# ---- Calibration: what errors of a matrix cost ----


class Sensitivity(NamedTuple):
    """What an error E in a matrix (out, in) costs: about 1/2 sum_i row_weights[i] E[i] hessian E[i]^T nats per token,
    as KL divergence from the predictions of the exact network.

    This is the Fisher information, estimated from gradients at sampled labels, with one factor per row (Martens &
    Grosse 2015, arXiv 1503.05671, restricted to the diagonal on the output side)."""

    hessian: Tensor  # (in, in) fp32
    row_weights: Tensor  # (out,) fp32, with mean 1
    inputs: Tensor | None = None  # (in, in), mean of x x^T; only for the embedding: see `MatrixPlan.row_octaves`


class GradientSums:
    """Sums over tokens for one matrix (out, in), from its inputs and from the gradients at its outputs."""

    def __init__(self, shape: torch.Size, device: torch.device):
        self.hessian = torch.zeros(shape[1], shape[1], device=device)
        self.row_squares = torch.zeros(shape[0], device=device)  # of gradients at each output
        self.calls = 0  # forward passes that used the matrix

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Inputs (T, in), gradients (T, out)"""
        squares = gradient.square()
        self.row_squares += squares.sum(0)
        weighted = x * squares.mean(1).sqrt()[:, None]
        self.hessian.addmm_(weighted.mT, weighted)


# Factor on the measured Hessian of blocks that a loop repeats: their errors add up (EXPERIMENTS.md, section 26)
LOOPED_FACTOR = 1.5
HEAD_CHUNK = 4096  # tokens whose logits are in memory at a time


@contextlib.contextmanager
def without_weight_gradients(model: GPT) -> Iterator[None]:
    """Inside, gradients of weights are not computed, and no compiled code runs."""
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for p, required in requires_grad.items():
            p.requires_grad_(required)


class Calibration:
    """Gathers the sensitivity of every matrix from forward and backward passes over text, with labels sampled from the
    model's own predictions."""

    def __init__(self, model: GPT, seed: int):
        self.model = model
        device = model.embed.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.tokens = 0
        self.matrices = {
            name: GradientSums(p.shape, device) for name, p in model.named_parameters() if param_role(name) == "matrix"
        }
        vocab, dim = model.embed.shape
        self.head = GradientSums(model.embed.shape, device)  # the embedding as the output matrix
        self.lookup = torch.zeros(dim, dim, device=device)  # sum of g g^T over gradients g of looked-up embeddings
        self.inputs = torch.zeros(dim, dim, device=device)  # sum of x x^T over states x before the head
        self.counts = torch.zeros(vocab, device=device)  # how often each token occurs

    def run(self, batches: Iterable[MicroBatch]) -> None:
        """Add text. Keeps all activations of a micro-batch in memory, where uncompiled code needs more of them."""
        hooked = (self.add_hook(name, module) for name, module in self.model.named_modules())
        handles = [handle for handle in hooked if handle is not None]
        try:
            with without_weight_gradients(self.model), torch.enable_grad():  # hooks do not fire in compiled code
                for batch in batches:
                    states, _ = self.model.hidden(batch.tokens, batch.segments)
                    states.backward(self.head_gradient(states.detach().flatten(0, 1)).view_as(states))
                    self.tokens += batch.tokens.numel()
                    self.counts += batch.tokens.flatten().bincount(minlength=len(self.counts))
        finally:
            for handle in handles:
                handle.remove()

    def add_hook(self, name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle | None:
        """Hook a module that multiplies by matrices, or looks up embeddings; None if it does neither."""
        if isinstance(module, Lookup):
            return module.register_forward_hook(self.lookup_hook)
        if isinstance(module, JointProjection):
            attention = name.rpartition(".")[0]
            return module.register_forward_hook(self.product_hook([f"{attention}.{part}.weight" for part in "qkv"]))
        if isinstance(module, Linear):
            return module.register_forward_hook(self.product_hook([f"{name}.weight"]))
        return None

    def product_hook(self, names: list[str]) -> Callable[[nn.Module, tuple, Tensor], None]:
        """A hook for a product of inputs (..., in) with these matrices, whose outputs lie side by side."""
        sums = [self.matrices[name] for name in names]
        widths = [len(s.row_squares) for s in sums]

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = args[0].detach()
            # `scale` of Linear.forward, which callers pass by position: hooks do not see keyword arguments.
            scale = args[2] if isinstance(module, Linear) and len(args) > 2 else None

            def add(gradient: Tensor) -> None:
                if scale is not None:  # it is folded into the weight
                    gradient = gradient * scale.to(gradient.dtype)
                parts = gradient.flatten(0, -2).float().split(widths, -1)
                for s, part in zip(sums, parts, strict=True):
                    s.add(x.flatten(0, -2).float(), part)

            for s in sums:
                s.calls += 1
            output.register_hook(add)

        return hook

    def lookup_hook(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float()
            self.lookup.addmm_(g.mT, g)

        output.requires_grad_(True)  # the first tensor with a gradient, so that all later ones have one too
        output.register_hook(add)

    @torch.no_grad()
    def head_gradient(self, states: Tensor) -> Tensor:
        """States before the head (T, D) -> gradient (T, D) of the loss at them, with labels sampled from the model.
        Also adds to the sums of the head.

        With p the softmax of the logits and c the slope of the soft cap, the loss has the gradient c (p - onehot) and
        the expected second derivative c^2 p (1 - p) with respect to the uncapped logits."""
        embedding = self.model.embed
        gradients = []
        for x in states.split(HEAD_CHUNK):
            # (chunk, V) fp32 each: beside all activations, where the memory of a small run peaks
            p, slope = self.model.head.probabilities(self.model.head.logits(x[None], embedding, None)[0])
            labels = torch.multinomial(p, 1, generator=self.generator)[:, 0]
            curvature = (1 - p).mul_(p).mul_(slope.square())
            x = x.float()
            weighted = x * curvature.sum(1).sqrt()[:, None]
            self.head.hessian.addmm_(weighted.mT, weighted)
            self.head.row_squares += curvature.sum(0)
            self.inputs.addmm_(x.mT, x)
            p[torch.arange(len(x), device=x.device), labels] -= 1.0
            gradients.append((p * slope) @ embedding)
        return torch.cat(gradients).to(states.dtype)

    def all_reduce(self, dist: Dist) -> None:
        """Sum over ranks."""
        for sums in (*self.matrices.values(), self.head):
            dist.all_reduce(sums.hessian)
            dist.all_reduce(sums.row_squares)
        for total in (self.lookup, self.inputs, self.counts):
            dist.all_reduce(total)
        self.tokens = int(dist.all_reduce(torch.tensor(self.tokens)))

    def sensitivities(self) -> dict[str, Sensitivity]:
        """The sensitivity of every matrix, by name. Raises UserError for a matrix that no forward pass used."""
        silent = [name for name, sums in self.matrices.items() if not sums.calls]
        require(
            silent == [],
            f"calibration saw no input of {', '.join(silent)}: the forward pass never calls the module that owns it; "
            "call it, or name the parameter otherwise, so that param_role makes it a scalar",
            UserError,
        )
        fewest = min(sums.calls for sums in self.matrices.values())
        found = {"embed": self.of_embedding()}
        for name, sums in self.matrices.items():
            factor = LOOPED_FACTOR if sums.calls > fewest else 1.0
            row_weights = sums.row_squares / sums.row_squares.mean().clamp(min=1e-30)
            found[name] = Sensitivity(factor * sums.hessian / self.tokens, row_weights)
        return found

    def of_embedding(self) -> Sensitivity:
        """The embedding is used twice: as the output matrix, where a row's weight follows how much its token is
        predicted, and as the lookup table, where it follows how often its token occurs."""
        output = self.head.hessian / self.tokens
        looked_up = self.lookup / self.tokens
        total = output + looked_up
        vocab = len(self.counts)
        predicted = self.head.row_squares / self.head.row_squares.sum().clamp(min=1e-30)
        counts = self.counts + 0.3  # a token that calibration never saw will occur, though rarely
        weights = predicted * output.trace() + counts / counts.sum() * looked_up.trace()
        row_weights = vocab * weights / total.trace().clamp(min=1e-30)
        return Sensitivity(total / vocab, row_weights, self.inputs / self.tokens)


def calibrate(
    model: GPT, batches: Iterable[Sequence[MicroBatch]], dist: Dist, run: RunConfig
) -> dict[str, Sensitivity]:
    """The sensitivity of every matrix, from the calibration text of all ranks: micro-batches of whole training rows.
    Raises UserError for a matrix that no forward pass used."""
    calibration = Calibration(model, run.seed * MAX_RANKS + dist.rank)
    calibration.run(row for batch in batches for part in batch for row in split_rows(part, run.train_row_tokens))
    calibration.all_reduce(dist)
    return calibration.sensitivities()


# ---- Steps: how fine each weight is stored ----

EIGHTHS = (1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142136, 1.5422108, 1.6817929, 1.8340081)  # 2^(i / 8), in fp32
GRID_LIMIT = 127  # largest absolute value of any number in a grid: 16 octaves


class Grid(NamedTuple):
    """Step and size of every weight of a matrix (out, in): entry (i, j) has the step
    2^((row_steps[i] + column_steps[j]) / 8), and its weight an RMS of about 2^((row_sizes[i] + column_sizes[j]) / 8).

    Numbers are whole eighths of an octave, which are small to store and equal on every machine."""

    row_steps: np.ndarray  # (out,) int16
    column_steps: np.ndarray  # (in,) int16
    row_sizes: np.ndarray  # (out,) int16
    column_sizes: np.ndarray  # (in,) int16

    @property
    def row_classes(self) -> np.ndarray:
        """(out,) int16. The class of entry (i, j) is row_classes[i] + column_classes[j]: log2 of its RMS in steps, in
        eighths of an octave."""
        return self.row_sizes - self.row_steps

    @property
    def column_classes(self) -> np.ndarray:
        return self.column_sizes - self.column_steps


def power_of_two(eighths: np.ndarray) -> np.ndarray:
    """2^(n / 8) for integers n within 2 GRID_LIMIT -> fp32, the same bits on every machine."""
    exponents = np.arange(-2 * GRID_LIMIT, 2 * GRID_LIMIT + 1)
    table = np.ldexp(np.array(EIGHTHS, np.float32)[exponents % 8], exponents // 8).astype(np.float32)
    return table[eighths + 2 * GRID_LIMIT]


def to_eighths(octaves: Tensor) -> np.ndarray:
    """Logarithms to base 2 -> int16 eighths of an octave, within GRID_LIMIT."""
    return (8 * octaves).round().clamp(-GRID_LIMIT, GRID_LIMIT).to(torch.int16).cpu().numpy()


def to_quarters(octaves: Tensor) -> np.ndarray:
    """Logarithms to base 2 -> int16 eighths of an octave, even ones only, within GRID_LIMIT."""
    return 2 * (4 * octaves).round().clamp(-(GRID_LIMIT // 2), GRID_LIMIT // 2).to(torch.int16).cpu().numpy()


def row_and_column_sizes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes (out,) and (in,) whose outer product approximates the RMS of the weights (out, in)."""
    columns = torch.ones_like(weight[0])
    for _ in range(3):
        rows = (weight / columns).square().mean(1).sqrt().clamp(min=1e-8)
        columns = (weight / rows[:, None]).square().mean(0).sqrt().clamp(min=1e-4)
    return rows, columns


def lambert_w(y: Tensor) -> Tensor:
    """W with W e^W = y for y >= 0, by Newton's method (Corless et al. 1996)."""
    w = torch.log1p(y)
    for _ in range(10):
        e = w.exp()
        w = w - (w * e - y) / (e * (w + 1))
    return w


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor (c, c) of (H + damping * mean diagonal)^-1, and the damping used: it grows tenfold at a
    time until the sum is positive definite in fp32, as it may not be at first after few calibration tokens.

    Raises UserError if damping by the whole mean diagonal is not enough, for instance where H is not finite."""
    while damping <= 1.0:
        damped = hessian.clone()
        damped.diagonal().add_(damping * hessian.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, damping
        damping *= 10
    raise UserError(
        "the Hessian of a matrix is not positive definite: its calibration inputs are not finite, or too few"
    )


# Factor on the noise of rare tokens' logits: see `MatrixPlan.row_octaves`. A tenth of it, or ten times, changes little
# (EXPERIMENTS.md, section 26).
RARE_TOKEN_CAUTION = 10.0


class MatrixPlan:
    """One matrix, ready to be rounded: its steps, up to a factor 2^octave of the whole network, and the Cholesky factor
    that spreads rounding errors over later columns.

    Let U be the upper Cholesky factor of the damped inverse Hessian, with columns in the order of rounding, and b_i the
    weight of row i. An error e at (i, j) costs b_i (e / U_jj)^2 after later columns have compensated for what they can.
    An extra bit saves the same cost at every weight if steps are proportional to U_jj / sqrt(b_i): so they are."""

    def __init__(self, weight: Tensor, sensitivity: Sensitivity, damping: float, noise: float):
        """`noise` is the variance of a rounding error, in squared steps."""
        hessian = sensitivity.hessian
        if not hessian.any():  # nothing that this matrix computes matters
            hessian = torch.eye(len(hessian), device=hessian.device)
        self.weight = weight
        self.order = hessian.diagonal().argsort(descending=True, stable=True)  # (in,) columns in the order of rounding
        self.upper, self.damping = inverse_factor(hessian[self.order][:, self.order], damping)  # (in, in)
        column_octaves = torch.empty_like(weight[0])  # (in,)
        column_octaves[self.order] = self.upper.diagonal().log2()
        self.level = column_octaves.median()  # moved to the rows, so that columns have small numbers
        column_octaves -= self.level
        self.column_steps = to_eighths(column_octaves)
        self.row_weights = sensitivity.row_weights.clamp(min=1e-6)  # (out,)
        row_sizes, column_sizes = row_and_column_sizes(weight)
        self.row_sizes = to_quarters(row_sizes.log2())  # as fine as classes
        self.column_sizes = to_quarters(column_sizes.log2())

        # Finer steps would need integers that are too large; 0.75 leaves room for errors spread from other columns.
        largest = (weight.abs() / column_octaves.exp2()).amax(1)  # (out,)
        self.finest_row_octaves = (largest.clamp(min=1e-30) / (0.75 * LARGEST_INTEGER)).log2()

        self.logit_noise = 0.0  # variance of the logit of a row of weight 1, at octave 0; 0 if rows are not tokens
        if sensitivity.inputs is not None:
            inputs = sensitivity.inputs[self.order][:, self.order]
            explained = (self.upper @ inputs @ self.upper.mT).trace()  # tr((H + damping)^-1 E[x x^T])
            self.logit_noise = RARE_TOKEN_CAUTION * noise * float(explained)

    def row_octaves(self, octave: float) -> Tensor:
        """log2 of the rows' factor of the steps, (out,), where 2^octave is the factor of the whole network.

        The cost of an error is quadratic only while the error is small. Noise of variance v on the logit of a rare
        token of probability P costs P (e^(v/2) - 1), and v grows with the squared step. Minimising bits plus this cost
        bounds the steps of rare tokens, by Lambert's W."""
        octaves = octave + self.level - 0.5 * self.row_weights.log2()
        if self.logit_noise:
            x = self.logit_noise * 4.0**octave / self.row_weights
            octaves = octaves + 0.5 * (2 * lambert_w(x / 2) / x).log2()
        return octaves

    def grid(self, octave: float) -> Grid:
        row_octaves = torch.maximum(self.row_octaves(octave), self.finest_row_octaves)
        return Grid(to_eighths(row_octaves), self.column_steps, self.row_sizes, self.column_sizes)


# ---- Rounding: to nearest, or along a trellis ----

TRELLISES = {8: (0o13, 0o4), 32: (0o45, 0o10)}  # {states: (h0, h1)}, parity checks
STRIP_ROWS = 512  # rows of a column that one path through the trellis covers
# Below this class, weights have an RMS of less than a quarter of a step: a path would force odd integers on them.
SILENT_CLASS = -16  # eighths of an octave
LARGEST_INTEGER = 4095  # columns of the embedding with large inputs have much finer steps than the others


class Trellis(NamedTuple):
    """Which integers may follow one another down a column. Each state allows only even or only odd integers, and the
    integer decides the next state. Allowed integers lie two steps apart, but the path through the states is free, so
    it comes closer to the weights than rounding to an equally coarse grid: this saves up to 0.2 bits per weight.

    Entropy-coded trellis-coded quantisation (Marcellin & Fischer 1990; Fischer & Wang 1992) with Ungerboeck's codes
    (1982) in systematic feedback form. With 0 states any integer may follow any other, which is plain rounding."""

    states: int

    @property
    def noise(self) -> float:
        """Variance of the rounding error, in squared steps."""
        return 0.259 if self.states else 1 / 12  # measured: 0.261 with 8 states, 0.255 with 32

    def advance(self, state: np.ndarray, bit: np.ndarray) -> np.ndarray:
        """The state that follows `state` after an integer whose bit 1, the second lowest, is `bit`; arrays of uint8."""
        h0, h1 = TRELLISES[self.states]
        return (state >> 1) ^ ((state & 1) * (h0 >> 1)) ^ (bit * (h1 >> 1))

    def predecessors(self) -> Tensor:
        """(2, states) int64: the state before each state, when bit 1 of the integer in between is 0, and when it is 1.

        All integers that lead to a state have one parity, the state's highest bit."""
        h0, h1 = TRELLISES[self.states]
        state = torch.arange(self.states)
        parity = state // (self.states // 2)
        shifted = [state ^ (parity * (h0 >> 1)) ^ (bit * (h1 >> 1)) for bit in (0, 1)]
        return torch.stack([s << 1 | parity for s in shifted])


def nearest_in_coset(v: Tensor, coset: Tensor) -> Tensor:
    """The integer nearest to v that is `coset` modulo 4."""
    return coset + 4 * torch.floor((v - coset) / 4 + 0.5)


def viterbi_reference(v: Tensor, live: Tensor, trellis: Trellis) -> Tensor:
    """The allowed integers (n, L) fp32 with the least squared distance to v (n, L), for n columns of L rows. Where
    `live` (n, L) is false they are zeros, which leave the state unchanged. The reference for `viterbi_kernel`.

    Viterbi 1967: the cheapest path to each state, row by row, then back along the choices."""
    n, L = v.shape
    states = trellis.states
    before = trellis.predecessors().to(v.device)  # (2, states)
    parity = torch.arange(states, device=v.device) // (states // 2)  # of the integer that led to a state
    cosets = torch.arange(4, device=v.device)
    distance = (v[..., None] - nearest_in_coset(v[..., None], cosets)).square()  # (n, L, 4)

    cost = torch.full((n, states), 1e30, device=v.device)
    cost[:, 0] = 0.0  # paths begin in state 0
    chosen = torch.zeros(L, n, states, dtype=torch.bool, device=v.device)
    for i in range(L):
        paths = [cost[:, before[bit]] + distance[:, i, parity + 2 * bit] for bit in (0, 1)]
        chosen[i] = paths[1] < paths[0]
        cost = torch.where(live[:, i, None], torch.minimum(*paths), cost)

    integers = torch.zeros_like(v)
    state = cost.argmin(1)
    for i in reversed(range(L)):
        bit = chosen[i].gather(1, state[:, None])[:, 0].long()
        k = nearest_in_coset(v[:, i], parity[state] + 2 * bit)
        integers[:, i] = torch.where(live[:, i], k, 0.0)
        state = torch.where(live[:, i], before[bit, state], state)
    return integers


def round_columns(v: Tensor, live: Tensor, trellis: Trellis) -> Tensor:
    """Columns of matrices (n, out), in steps -> integers (n, out) fp32. Each path covers STRIP_ROWS of a column."""
    if not trellis.states:
        return v.round()
    n, rows = v.shape
    padding = -rows % STRIP_ROWS if rows > STRIP_ROWS else 0
    if padding:
        v = F.pad(v, (0, padding))
        live = F.pad(live, (0, padding))
    length = min(rows, STRIP_ROWS)
    search = viterbi if use_kernels(v) else viterbi_reference
    integers = search(v.reshape(-1, length).contiguous(), live.reshape(-1, length).contiguous(), trellis)
    return integers.view(n, rows + padding)[:, :rows]


def gptq(plans: Sequence[MatrixPlan], grids: Sequence[Grid], trellis: Trellis, block: int = 128) -> list[np.ndarray]:
    """Integers (out, in) int16 of n matrices of one shape. Times their steps, they map calibration inputs to nearly the
    same outputs as the weights: columns are rounded in turn, and each one's error is spread over later columns.

    GPTQ, Frantar et al. 2022 (arXiv 2210.17323), with columns in order of decreasing diagonal of the Hessian. The
    errors of `block` columns are spread over those after the block in one product."""
    device = plans[0].weight.device

    def stack(parts: Iterable[np.ndarray | Tensor]) -> Tensor:
        return torch.stack([torch.as_tensor(part, device=device) for part in parts])

    orders = [plan.order.cpu().numpy() for plan in plans]
    grids_and_orders = list(zip(grids, orders, strict=True))
    upper = stack(plan.upper for plan in plans)  # (n, in, in)
    w = stack(plan.weight[:, plan.order].mT for plan in plans)  # (n, in, out)
    row_steps = stack(power_of_two(grid.row_steps) for grid in grids)  # (n, out)
    row_classes = stack(grid.row_classes for grid in grids)
    column_steps = stack(power_of_two(grid.column_steps[order]) for grid, order in grids_and_orders)  # (n, in)
    column_classes = stack(grid.column_classes[order] for grid, order in grids_and_orders)

    integers = torch.empty(w.shape, dtype=torch.int16, device=device)
    columns = w.size(1)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            steps = row_steps * column_steps[:, j, None]  # (n, out)
            live = row_classes + column_classes[:, j, None] >= SILENT_CLASS
            v = (w[:, j] / steps).clamp(3 - LARGEST_INTEGER, LARGEST_INTEGER - 3)  # a trellis may add up to 3
            k = round_columns(v, live, trellis)
            integers[:, j] = k.to(torch.int16)
            error = (w[:, j] - k * steps) / upper[:, j, j, None]
            errors[:, j - start] = error
            w[:, j + 1 : end].baddbmm_(upper[:, j, j + 1 : end, None], error[:, None], alpha=-1)
        w[:, end:].baddbmm_(upper[:, start:end, end:].mT, errors, alpha=-1)

    in_order = integers.mT.cpu().numpy()  # (n, out, in)
    return [np.ascontiguousarray(k[:, np.argsort(order)]) for k, order in zip(in_order, orders, strict=True)]


# ---- Storage: grids and integers as streams of the entropy coder ----


class Matrices(NamedTuple):
    """All matrices of a network as an artifact holds them, by name."""

    integers: dict[str, np.ndarray]  # (out, in) int16
    grids: dict[str, Grid]

    def restore(self, name: str) -> Tensor:
        """The matrix (out, in) fp32: integers times steps."""
        grid = self.grids[name]
        steps = power_of_two(grid.row_steps[:, None].astype(np.int64) + grid.column_steps)
        return torch.from_numpy(self.integers[name] * steps)


Shapes = Mapping[str, tuple[int, int]]  # (out, in) of every matrix
ALPHABET = 2 * LARGEST_INTEGER + 2  # symbols: integers, shifted so that none is negative
CLASSES = 48  # of integers: one for silent ones, then one per quarter octave of RMS; the last has no upper end
CONTEXTS = 2 * CLASSES  # a table for each class and parity of the integer


class Strip(NamedTuple):
    """STRIP_ROWS of a matrix, or fewer at its end: the rows that one path through the trellis covers in a column."""

    name: str
    start: int  # its first row


def strips_by_height(shapes: Shapes) -> dict[int, list[Strip]]:
    """All strips of the matrices, by height: strips of one height are coded side by side, row by row."""
    strips: dict[int, list[Strip]] = {}
    for name in sorted(shapes):
        rows = shapes[name][0]
        for start in range(0, rows, STRIP_ROWS):
            strips.setdefault(min(STRIP_ROWS, rows - start), []).append(Strip(name, start))
    return dict(sorted(strips.items()))


class ContextModel:
    """What encoder and decoder both know of the next integers, row by row down strips of one height that lie side by
    side: which table codes each of them, its context, and which integer a symbol stands for. C: columns of all strips.

    A state of the trellis allows integers of one parity only, so symbol s stands for the integer 2 s + parity."""

    def __init__(self, strips: Sequence[Strip], height: int, grids: Mapping[str, Grid], trellis: Trellis):
        self.trellis = trellis
        self.column_classes = np.concatenate([grids[strip.name].column_classes for strip in strips])  # (C,)
        self.row_classes = np.stack(  # (height, strips)
            [grids[strip.name].row_classes[strip.start : strip.start + height] for strip in strips], 1
        )
        widths = [len(grids[strip.name].column_classes) for strip in strips]
        self.strip_of_column = np.repeat(np.arange(len(strips)), widths)  # (C,)
        self.state = np.zeros(len(self.column_classes), np.uint8)  # of the trellis in every column
        self.silent = np.zeros(len(self.column_classes), bool)

    def contexts(self, row: int) -> np.ndarray:
        """The contexts of the integers of a row, (C,) int16. Rows must be taken in order."""
        classes = self.row_classes[row].take(self.strip_of_column) + self.column_classes
        self.silent = classes < SILENT_CLASS
        quarter_octaves = (classes - SILENT_CLASS) >> 1
        contexts = 2 * np.clip(quarter_octaves + 1, 0, CLASSES - 1)
        if self.trellis.states:
            contexts[self.silent] = 0  # the path skips them
            contexts += np.where(self.silent, 0, self.state & 1)
        return contexts

    def to_symbols(self, integers: np.ndarray) -> np.ndarray:
        """Integers (C,) of the row last given to `contexts` -> symbols (C,). Advances the state of the trellis."""
        if not self.trellis.states:
            return integers + (LARGEST_INTEGER + 1)
        halves = np.where(self.silent, 0, integers - (self.state & 1)) >> 1
        self._advance(halves)
        return halves + (LARGEST_INTEGER + 1)

    def to_integers(self, symbols: np.ndarray) -> np.ndarray:
        """The inverse of `to_symbols`."""
        halves = symbols - (LARGEST_INTEGER + 1)
        if not self.trellis.states:
            return halves
        integers = np.where(self.silent, 0, 2 * halves + (self.state & 1))
        self._advance(halves)
        return integers

    def _advance(self, halves: np.ndarray) -> None:
        following = self.trellis.advance(self.state, (halves & 1).astype(np.uint8))
        self.state = np.where(self.silent, self.state, following)


def integer_symbols(matrices: Matrices, trellis: Trellis) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The integers of all matrices in coding order, row by row: symbols (C,) and their contexts (C,)."""
    shapes = {name: k.shape for name, k in matrices.integers.items()}
    for height, strips in strips_by_height(shapes).items():
        model = ContextModel(strips, height, matrices.grids, trellis)
        side_by_side = [matrices.integers[strip.name][strip.start : strip.start + height] for strip in strips]
        for row, integers in enumerate(np.concatenate(side_by_side, 1)):
            contexts = model.contexts(row)
            yield model.to_symbols(integers).astype(np.int16), contexts


def decode_integers(stream: bytes, tables: bytes, grids: Mapping[str, Grid], trellis: Trellis) -> dict[str, np.ndarray]:
    """Decode the stream of symbols that `integer_symbols` gives -> {name: (out, in) int16}. Raises DataError."""
    decoder = RansDecoder(stream, FrequencyTables.from_bytes(tables, CONTEXTS, ALPHABET))
    shapes = {name: (len(grid.row_steps), len(grid.column_steps)) for name, grid in grids.items()}
    by_height = strips_by_height(shapes)
    widest = max(sum(shapes[strip.name][1] for strip in strips) for strips in by_height.values())
    lanes = lane_count(sum(map(math.prod, shapes.values())), widest)  # with fewer, a forged stream would take minutes
    require(len(decoder.states) == lanes, f"{len(decoder.states)} lanes, expected {lanes}", DataError)
    integers = {name: np.empty(shape, np.int16) for name, shape in shapes.items()}
    for height, strips in by_height.items():
        model = ContextModel(strips, height, grids, trellis)
        rows = np.empty((height, len(model.column_classes)), np.int16)
        for row in range(height):
            rows[row] = model.to_integers(decoder.take(model.contexts(row)))
        ends = np.cumsum([shapes[strip.name][1] for strip in strips])[:-1]
        for strip, part in zip(strips, np.split(rows, ends, 1), strict=True):
            integers[strip.name][strip.start : strip.start + height] = part
    decoder.finish()
    return integers


PREFIX = "matrices."  # of the names of stored tensors


def encode_matrices(matrices: Matrices, trellis: Trellis) -> dict[str, Tensor]:
    """The tensors that an artifact stores for all matrices: their grids and their entropy-coded integers."""
    calls = list(integer_symbols(matrices, trellis))
    pairs = np.concatenate([contexts.astype(np.int32) * ALPHABET + symbols for symbols, contexts in calls])
    counts = np.bincount(pairs, minlength=CONTEXTS * ALPHABET)  # all at once: row by row, it would take seconds
    tables = FrequencyTables.from_counts(counts.reshape(CONTEXTS, ALPHABET))
    encoder = RansEncoder(tables)
    for symbols, contexts in calls:
        encoder.put(symbols, contexts)

    stored = {
        "integers": np.frombuffer(encoder.finish(), np.uint8),
        "integer_tables": np.frombuffer(tables.to_bytes(), np.uint8),
        "trellis": np.array([trellis.states], np.uint8),
    }
    for part in Grid._fields:
        numbers = [getattr(matrices.grids[name], part) for name in sorted(matrices.grids)]
        stored[part] = np.concatenate(numbers).astype(np.int8)
    return {PREFIX + name: torch.from_numpy(array.copy()) for name, array in stored.items()}


def layout_of_matrices(shapes: Shapes, found: Layout, what: str) -> Layout:
    """The layout of what `encode_matrices` stores for matrices of these shapes, with streams as long as those found.
    Raises DataError if they are too short for the weights: a small file could claim a network of any size."""

    def bytes_of(name: str) -> int:
        _, shape = found.get(PREFIX + name, (None, torch.Size()))
        return shape.numel()

    weights = sum(rows * columns for rows, columns in shapes.values())
    require(
        LEAST_BITS * weights <= 8 * bytes_of("integers") + SMALL_NETWORK,
        f"{what}: its configuration has {weights} weights, which {bytes_of('integers')} bytes cannot hold",
        DataError,
    )
    all_rows = sum(rows for rows, _ in shapes.values())
    all_columns = sum(columns for _, columns in shapes.values())
    sizes = {"integers": bytes_of("integers"), "integer_tables": bytes_of("integer_tables"), "trellis": 1}
    layout: Layout = {name: (torch.uint8, torch.Size([size])) for name, size in sizes.items()}
    for part, size in zip(Grid._fields, (all_rows, all_columns, all_rows, all_columns), strict=True):
        layout[part] = torch.int8, torch.Size([size])
    return {PREFIX + name: entry for name, entry in layout.items()}


def decode_matrices(stored: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The inverse of `encode_matrices`, for matrices of these shapes -> {name: (out, in) fp32}. Raises DataError."""
    states = int(stored[PREFIX + "trellis"])
    require(states == 0 or states in TRELLISES, f"a trellis of {states} states", DataError)
    names = sorted(shapes)
    parts = []  # of all grids, matrix by matrix
    for part, side in zip(Grid._fields, (0, 1, 0, 1), strict=True):
        ends = np.cumsum([shapes[name][side] for name in names])
        numbers = stored[PREFIX + part].numpy().astype(np.int16)
        require(int(np.abs(numbers).max()) <= GRID_LIMIT, f"{part} beyond {GRID_LIMIT}", DataError)
        parts.append(np.split(numbers, ends[:-1]))
    grids = {name: Grid(*numbers) for name, numbers in zip(names, zip(*parts, strict=True), strict=True)}

    stream = stored[PREFIX + "integers"].numpy().tobytes()
    tables = stored[PREFIX + "integer_tables"].numpy().tobytes()
    integers = decode_integers(stream, tables, grids, Trellis(states))
    matrices = Matrices(integers, grids)
    return {name: matrices.restore(name) for name in shapes}


# ---- The fit to the limit of bytes ----


class Quantiser:
    """Rounds all matrices of a network, given one factor on all steps.

    Ranks share the work: each prepares and rounds some matrices of every shape."""

    def __init__(
        self, weights: Mapping[str, Tensor], sensitivities: Mapping[str, Sensitivity], run: RunConfig, dist: Dist
    ):
        self.dist = dist
        self.weight_count = sum(w.numel() for w in weights.values())
        self.trellis = Trellis(trellis_states(run, self.weight_count))
        self.shapes = {name: tuple(weights[name].shape) for name in sorted(weights)}
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name, shape in self.shapes.items():
            by_shape.setdefault(shape, []).append(name)

        # This rank's: {shape: {name: plan}}
        self.plans = {
            shape: {
                name: MatrixPlan(weights[name], sensitivities[name], run.gptq_damping, self.trellis.noise)
                for name in names[dist.rank :: dist.world]
            }
            for shape, names in by_shape.items()
        }
        damping = max((plan.damping for plans in self.plans.values() for plan in plans.values()), default=0.0)
        self.largest_damping = dist.all_reduce_max(damping)

    def round(self, octave: float) -> Matrices:
        """All matrices, rounded with the factor 2^octave on all steps; the same on every rank."""
        grids = self.grids(octave)
        rounded: dict[str, np.ndarray] = {}
        for plans in self.plans.values():
            if plans:
                integers = gptq(list(plans.values()), [grids[name] for name in plans], self.trellis)
                rounded |= zip(plans, integers, strict=True)
        return Matrices(self._from_all_ranks(rounded, self.shapes), grids)

    def grids(self, octave: float) -> dict[str, Grid]:
        """The grids of all matrices with the factor 2^octave on all steps; the same on every rank."""
        own: dict[str, np.ndarray] = {}
        for plans in self.plans.values():
            for name, plan in plans.items():
                own[name] = np.concatenate(plan.grid(octave))
        everyone = self._from_all_ranks(own, {name: (2 * sum(shape),) for name, shape in self.shapes.items()})
        return {
            name: Grid(*np.split(everyone[name], np.cumsum([rows, columns, rows])))
            for name, (rows, columns) in self.shapes.items()
        }

    def _from_all_ranks(self, own: Mapping[str, np.ndarray], shapes: Mapping[str, tuple]) -> dict[str, np.ndarray]:
        """This rank's arrays of small integers, the shapes of all ranks' arrays -> all arrays, int16, on every rank."""
        flat = [own[name].ravel() if name in own else np.zeros(math.prod(shapes[name]), np.int16) for name in shapes]
        total = torch.from_numpy(np.concatenate(flat).astype(np.int32)).to(self.dist.device)  # NCCL knows no int16
        total = self.dist.all_reduce(total).cpu().numpy().astype(np.int16)
        parts = np.split(total, np.cumsum([len(part) for part in flat])[:-1])
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def first_guess(self, bits: float) -> float:
        """The octave at which integers take `bits` on average, if weights are Gaussian and steps small: a weight whose
        standard deviation is 2^c steps takes c + log2(sqrt(2 pi e)) bits, or one less where a trellis excludes every
        other integer."""
        octave = -10.0  # any start will do: from -20 or 5, the first round comes within an octave, the others settle it
        for _ in range(4):  # several, as the steps of rare tokens, and those at their finest, do not follow the octave
            excess = -bits + 0.5 * math.log2(2 * math.pi * math.e) - (self.trellis.states > 0)
            for name, grid in self.grids(octave).items():
                share = math.prod(self.shapes[name]) / self.weight_count
                excess += share * (grid.row_classes.mean() + grid.column_classes.mean()) / 8
            octave += excess
        return octave


TRELLIS_MIN_WEIGHTS = 8_000_000  # smaller networks have bits to spare, and a CPU without a compiler avoids the search


def trellis_states(run: RunConfig, weights: int) -> int:
    """States of the trellis for a network with this many weights in matrices."""
    if run.trellis_states == "auto":
        return 32 if weights >= TRELLIS_MIN_WEIGHTS else 0
    return int(run.trellis_states)


# ---- The artifact ----

ENOUGH_BITS = 6.0  # per weight, on average: finer steps would change nothing, even if ARTIFACT_BYTES has room for them
LEAST_BITS = 1.0  # per weight: with fewer, the model is too large for the limit, or a file claims too large a model
GRID_BYTES = 0.6  # per row and column, about
FIT = 0.9995  # share of the limit to aim at, so that the noise of rounding does not exceed it
FIT_TOLERANCE = 0.001  # share of the limit that may stay unused
MAX_ROUNDINGS = 5  # the first follows a guess, the second usually fits


class Budget(NamedTuple):
    """Bytes of an artifact, without the code."""

    limit: int
    fixed: float  # about what everything but the integers takes
    weights: int  # numbers in matrices

    @classmethod
    def of(cls, model: GPT, run: RunConfig) -> Budget:
        parameters = [(param_role(name), p) for name, p in model.named_parameters()]
        scalars = sum(p.numel() for role, p in parameters if role == "scalar")
        rows_and_columns = sum(sum(p.shape) for role, p in parameters if role != "scalar")
        weights = sum(p.numel() for role, p in parameters if role != "scalar")
        fixed = 2 * scalars + GRID_BYTES * rows_and_columns + gradient_rms_bytes(model, run)
        return cls(run.artifact_bytes - len(code()), fixed, weights)

    @property
    def goal(self) -> float:
        """The size to aim at: just below the limit, or less where finer steps would change nothing."""
        return min(FIT * self.limit, self.fixed + ENOUGH_BITS * self.weights / 8)

    def accepts(self, size: int) -> bool:
        """Whether an artifact of this size fits, and leaves little usable room unused."""
        return size <= self.limit and (size >= (1 - FIT_TOLERANCE) * self.limit or self.goal < FIT * self.limit)

    @property
    def least(self) -> float:
        """With a limit below this, the model is too large."""
        return self.fixed + LEAST_BITS * self.weights / 8


def make_artifact(
    model: GPT,
    sensitivities: Mapping[str, Sensitivity],
    run: RunConfig,
    dist: Dist,
    watch: Stopwatch,
    provenance: Mapping[str, Any],
    log: Log,
    once: bool = False,
) -> bytes:
    """Quantise and pack into ARTIFACT_BYTES, code included -> the artifact (b"" on all ranks but the first). Raises
    UserError if none fits. With `once` it rounds once and accepts any size."""
    budget = Budget.of(model, run)
    meta = {"kind": "artifact", "model": dataclasses.asdict(model.config), **provenance}
    with watch.phase("factorise"):
        weights = {name: p.detach().float() for name, p in model.named_parameters() if param_role(name) != "scalar"}
        scalars = {name: p.detach().half() for name, p in model.named_parameters() if param_role(name) == "scalar"}
        others = scalars | encode_gradient_rms(model)
        quantiser = Quantiser(weights, sensitivities, run, dist)
        octave = quantiser.first_guess(8 * (budget.goal - budget.fixed) / budget.weights)
    if quantiser.largest_damping > run.gptq_damping:
        line = "damping: a Hessian is not positive definite with GPTQ_DAMPING, which was raised to {damping:g} for it"
        log.event("damping", line, damping=quantiser.largest_damping)

    def pack_at(octave: float) -> tuple[bytes, int]:
        with watch.phase("quantise"):
            matrices = quantiser.round(octave)
        with watch.phase("pack"):
            blob = pack(meta, others | encode_matrices(matrices, quantiser.trellis), level=22) if dist.main else b""
            return blob, int(dist.broadcast(len(blob))[0])

    return fit_to_limit(pack_at, octave, budget, log, once)


def fit_to_limit(
    pack_at: Callable[[float], tuple[bytes, int]], octave: float, budget: Budget, log: Log, once: bool
) -> bytes:
    """Pack until a size is accepted, or only `once` -> that artifact. `pack_at` takes a factor 2^octave on all steps
    and returns an artifact and its size; each size corrects the octave of the next. Raises UserError if none fits."""
    tried: list[tuple[float, int]] = []  # (octave, bytes)
    for attempt in range(1, MAX_ROUNDINGS + 1):
        blob, size = pack_at(octave)
        line = "pack {attempt}: {artifact_bytes} bytes, {bits:.4f} bits a weight, steps finer by {fineness:.4f} octaves"
        bits = 8 * (size - budget.fixed) / budget.weights
        log.event("rounding", line, attempt=attempt, fineness=-octave, artifact_bytes=size, bits=bits)
        if once or budget.accepts(size) or (size <= budget.limit and attempt > 2):
            return blob
        tried.append((octave, size))
        aim = (1 - FIT_TOLERANCE * (attempt - 1)) * budget.goal  # lower each time, as rounding may be noisier
        octave += (size - aim) / bytes_per_octave(tried, budget.weights / 8)
        if attempt == MAX_ROUNDINGS - 1:  # the last chance: rather one that left room than one that may not fit
            octave = next((octave for octave, size in tried if size <= budget.limit), octave)
    raise UserError(
        f"the artifact of {size} bytes and {len(code())} bytes of code are {size - budget.limit} bytes over "
        f"ARTIFACT_BYTES={budget.limit + len(code())}: raise it or use a smaller model"
    )


def bytes_per_octave(tried: Sequence[tuple[float, int]], one_bit: float) -> float:
    """Bytes saved by doubling all steps: about a bit per weight, and less where steps are coarse, as the last two
    roundings (octave, bytes) show."""
    if len(tried) < 2:
        return one_bit
    (octave, size), (last_octave, last_size) = tried[-2:]
    return min(max((size - last_size) / (last_octave - octave), one_bit / 4), 2 * one_bit)


# ---- Reading back ----

SMALL_NETWORK = 10_000_000  # weights, too few to cost time or memory


def check_layout(config: ModelConfig, found: Layout, what: str) -> None:
    """Check that names, types and shapes are those that an artifact stores for this network. Raises DataError."""
    with torch.device("meta"):  # takes no memory
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    matrices = {name: shape for name, shape in shapes.items() if param_role(name) != "scalar"}
    expected: Layout = {name: (torch.float16, shape) for name, shape in shapes.items() if name not in matrices}
    if PREFIX + "integers" in found:
        expected |= layout_of_matrices(matrices, found, what)
    else:
        expected |= layout_of_rows(matrices)
    if has_gradient_rms(found):
        expected |= layout_of_gradient_rms(config)
    require_layout(expected, found, what)


def layout_of_rows(matrices: Mapping[str, torch.Size]) -> Layout:
    """The layout of matrices in artifacts of the first version: transposed integers, and a step for every row."""
    layout: Layout = {}
    for name, shape in matrices.items():
        layout[name] = torch.int8, shape[::-1]
        layout[f"{name}.scale"] = torch.float16, shape[:1]
    return layout


def decode_rows(stored: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The matrices (out, in) fp32 of an artifact of the first version, by name."""
    return {name: stored[name].mT.float() * stored[f"{name}.scale"].float()[:, None] for name in names}


@torch.no_grad()
def restore(model: GPT, stored: Mapping[str, Tensor], what: str) -> GPT:
    """The model, filled with what an artifact stores. Raises DataError, which names the file `what`."""
    check_layout(model.config, {name: (t.dtype, t.shape) for name, t in stored.items()}, what)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if param_role(name) != "scalar"}
    if PREFIX + "integers" in stored:
        with untrusted(what):
            matrices = decode_matrices(stored, shapes)
    else:
        matrices = decode_rows(stored, shapes)
    for name, p in parameters.items():
        p.copy_(matrices[name] if name in matrices else stored[name])
        require(bool(p.isfinite().all()), f"{what}: {name} holds values that are not finite", DataError)
    if has_gradient_rms(stored):
        model.gradient_rms = decode_gradient_rms(stored, model.config, what)
    return model


def kind_of(stored_name: str) -> str:
    """The kind of bytes that a stored tensor counts as in reports."""
    if stored_name.startswith(PREFIX):
        return "steps" if stored_name.removeprefix(PREFIX) in Grid._fields else "integers"
    if stored_name.endswith(".scale"):
        return "steps"
    if stored_name.startswith(GRADIENT_PREFIX):
        return "statistics"
    return "scalars" if param_role(stored_name) == "scalar" else "integers"


@functools.cache
def code() -> bytes:
    """The source that counts towards ARTIFACT_BYTES, read once: it may be edited or gone when a long training ends."""
    return Path(__file__).read_bytes()


# ======================================================================================================================
# Scoring: every target is scored once, in nats, and added to its document's total. Which tokens it is predicted from
# depends only on its position in the document.


class ScoreTable:
    """Nats, scored targets and test-time training steps of every document, summed over ranks at the end."""

    def __init__(self, docs: Documents):
        self.docs = docs
        # (documents,) each
        self.nats = np.zeros(len(docs))
        self.targets = np.zeros(len(docs))  # scored so far
        self.updates = np.zeros(len(docs))

    def add(self, documents: np.ndarray, nats: np.ndarray) -> None:
        """Add the scores (n,) of targets that belong to these documents (n,)."""
        self.nats += np.bincount(documents, nats, minlength=len(self.docs))  # a sum in double precision
        self.targets += np.bincount(documents, minlength=len(self.docs))

    def all_reduced(self, dist: Dist) -> ScoreTable:
        """Sum over ranks, in place -> this table, after a check that every target was scored exactly once."""
        for values in (self.nats, self.targets, self.updates):
            values[:] = dist.all_reduce(torch.from_numpy(values)).numpy()
        wrong = np.flatnonzero(self.targets != self.docs.lengths)
        assert len(wrong) == 0, f"documents {wrong[:5]}: {self.targets[wrong[:5]]} targets scored, not once each"
        return self

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.docs.target_bytes().sum())

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.targets.sum())

    def require_finite(self, advice: str) -> None:
        """Raises UserError, with this advice, if a document's score is not a finite number."""
        wrong = np.flatnonzero(~np.isfinite(self.nats))
        require(
            len(wrong) == 0,
            f"{len(wrong)} of {len(self.nats)} documents have no finite score, the first is {wrong[:1]}: {advice}",
            UserError,
        )


class Window(NamedTuple):
    """Inputs start..end-1 of a document, of which first..end-1 are scored (input i predicts token i + 1)."""

    document: int
    start: int
    first: int
    end: int


def windows(document: int, begin: int, end: int, context: int, stride: int) -> Iterator[Window]:
    """The windows that score inputs begin..end-1 of a document: the first window of a document ends at `context`, each
    further one `stride` later. Where a window starts depends on the position alone, never on the document's length."""
    edge = context  # where the window ends, if the document reaches that far
    if begin >= context:
        edge += ((begin - context) // stride + 1) * stride
    while begin < end:
        yield Window(document, max(0, edge - context), begin, min(edge, end))
        begin = edge
        edge += stride


class EvalRow(NamedTuple):
    """A packed row of windows, and which of its targets count."""

    batch: MicroBatch
    documents: np.ndarray  # (N,) document of every target
    counted: np.ndarray  # (N,) bool, the target is scored in this row


def aligned(tokens: int) -> int:
    """A number of tokens, rounded up to where a window may begin in a packed row. Attention tiles then begin where
    windows do, so that a score is the same to the last bit wherever its window lies in a row."""
    return -(-tokens // TILE_TOKENS) * TILE_TOKENS


def fill_rows(wanted: Iterable[Window], row_tokens: int) -> list[list[Window]]:
    """Put windows, in order, into rows of at most `row_tokens`."""
    rows = []
    used = row_tokens  # tokens used in the last row; it counts as full while there is none
    for window in wanted:
        size = window.end - window.start
        if aligned(used) + size > row_tokens:
            rows.append([])
            used = 0
        rows[-1].append(window)
        used = aligned(used) + size
    return rows


def local_rows(docs: Documents, wanted: Iterable[Window], run: RunConfig, dist: Dist) -> Iterator[EvalRow]:
    """Pack windows into rows -> this rank's share of them. Every row has MICRO_BATCH_TOKENS: for matrix products of
    another shape a GPU may choose a kernel that rounds differently. Some CPUs do, too, but there padding would take
    too long: scores are the same up to rounding, and a lone row is only as long as its windows need."""
    size = run.micro_batch_tokens
    rows = fill_rows(wanted, size)
    if len(rows) == 1 and dist.device.type == "cpu":
        used = sum(aligned(window.end - window.start) for window in rows[0])
        contexts = -(-used // run.eval_seq_len)  # rounded up
        size = min(size, contexts * run.eval_seq_len)

    for row in rows[dist.rank :: dist.world]:
        yield pack_windows(docs, row, size, run.eval_seq_len, dist.device)


def pack_windows(docs: Documents, row: Sequence[Window], size: int, context: int, device: torch.device) -> EvalRow:
    """A row of `size` tokens that holds these windows, each at an aligned position. The padding between and after them
    has segments of its own: nothing else attends to it, and none of it counts."""
    text = np.full(size, BOS, np.uint16)
    targets = np.full(size, BOS, np.uint16)
    documents = np.zeros(size, np.int64)
    counted = np.zeros(size, bool)
    starts = []
    at = 0
    for window in row:
        span = docs.span(window.document)
        end = at + window.end - window.start
        text[at:end] = span[window.start : window.end]
        targets[at:end] = span[window.start + 1 : window.end + 1]
        documents[at:end] = window.document
        counted[at + window.first - window.start : end] = True
        starts.append(at)
        at = min(size, aligned(end))
        starts.extend(range(end, at, context))

    starts.extend(range(at, size, context))
    return EvalRow(make_micro_batch(text, targets, np.array(starts), device), documents, counted)


@torch.no_grad()
def score_static(
    model: GPT,
    docs: Documents,
    chosen: Sequence[int],
    run: RunConfig,
    dist: Dist,
    table: ScoreTable,
    looping: bool = True,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Score these documents without adaptation."""
    lengths = docs.lengths
    wanted = (w for i in chosen for w in windows(i, 0, int(lengths[i]), run.eval_seq_len, run.eval_stride))
    targets = int(lengths[chosen].sum())
    done = 0
    for row in local_rows(docs, wanted, run, dist):
        nats = model(*row.batch, looping=looping)[0].cpu().numpy()
        table.add(row.documents[row.counted], nats[row.counted])
        done += int(row.counted.sum()) * dist.world  # the other ranks are about as far
        progress(done, targets)


# ======================================================================================================================
# Test-time training (TTT): a chunk is scored, then learned from. What is learned is forgotten at the end of a document
# or, with TTT_SCOPE=stream, never.
#
# A learner adapts along a text. The caller goes from chunk to chunk and holds the chunk's state:
#     chunk = learner.score(...)            final scores, from what was learned before the chunk
#     chunk = learner.learn(chunk, mask)    steps on the targets that the mask counts
#     learner.advance(chunk)                the chunk becomes context
# BatchedTTT adapts to many documents at once, each with its own LoRA. SequentialTTT adapts to one text, changing
# the weights themselves or one set of LoRA; the ranks share every chunk.


def lora_outputs(c: ModelConfig) -> list[tuple[str, int]]:
    """(target, output columns) of everything that LoRA may correct, in the order of a forward pass."""
    widths = {"k": c.kv_dim, "v": c.kv_dim, "head": c.vocab_size}
    layer_passes = layer_plan(c, looping=True)
    targets = [*LayerLoRA._fields] * len(layer_passes) + ["head"]
    return [(target, widths.get(target, c.model_dim)) for target in targets]


def by_layer(targets: Sequence[Any]) -> list[LayerLoRA]:
    """One value per target, layer pass after layer pass -> a LayerLoRA of values for each pass."""
    size = len(LayerLoRA._fields)
    return [LayerLoRA(*targets[i : i + size]) for i in range(0, len(targets), size)]


class Adapter:
    """LoRA of B documents, for every layer pass and for the head. Initial values depend only on the seed. With
    TTT_OPTIMIZER=rms, `down` is frozen and shared by all documents."""

    def __init__(self, c: ModelConfig, run: RunConfig, documents: int, device: torch.device):
        generator = torch.Generator().manual_seed(run.seed)
        bound = c.model_dim**-0.5
        self.adapts_down = run.ttt_optimizer != "rms"
        self.initial: list[Tensor] = []  # values for one document, in the order of `tensors`

        def new_lora(target: str, width: int) -> LoRA | None:
            if target not in run.lora_targets:
                return None
            down = torch.empty(c.model_dim, run.ttt_lora_rank).uniform_(-bound, bound, generator=generator).to(device)
            up = torch.zeros(documents, run.ttt_lora_rank, width, device=device)  # zero: no effect at first
            if self.adapts_down:
                self.initial.append(down)
                down = down.repeat(documents, 1, 1).requires_grad_()
            self.initial.append(up[0].clone())
            return LoRA(down, up.requires_grad_(), run.ttt_lora_alpha / run.ttt_lora_rank)

        *of_layers, self.head = [new_lora(target, width) for target, width in lora_outputs(c)]
        self.passes = by_layer(of_layers)

    def tensors(self) -> list[Tensor]:
        """All tensors that adapt, (B, ...) each."""
        loras = [lora for layer in self.passes for lora in layer] + [self.head]
        if not self.adapts_down:
            return [lora.up for lora in loras if lora is not None]
        return [t for lora in loras if lora is not None for t in (lora.down, lora.up)]

    def reset(self) -> None:
        for t, initial in zip(self.tensors(), self.initial, strict=True):
            t.copy_(initial)


class TTTOptimizer:
    """The update rule of test-time training on tensors (B, ...). Clipping, moments, decay and learning rate are per
    document, so that no document's step depends on another. A new rule is a new branch of `directions`; what it knows
    about each column in advance is a multiplier of the learning rate."""

    def __init__(self, tensors: list[Tensor], multipliers: Sequence[float | Tensor], run: RunConfig):
        """`multipliers` of the learning rate: one per tensor or, with TTT_OPTIMIZER=rms, one per column, (columns,),
        namely the reciprocal of the RMS of the column's gradients."""
        self.run = run
        self.multipliers = multipliers
        self.steps_done = torch.zeros((), device=tensors[0].device)  # a tensor, so that replayed graphs count too
        adamw = run.ttt_optimizer == "adamw"
        has_exp_avg = run.ttt_optimizer == "sgd" or (adamw and run.ttt_beta1 > 0)  # with beta1 = 0 it is the gradient
        self.exp_avg = [torch.zeros_like(t) for t in tensors] if has_exp_avg else []
        self.exp_avg_sq = [torch.zeros_like(t) for t in tensors] if adamw else []
        self.state = [*self.exp_avg, *self.exp_avg_sq]  # (B, ...) each: what is copied where a document changes rows

    def reset(self) -> None:
        for t in (self.steps_done, *self.state):
            t.zero_()

    def directions(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients (B, ...) -> step directions, at a learning rate of 1. Updates moments in place."""
        run = self.run
        if run.ttt_optimizer == "adamw":
            betas = run.ttt_beta1, run.ttt_beta2
            return adam_directions(grads, self.exp_avg, self.exp_avg_sq, self.steps_done, *betas, eps=1e-10)
        if run.ttt_optimizer == "rms":
            return grads
        torch._foreach_mul_(self.exp_avg, run.ttt_momentum)
        torch._foreach_add_(self.exp_avg, grads)
        return self.exp_avg

    @torch.no_grad()
    def step(self, tensors: list[Tensor], grads: list[Tensor], lr: Tensor | float) -> None:
        """Update tensors (B, ...) in place, by gradients (B, ...) and a learning rate per document (B,) or for all."""
        run = self.run
        self.steps_done += 1
        lr = torch.zeros(len(tensors[0]), device=tensors[0].device) + lr  # (B,), also from one number
        if run.ttt_grad_clip:
            norms = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()  # (B,)
            factor = (run.ttt_grad_clip / (norms + 1e-6)).clamp(max=1.0)
            grads = [g * per_document(factor, g) for g in grads]
        for t, direction, multiplier in zip(tensors, self.directions(grads), self.multipliers, strict=True):
            rate = per_document(lr, t) * multiplier
            if run.ttt_optimizer != "rms":
                if run.ttt_ns_steps and direction.ndim == 3:
                    direction = orthogonalise(direction, run.ttt_ns_steps).to(t.dtype)
                t.mul_(1 - rate * run.ttt_weight_decay)
            t.addcmul_(rate, direction, value=-1.0)


def per_document(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to be multiplied with `like` (B, ...)"""
    return values.view(-1, *[1] * (like.ndim - 1))


def chunk_learning_rate(run: RunConfig, epoch: int, entropy: Tensor | None) -> Tensor | float:
    """Learning rate of a step on a chunk: TTT_LR, with cosine decay over the epochs if TTT_COSINE. It is scaled down in
    proportion where `entropy` (B,), the mean of the chunk's predictions in nats, is outside its window."""
    rate = run.ttt_lr
    if run.ttt_cosine:
        rate = run.ttt_lr * (0.5 * (1 + math.cos(math.pi * epoch / run.ttt_epochs)))
    if entropy is None:
        return rate
    low = max(run.ttt_entropy_low, 1e-9)
    high = run.ttt_entropy_high or math.inf
    return rate * (entropy / low).clamp(max=1.0) * (high / entropy.clamp(min=1e-9)).clamp(max=1.0)


def uses_entropy(run: RunConfig) -> bool:
    return run.ttt_entropy_low > 0 or run.ttt_entropy_high > 0


class Learner:
    """The learning step that all learners share. A subclass adds `score`, `learn` and `advance`, with its own type of
    chunk, and implements the methods below for it."""

    run: RunConfig
    tensors: list[Tensor]  # all that adapts, (B, ...) each
    optimizer: TTTOptimizer

    def take_steps(self, chunk: Any, mask: Any) -> Any:
        """Take TTT_EPOCHS steps on a scored chunk -> the chunk of the last forward pass."""
        entropy = self.mean_entropy(chunk, mask) if uses_entropy(self.run) else None
        for epoch in range(self.run.ttt_epochs):
            if epoch > 0:
                chunk = self.forward_again(chunk)
            grads = self.gradients(chunk, mask)
            self.optimizer.step(self.tensors, grads, chunk_learning_rate(self.run, epoch, entropy))
        return chunk

    def mean_entropy(self, chunk: Any, mask: Any) -> Tensor:
        """The mean entropy of each document's counted predictions, (B,) nats."""
        raise NotImplementedError

    def forward_again(self, chunk: Any) -> Any:
        """Run another forward pass over the chunk, with what has been learned since the last."""
        raise NotImplementedError

    def gradients(self, chunk: Any, mask: Any) -> list[Tensor]:
        """The gradients of each document's mean loss over its counted targets, (B, ...) each."""
        raise NotImplementedError


# ---- Many documents at once ----


class KVCache:
    """Keys and values of the last L tokens of B documents, for every layer pass. Token t lies in slot t % L.

    All documents are at the same position. On a GPU, whose kernels read only filled slots, L is `capacity`; on a CPU it
    grows by doubling. The buffers of every size are kept and reused: captured CUDA graphs hold their addresses.
    """

    SMALLEST = 256  # tokens, on a CPU

    def __init__(self, c: ModelConfig, documents: int, capacity: int, device: torch.device):
        self.config = c
        self.documents = documents
        self.capacity = capacity
        self.device = device
        self.buffers_by_size: dict[int, list[Tensor]] = {}
        self.last_token = torch.full((documents, 1), BOS, device=device)  # the token before the chunk, to smear
        self.position_on_device = torch.zeros((), dtype=torch.int64, device=device)  # equals `position`; graphs read it
        self.reset()

    def reset(self) -> None:
        """Go to the start of new documents."""
        self.last_token.fill_(BOS)
        self.position_on_device.zero_()
        for buffers in self.buffers_by_size.values():
            for buffer in buffers:
                buffer.zero_()  # masked anyhow, but 0 times NaN is NaN
        self.position = 0  # tokens so far
        self.size = 0  # L
        self.buffers: list[Tensor] = []  # (2, B, K, L, h) for each layer pass

    def make_room(self, tokens: int) -> None:
        """Grow to hold `tokens` more, but no more than `capacity`: all that a chunk may attend to."""
        size = self.size
        if size == 0:
            size = self.capacity if self.device.type == "cuda" else min(self.capacity, self.SMALLEST)
        while size < min(self.capacity, self.position + tokens):
            size = min(self.capacity, 2 * size)
        if self.buffers and size == self.size:
            return
        if size not in self.buffers_by_size:
            shape = (2, self.documents, self.config.num_kv_heads, size, self.config.head_dim)
            passes = len(layer_plan(self.config, looping=True))
            options = dict(dtype=activation_dtype(self.device), device=self.device)
            self.buffers_by_size[size] = [torch.zeros(shape, **options) for _ in range(passes)]
        larger = self.buffers_by_size[size]
        if self.buffers:  # no slot wraps round before the size is `capacity`, so that token t stays in slot t
            for new, old in zip(larger, self.buffers, strict=True):
                new[..., : self.size, :].copy_(old)
        self.buffers = larger
        self.size = size

    def context(self, tokens: int) -> CachedContext:
        """What the next `tokens` tokens attend to. Reads the position on the device, so that it can be captured."""
        positions = self.position_on_device + torch.arange(-1, tokens, device=self.device)
        return CachedContext(positions, self.position_on_device.clamp(max=self.size), self.buffers)

    @torch.no_grad()
    def append(self, tokens: Tensor, new_kvs: Sequence[Tensor]) -> None:
        """Append a chunk's tokens (B, C) with their keys and values, (2, B, K, C, h) for each layer pass. Works on the
        device alone, so that it can be captured; the caller must advance `position`."""
        count = tokens.size(1)
        kept = min(self.size, count)  # a chunk may be longer than the cache
        if kept:
            newest = torch.arange(kept, device=self.device)
            slots = (self.position_on_device + count - kept + newest) % self.size
            for buffer, new in zip(self.buffers, new_kvs, strict=True):
                buffer.index_copy_(3, slots, new[..., -kept:, :])
        self.last_token.copy_(tokens[:, -1:])
        self.position_on_device += count

    def copy_rows(self, other: KVCache, rows: Tensor) -> None:
        """Copy these documents from another cache, at its position; the two may differ in capacity."""
        self.position = other.position
        self.make_room(0)
        other.make_room(0)
        kept = min(self.position, self.size, other.size)
        newest = torch.arange(self.position - kept, self.position, device=self.device)
        for new, old in zip(self.buffers, other.buffers, strict=True):
            new.index_copy_(3, newest % self.size, old[:, rows][..., newest % other.size, :])
        self.last_token.copy_(other.last_token[rows])
        self.position_on_device.copy_(other.position_on_device)


class BatchedChunk(NamedTuple):
    """A chunk of C tokens of B documents, scored."""

    tokens: Tensor  # (B, C) inputs
    targets: Tensor  # (B, C)
    states: Tensor  # (B, C, D) before the head
    nats: Tensor  # (B, C); gradients flow through it to the adapter, if the chunk is to be learned from
    new_kvs: list[Tensor]  # keys and values that the chunk adds to the cache
    to_learn: bool = True  # whether the chunk was scored to be learned from


class BatchedTTT(Learner):
    """Adapts to B documents at once, each with its own LoRA. No row affects another.

    A chunk attends to the cached keys and values of earlier chunks, from their last forward pass, so that a step costs
    one chunk and not a whole window. On a GPU, steps that learn are replayed as CUDA graphs.
    """

    def __init__(self, model: GPT, run: RunConfig, documents: int, device: torch.device):
        self.model = model
        self.run = run
        self.adapter = Adapter(model.config, run, documents, device)
        self.tensors = self.adapter.tensors()
        multipliers = [1.0] * len(self.tensors)
        if run.ttt_optimizer == "rms":
            multipliers = [1 / rms.to(device) for rms in rms_of_gradients(model, run)]
        self.optimizer = TTTOptimizer(self.tensors, multipliers, run)
        self.cache = KVCache(model.config, documents, run.eval_seq_len - run.ttt_chunk_tokens, device)
        self.graphs = CUDAGraphs() if device.type == "cuda" and run.compile else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Begin new documents, remembering nothing."""
        self.adapter.reset()
        self.optimizer.reset()
        self.cache.reset()

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Inputs of the next chunk (B, C) -> states (B, C, D), new keys and values. Changes nothing."""
        self.cache.make_room(tokens.size(1))
        context = self.cache.context(tokens.size(1))
        return self.model.hidden(torch.cat([self.cache.last_token, tokens], 1), context, self.adapter)

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Inputs of the next chunk (B, C) -> logits of the tokens after them (B, C, V), which on a GPU the next call
        overwrites. Changes no other state, so several inputs may be tried."""
        self.cache.make_room(tokens.size(1))
        return self._replay_or_run("predict", True, self._predict, tokens)

    def score(self, tokens: Tensor, targets: Tensor, to_learn: bool) -> BatchedChunk:
        """Score the next chunk, inputs and targets (B, C) each, from what was learned before it. `to_learn`: whether
        `learn` will be called on it."""
        self.cache.make_room(tokens.size(1))
        # On a GPU always with an autograd graph: without one, torch may choose kernels that round differently.
        with torch.set_grad_enabled(to_learn or tokens.is_cuda):
            chunk = self._replay_or_run("score", to_learn, self._score, tokens, targets)
        return chunk._replace(to_learn=to_learn)

    def learn(self, chunk: BatchedChunk, mask: Tensor) -> BatchedChunk:
        """Take steps on a scored chunk; the mask (B, C) says which of its targets count."""
        # The chunk is closed over and not passed as an input: inputs are copied, and the copies would be cut off from
        # their autograd graph. A captured step must read the very tensors of the captured score.
        return self._replay_or_run("learn", True, lambda mask: self.take_steps(chunk, mask), mask)

    def advance(self, chunk: BatchedChunk) -> None:
        """Make the chunk part of the context."""
        self._replay_or_run("advance", chunk.to_learn, lambda: self.cache.append(chunk.tokens, chunk.new_kvs))
        self.cache.position += chunk.tokens.size(1)

    def _predict(self, tokens: Tensor) -> Tensor:
        states, _ = self.hidden(tokens)
        return self.model.head.logits(states, self.model.embed, self.adapter.head)

    def _score(self, tokens: Tensor, targets: Tensor) -> BatchedChunk:
        states, new_kvs = self.hidden(tokens)
        nats = self.model.head(states, targets, self.model.embed, self.adapter.head)
        return BatchedChunk(tokens, targets, states, nats, new_kvs)

    def forward_again(self, chunk: BatchedChunk) -> BatchedChunk:
        return self._score(chunk.tokens, chunk.targets)

    def gradients(self, chunk: BatchedChunk, mask: Tensor) -> list[Tensor]:
        count = mask.sum(1).clamp(min=1)
        loss = ((chunk.nats * mask).sum(1) / count).sum()  # a sum over documents: no step depends on a neighbour
        return list(torch.autograd.grad(loss, self.tensors))

    def mean_entropy(self, chunk: BatchedChunk, mask: Tensor) -> Tensor:
        entropy = self.model.head.entropy(chunk.states, self.model.embed, self.adapter.head)
        return (entropy * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _replay_or_run(self, name: str, to_learn: bool, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """Do a part of a step: on a GPU as a CUDA graph, if the chunk is to be learned from."""
        if self.graphs is None:
            return work(*inputs)
        if not to_learn:
            with self.graphs.on_stream():
                return work(*inputs)
        return self.graphs((name, self.cache.size), work, *inputs)

    @torch.no_grad()
    def copy_rows(self, other: BatchedTTT, rows: Tensor) -> None:
        """Copy these documents from another learner, in their current state."""
        self.reset()
        self.cache.copy_rows(other.cache, rows)
        mine = [*self.tensors, *self.optimizer.state]
        theirs = [*other.tensors, *other.optimizer.state]
        for new, old in zip(mine, theirs, strict=True):
            new.copy_(old[rows])
        self.optimizer.steps_done.copy_(other.optimizer.steps_done)


def late_chunk_tokens(run: RunConfig) -> int:
    """Tokens per chunk after the first EVAL_SEQ_LEN tokens of a document."""
    return run.ttt_late_chunk_tokens or max(run.ttt_chunk_tokens, min(64, run.eval_seq_len // 32))


def late_run(run: RunConfig) -> RunConfig:
    """The settings of late chunks.

    They are longer. Otherwise a document of 78,000 tokens would take almost 5,000 steps, each of which would leave a
    GPU idle, as few documents are that long. In a mean over n times as many targets, what their gradients have in
    common stands out sqrt(n) times as much; the learning rate grows by the same factor, so that about as much is
    learned from a text as with short chunks."""
    size = late_chunk_tokens(run)
    growth = math.sqrt(size / run.ttt_chunk_tokens)
    return dataclasses.replace(run, ttt_chunk_tokens=size, ttt_lr=run.ttt_lr * growth)


# How documents run side by side: the steps of `chunk_steps` for documents A to D of 150, 100, 40 and 20 targets, with
# EVAL_SEQ_LEN=64, TTT_BATCH_DOCS=4, TTT_CHUNK_TOKENS=16 and TTT_LATE_CHUNK_TOKENS=64. Each column is a step:
#
#              wave 0               wave 1       wave 2
#     tokens   16   16   16   16    64    64     64
#     first    0    16   32   48    64    128    64
#     row 0    A    A    A    A     A     A      B
#     row 1    B    B    B    B
#     row 2    C    C    C    c
#     row 3    D    D    d    d
#
# Lower case: the document has ended. A GPU keeps its row, whose scores do not count. A CPU drops half of the rows once
# half have ended: its step at 48 has only rows A and B. These two are longer than EVAL_SEQ_LEN and go on with late
# chunks, here 4 times as long, in waves of 4 / 4 = 1 row: A to its end, then B. Each wave starts from the state in
# which wave 0 left its documents: `BatchedTTT.copy_rows` copies LoRA and moments, `KVCache.copy_rows` the cache.


class ChunkStep(NamedTuple):
    """One chunk of each of the documents that run side by side."""

    first: int  # position in every document at which the chunk begins
    run: RunConfig  # settings of the learner; TTT_CHUNK_TOKENS is the chunk's length
    rows: np.ndarray  # (B,) the document in each row, -1 for none; some may have ended
    # (B,) where each row comes from: its index in the previous step or, in the first step of waves 1, 2, ..., in the
    # last step of wave 0; rows without a document have any index. None if rows have not changed.
    kept: np.ndarray | None
    wave: int  # 0; then 1, 2, ... for groups that go on with late chunks, each from where wave 0 ended


def chunk_steps(
    documents: int, run: RunConfig, device: torch.device, goes_on: Callable[[np.ndarray, int], np.ndarray]
) -> Iterator[ChunkStep]:
    """The steps that take `documents` documents, at most TTT_BATCH_DOCS, side by side to their ends. Documents longer
    than EVAL_SEQ_LEN go on in waves of fewer rows, as late chunks have more tokens.

    On a GPU the number of rows is fixed, and some rows may hold no document: for a matrix product of another shape, a
    GPU may choose a kernel that rounds differently, and a score would depend on the documents beside it. Some CPUs do,
    too, but there empty rows would take too long: scores are the same up to rounding, and half of the rows are dropped
    whenever half have ended.

    goes_on(rows, first) -> (B,) bool says which of these documents have a target at `first`. It is called once all
    earlier chunks are processed: a decoder finds out where a document ends as it goes."""
    fixed = device.type == "cuda"
    late = late_run(run)
    late_rows = max(1, run.ttt_batch_docs * run.ttt_chunk_tokens // late.ttt_chunk_tokens)

    def alive(rows: np.ndarray, first: int) -> np.ndarray:
        going = rows >= 0
        going[going] = goes_on(rows[going], first)
        return going

    def together(step: ChunkStep, end: float) -> Iterator[ChunkStep]:
        """The steps from this one on, until all documents have ended or reached `end` -> the step that would follow."""
        while (going := alive(step.rows, step.first)).any() and step.first < end:
            if not fixed:
                step = with_fewer_rows(step, going)
            yield step
            step = step._replace(first=step.first + step.run.ttt_chunk_tokens, kept=None)
        return step

    rows = filled_up(np.arange(documents), run.ttt_batch_docs if fixed else documents)
    step = yield from together(ChunkStep(0, run, rows, None, 0), run.eval_seq_len)
    left = np.flatnonzero(alive(step.rows, step.first))
    for wave, begin in enumerate(range(0, len(left), late_rows), 1):
        chosen = left[begin : begin + late_rows]
        size = late_rows if fixed else len(chosen)
        rows = filled_up(step.rows[chosen], size)
        yield from together(ChunkStep(step.first, late, rows, filled_up(chosen, size, 0), wave), math.inf)


def filled_up(values: np.ndarray, size: int, value: int = -1) -> np.ndarray:
    """Values (n,), padded with `value` to (size,)."""
    return np.append(values, np.full(size - len(values), value, values.dtype))


def with_fewer_rows(step: ChunkStep, going: np.ndarray) -> ChunkStep:
    """The step with its rows halved while at most half of them go on, so that only a few numbers of rows occur.
    `going` (B,) bool: the rows that go on. In the first step of a wave all do."""
    size = len(step.rows)
    while size > 1 and going.sum() <= size // 2:
        size //= 2
    if size == len(step.rows):
        return step
    chosen = np.argsort(~going, kind="stable")[:size]  # those that go on, then some that have ended
    return step._replace(rows=step.rows[chosen], kept=chosen)


class Learners:
    """A learner for each number of rows, with late chunks or not, kept with its captured graphs for the next group."""

    def __init__(self, model: GPT, device: torch.device):
        self.model = model
        self.device = device
        self.by_size: dict[tuple[int, bool], BatchedTTT] = {}  # (rows, late chunks or not)
        self.current: BatchedTTT | None = None  # the learner of the latest step
        self.wave = 0  # of the latest step
        self.before_waves: BatchedTTT | None = None  # the learner of wave 0's last step, where later waves start

    def at(self, step: ChunkStep) -> BatchedTTT:
        """The learner for a step, with what its documents have learned so far."""
        if step.first == 0:
            if (len(step.rows), False) not in self.by_size:
                # Each learner holds gigabytes, and those for groups of another size are not needed again.
                self.by_size.clear()
                self.current = self.before_waves = None
            elif self.device.type == "cpu":  # where the number of late rows depends on the group
                self.by_size = {key: learner for key, learner in self.by_size.items() if key == (len(step.rows), False)}
            self.current = self._learner(step)
            self.current.reset()
        elif step.kept is not None:
            if self.wave == 0:
                self.before_waves = self.current
            source = self.current if step.wave == self.wave else self.before_waves
            self.current = self._learner(step)
            self.current.copy_rows(source, torch.from_numpy(step.kept).to(self.device))
        self.wave = step.wave
        return self.current

    def _learner(self, step: ChunkStep) -> BatchedTTT:
        key = len(step.rows), step.wave > 0
        if key not in self.by_size:
            self.by_size[key] = BatchedTTT(self.model, step.run, len(step.rows), self.device)
        return self.by_size[key]


def score_batched(
    docs: Documents, group: Sequence[int], run: RunConfig, dist: Dist, table: ScoreTable, learners: Learners
) -> None:
    """Score documents that adapt side by side."""
    group = np.array(group)
    lengths = np.append(docs.lengths[group], 0)  # the last one is for rows without a document, -1
    text = padded_documents(docs, group, late_chunk_tokens(run)).to(dist.device)  # (n + 1, T)
    scored = []  # nats stay on the device until the end: reading them at every chunk would make it wait for Python
    for step in chunk_steps(len(group), run, dist.device, lambda rows, first: lengths[rows] > first):
        learner = learners.at(step)
        first = step.first
        size = step.run.ttt_chunk_tokens
        end = first + size
        if first == 0 or step.kept is not None:
            tokens = text[torch.from_numpy(step.rows).to(dist.device)]  # (B, T)
        left = lengths[step.rows] - first  # (B,) targets of every document from here on
        mask = np.arange(size) < left[:, None]  # (B, C)
        to_learn = end >= run.ttt_min_doc_tokens and bool(left.max() > size)

        chunk = learner.score(tokens[:, first:end], tokens[:, first + 1 : end + 1], to_learn)
        scored.append((np.repeat(group[step.rows], mask.sum(1)), mask, chunk.nats.detach().clone()))
        if to_learn:
            chunk = learner.learn(chunk, torch.from_numpy(mask).to(dist.device))
            table.updates[group[step.rows[left > size]]] += run.ttt_epochs
        learner.advance(chunk)

    for documents, mask, nats in scored:
        table.add(documents, nats.cpu().numpy()[mask])


def padded_documents(docs: Documents, group: Sequence[int], chunk: int) -> Tensor:
    """Documents as rows, (n + 1, T) int64, padded with BOS by more than a chunk. Everything is causal, so padding
    changes no score. The last row is all padding."""
    lengths = docs.lengths[group]
    text = np.full((len(group) + 1, int(lengths.max(initial=0)) + chunk + 1), BOS, np.int64)
    for row, i in enumerate(group):
        text[row, : lengths[row] + 1] = docs.span(i)
    return torch.from_numpy(text)


# ---- How large gradients are, for TTT_OPTIMIZER=rms ----

RMS_CHUNK_TOKENS = 16  # length of the chunks to measure gradients on, if the run does not learn from short ones itself
LONGER_CHUNKS = 4  # gradients are measured again on chunks this many times as long, to see how they grow
FARTHEST_CHUNKS = 2  # the run's chunks may be this many times shorter than the short ones, or longer than the long ones
PROBED_DOCUMENTS = 128  # at a time
PROBED_TOKENS = 512  # per document: many short texts say more than few long ones, in the same time


class GradientRMS(NamedTuple):
    """How large gradients are on training text, for every column of every output that LoRA may correct.

    For a chunk of C targets, let x_t (in,) be the input at token t, and g_tj the gradient of the summed loss at column
    j of the output there. The number of column j is sqrt(mean |sum_t x_t g_tj|^2 / C), with the mean over chunks: the
    RMS of one target's gradient at row j of the matrix. It does not depend on LoRA: see `rms_of_gradients`.

    After dynamic evaluation with RMS statistics (Krause et al., arXiv 1904.08378), which keeps one per weight."""

    columns: list[Tensor]  # (out,) fp32, for each of lora_outputs
    growth: Tensor  # (outputs,) fp32: the columns of an output grow as C^growth
    chunk_tokens: int  # C


def rms_of_gradients(model: GPT, run: RunConfig) -> list[Tensor]:
    """RMS of the gradients at `up`, (out,) fp32 for every output that adapts: a step on a chunk is divided by it.

    LoRA adds s x A B to an output, with s = TTT_LORA_ALPHA / R and the entries of A (in, R) uniform between -in^-1/2
    and in^-1/2, so that their variance is 1 / (3 in). For a chunk of C targets, the mean loss has the gradient
    s / C sum_t (x_t . a_r) g_tj at B_rj, where a_r is column r of A. If A is independent of the text, the mean square
    of this gradient is (s / C)^2 mean |sum_t x_t g_tj|^2 / (3 in), so that its RMS is s / sqrt(3 in C) times the number
    of column j. That number is the same for all R, s and A.

    It is also the same for all C if the gradients of a chunk's targets are uncorrelated. At the head they are, if the
    model's errors have zero mean given the preceding text. Elsewhere a target's gradient comes from all tokens of the
    chunk up to it, and grows with C, which `growth` corrects. Raises UserError if C is too far from what was measured.
    """
    measured = model.gradient_rms
    check_gradient_rms(measured, run, "test-time training")
    chunk_tokens = run.ttt_chunk_tokens
    scale = run.ttt_lora_alpha / run.ttt_lora_rank / math.sqrt(3 * model.config.model_dim * chunk_tokens)
    found = []
    outputs = zip(lora_outputs(model.config), measured.columns, measured.growth.tolist(), strict=True)
    for (target, _), columns, growth in outputs:
        if target in run.lora_targets:
            rms = columns * (scale * (chunk_tokens / measured.chunk_tokens) ** growth)
            found.append(rms + run.ttt_rms_floor * rms.square().mean().sqrt())
    return found


def check_gradient_rms(measured: GradientRMS | None, run: RunConfig, what: str) -> None:
    """Raises UserError, which names the artifact `what`, if it lacks the RMS that TTT_OPTIMIZER=rms divides by, or if
    that was measured on chunks of a very different length."""
    require(measured is not None, f"{what}: TTT_OPTIMIZER=rms: {NO_GRADIENT_RMS}", UserError)
    check_chunks(measured.chunk_tokens, run, what)


def check_chunks(measured_on: int, run: RunConfig, what: str) -> None:
    """Raises UserError, which names `what`, if gradients measured on chunks of `measured_on` tokens say too little
    about the chunks that the run learns from."""
    low = measured_on / FARTHEST_CHUNKS
    high = measured_on * LONGER_CHUNKS * FARTHEST_CHUNKS
    chunks = {"TTT_CHUNK_TOKENS": run.ttt_chunk_tokens, "TTT_LATE_CHUNK_TOKENS": late_chunk_tokens(run)}
    for name, chunk_tokens in chunks.items():
        require(
            low <= chunk_tokens <= high,
            f"{what}: TTT_OPTIMIZER=rms: gradients are measured on chunks of {measured_on} tokens, which says too "
            f"little of {name}={chunk_tokens}: choose {low:g} to {high:g}, measure an artifact again "
            "(./run.sh calibrate), or set TTT_OPTIMIZER=adamw",
            UserError,
        )


NO_GRADIENT_RMS = (
    "the artifact does not hold the RMS of gradients: add it (./run.sh calibrate), or set TTT_OPTIMIZER=adamw"
)


class Probe:
    """Takes the place of LoRA: adds zeros to the output, and shows the gradient there."""

    def __init__(self, columns: int):
        self.columns = columns

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, in) -> zeros (B, C, columns), which have a gradient. Keeps both for `squares`."""
        self.inputs = x.detach().float()
        self.outputs = x.new_zeros(*x.shape[:-1], self.columns, requires_grad=True)
        return self.outputs

    def squares(self, gradient: Tensor) -> Tensor:
        """Gradient g at the outputs (B, C, columns) -> |sum_t x_t g_tj|^2 (columns,), summed over documents."""
        gradient = gradient.float()
        products = self.inputs @ self.inputs.mT  # (B, C, C)
        return ((products @ gradient) * gradient).sum((0, 1))


class ProbedDocuments:
    """Reads B documents side by side and chunk by chunk, as `BatchedTTT` does, and measures gradients instead of
    learning from them. Takes the place of an `Adapter`."""

    head = None  # not probed: see `head_squares`

    def __init__(self, model: GPT, documents: int, context: int, chunk_tokens: int, capture: bool):
        device = model.embed.device
        outputs = lora_outputs(model.config)
        self.model = model
        self.probes = [Probe(columns) for target, columns in outputs if target != "head"]
        self.passes = by_layer(self.probes)
        self.cache = KVCache(model.config, documents, context - chunk_tokens, device)
        self.graphs = CUDAGraphs() if device.type == "cuda" and capture else None
        self.squares = [torch.zeros(columns, device=device) for _, columns in outputs]  # sums over chunks
        self.chunks = torch.zeros((), dtype=torch.int64, device=device)

    def read(self, tokens: Tensor, targets: Tensor, counted: Tensor) -> None:
        """Read the next chunk, inputs and targets (B, C) each. `counted` (B,) bool: which documents are measured."""
        self.cache.make_room(tokens.size(1))
        if self.graphs is None:
            self._read(tokens, targets, counted)
        else:
            self.graphs(self.cache.size, self._read, tokens, targets, counted)
        self.cache.position += tokens.size(1)

    def _read(self, tokens: Tensor, targets: Tensor, counted: Tensor) -> None:
        context = self.cache.context(tokens.size(1))
        with torch.enable_grad():
            states, new_kvs = self.model.hidden(torch.cat([self.cache.last_token, tokens], 1), context, self)
            nats = self.model.head(states, targets, self.model.embed)
            loss = (nats * counted[:, None]).sum()
            gradients = torch.autograd.grad(loss, [probe.outputs for probe in self.probes])
        found = [probe.squares(gradient) for probe, gradient in zip(self.probes, gradients, strict=True)]
        found.append(self.head_squares(states.detach(), counted))
        torch._foreach_add_(self.squares, found)
        self.chunks += counted.sum()
        self.cache.append(tokens, new_kvs)

    def head_squares(self, states: Tensor, counted: Tensor) -> Tensor:
        """States (B, C, D) -> the expectation (V,) of `Probe.squares` at the head, over targets sampled from the model:
        |x|^2 c^2 p (1 - p), with p the probabilities and c the slope of the soft cap.

        With the text's own targets, tokens absent from so little text would get numbers a hundred times too small, and
        steps a hundred times too large once they occur."""
        logits = self.model.head.logits(states, self.model.embed, None)  # (B, C, V)
        p, slope = self.model.head.probabilities(logits)
        curvature = p * (1 - p) * slope.square()
        weights = states.float().square().sum(-1) * counted[:, None]
        return (curvature * weights[..., None]).sum((0, 1))


def probed_tokens(run: RunConfig) -> int:
    """The most tokens of a document that gradients are measured on."""
    return min(PROBED_TOKENS, run.train_seq_len)


def rms_chunk_tokens(run: RunConfig) -> int:
    """Length of the chunks to measure gradients on: that of the chunks that the run learns from, if these are short."""
    return min(run.ttt_chunk_tokens if run.batched_ttt else RMS_CHUNK_TOKENS, probed_tokens(run))


def measure_gradient_rms(
    model: GPT, docs: Documents, run: RunConfig, dist: Dist, log: Log | None = None
) -> GradientRMS:
    """Measure gradients on up to `probed_tokens` of each document; at least one must have a whole chunk. The result is
    the same on every rank. Progress goes to `log`, if there is one."""

    def progress(size: int) -> ScoringProgress:
        return ScoringProgress(log or Log(), f"training text for its gradients, in chunks of {size}")

    size = rms_chunk_tokens(run)
    longer_size = size * longer_chunks(docs, run)
    columns = measure_columns(model, docs, run, dist, size, progress(size))
    growth = torch.zeros(len(columns))
    if longer_size > size:
        longer = measure_columns(model, docs, run, dist, longer_size, progress(longer_size))
        ratios = [b.norm() / a.norm() for a, b in zip(columns, longer, strict=True)]
        growth = torch.stack(ratios).log() / math.log(longer_size / size)
    return GradientRMS(columns, growth, size)


def longer_chunks(docs: Documents, run: RunConfig) -> int:
    """How many times as long as short chunks the longer ones are, which show how gradients grow; 1 if no document has
    room for longer chunks, so that growth cannot be measured."""
    longest = min(int(docs.lengths.max()), probed_tokens(run))
    return min(LONGER_CHUNKS, longest // rms_chunk_tokens(run))


@torch.no_grad()
def measure_columns(
    model: GPT, docs: Documents, run: RunConfig, dist: Dist, size: int, progress: ScoringProgress
) -> list[Tensor]:
    """`GradientRMS.columns`, measured on all whole chunks of `size` tokens; there must be at least one."""
    context = probed_tokens(run)
    chunks = np.minimum(docs.lengths, context) // size  # of every document
    rounds = deal_documents(chunks, dist.world, PROBED_DOCUMENTS)
    rows = len(rounds[0][0])  # of the largest group; smaller ones leave rows empty to share its CUDA graphs
    done = 0
    with without_weight_gradients(model):
        probed = ProbedDocuments(model, rows, context, size, bool(run.compile))
        for groups in rounds:
            group = groups[dist.rank]
            for read in probe_documents(probed, docs, group, chunks[group], size):
                done += read * dist.world  # the other ranks are about as far
                progress(done, size * int(chunks.sum()))

    targets = size * int(dist.all_reduce(probed.chunks))
    return [(dist.all_reduce(total) / targets).sqrt().clamp(min=1e-18).cpu() for total in probed.squares]


def probe_documents(
    probed: ProbedDocuments, docs: Documents, group: Sequence[int], chunks: np.ndarray, size: int
) -> Iterator[int]:
    """Read chunks of `size` tokens from the start of every document of a group, as many as `chunks` (n,) says. -> after
    every step, the number of targets that it read."""
    rows = len(probed.cache.last_token)
    most = int(chunks.max(initial=0))
    text = np.full((rows, most * size + 1), BOS, np.int64)
    counted = np.zeros((rows, most), bool)
    for row, i in enumerate(group):
        end = chunks[row] * size
        text[row, : end + 1] = docs.span(i)[: end + 1]
        counted[row, : chunks[row]] = True

    tokens = torch.from_numpy(text).to(probed.chunks.device)
    is_counted = torch.from_numpy(counted).to(probed.chunks.device)
    probed.cache.reset()
    for n in range(most):
        first = n * size
        end = first + size
        probed.read(tokens[:, first:end], tokens[:, first + 1 : end + 1], is_counted[:, n])
        yield size * int(counted[:, n].sum())


# The RMS of gradients is stored as logarithms, which zstd compresses well: columns are alike in several layer passes.

GRADIENT_PREFIX = "gradients."  # of the names of stored tensors
LEVELS = 4  # per octave: numbers are exact to 9 %
GROWTH_STEPS = 64  # per unit of the exponent
EXPECTED_LEVEL_BITS = 3.2  # per column, compressed


def has_gradient_rms(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold the RMS of gradients, or a part of it."""
    return any(name.startswith(GRADIENT_PREFIX) for name in names)


def layout_of_gradient_rms(c: ModelConfig) -> Layout:
    """The layout of what `encode_gradient_rms` stores."""
    outputs = lora_outputs(c)
    layout: Layout = {
        "growth": (torch.int8, torch.Size([len(outputs)])),
        "chunk_tokens": (torch.float32, torch.Size([1])),
    }
    for target, columns in dict(outputs).items():
        count = sum(name == target for name, _ in outputs)
        layout[target] = torch.int8, torch.Size([count, columns])
    return {GRADIENT_PREFIX + name: entry for name, entry in layout.items()}


def gradient_rms_bytes(model: GPT, run: RunConfig) -> float:
    """About how many bytes the RMS of gradients will take in an artifact of this model; 0 if it is not measured."""
    columns = sum(columns for _, columns in lora_outputs(model.config))
    return EXPECTED_LEVEL_BITS / 8 * columns if run.grad_rms_tokens else 0.0


def encode_gradient_rms(model: GPT) -> dict[str, Tensor]:
    """The tensors that an artifact stores for `model.gradient_rms`, none if it is None. Most hold the logarithms of one
    target's columns, (outputs, columns) int8."""
    measured = model.gradient_rms
    if measured is None:
        return {}
    levels: dict[str, list[Tensor]] = {target: [] for target in LORA_TARGETS}
    for (target, _), numbers in zip(lora_outputs(model.config), measured.columns, strict=True):
        levels[target].append((LEVELS * numbers.log2()).round().clamp(-GRID_LIMIT, GRID_LIMIT).to(torch.int8))
    growth = (GROWTH_STEPS * measured.growth).round().clamp(-GRID_LIMIT, GRID_LIMIT).to(torch.int8)
    stored = {target: torch.stack(found) for target, found in levels.items()}
    stored |= {"growth": growth, "chunk_tokens": torch.tensor([float(measured.chunk_tokens)])}
    return {GRADIENT_PREFIX + name: tensor for name, tensor in stored.items()}


def decode_gradient_rms(stored: Mapping[str, Tensor], c: ModelConfig, what: str) -> GradientRMS:
    """The inverse of `encode_gradient_rms`, up to rounding. Raises DataError, which names the file `what`."""
    parts = {name.removeprefix(GRADIENT_PREFIX): t for name, t in stored.items() if name.startswith(GRADIENT_PREFIX)}
    chunk_tokens = float(parts["chunk_tokens"])
    require(
        1 <= chunk_tokens <= 1 << 20 and chunk_tokens.is_integer(),
        f"{what}: gradients were measured on chunks of {chunk_tokens} tokens, expected a whole number",
        DataError,
    )
    columns = []
    rows = {target: iter(parts[target].numpy()) for target in LORA_TARGETS}
    for target, _ in lora_outputs(c):
        levels = next(rows[target]).astype(np.int64).clip(-GRID_LIMIT, GRID_LIMIT)
        columns.append(torch.from_numpy(power_of_two(8 // LEVELS * levels)))
    return GradientRMS(columns, parts["growth"].float() / GROWTH_STEPS, int(chunk_tokens))


# ---- One text ----


class SequentialChunk(NamedTuple):
    """A chunk of a text, scored; every rank holds some of its rows."""

    rows: Sequence[EvalRow]
    nats: list[np.ndarray]  # (N,) of every row
    entropy: Tensor | None  # (1,) sum over this rank's counted predictions, if the learning rate depends on it
    targets: int  # of all ranks


class SequentialTTT(Learner):
    """Adapts the weights themselves, or one set of LoRA, along one text. The ranks of `dist` share every chunk."""

    def __init__(self, model: GPT, run: RunConfig, dist: Dist):
        self.model = model
        self.run = run
        self.dist = dist
        if run.ttt_params == "lora":
            self.adapter = Adapter(model.config, run, 1, dist.device)
            self.leaves = self.adapter.tensors()  # gradients are taken with respect to these
            self.tensors = self.leaves
            multipliers = [1.0] * len(self.leaves)
        else:
            self.adapter = None
            frozen = tuple(f"blocks.{i}." for i in range(run.ttt_freeze_blocks))
            named = {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}
            self.leaves = [p.requires_grad_() for p in named.values()]
            self.tensors = [p.detach()[None] for p in self.leaves]  # one "document", sharing the weights' memory
            multipliers = [lr_multiplier(name, run) for name in named]
        self.optimizer = TTTOptimizer(self.tensors, multipliers, run)
        self.initial = [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the artifact's weights, remembering nothing."""
        for t, initial in zip(self.tensors, self.initial, strict=True):
            t.copy_(initial)
        self.optimizer = TTTOptimizer(self.tensors, self.optimizer.multipliers, self.run)

    @torch.no_grad()
    def score(self, rows: Sequence[EvalRow], targets: int) -> SequentialChunk:
        """Score this rank's rows of a chunk that has `targets` targets on all ranks together."""
        nats = []
        entropy = torch.zeros(1, device=self.dist.device) if uses_entropy(self.run) else None
        for row in rows:
            states, row_nats = self.score_row(row)
            nats.append(row_nats)
            if entropy is not None:
                each = self.model.head.entropy(states, self.model.embed, self.head_lora)[0]
                entropy += each[torch.from_numpy(row.counted)].sum()
        return SequentialChunk(rows, nats, entropy, targets)

    @torch.no_grad()
    def score_row(self, row: EvalRow) -> tuple[Tensor, np.ndarray]:
        """-> states (1, N, D), nats (N,)"""
        tokens, targets, segments = row.batch
        states, _ = self.model.hidden(tokens, segments, self.adapter)
        return states, self.model.head(states, targets, self.model.embed, self.head_lora)[0].cpu().numpy()

    @property
    def head_lora(self) -> LoRA | None:
        return None if self.adapter is None else self.adapter.head

    def learn(self, chunk: SequentialChunk, mask: Sequence[np.ndarray]) -> SequentialChunk:
        """Take steps on a scored chunk; the mask (N,) of every row says which of its targets count."""
        return self.take_steps(chunk, mask)

    def advance(self, chunk: SequentialChunk) -> None:
        """Nothing is cached: every window is encoded from its tokens."""

    def forward_again(self, chunk: SequentialChunk) -> SequentialChunk:
        return chunk  # `gradients` runs the forward passes, row by row: together they would not fit in memory

    def gradients(self, chunk: SequentialChunk, mask: Sequence[np.ndarray]) -> list[Tensor]:
        grads = [torch.zeros_like(leaf) for leaf in self.leaves]
        for row, counted in zip(chunk.rows, mask, strict=True):
            nats = self.model(*row.batch, self.adapter)
            loss = (nats * torch.from_numpy(counted).to(self.dist.device)).sum() / chunk.targets
            torch._foreach_add_(grads, list(torch.autograd.grad(loss, self.leaves, materialize_grads=True)))
        return [self.dist.all_reduce(g).view_as(t) for g, t in zip(grads, self.tensors, strict=True)]

    def mean_entropy(self, chunk: SequentialChunk, mask: Sequence[np.ndarray]) -> Tensor:
        return self.dist.all_reduce(chunk.entropy) / chunk.targets  # `score` has applied the mask


def lr_multiplier(name: str, run: RunConfig) -> float:
    """Factor on the learning rate of a parameter under TTT_PARAMS=full."""
    kind = name.removesuffix(".weight").split(".")[-1]
    if kind == "down":
        return run.ttt_lr_mult_mlp_out
    return run.ttt_lr_mult_in if kind in ("q", "k", "v", "up") else 1.0


class TargetSpan(NamedTuple):
    """Targets begin..end-1 of a document."""

    document: int
    begin: int
    end: int


def stream_chunks(docs: Documents, chosen: Sequence[int], chunk: int) -> Iterator[list[TargetSpan]]:
    """Cut these documents, one after another, into chunks of `chunk` targets."""
    lengths = docs.lengths
    spans = []
    room = chunk
    for i in chosen:
        begin = 0
        while begin < lengths[i]:
            end = min(int(lengths[i]), begin + room)
            spans.append(TargetSpan(i, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield spans
                spans = []
                room = chunk
    if spans:
        yield spans


def score_sequentially(
    learner: SequentialTTT,
    docs: Documents,
    chosen: Sequence[int],
    table: ScoreTable,
    may_learn: Callable[[int, int], bool] = lambda targets_left, documents_left: True,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Score these documents one after another and learn from every chunk once it is scored, as long as
    may_learn(targets left, documents left) is true. The rest is scored without further learning."""
    run = learner.run
    dist = learner.dist
    all_targets = int(docs.lengths[chosen].sum())
    targets_left = all_targets

    def rows_of(spans: Sequence[TargetSpan]) -> Iterator[EvalRow]:
        wanted = (window for span in spans for window in windows(*span, run.eval_seq_len, run.eval_stride))
        return local_rows(docs, wanted, run, dist)

    def add_scores(row: EvalRow, nats: np.ndarray) -> None:
        table.add(row.documents[row.counted], nats[row.counted])

    for spans in stream_chunks(docs, chosen, run.ttt_chunk_tokens):
        if not may_learn(targets_left, len(chosen) - chosen.index(spans[0].document)):
            rest = spans_from(docs, chosen, spans[0])
            done = all_targets - targets_left
            for row in rows_of(rest):
                add_scores(row, learner.score_row(row)[1])
                done += int(row.counted.sum()) * dist.world  # the other ranks are about as far
                progress(done, all_targets)
            break

        targets = sum(span.end - span.begin for span in spans)
        chunk = learner.score(list(rows_of(spans)), targets)
        for row, nats in zip(chunk.rows, chunk.nats, strict=True):
            add_scores(row, nats)

        targets_left -= targets
        progress(all_targets - targets_left, all_targets)
        # Under TTT_SCOPE=document there is one document, so that spans[0].end is how many of its targets are scored.
        if targets_left and spans[0].end >= run.ttt_min_doc_tokens:
            chunk = learner.learn(chunk, [row.counted for row in chunk.rows])
            if dist.main:
                table.updates[[span.document for span in spans]] += run.ttt_epochs
        learner.advance(chunk)

    learner.reset()


def spans_from(docs: Documents, chosen: Sequence[int], first: TargetSpan) -> list[TargetSpan]:
    """What is left of the chosen documents from the beginning of a span on."""
    later = list(chosen)[list(chosen).index(first.document) + 1 :]
    lengths = docs.lengths
    rest = [TargetSpan(first.document, first.begin, int(lengths[first.document]))]
    return rest + [TargetSpan(i, 0, int(lengths[i])) for i in later]


# ---- All documents, within the time ----


def deal_documents(lengths: np.ndarray, world: int, batch: int) -> list[list[list[int]]]:
    """Documents by [round][rank], longest first: in a round every rank gets a group of at most `batch` documents. The
    order changes no score."""
    order = np.argsort(-lengths, kind="stable").tolist()
    batch = min(batch, -(-len(order) // world))  # rounded up
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    groups += [[] for _ in range(-len(groups) % world)]
    return [groups[i : i + world] for i in range(0, len(groups), world)]


def static_costs(lengths: np.ndarray, run: RunConfig) -> np.ndarray:
    """Tokens that pass through the network to score each document (B,) without adaptation; used to forecast seconds."""

    def cost(length: int) -> int:
        return sum(w.end - w.start for w in windows(0, 0, length, run.eval_seq_len, run.eval_stride))

    return np.array([cost(int(length)) for length in lengths], np.float64)


LAUNCH_TOKENS = 2500  # the fixed cost of a chunk on a GPU, however few rows it has, expressed in tokens


def batched_cost(lengths: np.ndarray, run: RunConfig, device: torch.device) -> float:
    """Tokens that pass through the network as `score_batched` runs documents (B,); used to forecast seconds."""
    steps = chunk_steps(len(lengths), run, device, lambda rows, first: lengths[rows] > first)
    return float(sum(LAUNCH_TOKENS + len(step.rows) * step.run.ttt_chunk_tokens for step in steps))


def random_documents(vocab_size: int, documents: int, length: int) -> Documents:
    """Documents of random tokens with `length` targets each; the last document has one target less."""
    text = np.random.default_rng(0).integers(2, vocab_size, documents * length, np.uint16)
    text[::length] = BOS
    return split_documents(text, np.ones(len(text), np.int64))


class Evaluation:
    """Scores a model with test-time training: decides which rank scores which documents, within the time limit.

    It forecasts how long adaptation will take: tokens to come times the seconds per token measured so far. Documents
    that would not finish in time are scored without adaptation, which is several times faster."""

    def __init__(self, model: GPT, docs: Documents, run: RunConfig, dist: Dist, log: Log, seconds: Callable[[], float]):
        self.model = model
        self.docs = docs
        self.run = run
        self.dist = dist
        self.log = log
        self.seconds = seconds  # of the evaluation so far
        self.table = ScoreTable(docs)
        self.degraded = 0  # documents that did not adapt for lack of time
        self.learners = Learners(model, dist.device)
        self.static_tokens = static_costs(docs.lengths, run)  # (documents,), to score each without adaptation
        # The first is measured in the warm-up. The second is measured there only for batches on a GPU, and again during
        # the evaluation; while it is 0, a group takes no time by the forecast.
        self.static_seconds_per_token = 0.0
        self.ttt_seconds_per_token = 0.0  # of a group that adapts
        model.requires_grad_(run.ttt_params == "full")

    def warm_up(self) -> None:
        """Measure speeds on random documents; on a GPU also compile and load every kernel."""
        on_gpu = self.dist.device.type == "cuda"
        self._warm_up_static(on_gpu)
        if self.run.ttt_enabled and on_gpu:
            self._warm_up_ttt()

    def _warm_up_static(self, on_gpu: bool) -> None:
        run = self.run
        length = run.eval_seq_len
        count = max(1, run.micro_batch_tokens // length) if on_gpu else 1  # a full row: a GPU has no shorter one
        docs = random_documents(self.model.config.vocab_size, count, length)
        for _ in range(2):  # the first run compiles, the second measures the speed
            started = time.perf_counter()
            score_static(self.model, docs, range(count), run, Dist(device=self.dist.device), ScoreTable(docs))
            spent = time.perf_counter() - started
            self.static_seconds_per_token = spent / static_costs(docs.lengths, run).sum()

    def _warm_up_ttt(self) -> None:
        run = self.run
        alone = Dist(device=self.dist.device)
        count = 2  # documents
        length = run.eval_seq_len
        if not run.batched_ttt:
            docs = random_documents(self.model.config.vocab_size, count, length)
            short = dataclasses.replace(run, ttt_chunk_tokens=length)  # two chunks, of which the first is learned from
            score_sequentially(SequentialTTT(self.model, short, alone), docs, range(count), ScoreTable(docs))
            return

        longer = length + 3 * late_chunk_tokens(run)  # a graph is captured at the second chunk of its kind
        for size in (longer, min(longer, 512)):  # the first compiles and captures, the second is timed
            docs = random_documents(self.model.config.vocab_size, count, size)
            started = time.perf_counter()
            score_batched(docs, range(count), run, alone, ScoreTable(docs), self.learners)
            cost = batched_cost(docs.lengths, run, self.dist.device)
            self.ttt_seconds_per_token = (time.perf_counter() - started) / cost

    def score(self) -> ScoreTable:
        """Score every target of every document -> the table of all ranks."""
        everything = range(len(self.docs))
        if not self.run.ttt_enabled:
            progress = ScoringProgress(self.log, "validation without adaptation")
            score_static(self.model, self.docs, everything, self.run, self.dist, self.table, progress=progress)
        elif self.run.ttt_scope == "document":
            self._score_documents()
        else:  # a stream: the ranks share every chunk
            learner = SequentialTTT(self.model, self.run, self.dist)
            tokens_per_target = self.static_tokens.sum() / self.docs.lengths.sum()

            def may_learn(targets_left: int, documents_left: int) -> bool:
                in_time = self._has_time(targets_left * tokens_per_target)
                if not in_time:
                    self._stop_adapting(documents_left)
                return in_time

            progress = ScoringProgress(self.log, "validation as a stream")
            score_sequentially(learner, self.docs, everything, self.table, may_learn, progress)
        return self.table.all_reduced(self.dist)

    def _has_time(self, static_tokens_left: float, next_seconds: float = 0.0) -> bool:
        """Whether, after `next_seconds` of adaptation, there is time to score the rest without it; all ranks agree."""
        if not self.run.eval_seconds:
            return True
        rest = 1.5 * static_tokens_left * self.static_seconds_per_token / self.dist.world  # with a margin of 50 %
        end = self.seconds() + next_seconds + rest
        return self.dist.all_reduce_max(end) <= self.run.eval_seconds * 0.98  # 2 % for what a forecast misses

    def _stop_adapting(self, remaining: int) -> None:
        """Note and report how many documents do not adapt; of a stream, the first may have been scored in part."""
        self.degraded = remaining
        line = "time is short: the remaining {degraded_documents} documents are scored without further adaptation"
        self.log.event("time_short", line, degraded_documents=remaining)

    def _score_documents(self) -> None:
        """Score documents round by round, a group per rank. When time runs short, those not yet begun do not adapt."""
        dist = self.dist
        lengths = self.docs.lengths
        rounds = deal_documents(lengths, dist.world, self.run.ttt_batch_docs if self.run.batched_ttt else 1)
        costs = [max(batched_cost(lengths[group], self.run, dist.device) for group in groups) for groups in rounds]
        learner = None
        if not self.run.batched_ttt:
            learner = SequentialTTT(self.model, self.run, Dist(device=dist.device))

        started = self.seconds()
        reported = started
        cost_so_far = 0.0
        for n, groups in enumerate(rounds):
            rest = [i for later in rounds[n:] for group in later for i in group]
            if cost_so_far:
                self.ttt_seconds_per_token = (self.seconds() - started) / cost_so_far
            if not self._has_time(self.static_tokens[rest].sum(), self.ttt_seconds_per_token * costs[n]):
                self._stop_adapting(len(rest))
                progress = ScoringProgress(self.log, "the rest without adaptation")
                score_static(self.model, self.docs, rest, self.run, dist, self.table, progress=progress)
                return

            self._score_group(groups[dist.rank], learner)
            cost_so_far += costs[n]
            if self.seconds() - reported > SECONDS_BETWEEN_REPORTS:
                reported = self.seconds()
                eta = (reported - started) * (sum(costs) / cost_so_far - 1)
                self._report(len(self.docs) - len(rest) + sum(map(len, groups)), reported, eta)

    def _score_group(self, group: Sequence[int], learner: SequentialTTT | None) -> None:
        if learner is not None:
            for i in group:
                score_sequentially(learner, self.docs, [i], self.table)
        elif group:
            score_batched(self.docs, group, self.run, self.dist, self.table, self.learners)

    def _report(self, documents: int, seconds: float, eta: float) -> None:
        begun = self.table.targets > 0
        bpb = self.table.nats.sum() / math.log(2) / self.docs.target_bytes()[begun].sum()
        self.log.event(
            "adapted",
            "adapted documents:{documents_done}/{documents} bpb:{bpb:.4f} (of this rank's) "
            "eval_s:{eval_s:.0f} eta_s:{eta_s:.0f}",
            documents_done=documents,
            documents=len(self.docs),
            bpb=float(bpb),
            eval_s=seconds,
            eta_s=eta,
        )


# ======================================================================================================================
# Set-up and report: open and check what a run reads, train and pack, read back from the disk, score, report.


# ---- Opening and checking what a run reads ----

LOGS = Path("logs")


class Setup(NamedTuple):
    """All that is known before any time is spent."""

    model: ModelConfig
    run: RunConfig
    dist: Dist
    tokenizer: Tokenizer
    validation: Documents
    stream: TrainingStream | None  # None when an artifact is only evaluated


def make_setup(model: ModelConfig, run: RunConfig, dist: Dist) -> Setup:
    """Open and check all that the run will read, and decide what knobs leave open."""
    run = with_batch(run, dist.world)
    if run.artifact:  # the artifact's own configuration counts, whatever the environment says about the model
        header, _ = read_header(read_on_main(run.artifact, dist), run.artifact)
        model = stored_config(header["meta"], run.artifact)
        run = decide_optimizer(run, header, run.artifact)
    tokenizer = load_tokenizer(run, model.vocab_size)
    validation = load_validation(run.data_path, model.vocab_size, tokenizer)
    stream = None if run.artifact else TrainingStream(run, model.vocab_size, dist)
    return Setup(model, run, dist, tokenizer, validation, stream)


def stored_config(meta: Mapping[str, Any], what: str) -> ModelConfig:
    """The configuration of the network in an artifact, checked like the environment's. Raises DataError.

    An artifact may be older than a field of ModelConfig: the field then says what its absence means (see `knob`)."""
    require(
        meta.get("kind") == "artifact", f"{what}: of kind {brief(meta.get('kind'))}, expected an artifact", DataError
    )
    values = meta.get("model")
    kinds = get_type_hints(ModelConfig)
    try:
        require(isinstance(values, dict), f"it is {brief(values)}, expected a table")
        unknown = ", ".join(sorted(values.keys() - kinds.keys()))
        require(
            not unknown,
            f"{printable(unknown, 60)}: unknown here, written by a newer version; use that version to read it",
        )

        checked = {}
        for f in fields(ModelConfig):
            value = values.get(f.name, f.metadata["absent"])
            require(value is not None, f"{f.name} is missing")
            require(type(value) in {int, kinds[f.name]}, f"{f.name} is {brief(value)}")
            checked[f.name] = parse_knob(f.name.upper(), str(value), kinds[f.name], f.metadata)
        return ModelConfig(**checked)
    except ConfigError as error:
        raise DataError(f"{what}: its configuration is not one of ours: {error}") from error


def decide_optimizer(run: RunConfig, header: Mapping[str, Any], what: str) -> RunConfig:
    """The run with TTT_OPTIMIZER=auto decided by the header of the artifact `what`. Raises UserError if the run needs
    what the artifact does not hold."""
    has_rms = has_gradient_rms(table_layout(header, what))
    require(has_rms or run.ttt_optimizer != "rms", f"{what}: TTT_OPTIMIZER=rms: {NO_GRADIENT_RMS}", UserError)
    if run.ttt_optimizer != "auto":
        return run
    decided = dataclasses.replace(run, ttt_optimizer="rms" if has_rms else "adamw")
    for f in fields(run):
        unchanged = getattr(run, f.name) == f.metadata["default"]
        require(unchanged or has_effect(f, decided), f"{f.name.upper()} {NO_EFFECT} {conditions(f)}")
    return decided


OF_A_MACHINE = ("DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "ARTIFACT", "RESUME")  # knobs that name files or folders


def check_ranks_begin_alike(dist: Dist, run: RunConfig, check_only: bool) -> None:
    """What decides which messages the ranks exchange from here on must be the same on all: otherwise each would wait
    for another one. The files that ARTIFACT or RESUME name may differ, as rank 0's is sent. Raises ConfigError."""
    choices = (run.artifact != "", run.resume != "", check_only)
    require_same(dist, {"code": code(), "choices of ARTIFACT, RESUME and --check-setup": bytes(choices)})


def check_ranks_compute_alike(dist: Dist) -> None:
    """All ranks need the same packages and the same kind of device, as the result names those of rank 0. A rank with
    others rounds differently: a document's score would depend on the rank that scores it, and the ranks' copies of the
    weights would drift apart. Raises ConfigError, which names what differs."""
    facts = [*versions().split(), f"triton:{triton.__version__ if triton else 'none'}", device_name(dist.device)]
    everyone = [text.splitlines() for text in dist.gather_texts("\n".join(facts))]
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        others = ", ".join(fact for fact in theirs if fact not in first) or "none of that"
        expected = ", ".join(fact for fact in first if fact not in theirs) or "none of that"
        require(
            theirs == first,
            f"rank {rank} on {dist.hosts[rank]} has {others}, rank 0 on {dist.hosts[0]} has {expected}, and they would "
            "round differently: start machines with the same packages and the same kind of device",
        )


def check_ranks_agree(setup: Setup) -> None:
    """All ranks must run with the same knobs on the same data: a rank that differs would silently change the score.
    Raises ConfigError."""
    knobs = {name: value for name, value in settings(setup.model, setup.run).items() if name not in OF_A_MACHINE}
    compared = {
        "knobs": repr(knobs).encode(),
        "tokenizer": setup.tokenizer.sha256.encode(),
        "validation set": setup.validation.sha256().encode(),
        "training shards": shards_digest(setup.stream).encode(),
        "documents at the end of the training shards": measured_digest(setup.stream).encode(),
    }
    require_same(setup.dist, compared)


def require_same(dist: Dist, compared: Mapping[str, bytes]) -> None:
    """Raise ConfigError unless these are the same on all ranks. It names the first rank that differs from rank 0, its
    host and what differs."""
    digests = b"".join(hashlib.sha256(content).digest() for content in compared.values())
    everyone = dist.gather_bytes(digests)
    hosts = dist.hosts
    size = hashlib.sha256().digest_size
    for rank, theirs in enumerate(everyone):
        for i, what in enumerate(compared):
            part = slice(i * size, (i + 1) * size)
            require(
                theirs[part] == everyone[0][part],
                f"rank {rank} on {hosts[rank]} has other {what} than rank 0 on {hosts[0]}: "
                f"start all machines with the same {what}",
            )


def shards_digest(stream: TrainingStream | None) -> str:
    """Identifies the training shards, by the name, size and some tokens of each."""
    described = []
    for path, shard in zip(stream.paths, stream.shards, strict=True) if stream else ():
        sample = np.concatenate([tokens for _, tokens in sample_shard(shard)])
        described.append((path.name, len(shard), sample.tolist()))
    return hashlib.sha256(repr(described).encode()).hexdigest()


def measured_digest(stream: TrainingStream | None) -> str:
    """Identifies the training documents that weights are chosen and gradients measured on, of which the ranks share
    every pass: a sample, as `shards_digest` takes it, does not tell that all have the same."""
    if stream is None:
        return ""
    tokens = stream.run.grad_rms_tokens
    return stream.held_out().tokens_sha256() + (stream.last_documents(tokens).tokens_sha256() if tokens else "")


def check_setup(setup: Setup) -> None:
    """Refuse what cannot be run: too little disk, an unsuitable GPU, a limit of bytes that no model could meet."""
    run = setup.run
    free = shutil.disk_usage(LOGS if LOGS.exists() else ".").free  # logs/ may be a link to another disk
    need = artifact_room(run)
    if run.checkpoint_seconds:
        need += 600 << 20  # one checkpoint of the default network takes 430 MiB
    message = f"{free >> 20} MiB of disk are free, {need >> 20} MiB are needed: free some disk"
    require(free >= need or not setup.dist.main, message, UserError)  # only rank 0 writes

    if setup.dist.device.type == "cuda":
        check_gpu(setup.model, setup.dist.device)

    if setup.stream is not None:
        if run.resume and setup.dist.main:  # it sends the checkpoint to the other machines
            read_header(read_file(run.resume), run.resume)
        if run.ttt_enabled and run.ttt_optimizer == "rms":
            check_chunks(rms_chunk_tokens(run), run, "what training would measure")
        with torch.device("meta"):
            sketch = GPT(setup.model)
        budget = Budget.of(sketch, run)
        require(
            budget.limit >= budget.least,
            f"ARTIFACT_BYTES={run.artifact_bytes}: {len(code())} bytes of code, {budget.fixed:.0f} of gains and steps, "
            f"and {budget.weights} weights of at least {LEAST_BITS:g} bit: raise it or use a smaller model",
            UserError,
        )


def check_gpu(config: ModelConfig, device: torch.device) -> None:
    """Refuse a GPU that cannot run the network. Raises UserError."""
    too_old = torch.cuda.get_device_capability(device) < (8, 0)
    require(not too_old, "GPUs before the A100 cannot multiply bf16: use a later one, or DEVICE=cpu", UserError)
    require(
        not triton or config.head_dim in (16, 32, 64, 128),
        f"on a GPU, MODEL_DIM / NUM_HEADS = {config.head_dim} must be 16, 32, 64 or 128",
    )


def prepare_torch(run: RunConfig, device: torch.device) -> None:
    """Set torch's seed, precision and determinism. A budget in steps must repeat exactly, so it gets deterministic
    kernels; a budget in time gets the fastest."""
    torch.manual_seed(run.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # products of fp32 matrices in TF32
    if run.iterations and not run.max_wallclock_seconds:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


# ---- The first lines of the log ----


def describe_run(setup: Setup, run_id: str, log: Log) -> None:
    """Log the source, the settings (for pasting into a shell) and the versions; the lines go only to the file."""
    knobs = settings(setup.model, setup.run)
    log.line(code().decode(), screen=False)
    for name, value in knobs.items():
        log.line(f"{name}={shlex.quote(value) if value else ''}", screen=False)
    log.line(f"{versions()} {platform.platform()}", screen=False)
    log.event(
        "run",
        run_id=run_id,
        seed=setup.run.seed,
        code_sha256=hashlib.sha256(code()).hexdigest(),
        code_bytes=len(code()),
        versions=versions(),
        platform=platform.platform(),
        knobs=knobs,
    )


def describe_setup(setup: Setup, log: Log) -> None:
    """Log what will be run: devices, data, sizes, limits."""
    run = setup.run
    dist = setup.dist
    docs = setup.validation
    if dist.device.type == "cuda":
        describe_kernels(run, dist.device, log)
    log.event("device", "devices: {world_size} x {device}", world_size=dist.world, device=device_name(dist.device))
    log.event(
        "validation",
        "validation: {documents} documents, {tokens} targets, {bytes} bytes",
        documents=len(docs),
        tokens=len(docs.tokens) - 1,
        bytes=int(docs.target_bytes().sum()),
    )
    if setup.stream is None:
        return

    log.event(
        "training_data",
        "training data: {shards} shards, {tokens} tokens, {holdout_tokens} held out; "
        "{batch_tokens} a step, {grad_accum_steps} passes of {micro_batch_rows} rows per rank",
        shards=len(setup.stream.paths),
        tokens=setup.stream.total,
        holdout_tokens=run.holdout_tokens,
        batch_tokens=run.train_batch_tokens,
        grad_accum_steps=setup.stream.grad_accum_steps,
        micro_batch_rows=setup.stream.micro_batch_rows,
    )
    missing = sorted(listed_files(Path(run.data_path), "train", "shards").keys() - {p.name for p in setup.stream.paths})
    if missing:
        log.warn(f"training shards that the manifest lists but the folder lacks: {len(missing)}, as {missing[0]}")
    with torch.device("meta"):
        sketch = GPT(setup.model)
    log.event(
        "predicted_size",
        "predicted artifact: about {artifact_bytes:.0f} bytes, {code_bytes} bytes of code, limit {limit_bytes}",
        artifact_bytes=Budget.of(sketch, run).goal,
        code_bytes=len(code()),
        limit_bytes=run.artifact_bytes,
    )
    log.event(
        "limits",
        "limits: {steps} steps, {train_seconds:g} s of training, {eval_seconds:g} s of evaluation (0: none)",
        steps=run.iterations,
        train_seconds=run.max_wallclock_seconds,
        eval_seconds=run.eval_seconds,
    )


def describe_kernels(run: RunConfig, device: torch.device, log: Log) -> None:
    if not triton:
        log.event("kernels", "no Triton: all runs in plain torch", triton=None, mlp="cublas")
    elif run.compile and not has_tma(device):
        line = "kernels: Triton {triton}, but cuBLAS for the MLP: no TMA"
        log.event("kernels", line, triton=triton.__version__, mlp="cublas")
    else:
        log.event("kernels", "kernels: Triton {triton}", triton=triton.__version__, mlp="triton")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def versions() -> str:
    cuda = f" cuda:{torch.version.cuda}" if torch.version.cuda else ""
    return (
        f"python:{platform.python_version()} torch:{torch.__version__}{cuda} numpy:{np.__version__} "
        f"sentencepiece:{sentencepiece.__version__} zstandard:{zstandard.__version__}"
    )


# ---- Training and packing ----


def score_all_static(
    model: GPT,
    setup: Setup,
    looping: bool = True,
    docs: Documents | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> ScoreTable:
    """The scores without adaptation of the validation set, or of other documents; the same table on every rank."""
    table = ScoreTable(setup.validation if docs is None else docs)
    score_static(model, table.docs, range(len(table.docs)), setup.run, setup.dist, table, looping, progress)
    return table.all_reduced(setup.dist)


def make_trainer(setup: Setup, held_out: Documents) -> Trainer:
    """A new network and its trainer."""
    run = setup.run
    model = GPT(setup.model)
    init_weights(model, run.seed)
    model.to(setup.dist.device)
    if setup.dist.device.type == "cuda" and run.compile and triton:  # the compiler generates Triton kernels
        compile_parts(model)

    provenance = {
        "tokenizer": setup.tokenizer.sha256,
        "holdout_tokens": run.holdout_tokens,
        "holdout": held_out.tokens_sha256(),
    }
    return Trainer(model, run, setup.dist, provenance, shards_digest(setup.stream))


def prepare_training(trainer: Trainer, setup: Setup, held_out: Documents, log: Log) -> float:
    """Before the clock starts, compile and time all that training and packing will do. Leaves the trainer with the
    initial weights, or at the checkpoint RESUME -> seconds to reserve for what follows training."""
    run = setup.run
    if run.resume:
        trainer.load_checkpoint(run.resume)  # first, so that a bad one is refused before minutes of compilation
        if trainer.finished:
            return 0.0
    if run.grad_rms_tokens:
        gradient_documents(setup)  # refuses too few documents before training is paid for
    batch = random_batch(run, setup.model.vocab_size, setup.dist)
    step = trainer.step
    state = trainer.copy_state()

    stage = "set-up: {stage}"
    log.event("setting_up", stage, stage="compiling and warming up the training step")
    warm_up(trainer, batch)
    calibrate(trainer.model, [batch[:1]], setup.dist, run)  # refuses a matrix without input before training is paid for
    reserve = 0.0
    if run.max_wallclock_seconds:
        log.event("setting_up", stage, stage="a dry run of what follows training, to know how long it takes")
        reserve = dry_run(trainer, batch, setup, held_out, log)
        remedy = "raise it, or lower HOLDOUT_TOKENS (choose) or GRAD_RMS_TOKENS (gradients)"  # as `dry_run` names them
        problem = (
            f"MAX_WALLCLOCK_SECONDS={run.max_wallclock_seconds:g}: what follows training takes {reserve:.1f} s of it"
        )
        require(reserve < run.max_wallclock_seconds, f"{problem}; {remedy}")
        if reserve > run.max_wallclock_seconds / 2:
            log.warn(f"{problem}, more than is left for training; {remedy}")

    trainer.load_state(state, step)
    return reserve


def dry_run(trainer: Trainer, batch: Sequence[MicroBatch], setup: Setup, held_out: Documents, log: Log) -> float:
    """Do what follows training, with random tokens and the weights of the warm-up. This also compiles the scoring of
    the validation set -> seconds to reserve."""
    run = setup.run
    dist = setup.dist
    model = trainer.model

    docs = blank(held_out)
    gradient_docs = blank(gradient_documents(setup)) if run.grad_rms_tokens else None

    def follow_training(watch: Stopwatch) -> None:
        with watch.phase("calibrate"):
            sensitivities = calibrate(model, [batch], dist, run)
        make_artifact(model, sensitivities, run, dist, watch, trainer.provenance, Log(), once=True)
        with watch.phase("choose"):
            score_all_static(model, setup, docs=docs)
        if gradient_docs is not None:
            with watch.phase("gradients"):
                measure_gradient_rms(model, gradient_docs, run, dist)

    follow_training(Stopwatch(dist))  # compiles, and loads kernels
    watch = Stopwatch(dist)
    follow_training(watch)

    checkpoint = LOGS / f".dry-run.{os.getpid()}.partial"  # a name that an interrupted run cleans up
    with watch.phase("checkpoint"):
        save_or_warn(trainer, checkpoint, 0.0, log, finished=True)
    remove(checkpoint, log)

    times = {
        "checkpoint": 1,
        "choose": len(READOUTS) + 1,  # and once more, for the blend where the score is lowest
        "gradients": 1,
        "calibrate": run.gptq_calibration_batches,
        "factorise": 1,
        "quantise": 2,  # two tries to fit the bytes
        "pack": 2,
    }
    seconds = {phase: count * watch.total(phase) for phase, count in times.items()}
    log.event(
        "dry_run",
        "set-up: what follows training takes, in seconds: checkpoint {checkpoint:.1f}, choose {choose:.1f}, "
        "gradients {gradients:.1f}, calibrate {calibrate:.1f}, factorise {factorise:.1f}, quantise {quantise:.1f}, "
        "pack {pack:.1f}",
        **seconds,
    )
    return dist.all_reduce_max(1.15 * sum(seconds.values()) + 0.5)  # with a margin: a late artifact is no entry


def blank(docs: Documents) -> Documents:
    """Documents of the same lengths, without content."""
    return Documents(np.minimum(docs.tokens, BOS + 1), docs.bytes, docs.starts)  # BOS where it was


# Blends of last and average weights that are always scored: the share of the average
READOUTS = {"last": 0.0, "half": 0.5, "average": 1.0}


def choose_weights(trainer: Trainer, setup: Setup, held_out: Documents, log: Log) -> float:
    """The blend of last and average weights that scores best on the held-out text -> the share of the average, 0..1.

    Between the last weights and their average the score is close to a parabola, so three blends predict where it is
    lowest. The blend there is scored, too, and the best of the four is taken. Without held-out text the share is 1/2,
    which is never the worst where the score is convex (EXPERIMENTS.md, sections 24 and 31)."""
    if not len(held_out):
        return READOUTS["half"]

    def score(share: float) -> float:
        progress = ScoringProgress(log, f"held-out text, share of average weights {share:.3f}")
        with trainer.average.applied(share):
            table = score_all_static(trainer.model, setup, docs=held_out, progress=progress)
        return float(table.nats.sum() / (len(held_out.tokens) - 1))

    nats = {name: score(share) for name, share in READOUTS.items()}  # per token
    by_share = {share: nats[name] for name, share in READOUTS.items()}
    lowest = lowest_share(**nats)
    if lowest not in by_share:
        by_share[lowest] = score(lowest)
    best = min(by_share, key=lambda share: by_share[share])

    log.event(
        "readout",
        "{documents} held-out documents: last {last:.5f}, half {half:.5f}, average {average:.5f} nats a token; "
        "{readout:.3f} of the average: {best:.5f}",
        documents=len(held_out),
        last=nats["last"],
        half=nats["half"],
        average=nats["average"],
        readout=best,
        best=by_share[best],
    )
    return best


def lowest_share(last: float, half: float, average: float) -> float:
    """The share within 0..1 at which the parabola through the scores at 0, 1/2 and 1 is lowest."""
    curvature = last - 2 * half + average  # 1/4 of the second derivative
    if curvature > 0:
        return min(1.0, max(0.0, 0.5 + (last - average) / (4 * curvature)))
    return 1.0 if average < last else 0.0


def train_and_pack(setup: Setup, log: Log, watch: Stopwatch, path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Train, from random weights or a checkpoint, and write the artifact -> what the result says about training, and
    the nats of every validation document, (documents,), before quantisation."""
    run = setup.run
    stream = setup.stream
    run_id = run.run_id or path.stem
    checkpoint = path.with_suffix(".ckpt")

    with watch.phase("set-up"):
        held_out = stream.held_out()
        trainer = make_trainer(setup, held_out)
        reserve = prepare_training(trainer, setup, held_out, log)
        setup.dist.finish_kernels()
        setup.dist.barrier()
    line = "set-up took {seconds:.1f} s; {reserve_seconds:.1f} s are reserved for what follows training"
    log.event("set_up", line, seconds=watch.total("set-up"), reserve_seconds=reserve)

    def validate() -> float:
        looping = trainer.looping(trainer.progress)
        progress = ScoringProgress(log, "validation")
        return score_all_static(trainer.model, setup, looping, progress=progress).bits_per_byte

    history = []
    weights_file = run.resume
    if not trainer.finished:
        with watch.phase("train"), advice(lambda: how_to_resume(trainer, setup, run_id)):
            history = train(trainer, stream, log, watch, reserve, validate, checkpoint)
        with watch.phase("checkpoint"):
            seconds = trainer.seconds_before + watch.total(*TRAINING_CLOCK)
            kept = save_or_warn(trainer, checkpoint, seconds, log, finished=True)
        weights_file = str(checkpoint) if kept else ""
    with advice(report_weights_file(trainer, setup, log, run_id, weights_file)):
        readout, prequant_nats = read_out_and_pack(trainer, setup, held_out, log, watch, path)
    if setup.dist.main:
        remove(checkpoint, log)

    train_tokens = trainer.step * run.train_batch_tokens
    result = {
        "steps": trainer.step,
        "train_tokens": train_tokens,
        "epochs": train_tokens / stream.total,
        **readout,
        "history": history,
        "train_seconds": trainer.seconds_before + watch.total(*TRAINING_CLOCK),
    }
    return result, prequant_nats


def how_to_resume(trainer: Trainer, setup: Setup, run_id: str) -> str:
    """How to go on from the last checkpoint if training is cut off; empty if there is none."""
    if not trainer.resumable or not setup.dist.main:
        return ""
    command = command_line(setup, RESUME=str(trainer.resumable), RUN_ID=run_id)
    return f"the last checkpoint is {trainer.resumable}; this goes on from it: {command}"


def report_weights_file(trainer: Trainer, setup: Setup, log: Log, run_id: str, weights_file: str) -> str:
    """Log which file, a checkpoint, holds the trained weights -> how to repeat only what follows training, if that is
    cut off. Empty if there is no such file."""
    if not weights_file:
        return ""
    line = "step {step}: the trained weights are in {file} ({bytes} bytes); RESUME={file} goes on from here"
    size = sum(t.nbytes for t in trainer.weights().values())
    log.event("trained", line, step=trainer.step, file=weights_file, bytes=size)
    command = command_line(setup, RESUME=weights_file, RUN_ID=run_id)
    return f"the trained weights are in {weights_file}; this goes on from them: {command}"


@contextlib.contextmanager
def advice(text: str | Callable[[], str]) -> Iterator[None]:
    """Attaches this advice, if there is any, to every exception that leaves the block: it ends the message shown. A
    function is asked for it only then."""
    try:
        yield
    except BaseException as error:
        found = text() if callable(text) else text
        if found:
            error.add_note(found)
        raise


def command_line(setup: Setup, **changes: str) -> str:
    """The shell command that starts this run with changed knobs, in the same folder. Leaves out knobs at defaults."""
    run = setup.run
    others = dict(ttt_params=run.ttt_params, ttt_scope=run.ttt_scope, ttt_optimizer=run.ttt_optimizer)
    defaults = settings(ModelConfig(), RunConfig(**others))  # the defaults of other knobs depend on these
    defaults |= {name.upper(): str(KNOBS[name.upper()][0].metadata["default"]) for name in others}
    knobs = changes | {name: v for name, v in settings(setup.model, setup.run).items() if name not in changes}
    words = [f"{name}={shlex.quote(value)}" for name, value in knobs.items() if value != defaults.get(name)]
    words.append(shlex.quote(sys.executable))
    if setup.dist.world > 1:
        words.append(f"-m torch.distributed.run --standalone --nproc_per_node={setup.dist.world}")
    return " ".join([*words, shlex.quote(__file__)])


def remove(path: Path, log: Log) -> None:
    """Remove a file that is no longer needed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warn(printable(f"{path}: cannot be removed: {error.strerror}"))


def read_out_and_pack(
    trainer: Trainer, setup: Setup, held_out: Documents, log: Log, watch: Stopwatch, path: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Choose among the trained weights and write the artifact -> what the result says about the chosen weights, and
    their nats on every validation document, (documents,), before quantisation."""
    with watch.phase("validate"):
        progress = ScoringProgress(log, "validation with the last weights")
        last_bpb = score_all_static(trainer.model, setup, progress=progress).bits_per_byte
    with watch.phase("choose"):
        share = choose_weights(trainer, setup, held_out, log)
    with trainer.average.applied(share):
        with watch.phase("validate"):
            progress = ScoringProgress(log, "validation before quantisation")
            table = score_all_static(trainer.model, setup, progress=progress)
            prequant_bpb = table.bits_per_byte
        DivergenceCheck(setup.model.vocab_size).at_the_end(table.nats_per_token, "the score of the trained weights")
        line = "before quantisation, without adaptation: val_bpb:{prequant_bpb:.5f}, last iterate {last_bpb:.5f}"
        log.event("before_quantisation", line, prequant_bpb=prequant_bpb, last_bpb=last_bpb)
        pack_weights(trainer, setup, log, watch, path)
    return {"last_bpb": last_bpb, "readout": share, "prequant_bpb": prequant_bpb}, table.nats


def gradient_documents(setup: Setup) -> Documents:
    """The training documents that gradients are measured on. Raises UserError if none has a whole chunk."""
    run = setup.run
    docs = setup.stream.last_documents(run.grad_rms_tokens)
    size = rms_chunk_tokens(run)
    require(
        int(docs.lengths.max(initial=0)) >= size,
        f"GRAD_RMS_TOKENS={run.grad_rms_tokens}: of {len(docs)} documents, none has {size} tokens to measure gradients "
        "on: raise it, or set 0 and do without TTT_OPTIMIZER=rms",
        UserError,
    )
    return docs


def pack_weights(trainer: Trainer, setup: Setup, log: Log, watch: Stopwatch, path: Path) -> None:
    """Quantise the weights that the model holds and write the artifact."""
    run = setup.run
    dist = setup.dist
    if run.grad_rms_tokens:
        with watch.phase("gradients"):
            docs = gradient_documents(setup)
            trainer.model.gradient_rms = measure_gradient_rms(trainer.model, docs, run, dist, log)
        line = (
            "gradients: measured on {documents} documents of {tokens} tokens, in chunks of {chunk} and {longer_chunk}"
        )
        chunk = rms_chunk_tokens(run)
        longer = chunk * longer_chunks(docs, run)
        log.event("gradients", line, documents=len(docs), tokens=len(docs.tokens), chunk=chunk, longer_chunk=longer)
    with watch.phase("calibrate"):
        batches = (setup.stream.batch(trainer.step + i) for i in range(run.gptq_calibration_batches))
        sensitivities = calibrate(trainer.model, batches, dist, run)
    artifact = make_artifact(trainer.model, sensitivities, run, dist, watch, trainer.provenance, log)
    with watch.phase("pack"):
        if dist.main:
            write_atomically(path, [artifact], parents=True)
        dist.barrier()


# ---- Evaluation ----


def load_artifact(path: Path, setup: Setup) -> GPT:
    """The model that a file holds, built from that file alone. Raises UserError."""
    return unpack_artifact(read_on_main(path, setup.dist), path, setup)


def unpack_artifact(data: bytes, path: Path, setup: Setup) -> GPT:
    """The model in the content of a file. Raises DataError, and UserError where it lacks what TTT_OPTIMIZER needs.

    The table of tensors is compared with the configuration before anything is unpacked: a small file can claim tensors
    of gigabytes, and a short header a network of any size."""
    what = str(path)
    header, at = read_header(data, what)
    config = stored_config(header["meta"], what)
    tokenizer = str(header["meta"].get("tokenizer"))
    require(
        tokenizer == setup.tokenizer.sha256,
        f"{path}: made for another tokenizer (sha256 {tokenizer[:12]}…) than "
        f"{setup.tokenizer.path} ({setup.tokenizer.sha256[:12]}…); set DATA_PATH or TOKENIZER_PATH",
        DataError,
    )
    check_layout(config, table_layout(header, what), what)
    stored = read_tensors(data, header, at, what)
    model = restore(GPT(config).to(setup.dist.device), stored, what)
    if setup.run.ttt_enabled and setup.run.ttt_optimizer == "rms":
        check_gradient_rms(model.gradient_rms, setup.run, what)
    return model


def evaluate(
    setup: Setup, log: Log, watch: Stopwatch, path: Path, prequant_nats: np.ndarray | None = None
) -> tuple[dict[str, Any], bytes]:
    """Read an artifact from the disk and score it -> what the result says about it, and the file of all documents,
    which also holds their scores before quantisation (documents,), if this run has them."""
    run = setup.run
    docs = setup.validation

    with watch.phase("unpack"):
        data = read_on_main(path, setup.dist)
        model = unpack_artifact(data, path, setup)
        require(model.config == setup.model, f"{path}: was replaced meanwhile; score it again", DataError)
        evaluation = Evaluation(model, docs, run, setup.dist, log, lambda: watch.total(*EVALUATION_CLOCK))
    with watch.phase("evaluate: warm-up"):
        evaluation.warm_up()
    with watch.phase("evaluate: score"):
        table = evaluation.score()
    with watch.phase("score without adaptation"):
        static = table
        if run.ttt_enabled:
            progress = ScoringProgress(log, "validation without adaptation")
            static = score_all_static(model, setup, progress=progress)

    static.require_finite(f"the network of {path} gives none, whatever adapts; train again, with lower rates")
    table.require_finite(
        "test-time training diverged; lower TTT_LR, TTT_LORA_ALPHA or TTT_EPOCHS, or set TTT_GRAD_CLIP"
    )
    log_scores(setup, log, path, table, static)
    independent = not run.ttt_enabled or (run.ttt_scope == "document" and evaluation.degraded == 0)
    result = {
        "val_bpb": table.bits_per_byte,
        "val_loss": table.nats_per_token,
        "static_bpb": static.bits_per_byte,
        "documents": len(docs),
        "tokens": int(table.targets.sum()),
        "bytes": int(docs.target_bytes().sum()),
        "excess_bytes": docs.excess_bytes(setup.tokenizer.pieces),
        "validation": docs.sha256(),
        "adaptation_steps": int(table.updates.sum()),
        "doc_independent": int(independent),
        "degraded_documents": evaluation.degraded,
        "eval_seconds": watch.total(*EVALUATION_CLOCK),
        "artifact_sha256": hashlib.sha256(data).hexdigest(),
    }
    return result, documents_file(table, static, prequant_nats)


def documents_file(table: ScoreTable, static: ScoreTable, prequant_nats: np.ndarray | None) -> bytes:
    """The score of every document, in the order of the validation set, for comparing runs: the bytes of an .npz."""
    before_quantisation = {} if prequant_nats is None else {"prequant_nats": prequant_nats}
    out = io.BytesIO()
    np.savez_compressed(
        out,
        nats=table.nats,
        static_nats=static.nats,
        **before_quantisation,
        tokens=table.docs.lengths,
        bytes=table.docs.target_bytes(),
        updates=table.updates.astype(np.int64),
        validation=np.array(table.docs.sha256()),
    )
    return out.getvalue()


def log_scores(setup: Setup, log: Log, path: Path, table: ScoreTable, static: ScoreTable) -> None:
    """Log the scores with and without adaptation; for a lossy tokenizer also per byte of the text that survives it, and
    where the contest's formula counts too many bytes, also without those."""
    counted_bytes = int(setup.validation.target_bytes().sum())
    kept = manifest_value(Path(setup.run.data_path), "splits", "val", "smaller_bytes")
    if isinstance(kept, int) and 0 < kept < counted_bytes:
        log.event(
            "lossy",
            "this tokenizer is lossy: over the {bytes_kept} bytes that survive it, val_bpb is {val_bpb_kept:.5f}",
            bytes_kept=kept,
            val_bpb_kept=table.bits_per_byte * counted_bytes / kept,
        )
    excess = setup.validation.excess_bytes(setup.tokenizer.pieces)
    if excess > 0:
        log.event(
            "excess",
            "this tokenizer has spaces inside pieces, for which the contest's formula counts {excess_bytes} bytes too "
            "many: without these, val_bpb is {val_bpb_exact:.5f}",
            excess_bytes=excess,
            val_bpb_exact=table.bits_per_byte * counted_bytes / (counted_bytes - excess),
        )

    line = "artifact {artifact}: static_bpb:{static_bpb:.5f}"
    val_bpb = None
    if setup.run.ttt_enabled:
        line += " ttt_bpb:{val_bpb:.5f}"
        val_bpb = table.bits_per_byte
    log.event("score", line, artifact=str(path), static_bpb=static.bits_per_byte, val_bpb=val_bpb)


# ---- The result ----


def describe_artifact(path: Path, sha256: str) -> dict[str, Any]:
    """What the result says about the artifact's file. Raises DataError if its SHA-256 is not that of the artifact that
    was scored: another run may have replaced it meanwhile."""
    data = read_file(path)
    require(
        hashlib.sha256(data).hexdigest() == sha256,
        f"{path}: was replaced while it was scored, so that there is no result; score it again",
        DataError,
    )
    return {
        "artifact_bytes": len(data),
        "code_bytes": len(code()),
        "total_bytes": len(data) + len(code()),
    }


def part_bytes(path: Path) -> dict[str, int]:
    """Bytes of an artifact by kind of tensor, as they lie in the file; `header` is the rest."""
    data = read_file(path)
    header, _ = read_header(data, str(path))
    parts: dict[str, int] = {}
    for name, _, _, size in header["tensors"]:
        kind = kind_of(name)
        parts[kind] = parts.get(kind, 0) + size
    return parts | {"header": len(data) - sum(parts.values())}


def report_overruns(run: RunConfig, result: Mapping[str, Any], log: Log) -> None:
    """Log by how much a limit of bytes or time was exceeded."""
    extra = result["total_bytes"] - run.artifact_bytes
    if extra > 0:  # of an artifact that was packed beside other code, or under another limit
        log.warn(f"artifact and code are {extra} bytes over ARTIFACT_BYTES={run.artifact_bytes}")
    clocks = (
        ("training", "train_seconds", run.max_wallclock_seconds),
        ("evaluation", "eval_seconds", run.eval_seconds),
    )
    for clock, key, limit in clocks:
        over = result.get(key, 0.0) - limit
        if limit and over > 0:
            line = "over the limit: {clock} took {over_seconds:.3f} s more than its {limit_seconds:g} s"
            log.event("over_limit", line, clock=clock, over_seconds=over, limit_seconds=limit)


SHOWN_IN_RESULT_LINE = (
    "val_bpb static_bpb prequant_bpb artifact_bytes code_bytes total_bytes steps train_tokens train_seconds "
    "eval_seconds documents tokens bytes doc_independent degraded_documents seed"
).split()


def report(result: Mapping[str, Any], documents: bytes, watch: Stopwatch, log: Log, path: Path) -> None:
    """Log the seconds of every phase and the result; then write the result as JSON, `path`, and the file of documents
    beside it. Raises UserError if a file cannot be written; the result is on the screen even then."""
    for name, seconds in watch.seconds.items():
        clock = "-"
        if name in TRAINING_CLOCK:
            clock = "training"
        elif name in EVALUATION_CLOCK:
            clock = "evaluation"
        line = "phase {name:26} {seconds:9.2f} s   clock: {clock}"
        log.event("phase", line, name=name, seconds=seconds, clock=clock)

    line = "result"
    for key in SHOWN_IN_RESULT_LINE:
        if isinstance(result.get(key), float):
            line += f" {key}:{{{key}:.6f}}"
        elif key in result:
            line += f" {key}:{{{key}}}"
    log.event("result", line, **result)

    problems = []
    files = {
        path.with_suffix(".docs.npz"): documents,
        path: json.dumps(result, indent=1, allow_nan=False).encode(),  # last: whoever finds it finds the others
    }
    for file, content in files.items():
        try:
            write_atomically(file, [content], parents=True)
        except UserError as error:
            problems.append(str(error))
    require(not problems, f"{'; '.join(problems)}; the result is the last line above", UserError)


# ======================================================================================================================
# Appendix: Triton kernels, where plain torch would read and write memory too often.
#
# Each kernel computes what its reference does, which stands beside the model code that uses it.

if triton:
    jit = triton.jit
    constant = tl.constexpr
else:  # the kernels are still defined, but nothing calls them

    def jit(kernel: Callable) -> Callable:
        return kernel

    constant = float


MASKED = constant(-1e30)  # score of a masked pair: as good as -inf, but the difference of two is not NaN
LOG2_E = constant(math.log2(math.e))
EPSILON = constant(NORM_EPSILON)  # for kernels, which may read constants only


# ---- Attention kernels ----
#
# FlashAttention-2 (Dao, arXiv 2307.08691) on a packed row of N tokens, together with what surrounds attention in the
# model: QK norm, RoPE and gain before it, XSA and the gate after it.
#
# Tiling: a program owns a tile of 64 queries of one head and loops over tiles of 64 keys. Scores live in registers
# only. For every query it keeps the maximum of the scores so far, the sum of their exponentials and the output before
# division by that sum, and rescales sum and output whenever the maximum grows (online softmax).
#
# Segments: a query attends to tokens of its own segment, up to itself. So a tile of queries loops over keys from the
# start of its first query's segment to its own last token; in the backward pass a tile of keys loops over queries, of
# several heads at once, from its own first token to the end of its last key's segment. Most tiles on the way need no
# mask: a loop without one takes them, and a second loop the others. (A condition within a single loop would cost more
# than the masks that it saves.)
#
#     forward:  qk_norm_rope_kernel                qkv -> qk
#               attention_forward_kernel           qk, values -> y, lse, out
#     backward: attention_output_backward_kernel   d_out -> d_y, d_gate, delta, XSA's share of the gradient of values
#               attention_query_backward_kernel    d_y, delta -> gradient of the queries in qk
#               attention_kv_backward_kernel       d_y, delta -> gradients of the keys in qk, and of values
#               qk_norm_rope_kernel                gradient of qk -> gradients of queries and keys in qkv, d_gain
#
# The backward pass recomputes probabilities from `lse`. A single program writes each number: without atomic additions,
# results repeat to the last bit.
#
#     qkv     (N, (H + 2 K) h)   projections: queries, keys and values of all heads side by side
#     qk      (N, (H + K) h)     queries and keys after norm, RoPE and gain
#     y, out  (N, H h)           outputs of attention: as they are, and after XSA and gate
#     lse     (H, N) fp32        log2 of the sum of the exponentials of a query's scores
#     delta   (H, N) fp32        sum(y * d_y) of a query: what softmax's gradient subtracts
#
# Scores are in units of log 2, since a GPU computes powers of 2 faster than of e: the factor is part of the gain. In
# comments, 64 stands for TILE, and R for the rows of a tile of any size; in names of kernel arguments, `heads` is H,
# `kv_heads` K, `width` h, `half` half of the dimensions that RoPE rotates, and `tokens` N.

TILE_TOKENS = 64  # the fastest of those tried on an H200, as are the sizes and launch options below
TILE = constant(TILE_TOKENS)  # for kernels

QK_ROWS = 32  # queries and keys, of one head or several, that a program of qk_norm_rope_kernel takes
OUTPUT_TOKENS = 16  # tokens that a program of attention_output_backward_kernel takes


def heads_together(heads: int) -> int:
    """How many heads a program takes together: the most, of 1, 2 and 4, that divide `heads`."""
    return math.gcd(heads, 4)


def attention_launch(width: int) -> dict[str, int]:
    """Options of kernels that loop over tiles. Wide heads leave less shared memory for tiles fetched ahead (stages)."""
    return dict(num_warps=4, num_stages=3 if width < 128 else 2)


def score_scale(width: int) -> float:
    """The factor h^-0.5 of attention scores, in units of log 2."""
    return math.log2(math.e) * width**-0.5


@jit
def load_tile(ptr, rows, tokens, heads: tl.constexpr, head, width: tl.constexpr):
    """Rows (R,) of one head, or of a head each (R, 1), from a matrix (N, heads * width) -> tile (R, width), zeros
    beyond row N."""
    offsets = (rows[:, None] * heads + head) * width + tl.arange(0, width)[None, :]
    return tl.load(ptr + offsets, rows[:, None] < tokens, 0.0)


@jit
def store_tile(ptr, tile, rows, tokens, heads: tl.constexpr, head, width: tl.constexpr):
    """The inverse of `load_tile`; rows beyond N are not written."""
    offsets = (rows[:, None] * heads + head) * width + tl.arange(0, width)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), rows[:, None] < tokens)


@jit
def apply_rope_tile(
    x,
    ptr,
    rows,
    tokens,
    heads: tl.constexpr,
    head,
    cos_ptr,
    sin_ptr,
    direction: tl.constexpr,
    width: tl.constexpr,
    half: tl.constexpr,
):
    """Rotate the pairs (i, i + half) of each row of x (R, width) by its token's angles; back if `direction` is -1.

    x was loaded from `ptr`. Each column reads the other one of its pair from there: registers cannot be indexed."""
    rows = rows[:, None]  # (R, 1)
    cols = tl.arange(0, width)[None, :]  # (1, width)
    rotates = (rows < tokens) & (cols < 2 * half)  # (R, width)
    is_first = cols < half
    partner = (rows * heads + head) * width + tl.where(is_first, cols + half, cols - half)
    angle = tl.where(is_first, cols, cols - half)

    cos = tl.load(cos_ptr + rows * half + angle, rotates, 1.0)
    sin = tl.load(sin_ptr + rows * half + angle, rotates, 0.0)
    sign = tl.where(is_first, -direction, direction)
    return x * cos + sign * sin * tl.load(ptr + partner, rotates, 0.0).to(tl.float32)


@jit
def qk_norm_rope_kernel(
    qkv_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    qk_ptr,  # in the backward pass its gradient, an input
    d_qkv_ptr,
    d_gain_ptr,
    tokens,
    backward: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    half: tl.constexpr,
    together: tl.constexpr,
    size: tl.constexpr,
):
    """Queries and keys: RMSNorm, RoPE, the gain of the head. Backward: from the gradient of qk to the gradients of qkv
    and of the gain; for the latter, every program writes its sum over its tokens.

    A program takes `size` rows: token after token, each in `together` heads.
    Rotation keeps lengths, so the forward pass rotates before it normalises, and reads pairs from qkv."""
    first_head = tl.program_id(1) * together
    row = tl.arange(0, size)
    token = tl.program_id(0) * (size // together) + row // together  # (R,)
    head = (first_head + row % together)[:, None]  # (R, 1)
    x = load_tile(qkv_ptr, token, tokens, heads + 2 * kv_heads, head, width).to(tl.float32)  # (R, width)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / width + EPSILON)[:, None]  # (R, 1)
    gain = tl.load(gain_ptr + head)

    if backward:
        d_y = load_tile(qk_ptr, token, tokens, heads + kv_heads, head, width).to(tl.float32)
        # The gradient of the normalised head, except for the gain, which is multiplied in below.
        d_normed = apply_rope_tile(
            d_y, qk_ptr, token, tokens, heads + kv_heads, head, cos_ptr, sin_ptr, -1, width, half
        )
        along = tl.sum(d_normed * x * inverse_rms, 1)  # (R,)
        d_gain = tl.sum(tl.reshape(along, (size // together, together)), 0)  # (together,)
        d_gain_ptr += tl.program_id(0) * (heads + kv_heads) + first_head
        tl.store(d_gain_ptr + tl.arange(0, together), d_gain)
        d_x = (d_normed - x * inverse_rms * (along / width)[:, None]) * inverse_rms * gain
        store_tile(d_qkv_ptr, d_x, token, tokens, heads + 2 * kv_heads, head, width)
    else:
        y = apply_rope_tile(x, qkv_ptr, token, tokens, heads + 2 * kv_heads, head, cos_ptr, sin_ptr, 1, width, half)
        store_tile(qk_ptr, y * inverse_rms * gain, token, tokens, heads + kv_heads, head, width)


@jit
def keys_of_tile(positions_ptr, first_query, tokens, masked: tl.constexpr):
    """The keys that a tile of queries loops over, from the start of its first query's segment on: whole tiles in which
    every query attends to every key, then the rest, which needs a mask -> begin and end of the rest if `masked`, else
    of the whole tiles.

    If another segment begins within the tile of queries, there are no whole tiles; else the last one ends at the first
    query or before."""
    begin = first_query - tl.load(positions_ptr + first_query)
    last_query = tl.minimum(first_query + TILE, tokens) - 1
    one_segment = last_query - tl.load(positions_ptr + last_query) == begin
    middle = tl.where(one_segment, begin + (first_query + 1 - begin) // TILE * TILE, begin)
    if masked:
        begin = middle
        end = last_query + 1
    else:
        end = middle
    return begin, end


@jit
def load_keys_and_values(
    qk_ptr, qkv_ptr, first_key, tokens, heads: tl.constexpr, kv_heads: tl.constexpr, key_head, width: tl.constexpr
):
    """Keys and values (64, h) from token `first_key` on; `key_head` is the head of the keys in qk."""
    key = first_key + tl.arange(0, TILE)
    k = load_tile(qk_ptr, key, tokens, heads + kv_heads, key_head, width)
    v = load_tile(qkv_ptr, key, tokens, heads + 2 * kv_heads, key_head + kv_heads, width)
    return k, v


@jit
def attention_scores(q, k, positions_ptr, first_query, first_key, tokens, masked: tl.constexpr):
    """Queries and keys (64, h) from `first_query` and `first_key` on -> scores (64, 64) in units of log 2; if `masked`,
    MASKED where a query does not attend to a key."""
    s = tl.dot(q, tl.trans(k))
    if masked:
        query = first_query + tl.arange(0, TILE)
        key = first_key + tl.arange(0, TILE)
        segment_start = query - tl.load(positions_ptr + query, query < tokens, 0)
        s = tl.where((key[None, :] <= query[:, None]) & (key[None, :] >= segment_start[:, None]), s, MASKED)
    return s


@jit
def unit_vectors(v):
    """Values (R, h) -> unit vectors (R, h), and the lengths they were divided by (R, 1)."""
    v = v.to(tl.float32)
    length = tl.sqrt(tl.maximum(tl.sum(v * v, 1), 1e-24))[:, None]  # at least 1e-12, as in F.normalize
    return v / length, length


@jit
def add_keys(s, v, row_max, row_sum, y):
    """A step of the online softmax: scores (R, 64) of more keys, their values (64, h)
    -> maxima (R,), sums (R,) and outputs (R, h) with these keys."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    y = y * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_max, row_sum, y


@jit
def attention_forward_kernel(
    qk_ptr,
    qkv_ptr,
    gate_ptr,
    positions_ptr,
    y_ptr,
    out_ptr,
    lse_ptr,
    tokens,
    xsa: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
):
    """y, lse and out of a tile of queries of one head.

    Until a query has seen an unmasked key, its sum and y hold garbage. Its first true score, at the latest that of its
    own key, rescales them by exp2(MASKED - score) = 0."""
    first_query = tl.program_id(0) * TILE
    head = tl.program_id(1)
    query = first_query + tl.arange(0, TILE)  # (64,)
    key_head = heads + head // (heads // kv_heads)
    q = load_tile(qk_ptr, query, tokens, heads + kv_heads, head, width)  # (64, h)

    row_max = tl.full([TILE], MASKED, tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    y = tl.zeros([TILE, width], tl.float32)
    for masked in tl.static_range(2):
        begin, end = keys_of_tile(positions_ptr, first_query, tokens, masked)
        for first_key in range(begin, end, TILE):
            k, v = load_keys_and_values(qk_ptr, qkv_ptr, first_key, tokens, heads, kv_heads, key_head, width)
            s = attention_scores(q, k, positions_ptr, first_query, first_key, tokens, masked)  # (64 queries, 64 keys)
            row_max, row_sum, y = add_keys(s, v, row_max, row_sum, y)
    y = y / row_sum[:, None]
    tl.store(lse_ptr + head * tokens + query, row_max + tl.log2(row_sum), query < tokens)
    store_tile(y_ptr, y, query, tokens, heads, head, width)

    if xsa:
        v = load_tile(qkv_ptr, query, tokens, heads + 2 * kv_heads, key_head + kv_heads, width)
        unit_value, _ = unit_vectors(v)
        y -= tl.sum(y * unit_value, 1)[:, None] * unit_value
    gate = tl.load(gate_ptr + query * heads + head, query < tokens, 0.0).to(tl.float32)  # (64,)
    store_tile(out_ptr, y * gate[:, None], query, tokens, heads, head, width)


@jit
def attention_output_backward_kernel(
    qkv_ptr,
    gate_ptr,
    y_ptr,
    d_out_ptr,
    d_y_ptr,
    d_gate_ptr,
    d_qkv_ptr,
    delta_ptr,
    tokens,
    xsa: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
):
    """From d_out to d_y, d_gate and delta, for `size` tokens and the query heads that share a key/value head. In d_qkv
    it writes the values' gradient through XSA, to which `attention_kv_backward_kernel` adds the rest."""
    token = tl.program_id(0) * size + tl.arange(0, size)  # (R,)
    kv_head = tl.program_id(1)
    group = heads // kv_heads
    value_head = heads + kv_heads + kv_head
    v = load_tile(qkv_ptr, token, tokens, heads + 2 * kv_heads, value_head, width)  # (R, h)
    unit_value, length = unit_vectors(v)
    d_unit_value = tl.zeros([size, width], tl.float32)

    for head in range(kv_head * group, (kv_head + 1) * group):
        y = load_tile(y_ptr, token, tokens, heads, head, width).to(tl.float32)  # (R, h)
        d_y = load_tile(d_out_ptr, token, tokens, heads, head, width).to(tl.float32)  # so far without XSA and gate
        gate = tl.load(gate_ptr + token * heads + head, token < tokens, 0.0).to(tl.float32)[:, None]  # (R, 1)
        d_gate = tl.sum(y * d_y, 1)  # (R,)
        if xsa:
            along = tl.sum(y * unit_value, 1)  # (R,)
            d_along = tl.sum(d_y * unit_value, 1)
            d_gate -= along * d_along
            d_unit_value -= gate * (d_along[:, None] * y + along[:, None] * d_y)
            d_y -= d_along[:, None] * unit_value
        d_y = (d_y * gate).to(d_y_ptr.dtype.element_ty).to(tl.float32)  # rounded as the next kernels will read it

        tl.store(d_gate_ptr + token * heads + head, d_gate.to(gate_ptr.dtype.element_ty), token < tokens)
        tl.store(delta_ptr + head * tokens + token, tl.sum(y * d_y, 1), token < tokens)
        store_tile(d_y_ptr, d_y, token, tokens, heads, head, width)

    d_v = (d_unit_value - tl.sum(d_unit_value * unit_value, 1)[:, None] * unit_value) / length
    store_tile(d_qkv_ptr, d_v, token, tokens, heads + 2 * kv_heads, value_head, width)


@jit
def attention_query_backward_kernel(
    qk_ptr,
    qkv_ptr,
    lse_ptr,
    positions_ptr,
    d_y_ptr,
    delta_ptr,
    d_qk_ptr,
    tokens,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
):
    """Gradient of a tile of queries of one head."""
    first_query = tl.program_id(0) * TILE
    head = tl.program_id(1)
    query = first_query + tl.arange(0, TILE)  # (64,)
    key_head = heads + head // (heads // kv_heads)
    q = load_tile(qk_ptr, query, tokens, heads + kv_heads, head, width)  # (64, h)
    d_y = load_tile(d_y_ptr, query, tokens, heads, head, width)
    lse = tl.load(lse_ptr + head * tokens + query, query < tokens, 0.0)  # (64,)
    delta = tl.load(delta_ptr + head * tokens + query, query < tokens, 0.0)

    d_q = tl.zeros([TILE, width], tl.float32)
    for masked in tl.static_range(2):
        begin, end = keys_of_tile(positions_ptr, first_query, tokens, masked)
        for first_key in range(begin, end, TILE):
            k, v = load_keys_and_values(qk_ptr, qkv_ptr, first_key, tokens, heads, kv_heads, key_head, width)
            s = attention_scores(q, k, positions_ptr, first_query, first_key, tokens, masked)  # (64 queries, 64 keys)
            p = tl.exp2(s - lse[:, None])
            d_s = p * (tl.dot(d_y, tl.trans(v)) - delta[:, None])
            d_q += tl.dot(d_s.to(k.dtype), k)
    store_tile(d_qk_ptr, d_q / LOG2_E, query, tokens, heads + kv_heads, head, width)


@jit
def queries_of_tile(ends_ptr, first_key, tokens, queries: tl.constexpr, masked: tl.constexpr):
    """The queries that a tile of keys loops over, up to the end of its last key's segment: those of the keys' own
    tokens, then whole tiles of `queries` tokens in which every query attends to every key, then what is left -> begin
    and end of the whole tiles, or if `masked` of the others as if they were adjacent, and the gap between these.

    If another segment begins within the tile of keys, there are no whole tiles."""
    begin = first_key + TILE
    end = tl.load(ends_ptr + tl.minimum(begin, tokens) - 1)
    one_segment = (tl.load(ends_ptr + first_key) == end) & (end > begin)
    gap = tl.where(one_segment, (end - begin) // queries * queries, 0)
    if masked:
        begin = first_key
        end -= gap
    else:
        end = begin + gap
    return begin, end, gap


@jit
def attention_kv_backward_kernel(
    qk_ptr,
    qkv_ptr,
    lse_ptr,
    positions_ptr,
    ends_ptr,
    d_y_ptr,
    delta_ptr,
    d_qk_ptr,
    d_qkv_ptr,
    tokens,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    together: tl.constexpr,
):
    """Gradients of a tile of keys and values of one key/value head, summed over the query heads that share it. d_qkv
    already holds the values' gradient through XSA.

    A tile of queries has 64 rows, too: head after head, 64 / `together` tokens of each of `together` heads. Rows beyond
    N add nothing: their q and d_y are zeros."""
    first_key = tl.program_id(0) * TILE
    kv_head = tl.program_id(1)
    group = heads // kv_heads
    key = first_key + tl.arange(0, TILE)  # (64,)
    key_head = heads + kv_head
    value_head = heads + kv_heads + kv_head
    k, v = load_keys_and_values(qk_ptr, qkv_ptr, first_key, tokens, heads, kv_heads, key_head, width)  # (64, h) each

    d_k = tl.zeros([TILE, width], tl.float32)
    d_v = tl.zeros([TILE, width], tl.float32)
    queries: tl.constexpr = TILE // together  # tokens of a tile of queries
    row = tl.arange(0, TILE)
    for first_head in range(kv_head * group, (kv_head + 1) * group, together):
        head = first_head + row // queries  # (64,)
        for masked in tl.static_range(2):
            begin, end, gap = queries_of_tile(ends_ptr, first_key, tokens, queries, masked)
            for first in range(begin, end, queries):
                first_query = tl.where(first < first_key + TILE, first, first + gap) if masked else first
                query = first_query + row % queries
                q = load_tile(qk_ptr, query, tokens, heads + kv_heads, head[:, None], width)
                d_y = load_tile(d_y_ptr, query, tokens, heads, head[:, None], width)
                lse = tl.load(lse_ptr + head * tokens + query, query < tokens, 0.0)
                delta = tl.load(delta_ptr + head * tokens + query, query < tokens, 0.0)
                s = tl.dot(k, tl.trans(q))  # (64 keys, 64 rows of queries)
                if masked:
                    segment_start = query - tl.load(positions_ptr + query, query < tokens, 0)
                    s = tl.where((key[:, None] <= query[None, :]) & (key[:, None] >= segment_start[None, :]), s, MASKED)
                p = tl.exp2(s - lse[None, :])
                d_v += tl.dot(p.to(q.dtype), d_y)
                d_s = p * (tl.dot(v, tl.trans(d_y)) - delta[None, :])
                d_k += tl.dot(d_s.to(q.dtype), q)

    d_v += load_tile(d_qkv_ptr, key, tokens, heads + 2 * kv_heads, value_head, width)
    store_tile(d_qk_ptr, d_k / LOG2_E, key, tokens, heads + kv_heads, key_head, width)
    store_tile(d_qkv_ptr, d_v, key, tokens, heads + 2 * kv_heads, value_head, width)


def qk_launch(tokens: int, heads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Programs of `qk_norm_rope_kernel` for tokens with `heads` queries and keys each, and its last two arguments."""
    together = heads_together(heads)
    programs = triton.cdiv(tokens, QK_ROWS // together), heads // together
    return programs, (together, QK_ROWS)


class FusedAttention(torch.autograd.Function):
    """`attention_reference` on one packed row, by the kernels above."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, gain: Tensor, gate: Tensor, cos: Tensor, sin: Tensor, segments: Segments, heads: HeadLayout
    ) -> Tensor:
        """Projections (N, (H + 2 K) h), gains (H,), gates (N, H), cosine and sine (N, rope_dims / 2) -> (N, H h)"""
        assert qkv.numel() < 2**31, "the kernels count in 32 bits: lower MICRO_BATCH_TOKENS"
        N = len(qkv)
        _, H, K, h = heads
        tiles = triton.cdiv(N, TILE_TOKENS)
        qk_programs, qk_tile = qk_launch(N, H + K)
        gain = torch.cat([gain * score_scale(h), gain.new_ones(K)])  # (H + K,): keys have no gain
        qk = qkv.new_empty(N, (H + K) * h)
        y = qkv.new_empty(N, H * h)
        out = qkv.new_empty(N, H * h)
        lse = torch.empty(H, N, device=qkv.device)

        unused = (qkv, gain)  # in place of the gradients of both
        qk_norm_rope_kernel[qk_programs](qkv, gain, cos, sin, qk, *unused, N, False, H, K, h, cos.size(1), *qk_tile)
        attention_forward_kernel[(tiles, H)](
            qk, qkv, gate, segments.positions, y, out, lse, N, *heads, **attention_launch(h)
        )
        ctx.save_for_backward(qkv, gain, gate, cos, sin, qk, y, lse, *segments)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """(N, H h) -> gradients of qkv, gain and gate"""
        qkv, gain, gate, cos, sin, qk, y, lse, positions, ends = ctx.saved_tensors
        N = len(qkv)
        _, H, K, h = ctx.heads
        tiles = triton.cdiv(N, TILE_TOKENS)
        d_out = d_out.contiguous()
        d_y = torch.empty_like(y)
        d_gate = torch.empty_like(gate)
        d_qk = torch.empty_like(qk)
        d_qkv = torch.empty_like(qkv)
        delta = torch.empty_like(lse)
        qk_programs, qk_tile = qk_launch(N, H + K)
        d_gain = torch.empty(qk_programs[0], H + K, device=qkv.device)

        attention_output_backward_kernel[(triton.cdiv(N, OUTPUT_TOKENS), K)](
            qkv, gate, y, d_out, d_y, d_gate, d_qkv, delta, N, *ctx.heads, OUTPUT_TOKENS
        )
        attention_query_backward_kernel[(tiles, H)](
            qk, qkv, lse, positions, d_y, delta, d_qk, N, H, K, h, **attention_launch(h)
        )
        together = heads_together(H // K)
        attention_kv_backward_kernel[(tiles, K)](
            qk, qkv, lse, positions, ends, d_y, delta, d_qk, d_qkv, N, H, K, h, together, **attention_launch(h)
        )
        qk_norm_rope_kernel[qk_programs](
            qkv, gain, cos, sin, d_qk, d_qkv, d_gain, N, True, H, K, h, cos.size(1), *qk_tile
        )
        return d_qkv, d_gain.sum(0)[:H] * score_scale(h), d_gate, None, None, None, None


# ---- Cached attention kernels ----
#
# A chunk of C tokens of B documents attends to the filled slots of a cache and, causally, to itself. The kernels work
# as above, except for the following.
#
# Tiling: a program owns the queries of all heads that share a key/value head, so that cached keys and values are read
# once for them. A row of its tile is a token's query in one head; the rows of a token lie side by side. A tile has R
# rows, a power of two: at least 16, the fewest that a GPU multiplies, and at most 128 (64 for wide heads), the most
# that fit into registers and shared memory. Several programs share a chunk that needs more. Rows beyond the chunk are
# zeros and are not stored.
#
# Keys: a program loops over tiles of 64 cached keys, from slot 0 to the last filled one, then over tiles of 64 of the
# chunk's own. The number of filled slots is read on the device, so that the time of a captured graph depends on what is
# cached, not on the capacity. Empty slots are never loaded.
#
#     forward:  cached_attention_forward_kernel          q, k, v, cache -> y, lse
#     backward: cached_attention_query_backward_kernel   d_y -> gradient of q, delta
#               cached_attention_kv_backward_kernel      d_y, delta -> gradients of k and v, for the chunk alone
#
# A document's numbers repeat to the last bit in any batch and in a cache of any size: a program sees one document only,
# its tiles begin at slot 0 whatever the size is, and nothing is tuned to the number of documents.
#
#     q, y          (B, C, H, h)         scale and gain are not folded in: see score_scale
#     k, v          (B, C, K, h)         the chunk's own keys and values
#     cached_k, _v  (B, K, L, h)         keys and values of earlier tokens
#     lse, delta    (B, C, H) fp32       as above
#
# In names of kernel arguments, `chunk` is C, `slots` L and `tile_rows` R.


def cached_attention_tile_rows(rows: int, width: int) -> int:
    """R, if a document has this many rows for a key/value head."""
    most = 128 if width < 128 else 64
    return min(most, max(16, triton.next_power_of_2(rows)))


def cached_attention_launch(tile_rows: int, width: int) -> dict[str, int]:
    """Options of the kernels: a warp for 16 rows, in groups of 4 warps."""
    return attention_launch(width) | dict(num_warps=8 if tile_rows > 64 else 4)


@jit
def visible_scores(q, k, visible, scale):
    """Queries (R, h), keys (64, h) -> scores (R, 64) in units of log 2; `visible`, (R, 64) or (1, 64), says which
    count."""
    return tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, MASKED)


@jit
def score_gradient(p, v, d_y, delta):
    """Probabilities (R, 64), values (64, h), d_y (R, h), delta (R,) -> gradient of the scores (R, 64)."""
    return p * (tl.dot(d_y, tl.trans(v), input_precision="ieee") - delta[:, None])


@jit
def token_and_head(row, kv_head, heads: tl.constexpr, kv_heads: tl.constexpr):
    """Rows (R,) of a key/value head -> token and query head of every row, (R,) each."""
    group: tl.constexpr = heads // kv_heads
    return row // group, kv_head * group + row % group


@jit
def place_of_rows(chunk, slots, heads: tl.constexpr, kv_heads: tl.constexpr, tile_rows: tl.constexpr):
    """The rows of the tile that a program owns -> token and query head of every row, (R,) each, and how many queries of
    all heads, own keys of all heads, and cached keys are stored before the program's."""
    document = tl.program_id(0).to(tl.int64)  # a cache may hold more numbers than 32 bits count
    kv_head = tl.program_id(1)
    row = tl.program_id(2) * tile_rows + tl.arange(0, tile_rows)  # (R,)
    token, head = token_and_head(row, kv_head, heads, kv_heads)
    queries = document * chunk * heads
    own_keys = document * chunk * kv_heads
    cached_keys = (document * kv_heads + kv_head) * slots
    return token, head, queries, own_keys, cached_keys


@jit
def cached_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cached_k_ptr,
    cached_v_ptr,
    filled_ptr,
    y_ptr,
    lse_ptr,
    chunk,
    slots,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
):
    """y and lse of a tile of rows."""
    token, head, queries, own_keys, cached_keys = place_of_rows(chunk, slots, heads, kv_heads, tile_rows)
    kv_head = tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    q = load_tile(q_ptr + queries * width, token, chunk, heads, head[:, None], width)  # (R, h)

    row_max = tl.full([tile_rows], MASKED, tl.float32)
    row_sum = tl.zeros([tile_rows], tl.float32)
    y = tl.zeros([tile_rows, width], tl.float32)
    filled = tl.load(filled_ptr).to(tl.int32)
    for first_slot in range(0, filled, TILE):
        slot = first_slot + tl.arange(0, TILE)  # (64,)
        k = load_tile(cached_k_ptr + cached_keys * width, slot, filled, 1, 0, width)
        v = load_tile(cached_v_ptr + cached_keys * width, slot, filled, 1, 0, width)
        s = visible_scores(q, k, slot[None, :] < filled, scale)
        row_max, row_sum, y = add_keys(s, v, row_max, row_sum, y)

    last_token = ((tl.program_id(2) + 1) * tile_rows - 1) // group
    for first_key in range(0, tl.minimum(last_token + 1, chunk), TILE):
        key = first_key + tl.arange(0, TILE)  # (64,)
        k = load_tile(k_ptr + own_keys * width, key, chunk, kv_heads, kv_head, width)
        v = load_tile(v_ptr + own_keys * width, key, chunk, kv_heads, kv_head, width)
        s = visible_scores(q, k, key[None, :] <= token[:, None], scale)
        row_max, row_sum, y = add_keys(s, v, row_max, row_sum, y)

    store_tile(y_ptr + queries * width, y / row_sum[:, None], token, chunk, heads, head[:, None], width)
    tl.store(lse_ptr + queries + token * heads + head, row_max + tl.log2(row_sum), token < chunk)


@jit
def cached_attention_query_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cached_k_ptr,
    cached_v_ptr,
    filled_ptr,
    y_ptr,
    lse_ptr,
    d_y_ptr,
    d_q_ptr,
    delta_ptr,
    chunk,
    slots,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
):
    """delta, and the gradient of the queries in a tile of rows."""
    token, head, queries, own_keys, cached_keys = place_of_rows(chunk, slots, heads, kv_heads, tile_rows)
    kv_head = tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    q = load_tile(q_ptr + queries * width, token, chunk, heads, head[:, None], width)  # (R, h)
    d_y = load_tile(d_y_ptr + queries * width, token, chunk, heads, head[:, None], width)
    y = load_tile(y_ptr + queries * width, token, chunk, heads, head[:, None], width)
    lse = tl.load(lse_ptr + queries + token * heads + head, token < chunk, 0.0)  # (R,)
    delta = tl.sum(y.to(tl.float32) * d_y.to(tl.float32), 1)  # (R,)
    tl.store(delta_ptr + queries + token * heads + head, delta, token < chunk)

    d_q = tl.zeros([tile_rows, width], tl.float32)
    filled = tl.load(filled_ptr).to(tl.int32)
    for first_slot in range(0, filled, TILE):
        slot = first_slot + tl.arange(0, TILE)  # (64,)
        k = load_tile(cached_k_ptr + cached_keys * width, slot, filled, 1, 0, width)
        v = load_tile(cached_v_ptr + cached_keys * width, slot, filled, 1, 0, width)
        p = tl.exp2(visible_scores(q, k, slot[None, :] < filled, scale) - lse[:, None])  # (R, 64)
        d_s = score_gradient(p, v, d_y, delta)
        d_q += tl.dot(d_s.to(k.dtype), k, input_precision="ieee")

    last_token = ((tl.program_id(2) + 1) * tile_rows - 1) // group
    for first_key in range(0, tl.minimum(last_token + 1, chunk), TILE):
        key = first_key + tl.arange(0, TILE)  # (64,)
        k = load_tile(k_ptr + own_keys * width, key, chunk, kv_heads, kv_head, width)
        v = load_tile(v_ptr + own_keys * width, key, chunk, kv_heads, kv_head, width)
        p = tl.exp2(visible_scores(q, k, key[None, :] <= token[:, None], scale) - lse[:, None])  # (R, 64)
        d_s = score_gradient(p, v, d_y, delta)
        d_q += tl.dot(d_s.to(k.dtype), k, input_precision="ieee")
    store_tile(d_q_ptr + queries * width, d_q * (scale / LOG2_E), token, chunk, heads, head[:, None], width)


@jit
def cached_attention_kv_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    d_y_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
    chunk,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
):
    """Gradients of a tile of the chunk's own keys and values of one head, summed over rows in their order.

    Rows beyond the chunk add nothing: their q and d_y are zeros."""
    document = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    first_key = tl.program_id(2) * TILE
    key = first_key + tl.arange(0, TILE)  # (64,)
    queries = document * chunk * heads  # before this document's
    own_keys = document * chunk * kv_heads
    k = load_tile(k_ptr + own_keys * width, key, chunk, kv_heads, kv_head, width)  # (64, h)
    v = load_tile(v_ptr + own_keys * width, key, chunk, kv_heads, kv_head, width)

    d_k = tl.zeros([TILE, width], tl.float32)
    d_v = tl.zeros([TILE, width], tl.float32)
    for first_row in range(first_key * group, chunk * group, tile_rows):
        row = first_row + tl.arange(0, tile_rows)  # (R,)
        token, head = token_and_head(row, kv_head, heads, kv_heads)
        q = load_tile(q_ptr + queries * width, token, chunk, heads, head[:, None], width)  # (R, h)
        d_y = load_tile(d_y_ptr + queries * width, token, chunk, heads, head[:, None], width)
        lse = tl.load(lse_ptr + queries + token * heads + head, token < chunk, 0.0)  # (R,)
        delta = tl.load(delta_ptr + queries + token * heads + head, token < chunk, 0.0)
        p = tl.exp2(visible_scores(q, k, key[None, :] <= token[:, None], scale) - lse[:, None])  # (R, 64)
        d_v += tl.dot(tl.trans(p.to(q.dtype)), d_y, input_precision="ieee")
        d_s = score_gradient(p, v, d_y, delta)
        d_k += tl.dot(tl.trans(d_s.to(q.dtype)), q, input_precision="ieee")
    store_tile(d_k_ptr + own_keys * width, d_k * (scale / LOG2_E), key, chunk, kv_heads, kv_head, width)
    store_tile(d_v_ptr + own_keys * width, d_v, key, chunk, kv_heads, kv_head, width)


class FusedCachedAttention(torch.autograd.Function):
    """`attend_with_cache`, by the kernels above."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, filled: Tensor, buffer: Tensor) -> Tensor:
        """(B, C, H, h), (B, C, K, h), (B, C, K, h), then a CachedLayer: () int64, (2, B, K, L, h) -> (B, C, H, h)"""
        assert q.dtype == k.dtype == v.dtype == buffer.dtype, "a product has one dtype"
        q = q.contiguous()
        k = k.contiguous()
        v = v.contiguous()
        B, C, H, h = q.shape
        K = k.size(2)
        rows = C * (H // K)
        tile_rows = cached_attention_tile_rows(rows, h)
        ctx.grid = (B, K, triton.cdiv(rows, tile_rows))
        ctx.shape = (H, K, h, tile_rows)
        y = torch.empty_like(q)
        lse = torch.empty(B, C, H, device=q.device)

        inputs = (q, k, v, *buffer, filled)
        sizes = (C, buffer.size(3), score_scale(h), *ctx.shape)
        cached_attention_forward_kernel[ctx.grid](*inputs, y, lse, *sizes, **cached_attention_launch(tile_rows, h))
        ctx.save_for_backward(q, k, v, filled, buffer, y, lse)
        return y

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """(B, C, H, h) -> gradients of q, k and v"""
        q, k, v, filled, buffer, y, lse = ctx.saved_tensors
        B, C, _, h = q.shape
        _, K, _, tile_rows = ctx.shape
        launch = cached_attention_launch(tile_rows, h)
        scale = score_scale(h)
        d_y = d_y.contiguous()
        d_q = torch.empty_like(q)
        d_k = torch.empty_like(k)
        d_v = torch.empty_like(v)
        delta = torch.empty_like(lse)

        inputs = (q, k, v, *buffer, filled, y, lse, d_y)
        cached_attention_query_backward_kernel[ctx.grid](
            *inputs, d_q, delta, C, buffer.size(3), scale, *ctx.shape, **launch
        )
        launch["num_stages"] = 1  # its loop is too short to fetch ahead
        cached_attention_kv_backward_kernel[(B, K, triton.cdiv(C, TILE_TOKENS))](
            q, k, v, lse, d_y, delta, d_k, d_v, C, scale, *ctx.shape, **launch
        )
        return d_q, d_k, d_v, None, None


# ---- Loss kernel ----
#
# A program holds all logits of one token, so that they are read once forward and once backward.


@jit
def softcap_logits(z, cap: tl.constexpr):
    """cap * tanh(z / cap) in fp32, with tanh(x) = 1 - 2 / (1 + exp(2 x)); z itself if cap is 0."""
    z = z.to(tl.float32)
    return cap - 2 * cap / (1 + tl.exp2(z * (2 * LOG2_E / cap))) if cap > 0 else z


@jit
def loss_kernel(
    z_ptr,
    targets_ptr,
    nll_ptr,  # in the backward pass its gradient, an input
    lse_ptr,
    d_z_ptr,
    backward: tl.constexpr,
    vocab: tl.constexpr,
    cap: tl.constexpr,
    cols: tl.constexpr,
):
    """A token's negative log-likelihood and the log-sum-exp of its logits, in nats. Backward: from the gradient of the
    former to that of the uncapped logits z. `cols`: the vocabulary, rounded up to a power of 2."""
    token = tl.program_id(0).to(tl.int64)  # as token * vocab may need more than 32 bits
    col = tl.arange(0, cols)
    target = tl.load(targets_ptr + token)
    z_ptr += token * vocab
    logits = softcap_logits(tl.load(z_ptr + col, col < vocab, 0.0), cap)  # (cols,)

    if backward:
        dlogits = tl.exp2((logits - tl.load(lse_ptr + token)) * LOG2_E) - tl.where(col == target, 1.0, 0.0)
        if cap > 0:
            dlogits *= 1 - (logits / cap) * (logits / cap)  # from capped to uncapped logits
        dlogits = (dlogits * tl.load(nll_ptr + token)).to(d_z_ptr.dtype.element_ty)
        tl.store(d_z_ptr + token * vocab + col, dlogits, col < vocab)
    else:
        logits = tl.where(col < vocab, logits, MASKED)
        row_max = tl.max(logits, 0)
        lse = row_max + tl.log2(tl.sum(tl.exp2((logits - row_max) * LOG2_E), 0)) / LOG2_E
        tl.store(lse_ptr + token, lse)
        tl.store(nll_ptr + token, lse - softcap_logits(tl.load(z_ptr + target), cap))


class FusedLoss(torch.autograd.Function):
    """`loss_reference`, by the kernel above."""

    @staticmethod
    def forward(ctx, z: Tensor, targets: Tensor, cap: float) -> Tensor:
        """Uncapped logits (N, V), targets (N,) -> negative log-likelihoods (N,), nats"""
        N, V = z.shape
        nll, lse = torch.empty(2, N, device=z.device).unbind()
        ctx.launch = dict(vocab=V, cap=cap, cols=1 << (V - 1).bit_length(), num_warps=8)
        unused = z  # in place of its gradient
        loss_kernel[(N,)](z, targets, nll, lse, unused, False, **ctx.launch)
        ctx.save_for_backward(z, targets, lse)
        return nll

    @staticmethod
    def backward(ctx, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        """(N,) -> gradient of z"""
        z, targets, lse = ctx.saved_tensors
        d_z = torch.empty_like(z)
        loss_kernel[(len(z),)](z, targets, d_nll.contiguous(), lse, d_z, True, **ctx.launch)
        return d_z, None, None


# ---- MLP kernel ----
#
# The activation is applied while a product is still in registers: the hidden layer, MLP_MULT times as wide as x, is
# written and read once less in each direction. Hopper's tensor memory accelerator (TMA) moves the tiles; it knows the
# bounds of its tensors, so that nothing here needs a mask.

MLP_TILE = 128  # rows and columns of a tile of the result
MLP_STEP = 32  # slice of the summed dimension that one step takes


@jit
def mlp_kernel(
    x,
    w,
    h,
    out,
    cols: tl.constexpr,
    depth: tl.constexpr,
    backward: tl.constexpr,
    slope: tl.constexpr,
    tile: tl.constexpr,
    step: tl.constexpr,
):
    """A tile of x w^T, with x (N, depth), w (cols, depth), h and out (N, cols) given as tensor descriptors.

    Forward, x w^T is h, and out is LeakyReLU(h)^2. Backward, x is d_y, w is down^T and h an input: x w^T is then the
    gradient of LeakyReLU(h)^2, and out that of h."""
    tiles_across = tl.cdiv(cols, tile)
    row = tl.program_id(0) // tiles_across * tile
    col = tl.program_id(0) % tiles_across * tile
    y = tl.zeros([tile, tile], tl.float32)
    for k in range(0, depth, step):
        y = tl.dot(x.load([row, k]), w.load([col, k]).T, y)

    if backward:
        hidden = h.load([row, col]).to(tl.float32)
        y *= tl.where(hidden > 0, 2 * hidden, 2 * slope * slope * hidden)
    else:
        h.store([row, col], y.to(h.dtype))
        y *= tl.where(y > 0, y, slope * slope * y)
    out.store([row, col], y.to(out.dtype))


def launch_mlp(x: Tensor, w: Tensor, h: Tensor, out: Tensor, backward: bool, slope: float) -> None:
    """`mlp_kernel` on x (N, D), w (W, D), h (N, W), out (N, W)."""
    N, D = x.shape
    W = len(w)
    tiles = triton.cdiv(N, MLP_TILE) * triton.cdiv(W, MLP_TILE)
    descriptors = (
        TensorDescriptor.from_tensor(x, [MLP_TILE, MLP_STEP]),
        TensorDescriptor.from_tensor(w, [MLP_TILE, MLP_STEP]),
        TensorDescriptor.from_tensor(h, [MLP_TILE, MLP_TILE]),
        TensorDescriptor.from_tensor(out, [MLP_TILE, MLP_TILE]),
    )
    mlp_kernel[(tiles,)](*descriptors, W, D, backward, slope, MLP_TILE, MLP_STEP, num_warps=4, num_stages=4)


class FusedMLP(torch.autograd.Function):
    """The kernel above and the products around it; the reference is in `MLP.forward`."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        """(N, D), (W, D), (D, W) -> (N, D)"""
        h = x.new_empty(len(x), len(up))  # (N, W)
        a = x.new_empty(len(x), len(up))  # (N, W), activated
        launch_mlp(x, up, h, a, False, slope)
        ctx.save_for_backward(x, up, down, h, a)
        ctx.slope = slope
        return a @ down.mT

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """(N, D) -> gradients of x, up and down"""
        x, up, down, h, a = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_h = torch.empty_like(h)
        launch_mlp(d_y, down.mT.contiguous(), h, d_h, True, ctx.slope)
        return d_h @ up, d_h.mT @ x, d_y.mT @ a, None


# ---- Input mix kernel ----
#
# Only the backward pass of `mix_reference` needs a kernel. The gradient of the mix is a sum over tokens, for which
# compiled code would read all inputs twice more; the compiled forward pass is as fast as it can be.

MIX_PROGRAMS = 1056  # eight for each of a Hopper's 132 multiprocessors
MIX_ROWS = 2  # tokens that a program takes at a time


@jit
def mix_backward_kernel(
    x_ptr,
    x0_ptr,
    mix_ptr,
    scale_ptr,
    d_mixed_ptr,
    d_normalised_ptr,
    d_gate_input_ptr,
    d_x_ptr,
    d_x0_ptr,
    d_mix_ptr,
    tokens,
    gate_width: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    """From the gradients of the three outputs of `mix_reference` to those of x, x0 and the mix; for the mix, every
    program writes its own sum (2, width). `cols`: the width, rounded up to a power of 2."""
    col = tl.arange(0, cols)[None, :]  # (1, cols)
    keep = tl.load(mix_ptr + col, col < width, 0.0)
    add = tl.load(mix_ptr + width + col, col < width, 0.0)
    d_keep = tl.zeros([1, cols], tl.float32)
    d_add = tl.zeros([1, cols], tl.float32)
    scale = tl.load(scale_ptr)

    for first in range(tl.program_id(0) * rows, tokens, tl.num_programs(0) * rows):
        row = first + tl.arange(0, rows)[:, None]  # (rows, 1)
        offsets = row * width + col  # (rows, cols)
        inside = (row < tokens) & (col < width)
        x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
        x0 = tl.load(x0_ptr + offsets, inside, 0.0).to(tl.float32)
        d_normalised = tl.load(d_normalised_ptr + offsets, inside, 0.0).to(tl.float32)
        in_gate = inside & (col < gate_width)
        d_normalised += tl.load(d_gate_input_ptr + row * gate_width + col, in_gate, 0.0).to(tl.float32)

        mixed = keep * x + add * x0
        inverse_rms = tl.rsqrt(tl.sum(mixed * mixed, 1) / width + EPSILON)[:, None]  # (rows, 1)
        along = tl.sum(mixed * d_normalised, 1)[:, None] / width * inverse_rms * inverse_rms
        d_mixed = tl.load(d_mixed_ptr + offsets, inside, 0.0).to(tl.float32)
        d_mixed = d_mixed + scale * inverse_rms * (d_normalised - mixed * along)

        tl.store(d_x_ptr + offsets, (keep * d_mixed).to(d_x_ptr.dtype.element_ty), inside)
        tl.store(d_x0_ptr + offsets, (add * d_mixed).to(d_x0_ptr.dtype.element_ty), inside)
        d_keep += tl.sum(d_mixed * x, 0)[None, :]
        d_add += tl.sum(d_mixed * x0, 0)[None, :]

    d_mix_ptr += tl.program_id(0) * 2 * width + col
    tl.store(d_mix_ptr, d_keep, col < width)
    tl.store(d_mix_ptr + width, d_add, col < width)


class FusedMix(torch.autograd.Function):
    """`mix_reference`, with the kernel above as its backward pass."""

    @staticmethod
    def forward(
        ctx, x: Tensor, x0: Tensor, mix: Tensor, scale: Tensor, gate_width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D), (B, T, D), (2, D), () -> (B, T, D), (B, T, D), (B, T, gate_width)"""
        ctx.save_for_backward(x, x0, mix, scale)
        mixed, normalised, gate_input = mix_reference(x, x0, mix, scale, gate_width)
        return mixed, normalised, gate_input.contiguous()

    @staticmethod
    def backward(ctx, d_mixed: Tensor, d_normalised: Tensor, d_gate_input: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the outputs -> gradients of x, x0 and mix"""
        x, x0, mix, scale = ctx.saved_tensors
        D = x.size(-1)
        d_x = torch.empty_like(x)
        d_x0 = torch.empty_like(x)
        d_mix = x.new_empty(MIX_PROGRAMS, 2, D, dtype=mix.dtype)
        inputs = [t.contiguous() for t in (x, x0, mix, scale, d_mixed, d_normalised, d_gate_input)]
        mix_backward_kernel[(MIX_PROGRAMS,)](
            *inputs,
            d_x,
            d_x0,
            d_mix,
            x.numel() // D,
            d_gate_input.size(-1),
            D,
            MIX_ROWS,
            1 << (D - 1).bit_length(),
            num_warps=2,
        )
        return d_x, d_x0, d_mix.sum(0), None, None


# ---- Trellis kernel ----
#
# A search goes row by row, with too little work in each row for a launch of its own: one program walks a whole column.


@jit
def nearest_in_coset_tile(v, coset):
    """The integer nearest to v that is `coset` modulo 4."""
    return coset + 4.0 * tl.floor((v - coset) / 4.0 + 0.5)


@jit
def predecessor(state, bit, states: tl.constexpr, h0: tl.constexpr, h1: tl.constexpr):
    """The state before `state`, if bit 1 of the integer in between is `bit`: see `Trellis.predecessors`."""
    parity = state // (states // 2)
    shifted = state ^ (parity * (h0 >> 1)) ^ (bit * (h1 >> 1))
    return (shifted << 1) | parity


@jit
def viterbi_kernel(
    v_ptr,
    live_ptr,
    choices_ptr,
    integers_ptr,
    length,
    states: tl.constexpr,
    h0: tl.constexpr,
    h1: tl.constexpr,
):
    """`viterbi_reference`, with a program for each column of `length` rows. Choices (n, length) int64 are memory for
    tracing back: bit s is the bit by which the best path reached state s."""
    begin = tl.program_id(0) * length
    state = tl.arange(0, states)  # (states,)
    parity = state // (states // 2)
    before_0 = predecessor(state, 0, states, h0, h1)
    before_1 = predecessor(state, 1, states, h0, h1)
    cost = tl.where(state == 0, 0.0, 1e30)  # (states,) of the best path to each: paths begin in state 0
    for i in range(length):
        v = tl.load(v_ptr + begin + i)
        live = tl.load(live_ptr + begin + i)
        error_0 = v - nearest_in_coset_tile(v, parity)
        error_1 = v - nearest_in_coset_tile(v, parity + 2)
        path_0 = tl.gather(cost, before_0, 0) + error_0 * error_0
        path_1 = tl.gather(cost, before_1, 0) + error_1 * error_1
        choice = (path_1 < path_0).to(tl.int64)
        tl.store(choices_ptr + begin + i, tl.sum(choice << state, 0))
        cost = tl.where(live != 0, tl.minimum(path_0, path_1), cost)

    tl.debug_barrier()  # the threads that read choices are not those that wrote them
    at = tl.argmin(cost, 0)  # the state of the best path, from the last row back to the first
    for step in range(length):
        i = length - 1 - step
        v = tl.load(v_ptr + begin + i)
        live = tl.load(live_ptr + begin + i)
        bit = ((tl.load(choices_ptr + begin + i) >> at) & 1).to(tl.int32)
        last_parity = at // (states // 2)
        k = nearest_in_coset_tile(v, last_parity + 2 * bit)
        tl.store(integers_ptr + begin + i, tl.where(live != 0, k, 0.0))
        at = tl.where(live != 0, predecessor(at, bit, states, h0, h1), at)


def viterbi(v: Tensor, live: Tensor, trellis: Trellis) -> Tensor:
    """`viterbi_reference`, by a kernel."""
    n, length = v.shape
    choices = torch.empty(n, length, dtype=torch.int64, device=v.device)
    integers = torch.empty_like(v)
    h0, h1 = TRELLISES[trellis.states]
    viterbi_kernel[(n,)](v, live.to(torch.int8), choices, integers, length, trellis.states, h0, h1, num_warps=1)
    return integers


# ======================================================================================================================
# Appendix: CUDA graphs


class CapturedGraph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # where the graph reads its inputs
    result: Any  # tensors that every replay overwrites

    def copy_inputs(self, inputs: Sequence[Tensor]) -> None:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)


class CUDAGraphs:
    """Calls `work(*inputs)` as CUDA graphs: without them, a GPU would wait for Python to launch thousands of small
    kernels, one by one.

    There is one graph for each combination of key and input shapes:
    - the first call runs `work` as it is, a warm-up: kernels are compiled, and lasting tensors are created;
    - the second call captures: it records the kernels that `work` launches, with the addresses that they read and
      write, and then replays them once;
    - every later call copies its inputs to the addresses of the captured ones and replays. No line of `work` runs: it
      must be the same work as during the capture.

    Rules for callers:
    - Whatever outlives a call (weights, gradients, caches) changes in place. A graph knows addresses: if a name is
      bound to a new tensor, the graph still uses the old one.
    - `work` never waits for the GPU, as `.item()` does to read a number back: no capture allows that.
    - Python numbers and flags keep their values of the capture. One that changes from call to call belongs in the key.
    - A result is used or copied before the next call with the same key and shapes, which overwrites it.

    Inputs are copied, since each call brings new tensors. What `work` closes over is not: a replay reads it where it
    lay during the capture. Weights and caches are closed over for that reason, and so is the result of another captured
    call if `work` differentiates it: a copy would be cut off from its gradients.
    """

    def __init__(self):
        self.graphs: dict[Any, CapturedGraph | None] = {}  # by key and shapes; None: warmed up, not yet captured
        self.memory = torch.cuda.graph_pool_handle()  # one pool for all graphs
        self.stream = torch.cuda.Stream()  # for the warm-up too: autograd keeps using the stream that it met first

    def __call__(self, key: Any, work: Callable[..., Any], *inputs: Tensor) -> Any:
        key = (key, *(x.shape for x in inputs))
        with self.on_stream():
            if key not in self.graphs:
                # On clones, which have the same memory alignment as those of the capture: for another alignment, Triton
                # would recompile a kernel, and a capture does not allow that.
                result = work(*(x.clone() for x in inputs))
                self.graphs[key] = None
            else:
                captured = self.graphs[key]
                if captured is None:
                    captured = self._capture(work, inputs)
                    self.graphs[key] = captured
                else:  # not right after the capture: autograd would refuse a later backward pass if inputs had changed
                    captured.copy_inputs(inputs)
                captured.graph.replay()
                result = captured.result
        return result

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Inside, kernels are launched on the stream of the graphs. Work that is never captured belongs there too if it
        takes gradients of what captured work learns: autograd keeps using the stream that it met first."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, work: Callable[..., Any], inputs: Sequence[Tensor]) -> CapturedGraph:
        graph = torch.cuda.CUDAGraph()
        own_inputs = [x.clone() for x in inputs]
        with torch.cuda.graph(graph, self.memory, self.stream, capture_error_mode="thread_local"):
            result = work(*own_inputs)
        return CapturedGraph(graph, own_inputs, result)


# ======================================================================================================================
# Main: the run in one page, signals and exit status.


def run_experiment(check_only: bool, ending: Ending) -> None:
    """Read the settings, meet the other ranks, and do the experiment as the only run of this RUN_ID."""
    model_config, run = read_env()
    dist = Dist.from_env(run.device)
    ending.world = dist.world
    dist.join(ending.after_a_loss)
    check_ranks_begin_alike(dist, run, check_only)
    check_ranks_compute_alike(dist)
    prepare_torch(run, dist.device)
    run_id = choose_run_id(run, dist)

    with contextlib.ExitStack() as stack:
        if dist.main and check_only:
            require_free(run_id)
        elif dist.main:
            ending.leftovers.append(stack.enter_context(reserve_run_id(run_id, new=not run.run_id)))
            stack.callback(ending.leftovers.clear)
        do_experiment(model_config, run, dist, run_id, check_only)
        dist.close()


def do_experiment(model_config: ModelConfig, run: RunConfig, dist: Dist, run_id: str, check_only: bool) -> None:
    """Check the settings; train, quantise and pack; read the artifact back, score it and report."""
    watch = Stopwatch(dist)

    with watch.phase("load"):
        setup = make_setup(model_config, run, dist)
        check_ranks_agree(setup)
        check_setup(setup)  # before the log is opened: a refused run leaves the files of its name alone
    log = open_log(run_id, dist, write_files=not check_only)
    describe_run(setup, run_id, log)
    describe_setup(setup, log)
    if check_only:
        log.line("checked: this run can start")
        return

    result = {"run_id": run_id, "seed": run.seed, "code_sha256": hashlib.sha256(code()).hexdigest()}
    result["knobs"] = settings(setup.model, setup.run)
    how_to_score = ""
    prequant_nats = None
    if run.artifact:
        artifact = Path(run.artifact)
    else:
        artifact = LOGS / f"{run_id}.ptz"
        trained, prequant_nats = train_and_pack(setup, log, watch, artifact)
        result |= trained
        command = command_line(setup, ARTIFACT=str(artifact), RESUME="", RUN_ID="")  # under a name of its own
        how_to_score = f"the artifact is in {artifact}; this scores it: {command}"
    with advice(how_to_score):
        scores, documents = evaluate(setup, log, watch, artifact, prequant_nats)
    result |= scores
    if dist.main:  # other machines have no artifact
        result |= describe_artifact(artifact, result["artifact_sha256"])
        result |= {"versions": versions(), "artifact_parts": part_bytes(artifact)}
        result |= {"world_size": dist.world, "device": device_name(dist.device)}
        report_overruns(run, result, log)
        result["phases"] = {name: round(seconds, 3) for name, seconds in watch.seconds.items()}
        report(result, documents, watch, log, LOGS / f"{run_id}.json")
        let_go_of_screen()


def let_go_of_screen() -> None:
    """Drop lines that stdout does not take: they would end Python with status 120, although the files are complete."""
    if sys.stdout is None:  # started without one (`>&-`)
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_run_id(run: RunConfig, dist: Dist) -> str:
    """RUN_ID, or rank 0's time of day: ranks whose clocks differ must name the same files. A number is added if files
    have that name, as when the clock was set back."""
    now = time.strftime("%Y%m%d_%H%M%S")
    unused = now
    number = 1
    while files_of(unused):
        number += 1
        unused = f"{now}_{number}"
    unused = dist.broadcast_bytes(unused.encode()).decode()
    return run.run_id or unused


def files_of(run_id: str) -> set[Path]:
    """The files in logs/ of runs with this name, which has no wildcards."""
    return set(LOGS.glob(f"{run_id}.*"))


@contextlib.contextmanager
def reserve_run_id(run_id: str, new: bool = False) -> Iterator[Path]:
    """Inside, no other process runs under this RUN_ID: two would write one log, and one could score the other's
    artifact. Raises ConfigError if another does; with `new`, also if one did. -> the file that is locked and then
    removed.

    The system releases the lock when this process ends, however it ends, and no child inherits it. The file that a
    killed process leaves behind does no harm: the next run of this name takes it over.
    """
    path = LOGS / f"{run_id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = lock_run(path, run_id)
    try:
        taken = new and files_of(run_id) != {path}
        require(not taken, f"another run has just been named {run_id}, after the time; start again, or set RUN_ID")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield path
    finally:
        path.unlink(missing_ok=True)  # before the lock is released: afterwards the file may be another run's
        os.close(handle)


def require_free(run_id: str) -> None:
    """Raise ConfigError if a process runs under this RUN_ID. Writes nothing."""
    path = LOGS / f"{run_id}.lock"
    if path.exists():
        os.close(lock_run(path, run_id))


def lock_run(path: Path, run_id: str) -> int:
    """Lock the file of a run -> its descriptor. Raises ConfigError if another process has locked it."""

    def in_use(handle: int) -> ConfigError:
        holder = re.match(rb"process \d+ on [\w.-]+", os.pread(handle, 200, 0))
        return ConfigError(
            f"RUN_ID={run_id} is in use: {holder[0].decode() if holder else 'another process'} runs under it "
            f"({path} is locked); wait for it, end it, or set another RUN_ID"
        )

    def without_locks(reason: str) -> None:
        print(f"warning: {path} cannot be locked: {reason}; do not run RUN_ID={run_id} twice", file=sys.stderr)

    return lock_file(path, in_use, without_locks)


def lock_file(path: Path, in_use: Callable[[int], UserError], without_locks: Callable[[str], None]) -> int:
    """Open and lock a file -> its descriptor. If another process, here or on another machine that shares the folder,
    has locked it, raises the error that `in_use` makes of the descriptor. If the file system has no locks,
    `without_locks` gets the reason."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = in_use(handle)
            os.close(handle)
            raise error from None
        except OSError as error:  # not all file systems have locks
            without_locks(error.strerror)
            return handle

        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # of a file that its last owner has removed meanwhile


def open_log(run_id: str, dist: Dist, write_files: bool) -> Log:
    if not dist.main:
        return Log()
    return Log(LOGS / f"{run_id}.txt" if write_files else None, screen=print_now)


INTERRUPTED = 130  # exit status of Ctrl-C
RANK_LOST = 3  # exit status


class Ending:
    """How the process ends. The main thread, the one that watches the ranks and the one that a signal wakes may all try
    to end it at once: the first says why, in one line."""

    def __init__(self):
        self.world = 1  # ranks of the run
        self.loss = ""  # which rank is lost
        self.begun = False  # once true, signals no longer interrupt
        self.leftovers: list[Path] = []  # files to remove
        self.first = threading.Lock()

    def say(self, line: str) -> None:
        """Say why the process ends, unless that has been said."""
        self.begun = True
        if self.first.acquire(blocking=False):
            with contextlib.suppress(OSError):  # the terminal may be closed
                print(line, file=sys.stderr, flush=True)

    def exit_now(self, status: int) -> None:
        """End the process, whatever its threads are waiting for."""
        for path in (*LOGS.rglob(f".*.{os.getpid()}.partial"), *self.leftovers):
            path.unlink(missing_ok=True)
        os._exit(status)

    def after_a_loss(self, line: str) -> None:
        """Interrupt the main thread; called by the thread that watches the ranks."""
        self.loss = line
        os.kill(os.getpid(), signal.SIGTERM)

    def after_a_signal(self, number: int = signal.SIGINT) -> int:
        """Say what interrupts the process -> exit status."""
        if self.loss:
            self.say(f"error: {self.loss}")
            return RANK_LOST
        if number == signal.SIGTERM and self.world > 1:
            self.say(f"error: ended by SIGTERM, as by torchrun once a rank has failed; {WHERE_TO_LOOK}")
        else:
            self.say("interrupted")
        return INTERRUPTED


def ending_signals() -> list[signal.Signals]:
    """Those that end a run: Ctrl-C, SIGTERM and a terminal that closes, unless that is ignored, as under nohup."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


def install_signal_handlers(ending: Ending, grace_s: float = 3.0) -> None:
    """Make the signals that end a run raise KeyboardInterrupt, with the signal's number. A rank that waits in a
    collective never runs Python's handler, so after `grace_s` a thread ends the process, whatever it is doing."""
    numbers = ending_signals()

    def interrupt(number: int, frame: Any) -> None:
        if not ending.begun:
            raise KeyboardInterrupt(number)

    for number in numbers:
        signal.signal(number, interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def end_after_grace() -> None:
        number = 0
        while number not in numbers:
            number = os.read(reader, 1)[0]  # the C handler writes the signal's number, even while Python is blocked
        time.sleep(grace_s)
        ending.exit_now(ending.after_a_signal(number))

    threading.Thread(target=end_after_grace, daemon=True).start()


def print_advice(error: BaseException) -> None:
    """Print what `advice` attached to the exception."""
    with contextlib.suppress(OSError):  # the terminal may be closed
        for note in vars(error).get("__notes__", []):
            print(printable(note, most=1 << 16), file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """-> exit status: 0; 1 for an error of the program; 2 for what a user can fix; 3 when another rank was lost; 130
    when interrupted."""
    if arguments in (["--help"], ["-h"]):
        with contextlib.suppress(OSError):  # nobody may read on, as after `| head -1`
            print_now(describe_knobs())
        let_go_of_screen()
        return 0
    if arguments not in ([], ["--check-setup"]):
        print(f"unknown argument {arguments[0]!r}; settings are environment variables, see --help", file=sys.stderr)
        return 2

    ending = Ending()
    install_signal_handlers(ending)
    try:
        status = run_to_the_end(arguments == ["--check-setup"], ending)
    except KeyboardInterrupt as interruption:  # also while an error was about to be reported
        status = ending.after_a_signal(*interruption.args)
        print_advice(interruption)
    ending.begun = True
    if status and ending.world > 1:
        ending.exit_now(status)  # a normal exit would wait for threads, and these for other ranks
    return status


def run_to_the_end(check_only: bool, ending: Ending) -> int:
    """Run, and report an error -> exit status."""
    try:
        run_experiment(check_only, ending)
    except FOR_THE_USER as error:
        ending.say(error_line(error))
        print_advice(error)
        return 2
    except Exception:
        ending.begun = True
        sys.excepthook(*sys.exc_info())  # as if it had not been caught
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
