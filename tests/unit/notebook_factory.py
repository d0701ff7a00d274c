"""Small notebooks in the course's anatomy, for tests that execute real ones."""

from pathlib import Path

import nbformat

PARAMETERS = 'recipe = "tiny-cpu"  # recipe\nrun_dir = ""  # folder\noverrides = {}  # changes'


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """Write <folder>/<name>.ipynb with a parameters cell and one code cell "step-k" per source."""
    new = nbformat.v4.new_code_cell
    first = new(parameters, id="parameters", metadata={"tags": ["parameters"]})
    steps = [new(cell, id=f"step-{k}") for k, cell in enumerate(cells, 1)]
    notebook = nbformat.v4.new_notebook(cells=[first, *steps])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path
