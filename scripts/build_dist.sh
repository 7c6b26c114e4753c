#!/bin/sh
# Build the sdist and the wheel in dist/, or in the folder that is the argument. `make dist` runs this
# script. The same commit gives the same bytes: SOURCE_DATE_EPOCH, the time of every file in them, is
# that of the commit.
set -eu
cd "$(dirname "$0")/.."
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
exec "${PYTHON:-.venv/bin/python}" -m hatchling build -d "${1:-dist}"
