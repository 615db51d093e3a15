"""Both notebooks run from top to bottom, at a small size, in a kernel of this very Python."""

import importlib.util
import json
import os
import sys

import pytest
from test_walls import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel specification of this Python, so that none has to be installed, in a quick and small environment."""
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": words, "display_name": "this Python", "language": "python"}
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    for key, value in {
        "JUPYTER_PATH": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "R1JAX_NOTEBOOK_SIZE": "small",
        "WORKDIR": str(tmp_path / "run"),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }.items():
        monkeypatch.setenv(key, value)


def execute(name: str) -> str:
    """Runs a notebook and returns everything that it printed, its pictures as their mime types."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or " ".join(output.get("data", ())) for output in outputs)


def test_the_demo(kernel):
    told = execute("zero_colab.ipynb")
    assert "reasoning_rl 4/4" in told and "pass_at_1" in told and "TRAINED" in told and "image/png" in told


@pytest.mark.skipif(importlib.util.find_spec("r1jax.plan") is None, reason="r1jax.plan is not there")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
def test_the_layouts(kernel):
    told = execute("sharding_ablation.ipynb")
    assert "fsdp4" in told and "hbm_gb" in told and "image/png" in told


def test_the_notebooks_are_stored_without_outputs():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path
