"""Exports a model: `python -m effnetv2_jax.tools.export --model=DIR --output=DIR --format=onnx`.

Formats are stablehlo, saved_model, tflite and onnx; `weights.export` says what each of them is.
The program is run and compared with the network before the output appears. Exit status: 0 done, 2
bad input, or a program whose outputs are not the network's.
"""

from __future__ import annotations

from absl import flags

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError
from effnetv2_jax.weights.export import INPUT, TOLERANCE, export_model, list_formats

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    """The command line."""
    del arguments
    for flag in ("model", "output"):
        if not FLAGS[flag].value:
            raise InputError(f"--{flag} is missing: name a folder.")
    export = export_model(
        FLAGS.model,
        FLAGS.output,
        FLAGS.format,
        batch_size=FLAGS.batch_size,
        scores=FLAGS.scores,
        tolerance=FLAGS.tolerance,
        force=FLAGS.force,
    )
    print(
        f"{export.folder}: {export.num_bytes:,} bytes; on random images it is at most "
        f"{export.error:.2g} of the outputs' spread away from the network. With uint8 {INPUT}:\n\n"
        f"{export.usage}"
    )


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "The model folder.")
    flags.DEFINE_string("output", None, "The folder to write.")
    flags.DEFINE_string("format", "stablehlo", f"One of {', '.join(list_formats())}.")
    flags.DEFINE_integer(
        "batch_size", None, "Images per call; by default any number for stablehlo, else 1."
    )
    flags.DEFINE_bool("scores", False, "Probabilities instead of logits.")
    flags.DEFINE_float(
        "tolerance", TOLERANCE, "The largest distance allowed, in units of the outputs' spread."
    )
    flags.DEFINE_bool("force", False, "Replace an export that is there.")


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        usage="python -m effnetv2_jax.tools.export --model=DIR --output=DIR --format=onnx",
    )
