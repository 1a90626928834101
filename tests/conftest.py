"""Every test starts from the same random state and uses one thread, whatever the machine has: ./run.sh runs as many
tests at a time as there are cores.

Fixtures for every test file: `tiny_config`, `tiny_run(**overrides)`, `train_tokenizer(**options)`,
`write_shard(path, tokens)`, `tiny_data` (a prepared folder), `tiny_env` (the environment of a run of all that),
`run_script` (starts it as a user does), `run_here` (in this process, for speed), `stand_in` and `race` (sweeps in no
time). To import, where a fixture does not reach: TINY_MODEL, TINY_RUN, read_events, stored_tensors,
rows_of_integers, start_two_ranks, START_RANKS_BY, process_group, group_has_ended, leave_process_alone.
"""

import os

# Read when torch is imported, inherited by the processes that tests start. Cores may be shared: no spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import contextlib
import functools
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined: they then run on a CPU, slowly

import train_gpt  # noqa: E402

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so a shell starts what runs in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

TINY_VOCAB = 64


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "longest" not in item.keywords)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


TINY_MODEL = train_gpt.ModelConfig(
    vocab_size=TINY_VOCAB,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2,
    rope_dims=4,
    xsa_last_n=2,
    attn_gate_width=4,
    smear_width=4,
    unet_skips=2,
    parallel_start_layer=3,
    num_loops=1,
    loop_start=1,
    loop_end=2,
)
TINY_RUN = dict(
    run_id="tiny",
    device="cpu",
    iterations=3,
    max_wallclock_seconds=0.0,
    eval_seconds=0.0,
    warmup_steps=1,
    train_batch_tokens=256,
    train_row_tokens=64,
    micro_batch_tokens=128,
    train_seq_len=32,
    holdout_tokens=0,
    train_log_every=1,
    gptq_calibration_batches=1,
    grad_rms_tokens=200,
    eval_seq_len=32,
    eval_stride=8,
    ttt_chunk_tokens=8,
    ttt_batch_docs=4,
    ttt_lora_rank=2,
)


@pytest.fixture
def tiny_config() -> train_gpt.ModelConfig:
    """A network with every mechanism in it: 64 pieces, width 32, 4 layers, heads 4/2, a loop, parallel streams, skips
    and gates."""
    return TINY_MODEL


@pytest.fixture
def tiny_run(tmp_path) -> Callable[..., train_gpt.RunConfig]:
    """tiny_run(**overrides): three steps of 256 tokens in rows of 64 on the CPU, contexts of 32, chunks of 8, data in
    tmp_path / "data", where `tiny_data` puts it."""
    return lambda **overrides: train_gpt.RunConfig(**(TINY_RUN | {"data_path": str(tmp_path / "data")} | overrides))


@torch.no_grad()
def stored_tensors(model: train_gpt.GPT, octave: float = -4.0, states: int = 0) -> dict[str, torch.Tensor]:
    """What an artifact stores of a network, without calibration: every error counts alike, and steps are 2^octave."""
    parameters = dict(model.named_parameters())
    scalars = {name: p.half() for name, p in parameters.items() if train_gpt.param_role(name) == "scalar"}
    weights = {name: p.detach() for name, p in parameters.items() if name not in scalars}
    alike = {name: train_gpt.Sensitivity(torch.eye(w.size(1)), torch.ones(len(w))) for name, w in weights.items()}
    run = train_gpt.RunConfig(trellis_states=str(states), gptq_damping=1e-6)
    quantiser = train_gpt.Quantiser(weights, alike, run, train_gpt.Dist())
    return scalars | train_gpt.encode_matrices(quantiser.round(octave), quantiser.trellis)


def any_gradient_rms(config: train_gpt.ModelConfig, chunk_tokens: int) -> train_gpt.GradientRMS:
    """What might have been measured: columns that differ, the same each time."""
    random = torch.Generator().manual_seed(0)
    outputs = train_gpt.lora_outputs(config)
    columns = [torch.randn(count, generator=random).exp2() for _, count in outputs]
    return train_gpt.GradientRMS(columns, torch.full((len(outputs),), 0.125), chunk_tokens)


@torch.no_grad()
def rows_of_integers(model: train_gpt.GPT) -> dict[str, torch.Tensor]:
    """What an artifact of the first version stores of a network: NAME (in, out) int8, and NAME.scale (out,) fp16."""
    stored = {}
    for name, p in model.named_parameters():
        if train_gpt.param_role(name) == "scalar":
            stored[name] = p.half()
        else:
            scale = (p.abs().amax(1) / 127).clamp(min=2.0**-14).half()
            stored[name] = (p / scale.float()[:, None]).round().clamp(-127, 127).mT.contiguous().to(torch.int8)
            stored[f"{name}.scale"] = scale
    return stored


# Without a GPU the ranks of a test are forks, which need not import torch again. Of a process that has used a GPU, a
# fork could not compute.
START_RANKS_BY = "spawn" if torch.cuda.is_available() else "fork"


def start_two_ranks(rank_main: Callable, *arguments: Any) -> None:
    """rank_main(rank, *arguments) in two processes, to their end."""
    torch.multiprocessing.start_processes(rank_main, arguments, nprocs=2, start_method=START_RANKS_BY)


def read_events(path: Path) -> list[dict]:
    """The events of a run; every line must be whole, and JSON in the strict sense."""

    def refuse(constant: str):
        raise AssertionError(f"{path}: {constant} is no JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n"), f"{path}: the last line is not whole"
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@functools.cache
def words() -> tuple[str, ...]:
    chance = random.Random(0)
    return tuple("".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 8))) for _ in range(200))


@functools.cache
def trained(**options) -> bytes:
    chance, model = random.Random(1), io.BytesIO()
    text = [" ".join(chance.choices(words(), k=40)) for _ in range(100)]
    defaults = dict(
        vocab_size=TINY_VOCAB,
        model_type="bpe",
        bos_id=1,
        eos_id=2,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **(defaults | options))
    return model.getvalue()


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[..., bytes]:
    """train_tokenizer(**options): a SentencePiece model of 64 pieces that keeps text of the letters of "etaoinshrdlu"
    and spaces exactly, or what SentencePiece's options make of it; with byte_fallback=True ask for 300 pieces or more.
    Equal options train once."""
    return trained


def shard_bytes(tokens: Iterable[int]) -> bytes:
    tokens = np.asarray(list(tokens), "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.tobytes()


@pytest.fixture
def write_shard() -> Callable[[Path, Iterable[int]], Path]:
    """write_shard(path, tokens): a whole shard with its header -> the path."""

    def write(path: Path, tokens: Iterable[int]) -> Path:
        path.write_bytes(shard_bytes(tokens))
        return path

    return write


@pytest.fixture
def tiny_data(tmp_path, write_shard) -> Path:
    """tmp_path / "data": training shards of 500, 300 and 700 tokens, a validation shard of 12 documents of 3 to 80
    tokens, tokenizer.model and manifest.json. Training text goes on from shard to shard."""
    folder, chance = tmp_path / "data", random.Random(2)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(trained())
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"path": "tokenizer.model"}}))
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained())

    def document(tokens: int) -> list[int]:
        return [train_gpt.BOS, *processor.encode(" ".join(chance.choices(words(), k=tokens)))[:tokens]]

    text = [token for _ in range(60) for token in document(chance.randint(5, 80))]
    for i, (begin, end) in enumerate(((0, 500), (500, 800), (800, 1500))):
        write_shard(folder / f"fineweb_train_{i:06}.bin", text[begin:end])
    validation = [token for length in (40, 3, 80, 9, 16, 8, 33, 32, 7, 50, 24, 12) for token in document(length)]
    write_shard(folder / "fineweb_val_000000.bin", validation)
    return folder


@pytest.fixture
def tiny_env(tiny_config, tiny_run) -> Callable[..., dict[str, str]]:
    """tiny_env(TTT_LR="0.1", ...): the environment of tiny_config and tiny_run, for `python train_gpt.py`, with these
    changes; a value of None takes a variable out."""

    def environment(**changes: str | None) -> dict[str, str]:
        env = dict(os.environ) | train_gpt.settings(tiny_config, tiny_run()) | changes
        return {name: value for name, value in env.items() if value is not None}

    return environment


@pytest.fixture
def run_script(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """run_script(*arguments, env={}): `python train_gpt.py` in tmp_path, as a user starts it, with this environment
    beside that of the tests -> returncode, stdout, stderr."""

    def run(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess:
        command = [sys.executable, train_gpt.__file__, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300)

    return run


@contextlib.contextmanager
def process_group(command: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """A command in a process group of its own; whatever is left of it is ended."""
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    process = subprocess.Popen(command, cwd=folder, env=env, **pipe)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def group_has_ended(group: int, within: float = 10.0) -> bool:
    """Whether no process of this group is left. What a process had started when it was ended may stay a moment longer
    in the system's table."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def leave_process_alone(entry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a run of this train_gpt.py from changing what would outlive it in the process of the tests."""
    monkeypatch.setattr(entry, "install_signal_handlers", lambda ending: None)
    monkeypatch.setattr(entry, "prepare_torch", lambda run, device: None)


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """run_here(*arguments, env={}, folder=tmp_path): as `run_script`, but in this process, which need not import torch
    again -> returncode, stdout, stderr."""
    monkeypatch.chdir(".")  # goes back in the end
    leave_process_alone(train_gpt, monkeypatch)

    def run(*arguments: str, env: Mapping[str, str], folder: Path = tmp_path) -> SimpleNamespace:
        os.chdir(folder)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            status = train_gpt.main([*arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return run


@pytest.fixture
def stand_in(tmp_path, tiny_data, tiny_config, tiny_run, monkeypatch):
    """A folder in which sweeps run a stand-in for the entry: a StandIn of stand_in.py."""
    from stand_in import HELD, STAND_IN, StandIn, sweep  # here, since it imports matplotlib, which few tests need

    for name, value in train_gpt.settings(tiny_config, tiny_run(holdout_tokens=HELD)).items():
        if value and name not in ("TTT_LR", "TTT_OPTIMIZER"):
            monkeypatch.setenv(name, value)
    for name in ("SEED", "ARTIFACT", "RESUME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "entry.py").write_text(STAND_IN)
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "entry.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "code", Path("entry.py").read_bytes)  # anew whenever it is asked for
    choose = sweep.choose_documents

    def choose_any(jobs: list, *others: Any) -> Any:
        """What the stand-in gives are scores of no documents of the sweep's."""
        scored = choose(jobs, *others)
        for job in jobs:
            job.documents = {name: digest for name, digest in job.documents.items() if name != "validation"}
        return scored

    monkeypatch.setattr(sweep, "choose_documents", choose_any)
    return StandIn(tmp_path)


@pytest.fixture
def race(stand_in, monkeypatch):
    """The same for sources that are raced, which have few knobs: see `source` in stand_in.py."""
    from stand_in import COMMON

    for name in train_gpt.KNOBS.keys() - set(COMMON):
        monkeypatch.delenv(name, raising=False)
    return stand_in
