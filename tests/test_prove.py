"""The audit passes the program, and fails it with any known cheat built in, by the name of the rule that is broken."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cheats import CHEATS, MODEL, RUN, SOURCE, SYSTEMS, Cheat, load_source
from conftest import any_gradient_rms, stored_tensors
from sentencepiece import SentencePieceProcessor

import train_gpt
from data import prepare
from tools import alone, artifact, audit_hook, listening, prove, recount
from tools.audit import FEWEST_TOKENS, Audit
from tools.listening import ScorerError

AUDITING = ("alone", "artifact", "audit", "listening", "prove", "recount")  # modules of tools/ that call the program
BUDGET = dict(iterations=1, max_wallclock_seconds=0)  # a budget in steps: kernels that repeat
DOCUMENTS = (30, 5, 41)  # tokens after BOS; contexts are 24, chunks 8


def environment(folder: Path, knobs: dict) -> dict[str, str]:
    env = {name.upper(): str(value) for name, value in (knobs | BUDGET).items()}
    return env | {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}


def make_artifact(path: Path, tokenizer: bytes) -> None:
    """A small network with every mechanism away from its neutral start, quantised and packed."""
    random_bits, pieces = (
        torch.Generator().manual_seed(0),
        SentencePieceProcessor(model_proto=tokenizer),
    )
    config = train_gpt.ModelConfig(**MODEL | dict(vocab_size=pieces.get_piece_size()))
    model = train_gpt.GPT(config)
    for name, p in model.named_parameters():
        start = p.detach() if train_gpt.param_role(name) == "scalar" else 0.0
        p.data = start + 0.2 * torch.randn(p.shape, generator=random_bits)
    digest = hashlib.sha256(tokenizer).hexdigest()
    meta = {"kind": "artifact", "model": dataclasses.asdict(config), "tokenizer": digest, "holdout_tokens": 0}
    model.gradient_rms = any_gradient_rms(config, RUN["ttt_chunk_tokens"])
    stored = stored_tensors(model) | train_gpt.encode_gradient_rms(model)
    path.write_bytes(train_gpt.pack(meta, stored, level=3))


class Place(NamedTuple):
    """An artifact, and the folder with its data."""

    artifact: Path
    data: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory, train_tokenizer) -> dict[str, Place]:
    """`plain`: 64 pieces; `bytes`: 300, bytes among them; `caseops`: the same, capitals marked, and a side-car;
    `suffix`: 64, spaces at the end of them."""
    with_bytes = train_tokenizer(vocab_size=300, byte_fallback=True)
    tokenizers = {"plain": train_tokenizer(), "bytes": with_bytes, "caseops": with_bytes}
    tokenizers["suffix"] = train_tokenizer(treat_whitespace_as_suffix=True)
    found = {}
    for name, model in tokenizers.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.model").write_bytes(model)
        write_documents(folder, name, model)
        prepare.write_shard(folder / "fineweb_train_000000.bin", [np.ones(100, np.uint16)])
        make_artifact(folder / "small.ptz", model)
        found[name] = Place(folder / "small.ptz", folder)
    return found


def write_documents(folder: Path, name: str, model: bytes) -> None:
    """The validation shard of a place."""
    chance = random.Random(3)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 8))) for _ in range(200)]
    texts = [
        "Nut \u2602 " * (name in ("bytes", "caseops")) + " ".join(chance.choices(words, k=size)) for size in DOCUMENTS
    ]
    if name == "caseops":
        encoder = prepare.load_encoder(model, True)
        tokens, sizes, _ = zip(*(prepare.encode_document(encoder, text[:40], True) for text in texts), strict=True)
        prepare.write_shard(folder / "fineweb_val_bytes_000000.bin", list(sizes))
        (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"transform": "caseops"}}))
    else:
        encode = SentencePieceProcessor(model_proto=model).encode
        tokens = [[train_gpt.BOS, *encode(text)][: n + 1] for text, n in zip(texts, DOCUMENTS, strict=True)]
    prepare.write_shard(folder / "fineweb_val_000000.bin", [np.concatenate(tokens)])


@pytest.fixture
def audit(monkeypatch, tmp_path) -> Callable[..., Audit]:
    """audit(place, knobs, source): an audit of all documents, by train_gpt.py or by another program's source."""
    number = itertools.count()

    def begin(place: Place, knobs: dict, source: str | None = None) -> Audit:
        program = load_source(tmp_path / f"{next(number)}" / "train_gpt.py", source) if source else train_gpt
        for module in AUDITING:
            monkeypatch.setattr(f"tools.{module}.train_gpt", program)
        opened = artifact.open_artifact(place.artifact, environment(place.data, knobs))
        return Audit(opened, 0, 1e9, lambda line: None)

    return begin


def faults_of(audit: Audit, name: str) -> list[str]:
    """What a property is found to be broken by; [] where it is kept, or does not apply."""
    return list(prove.PROPERTIES[name](audit)[0] or [])


# ---- the program keeps the rules --------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(SYSTEMS.keys() - {"adamw"}))  # which the command is tested with
def test_the_program_keeps_every_rule(audit, places, system):
    looked = audit(places["plain"], SYSTEMS[system])
    assert looked.chosen and {len(text.tokens) - 1 for text in looked.texts} == set(DOCUMENTS)
    for name in prove.PROPERTIES.keys() - {"artifact alone"}:
        assert faults_of(looked, name) == [], name


@pytest.fixture
def documents_of(places, tmp_path) -> Callable[..., Place]:
    """documents_of(*tokens): the artifact of `plain` on a validation of documents with so many tokens."""

    def make(*tokens: int) -> Place:
        folder = tmp_path / f"of {tokens}"
        shutil.copytree(places["plain"].data, folder)
        chance = np.random.default_rng(0)
        texts = [np.append(train_gpt.BOS, chance.integers(3, 64, count - 1)) for count in tokens]
        prepare.write_shard(folder / "fineweb_val_000000.bin", [np.concatenate(texts).astype(np.uint16)])
        return Place(folder / "small.ptz", folder)

    return make


def test_of_a_document_that_the_time_does_not_hold_the_beginning_is_looked_at(documents_of):
    place = documents_of(2_000)
    opened = artifact.open_artifact(place.artifact, environment(place.data, SYSTEMS["static"]))
    looked = Audit(opened, 0, 0.001, lambda line: None)
    assert [len(text.tokens) for text in looked.texts] == [looked.limit] == [FEWEST_TOKENS]
    for name in prove.PROPERTIES.keys() - {"artifact alone"}:
        assert faults_of(looked, name) == [], name
    assert 0.4 < looked.spent / looked.planned < 2.5, "the time left is told from these"
    whole = Audit(opened, 0, 1e9, lambda line: None)
    assert [len(text.tokens) for text in whole.texts] == [2_000] and whole.is_whole(0)


def test_a_validation_that_proves_nothing_is_named(documents_of):
    place = documents_of(2)
    opened = artifact.open_artifact(place.artifact, environment(place.data, SYSTEMS["static"]))
    with pytest.raises(train_gpt.DataError, match="the longest of its 1 validation documents has 2 tokens"):
        Audit(opened, 0, 1.0, lambda line: None)


@pytest.mark.parametrize("place", ["bytes", "caseops"])
def test_bytes_are_counted_again_from_the_tokens(audit, places, place):
    faults, figures = recount.bytes_counted(audit(places[place], SYSTEMS["static"]))
    assert faults == [] and "documents decoded again" in figures


def test_a_byte_too_many_in_any_document_is_found(audit, places, tmp_path):
    """Also in one that no other property looks at. A side-car that counts too much makes a score look better."""
    folder = tmp_path / "forged"
    shutil.copytree(places["caseops"].data, folder)
    sidecar = train_gpt.read_shard(folder / "fineweb_val_bytes_000000.bin").copy()
    starts = np.flatnonzero(train_gpt.read_shard(folder / "fineweb_val_000000.bin") == train_gpt.BOS)
    sidecar[starts + 1] += 1
    prepare.write_shard(folder / "fineweb_val_bytes_000000.bin", [sidecar])
    looked = audit(Place(folder / "small.ptz", folder), SYSTEMS["static"])
    looked.chosen = looked.chosen[:1]
    assert len(faults_of(looked, "bytes")) == len(starts) == len(DOCUMENTS)


def test_bytes_that_the_formula_counts_too_many_are_told(audit, places, tmp_path):
    folder = tmp_path / "suffix"
    shutil.copytree(places["suffix"].data, folder)
    looked = audit(Place(folder / "small.ptz", folder), SYSTEMS["static"])
    docs = looked.opened.setup.validation
    excess = docs.excess_bytes(looked.opened.setup.tokenizer.pieces)
    for stated, faults in ((excess, []), (0, [f"excess_bytes is 0, the spaces inside pieces have {excess}"])):
        result = {"validation": docs.sha256(), "excess_bytes": stated}
        (folder / "small.json").write_text(json.dumps(result))
        found, figures = recount.bytes_counted(looked)
        assert found == faults and excess > 0 and f"counts {excess} bytes too many" in figures


def test_a_side_car_of_no_shard_counts_nothing(audit, places, tmp_path):
    """What the program does not read, the audit does not either."""
    folder = tmp_path / "stray"
    shutil.copytree(places["plain"].data, folder)
    prepare.write_shard(folder / "fineweb_val_bytes_000001.bin", [np.ones(3, np.uint16)])
    looked = audit(Place(folder / "small.ptz", folder), SYSTEMS["static"])
    assert faults_of(looked, "bytes") == []


def test_code_and_artifact_must_fit(audit, places):
    looked = audit(places["plain"], SYSTEMS["static"] | dict(artifact_bytes=100_000))
    assert "the limit is 100000" in faults_of(looked, "bytes")[0]


def test_no_knob_raises_the_limit_of_the_contest(audit, places):
    padded = SOURCE + f"# {'x' * 16_000_000}\n"
    looked = audit(places["plain"], SYSTEMS["static"] | dict(artifact_bytes=20_000_000), padded)
    assert "the limit is 16000000" in faults_of(looked, "bytes")[0]


@pytest.mark.parametrize(
    "path, on_cpu, on_gpu",
    [
        ("/dev/null", True, True),
        ("/dev/urandom", True, True),
        ("/dev/shm/psm_1", True, True),
        ("/dev/nvidia0", False, True),
        ("/dev/nvidiactl", False, True),
        ("/dev/fd", False, False),
        ("/dev/fd/0", False, False),
        ("/dev/stdin", False, False),
        ("/dev/sda", False, False),
        ("/dev/shmx", False, False),
        ("/proc/7/fd/pipe:[8]", False, False),
        ("/proc/7/task/7/fd/0", False, False),
        ("/proc/7/mem", False, False),
        ("/proc/7/maps", True, True),
        ("/proc/cpuinfo", True, True),
        ("{folder}/artifact.ptz", True, True),
        ("{folder}x/artifact.ptz", False, False),
        (prove.__file__, False, False),
        (torch.__file__, True, True),
        ("/opt/driver/libcuda.so.1", True, True),
        ("/opt/driver/shard.bin", False, False),
        ("/opt/x.so", False, False),
        ("/opt/site/x-1.0.dist-info/entry_points.txt", True, True),
        ("/opt/site/x-1.0.dist-info/knowledge.txt", False, False),
        ("/opt/site/zstandard/__init__.py", True, True),
        ("/opt/site/zstandard_more/__init__.py", False, False),
        ("/opt/site/knowledge.py", False, False),
        ("/opt/site/x-1.0.dist-info/more/entry_points.txt", False, False),
        ("/opt/other/x-1.0.dist-info/entry_points.txt", False, False),
        ("/usr/share/fineweb_train_000000.bin", False, False),
        ("subprocess.Popen: ('cc',", False, True),
        ("os.posix_spawn: ('/opt/triton/bin/ptxas', ['/opt/triton/bin/ptxas', '-v'", False, True),
        ("subprocess.Popen: ('file', ['file', '-b', '/usr/bin/python3.12'])", False, True),
        ("subprocess.Popen: ('uname',", True, True),
        ("subprocess.Popen: ('curl', ['gcc',", False, False),
        ("socket.connect: (<socket>, ('gcc', 80))", False, False),
        ("os.system: (b'gcc',)", False, False),
    ],
)
def test_what_an_evaluation_may_open(tmp_path, monkeypatch, path, on_cpu, on_gpu):
    monkeypatch.setattr(alone, "LIBRARIES", ["/opt/driver"])
    monkeypatch.setattr(alone, "PYTHONPATH", ["/opt/site"])
    path = path.format(folder=tmp_path)
    assert [alone.expected(path, tmp_path, compiles) for compiles in (False, True)] == [on_cpu, on_gpu]


def test_a_watched_program_finds_no_code_of_the_repository_and_opens_nothing_unseen(tmp_path):
    for name in ("by path", "mapped"):
        (tmp_path / name).write_bytes(bytes(4096))
    (tmp_path / "program.py").write_text(PROGRAM)
    source, root = Path(audit_hook.__file__).read_text(), Path(audit_hook.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": alone.elsewhere(f"{root}:{tmp_path}")}
    subprocess.run([sys.executable, "-c", source, "program.py", "report"], cwd=tmp_path, env=env, check=True)
    opened = set(json.loads((tmp_path / "report").read_text()))
    assert {str(tmp_path / name) for name in ("by path", "mapped", "program.py")} <= opened
    assert env["PYTHONPATH"] == str(tmp_path)


PROGRAM = """
import importlib.util, io, pathlib, torch
assert not any(importlib.util.find_spec(name) for name in ("tools", "data", "train_gpt"))
io.FileIO(pathlib.Path("by path")).close()
kept = torch.from_file("mapped", size=4096, dtype=torch.uint8)
"""


def test_a_stream_is_not_called_independent(audit, places):
    faults, figures = prove.independence(audit(places["plain"], SYSTEMS["lora stream"]))
    assert faults is None and "doc_independent:0" in figures


def with_gradients_times(factor: str) -> str:
    """The program, with the gradients of BatchedTTT multiplied by an expression."""
    plain = "list(torch.autograd.grad(loss, self.tensors))\n"
    assert SOURCE.count(plain) == 1
    return SOURCE.replace(plain, f"[g * ({factor}) for g in {plain.strip()}]\n")


CHAOTIC = SYSTEMS["rms"] | dict(ttt_lr=3.0, ttt_epochs=1)  # there, both tests below see rounding grow


@pytest.mark.parametrize("change, kept", [(1e-7, True), (1e-3, False)], ids=["rounding", "dependence"])
def test_where_adaptation_is_chaotic_rounding_is_told_from_dependence(audit, documents_of, change, kept):
    """The number of documents in a batch changes gradients a little, and scores by much."""
    looked = audit(documents_of(45, 40), CHAOTIC, with_gradients_times(f"1 + {change} * len(mask)"))
    assert prove.settings_compared(looked)[0].faults and looked.nudged().faults
    faults, figures = prove.independence(looked)
    assert (faults == []) == kept
    assert looked.run.ttt_lr == 3 and ": at 3, a millionth more TTT_LR changes scores by 0.0" in figures


def test_what_no_lower_rate_calms_is_not_rounding(audit, documents_of, monkeypatch):
    monkeypatch.setattr("tools.audit.LOWER_RATES", [1.0, 4.0])
    source = with_gradients_times("1 + 0.1 * (hash(1e6 * self.run.ttt_lr) % 7)")
    looked = audit(documents_of(45, 40), CHAOTIC, source)
    with pytest.raises(ScorerError, match="a millionth more TTT_LR changes scores by .* nats, and at 0.75 by"):
        looked.calm()


# ---- the command ------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, places, capsys):
    """command(arguments): `python -m tools.prove` in the environment of `adamw` -> status, stdout, stderr"""
    for name, value in environment(places["plain"].data, SYSTEMS["adamw"]).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = prove.main(arguments)
        return status, *capsys.readouterr()

    yield run
    torch.use_deterministic_algorithms(False)


def test_prove_prints_a_line_a_property_and_leaves_them_as_json(command, places):
    path = places["plain"].artifact
    status, out, _ = command(str(path), "--seconds", "1000")
    lines = out.splitlines()
    assert status == 0, out
    assert lines[0].startswith(f"{path}: TTT_PARAMS=lora TTT_SCOPE=document")
    assert [line[6:27].strip() for line in lines[1:]] == list(prove.PROPERTIES)
    assert [line.split()[0] for line in lines[1:]] == ["ok"] * 7 + ["-"]
    left = json.loads(path.with_suffix(".prove.json").read_text())
    assert left["ok"] and [p["name"] for p in left["properties"]] == list(prove.PROPERTIES)
    assert left["code_sha256"] == prove.file_sha256(train_gpt.__file__)


def test_prove_fails_by_its_exit_status(command, places, monkeypatch):
    monkeypatch.setattr(prove, "PROPERTIES", {"bytes": recount.bytes_counted})
    monkeypatch.setenv("ARTIFACT_BYTES", "1000")
    status, out, _ = command(str(places["plain"].artifact))
    assert status == 1 and out.splitlines()[1].startswith("FAIL  bytes")
    assert not json.loads(places["plain"].artifact.with_suffix(".prove.json").read_text())["ok"]


@pytest.mark.parametrize("name", ["nothing.ptz", "fineweb_val_000000.bin"])
def test_what_is_no_artifact_is_an_error_in_a_line(command, places, name):
    status, _, err = command(str(places["plain"].data / name))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1


# ---- the run beside the artifact --------------------------------------------


@pytest.fixture
def scored(places, run_here, tmp_path) -> Place:
    """A run that scored the artifact, and left its result beside it."""
    env = environment(places["plain"].data, SYSTEMS["adamw"])
    done = run_here(env=env | {"ARTIFACT": str(places["plain"].artifact), "RUN_ID": "small"})
    assert done.returncode == 0, done.stderr
    artifact = tmp_path / "logs" / "small.ptz"
    artifact.write_bytes(places["plain"].artifact.read_bytes())
    return Place(artifact, places["plain"].data)


def test_a_run_reports_what_its_documents_score(audit, scored, monkeypatch):
    opened = artifact.open_artifact(scored.artifact, {"EVAL_SECONDS": "0"})
    assert (opened.setup.run.ttt_lora_rank, opened.setup.run.data_path) == (4, str(scored.data)), "knobs are the run's"
    mine = Audit(opened, 0, 1e9, lambda line: None)
    faults, figures = prove.reported(mine)
    assert faults == [] and "in 3 documents" in figures
    mine.limit = 3  # tokens
    faults, figures = prove.reported(mine)
    assert faults is None and "none of the sampled documents" in figures, "what compared nothing is not ok"
    other = audit(scored, SYSTEMS["adamw"] | dict(ttt_lr=0.02))
    assert prove.reported(other)[0] is None and "other knobs" in prove.reported(other)[1]

    path = scored.artifact.with_suffix(".json")
    result, stored = json.loads(path.read_text()), dict(np.load(path.with_suffix(".docs.npz"), allow_pickle=False))
    better = result | {name: 0.99 * result[name] for name in ("val_bpb", "val_loss")}
    path.write_text(json.dumps(better))
    looked = audit(scored, SYSTEMS["adamw"])
    assert "contradict" in prove.reported(looked)[0][0]
    np.savez(path.with_suffix(".docs.npz"), **stored | {"nats": 0.99 * stored["nats"]})
    assert "as reported" in prove.reported(looked)[0][0]


# ---- cheats -----------------------------------------------------------------


QUICK = (
    "attention to the token ahead",
    "a bonus for the target's logit",
    "a chunk counted twice",
    "A drawn per batch",
    "every side-car's byte counts twice",
)


def caught(audit, places, cheat: Cheat) -> str:
    """What the audit says of a cheat; nothing if it says nothing."""
    try:
        place = places[cheat.data]
        looked = audit(place, SYSTEMS[cheat.system], cheat.source(place.data))
        return "; ".join(faults_of(looked, cheat.rule))
    except ScorerError as error:
        return str(error)


def tiered(cheat: Cheat):
    return pytest.param(cheat, id=cheat.name, marks=() if cheat.name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("cheat", [*map(tiered, CHEATS)])
def test_a_cheat_is_caught_by_its_rule(audit, places, cheat):
    assert caught(audit, places, cheat)


def test_every_rule_has_its_cheats_and_they_change_the_program_as_it_is():
    rules = [cheat.rule for cheat in CHEATS]
    assert all(rules.count(rule) >= 2 for rule in prove.PROPERTIES.keys() - {"reported"})
    for cheat in CHEATS:
        compile(cheat.source(Path("data")), cheat.name, "exec")


def test_the_digest_of_a_state_sees_every_bit_and_every_place():
    tensors = [torch.randn(3, 4), torch.randn(5), torch.tensor(1.5)]
    one = listening.state_of(tensors)
    assert listening.state_of([t.clone() for t in tensors]) == one
    for i, bit in itertools.product(range(5), range(32)):
        changed_bits = tensors[1].view(torch.int32).clone()
        changed_bits[i] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert listening.state_of([tensors[0], changed_bits.view(torch.float32), tensors[2]]) != one
    moved = tensors[1][[1, 0, 2, 3, 4]]
    assert listening.state_of([tensors[0], moved, tensors[2]]) != one
