"""Shards, tokenizers and side-cars that are not what they should be are refused; good ones are read as written."""

import hashlib
import json
import os
import random
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import read_events
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import BOS, ConfigError, DataError, Dist, TrainingStream

VOCAB = 64


def refusal(function, *arguments) -> str:
    with pytest.raises(DataError) as error:
        function(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def load(run):
    return train_gpt.load_validation(run.data_path, VOCAB, train_gpt.load_tokenizer(run, VOCAB))


def validation_shard(folder):
    return folder / "fineweb_val_000000.bin"


def with_header(first: tuple[int, ...], body: bytes) -> bytes:
    header = np.zeros(256, "<i4")
    header[: len(first)] = first
    return header.tobytes() + body


# ---- shards -----------------------------------------------------------------


@given(tokens=st.lists(st.integers(0, 65535), max_size=50))
def test_a_shard_is_read_as_it_was_written(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "shard.bin"
    path.write_bytes(with_header((20240520, 1, len(tokens)), np.array(tokens, "<u2").tobytes()))
    read = train_gpt.read_shard(path)
    assert read.dtype == np.dtype("<u2") and read.tolist() == tokens


GOOD = (20240520, 1, 3)


@pytest.mark.parametrize(
    "data, mentioned",
    [
        (with_header((20240521, 1, 3), bytes(6)), ("not a shard", "20240521", "20240520")),
        (with_header((20240520, 2, 3), bytes(6)), ("not a shard", "version", "2")),
        (np.array(GOOD, ">i4").tobytes() + bytes(1012 + 6), ("not a shard",)),
        (with_header(GOOD, bytes(4)), ("3 tokens", "hold 2", "truncated")),
        (with_header(GOOD, bytes(5)), ("3 tokens", "2.5", "truncated")),
        (with_header(GOOD, bytes(7)), ("3 tokens", "3.5")),
        (with_header(GOOD, bytes(8)), ("3 tokens", "hold 4")),
        (with_header((20240520, 1, -1), b""), ("-1 tokens",)),
        (with_header((20240520, 1, 2**31 - 1), bytes(6)), ("2147483647 tokens",)),
        (with_header(GOOD, b"")[:1023], ("1023 bytes", "header")),
        (b"", ("0 bytes", "header")),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, data, mentioned):
    path = tmp_path / "shard.bin"
    path.write_bytes(data)
    message = refusal(train_gpt.read_shard, path)
    assert all(part in message for part in (str(path), "prepare the data again", *mentioned)), message


def test_a_missing_shard_is_refused(tmp_path):
    path = tmp_path / "none.bin"
    message = refusal(train_gpt.read_shard, path)
    assert str(path) in message and "No such file" in message


@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_folder_without_shards_is_refused(tmp_path, kind):
    (tmp_path / f"fineweb_{kind}_bytes_000000.bin").touch()  # a side-car is no shard
    message = refusal(train_gpt.find_shards, str(tmp_path), kind)
    assert f"DATA_PATH={tmp_path}" in message and f"fineweb_{kind}_" in message


def test_shards_come_in_order_and_without_side_cars(tmp_path, write_shard):
    names = [f"fineweb_val_{i:06}.bin" for i in (0, 1, 2, 10)]
    for name in [*names[::-1], "fineweb_val_bytes_000000.bin", "fineweb_train_000000.bin"]:
        write_shard(tmp_path / name, [BOS, 2])
    assert [path.name for path in train_gpt.find_shards(str(tmp_path), "val")] == names


# ---- validation and its side-car --------------------------------------------


@pytest.mark.parametrize(
    "tokens, mentioned",
    [
        ([], ("begin with BOS",)),
        ([BOS], ("hold a document",)),
        ([BOS, BOS, BOS], ()),  # documents, but no text: nothing to divide by
        ([7, 8, BOS, 9], ("begin with BOS", "[7, 8, 1, 9]")),
        ([7, 8, 9], ("begin with BOS",)),
        ([BOS, 5, VOCAB], ("token 64 at position 2", "VOCAB_SIZE=64", "another tokenizer")),
        ([BOS, 5, 65535], ("token 65535",)),
    ],
)
def test_bad_validation_is_refused(tiny_data, tiny_run, write_shard, tokens, mentioned):
    write_shard(validation_shard(tiny_data), tokens)
    message = refusal(load, tiny_run())
    assert all(part in message for part in mentioned), message


def test_every_validation_shard_is_checked(tiny_data, tiny_run, write_shard):
    path = write_shard(tiny_data / "fineweb_val_000001.bin", [BOS, VOCAB])
    assert str(path) in refusal(load, tiny_run())
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(load, tiny_run())


def test_all_validation_shards_are_one_set_in_order(tiny_data, tiny_run, write_shard):
    before = load(tiny_run())
    write_shard(tiny_data / "fineweb_val_000001.bin", [BOS, 5, 6, BOS, 7])
    after = load(tiny_run())
    assert after.tokens.tolist() == [*before.tokens.tolist(), BOS, 5, 6, BOS, 7]
    assert len(after) == len(before) + 2 and after.lengths[-3:].tolist() == [before.lengths[-1] + 1, 3, 1]


def test_a_shard_may_go_on_with_the_document_of_the_one_before(tiny_data, tiny_run, write_shard):
    """As the contest's own script cuts them, which may also leave one empty: the stream is what counts."""
    whole = train_gpt.read_shard(validation_shard(tiny_data)).tolist()
    expected = load(tiny_run())
    for i, (begin, end) in enumerate(((0, 50), (50, 60), (60, 60), (60, len(whole)))):
        write_shard(tiny_data / f"fineweb_val_{i:06}.bin", whole[begin:end])
    assert whole[50] != BOS and BOS not in whole[50:60]
    cut = load(tiny_run())
    assert cut.sha256() == expected.sha256() and cut.starts.tolist() == expected.starts.tolist()


def test_a_shard_that_goes_on_needs_the_one_before(tiny_data, tiny_run, write_shard):
    path = write_shard(tiny_data / "fineweb_val_000002.bin", [5, BOS, 6])
    message = refusal(load, tiny_run())
    assert str(path) in message and "fineweb_val_000001.bin is missing" in message
    path.rename(tiny_data / "fineweb_val_000001.bin")
    load(tiny_run())
    validation_shard(tiny_data).unlink()
    assert "validation must begin with BOS" in refusal(load, tiny_run())


def side_car(folder, write_shard, entries):
    return write_shard(folder / "fineweb_val_bytes_000000.bin", entries)


def test_a_side_car_that_the_manifest_names_may_not_be_missing(tiny_data, tiny_run):
    """The tokens alone would stand for more bytes, where markers are tokens: a score too good."""
    path = tiny_data / "manifest.json"
    splits = {"val": {"sidecars": [{"file": "fineweb_val_bytes_000000.bin"}]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": splits}))
    assert "fineweb_val_bytes_000000.bin" in refusal(load, tiny_run())


def test_a_side_car_says_how_many_bytes_tokens_stand_for(tiny_data, tiny_run, write_shard):
    count = len(train_gpt.read_shard(validation_shard(tiny_data)))
    entries = [random.randrange(300) for _ in range(count)]
    side_car(tiny_data, write_shard, entries)
    docs = load(tiny_run())
    assert docs.bytes.tolist() == entries and docs.target_bytes().sum() == sum(entries[1:])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_side_car_of_another_length_is_refused(tiny_data, tiny_run, write_shard, change):
    count = len(train_gpt.read_shard(validation_shard(tiny_data)))
    path = side_car(tiny_data, write_shard, [1] * (count + change))
    message = refusal(load, tiny_run())
    assert all(part in message for part in (str(path), str(count), str(count + change))), message


def test_a_side_car_for_some_shards_only_is_refused(tiny_data, tiny_run, write_shard):
    side_car(tiny_data, write_shard, [1] * len(train_gpt.read_shard(validation_shard(tiny_data))))
    write_shard(tiny_data / "fineweb_val_000001.bin", [BOS, 5])
    assert "fineweb_val_bytes_000001.bin" in refusal(load, tiny_run())


def test_a_damaged_side_car_is_refused(tiny_data, tiny_run, write_shard):
    path = side_car(tiny_data, write_shard, [1] * len(train_gpt.read_shard(validation_shard(tiny_data))))
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(load, tiny_run())


# ---- tokenizer --------------------------------------------------------------


def test_the_tokenizer_is_the_manifests_or_the_one_that_is_set(tiny_data, tiny_run, train_tokenizer, tmp_path):
    named = train_gpt.load_tokenizer(tiny_run(), VOCAB)
    assert named.path == tiny_data / "tokenizer.model" and named.processor.get_piece_size() == VOCAB
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(vocab_size=50))
    chosen = train_gpt.load_tokenizer(tiny_run(tokenizer_path=str(other)), 50)
    assert chosen.path == other and chosen.sha256 != named.sha256


MANIFESTS = [None, "", "[]", "{}", '{"tokenizer": "x"}', '{"tokenizer": {"path": 7}}', "\xff", "[" * 10**5]
MANIFESTS += ['{"tokenizer": {"path": "a\\u0000b"}}', '{"tokenizer": {"path": "\\ud800"}}']  # names that no file has


@pytest.mark.parametrize("manifest", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_folder_that_names_no_tokenizer_is_refused(tiny_data, tiny_run, manifest):
    (tiny_data / "manifest.json").unlink()
    if manifest is not None:
        (tiny_data / "manifest.json").write_text(manifest, encoding="latin-1")
    message = refusal(train_gpt.load_tokenizer, tiny_run(), VOCAB)
    assert str(tiny_data) in message and ("TOKENIZER_PATH" in message or "manifest.json: damaged" in message)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path, tiny_run):
    """Not to name no tokenizer, which sent the user to TOKENIZER_PATH."""
    message = refusal(train_gpt.load_tokenizer, tiny_run(data_path=str(tmp_path / "mispelt")), VOCAB)
    assert "mispelt: no such folder" in message and "TOKENIZER_PATH" not in message


@pytest.mark.parametrize("manifest", ["", "{", "\xff", "[" * 10**5])
def test_a_damaged_manifest_is_refused_though_a_tokenizer_is_named(tiny_data, tiny_run, manifest):
    """It was taken for none, and no checksum that it lists was compared."""
    tokenizer = train_gpt.load_tokenizer(tiny_run(), VOCAB)
    (tiny_data / "manifest.json").write_text(manifest, encoding="latin-1")
    assert "manifest.json: damaged: " in refusal(train_gpt.load_validation, str(tiny_data), VOCAB, tokenizer)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_a_tokenizer_is_read_from_a_file(tiny_data, tiny_run, kind):
    """The manifest may name anything; a device never ends."""
    path = tiny_data / "x"
    if kind == "pipe":
        os.mkfifo(path)
    named = {"device": "/dev/zero", "pipe": "x", "folder": "."}[kind]
    (tiny_data / "manifest.json").write_text(json.dumps({"tokenizer": {"path": named}}))
    assert "not a file; set TOKENIZER_PATH" in refusal(train_gpt.load_tokenizer, tiny_run(), VOCAB)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(1000), None])
def test_what_is_no_tokenizer_is_refused(tiny_data, tiny_run, content):
    path = tiny_data / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    message = refusal(train_gpt.load_tokenizer, tiny_run(), VOCAB)
    assert str(path) in message and "not a SentencePiece model" in message and "TOKENIZER_PATH" in message


def test_a_missing_tokenizer_is_refused(tiny_data, tiny_run):
    (tiny_data / "tokenizer.model").unlink()
    message = refusal(train_gpt.load_tokenizer, tiny_run(), VOCAB)
    assert str(tiny_data / "tokenizer.model") in message and "TOKENIZER_PATH" in message


def test_a_tokenizer_of_another_size_is_refused(tiny_data, tiny_run):
    message = refusal(train_gpt.load_tokenizer, tiny_run(), VOCAB + 1)
    assert "64 pieces" in message and "VOCAB_SIZE=65" in message and "set VOCAB_SIZE=64" in message


@pytest.mark.parametrize("options, found", [(dict(bos_id=2, eos_id=1), "2"), (dict(bos_id=-1), "-1")])
def test_a_tokenizer_with_another_bos_is_refused(tiny_data, tiny_run, train_tokenizer, options, found):
    (tiny_data / "tokenizer.model").write_bytes(train_tokenizer(**options))
    message = refusal(train_gpt.load_tokenizer, tiny_run(), VOCAB)
    assert f"BOS is {found}, expected 1" in message


# ---- bytes ------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", "<0xE2>", "<0x20>", "▁", "▁the", "re", "é", "▁▁", "▁½", "a▁b", "▁un"]


class Pieces:
    """The part of a SentencePiece processor that is asked, over PIECES."""

    get_piece_size = staticmethod(lambda: len(PIECES))
    id_to_piece = staticmethod(lambda i: PIECES[i])
    is_unknown = staticmethod(lambda i: i == 0)
    is_control = staticmethod(lambda i: i in (1, 2))
    is_byte = staticmethod(lambda i: i in (3, 4))
    is_unused = staticmethod(lambda i: i == 12)


@pytest.mark.parametrize(
    "text, expected",
    [
        ([1], [0]),
        ([1, 6, 7], [0, 3, 2]),  # no byte for the space after BOS
        ([1, 7, 6], [0, 2, 4]),
        ([7, 6, 1, 6], [2, 4, 0, 3]),
        ([1, 5, 5, 7], [0, 0, 1, 2]),  # a space alone
        ([2, 6, 0, 6], [0, 3, 0, 3]),  # nor after any other control or unknown piece, which are nothing themselves
        ([7, 12, 6], [2, 0, 3]),  # nor after an unused one
        ([1, 3, 6, 4, 5], [0, 1, 4, 1, 1]),  # a byte piece is one byte, and text
        ([1, 8, 9, 10, 11], [0, 2, 4, 3, 5]),  # é; ▁▁: a space and a mark of three bytes; ½; a mark that does not lead
        ([6, 6], [3, 4]),
    ],
)
def test_the_contests_bytes_by_hand(text, expected):
    counted = train_gpt.contest_bytes(np.array(text, np.uint16), train_gpt.piece_bytes(Pieces()))
    assert counted.dtype == np.int64 and counted.tolist() == expected


@given(st.text(alphabet="etaoin shrdlu  \n½é😀▁A", max_size=40))
@settings(max_examples=300)
def test_bytes_are_those_of_the_decoded_text(train_tokenizer, text):
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(vocab_size=320, byte_fallback=True))
    ids = [BOS, *processor.encode(text)]
    counted = train_gpt.contest_bytes(np.array(ids, np.uint16), train_gpt.piece_bytes(processor))
    decoded = processor.decode(ids)
    first_piece = processor.id_to_piece(ids[1]) if len(ids) > 1 else ""
    assert int(counted.sum()) == len(decoded.encode()) - first_piece.startswith("▁")


@pytest.fixture
def spaces_inside(tiny_data, train_tokenizer, write_shard) -> Path:
    """A folder without side-cars, whose tokenizer puts spaces at the end of pieces."""
    model = train_tokenizer(treat_whitespace_as_suffix=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    (tiny_data / "tokenizer.model").write_bytes(model)
    texts = ["neat toast on the slate", "a note", "rest in the shade"]
    write_shard(validation_shard(tiny_data), [token for text in texts for token in [BOS, *processor.encode(text)]])
    return tiny_data


def test_bytes_that_the_formula_counts_too_many_are_known(spaces_inside, tiny_run, write_shard):
    docs = load(tiny_run())
    tokenizer = train_gpt.load_tokenizer(tiny_run(), VOCAB)
    inner = sum(tokenizer.processor.id_to_piece(token)[1:].count("▁") for token in docs.tokens.tolist())
    assert docs.excess_bytes(tokenizer.pieces) == 2 * inner > 0

    write_shard(spaces_inside / "fineweb_val_bytes_000000.bin", docs.bytes)
    assert load(tiny_run()).excess_bytes(tokenizer.pieces) == 0  # side-cars count, not the formula


def test_spaces_that_do_not_lead_are_counted_too_high():
    excess = train_gpt.piece_bytes(Pieces()).excess
    assert {piece: n for piece, n in zip(PIECES, excess.tolist(), strict=True) if n} == {"▁▁": 2, "a▁b": 2}


def test_a_byte_count_that_is_not_exact_reaches_the_score(spaces_inside, tiny_env, run_here, tmp_path):
    done = run_here(env=tiny_env(ITERATIONS="1", TTT_ENABLED="0"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "logs" / "tiny.json").read_text())
    (event,) = [e for e in read_events(tmp_path / "logs" / "tiny.events.jsonl") if e["event"] == "excess"]
    excess = result["excess_bytes"]
    assert excess == event["excess_bytes"] > 0
    exact = result["val_bpb"] * result["bytes"] / (result["bytes"] - excess)
    assert event["val_bpb_exact"] == pytest.approx(exact)
    assert f"counts {excess} bytes too many: without these, val_bpb is {exact:.5f}\n" in done.stdout


def test_the_score_over_what_a_lossy_tokenizer_keeps_is_told_beside_the_contests(
    tiny_data, tiny_env, run_here, tmp_path
):
    manifest = {"tokenizer": {"path": "tokenizer.model"}, "splits": {"val": {"smaller_bytes": 400}}}
    (tiny_data / "manifest.json").write_text(json.dumps(manifest))
    done = run_here(env=tiny_env(ITERATIONS="1", TTT_ENABLED="0"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "logs" / "tiny.json").read_text())
    (event,) = [e for e in read_events(tmp_path / "logs" / "tiny.events.jsonl") if e["event"] == "lossy"]
    assert event["bytes_kept"] == 400 < result["bytes"]
    assert event["val_bpb_kept"] == pytest.approx(result["val_loss"] * result["tokens"] / np.log(2) / 400)


# ---- documents --------------------------------------------------------------


@given(bodies=st.lists(st.lists(st.integers(2, 9), max_size=5), min_size=1, max_size=8), data=st.data())
def test_every_target_belongs_to_one_document_and_totals_are_the_shards(bodies, data):
    stream = np.array([t for body in bodies for t in [BOS, *body]], np.uint16)
    weights = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(stream), max_size=len(stream))), np.int64)
    docs = train_gpt.split_documents(stream, weights)
    assert len(docs) == len(bodies)
    at = 0
    targets = []
    for i, body in enumerate(bodies):
        last = i == len(bodies) - 1
        span = [BOS, *body] + ([] if last else [BOS])  # the last document has no closing BOS
        assert docs.span(i).tolist() == span and docs.lengths[i] == len(span) - 1
        assert docs.target_bytes()[i] == weights[at + 1 : at + len(span)].sum()
        targets += span[1:]
        at += 1 + len(body)
    assert targets == stream[1:].tolist()
    assert docs.lengths.sum() == len(stream) - 1 and docs.target_bytes().sum() == weights[1:].sum()


# ---- micro-batches ----------------------------------------------------------------


def plain_segment_starts(tokens: list[int], row_tokens: int, seq_len: int) -> list[int]:
    """Token by token."""
    starts = []
    for i, token in enumerate(tokens):
        if i % row_tokens == 0 or token == BOS or i - starts[-1] == seq_len:
            starts.append(i)
    return starts


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    row_tokens=st.integers(1, 20),
    seq_len=st.integers(1, 9),
)
@settings(max_examples=300)
def test_segments_start_where_a_plain_loop_starts_them(tokens, row_tokens, seq_len):
    starts = train_gpt.segment_starts(np.array(tokens, np.uint16), row_tokens, seq_len)
    assert starts.tolist() == plain_segment_starts(tokens, row_tokens, seq_len)


def test_a_micro_batch_says_where_attention_restarts():
    tokens = np.arange(2, 9, dtype=np.uint16)
    targets = np.arange(3, 10, dtype=np.uint16)
    micro_batch = train_gpt.make_micro_batch(tokens, targets, np.array([0, 2, 3]), torch.device("cpu"))
    assert micro_batch.tokens.tolist() == [tokens.tolist()] and micro_batch.targets.tolist() == [targets.tolist()]
    assert micro_batch.tokens.dtype == micro_batch.targets.dtype == torch.int64
    assert micro_batch.segments.positions.tolist() == [0, 1, 0, 0, 1, 2, 3]
    assert micro_batch.segments.ends.tolist() == [2, 2, 3, 7, 7, 7, 7]
    assert micro_batch.segments.positions.dtype == micro_batch.segments.ends.dtype == torch.int32


def test_a_micro_batch_is_split_into_those_of_its_rows():
    text = np.array([BOS, 5, 6, 7, 5, BOS, 6, 7, 5, 6, 7, 7, 5], np.uint16)
    rows = train_gpt.split_rows(train_gpt.text_micro_batch(text, 4, 3, torch.device("cpu")), 4)
    for start, row in zip((0, 4, 8), rows, strict=True):
        alone = train_gpt.text_micro_batch(text[start : start + 5], 4, 3, torch.device("cpu"))
        assert torch.equal(row.tokens, alone.tokens) and torch.equal(row.targets, alone.targets)
        assert torch.equal(row.segments.positions, alone.segments.positions)
        assert torch.equal(row.segments.ends, alone.segments.ends)


# ---- the training stream ----------------------------------------------------


def training_tokens(folder) -> np.ndarray:
    return np.concatenate([train_gpt.read_shard(p) for p in sorted(folder.glob("fineweb_train_*.bin"))])


def whole_batch(streams: list[TrainingStream], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of all ranks' micro-batches, in order."""
    micro_batches = [micro_batch for stream in streams for micro_batch in stream.batch(number)]
    return joined(micro_batches)


def joined(micro_batches: list[train_gpt.MicroBatch]) -> tuple[np.ndarray, np.ndarray]:
    inputs = torch.cat([micro_batch.tokens[0] for micro_batch in micro_batches])
    targets = torch.cat([micro_batch.targets[0] for micro_batch in micro_batches])
    return inputs.numpy(), targets.numpy()


@pytest.mark.parametrize("micro_batch_tokens", [64, 128])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_the_contiguous_stream_whatever_the_ranks(tiny_data, tiny_run, world, micro_batch_tokens):
    """1,500 tokens in batches of 256: batch 1 crosses a shard's edge, batches 5 and 11 the end of an epoch."""
    run = tiny_run(micro_batch_tokens=micro_batch_tokens)
    stream = training_tokens(tiny_data)
    ranks = [TrainingStream(run, VOCAB, Dist(rank, world)) for rank in range(world)]
    for number in range(13):
        at = np.arange(number * 256, (number + 1) * 256)
        inputs, targets = whole_batch(ranks, number)
        assert (inputs == stream[at % 1500]).all() and (targets == stream[(at + 1) % 1500]).all()
    assert ranks[0].total == 1500


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_row_begins_a_segment_and_no_segment_holds_two_documents(tiny_data, tiny_run, world):
    run = tiny_run()
    for rank in range(world):
        for tokens, _, segments in TrainingStream(run, VOCAB, Dist(rank, world)).batch(3):
            assert tokens.numel() <= run.micro_batch_tokens
            expected = plain_segment_starts(tokens[0].tolist(), run.train_row_tokens, run.train_seq_len)
            assert (segments.positions == 0).nonzero()[:, 0].tolist() == expected
            assert segments.ends.unique().tolist() == [*expected[1:], tokens.numel()]


def test_a_batch_is_a_function_of_its_number(tiny_data, tiny_run):
    """In any order, again, and while the next one is loaded: always the same, and never written to again."""
    run = tiny_run()
    expected = [whole_batch([TrainingStream(run, VOCAB, Dist())], number) for number in range(8)]
    stream = TrainingStream(run, VOCAB, Dist())
    order = (0, 1, 2, 2, 7, 3, 4, 0, 6, 5)
    batches = [stream.batch(number) for number in order]
    for number, batch in zip(order, batches, strict=True):
        assert all((a == b).all() for a, b in zip(joined(batch), expected[number], strict=True))


def test_the_next_batch_is_loaded_ahead(tiny_data, tiny_run):
    stream = TrainingStream(tiny_run(), VOCAB, Dist())
    stream.batch(4)
    (((number, context), loading),) = stream.loading.items()
    assert (number, context) == (5, stream.run.train_seq_len) and isinstance(loading, Future)
    assert loading.result() is stream.batch(5)


def test_a_batch_may_have_a_shorter_context_also_if_it_was_loaded_for_another(tiny_data, tiny_run):
    run = tiny_run()
    stream = TrainingStream(run, VOCAB, Dist())
    for number, context in enumerate((8, 8, 32, 5)):
        for (tokens, targets, segments), (same_tokens, same_targets, _) in zip(
            stream.batch(number, context), TrainingStream(run, VOCAB, Dist()).batch(number), strict=True
        ):
            assert (tokens == same_tokens).all() and (targets == same_targets).all()
            expected = plain_segment_starts(tokens[0].tolist(), run.train_row_tokens, context)
            assert (segments.positions == 0).nonzero()[:, 0].tolist() == expected
            assert len(stream.loading) == 1


def test_rows_longer_than_all_data_are_refused(tiny_data, tiny_run):
    run = tiny_run(train_row_tokens=2048, train_batch_tokens=2048, micro_batch_tokens=2048)
    message = refusal(TrainingStream, run, VOCAB, Dist())
    assert "1500 training tokens" in message and "TRAIN_ROW_TOKENS=2048" in message


def test_empty_shards_among_others_do_no_harm(tiny_data, tiny_run, write_shard):
    before = whole_batch([TrainingStream(tiny_run(), VOCAB, Dist())], 1)
    (tiny_data / "fineweb_train_000002.bin").rename(tiny_data / "fineweb_train_000004.bin")
    write_shard(tiny_data / "fineweb_train_000003.bin", [])
    after = whole_batch([TrainingStream(tiny_run(), VOCAB, Dist())], 1)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("place", [0, -1, "everywhere", "one in a hundred"])
def test_a_shard_of_another_tokenizer_is_refused_at_the_start(tiny_data, tiny_run, write_shard, place):
    """A token outside the vocabulary ended the training at step 14 of 60."""
    path = tiny_data / "fineweb_train_000001.bin"
    tokens = np.random.default_rng(0).integers(2, VOCAB, 200_000)
    if place == "everywhere":
        tokens += VOCAB
    elif place == "one in a hundred":
        tokens[np.random.default_rng(1).random(len(tokens)) < 0.01] = VOCAB
    else:
        tokens[place] = VOCAB
    write_shard(path, tokens.tolist())
    message = refusal(TrainingStream, tiny_run(), VOCAB, Dist())
    position = int(message.partition("at position ")[2].partition(",")[0])
    assert f"{path}: token {tokens[position]} at position {position}, but VOCAB_SIZE=64 allows 0 to 63" in message


def test_a_training_token_that_no_sample_meets_is_refused_when_it_is_used(tiny_data, tiny_run, write_shard):
    path = tiny_data / "fineweb_train_000001.bin"
    tokens = np.full(100_000, 5)
    tokens[1000] = VOCAB
    assert all(not start <= 1000 < start + len(part) for start, part in train_gpt.sample_shard(tokens))
    write_shard(path, tokens.tolist())
    stream = TrainingStream(tiny_run(), VOCAB, Dist())
    stream.batch(0)
    message = refusal(lambda: [stream.batch(i) for i in range(1, 7)])
    assert f"{path}: token 64 at position 1000" in message and "VOCAB_SIZE=64" in message


@pytest.mark.parametrize("use", [lambda stream: stream.batch(5), lambda stream: stream.held_out()])
def test_a_shard_that_is_cut_while_it_is_in_use_is_refused(tiny_data, tiny_run, use):
    """What is missing of its last page read as zeros, and without the page the process was killed."""
    path = tiny_data / "fineweb_train_000001.bin"
    stream = TrainingStream(tiny_run(holdout_tokens=300), VOCAB, Dist())
    stream.batch(0)
    size = path.stat().st_size
    os.truncate(path, size - 100)
    message = refusal(lambda: [use(stream), stream.batch(6)])
    assert f"{path}: was cut from {size} to {size - 100} bytes while it was in use" in message


def test_a_shard_that_is_replaced_while_it_is_in_use_stays_what_it_was(tiny_data, tiny_run, write_shard):
    path = tiny_data / "fineweb_train_000001.bin"
    stream = TrainingStream(tiny_run(), VOCAB, Dist())
    expected = stream.read(0, 1400)
    write_shard(tiny_data / "other.bin", [5] * 10)
    os.replace(tiny_data / "other.bin", path)
    assert np.array_equal(stream.read(0, 1400), expected)


def test_a_shard_that_grows_while_it_is_in_use_stays_what_it_was(tiny_data, tiny_run, tmp_path):
    path = tiny_data / "fineweb_train_000001.bin"
    path.rename(tmp_path / "elsewhere.bin")
    path.symlink_to(tmp_path / "elsewhere.bin")
    stream = TrainingStream(tiny_run(), VOCAB, Dist())
    expected = stream.read(0, 1400)
    with open(path, "ab") as file:
        file.write(bytes(1000))
    assert np.array_equal(stream.read(0, 1400), expected)


def test_nothing_before_the_held_out_tokens_is_held_out(tiny_data, tiny_run):
    """Where a document begins at the first of them, where training ends inside one, and where its last token is BOS."""
    tokens = training_tokens(tiny_data)
    begin = int(np.flatnonzero(tokens == BOS)[-8])
    for held in range(1500 - begin - 2, 1500 - begin + 3):
        documents = TrainingStream(tiny_run(holdout_tokens=held), VOCAB, Dist()).held_out()
        assert len(documents) == (tokens[-held:] == BOS).sum() - 1


def test_a_held_out_token_outside_the_vocabulary_is_named_with_its_own_shard(tiny_data, tiny_run, write_shard):
    path = tiny_data / "fineweb_train_000001.bin"
    tokens = np.full(100_000, 5)
    tokens[-1000] = VOCAB
    write_shard(path, tokens.tolist())
    stream = TrainingStream(tiny_run(holdout_tokens=2000), VOCAB, Dist())
    assert f"{path}: token 64 at position 99000" in refusal(stream.held_out)


@given(size=st.integers(0, 20_000))
@settings(max_examples=50)
def test_a_sample_spans_a_shard_and_is_a_part_of_it(size):
    shard = np.arange(size, dtype="<u2")
    sample = train_gpt.sample_shard(shard)
    positions = np.concatenate([start + np.arange(len(tokens)) for start, tokens in sample])
    assert (np.concatenate([tokens for _, tokens in sample]) == shard[positions]).all()
    assert set(positions.tolist()) >= {0, size - 1} or size == 0
    assert len(np.unique(positions)) >= min(size, 4000)


def test_a_sample_costs_little_of_a_large_shard(tmp_path):
    """46 shards of 100 million tokens are looked at before every run."""
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.write(with_header((20240520, 1, 100_000_000), b""))
        file.truncate(1024 + 200_000_000)  # a hole: nothing is written
    begin = time.process_time()
    train_gpt.check_shard(path, train_gpt.read_shard(path), VOCAB, {})
    assert time.process_time() - begin < 0.5


def test_a_damaged_training_shard_is_refused_at_the_start(tiny_data, tiny_run):
    path = tiny_data / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert str(path) in refusal(TrainingStream, tiny_run(), VOCAB, Dist())


def test_training_text_without_bos_is_refused(tiny_data, tiny_run, write_shard):
    for path in sorted(tiny_data.glob("fineweb_train_*.bin")):
        write_shard(path, [5] * 2000)
    message = refusal(lambda: TrainingStream(tiny_run(), VOCAB, Dist()).batch(0))
    assert "no BOS" in message and str(tiny_data) in message


def test_shards_may_begin_and_end_inside_a_long_document(tiny_data, tiny_run, write_shard):
    """The first BOS comes after the first batch: the text is whole, only its first document is long."""
    write_shard(tiny_data / "fineweb_train_000000.bin", [5] * 290 + [BOS, *[6] * 209])
    inputs, _ = whole_batch([TrainingStream(tiny_run(), VOCAB, Dist())], 0)
    assert (inputs == 5).all()


@pytest.mark.parametrize(
    "seconds, world, batch",
    [
        (600, 8, 786_432),  # the contest's
        (1200, 4, 786_432),
        (0, 8, 786_432),  # no limit in seconds
        (480, 2, 262_144),
        (360, 1, 131_072),
        (115, 1, 65_536),
        (1, 1, 32_768),  # at least a row
        (60, 8, 262_144),  # and a row for each rank
        (600, 7, 688_128),  # three for each of seven
        (1_000_000, 1, 786_432),  # as good as no limit
        (1e-320, 1, 32_768),
    ],
)
def test_the_batch_follows_the_budget_and_ranks_share_it(seconds, world, batch):
    run = train_gpt.RunConfig(max_wallclock_seconds=seconds, iterations=10)
    run = train_gpt.with_batch(run, world)
    assert run.train_batch_tokens == batch
    train_gpt.split_batch(run, world)
    assert train_gpt.with_batch(run, 3) == run  # what is set stays


@given(seconds=st.floats(0.1, 1e5), world=st.integers(1, 16))
def test_a_longer_budget_never_has_a_smaller_batch(seconds, world):
    batches = [
        train_gpt.with_batch(train_gpt.RunConfig(max_wallclock_seconds=s), world).train_batch_tokens
        for s in (seconds, 1.5 * seconds)
    ]
    assert batches[0] <= batches[1]


@given(rows=st.integers(1, 60), world=st.integers(1, 16), micro=st.integers(1, 70))
@settings(max_examples=300)
def test_rows_are_shared_equally_or_the_nearest_valid_batch_is_named(rows, world, micro):
    def run(rows):
        return train_gpt.RunConfig(
            train_batch_tokens=rows * 32,
            train_row_tokens=32,
            micro_batch_tokens=micro * 32,
            eval_seq_len=32,
            eval_stride=8,
            ttt_chunk_tokens=8,
        )

    if rows % world == 0:
        micro_batch_rows, grad_accum_steps = train_gpt.split_batch(run(rows), world)
        assert micro_batch_rows * grad_accum_steps * world == rows and micro_batch_rows <= micro
        larger = [n for n in range(micro_batch_rows + 1, micro + 1) if (rows // world) % n == 0]
        assert larger == []  # would fit
        return
    with pytest.raises(ConfigError) as error:
        train_gpt.split_batch(run(rows), world)
    named = int(str(error.value).rpartition(" ")[2])
    assert f"TRAIN_BATCH_TOKENS={rows * 32}" in str(error.value) and f"{world} ranks" in str(error.value)
    assert train_gpt.split_batch(run(named // 32), world)  # it is valid
    assert abs(named // 32 - rows) == min(abs(n - rows) for n in range(world, rows + world + 1, world))


def test_the_stream_refuses_ranks_that_cannot_share_a_batch(tiny_data, tiny_run):
    with pytest.raises(ConfigError, match="nearest valid batch is 192"):
        TrainingStream(tiny_run(), VOCAB, Dist(0, 3))


def test_only_the_rank_that_writes_needs_the_disk(tiny_data, tiny_config, tiny_run, monkeypatch):
    monkeypatch.setattr(train_gpt.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    train_gpt.check_setup(train_gpt.make_setup(tiny_config, tiny_run(), Dist(1, 2)))
    with pytest.raises(train_gpt.UserError, match="0 MiB of disk are free"):
        train_gpt.check_setup(train_gpt.make_setup(tiny_config, tiny_run(), Dist(0, 2)))


@pytest.mark.parametrize("place", [-100, -400], ids=["held out", "for gradients"])
def test_ranks_that_would_measure_other_text_are_refused_though_no_sampled_token_differs(
    tiny_data, tiny_config, tiny_run, monkeypatch, place
):
    """After the training, they shared the passes over documents that differed in number, and torch ended them."""
    monkeypatch.setattr(train_gpt, "SAMPLED_PLACES", 1)
    digests: list[bytes] = []

    def gather(data: bytes) -> list[bytes]:
        digests.append(data)
        return digests

    dist = Dist()
    dist.hosts = ["first", "second"]
    dist.gather_bytes = gather
    run = tiny_run(holdout_tokens=300, grad_rms_tokens=200)
    train_gpt.check_ranks_agree(train_gpt.make_setup(tiny_config, run, dist))
    path = tiny_data / "fineweb_train_000002.bin"
    tokens = np.array(train_gpt.read_shard(path))
    tokens[place] += 1
    path.write_bytes(path.read_bytes()[:1024] + tokens.tobytes())
    with pytest.raises(ConfigError, match="rank 1 on second has other documents at the end of the training shards"):
        train_gpt.check_ranks_agree(train_gpt.make_setup(tiny_config, run, dist))


def test_the_manifests_entries_are_read(tiny_data):
    (tiny_data / "manifest.json").write_text(json.dumps({"splits": {"val": {"smaller_bytes": 12}}}))
    assert train_gpt.manifest_value(tiny_data, "splits", "val", "smaller_bytes") == 12
    assert train_gpt.manifest_value(tiny_data, "splits", "train", "smaller_bytes") is None
    assert train_gpt.manifest_value(tiny_data / "none", "splits") is None


# ---- the files that the manifest describes ----------------------------------


def sealed(folder: Path) -> Path:
    """A folder whose manifest names the SHA-256 of its tokenizer, its validation shard and a side-car, and the sizes of
    its training shards."""
    tokens = train_gpt.read_shard(folder / "fineweb_val_000000.bin")
    header = (folder / "fineweb_val_000000.bin").read_bytes()[:1024]
    (folder / "fineweb_val_bytes_000000.bin").write_bytes(header + np.ones(len(tokens), "<u2").tobytes())

    def entry(name: str) -> dict:
        return {"file": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}

    tokenizer = entry("tokenizer.model")
    val = {"shards": [entry("fineweb_val_000000.bin")], "sidecars": [entry("fineweb_val_bytes_000000.bin")]}
    training = {path.name: len(train_gpt.read_shard(path)) for path in folder.glob("fineweb_train_*.bin")}
    train = {"shards": [{"file": name, "tokens": tokens} for name, tokens in training.items()]}
    splits = {"val": val, "train": train}
    manifest = {"tokenizer": {"path": tokenizer["file"], "sha256": tokenizer["sha256"]}, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"])
def test_a_flipped_bit_is_refused(tiny_data, tiny_run, name):
    path = sealed(tiny_data) / name
    load(tiny_run())
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: its SHA-256 is .*the manifest says"):
        load(tiny_run())


@pytest.mark.parametrize("name", ["fineweb_val_000001.bin", "fineweb_val_bytes_000000.bin"])
def test_validation_files_that_the_manifest_does_not_list_are_refused(tiny_data, tiny_run, write_shard, name):
    """They would change the score, and the manifest's own files would still have their SHA-256."""
    manifest = json.loads((sealed(tiny_data) / "manifest.json").read_text())
    manifest["splits"]["val"]["sidecars"] = []
    (tiny_data / "manifest.json").write_text(json.dumps(manifest))
    if "bytes" not in name:
        (tiny_data / "fineweb_val_bytes_000000.bin").unlink()
        load(tiny_run())
        write_shard(tiny_data / name, [BOS, 5, 6])
    assert f"{tiny_data / name}: the manifest lists" in refusal(load, tiny_run())


def test_a_training_shard_that_is_not_the_manifests_is_refused(tiny_data, tiny_run, write_shard):
    sealed(tiny_data)
    TrainingStream(tiny_run(), VOCAB, Dist())
    added = write_shard(tiny_data / "fineweb_train_000003.bin", [BOS, 5, 6])
    assert f"{added}: the manifest lists shards, but not this one" in refusal(TrainingStream, tiny_run(), VOCAB, Dist())
    added.unlink()
    replaced = write_shard(tiny_data / "fineweb_train_000001.bin", [BOS] * 299)
    assert f"{replaced}: 299 tokens, but 300 by the manifest" in refusal(TrainingStream, tiny_run(), VOCAB, Dist())


def test_a_training_shard_that_is_gone_is_warned_of(tiny_data, tiny_env, run_here):
    """As after a copy that broke off. Without it training has less text, and other documents are held out."""
    sealed(tiny_data)
    last = max(tiny_data.glob("fineweb_train_*.bin"))
    warning = f"warning: training shards that the manifest lists but the folder lacks: 1, as {last.name}\n"
    for gone in (False, True):
        if gone:
            last.unlink()
        done = run_here("--check-setup", env=tiny_env(HOLDOUT_TOKENS="0"))
        assert done.returncode == 0 and (warning in done.stdout) == gone, done.stderr


def test_another_tokenizer_of_the_same_size_is_refused(tiny_data, tiny_run, train_tokenizer):
    sealed(tiny_data)
    other = tiny_data / "other.model"
    other.write_bytes(train_tokenizer(split_digits=True))
    assert other.read_bytes() != (tiny_data / "tokenizer.model").read_bytes()
    with pytest.raises(DataError, match="the shards of .* were made with .*TOKENIZER_PATH"):
        load(tiny_run(tokenizer_path=str(other)))


def test_markers_without_a_side_car_are_refused(tiny_data, tiny_run, train_tokenizer):
    """They would be counted as text: 1.9318 was reported for 2.0483."""
    (tiny_data / "tokenizer.model").write_bytes(train_tokenizer(user_defined_symbols="\ue001"))
    assert not list(tiny_data.glob("*_bytes_*"))
    with pytest.raises(DataError, match="CaseOps.*there is none"):
        load(tiny_run())


@pytest.mark.parametrize(
    "stated, markers, mentioned",
    [
        ("rot13", "", "'rot13', but no such transform"),
        (3, "", "3, but no such"),
        ("none", "\ue001", "pieces of CaseOps"),
    ],
)
def test_text_of_an_unknown_transform_is_refused(tiny_data, tiny_run, train_tokenizer, stated, markers, mentioned):
    """The formula would count the bytes of the text as it was transformed."""
    (tiny_data / "tokenizer.model").write_bytes(train_tokenizer(user_defined_symbols=markers))
    (tiny_data / "manifest.json").write_text(
        json.dumps({"tokenizer": {"path": "tokenizer.model", "transform": stated}})
    )
    assert mentioned in refusal(load, tiny_run())


@pytest.mark.parametrize("entry", [1, {}, {"file": 3}, {"file": "../x", "sha256": "0"}, {"file": "x"}, [], None])
def test_an_entry_that_names_no_file_of_the_folder_is_passed_over(tiny_data, tiny_run, entry):
    manifest = json.loads((sealed(tiny_data) / "manifest.json").read_text())
    manifest["splits"]["val"]["shards"].append(entry)
    (tiny_data / "manifest.json").write_text(json.dumps(manifest))
    assert len(train_gpt.listed_digests(tiny_data)) == 2 and len(load(tiny_run()))
