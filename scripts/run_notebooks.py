"""Execute the notebooks from top to bottom and write their results into them.

    python scripts/run_notebooks.py                          # all of them
    python scripts/run_notebooks.py notebooks/01_what_is_lora.ipynb

The cell tagged "parameters" holds what can be changed; `tests/notebooks` puts small values behind
it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(
    notebook: nbformat.NotebookNode, folder: Path, parameters: str = "", timeout: int = 7200
) -> nbformat.NotebookNode:
    """Run every cell in a new kernel.

    Args:
      notebook: The notebook; it is not changed.
      folder: Where its kernel works.
      parameters: Code to run behind the cell tagged "parameters", if any.
      timeout: Seconds for a cell.

    Returns:
      The notebook with its results, and without anything that differs from run to run.
    """
    notebook = nbformat.from_dict(notebook)
    if parameters:
        notebook.cells.insert(_parameters(notebook) + 1, nbformat.v4.new_code_cell(parameters))
    client = NotebookClient(
        notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's Python
    return notebook


def _parameters(notebook: nbformat.NotebookNode) -> int:
    tagged = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise SystemExit(f"{len(tagged)} cells are tagged 'parameters'; there must be one")
    return tagged[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Execute the notebooks that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb"))
    )
    for path in parser.parse_args(argv).notebooks:
        print(f"{path} ...", flush=True)
        notebook = execute(nbformat.read(path, as_version=4), path.parent)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
