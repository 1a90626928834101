"""What the tests of sweeps share: a stand-in for the entry that takes no time, and sweeps of the entry itself. The
fixtures `stand_in` and `race` of conftest.py are made of it."""

import contextlib
import dataclasses
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from test_results import fabricate

import train_gpt
from tools import sources, sweep
from tools.holdout import make_holdout

HELD = 300  # of the 1,500 training tokens of tiny_data
OURS = sources.Source("", b"")


def training_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([train_gpt.read_shard(path) for path in train_gpt.find_shards(str(folder), "train")])


def tokenizer_of(folder: Path, vocab_size: int = 64) -> train_gpt.Tokenizer:
    return train_gpt.load_tokenizer(train_gpt.RunConfig(data_path=str(folder)), vocab_size)


STAND_IN = """
import fcntl, hashlib, json, os, pathlib, shutil, sys, time

lr, source = os.environ["TTT_LR"], pathlib.Path(__file__).read_bytes()
out = pathlib.Path("logs", os.environ["RUN_ID"])
lock = open(out.with_suffix(".lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open("started", "a") as started:
    print(lr, os.environ.get("SEED", "-"), os.environ.get("CUDA_VISIBLE_DEVICES", "-"), file=started)
out.with_suffix(".txt").write_bytes(source)
if lr == "0.5":
    sys.exit("error: planted failure")
while lr == "0.25" and not os.path.exists("go on"):
    time.sleep(0.01)
made = pathlib.Path("made", lr + "-" + os.environ.get("SEED", "1"))
result = json.loads(made.with_suffix(made.suffix + ".json").read_text())
shutil.copy(f"{made}.docs.npz", f"{out}.docs.npz")
result["knobs"]["TTT_LR"] = os.environ.get("ASKED_TTT_LR", lr)
result |= dict(run_id=os.environ["RUN_ID"], code_sha256=hashlib.sha256(source).hexdigest(), code_bytes=len(source))
result["total_bytes"] = result["artifact_bytes"] + len(source)
out.with_suffix(".json").write_text(json.dumps(result))
"""


class StandIn:
    """A folder in which sweeps run the stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder

    def makes(self, lr: str, seed: int = 1, **how) -> None:
        fabricate(self.folder / "made", f"{lr}-{seed}", seed=seed, **how)

    def started(self) -> list[list[str]]:
        path = self.folder / "started"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def artifact(self, config: train_gpt.ModelConfig, **meta) -> str:
        """The path of an artifact without weights: sweeps read its description only."""
        tokenizer = hashlib.sha256((self.folder / "data/tokenizer.model").read_bytes()).hexdigest()
        data = self.folder / "data"
        held = make_holdout(data, tokenizer_of(data), HELD, self.folder / "of the artifact")["sha256"]
        meta = dict(kind="artifact", model=dataclasses.asdict(config), tokenizer=tokenizer, holdout=held) | meta
        (self.folder / "given.ptz").write_bytes(train_gpt.pack(meta, {}, None))
        return "given.ptz"


# A source that takes no time to import. Its runs give what made/{name}-{seed} holds.
SOURCE = """
import os
from dataclasses import field, make_dataclass

NAMES = {names}
CONFIGS = [make_dataclass("C", [(name.lower(), str, field(default="", metadata=dict(group=""))) for name in NAMES])]

def settings(model, run):
    return run

def read_env(env):
    if env.get("TTT_LR") == "9":
        raise ValueError("TTT_LR=9: expected at most 1")
    defaults = dict(DEVICE="cpu", VOCAB_SIZE="64", HOLDOUT_TOKENS="{held}", TRAIN_BATCH_TOKENS="as time allows")
    return None, defaults | {{name: env[name] for name in NAMES if name in env}}

print("a source may print what it likes")
if __name__ == "__main__":
    os.environ |= {{"ASKED_TTT_LR": os.environ.get("TTT_LR", ""), "TTT_LR": "{name}"}}
"""


COMMON = (
    "SEED",
    "TTT_LR",
    "DEVICE",
    "DATA_PATH",
    "VOCAB_SIZE",
    "HOLDOUT_TOKENS",
    "TRAIN_BATCH_TOKENS",
    "TRAIN_ROW_TOKENS",
)


def source(stand_in: StandIn, name: str, knobs: tuple[str, ...] = (), held: int = HELD) -> bytes:
    """Write name.py, a source with these knobs beside COMMON -> its content."""
    run = "".join(f"    {line}\n" for line in STAND_IN.splitlines())
    content = SOURCE.format(names=(*COMMON, *knobs), name=name, held=held) + run
    (stand_in.folder / f"{name}.py").write_text(content)
    return content.encode()


def sweep_here(folder: Path, env: dict[str, str], *arguments: str) -> str:
    """A sweep in this process, which need not import torch again; its runs are processes -> what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        for name in os.environ.keys() - env.keys():
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        assert sweep.main([*arguments]) == 0, out.getvalue()
    return out.getvalue()
