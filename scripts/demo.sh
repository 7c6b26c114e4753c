#!/bin/sh
# Demonstrate the commands on the bundled model and data: check the machine, plan, show the data, train
# an adapter, evaluate it against the base model, generate, merge and plot the loss. `make demo` runs it.
# Nothing is downloaded. Each command is printed before it runs.
set -eu
BIN=${BIN:-.venv/bin}
# A new folder for every run, so that earlier runs are kept.
OUT=${DEMO:-demo}/$(date +%Y%m%d-%H%M%S)
PROMPT=${PROMPT:-'table books: title, author, year, price\nquestion: show the title of books with year above 1990\nsql:'}

run() {
  printf '\n$ jax-lora'
  for word; do
    case $word in
      *[!A-Za-z0-9_./=-]*) printf " '%s'" "$word" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
  printf '\n'
  "$BIN/jax-lora" "$@"
}

printf '# jax-lora stands for %s/jax-lora.\n' "$BIN"
run doctor
run plan
run data show -n 1
run train --adapter-path "$OUT"
run eval --adapter-path "$OUT" --compare-base
run generate --adapter-path "$OUT" --prompt "$PROMPT" --stop-at-newline
run fuse --adapter-path "$OUT" --save-path "$OUT/fused" --check
run plot "$OUT" --text
printf '\n# Written to %s:\n' "$OUT"
ls "$OUT" "$OUT/fused"
printf '\n# Next: chat with the adapter, or train your own model on your own data.\n'
printf '$ jax-lora chat --adapter-path %s\n' "$OUT"
printf '$ jax-lora train path/to/hf_folder --data path/to/data\n'
