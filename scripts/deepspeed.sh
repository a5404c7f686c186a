#!/usr/bin/env bash
# Runs of this package under DeepSpeed on a CPU, in an environment of its own: "What was run" of docs/distributed.md.
#
#     scripts/deepspeed.sh install            the environment (2 GiB), and DeepSpeed's operation for shared memory compiled
#     scripts/deepspeed.sh run [ARG ...]      the tests that need DeepSpeed; arguments are pytest's
#     scripts/deepspeed.sh launch [NAME ...]  `unisd launch`, `accelerate launch`, `torchrun`, as docs/distributed.md types
#     scripts/deepspeed.sh all                everything, one after another
#
#     DEEPSPEED_ENV  the environment (default .deepspeed-venv); PYTHON the interpreter that makes it (python3)
#     LOGS           where the runs of `launch` and their output go (default runs/deepspeed)
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
env="${DEEPSPEED_ENV:-$root/.deepspeed-venv}"
logs="${LOGS:-$root/runs/deepspeed}"
export PYTHONPATH="$root" PATH="$env/bin:$PATH" HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE TORCH_EXTENSIONS_DIR="$env/extensions"

install() {
    [ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/pip" install -q torch==2.13.0
    grep -v '^torch==\|^#\|^triton' constraints.txt > "$env/constraints.txt"
    "$env/bin/pip" install -q -c "$env/constraints.txt" deepspeed==0.19.8 ninja transformers trl peft accelerate \
        datasets gguf matplotlib pyyaml jinja2 pytest pytest-xdist hypothesis
    # Every process of a first run would wait for it; of a compilation that was cut off, for ever.
    rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
    "$env/bin/python" -c 'from deepspeed.accelerator import get_accelerator as accelerator
accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)'
}

run() { "$env/bin/python" -m pytest -q -p no:cacheprovider tests/trainer/test_trainer_deepspeed.py "$@"; }

launch() { "$env/bin/python" scripts/deepspeed_runs.py "$logs" "$@"; }

all() {
    install
    run
    launch
}

case "${1:-}" in
    install | run | launch | all) "$@" ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
