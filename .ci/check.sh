#!/bin/sh
# `make check`: runs every checker, also after one has failed, and fails if any did.
set -u
cd -- "$(dirname -- "$0")/.." || exit 1

failed=
step() {
    name=$1
    shift
    start=$(date +%s)
    if "$@"; then state=ok; else
        state=FAILED
        failed="$failed $name"
    fi
    printf 'check: %-8s %s (%d s)\n' "$name" "$state" $(($(date +%s) - start))
}

step lint .venv/bin/python -m ruff check minitron tests
step format .venv/bin/python -m ruff format --check minitron tests
step layers .venv/bin/lint-imports --no-logo
step shell .venv/bin/shellcheck .ci/run .ci/check.sh launch/setup.sh launch/torchrun.sh launch/slurm/common.sh \
    docker/install.sh docker/test.sh
step types .venv/bin/python -m mypy
step docker .venv/bin/hadolint --no-color docker/Dockerfile
[ -z "$failed" ] || {
    printf 'check: failed:%s (make format mends most of lint and format)\n' "$failed" >&2
    exit 1
}
