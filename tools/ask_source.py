"""
Ask any train_gpt.py, not just this repository's, about its knobs. tools/sources.py runs this file in a process of its
own, since importing a source runs it:

    python -P tools/ask_source.py SOURCE < question > answer

The question is {"environments": [{NAME: text}], "gpus": number, "trains": bool, "needs": [names]}. The answer is
{"knobs": {NAME: its group}, "settings": for each environment, the knobs of a run under it or the reason why it is
refused, "lacking": the names in "needs" that the source does not define}. Imports only the standard library, so that
nothing of the tools' own train_gpt.py mixes with the source.
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

NEEDED = ("CONFIGS", "read_env", "settings")  # names that a source must define to be asked


def knob_groups(entry: ModuleType) -> dict[str, str]:
    """{NAME: group} of every knob of a source, in order; a knob without a group belongs to the group before it."""
    groups = {}
    group = ""
    for config in entry.CONFIGS:
        for field in fields(config):
            group = field.metadata.get("group") or group
            groups[field.name.upper()] = group
    return groups


def settings_under(entry: ModuleType, env: Mapping[str, str], gpus: int, trains: bool) -> dict[str, str] | str:
    """The knobs of a source's run under an environment, or the reason why the source refuses it."""
    try:
        model, run = entry.read_env(env)
        if trains and hasattr(entry, "with_batch"):  # missing in older sources, where TRAIN_BATCH_TOKENS is always set
            run = entry.with_batch(run, gpus)
        if trains and hasattr(entry, "split_batch"):  # older sources check it later
            entry.split_batch(run, gpus)
    except ValueError as error:  # ConfigError is a ValueError
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
    sys.modules["train_gpt"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    lacking = [name for name in NEEDED if not hasattr(module, name)]
    if lacking:
        sys.exit(f"it has no {', '.join(lacking)}, by which its knobs could be asked for")
    return module


def main(path: str) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what the source prints must not mix with the answer
    question = json.load(sys.stdin)
    with open(out, "w") as file:
        json.dump(answer(load(path), **question), file)


if __name__ == "__main__":
    main(sys.argv[1])
