"""
Documents to bits and back: the score of an artifact, test-time training included, as a lossless compressor.

A document is tokenised; every token, and the BOS that ends the document, is coded at the probability that the scorer
gives it, and the model learns from every chunk when both sides know it. Whatever the tokenizer does not give back
exactly is an edit of the decoded text, stored beside it, so that any bytes come back.

    magic (4) | length of the header (2, little-endian) | header: JSON, deflated | edits | coded tokens
    | BLAKE2b-64 of all before (8)

Sections: What predicts, Text, Edits, Coding, Files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import zstandard
from torch import Tensor

import train_gpt
from data.prepare import TITLE, decode_caseops, encode_caseops
from tools.artifact import knobs_of_run
from tools.coder import Decoder, Encoder, intervals
from train_gpt import BOS, DataError, UserError, require

MAX_BYTES = 1 << 26  # of a text, and of all its edits

# -----------------------------------------------------------------------------
# What predicts: an artifact, the tokenizer that it names and the knobs of adaptation. Nothing else is looked at.

DATA_KNOBS = ("DATA_PATH", "TOKENIZER_PATH")  # they say where the tokenizer lies
CODING_KNOBS = ("EVAL_SEQ_LEN", "SEED")  # they and the TTT_ knobs decide what is predicted
HERE = {"DEVICE": "cpu", "RESUME": "", "EVAL_STRIDE": "1"}  # no stride is taken, so it shall not forbid a short context
NO_DOCUMENTS = train_gpt.split_documents(np.zeros(0, np.uint16), np.zeros(0, np.int64))


class Predictor(NamedTuple):
    model: train_gpt.GPT
    run: train_gpt.RunConfig
    tokenizer: train_gpt.Tokenizer
    sha256: str  # of the artifact


def open_predictor(path: Path, knobs: Mapping[str, str] | None = None) -> Predictor:
    """Open an artifact on the CPU. Its knobs are those given, or else the environment's, then those of the run that
    made it, then the defaults. No data is needed but the tokenizer. Raises UserError."""
    env = knobs_of_run(path, os.environ) | dict(os.environ)
    if knobs is not None:
        env = {name: env[name] for name in DATA_KNOBS if name in env} | dict(knobs)
    _, run = train_gpt.read_env(env | {"ARTIFACT": str(path)} | HERE)
    blob = train_gpt.read_file(path)
    header, _ = train_gpt.read_header(blob, str(path))
    config = train_gpt.stored_config(header["meta"], str(path))
    tokenizer = train_gpt.load_tokenizer(run, config.vocab_size)
    plan = train_gpt.Setup(config, run, train_gpt.Dist(), tokenizer, NO_DOCUMENTS, None)
    model = train_gpt.load_artifact(path, plan).requires_grad_(False)
    return Predictor(model, run, tokenizer, hashlib.sha256(blob).hexdigest())


def knobs_to_keep(run: train_gpt.RunConfig) -> dict[str, str]:
    """What a decoder must set: the knobs that change predictions and are not at their defaults."""
    usual = train_gpt.settings(train_gpt.RunConfig())
    return {
        name: value
        for name, value in train_gpt.settings(run).items()
        if value != usual.get(name) and (name in CODING_KNOBS or name.startswith("TTT_"))
    }


def fix_sums(threads: int) -> None:
    """From here on, sums of the same numbers are taken in the same order."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def build() -> str:
    """What the bits of a prediction depend on, beside the artifact, the knobs and the number of threads."""
    entry = hashlib.sha256(train_gpt.code()).hexdigest()[:8]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, entry {entry}"


# -----------------------------------------------------------------------------
# Text: the bytes of a document to tokens; what the tokens give back may differ.


def uses_caseops(predictor: Predictor) -> bool:
    """Whether the tokenizer is made for transformed text: the data's manifest says so, or else its pieces."""
    transform = train_gpt.manifest_value(Path(predictor.run.data_path), "tokenizer", "transform")
    processor = predictor.tokenizer.processor
    return transform == "caseops" if transform else processor.piece_to_id(TITLE) != processor.unk_id()


def to_tokens(predictor: Predictor, caseops: bool, text: str) -> list[int]:
    """The tokens of a text and the BOS that ends it."""
    tokens = predictor.tokenizer.processor.encode(encode_caseops(text) if caseops else text)
    return [token for token in tokens if token != BOS] + [BOS]


def to_bytes(predictor: Predictor, caseops: bool, tokens: list[int]) -> bytes:
    """What these tokens stand for, without the BOS at the end."""
    text = predictor.tokenizer.processor.decode(tokens[:-1])
    return (decode_caseops(text) if caseops else text).encode()


class Stretch(NamedTuple):
    """A part of a document."""

    text: str
    foreign: bytes  # what follows and is no UTF-8


def cut_foreign(document: bytes) -> list[Stretch]:
    """Bytes -> text and what is none; a document with much of the latter is no text at all."""
    parts = re.split("([\udc80-\udcff]+)", document.decode(errors="surrogateescape")) + [""]
    stretches = [Stretch(t, f.encode(errors="surrogateescape")) for t, f in zip(parts[::2], parts[1::2], strict=True)]
    if 10 * sum(len(stretch.foreign) for stretch in stretches) > len(document):
        return [Stretch("", document)]
    return stretches


# -----------------------------------------------------------------------------
# Edits: how one string of bytes becomes another.

EDIT_PASSES = 2  # what the tokenizer lost, then what is no UTF-8
MAX_EDITS = 1 << 20  # of a file; a few bytes of a frame could claim millions, and each takes a hundred in memory
MATCH_BYTES, LOOK_AHEAD = 8, 4096  # two strings are in step again where so many bytes agree, not further off than that


class Edit(NamedTuple):
    same: int  # bytes to copy
    dropped: int  # bytes to leave out then
    added: bytes


def find_edits(got: bytes, wanted: bytes) -> list[Edit]:
    """Short edits that turn `got` into `wanted`, found from left to right: good where differences are small, right
    always."""
    edits, a, b = [], 0, 0
    while True:
        same = common_prefix(got, a, wanted, b)
        a, b = a + same, b + same
        if a == len(got) and b == len(wanted):
            return edits
        next_a, next_b = in_step_again(got, a, wanted, b)
        edits.append(Edit(same, next_a - a, wanted[b:next_b]))
        a, b = next_a, next_b


def common_prefix(x: bytes, a: int, y: bytes, b: int) -> int:
    """How many bytes agree from x[a] and y[b] on."""
    same, size = 0, 64
    while (part := x[a + same : a + same + size]) == y[b + same : b + same + size] and part:
        same, size = same + len(part), size * 2
    return same + len(os.path.commonprefix([part, y[b + same : b + same + size]]))


def in_step_again(got: bytes, a: int, wanted: bytes, b: int) -> tuple[int, int]:
    """Where MATCH_BYTES agree next after a difference at got[a], wanted[b]; a few bytes on in both, if nowhere near."""
    best = min(a + 4 * MATCH_BYTES, len(got)), min(b + 4 * MATCH_BYTES, len(wanted))
    if best[0] == len(got):
        best = best[0], len(wanted)
    nearest = LOOK_AHEAD
    for dropped in range(min(4 * MATCH_BYTES, len(got) - a - MATCH_BYTES + 1)):
        anchor = got[a + dropped : a + dropped + MATCH_BYTES]
        added = wanted.find(anchor, b, b + LOOK_AHEAD) - b
        if added >= 0 and added + dropped < nearest:
            best, nearest = (a + dropped, b + added), added + dropped
    return best


def foreign_edits(documents: list[list[Stretch]], split: bytes) -> list[Edit]:
    """What puts the foreign bytes back into the text of all documents."""
    edits, same = [], -len(split)
    for stretches in documents:
        same += len(split)
        for stretch in stretches:
            same += len(stretch.text.encode())
            if stretch.foreign:
                edits.append(Edit(same, 0, stretch.foreign))
                same = 0
    return edits


def edited(got: bytes, edits: list[Edit]) -> bytes:
    out, at = [], 0
    for edit in edits:
        require(at + edit.same + edit.dropped <= len(got), "an edit lies beyond the text", DataError)
        out += [got[at : at + edit.same], edit.added]
        at += edit.same + edit.dropped
    return b"".join([*out, got[at:]])


def to_documents(
    predictor: Predictor, caseops: bool, parts: list[bytes], split: bytes
) -> tuple[list[list[int]], list[list[Edit]]]:
    """Documents -> the tokens of each, and EDIT_PASSES passes of edits that mend what these give back."""
    stretches = [cut_foreign(part) for part in parts]
    texts = ["".join(stretch.text for stretch in document) for document in stretches]
    documents = [to_tokens(predictor, caseops, text) for text in texts]
    decoded = split.join(to_bytes(predictor, caseops, tokens) for tokens in documents)
    lost = find_edits(decoded, split.join(text.encode() for text in texts))
    return documents, [lost, foreign_edits(stretches, split)]


def from_documents(
    predictor: Predictor, caseops: bool, documents: list[list[int]], split: bytes, passes: list[list[Edit]]
) -> bytes:
    """The inverse: the bytes of all documents, with `split` between them."""
    data = split.join(to_bytes(predictor, caseops, tokens) for tokens in documents)
    for edits in passes:
        data = edited(data, edits)
    return data


def number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the last byte is below 128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def pack_edits(passes: list[list[Edit]]) -> bytes:
    """Edits of one pass after another, as they are or in a zstd frame, whichever is shorter; nothing for nothing."""
    if not any(passes):
        return b""
    count = sum(map(len, passes))
    require(count <= MAX_EDITS, f"{count} edits: at most {MAX_EDITS} go into a file; cut the text up", UserError)
    plain = b"".join(
        number(len(edits))
        + b"".join(number(e.same) + number(e.dropped) + number(len(e.added)) + e.added for e in edits)
        for edits in passes
    )
    frame = zstandard.ZstdCompressor(level=19).compress(plain)
    return min(b"\0" + plain, b"\1" + frame, key=len)


def unpack_edits(data: bytes) -> list[list[Edit]]:
    """The inverse. Raises ValueError."""
    if not data:
        return [[]] * EDIT_PASSES
    require(data[0] in {0, 1}, f"edits begin with {data[0]}")
    reader = Reader(train_gpt.decompress(data[1:], 2 * MAX_BYTES) if data[0] else data[1:])
    passes = [read_pass(reader) for _ in range(EDIT_PASSES)]
    require(reader.at == len(reader.data), "edits end early")
    return passes


def read_pass(reader: Reader) -> list[Edit]:
    count = reader.number()
    require(count <= MAX_EDITS, f"{count} edits are claimed, at most {MAX_EDITS} are expected")
    return [Edit(reader.number(), reader.number(), reader.take()) for _ in range(count)]


class Reader:
    """Reads what number() wrote."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self) -> int:
        value = shift = 0
        while True:
            require(self.at < len(self.data) and shift < 63, "a number does not end")
            byte = self.data[self.at]
            value, shift, self.at = value | (byte & 127) << shift, shift + 7, self.at + 1
            if byte < 128:
                return value

    def take(self) -> bytes:
        size = self.number()
        require(self.at + size <= len(self.data), "bytes are missing")
        self.at += size
        return self.data[self.at - size : self.at]


# -----------------------------------------------------------------------------
# Coding: documents side by side, chunk by chunk. Encoder and decoder share this walk and differ in how a chunk's tokens
# become known: the encoder has them and predicts all at once; the decoder finds one, and predicts anew. A prediction
# must not vary in its last bit with the tokens after it, which the decoder does not have yet: the encoder checks that.


class Chunk(NamedTuple):
    """The next C tokens of B documents, to be coded."""

    first: int  # their place in every document
    documents: np.ndarray  # (B,) which
    before: np.ndarray  # (B,) the token before
    going: np.ndarray  # (B,) bool, the document has not ended before
    predict: Callable[[np.ndarray], Tensor]  # inputs (B, C) -> logits (B, C, V); may be asked again


class Side(Protocol):
    def chunk(self, chunk: Chunk) -> np.ndarray:
        """Code a chunk -> its tokens (B, C), BOS from every document's end on."""


def walk(predictor: Predictor, documents: range, side: Side) -> None:
    """Code these documents to their ends, adapting to each. Rows are dropped just as the scorer drops them."""
    model, run = predictor.model, predictor.run
    require(run.batched_ttt, "text is coded document by document: TTT_PARAMS=lora and TTT_SCOPE=document are needed")
    require_memory(model.config, run, len(documents))
    device = torch.device("cpu")
    learner = train_gpt.BatchedTTT(model, run, len(documents), device)
    ended = np.zeros(len(documents), bool)
    before = np.full(len(documents), BOS)  # the token before the chunk, of every row

    @torch.no_grad()
    def predict(inputs: np.ndarray) -> Tensor:
        states, _ = learner.hidden(torch.from_numpy(inputs))
        return model.head.logits(states, model.embed, learner.adapter.head)

    for first, rows, kept in train_gpt.chunk_steps(len(documents), run.ttt_chunk_tokens, lambda rows, _: ~ended[rows]):
        if kept is not None:
            fewer = train_gpt.BatchedTTT(model, run, len(rows), device)
            fewer.copy_rows(learner, torch.from_numpy(kept))
            learner, before = fewer, before[kept]
        targets = side.chunk(Chunk(first, documents.start + rows, before, ~ended[rows], predict))
        mask = counted(targets, ~ended[rows])
        ended[rows] |= (targets == BOS).any(1)
        if ended.all():
            return
        to_learn = bool(run.ttt_enabled) and first + run.ttt_chunk_tokens >= run.ttt_min_doc_tokens
        inputs = inputs_of(before, targets)
        chunk = learner.score(torch.from_numpy(inputs), torch.from_numpy(targets), to_learn)
        if to_learn:
            chunk = learner.learn(chunk, torch.from_numpy(mask))
        learner.advance(chunk)
        before = targets[:, -1]


def require_memory(config: train_gpt.ModelConfig, run: train_gpt.RunConfig, documents: int) -> None:
    """Corrections with their gradients and moments, and the logits of a chunk, must fit this computer."""
    passes = len(train_gpt.layer_plan(config, looping=True))
    widths = 2 * config.model_dim * passes * len(run.lora_targets) + config.model_dim + config.vocab_size
    need = 16 * documents * (run.ttt_lora_rank * widths + run.ttt_chunk_tokens * config.vocab_size)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(
        need < have,
        f"{documents} documents side by side with TTT_LORA_RANK={run.ttt_lora_rank} need "
        f"{need / 2**30:.1f} GiB of memory, {have / 2**30:.1f} are there: lower TTT_BATCH_DOCS",
        UserError,
    )


def inputs_of(before: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.column_stack([before, targets[:, :-1]])


def counted(targets: np.ndarray, going: np.ndarray) -> np.ndarray:
    """Which of these are tokens of a document (B, C): up to and with its first BOS."""
    ended_before = np.cumsum(targets == BOS, 1) - (targets == BOS)
    return going[:, None] & (ended_before == 0)


class Encoding:
    """Puts the tokens of documents, each with its closing BOS."""

    def __init__(self, documents: Sequence[Sequence[int]], chunk_tokens: int, progress: Callable[[int], None]):
        self.documents, self.size, self.progress = documents, chunk_tokens, progress
        self.coder, self.done = Encoder(), 0

    def chunk(self, chunk: Chunk) -> np.ndarray:
        targets = np.full((len(chunk.documents), self.size), BOS)
        for row, i in zip(targets, chunk.documents, strict=True):
            part = self.documents[i][chunk.first : chunk.first + self.size]
            row[: len(part)] = part
        inputs = inputs_of(chunk.before, targets)
        logits, known = chunk.predict(inputs), counted(targets, chunk.going)
        self.check(chunk, inputs, logits)
        for place in range(self.size):
            for row in np.flatnonzero(known[:, place]):
                self.coder.put(intervals(logits[row, place]), int(targets[row, place]))
        self.done += int(known.sum())
        self.progress(self.done)
        return targets

    def check(self, chunk: Chunk, inputs: np.ndarray, logits: Tensor) -> None:
        """See a chunk as the decoder will, up to one place, another in every chunk."""
        place = chunk.first // self.size * 5 % self.size
        partly = inputs.copy()
        partly[:, place + 1 :] = BOS
        if not torch.equal(chunk.predict(partly)[:, : place + 1], logits[:, : place + 1]):
            raise UserError(
                "on this computer predictions vary with the tokens after them, in their last bits: "
                "nothing could be decoded; try OMP_NUM_THREADS=1, or another build of torch"
            )


class Decoding:
    """Gets the tokens of documents."""

    def __init__(self, documents: int, tokens: int, chunk_tokens: int, data: bytes, progress: Callable[[int], None]):
        self.documents: list[list[int]] = [[] for _ in range(documents)]
        self.tokens, self.size, self.progress = tokens, chunk_tokens, progress
        self.coder, self.done = Decoder(data), 0

    def chunk(self, chunk: Chunk) -> np.ndarray:
        targets, going = np.full((len(chunk.documents), self.size), BOS), chunk.going.copy()
        for place in range(self.size):
            logits = chunk.predict(inputs_of(chunk.before, targets))
            self.done += int(going.sum())
            require(self.done <= self.tokens, "more tokens come out than went in", DataError)
            for row in np.flatnonzero(going):
                token = self.coder.get(intervals(logits[row, place]))
                self.documents[chunk.documents[row]].append(token)
                targets[row, place], going[row] = token, token != BOS
            self.progress(self.done)
            if not going.any():
                break
        return targets


def groups(documents: int, run: train_gpt.RunConfig) -> Iterable[range]:
    """Which documents are coded side by side."""
    everyone = range(documents)
    return (everyone[i : i + run.ttt_batch_docs] for i in everyone[:: run.ttt_batch_docs])


def encode(predictor: Predictor, documents: Sequence[Sequence[int]], progress: Callable[[int], None]) -> bytes:
    """Tokens of documents, each with its closing BOS -> bits."""
    side = Encoding(documents, predictor.run.ttt_chunk_tokens, progress)
    for group in groups(len(documents), predictor.run):
        walk(predictor, group, side)
    return side.coder.finish()


def decode(
    predictor: Predictor, documents: int, tokens: int, data: bytes, progress: Callable[[int], None]
) -> list[list[int]]:
    """The inverse; `tokens` is how many there are in all. Raises DataError."""
    side = Decoding(documents, tokens, predictor.run.ttt_chunk_tokens, data, progress)
    for group in groups(documents, predictor.run):
        walk(predictor, group, side)
    return side.documents


# -----------------------------------------------------------------------------
# Files: a header that says what is needed to read the rest.

MAGIC, DIGEST_BYTES, MAX_DOCUMENTS, MAX_HEADER_BYTES = b"PGT\x01", 8, 1 << 20, 1 << 16
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
LIKELY = (  # a part of the format: headers are deflated as if they came after this text
    b'{"artifact":"0123456789abcdef","build":"torch 2.13.0+cu128, AVX2, AVX512, entry ","caseops":true,'
    b'"documents":1,"edits":0,"knobs":{"EVAL_SEQ_LEN":"512","TTT_BATCH_DOCS":"16","TTT_CHUNK_TOKENS":"64",'
    b'"TTT_LORA_ALPHA":"16.0","TTT_LORA_RANK":"8","TTT_LR":"0.001"},"split":"","text":"","threads":1,"tokens":'
)


class Compressed(NamedTuple):
    """A compressed file, and how many of its bytes are what."""

    blob: bytes
    header: int  # magic, length and checksum with it
    edits: int
    coded: int
    tokens: int
    documents: int


class Contents(NamedTuple):
    """A compressed file, checked and taken apart."""

    header: dict[str, Any]
    edits: list[list[Edit]]
    coded: bytes


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def compress(predictor: Predictor, data: bytes, split: bytes = b"") -> Compressed:
    """Code a text as one document, or as those that `split` stands between. Raises UserError."""
    parts = data.split(split) if split else [data]
    require(
        len(data) <= MAX_BYTES and len(parts) <= MAX_DOCUMENTS,
        f"{len(data)} bytes, {len(parts)} documents: at most {MAX_BYTES} and {MAX_DOCUMENTS} go into a file; cut it up",
        UserError,
    )
    caseops = uses_caseops(predictor)
    documents, passes = to_documents(predictor, caseops, parts, split)
    edits, tokens = pack_edits(passes), sum(map(len, documents))
    coded = encode(predictor, documents, Progress("compressing", tokens))
    header = {
        "artifact": predictor.sha256[:16],
        "build": build(),
        "caseops": caseops,
        "documents": len(documents),
        "edits": len(edits),
        "knobs": knobs_to_keep(predictor.run),
        "split": split.hex(),
        "text": digest(data),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
    }
    blob = pack_file(header, edits, coded)
    return Compressed(blob, len(blob) - len(edits) - len(coded), len(edits), len(coded), tokens, len(documents))


def pack_file(header: dict[str, Any], edits: bytes, coded: bytes) -> bytes:
    deflate = zlib.compressobj(9, wbits=-15, zdict=LIKELY)
    deflated = deflate.compress(json.dumps(header, separators=(",", ":")).encode()) + deflate.flush()
    body = MAGIC + struct.pack("<H", len(deflated)) + deflated + edits + coded
    return body + bytes.fromhex(digest(body))


def unpack_file(blob: bytes, what: str) -> Contents:
    """Take a compressed file apart; nothing is believed before it is checked. Raises DataError."""
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
        edits, coded = body[6 + size :][: header["edits"]], body[6 + size + header["edits"] :]
        return Contents(header, unpack_edits(edits), coded)


def inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(-15, zdict=LIKELY).decompress(data, MAX_HEADER_BYTES)
    except zlib.error as error:
        raise DataError(f"the header is no deflated text: {error}") from None


def check_header(header: Any) -> None:
    require(isinstance(header, dict) and header.keys() == HEADER.keys(), "the header has other entries")
    require(all(type(header[name]) is kind for name, kind in HEADER.items()), "an entry is of another kind")
    require(0 < header["documents"] <= min(header["tokens"], MAX_DOCUMENTS), "the number of documents cannot be")
    require(header["tokens"] <= 16 * MAX_BYTES, "the number of tokens cannot be")
    require(header["edits"] >= 0, "the size of the edits cannot be")
    require(0 < header["threads"] <= 1024, "the number of threads cannot be")
    split = bytes.fromhex(header["split"])
    require((header["documents"] - 1) * len(split) <= MAX_BYTES, "what stands between documents cannot be")
    for name, value in header["knobs"].items():
        require(isinstance(value, str) and (name in CODING_KNOBS or name.startswith("TTT_")), f"{name} is no knob here")


def decompress(path: Path, contents: Contents) -> bytes:
    """The text of a file that was compressed with the artifact at `path`. Raises UserError."""
    header = contents.header
    fix_sums(header["threads"])
    predictor = open_predictor(path, header["knobs"])
    require(
        predictor.sha256.startswith(header["artifact"]),
        f"{path} is artifact {predictor.sha256[:16]}, the text "
        f"was compressed with {header['artifact']}: name that one with --artifact",
        DataError,
    )
    same_build = header["build"] == build()
    builds = f"compressed under {header['build']}, which is not what runs here, {build()}"
    if not same_build:
        print(f"warning: {builds}; it is tried, and the text's checksum tells", file=sys.stderr, flush=True)
    try:
        documents = decode(
            predictor,
            header["documents"],
            header["tokens"],
            contents.coded,
            Progress("decompressing", header["tokens"]),
        )
        data = from_documents(predictor, header["caseops"], documents, bytes.fromhex(header["split"]), contents.edits)
        require(digest(data) == header["text"], "the decoded text does not fit its checksum", DataError)
    except DataError as error:
        why = "these predictions are not the encoder's, whose computer may be of another kind"
        raise DataError(f"{error}; {why if same_build else builds}") from None
    return data


class Progress:
    """How far and how long still, on stderr every ten seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.begun = self.shown = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.shown < 10 or done == self.total:
            return
        self.shown, spent = now, now - self.begun
        print(
            f"{self.what}: {done} of {self.total} tokens, {done / spent:.1f} a second, "
            f"{(self.total - done) * spent / done:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
