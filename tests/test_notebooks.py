"""Every notebook runs from its first cell to its last, and is stored without outputs."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
#: Those that run with the fast tests.
QUICK = ("quickstart", "predict_and_evaluate")

# The pictures that each draws, and some of what it prints.
SHOWN = {
    "alignment": (["alignment_levels.png", "alignment_beside.png", "alignment_turned.png"], ["crop4, voxels of"]),
    "augmentation_and_targets": (
        ["augmented.png", "intensity.png", "targets.png"],
        ["labels     torch.int64 [1, 16, 48, 48]", "'er': '100% known'"],
    ),
    "memory_and_streams": (
        ["decision.png", "waits.png"],
        ["finished    8.00 MiB", "compact     1.50 MiB", "128^3: a finished batch is 128.0 MiB"],
    ),
    "predict_and_evaluate": (["scores.png", "overlay.png"], ["1 of 1 block done", "crop4  mito"]),
    "quickstart": (
        ["batch.png"],
        ["raw     torch.float32 [3, 1, 16, 48, 48]", "32^3: off, 0 ahead", "128^3: on, 2 ahead", "val/dice"],
    ),
}


class ThisPython(AsyncKernelManager):
    """A kernel manager that starts this interpreter, not an installed kernel called python3."""

    kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
    )


def test_there_are_notebooks():
    names = ["alignment", "augmentation_and_targets", "memory_and_streams", "predict_and_evaluate", "quickstart"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebooks_run(path, volume, tmp_path, monkeypatch):
    # Connection files, history and profile stay out of the user's home.
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    (work / "demo_data").mkdir(parents=True)
    # The volume that the notebook would write, which this session has written already.
    (work / "demo_data" / "demo.zarr").symlink_to(volume.path)

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sys\nprint(sys.executable)"))
    NotebookClient(
        notebook, timeout=590, kernel_manager_class=ThisPython, resources={"metadata": {"path": str(work)}}
    ).execute()
    assert notebook.cells[0].outputs[0].text.strip() == sys.executable
    pictures, texts = SHOWN[path.stem]
    for picture in pictures:
        assert (work / picture).stat().st_size > 5000
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    for text in texts:
        assert text in printed
