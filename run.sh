#!/usr/bin/env bash
# Sets up what is missing, then does what was asked. `./run.sh help` lists the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

readonly CONTEST_DATA=data/datasets/fineweb10B_sp8192 # as DATA_PATH's default in train_gpt.py
readonly SMALL_DATA=data/datasets/installed           # where `data/prepare.py installed` writes
readonly VENV=$PWD/.venv

usage() {
  cat <<'EOF'
  ./run.sh              train, pack and score: with GPUs and prepared data the full run on all GPUs, else a small run
  ./run.sh check-setup  before a run: what `./run.sh` would do with these settings, and whether this machine can do it
  ./run.sh data ...     fetch or make data: python data/prepare.py ...
  ./run.sh prove ...    audit the score of an artifact (default: the newest in logs/), one line a property; two minutes
  ./run.sh compress FILE OUT     the scorer as a lossless compressor
  ./run.sh decompress OUT FILE   and back, exactly
  ./run.sh sample ...   what an artifact would write after a prompt
  ./run.sh sweep ...    rank combinations of knobs on held-out training text: TTT_LR=5e-5,1e-4 [--eval ARTIFACT];
                        or race sources: --source A.py,B.py SEED=0,1; cheaper: --train-only; many ideas: --screen
  ./run.sh rules ...    what rules of test-time training gain on one artifact: ARTIFACT [SETTING ...] [--published]
  ./run.sh compare A B  where two runs differ, document by document
  ./run.sh plot RUN...  pictures of finished runs, into logs/plots/
  ./run.sh packing CKPT what packing costs a network, and what each part of the quantiser is worth
  ./run.sh calibrate ARTIFACT --out NEW   add to an older artifact what TTT_OPTIMIZER=rms needs
  ./run.sh record ...   train and score every seed, audit, and write records/...: NAME --seeds 42,0,1234 --what TEXT
  ./run.sh check ...    after `record`: every number of a record folder against its logs; with its artifact, the score
  ./run.sh bench ...    speed on this machine: steps, kernels against their references, where the time goes
  ./run.sh test         ruff and the default tests; `test slow`: the slow ones; `test all`: both; or pytest's arguments
  ./run.sh help         this text, then every knob with the full run's default (the small run's: small_job in run.sh)

Names of files and folders, also those in knobs, are relative to this folder, wherever you call it from.
A knob is an environment variable: TTT_LR=3e-4 ./run.sh. Four more are read here:
  DATA_PATH        folder of prepared data; where there are GPUs, it makes the run the full one
  PYTHON           interpreter, at least 3.11 (default: python3). If it imports torch >= 2.11, that torch is used;
                   else requirements.txt is installed into .venv
  TORCH_INDEX_URL  package index to install torch from, such as https://download.pytorch.org/whl/cpu
  OMP_WAIT_POLICY  passive unless you set it: a CPU thread that waits leaves its core to others

EOF
}

commands() { usage | sed -n 's|^  ./run.sh \([a-z-][a-z-]*\) .*|\1|p' | xargs; }

# The small run: two CPU cores, three minutes, 1.7 GB. Its budget is in steps, so that it repeats exactly.
small_job() {
  [[ -n ${ARTIFACT:-} ]] || default RUN_ID=small # a score leaves the run's own files alone
  default DATA_PATH=$SMALL_DATA ITERATIONS=64 MAX_WALLCLOCK_SECONDS=0 TRAIN_LOG_EVERY=10
  default VOCAB_SIZE=2048 NUM_LAYERS=6 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=32 PARALLEL_START_LAYER=4
  default NUM_LOOPS=1 LOOP_START=2 LOOP_END=3
  default HOLDOUT_TOKENS=65536 TRAIN_BATCH_TOKENS=8192 TRAIN_ROW_TOKENS=4096 MICRO_BATCH_TOKENS=4096 TRAIN_SEQ_LEN=512
  default EVAL_SEQ_LEN=512 EVAL_STRIDE=128 GRAD_RMS_TOKENS=8192
  if [[ ${TTT_PARAMS:-lora} != lora ]]; then
    default TTT_CHUNK_TOKENS=128 # the default is longer than these documents
  else
    default TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 TTT_CHUNK_TOKENS=16
    if [[ ${TTT_OPTIMIZER:-auto} == @(auto|rms) && ${TTT_SCOPE:-document} == document && ${GRAD_RMS_TOKENS:-} != 0 ]]; then
      default TTT_OPTIMIZER=rms TTT_LR=5e-3 # named, so that an artifact without the RMS of gradients is refused
    else
      default TTT_LR=1e-3
    fi
    [[ ${TTT_SCOPE:-document} != document ]] || default TTT_BATCH_DOCS=16
  fi
}

defaults=() # names of what the environment did not say

default() { # NAME=value...: for what the environment does not say
  local pair name
  for pair in "$@"; do
    name=${pair%%=*}
    if [[ -z $(printenv "$name") ]]; then
      ! printenv "${name,,}" >/dev/null || fail 2 "${name,,} is not a knob; did you mean $name? Knobs are in capitals"
      export "${pair?}"
      defaults+=("$name")
    fi
  done
}

small_job_defaults() { # a line NAME=value each; tools/jobs.py asks for those of every combination
  local name
  small_job
  for name in "${defaults[@]}"; do printf '%s=%s\n' "$name" "${!name}"; done
}

say() { printf 'run.sh: %s\n' "$*" >&2; }
fail() { say "${@:2}" && exit "$1"; } # status, message

# -----------------------------------------------------------------------------
# Packages: `setup FILE...` leaves in $python an interpreter that has what the requirements files name.

PATH=${PATH//"$VENV/bin:"/} # .venv may be active, or PYTHON lie in it: it cannot be made from itself
[[ ${PYTHON:-} != "$VENV"/* && ${PYTHON:-} != .venv/* ]] || PYTHON=
python=$VENV/bin/python
base=${PYTHON:-$(head -n 1 "$VENV/made-from" 2>/dev/null || echo python3)}
sharing= # or the option that lets .venv see the packages of $base

setup() {
  local lacking origin
  if [[ -z ${PYTHON:-} ]] && installed "$@"; then return; fi
  require_python
  if has_torch; then
    lacking=$(missing "$base" "$@")
    if [[ -z $lacking ]]; then python=$base && return; fi
    sharing=--system-site-packages
  fi
  origin=$("$base" -c 'import sys; print(sys.executable, sys.version_info[:2], *sys.argv[1:], sep="\n")' $sharing)
  if [[ -e $VENV/made-from && $(<"$VENV/made-from") == "$origin" ]] && installed "$@"; then return; fi
  install "$origin" "$@"
}

# .venv keeps a copy of every requirements file that it fulfils, and holds `installing` while it may be incomplete.
installed() {
  local file
  [[ ! -e $VENV/installing ]] && "$python" -c 'import pip' &>/dev/null || return 1
  for file in "$@"; do
    cmp -s "$file" "$VENV/$file" || return 1
  done
}

require_python() {
  local remedy="install Python 3.11 or newer, or name one: PYTHON=/path/to/python3 ./run.sh"
  command -v "$base" >/dev/null || fail 2 "found no $base: $remedy"
  "$base" -c '' || fail 2 "$base does not run: $remedy"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail 2 "$(command -v "$base") is $("$base" --version 2>&1), which is too old: $remedy"
}

has_torch() {
  "$base" -c 'import sys, torch; sys.exit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 11])' &>/dev/null
}

# Interpreter, requirements files: prints the lines whose package the interpreter lacks. A package is imported by its own
# name, pytest-xdist by the last part of it.
missing() {
  "$1" - "${@:2}" <<'EOF'
import fileinput, importlib.util, re
for line in fileinput.input():
    name = re.match("(?:pytest-)?([a-z]+)", line)
    if name and not importlib.util.find_spec(name[1]):
        print(line, end="")
EOF
}

install() { # identity of $base, files
  local file
  clear_stale_venv "$1"
  say "installing ${*:2} into .venv; the first time takes minutes"
  mkdir -p "$VENV"
  echo $$ >"$VENV/installing"
  [[ -x $python ]] || make_venv
  for file in "${@:2}"; do
    ! cmp -s "$file" "$VENV/$file" || continue
    pip_install "$file" || fail 1 "could not install $file: see above"
    cp "$file" "$VENV/"
  done
  echo "$1" >"$VENV/made-from"
  rm "$VENV/installing"
}

clear_stale_venv() { # one that was interrupted or made from another interpreter; one made by hand is kept
  if [[ -s $VENV/installing ]] && kill -0 "$(<"$VENV/installing")" 2>/dev/null; then
    fail 1 "process $(<"$VENV/installing") is installing into .venv: wait for it, or stop it"
  fi
  [[ ! -e $VENV/installing && (! -e $VENV/made-from || $(<"$VENV/made-from") == "$1") ]] || rm -rf "$VENV"
}

make_venv() {
  local folder
  # shellcheck disable=SC2086  # an empty $sharing must vanish
  "$base" -m venv $sharing "$VENV" ||
    fail 1 "$base cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)"
  [[ -n $sharing ]] || return 0 # the option alone misses the packages of a $base in a virtual environment of its own
  for folder in "$VENV"/lib/python*/site-packages; do
    "$base" -c 'import site; print(*site.getsitepackages(), sep="\n")' >"$folder/shared.pth"
  done
}

pip_install() { # a requirements file; when sharing, only what $base lacks, and never another torch
  local pip=("$python" -m pip install --disable-pip-version-check)
  [[ -t 1 ]] || pip+=(--quiet) # no progress bars in a log
  if [[ -n $sharing ]]; then
    "${pip[@]}" -r <(missing "$python" "$1")
  elif [[ -n ${TORCH_INDEX_URL:-} && $1 == requirements.txt ]]; then
    "${pip[@]}" --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "$1")" && "${pip[@]}" -r "$1"
  else
    "${pip[@]}" -r "$1"
  fi
}

# -----------------------------------------------------------------------------
# Jobs
gpus=0 # of the full run; a small run uses one device, whatever it is

choose_job() {
  local found reason="torch finds no GPU"
  found=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  if ((found > 0)); then
    if [[ -n ${DATA_PATH:-} ]] || compgen -G "$CONTEST_DATA/fineweb_train_*.bin" >/dev/null; then
      gpus=$found
      say "full run on $gpus GPU(s) with ${DATA_PATH:-$CONTEST_DATA}"
      return
    fi
    reason="found no data in $CONTEST_DATA"
  fi
  small_job
  say "small run with $DATA_PATH: $reason"
  if [[ $DATA_PATH == "$SMALL_DATA" ]]; then "$python" data/prepare.py installed; fi
}

knobs() { # nothing, to refuse a bad one; or --help. Needs no packages
  require_python
  "$base" -m tools.knobs "$@"
}

# Help needs no knobs, and another --source may have others than the train_gpt.py of this folder.
refuse_bad_knobs() { # arguments of a tool
  has_option "-h|--help|--source" "$@" || knobs
}

has_option() { # names separated by |, arguments of a tool
  local argument
  for argument in "${@:2}"; do
    [[ $argument != @($1)?(=*) ]] || return 0
  done
  return 1
}

start_job() { # nothing, or --check-setup
  knobs
  setup requirements.txt
  choose_job
  if ((gpus > 1)); then
    local options=(--standalone --nproc_per_node="$gpus")
    # Under nohup SIGHUP is ignored, but not by torchrun, which would end the run when the terminal closes.
    [[ -z $(trap -p HUP) ]] || options+=(--signals-to-handle=SIGTERM,SIGINT,SIGQUIT)
    exec "$python" -m torch.distributed.run "${options[@]}" train_gpt.py "$@"
  fi
  exec "$python" train_gpt.py "$@"
}

run_python() {
  setup requirements.txt
  exec "$python" "$@"
}

run_tool() { # its name and arguments
  setup requirements.txt requirements-dev.txt
  exec "$python" -m "tools.$1" "${@:2}"
}

# With the knobs and data that a run would have; with --eval, the artifact brings those of its own run. With --launcher,
# the GPUs are not here, and the full run's knobs hold. Help needs neither.
run_tool_on_jobs() {
  setup requirements.txt requirements-dev.txt
  has_option "-h|--help|--eval|--launcher" "$@" || choose_job
  export RUN_SH_DEFAULTS=${defaults[*]} # which knobs are not the user's
  exec "$python" -m "tools.$1" "${@:2}"
}

run_tests() {
  local status=0 tier=()
  setup requirements.txt requirements-dev.txt
  if [[ ${1:-all} == all ]]; then "$python" -m ruff check . && "$python" -m ruff format --check . || status=1; fi
  case ${1:-} in # a tier: as many tests at a time as there are cores
    "" | slow | all) tier=(-n auto --dist worksteal) ;;
  esac
  [[ ${1:-} != slow ]] || set -- -m slow "${@:2}"
  [[ ${1:-} != all ]] || set -- -m "slow or not slow" "${@:2}"
  "$python" -m pytest "${tier[@]}" "$@" || status=$?
  exit "$status"
}

# A thread that waits for others must not spin: where a core is shared, it takes the time that the one it waits for
# needs. Jobs on GPUs get this, too: their CPU threads have next to nothing to wait for, and with several GPUs torchrun
# gives each process a single one.
wait_without_spinning() {
  [[ -n ${OMP_WAIT_POLICY:-} ]] || export OMP_WAIT_POLICY=passive
}

main() {
  local command=${1:-}
  (($# == 0)) || shift
  wait_without_spinning
  unset PYTHONSAFEPATH # with it, Python would not find the tools, modules of this folder
  case $command in # what takes knobs from the environment, but for a run, which refuses bad ones itself
    prove | compress | sample | calibrate | rules | packing | bench | sweep | record)
      refuse_bad_knobs "$@"
      ;;
  esac
  case $command in
    "") start_job ;;
    check-setup) start_job --check-setup ;;
    data) run_python data/prepare.py "$@" ;;
    prove | compress | decompress | sample | calibrate | check) run_python -m "tools.$command" "$@" ;;
    rules | compare | plot | packing | bench) run_tool "$command" "$@" ;;
    sweep | record) run_tool_on_jobs "$command" "$@" ;;
    test) run_tests "$@" ;;
    small-job-defaults) small_job_defaults ;; # for tools, not for people
    help | -h | --help) usage && knobs --help ;;
    *=*) fail 2 "a setting goes in front: $command ./run.sh" ;;
    *) fail 2 "unknown command '$command'; the commands are: $(commands)" ;;
  esac
}

main "$@"
