"""
A lossless compressor: an artifact's predictions, including test-time training, drive an arithmetic coder.

A document is tokenised. Every token, and the BOS that ends the document, is coded with the probability that the scorer
gives it. Once a chunk is known to both sides, the model learns from it. If the tokenizer does not restore the text
exactly, edits to the decoded text are stored too, so that any input round-trips byte for byte.

    magic (4) | length of the header (2, little-endian) | header: JSON, deflated | edits | coded tokens
    | BLAKE2b-64 of everything before (8)

Sections: Predictor, Text, Edits, Coding, Files, Commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import zstandard
from torch import Tensor

import train_gpt
from data.prepare import decode_caseops, encode_caseops
from tools.artifact import checked_knobs, knobs_of_run
from tools.coder import Decoder, Encoder, intervals
from tools.progress import Progress
from tools.values import printable
from train_gpt import BOS, DataError, UserError, require

MAX_BYTES = 1 << 26  # of a text, and of all its edits together

# -----------------------------------------------------------------------------
# Predictor: an artifact, its tokenizer, and the knobs of test-time training. Nothing else is read.

DATA_KNOBS = ("DATA_PATH", "TOKENIZER_PATH")  # where the tokenizer is
CODING_KNOBS = ("EVAL_SEQ_LEN", "SEED")  # together with the TTT_ knobs they determine the predictions
FIXED_KNOBS = {
    "COMPILE": "1",  # a GPU's graphs belong to the format
    "RESUME": "",
    "EVAL_STRIDE": "1",
}  # coding does not use the stride, but it may not exceed the context
STRIDE = train_gpt.RunConfig().eval_stride  # of a score without adaptation
NO_DOCUMENTS = train_gpt.split_documents(np.zeros(0, np.uint16), np.zeros(0, np.int64))


class Predictor(NamedTuple):
    model: train_gpt.GPT
    run: train_gpt.RunConfig
    tokenizer: train_gpt.Tokenizer
    sha256: str  # of the artifact
    device: torch.device


def open_predictor(path: Path, knobs: Mapping[str, str] | None = None, device: str = "cpu") -> Predictor:
    """Open an artifact on `device`, a value of the knob DEVICE. The other knobs are `knobs` if given; else each comes
    from the environment, else from the run that made the artifact, else from its default. The only data needed is the
    tokenizer. Raises UserError."""
    env = knobs_of_run(path, os.environ) | dict(os.environ)
    if knobs is not None:
        env = {name: env[name] for name in DATA_KNOBS if name in env} | dict(knobs)
        env["MICRO_BATCH_TOKENS"] = str(LARGEST_KNOBS["EVAL_SEQ_LEN"])  # unused here, but no context may be longer
    _, run = train_gpt.read_env(env | {"ARTIFACT": str(path), "DEVICE": device} | FIXED_KNOBS)
    dist = train_gpt.Dist.from_env(run.device, {})  # a single process, whatever torchrun may have set
    blob = train_gpt.read_file(path)
    header, _ = train_gpt.read_header(blob, str(path))
    config = train_gpt.stored_config(header["meta"], str(path))
    run = train_gpt.decide_optimizer(run, header, str(path))
    tokenizer = train_gpt.load_tokenizer(run, config.vocab_size)
    if dist.device.type == "cuda":
        train_gpt.check_gpu(config, dist.device)
        train_gpt.prepare_torch(run, dist.device)
    setup = train_gpt.Setup(config, run, dist, tokenizer, NO_DOCUMENTS, None)
    model = train_gpt.load_artifact(path, setup).requires_grad_(False)
    return Predictor(model, run, tokenizer, hashlib.sha256(blob).hexdigest(), dist.device)


def affects_coding(knob: str) -> bool:
    return knob in CODING_KNOBS or knob.startswith("TTT_")


def knobs_to_store(predictor: Predictor) -> dict[str, str]:
    """What a decoder must set: the knobs that affect predictions and differ from their defaults."""
    run = predictor.run
    defaults = train_gpt.settings(train_gpt.RunConfig(ttt_optimizer=run.ttt_optimizer))
    defaults["TTT_OPTIMIZER"] = "adamw" if predictor.model.gradient_rms is None else "rms"  # as the decoder decides
    knobs = train_gpt.settings(run)
    return {name: value for name, value in knobs.items() if affects_coding(name) and value != defaults.get(name)}


def make_deterministic(threads: int) -> None:
    """From now on, the same sum is always computed in the same order."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def build(device: torch.device) -> str:
    """Software and instruction set: what else affects a prediction's bits, beside artifact, knobs, GPU or threads."""
    instructions = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        triton = train_gpt.triton.__version__ if train_gpt.triton else "none"
        instructions = f"CUDA {torch.version.cuda}, Triton {triton}"
    entry = hashlib.sha256(train_gpt.code()).hexdigest()[:8]
    return f"torch {torch.__version__}, {instructions}, entry {entry}"


# -----------------------------------------------------------------------------
# Text: from the bytes of a document to tokens. Decoding the tokens may give a different text.


def uses_caseops(predictor: Predictor) -> bool:
    """Whether the tokenizer expects transformed text."""
    return train_gpt.transform_of(Path(predictor.run.data_path), predictor.tokenizer) == "caseops"


def to_tokens(predictor: Predictor, caseops: bool, text: str) -> list[int]:
    """The tokens of a text, and a final BOS."""
    tokens = predictor.tokenizer.processor.encode(encode_caseops(text) if caseops else text)
    return [token for token in tokens if token != BOS] + [BOS]


def to_bytes(predictor: Predictor, caseops: bool, tokens: list[int]) -> bytes:
    """The text of these tokens, the last of which must be BOS."""
    text = predictor.tokenizer.processor.decode(tokens[:-1])
    return (decode_caseops(text) if caseops else text).encode()


class Stretch(NamedTuple):
    """A part of a document: text, and the non-UTF-8 bytes that follow it."""

    text: str
    raw: bytes


def split_stretches(document: bytes) -> list[Stretch]:
    """Cut a document wherever valid UTF-8 starts or stops. If more than a tenth is not UTF-8, none of it counts as
    text."""
    decoded = document.decode(errors="surrogateescape")  # a non-UTF-8 byte becomes U+DC80 to U+DCFF
    parts = [*re.split("([\udc80-\udcff]+)", decoded), ""]
    stretches = [
        Stretch(text, raw.encode(errors="surrogateescape")) for text, raw in zip(parts[::2], parts[1::2], strict=True)
    ]
    if 10 * sum(len(stretch.raw) for stretch in stretches) > len(document):
        return [Stretch("", document)]
    return stretches


# -----------------------------------------------------------------------------
# Edits: turn one byte string into another.

EDIT_PASSES = 2  # one for what the tokenizer lost, one for non-UTF-8 bytes
MAX_EDITS = 1 << 20  # in a file; a few bytes of a zstd frame could claim millions, and each takes 100 bytes of memory
MATCH_BYTES = 8  # two strings match again where this many bytes are equal...
LOOK_AHEAD = 4096  # ...within this distance


class Edit(NamedTuple):
    """Copy bytes, skip bytes, insert bytes."""

    same: int  # bytes to copy
    dropped: int  # bytes to skip next
    added: bytes


def find_edits(source: bytes, target: bytes) -> list[Edit]:
    """Edits that turn `source` into `target`, found greedily from left to right: always correct, and short if the
    differences are small."""
    edits = []
    a = b = 0
    while True:
        same = common_prefix(source, a, target, b)
        a += same
        b += same
        if a == len(source) and b == len(target):
            return edits

        next_a, next_b = next_match(source, a, target, b)
        edits.append(Edit(same, next_a - a, target[b:next_b]))
        a, b = next_a, next_b


def common_prefix(x: bytes, a: int, y: bytes, b: int) -> int:
    """How many bytes of x[a:] and y[b:] agree."""
    same = 0
    size = 64  # bytes compared at a time, doubled while all are equal
    while True:
        part = x[a + same : a + same + size]
        other = y[b + same : b + same + size]
        if part != other or not part:
            return same + len(os.path.commonprefix([part, other]))
        same += len(part)
        size *= 2


def next_match(source: bytes, a: int, target: bytes, b: int) -> tuple[int, int]:
    """The nearest positions, from a and b on, where MATCH_BYTES bytes agree; if none do, a few bytes ahead in both."""
    step = 4 * MATCH_BYTES
    best = min(a + step, len(source)), min(b + step, len(target))
    if best[0] == len(source):
        best = len(source), len(target)

    nearest = LOOK_AHEAD
    for dropped in range(min(step, len(source) - a - MATCH_BYTES + 1)):
        anchor = source[a + dropped : a + dropped + MATCH_BYTES]
        added = target.find(anchor, b, b + LOOK_AHEAD) - b
        if added >= 0 and added + dropped < nearest:
            nearest = added + dropped
            best = a + dropped, b + added
    return best


def raw_edits(documents: list[list[Stretch]], separator: bytes) -> list[Edit]:
    """Edits that put the raw bytes back into the text of all documents."""
    edits = []
    same = -len(separator)
    for stretches in documents:
        same += len(separator)
        for stretch in stretches:
            same += len(stretch.text.encode())
            if stretch.raw:
                edits.append(Edit(same, 0, stretch.raw))
                same = 0
    return edits


def apply_edits(source: bytes, edits: list[Edit]) -> bytes:
    parts = []
    at = 0
    for edit in edits:
        require(at + edit.same + edit.dropped <= len(source), "an edit lies beyond the text", DataError)
        parts += [source[at : at + edit.same], edit.added]
        at += edit.same + edit.dropped
    return b"".join([*parts, source[at:]])


def to_documents(
    predictor: Predictor, caseops: bool, parts: list[bytes], separator: bytes
) -> tuple[list[list[int]], list[list[Edit]]]:
    """Documents -> the tokens of each, and EDIT_PASSES passes of edits that correct the decoded text."""
    stretches = [split_stretches(part) for part in parts]
    texts = ["".join(stretch.text for stretch in document) for document in stretches]
    documents = [to_tokens(predictor, caseops, text) for text in texts]
    decoded = separator.join(to_bytes(predictor, caseops, tokens) for tokens in documents)
    lost = find_edits(decoded, separator.join(text.encode() for text in texts))
    return documents, [lost, raw_edits(stretches, separator)]


def from_documents(
    predictor: Predictor, caseops: bool, documents: list[list[int]], separator: bytes, passes: list[list[Edit]]
) -> bytes:
    """The inverse of `to_documents`: the bytes of all documents, with the separator between them."""
    data = separator.join(to_bytes(predictor, caseops, tokens) for tokens in documents)
    for edits in passes:
        data = apply_edits(data, edits)
    return data


def varint(value: int) -> bytes:
    """LEB128: seven bits per byte, the lowest first; the last byte is below 128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def pack_edits(passes: list[list[Edit]]) -> bytes:
    """Serialise passes of edits, plain or in a zstd frame, whichever is shorter; no edits give no bytes."""
    if not any(passes):
        return b""
    count = sum(map(len, passes))
    require(count <= MAX_EDITS, f"{count} edits: at most {MAX_EDITS} go into a file; cut the text up", UserError)
    plain = b""
    for edits in passes:
        packed = [varint(e.same) + varint(e.dropped) + varint(len(e.added)) + e.added for e in edits]
        plain += varint(len(edits)) + b"".join(packed)
    frame = zstandard.ZstdCompressor(level=19).compress(plain)
    return min(b"\0" + plain, b"\1" + frame, key=len)


def unpack_edits(data: bytes) -> list[list[Edit]]:
    """The inverse of `pack_edits`. Raises ValueError."""
    if not data:
        return [[]] * EDIT_PASSES
    kind, packed = data[0], data[1:]
    require(kind in {0, 1}, f"edits begin with {kind}")
    if kind == 1:
        packed = train_gpt.decompress(packed, 2 * MAX_BYTES)
    reader = Reader(packed)
    passes = [read_pass(reader) for _ in range(EDIT_PASSES)]
    require(reader.at == len(packed), "edits end early")
    return passes


def read_pass(reader: Reader) -> list[Edit]:
    count = reader.varint()
    require(count <= MAX_EDITS, f"{count} edits are claimed, at most {MAX_EDITS} are expected")
    return [Edit(reader.varint(), reader.varint(), reader.string()) for _ in range(count)]


class Reader:
    """Reads varints and length-prefixed byte strings."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def varint(self) -> int:
        value = shift = 0
        while True:
            require(self.at < len(self.data) and shift < 63, "a number does not end")
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def string(self) -> bytes:
        size = self.varint()
        begin = self.at
        require(begin + size <= len(self.data), "bytes are missing")
        self.at += size
        return self.data[begin : self.at]


# -----------------------------------------------------------------------------
# Coding: documents side by side, chunk by chunk. Encoder and decoder share `code_group`. They differ in how the tokens
# of a chunk become known: the encoder has them and predicts all at once; the decoder decodes one and predicts again. So
# a prediction must not change, not even in its last bit, with the tokens after it, which the decoder does not have yet:
# the encoder checks that. Both run the same pass over the whole chunk and all rows, on a GPU the same CUDA graph,
# because a pass of another shape might round differently.


class Chunk(NamedTuple):
    """The next C tokens of B documents, to be coded."""

    first: int  # position of the chunk in every document
    size: int  # C
    documents: np.ndarray  # (B,) which document each row holds
    last_tokens: np.ndarray  # (B,) the token before the chunk
    active: np.ndarray  # (B,) bool: the row holds a document that has not ended before the chunk
    predict: Callable[[np.ndarray], Tensor]  # inputs (B, C) -> logits (B, C, V), until the next call


class TokenCoder(Protocol):
    def code(self, chunk: Chunk) -> np.ndarray:
        """Code a chunk -> its tokens (B, C), all BOS from the end of a document on."""


def code_group(run: train_gpt.RunConfig, learners: train_gpt.Learners, documents: range, coder: TokenCoder) -> None:
    """Code these documents to their ends, adapting to each, chunk by chunk as the scorer does."""
    device = learners.device
    # One entry per document; the last entries are for rows without one.
    last_tokens = np.full(len(documents) + 1, BOS)
    ended = np.append(np.zeros(len(documents), bool), True)

    def go_on(rows: np.ndarray, _first: int) -> np.ndarray:
        return ~ended[rows]

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def predict(inputs: np.ndarray) -> Tensor:
        return learners.current.predict(on_device(inputs))

    for step in train_gpt.chunk_steps(len(documents), run, device, go_on):
        learner = learners.at(step)
        rows = step.rows
        size = step.run.ttt_chunk_tokens
        active = ~ended[rows]
        before = last_tokens[rows]
        targets = coder.code(Chunk(step.first, size, documents.start + rows, before, active, predict))
        ended[rows] |= (targets == BOS).any(1)
        if ended.all():
            return  # nothing is scored after the last chunk, so there is no need to learn from it

        to_learn = bool(run.ttt_enabled) and step.first + size >= run.ttt_min_doc_tokens
        chunk = learner.score(on_device(inputs_of(before, targets)), on_device(targets), to_learn)
        if to_learn:
            chunk = learner.learn(chunk, on_device(counted(targets, active)))
        learner.advance(chunk)
        last_tokens[rows] = targets[:, -1]


def require_memory(
    config: train_gpt.ModelConfig, run: train_gpt.RunConfig, documents: int, device: torch.device
) -> None:
    """Refuse what this device cannot hold: LoRA with gradients and moments, the logits of a chunk, keys and values, all
    in fp32. Counted twice, for the smaller learners that take over as documents end or reach late chunks."""
    passes = len(train_gpt.layer_plan(config, looping=True))
    widths = 2 * config.model_dim * passes * len(run.lora_targets) + config.model_dim + config.vocab_size
    cached = passes * 2 * config.kv_dim * run.eval_seq_len
    need = (
        2 * documents * (16 * run.ttt_lora_rank * widths + 16 * run.ttt_chunk_tokens * config.vocab_size + 4 * cached)
    )
    have = memory_of(device)
    require(
        need < have,
        f"{documents} documents side by side with TTT_LORA_RANK={run.ttt_lora_rank} need "
        f"{need / 2**30:.1f} GiB of memory, {have / 2**30:.1f} are there: lower TTT_BATCH_DOCS",
        UserError,
    )


def memory_of(device: torch.device) -> int:
    """Total bytes of memory of this device, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def inputs_of(last_tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Targets (B, C) -> inputs (B, C): each target's predecessor."""
    return np.column_stack([last_tokens, targets[:, :-1]])


def counted(targets: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The mask (B, C) of targets that belong to their document: up to and including its first BOS."""
    is_end = targets == BOS
    ends_before = np.cumsum(is_end, 1) - is_end
    return active[:, None] & (ends_before == 0)


class TokenEncoder:
    """Encodes the tokens of documents, each with its final BOS."""

    def __init__(self, documents: Sequence[Sequence[int]], progress: Callable[[int], None]):
        self.documents = documents
        self.progress = progress
        self.encoder = Encoder()
        self.done = 0  # tokens

    def code(self, chunk: Chunk) -> np.ndarray:
        targets = np.full((len(chunk.documents), chunk.size), BOS)
        for row in np.flatnonzero(chunk.active):
            part = self.documents[chunk.documents[row]][chunk.first : chunk.first + chunk.size]
            targets[row, : len(part)] = part

        inputs = inputs_of(chunk.last_tokens, targets)
        logits = chunk.predict(inputs).clone()  # the check predicts again
        self.check_causality(chunk, inputs, logits)

        mask = counted(targets, chunk.active)
        for place in range(chunk.size):  # in the order of decoding
            rows = np.flatnonzero(mask[:, place])
            for row, bounds in zip(rows, intervals(logits[rows, place]), strict=True):
                self.encoder.put(bounds, int(targets[row, place]))
        self.done += int(mask.sum())
        self.progress(self.done)
        return targets

    def check_causality(self, chunk: Chunk, inputs: np.ndarray, logits: Tensor) -> None:
        """Predict as the decoder will, with the chunk known only up to one place that varies by chunk, and compare."""
        place = chunk.first // chunk.size * 5 % chunk.size
        partial = inputs.copy()
        partial[:, place + 1 :] = BOS
        if not torch.equal(chunk.predict(partial)[:, : place + 1], logits[:, : place + 1]):
            raise UserError(
                "on this computer predictions vary with the tokens after them, in their last bits: "
                "nothing could be decoded; try OMP_NUM_THREADS=1, or another build of torch"
            )


class TokenDecoder:
    """Decodes the tokens of documents."""

    def __init__(self, documents: int, tokens: int, data: bytes, progress: Callable[[int], None]):
        self.documents: list[list[int]] = [[] for _ in range(documents)]
        self.tokens = tokens  # of all documents
        self.progress = progress
        self.decoder = Decoder(data)
        self.done = 0  # tokens

    def code(self, chunk: Chunk) -> np.ndarray:
        targets = np.full((len(chunk.documents), chunk.size), BOS)
        active = chunk.active.copy()
        for place in range(chunk.size):
            logits = chunk.predict(inputs_of(chunk.last_tokens, targets))
            self.done += int(active.sum())
            require(self.done <= self.tokens, "more tokens come out than went in", DataError)
            rows = np.flatnonzero(active)
            for row, bounds in zip(rows, intervals(logits[rows, place]), strict=True):
                token = self.decoder.get(bounds)
                self.documents[chunk.documents[row]].append(token)
                targets[row, place] = token
                active[row] = token != BOS
            self.progress(self.done)
            if not active.any():
                break
        return targets


def code_documents(predictor: Predictor, documents: int, coder: TokenCoder) -> None:
    """Code this many documents, TTT_BATCH_DOCS side by side."""
    run = predictor.run
    check_adaptation(run)
    at_a_time = run.ttt_batch_docs
    rows = at_a_time if predictor.device.type == "cuda" else min(at_a_time, documents)
    require_memory(predictor.model.config, run, rows, predictor.device)
    learners = train_gpt.Learners(predictor.model, predictor.device)
    for first in range(0, documents, at_a_time):
        code_group(run, learners, range(first, min(first + at_a_time, documents)), coder)


def check_adaptation(run: train_gpt.RunConfig) -> None:
    require(run.batched_ttt, "text is coded document by document: TTT_PARAMS=lora and TTT_SCOPE=document are needed")


def with_rows_for(predictor: Predictor, documents: int) -> Predictor:
    """The predictor with TTT_BATCH_DOCS cut to what this many documents need to stay side by side to their ends: on a
    GPU an empty row costs as much as a full one. A CPU has no empty rows."""
    if predictor.device.type == "cpu":
        return predictor
    run = predictor.run
    late = train_gpt.late_chunk_tokens(run)
    needed = -(-documents * max(late, run.ttt_chunk_tokens) // run.ttt_chunk_tokens)  # late rows are fewer: chunk_steps
    rows = min(run.ttt_batch_docs, needed)
    return predictor._replace(run=dataclasses.replace(run, ttt_batch_docs=rows))


def encode(predictor: Predictor, documents: Sequence[Sequence[int]], progress: Callable[[int], None]) -> bytes:
    """Tokens of documents, each with its final BOS -> coded bytes."""
    coder = TokenEncoder(documents, progress)
    code_documents(predictor, len(documents), coder)
    return coder.encoder.finish()


def decode(
    predictor: Predictor, documents: int, tokens: int, data: bytes, progress: Callable[[int], None]
) -> list[list[int]]:
    """The inverse of `encode`; `tokens` is the total number over all documents. Raises DataError."""
    coder = TokenDecoder(documents, tokens, data, progress)
    code_documents(predictor, documents, coder)
    return coder.documents


# -----------------------------------------------------------------------------
# Files: a header holds what is needed to read the rest.

MAGIC = b"PGT\x01"
DIGEST_BYTES = 8
MAX_DOCUMENTS = 1 << 20
MAX_HEADER_BYTES = 1 << 16
LARGEST_KNOBS = {  # maxima in a compressed file: they multiply the work that a few bytes can cause
    "TTT_EPOCHS": 16,
    "TTT_LORA_RANK": 1024,
    "TTT_BATCH_DOCS": 4096,
    "TTT_CHUNK_TOKENS": 4096,
    "TTT_LATE_CHUNK_TOKENS": 4096,
    "EVAL_SEQ_LEN": 1 << 17,
}
HEADER = {
    "artifact": str,
    "build": str,
    "caseops": bool,
    "documents": int,
    "edits": int,
    "knobs": dict,
    "split": str,
    "text": str,
    "threads": int,
    "tokens": int,
}
GPU_HEADER = HEADER | {"device": str}  # `device` is the GPU's name; without it, a CPU made the file
DEFLATE_DICTIONARY = (  # part of the format: headers are deflated as if they followed this text
    b'{"artifact":"0123456789abcdef","build":"torch 2.13.0+cu128, AVX2, AVX512, entry ","caseops":true,'
    b'"documents":1,"edits":0,"knobs":{"EVAL_SEQ_LEN":"512","TTT_BATCH_DOCS":"16","TTT_CHUNK_TOKENS":"64",'
    b'"TTT_LORA_ALPHA":"16.0","TTT_LORA_RANK":"8","TTT_LR":"0.001"},"split":"","text":"","threads":1,"tokens":'
)


class Compressed(NamedTuple):
    """A compressed file, and the sizes of its parts."""

    blob: bytes
    header: int  # bytes, magic, length and checksum included
    edits: int  # bytes
    coded: int  # bytes
    tokens: int
    documents: int


class Contents(NamedTuple):
    """A compressed file, checked and parsed."""

    header: dict[str, Any]
    edits: list[list[Edit]]
    coded: bytes


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def compress(predictor: Predictor, data: bytes, separator: bytes = b"") -> Compressed:
    """Code a text as one document, or split into documents at the separator. Raises UserError."""
    parts = data.split(separator) if separator else [data]
    require(
        len(data) <= MAX_BYTES and len(parts) <= MAX_DOCUMENTS,
        f"{len(data)} bytes, {len(parts)} documents: at most {MAX_BYTES} and {MAX_DOCUMENTS} go into a file; cut it up",
        UserError,
    )
    check_adaptation(predictor.run)
    check_work(knobs_to_store(predictor))
    caseops = uses_caseops(predictor)
    documents, passes = to_documents(predictor, caseops, parts, separator)
    predictor = with_rows_for(predictor, len(documents))
    edits = pack_edits(passes)
    tokens = sum(map(len, documents))
    coded = encode(predictor, documents, Progress("compressing", tokens))
    header = {
        "artifact": predictor.sha256[:16],
        "build": build(predictor.device),
        "caseops": caseops,
        "documents": len(documents),
        "edits": len(edits),
        "knobs": knobs_to_store(predictor),
        "split": separator.hex(),
        "text": digest(data),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
    }
    if predictor.device.type == "cuda":
        header["device"] = train_gpt.device_name(predictor.device)
    blob = pack_file(header, edits, coded)
    header_bytes = len(blob) - len(edits) - len(coded)
    return Compressed(blob, header_bytes, len(edits), len(coded), tokens, len(documents))


def reported_bits(predictor: Predictor, texts: Sequence[bytes]) -> float:
    """The bits that the scorer reports for these documents, including the end of each."""
    documents, _ = to_documents(predictor, uses_caseops(predictor), list(texts), b"\0")
    stream = np.array([BOS, *itertools.chain(*documents)], np.uint16)
    docs = train_gpt.Documents(stream, np.ones(len(stream), np.int64), np.flatnonzero(stream == BOS))
    run = with_rows_for(predictor, len(documents)).run
    run = dataclasses.replace(run, eval_stride=min(STRIDE, run.eval_seq_len))
    dist = train_gpt.Dist(device=predictor.device)
    scorer = train_gpt.Evaluation(predictor.model, docs, run, dist, train_gpt.Log(), lambda: 0.0)  # no time limit
    return float(scorer.score().nats.sum()) / math.log(2)


def pack_file(header: dict[str, Any], edits: bytes, coded: bytes) -> bytes:
    deflate = zlib.compressobj(9, wbits=-15, zdict=DEFLATE_DICTIONARY)
    deflated = deflate.compress(json.dumps(header, separators=(",", ":"), allow_nan=False).encode()) + deflate.flush()
    body = MAGIC + struct.pack("<H", len(deflated)) + deflated + edits + coded
    return body + bytes.fromhex(digest(body))


def unpack_file(blob: bytes, what: str) -> Contents:
    """Parse a compressed file; nothing in it is trusted before it is checked. Raises DataError."""
    require(blob[:4] == MAGIC, f"{what}: not a text compressed by this program, it begins with {blob[:4]!r}", DataError)
    body = blob[:-DIGEST_BYTES]
    require(
        digest(body) == blob[-DIGEST_BYTES:].hex(),
        f"{what}: damaged or cut short: the checksum does not fit its {len(blob)} bytes",
        DataError,
    )
    require(len(body) >= 6, f"{what}: cut short: it ends before its header", DataError)
    with train_gpt.untrusted(what):
        (size,) = struct.unpack("<H", body[4:6])
        header = json.loads(inflate(body[6 : 6 + size]))
        check_header(header)
        edits_at = 6 + size
        coded_at = edits_at + header["edits"]
        return Contents(header, unpack_edits(body[edits_at:coded_at]), body[coded_at:])


def inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(-15, zdict=DEFLATE_DICTIONARY).decompress(data, MAX_HEADER_BYTES)
    except zlib.error as error:
        raise DataError(f"the header is not deflated text: {error}") from None


def check_header(header: Any) -> None:
    """Refuse impossible values: even a file with a valid checksum may be forged."""
    require(isinstance(header, dict), "the header is not a table")
    kinds = GPU_HEADER if "device" in header else HEADER
    require(header.keys() == kinds.keys(), "the header has other entries")
    require(all(type(header[name]) is kind for name, kind in kinds.items()), "an entry of the header has a wrong type")
    require(0 < header["documents"] <= min(header["tokens"], MAX_DOCUMENTS), "the number of documents is impossible")
    require(header["tokens"] <= 16 * MAX_BYTES, "the number of tokens is impossible")
    require(header["edits"] >= 0, "the size of the edits is impossible")
    require(0 < header["threads"] <= 1024, "the number of threads is impossible")
    separator = bytes.fromhex(header["split"])
    require((header["documents"] - 1) * len(separator) <= MAX_BYTES, "the separator of documents is impossible")
    for name, value in header["knobs"].items():
        require(isinstance(value, str) and affects_coding(name), f"{name} is not a knob of the coding")
    check_work(header["knobs"])


def check_work(knobs: Mapping[str, str]) -> None:
    """Refuse unknown knobs, and those that exceed LARGEST_KNOBS. Raises UserError."""
    known = checked_knobs(knobs, "its header")
    require(known.keys() == knobs.keys(), f"unknown knobs: {', '.join(sorted(knobs.keys() - known.keys()))}")
    for name, most in LARGEST_KNOBS.items():
        value = int(knobs.get(name, "0"))
        require(value <= most, f"{name}={value}: a compressed text may use at most {most}")


def device_of(header: Mapping[str, Any]) -> str:
    """The device that a text was compressed on, as a value of the knob DEVICE. Raises UserError if this machine
    lacks that device or DEVICE differs. Another GPU or build is refused, as its numbers differ; another CPU is
    accepted, as its numbers may be the same."""
    allowed = os.environ.get("DEVICE", "auto")
    device = "cuda" if "device" in header else "cpu"
    where = f"compressed on a GPU, {printable(header['device'])}" if device == "cuda" else "compressed on a CPU"
    require(allowed in {"auto", device}, f"{where}, but DEVICE={allowed}: set DEVICE={device} or auto", UserError)
    if device == "cpu":
        return device

    require(torch.cuda.is_available(), f"{where}: it decompresses only there, and torch sees no GPU here", UserError)
    gpu = torch.device("cuda")
    here = train_gpt.device_name(gpu), build(gpu)
    require(
        here == (header["device"], header["build"]),
        f"{where}, under {printable(header['build'])}: it decompresses only there, and here is {', '.join(here)}",
        UserError,
    )
    return device


def decompress(path: Path, contents: Contents) -> bytes:
    """The text of a file that was compressed with the artifact at `path`. Raises UserError."""
    header = contents.header
    make_deterministic(header["threads"])
    predictor = open_predictor(path, header["knobs"], device_of(header))
    require(
        predictor.sha256.startswith(header["artifact"]),
        f"{path} is artifact {predictor.sha256[:16]}, the text "
        f"was compressed with {header['artifact']}: name that one with --artifact",
        DataError,
    )
    here = build(predictor.device)
    why = "these predictions are not the encoder's, whose computer may be of another kind"
    if header["build"] != here:
        why = f"compressed under {header['build']}, which is not what runs here, {here}"
        print(f"warning: {printable(why)}; it is tried, and the text's checksum tells", file=sys.stderr, flush=True)

    progress = Progress("decompressing", header["tokens"])
    separator = bytes.fromhex(header["split"])
    try:
        documents = decode(predictor, header["documents"], header["tokens"], contents.coded, progress)
        data = from_documents(predictor, header["caseops"], documents, separator, contents.edits)
        require(digest(data) == header["text"], "the decoded text does not match its checksum", DataError)
    except DataError as error:
        raise DataError(f"{error}; {why}") from None
    return data


# -----------------------------------------------------------------------------
# Commands: code shared by compress, decompress and sample.


def argument_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The argument parser of a command that uses an artifact."""
    parser = argparse.ArgumentParser(
        prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", help="[ARTIFACT in the environment, else the newest logs/*.ptz]")
    return parser


def convert_file(source: Path, out: Path, convert: Callable[[bytes], tuple[bytes, str]]) -> None:
    """Convert `source`, write the result to `out`, and print the message that `convert` returns."""
    data = train_gpt.read_file(source)
    started = time.monotonic()
    result, summary = convert(data)
    train_gpt.write_atomically(out, [result])
    print(printable(f"{out}: {summary}; {time.monotonic() - started:.1f} s"))
