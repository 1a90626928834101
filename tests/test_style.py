"""What keeps one file readable: no dead knob, no stray environment variable, no hidden state, no endless function."""

import ast
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import train_gpt

SOURCE = Path(train_gpt.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
KNOBS = {f.name for kind in train_gpt.CONFIGS for f in fields(kind)}
LONGEST_FUNCTION = 80  # lines; 60 once the warm-up is linear


def found(kind: type[ast.AST], within: ast.AST = TREE) -> list:
    return [node for node in ast.walk(within) if isinstance(node, kind)]


def functions_named(*names: str) -> list[ast.FunctionDef]:
    return [f for f in found(ast.FunctionDef) if f.name in names]


def calls_of(name: str) -> list[ast.Call]:
    return [c for c in found(ast.Call) if isinstance(c.func, ast.Name) and c.func.id == name]


def test_every_function_can_be_seen_whole():
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in found(ast.FunctionDef)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_every_knob_is_read_somewhere():
    """By an attribute of a config, elsewhere than where the config checks itself."""
    checks = {id(node) for f in functions_named("__post_init__") for node in ast.walk(f)}
    own = {id(node) for c in found(ast.ClassDef) if c.name in ("ModelConfig", "RunConfig") for node in ast.walk(c)}
    read = set()
    for node in found(ast.Attribute):
        holder = node.value.attr if isinstance(node.value, ast.Attribute) else vars(node.value).get("id")
        is_config = holder in ("run", "c", "config", "model") or (holder == "self" and id(node) in own)
        if is_config and isinstance(node.ctx, ast.Load) and id(node) not in checks:
            read.add(node.attr)
    assert KNOBS - read == set()


def test_a_knob_is_declared_once():
    model, run = ({f.name for f in fields(kind)} for kind in train_gpt.CONFIGS)
    assert model & run == set()


def test_only_two_functions_touch_the_environment():
    allowed = {id(node) for f in functions_named("read_env", "from_env") for node in ast.walk(f)}
    touched = [n for n in found(ast.Attribute) if n.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")]
    assert touched and [n.lineno for n in touched if id(n) not in allowed] == []
    assert [i.lineno for i in found(ast.ImportFrom) if i.module == "os"] == []


def test_nothing_is_hidden_in_globals_or_defaults():
    assert found(ast.Global) == []
    assert [c.lineno for c in calls_of("getattr") if len(c.args) + len(c.keywords) > 2] == []
    assert [c.lineno for name in ("globals", "locals", "exec", "eval", "setattr") for c in calls_of(name)] == []


def test_errors_are_not_swallowed():
    """No bare `except`, and none that only passes."""
    handlers = found(ast.ExceptHandler)
    assert [h.lineno for h in handlers if h.type is None] == []
    assert [h.lineno for h in handlers if all(isinstance(statement, ast.Pass) for statement in h.body)] == []


def test_torch_distributed_is_named_in_one_class_only():
    (dist,) = [c for c in found(ast.ClassDef) if c.name == "Dist"]
    inside = {id(node) for node in ast.walk(dist)}
    assert [n.lineno for n in found(ast.Name) if n.id == "torch_dist" and id(n) not in inside] == []


def test_the_artifact_is_read_without_pickle():
    names = {n.attr for n in found(ast.Attribute)} | {n.id for n in found(ast.Name)}
    imported = {a.name for i in found(ast.Import) for a in i.names} | {i.module for i in found(ast.ImportFrom)}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib"}
    called = [c.func for c in found(ast.Call) if isinstance(c.func, ast.Attribute) and c.func.attr in ("load", "save")]
    assert [f.lineno for f in called if isinstance(f.value, ast.Name) and f.value.id in ("torch", "np")] == []
    assert "allow_pickle" not in names


IMPORT = """
import os, random, signal, sys, threading
import numpy as np
import torch
state = lambda: repr((torch.get_rng_state().sum().item(), np.random.get_state(), random.getstate(), dict(os.environ),
                      threading.active_count(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
                      torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_grad_enabled(),
                      [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], torch.cuda.is_initialized(),
                      torch.distributed.is_initialized(), os.getcwd(), sys.path, sorted(os.listdir())))
before = state()
sys.path.insert(0, sys.argv[1])
import train_gpt
sys.path.remove(sys.argv[1])
assert state() == before, (before, state())
"""


def test_import_does_nothing(tmp_path):
    """Not even with an environment that a run would refuse."""
    environment = os.environ | {"TTT_LR": "nonsense", "TTT_TYPO": "1", "WORLD_SIZE": "8", "RANK": "x"}
    command = [sys.executable, "-c", IMPORT, str(Path(train_gpt.__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
