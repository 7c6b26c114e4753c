#!/bin/sh
# The whole story on the bundled model and data: look at the machine, the plan and the rows; train an
# adapter, measure it against its base, ask it a question, merge it, draw its curves. Run by
# `make demo`; nothing is downloaded. Each command is printed as it can be typed again.
set -eu
BIN=${BIN:-.venv/bin}
# A folder of its own for every run, so that no earlier run is overwritten.
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

printf '# In this folder jax-lora is %s/jax-lora.\n' "$BIN"
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
printf '\n# Go on: talk with it, or give it your own model and rows.\n'
printf '$ jax-lora chat --adapter-path %s\n' "$OUT"
printf '$ jax-lora train path/to/hf_folder --data path/to/rows\n'
