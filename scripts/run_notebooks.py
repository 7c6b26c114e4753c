"""Execute the notebooks and save their outputs.

    python scripts/run_notebooks.py                          # all notebooks
    python scripts/run_notebooks.py notebooks/01_what_is_lora.ipynb

The cell tagged "parameters" contains the settings of a notebook; `tests/notebooks` inserts smaller
values after it.
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
      notebook: The notebook, which is not modified.
      folder: Working directory of the kernel.
      parameters: Code to insert after the cell tagged "parameters".
      timeout: Seconds per cell.

    Returns:
      The notebook with outputs, without metadata that differs between runs.
    """
    notebook = nbformat.from_dict(notebook)
    if parameters:
        notebook.cells.insert(_parameters(notebook) + 1, nbformat.v4.new_code_cell(parameters))
    client = NotebookClient(
        notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # independent of the Python version
    return notebook


def _parameters(notebook: nbformat.NotebookNode) -> int:
    tagged = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise SystemExit(f"{len(tagged)} cells are tagged 'parameters', expected one")
    return tagged[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Execute the given notebooks, or all of them."""
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
