"""One property of an audit: an evaluation opens nothing but the artifact, the tokenizer and the validation data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import train_gpt
from data import prepare
from tools import audit_hook
from tools.audit import TOLERANCE_BPB, Audit, Seen, joined
from tools.processes import ends_with_its_parent
from tools.recount import has_sidecar

INSTALLED = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/sys", sys.prefix, sys.base_prefix)
LIBRARIES = [os.path.realpath(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if name]
PYTHONPATH = [os.path.realpath(name) for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "zstandard")  # that the entry may import
DEVICES = r"/dev/(null|zero|u?random|shm/.*%s)"
STARTS = ("subprocess.Popen", "os.posix_spawn")
COMPILERS = ("cc", "gcc", "clang", "ptxas", "ldconfig", "file")  # programs that Triton starts
HANDED_DOWN = r"/proc/[^/]+/(task/[^/]+/)?(fd|fdinfo|map_files|mem|root|cwd)(/.*)?"  # what another process has open


def artifact_alone(audit: Audit) -> Seen:
    """A process given only program, artifact, tokenizer and validation data scores the same and opens nothing else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.path.realpath(name))
        env = lay_out(audit, folder)
        report = folder / "opened.json"
        there = sorted(path.name for path in folder.iterdir())
        source = Path(audit_hook.__file__).read_text(encoding="utf-8")
        script = [sys.executable, "-c", source, str(folder / "train_gpt.py"), str(report)]
        done = subprocess.run(
            script,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            preexec_fn=ends_with_its_parent(),
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [f"the evaluation ends with status {done.returncode}: {last}"], ""
        opened = json.loads(report.read_text())
        result = json.loads((folder / "logs" / "prove.json").read_text())
    compiles = audit.dist.device.type == "cuda"
    used = [name for name in there if str(folder / name) in opened]
    faults = [f"it opened {path}" for path in opened if not expected(path, folder, compiles)]
    seen = f"val_bpb {result['val_bpb']:.5f} of {len(audit.texts)} documents again, from {', '.join(used)}"
    return faults + wrong_result(audit, result), seen


def lay_out(audit: Audit, folder: Path) -> dict[str, str]:
    """Copy everything an evaluation of the sample may need into a folder; returns the environment to run it in."""
    whole = joined(audit.texts)
    setup = audit.opened.setup
    shutil.copyfile(train_gpt.__file__, folder / "train_gpt.py")
    shutil.copyfile(setup.run.artifact, folder / "artifact.ptz")
    shutil.copyfile(setup.tokenizer.path, folder / "tokenizer.model")
    prepare.write_shard(folder / "fineweb_val_000000.bin", [whole.tokens])
    if has_sidecar(audit):
        prepare.write_shard(folder / "fineweb_val_bytes_000000.bin", [whole.bytes])
    return audit.opened.env | {
        "ARTIFACT": str(folder / "artifact.ptz"),
        "DATA_PATH": str(folder),
        "TOKENIZER_PATH": "tokenizer.model",
        "RUN_ID": "prove",
        "PYTHONPATH": elsewhere(audit.opened.env.get("PYTHONPATH", "")),
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def elsewhere(folders: str) -> str:
    """PYTHONPATH without this repository: not all of its code counts towards the size limit."""
    here = Path(audit_hook.__file__).resolve().parent.parent
    found = [Path(folder).resolve() for folder in folders.split(os.pathsep) if folder]
    return os.pathsep.join(str(folder) for folder in found if folder != here)


def expected(path: str, folder: Path, compiles: bool) -> bool:
    """Whether an evaluation may open this path: it is in its folder, or belongs to what is installed. Three exceptions:
    Python runs `uname` to name the platform; on a GPU, compilers run, and they call `file` on Python; and torch looks
    for plug-ins in all packages."""
    if path.startswith(audit_hook.GOES_OUTSIDE):
        event, _, arguments = path.partition(": ")
        program = Path((arguments.split("'") + [""])[1]).name
        return event in STARTS and (program == "uname" or (compiles and program in COMPILERS))
    if Path(path).name.startswith("fineweb_train_"):
        return False
    if re.fullmatch(HANDED_DOWN, path):
        return False
    torch_folder = Path(torch.__file__).resolve().parent.parent
    installed = any(Path(path).is_relative_to(os.path.realpath(root)) for root in (folder, torch_folder, *INSTALLED))
    library = ".so" in Path(path).suffixes and str(Path(path).parent) in LIBRARIES
    devices = DEVICES % ("|nvidia.*" if compiles else "")
    return installed or library or of_package(path) or bool(re.fullmatch(devices, path))


def of_package(path: str) -> bool:
    """Whether this path is on PYTHONPATH and belongs to one of PACKAGES, or is the entry_points.txt of any package."""
    for folder in PYTHONPATH:
        if Path(path).is_relative_to(folder):
            top, *rest = Path(path).relative_to(folder).parts
            return top in PACKAGES or (top.endswith(".dist-info") and rest == ["entry_points.txt"])
    return False


def wrong_result(audit: Audit, result: dict) -> list[str]:
    """Faults in the result of an evaluation of the sample."""
    whole = joined(audit.texts)
    size = int(whole.bytes[1:].sum())
    truth = {"documents": len(audit.texts), "tokens": len(whole.tokens) - 1, "bytes": size, "degraded_documents": 0}
    faults = [f"{name} is {result[name]}, counted {value}" for name, value in truth.items() if result[name] != value]
    bpb = float(audit.together.nats.sum()) / math.log(2) / size
    if not abs(result["val_bpb"] - bpb) <= TOLERANCE_BPB:
        faults.append(f"val_bpb is {result['val_bpb']:.7f}, what is booked adds up to {bpb:.7f}")
    return faults
