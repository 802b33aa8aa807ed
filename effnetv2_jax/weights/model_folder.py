"""A model as a folder: `model.safetensors` with readable names, `model.json` with how to use it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.weights.output_folder import replacing_folder

WEIGHTS = "model.safetensors"
SPEC = "model.json"
_FORMAT = 1
SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What has to be known of trained weights to use them; evaluation and prediction obey it.

    Attributes:
      variant: a name of `list_variants()`.
      num_classes: width of the logits.
      eval_size: side of the images to classify, pixels.
      train_size: side of the largest training images, pixels; None if not known.
      mean: of each colour channel in grey levels, subtracted from the image.
      std: what is divided by, likewise.
      crop: rule of `data.preprocess.eval_crop`.
      crop_fraction: see there.
      resize: see there.
      padding: of the convolutions, `same` or `symmetric`.
      bn_epsilon: added to the variance by batch normalisation.
      stem_stride: of the first convolution.
      width_multiplier: of a cut-down network.
      depth_multiplier: likewise.
      scores: how logits become probabilities: `softmax`, or `sigmoid` where classes are
        independent.
      label_space: the name of the data set whose classes these are.
      classes: the identifier of each class, for instance its synset; None if not known. Outputs
        beyond them stand for no class.
      class_names: words for each class; None: the identifiers.
      source: where the weights come from.
      licence: of the weights, as far as known.
    """

    variant: str
    num_classes: int
    eval_size: int
    train_size: int | None = None
    mean: tuple[float, ...] = (128.0, 128.0, 128.0)
    std: tuple[float, ...] = (128.0, 128.0, 128.0)
    crop: str = "released"
    crop_fraction: float | None = None
    resize: str = "bilinear"
    padding: str = "same"
    bn_epsilon: float = 1e-3
    stem_stride: int = 2
    width_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    scores: str = "softmax"
    label_space: str = "unknown"
    classes: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    source: str = "unknown"
    licence: str = "unknown"

    def __post_init__(self) -> None:
        if self.scores not in SCORES:
            raise unknown_name("scores", self.scores, SCORES)
        for field in ("classes", "class_names"):
            names = getattr(self, field)
            if names is not None and len(names) > self.num_classes:
                raise InputError(
                    f"{field} has {len(names)} entries for {self.num_classes} classes: give at "
                    "most one for each."
                )

    def create_model(self, **overrides: Any) -> Any:
        """The network; `overrides` are those of `models.create.create_model`."""
        from effnetv2_jax.models.create import create_model

        return create_model(
            self.variant,
            **{
                "num_classes": self.num_classes,
                "padding": self.padding,
                "bn_epsilon": self.bn_epsilon,
                "stem_stride": self.stem_stride,
                "width_multiplier": self.width_multiplier,
                "depth_multiplier": self.depth_multiplier,
                **overrides,
            },
        )


def save_model(
    path: str | os.PathLike[str],
    spec: ModelSpec,
    variables: Mapping[str, Any],
    *,
    force: bool = False,
) -> Path:
    """Writes a model folder; it appears whole or not at all.

    Args:
      path: the folder.
      spec: describes the variables.
      variables: {'params', 'batch_stats'}.
      force: whether a model that is there is replaced.

    Raises:
      InputError: the folder exists, or the variables are not of the spec's network.
    """
    from safetensors.numpy import save_file

    folder = Path(path).expanduser().absolute()
    check_output(folder, force=force)
    tensors = {
        name: np.ascontiguousarray(np.asarray(value, np.float32))
        for name, value in flatten_dict(dict(variables), sep="/").items()
    }
    _check_tensors(spec, tensors, str(folder))
    with replacing_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(spec)}, indent=1)
        (temporary / SPEC).write_text(text + "\n", encoding="utf-8")
    return folder


def check_output(folder: Path, *, force: bool) -> None:
    """Raises `InputError` if a model cannot be written there."""
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    # An export has a spec too, but no weights.
    if not ((folder / SPEC).is_file() and (folder / WEIGHTS).is_file()):
        raise InputError(f"{str(folder)!r} exists and is no model of ours: name a new folder.")
    if not force:
        raise InputError(f"{str(folder)!r} holds a model already: name another, or give --force.")


def load_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """Reads `model.json`.

    Raises:
      InputError: it is missing, or no description of a model.
    """
    folder = Path(path).expanduser()
    file = folder / SPEC
    if not file.is_file():
        raise InputError(
            f"{str(folder)!r} holds no {SPEC}: name a folder that `python -m "
            "effnetv2_jax.tools.convert` wrote."
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        version = fields.pop("format")
        if version != _FORMAT:
            raise InputError(
                f"{str(file)!r} has format {version} and this is {_FORMAT}: install the "
                "effnetv2_jax that wrote it."
            )
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return ModelSpec(**fields)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(file)!r} describes no model ({error}): convert it again."
        ) from error


def load_model(
    path: str | os.PathLike[str], **overrides: Any
) -> tuple[Any, dict[str, Any], ModelSpec]:
    """Reads a model folder.

    Args:
      path: the folder.
      **overrides: attributes of the network, for instance `dtype="bfloat16"`.

    Returns:
      The Linen module, its variables {'params', 'batch_stats'} as float32 NumPy arrays, and the
      spec that says how to prepare images. `variables` and `spec` are of `model.apply`'s kind:
      `model.apply(variables, normalized_images)` gives logits.

    Raises:
      InputError: a file is missing or damaged, or a tensor is missing, unknown or misshapen.
    """
    from effnetv2_jax.weights.pytorch import read_safetensors

    folder = Path(path).expanduser()
    spec = load_spec(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{str(folder)!r} holds no {WEIGHTS}: convert the model again.")
    tensors = read_safetensors(folder / WEIGHTS)
    _check_tensors(spec, tensors, str(folder))
    return spec.create_model(**overrides), unflatten_dict(tensors, sep="/"), spec


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """`params/...` and `batch_stats/...` -> shape, of the spec's network."""
    import jax
    import jax.numpy as jnp

    model = spec.create_model()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}


def _check_tensors(spec: ModelSpec, tensors: Mapping[str, np.ndarray], where: str) -> None:
    expected = expected_shapes(spec)
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(tensors))]
    problems += [f"{name} is unknown" for name in sorted(set(tensors) - set(expected))]
    problems += [
        f"{name} has shape {tensors[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise InputError(
            f"the weights of {where!r} are not those of its {SPEC} ({problems[0]}{more}): convert "
            "the model again."
        )
