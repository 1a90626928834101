"""What keeps one file readable: no dead knob, no stray environment variable, no hidden state, no endless function."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import train_gpt

SOURCE = Path(train_gpt.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
MODULES = {name for name, value in vars(train_gpt).items() if isinstance(value, ModuleType)}
KNOBS = {f.name for kind in train_gpt.CONFIGS for f in fields(kind)}
SHARED = KNOBS & {"device", "vocab_size"}  # tensors have the one, TrainingStream has the other
LONGEST_FUNCTION = 60  # lines


def found(kind: type[ast.AST], within: ast.AST = TREE) -> list:
    return [node for node in ast.walk(within) if isinstance(node, kind)]


def functions_named(*names: str) -> list[ast.FunctionDef]:
    return [f for f in found(ast.FunctionDef) if f.name in names]


def calls_of(name: str) -> list[ast.Call]:
    return [c for c in found(ast.Call) if isinstance(c.func, ast.Name) and c.func.id == name]


def test_every_function_can_be_seen_whole():
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in found(ast.FunctionDef)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_the_docstring_lists_the_sections_in_order():
    titles = re.findall(r"^# ={118}\n# (.*)$", SOURCE, re.M)
    table = train_gpt.__doc__.partition("The sections of this file")[2].partition("Shapes:")[0]
    sections = re.findall(r"^    (\S.*?)  ", table, re.M)
    assert len(sections) == len(titles)
    assert [title for section, title in zip(sections, titles, strict=True) if not title.startswith(section)] == []


def test_every_knob_is_read_somewhere():
    """As an attribute of whatever the config is called there. Checks of the config by itself do not count, its
    properties do. Nor do attributes of modules and of `self` (torch.compile, self.device), nor calls (p.compile())."""
    configs = [c for c in found(ast.ClassDef) if c.name in {kind.__name__ for kind in train_gpt.CONFIGS}]
    methods = [f for c in configs for f in found(ast.FunctionDef, c)]
    properties = [f for f in methods if "property" in {vars(d).get("id") for d in f.decorator_list}]
    checks = {id(node) for f in methods if f not in properties for node in ast.walk(f)}
    in_properties = {id(node) for f in properties for node in ast.walk(f)}
    called = {id(call.func) for call in found(ast.Call)}

    read = set()
    for node in found(ast.Attribute):
        owner = vars(node.value).get("id")
        of_another = owner in MODULES or (owner == "self" and id(node) not in in_properties) or id(node) in called
        if isinstance(node.ctx, ast.Load) and not of_another and id(node) not in checks:
            read.add(node.attr)
    assert KNOBS - SHARED - read == set()


def test_knobs_whose_names_other_objects_have_too_are_read(tiny_data, tiny_config, tiny_run, monkeypatch, tmp_path):
    """There the source does not tell; so the configs note what is read of them."""
    read = set()

    def noting(config):
        def get(self, name):
            read.add(name)
            return object.__getattribute__(self, name)

        kind = type(config)
        noted = object.__new__(type(kind.__name__, (kind,), {"__getattribute__": get}))
        object.__setattr__(noted, "__dict__", dict(vars(config)))
        return noted

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "read_env", lambda: (noting(tiny_config), noting(tiny_run())))
    monkeypatch.setattr(train_gpt, "settings", lambda *configs: {})  # it reads them all
    monkeypatch.setattr(train_gpt, "prepare_torch", lambda run, device: None)  # it would change torch for other tests
    train_gpt.run_experiment(check_only=True, ending=train_gpt.Ending())
    assert SHARED - read == set() and len(read) < len(KNOBS)


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
