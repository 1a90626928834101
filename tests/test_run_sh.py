"""run.sh as a user calls it. The fast tests copy it into a folder whose name has spaces and put stubs where the machine
would be: an interpreter that sees nothing but the standard library and stubs of torch, pip, venv, pytest and the rest.
Every stub that is started writes a line to started.jsonl."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest

import train_gpt
from tools import record, sweep

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"PYTHON", "DATA_PATH", "TORCH_INDEX_URL", "PYTHONPATH", "OMP_WAIT_POLICY"} | {
    field.name.upper() for config in (train_gpt.ModelConfig, train_gpt.RunConfig) for field in fields(config)
}

STARTED = """\
import json, os, sys, time
with open("started.jsonl", "a") as file:
    file.write(json.dumps({"name": %r, "args": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
"""
TORCH = """\
import os
from types import SimpleNamespace
if "STUB_TORCH" not in os.environ:
    raise ImportError("no torch here")
__version__ = os.environ["STUB_TORCH"]
cuda = SimpleNamespace(device_count=lambda: int(os.environ.get("STUB_GPUS", "0")))
"""
VENV = """
from pathlib import Path
Path(sys.argv[-1], "lib/python3/site-packages").mkdir(parents=True)
python = Path(sys.argv[-1], "bin/python")
python.parent.mkdir()
python.write_text('#!/bin/sh\\nSTUB_TORCH=${STUB_TORCH:-2.13.0} exec "$STUB_PYTHON" "$@"\\n')
python.chmod(0o755)
"""
PIP = """
if "-r" in sys.argv:
    requirements = open(sys.argv[-1]).read()
    with open("installed.txt", "a") as file:
        file.write(requirements)
    sys.exit(int(os.environ.get("STUB_PIP_STATUS", "0")))
"""
TRAIN = """
print("result val_bpb:1.0", flush=True)
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
sys.exit(int(os.environ.get("STUB_STATUS", "0")))
"""
OLD_PYTHON = """\
#!/bin/sh
[ "$1" = --version ] && echo Python 3.10.12 && exit
exec "$STUB_PYTHON" -c 'import sys; sys.version_info = (3, 10, 12); exec(sys.argv[1])' "$2"
"""
TOOLS = ("prove", "compress", "decompress", "sample", "sweep", "rules", "compare", "plot", "packing")
TOOLS += ("calibrate", "record", "check", "bench")
COMMANDS = ("check-setup", "data", *TOOLS, "test", "help")
STARTED_BY = {
    "": "train_gpt.py",
    "check-setup": "train_gpt.py",
    "help": "knobs",
    "data": "prepare.py",
    "test": "pytest",
}
STARTED_BY |= {name: name for name in TOOLS}
STUBS = {
    "stubs/torch/__init__.py": TORCH,
    "stubs/torch/distributed/__init__.py": "",
    "stubs/torch/distributed/run.py": STARTED % "torchrun",
    "stubs/venv.py": STARTED % "venv" + VENV,
    "stubs/pip.py": "import sys\nif len(sys.argv) < 2:\n    raise SystemExit\n" + STARTED % "pip" + PIP,
    "stubs/ruff.py": STARTED % "ruff" + 'sys.exit(int(os.environ.get("STUB_RUFF_STATUS", "0")))\n',
    "stubs/pytest.py": STARTED % "pytest" + 'sys.exit(int(os.environ.get("STUB_PYTEST_STATUS", "0")))\n',
    "train_gpt.py": STARTED % "train_gpt.py" + TRAIN,
    "data/prepare.py": STARTED % "prepare.py",
} | {f"tools/{name}.py": STARTED % name for name in ("knobs", *TOOLS)}


class Machine:
    """A folder with run.sh and stubs. Its python3 has no torch; .venv, once made, has torch 2.13.0."""

    nohup = False  # whether run.sh is started by it

    def __init__(self, folder: Path):
        self.folder = folder / "a folder with spaces"
        for path, text in STUBS.items():
            self.write(path, text)
        for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.folder)
        self.python = self.write("bin/python3", '#!/bin/sh\nexec "$STUB_PYTHON" "$@"\n')
        hidden = self.write("bin/hidden", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no site-packages
        self.env = {name: value for name, value in os.environ.items() if name not in MACHINE}
        self.env |= {"PATH": f"{self.python.parent}:{self.env['PATH']}", "PYTHONPATH": str(self.folder / "stubs")}
        self.env |= {"STUB_PYTHON": str(hidden)}

    def write(self, path: str, text: str = "") -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def has_packages(self, *names: str) -> None:
        """What python3 can import besides its torch."""
        for name in names:
            self.write(f"stubs/{name}.py")

    def run(self, *arguments: str, **env: object) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(arguments, env), capture_output=True, text=True, timeout=60)

    def command(self, arguments: tuple[str, ...], env: dict) -> dict:
        (self.folder / "started.jsonl").unlink(missing_ok=True)
        (self.folder / "installed.txt").unlink(missing_ok=True)
        settings = self.env | {name: str(value) for name, value in env.items()}
        start = dict(env=settings, cwd="/", stdin=subprocess.DEVNULL, preexec_fn=self.hang_up)
        return dict(args=[self.folder / "run.sh", *arguments], **start)

    def hang_up(self) -> None:
        """Called first in what is started."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN if self.nohup else signal.SIG_DFL)

    def started(self, name: str) -> list[dict]:
        path = self.folder / "started.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call["name"] == name]

    def installed(self) -> list[str]:
        """The packages that pip was asked for since the last start."""
        path = self.folder / "installed.txt"
        return re.findall("^[a-z]+", path.read_text(), re.MULTILINE) if path.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def ready(machine):
    """A machine whose python3 has everything: nothing is ever installed."""
    machine.env["STUB_TORCH"] = "2.11.0a0+git"
    machine.has_packages("numpy", "sentencepiece", "zstandard", "hypothesis", "matplotlib", "triton", "xdist")
    yield machine
    assert not (machine.folder / ".venv").exists()


# ---- commands


def test_unknown_command_is_refused_with_the_known_ones(machine):
    done = machine.run("tain")
    assert done.returncode == 2
    assert done.stderr.strip() == "run.sh: unknown command 'tain'; the commands are: " + " ".join(COMMANDS)


def test_a_setting_after_the_command_is_told_its_place(machine):
    done = machine.run("TTT_LR=3e-3")
    assert done.returncode == 2
    assert done.stderr.strip() == "run.sh: a setting goes in front: TTT_LR=3e-3 ./run.sh"


@pytest.mark.parametrize("name", ["help", "-h", "--help"])
def test_help_is_that_of_run_sh_and_then_the_knobs(ready, name):
    done = ready.run(name)
    assert done.returncode == 0 and "./run.sh check-setup" in done.stdout
    assert [call["args"] for call in ready.started("knobs")] == [["--help"]]


@pytest.fixture
def bare(machine):
    """A machine without any package, but with the real knobs."""
    for name in ("train_gpt.py", "tools/__init__.py", "tools/knobs.py"):
        shutil.copy(ROOT / name, machine.folder / name)
    return machine


def test_help_needs_no_package(bare):
    done = bare.run("help", TTT_LR="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    usage, _, knobs = done.stdout.partition(
        "passive unless you set it: a CPU thread that waits leaves its core to others\n"
    )
    assert "./run.sh check-setup" in usage and knobs.strip() == train_gpt.describe_knobs()
    assert bare.started("pip") == bare.started("venv") == []


WITHOUT_KNOBS = {"compare", "plot", "decompress", "check"}  # the last two take those of a file or a record


@pytest.mark.parametrize(
    "command", [[], ["check-setup"], *([tool, "X"] for tool in TOOLS if tool not in WITHOUT_KNOBS)]
)
@pytest.mark.parametrize(
    "knobs, said",
    [
        ({"MATRIX_LR": "abc"}, "error: MATRIX_LR='abc': Muon's learning rate; expected a number\n"),
        ({"TTL_LR": "1"}, "error: TTL_LR is not a knob; did you mean TTT_LR? (python train_gpt.py --help lists all)\n"),
    ],
)
def test_a_bad_knob_is_refused_before_anything_is_installed(bare, command, knobs, said):
    done = bare.run(*command, **knobs)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert bare.started("pip") == bare.started("venv") == bare.started("prepare.py") == []


def test_good_knobs_are_not_refused_before_the_run(bare):
    """Nor are values that go together only in a small run, or only in a full one: which it is, torch must tell."""
    bare.run("check-setup", TRAIN_BATCH_TOKENS="8192", MATRIX_LR="0.02")
    assert "torch" in bare.installed()


@pytest.mark.parametrize(
    "arguments", [["sweep", "--help"], ["sweep", "--source=other.py"], *([name, "X"] for name in sorted(WITHOUT_KNOBS))]
)
def test_a_bad_knob_is_not_refused_by_what_takes_none_or_those_of_another_source(bare, arguments):
    bare.run(*arguments, TTL_LR="1")
    assert "torch" in bare.installed()


def test_data_passes_its_arguments_on(ready):
    assert ready.run("data", "jsonl", "my texts/*.jsonl").returncode == 0
    assert [call["args"] for call in ready.started("prepare.py")] == [["jsonl", "my texts/*.jsonl"]]


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_gets_its_arguments(ready, name):
    assert ready.run(name, "a file", "--option", "2").returncode == 0
    (call,) = ready.started(name)
    assert call["args"] == ["a file", "--option", "2"]
    knobs = {"sweep", "record"}  # these start runs, so they get what a run would get
    assert ("ITERATIONS" in call["env"]) == (name in knobs) == bool(ready.started("prepare.py"))


def test_python_finds_the_tools_whatever_the_environment_says(ready):
    ready.run("plot", PYTHONSAFEPATH="1")
    (call,) = ready.started("plot")
    assert "PYTHONSAFEPATH" not in call["env"]


def test_a_sweep_of_an_artifact_gets_no_knobs_of_the_small_run(ready):
    ready.run("sweep", "TTT_LR=1e-4,2e-4", "--eval", "logs/other.ptz")
    (call,) = ready.started("sweep")
    assert "ITERATIONS" not in call["env"] and ready.started("prepare.py") == []


@pytest.mark.parametrize("name", ["sweep", "record"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_a_tool_that_starts_runs_prepares_nothing(ready, name, option):
    ready.run(name, option)
    assert len(ready.started(name)) == 1 and ready.started("prepare.py") == []


def test_words_of_an_argument_are_not_options(ready):
    ready.run("record", "NAME", "--what", "scores of --eval and --launcher, see --help")
    (call,) = ready.started("record")
    assert "ITERATIONS" in call["env"]


@pytest.mark.parametrize(
    "parse, arguments",
    [(sweep.read_options, ["SEED=0,1", "--launch", "srun"]), (record.parse, ["X", "--seeds", "0,1", "--eval", "700"])],
)
def test_options_are_not_abbreviated(capsys, parse, arguments):
    """run.sh would not find them, or take one for another."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "unrecognized arguments: --" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", [["--launcher", "srun -N1"], ["--launcher=srun"]])
def test_a_sweep_whose_gpus_are_elsewhere_gets_no_knobs_of_the_small_run(ready, launcher):
    ready.run("sweep", "TTT_LR=1e-4,2e-4", *launcher)
    (call,) = ready.started("sweep")
    assert "ITERATIONS" not in call["env"] and ready.started("prepare.py") == []


def test_a_sweep_is_told_which_knobs_are_not_the_user_s(ready):
    ready.run("sweep", "TTT_PARAMS=lora,full", TTT_LR=0.1)
    (call,) = ready.started("sweep")
    defaults = call["env"]["RUN_SH_DEFAULTS"].split()
    assert {"ITERATIONS", "TTT_LORA_RANK", "TTT_BATCH_DOCS"} < set(defaults) <= call["env"].keys()
    assert "TTT_LR" not in defaults
    for given in ({}, {"TTT_PARAMS": "full"}, {"TTT_SCOPE": "stream", "TTT_LR": "0.1"}):
        ready.run(**given)
        env = ready.started("train_gpt.py")[0]["env"]
        told = dict(line.split("=", 1) for line in ready.run("small-job-defaults", **given).stdout.splitlines())
        assert told.items() <= env.items() and not told.keys() & given.keys()
        assert {name for name in env if name.startswith("TTT_")} == {n for n in told | given if n.startswith("TTT_")}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_threads_that_wait_do_not_spin_unless_the_user_says_so(ready, name):
    """Whatever is started; a core that others need, too, would else be taken by threads that only wait."""
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        ready.run(*name.split(), **given)
        started = ready.started(STARTED_BY[name])
        assert [call["env"]["OMP_WAIT_POLICY"] for call in started] == [expected]


def test_the_entry_s_exit_status_is_passed_on(ready):
    assert ready.run(STUB_STATUS=2).returncode == 2


def test_ctrl_c_ends_the_entry(ready):
    with subprocess.Popen(**ready.command((), {"STUB_SECONDS": 60}), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "result val_bpb:1.0\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) != 0


# ---- the job


def test_without_a_gpu_the_small_run_is_chosen_and_said(ready):
    done = ready.run()
    assert done.returncode == 0
    assert done.stderr == "run.sh: small run with data/datasets/installed: torch finds no GPU\n"
    assert [call["args"] for call in ready.started("prepare.py")] == [["installed"]]
    (entry,) = ready.started("train_gpt.py")
    assert entry["args"] == []
    assert entry["env"]["DATA_PATH"] == "data/datasets/installed"
    assert int(entry["env"]["ITERATIONS"]) > 0 and entry["env"]["MAX_WALLCLOCK_SECONDS"] == "0"


def test_the_users_environment_wins_over_the_small_run(ready):
    ready.run(ITERATIONS=7, RUN_ID="mine", DATA_PATH="my data", TTT_LR=0.1)
    (entry,) = ready.started("train_gpt.py")
    assert {"ITERATIONS": "7", "RUN_ID": "mine", "DATA_PATH": "my data", "TTT_LR": "0.1"}.items() <= entry[
        "env"
    ].items()
    assert ready.started("prepare.py") == []


def test_a_knob_in_small_letters_is_refused_though_the_small_run_sets_it(ready):
    done = ready.run(iterations=7)
    assert done.returncode == 2 and ready.started("train_gpt.py") == []
    assert done.stderr == "run.sh: iterations is not a knob; did you mean ITERATIONS? Knobs are in capitals\n"
    assert ready.run(iterations=7, ITERATIONS=7).returncode == 0  # a script's own variable


def test_the_small_run_s_settings_are_accepted_by_the_entry(ready):
    ready.run()
    (entry,) = ready.started("train_gpt.py")
    model, run = train_gpt.read_env(entry["env"])
    assert model != train_gpt.ModelConfig() and run.run_id == "small"


@pytest.mark.parametrize("given", [{"TTT_SCOPE": "stream"}, {"TTT_PARAMS": "full"}, {"TTT_ENABLED": "0"}], ids=str)
def test_every_kind_of_adaptation_can_be_asked_of_the_small_run(ready, given):
    """And `full` adapts: its own chunk is longer than any document here."""
    ready.run(**given)
    _, run = train_gpt.read_env(ready.started("train_gpt.py")[0]["env"])
    assert run.ttt_chunk_tokens <= 128


def test_scoring_an_artifact_does_not_take_the_name_of_the_small_run(ready):
    ready.run(ARTIFACT="logs/small.ptz")
    assert "RUN_ID" not in ready.started("train_gpt.py")[0]["env"]


def test_gpus_without_data_still_mean_the_small_run(ready):
    done = ready.run(STUB_GPUS=8)
    assert re.fullmatch(r"run.sh: small run with \S+: found no data in \S+\n", done.stderr)
    assert len(ready.started("train_gpt.py")) == 1 and ready.started("torchrun") == []


@pytest.mark.parametrize("given", [False, True])
def test_gpus_and_data_mean_the_full_run_on_all_of_them(ready, given):
    default = train_gpt.RunConfig().data_path
    ready.write(("elsewhere" if given else default) + "/fineweb_train_000000.bin")
    done = ready.run(STUB_GPUS=8, **({"DATA_PATH": "elsewhere"} if given else {}))
    assert done.stderr == f"run.sh: full run on 8 GPU(s) with {'elsewhere' if given else default}\n"
    (call,) = ready.started("torchrun")
    assert call["args"] == ["--standalone", "--nproc_per_node=8", "train_gpt.py"]
    assert "ITERATIONS" not in call["env"] and ready.started("prepare.py") == []


def test_under_nohup_torchrun_is_told_to_leave_sighup_ignored(ready):
    """It would else end the run when the terminal closes."""
    ready.nohup = True
    ready.run(STUB_GPUS=8, DATA_PATH="elsewhere")
    (call,) = ready.started("torchrun")
    assert call["args"][2:] == ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT", "train_gpt.py"]


def test_one_gpu_needs_no_torchrun(ready):
    ready.run(STUB_GPUS=1, DATA_PATH="elsewhere")
    (entry,) = ready.started("train_gpt.py")
    assert "ITERATIONS" not in entry["env"] and ready.started("torchrun") == []


@pytest.mark.parametrize("gpus", [0, 8])
def test_check_setup_is_told_what_the_run_would_be(ready, gpus):
    env = {"STUB_GPUS": gpus} | ({"DATA_PATH": "elsewhere"} if gpus else {})
    ready.run("check-setup", **env)
    (entry,) = ready.started("torchrun" if gpus else "train_gpt.py")
    assert entry["args"][-1] == "--check-setup" and ("--nproc_per_node=8" in entry["args"]) == (gpus == 8)
    assert ("ITERATIONS" in entry["env"]) == (gpus == 0)


# ---- the tests

SPREAD = ["-n", "auto", "--dist", "worksteal"]


@pytest.mark.parametrize(
    "arguments, passed, linted",
    [
        ([], SPREAD, True),
        (["slow"], [*SPREAD, "-m", "slow"], False),
        (["all", "-x"], [*SPREAD, "-m", "slow or not slow", "-x"], True),
        (["tests/test_pack.py", "-k", "a b"], ["tests/test_pack.py", "-k", "a b"], False),
    ],
)
def test_test_tiers(ready, arguments, passed, linted):
    assert ready.run("test", *arguments).returncode == 0
    assert [call["args"] for call in ready.started("pytest")] == [passed]
    assert [call["args"][0] for call in ready.started("ruff")] == ["check", "format"] * linted


def test_ruff_and_pytest_can_each_fail_and_both_are_run(ready):
    assert ready.run("test", STUB_RUFF_STATUS=1).returncode == 1
    assert len(ready.started("pytest")) == 1
    assert ready.run("test", STUB_PYTEST_STATUS=3).returncode == 3


# ---- packages


def test_packages_are_installed_once(machine):
    done = machine.run()
    assert done.returncode == 0 and "installing requirements.txt into .venv" in done.stderr
    assert machine.installed() == ["torch", "numpy", "sentencepiece", "zstandard"]
    assert machine.run().returncode == 0
    assert machine.started("pip") == machine.started("venv") == []


def test_changed_requirements_are_installed(machine):
    machine.run()
    with open(machine.folder / "requirements.txt", "a") as file:
        file.write("another==1.0\n")
    machine.run()
    assert machine.started("venv") == [] and "another" in machine.installed()
    machine.run()
    assert machine.started("pip") == []


def test_what_the_tests_need_comes_on_top(machine):
    machine.run()
    assert machine.run("test").returncode == 0
    assert machine.started("venv") == []
    assert set(machine.installed()) >= {"pytest", "hypothesis", "ruff", "triton", "matplotlib"}


def test_an_incomplete_installation_is_made_anew(machine):
    failed = machine.run(STUB_PIP_STATUS=1)
    assert failed.returncode == 1 and "could not install requirements.txt" in failed.stderr
    assert machine.started("train_gpt.py") == []
    leftover = machine.write(".venv/lib/python3/site-packages/half.py")
    assert machine.run().returncode == 0
    assert len(machine.started("venv")) == 1 and not leftover.exists()
    machine.run(
        "test", STUB_PIP_STATUS=1
    )  # the copy of requirements.txt is in place, but something may be half installed
    machine.run()
    assert len(machine.started("venv")) == 1


def test_an_installation_in_progress_is_left_alone(machine):
    machine.write(".venv/installing", str(os.getpid()))
    done = machine.run()
    assert done.returncode == 1 and f"process {os.getpid()} is installing" in done.stderr
    assert machine.started("venv") == []


def test_torch_comes_from_the_given_index(machine):
    machine.run(TORCH_INDEX_URL="https://example.org/cpu")
    first, second = (call["args"] for call in machine.started("pip"))
    assert first[-3:] == ["--index-url", "https://example.org/cpu", "torch==2.13.0"]
    assert second[-2:] == ["-r", "requirements.txt"]


def test_a_torch_that_is_there_is_kept_and_only_the_rest_installed(machine):
    machine.has_packages("numpy", "sentencepiece")
    machine.run(STUB_TORCH="2.11.0")
    assert machine.installed() == ["zstandard"]
    assert "--system-site-packages" in machine.started("venv")[0]["args"]
    assert "site-packages" in (machine.folder / ".venv/lib/python3/site-packages/shared.pth").read_text()
    machine.run(STUB_TORCH="2.11.0", PYTHON=machine.python)
    assert machine.started("pip") == []


def test_a_plugin_that_is_not_there_is_installed(ready):
    (ready.folder / "stubs/xdist.py").unlink()
    ready.run("test")
    assert "pytest-xdist==" in (ready.folder / "installed.txt").read_text()
    assert ready.installed() == ["pytest"] and len(ready.started("pytest")) == 1
    shutil.rmtree(ready.folder / ".venv")


def test_a_torch_that_is_too_old_is_not_used(machine):
    machine.run(STUB_TORCH="2.10.1")
    assert "torch" in machine.installed()


def test_another_interpreter_gets_a_venv_of_its_own(machine):
    machine.run()
    made_from = machine.folder / ".venv/made-from"
    made_from.write_text(made_from.read_text().replace("(3, ", "(2, "))
    assert machine.run(PYTHON=machine.python).returncode == 0
    assert len(machine.started("venv")) == 1


def test_the_chosen_interpreter_is_remembered(machine):
    machine.run(PYTHON=machine.python)
    assert sys.executable in (machine.folder / ".venv/made-from").read_text()
    machine.env["PATH"] = f"{machine.write('old/python3', OLD_PYTHON).parent}:{machine.env['PATH']}"
    machine.run("test")
    assert len(machine.started("pytest")) == 1


def test_a_venv_is_not_made_from_itself(machine):
    machine.run()
    machine.write("requirements-dev.txt", "another==1.0\n")
    assert machine.run("test", PYTHON=".venv/bin/python").returncode == 0
    assert machine.started("venv") == [] and machine.installed() == ["another"]


def test_a_venv_made_by_hand_is_filled_even_if_it_is_active(machine):
    made_by_hand = machine.write(".venv/bin/python", '#!/bin/sh\nSTUB_TORCH=2.13.0 exec "$STUB_PYTHON" "$@"\n')
    made_by_hand.with_name("python3").write_text("#!/bin/sh\nexit 1\n")
    made_by_hand.with_name("python3").chmod(0o755)
    assert machine.run(PATH=f"{made_by_hand.parent}:{machine.env['PATH']}").returncode == 0
    assert machine.started("venv") == [] and "torch" in machine.installed()


def test_no_python_or_an_old_one_is_refused(machine):
    old = machine.write("bin/old", OLD_PYTHON)
    done = machine.run(PYTHON=old)
    assert done.returncode == 2 and f"{old} is Python 3.10.12, which is too old" in done.stderr
    broken = machine.write("bin/broken", "#!/bin/sh\necho no version is set >&2; exit 127\n")
    done = machine.run(PYTHON=broken)
    assert done.returncode == 2 and f"no version is set\nrun.sh: {broken} does not run: install" in done.stderr
    done = machine.run(PYTHON="/nowhere/python3")
    assert done.returncode == 2 and "found no /nowhere/python3" in done.stderr


# ---- for real


@pytest.mark.slow
@pytest.mark.longest
def test_the_small_run_from_a_fresh_copy(tmp_path):
    """Real data, training, packing and scoring, with the interpreter of the tests; twice, to see what is reused."""
    copy = tmp_path / "a copy"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "datasets", "tokenizers", "logs")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    env = {name: value for name, value in os.environ.items() if name not in MACHINE}
    env |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}

    def run(**settings: str) -> str:
        with open(copy / "output.txt", "w+") as output:
            process = subprocess.Popen(
                ["./run.sh"], cwd=copy, env=env | settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            deadline = threading.Timer(600, process.terminate)
            deadline.start()
            _, status, usage = os.wait4(process.pid, 0)
            deadline.cancel()
            output.seek(0)
            text = output.read()
        assert status == 0, text[-4000:]
        assert usage.ru_maxrss * 1024 < 3e9
        return text

    little = dict(ITERATIONS="2", WARMUP_STEPS="1", TRAIN_BATCH_TOKENS="4096")
    first = run(HOLDOUT_TOKENS="4096", GRAD_RMS_TOKENS="2048", EVAL_STRIDE="512", **little)
    assert any(line.startswith("result ") for line in first.splitlines()[-5:]), first[-4000:]
    shards = {path: path.stat().st_mtime_ns for path in (copy / "data/datasets/installed").iterdir()}
    run(ARTIFACT="logs/small.ptz", TTT_ENABLED="0", EVAL_STRIDE="512", RUN_ID="second")
    assert {path: path.stat().st_mtime_ns for path in (copy / "data/datasets/installed").iterdir()} == shards
    assert not (copy / ".venv").exists()
