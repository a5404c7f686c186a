#!/usr/bin/env bash
# One row of docs/wheel-matrix.md: the built wheel in a fresh environment with one Python and one torch.
#
#     make wheel
#     scripts/wheel_matrix.sh python3.10 2.10.0
#     scripts/wheel_matrix.sh python3.11 torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl
#
# The first argument is an interpreter, the second a version of torch or the path of a torch wheel. Makes an environment
# in a temporary folder, installs torch as pip resolves it (its CUDA packages too, where its wheel asks for them), then
# the wheel, then pytest, hypothesis, numpy and Triton, which torch for CPUs alone does not bring; runs `unisd doctor` and
# tests/ops and tests/reference from a copy of the tests that has no package beside it (they read bench/ and docs/, which
# are copied too). The last line on stdout is the summary; the exit status is 0 if all of it passed.
#
# It needs up to 10 GiB in $TMPDIR, freed at the end.
#
#     WHEEL         the wheel to test (default: the only one in dist/)
#     LOGS          where install.txt, doctor.txt and tests.txt are kept (default: nowhere)
#     ENVIRONMENT   where to make the environment and leave it; one that is there already with this torch is used
#                   again, and only the wheel is installed anew
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
root="$(cd "$(dirname "$0")/.." && pwd)"
interpreter="$1"
torch="torch==$2"
torch_version="$2"
if [[ $2 == *.whl ]]; then torch="$(realpath "$2")"; fi
if [ -z "${WHEEL:-}" ]; then
    wheels=("$root"/dist/*.whl)
    [ -e "${wheels[0]}" ] && [ ${#wheels[@]} -eq 1 ] || { echo "dist/ must hold one wheel, or name it: WHEEL=..." >&2; exit 2; }
    WHEEL="${wheels[0]}"
fi
WHEEL="$(realpath "$WHEEL")"
temporary="$(mktemp -d)"
trap 'rm -rf "$temporary"' EXIT
logs="${LOGS:-$temporary/logs}"
mkdir -p "$logs"
logs="$(cd "$logs" && pwd)"

# Nothing of this checkout or of the user's own site-packages may stand in for what the wheel brings.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE PYTEST_ADDOPTS UNISD_CPU_ISA
export PYTHONNOUSERSITE=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    tail -n 30 "$2" >&2
    echo "python $version torch $torch_version: $1"
    exit 1
}

environment="$(realpath -m "${ENVIRONMENT:-$temporary/venv}")"
python="$environment/bin/python"
[ -x "$python" ] || "$interpreter" -m venv "$environment"
version="$("$python" -c 'import platform; print(platform.python_version())')"

# Without constraints.txt: some of its pins do not exist for every Python.
{
    "$python" -m pip uninstall -y unisd-kernels &&
        "$python" -m pip install --no-compile "$torch" &&
        "$python" -m pip freeze >"$temporary/before.txt" &&
        "$python" -m pip install --no-compile "$WHEEL" &&
        "$python" -m pip freeze >"$temporary/after.txt" &&
        "$python" -m pip install --no-compile pytest hypothesis numpy triton &&
        "$python" -m pip check &&
        "$python" -m pip list
} >"$logs/install.txt" 2>&1 || fail "could not be installed" "$logs/install.txt"
torch_version="$("$python" -c 'from importlib import metadata; print(metadata.version("torch"))')"
# The wheel asks for nothing that torch did not bring, and above all for no other torch.
[ "$(comm -13 <(sort "$temporary/before.txt") <(sort "$temporary/after.txt") | grep -vc '^unisd')" -eq 0 ] ||
    fail "the wheel changed what else is installed" "$logs/install.txt"

mkdir "$temporary/source"
cp -r "$root/tests" "$root/bench" "$root/csrc" "$root/docs" "$root/pyproject.toml" "$temporary/source"
cd "$temporary/source"

# Loads the compiled library: without it the tests of the CPU operations would only be skipped.
"$python" - "$environment" >"$logs/library.txt" 2>&1 <<'CHECK' || fail "not the wheel's compiled library" "$logs/library.txt"
import sys
from pathlib import Path

import unisd_kernels
from unisd_kernels.backends import extension

print(unisd_kernels.__file__)
assert Path(sys.argv[1]).resolve() in Path(unisd_kernels.__file__).resolve().parents
print(extension.cpu_unavailable() or extension.cpu_isa())
assert extension.cpu_unavailable() is None
CHECK
isa="$(tail -n 1 "$logs/library.txt")"

"$python" -c "import sys; from unisd.cli import main; sys.exit(main(['doctor', '--device', 'cpu']))" \
    >"$logs/doctor.txt" 2>&1 || fail "unisd doctor failed" "$logs/doctor.txt"

status=0
"$python" -m pytest tests/ops tests/reference -rs >"$logs/tests.txt" 2>&1 || status=$?
counts="$({ grep -E '(passed|failed|errors?)[ ,].*in [0-9]' "$logs/tests.txt" || true; } | tail -n 1 | sed 's/^=* *//; s/ *=*$//')"
[ $status -eq 0 ] || fail "${counts:-pytest ended with $status}; doctor passed with $isa" "$logs/tests.txt"
echo "python $version torch $torch_version: $counts; doctor passed with $isa"
