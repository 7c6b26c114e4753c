#!/bin/sh
# The whole story on the bundled model and data: train an adapter, measure it against its base,
# ask it a question, list what was written. Run by `make demo`; nothing is downloaded.
set -eu
BIN=${BIN:-.venv/bin}
# A folder of its own for every run, so that no earlier run is overwritten.
OUT=${DEMO:-demo}/$(date +%Y%m%d-%H%M%S)
PROMPT=${PROMPT:-$(printf 'table books: title, author, year, price\nquestion: show the title of books with year above 1990\nsql:')}

step() { printf '\n== %s\n' "$*"; }

step "jax-lora train --adapter-path $OUT"
"$BIN/jax-lora" train --adapter-path "$OUT"

step "jax-lora eval --adapter-path $OUT --compare-base"
"$BIN/jax-lora" eval --adapter-path "$OUT" --compare-base

step "jax-lora generate --adapter-path $OUT --prompt ..."
printf '%s\n' "$PROMPT"
"$BIN/jax-lora" generate --adapter-path "$OUT" --prompt "$PROMPT"

step "files written to $OUT"
find "$OUT" -type f -exec du -ah {} + | sort -k 2
