#!/bin/sh
# The tests again on the newest JAX, which needs a newer Python than the oldest one supported.
# Run by `make test-newest`. Without such an interpreter it says so and succeeds. With the word `setup`
# it makes the environment and stops.
#
# It runs the tests of what touches JAX most and of what uses all of the rest: transform, models, PEFT's
# files, the commands. `make test` and `make test-slow` alone test what is not part of the library
# (benchmarks, examples, notebooks, pages), what does not use JAX (rows, reports), and what the commands
# or `make test-matrix` cover too.
# XLA optimises little here, as in `make test-matrix`: what a new JAX changes are its interfaces.
set -eu
VENV=.venv-newest

works() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

find_python() {
  for version in 3.12 3.13 3.14; do
    for python in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
      if works "$python"; then
        echo "$python"
        return
      fi
    done
  done
}

PYTHON=${NEWEST_PYTHON:-$(find_python)}
if [ -z "$PYTHON" ]; then
  echo "test-newest: skipped, no Python 3.12 or newer on this machine"
  exit 0
fi

if [ ! -e "$VENV/.installed" ] || [ pyproject.toml -nt "$VENV/.installed" ]; then
  echo "Setting up $VENV with $PYTHON (once)"
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade -e '.[cli,test]'
  touch "$VENV/.installed"
fi
[ "${1:-}" = setup ] && exit
"$VENV/bin/python" -c 'import sys, jax; print(f"test-newest: Python {sys.version.split()[0]}, jax {jax.__version__}")'
export JAX_DISABLE_MOST_OPTIMIZATIONS=1
exec "$VENV/bin/python" -m pytest -q -n auto --dist worksteal -m "not slow" \
  --ignore=tests/test_benchmarks.py --ignore=tests/examples --ignore=tests/notebooks \
  --ignore=tests/test_explorer.py --ignore=tests/test_docs.py --ignore=tests/test_text_to_sql.py \
  --ignore=tests/data --ignore=tests/report --ignore=tests/plan --ignore=tests/finetune \
  --ignore=tests/foreign --ignore=tests/properties "$@"
