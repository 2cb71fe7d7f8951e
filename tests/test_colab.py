"""Each notebook alone in an empty folder, in a fresh environment that has what a Colab has, from its first cell on."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
import yaml
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

import sources

pytestmark = pytest.mark.notebooks

SHIPPED = ("torch", "torchvision", "numpy", "matplotlib", "scipy", "sympy", "ipykernel")
NEVER_REPLACED = ("torch", "torchvision", "numpy")


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    """The Python of a fresh environment with nothing of the book, one for each worker: notebooks install into it."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pins = [line for line in (sources.ROOT / "requirements.txt").read_text().splitlines() if line.startswith(SHIPPED)]
    assert len(pins) == len(SHIPPED)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
    return python


@pytest.fixture(scope="module")
def redirected(tmp_path_factory) -> dict[str, str]:
    """Environment in which git finds this checkout, as it is now, at the repository's public address."""
    folder = tmp_path_factory.mktemp("address")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(sources.ROOT / name, folder)
    for package in ("ewc_code", "ewc_checks", "ewc_experiments", "ewc_plots"):
        shutil.copytree(sources.ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "init", "--quiet", "--initial-branch", "main"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "checkout"], check=True)
    url = yaml.safe_load((sources.ROOT / "_config.yml").read_text())["repository"]["url"]
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{folder}.insteadOf", "GIT_CONFIG_VALUE_0": url}


def versions(python: Path, names: tuple[str, ...]) -> str:
    code = f"from importlib import metadata; print([(n, metadata.version(n)) for n in {names!r}])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_environment_has_nothing_of_the_book(colab, tmp_path):
    absent = subprocess.run([colab, "-c", "import ewc_code"], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'ewc_code'" in absent.stderr


@pytest.mark.parametrize("name", [name.split("/")[-1] for name in sources.chapters()])
def test_run_all(name, colab, redirected, tmp_path, monkeypatch):
    before = versions(colab, NEVER_REPLACED)
    for key, value in redirected.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("EWC_DATA", os.environ.get("EWC_DATA") or "sample")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two notebooks run at a time
    monkeypatch.setenv("PATH", f"{colab.parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(sources.ROOT / f"notebooks/{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'SCALE = "laptop"' in first.source
    first.source = first.source.replace('SCALE = "laptop"', 'SCALE = "smoke"')
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first.source))  # the set-up runs twice
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = str(colab)
    client = NotebookClient(notebook, km=manager, timeout=None, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(out.get("text", "") for out in cell.outputs) for cell in code]
    assert "device:" in printed[0]
    assert "scale:  smoke" in printed[0]
    assert "scale:  smoke" in printed[1]
    for cell in code:
        if cell.source.startswith("# @title Text"):
            (shown,) = cell.outputs
            assert "«" not in shown.data["text/markdown"]
    assert versions(colab, NEVER_REPLACED) == before
    assert sys.prefix not in "".join(printed), "the notebook ran in the book's own environment"
