#!/bin/sh
# Run the tests on the newest JAX, which needs a newer Python than the oldest supported one.
# `make test-newest` runs this script. It succeeds without running tests if no such Python is installed.
# With the argument `setup`, it only creates the environment.
#
# It runs the tests that depend most on JAX, and those that use many parts of the library: transform,
# models, PEFT files and commands. It skips the benchmarks, examples, notebooks and documents, the data,
# storage, Hub and report tests, which do not use JAX, and tests that the commands or `make test-matrix`
# cover: single architectures, among others, as all of them are in tests/models/test_decoders.py.
# Most XLA optimizations are disabled, as in `make test-matrix`: a new JAX mainly changes its API.
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
  --ignore=tests/foreign --ignore=tests/properties --ignore=tests/attacks --ignore=tests/interchange \
  --ignore=tests/hub --ignore=tests/storage --ignore-glob='tests/models/test_gemma*.py' \
  --ignore=tests/models/test_llama.py --ignore=tests/models/test_gpt2.py \
  --ignore=tests/models/test_encoders.py --ignore=tests/models/test_experts.py \
  --ignore=tests/models/test_decoding.py --ignore=tests/models/test_rematerialization.py "$@"
