"""Every knob is parsed, checked and printed back; what is misspelt, impossible or without effect is refused."""

import dataclasses
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from train_gpt import ConfigError, ModelConfig, RunConfig, read_env

KNOBS = {f.name.upper(): (f, get_type_hints(kind)[f.name]) for kind in (ModelConfig, RunConfig) for f in fields(kind)}
NUMBERS = [name for name, (_, kind) in KNOBS.items() if kind in (int, float)]
NEEDS = {  # without which a knob has no effect
    "TTT_MOMENTUM": {"TTT_OPTIMIZER": "sgd"},
    "TTT_BETA1": {"TTT_OPTIMIZER": "adamw"},
    "TTT_BETA2": {"TTT_OPTIMIZER": "adamw"},
    "TTT_RMS_FLOOR": {"TTT_OPTIMIZER": "rms"},
    "TTT_WEIGHT_DECAY": {"TTT_OPTIMIZER": "sgd"},
    "TTT_NS_STEPS": {"TTT_OPTIMIZER": "sgd"},
    "TTT_BATCH_DOCS": {"TTT_PARAMS": "lora"},
    "TTT_LORA_RANK": {"TTT_PARAMS": "lora"},
    "TTT_LORA_ALPHA": {"TTT_PARAMS": "lora"},
    "TTT_LORA_TARGETS": {"TTT_PARAMS": "lora"},
    "TTT_FREEZE_BLOCKS": {"TTT_PARAMS": "full"},
    "TTT_LR_MULT_MLP_OUT": {"TTT_PARAMS": "full"},
    "TTT_LR_MULT_IN": {"TTT_PARAMS": "full"},
}
OTHER_DEFAULTS = {"full": "TTT_PARAMS=full", "rms": "TTT_OPTIMIZER=rms"}
SUITABLE = {  # values of other knobs that the changed value of this one needs
    "ARTIFACT": {},
    "LOOP_START": {"LOOP_END": "9"},
    "TRAIN_BATCH_TOKENS": {"TRAIN_ROW_TOKENS": "8"},
    "MICRO_BATCH_TOKENS": {"TRAIN_BATCH_TOKENS": "8192", "TRAIN_ROW_TOKENS": "8"},
    "EVAL_SEQ_LEN": {"EVAL_STRIDE": "8"},
    "TTT_ENTROPY_LOW": {"TTT_ENTROPY_HIGH": "99"},
}
OTHER_VALUES = {
    "MODEL_DIM": "1024",
    "NUM_HEADS": "16",
    "NUM_KV_HEADS": "1",
    "NUM_LAYERS": "12",
    "ROPE_DIMS": "8",
    "ATTN_GATE_WIDTH": "8",
    "SMEAR_WIDTH": "8",
    "LOOP_START": "4",
    "LOOP_END": "6",
    "TTT_LORA_TARGETS": "v,head",
    "TTT_LATE_CHUNK_TOKENS": "100",
    "TRAIN_BATCH_TOKENS": "65_536",
    "TRAIN_ROW_TOKENS": "1024",
    "MICRO_BATCH_TOKENS": "32_768",
    "EVAL_SEQ_LEN": "1024",
    "EVAL_STRIDE": "64",
    "MUON_NS_STEPS": "4",
    "TTT_CHUNK_TOKENS": "64",
    "TTT_ENTROPY_LOW": "0.5",
}


def other_value(name: str) -> str:
    """A valid value that is not the default."""
    field, kind = KNOBS[name]
    meta = field.metadata
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if get_args(kind):
        return next(choice for choice in get_args(kind) if choice != meta["default"])
    if kind is str:
        return "some where/else"
    raised = meta["default"] + 1 if kind is int else meta["default"] * 0.75 + 0.001
    return str(raised if meta["high"] is None or raised <= meta["high"] else meta["default"] - 1)


def value_of(configs: tuple[ModelConfig, RunConfig], name: str):
    return next(vars(c)[name.lower()] for c in configs if name.lower() in vars(c))


def needed(name: str) -> dict[str, str]:
    return NEEDS.get(name, {}) | SUITABLE.get(name, {})


def refusal(env: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as error:
        read_env(env)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- parsing ----------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_is_parsed_and_changes_its_own_field(name):
    text, kind = other_value(name), KNOBS[name][1]
    before, after = read_env(needed(name)), read_env(needed(name) | {name: text})
    value = value_of(after, name)
    assert value == (text if get_args(kind) or kind is str else kind(text)) != value_of(before, name)
    assert type(value) is (str if get_args(kind) else kind)
    following = {
        "ttt_params",
        "ttt_scope",
        "ttt_optimizer",
        "artifact",
        "grad_rms_tokens",
    }  # other defaults depend on these
    for old, new in zip(before, after, strict=True):
        changed = {n for n in vars(old) if vars(old)[n] != vars(new)[n]}
        assert changed <= {name.lower()} or name.lower() in following


def test_defaults_are_what_an_empty_environment_gives():
    model, run = read_env({})
    assert (model, run) == (ModelConfig(), RunConfig())
    for name, (field, _) in KNOBS.items():
        default = field.metadata["default"] if field.metadata["rms"] is None else field.metadata["rms"]
        expected = "rms" if name == "TTT_OPTIMIZER" else default  # gradients are measured
        assert value_of((model, run), name) == expected, name


def test_defaults_lie_in_their_own_range_and_have_a_doc_line():
    for name, (field, kind) in KNOBS.items():
        meta = field.metadata
        assert meta["doc"] and "\n" not in meta["doc"], name
        for default in (meta["default"], meta["full"], meta["rms"]):
            if default is not None and kind is not str:
                assert train_gpt.parse_knob(name, str(default), kind, meta) == default, name


def test_configs_cannot_be_changed():
    for config in read_env({}):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seed = 1


# ---- bad values -------------------------------------------------------------


def bad_values(name: str) -> list[tuple[str, str]]:
    """(text, expectation in the message)"""
    field, kind = KNOBS[name]
    meta = field.metadata
    if get_args(kind):
        return [("neither", " | ".join(get_args(kind))), ("", " | ".join(get_args(kind)))]
    if kind is str:
        return []
    what = "a whole number" if kind is int else "a number"
    bad = [("four", what), ("", what), ("1e", what), ("0x10", what)]
    bad += [("1.5", what), ("True", what)] if kind is int else [("nan", "a finite number"), ("inf", "a finite number")]
    high = train_gpt.MAX_KNOB if meta["high"] is None else meta["high"]
    return [*bad, (str(meta["low"] - 1), f"at least {meta['low']}"), (str(high + 1), f"at most {high}")]


@pytest.mark.parametrize("name", KNOBS)
def test_a_bad_value_is_refused_with_name_value_doc_and_expectation(name):
    for text, expected in bad_values(name):
        message = refusal(needed(name) | {name: text})
        assert f"{name}={text!r}" in message and KNOBS[name][0].metadata["doc"] in message
        assert message.endswith("expected " + expected)


@given(st.sampled_from(NUMBERS), st.text(max_size=12))
def test_any_text_becomes_a_number_in_range_or_a_config_error(name, text):
    field, kind = KNOBS[name]
    try:
        value = train_gpt.parse_knob(name, text, kind, field.metadata)
    except ConfigError as error:
        assert name in str(error)
    else:
        low, high = field.metadata["low"], field.metadata["high"]
        assert type(value) is kind and low <= value <= (train_gpt.MAX_KNOB if high is None else high)


@pytest.mark.parametrize("text", ["0", "-0", "-0.0", "0e5"])
def test_equal_values_are_written_alike(text):
    """Sweeps and records tell runs apart by what is written."""
    _, run = read_env({"EVAL_SECONDS": text})
    assert train_gpt.settings(run)["EVAL_SECONDS"] == "0.0"


@pytest.mark.parametrize("path", ["a\tb", "a\nb", "a\u00a0b", "a\udcffb"])
def test_a_text_that_is_no_line_is_refused(path):
    """No tool would read the result of such a run."""
    for name in ("DATA_PATH", "TOKENIZER_PATH", "ARTIFACT", "RESUME"):
        assert refusal({name: path}).startswith(f"{name}={path!r}: ")
    read_env({"DATA_PATH": "ein Ordner/für $Texte"})


@pytest.mark.parametrize(
    "env, mentioned",
    [
        ({"MODEL_DIM": "501"}, ("MODEL_DIM=501", "NUM_HEADS=8")),
        ({"NUM_KV_HEADS": "3"}, ("NUM_HEADS=8", "NUM_KV_HEADS=3")),
        ({"ROPE_DIMS": "7"}, ("ROPE_DIMS=7",)),
        ({"ROPE_DIMS": "66"}, ("ROPE_DIMS=66", "64")),
        ({"SMEAR_WIDTH": "513"}, ("SMEAR_WIDTH=513", "MODEL_DIM=512")),
        ({"ATTN_GATE_WIDTH": "513"}, ("ATTN_GATE_WIDTH=513", "MODEL_DIM=512")),
        ({"LOOP_END": "11"}, ("LOOP_START=3", "LOOP_END=11")),
        ({"LOOP_START": "6"}, ("LOOP_START=6", "LOOP_END=5")),
        ({"NUM_LAYERS": "4"}, ("LOOP_END=5", "4 blocks", "NUM_LOOPS=0")),
        ({"MAX_WALLCLOCK_SECONDS": "0"}, ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")),
        ({"TRAIN_BATCH_TOKENS": "1000"}, ("TRAIN_BATCH_TOKENS=1000", "TRAIN_ROW_TOKENS=32768")),
        ({"MICRO_BATCH_TOKENS": "64"}, ("MICRO_BATCH_TOKENS=64", "TRAIN_ROW_TOKENS=32768")),
        ({"EVAL_SEQ_LEN": "256"}, ("EVAL_STRIDE=512", "EVAL_SEQ_LEN=256")),
        ({"ARTIFACT": "a", "RESUME": "b"}, ("ARTIFACT", "RESUME")),
    ],
)
def test_values_that_do_not_go_together_are_refused(env, mentioned):
    message = refusal(env)
    assert all(part in message for part in mentioned), message


# ---- unknown names ----------------------------------------------------------


def one_edit_away(a: str, b: str) -> bool:
    return any(a == b[:i] + b[i + 1 :] or b == a[:i] + a[i + 1 :] for i in range(max(len(a), len(b))))


@pytest.mark.parametrize("name", ["ARTIFACTS", "COMPILER"])
def test_names_that_build_tools_set_are_left_to_them(name):
    read_env({name: "gcc"})


@pytest.mark.parametrize("name", KNOBS)
def test_a_misspelt_name_is_refused_with_a_nearest_name(name):
    misspelt = {name + "S", name.replace("_", "", 1)} | ({name[:-1], name[:2] + name[3:]} if len(name) > 4 else set())
    for wrong in misspelt - set(KNOBS) - {"ARTIFACTS"}:
        message = refusal({wrong: "1"})
        assert message.startswith(f"{wrong} is not a knob")
        named = message.partition("did you mean ")[2].partition("?")[0]
        assert named in KNOBS and one_edit_away(wrong, named), message
        assert "--help" in message


@pytest.mark.parametrize("name", KNOBS)
def test_a_name_in_other_letters_is_refused_unless_the_knob_itself_is_set(name):
    """Unless refused, `ttt_lr=1e-3 ./run.sh` would score with the default rate."""
    for wrong in (name.lower(), name.title()):
        assert refusal({wrong: "1"}).startswith(f"{wrong} is not a knob; did you mean {name}?")
    read_env({"seed": "7", "SEED": "7"})


@pytest.mark.parametrize("name", KNOBS)
def test_a_slip_of_the_finger_is_refused_however_short_the_name(name):
    """A wrong letter, as in TTL_LR, or two in the wrong order."""
    slips = {name[:i] + "Q" + name[i + 1 :] for i in range(len(name))}
    slips |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
    for wrong in slips - set(KNOBS):
        assert refusal({wrong: "1"}).startswith(f"{wrong} is not a knob; did you mean ")


@pytest.mark.parametrize(
    "name, near",
    [
        ("SED", "SEED"),
        ("WARMDOWN_ITERS", "WARMDOWN_FRAC"),
        ("EMA_DECAY", ""),
        ("TIED_EMBED_LR", ""),
        ("LQER_RANK", ""),
        ("TTT_RANK", "TTT_LORA_RANK"),
        ("TTT_CHUNK_SIZE", "TTT_CHUNK_TOKENS"),
        ("MUON_BACKEND_STEPS", "MUON_NS_STEPS"),
        ("MUON_MOMENTUM_WARMUP_STEPS", "MUON_MOMENTUM_WARMUP_FRAC"),
        ("ROPE_TRAIN_SEQ_LEN", "TRAIN_SEQ_LEN"),
        ("GPTQ_RESERVE_SECONDS", "EVAL_SECONDS"),
        ("SMEAR_GATE", "SMEAR_WIDTH"),
        ("EVAL_INCLUDE_EOS", None),
    ],
)
def test_a_retired_or_foreign_name_of_our_families_is_refused(name, near):
    message = refusal({name: "1"})
    assert message.startswith(f"{name} is not a knob; did you mean ")
    assert near is None or near in message


@pytest.mark.parametrize("name", train_gpt.RETIRED)
def test_a_retired_knob_is_refused_with_what_replaces_it(name):
    message = refusal({name: "5"})
    assert message.startswith(f"{name} is retired: ") and "ARTIFACT_BYTES" in message and name not in KNOBS


# Every name that begins so is refused unless it is a knob. The derived families may grow, but not lose one of these.
FAMILIES = """TTT_ MUON_ GPTQ_ QUANT_ XSA_ ROPE_ LOOP_ SMEAR_ ATTN_GATE_ UNET_ EVAL_ EMA_ EMBED_ MATRIX_ SCALAR_
    WARMDOWN_ GRAD_CLIP QK_ LOGIT_ MLP_ TIED_ TIE_ HEAD_LR PHASED_TTT LQER_ VAL_""".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_begins_like_our_knobs_is_refused(family):
    assert refusal({family + "ZZZZZZZZZZ": "1"}).startswith(f"{family}ZZZZZZZZZZ is not a knob")


FOREIGN = """PATH HOME LANG LC_ALL TERM SHELL USER LOGNAME PWD OLDPWD SHLVL EDITOR PAGER DISPLAY HOSTNAME TMPDIR TZ _
    CUDA_VISIBLE_DEVICES CUDA_HOME NCCL_DEBUG NCCL_P2P_DISABLE OMP_NUM_THREADS OMP_WAIT_POLICY MKL_NUM_THREADS MAX_JOBS
    MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK TORCHELASTIC_RUN_ID
    TORCH_LOGS TORCH_INDEX_URL PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED VIRTUAL_ENV LD_LIBRARY_PATH LD_PRELOAD
    DATA_DIR MODEL_PATH NUM_WORKERS RUN_URL MIN_VERSION ENABLE_LOGGING PARALLEL_SEQ TOKENIZERS_PARALLELISM
    HF_HOME HF_TOKEN HF_HUB_OFFLINE HF_DATASETS_CACHE TRANSFORMERS_CACHE WANDB_MODE WANDB_API_KEY
    SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_STEP_ID SLURM_JOB_NODELIST SLURM_GPUS
    KUBERNETES_PORT KUBERNETES_SERVICE_HOST KUBECONFIG POD_NAME POD_IP NODE_NAME JOB_ID TASK_ID TTY GPG_TTY SSH_TTY
    NCCL_IB_DISABLE NCCL_SOCKET_IFNAME NCCL_NVLS_ENABLE CUDA_PATH CUDA_LAUNCH_BLOCKING CUDA_DEVICE_ORDER CUDA_CACHE_PATH
    OMP_SCHEDULE OMP_PROC_BIND KMP_AFFINITY NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES GOMP_CPU_AFFINITY
    TORCH_HOME TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR TORCH_COMPILE_DEBUG PYTORCH_CUDA_ALLOC_CONF PYTORCH_VERSION
    MAIL MANPATH VISUAL BROWSER SUDO_USER SUDO_UID WINDOWID TMUX TMUX_PANE STY PS1 PS2 IFS UID EUID PPID BASH HISTSIZE
    HISTFILE RANDOM SECONDS LINENO COLORTERM TERM_PROGRAM LS_COLORS LANGUAGE LC_CTYPE LC_NUMERIC DEBUG VERBOSE QUIET
    MAKEFLAGS MAKELEVEL LDFLAGS CPPFLAGS CXXFLAGS ARCH HOST PORT USERNAME PASSWORD TOKEN REGION STAGE MODE LEVEL SPACE
    FEATURE BATCH EPOCHS STEPS LR ALPHA GAMMA DELTA THETA WORKERS THREADS NODES CLUSTER QUEUE PARTITION ACCOUNT
    SSH_CLIENT SSH_CONNECTION XDG_RUNTIME_DIR TRITON_CACHE_DIR CI
    TORCHINDUCTOR_CACHE_DIR CONDA_PREFIX PIP_INDEX_URL HTTP_PROXY NO_PROXY CC CXX CFLAGS LESS COLUMNS LINES""".split()


def test_foreign_variables_are_left_alone():
    env = dict.fromkeys(FOREIGN, "nonsense")
    assert read_env(env | {"SEED": "7"}) == (ModelConfig(), RunConfig(seed=7))
    assert env == dict.fromkeys(FOREIGN, "nonsense")


# ---- test-time training -----------------------------------------------------

LORA_STREAM = {"TTT_PARAMS": "lora", "TTT_SCOPE": "stream"}


@pytest.mark.parametrize(
    "env, mentioned",
    [
        ({"TTT_PARAMS": "full", "TTT_LORA_RANK": "8"}, ("TTT_LORA_RANK", "TTT_PARAMS=lora")),
        ({"TTT_PARAMS": "full", "TTT_LORA_ALPHA": "8"}, ("TTT_LORA_ALPHA", "TTT_PARAMS=lora")),
        ({"TTT_PARAMS": "full", "TTT_LORA_TARGETS": "q"}, ("TTT_LORA_TARGETS", "TTT_PARAMS=lora")),
        ({"TTT_PARAMS": "full", "TTT_BATCH_DOCS": "8"}, ("TTT_BATCH_DOCS", "TTT_PARAMS=lora")),
        (LORA_STREAM | {"TTT_BATCH_DOCS": "8"}, ("TTT_BATCH_DOCS", "TTT_SCOPE")),
        ({"TTT_FREEZE_BLOCKS": "1"}, ("TTT_FREEZE_BLOCKS", "TTT_PARAMS=full")),
        ({"TTT_LR_MULT_MLP_OUT": "1"}, ("TTT_LR_MULT_MLP_OUT", "TTT_PARAMS=full")),
        ({"TTT_LR_MULT_IN": "1"}, ("TTT_LR_MULT_IN", "TTT_PARAMS=full")),
        ({"TTT_MOMENTUM": "0.9"}, ("TTT_MOMENTUM", "TTT_OPTIMIZER=sgd")),
        ({"TTT_PARAMS": "full", "TTT_BETA1": "0.9"}, ("TTT_BETA1", "TTT_OPTIMIZER=adamw")),
        ({"TTT_OPTIMIZER": "sgd", "TTT_BETA2": "0.9"}, ("TTT_BETA2", "TTT_OPTIMIZER=adamw")),
        ({"GRAD_RMS_TOKENS": "4096", "TTT_BETA2": "0.9"}, ("TTT_BETA2", "TTT_OPTIMIZER=adamw")),
        ({"GRAD_RMS_TOKENS": "4096", "TTT_WEIGHT_DECAY": "0.5"}, ("TTT_WEIGHT_DECAY", "TTT_OPTIMIZER=sgd or adamw")),
        (
            {"TTT_OPTIMIZER": "rms", "GRAD_RMS_TOKENS": "4096", "TTT_NS_STEPS": "5"},
            ("TTT_NS_STEPS", "TTT_OPTIMIZER=sgd or adamw"),
        ),
        ({"TTT_OPTIMIZER": "adamw", "TTT_RMS_FLOOR": "0.5"}, ("TTT_RMS_FLOOR", "TTT_OPTIMIZER=rms")),
        (
            {"TTT_OPTIMIZER": "rms", "GRAD_RMS_TOKENS": "4096", "TTT_SCOPE": "stream"},
            ("TTT_OPTIMIZER=rms", "TTT_SCOPE=document"),
        ),
        (
            {"TTT_OPTIMIZER": "rms", "GRAD_RMS_TOKENS": "4096", "TTT_PARAMS": "full"},
            ("TTT_OPTIMIZER=rms", "TTT_PARAMS=lora"),
        ),
        ({"TTT_OPTIMIZER": "rms", "GRAD_RMS_TOKENS": "0"}, ("TTT_OPTIMIZER=rms", "GRAD_RMS_TOKENS=0")),
        (
            {"TTT_OPTIMIZER": "rms", "GRAD_RMS_TOKENS": "4096", "TTT_LORA_ALPHA": "0"},
            ("TTT_OPTIMIZER=rms", "TTT_LORA_ALPHA=0"),
        ),
        ({"TTT_CHUNK_TOKENS": "4096"}, ("TTT_CHUNK_TOKENS=4096", "EVAL_SEQ_LEN=3072")),
        ({"TTT_ENTROPY_LOW": "3", "TTT_ENTROPY_HIGH": "2"}, ("TTT_ENTROPY_LOW=3", "TTT_ENTROPY_HIGH=2")),
        (LORA_STREAM | {"TTT_MIN_DOC_TOKENS": "8"}, ("TTT_MIN_DOC_TOKENS", "TTT_SCOPE=document")),
        ({"TTT_LORA_TARGETS": "q,w"}, ("TTT_LORA_TARGETS='q,w'", "q,k,v,o,mlp,head")),
        ({"TTT_LORA_TARGETS": ""}, ("TTT_LORA_TARGETS=''", "q,k,v,o,mlp,head")),
    ],
)
def test_ttt_knobs_that_contradict_each_other_are_refused(env, mentioned):
    message = refusal(env)
    assert all(part in message for part in mentioned), message


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, dict(ttt_optimizer="rms", ttt_lr=8e-5, ttt_epochs=1, ttt_chunk_tokens=16)),
        ({"TTT_OPTIMIZER": "auto"}, dict(ttt_optimizer="rms", ttt_lr=8e-5)),
        ({"TTT_OPTIMIZER": "adamw"}, dict(ttt_optimizer="adamw", ttt_lr=1e-4)),
        ({"GRAD_RMS_TOKENS": "0"}, dict(ttt_optimizer="adamw", ttt_lr=1e-4)),
        ({"TTT_SCOPE": "stream"}, dict(ttt_optimizer="adamw", ttt_lr=1e-4)),
        ({"ARTIFACT": "a.ptz"}, dict(ttt_optimizer="auto", ttt_lr=None)),
        ({"ARTIFACT": "a.ptz", "TTT_LR": "3e-4"}, dict(ttt_optimizer="auto", ttt_lr=3e-4)),
        ({"ARTIFACT": "a.ptz", "TTT_OPTIMIZER": "rms"}, dict(ttt_optimizer="rms", ttt_lr=8e-5)),
        ({"ARTIFACT": "a.ptz", "TTT_PARAMS": "full"}, dict(ttt_optimizer="sgd", ttt_lr=0.005)),
        (
            {"TTT_PARAMS": "full"},
            dict(
                ttt_optimizer="sgd",
                ttt_lr=0.005,
                ttt_epochs=3,
                ttt_chunk_tokens=32768,
                ttt_momentum=0.9,
                ttt_freeze_blocks=2,
                ttt_lr_mult_mlp_out=3.0,
                ttt_lr_mult_in=0.5,
            ),
        ),
        (
            {"TTT_PARAMS": "full", "TTT_EPOCHS": "10", "TTT_OPTIMIZER": "adamw"},
            dict(ttt_optimizer="adamw", ttt_lr=0.005, ttt_epochs=10),
        ),
    ],
)
def test_defaults_follow_what_adapts(env, expected):
    run = read_env(env)[1]
    assert {name: vars(run)[name] for name in expected} == expected


# ---- what is printed --------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"TTT_PARAMS": "full"},
        {"TTT_OPTIMIZER": "sgd"},
        {"TTT_PARAMS": "full", "TTT_OPTIMIZER": "adamw"},
        {"ARTIFACT": "a.ptz"},
        {"ARTIFACT": "a.ptz", "TTT_BETA2": "0.9"},
        {"GRAD_RMS_TOKENS": "4096", "TTT_RMS_FLOOR": "0.5"},
        LORA_STREAM,
        {"TTT_PARAMS": "full", "TTT_SCOPE": "stream", "TTT_LR": "0.1"},
        {
            "ADAM_EPS": "1.2345678901234567e-11",
            "TTT_LORA_TARGETS": "q,v",
            "DATA_PATH": "with space/$HOME;'\"",
            "MODEL_DIM": "1024",
            "ITERATIONS": "1_000",
        },
    ],
)
def test_printed_settings_give_the_same_configs_again(env):
    configs = read_env(env)
    assert read_env(train_gpt.settings(*configs)) == configs


def test_help_lists_every_knob_with_default_unit_allowed_values_and_doc(capsys):
    assert train_gpt.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "without an upper limit, numbers up to 1,000,000,000" in out
    for name, (field, kind) in KNOBS.items():
        meta = field.metadata
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        shown = [meta["doc"], meta["unit"], str(meta["default"])]
        if get_args(kind):
            shown.append(f"[{' | '.join(get_args(kind))}]")
        elif kind is not str:
            shown.append(f"at least {meta['low']}]" if meta["high"] is None else f"{meta['low']} to {meta['high']}]")
        shown += [f"({name}: {meta[key]})" for key, name in OTHER_DEFAULTS.items() if meta[key] is not None]
        shown += [f"{other}={value}" for other, value in NEEDS.get(name, {}).items()]
        assert all(part in line for part in shown), line
        assert not meta["group"] or f"\n{meta['group']}\n" in out


def test_help_works_whatever_the_environment_says(run_script):
    done = run_script("--help", env={"TTT_LR": "nonsense", "TTT_TYPO": "1"})
    assert done.returncode == 0 and "TTT_LORA_RANK" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("shell", ["{} | head -c 0", "{} >&-", "{} >/dev/full"])
def test_help_ends_well_though_nobody_reads_it(shell):
    """`./run.sh help | head -1` showed a traceback."""
    command = shell.format(shlex.join([sys.executable, train_gpt.__file__, "--help"]))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


def test_nothing_runs_without_assertions(run_script, tiny_env):
    """One of them is that every target is scored exactly once."""
    done = run_script(env=tiny_env(PYTHONOPTIMIZE="2"))
    assert done.returncode == 2 and done.stderr.startswith("error: Python runs under -O") and done.stdout == ""
    assert run_script("--help", env={"PYTHONOPTIMIZE": "2"}).returncode == 0


def test_an_unknown_argument_is_refused(capsys):
    assert train_gpt.main(["--lr=3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--lr=3" in err and "--help" in err and len(err.splitlines()) == 1


# ---- names of files, numbers without sense, ranks ---------------------------


@pytest.mark.parametrize(
    "run_id",
    ["../x", "/tmp/x", "a//b", "a/../b", ".hidden", "a/.b", "x" * 201, "é" * 101, "a\nb", "\x1b[2J", "a/" * 9 + "b"],
)
def test_a_run_id_that_names_no_file_in_logs_is_refused(run_id):
    with pytest.raises(train_gpt.ConfigError, match="RUN_ID=.*names (the )?files in logs/"):
        train_gpt.read_env({"RUN_ID": run_id})


@pytest.mark.parametrize(
    "run_id", ["", "a", "2026-11-29_x.y", "sweeps/night/0123abc", "x" * 200, "lr=1e-3, seed=2", "é"]
)
def test_other_run_ids_are_not(run_id):
    assert train_gpt.read_env({"RUN_ID": run_id})[1].run_id == run_id


@pytest.mark.parametrize("name", ["QK_GAIN_INIT", "ATTN_GATE_SCALE", "TTT_LORA_ALPHA", "MATRIX_LR", "ROPE_BASE"])
def test_a_number_that_fp32_cannot_hold_is_refused(name):
    with pytest.raises(train_gpt.ConfigError, match=f"{name}='1e300'.*at most"):
        train_gpt.read_env({name: "1e300"})


WHOLE_NUMBERS = [name for name, (_, kind) in KNOBS.items() if kind is int]


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_a_count_that_nothing_could_run_is_refused(name):
    """Otherwise it would fail only when it is used, hours later perhaps."""
    text = "1" + 22 * "0"
    assert re.search(f"{name}='{text}'.*expected at most [0-9]+$", refusal(needed(name) | {name: text}))


@pytest.mark.parametrize("name", ["TRAIN_ROW_TOKENS", "EVAL_SEQ_LEN", "TTT_CHUNK_TOKENS"])
def test_more_tokens_than_a_forward_pass_could_hold_are_refused(name):
    largest = str(train_gpt.MAX_MICRO_BATCH)
    assert f"{name}=100000000" in refusal({name: str(10**8), "MICRO_BATCH_TOKENS": largest})


def test_a_network_of_too_many_passes_is_refused():
    with pytest.raises(train_gpt.ConfigError, match="NUM_LAYERS=1024 and NUM_LOOPS=64 make .* passes"):
        train_gpt.ModelConfig(num_layers=1024, num_loops=64, loop_start=0, loop_end=1023)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "99999", "9" * 400, "²"])
def test_a_variable_of_torchruns_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(train_gpt.ConfigError, match=f"{name}=.*torchrun"):
        train_gpt.Dist.from_env("cpu", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"} | {name: value})


def test_ranks_without_an_address_are_refused():
    with pytest.raises(train_gpt.ConfigError, match="MASTER_ADDR is empty.*torchrun"):
        train_gpt.Dist.from_env("cpu", {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": ""})
