#!/usr/bin/env bash
# Everything that needs a GPU, in one call, the most valuable first: doctor (which tries every implementation), the two
# ceilings, the headline's four operations with the floor and this package's designs, their kernels, the GPU's tests, the
# peers, the other tests, training steps, other heads, the library's products, rollouts, other row counts, a memory
# check, torch.compile. Installs nothing from a network.
#
#   bash scripts/gpu_suite.sh [--deadline SECONDS] [--parts "NAME[:SECONDS] ..."]
#
# It ends within the deadline (default 520), and nine minutes at most. --parts: these alone, in this order, each within its
# seconds, of those in the table PARTS below; a part named "tiles" is there besides (every tile shape, timed).
#
# Needs python3 with torch, triton and pytest; pytest-xdist runs the tests side by side and pytest-timeout ends one that
# hangs. Wheels of peers (trl, liger-kernel, ...) are installed from the folder .whl of the repository (or $WHEELS) if
# there is one. Results go to $OUT (default: runs/gpu), eight files at most, each written as it grows; the tables are
# printed last.
# A peer that hangs or takes the process with it costs itself: the next process goes on past it.
# Status 0: what was built was built, tests passed, and this package's default has a time in every case that was reached.
#
# A rehearsal on a CPU: DEVICE=cpu CASES=smoke ROUNDS=2 OUT=/tmp/rehearsal bash scripts/gpu_suite.sh
# UNISD_COMMIT names the commit where the tree has no history.
set -uo pipefail
cd "$(dirname "$0")/.."
DEADLINE=520
PARTS="ceilings:30 headline:100 kernels:40 gpu_tests:90 peers:110 triton_tests:60 steps:70 heads:70 products:30 rollouts:40
       rows:60 memory_check:125 compiled:120"
NAMES="$(printf '%s ' $PARTS tiles | sed 's/:[0-9]*//g')"
while [ $# -gt 0 ]; do
    case "$1" in
        --deadline) DEADLINE="${2:?--deadline needs a number of seconds}"; shift 2 ;;
        --parts) PARTS="${2:?--parts needs names}"; shift 2 ;;
        *) echo 'usage: bash scripts/gpu_suite.sh [--deadline SECONDS] [--parts "NAME[:SECONDS] ..."]' >&2; exit 2 ;;
    esac
done
for part in $PARTS; do
    case " $NAMES " in
        *" ${part%%:*} "*) ;;
        *) echo "gpu_suite.sh: there is no part ${part%%:*}" >&2; exit 2 ;;
    esac
done
[ "$DEADLINE" -le 530 ] || { echo "gpu_suite.sh: --deadline is 530 at most, got $DEADLINE" >&2; exit 2; }
OUT="${OUT:-runs/gpu}"
DEVICE="${DEVICE:-cuda}"
CASES="${CASES:-gpu}"
mkdir -p "$OUT"
rm -f "$OUT/log.txt" "$OUT"/{ceilings,bench,tuning,kernels,steps,products,rollouts}.json "$OUT/tables.md" "$OUT"/*.in_flight
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# On a GPU kernels are compiled: under the interpreter they would be neither tested nor measured.
[ "$DEVICE" = cpu ] || unset TRITON_INTERPRET
status=0

left() { echo $((DEADLINE - SECONDS)); }

# What every step leaves to the tables.
reserve=10

# within LIMIT COMMAND...: the command, ended after LIMIT seconds or where only the reserve is left; by $signal, and if
# that is ignored for five seconds, for good. Status 124 or 137: it was ended.
signal=TERM
within() {
    local limit=$1 rest=$(($(left) - reserve))
    shift
    [ "$rest" -ge 1 ] || { echo "no time left for: $*"; return 124; }
    timeout --signal "$signal" --kill-after 5 $((limit < rest ? limit : rest)) "$@"
}

failed() { status=1; echo "FAILED: $1"; }

WHEELS="${WHEELS:-.whl}"
if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    within 60 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi

# verdict CODE LIMIT NAME: what became of a part of the benchmarks; to be cut off is no failure of it.
verdict() {
    case $1 in
        0) ;;
        124 | 137) echo "cut off after $2 s" ;;
        *) failed "$3, status $1"; tail -n 5 "$OUT/log.txt" ;;
    esac
}

# The compiled libraries, where the machine has compilers. A build that fails is a failure: its tests would only skip.
build_cpu() { [ -e unisd_kernels/_C.abi3.so ] || UNISD_BUILD=cpu within 75 python3 setup.py -q build_ext --inplace; }
build_cuda() { within 75 python3 csrc/nvcc.py --arch 90; }
build() {
    local cpu=0 cuda=0 code=0
    if command -v g++ >/dev/null; then build_cpu & cpu=$!; else echo "no g++: no CPU library"; fi
    # The CUDA library is loaded on top of the CPU one.
    if [ "$DEVICE" != cpu ] && command -v g++ >/dev/null && command -v nvcc >/dev/null; then
        build_cuda & cuda=$!
    else
        echo "no nvcc, or not for a GPU: no CUDA library"
    fi
    [ $cpu -eq 0 ] || wait $cpu || { echo "the CPU library was not built"; code=1; }
    [ $cuda -eq 0 ] || wait $cuda || { echo "the CUDA library was not built"; code=1; }
    return $code
}
echo "== libraries"
build >>"$OUT/log.txt" 2>&1 || failed "build of the compiled libraries"
tail -n 6 "$OUT/log.txt"

echo "== doctor"
within 45 python3 -c 'import sys; from unisd.cli import main; sys.exit(main(["doctor", "--device", sys.argv[1]]))' "$DEVICE" 2>&1 | tee -a "$OUT/log.txt" || failed doctor

# tests SECONDS NAME ARGUMENTS...: pytest within its time; says so where that was not enough.
tests() {
    local limit=$1 name=$2 code
    shift 2
    echo "== tests: $name"
    echo "-- $name" >>"$OUT/log.txt"
    # Interrupted, pytest still says what it found.
    signal=INT within "$limit" python3 -m pytest -rs "${test_options[@]}" "$@" >>"$OUT/log.txt" 2>&1
    code=$?
    case $code in
        0) ;;
        124 | 137) failed "tests: $name was cut off after $limit s, or no time was left" ;;
        *) failed "tests: $name, status $code" ;;
    esac
    awk -v title="-- $name" '$0 == title { found = 1 } found' "$OUT/log.txt" |
        grep -E "^(FAILED|ERROR)|(passed|failed|skipped|error).* in |no time left|Interrupt|Timeout" | tail -n 40
}

test_options=()
if python3 -c 'import xdist, execnet' 2>/dev/null; then
    cores="$(nproc)"
    test_options+=(-n "$((cores < 8 ? cores : 8))")
else
    echo "pytest-xdist is absent: one test at a time"
fi
# A kernel that hangs ends its worker, which is replaced.
if python3 -c 'import pytest_timeout' 2>/dev/null; then test_options+=(--timeout 60 --timeout-method thread); fi

# cases SUITE SECONDS WATCHDOG: a part of the cases, into the one file, again where a peer took the process with it.
cases() {
    local suite=$1 limit=$2 watchdog=$3 end=$((SECONDS + $2)) attempt code=0 rest
    echo "== cases: $suite"
    for attempt in 1 2 3 4; do
        rest=$((end - SECONDS))
        [ $((rest < $(left) - reserve ? rest : $(left) - reserve)) -ge 20 ] || { echo "no time left"; break; }
        # Nothing new is begun in the last ten seconds: what runs then may end.
        within "$rest" python3 -m bench suite --suite "$suite" --device "$DEVICE" \
            --deadline $(((rest < $(left) - reserve ? rest : $(left) - reserve) - 10)) --watchdog "$watchdog" \
            --rounds "${ROUNDS:-9}" --peer-rounds "${PEER_ROUNDS:-4}" --output "$OUT/bench.json" --resume 2>>"$OUT/log.txt"
        code=$?
        case $code in 124 | 137) rm -f "$OUT/bench.json.in_flight" ;; esac # our limit, nobody's fault
        # 3: a peer took the device with it. A call in flight: it took the process. The others deserve a fresh one.
        [ $code -eq 3 ] || [ -e "$OUT/bench.json.in_flight" ] || break
        echo "attempt $attempt: $(tail -n 1 "$OUT/log.txt")"
    done
    verdict $code "$limit" "cases $suite"
}

tiles() {
    echo "== tiles"
    local limit=$1
    if [ "$DEVICE" = cpu ]; then
        echo "not on a CPU"
        within 30 python3 -m bench tuning --dry-run >>"$OUT/log.txt" 2>&1 || failed tiles
        return
    fi
    limit=$((limit < $(left) - reserve ? limit : $(left) - reserve))
    [ "$limit" -ge 20 ] || { echo "skipped: $limit s are left"; return; }
    # A candidate that is begun may take ten seconds to compile.
    within "$limit" python3 -m bench tuning --device "$DEVICE" --deadline $((limit - 12)) --output "$OUT/tuning.json" \
        >/dev/null 2>>"$OUT/log.txt"
    verdict $? "$limit" tiles
}

kernels() {
    echo "== kernels"
    if [ "$DEVICE" = cpu ]; then echo "not on a CPU"; return; fi
    within "$1" python3 -m bench kernels --device "$DEVICE" --output "$OUT/kernels.json" >/dev/null 2>>"$OUT/log.txt"
    verdict $? "$1" kernels
}

# study TITLE MODULES LIMIT NAME ARGUMENTS...: a command of bench with a file of its own, whose table is printed; it needs
# the modules.
study() {
    local title=$1 modules=$2 limit=$3 name=$4
    shift 4
    echo "== $title"
    if [ "$DEVICE" = cpu ]; then echo "not on a CPU"; return; fi
    python3 -c "import $modules" 2>>"$OUT/log.txt" || { echo "$modules cannot be imported: log.txt says why"; return; }
    within "$limit" python3 -m bench "$name" --device "$DEVICE" "$@" --output "$OUT/$name.json" 2>>"$OUT/log.txt"
    verdict $? "$limit" "$title"
}

# Whole training steps of a model of random weights, the size of Llama-3.2-1B: ours and the dense loss.
steps() {
    study "training steps" "trl, peft" "$1" steps --model random-1b --batch-size 8 --new-tokens 192 --rounds 3 \
        --presets plain agreement_token unisd_star unisd_star-q0.25
}

# Rates of the library's products, which say how many rows are worth holding.
products() { study "the library's products" torch "$1" products; }

# Sampling through an adapter, and from merged weights.
rollouts() { study rollouts "trl, peft" "$1" rollouts --model random-1b; }

memory_check() {
    local log
    log="$(mktemp)"
    echo "== memory check of one small step of each design"
    if [ "$DEVICE" = cpu ]; then
        echo "not on a CPU"
    elif command -v compute-sanitizer >/dev/null; then
        for peer in "unisd fused" "unisd chunked"; do
            echo "-- $peer"
            # Without torch's pool, so that an access outside a tensor is one outside an allocation.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
                python3 -m bench --case smoke.bf16 --device "$DEVICE" --one-step-of "$peer"
            code=$?
            case $code in
                0) ;;
                124 | 137) echo "no answer within its time" ;;
                *) failed "memory check of $peer, status $code" ;;
            esac
        done
    else
        echo "compute-sanitizer is absent"
    fi >"$log" 2>&1
    cat "$log" >>"$OUT/log.txt"
    grep -E "^--|FAILED|ERROR SUMMARY|no answer|absent|not on" "$log"
    # The check's output went to the file, with its failures.
    ! grep -q "^FAILED" "$log" || status=1
    rm -f "$log"
}

if [ "$CASES" != gpu ]; then # a rehearsal
    tests 200 tests/gpu -m gpu tests/gpu
    within 45 python3 -m bench ceilings --device "$DEVICE" --output "$OUT/ceilings.json" || failed ceilings
    cases "$CASES" 200 90
    tiles 60
    memory_check
else
    for part in $PARTS; do
        name="${part%%:*}" seconds="${part#*:}"
        [ "$seconds" != "$name" ] || seconds=60
        case "$name" in
            ceilings)
                echo "== ceilings"
                within "$seconds" python3 -m bench ceilings --device "$DEVICE" --output "$OUT/ceilings.json" || failed ceilings ;;
            headline | peers | heads | rows) cases "$name" "$seconds" 60 ;;
            compiled) cases compiled "$seconds" $((seconds - 10)) ;;
            gpu_tests) tests "$seconds" tests/gpu -m gpu tests/gpu ;;
            # Of any device; many compilations. `make test` runs them under the interpreter, and compiles ahead of time.
            triton_tests)
                tests "$seconds" tests/triton -m "not exhaustive" --ignore=tests/triton/test_ahead_of_time.py \
                    --ignore=tests/triton/test_dry_launches.py tests/triton ;;
            *) "$name" "$seconds" ;;
        esac
    done
fi

echo "== tables"
{
    if [ -e "$OUT/bench.json" ]; then
        python3 -m bench tables "$OUT/bench.json" || failed tables
    else
        echo "no case was begun"
    fi
    if [ "$CASES" = gpu ] && [ -e "$OUT/bench.json" ] && [ -e "$OUT/ceilings.json" ]; then
        echo
        python3 -m bench expected --measured "$OUT/ceilings.json" --results "$OUT/bench.json" || failed expected
    fi
    if [ -e "$OUT/kernels.json" ]; then
        echo
        python3 -m bench kernels --report "$OUT/kernels.json" || failed "tables of the kernels"
    fi
    if [ -e "$OUT/tuning.json" ]; then
        echo
        python3 -m bench tuning --report "$OUT/tuning.json" || failed "tables of the tiles"
    fi
} >"$OUT/tables.md"
[ ! -e "$OUT/ceilings.json" ] || cat "$OUT/ceilings.json"
cat "$OUT/tables.md"
rm -f "$OUT"/*.in_flight "$OUT"/*.partial
echo "status $status after $SECONDS s"
exit $status
