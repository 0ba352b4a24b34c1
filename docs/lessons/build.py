"""The lessons as notebooks, run, with outputs and figures: `make lessons`. Says how long each took."""

import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent


def run(path: Path) -> None:
    """Run the cells of a lesson, and write them beside it."""
    notebook, began = jupytext.read(path), time.perf_counter()
    options = {"kernel_name": "python3", "extra_arguments": ["--log-level=ERROR"], "record_timing": False}
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=None, resources=where, **options).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}  # the same at each run
        if cell.cell_type == "code":  # without the progress bars
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    out = path.with_suffix(".ipynb")
    nbformat.write(notebook, out)
    tqdm.write(f"{out.name}: {time.perf_counter() - began:.0f} seconds, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for lesson in tqdm(sorted(HERE.glob("[1-9]_*.py")), "lessons"):
        run(lesson)
