"""A container gives back exactly what was put in, or is refused; a file appears whole or not at all."""

import dataclasses
import errno
import hashlib
import json
import os
import resource
import struct

import numpy as np
import pytest
import torch
import zstandard
from conftest import rows_of_integers, stored_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import train_gpt
from train_gpt import DataError, Dist, UserError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
stored_arrays = st.sampled_from(["<f4", "<f2", "i1", "u1"]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN and negative zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# ---- round trip -------------------------------------------------------------


@given(
    meta=st.dictionaries(st.text(max_size=6), json_values, max_size=4),
    level=st.sampled_from([None, 1, 19]),
    held=st.dictionaries(st.text(max_size=8), stored_arrays, max_size=4),
)
@settings(max_examples=150)
def test_unpack_gives_back_what_was_packed(meta, level, held):
    tensors = {name: torch.from_numpy(array) for name, array in held.items()}
    got_meta, got = train_gpt.unpack(train_gpt.pack(meta, tensors, level), "file")
    assert got_meta == meta and list(got) == list(tensors)
    assert all(same(got[name], tensors[name]) for name in tensors)


def test_a_transposed_tensor_is_packed_as_it_looks():
    tensor = torch.arange(12, dtype=torch.int8).view(3, 4).mT
    assert torch.equal(train_gpt.unpack(train_gpt.pack({}, {"t": tensor}, 3), "file")[1]["t"], tensor)


def test_packing_repeats_exactly_and_compresses():
    tensors = {f"t{i}": torch.randint(-3, 4, (40, 50), dtype=torch.int8) for i in range(8)}
    assert train_gpt.pack({"a": 1}, tensors, 22) == train_gpt.pack({"a": 1}, tensors, 22)
    assert len(train_gpt.pack({}, tensors, 22)) < 0.5 * len(train_gpt.pack({}, tensors, None))


def test_what_is_coded_already_is_packed_as_it_is():
    data = torch.zeros(5000, dtype=torch.uint8)
    blob = train_gpt.pack({}, {"t": data}, 22)
    assert len(blob) > 5000 and torch.equal(train_gpt.unpack(blob, "file")[1]["t"], data)


def test_what_was_unpacked_may_be_written_to():
    got = train_gpt.unpack(train_gpt.pack({}, {"t": torch.zeros(3)}, None), "file")[1]["t"]
    got += 1
    assert got.tolist() == [1, 1, 1]


# ---- damage -----------------------------------------------------------------

SMALL = {"kind": "artifact", "n": 3}, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.int8)}


def assert_refused(data: bytes) -> str:
    with pytest.raises(DataError) as error:
        train_gpt.unpack(data, "file.ptz")
    assert str(error.value).startswith("file.ptz: ")
    return str(error.value)


@pytest.mark.parametrize("level", [None, 22])
def test_every_flipped_bit_is_noticed(level):
    data = train_gpt.pack(*SMALL, level)
    assert train_gpt.unpack(data, "file")[0] == SMALL[0]
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            assert_refused(bytes(damaged))


@pytest.mark.parametrize("level", [None, 22])
def test_every_truncation_and_addition_is_noticed(level):
    data = train_gpt.pack(*SMALL, level)
    for end in range(len(data)):
        assert_refused(data[:end])
    for more in (b"\0", data[-16:], data):
        assert_refused(data + more)


@given(st.binary(max_size=80))
def test_any_other_file_is_refused(data):
    assert "not a file of this program" in assert_refused(data)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="none.ptz: cannot be read: No such file"):
        train_gpt.read_file(tmp_path / "none.ptz")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        train_gpt.read_file(tmp_path)


# ---- forged: the checksum is right, what it guards is not -------------------


def seal(header: bytes, *blobs: bytes, length: int | None = None) -> bytes:
    size = struct.pack("<I", len(header) if length is None else length)
    body = b"".join([train_gpt.CONTAINER_MAGIC, size, header, *blobs])
    return body + hashlib.blake2b(body, digest_size=16).digest()


def frame(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def forged(table=None, *blobs: bytes, **changes) -> bytes:
    header = {"meta": {}, "zstd": False, "tensors": [] if table is None else table} | changes
    return seal(frame(json.dumps(header).encode()), *blobs)


def without(key: str) -> bytes:
    header = {"meta": {}, "zstd": False, "tensors": []}
    del header[key]
    return seal(frame(json.dumps(header).encode()))


UNSIZED = dict(write_content_size=False)
F4 = bytes(4)
FORGED = {
    "a shape of 400,000 dimensions": forged([["a", "i1", [1] * 400_000, 1]], b"x"),
    "more tensors than any network has": forged([[f"{i}", "f4", [0], 0] for i in range((1 << 17) + 1)]),
    "no header": seal(b""),
    "the header is no frame": seal(b"{}"),
    "the header is not JSON": seal(frame(b"{")),
    "the header is not UTF-8": seal(frame(b'"\xff"')),
    "the header is nested deeply": seal(frame(b"[" * 100_000)),
    "the header is a list": seal(frame(b"[]")),
    "the header is a number": seal(frame(b"1" * 5000)),
    "the header claims no size": seal(frame(b"{}", **UNSIZED)),
    "the header is cut short": seal(frame(json.dumps({"meta": {}, "zstd": False, "tensors": []}).encode())[:-3]),
    "the header is a bomb": seal(frame(bytes(1 << 25))),
    "the header's length is beyond the file": seal(frame(b"{}"), length=1 << 31),
    "the header's length cuts it short": seal(frame(b"{}"), length=3),
    "nothing after the magic": seal(b"")[:8] + hashlib.blake2b(seal(b"")[:8], digest_size=16).digest(),
    "no meta": without("meta"),
    "no tensors": without("tensors"),
    "meta is a number": forged(meta=1),
    "meta is text": forged(meta="ab"),
    "tensors are a number": forged(3),
    "tensors are numbers": forged([1, 2]),
    "an entry of three": forged([["a", "f4", 4]], F4),
    "an entry of five": forged([["a", "f4", [1], 4, 0]], F4),
    "a type of another kind": forged([["a", "f8", [1], 8]], F4, F4),
    "a type that is a list": forged([["a", ["f4"], [1], 4]], F4),
    "a name that is a number": forged([[1, "f4", [1], 4]], F4),
    "a name that is a list": forged([[["a"], "f4", [1], 4]], F4),
    "a name twice": forged([["a", "f4", [1], 4], ["a", "f4", [1], 4]], F4, F4),
    "a shape of another size": forged([["a", "f4", [2], 4]], F4),
    "a shape of a smaller size": forged([["a", "i1", [3], 4]], F4),
    "a negative side": forged([["a", "f4", [-1], 4]], F4),
    "two negative sides": forged([["a", "f4", [-1, -1], 4]], F4),
    "a side that is no whole number": forged([["a", "f4", [1.0], 4]], F4),
    "a side that is true": forged([["a", "f4", [True], 4]], F4),
    "a shape that is a number": forged([["a", "f4", 1, 4]], F4),
    "a shape that is text": forged([["a", "f4", "", 4]], F4),
    "a shape that is nothing": forged([["a", "f4", None, 4]], F4),
    "a shape that is a table": forged([["a", "f4", {}, 4]], F4),
    "a shape without end": forged([["a", "f4", [2**40], 4]], F4),
    "a shape over every number": forged([["a", "f4", [2**200], 4]], F4),
    "a side over every number, and none": forged([["a", "f4", [2**200, 0], 0]]),
    "a huge side, and none": forged([["a", "f4", [2**62, 2**62, 0], 0]]),
    "a negative size": forged([["a", "f4", [1], 8], ["b", "f4", [0], -4]], F4),
    "a size that is no whole number": forged([["a", "f4", [1], 4.0]], F4),
    "a size that is text": forged([["a", "f4", [1], "4"]], F4),
    "a size over every number": forged([["a", "f4", [1], 2**200]], F4),
    "sizes under the file's": forged([["a", "f4", [1], 4]], F4, F4),
    "sizes over the file's": forged([["a", "f4", [1], 4], ["b", "f4", [1], 4]], F4),
    "a frame that is none": forged([["a", "f4", [1], 4]], F4, zstd=True),
    "a frame that is empty": forged([["a", "f4", [1], 0]], zstd=True),
    "a frame that claims too much": forged([["a", "f4", [1], len(frame(bytes(5)))]], frame(bytes(5)), zstd=True),
    "a frame that claims too little": forged([["a", "f4", [1], len(frame(bytes(3)))]], frame(bytes(3)), zstd=True),
    "a frame of unknown size": forged([["a", "f4", [1], len(frame(F4, **UNSIZED))]], frame(F4, **UNSIZED), zstd=True),
    "a frame with something behind it": forged([["a", "f4", [1], len(frame(F4)) + 1]], frame(F4) + b"x", zstd=True),
    "coded bytes of another size": forged([["a", "u1", [5], 4]], F4, zstd=True),
    "a bomb": forged([["a", "f4", [1], len(frame(bytes(1 << 24)))]], frame(bytes(1 << 24)), zstd=True),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(case):
    assert_refused(FORGED[case])


entries = st.tuples(
    st.sampled_from(["a", "b", 1, None]),
    st.sampled_from(["f4", "i1", "f8", 0, []]),
    st.lists(st.integers(-1, 3) | st.none() | st.integers(0, 2**70), max_size=3) | json_values,
    st.integers(-1, 9),
)


@given(
    header=json_values
    | st.fixed_dictionaries(
        {"meta": json_values, "zstd": json_values, "tensors": st.lists(entries, max_size=3) | json_values}
    ),
    blob=st.binary(max_size=12),
)
@settings(max_examples=200)
def test_any_forged_header_is_read_or_refused(header, blob):
    try:
        meta, tensors = train_gpt.unpack(seal(frame(json.dumps(header).encode()), blob), "file.ptz")
    except DataError as error:
        assert str(error).startswith("file.ptz: ")
    else:
        assert isinstance(meta, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values())


def test_a_bomb_is_refused_before_it_takes_memory():
    """A frame of a few KiB that unfolds to 1 GiB is never unfolded, and a shape is never allocated for nothing."""
    bomb = frame(bytes(1 << 28))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(forged([["a", "i1", [9], len(bomb)]], bomb, zstd=True))
    assert_refused(forged([["a", "i1", [1 << 30], len(bomb)]], bomb, zstd=False))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


def test_many_small_bombs_are_one(monkeypatch):
    """Each tensor is within the limit, all of them are not; what is not compressed cannot grow."""
    one = frame(bytes(600))
    table = [[name, "i1", [600], len(one)] for name in "ab"]
    assert set(train_gpt.unpack(forged(table, one, one, zstd=True), "file.ptz")[1]) == {"a", "b"}
    monkeypatch.setattr(train_gpt, "MAX_UNPACKED_BYTES", 1000)
    assert_refused(forged(table, one, one, zstd=True))
    plain = [[name, "i1", [600], 600] for name in "ab"]
    assert set(train_gpt.unpack(forged(plain, bytes(600), bytes(600), zstd=False), "file.ptz")[1]) == {"a", "b"}


# ---- what fills a network ---------------------------------------------------


def a_network(config: train_gpt.ModelConfig) -> train_gpt.GPT:
    model = train_gpt.GPT(config)
    train_gpt.init_weights(model, 0)
    return model


@pytest.fixture
def stored(tiny_config) -> dict[str, torch.Tensor]:
    return stored_tensors(a_network(tiny_config))


def restored(tiny_config, stored) -> train_gpt.GPT:
    model = train_gpt.GPT(tiny_config)
    train_gpt.restore(model, stored, "file.ptz")
    return model


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


MATRIX = "blocks.0.mlp.up.weight"
GAIN = "blocks.0.attention.q_gain"
SCALE = f"{MATRIX}.scale"
WRONG_ROWS = {  # of artifacts of the first version; test_quantise.py has those of streams
    "a matrix is missing": lambda s: {n: t for n, t in s.items() if n != MATRIX},
    "a scale is missing": lambda s: {n: t for n, t in s.items() if n != SCALE},
    "a gain is missing": lambda s: {n: t for n, t in s.items() if n != GAIN},
    "one too many": lambda s: s | {"extra": torch.zeros(1)},
    "a scale for a gain": lambda s: s | {f"{GAIN}.scale": torch.ones(4).half()},
    "nothing": lambda s: {},
    "a matrix the wrong way round": lambda s: s | {MATRIX: s[MATRIX].mT.contiguous()},
    "a matrix that is flat": lambda s: s | {MATRIX: s[MATRIX].flatten()},
    "a matrix that is a number": lambda s: s | {MATRIX: torch.tensor(1, dtype=torch.int8)},
    "a matrix of fractions": lambda s: s | {MATRIX: s[MATRIX].float()},
    "a gain of integers": lambda s: s | {GAIN: s[GAIN].to(torch.int8)},
    "a gain of another length": lambda s: s | {GAIN: s[GAIN][:-1]},
    "a gain that is not finite": lambda s: s | {GAIN: poisoned(s[GAIN], float("nan"))},
    "a scale that is not finite": lambda s: s | {SCALE: poisoned(s[SCALE], float("inf"))},
    "a scale for all rows": lambda s: s | {SCALE: s[SCALE][:1]},
    "a scale that is a number": lambda s: s | {SCALE: s[SCALE][0]},
    "a scale of another length": lambda s: s | {SCALE: s[SCALE][:-1]},
    "a scale of two dimensions": lambda s: s | {SCALE: s[SCALE][:, None]},
    "a scale of integers": lambda s: s | {SCALE: s[SCALE].to(torch.int8)},
    "a stream beside them": lambda s: s | {"matrices.integers": torch.zeros(9, dtype=torch.uint8)},
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_tensors_that_do_not_fit_the_network_are_refused(tiny_config, case):
    stored = rows_of_integers(a_network(tiny_config))
    assert restored(tiny_config, stored).config == tiny_config
    with pytest.raises(DataError, match="^file.ptz: "):
        restored(tiny_config, WRONG_ROWS[case](stored))


# ---- artifacts --------------------------------------------------------------


@pytest.fixture
def setup(tiny_data, tiny_config, tiny_run) -> train_gpt.Setup:
    return train_gpt.make_setup(tiny_config, tiny_run(ttt_optimizer="adamw"), Dist())


@pytest.fixture
def meta(setup) -> dict:
    return {"kind": "artifact", "model": dataclasses.asdict(setup.model), "tokenizer": setup.tokenizer.sha256}


def write_artifact(folder, meta, stored):
    path = folder / "model.ptz"
    path.write_bytes(train_gpt.pack(meta, stored, 1))
    return path


@pytest.mark.parametrize("version", [stored_tensors, rows_of_integers])
def test_an_artifact_rebuilds_its_network_whatever_the_environment_says(setup, meta, tmp_path, tiny_config, version):
    stored = version(a_network(tiny_config))
    other = setup._replace(model=train_gpt.ModelConfig(vocab_size=64))
    model = train_gpt.load_artifact(write_artifact(tmp_path, meta, stored), other)
    assert model.config == tiny_config
    expected = dict(restored(tiny_config, stored).named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_a_whole_number_is_a_number_too(setup, meta, stored, tmp_path):
    whole = {name: int(value) if value == int(value) else value for name, value in meta["model"].items()}
    model = train_gpt.load_artifact(write_artifact(tmp_path, meta | {"model": whole}, stored), setup)
    assert repr(model.config) == repr(setup.model)


def with_new_field(monkeypatch, **options) -> None:
    """Let ModelConfig have one more field, with these options of its knob."""

    @dataclasses.dataclass(frozen=True)
    class Newer(train_gpt.ModelConfig):
        new_width: int = train_gpt.knob(7, "a part that older artifacts lack", low=0, **options)

    Newer.__annotations__ = {"new_width": int}  # get_type_hints looks names up in this module otherwise
    monkeypatch.setattr(train_gpt, "ModelConfig", Newer)


def test_an_artifact_older_than_a_field_means_what_the_field_says(meta, monkeypatch):
    with_new_field(monkeypatch, absent=0)
    assert train_gpt.stored_config(meta, "old.ptz").new_width == 0
    newer = meta | {"model": meta["model"] | {"new_width": 3}}
    assert train_gpt.stored_config(newer, "new.ptz").new_width == 3


def test_a_field_that_does_not_say_what_its_absence_means_is_refused_by_name(meta, monkeypatch):
    with_new_field(monkeypatch)
    with pytest.raises(DataError, match="old.ptz.*new_width is missing"):
        train_gpt.stored_config(meta, "old.ptz")


def test_a_field_of_a_newer_version_is_refused_by_name(meta):
    newer = meta | {"model": meta["model"] | {"future_width": 3}}
    with pytest.raises(DataError, match="future_width: unknown here, written by a newer version; use that version"):
        train_gpt.stored_config(newer, "new.ptz")


WRONG_META = {
    "a checkpoint": lambda m: m | {"kind": "checkpoint"},
    "no kind": lambda m: {n: v for n, v in m.items() if n != "kind"},
    "another tokenizer": lambda m: m | {"tokenizer": "0" * 64},
    "no tokenizer": lambda m: {n: v for n, v in m.items() if n != "tokenizer"},
    "a tokenizer that is a number": lambda m: m | {"tokenizer": 3},
    "no configuration": lambda m: {n: v for n, v in m.items() if n != "model"},
    "a configuration that is a list": lambda m: m | {"model": [1]},
    "an entry too many": lambda m: m | {"model": m["model"] | {"extra": 1}},
    "an entry too few": lambda m: m | {"model": {n: v for n, v in m["model"].items() if n != "rope_base"}},
    "an impossible shape": lambda m: m | {"model": m["model"] | {"num_heads": 3}},
    "no heads": lambda m: m | {"model": m["model"] | {"num_heads": 0}},
    "a size that is text": lambda m: m | {"model": m["model"] | {"vocab_size": "64"}},
    "a size that is a fraction": lambda m: m | {"model": m["model"] | {"num_layers": 4.5}},
    "a size under nothing": lambda m: m | {"model": m["model"] | {"vocab_size": -64}},
    "a size of another network": lambda m: m | {"model": m["model"] | {"model_dim": 64}},
    "a width beyond memory": lambda m: m | {"model": m["model"] | {"model_dim": 1 << 42}},
    "a number that is none": lambda m: m | {"model": m["model"] | {"rope_base": None}},
}


@pytest.mark.parametrize("case", WRONG_META)
def test_an_artifact_that_does_not_describe_our_network_is_refused(setup, meta, stored, tmp_path, case):
    path = write_artifact(tmp_path, WRONG_META[case](meta), stored)
    with pytest.raises(DataError) as error:
        train_gpt.load_artifact(path, setup)
    assert str(path) in str(error.value)


def test_the_message_says_which_kind_and_which_tokenizer(setup, meta, stored, tmp_path):
    with pytest.raises(DataError, match="of kind 'checkpoint', expected an artifact"):
        train_gpt.load_artifact(write_artifact(tmp_path, meta | {"kind": "checkpoint"}, stored), setup)
    with pytest.raises(DataError, match="made for another tokenizer.*000000.*TOKENIZER_PATH"):
        train_gpt.load_artifact(write_artifact(tmp_path, meta | {"tokenizer": "0" * 64}, stored), setup)


@pytest.mark.parametrize("model", [None, [1], "x", {}, {"vocab_size": "many"}, {"vocab_size": None}])
def test_a_run_refuses_an_artifact_without_a_vocabulary_before_anything_else(setup, meta, stored, tmp_path, model):
    path = write_artifact(tmp_path, meta | {"model": model}, stored)
    run = dataclasses.replace(setup.run, artifact=str(path))
    with pytest.raises(DataError) as error:
        train_gpt.load_artifact(path, train_gpt.make_setup(setup.model, run, Dist()))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("version", [stored_tensors, rows_of_integers])
def test_bytes_by_part_add_up_to_the_file(meta, tmp_path, tiny_config, version):
    path = write_artifact(tmp_path, meta, version(a_network(tiny_config)))
    parts = train_gpt.part_bytes(path)
    assert sum(parts.values()) == path.stat().st_size and min(parts.values()) > 0
    assert set(parts) == {"integers", "steps", "scalars", "header"}


# ---- files ------------------------------------------------------------------


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def chunks():
        for part in (b"new" * 1000, b" and ", b"whole"):
            yield part
            assert path.read_bytes() == b"old"

    train_gpt.write_atomically(path, chunks())
    assert path.read_bytes() == b"new" * 1000 + b" and whole" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), SystemExit()])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def chunks():
        yield b"half"
        raise error

    with pytest.raises(type(error)):
        train_gpt.write_atomically(path, chunks())
    assert names(tmp_path) == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError) as error:
        train_gpt.write_atomically(path, [b"new"])
    assert str(path) in str(error.value) and "No space left" in str(error.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path):
    """The operating system itself refuses the second half."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            train_gpt.write_atomically(path, [bytes(60_000)] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="none/file: cannot be written: No such file"):
        train_gpt.write_atomically(tmp_path / "none" / "file", [b"new"])


@pytest.mark.parametrize("path", [".", "folder"])
def test_a_folder_is_not_written_to_as_a_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{path}: cannot be written: "):
        train_gpt.write_atomically(path, [b"new"])
    assert names(tmp_path) == ["folder"]


# ---- bad input as a user meets it -------------------------------------------


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def flip(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 1
    return data


def shard_of(*tokens: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def unchanged(folder) -> None:
    """The data folder stays as it is."""


TERMINAL = "\x1b[2J\nresult val_bpb:0.9"
VAL = "fineweb_val_000000.bin"
TRAIN = "fineweb_train_000001.bin"
BAD = {  # environment, what happens to the data folder, what the message must hold
    "unknown knob": ({"TTT_LORA_RNK": "4"}, unchanged, ["TTT_LORA_RNK is not a knob", "TTT_LORA_RANK"]),
    "bad value": ({"TTT_LR": "fast"}, unchanged, ["TTT_LR='fast'", "a number"]),
    "contradiction": ({"TTT_MOMENTUM": "0.5"}, unchanged, ["TTT_MOMENTUM", "TTT_OPTIMIZER=sgd"]),
    "no data": ({"DATA_PATH": "nowhere"}, unchanged, ["nowhere"]),
    "no BOS": ({}, lambda f: [p.write_bytes(shard_of(*[5] * 400)) for p in f.glob("fineweb_train*")], ["no BOS"]),
    "wrong magic": ({}, lambda f: damage(f / VAL, lambda d: b"\0" + d[1:]), [VAL, "not a shard"]),
    "truncated": ({}, lambda f: damage(f / VAL, lambda d: d[:-2]), [VAL, "truncated"]),
    "odd-sized": ({}, lambda f: damage(f / TRAIN, lambda d: d[:-1]), [TRAIN, "truncated"]),
    "empty validation": ({}, lambda f: (f / VAL).write_bytes(shard_of()), [VAL, "hold a document"]),
    "token": ({}, lambda f: (f / VAL).write_bytes(shard_of(1, 64)), [VAL, "token 64", "VOCAB_SIZE=64"]),
    "training token": ({}, lambda f: (f / TRAIN).write_bytes(shard_of(*[64] * 300)), [TRAIN, "token 64"]),
    "tokenizer": ({"VOCAB_SIZE": "65"}, unchanged, ["tokenizer.model", "64 pieces", "VOCAB_SIZE=65"]),
    "side-car": ({}, lambda f: (f / VAL.replace("val", "val_bytes")).write_bytes(shard_of(1, 2)), ["2 entries"]),
    "tampered artifact": ({"ARTIFACT": "data/a.ptz"}, lambda f: damage(f / "a.ptz", flip), ["a.ptz", "damaged"]),
    "unreadable artifact": ({"ARTIFACT": "data/b.ptz"}, unchanged, ["b.ptz", "No such file"]),
    "artifact of another kind": ({"ARTIFACT": f"data/{VAL}"}, unchanged, [VAL, "not a file of this program"]),
    "names that a terminal obeys": (
        {"ARTIFACT": "data/c.ptz"},
        lambda f: (f / "c.ptz").write_bytes(forged(meta={"kind": "artifact", "model": {TERMINAL: 1}})),
        ["c.ptz", r"\x1b[2J\nresult"],
    ),
    "checkpoint that is none": (
        {"RESUME": "data/a.ptz"},
        unchanged,
        ["a.ptz", "its kind is 'artifact', not 'checkpoint'"],
    ),
    "size limit": ({"ARTIFACT_BYTES": "1000"}, unchanged, ["ARTIFACT_BYTES=1000"]),
}
AS_A_PROCESS = ["unknown knob", "truncated", "tampered artifact"]


@pytest.fixture
def whole_folder(tiny_data, tmp_path, meta, stored):
    write_artifact(tmp_path, meta, stored).rename(tiny_data / "a.ptz")
    return tiny_data


def assert_clear(status: int, out: str, err: str, mentioned: list[str]) -> None:
    assert status == 2, err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert err.removesuffix("\n").isprintable()
    assert all(part in err for part in mentioned), err


@pytest.mark.parametrize("case", AS_A_PROCESS)
def test_bad_input_ends_a_run_with_one_clear_line(whole_folder, tiny_env, run_script, case):
    env, change, mentioned = BAD[case]
    change(whole_folder)
    done = run_script(env=tiny_env(**env))
    assert_clear(done.returncode, done.stdout, done.stderr, mentioned)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_was_found(whole_folder, tiny_env, tmp_path, monkeypatch, capsys, case):
    """All of them, in this process, for speed."""
    env, change, mentioned = BAD[case]
    change(whole_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train_gpt, "install_signal_handlers", lambda ending: None
    )  # it would take over this process's signals
    for name, value in tiny_env(CUBLAS_WORKSPACE_CONFIG=":4096:8", **env).items():
        monkeypatch.setenv(name, value)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        status = train_gpt.main([])
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert_clear(status, *capsys.readouterr(), mentioned)
    assert not list(tmp_path.rglob("*.partial")) and not list((tmp_path / "logs").glob("*.json"))


@pytest.mark.parametrize("side", [1 << 63, 10**400, -1, 1.0, None, "1"])
def test_a_shape_of_the_table_is_one_of_this_world(side):
    """torch keeps a number that it cannot print."""
    with pytest.raises(DataError, match="^x.ptz: .* is not a shape"):
        train_gpt.table_layout({"tensors": [["embed", "i1", [32, side], 0]]}, "x.ptz")


def test_tensors_are_compared_with_the_network_before_they_are_unpacked(setup, meta, stored, tmp_path, monkeypatch):
    """An artifact of 84 kB could claim gigabytes."""
    path = write_artifact(tmp_path, meta, stored | {"extra": torch.zeros(1).half()})
    monkeypatch.setattr(train_gpt, "read_tensor", lambda *_: pytest.fail("a tensor was unpacked"))
    with pytest.raises(DataError, match="extra is .*expected None"):
        train_gpt.load_artifact(path, setup)
