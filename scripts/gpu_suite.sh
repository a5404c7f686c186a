#!/usr/bin/env bash
# Everything that needs a GPU, in one call: tests, a memory check, the two ceilings, benchmarks, the tiles of the
# product kernels. Installs nothing from a network.
#
#   bash scripts/gpu_suite.sh [--deadline SECONDS]      (default 520; it ends within this, and nine minutes at most)
#
# Needs python3 with torch, triton and pytest. Wheels of contenders (trl, liger-kernel, ...) and of pytest-xdist (with
# execnet), which runs the tests side by side, are installed from the folder .whl of the repository if there is one.
# Results go to $OUT (default: runs/gpu), eight files at most; the tables are printed last. Status 0: tests passed, and
# this package's default has a time in every case that was reached. TUNING=60 keeps that many seconds of the cases' time
# for the tiles, which are measured in any time that is left.
#
# A rehearsal on a CPU: DEVICE=cpu CASES=smoke ROUNDS=2 OUT=/tmp/rehearsal bash scripts/gpu_suite.sh
# UNISD_COMMIT names the commit where the tree has no history.
set -uo pipefail
cd "$(dirname "$0")/.."
DEADLINE=520
while [ $# -gt 0 ]; do
    case "$1" in
        --deadline) DEADLINE="${2:?--deadline needs a number of seconds}"; shift 2 ;;
        *) echo "usage: bash scripts/gpu_suite.sh [--deadline SECONDS]" >&2; exit 2 ;;
    esac
done
[ "$DEADLINE" -le 530 ] || { echo "gpu_suite.sh: --deadline is 530 at most, got $DEADLINE" >&2; exit 2; }
OUT="${OUT:-runs/gpu}"
DEVICE="${DEVICE:-cuda}"
CASES="${CASES:-gpu}"
mkdir -p "$OUT"
rm -f "$OUT"/{setup,tests,sanitizer,bench_log}.txt "$OUT"/{ceilings,bench,tuning}.json "$OUT/tables.md"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# On a GPU kernels are compiled: under the interpreter they would be neither tested nor measured.
[ "$DEVICE" = cpu ] || unset TRITON_INTERPRET
status=0

left() { echo $((DEADLINE - SECONDS)); }

# What every step leaves to those after it: before the cases, time for the headline's first; after them, the tables.
reserve=60

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

if ls .whl/*.whl >/dev/null 2>&1; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    within 60 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi

# The compiled libraries, where the machine has compilers. One that cannot be built there is a failure.
build() {
    local cpu cuda
    if command -v g++ >/dev/null && [ ! -e unisd_kernels/_C.abi3.so ]; then
        UNISD_BUILD=cpu within 75 python3 setup.py -q build_ext --inplace
    fi &
    cpu=$!
    if command -v nvcc >/dev/null && [ "$DEVICE" != cpu ]; then
        within 75 python3 csrc/nvcc.py --arch 90
    fi &
    cuda=$!
    wait "$cpu" || failed "the CPU library was not built"
    wait "$cuda" || failed "the CUDA library was not built"
}
build >"$OUT/setup.txt" 2>&1
tail -n 5 "$OUT/setup.txt"

echo "== doctor"
within 45 python3 -c 'import sys; from unisd.cli import main; sys.exit(main(["doctor", "--device", sys.argv[1]]))' "$DEVICE" | tee -a "$OUT/setup.txt" || failed doctor

# test_part NAME ARGUMENTS...: pytest in what is left of the tests' time; says so where that was not enough.
test_part() {
    local name=$1 rest=$((tests_end - SECONDS)) code
    shift
    echo "-- $name" >>"$OUT/tests.txt"
    if [ "$rest" -lt 1 ]; then
        echo "not begun: no time left" >>"$OUT/tests.txt"
        failed "tests: $name was not begun, no time left"
        return
    fi
    # Interrupted, pytest still says what it found.
    signal=INT within "$rest" python3 -m pytest "${workers[@]}" "$@" >>"$OUT/tests.txt" 2>&1
    code=$?
    case $code in
        0) ;;
        124 | 137) failed "tests: $name was cut off after $((SECONDS - tests_end + rest)) s" ;;
        *) failed "tests: $name, status $code" ;;
    esac
}

echo "== tests"
workers=()
if python3 -c 'import xdist, execnet' 2>/dev/null; then
    cores="$(nproc)"
    workers=(-n "$((cores < 8 ? cores : 8))")
else
    echo "pytest-xdist is absent: one test at a time"
fi
tests_end=$((SECONDS + 200))
test_part tests/gpu -m gpu tests/gpu
# Of any device; many compilations. On a CPU the interpreter runs them, which `make test` does, as it compiles for GPUs
# that are not here.
if [ "$DEVICE" = cpu ]; then
    echo "-- tests/triton: not on a CPU" | tee -a "$OUT/tests.txt"
else
    test_part tests/triton --ignore=tests/triton/test_ahead_of_time.py --ignore=tests/triton/test_dry_launches.py tests/triton
fi
grep -E "^(--|FAILED|ERROR|not begun)|(passed|failed|skipped|error).* in |no time left|Interrupt" "$OUT/tests.txt" | tail -n 40

echo "== memory check of one small step of each design"
if [ "$DEVICE" = cpu ]; then
    echo "not on a CPU"
elif command -v compute-sanitizer >/dev/null; then
    for peer in "unisd fused" "unisd chunked"; do
        echo "-- $peer"
        # Without torch's pool, so that an access outside a tensor is one outside an allocation.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 40 compute-sanitizer --tool memcheck --error-exitcode 9 \
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
fi >"$OUT/sanitizer.txt" 2>&1
grep -E "^--|FAILED|ERROR SUMMARY|no answer|absent|not on" "$OUT/sanitizer.txt"

echo "== ceilings"
within 45 python3 -m bench.ceilings --device "$DEVICE" --output "$OUT/ceilings.json" || failed ceilings

echo "== cases"
reserve=10
for attempt in 1 2 3; do
    # Nothing new is begun in the last 45 seconds: what runs then may end, and the tables need a few.
    within 600 python3 -m bench.suite --suite "$CASES" --device "$DEVICE" --deadline $(($(left) - 45 - ${TUNING:-0})) \
        --rounds "${ROUNDS:-9}" --peer-rounds "${PEER_ROUNDS:-4}" --output "$OUT/bench.json" --resume 2>>"$OUT/bench_log.txt"
    code=$?
    # 3: a contender took the device with it; the others deserve a fresh process.
    [ $code -eq 3 ] || break
    echo "attempt $attempt: $(tail -n 1 "$OUT/bench_log.txt")"
done
if [ $code -ne 0 ]; then
    failed "cases, status $code"
    tail -n 5 "$OUT/bench_log.txt"
fi

echo "== tiles"
rest=$(($(left) - reserve))
limit=$((rest < 60 ? rest : 60))
if [ "$DEVICE" = cpu ]; then
    echo "not on a CPU"
    within 30 python3 -m bench.tuning --dry-run >>"$OUT/bench_log.txt" 2>&1 || failed tiles
elif [ "$limit" -lt 20 ]; then
    echo "skipped: $rest s are left"
else
    # A candidate that is begun may take ten seconds to compile.
    within "$limit" python3 -m bench.tuning --device "$DEVICE" --deadline $((limit - 12)) --output "$OUT/tuning.json" \
        >/dev/null 2>>"$OUT/bench_log.txt"
    code=$?
    case $code in
        0) ;;
        124 | 137) echo "cut off after $limit s" ;;
        *) failed "tiles, status $code" ;;
    esac
fi

echo "== tables"
{
    if [ -e "$OUT/bench.json" ]; then
        python3 -m bench.tables "$OUT/bench.json" || failed tables
    else
        echo "no case was begun"
    fi
    if [ "$CASES" = gpu ] && [ -e "$OUT/bench.json" ] && [ -e "$OUT/ceilings.json" ]; then
        echo
        python3 -m bench.expected --measured "$OUT/ceilings.json" --results "$OUT/bench.json" || failed expected
    fi
    if [ -e "$OUT/tuning.json" ]; then
        echo
        python3 -m bench.tuning --report "$OUT/tuning.json" || failed "tables of the tiles"
    fi
} >"$OUT/tables.md"
[ ! -e "$OUT/ceilings.json" ] || cat "$OUT/ceilings.json"
cat "$OUT/tables.md"
echo "status $status after $SECONDS s"
exit $status
