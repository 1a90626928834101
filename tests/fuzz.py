"""
Files from outside, damaged and forged by the thousand: each is refused in a sentence, or read to the same effect.

    python tests/fuzz.py                            every kind of file, in full: eleven minutes
    python tests/fuzz.py artifacts shards           these kinds
    python tests/fuzz.py artifacts --only 1234      one case again, with its traceback

The exit status is 1 if a case fails. tests/test_fuzz.py runs the first few of the same cases: a case is known by its
kind and its number. It fails

- if anything is raised but UserError and its kinds, which end a program in one line;
- if it takes more than MAX_SECONDS of processor time (or six times as long, waiting), or MAX_BYTES of memory;
- if a file is accepted that changes a score.

What changes a score, kind by kind:

artifacts    The checksum is repaired, so that such a file is an artifact of its own, with a SHA-256 of its own in
             every result. It may pass if its configuration is one that knobs can have, its tensors are those of that
             network, all weights are finite, and its score without adaptation is finite, or refused.
older        The same with an artifact of the first version, which has other tensors.
broken       Artifacts again, with the old checksum, or a damaged one: only the original may pass.
checkpoints  With a repaired checksum (9 of 10), weights and moments may differ, but must be finite and those of this
             network; step and seconds must be those of a training. One that is refused leaves the trainer as it was.
shards       A prepared folder, whose manifest lists checksums: validation tokens, their bytes and the tokenizer must
             be the original ones. Training tokens may differ, and must lie within the vocabulary when they are read.
compressed   Text for a preparation. Of damaged frames that carry a checksum, whole frames must come out, and all of
             them. Other text in whole frames may differ: it is other data, which the manifest then describes.
documents    The .docs.npz of a finished run, whose bits per byte must stay as they are.
results      Its other files: the same.
codec        A compressed text: what comes out must be the text that went in.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import faulthandler
import functools
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a script

import numpy as np
import torch
import zstandard
from conftest import TINY_MODEL, TINY_RUN, rows_of_integers, stored_tensors, trained
from test_results import fabricate

import train_gpt
from data import prepare
from tools import codec, holdout
from tools.events import first_difference
from tools.results import load_run
from train_gpt import BOS, UserError

MAX_SECONDS = 10
MAX_BYTES = 2 << 30

# -----------------------------------------------------------------------------
# Mutators: bytes, values of JSON, and the formats that are made of these.


def damaged(chance: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, repeated or replaced."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not data:
            break
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + chance.choice((1, 8, len(data)))]
            case 2:
                data[at:at] = data[at : at + chance.randrange(64)]
            case _:
                data[at : at + 4] = chance.randbytes(4)
    return bytes(data)


NESTED = {f"nested {depth}": b"[" * depth + b"]" * depth for depth in (50, 900, 960, 980, 100_000)}
HOSTILE = (
    *(None, True, False, "", "0", "1e999", "-1", "\x1b[2J\nresult", "\ud800", "../../x", "/dev/zero", "x" * 10**5),
    *([], {}, [[]], [1e308] * 3, {"a": {}}, [None], *NESTED),
    *(0, 1, -1, 2, 255, 2**31, 2**63, -(2**63), 10**400),
    *(0.5, -0.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
)


def edited(chance: random.Random, value: Any) -> Any:
    """A value of JSON with one to three places changed; every level is as likely to be hit as the next."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        value = edited_once(chance, value)
    return value


def edited_once(chance: random.Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.05:
        return replaced(chance, value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = chance.choice(keys)
    if chance.random() < 0.75:
        value[key] = edited_once(chance, value[key])
        return value
    match chance.randrange(4):
        case 0:
            del value[key]
        case 1:
            other = chance.choice(keys)
            value[key], value[other] = value[other], value[key]
        case 2 if isinstance(value, list):
            value.insert(key, copy.deepcopy(value[key]))
        case 2:
            value[chance.choice((key + "x", key.upper(), "", "\x1b"))] = value.pop(key)
        case _:
            value[key] = [value[key]]
    return value


def replaced(chance: random.Random, value: Any) -> Any:
    """Another value in the place of one: near to it, of another type, or hostile."""
    if isinstance(value, (int, float)) and abs(value) < 1e300 and chance.random() < 0.5:
        return chance.choice((value + 1, value - 1, -value, 2 * value, value / 2, str(value), float(value), [value]))
    if isinstance(value, str) and value and chance.random() < 0.3:
        at = chance.randrange(len(value))
        return value[:at] + chance.choice("09aAxf\0 -") + value[at + 1 :]
    return copy.deepcopy(chance.choice(HOSTILE))


def edited_json(chance: random.Random, value: Any) -> bytes:
    """A value as JSON, changed as a value or as text."""
    if chance.random() < 0.2:
        text = bytearray(json.dumps(value).encode())
        for _ in range(chance.choice((1, 2, 5))):
            text[chance.randrange(len(text))] = chance.choice(b'0123456789-e.{}[]",:aN')
        return bytes(text)
    return json_text(edited(chance, value))


def json_text(value: Any) -> bytes:
    text = json.dumps(value).encode()
    for name, nested in NESTED.items():  # Python could not write them
        text = text.replace(f'"{name}"'.encode(), nested)
    return text


# ---- the container of artifacts and checkpoints -----------------------------


class Container(NamedTuple):
    """Its header, and the bytes of each entry of the table there, whose last item is their number."""

    header: dict[str, Any]
    blobs: list[bytes]


def open_container(data: bytes) -> Container:
    at = 12 + int.from_bytes(data[8:12], "little")
    header = json.loads(zstandard.decompress(data[12:at]))
    blobs = []
    for *_, size in header["tensors"]:
        blobs.append(data[at : at + size])
        at += size
    return Container(header, blobs)


def sealed(head: bytes, frame: bytes, blobs: list[bytes]) -> bytes:
    """The container of a header's frame and blobs, with the right checksum."""
    body = b"".join([head, len(frame).to_bytes(4, "little"), frame, *blobs])
    return body + hashlib.blake2b(body, digest_size=16).digest()


def forged_container(chance: random.Random, data: bytes) -> bytes:
    """A container with something else in it, and the right checksum."""
    header, blobs = open_container(data)
    if chance.random() < 0.15:
        text = edited_json(chance, header)
    else:
        forge = chance.choice(FORGERIES)
        forge(chance, header, blobs)
        text = json_text(header)
    frame = zstandard.ZstdCompressor(level=1, write_content_size=chance.random() < 0.98).compress(text)
    if chance.random() < 0.1:
        frame = damaged(chance, frame)
    return sealed(data[:8], frame, blobs)


def forge_meta(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    header["meta"] = edited(chance, header["meta"])


def forge_row(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    table = header["tensors"]
    i = chance.randrange(len(table))
    table[i] = edited(chance, table[i])


SIDES = (0, 1, 2, -1, 1.0, True, None, "1", 2**31, 2**62, 2**63, 10**400)


def forge_shape(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    *_, shape, _ = chance.choice(header["tensors"])
    shape.insert(chance.randrange(len(shape) + 1), chance.choice(SIDES))
    if chance.random() < 0.7:
        del shape[chance.randrange(len(shape))]
    if chance.random() < 0.1:
        shape *= 100_000


def forge_values(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    i = chance.randrange(len(blobs))
    coded = header["tensors"][i][1] == "u1"
    blobs[i] = other_values(chance, blobs[i], header["zstd"] and not coded)
    header["tensors"][i][-1] = len(blobs[i])


def forge_frequencies(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    """Tables of the entropy coder that are possible, but others: what they decode is not what was encoded."""
    found = [i for i, (name, *_) in enumerate(header["tensors"]) if name.endswith("integer_tables")]
    if not found:
        forge_values(chance, header, blobs)
        return

    (i,) = found
    tables = train_gpt.FrequencyTables.from_bytes(blobs[i], train_gpt.CONTEXTS, train_gpt.ALPHABET)
    for _ in range(chance.choice((1, 10, 1000))):
        row = tables.frequencies[chance.choice(np.flatnonzero(tables.in_use))]
        giver = chance.choice(np.flatnonzero(row))
        given = chance.randint(1, int(row[giver]))
        row[giver] -= given
        row[chance.randrange(len(row))] += given
    blobs[i] = tables.to_bytes()
    header["tensors"][i][-1] = len(blobs[i])


def forge_blob(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    i = chance.randrange(len(blobs))
    blobs[i] = damaged(chance, blobs[i])
    if chance.random() < 0.8:
        header["tensors"][i][-1] = len(blobs[i])


def swap_blobs(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    i = chance.randrange(len(blobs))
    j = chance.randrange(len(blobs))
    blobs[i], blobs[j] = blobs[j], blobs[i]
    swap_cells(chance, header, i, j, column=-1)


def swap_column(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    """Name, type, shape or size of two rows."""
    i = chance.randrange(len(blobs))
    j = chance.randrange(len(blobs))
    swap_cells(chance, header, i, j, column=chance.randrange(len(header["tensors"][i])))


def swap_cells(chance: random.Random, header: dict[str, Any], i: int, j: int, column: int) -> None:
    table = header["tensors"]
    table[i][column], table[j][column] = table[j][column], table[i][column]


def copy_row(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    i = chance.randrange(len(blobs))
    at = chance.randrange(len(blobs))
    header["tensors"].insert(at, list(header["tensors"][i]))
    blobs.insert(at, blobs[i])


def drop_row(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    i = chance.randrange(len(blobs))
    del header["tensors"][i]
    del blobs[i]


def add_empty_rows(chance: random.Random, header: dict[str, Any], blobs: list[bytes]) -> None:
    *_, kind, _, _ = chance.choice(header["tensors"])
    header["tensors"] += [[f"t{i}", kind, [0], 0] for i in range(chance.choice((1, 1, 1, 10, 10, 10, 50_000)))]


FORGERIES = (
    *(forge_meta, forge_row, forge_shape, forge_values, forge_frequencies, forge_blob),
    *(swap_blobs, swap_column, copy_row, drop_row, add_empty_rows),
)


SPECIAL = np.array([math.nan, math.inf, -math.inf, -1.0, 0.0, 65504.0, 1e-7], np.float16).view(np.uint16).tolist()


def other_values(chance: random.Random, blob: bytes, compressed: bool) -> bytes:
    """A blob of other numbers, as many of them; or of more or fewer."""
    raw = bytearray(zstandard.decompress(blob) if compressed else blob)
    if chance.random() < 0.3:
        raw = bytearray(damaged(chance, bytes(raw)))
    for _ in range(chance.choice((1, 1, 100))):
        if len(raw) < 2:
            break
        at = chance.randrange(len(raw) // 2) * 2
        raw[at : at + 2] = chance.choice(SPECIAL).to_bytes(2, "little")
        if chance.random() < 0.3:
            raw[at : at + 2] = b"\xff\x7f"  # of a float32, the upper half of a NaN
    if not compressed:
        return bytes(raw)
    if chance.random() < 0.02:
        raw = bytearray(1 << 28)
    return zstandard.ZstdCompressor(level=1).compress(bytes(raw))


# -----------------------------------------------------------------------------
# Kinds of files. `read` damages a file and reads it as the program does: it raises UserError where the file is refused,
# AssertionError where one is accepted that should not be.


class Kind:
    full: int  # cases of a full run

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, chance: random.Random) -> None:
        raise NotImplementedError


VOCAB = 300
MODEL = replace(TINY_MODEL, vocab_size=VOCAB)


@functools.cache
def tokenizer() -> bytes:
    return trained(vocab_size=VOCAB, byte_fallback=True)


def some_text(words: int, seed: int) -> str:
    chance = random.Random(seed)
    known = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(25)]  # they repeat
    return " ".join(chance.choice((str.lower, str.title, str.upper))(chance.choice(known)) for _ in range(words))


def prepared(folder: Path, *options: str) -> Path:
    """A folder of data as prepare makes it, of 60 documents."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(some_text(30, i) + f" {i}") + "\n" for i in range(60)))
    (folder / "given.model").write_bytes(tokenizer())
    arguments = ["jsonl", str(text), "--val-fraction", "0.2", "--out", str(folder), "--name", "x", "--workers", "1"]
    arguments += ["--tokenizer", str(folder / "given.model"), "--shard-tokens", "4000", *options]
    with contextlib.redirect_stdout(io.StringIO()):
        assert prepare.main(arguments) == 0
    return folder / "datasets" / "x"


def tiny_run(**changes: Any) -> train_gpt.RunConfig:
    return train_gpt.RunConfig(**(TINY_RUN | changes))


@functools.cache
def random_artifact(stored_of: Callable[[train_gpt.GPT], dict[str, torch.Tensor]]) -> bytes:
    """An artifact of random weights whose predictions are far from even; `stored_of` a network is what it stores."""
    model = train_gpt.GPT(MODEL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.2, generator=generator)
    meta = {"kind": "artifact", "model": asdict(MODEL), "tokenizer": hashlib.sha256(tokenizer()).hexdigest()}
    return train_gpt.pack(meta | {"holdout_tokens": 500, "holdout": "0" * 64}, stored_of(model), level=1)


class Artifacts(Kind):
    """The checksum is repaired."""

    full = 8_000
    stored_of = staticmethod(functools.partial(stored_tensors, states=8))

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.whole = random_artifact(self.stored_of)
        self.path = folder / "x.ptz"
        self.path.write_bytes(self.whole)
        run = tiny_run(data_path=str(prepared(folder)), artifact=str(self.path))
        self.setup = train_gpt.make_setup(MODEL, run, train_gpt.Dist())
        some = slice(0, 100)  # tokens: enough to tell whether a score is a number
        self.docs = train_gpt.split_documents(self.setup.validation.tokens[some], self.setup.validation.bytes[some])
        self.read_as_it_is()

    def damage(self, chance: random.Random) -> bytes:
        return forged_container(chance, self.whole)

    def read(self, chance: random.Random) -> None:
        self.path.write_bytes(self.damage(chance))
        self.read_as_it_is()

    def read_as_it_is(self) -> None:
        data = self.path.read_bytes()
        header, _ = train_gpt.read_header(data, "x.ptz")
        holdout.held_out_by(str(self.path))
        config = train_gpt.stored_config(header["meta"], "x.ptz")
        model = train_gpt.load_artifact(self.path, self.setup)
        assert model.config == config
        assert all(p.isfinite().all() for p in model.parameters())
        assert sum(train_gpt.part_bytes(self.path).values()) == len(data)
        table = train_gpt.score_all_static(model, self.setup, docs=self.docs)
        table.require_finite("train again")
        assert math.isfinite(table.bits_per_byte)


class OlderArtifacts(Artifacts):
    """Of the first version, whose matrices are rows of integers."""

    full = 2_000
    stored_of = staticmethod(rows_of_integers)


class BrokenArtifacts(Artifacts):
    """The checksum is the old one, or is damaged, too."""

    full = 10_000

    def damage(self, chance: random.Random) -> bytes:
        if chance.random() < 0.5:
            return damaged(chance, self.whole)
        return forged_container(chance, self.whole)[:-16] + self.whole[-16:]

    def read_as_it_is(self) -> None:
        super().read_as_it_is()
        assert self.path.read_bytes() == self.whole


class Checkpoints(Kind):
    full = 1_000

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = folder / "x.ckpt"
        run = tiny_run(data_path=str(prepared(folder)), iterations=8, resume=str(self.path))
        setup = train_gpt.make_setup(MODEL, run, train_gpt.Dist())
        self.trainer = train_gpt.make_trainer(setup, setup.stream.held_out())
        for step in range(2):
            self.trainer.train_step(setup.stream.batch(step), step / 8, looping=bool(step))
        self.trainer.step = 2
        self.trainer.save_checkpoint(self.path, 3.0)
        self.whole = self.path.read_bytes()
        self.before = self.trainer.copy_state()

    def read(self, chance: random.Random) -> None:
        repaired = chance.random() < 0.9
        data = forged_container(chance, self.whole) if repaired else damaged(chance, self.whole)
        self.path.write_bytes(data)
        trainer = self.trainer
        try:
            trainer.load_checkpoint(str(self.path))
        except UserError:
            now = trainer.state()
            assert all(torch.equal(t, now[name]) for name, t in self.before.items()), "refused, but taken over in part"
            raise
        assert repaired or data == self.whole
        assert type(trainer.step) is int and 0 <= trainer.step <= 8 and trainer.step == trainer.optimizer.steps_done
        assert 0 <= trainer.seconds_before < math.inf
        state = trainer.copy_state()
        assert all(t.isfinite().all() for t in state.values())
        assert all(t.dtype == torch.float32 and t.shape == self.before[name].shape for name, t in state.items())
        trainer.load_state(self.before, 2)


class Shards(Kind):
    """A prepared folder: shards, side-car, manifest and tokenizer."""

    full = 2_500

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.data = prepared(folder, "--caseops")
        self.files = {path: path.read_bytes() for path in (*self.data.iterdir(), *folder.glob("tokenizers/*"))}
        self.manifest = json.loads(self.files[self.data / "manifest.json"])
        self.run = tiny_run(data_path=str(self.data), holdout_tokens=500)
        self.expected = self.found()

    def found(self) -> tuple[str, ...]:
        """Read the folder as a run and as a preparation do -> what a score depends on."""
        setup = train_gpt.make_setup(MODEL, self.run, train_gpt.Dist())
        held_out = setup.stream.held_out()
        assert held_out.tokens.max(initial=0) < VOCAB
        stream = setup.stream.read(0, setup.stream.total)
        assert len(stream) == setup.stream.total and stream.max() < VOCAB
        with setup.stream.loader:  # it has read before the files change again
            setup.stream.batch(0)
        train_gpt.transform_of(self.data, setup.tokenizer)
        return setup.validation.sha256(), setup.tokenizer.sha256

    def read(self, chance: random.Random) -> None:
        path = chance.choice([*self.files, self.data / "manifest.json", self.data / "manifest.json"])
        content = self.damage(chance, path)
        path.write_bytes(content)
        try:
            self.prepare_again()
            assert self.found() == self.expected
        finally:
            path.write_bytes(self.files[path])

    def damage(self, chance: random.Random, path: Path) -> bytes:
        whole = self.files[path]
        if path.suffix == ".json" and chance.random() < 0.8:
            return edited_json(chance, self.manifest)
        if path.suffix == ".bin" and chance.random() < 0.7:
            return forged_shard(chance, whole)
        return damaged(chance, whole)

    def prepare_again(self) -> None:
        """What a second preparation of that name makes of the manifest."""
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(UserError):  # a run is told of it, too
                prepare.check_replaceable(self.data, self.manifest["parameters"] | {"format": 0}, False)
            manifest = prepare.find_prepared(self.data, self.manifest["parameters"])
            if manifest:
                prepare.print_summary(self.data, manifest)


def forged_shard(chance: random.Random, content: bytes) -> bytes:
    """A shard whose header or tokens say something else, and may agree."""
    header = np.frombuffer(content[:1024], "<i4").copy()
    tokens = np.frombuffer(content[1024:], "<u2").copy()
    match chance.randrange(5):
        case 0:
            header[chance.randrange(3)] = chance.choice((0, 1, -1, 2**31 - 1, -(2**31), len(tokens) + 1))
        case 1:
            tokens[chance.randrange(len(tokens))] = chance.choice((0, BOS, 2, VOCAB - 1, VOCAB, 65535))
        case 2:
            tokens = tokens[: chance.choice((0, 1, 2, len(tokens) // 2, len(tokens) - 1))]
            header[2] = len(tokens)
        case 3:
            tokens = np.concatenate([tokens, tokens[: chance.randrange(1, 100)]])
            header[2] = len(tokens)
        case _:
            chance.shuffle(tokens)
    return header.tobytes() + tokens.tobytes()


class Compressed(Kind):
    """Compressed JSONL for a preparation: damaged, or made of other text."""

    full = 1_000

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.parts = [[some_text(20, 100 * part + i) for i in range(15)] for part in range(2)]
        self.plain = [b"".join(json.dumps(text).encode() + b"\n" for text in part) for part in self.parts]
        with_checksum = zstandard.ZstdCompressor(write_checksum=True)
        self.packers: dict[str, Callable[[bytes], bytes]] = {
            ".gz": functools.partial(gzip.compress, mtime=0),
            ".bz2": bz2.compress,
            ".xz": lzma.compress,
            ".zst": with_checksum.compress,
        }

    def read(self, chance: random.Random) -> None:
        suffix = chance.choice(list(self.packers))
        pack = self.packers[suffix]
        path = self.folder / f"x.jsonl{chance.choice((suffix, '', suffix.upper()))}"
        forged = chance.random() < 0.4
        if forged:
            content = pack(forged_lines(chance, self.plain[0]))
        else:
            content = damaged_frames(chance, [pack(part) for part in self.plain])
        path.write_bytes(content)
        try:
            texts = read_texts(path, skip_bad_lines=forged and chance.random() < 0.5)
        finally:
            path.unlink()
        if not forged:
            frames = {len(pack(plain)): part for plain, part in zip(self.plain, self.parts, strict=True)}
            assert len(content) == whole_frames(texts, frames), "text was lost, or is another's"
        for text in texts:
            text.encode()


def damaged_frames(chance: random.Random, frames: list[bytes]) -> bytes:
    match chance.randrange(5):
        case 0:
            return damaged(chance, frames[0]) + frames[1]
        case 1:
            return frames[0] + damaged(chance, frames[1])
        case 2:
            return frames[0] + frames[1][: chance.randrange(len(frames[1]))]
        case 3:
            return frames[0] + chance.randbytes(chance.choice((1, 8, 100)))
    return damaged(chance, frames[0])


def forged_lines(chance: random.Random, plain: bytes) -> bytes:
    """Lines that hold something else, or no end."""
    lines = plain.splitlines()
    i = chance.randrange(len(lines))
    match chance.randrange(7):
        case 0:
            lines[i] = damaged(chance, lines[i])
        case 1:
            lines[i] = edited_json(chance, {"text": json.loads(lines[i]), "id": 1})
        case 2:
            lines[i] = chance.choice(list(NESTED.values()))
        case 3:
            lines[i] = b'"\\ud800"'
        case 4:
            lines[i] = b'"' + b"x" * chance.choice((1 << 20, prepare.MAX_LINE_BYTES + 9, 1 << 27))
        case 5:
            lines[i] = chance.randbytes(300)
        case _:
            lines[i:i] = [b""] * chance.choice((1, 1 << 20))
    return b"\n".join(lines) + chance.choice((b"\n", b""))


def read_texts(path: Path, skip_bad_lines: bool) -> list[str]:
    """The documents of a file, as a preparation reads it."""
    skipped = prepare.SkippedLines()
    (source,) = prepare.source_files([str(path)], skip_bad_lines=skip_bad_lines)
    return [doc.text for batch in prepare.read_batches([source]) for doc in batch.documents(skipped)]


def whole_frames(texts: list[str], frames: dict[int, list[str]]) -> int:
    """How many bytes the frames take that these texts are; `frames` says by size what they hold. -1 for other texts."""
    at = 0
    size = 0
    while at < len(texts):
        for frame, part in frames.items():
            if texts[at : at + len(part)] == part:
                at += len(part)
                size += frame
                break
        else:
            return -1
    return size


class Documents(Kind):
    """The .docs.npz of a finished run."""

    full = 3_000

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = fabricate(folder, count=40)
        self.scores = folder / "run.docs.npz"
        self.whole = self.scores.read_bytes()
        self.bpb = load_run(self.path).bpb

    def read(self, chance: random.Random) -> None:
        damage = chance.choice((damaged, forged_archive))
        self.scores.write_bytes(damage(chance, self.whole))
        assert math.isclose(load_run(self.path).bpb, self.bpb, rel_tol=1e-9)


def forged_archive(chance: random.Random, content: bytes) -> bytes:
    """One array of a .docs.npz damaged, renamed, or another's, and the checksums of the archive as they should be."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as changed:
        parts = {name: archive.read(name) for name in archive.namelist()}
        name, other = chance.choice(list(parts)), chance.choice(list(parts))
        match chance.randrange(6):
            case 0:
                parts[name] = parts[other]
            case 1:
                parts[name + "x"] = parts.pop(name)
            case 2:
                parts[name] = forged_array(chance)
            case _:  # mostly the header, where every byte means something
                size = chance.choice((128, 128, 128, len(parts[name])))
                parts[name] = damaged(chance, parts[name][:size]) + parts[name][size:]
        for name, part in parts.items():
            changed.writestr(name, part)
    return out.getvalue()


def forged_array(chance: random.Random) -> bytes:
    """A .npy of another type or shape, or with a header that claims one."""
    array = np.ones(40, chance.choice(("<f8", ">f8", "<f4", "<i8", "<i4", "?", "<c16", "<U64", "S8", "<M8[s]")))
    if array.dtype.kind == "f":
        array[chance.randrange(40)] = chance.choice((math.nan, math.inf, -1.0, np.finfo(array.dtype).max, 1e-30))
    shape = chance.choice(((40,), (40, 1), (1, 40), (), (0,), (39,), (2**40,), (2**62, 4), (-1,)))
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
    )
    return out.getvalue() + array.tobytes()


class Results(Kind):
    """The other files of a finished run: result, events and log."""

    full = 2_000

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = fabricate(folder, count=40)
        self.files = {path: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}
        self.bpb = load_run(self.path).bpb

    def read(self, chance: random.Random) -> None:
        path = chance.choice([*self.files, self.path])
        whole = self.files[path]
        content = damaged(chance, whole)
        if path.suffix == ".json" and chance.random() < 0.7:
            content = edited_json(chance, json.loads(whole))
        elif path.suffix == ".jsonl" and chance.random() < 0.7:
            lines = whole.splitlines()
            i = chance.randrange(len(lines))
            lines[i] = edited_json(chance, json.loads(lines[i]))
            content = b"\n".join(lines) + b"\n"
        path.write_bytes(content)
        try:
            run = load_run(self.path)
            assert run.bpb == self.bpb and math.isclose(run.result["val_bpb"], self.bpb, rel_tol=1e-9)
            first_difference(run.log_text, run.events)
            assert all(math.isfinite(bpb) for _, bpb in run.validations())
            run.phases()
        finally:
            path.write_bytes(whole)


class Codec(Kind):
    """A text compressed with an artifact; the checksum is repaired, except for one in ten."""

    full = 500
    knobs = dict(EVAL_SEQ_LEN="32", TTT_CHUNK_TOKENS="8", TTT_LORA_RANK="2", TTT_LR="0.02", TTT_BATCH_DOCS="3")

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.artifact = folder / "x.ptz"
        self.artifact.write_bytes(random_artifact(stored_tensors))
        self.text = "\n\n".join(some_text(2, i) for i in range(3)).encode() + b"\xff"
        self.env = {"DATA_PATH": str(prepared(folder))}
        with self.as_a_program():
            predictor = codec.open_predictor(self.artifact, self.knobs)
            self.whole = codec.compress(predictor, self.text, b"\n\n").blob
            contents = codec.unpack_file(self.whole, "x")
            assert codec.decompress(self.artifact, contents) == self.text
        self.header = contents.header
        self.edits = self.whole[6 + int.from_bytes(self.whole[4:6], "little") :][: self.header["edits"]]
        self.coded = contents.coded

    @contextlib.contextmanager
    def as_a_program(self) -> Iterator[None]:
        """What the command does to torch, and its environment, are its own."""
        threads = torch.get_num_threads()
        try:
            with mock.patch.dict(os.environ, self.env):
                codec.make_deterministic(threads)
                yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)

    def damage(self, chance: random.Random) -> bytes:
        if chance.random() < 0.1:
            return damaged(chance, self.whole)
        header = json.dumps(self.header).encode()
        edits = self.edits
        coded = self.coded
        match chance.randrange(4):
            case 0:
                edits = damaged(chance, edits)
                header = json.dumps(self.header | {"edits": len(edits)}).encode()
            case 1:
                coded = damaged(chance, coded)
            case _:
                header = edited_json(chance, self.header)
        deflate = codec.zlib.compressobj(9, wbits=-15, zdict=codec.DEFLATE_DICTIONARY)
        deflated = deflate.compress(header) + deflate.flush()
        body = codec.MAGIC + (len(deflated) & 0xFFFF).to_bytes(2, "little") + deflated + edits + coded
        return body + bytes.fromhex(codec.digest(body))

    def read(self, chance: random.Random) -> None:
        contents = codec.unpack_file(self.damage(chance), "x")
        for name, most in codec.LARGEST_KNOBS.items():
            assert int(contents.header["knobs"].get(name, 0)) <= most
        with self.as_a_program(), contextlib.redirect_stderr(io.StringIO()):
            assert codec.decompress(self.artifact, contents) == self.text


KINDS: dict[str, type[Kind]] = {
    "artifacts": Artifacts,
    "older": OlderArtifacts,
    "broken": BrokenArtifacts,
    "checkpoints": Checkpoints,
    "shards": Shards,
    "compressed": Compressed,
    "documents": Documents,
    "results": Results,
    "codec": Codec,
}

# -----------------------------------------------------------------------------
# Cases


class TooSlow(BaseException):
    """No Exception: no reader of damaged files may take it for damage."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow after so many seconds of processor time, which other programs do not take up; and after six times
    as many by the clock, in which a case may wait for ever."""

    def end(*_: Any) -> None:
        raise TooSlow(f"over {seconds} s")

    limits = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 6 * seconds))
    before = [signal.signal(number, end) for number, _, _ in limits]
    for _, timer, most in limits:
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for _, timer, _ in limits:
            signal.setitimer(timer, 0)
        for (number, _, _), handler in zip(limits, before, strict=True):
            signal.signal(number, handler)


def memory() -> tuple[int, int]:
    """Bytes of memory that this process holds, and the most that it has held since the last call; zeros where the
    system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return sizes["VmRSS"], sizes["VmHWM"]


class Outcome(NamedTuple):
    refused: int
    accepted: int
    slowest: float  # seconds
    largest: int  # bytes of memory
    failures: dict[int, str]  # number of the case: what happened

    def __str__(self) -> str:
        cases = self.refused + self.accepted + len(self.failures)
        return (
            f"{cases} cases: {self.refused} refused, {self.accepted} accepted, {len(self.failures)} failed; "
            f"slowest {self.slowest:.2f} s, most memory {self.largest >> 20} MiB"
        )


def run_case(kind: Kind, number: int) -> bool:
    """Whether the file was accepted. Raises what should not happen."""
    torch.manual_seed(0)
    try:
        with time_limit(MAX_SECONDS):
            kind.read(random.Random(f"{type(kind).__name__} {number}"))
    except UserError:
        return False
    return True


def run_cases(name: str, folder: Path, numbers: range) -> Outcome:
    kind = KINDS[name](folder)
    failures = {}
    accepted = 0
    slowest = 0.0
    largest = 0
    for number in numbers:
        before, _ = memory()
        began = time.monotonic()
        passed = False
        try:
            passed = run_case(kind, number)
        except (Exception, TooSlow) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures[number] = f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
        slowest = max(slowest, time.monotonic() - began)
        _, peak = memory()
        largest = max(largest, peak - before)
        if peak - before > MAX_BYTES:
            failures[number] = f"{peak - before >> 20} MiB of memory"
        accepted += passed and number not in failures
    return Outcome(len(numbers) - accepted - len(failures), accepted, slowest, largest, failures)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"any of {', '.join(KINDS)} [all]")
    parser.add_argument("--count", type=int, help="cases of each kind [as many as its full run has]")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one case, with its traceback")
    args = parser.parse_args(arguments)
    unknown = set(args.kinds) - KINDS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")

    faulthandler.enable()
    torch.set_num_threads(1)
    status = 0
    for name in args.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            if args.only is not None:
                print(
                    f"{name} {args.only}: {'accepted' if run_case(KINDS[name](Path(folder)), args.only) else 'refused'}"
                )
                continue
            began = time.monotonic()
            outcome = run_cases(name, Path(folder), range(args.count or KINDS[name].full))
        print(f"{name}: {outcome}; {time.monotonic() - began:.0f} s", flush=True)
        for number, what in outcome.failures.items():
            print(f"  {name} --only {number}: {what}", flush=True)
        status = max(status, int(bool(outcome.failures)))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
