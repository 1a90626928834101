"""From text to shards and back: what is read is what was given, every byte is accounted for, bad input is refused."""

import bz2
import contextlib
import errno
import fcntl
import gzip
import io
import json
import lzma
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from data import prepare

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "\ue001\ue002\ue003\ue004"
NASTY = [
    "  two  spaces, tabs\t\tand lines\n\n\r\n ",
    "½ ﬁne … Ⅳ ﷺ e\u0301 é 😀\u200b\ufeff",
    f"a\u2581b {MARKERS} \ue004A\u2581",
    "<s> </s> <unk> <0x41>\0\x7f",
    "Mixed iPhone McDonald NASA U.S.A. É",
    " ",
]


def sentences(count: int, seed: int) -> list[str]:
    """Distinct made-up documents with words that come again, capitals and numbers."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(300)]
    cases = [str.lower, str.lower, str.lower, str.title, str.upper]
    bodies = ([chance.choice(cases)(chance.choice(words)) for _ in range(chance.randint(5, 120))] for _ in range(count))
    return [f"{n}. {' '.join(body)}.\n" for n, body in enumerate(bodies)]


TEXTS = sentences(400, 1)


def write_lines(path: Path, texts: list[str]) -> Path:
    """Every other document as an object."""
    lines = [json.dumps(t if i % 2 else {"text": t, "id": i}) for i, t in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def trained(**rules) -> bytes:
    """A tokenizer of other people's, with these options of normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        minloglevel=3,
        **rules,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, bytes]:
    """Ours with and without CaseOps; one that normalises as the contest's do; one with spaces at the end of pieces."""
    folder = tmp_path_factory.mktemp("models")
    part = prepare.SourceFile(str(write_lines(folder / "text.jsonl", TEXTS)))
    return {
        "caseops": prepare.train_tokenizer([part], 420, True),
        "plain": prepare.train_tokenizer([part], 400, False),
        "lossy": trained(normalization_rule_name="nmt_nfkc"),
        "suffix": trained(
            normalization_rule_name="identity", remove_extra_whitespaces=False, treat_whitespace_as_suffix=True
        ),
        "part": part,
    }


@pytest.fixture
def model_file(models, tmp_path):
    """model_file(kind): the model as a file, for --tokenizer."""

    def write(kind: str) -> Path:
        path = tmp_path / "given.model"
        path.write_bytes(models[kind])
        return path

    return write


def run(*arguments: object) -> int:
    return prepare.main(["jsonl", "--workers", "1", *map(str, arguments)])


def read_back(folder: Path, split: str) -> tuple[list[str], list[int]]:
    """Texts of a prepared split, and the sums of their side-car (validation)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / manifest["tokenizer"]["path"]))
    decode = prepare.decode_caseops if manifest["tokenizer"]["transform"] == "caseops" else str
    texts = []
    sums = []
    for path in train_gpt.find_shards(str(folder), split):
        tokens = train_gpt.read_shard(path)
        sidecar = path.with_name(path.name.replace("_val_", "_val_bytes_"))
        counts = train_gpt.read_shard(sidecar) if split == "val" else np.zeros(len(tokens), np.int64)
        starts = np.flatnonzero(tokens == train_gpt.BOS)
        assert starts[0] == 0 and len(counts) == len(tokens) and not counts[starts].any()
        for document in np.split(tokens, starts[1:]):
            texts.append(decode(processor.decode(document[1:].tolist())))
        sums += np.add.reduceat(counts.astype(np.int64), starts).tolist()
    return texts, sums


def everything(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- bytes ------------------------------------------------------------------


def recounted(encoder: prepare.Encoder, tokens: list[int]) -> list[int]:
    """Original bytes of an exact tokenizer's tokens, byte by byte: the long way."""
    stream = []  # (UTF-8 byte of transformed text, its token)
    for i, token in enumerate(tokens):
        piece = encoder.processor.id_to_piece(token)
        if encoder.processor.is_byte(token):
            stream.append((int(piece[3:5], 16), i))
        else:
            stream += [(byte, i) for byte in piece.replace("\u2581", " ").encode()]
    counts = [0] * len(tokens)
    escaped = False
    at = 0
    for character in bytes(b for b, _ in stream).decode():
        for _, token in stream[at : at + len(character.encode())]:
            counts[token] += not encoder.caseops or character not in MARKERS or escaped
        at += len(character.encode())
        escaped = encoder.caseops and character == MARKERS[3] and not escaped
    return counts


@pytest.mark.parametrize("kind", ["caseops", "plain"])
def test_exact_tokenizers_keep_every_character(models, kind):
    encoder = prepare.load_encoder(models[kind], kind == "caseops")
    assert encoder.exact
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for i in range(0, len(every), 50_000):
        prepare.encode_document(encoder, "".join(every[i : i + 50_000]), False)  # raises where a character is lost
    some = "".join(every[:0x400] + every[0x400::97])
    tokens, sidecar, byte_counts = prepare.encode_document(encoder, some, True)
    assert byte_counts[:3] == [len(some.encode())] * 3
    assert sidecar[0] == 0 and sidecar[1:].tolist() == recounted(encoder, tokens[1:].tolist())


@pytest.mark.parametrize("kind", ["caseops", "plain"])
@pytest.mark.parametrize("text", NASTY + TEXTS[:20])
def test_sidecar_of_exact_tokenizers(models, kind, text):
    encoder = prepare.load_encoder(models[kind], kind == "caseops")
    tokens, sidecar, byte_counts = prepare.encode_document(encoder, text, True)
    assert tokens[0] == train_gpt.BOS
    assert sidecar[1:].tolist() == recounted(encoder, tokens[1:].tolist())
    assert sidecar.sum() == len(text.encode()) == byte_counts[0]


@given(
    text=st.text(
        st.one_of(st.sampled_from("ab AB\n\u2581½ﬁ " + MARKERS), st.characters(exclude_categories=["Cs"])), min_size=1
    )
)
@pytest.mark.parametrize(
    "kind, caseops", [("caseops", True), ("plain", False), ("plain", True), ("lossy", False), ("lossy", True)]
)
def test_sidecar_adds_up_for_any_text(models, kind, caseops, text):
    encoder = prepare.load_encoder(models[kind], caseops)
    tokens, sidecar, byte_counts = prepare.encode_document(encoder, text, True)
    decoded = encoder.processor.decode(tokens[1:].tolist())
    decoded = len((prepare.decode_caseops(decoded) if caseops else decoded).encode())
    assert byte_counts[:3] == [len(text.encode()), decoded, min(decoded, len(text.encode()))]
    assert len(tokens) == 1 or sidecar.sum() == len(text.encode())
    assert encoder.exact == (kind != "lossy")


def test_text_that_normalisation_removed_goes_to_the_next_token(models):
    encoder = prepare.load_encoder(models["lossy"], False)
    tokens, sidecar, byte_counts = prepare.encode_document(encoder, "  e\n\n\te½ ", True)
    pieces = [encoder.processor.id_to_piece(t) for t in tokens[1:].tolist()]
    assert "".join(pieces) == "e\u2581e1<0xE2><0x81><0x84>2"  # ½ becomes 1⁄2
    assert pieces[0] == "e" and sidecar[1] == 3  # two spaces removed before it
    counts = dict(zip(pieces[1:], sidecar[2:].tolist(), strict=True))
    assert sum(counts.values()) == len("\n\n\te½ ".encode()) and counts["2"] == 3  # ½, and the space removed at the end
    assert byte_counts == [10, 8, 8, 8]


def test_contest_formula_by_hand(models):
    encoder = prepare.load_encoder(models["plain"], False)
    word = next(i for i in range(400) if encoder.processor.id_to_piece(i).startswith("\u2581") and i > 260)
    length = len(encoder.processor.id_to_piece(word)) - 1
    text = encoder.processor.id_to_piece(word).replace("\u2581", " ") * 2 + "é"
    tokens, _, byte_counts = prepare.encode_document(encoder, text, False)
    assert tokens.tolist() == [1, word, word, *encoder.byte_ids[0xC3:0xC4], *encoder.byte_ids[0xA9:0xAA]]
    assert byte_counts[3] == length + (1 + length) + 2  # no space is counted after BOS
    assert byte_counts[0] == byte_counts[3] + 1


def test_a_token_too_heavy_for_the_sidecar_is_refused(models):
    encoder = prepare.load_encoder(models["lossy"], False)
    prepare.encode_document(encoder, "e" + " " * 70_000 + "e", False)
    with pytest.raises(train_gpt.DataError, match="70001 bytes, the side-car holds 65,535"):
        prepare.encode_document(encoder, "e" + " " * 70_000 + "e", True)


# ---- tokenizers -------------------------------------------------------------


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def more_pieces(model: bytes, count: int) -> bytes:
    """A serialised model with further pieces: repeated field 1, each with its text and a score of zero."""
    bodies = (b"\x0a" + varint(len(p)) + p + b"\x15\0\0\0\0" for p in (f"!{i}".encode() for i in range(count)))
    return model + b"".join(b"\x0a" + varint(len(b)) + b for b in bodies)


def test_hostile_models_are_refused(models, tmp_path):
    trained = []
    for options in ({"vocab_size": 100}, {"vocab_size": 400, "byte_fallback": True, "bos_id": 2, "eos_id": 1}):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", minloglevel=3, **options
        )
        trained.append(model.getvalue())
    cases = [
        (b"", "not a SentencePiece model"),
        (b"junk" * 100, "not a SentencePiece model"),
        (models["plain"][:-5], "not a SentencePiece model"),
        (trained[0], "byte_fallback=true"),
        (trained[1], "its BOS is 2, expected 1"),
        (more_pieces(models["plain"], 1 << 16), "at most 65,536"),
    ]
    for model, message in cases:
        with pytest.raises(train_gpt.DataError, match=message):
            prepare.load_encoder(model, False, "given.model")


def test_training_repeats_exactly_and_leaves_validation_out(models, tmp_path):
    assert prepare.train_tokenizer([models["part"]], 420, True) == models["caseops"]
    part = models["part"]._replace(first_validation=100)
    validation = write_lines(tmp_path / "val.jsonl", ["unseen"])
    seen = list(prepare.tokenizer_text([prepare.SourceFile(str(validation), all_validation=True), part], False))
    assert seen == TEXTS[100:]


def test_markers_end_pieces_and_no_letter_follows_them(tmp_path):
    sentence = "See The Cat, says NASA.\n\nThen McDonald the CAT. "
    text = write_lines(tmp_path / "a.jsonl", [sentence * n for n in range(1, 50)])
    model = prepare.train_tokenizer([prepare.SourceFile(str(text))], 310, True)
    processor = prepare.load_encoder(model, True).processor
    pieces = [processor.id_to_piece(i) for i in range(310)]
    marked = [piece for piece in pieces if MARKERS[0] in piece or MARKERS[1] in piece]
    assert {f"\u2581{MARKERS[0]}", f"\u2581{MARKERS[1]}", f".\n\n{MARKERS[0]}"} <= set(marked)
    assert all(piece[-1] in MARKERS for piece in marked)
    title, capitals = (processor.encode(prepare.encode_caseops(f"see {word}"), out_type=str) for word in ("Cat", "CAT"))
    assert title[-1] == capitals[-1] == "cat"


def test_another_way_to_train_a_tokenizer_is_another_dataset(tmp_path, monkeypatch, capsys):
    """What was prepared with the earlier one is not taken for the same."""
    text = write_lines(tmp_path / "a.jsonl", TEXTS)
    options = ["--vocab-size", 420, "--val-fraction", 0.3, "--out", tmp_path]
    monkeypatch.setattr(prepare, "trained_as", lambda size, caseops: f"{size} pieces, trained")
    assert run(text, *options) == 0
    monkeypatch.undo()
    assert run(text, *options) == 2 and "holds another dataset (other tokenizer)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, reason",
    [
        (60_000, r"it has (\d+) pieces at most"),
        (261, r"it needs (\d+) pieces or more: 256 bytes, 4 special pieces and [\d,]+ characters"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_refused_with_one_that_does(tmp_path, capsys, asked, reason):
    text = write_lines(tmp_path / "a.jsonl", TEXTS[:20])
    options = ["--val-fraction", 0.3, "--out", tmp_path]
    assert run(text, *options, "--vocab-size", asked) == 2
    error = capsys.readouterr().err
    found = re.search(f"--vocab-size {asked}: no tokenizer can be trained on this text: {reason}\n", error)
    assert found, error
    assert not list((tmp_path / "datasets").iterdir())
    assert run(text, *options, "--vocab-size", found[1]) == 0


@pytest.mark.parametrize(
    "size, reason",
    [
        (3, "3: expected at least 261: 256 bytes, 4 special pieces, and the characters of the text"),
        (65_537, "65537: expected at most 65,536: tokens are uint16"),
    ],
)
def test_a_vocabulary_that_fits_no_text_is_refused_before_a_tokenizer_is_trained(tmp_path, capsys, size, reason):
    with pytest.raises(SystemExit):
        run("missing.jsonl", "--out", tmp_path, "--vocab-size", size)
    assert f"--vocab-size: {reason}\n" in capsys.readouterr().err


# ---- jsonl, end to end ------------------------------------------------------


def pack(kind: str, content: bytes) -> bytes:
    """Two members one after another, as parallel packers write them."""
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.ZstdCompressor().compress}
    return b"".join(map(packers[kind], halves)) if kind in packers else content


@pytest.mark.parametrize("window_log", [27, 28, 30, 31])
def test_a_long_window_is_read(tmp_path, window_log):
    """As `zstd --ultra -22 --long=31` writes it, which was called damaged."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressor.compress(b'"one"\n"two"\n') + compressor.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    with open(path, "rb") as raw:
        assert prepare.open_zstandard(raw).read() == b'"one"\n"two"\n'


@pytest.mark.parametrize("suffix, caseops", [(".jsonl", True), (".gz", False), (".bz2", True), (".zst", True)])
def test_text_comes_back_from_shards(tmp_path, suffix, caseops):
    validation = NASTY + TEXTS[:60]
    for name, texts in (("train", TEXTS[60:]), ("val", validation)):
        content = write_lines(tmp_path / "lines", texts).read_bytes()
        (tmp_path / f"{name}{suffix}").write_bytes(pack(suffix, content))
    options = ["--caseops" if caseops else "--no-caseops", "--vocab-size", 420, "--shard-tokens", 2000]
    assert run(tmp_path / f"t*{suffix}", "--val", tmp_path / f"val{suffix}", "--out", tmp_path, *options) == 0
    folder = tmp_path / "datasets" / "jsonl"
    assert read_back(folder, "train")[0] == TEXTS[60:]
    assert read_back(folder, "val") == (validation, [len(t.encode()) for t in validation])
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, texts in (("train", TEXTS[60:]), ("val", validation)):
        facts = manifest["splits"][split]
        size = sum(len(t.encode()) for t in texts)
        assert facts["documents"] == len(texts)
        assert facts["original_bytes"] == facts["decoded_bytes"] == facts["smaller_bytes"] == size
        assert facts["tokens"] == sum(s["tokens"] for s in facts["shards"])
        assert len(facts["shards"]) > 2 and all(s["tokens"] <= 2000 for s in facts["shards"])
        for entry in facts["shards"] + facts["sidecars"]:
            assert prepare.shard_facts(folder / entry["file"]) == entry
    assert manifest["tokenizer"]["vocab_size"] == 420 and manifest["tokenizer"]["exact"]
    assert manifest["tokenizer"]["transform"] == ("caseops" if caseops else "none")


def test_the_entry_reads_what_was_prepared(tmp_path):
    text = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert run(text, "--val-fraction", 0.2, "--out", tmp_path, "--vocab-size", 420) == 0
    folder = tmp_path / "datasets" / "jsonl"
    config = train_gpt.read_env({"DATA_PATH": str(folder)})[1]
    tokenizer = train_gpt.load_tokenizer(config, 420)
    documents = train_gpt.load_validation(str(folder), 420, tokenizer)
    texts = read_back(folder, "val")[0]
    assert len(documents) == len(texts) and documents.bytes.sum() == sum(len(t.encode()) for t in texts)


def test_a_lossy_tokenizer_is_weighed_and_reported(models, model_file, tmp_path, capsys):
    model = model_file("lossy")
    validation = ["e½" * 50, "e  e" * 50, "eee"]
    val = write_lines(tmp_path / "val.jsonl", validation)
    train = write_lines(tmp_path / "train.jsonl", TEXTS)
    assert run(train, "--val", val, "--tokenizer", model, "--out", tmp_path) == 0
    facts = json.loads((tmp_path / "datasets" / "jsonl" / "manifest.json").read_text())
    processor = sentencepiece.SentencePieceProcessor(model_proto=models["lossy"])
    sizes = [(len(t.encode()), len(processor.decode(processor.encode(t)).encode())) for t in validation]
    val_facts = facts["splits"]["val"]
    assert val_facts["original_bytes"] == sum(a for a, _ in sizes)
    assert val_facts["decoded_bytes"] == sum(b for _, b in sizes)
    assert val_facts["smaller_bytes"] == sum(map(min, sizes)) < min(map(sum, zip(*sizes, strict=True)))
    assert val_facts["contest_bytes"] == val_facts["decoded_bytes"]  # here: no document begins with a space
    excess = val_facts["contest_bytes"] - val_facts["smaller_bytes"]
    assert f"{excess:,} more than the smaller of original and decoded text" in capsys.readouterr().out
    assert facts["tokenizer"] | {"path": ""} == {
        "path": "",
        "sha256": prepare.file_sha256(model),
        "vocab_size": 400,
        "exact": False,
        "transform": "none",
    }
    assert read_back(tmp_path / "datasets" / "jsonl", "val")[1] == [a for a, _ in sizes]


def test_caseops_follows_the_markers_of_a_given_tokenizer(model_file, tmp_path):
    text = write_lines(tmp_path / "a.jsonl", TEXTS)
    for kind, transform in (("caseops", "caseops"), ("plain", "none")):
        assert run(text, "--val-fraction", 0.3, "--tokenizer", model_file(kind), "--out", tmp_path, "--replace") == 0
        manifest = json.loads((tmp_path / "datasets" / "jsonl" / "manifest.json").read_text())
        assert manifest["tokenizer"]["transform"] == transform


def test_markers_without_caseops_are_refused_at_once(model_file, tmp_path, capsys):
    """Training would refuse the data after hours of encoding."""
    text = write_lines(tmp_path / "a.jsonl", TEXTS)
    model = model_file("caseops")
    assert run(text, "--tokenizer", model, "--no-caseops", "--out", tmp_path / "out") == 2
    assert f"{model}: its pieces hold the markers of CaseOps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("caseops", [False, True])
def test_training_takes_what_was_made_from_text_full_of_markers(tmp_path, caseops):
    """A tokenizer that is trained on it without CaseOps must not have them in its pieces."""
    texts = [f"{text} {' '.join(f'{marker}ab' for marker in MARKERS * 9)}" for text in TEXTS]
    text = write_lines(tmp_path / "a.jsonl", texts)
    options = ["--vocab-size", 420, "--val-fraction", 0.3, "--caseops" if caseops else "--no-caseops"]
    assert run(text, *options, "--out", tmp_path) == 0
    folder = tmp_path / "datasets" / "jsonl"
    tokenizer = train_gpt.load_tokenizer(train_gpt.read_env({"DATA_PATH": str(folder)})[1], 420)
    assert train_gpt.transform_of(folder, tokenizer) == ("caseops" if caseops else "none")
    assert sorted(read_back(folder, "train")[0] + read_back(folder, "val")[0]) == sorted(texts)


def test_workers_change_nothing(model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 4096)
    text = write_lines(tmp_path / "a.jsonl", TEXTS)
    for workers in (1, 3):
        options = ["--val-fraction", 0.3, "--tokenizer", model_file("caseops"), "--workers", workers]
        assert run(text, *options, "--out", tmp_path / str(workers)) == 0
    assert everything(tmp_path / "1") == everything(tmp_path / "3")


# ---- splits -----------------------------------------------------------------


def test_a_document_in_both_splits_is_refused_by_name(model_file, tmp_path, capsys):
    model = model_file("plain")
    val = write_lines(tmp_path / "val.jsonl", TEXTS[:10])
    train = write_lines(tmp_path / "train.jsonl", [*TEXTS[10:50], TEXTS[7]])
    assert run(train, "--val", val, "--tokenizer", model, "--out", tmp_path) == 2
    assert f"{train}:41: this training document is in validation too ({val}:8)" in capsys.readouterr().err
    assert not (tmp_path / "datasets" / "jsonl").exists()


def test_copies_and_empty_documents_are_counted(model_file, tmp_path):
    model = model_file("plain")
    val = write_lines(tmp_path / "val.jsonl", [*TEXTS[:10], TEXTS[3], ""])
    train = write_lines(tmp_path / "train.jsonl", [*TEXTS[10:30], TEXTS[11], TEXTS[11], "", ""])
    assert run(train, "--val", val, "--tokenizer", model, "--out", tmp_path) == 0
    splits = json.loads((tmp_path / "datasets" / "jsonl" / "manifest.json").read_text())["splits"]
    names = ("duplicate_documents", "empty_documents", "documents")
    assert [splits["train"][name] for name in names] == [2, 2, 22]
    assert [splits["val"][name] for name in names] == [1, 1, 11]


def test_the_split_by_digest_is_a_property_of_the_text(model_file, tmp_path):
    model = model_file("plain")
    found = []
    for texts in (TEXTS, TEXTS[::-1] + TEXTS):
        text = write_lines(tmp_path / "a.jsonl", texts)
        assert run(text, "--val-fraction", 0.25, "--tokenizer", model, "--out", tmp_path, "--replace") == 0
        folder = tmp_path / "datasets" / "jsonl"
        found.append([set(read_back(folder, split)[0]) for split in ("val", "train")])
    assert found[0] == found[1] and not found[0][0] & found[0][1]
    assert 60 < len(found[0][0]) < 140


def test_every_digit_of_the_fraction_counts(small, capsys):
    arguments, _ = small
    assert run(*arguments) == 0
    assert run(*arguments, "--val-fraction", 0.3000001) == 2
    assert "holds another dataset (other source)" in capsys.readouterr().err


# ---- bad input --------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        (b"nonsense", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"17", "b'17'; expected a JSON string, or an object with a string \"text\""),
        (b'{"txet": "a"}', "expected a JSON string, or an object"),
        (b'{"text": null}', "expected a JSON string, or an object"),
        (b'"a\\ud800b"', "no UTF-8 for character 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"good"\n' + line + b'\n"good too"\n')
    assert run(path, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prepare: {path}:2: ") and message in error and error.count("\n") == 1
    assert not list((tmp_path / "datasets").iterdir())


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_damaged_file_is_named(tmp_path, capsys, suffix):
    whole = pack(suffix, write_lines(tmp_path / "lines", TEXTS * 9).read_bytes())
    path = tmp_path / f"a{suffix}"
    for damaged in (b"no such format" * 9, whole[: len(whole) * 2 // 3]):
        path.write_bytes(damaged)
        assert run(path, "--out", tmp_path) == 2
        assert capsys.readouterr().err.startswith(f"prepare: {path}:")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["missing*.jsonl"], "missing*.jsonl: no such file"),
        (["a.jsonl", "a.jsonl"], "a.jsonl: given 2 times"),
        (["a.jsonl", "--val-fraction", "1"], "--val-fraction 1.0: expected a number between 0 and 1"),
        (["a.jsonl", "--tokenizer", "missing.model"], "missing.model: No such file"),
        (["a.jsonl", "--val", "empty.jsonl"], "no document is for val"),
        (["empty.jsonl", "--val", "a.jsonl"], "no tokenizer can be trained on this text"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert run(*arguments, "--vocab-size", 300, "--out", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare: ") and message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.parametrize(
    "arguments", [["--workers", "0"], ["--name", "../up"], ["--name", ".hidden"], ["--shard-tokens", "x"]]
)
def test_bad_options_are_refused_by_the_command_line(arguments):
    with pytest.raises(SystemExit) as stop:
        run("a.jsonl", *arguments)
    assert stop.value.code == 2


def test_blank_lines_are_skipped_and_counted(model_file, tmp_path, capsys):
    text = tmp_path / "a.jsonl"
    text.write_bytes(b"\n" + b"\r\n  \n".join(json.dumps(t).encode() for t in TEXTS[:60]) + b"\n\n")
    plain = write_lines(tmp_path / "b.jsonl", TEXTS[:60])
    for path, name in ((text, "blank"), (plain, "plain")):
        options = ["--val-fraction", 0.3, "--tokenizer", model_file("plain"), "--out", tmp_path, "--name", name]
        assert run(path, *options) == 0
    assert "61 blank lines skipped" in capsys.readouterr().out
    folders = [tmp_path / "datasets" / name for name in ("blank", "plain")]
    shards = [{name: data for name, data in everything(f).items() if name != "manifest.json"} for f in folders]
    assert shards[0] == shards[1]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert manifests[0]["skipped_lines"] == {"blank": 61, "bad": 0} and "skipped_lines" not in manifests[1]


def test_bad_lines_are_skipped_counted_and_named_when_asked(model_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_LINE_BYTES", 3_000_000)
    text = tmp_path / "a.jsonl"
    bad = [b"no\x1b[2Jnsense", b"17", b'"a\\ud800b"', b'"' + b"x" * 3_500_000 + b'"', b"{}", b"[", b"]"]
    good = [json.dumps(t).encode() for t in TEXTS[:60]]
    text.write_bytes(b"\n".join([*good[:30], *bad, *good[30:]]))
    options = ["--val-fraction", 0.3, "--vocab-size", 300, "--no-caseops", "--out", tmp_path]
    assert run(text, *options) == 2 and not (tmp_path / "datasets" / "jsonl").exists()
    assert run(text, *options, "--skip-bad-lines") == 0
    error = capsys.readouterr().err
    assert "warning: 7 bad lines skipped" in error and "\x1b" not in error
    assert all(f"{text}:{number}: " in error for number in range(31, 36)) and f"{text}:36" not in error
    assert "longer than 3,000,000 bytes" in error
    folder = tmp_path / "datasets" / "jsonl"
    assert sorted(sum((read_back(folder, split)[0] for split in ("train", "val")), [])) == sorted(TEXTS[:60])
    assert json.loads((folder / "manifest.json").read_text())["skipped_lines"] == {"blank": 0, "bad": 7}
    assert run(text, *options) == 2  # what was prepared with bad lines left out is not the same as all of it


@pytest.mark.parametrize("longer", [False, True])
def test_one_endless_line_in_a_small_file_takes_little_memory(tmp_path, longer):
    """Some 50 KB that stand for 500 MB, without and with a window of 2 GB."""
    options = {"window_log": 31} if longer else {}
    parameters = zstandard.ZstdCompressionParameters(compression_level=1, **options)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    with open(path, "wb") as file:
        file.write(compressor.compress(b'"'))
        for _ in range(500):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.flush())
    assert path.stat().st_size < 200_000
    program = f"""
import resource, sys
from data import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for skip in (False, True):
    lines = [line for batch in prepare.read_batches([prepare.SourceFile({str(path)!r}, skip_bad_lines=skip)])
             for line in batch.lines]
    assert len(lines) == 1 and len(lines[0]) > prepare.MAX_LINE_BYTES
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < (750_000 if longer else 300_000)  # KB; the window holds what was read, 500 MB


LINES = b'"one"\n"two"\n'


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.xz", lzma.compress(LINES)),
        ("a.jsonl", lzma.compress(LINES)),
        ("a", gzip.compress(LINES)),
        ("a.GZ", gzip.compress(LINES)),
        ("a.gz", gzip.compress(gzip.compress(LINES))),
        ("a.gz", zstandard.compress(bz2.compress(LINES))),
        ("a.gz", LINES),  # unpacked on the way, as browsers do
        ("a.zst", b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.compress(LINES)),
        ("a.jsonl", zstandard.compress(LINES)),
        ("a.json", LINES[:-1]),
        ("a.bz2", bz2.compress(LINES[:6]) + bz2.compress(LINES[6:])),
        ("a.xz", lzma.compress(LINES[:6]) + lzma.compress(LINES[6:])),
        ("a.zst", zstandard.compress(LINES[:6]) + zstandard.compress(LINES[6:])),
    ],
    ids=range(13),  # packed files hold the time
)
def test_compression_is_known_by_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    lines = [line for batch in prepare.read_batches([prepare.SourceFile(str(tmp_path / name))]) for line in batch.lines]
    assert lines == [b'"one"', b'"two"']


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (gzip.compress(b"name".ljust(257, b"\0") + b"ustar" + bytes(250)), "a tar archive; unpack it"),
        ('"text"'.encode("utf-16"), "UTF-16 text"),
        (gzip.compress(gzip.compress(gzip.compress(gzip.compress(LINES)))), "compressed more than 3 times"),
        (lzma.compress(LINES * 99)[:-30], "after 0 lines"),
        (zstandard.compress(b"x" * 99)[:-2], "ends within a compressed frame"),
    ],
    ids=range(6),  # packed files hold the time
)
def test_what_is_no_jsonl_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(train_gpt.DataError, match=message) as error:
        list(prepare.read_batches([prepare.SourceFile(str(path))]))
    assert str(error.value).startswith(str(path))


def test_a_frame_that_breaks_off_between_lines_is_noticed(tmp_path):
    """The library's own reader takes it for whole, and all that follows would be missing."""
    compressor = zstandard.ZstdCompressor().compressobj()
    path = tmp_path / "a.zst"
    path.write_bytes(compressor.compress(LINES) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    with pytest.raises(train_gpt.DataError, match="ends within a compressed frame"):
        list(prepare.read_batches([prepare.SourceFile(str(path))]))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".xz"])
def test_no_later_frame_is_lost(tmp_path, suffix):
    """What followed the first frame of a .bz2 or .xz and was damaged was ignored, as were empty files."""
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"a{suffix}"
    more = compress(LINES * 99)
    for later in (more[:-1], more[: len(more) // 2], more[:3], b"?", b"x" + more, more + b"?"):
        path.write_bytes(compress(LINES) + later)
        with pytest.raises(train_gpt.DataError, match="fetch or write the file again"):
            list(prepare.read_batches([prepare.SourceFile(str(path))]))
    path.write_bytes(b"")
    with pytest.raises(train_gpt.DataError, match="empty, which no compressed file is"):
        list(prepare.read_batches([prepare.SourceFile(str(path))]))


def test_no_frame_gets_more_memory_than_its_limit(tmp_path):
    """A .xz of a hundred bytes may ask for 4 GiB to refer back to."""
    content = bytearray(lzma.compress(LINES))
    header = slice(12, 12 + 4 * (content[12] + 1) - 4)  # of the first block; its checksum follows
    assert content[14] == 0x21  # LZMA2, whose one property, two bytes on, says how much
    content[16] = 40
    content[header.stop : header.stop + 4] = zlib.crc32(content[header]).to_bytes(4, "little")
    path = tmp_path / "a.xz"
    path.write_bytes(content)
    with pytest.raises(train_gpt.DataError, match="Memory usage limit exceeded"):
        list(prepare.read_batches([prepare.SourceFile(str(path))]))


def test_files_that_val_swallowed_are_named(model_file, tmp_path, capsys):
    val = write_lines(tmp_path / "v.jsonl", TEXTS[:30])
    train = write_lines(tmp_path / "t.jsonl", TEXTS[30:60])
    more = write_lines(tmp_path / "m.jsonl", TEXTS[60:70])
    options = ["--tokenizer", model_file("plain"), "--out", tmp_path]
    with pytest.raises(SystemExit) as stop:
        run(*options, "--val", val, train)
    assert stop.value.code == 2 and "--val takes every name that follows it" in capsys.readouterr().err
    assert run(*options, "--val", val, "--", train) == 0
    assert "validation: " not in capsys.readouterr().err
    assert run(train, *options, "--name", "two", "--val", val, more) == 0
    assert f"validation: 2 files: {val}, {more}\n" in capsys.readouterr().err


def test_a_name_that_is_also_a_glob_is_that_file(tmp_path):
    """As browsers name a second download; a shell passes it on as it is."""
    second, glob = tmp_path / "a[1].jsonl", tmp_path / "a[12].jsonl"
    others = [write_lines(tmp_path / name, TEXTS[:1]) for name in ("a1.jsonl", "a2.jsonl")]
    write_lines(second, TEXTS[:1])
    found = [[file.path for file in prepare.source_files([str(name)])] for name in (second, glob)]
    assert found == [[str(second)], [str(name) for name in others]]


def normalising(models) -> bytes:
    """A model that writes "qu" as "kw" before it cuts text into pieces; all else it keeps."""
    folder = models["part"].path.rpartition("/")[0]
    rules = Path(folder) / "rules.tsv"
    rules.write_text("71 75\t6B 77\n")
    return trained(normalization_rule_tsv=str(rules), remove_extra_whitespaces=False)


@pytest.mark.parametrize("known", [True, False])
def test_a_tokenizer_with_rules_of_its_own_is_lossy(models, tmp_path, monkeypatch, known):
    """By its rules; and where these do not tell, by the documents."""
    if not known:
        monkeypatch.setattr(prepare, "has_normalisation_rules", lambda _: False)
    prepare.load_encoder.cache_clear()
    model = tmp_path / "own.model"
    model.write_bytes(normalising(models))
    validation = ["quite a queen", "plain"]
    val = write_lines(tmp_path / "val.jsonl", validation)
    train = write_lines(tmp_path / "train.jsonl", TEXTS)
    assert run(train, "--val", val, "--tokenizer", model, "--out", tmp_path) == 0
    prepare.load_encoder.cache_clear()
    folder = tmp_path / "datasets" / "jsonl"
    assert json.loads((folder / "manifest.json").read_text())["tokenizer"]["exact"] is False
    assert read_back(folder, "val") == (["kwite a kween", "plain"], [len(t) for t in validation])


def test_rules_are_found_in_the_model(models):
    assert prepare.has_normalisation_rules(models["lossy"])
    assert prepare.has_normalisation_rules(normalising(models))
    assert not prepare.has_normalisation_rules(models["plain"])
    assert not prepare.has_normalisation_rules(models["caseops"])


# ---- whole or not at all ----------------------------------------------------


@pytest.fixture
def small(model_file, tmp_path):
    """Arguments of a quick preparation, and its folder."""
    model = model_file("plain")
    text = write_lines(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    return [text, "--tokenizer", model, "--val-fraction", 0.3, "--out", out], out / "datasets" / "jsonl"


def change_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_finished_preparation_is_used_again(small, capsys):
    arguments, folder = small
    assert run(*arguments) == 0
    born = folder.stat().st_ino
    assert "already prepared" not in capsys.readouterr().out
    assert run(*arguments) == 0
    assert "already prepared" in capsys.readouterr().out and folder.stat().st_ino == born
    for spoil in (
        lambda: (folder / "fineweb_train_000000.bin").unlink(),
        lambda: os.truncate(folder / "fineweb_val_bytes_000000.bin", 2000),
        lambda: shutil.copy(folder / "fineweb_train_000000.bin", folder / "fineweb_train_000001.bin"),
        lambda: (folder.parent.parent / "tokenizers" / "jsonl.model").write_bytes(b"other"),
        lambda: (folder / "manifest.json").write_text("[]"),
        lambda: change_manifest(folder, lambda m: m["splits"]["val"].update(documents="many")),
        lambda: change_manifest(folder, lambda m: m["splits"]["val"].pop("contest_bytes")),
        lambda: change_manifest(folder, lambda m: m["splits"]["train"].update(tokens=0)),
        lambda: change_manifest(folder, lambda m: m["tokenizer"].update(path="/dev/zero")),
        lambda: write_lines(Path(arguments[0]), TEXTS[1:]),
    ):
        spoil()
        assert run(*arguments, "--replace") == 0
        assert "already prepared" not in capsys.readouterr().out
    assert run(*arguments, "--shard-tokens", 3000, "--replace") == 0
    assert "already prepared" not in capsys.readouterr().out
    assert [p.name for p in folder.parent.iterdir()] == ["jsonl"]


@pytest.mark.parametrize("failure, status", [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left"), 2)])
def test_a_failure_leaves_what_was_there(small, monkeypatch, capsys, failure, status):
    arguments, folder = small
    assert run(*arguments) == 0
    before = everything(folder.parent.parent)

    def fail(*_):
        raise failure

    monkeypatch.setattr(prepare, "write_manifest", fail)
    assert run(*arguments, "--shard-tokens", 3000, "--replace") == status
    assert everything(folder.parent.parent) == before
    assert "Traceback" not in capsys.readouterr().err


def test_another_dataset_is_not_replaced_in_silence(small, capsys):
    arguments, folder = small
    assert run(*arguments) == 0
    before = everything(folder.parent.parent)
    assert run(*arguments, "--shard-tokens", 3000) == 2
    assert f"{folder}: holds another dataset (other shard_tokens); " in capsys.readouterr().err
    (folder / "manifest.json").write_bytes(b"[" * 100_000)
    assert run(*arguments) == 2
    assert "holds something unreadable" in capsys.readouterr().err
    (folder / "manifest.json").write_bytes(before["datasets/jsonl/manifest.json"])
    (folder / "fineweb_train_000000.bin").unlink()
    assert run(*arguments) == 0  # the same is mended
    assert everything(folder.parent.parent) == before
    assert run(*arguments, "--shard-tokens", 3000, "--replace") == 0
    assert everything(folder.parent.parent) != before


def test_a_worker_that_dies_is_reported(small, monkeypatch, capsys):
    arguments, folder = small
    monkeypatch.setattr(prepare, "encode_document", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run(*arguments) == 2
    assert "a worker process died" in capsys.readouterr().err and not folder.exists()


def test_a_foreign_folder_is_left_alone(small, capsys):
    arguments, folder = small
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    assert run(*arguments) == 2
    assert "was not made by prepare" in capsys.readouterr().err
    assert everything(folder) == {"precious.txt": b"mine"}


def test_a_link_to_a_dataset_is_replaced_and_not_followed(small, tmp_path, capsys):
    """As where a dataset was moved to a larger disk."""
    arguments, folder = small
    assert run(*arguments) == 0
    moved = folder.rename(tmp_path / "moved")
    before = everything(moved)
    folder.symlink_to(moved)
    for tokens in (3000, 4000):  # twice, because the first could leave something behind
        assert run(*arguments, "--shard-tokens", tokens, "--replace") == 0, capsys.readouterr().err
    assert everything(moved) == before and not folder.is_symlink()
    assert [path.name for path in folder.parent.iterdir()] == ["jsonl"]


def test_a_link_to_nothing_is_refused_before_the_work(small, tmp_path, capsys):
    arguments, folder = small
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / "gone")
    assert run(*arguments) == 2
    assert "was not made by prepare" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["jsonl"]


def test_two_preparations_of_one_name_do_not_meet(small, capsys):
    arguments, folder = small
    partial = folder.parent / ".jsonl.partial"
    partial.mkdir(parents=True)
    (partial / "left by a process that was killed").write_text("")
    with prepare.workspace(folder, {}, replace=False, resume_key="of a download"):
        assert run(*arguments) == 2
    assert "another process is preparing it" in capsys.readouterr().err and len(list(partial.iterdir())) == 1
    shutil.rmtree(folder)
    assert run(*arguments) == 0
    assert sorted(p.name for p in folder.parent.iterdir()) == ["jsonl"]


def before_the_lock(monkeypatch, act: Callable[[], None]) -> None:
    """Let another process act between the first look at the folder and its lock."""
    flock = fcntl.flock

    def after_the_other(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        act()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", after_the_other)


def test_what_another_process_has_just_prepared_is_not_replaced(small, monkeypatch, capsys):
    arguments, folder = small
    assert run(*arguments) == 0
    before = everything(folder)
    aside = folder.rename(folder.with_name("aside"))
    before_the_lock(monkeypatch, lambda: aside.rename(folder))
    assert run(*arguments, "--shard-tokens", 3000) == 2
    assert "holds another dataset (other shard_tokens)" in capsys.readouterr().err
    assert everything(folder) == before and [path.name for path in folder.parent.iterdir()] == ["jsonl"]


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, capsys):
    """Some network file systems have none. Runs go on there, too."""

    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with prepare.locked(tmp_path / ".jsonl.lock", "busy"):
        pass
    assert "cannot be locked: No locks available" in capsys.readouterr().err


def test_a_lock_that_its_owner_removes_meanwhile_is_none(tmp_path, monkeypatch):
    """Two processes would hold locks on two files of one name."""
    lock = tmp_path / "datasets" / ".jsonl.lock"
    before_the_lock(monkeypatch, lock.unlink)
    with prepare.locked(lock, "busy"), pytest.raises(prepare.UserError, match="busy"), prepare.locked(lock, "busy"):
        pass
    assert not lock.exists()


FORKER = """
import json, os, sys
sys.path[0] = os.getcwd()
import train_gpt
for line in sys.stdin:
    folder, program = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        exec(program)
        break
    print(child, flush=True)
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its id stays taken: a signal may come too late
    print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, flush=True)
"""


class Forker:
    """Runs programs in forks of a process that has imported the entry: importing takes longer than the programs do.
    A program gets a session of its own, and ends as any Python process does."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def start(self, folder: Path, program: str) -> None:
        """Run a program in a folder."""
        os.mkfifo(folder / "output")
        self.output = os.open(folder / "output", os.O_RDONLY | os.O_NONBLOCK)
        self.process.stdin.write(json.dumps([str(folder), program]).encode() + b"\n")
        self.pid = int(self.process.stdout.readline())
        self.running = True

    def has_ended(self, wait_s: float = 0) -> bool:
        return bool(select.select([self.process.stdout], [], [], wait_s)[0])

    def result(self) -> tuple[int, str]:
        """(exit status, output), once the program and all processes that hold its output have ended."""
        assert self.has_ended(20), "the program does not end"
        status = int(self.process.stdout.readline())
        self.running = False
        output = b""
        while True:
            assert select.select([self.output], [], [], 20)[0], "a process of the program does not end"
            chunk = os.read(self.output, 1 << 16)
            if not chunk:
                return status, output.decode()
            output += chunk

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.output)
        if self.running:
            self.process.stdout.readline()


@pytest.fixture(scope="session")
def forker_process():
    forker = Forker()
    yield forker
    forker.process.stdin.close()
    forker.process.wait()


@pytest.fixture
def forker(forker_process):
    yield forker_process
    forker_process.clean_up()


# `at_it` says that the preparation is where the signal shall find it.
INTERRUPTED = """
import hashlib, os, runpy, sys, time
from multiprocessing.connection import Connection
import sentencepiece
parent = os.getpid()
send = Connection._send
def at_it():
    open("at it", "w").close()
def train_long(**_):
    at_it()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # Python hears no signal
def send_in_two(self, data, *more):
    if len(data) < 1 << 16 or os.getpid() == parent:
        return send(self, data, *more)
    send(self, data[:9], *more)
    at_it()
    while not os.path.exists("signals are sent"):
        time.sleep(0.01)
    send(self, data[9:], *more)
Connection._send = send_in_two
sentencepiece.SentencePieceTrainer.train = train_long
sys.argv = {arguments}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["INT", "TERM", "INT, INT, INT", "TERM to all"])
@pytest.mark.parametrize("moment", ["in training", "while a long result is sent"])
def test_a_signal_ends_it_within_seconds(small, tmp_path, forker, moment, sent):
    """And all its workers, also if it comes again, or to them, too, as from `timeout`."""
    arguments, folder = small
    if moment == "in training":
        arguments = [a for a in arguments if a not in ("--tokenizer", tmp_path / "given.model")]
    command = [ROOT / "data" / "prepare.py", "jsonl", *arguments, "--workers", 3]
    forker.start(tmp_path, INTERRUPTED.format(arguments=list(map(str, command))))
    while not (tmp_path / "at it").exists():
        assert not forker.has_ended(0.01), forker.result()
    for name in sent.removesuffix(" to all").split(", "):
        send = os.killpg if sent.endswith(" to all") else os.kill
        send(forker.pid, signal.Signals["SIG" + name])
        time.sleep(0.1)
    (tmp_path / "signals are sent").touch()
    begin = time.monotonic()
    status, output = forker.result()
    assert status in (130, -signal.SIGINT) and time.monotonic() - begin < 15  # -2: at Python's own end
    assert "interrupted" in output and not list(folder.parent.iterdir())


@pytest.mark.parametrize("moment", ["encode_batch", "save_tokenizer"])
def test_workers_end_with_a_parent_that_is_killed(small, tmp_path, forker, moment):
    """And hold no lock meanwhile: the next preparation can begin at once."""
    arguments, folder = small
    if moment == "save_tokenizer":
        arguments = [a for a in arguments if a not in ("--tokenizer", tmp_path / "given.model")]
    program = f"""
import os, sys, time
from data import prepare
def stall(*_):
    open("at it", "w").close()
    time.sleep(1000)
prepare.{moment} = stall
sys.exit(prepare.main({["jsonl", *map(str, arguments), "--workers", "2"]!r}))
"""
    forker.start(tmp_path, program)
    while not (tmp_path / "at it").exists():
        assert not forker.has_ended(0.01), forker.result()
    lock = os.open(folder.parent / ".jsonl.lock", os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(forker.pid, signal.SIGKILL)
    begin = time.monotonic()
    assert forker.result()[0] == -signal.SIGKILL  # the output is closed: no worker is left
    assert time.monotonic() - begin < 15
    with prepare.locked(folder.parent / ".jsonl.lock", "busy"):
        pass
    os.close(lock)


def test_workers_work_where_none_can_be_tied_to_its_parent(monkeypatch):
    """As on systems other than Linux, where they failed for lack of prctl(2)."""
    monkeypatch.setattr(prepare, "ends_with_its_parent", lambda signal: None)
    with prepare.worker_pool(1) as pool:
        assert pool.submit(abs, -7).result() == 7


@pytest.mark.slow
def test_workers_that_cannot_all_be_made_are_ended(tmp_path, forker):
    program = """
import errno, os
from data import prepare
fork, made = os.fork, []
def failing():
    if len(made) == 2:
        raise OSError(errno.EAGAIN, "no more processes")
    made.append(child := fork())
    return child
os.fork = failing
try:
    with prepare.worker_pool(4):
        print("all made")
except OSError as error:
    print(error.strerror)
"""
    forker.start(tmp_path, program)
    assert forker.result() == (0, "no more processes\n")


@pytest.mark.slow
def test_a_signal_while_workers_are_made_is_not_lost(tmp_path, forker):
    """Python drops what is raised in the hooks of a fork."""
    program = """
import os, signal
from data import prepare
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
try:
    with prepare.worker_pool(1):
        print("lost")
except KeyboardInterrupt:
    print("heard")
"""
    forker.start(tmp_path, program)
    assert forker.result() == (0, "heard\n")


# ---- what it prints ---------------------------------------------------------

PRINTING = """
import os, runpy, sys
sys.stdout = open(1, "w", encoding={encoding!r}, closefd=False)
sys.stderr = open(2, "w", encoding={encoding!r}, closefd=False, errors="backslashreplace", buffering=1)
{first}
for arguments in {calls!r}:
    sys.argv = [{program!r}, *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
sys.exit(status)
"""


@pytest.fixture
def printed(forker, tmp_path) -> Callable[..., tuple[int, str]]:
    """printed(*calls, encoding, first): the command with these arguments each, on an output of this encoding, after
    this code -> (the last status, what was printed)."""

    def run_it(*calls: list, encoding: str = "utf-8", first: str = "") -> tuple[int, str]:
        texts = [list(map(str, arguments)) for arguments in calls]
        program = str(ROOT / "data" / "prepare.py")
        forker.start(tmp_path, PRINTING.format(program=program, calls=texts, encoding=encoding, first=first))
        return forker.result()

    return run_it


@pytest.mark.parametrize(
    "name, encoding, shown",
    [
        ("t\xe9xt", "utf-8", "t\xe9xt"),
        ("t\xe9xt", "ascii", "t\\xe9xt"),
        ("\udcff", "utf-8", "\\udcff"),
        ("new\nline\x1b[2J", "ascii", "new\\nline\\x1b[2J"),
    ],
    ids=range(4),
)
def test_names_that_cannot_be_shown_are_escaped(model_file, tmp_path, printed, name, encoding, shown):
    """Of files and folders: in what is prepared, or was already, in warnings and in errors."""
    out = tmp_path / name
    out.mkdir()
    text = write_lines(out / "a.jsonl", TEXTS[:60])
    text.write_bytes(text.read_bytes() + b"17\n")
    strict = ["jsonl", text, "--val-fraction", 0.3, "--tokenizer", model_file("plain"), "--out", out, "--workers", 1]
    skipping = [*strict, "--skip-bad-lines"]
    status, output = printed(skipping, skipping, strict, encoding=encoding)
    assert status == 2 and "\x1b" not in output and "Traceback" not in output
    for line in ("jsonl\n", "jsonl: already prepared\n", "jsonl: holds another dataset (other source); "):
        assert f"/{shown}/datasets/{line}" in output
    assert f"/{shown}/a.jsonl:61: b'17'; expected a JSON string" in output


@pytest.mark.parametrize("stream", [1, 2])
def test_a_reader_that_goes_is_no_error(small, printed, stream):
    """As in `| head`; what was prepared is whole."""
    arguments, folder = small
    close = f"read, write = os.pipe(); os.close(read); os.dup2(write, {stream})"
    command = ["jsonl", *arguments, "--workers", 1] if stream == 1 else ["jsonl", "none"]
    assert printed(command, first=close) == (141, "")
    assert (folder / "manifest.json").exists() == (stream == 1)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_without_an_output_it_works(small, printed, stream):
    arguments, folder = small
    status, output = printed(["jsonl", *arguments, "--workers", 1], first=f"sys.{stream} = None")
    assert status == 0 and (folder / "manifest.json").exists(), output


@pytest.mark.parametrize("stream", [1, 2])
def test_a_screen_on_a_full_disk_is_no_failure(small, printed, stream):
    arguments, folder = small
    arguments[0].write_bytes(arguments[0].read_bytes() + b"17\n")  # which is warned about
    full = f"os.dup2(os.open('/dev/full', os.O_WRONLY), {stream})"
    status, output = printed(["jsonl", *arguments, "--workers", 1, "--skip-bad-lines"], first=full)
    assert status == 0 and (folder / "manifest.json").exists()
    lost = output.count("warning: stdout: a line cannot be written: No space left on device; the data is not affected")
    assert lost == (stream == 1) and "--out" not in output


# ---- installed text ---------------------------------------------------------


def test_sources_are_parsed_not_run(tmp_path):
    package = tmp_path / "pack"
    module = '''
"""Module."""
class C:
  """Class."""
  def m(self):
    """Method."""
    def inner():
      """No."""
  def _m(self):
    """No."""
async def f():
  """Function \\d."""
if True:
  def g():
    """No."""
'''
    no = '"""No."""'
    for name, code in {
        "__init__": '"""Package."""\nraise SystemExit("this was run")',
        "good": module,
        "_private": no,
        "other": f"{no}\nprint 1",
        "tests/one": no,
        "idlelib": no,
        "__main__": no,
        "sub/__init__": '"""Sub."""',
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(code)
    found = dict(prepare.parsed_docstrings(package, "pack"))
    assert found == {
        "pack": "Package.",
        "pack.good": "Module.",
        "pack.good.C": "Class.",
        "pack.good.C.m": "Method.",
        "pack.good.f": "Function \\d.",
        "pack.sub": "Sub.",
    }
    (package / "string.py").write_text('"""Of the standard library."""')
    assert dict(prepare.parsed_docstrings(package, "")) == {"string": "Of the standard library."}  # only its modules


def test_compiled_documentation():
    found = dict(prepare.compiled_docstrings("builtins"))
    assert "Return" in found["builtins.abs"] and "builtins.str.join" in found
    assert not [name for name in found if "._" in name]
    assert "torch.matmul" in dict(prepare.compiled_docstrings("torch"))


def test_installed_documents_are_masked_deduplicated_and_sorted(monkeypatch):
    long = "Of some length. " * 20
    sources = {
        "": [("os.b", f"ours 2 {long}")],
        "torch": [("torch.short", "ours, too short")],
        "numpy": [("numpy.z", f"ours 2 {long}"), ("numpy.a", f"ours 1 <f at 0x7f12ab34cd56> {long}")],
    }
    monkeypatch.setattr(prepare, "parsed_docstrings", lambda root, package: sources[package])
    monkeypatch.setattr(prepare, "compiled_docstrings", lambda name: [(f"{name}.compiled", f"ours 3 {long}")])
    texts = prepare.installed_documents()
    assert len(texts) > 50 and "The standard type hierarchy" in "".join(texts)  # pydoc's topics
    assert [t for t in texts if t.startswith("ours")] == [
        f"ours 3 {long}",
        f"ours 1 <f at 0x0> {long}",
        f"ours 2 {long}",
    ]  # array.compiled, numpy.a, numpy.z


def test_installed_validation_is_chosen_by_digest(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare, "installed_documents", lambda: TEXTS)
    arguments = ["installed", "--workers", "1", "--vocab-size", "420", "--out", str(tmp_path)]
    assert prepare.main([*arguments, "--val-docs", "40"]) == 0
    folder = tmp_path / "datasets" / "installed"
    val, train = (read_back(folder, split)[0] for split in ("val", "train"))
    assert len(val) == 40 and val + train != TEXTS and sorted(val + train) == sorted(TEXTS)
    assert val + train == sorted(TEXTS, key=prepare.text_digest)
    assert prepare.main([*arguments, "--val-docs", "400"]) == 2
    assert "--val-docs 400: there are 400 documents" in capsys.readouterr().err


def test_without_docstrings_it_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    with pytest.raises(train_gpt.UserError, match="-OO"):
        prepare.installed_documents()


@pytest.mark.slow
def test_installed_text_is_the_same_in_every_process(tmp_path):
    """Other hash seed, other folder, another package in sight, another environment: the same bytes."""
    (tmp_path / "torch_more.py").write_text('"""' + "No part of it. " * 50 + '"""')
    results = []
    for seed, folder in (("1", tmp_path), ("2", ROOT)):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HOME": str(folder), "PYTHONPATH": str(folder)}
        command = [sys.executable, ROOT / "data" / "prepare.py", "installed", "--out", tmp_path / seed]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(everything(tmp_path / seed))
    assert results[0] == results[1]
    manifest = json.loads(results[0]["datasets/installed/manifest.json"])
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    assert train["documents"] > 4000 and train["original_bytes"] > 5_000_000
    assert 40_000 < val["original_bytes"] < 120_000
    texts, sums = read_back(tmp_path / "1" / "datasets" / "installed", "val")
    assert texts == [json.loads(line) for line in results[0]["datasets/installed/val.jsonl"].splitlines()]
    assert sums == [len(t.encode()) for t in texts]
    everywhere = b"".join(results[0].values())
    assert str(ROOT).encode() not in everywhere and str(tmp_path).encode() not in everywhere


# ---- progress ---------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stream, times, expected",
    [
        (io.StringIO, (0, 9, 20, 25), "encoding: 20 s, 20 MB, 1.0 MB/s, 20%, 80 s left\n"),
        (Terminal, (0, 0.5, 2), "\r\x1b[Kencoding: 2 s, 20 MB, 10.0 MB/s, 20%, 8 s left\r"),
    ],
)
def test_progress_tells_how_long_still(monkeypatch, stream, times, expected):
    clock = iter(times)
    out = stream()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with contextlib.redirect_stderr(out):
        progress = prepare.Progress("encoding", 100_000_000)
        for _ in times[1:]:
            progress(20_000_000)
    assert out.getvalue() == expected
