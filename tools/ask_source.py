"""
What a train_gpt.py that is not the one beside the tools says of its knobs. tools/sweep.py runs this file in a process
of its own, since importing a source runs it:

    python -P tools/ask_source.py SOURCE < question > answer

question {"environments": [{NAME: text}], "gpus": number, "trains": bool, "needs": [names]}; answer {"knobs": {NAME: its
group}, "settings": for every environment the knobs that a run under it has, or a text that says why it can have none,
"lacking": those of the names that the source does not define}. Standard library alone: nothing of the tools' own
train_gpt.py may mix with what is asked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

NEEDED = ("CONFIGS", "read_env", "settings")  # of a source that can be asked


def knob_groups(entry: ModuleType) -> dict[str, str]:
    """{NAME: group} of every knob of a source, in its order; a knob without a group belongs to the one before."""
    groups = {}
    group = ""
    for config in entry.CONFIGS:
        for field in fields(config):
            group = field.metadata.get("group") or group
            groups[field.name.upper()] = group
    return groups


def settings_under(entry: ModuleType, env: Mapping[str, str], gpus: int, trains: bool) -> dict[str, str] | str:
    """The knobs that a run of a source has under an environment, or why it refuses it."""
    try:
        model, run = entry.read_env(env)
        if trains and hasattr(entry, "with_batch"):  # of older sources, TRAIN_BATCH_TOKENS always says it
            run = entry.with_batch(run, gpus)
        if trains and hasattr(entry, "split_batch"):  # older sources check that later
            entry.split_batch(run, gpus)
    except ValueError as error:  # ConfigError is one
        return str(error)
    return entry.settings(model, run)


def answer(
    entry: ModuleType, environments: Iterable[Mapping[str, str]], gpus: int, trains: bool, needs: Iterable[str] = ()
) -> dict[str, Any]:
    said = [settings_under(entry, env, gpus, trains) for env in environments]
    lacking = [name for name in needs if not hasattr(entry, name)]
    return {"knobs": knob_groups(entry), "settings": said, "lacking": lacking}


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    lacking = [name for name in NEEDED if not hasattr(module, name)]
    if lacking:
        sys.exit(f"it has no {', '.join(lacking)}, by which its knobs could be asked for")
    return module


def main(path: str) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what the source prints is no answer
    question = json.load(sys.stdin)
    with open(out, "w") as file:
        json.dump(answer(load(path), **question), file)


if __name__ == "__main__":
    main(sys.argv[1])
