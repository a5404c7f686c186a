#!/usr/bin/env bash
# Everything that needs a GPU, in one call: tests, the two ceilings, benchmarks. Installs nothing from a network.
#
# Needs python3 with torch, triton and pytest. Wheels of contenders (trl, liger-kernel, ...) are installed from the
# folder .whl of the repository if there is one. Results go to $OUT (default: runs/gpu); the summary is printed last.
# Ends within nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-runs/gpu}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/unisd-site .whl/*.whl || exit 1
    export PYTHONPATH="/tmp/unisd-site:$PYTHONPATH"
fi
DEVICE="${DEVICE:-cuda}"
# The compiled libraries, where the machine has compilers; an absent one is reported by doctor and its tests skip.
if command -v g++ >/dev/null && [ ! -e unisd_kernels/_C.abi3.so ]; then
    UNISD_BUILD=cpu python3 setup.py -q build_ext --inplace >"$OUT/build_cpu.txt" 2>&1 || tail -n 5 "$OUT/build_cpu.txt"
fi
if command -v nvcc >/dev/null && [ "$DEVICE" = cuda ]; then
    python3 csrc/nvcc.py --arch 90 >"$OUT/build_cuda.txt" 2>&1 || tail -n 5 "$OUT/build_cuda.txt"
fi
CASES="${CASES:-llama3.1-8b llama3.1-8b_trainable qwen2.5-0.5b qwen2.5-7b gemma3-4b}"
status=0

echo "== doctor"
python3 -c 'import sys; from unisd.cli import main; sys.exit(main(["doctor", "--device", sys.argv[1]]))' "$DEVICE" | tee "$OUT/doctor.txt" || status=1

echo "== tests"
timeout 180 python3 -m pytest -m gpu tests/gpu -q --junitxml "$OUT/tests.xml" 2>&1 | tee "$OUT/tests.txt" | tail -n 30
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1

echo "== ceilings"
timeout 60 python3 -m bench.ceilings --device "$DEVICE" --output "$OUT/ceilings.json" || status=1

for case in $CASES; do
    echo "== $case"
    timeout 100 python3 -m bench --case "$case" --device "$DEVICE" --rounds "${ROUNDS:-7}" --output "$OUT/$case.json" \
        >"$OUT/$case.txt" 2>"$OUT/$case.err" || { status=1; echo "failed or out of time:"; tail -n 5 "$OUT/$case.err"; }
done

echo "== summary"
cat "$OUT"/ceilings.json
for case in $CASES; do cat "$OUT/$case.txt"; echo; done
echo "status $status"
exit $status
