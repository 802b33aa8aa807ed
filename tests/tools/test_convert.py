"""The command that converts: what it writes, and that a mistake writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effnetv2_jax import load_model, save_model
from effnetv2_jax.errors import InputError
from effnetv2_jax.tools.convert import convert_file
from effnetv2_jax.weights.convert import convert_back
from effnetv2_jax.weights.model_folder import ModelSpec, expected_shapes, load_spec

VARIANT = "efficientnet-lite0"


def random_variables(spec):
    """Every tensor another random one."""
    from flax.traverse_util import unflatten_dict

    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in expected_shapes(spec).items()
    }
    return unflatten_dict(tensors, sep="/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, and the same weights as files of timm and efficientnet_pytorch."""
    root = tmp_path_factory.mktemp("convert")
    spec = ModelSpec(VARIANT, 10, 224, mean=(127.0,) * 3, licence="CC0")
    variables = random_variables(spec)
    save_model(root / "model", spec, variables)
    for target in ("timm", "efficientnet_pytorch"):
        save_file(convert_back(target, spec, variables), root / f"{target}.safetensors")
    return root


def test_there_and_back_is_exact(folder, tmp_path):
    report = convert_file("model", folder / "model", tmp_path / "a.safetensors", target="timm")
    assert "Written to" in report
    report = convert_file("timm", tmp_path / "a.safetensors", tmp_path / "b", variant=VARIANT)
    assert report.startswith("247 tensors matched, 0 missing, 0 unused.\n")
    _, before, _ = load_model(folder / "model")
    _, after, spec = load_model(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (spec.num_classes, spec.eval_size, spec.std) == (10, 224, (128.0, 128.0, 128.0))
    # The same tensors under the names of another layout.
    timm = load_file(tmp_path / "a.safetensors")
    other = load_file(folder / "efficientnet_pytorch.safetensors")
    np.testing.assert_array_equal(timm["conv_stem.weight"], other["_conv_stem.weight"])
    assert timm.keys() != other.keys() and len(timm) == len(other)


def test_a_thousand_classes_get_the_names_of_imagenet(tmp_path):
    spec = ModelSpec(VARIANT, 1000, 224)
    tensors = convert_back("timm", spec, random_variables(spec))
    save_file(tensors, tmp_path / "a.safetensors")
    convert_file("timm", tmp_path / "a.safetensors", tmp_path / "b", variant=VARIANT)
    written = json.loads((tmp_path / "b" / "model.json").read_text())
    assert written["label_space"] == "imagenet2012"
    assert written["classes"][0] == "n01440764"


MISTAKES = [
    ({"source": "tim"}, "unknown source 'tim': did you mean timm"),
    ({"target": "jax"}, "unknown target 'jax'"),
    ({"variant": None}, "source 'timm' needs a variant"),
    ({"source": "model", "input": "model"}, "source 'model' knows its variant: drop it"),
    ({"variant": "efficientnet-lite1"}, r"is not efficientnet-lite1 of timm \(.* is missing"),
    ({"variant": "efficientnetv2-s"}, "is not efficientnetv2-s of timm"),
    ({"source": "efficientnet_pytorch"}, "has none of the names of efficientnet_pytorch"),
    ({"input": "nothing.safetensors"}, "is not a file"),
    ({"output": "model"}, "holds a model already: name another, or give --force"),
    ({"output": "."}, "exists and is no model of ours"),
    (
        {"source": "model", "input": "model", "variant": None, "target": "torchvision"},
        r"must end in \.safetensors",
    ),
    (
        {
            "source": "model",
            "input": "model",
            "variant": None,
            "target": "torchvision",
            "output": "new.safetensors",
        },
        "trained with same padding and torchvision has symmetric",
    ),
    (
        {"source": "run", "input": "timm.safetensors", "variant": None},
        "is neither a model folder nor a workdir",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_write_nothing(folder, changes, message):
    arguments = {
        "source": "timm",
        "variant": VARIANT,
        "target": "model",
        "input": "timm.safetensors",
        "output": "new",
        **changes,
    }
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(InputError, match=message):
        convert_file(
            arguments.pop("source"),
            folder / arguments.pop("input"),
            folder / arguments.pop("output"),
            **arguments,
        )
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_the_command_line(folder, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "effnetv2_jax.tools.convert", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    input_flag = f"--input={folder / 'timm.safetensors'}"
    flags = ["--source=timm", f"--variant={VARIANT}", input_flag, f"--output={tmp_path / 'new'}"]
    result = run(*flags, "--mean=1,2,x")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "must be three numbers" in result.stderr
    result = run(*flags, "--mean=1,2,3", "--eval_size=64", "--licence=MIT")
    assert result.returncode == 0, result.stderr
    _, _, spec = load_model(tmp_path / "new")
    assert (spec.mean, spec.eval_size, spec.licence) == ((1.0, 2.0, 3.0), 64, "MIT")
    result = run(*flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))  # The last line without its end.
    assert run(*flags, "--force", f"--classes={names}").returncode == 0
    assert load_spec(tmp_path / "new").classes == tuple("abcdefghij")
    result = run(*flags, "--force", "--crop=centre")
    assert result.returncode == 2 and "did you mean center" in result.stderr.splitlines()[-1]
    assert load_spec(tmp_path / "new").classes == tuple("abcdefghij")
    # What a model says of itself may be set right.
    again = ["--source=model", f"--input={tmp_path / 'new'}", f"--output={tmp_path / 'again'}"]
    assert run(*again, "--eval_size=96").returncode == 0
    assert load_spec(tmp_path / "again").eval_size == 96
    assert run(*flags, "--force").returncode == 0
    _, _, spec = load_model(tmp_path / "new")
    assert spec.eval_size == 224
