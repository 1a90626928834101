"""The compressor: what comes out is what went in, at the size that the scorer reports, or else an error says why."""

import dataclasses
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import any_gradient_rms, stored_tensors
from graphs import replays_of
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from tools import codec, compress, decompress, sample
from tools.artifact import end_in_a_line, find_artifact
from train_gpt import BOS, DataError, UserError

ROOT = Path(train_gpt.__file__).parent
SIZE = 300  # pieces: the tokenizers here spell in bytes what they do not know
LOSSY = dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, remove_extra_whitespaces=True)
STRANGE = {
    "empty": b"",
    "nul": b"\0",
    "no UTF-8": b"\xff",
    "a bad byte in much text": b"a tale of nine oars \xe9 and then some more of the same",
    "half a character": "déjà".encode()[:-1],
    "surrogate": b"some words before and \xed\xa0\x80 some after it, to be text, a bit more",
    "lines": b"one\r\ntwo\n\n\n\tthree  \r",
    "control pieces": b"<s></s> <unk> <0x41> <pad>\x01",
    "marks of the tokenizer": "a▁b \ue001\ue002\ue003\ue004A NASA McDonald \ue004".encode(),
    "signs": "½ ﬁne … Ⅳ ﷺ é e\u0301 😀\u200b\ufeff\ufffd".encode(),
    "bytes": bytes(range(256)) * 2,
}


def some_text(words: int, seed: int = 3) -> bytes:
    chance = random.Random(seed)
    known = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(25)]  # they repeat
    return " ".join(chance.choices(known, k=words)).encode()


@pytest.fixture
def make_artifact(tmp_path, monkeypatch, tiny_config, train_tokenizer):
    """make_artifact(name, transform, seed, rms, heads, **options of the tokenizer): a network of random weights whose
    predictions are far from even, in a file, with the RMS of gradients or without; the environment then leads to its
    tokenizer -> its path."""

    def make(
        name: str = "tiny", transform: str = "none", seed: int = 0, rms: bool = False, heads: int = 4, **options
    ) -> Path:
        proto = train_tokenizer(vocab_size=SIZE, byte_fallback=True, **options)
        (tmp_path / "tokenizer.model").write_bytes(proto)
        manifest = {"tokenizer": {"path": "tokenizer.model", "transform": transform}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        config = dataclasses.replace(tiny_config, vocab_size=SIZE, num_heads=heads, num_kv_heads=heads // 2)
        model = train_gpt.GPT(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                if param.ndim == 2:
                    param.normal_(0, 0.2, generator=generator)
        meta = {"kind": "artifact", "model": dataclasses.asdict(model.config)}
        meta["tokenizer"] = train_gpt.hashlib.sha256(proto).hexdigest()
        path = tmp_path / f"{name}.ptz"
        model.gradient_rms = any_gradient_rms(model.config, 8) if rms else None
        stored = stored_tensors(model) | train_gpt.encode_gradient_rms(model)
        path.write_bytes(train_gpt.pack(meta, stored, level=1))
        return path

    knobs = dict(DATA_PATH=str(tmp_path), EVAL_SEQ_LEN="32", TTT_CHUNK_TOKENS="8", TTT_LORA_RANK="2", TTT_LR="0.02")
    for knob, value in (knobs | {"TTT_BATCH_DOCS": "3", "DEVICE": "cpu"}).items():
        monkeypatch.setenv(knob, value)
    return make


@pytest.fixture
def artifact(make_artifact) -> Path:
    codec.make_deterministic(torch.get_num_threads())
    yield make_artifact()
    torch.use_deterministic_algorithms(False)


def there_and_back(path: Path, data: bytes, separator: bytes = b"") -> codec.Compressed:
    made = codec.compress(codec.open_predictor(path), data, separator)
    assert codec.decompress(path, codec.unpack_file(made.blob, "it")) == data
    return made


def scored_bits(predictor: codec.Predictor, documents: list[list[int]], **changes) -> float:
    """What the scorer says of these documents, each with its closing BOS."""
    stream = np.array([BOS, *(token for document in documents for token in document)], np.uint16)
    starts = np.flatnonzero(stream == BOS)  # the last one begins nothing
    docs = train_gpt.Documents(stream, np.ones(len(stream), np.int64), starts)
    table = train_gpt.ScoreTable(docs)
    run = dataclasses.replace(predictor.run, **changes)
    dist = train_gpt.Dist(device=predictor.device)
    if run.ttt_enabled:
        learners = train_gpt.Learners(predictor.model, predictor.device)
        train_gpt.score_batched(docs, range(len(docs)), run, dist, table, learners)
    else:
        with torch.no_grad():
            train_gpt.score_static(predictor.model, docs, range(len(docs)), run, dist, table)
    assert table.targets.tolist() == [len(document) for document in documents]
    return table.nats.sum() / math.log(2)


# -----------------------------------------------------------------------------
# The code is as long as the score says


def allowance(bits: float) -> float:
    """What README allows code and score to differ by. The code can be the shorter one: no token costs it more than 28
    bits, and these networks find some tokens less likely than that."""
    return 0.01 * bits + 8 * 16


def test_a_document_takes_the_bits_that_the_scorer_reports_and_comes_back(artifact):
    """The four rules at once: a score that looked ahead, was not normalised, learned first or left a token out could
    not be decoded at this length."""
    predictor = codec.open_predictor(artifact)
    text = some_text(40)
    made = there_and_back(artifact, text)
    tokens = codec.to_tokens(predictor, False, text.decode())
    bits = scored_bits(predictor, [tokens])
    assert made.tokens == len(tokens) > 3 * predictor.run.eval_seq_len  # the window slides
    assert made.edits == 0
    assert abs(8 * made.coded - bits) <= allowance(bits)
    without = scored_bits(predictor, [tokens], ttt_lr=0.0)
    assert abs(without - bits) > allowance(bits)  # what was learned counts: neither side can have left it out


def test_documents_side_by_side_take_the_bits_of_each(artifact):
    """Five documents in groups of three: rows end at different times, one at the very end of a chunk, one is empty."""
    predictor = codec.open_predictor(artifact)
    texts = [some_text(n, seed=n).decode() for n in (5, 2, 16)] + ["", "tone"]
    lengths = [len(codec.to_tokens(predictor, False, text)) for text in texts]
    texts[1] += "\0" * (-lengths[1] % 8)  # a token each
    documents = [codec.to_tokens(predictor, False, text) for text in texts]
    assert len(documents[1]) % 8 == 0
    made = there_and_back(artifact, "\n\n".join(texts).encode(), separator=b"\n\n")
    bits = sum(scored_bits(predictor, [document]) for document in documents)
    assert made.documents == 5
    assert abs(8 * made.coded - bits) <= allowance(bits)


def test_without_adaptation(artifact, monkeypatch):
    monkeypatch.setenv("TTT_ENABLED", "0")
    text = some_text(3)
    made = there_and_back(artifact, text)
    predictor = codec.open_predictor(artifact)
    tokens = codec.to_tokens(predictor, False, text.decode())
    assert len(tokens) <= predictor.run.eval_seq_len  # in a longer one, static windows see less than the codec's cache
    bits = scored_bits(predictor, [tokens])
    assert abs(8 * made.coded - bits) <= allowance(bits)


def test_other_knobs_of_adaptation_reach_the_decoder(artifact, monkeypatch):
    for name, value in (("OPTIMIZER", "sgd"), ("EPOCHS", "2"), ("ENTROPY_HIGH", "3"), ("MIN_DOC_TOKENS", "24")):
        monkeypatch.setenv(f"TTT_{name}", value)
    made = codec.compress(codec.open_predictor(artifact), some_text(9))
    for name in ("OPTIMIZER", "EPOCHS", "ENTROPY_HIGH", "MIN_DOC_TOKENS", "LR"):
        monkeypatch.delenv(f"TTT_{name}")
    assert codec.decompress(artifact, codec.unpack_file(made.blob, "it")) == some_text(9)


def test_a_context_longer_than_the_default_micro_batch_reaches_the_decoder(artifact, monkeypatch):
    for name in ("EVAL_SEQ_LEN", "MICRO_BATCH_TOKENS"):
        monkeypatch.setenv(name, "120000")
    stored = codec.knobs_to_store(codec.open_predictor(artifact))
    monkeypatch.delenv("MICRO_BATCH_TOKENS")
    assert codec.open_predictor(artifact, stored).run.eval_seq_len == 120_000


@pytest.mark.usefixtures("artifact")  # deterministic
@pytest.mark.parametrize(
    "knobs, stored",
    [({}, {}), ({"TTT_RMS_FLOOR": "0.5"}, {"TTT_RMS_FLOOR"}), ({"TTT_OPTIMIZER": "adamw"}, {"TTT_OPTIMIZER"})],
)
def test_the_optimizer_is_stored_unless_it_follows_from_the_artifact(make_artifact, monkeypatch, knobs, stored):
    path = make_artifact("with rms", rms=True)
    expected = codec.knobs_to_store(codec.open_predictor(path)).keys() | stored
    for name, value in knobs.items():
        monkeypatch.setenv(name, value)
    made = codec.compress(codec.open_predictor(path), some_text(9))
    for name in (*knobs, "TTT_LR"):
        monkeypatch.delenv(name)
    contents = codec.unpack_file(made.blob, "it")
    assert contents.header["knobs"].keys() == expected and "TTT_LR" in expected
    assert codec.decompress(path, contents) == some_text(9)


# -----------------------------------------------------------------------------
# Devices

GPU = torch.device("cuda")
FIVE = "\n\n".join(["", "tone", *(some_text(n, seed=n).decode() for n in (5, 30, 16))]).encode()  # documents
FROM_A_CPU = (  # pack_file's, before a header could name a GPU
    "504754013800ab2631b02c416155500a0b294808c1f42187545a624e31314185ec7623ec4e4f4b4d494e4ab4b4303733353136323440f6"
    "8a11c22b96b500636f646564402a4ad95e31b6f2"
)


@pytest.mark.parametrize("late", ["8", "16"])
def test_what_a_gpu_does_gives_the_bits_of_the_score_and_comes_back(artifact, monkeypatch, late):
    """Played on a CPU: rows of no document, predictions replayed as graphs, which overwrite those before; two groups
    of documents, some of them longer than the context."""
    monkeypatch.setenv("TTT_LATE_CHUNK_TOKENS", late)
    plain_steps = train_gpt.chunk_steps
    monkeypatch.setattr(train_gpt, "chunk_steps", lambda n, run, _, goes_on: plain_steps(n, run, GPU, goes_on))
    captured = replays_of(train_gpt.BatchedTTT, monkeypatch)
    made = there_and_back(artifact, FIVE, separator=b"\n\n")
    predictor = codec.open_predictor(artifact)
    documents = [codec.to_tokens(predictor, False, text.decode()) for text in FIVE.split(b"\n\n")]
    assert max(map(len, documents)) > 2 * predictor.run.eval_seq_len
    bits = sum(scored_bits(predictor, [document]) for document in documents)
    assert abs(8 * made.coded - bits) <= allowance(bits)
    assert captured and not any(graph.fresh for graph in captured)


def test_a_gpu_has_as_many_rows_as_keep_all_documents_side_by_side(artifact, monkeypatch):
    monkeypatch.setenv("TTT_BATCH_DOCS", "100")
    monkeypatch.setenv("TTT_LATE_CHUNK_TOKENS", "20")
    on_cpu = codec.open_predictor(artifact)
    assert codec.with_rows_for(on_cpu, 1).run == on_cpu.run
    for documents, rows in ((1, 3), (2, 5), (39, 98), (40, 100), (1000, 100)):
        run = codec.with_rows_for(on_cpu._replace(device=GPU), documents).run
        assert run.ttt_batch_docs == rows
        step = next(
            s for s in train_gpt.chunk_steps(min(documents, rows), run, GPU, lambda rows, _: rows >= 0) if s.wave
        )
        assert len(step.rows) >= min(documents, 40)


def test_a_gpu_is_asked_for_its_own_memory(artifact, monkeypatch):
    predictor = codec.open_predictor(artifact)
    given = predictor.model.config, predictor.run, 3
    codec.require_memory(*given, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1 << 12))
    with pytest.raises(UserError, match="lower TTT_BATCH_DOCS"):
        codec.require_memory(*given, GPU)


def test_a_file_from_before_headers_could_name_a_gpu_is_read():
    contents = codec.unpack_file(bytes.fromhex(FROM_A_CPU), "it")
    assert contents.header.keys() == codec.HEADER.keys()
    assert (contents.header["knobs"], contents.header["threads"], contents.coded) == ({"TTT_LR": "0.02"}, 2, b"coded")
    assert codec.device_of(contents.header) == "cpu"


def test_the_header_of_a_file_from_a_cpu_names_no_device(artifact):
    header = codec.unpack_file(codec.compress(codec.open_predictor(artifact), b"a tale").blob, "it").header
    assert header.keys() == codec.HEADER.keys()


@pytest.fixture
def here(monkeypatch):
    """here(gpu): from now on torch sees this GPU, or none."""

    def set_up(gpu: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)

    return set_up


@pytest.mark.parametrize("device", ["auto", "cpu", None])
def test_what_a_cpu_compressed_a_cpu_decompresses_though_there_is_a_gpu(
    artifact, compressed, monkeypatch, here, device
):
    here("NVIDIA H200")
    if device is None:
        monkeypatch.delenv("DEVICE")
    else:
        monkeypatch.setenv("DEVICE", device)
    assert codec.decompress(artifact, codec.unpack_file(compressed, "it")) == some_text(5)


@pytest.mark.parametrize(
    "made_on, gpu, device, said",
    [
        ("cpu", "NVIDIA H200", "cuda", "compressed on a CPU, but DEVICE=cuda: set DEVICE=cpu or auto"),
        ("NVIDIA H200", "NVIDIA H200", "cpu", "a GPU, NVIDIA H200, but DEVICE=cpu: set DEVICE=cuda or auto"),
        ("NVIDIA H200", None, "auto", "compressed on a GPU, NVIDIA H200: it decompresses only there, .* no GPU"),
        (
            "NVIDIA H200",
            "NVIDIA A100",
            "auto",
            "NVIDIA H200, under torch .* only there, and here is NVIDIA A100, torch",
        ),
        ("an older build", "NVIDIA H200", "cuda", "NVIDIA H200, under torch 1: .* here is NVIDIA H200, torch"),
        ("\n\x1b[1m", "NVIDIA H200", "auto", r"a GPU, \\n\\x1b\[1m, under torch"),
    ],
)
def test_another_device_is_refused_and_the_encoders_named(
    artifact, compressed, monkeypatch, here, made_on, gpu, device, said
):
    here(gpu)
    monkeypatch.setenv("DEVICE", device)
    header, _, coded = codec.unpack_file(compressed, "it")
    if made_on == "an older build":
        header |= {"device": "NVIDIA H200", "build": "torch 1"}
    elif made_on != "cpu":
        header |= {"device": made_on, "build": codec.build(GPU)}
    contents = codec.unpack_file(codec.pack_file(header, b"", coded), "it")
    with pytest.raises(UserError, match=said) as error:
        codec.decompress(artifact, contents)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("enabled", ["1", "0"])
def test_documents_come_back_from_a_gpu_at_the_size_of_their_score(make_artifact, tmp_path, monkeypatch, enabled):
    """From one process to another, and not on a CPU."""
    path = make_artifact(heads=2)
    for name, value in (("DEVICE", "auto"), ("TTT_BATCH_DOCS", "4"), ("TTT_ENABLED", enabled)):
        monkeypatch.setenv(name, value)
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    source.write_bytes(FIVE)

    def run(*command: str, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *command, "--artifact", str(path)]
        return subprocess.run(command, cwd=ROOT, timeout=300, env=os.environ | env, capture_output=True, text=True)

    done = run("tools.compress", str(source), str(out), "--split", r"\n\n")
    assert done.returncode == 0, done.stderr
    done = run("tools.decompress", str(out), str(back))
    assert done.returncode == 0, done.stderr
    assert back.read_bytes() == FIVE
    contents = codec.unpack_file(out.read_bytes(), "it")
    assert contents.header["device"] == torch.cuda.get_device_name()
    done = run("tools.decompress", str(out), str(back), DEVICE="cpu")
    assert done.returncode == 2 and torch.cuda.get_device_name() in done.stderr

    try:
        predictor = codec.open_predictor(path, device="cuda")
        documents = [codec.to_tokens(predictor, False, text.decode()) for text in FIVE.split(b"\n\n")]
        bits = sum(scored_bits(predictor, [document]) for document in documents)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert abs(8 * len(contents.coded) - bits) <= allowance(bits)


# -----------------------------------------------------------------------------
# Any bytes


@pytest.mark.parametrize("options", [{}, LOSSY], ids=["exact", "lossy"])
@pytest.mark.parametrize("transform", ["none", "caseops"])
def test_any_bytes_come_back(make_artifact, transform, options):
    predictor = codec.open_predictor(make_artifact(transform=transform, **options))
    caseops = codec.uses_caseops(predictor)
    assert caseops == (transform == "caseops")

    @given(
        st.lists(st.sampled_from([*STRANGE.values(), some_text(9)]) | st.binary(max_size=20), min_size=1, max_size=4)
    )
    @settings(max_examples=60)
    def check(parts: list[bytes]):
        documents, passes = codec.to_documents(predictor, caseops, parts, b"\xfe\n")
        assert all(document.count(BOS) == 1 for document in documents)
        passes = codec.unpack_edits(codec.pack_edits(passes))
        assert codec.from_documents(predictor, caseops, documents, b"\xfe\n", passes) == b"\xfe\n".join(parts)

    check()


@pytest.mark.parametrize("name", ["empty", "no UTF-8", *(pytest.param(n, marks=pytest.mark.slow) for n in STRANGE)])
def test_strange_text_comes_back_from_bits(artifact, name):
    there_and_back(artifact, STRANGE[name])


def test_strange_documents_come_back_side_by_side(artifact, monkeypatch):
    monkeypatch.setenv("TTT_BATCH_DOCS", "16")
    there_and_back(artifact, b"\n--\n".join(STRANGE.values()), separator=b"\n--\n")


def test_what_the_tokenizer_keeps_needs_no_edit(artifact):
    predictor = codec.open_predictor(artifact)
    for name in ("empty", "nul", "lines", "control pieces"):
        assert codec.to_documents(predictor, False, [STRANGE[name]], b"")[1] == [[], []], name


def test_edits_stay_small_where_little_is_lost(make_artifact):
    """A tokenizer that makes one space of line ends and of spaces: an edit for each, not for what lies between."""
    predictor = codec.open_predictor(make_artifact(**LOSSY))
    text = b"\n".join([some_text(12, seed=n) + b" " * 300 + b"tale" for n in range(20)])
    documents, passes = codec.to_documents(predictor, False, [text], b"")
    assert sum(len(e.added) for edits in passes for e in edits) < 20 * 320
    assert len(codec.pack_edits(passes)) < 200


@given(st.binary(max_size=80), st.lists(st.tuples(st.integers(0, 80), st.integers(0, 12), st.binary(max_size=12))))
def test_edits_turn_one_string_into_another(got, changes):
    wanted = got
    for place, dropped, added in changes:
        wanted = wanted[:place] + added + wanted[place + dropped :]
    edits = codec.find_edits(got, wanted)
    assert codec.apply_edits(got, edits) == wanted
    assert codec.unpack_edits(codec.pack_edits([edits, []])) == [edits, []]


# -----------------------------------------------------------------------------
# Errors


@pytest.fixture(scope="module")
def kept() -> dict[str, bytes]:
    """What `compressed` has made: it is the same each time."""
    return {}


@pytest.fixture
def compressed(artifact, kept) -> bytes:
    if not kept:
        kept["blob"] = codec.compress(codec.open_predictor(artifact), some_text(5)).blob
    return kept["blob"]


def test_damage_is_noticed_wherever_it_is(compressed):
    for place in range(len(compressed)):
        for damaged in (
            compressed[:place],
            compressed[:place] + bytes([compressed[place] ^ 8]) + compressed[place + 1 :],
        ):
            with pytest.raises(DataError):
                codec.unpack_file(damaged, "it")


@pytest.mark.parametrize("body", [codec.MAGIC, codec.MAGIC + b"\5", codec.MAGIC + b"\5\0"])
def test_a_file_that_ends_before_its_header_is_refused_though_its_checksum_fits(body):
    with pytest.raises(DataError) as error:
        codec.unpack_file(body + bytes.fromhex(codec.digest(body)), "it")
    assert str(error.value).startswith("it: ") and "\n" not in str(error.value)


def test_no_frame_unpacks_into_more_edits_than_a_file_may_have():
    many = [codec.Edit(0, 1, b"")] * (codec.MAX_EDITS + 1)
    with pytest.raises(UserError, match="cut the text up"):
        codec.pack_edits([many, []])
    claimed = codec.varint(len(many))
    for plain in (claimed + b"\0\1\0" * len(many) + b"\0", claimed, codec.varint(1 << 62)):
        with pytest.raises(ValueError, match="edits are claimed"):
            codec.unpack_edits(b"\1" + codec.zstandard.compress(plain))


@pytest.mark.parametrize(
    "change",
    [
        {"documents": 10_000, "tokens": 10_000, "split": "00" * 8000},
        {"tokens": 10**400},
        {"documents": 0},
        {"documents": 1 << 40},
        {"tokens": -1},
        {"edits": -1},
        {"edits": 1 << 40},
        {"threads": 0},
        {"threads": 1 << 20},
        {"knobs": {"ARTIFACT": "x"}},
        {"knobs": {"TTT_LR": 1}},
        {"knobs": []},
        {"knobs": {"TTT_EPOCHS": "4096"}},
        {"knobs": {"TTT_EPOCHS": "17"}},
        {"knobs": {"TTT_LORA_RANK": "1000000000"}},
        {"knobs": {"TTT_BATCH_DOCS": "100000"}},
        {"knobs": {"EVAL_SEQ_LEN": "10000000"}},
        {"knobs": {"TTT_LR": "fast"}},
        {"knobs": {"TTT_X": "1"}},
        {"split": "xy"},
        {"caseops": 1},
        {"more": 1},
        {"device": 1},
        {"device": "NVIDIA H200", "more": 1},
    ],
)
def test_a_header_that_cannot_be_is_refused_though_its_checksum_fits(compressed, change):
    contents = codec.unpack_file(compressed, "it")
    with pytest.raises(DataError):
        codec.unpack_file(codec.pack_file(contents.header | change, b"", contents.coded), "it")


def test_what_no_file_may_ask_for_is_not_written(artifact, monkeypatch):
    monkeypatch.setenv("TTT_EPOCHS", "17")
    with pytest.raises(UserError, match="TTT_EPOCHS=17: a compressed text may use at most 16"):
        codec.compress(codec.open_predictor(artifact), b"text")


def test_contents_that_cannot_be_are_refused(artifact, compressed):
    header, _, coded = codec.unpack_file(compressed, "it")

    def read(edits: bytes = b"", coded: bytes = coded, **changes) -> None:
        packed = codec.pack_file(header | {"edits": len(edits)} | changes, edits, coded)
        codec.decompress(artifact, codec.unpack_file(packed, "it"))

    read()
    for edits in (
        b"\2",
        b"\0",
        b"\1abc",
        b"\0\1\0\0\5x\0",
        b"\0\0\0\0",
        codec.pack_edits([[codec.Edit(999, 0, b"")], []]),
    ):
        with pytest.raises(DataError):
            read(edits)
    for wrong in ({"tokens": 5}, {"coded": b"\xff" * 40}, {"coded": b""}, {"text": "0" * 16}, {"knobs": {}}):
        with pytest.raises(DataError):
            read(**wrong)
    for knobs in ({"TTT_RL": "1"}, {"TTT_PARAMS": "full"}, {"TTT_LORA_RANK": "1000000000"}):
        with pytest.raises(UserError):
            read(knobs=knobs)


def test_a_decoder_that_learns_otherwise_finds_no_text(artifact, compressed, monkeypatch):
    monkeypatch.setattr(train_gpt.BatchedTTT, "learn", lambda self, chunk, mask: chunk)
    with pytest.raises(DataError, match="not the encoder's"):
        codec.decompress(artifact, codec.unpack_file(compressed, "it"))


def test_another_build_is_named_and_tried(artifact, compressed, monkeypatch, capsys):
    monkeypatch.setattr(codec, "build", lambda device: "torch 9")
    assert codec.decompress(artifact, codec.unpack_file(compressed, "it")) == some_text(5)
    assert "torch 9" in capsys.readouterr().err


def test_the_encoder_notices_predictions_that_vary_with_what_follows(artifact, monkeypatch):
    predictor = codec.open_predictor(artifact)
    hidden = predictor.model.hidden

    def peeking(tokens, *rest):
        states, new_kvs = hidden(tokens, *rest)
        return states + 1e-6 * tokens.sum(), new_kvs

    monkeypatch.setattr(predictor.model, "hidden", peeking)
    with pytest.raises(UserError, match="vary"):
        codec.compress(predictor, some_text(5))


def test_only_documents_that_adapt_by_themselves_can_be_coded(artifact, monkeypatch):
    monkeypatch.setenv("TTT_SCOPE", "stream")
    monkeypatch.delenv("TTT_BATCH_DOCS")
    predictor = codec.open_predictor(artifact)
    with pytest.raises(UserError, match="TTT_SCOPE"):
        codec.compress(predictor, b"")


# -----------------------------------------------------------------------------
# As users do


def test_the_commands(make_artifact, tmp_path, monkeypatch, capsys):
    """Compressed in one process and decompressed in another, under other knobs, then refused for another artifact."""
    first = make_artifact()
    other = make_artifact("other", seed=1)
    text = some_text(9) + b"\xff"
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    source.write_bytes(text)
    assert end_in_a_line(lambda: compress.main([str(source), str(out), "--artifact", str(first)])) == 0
    said = capsys.readouterr().out
    assert f"{len(text)} -> {out.stat().st_size} bytes, " in said
    assert re.search(r"; of these, header \d+, edits \d+, tokens \d+ \(\d+ of 1 document\); \d+\.\d s$", said)
    monkeypatch.setenv("TTT_LR", "7")
    command = [sys.executable, "-m", "tools.decompress", str(out), str(back), "--artifact", str(first)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=100)
    assert back.read_bytes() == text
    back.unlink()
    assert end_in_a_line(lambda: decompress.main([str(out), str(back), "--artifact", str(other)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--artifact" in error
    out.write_bytes(out.read_bytes()[:-1])
    assert end_in_a_line(lambda: decompress.main([str(out), str(back), "--artifact", str(first)])) == 2
    assert not back.exists()


def test_an_artifact_that_nobody_named_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARTIFACT", raising=False)
    Path("logs").mkdir()
    for number, name in enumerate(["older", "newer"]):
        (path := Path("logs", f"{name}.ptz")).write_bytes(b"")
        os.utime(path, (number, number))
    assert find_artifact(None) == path
    assert capsys.readouterr().err == "artifact: logs/newer.ptz, the newest in logs/\n"
    assert find_artifact("logs/older.ptz") == Path("logs/older.ptz")
    assert capsys.readouterr().err == ""


def test_the_table_is_of_validation_documents(artifact, tmp_path, capsys, write_shard):
    predictor = codec.open_predictor(artifact)
    texts = [some_text(n, seed=n).decode() for n in (4, 20, 9, 14, 3)]
    stream = [BOS, *(token for text in texts for token in codec.to_tokens(predictor, False, text))]
    write_shard(tmp_path / "fineweb_val_000000.bin", stream[:-1])
    assert [text.decode() for text in compress.held_out(predictor, 2)] == [texts[2], texts[3]]
    compress.main(["--table", "2", "--artifact", str(artifact)])
    rows = capsys.readouterr().out.splitlines()
    sizes = [[int(cell.replace(",", "")) for cell in row.split("|")[2:10]] for row in rows[2:]]
    for *_, coded, score in sizes:
        assert 8 * abs(coded - score) <= allowance(8 * score)
    for row, documents in zip(sizes, ([texts[2]], [texts[3]], [texts[2], texts[3]]), strict=True):
        bits = scored_bits(predictor, [codec.to_tokens(predictor, False, text) for text in documents])
        assert row[-1] == round(bits / 8)  # together: a CPU may round one row otherwise than two
    assert [row[0] for row in sizes] == [len(texts[2]), len(texts[3]), len(texts[2]) + 1 + len(texts[3])]
    assert sizes[0][4] == len(codec.compress(predictor, texts[2].encode()).blob)


def test_separators_as_typed():
    assert [compress.separator(text) for text in (r"\n\n", "<s>", r"\x00", "é世")] == [
        b"\n\n",
        b"<s>",
        b"\0",
        "é世".encode(),
    ]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"TTT_CHUNK_TOKENS": "64"},
        {"TTT_PARAMS": "full"},
        {"TTT_PARAMS": "full", "TTT_SCOPE": "stream"},
        {"TTT_SCOPE": "stream", "TTT_CHUNK_TOKENS": "32768"},
    ],
    ids=str,
)
def test_a_sample_follows_from_the_whole_context(artifact, monkeypatch, knobs):
    """The likeliest tokens, one by one over kept keys and values, are those of passes over all of the text, whatever
    the artifact's run adapted."""
    for name in ("TTT_CHUNK_TOKENS", "TTT_LORA_RANK", "TTT_BATCH_DOCS"):
        monkeypatch.delenv(name)
    for name, value in (knobs | {"EVAL_SEQ_LEN": "64"}).items():
        monkeypatch.setenv(name, value)
    predictor = codec.open_predictor(artifact)
    tokens = [BOS, *codec.to_tokens(predictor, False, "a tale")[:-1]]
    drawn = sample.continued(predictor, tokens[1:], temperature=0, top_p=1, seed=0)
    for _ in range(12):
        states = predictor.model.hidden(torch.tensor([tokens]))[0][:, -1:]
        tokens.append(next(drawn))
        assert tokens[-1] == predictor.model.head.logits(states, predictor.model.embed, None).argmax()


def test_a_sample_shows_the_prompt_and_repeats_by_its_seed(artifact, monkeypatch, capsys):
    def drawn(*options: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the Tale of ")))
        sample.main(
            ["-", "--artifact", str(artifact), "--tokens", "30", "--temperature", "2", "--top-p", "1", *options]
        )
        return capsys.readouterr().out

    texts = [drawn("--seed", seed) for seed in "112"]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the Tale of ") for text in texts)


def test_top_p_leaves_the_likeliest():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    assert {sample.pick(logits, 1.0, 0.6, generator) for _ in range(200)} == {1, 2}
    assert {sample.pick(logits, 1.0, 0.0, generator) for _ in range(20)} == {1}
    assert {sample.pick(logits, temperature, 1.0, generator) for temperature in (1e-3, 1e-45, 5e-324)} == {1}
