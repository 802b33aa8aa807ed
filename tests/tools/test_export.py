"""`export`: every format by its own runtime against the network, and what is refused."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from effnetv2_jax import InputError, create_model, load_model, save_model
from effnetv2_jax.weights import export as module
from effnetv2_jax.weights.export import (
    TOLERANCE,
    compared_images,
    export_model,
    list_formats,
)
from effnetv2_jax.weights.model_folder import ModelSpec

ROOT = Path(__file__).parents[2]
# Each is installed by the extra `onnx`, which `dev` holds.
_MISSING = [
    name for name in ("tf2onnx", "onnx", "onnxruntime") if not importlib.util.find_spec(name)
]
needs_onnx = pytest.mark.skipif(bool(_MISSING), reason=f"the extra onnx lacks {_MISSING}")
FORMATS = [pytest.param(f, marks=needs_onnx if f == "onnx" else ()) for f in list_formats()]
TINY = {"width_multiplier": 0.25, "depth_multiplier": 0.2}


def random_model(path, variant="efficientnetv2-b0", eval_size=32, num_classes=7, **fields):
    """Every tensor is random and each channel has its own mean, so that none can be mistaken."""
    spec = ModelSpec(
        variant,
        num_classes,
        eval_size,
        mean=(123.7, 116.3, 103.5),
        std=(58.4, 57.1, 57.4),
        **fields,
    )
    network = create_model(
        variant, num_classes=num_classes, padding=spec.padding, **_multipliers(spec)
    )
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), images)
    random = np.random.default_rng(0)

    def randomize(keys, value):
        name = keys[-1].key
        if name in ("scale", "var"):
            return random.uniform(0.5, 1.5, value.shape).astype(np.float32)
        if name in ("bias", "mean"):
            return random.normal(0, 0.1, value.shape).astype(np.float32)
        return np.asarray(value)

    save_model(path, spec, jax.tree_util.tree_map_with_path(randomize, variables))
    return path


def _multipliers(spec):
    return {name: getattr(spec, name) for name in TINY}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "tiny", **TINY)


def reference(folder, images):
    """Logits of the network, with normalisation written out in NumPy."""
    network, variables, spec = load_model(folder)
    normalized = (images.astype(np.float32) - np.float32(spec.mean)) / np.float32(spec.std)
    return np.asarray(jax.jit(network.apply)(variables, normalized))


def run(export, images, output="logits"):
    """Does what the command tells users to do."""
    names = {"images": images}
    usage = export.usage
    if not importlib.util.find_spec("ai_edge_litert"):
        usage = usage.replace("ai_edge_litert.", "tensorflow.lite.python.")
    exec(usage, names)
    return np.asarray(names[output])


def assert_near(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape and got.dtype == np.float32
    assert np.abs(got - expected).max() <= tolerance * expected.std()


@pytest.mark.parametrize("format", FORMATS)
def test_a_program_answers_as_the_network_does(format, model, tmp_path):
    export = export_model(model, tmp_path / "out" / format, format)
    images = compared_images(3, 32)
    expected = reference(model, images)
    for batch in [images[:1], images] if format == "stablehlo" else [images[1:2]]:
        first = 0 if format == "stablehlo" else 1
        assert_near(run(export, batch), expected[first : first + len(batch)])
    assert 0 < export.error < TOLERANCE
    assert export.folder == tmp_path / "out" / format
    assert (export.folder / "model.json").read_bytes() == (model / "model.json").read_bytes()
    files = [file for file in export.folder.rglob("*") if file.is_file()]
    assert export.num_bytes == sum(file.stat().st_size for file in files)
    record = json.loads((export.folder / "export.json").read_text())
    batch = None if format == "stablehlo" else 1
    assert record["input"] == {"name": "images", "dtype": "uint8", "shape": [batch, 32, 32, 3]}
    assert record["output"] == {"name": "logits", "dtype": "float32", "shape": [batch, 7]}
    assert (export.folder / record["file"]).exists() and record["versions"][
        "jax"
    ] == jax.__version__
    # Neither intermediate files nor the temporary folder stay.
    assert sum(file.name.startswith("model.") for file in files) == (
        1 if format == "saved_model" else 2
    )
    assert [path.name for path in export.folder.parent.iterdir()] == [format]


@pytest.mark.parametrize("format", FORMATS)
def test_fixed_batch_and_symmetric_padding(format, tmp_path):
    model = random_model(tmp_path / "model", padding="symmetric", **TINY)
    export = export_model(model, tmp_path / "out", format, batch_size=5)
    images = compared_images(5, 32)
    assert_near(run(export, images), reference(model, images))
    with pytest.raises(Exception):  # noqa: B017 (each runtime has its own)
        run(export, images[:3])


def test_the_signature_of_a_saved_model_has_names(model, tmp_path):
    from effnetv2_jax.data.host_tf import tf

    export = export_model(model, tmp_path / "out", "saved_model")
    images = compared_images(1, 32)
    serve = tf.saved_model.load(str(export.folder)).signatures["serving_default"]
    assert_near(serve(images=tf.constant(images))["logits"].numpy(), reference(model, images))


@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
def test_scores(rule, tmp_path):
    model = random_model(tmp_path / "model", scores=rule, **TINY)
    export = export_model(model, tmp_path / "out", scores=True)
    images = compared_images(3, 32)
    got = run(export, images, "scores")
    logits = reference(model, images).astype(np.float64)
    odds = np.exp(logits)
    expected = odds / odds.sum(1, keepdims=True) if rule == "softmax" else odds / (1 + odds)
    assert_near(got, expected, 1e-3)
    assert json.loads((export.folder / "export.json").read_text())["output"]["name"] == "scores"


def test_stablehlo_is_for_three_platforms_and_needs_jax_alone(model, tmp_path):
    export = export_model(model, tmp_path / "out")
    code = f"""
import sys
import numpy as np
images = np.load({str(tmp_path / "images.npy")!r})
{export.usage}
np.save({str(tmp_path / "logits.npy")!r}, logits)
assert jax.export.deserialize(bytearray(content)).platforms == ("cpu", "tpu", "cuda")
assert not {{"effnetv2_jax", "flax", "tensorflow"}} & set(sys.modules)
"""
    images = compared_images(2, 32)
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert_near(np.load(tmp_path / "logits.npy"), reference(model, images))


def changed(program):
    variables = jax.tree.map(np.copy, dict(program.variables))
    variables["params"]["stem_conv"]["kernel"] *= 1.01
    return dataclasses.replace(program, variables=variables)


@pytest.mark.parametrize("format", FORMATS)
def test_another_networks_outputs_are_refused_and_nothing_stays(
    format, model, tmp_path, monkeypatch
):
    ours = module._network_outputs
    monkeypatch.setattr(
        module, "_network_outputs", lambda program, images: ours(changed(program), images)
    )
    with pytest.raises(InputError, match="of their spread away from the network's"):
        export_model(model, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    assert export_model(model, tmp_path / "out", format, tolerance=0.9).error > TOLERANCE


@pytest.mark.parametrize("wrong", ["nan", "shape", "type"])
def test_what_no_distance_tells_is_refused(wrong, model, tmp_path, monkeypatch):
    def read(folder, output):
        change = {
            "nan": lambda logits: logits * np.float32("nan"),
            "shape": lambda logits: logits[:, :1],
            "type": lambda logits: logits.astype(np.float64),
        }[wrong]
        runs = module._read_stablehlo(folder, output)
        return lambda images: change(runs(images))

    form = dataclasses.replace(module._FORMATS["stablehlo"], read=read)
    monkeypatch.setitem(module._FORMATS, "stablehlo", form)
    with pytest.raises(InputError, match="nothing was written"):
        export_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_not_finite_is_refused(model, tmp_path):
    _, variables, spec = load_model(model)
    variables["params"]["classifier"]["bias"][:] = np.nan
    save_model(tmp_path / "model", spec, variables)
    with pytest.raises(InputError, match="not finite"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_constant_network_is_exported(model, tmp_path):
    """Its outputs have no spread, and are the same everywhere."""
    _, variables, spec = load_model(model)
    for tensor in variables["params"]["classifier"].values():
        tensor[:] = 0
    save_model(tmp_path / "model", spec, variables)
    assert export_model(tmp_path / "model", tmp_path / "out").error == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"format": "onx"}, "unknown format 'onx': did you mean onnx"),
        ({"batch_size": 0}, "batch_size 0 must be 1 image or more"),
        ({"tolerance": 0.0}, "tolerance 0.0 must be between 0 and 1"),
        ({"tolerance": float("nan")}, "tolerance nan must be between 0 and 1"),
        ({"model": "nowhere"}, "'nowhere' holds no model.json"),
    ],
)
def test_bad_arguments(arguments, says, model, tmp_path):
    with pytest.raises(InputError, match=says):
        export_model(**{"model": model, "output": tmp_path / "out", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_model_is_refused(model, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        export_model(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_exports_are_replaced_and_only_by_force(model, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # Empty: nothing is lost.
    export_model(model, output)
    (output / "mine").touch()
    with pytest.raises(InputError, match="holds an export already"):
        export_model(model, output)
    assert (output / "mine").exists()
    export_model(model, output, force=True)
    assert not (output / "mine").exists()
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(InputError, match="exists and is no export"):
        export_model(model, model, force=True)
    assert sorted(path.name for path in model.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is no export"):
        export_model(model, tmp_path / "file", force=True)


def test_a_missing_package_is_named_with_its_extra(model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find(name)
    )
    with pytest.raises(InputError, match=r"needs tf2onnx: run `pip install effnetv2_jax\[onnx\]`"):
        export_model(model, tmp_path / "out", "onnx")


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.tools.export", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_command(model, tmp_path):
    output = tmp_path / "out"
    done = run_tool(f"--model={model}", f"--output={output}", "--batch_size=2")
    assert done.returncode == 0, done.stderr
    num_bytes = sum(file.stat().st_size for file in output.iterdir())
    assert f"{output}: {num_bytes:,} bytes; on random images" in done.stdout
    assert "logits = jax.jit(jax.export.deserialize(" in done.stdout
    again = run_tool(f"--model={model}", f"--output={output}", "--batch_size=2")
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in again.stderr


def test_the_command_without_a_model():
    refused = run_tool("--output=anywhere")
    assert refused.returncode == 2 and "error: --model is missing" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", ["efficientnetv2-b0", "efficientnet-lite0"])
def test_whole_networks(variant, format, tmp_path):
    model = random_model(tmp_path / "model", variant, 224, 1000)
    export = export_model(model, tmp_path / "out", format)
    print(f"{variant} {format}: {export.num_bytes:,} bytes, error {export.error:.2g}")
    assert 0 < export.error < TOLERANCE
    images = compared_images(1, 224)
    assert_near(run(export, images), reference(model, images))
