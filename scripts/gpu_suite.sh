#!/usr/bin/env bash
# Everything that needs a GPU, in one call: tests, a memory check, the two ceilings, benchmarks. Installs nothing from
# a network.
#
#   bash scripts/gpu_suite.sh [--deadline SECONDS]      (default 520; it ends within this, and nine minutes at most)
#
# Needs python3 with torch, triton and pytest. Wheels of contenders (trl, liger-kernel, ...) are installed from the
# folder .whl of the repository if there is one. Results go to $OUT (default: runs/gpu), eight files at most; the tables
# are printed last. Status 0: tests passed and this package's default has a time in every case that was reached.
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
rm -f "$OUT"/{build,doctor,tests,sanitizer,bench_log}.txt "$OUT"/{ceilings,bench}.json "$OUT/tables.md"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

left() { echo $((DEADLINE - SECONDS)); }

# What every step leaves to those after it: before the cases, time for the headline's first; after them, the tables.
reserve=60

# within LIMIT COMMAND...: the command, ended after LIMIT seconds or where only the reserve is left.
within() {
    local limit=$1 rest=$(($(left) - reserve))
    shift
    [ "$rest" -ge 1 ] || { echo "no time left for: $*"; return 124; }
    timeout --kill-after 5 $((limit < rest ? limit : rest)) "$@"
}

failed() { status=1; echo "FAILED: $1"; }

if ls .whl/*.whl >/dev/null 2>&1; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    within 60 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi

# The compiled libraries, where the machine has compilers; an absent one is reported by doctor and its tests skip.
build() {
    if command -v g++ >/dev/null && [ ! -e unisd_kernels/_C.abi3.so ]; then
        UNISD_BUILD=cpu within 75 python3 setup.py -q build_ext --inplace || echo "the CPU library was not built"
    fi &
    if command -v nvcc >/dev/null && [ "$DEVICE" != cpu ]; then
        within 75 python3 csrc/nvcc.py --arch 90 || echo "the CUDA library was not built"
    fi &
    wait
}
build >"$OUT/build.txt" 2>&1
tail -n 3 "$OUT/build.txt"

echo "== doctor"
within 45 python3 -c 'import sys; from unisd.cli import main; sys.exit(main(["doctor", "--device", sys.argv[1]]))' "$DEVICE" | tee "$OUT/doctor.txt" || failed doctor

echo "== tests"
within 200 python3 -m pytest -m gpu tests/gpu -q 2>&1 | tee "$OUT/tests.txt" | tail -n 30
[ "${PIPESTATUS[0]}" -eq 0 ] || failed "tests (a status of 124 is the time limit)"

echo "== memory check of one small step"
if [ "$DEVICE" = cpu ]; then
    echo "not on a CPU"
elif command -v compute-sanitizer >/dev/null; then
    # Without torch's pool, so that an access outside a tensor is one outside an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python3 -m bench --case smoke.bf16 --device "$DEVICE" --memory-of unisd_kernels
    code=$?
    case $code in
        0) ;;
        124) echo "no answer within its time" ;;
        *) failed "memory check, status $code" ;;
    esac
else
    echo "compute-sanitizer is absent"
fi >"$OUT/sanitizer.txt" 2>&1
tail -n 5 "$OUT/sanitizer.txt"

echo "== ceilings"
within 45 python3 -m bench.ceilings --device "$DEVICE" --output "$OUT/ceilings.json" || failed ceilings

echo "== cases"
reserve=10
for attempt in 1 2 3; do
    # Nothing new is begun in the last 45 seconds: what runs then may end, and the tables need a few.
    within 600 python3 -m bench.suite --suite "$CASES" --device "$DEVICE" --deadline $(($(left) - 45)) \
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
} >"$OUT/tables.md"
[ ! -e "$OUT/ceilings.json" ] || cat "$OUT/ceilings.json"
cat "$OUT/tables.md"
echo "status $status after $SECONDS s"
exit $status
