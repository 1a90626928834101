"""The program as a user runs it: small settings, real processes, a folder of its own."""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import START_RANKS_BY, TINY_MODEL, TINY_RUN, group_has_ended, process_group, read_events, shard_bytes

import train_gpt as g

SCRIPT = Path(g.__file__)
ALONE = [sys.executable, str(SCRIPT)]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
KILLED_BY_TORCHRUN = "forcefully exiting via"  # its words for a rank that goes on for 30 s after it was told to end
SMALL = {name.upper(): value for name, value in (vars(TINY_MODEL) | TINY_RUN).items()} | dict(
    RUN_ID=None,
    NUM_LAYERS=2,
    PARALLEL_START_LAYER=1,
    UNET_SKIPS=1,
    LOOP_START=0,
    LOOP_END=0,
    ITERATIONS=12,
    HOLDOUT_TOKENS=600,
    TRAIN_LOG_EVERY=2,
    DATA_PATH="my data",
    TTT_LR=0.01,
    TTT_LORA_ALPHA=4,
    TTT_BATCH_DOCS=None,
)
MACHINE = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
MACHINE |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def write_data(folder: Path) -> None:
    """Two training shards, one of validation, and the tokenizer that the manifest names."""
    random, blob = np.random.default_rng(0), io.BytesIO()
    words = ["".join(random.choice([*"etaoinshr"], n)) for n in random.integers(2, 6, 40)]
    texts = [" ".join(random.choice(random.choice(words, 6), n)) for n in random.integers(3, 60, 150)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=blob,
        model_type="bpe",
        vocab_size=64,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        minloglevel=3,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    folder.mkdir(parents=True)
    (folder / "small.model").write_bytes(blob.getvalue())
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"path": "small.model"}}))
    for name, part in {"train_000000": texts[:80], "train_000001": texts[80:140], "val_000000": texts[140:]}.items():
        tokens = [token for text in part for token in (g.BOS, *processor.encode(text))]
        (folder / f"fineweb_{name}.bin").write_bytes(shard_bytes(tokens))
    (folder / "val.txt").write_text("\n".join(texts[140:]))


class Folder:
    """A working directory with data of its own, whose name a shell must quote."""

    def __init__(self, path: Path):
        self.path = path
        write_data(path / "my data")

    def environment(self, **knobs) -> dict[str, str]:
        settings = SMALL | knobs
        return MACHINE | {name: str(value) for name, value in settings.items() if value is not None}

    def run(self, *arguments: str, command=ALONE, **knobs) -> subprocess.CompletedProcess:
        env = self.environment(**knobs)
        return subprocess.run(
            [*command, *arguments], cwd=self.path, env=env, capture_output=True, text=True, timeout=300
        )

    def result(self, run=None, **knobs) -> dict:
        """Run to the end, by `here(self, **knobs)` if that is given, and read logs/<RUN_ID>.json."""
        done = run(self, **knobs) if run else self.run(**knobs)
        assert done.returncode == 0, done.stderr[:2000]  # torchrun ends with a long report of its own
        return json.loads((self.path / "logs" / f"{knobs['RUN_ID']}.json").read_text())

    def artifact(self, run_id: str = "first") -> Path:
        return self.path / "logs" / f"{run_id}.ptz"


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> SimpleNamespace:
    """A complete run, from random weights to the score; the other tests leave its files as they are."""
    folder = Folder(tmp_path_factory.mktemp("first"))
    done = folder.run(RUN_ID="first")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder.path / "logs" / "first.json").read_text())
    events = read_events(folder.path / "logs" / "first.events.jsonl")
    log = folder.path / "logs" / "first.txt"
    return SimpleNamespace(folder=folder, stdout=done.stdout, result=result, log=log, events=events)


@pytest.fixture
def here(run_here) -> Callable[..., SimpleNamespace]:
    """here(folder, *arguments, **knobs): a run in this process -> returncode, stdout, stderr."""

    def run(folder: Folder, *arguments: str, **knobs) -> SimpleNamespace:
        return run_here(*arguments, env=folder.environment(**knobs), folder=folder.path)

    return run


# ---- a complete run ---------------------------------------------------------


def test_the_last_line_is_the_result_and_the_json_says_the_same(first):
    lines = first.stdout.splitlines()
    assert lines[-1].startswith("result ") and lines == first.log.read_text().splitlines()[-len(lines) :]
    shown = dict(pair.split(":") for pair in lines[-1].split()[1:])
    for key in ("val_bpb", "static_bpb", "prequant_bpb", "artifact_bytes", "total_bytes", "steps", "doc_independent"):
        assert float(shown[key]) == pytest.approx(first.result[key], abs=1e-6)
    for key, value in shown.items():
        assert float(value) == pytest.approx(first.result[key], abs=1e-6), key


EVENTS = {  # of a run on a CPU in which nothing special happens, in order: their fields
    "run": {"run_id", "seed", "code_sha256", "code_bytes", "versions", "platform", "knobs"},
    "device": {"world_size", "device"},
    "validation": {"documents", "tokens", "bytes"},
    "training_data": {"shards", "tokens", "holdout_tokens", "batch_tokens", "grad_accum_steps", "micro_batch_rows"},
    "predicted_size": {"artifact_bytes", "code_bytes", "limit_bytes"},
    "limits": {"steps", "train_seconds", "eval_seconds"},
    "setting_up": {"stage"},
    "set_up": {"seconds", "reserve_seconds"},
    "step": {"step", "loss", "progress", "loop", "tokens_per_s", "epoch", "train_s", "eta_s"},
    "trained": {"step", "file", "bytes"},
    "readout": {"documents", "last", "half", "average", "readout", "best"},
    "before_quantisation": {"prequant_bpb", "last_bpb"},
    "gradients": {"documents", "tokens", "chunk", "longer_chunk"},
    "rounding": {"attempt", "fineness", "artifact_bytes", "bits"},
    "score": {"artifact", "static_bpb", "val_bpb"},
    "phase": {"name", "seconds", "clock"},
}


# More of a run on a slow or busy machine, where a pass takes long enough to report its progress.
REPORTS = {
    "scoring": {"what", "targets_done", "targets", "eta_s"},
    "adapted": {"documents_done", "documents", "bpb", "eval_s", "eta_s"},
}


def test_the_events_are_those_of_the_contract_in_their_order(first):
    names = [event["event"] for event in first.events if event["event"] not in REPORTS]
    assert list(dict.fromkeys(names)) == [*EVENTS, "result"]
    fields = EVENTS | REPORTS
    for event in first.events[:-1]:
        assert event.keys() == {"event"} | fields[event["event"]]
    assert first.events[-1] == {"event": "result"} | first.result
    assert first.events[0]["knobs"] == first.result["knobs"]
    assert first.events[0]["code_bytes"] == first.result["code_bytes"] == SCRIPT.stat().st_size
    assert [e["step"] for e in first.events if e["event"] == "step"] == [2, 4, 6, 8, 10, 12]


def test_the_figures_of_a_line_are_those_of_its_event(first):
    lines = first.stdout.splitlines()
    assert len(lines) == len(first.events) - 1  # the first event, of source and settings, has none on the screen
    for line, event in zip(lines, first.events[1:], strict=True):
        if event["event"] in ("device", "score", "scoring"):  # which name a device, a file, and what is scored
            continue
        values = [value for value in event.values() if isinstance(value, int | float)]
        for figure in re.findall(r"\d+(?:\.\d+)?", line.removesuffix("(0: none)")):
            half_a_digit = 0.51 * 10.0 ** -len(figure.partition(".")[2])
            assert any(abs(float(figure) - value) <= half_a_digit for value in values), (line, event)
    (score,) = [event for event in first.events if event["event"] == "score"]
    assert f"artifact {score['artifact']}: static_bpb:{score['static_bpb']:.5f} ttt_bpb:{score['val_bpb']:.5f}" in lines


def test_the_result_adds_up(first):
    data, result = first.folder.path / "my data", first.result
    texts = (data / "val.txt").read_text().split("\n")
    assert result["documents"] == len(texts) == 10
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert result["tokens"] == len(g.read_shard(data / "fineweb_val_000000.bin")) - 1
    assert result["val_bpb"] == pytest.approx(result["val_loss"] * result["tokens"] / np.log(2) / result["bytes"])
    assert (result["steps"], result["train_tokens"], result["degraded_documents"]) == (12, 12 * 256, 0)
    trained_on = sum(len(g.read_shard(data / f"fineweb_train_00000{i}.bin")) for i in (0, 1)) - 600
    assert result["epochs"] == pytest.approx(12 * 256 / trained_on)
    assert result["doc_independent"] == 1 and result["adaptation_steps"] > 0
    assert result["artifact_bytes"] == first.folder.artifact().stat().st_size == sum(result["artifact_parts"].values())
    assert result["total_bytes"] == result["artifact_bytes"] + SCRIPT.stat().st_size <= 16_000_000
    assert {"train", "gradients", "calibrate", "quantise", "pack", "unpack", "evaluate: score"} <= set(result["phases"])
    assert sorted(p.name for p in first.log.parent.glob("first.*")) == [
        "first.docs.npz",
        "first.events.jsonl",
        "first.json",
        "first.ptz",
        "first.txt",
    ]


CLOCKS = {
    "training": {"train", "checkpoint", "choose", "gradients", "calibrate", "factorise", "quantise", "pack"},
    "evaluation": {"unpack", "evaluate: warm-up", "evaluate: score"},
    "-": {"load", "set-up", "validate", "score without adaptation"},
}


def test_every_phase_counts_towards_the_limit_that_the_rules_say(first):
    phases = [event for event in first.events if event["event"] == "phase"]
    seconds = {}
    for clock, names in CLOCKS.items():
        assert {event["name"] for event in phases if event["clock"] == clock} == names
        seconds[clock] = sum(event["seconds"] for event in phases if event["clock"] == clock)
    assert first.result["train_seconds"] == pytest.approx(seconds["training"])
    assert first.result["eval_seconds"] == pytest.approx(seconds["evaluation"])


def test_an_artifact_says_what_its_training_depended_on(first):
    data = first.folder.path / "my data"
    meta, _ = g.unpack(first.folder.artifact().read_bytes(), "first.ptz")
    held = g.whole_documents(g.read_shard(data / "fineweb_train_000001.bin")[-600:])
    assert meta["tokenizer"] == hashlib.sha256((data / "small.model").read_bytes()).hexdigest()
    assert (meta["holdout_tokens"], meta["holdout"]) == (600, held.tokens_sha256())


def test_the_scores_of_documents_add_up_to_those_of_the_result(first):
    """For races, in pairs of documents. A run that only scores has none before quantisation."""
    with np.load(first.log.with_suffix(".docs.npz")) as scores:
        nats = scores["prequant_nats"]
        assert first.result["prequant_bpb"] == nats.sum() / np.log(2) / scores["bytes"].sum()
        for name, bpb in {"nats": "val_bpb", "static_nats": "static_bpb"}.items():
            assert first.result[bpb] == scores[name].sum() / np.log(2) / scores["bytes"].sum()
    assert len(nats) == first.result["documents"] and "prequant_nats" not in first.result


def test_an_artifact_that_holds_the_rms_of_gradients_is_scored_by_it(first):
    tensors = g.unpack(first.folder.artifact().read_bytes(), "first.ptz")[1]
    assert g.has_gradient_rms(tensors) and first.result["artifact_parts"]["statistics"] > 0
    assert first.result["knobs"]["TTT_OPTIMIZER"] == first.events[0]["knobs"]["TTT_OPTIMIZER"] == "rms"
    assert "TTT_OPTIMIZER=rms" in first.log.read_text(encoding="utf-8").splitlines()


def test_the_weights_that_score_best_on_held_out_text_are_read_out(first):
    (event,) = [event for event in first.events if event["event"] == "readout"]
    nats = [event[name] for name in ("last", "half", "average")]
    assert len(set(nats)) == 3 and event["documents"] > 0
    assert first.result["readout"] == event["readout"] and event["best"] <= min(nats)


def test_the_model_learns_and_test_time_training_helps(first):
    losses = [loss for _, _, loss in first.result["history"]]
    assert losses[-1] < losses[0] - 0.3
    assert first.result["val_bpb"] < first.result["static_bpb"] - 0.01
    assert abs(first.result["static_bpb"] - first.result["prequant_bpb"]) < 0.1


def test_the_log_begins_with_the_source_and_its_settings(first):
    source, log = SCRIPT.read_text(encoding="utf-8"), first.log.read_text(encoding="utf-8")
    assert log.startswith(source)
    rest = log.removeprefix(source).strip().splitlines()
    assert rest[0] == "VOCAB_SIZE=64" and "TTT_LR=0.01" in rest and "DATA_PATH='my data'" in rest
    assert any(line.startswith("python:") and "torch:" in line for line in rest)


def test_an_artifact_is_scored_alone_without_training_data(first, tmp_path, here):
    """Nor any setting of the model: the file says what it is."""
    folder = Folder(tmp_path)
    for path in (tmp_path / "my data").glob("fineweb_train_*"):
        path.unlink()
    of_the_model = {name: None for name in SMALL if name.lower() in {f.name for f in g.fields(g.ModelConfig)}}
    alone = folder.result(here, RUN_ID="alone", ARTIFACT=first.folder.artifact(), **of_the_model)
    for key in ("val_bpb", "static_bpb", "val_loss", "bytes", "tokens", "artifact_bytes", "adaptation_steps"):
        assert alone[key] == first.result[key], key
    assert "prequant_nats" not in np.load(tmp_path / "logs" / "alone.docs.npz")
    assert "steps" not in alone and not (tmp_path / "logs" / "alone.ptz").exists()
    assert alone["knobs"] == first.result["knobs"] | {"RUN_ID": "alone", "ARTIFACT": str(first.folder.artifact())}


def test_an_artifact_of_another_network_that_replaces_it_meanwhile_is_not_scored(first, in_process, monkeypatch):
    """Its score would stand beside the settings of the first."""
    path = Path("it.ptz").absolute()
    shutil.copy(first.folder.artifact(), path)

    def replace(setup: g.Setup) -> None:
        meta, tensors = g.unpack(path.read_bytes(), "it.ptz")
        meta["model"]["rope_base"] = 20_000.0
        path.write_bytes(g.pack(meta, tensors, level=22))

    monkeypatch.setattr(g, "check_setup", replace)
    status, err = in_process(RUN_ID="alone", ARTIFACT=str(path))
    assert (status, err) == (2, f"error: {path}: was replaced meanwhile; score it again\n")


def test_a_time_that_packing_alone_takes_is_refused_before_training(tmp_path, here):
    done = here(Folder(tmp_path), RUN_ID="short", ITERATIONS=0, MAX_WALLCLOCK_SECONDS=0.4)
    assert done.returncode == 2 and "MAX_WALLCLOCK_SECONDS=0.4" in done.stderr and "result" not in done.stdout


def test_ranks_whose_clocks_differ_name_their_files_alike(tmp_path, monkeypatch):
    """Without RUN_ID, a rank that named the artifact by its own clock would not find the one that was written."""
    named = []

    def note_path(setup: g.Setup, log: g.Log, watch: g.Stopwatch, path: Path) -> tuple[dict, np.ndarray]:
        named.append(path)
        return {}, np.zeros(0)

    monkeypatch.setattr(g.Dist, "broadcast_bytes", lambda self, name: b"19700101_000000")  # rank 0's
    monkeypatch.setattr(g, "train_and_pack", note_path)
    monkeypatch.setattr(g, "evaluate", lambda *given: g.require(False, "far enough"))
    monkeypatch.chdir(tmp_path)
    for name, value in Folder(tmp_path).environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(g.UserError, match="far enough"):
        g.run_experiment(check_only=False, ending=g.Ending())
    assert [path.name for path in named] == ["19700101_000000.ptz"]
    kept = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert kept == ["19700101_000000.events.jsonl", "19700101_000000.txt"]


def test_a_run_that_is_refused_leaves_the_files_of_its_name_alone(tmp_path, here):
    folder, logs = Folder(tmp_path), tmp_path / "logs"
    kept = {"kept.txt": "of a run that took ten minutes", "kept.events.jsonl": '{"event": "run"}\n'}
    logs.mkdir()
    for name, text in kept.items():
        (logs / name).write_text(text)
    for wrong in ({"DATA_PATH": "absent"}, {"ARTIFACT_BYTES": 1000}):
        assert here(folder, RUN_ID="kept", **wrong).returncode == 2
        assert here(folder, RUN_ID="new", **wrong).returncode == 2
        assert {path.name: path.read_text() for path in logs.iterdir()} == kept


@pytest.mark.slow
def test_a_budget_in_time_has_a_dry_run_of_what_follows_training(tmp_path, here):
    result = Folder(tmp_path).result(here, RUN_ID="timed", ITERATIONS=0, MAX_WALLCLOCK_SECONDS=8, EVAL_SECONDS=30)
    assert result["steps"] > 0 and result["train_seconds"] < 8 and result["degraded_documents"] == 0


def test_a_flipped_byte_ends_with_status_2(first, here):
    blob = bytearray(first.folder.artifact().read_bytes())
    blob[len(blob) // 2] ^= 1
    damaged = first.folder.path / "damaged.ptz"
    damaged.write_bytes(blob)
    done = here(first.folder, RUN_ID="damaged", ARTIFACT="damaged.ptz")
    assert done.returncode == 2 and "damaged.ptz" in done.stderr and "checksum" in done.stderr
    assert "result" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("rows, world, nearest", [(3, 2, 4), (5, 4, 4), (7, 4, 8), (1, 8, 8), (100, 8, 96)])
def test_a_world_that_does_not_divide_the_batch_gets_the_nearest_that_it_does(rows, world, nearest):
    run = g.RunConfig(train_batch_tokens=rows * 64, train_row_tokens=64)
    with pytest.raises(g.ConfigError, match=f"nearest valid batch is {nearest * 64}$"):
        g.split_batch(run, world)
    assert g.split_batch(g.RunConfig(train_batch_tokens=nearest * 64, train_row_tokens=64), world)


def test_a_run_whose_output_nobody_reads_any_more_ends_well(tmp_path):
    """`… | head -1` ended it, before there was an artifact."""
    folder = Folder(tmp_path)
    with started(folder, ALONE, RUN_ID="unseen") as process:
        wait_for(process, "devices: ")
        process.stdout.close()
        process.stdout = None  # what `started` would read to its end
        assert process.wait(timeout=120) == 0
    lines = (tmp_path / "logs" / "unseen.txt").read_text().splitlines()
    assert lines[-1].startswith("result ") and folder.artifact("unseen").exists()
    assert [line for line in lines if line.startswith("warning: the screen: a line cannot be written: ")] != []


# ---- again, elsewhere, and on two ranks -------------------------------------


@pytest.mark.slow
def test_the_settings_of_a_log_pasted_into_a_shell_repeat_the_run_to_the_last_bit(first, tmp_path):
    Folder(tmp_path)
    rest = first.log.read_text().removeprefix(SCRIPT.read_text()).strip().splitlines()
    pasted = rest[: next(i for i, line in enumerate(rest) if line.startswith("python:"))]
    shell = ["set -a", *pasted, "RUN_ID=again", f"exec {sys.executable} {SCRIPT}"]
    done = subprocess.run(["bash", "-c", "\n".join(shell)], cwd=tmp_path, env=MACHINE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "logs" / "again.json").read_text())
    for key in ("val_bpb", "val_loss", "static_bpb", "prequant_bpb", "last_bpb", "total_bytes", "code_sha256"):
        assert again[key] == first.result[key], key
    assert [loss for *_, loss in again["history"]] == [loss for *_, loss in first.result["history"]]
    assert (tmp_path / "logs" / "again.ptz").read_bytes() == first.folder.artifact().read_bytes()


@pytest.mark.slow
def test_two_ranks_learn_and_score_what_one_does(first):
    two = first.folder.result(RUN_ID="two", command=TWO_RANKS)
    assert two["world_size"] == 2 and two["tokens"] == first.result["tokens"] and two["steps"] == first.result["steps"]
    for (*_, one_loss), (*_, two_loss) in zip(first.result["history"], two["history"], strict=True):
        assert two_loss == pytest.approx(one_loss, abs=1e-4)
    for key in ("val_bpb", "static_bpb", "prequant_bpb"):
        assert two[key] == pytest.approx(first.result[key], abs=2e-3), key


class TwoRanks:
    """A run of two ranks, each in a folder of its own, as on two machines, or both in one. Their processes are started
    as those of `start_two_ranks`, and end with the `with`."""

    def __init__(self, folders: list[Folder], **knobs):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folders = folders
        self.processes = []
        for rank, folder in enumerate(folders):
            own = {name: value[rank] if isinstance(value, list) else value for name, value in knobs.items()}
            env = folder.environment(**own)
            env |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            process = torch.multiprocessing.get_context(START_RANKS_BY).Process(target=a_rank, args=(folder.path, env))
            process.start()
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *given) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def output(self, rank: int, name: str = "out") -> str:
        """What a rank has printed so far; by the name "err", its messages."""
        path = self.folders[rank].path / f"{rank}.{name}"
        return path.read_text() if path.exists() else ""

    def wait_for(self, words: str) -> None:
        """Until a line of the first rank begins so."""
        while not any(line.startswith(words) for line in self.output(0).splitlines()):
            assert self.processes[0].is_alive(), self.output(0, "err")
            time.sleep(0.01)

    def ended(self, rank: int, within: float = 240.0) -> SimpleNamespace:
        """How a rank ended: returncode and stderr."""
        self.processes[rank].join(within)
        return SimpleNamespace(returncode=self.processes[rank].exitcode, stderr=self.output(rank, "err"))


def a_rank(folder: Path, env: dict[str, str]) -> None:
    """In a process of its own: the program from its start to its exit status, its output in two files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{env['RANK']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest's own go elsewhere
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.exit(g.main([]))


@pytest.mark.slow
def test_two_machines_score_what_one_does_though_only_the_first_has_the_artifact(first, tmp_path):
    """The second scored with an older artifact of that name: 4.107 for 4.277, status 0."""
    other = Folder(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "first.ptz").write_bytes(b"an older one")
    with TwoRanks([first.folder, other], RUN_ID="machines", ARTIFACT="logs/first.ptz") as machines:
        ended = [machines.ended(rank) for rank in range(2)]
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr[-1000:] + ended[1].stderr[-1000:]
    result = json.loads((first.folder.path / "logs" / "machines.json").read_text())
    assert result["world_size"] == 2 and result["val_bpb"] == pytest.approx(first.result["val_bpb"], abs=1e-6)
    assert result["adaptation_steps"] == first.result["adaptation_steps"]
    assert not (tmp_path / "logs" / "machines.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["knobs", "validation set", "training shards"])
def test_a_machine_that_differs_is_refused_before_anything_is_paid_for(first, tmp_path, what):
    other, knobs = Folder(tmp_path), {}
    if what == "knobs":
        knobs = {"TTT_LR": ["0.01", "0.02"]}
    else:
        name = {"validation set": "fineweb_val_000000.bin", "training shards": "fineweb_train_000001.bin"}[what]
        path = tmp_path / "my data" / name
        content = bytearray(path.read_bytes())
        content[1024 + 2 * 64 :: 2 * 64] = bytes(3 for _ in content[1024 + 2 * 64 :: 2 * 64])
        path.write_bytes(content)
    with TwoRanks([first.folder, other], RUN_ID="differs", **knobs) as machines:
        ended = [machines.ended(rank) for rank in range(2)]
    for rank in ended:
        assert rank.returncode == 2, rank.stderr[-1000:]
        assert f"rank 1 on {platform.node()} has other {what} than rank 0" in rank.stderr
    assert not (first.folder.path / "logs" / "differs.txt").exists()


class RankOne(g.Dist):
    """Tells what rank 0 would, and meets what it then tells itself."""

    def __init__(self):
        super().__init__(1, 2)
        self.of_rank_0 = None

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self.of_rank_0 = self.of_rank_0 or data
        return [self.of_rank_0, data]


def test_ranks_may_differ_in_nothing_but_where_their_files_lie(tiny_config, tiny_run, tiny_data):
    dist = RankOne()
    setup = g.make_setup(tiny_config, tiny_run(), dist)
    run = setup.run
    docs = setup.validation
    other_docs = g.Documents(docs.tokens, docs.bytes[::-1], docs.starts, docs.by_formula)
    g.check_ranks_agree(setup)
    g.check_ranks_agree(setup._replace(run=g.dataclasses.replace(run, data_path="elsewhere", run_id="other")))
    others = {
        "knobs": setup._replace(run=g.dataclasses.replace(run, seed=1)),
        "tokenizer": setup._replace(tokenizer=setup.tokenizer._replace(sha256="another")),
        "validation set": setup._replace(validation=other_docs),
        "training shards": setup._replace(stream=None),
    }
    for what, other in others.items():
        with pytest.raises(g.ConfigError, match=f"rank 1 on .* has other {what} than rank 0"):
            g.check_ranks_agree(other)


def test_ranks_may_not_differ_in_code(tiny_run, monkeypatch):
    dist = RankOne()
    g.check_ranks_begin_alike(dist, tiny_run(), check_only=False)
    monkeypatch.setattr(g, "code", lambda: b"another")
    with pytest.raises(g.ConfigError, match="rank 1 on .* has other code than rank 0"):
        g.check_ranks_begin_alike(dist, tiny_run(), check_only=False)


LAST_WORDS = """
import weakref, torch, train_gpt as g
g.torch_dist.init_process_group("gloo", store=g.torch_dist.HashStore(), rank=0, world_size=1)
group, ranks = weakref.ref(g.torch_dist.group.WORLD), g.Dist(0, 2)
import torch._dynamo  # as compiling does, and some optimizers
ranks.all_reduce(torch.ones(1))
ranks.close()
assert group() is None, "somebody holds the group, and it its threads"
"""


def test_no_thread_of_a_group_outlives_it():
    """One that frees a tensor while the interpreter ends aborts the process: so did one good run in forty."""
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS],
        env=MACHINE | {"PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs, independent",
    [
        (dict(TTT_ENABLED=0), 1),
        (dict(TTT_OPTIMIZER="sgd", TTT_LR=0.1), 1),
        (dict(TTT_OPTIMIZER="adamw"), 1),
        (dict(TTT_SCOPE="stream"), 0),
        (dict(TTT_PARAMS="full", TTT_LORA_RANK=None, TTT_LORA_ALPHA=None, TTT_FREEZE_BLOCKS=1), 1),
        (dict(TTT_PARAMS="full", TTT_LORA_RANK=None, TTT_LORA_ALPHA=None, TTT_SCOPE="stream", TTT_FREEZE_BLOCKS=0), 0),
        (dict(EVAL_SECONDS=0.001), 0),
    ],
    ids=["off", "sgd", "adamw", "lora, stream", "full, document", "full, stream", "no time"],
)
def test_kinds_of_test_time_training_from_the_environment(first, here, knobs, independent):
    result = first.folder.result(here, RUN_ID="kind", ARTIFACT="logs/first.ptz", **knobs)
    assert result["doc_independent"] == independent
    assert result["static_bpb"] == pytest.approx(first.result["static_bpb"], abs=1e-6)
    if "TTT_ENABLED" in knobs or "EVAL_SECONDS" in knobs:
        assert result["val_bpb"] == pytest.approx(result["static_bpb"], abs=1e-6) and result["adaptation_steps"] == 0
    else:
        assert result["val_bpb"] < result["static_bpb"] - 1e-3 and result["adaptation_steps"] > 0
    assert result["degraded_documents"] == (result["documents"] if "EVAL_SECONDS" in knobs else 0)


@pytest.mark.slow
def test_check_setup_says_what_would_be_run_and_writes_nothing(tmp_path, here):
    folder = Folder(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = here(folder, "--check-setup")
    assert done.returncode == 0, done.stderr
    assert "validation: 10 documents" in done.stdout and "training data: 2 shards" in done.stdout
    assert "predicted artifact" in done.stdout
    assert "limits: 12 steps, 0 s of training, 0 s of evaluation (0: none)" in done.stdout
    assert done.stdout.endswith("\nchecked: this run can start\n")
    assert sorted(tmp_path.rglob("*")) == before
    refused = here(folder, "--check-setup", RESUME="logs/none.ckpt")
    assert refused.returncode == 2 and "logs/none.ckpt: cannot be read" in refused.stderr
    refused = here(folder, "--check-setup", TRAIN_ROW_TOKENS=100)
    assert refused.returncode == 2 and "TRAIN_ROW_TOKENS=100" in refused.stderr


@pytest.mark.slow
def test_a_score_that_is_not_finite_is_an_error_and_no_result(first, here):
    """`TTT_LR=1e3` reported val_bpb:nan with status 0, and JSON that is none."""
    env = dict(ARTIFACT=first.folder.artifact(), RUN_ID="astray", TTT_LR=1e8, TTT_OPTIMIZER="sgd", TTT_LORA_ALPHA=1e8)
    done = here(first.folder, **env)
    assert done.returncode == 2 and "have no finite score" in done.stderr and "lower TTT_LR" in done.stderr
    logs = first.folder.path / "logs"
    assert not (logs / "astray.json").exists() and not (logs / "astray.docs.npz").exists()


def test_rates_that_destroy_the_network_end_in_that_message(first, here):
    """Not in a Cholesky that fails, after training is paid for."""
    done = here(first.folder, RUN_ID="destroyed", MATRIX_LR=1e3)
    assert done.returncode == 2 and "training diverged" in done.stderr and "lower MATRIX_LR" in done.stderr
    assert not (first.folder.path / "logs" / "destroyed.json").exists()


def test_a_batch_that_two_ranks_cannot_share_is_refused(tmp_path):
    folder = Folder(tmp_path)
    with TwoRanks([folder, folder], TRAIN_BATCH_TOKENS=192) as ranks:
        ended = [ranks.ended(rank) for rank in range(2)]
    for rank in ended:
        assert rank.returncode == 2
        assert "TRAIN_BATCH_TOKENS=192 is 3 rows" in rank.stderr and "nearest valid batch is 256" in rank.stderr


# ---- between the last step and the artifact ---------------------------------


@pytest.fixture
def in_process(tmp_path, here):
    """in_process(**knobs): a run in this process, where functions can be replaced -> its exit status and stderr."""
    folder = Folder(tmp_path)

    def run(**knobs) -> tuple[int, str]:
        done = here(folder, **knobs)
        return done.returncode, done.stderr

    os.chdir(tmp_path)  # `here` goes back
    return run


def full_disk_for(suffix: str, monkeypatch) -> None:
    """No file of that kind can be written."""
    plain = g.write_atomically

    def write(path, chunks, parents=False):
        g.require(not str(path).endswith(suffix), f"{path}: cannot be written: No space left on device", g.UserError)
        plain(path, chunks, parents)

    monkeypatch.setattr(g, "write_atomically", write)


def raising(error: BaseException):
    def fail(*given, **named):
        raise error

    return fail


LOST = {  # what ends a run after its last step; exit status and first line on stderr
    "a Cholesky": (
        lambda patch: patch.setattr(g, "gptq", raising(g.UserError("not positive"))),
        2,
        "error: not positive",
    ),
    "a score": (lambda patch: patch.setattr(g, "choose_weights", raising(g.UserError("astray"))), 2, "error: astray"),
    "a full disk": (lambda patch: full_disk_for(".ptz", patch), 2, "error: logs/lost.ptz: cannot be written"),
    "Ctrl-C": (lambda patch: patch.setattr(g, "make_artifact", raising(KeyboardInterrupt())), 130, "interrupted"),
}


ADVICE = "the trained weights are in logs/lost.ckpt; this goes on from them: "


@pytest.mark.parametrize("case", LOST)
def test_what_fails_after_the_last_step_leaves_the_trained_weights(first, in_process, monkeypatch, case):
    """And RESUME gives the artifact that the run would have given."""
    break_it, expected, message = LOST[case]
    with monkeypatch.context() as patch:
        break_it(patch)
        status, err = in_process(RUN_ID="lost")
    said, hint = err.splitlines()
    assert status == expected and said.startswith(message)
    assert hint.startswith(ADVICE + "RESUME=logs/lost.ckpt RUN_ID=lost ")
    logs = Path("logs")
    assert sorted(p.name for p in logs.iterdir()) == ["lost.ckpt", "lost.events.jsonl", "lost.txt"]

    status, err = in_process(RUN_ID="lost", RESUME="logs/lost.ckpt")
    assert (status, err) == (0, "") and not (logs / "lost.ckpt").exists()
    assert (logs / "lost.ptz").read_bytes() == first.folder.artifact().read_bytes()
    result = json.loads((logs / "lost.json").read_text())
    for key in ("steps", "train_tokens", "readout", "last_bpb", "prequant_bpb", "val_bpb"):
        assert result[key] == first.result[key], key


def test_the_command_that_goes_on_can_be_pasted_into_a_shell(first, in_process, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(g, "make_artifact", raising(g.UserError("too large")))
        _, err = in_process(RUN_ID="lost")
    command = ["bash", "-c", err.splitlines()[1].removeprefix(ADVICE)]
    done = subprocess.run(command, env=MACHINE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path("logs/lost.ptz").read_bytes() == first.folder.artifact().read_bytes()


def test_the_command_names_what_differs_from_the_defaults_alone():
    run = g.RunConfig(data_path="my data", ttt_params="full", resume="a.ckpt")
    setup = g.Setup(TINY_MODEL, run, g.Dist(world=2), None, None, None)
    words = shlex.split(g.command_line(setup, ARTIFACT="a.ptz", RESUME=""))
    assert words[0] == "ARTIFACT=a.ptz" and {"DATA_PATH=my data", "TTT_PARAMS=full", "VOCAB_SIZE=64"} < set(words)
    assert not [word for word in words if word.startswith(("RESUME=", "SEED=", "TTT_LR="))]
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 {SCRIPT}"
    assert words[-6:] == start.split()


def test_an_error_of_the_program_itself_says_how_to_go_on_too(in_process, monkeypatch):
    """Below its traceback, where Python shows the notes of an exception."""
    monkeypatch.setattr(g, "calibrate", raising(ZeroDivisionError("a bug")))
    monkeypatch.setattr(g, "prepare_training", lambda *given: 0.0)
    status, err = in_process(RUN_ID="lost")
    *_, error, note = err.splitlines()
    assert status == 1 and "Traceback" in err and error == "ZeroDivisionError: a bug"
    assert "RESUME=logs/lost.ckpt RUN_ID=lost " in note and Path("logs/lost.ckpt").exists()


class CutOff(g.DivergenceCheck):
    """Interrupts training."""

    def __call__(self, loss: float, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt


def test_what_ends_training_says_how_to_go_on_from_the_last_checkpoint(in_process, monkeypatch):
    """A checkpoint of an earlier run of this name does not count."""
    monkeypatch.setattr(g, "DivergenceCheck", CutOff)
    status, err = in_process(RUN_ID="cut", CHECKPOINT_SECONDS=1e-6)
    said, hint = err.splitlines()
    assert (status, said) == (130, "interrupted")
    assert hint.startswith(
        "the last checkpoint is logs/cut.ckpt; this goes on from it: RESUME=logs/cut.ckpt RUN_ID=cut "
    )
    assert in_process(RUN_ID="cut") == (130, "interrupted\n")


def test_the_seconds_of_all_runs_that_a_result_continues_count(in_process, monkeypatch):
    """Of one that is cut off, and of one that only fails to pack."""

    def lengthen(path: Path) -> float:
        """Make a checkpoint say that training took 100 seconds longer -> the seconds that it now says"""
        meta, tensors = g.unpack(path.read_bytes(), "it")
        meta["seconds"] += 100.0
        path.write_bytes(g.pack(meta, tensors, level=None))
        return meta["seconds"]

    with monkeypatch.context() as patch:
        patch.setattr(g, "DivergenceCheck", CutOff)
        in_process(RUN_ID="cut", CHECKPOINT_SECONDS=1e-6)
    lengthen(Path("logs/cut.ckpt"))
    with monkeypatch.context() as patch:
        patch.setattr(g, "make_artifact", raising(g.UserError("too large")))
        in_process(RUN_ID="lost", RESUME="logs/cut.ckpt")
    before = lengthen(Path("logs/lost.ckpt"))
    assert before > 200
    status, _ = in_process(RUN_ID="packed", RESUME="logs/lost.ckpt")
    result = json.loads(Path("logs/packed.json").read_text())
    phases = ("choose", "gradients", "calibrate", "factorise", "quantise", "pack")
    packing = sum(result["phases"][phase] for phase in phases)
    assert status == 0 and result["train_seconds"] == pytest.approx(before + packing, abs=0.01)


def test_a_validation_loops_if_the_steps_before_it_do(in_process, monkeypatch):
    modes = []
    plain = g.score_all_static

    def score(model, setup, looping=True, **given):
        modes.append(looping)
        return plain(model, setup, looping, **given)

    monkeypatch.setattr(g, "score_all_static", score)
    status, _ = in_process(RUN_ID="loops", ITERATIONS=4, ENABLE_LOOPING_AT=0.5, VAL_LOSS_EVERY=1)
    assert status == 0 and modes[:4] == [False, False, True, True] and all(modes[4:])


def test_a_disk_that_takes_no_checkpoint_does_not_end_a_run(first, in_process, monkeypatch):
    full_disk_for(".ckpt", monkeypatch)
    status, err = in_process(RUN_ID="crowded")
    lines = Path("logs/crowded.txt").read_text().splitlines()
    assert status == 0 and lines[-1].startswith("result ") and err == ""
    warning = "warning: no checkpoint is written: logs/crowded.ckpt: cannot be written: No space left on device"
    assert lines.count(warning) == 1
    assert Path("logs/crowded.ptz").read_bytes() == first.folder.artifact().read_bytes()


def test_a_folder_that_is_deleted_meanwhile_does_not_lose_the_training(in_process, monkeypatch):
    plain = g.choose_weights

    def choose(*given):
        shutil.rmtree("logs")
        return plain(*given)

    monkeypatch.setattr(g, "choose_weights", choose)
    status, _ = in_process(RUN_ID="deleted")
    assert status == 0 and Path("logs/deleted.ptz").exists() and Path("logs/deleted.json").exists()


@pytest.mark.parametrize("suffix", [".json", ".docs.npz"])
def test_a_result_that_cannot_be_written_is_on_the_screen_and_the_status_is_2(in_process, monkeypatch, suffix):
    """Without room for the scores of documents, the result was neither on the screen nor in a file."""
    full_disk_for(suffix, monkeypatch)
    status, err = in_process(RUN_ID="unwritten")
    assert status == 2
    problem = f"error: logs/unwritten{suffix}: cannot be written: No space left on device"
    assert err == f"{problem}; the result is the last line above\n"
    assert Path("logs/unwritten.txt").read_text().splitlines()[-1].startswith("result val_bpb:")
    written = {p.name.removeprefix("unwritten") for p in Path("logs").iterdir()}
    assert written == {".txt", ".events.jsonl", ".ptz", ".json", ".docs.npz"} - {suffix}


def test_what_fails_after_the_artifact_is_written_says_how_to_score_it(in_process, monkeypatch):
    monkeypatch.setattr(g, "unpack_artifact", raising(g.UserError("no memory")))
    status, err = in_process(RUN_ID="unscored")
    said, hint = err.splitlines()
    assert status == 2 and said == "error: no memory"
    assert hint.startswith(
        "the artifact is in logs/unscored.ptz; this scores it: ARTIFACT=logs/unscored.ptz VOCAB_SIZE="
    )
    assert "RUN_ID" not in hint and not Path("logs/unscored.ckpt").exists()


def test_a_source_that_is_edited_meanwhile_is_counted_as_it_ran(tmp_path, monkeypatch):
    """Another size would have been reported than that of the source in the log; without the file there was no
    artifact."""
    copy = tmp_path / "train_gpt.py"
    shutil.copy(SCRIPT, copy)
    monkeypatch.setattr(g, "__file__", str(copy))
    g.code.cache_clear()
    try:
        source = g.code()
        copy.unlink()
        assert g.code() == source == SCRIPT.read_bytes()
    finally:
        g.code.cache_clear()


def test_a_checkpoint_of_another_name_stays(in_process, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(g, "make_artifact", raising(g.UserError("too large")))
        in_process(RUN_ID="lost")
    status, _ = in_process(RUN_ID="other", RESUME="logs/lost.ckpt")
    assert status == 0 and Path("logs/other.ptz").exists()
    assert sorted(p.name for p in Path("logs").glob("*.ckpt")) == ["lost.ckpt"]


# ---- interruption -----------------------------------------------------------


def started(folder: Folder, command: list[str], **knobs) -> contextlib.AbstractContextManager[subprocess.Popen]:
    """A run in a process group of its own."""
    return process_group(command, folder.path, folder.environment(**knobs))


def wait_for(process: subprocess.Popen, words: str) -> None:
    """Read what it prints until a line begins so."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(words):
            return
    raise AssertionError("it ended early: " + "".join(seen[-20:]))


@pytest.mark.slow
@pytest.mark.parametrize("command", [ALONE, TWO_RANKS], ids=["one process", "torchrun"])
def test_ctrl_c_ends_everything_soon_and_leaves_no_half_written_file(tmp_path, command):
    folder = Folder(tmp_path)
    with started(folder, command, ITERATIONS=100_000, CHECKPOINT_SECONDS=0.01, RUN_ID="cut") as process:
        wait_for(process, "step:4 ")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=100)
        assert process.returncode != 0 and KILLED_BY_TORCHRUN not in output
        assert group_has_ended(process.pid), "a rank is left behind"
    assert list(tmp_path.rglob("*.partial")) == []
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["cut.ckpt", "cut.events.jsonl", "cut.txt"]
    steps = [event for event in read_events(tmp_path / "logs" / "cut.events.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps[:3]] == [2, 4, 6][: len(steps)] and len(steps) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("command", [ALONE, TWO_RANKS], ids=["one process", "torchrun"])
def test_a_second_run_of_the_same_name_is_refused_and_leaves_the_first_alone(first, here, command):
    """Two wrote one log, and one scored the artifact of the other."""
    folder, logs, name = first.folder, first.folder.path / "logs", f"twice_{len(command)}"
    with started(folder, command, ITERATIONS=100_000, RUN_ID=name) as process:
        wait_for(process, "step:4 ")
        own = process.pid if command == ALONE else rank_of(process, 0)
        for arguments, knobs in (((), dict(ARTIFACT="logs/first.ptz")), (("--check-setup",), {})):
            refused = here(folder, *arguments, RUN_ID=name, **knobs)
            assert refused.returncode == 2 and refused.stdout == ""
            assert f"error: RUN_ID={name} is in use: process {own} on {platform.node()}" in refused.stderr
        wait_for(process, "step:")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert sorted(path.name for path in logs.glob(f"{name}*")) == [f"{name}.events.jsonl", f"{name}.txt"]
    assert [event["event"] for event in read_events(logs / f"{name}.events.jsonl")].count("run") == 1


def rank_of(process: subprocess.Popen, rank: int) -> int:
    """The process of a rank that torchrun has started."""
    (task,) = Path(f"/proc/{process.pid}/task").glob(str(process.pid))
    for child in (task / "children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, killed, knobs",
    [
        ("step:4 ", 0, dict(ITERATIONS=100_000)),
        ("before quantisation", 1, dict(GPTQ_CALIBRATION_BATCHES=1000)),
        ("pack 1", 0, dict(TTT_EPOCHS=64)),
    ],
    ids=["training", "quantising", "evaluation"],
)
def test_when_a_rank_is_killed_the_other_ends_soon_with_one_line(tmp_path, moment, killed, knobs):
    """Either rank, and whatever it waits in: test_ranks.py."""
    folder = Folder(tmp_path)
    with TwoRanks([folder, folder], RUN_ID="lost", **knobs) as ranks:
        ranks.wait_for(moment)
        ranks.processes[killed].kill()
        other = ranks.ended(1 - killed, within=60)  # half of SILENCE_S: it does not wait for an answer
    assert other.returncode == g.RANK_LOST
    assert_one_line_of_a_lost_rank(other.stderr)


@pytest.mark.slow
def test_when_a_rank_of_torchrun_is_killed_the_other_ends_soon_with_one_line(tmp_path):
    with started(Folder(tmp_path), TWO_RANKS, RUN_ID="lost", ITERATIONS=100_000) as process:
        wait_for(process, "step:4 ")
        os.kill(rank_of(process, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=100)
        assert process.returncode != 0 and KILLED_BY_TORCHRUN not in output
    # torchrun ends with a report, and a traceback of its own
    assert_one_line_of_a_lost_rank(output, output.partition("torch/distributed/run.py")[0])


def assert_one_line_of_a_lost_rank(output: str, before_a_report: str | None = None) -> None:
    """Whatever else a rank or torchrun prints, one line of ours says which rank was lost, and none is of a library."""
    ours = [line for line in output.splitlines() if line.startswith(("error: ", "interrupted", "[rank"))]
    assert len(ours) == 1 and "its own message is above" in ours[0] and "want of memory" in ours[0], output
    before = output if before_a_report is None else before_a_report
    assert "gloo" not in before and "NCCL" not in before


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_from_its_checkpoint_as_if_nothing_had_been(tmp_path, here):
    folder = Folder(tmp_path)
    with started(folder, ALONE, ITERATIONS=60, CHECKPOINT_SECONDS=0.001, RUN_ID="cut") as process:
        wait_for(process, "step:20 ")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert not folder.artifact("cut").exists()
    resumed = folder.result(here, ITERATIONS=60, RESUME="logs/cut.ckpt", RUN_ID="resumed")
    whole = folder.result(here, ITERATIONS=60, RUN_ID="whole")
    assert 20 <= resumed["history"][0][0] < 60, "it began where it was cut off"
    assert resumed["history"][-1][2] == whole["history"][-1][2]
    assert folder.artifact("resumed").read_bytes() == folder.artifact("whole").read_bytes()
    assert resumed["val_bpb"] == whole["val_bpb"] and resumed["steps"] == whole["steps"] == 60
