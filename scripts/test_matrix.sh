#!/bin/sh
# Run the core tests on every supported pair of Python and JAX, and on the oldest supported release of
# every dependency. `make test-matrix` runs this script, which writes docs/compatibility.md.
#
# The environments are kept in .venv-matrix. All rows run, and the script fails at the end if one failed.
# MATRIX_PYTHONS and MATRIX_JAXES choose other versions.
set -u
ENVS=.venv-matrix
TABLE=docs/compatibility.md
PYTHONS=${MATRIX_PYTHONS:-3.11 3.12 3.13}
JAXES=${MATRIX_JAXES:-0.10 0.11 0.12}
TOOLS="pytest hypothesis chex"
# Tests that need optional dependencies are excluded: commands, models and training.
TESTS="tests --ignore=tests/finetune --ignore=tests/models --ignore=tests/examples
  --ignore=tests/foreign --ignore=tests/cli --ignore=tests/data --ignore=tests/report
  --ignore=tests/peft --ignore=tests/interchange --ignore=tests/plan --ignore=tests/notebooks
  --ignore=tests/test_text_to_sql.py --ignore=tests/test_explorer.py --ignore=tests/test_readme.py
  --ignore=tests/test_docs.py --ignore=tests/test_benchmarks.py --ignore=tests/tiny_model.py"

find_python() {
  for python in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    if "$python" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null
    then
      echo "$python"
      return
    fi
  done
}

# The lower bounds of the dependencies in pyproject.toml, as requirements: jax==0.10 flax==0.12.7 ...
oldest() {
  "$1" -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print(*(each.replace(">=", "==") for each in tomllib.load(file)["project"]["dependencies"]))'
}

# install ENVIRONMENT PYTHON REQUIREMENT...: repeated when pyproject.toml changes.
install() {
  environment=$1 python=$2
  shift 2
  if [ ! -e "$environment/.installed" ] || [ pyproject.toml -nt "$environment/.installed" ]; then
    rm -rf "$environment" && "$python" -m venv "$environment" || return 1
    # shellcheck disable=SC2086 # several words
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
      "$@" $TOOLS -e . >"$environment.install.log" 2>&1 || return 1
    touch "$environment/.installed"
  fi
}

version_of() { "$1/bin/python" -c "import importlib.metadata as m; print(m.version('$2'))"; }

# counted LOG WORD: the number before a word in pytest's last line, or 0.
counted() { tail -n 1 "$1" | grep -oE "[0-9]+ $2" | grep -oE '[0-9]+' || echo 0; }

row() { printf '| %s | %s | %s | %s | %s | %s | %s |\n' "$@" >>"$ENVS/rows"; }

not_run() { # python jax reason
  echo "test-matrix: Python $1, jax $2: $3"
  row "$1" "$2" "" "" "" "" "$3"
}

# run NAME PYTHON-VERSION JAX-VERSION NOTE REQUIREMENT...
run() {
  name=$1 version=$2 jax=$3 note=$4
  shift 4
  python=$(find_python "$version")
  if [ -z "$python" ]; then
    not_run "$version" "$jax" "not run: this Python was not installed"
    return
  fi
  environment=$ENVS/$name
  if ! install "$environment" "$python" "$@"; then
    if grep -q "No matching distribution found for jax" "$environment.install.log"; then
      not_run "$version" "$jax" "not run: this jax does not support this Python"
    else
      tail -n 3 "$environment.install.log"
      not_run "$version" "$jax" "installation failed"
      failures=$((failures + 1))
    fi
    return
  fi
  # shellcheck disable=SC2086 # several words
  "$environment/bin/python" -m pytest -q -m "not slow" $TESTS >"$environment.log" 2>&1
  status=$?
  if [ "$status" -ne 0 ]; then
    failures=$((failures + 1))
    grep -E "^(FAILED|ERROR)" "$environment.log"
    note="${note:+$note; }FAILS"
  fi
  echo "test-matrix: Python $version, jax $(version_of "$environment" jax): $(tail -n 1 "$environment.log")"
  broken=$(($(counted "$environment.log" failed) + $(counted "$environment.log" error)))
  row "$version" "$(version_of "$environment" jax)" "$(version_of "$environment" flax)" \
    "$(counted "$environment.log" passed)" "$broken" "$(counted "$environment.log" skipped)" "$note"
}

mkdir -p "$ENVS"
: >"$ENVS/rows"
failures=0
for version in $PYTHONS; do
  for jax in $JAXES; do
    run "py$version-jax$jax" "$version" "$jax" "" "jax==$jax.*" "jaxlib==$jax.*"
  done
done
first=${PYTHONS%% *}
reader=$(find_python "$first")
if [ -n "$reader" ]; then
  pins=$(oldest "$reader")
  # shellcheck disable=SC2086 # several words
  run oldest "$first" oldest "oldest supported dependencies: $(echo $pins | sed 's/==/ /g; s/ \([a-z]\)/, \1/g')" $pins
else
  not_run "$first" oldest "not run: this Python was not installed"
fi

{
  cat <<'TEXT'
# Compatibility

Results of the core tests on every supported pair of Python and JAX, with the newest compatible
release of all other dependencies. `make test-matrix` runs the tests and writes this table.

| Python | jax | flax | passed | failed | skipped | note |
| --- | --- | --- | --- | --- | --- | --- |
TEXT
  cat "$ENVS/rows"
} >"$TABLE"
[ "$failures" -eq 0 ]
