#!/bin/sh
# Run the tests on the newest JAX, which needs a newer Python than the oldest supported one.
# `make test-newest` runs this script. It succeeds without running tests if no such Python is installed.
# With the argument `setup`, it only creates the environment.
#
# It runs the tests that depend most on JAX: the transform and what it rests on, models, PEFT files, and
# a few commands that use every part. All architectures are in tests/models/test_decoders.py. The other
# tests run on the locked version in `make test`, and on both ends of the range in `make test-matrix`.
# The tests that compare bits run again with all optimizations of XLA, which the others leave out.
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
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --upgrade \
    -e '.[cli,test]'
  touch "$VENV/.installed"
fi
[ "${1:-}" = setup ] && exit
"$VENV/bin/python" -c 'import sys, jax; print(f"test-newest: Python {sys.version.split()[0]}, jax {jax.__version__}")'
cd tests
run() { "../$VENV/bin/python" -m pytest -q -n auto --dist worksteal -m "not slow" "$@"; }
run \
  algebra checkpoint peft transform updates \
  test_adapter.py test_dropout.py test_init.py test_merge.py test_optimizers.py test_public_jax.py \
  test_quantize.py test_training_states.py \
  models/test_attention_kernels.py models/test_decoders.py models/test_decoding.py \
  models/test_mesh_sharding.py models/test_quantized_loading.py models/test_rematerialization.py \
  finetune/test_process_group.py finetune/test_step.py cli/test_distributed.py cli/test_mesh.py "$@"
JAX_LORA_OPTIMIZED_TESTS=1 run \
  algebra/test_dora.py::test_step_zero_is_the_base_bit_by_bit kernels/test_stacks.py \
  transform/test_models.py test_merge.py test_optimizers.py test_training_states.py
