"""Programs that break a rule, for the audit to catch: train_gpt.py with one of the changes in cheats.patch."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import train_gpt

SOURCE = Path(train_gpt.__file__).read_text(encoding="utf-8")

MODEL = dict(vocab_size=32, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2, rope_dims=4)
MODEL |= dict(attn_gate_width=8, smear_width=8, unet_skips=1, parallel_start_layer=1, num_loops=0)
RUN = dict(device="cpu", train_row_tokens=32, train_batch_tokens=32, micro_batch_tokens=160, eval_seconds=0)
RUN |= dict(eval_seq_len=24, eval_stride=8, ttt_chunk_tokens=8)
LORA = RUN | dict(ttt_lora_rank=4, ttt_lora_alpha=4.0, ttt_epochs=2)
SYSTEMS = {  # ways to score
    "static": RUN | dict(ttt_enabled=0),
    "adamw": LORA
    | dict(ttt_optimizer="adamw", ttt_lr=0.01, ttt_weight_decay=0.1)
    | dict(ttt_grad_clip=0.5, ttt_entropy_low=2.8, ttt_entropy_high=2.9),
    "sgd": LORA
    | dict(ttt_optimizer="sgd", ttt_lr=0.1, ttt_weight_decay=0.1)
    | dict(ttt_cosine=1, ttt_ns_steps=2, ttt_lora_targets="k,o,mlp", ttt_late_chunk_tokens=16),
    "rms": LORA | dict(ttt_optimizer="rms", ttt_lr=0.02, ttt_rms_floor=0.25),
    "full": RUN | dict(ttt_params="full", ttt_lr=0.01, ttt_epochs=2, ttt_freeze_blocks=1),
    "stream": RUN | dict(ttt_params="full", ttt_scope="stream", ttt_lr=0.01, ttt_epochs=1),
    "lora stream": RUN | dict(ttt_scope="stream", ttt_lora_rank=4, ttt_lr=0.01, ttt_optimizer="sgd"),
}


class Hunk(NamedTuple):
    """Lines of train_gpt.py, and what a cheat makes of them."""

    old: str
    new: str


class Cheat(NamedTuple):
    name: str
    rule: str  # the property of the audit that must fail
    system: str  # one of SYSTEMS
    data: str  # what is scored: plain | bytes | caseops
    hunks: list[Hunk]

    def source(self, data: Path) -> str:
        """train_gpt.py with this cheat built in, for the data in that folder."""
        source = SOURCE
        for old, new in self.hunks:
            assert source.count(old) == 1, f"{self.name}: changes lines that stand {source.count(old)} times:\n{old}"
            source = source.replace(old, new)
        return source.replace("{data}", str(data))


def read_cheats(path: Path) -> list[Cheat]:
    text = path.read_text(encoding="utf-8")
    return [parse_cheat(part) for part in text.split("\n=== ")[1:]]


def parse_cheat(text: str) -> Cheat:
    heading, _, body = text.strip("\n").partition("\n")
    name, rule, system, data = heading.split(" | ")
    return Cheat(name, rule, system, data, [parse_hunk(part) for part in body.split("\n@@\n")])


def parse_hunk(text: str) -> Hunk:
    lines = text.splitlines()
    assert {line[:1] for line in lines} <= {" ", "-", "+"}, text
    old = [line[1:] for line in lines if line[0] != "+"]
    new = [line[1:] for line in lines if line[0] != "-"]
    return Hunk("".join(f"{line}\n" for line in old), "".join(f"{line}\n" for line in new))


def load_source(path: Path, source: str) -> ModuleType:
    """Write a program to a file, and import it as a module of its own."""
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("planted", path)
    module = sys.modules["planted"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHEATS = read_cheats(Path(__file__).with_suffix(".patch"))
