"""Pretrained weights in and out: `python -m effnetv2_jax.tools.convert --source=KIND ...`.

    --source=timm --variant=efficientnetv2-s --input=FILE --output=DIR    foreign weights to ours
    --source=run --input=WORKDIR --output=DIR                             a run's averaged weights
    --source=model --input=DIR --target=timm --output=FILE.safetensors    ours to a state dict

KIND is released, timm, torchvision, keras, efficientnet_pytorch or plain_pytorch. Every tensor is
accounted for, and nothing is written unless all of them fit. Exit status: 0 done, 2 bad input.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from absl import flags

from effnetv2_jax import command_line
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.weights.convert import SOURCES, TARGETS, convert, convert_back
from effnetv2_jax.weights.model_folder import check_output, save_model
from effnetv2_jax.weights.trained import load_trained

FLAGS = flags.FLAGS

# What was trained here rather than published elsewhere.
_OURS = ("run", "model")


def convert_file(
    source: str,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    target: str = "model",
    allow_mismatch: bool = False,
    force: bool = False,
    **spec_fields: Any,
) -> str:
    """Converts weights from one form to another.

    Args:
      source: a name of `SOURCES`, `run` (a workdir or one of its checkpoints) or `model` (a
        model folder).
      input_path: the file or folder to read.
      output_path: the model folder, or the .safetensors file, to write.
      variant: which network a foreign file holds; runs and models know it.
      target: `model`, or a layout of `TARGETS`.
      allow_mismatch: whether tensors of a foreign file may be missing or unused.
      force: whether an output that is there is replaced.
      **spec_fields: fields of `ModelSpec` that replace the defaults of a foreign file, or what a
        run or a model says of itself.

    Returns:
      What was done, in one line or more.

    Raises:
      InputError: bad input; nothing is written.
    """
    if source not in SOURCES and source not in _OURS:
        raise unknown_name("source", source, [*SOURCES, *_OURS])
    if target != "model" and target not in TARGETS:
        raise unknown_name("target", target, ["model", *TARGETS])
    if (variant is None) == (source in SOURCES):
        rule = "needs a variant, as efficientnetv2-s" if variant is None else "knows its variant"
        raise InputError(f"source {source!r} {rule}: {'give' if variant is None else 'drop'} it.")
    output = Path(output_path).expanduser().absolute()
    if target == "model":
        check_output(output, force=force)
    elif output.suffix != ".safetensors":
        raise InputError(f"output {str(output)!r} must end in .safetensors: rename it.")
    elif output.exists() and not force:
        raise InputError(f"{str(output)!r} exists: name another file, or give --force.")

    if variant is None:
        spec, variables = load_trained(input_path)
        spec = dataclasses.replace(spec, **spec_fields)
        report = f"{spec.variant} with {spec.num_classes} classes."
    else:
        converted = convert(
            source, variant, input_path, allow_mismatch=allow_mismatch, **spec_fields
        )
        spec, variables, report = converted.spec, converted.variables, converted.report()
    # It loads TensorFlow, which a mistake in the flags should not wait for.
    from effnetv2_jax.data.pipeline import check_evaluation

    check_evaluation(crop=spec.crop, crop_fraction=spec.crop_fraction, resize=spec.resize)
    if spec.eval_size < 1:
        raise InputError(f"eval_size {spec.eval_size} must be a positive number of pixels.")
    if target == "model":
        save_model(output, spec, variables, force=force)
    else:
        from safetensors.numpy import save_file

        tensors = convert_back(target, spec, variables)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.tmp")
        save_file(tensors, temporary)
        temporary.replace(output)
    return f"{report}\nWritten to {output}."


def _define_flags() -> None:
    kinds = ", ".join([*SOURCES, *_OURS])
    flags.DEFINE_string("source", None, f"What the input is: {kinds}.")
    flags.DEFINE_string("input", None, "File or folder to read.")
    flags.DEFINE_string("output", None, "Folder or .safetensors file to write.")
    flags.DEFINE_string("variant", None, "Network of a foreign file, as efficientnetv2-s.")
    flags.DEFINE_string("target", "model", f"What to write: model, {', '.join(TARGETS)}.")
    flags.DEFINE_bool("allow_mismatch", False, "Let tensors be missing or unused.")
    flags.DEFINE_bool("force", False, "Replace an output that is there.")
    flags.DEFINE_string("classes", None, "File of the classes' identifiers, one a line.")
    flags.DEFINE_string("licence", None, "Licence of the weights, kept in model.json.")
    flags.DEFINE_integer("eval_size", None, "Image size in pixels, if not the published one.")
    flags.DEFINE_list("mean", None, "Mean of the colours in grey levels, likewise.")
    flags.DEFINE_list("std", None, "What is divided by, likewise.")
    flags.DEFINE_string("crop", None, "Crop rule, likewise.")
    flags.DEFINE_string("resize", None, "Interpolation, likewise.")


def _spec_fields() -> dict[str, Any]:
    """The fields of `ModelSpec` that flags give."""
    fields: dict[str, Any] = {}
    for name in ("licence", "eval_size", "crop", "resize"):
        if FLAGS[name].value is not None:
            fields[name] = FLAGS[name].value
    for name in ("mean", "std"):
        given = FLAGS[name].value
        if given is None:
            continue
        try:
            fields[name] = tuple(float(value) for value in given)
        except ValueError as error:
            raise InputError(f"--{name} {given} must be three numbers, as 128,128,128.") from error
        if len(fields[name]) != 3:
            raise InputError(f"--{name} {given} must be three numbers, as 128,128,128.")
    if FLAGS.classes is not None:
        path = Path(FLAGS.classes).expanduser()
        if not path.is_file():
            raise InputError(f"--classes {str(path)!r} is not a file: give one name a line.")
        fields["classes"] = tuple(path.read_text(encoding="utf-8").splitlines())
        fields["label_space"] = path.name
    return fields


def main(arguments: list[str]) -> None:
    """The command line."""
    del arguments
    print(
        convert_file(
            FLAGS.source,
            FLAGS.input,
            FLAGS.output,
            variant=FLAGS.variant,
            target=FLAGS.target,
            allow_mismatch=FLAGS.allow_mismatch,
            force=FLAGS.force,
            **_spec_fields(),
        )
    )


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        required=("source", "input", "output"),
        usage="python -m effnetv2_jax.tools.convert --source=timm --variant=efficientnetv2-s "
        "--input=FILE --output=DIR",
    )
