"""Train the bundled task on float32, bfloat16, int8 and NF4 bases; compare loss and exact match.

Each run takes as long as `make demo`, or longer on a CPU, where 16-bit types are slow. A finished
run is recorded, and a second call of the same command continues with the missing ones.

    python -m benchmarks.quantized_quality runs
    python -m benchmarks.quantized_quality runs --markdown docs/quantized.md
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks import report

BASES = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "float32", "--quantize", "int8"),
    "NF4": ("--dtype", "float32", "--quantize", "nf4"),
}
SEEDS = (0, 1, 2)
Scores = dict[str, float]


def main() -> None:
    """Make the missing runs, print the table and, with --markdown, update a document."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=pathlib.Path, help="folder for the runs and their scores")
    parser.add_argument("--iters", type=int, help="training steps; by default, those of `train`")
    parser.add_argument("--limit", type=int, help="evaluate the first questions only")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--markdown", type=pathlib.Path, help="document to update")
    options = parser.parse_args()
    settings = {"iters": options.iters, "limit": options.limit}
    file = options.folder / "scores.json"
    scores = read(file, settings)
    for name in BASES if not options.table else ():
        for seed in SEEDS:
            if f"{name} {seed}" not in scores:
                scores[f"{name} {seed}"] = run(options.folder, name, seed, settings)
                file.write_text(json.dumps({"settings": settings, "scores": scores}, indent=2))
    missing = len(BASES) * len(SEEDS) - len(scores)
    command = report.command("benchmarks.quantized_quality")
    text = f"{report.machine()}.\n\n    {command}\n\n{table(scores)}"
    print(text + (f"\n\n{missing} runs are missing." if missing else ""))
    if options.markdown:
        if missing:
            sys.exit(f"{options.markdown} is unchanged: {missing} runs are missing")
        report.write_section(options.markdown, "quantized_quality", text)


def read(file: pathlib.Path, settings: dict[str, int | None]) -> dict[str, Scores]:
    """Read the recorded scores; exit if they are those of other settings."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    if found["settings"] != settings:
        sys.exit(f"{file} was made with {found['settings']}: use another folder")
    return found["scores"]


def run(folder: pathlib.Path, name: str, seed: int, settings: dict[str, int | None]) -> Scores:
    """Train and evaluate once."""
    run_folder = folder / f"{name}-{seed}"
    command = [*_COMMAND, "train", "--adapter-path", str(run_folder), "--seed", str(seed)]
    command += [*BASES[name], *_flag("--iters", settings["iters"])]
    subprocess.run(command, check=True)
    scores = folder / f"{name}-{seed}.json"
    command = [*_COMMAND, "eval", "--adapter-path", str(run_folder), "--json", str(scores)]
    subprocess.run([*command, *_flag("--limit", settings["limit"])], check=True)
    total = json.loads(scores.read_text())["adapter"]["all"]
    return {"loss": total["loss"], "exact": total["exact"]}


_COMMAND = (sys.executable, "-m", "jax_lora")


def _flag(name: str, value: int | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def table(scores: dict[str, Scores]) -> str:
    """Return mean and range of the recorded runs of each base."""
    rows = []
    for name in BASES:
        runs = [scores[f"{name} {seed}"] for seed in SEEDS if f"{name} {seed}" in scores]
        if runs:
            losses, exact = ([each[key] for each in runs] for key in ("loss", "exact"))
            rows.append(
                [
                    name, str(len(runs)),
                    f"{sum(losses) / len(runs):.4f}", f"{min(losses):.4f} to {max(losses):.4f}",
                    f"{sum(exact) / len(runs):.1%}", f"{min(exact):.1%} to {max(exact):.1%}",
                ]
            )  # fmt: skip
    return report.table(["base", "seeds", "loss", "range", "exact match", "range "], rows)


if __name__ == "__main__":
    main()
