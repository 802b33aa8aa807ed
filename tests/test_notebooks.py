"""The notebooks run from top to bottom, with settings that suit a CPU: `make test-parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parity
def test_predict_and_finetune(tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / "predict_and_finetune.ipynb", as_version=4)
    (settings,) = [cell for cell in notebook.cells if "IMAGE_SIZE = 96" in cell.source]
    small = {
        'WORK = Path("finetuned")': f"WORK = Path({str(tmp_path / 'work')!r})",
        "IMAGE_SIZE = 96": "IMAGE_SIZE = 48",
        "NUM_EPOCHS = 4.0": "NUM_EPOCHS = 1.0",
        "IMAGES_PER_CLASS = 100": "IMAGES_PER_CLASS = 20",
    }
    for old, new in small.items():
        assert settings.source.count(old) == 1
        settings.source = settings.source.replace(old, new)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    text = "\n".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "247 tensors matched, 0 missing, 0 unused." in text
    assert "china.jpg" in text and "%" in text
    assert "top-1 of held-out images: " in text
    assert text.count(": digit ") == 3
    assert (tmp_path / "work" / "model" / "model.safetensors").is_file()
