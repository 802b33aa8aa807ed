"""The notebooks run from top to bottom, with settings that suit a CPU: `make test-parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A kernel inherits the environment, in which the tests of this process have eight."""
    monkeypatch.setenv("XLA_FLAGS", "")


def execute(name, settings, folder):
    """Runs a notebook in a folder with other settings; returns what it printed."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    for old, new in settings.items():
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        assert cell.source.count(old) == 1
        cell.source = cell.source.replace(old, new)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return "\n".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.parity
def test_predict_and_finetune(tmp_path):
    small = {
        'WORK = Path("finetuned")': f"WORK = Path({str(tmp_path / 'work')!r})",
        "IMAGE_SIZE = 96": "IMAGE_SIZE = 48",
        "NUM_EPOCHS = 4.0": "NUM_EPOCHS = 1.0",
        "IMAGES_PER_CLASS = 100": "IMAGES_PER_CLASS = 20",
    }
    text = execute("predict_and_finetune.ipynb", small, tmp_path)
    assert "247 tensors matched, 0 missing, 0 unused." in text
    assert "china.jpg" in text and "%" in text
    assert "top-1 of held-out images: " in text
    assert text.count(": digit ") == 3
    assert (tmp_path / "work" / "model" / "model.safetensors").is_file()


@pytest.mark.parity
def test_colab_tpu(tmp_path):
    smaller = "config.model.update(width_multiplier=0.25, depth_multiplier=0.1)"
    small = {
        'WORKDIR = Path("runs/digits")': f"WORKDIR = Path({str(tmp_path / 'run')!r})",
        "config.num_epochs = NUM_EPOCHS": f"config.num_epochs = NUM_EPOCHS\n{smaller}",
        "NUM_EPOCHS = 13.0": "NUM_EPOCHS = 3.0",
    }
    text = execute("colab_tpu.ipynb", small, tmp_path)
    assert "1 x cpu" in text
    assert text.count(" of 359 held-out digits") == 2
    assert "step 1: " in text and text.count("s of them hidden") == 3
    assert (tmp_path / "run" / "progress.png").is_file()
