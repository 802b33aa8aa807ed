"""A model folder as a program for another runtime, compared with the network before it is kept.

| format | written by | runs on | batch |
| --- | --- | --- | --- |
| `stablehlo` | `jax.export` | jax alone, on CPU, TPU and CUDA | any, or fixed |
| `saved_model` | jax2tf | TensorFlow, on CPU, TPU and CUDA | fixed |
| `tflite` | TensorFlow's converter, from jax2tf | LiteRT | fixed |
| `onnx` | tf2onnx, from `tflite` | ONNX Runtime | fixed |

A program maps uint8 images [N, S, S, 3], S the model's `eval_size`, to float32 logits
[N, num_classes]; normalisation is part of it, cropping and resizing are not. The output is a folder
with the program, `model.json` (the model's `ModelSpec`: crop, resize and class names) and
`export.json` (shapes, versions, the error that was seen).

JAX promises to run a `stablehlo` program with versions of jax up to 6 months newer or 3 weeks
older than the one that wrote it (docs.jax.dev/en/latest/export/export.html); later ones mostly do
as well. Whoever keeps a program for longer keeps the model folder too, and exports it again.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.steps import normalize
from effnetv2_jax.weights.model_folder import SPEC, ModelSpec, load_model
from effnetv2_jax.weights.output_folder import replacing_folder

RECORD = "export.json"
INPUT = "images"
# Of the outputs' spread: several times what float32 sums in another order come to.
TOLERANCE = 1e-4
_PLATFORMS = ("cpu", "tpu", "cuda")
# The fewest images whose outputs are compared.
_NUM_COMPARED = 4

Runner = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What is exported.

    Attributes:
      classify: maps variables and uint8 images [N, S, S, 3] to `output`, float32
        [N, num_classes]; a JAX function.
      variables: {'params', 'batch_stats'}.
      image_size: S, pixels.
      batch_size: N; None: any.
      output: the name of what it returns, `logits` or `scores`.
    """

    classify: Callable[[Any, Any], jax.Array]
    variables: Mapping[str, Any]
    image_size: int
    batch_size: int | None
    output: str

    def image_shape(self) -> tuple[int | None, int, int, int]:
        """[N, S, S, 3]."""
        return self.batch_size, self.image_size, self.image_size, 3


@dataclasses.dataclass(frozen=True)
class Export:
    """What `export_model` wrote.

    Attributes:
      folder: the output.
      num_bytes: of all files in it.
      error: largest distance from the network's outputs, in units of their spread.
      usage: Python that loads and calls the program.
    """

    folder: Path
    num_bytes: int
    error: float
    usage: str


def export_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "stablehlo",
    *,
    batch_size: int | None = None,
    scores: bool = False,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Export:
    """Exports a model folder; the output appears whole and compared, or not at all.

    The written program is loaded by its own runtime and given at least 4 images. Its error is the
    largest distance from the network's outputs, on CPU and in float32, divided by their spread:
    the standard deviation over images and classes. More than `tolerance` is refused.

    Args:
      model: a model folder.
      output: the folder to write.
      format: one of `list_formats()`.
      batch_size: images per call; None: any number for `stablehlo`, else 1.
      scores: whether probabilities come out instead of logits, by the model's own rule
        (`ModelSpec.scores`).
      tolerance: the largest error that is kept.
      force: whether an export that is there is replaced.

    Raises:
      InputError: an argument is out of range, the output exists, the model is missing or damaged,
        a package is not installed, or the program's outputs are not those of the network.
    """
    if format not in _FORMATS:
        raise unknown_name("format", format, _FORMATS)
    form = _FORMATS[format]
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size {batch_size} must be 1 image or more.")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance} must be between 0 and 1, as {TOLERANCE} is.")
    folder = Path(output).expanduser().absolute()
    _check_output(folder, force=force)
    for package in form.packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"format {format!r} needs {package}: run `pip install effnetv2_jax[{format}]`."
            )
    network, variables, spec = load_model(model)
    if batch_size is None and not form.any_batch:
        batch_size = 1
    name = "scores" if scores else "logits"
    program = Program(
        _classifier(network, spec, scores), variables, spec.eval_size, batch_size, name
    )

    with replacing_folder(folder) as temporary:
        # The comparison's numbers are those of float32 on CPU, whatever else this machine has.
        with jax.default_device(_cpu()):
            form.write(program, temporary)
            error = _compare(program, form.read(temporary, program.output))
        # A NaN is refused as well.
        if not error <= tolerance:
            raise InputError(
                f"the {format} program's {name} are up to {error:.2g} of their spread away from "
                f"the network's, more than the tolerance {tolerance:g}: nothing was written; "
                "export another format, or give a larger tolerance."
            )
        shutil.copyfile(Path(model).expanduser() / SPEC, temporary / SPEC)
        record = _record(format, program, spec, error)
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    usage = form.usage.format(file=str(folder / form.file), output=name)
    return Export(folder, num_bytes, error, usage)


def list_formats() -> tuple[str, ...]:
    """The formats that `export_model` writes."""
    return tuple(_FORMATS)


def _check_output(folder: Path, *, force: bool) -> None:
    """Raises `InputError` if an export cannot be written there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    # A model folder is never replaced: its weights may be the only ones.
    if not (folder / RECORD).is_file():
        raise InputError(f"{str(folder)!r} exists and is no export: name a new folder.")
    if not force:
        raise InputError(f"{str(folder)!r} holds an export already: name another, or give --force.")


def _classifier(network: Any, spec: ModelSpec, scores: bool) -> Callable[[Any, Any], jax.Array]:
    def classify(variables: Any, images: jax.Array) -> jax.Array:
        logits = network.apply(variables, normalize(images, spec.mean, spec.std))
        if not scores:
            return logits
        return jax.nn.softmax(logits) if spec.scores == "softmax" else jax.nn.sigmoid(logits)

    return classify


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise InputError(
            "JAX sees no CPU, on which an export is compared: add cpu to the environment variable "
            "JAX_PLATFORMS, for instance cuda,cpu."
        ) from error


def _compare(program: Program, run: Runner) -> float:
    """The error of `export_model`; infinite if outputs differ in shape or type."""
    if program.batch_size is None:
        edges = [0, 1, _NUM_COMPARED]
    else:
        num_batches = -(-_NUM_COMPARED // program.batch_size)
        edges = [index * program.batch_size for index in range(num_batches + 1)]
    images = compared_images(edges[-1], program.image_size)
    expected = _network_outputs(program, images)
    if not np.isfinite(expected).all():
        raise InputError(
            "the network's own outputs are not finite: train or convert the model again."
        )
    got = np.concatenate([run(images[first:last]) for first, last in itertools.pairwise(edges)])
    if got.shape != expected.shape or got.dtype != np.float32:
        return float("inf")
    distance = float(np.abs(got - expected).max())
    if distance == 0:
        return 0.0
    spread = float(expected.std())
    return distance / spread if spread > 0 else float("inf")


def _network_outputs(program: Program, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(program.classify)(program.variables, images))


def compared_images(count: int, size: int) -> np.ndarray:
    """Random patches of every scale over a random grey, so that many filters respond.

    Returns:
      uint8 [count, size, size, 3], always the same.
    """
    random = np.random.default_rng(0)
    images = random.uniform(64, 192, (count, 1, 1, 3)) + np.zeros((count, size, size, 3))
    cell = 1
    while cell < size:
        cells = -(-size // cell)
        patches = random.normal(0, 16, (count, cells, cells, 3))
        images += patches.repeat(cell, axis=1).repeat(cell, axis=2)[:, :size, :size]
        cell *= 4
    return np.clip(images, 0, 255).astype(np.uint8)


def _record(format: str, program: Program, spec: ModelSpec, error: float) -> dict[str, Any]:
    packages = ("effnetv2_jax", "jax", *_FORMATS[format].written_with)
    versions = {package: importlib.import_module(package).__version__ for package in packages}
    return {
        "format": format,
        "file": _FORMATS[format].file,
        "input": {"name": INPUT, "dtype": "uint8", "shape": program.image_shape()},
        "output": {
            "name": program.output,
            "dtype": "float32",
            "shape": (program.batch_size, spec.num_classes),
        },
        "error": error,
        "versions": versions,
    }


def _write_stablehlo(program: Program, folder: Path) -> None:
    from jax import export

    batch = program.batch_size or export.symbolic_shape("b")[0]
    images = jax.ShapeDtypeStruct((batch, *program.image_shape()[1:]), jnp.uint8)
    function = jax.jit(lambda images: program.classify(program.variables, images))
    exported = export.export(function, platforms=_PLATFORMS)(images)
    (folder / _FORMATS["stablehlo"].file).write_bytes(exported.serialize())


def _read_stablehlo(folder: Path, output: str) -> Runner:
    del output  # It has no name there.
    from jax import export

    content = (folder / _FORMATS["stablehlo"].file).read_bytes()
    call = jax.jit(export.deserialize(bytearray(content)).call)
    return lambda images: np.asarray(call(images))


def _write_saved_model(
    program: Program, folder: Path, platforms: tuple[str, ...] = _PLATFORMS
) -> None:
    tf = _tensorflow()
    from jax.experimental import jax2tf

    # Of one platform alone is what a converter reads; nothing runs it.
    disabled_checks = [] if "cpu" in platforms else [jax2tf.DisabledSafetyCheck.platform()]
    convert = jax2tf.convert(
        program.classify,
        with_gradient=False,
        native_serialization_platforms=platforms,
        native_serialization_disabled_checks=disabled_checks,
    )
    module = tf.Module()
    # Variables, not constants: a graph of more than 2 GB cannot be saved.
    module.weights = tf.nest.map_structure(tf.Variable, dict(program.variables))
    signature = [tf.TensorSpec(program.image_shape(), tf.uint8, name=INPUT)]
    module.__call__ = tf.function(
        lambda images: convert(module.weights, images),
        autograph=False,
        input_signature=signature,
    )
    serve = tf.function(
        lambda images: {program.output: module.__call__(images)},
        autograph=False,
        input_signature=signature,
    )
    tf.saved_model.save(module, str(folder), signatures=serve)


def _read_saved_model(folder: Path, output: str) -> Runner:
    del output  # Only the signature has its name.
    loaded = _tensorflow().saved_model.load(str(folder))
    return lambda images: loaded(images).numpy()


def _write_tflite(program: Program, folder: Path) -> None:
    tf = _tensorflow()
    with tempfile.TemporaryDirectory(prefix="saved_model.", dir=folder) as saved:
        # As for an accelerator: TFLite has depthwise convolutions of its own and refuses the
        # CPU's matrix products, and its converter merges batch normalisation into convolutions.
        _write_saved_model(program, Path(saved), platforms=("tpu",))
        content = tf.lite.TFLiteConverter.from_saved_model(saved).convert()
    (folder / _FORMATS["tflite"].file).write_bytes(content)


def _read_tflite(folder: Path, output: str) -> Runner:
    with warnings.catch_warnings():
        # TensorFlow's own interpreter says that it will be removed in favour of LiteRT's.
        warnings.simplefilter("ignore")
        interpreter = _interpreter()(str(folder / _FORMATS["tflite"].file))
    run = interpreter.get_signature_runner()
    return lambda images: run(**{INPUT: images})[output]


def _interpreter() -> Any:
    """LiteRT's interpreter where it is installed, else TensorFlow's copy of it."""
    if importlib.util.find_spec("ai_edge_litert") is not None:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter
    return _tensorflow().lite.Interpreter


def _tensorflow() -> Any:
    """TensorFlow, blind to the accelerators that JAX uses."""
    from effnetv2_jax.data.host_tf import tf

    return tf


def _write_onnx(program: Program, folder: Path) -> None:
    _tensorflow()  # tf2onnx imports it too.
    import onnx
    import tf2onnx

    with tempfile.TemporaryDirectory(prefix="tflite.", dir=folder) as converted:
        _write_tflite(program, Path(converted))
        file = Path(converted) / _FORMATS["tflite"].file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # As in _read_tflite.
            model, _ = tf2onnx.convert.from_tflite(str(file))
    graph = model.graph
    # TFLite's names are not those of its signature.
    names = {graph.input[0].name: INPUT, graph.output[0].name: program.output}
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / _FORMATS["onnx"].file))


def _read_onnx(folder: Path, output: str) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(folder / _FORMATS["onnx"].file), providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run([output], {INPUT: images})[0]


@dataclasses.dataclass(frozen=True)
class _Format:
    """How a format is written to a folder and run from there.

    Attributes:
      file: the program's name in the folder.
      write: writes it.
      read: loads it with its own runtime; gets the folder and the output's name.
      usage: Python for users, with {file} and {output}.
      any_batch: whether the number of images may be left open.
      packages: importable names that the extra of the format's name installs.
      written_with: packages whose versions are recorded, besides jax's.
    """

    file: str
    write: Callable[[Program, Path], None]
    read: Callable[[Path, str], Runner]
    usage: str
    any_batch: bool = False
    packages: tuple[str, ...] = ()
    written_with: tuple[str, ...] = ()


_FORMATS = {
    "stablehlo": _Format(
        "model.jax_export",
        _write_stablehlo,
        _read_stablehlo,
        "import jax, pathlib\n"
        "content = pathlib.Path({file!r}).read_bytes()\n"
        "{output} = jax.jit(jax.export.deserialize(bytearray(content)).call)(images)",
        any_batch=True,
    ),
    "saved_model": _Format(
        "",
        _write_saved_model,
        _read_saved_model,
        "import tensorflow as tf\n{output} = tf.saved_model.load({file!r})(images)",
        written_with=("tensorflow",),
    ),
    "tflite": _Format(
        "model.tflite",
        _write_tflite,
        _read_tflite,
        "from ai_edge_litert.interpreter import Interpreter  # pip install ai-edge-litert\n"
        "run = Interpreter({file!r}).get_signature_runner()\n"
        '{output} = run(images=images)["{output}"]',
        written_with=("tensorflow",),
    ),
    "onnx": _Format(
        "model.onnx",
        _write_onnx,
        _read_onnx,
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession({file!r})\n"
        '{output} = session.run(["{output}"], {{"images": images}})[0]',
        packages=("tf2onnx", "onnx", "onnxruntime"),
        written_with=("tensorflow", "tf2onnx", "onnx"),
    ),
}
