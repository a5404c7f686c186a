#!/usr/bin/env bash
# What `make test` and `make test-all` run after the installation: lint, the tests, and the trainer's tests again with
# the oldest TRL of the window. A stage that fails does not hide the next; all are reported at the end, with their CPU time.
#
#   scripts/check.sh BIN OLDEST_TRL_FOLDER [PYTEST ARGUMENTS...]
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
bin="$1"
oldest_trl="$2"
shift 2
# A module is compiled once, not by each of some forty processes, whatever the caller's setting; and a thread that waits
# takes no processor time from the other processes.
export PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=PASSIVE
report=()
status=0

tally="$(mktemp)"
trap 'rm -f "$tally"' EXIT

# CPU seconds of this shell's finished children, user and system, into `spent`. Not by a pipe or `$(...)`: each is a
# shell of its own, whose children have used nothing.
spent=0
count_cpu() {
    times >"$tally"
    spent="$(tail -n 1 "$tally" | tr 'ms' '  ' | awk '{printf "%.0f", 60 * $1 + $2 + 60 * $3 + $4}')"
}

stage() {
    local name=$1 before code
    shift
    echo "== $name"
    count_cpu
    before=$spent
    "$@"
    code=$?
    count_cpu
    [ $code -eq 0 ] || status=1
    report+=("$(printf '%-42s %-10s %4d s of CPU' "$name" "$([ $code -eq 0 ] && echo passed || echo "FAILED ($code)")" $((spent - before)))")
}

lint() {
    local code=0
    "$bin/ruff" check . || code=1
    "$bin/ruff" format --check . || code=1
    "$bin/mypy" || code=1
    return $code
}

trainer_with_oldest_trl() {
    export PYTHONPATH="$oldest_trl"
    "$bin/python" -c 'import sys, trl; sys.exit(sys.argv[1].endswith(f"trl-{trl.__version__}") is False and f"got TRL {trl.__version__}, not that of {sys.argv[1]}")' "$oldest_trl" || return
    # In one process, which imports everything once; kills and resumes do not depend on TRL. Without the sweeps what asks
    # most of TRL: its sampling, its collator, its arguments and its loop.
    local files=(tests/trainer)
    [ $# -eq 0 ] || files=(tests/trainer/test_trainer_{rollouts,step,rows,config,frames,metrics,multimodal,baselines}.py)
    "$bin/python" -m pytest "$@" --ignore tests/trainer/test_trainer_kill.py "${files[@]}"
}

stage "lint and types" lint
# A file's tests in one process: what they share, groups of processes among it, is then made once.
stage "tests" "$bin/python" -m pytest -n 2 --dist loadfile "$@"
stage "the trainer's tests with $(basename "$oldest_trl")" trainer_with_oldest_trl "$@"
echo "== in all"
printf '%s\n' "${report[@]}"
count_cpu
echo "CPU seconds: $spent"
exit $status
