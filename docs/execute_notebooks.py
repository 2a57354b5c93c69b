"""Run the tutorials and store their outputs, without what libraries write to stderr: `make notebooks`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """``notebook`` without stderr and times, and with the lines of one stream in one output."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


def main() -> None:
    """Run each notebook in a folder of its own."""
    for path in tqdm(NOTEBOOKS, desc="notebooks"):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
        nbformat.write(cleaned(notebook), path)


if __name__ == "__main__":
    main()
