"""Foreign weights to ours and back, with every tensor accounted for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetv2_jax.data.label_space import imagenet1k_label_space
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.models.specs import Family, Spec, get_spec
from effnetv2_jax.weights import pytorch
from effnetv2_jax.weights.keras import keras_layout, read_keras
from effnetv2_jax.weights.layout import Entry, Layout, Tensors
from effnetv2_jax.weights.model_folder import ModelSpec, expected_shapes
from effnetv2_jax.weights.preprocessing import default_preprocessing
from effnetv2_jax.weights.released import read_tf_checkpoint, released_layout


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of foreign file.

    Attributes:
      layout: names and axes, for a variant's table.
      read: the tensors of a file, for a variant.
      padding: of the networks that these weights were trained in.
      families: of networks that it has.
    """

    layout: Callable[[Spec], Layout]
    read: Callable[[str, Spec], Tensors]
    padding: str = "same"
    families: tuple[Family, ...] = ("efficientnet",)

    def entries(self, source: str, variant: str) -> tuple[Entry, ...]:
        """Every tensor of a variant; `InputError` for one that this source, of that name, lacks."""
        spec = get_spec(variant)
        if spec.family not in self.families:
            others = [name for name, other in SOURCES.items() if spec.family in other.families]
            raise InputError(f"{source} has no {variant} here: choose {' or '.join(others)}.")
        return self.layout(spec).entries(spec)


def _state_dict(path: str, spec: Spec) -> Tensors:
    del spec
    return pytorch.read_state_dict(path)


SOURCES: dict[str, Source] = {
    "released": Source(released_layout, lambda path, spec: read_tf_checkpoint(path)),
    "timm": Source(pytorch.timm_layout, _state_dict),
    "torchvision": Source(
        pytorch.torchvision_layout,
        _state_dict,
        padding="symmetric",
        families=("efficientnet", "resnet"),
    ),
    "keras": Source(keras_layout, read_keras),
    "efficientnet_pytorch": Source(pytorch.efficientnet_pytorch_layout, _state_dict),
    "plain_pytorch": Source(pytorch.plain_pytorch_layout, _state_dict, padding="symmetric"),
}
# Layouts that can be written: state dicts.
TARGETS = ("timm", "torchvision", "efficientnet_pytorch", "plain_pytorch")


@dataclasses.dataclass(frozen=True)
class Converted:
    """Weights in our form.

    Attributes:
      spec: what they are.
      variables: {'params', 'batch_stats'}.
      matched: the number of tensors that were found.
      missing: names of ours that the file lacks; random values stand for them.
      unused: names of the file that have no place in the network.
    """

    spec: ModelSpec
    variables: dict[str, Any]
    matched: int
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def report(self) -> str:
        """One line, or more where tensors are left over."""
        lines = [
            f"{self.matched} tensors matched, {len(self.missing)} missing, {len(self.unused)} "
            "unused."
        ]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unused: {name}" for name in self.unused]
        return "\n".join(lines)


def convert(
    source: str,
    variant: str,
    path: str | os.PathLike[str],
    *,
    allow_mismatch: bool = False,
    **spec_overrides: Any,
) -> Converted:
    """Reads a foreign file.

    Args:
      source: one of `SOURCES`.
      variant: which network it holds.
      path: the file, or a checkpoint's folder.
      allow_mismatch: whether tensors may be missing (random values take their place) or unused.
      **spec_overrides: fields of the `ModelSpec` that are known better than by default.

    Raises:
      InputError: the file cannot be read, or is not of that variant.
    """
    if source not in SOURCES:
        raise unknown_name("source", source, SOURCES)
    entries = SOURCES[source].entries(source, variant)
    tensors = SOURCES[source].read(os.fspath(path), get_spec(variant))
    found = {e.ours: _in_our_axes(e, tensors) for e in entries if e.theirs in tensors}
    used = {entry.theirs for entry in entries}
    unused = tuple(
        sorted(n for n in set(tensors) - used if not n.endswith(pytorch.IGNORED_SUFFIXES))
    )
    if not found:
        example = next(iter(sorted(tensors)), "nothing")
        raise InputError(
            f"{os.fspath(path)!r} has none of the names of {source} (it has {example!r}): name "
            "another source."
        )
    spec = _spec(source, variant, found, spec_overrides)
    expected = expected_shapes(spec)
    missing = tuple(sorted(set(expected) - set(found)))
    misshapen = [
        f"{name} has shape {found[name].shape} instead of {expected[name]}"
        for name in found
        if found[name].shape != expected[name]
    ]
    problems = misshapen
    if not allow_mismatch:
        problems = [
            *(f"{name} is missing" for name in missing),
            *misshapen,
            *(f"{name} is unused" for name in unused),
        ]
    if problems:
        more = f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise InputError(
            f"{os.fspath(path)!r} is not {variant} of {source} ({problems[0]}{more}): "
            f"name its variant and source{'' if misshapen else ', or give --allow_mismatch'}."
        )
    values = {name: np.ascontiguousarray(value) for name, value in found.items()}
    if missing:
        values = {**_random(spec, missing), **values}
    return Converted(spec, unflatten_dict(values, sep="/"), len(found), missing, unused)


def convert_back(target: str, spec: ModelSpec, variables: Mapping[str, Any]) -> Tensors:
    """Our weights under the names and in the axes of a foreign state dict.

    Args:
      target: one of `TARGETS`.
      spec: of the variables.
      variables: {'params', 'batch_stats'}.

    Raises:
      InputError: an unknown target, or one whose networks pad differently.
    """
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    if spec.padding != SOURCES[target].padding:
        raise InputError(
            f"the weights were trained with {spec.padding} padding and {target} has "
            f"{SOURCES[target].padding}: about a point of accuracy would be lost, so choose "
            f"another target of {', '.join(TARGETS)}."
        )
    if spec.width_multiplier != 1 or spec.depth_multiplier != 1 or spec.stem_stride != 2:
        raise InputError(f"{target} has no cut-down {spec.variant}: convert a whole one.")
    flat = flatten_dict(dict(variables), sep="/")
    tensors = {
        entry.theirs: entry.to_theirs(np.asarray(flat[entry.ours], np.float32))
        for entry in SOURCES[target].entries(target, spec.variant)
    }
    for name in [n for n in tensors if n.endswith(".running_mean")]:
        tensors[name.removesuffix("running_mean") + "num_batches_tracked"] = np.array(0, np.int64)
    return tensors


def _spec(
    source: str, variant: str, found: Mapping[str, np.ndarray], overrides: Mapping[str, Any]
) -> ModelSpec:
    bias = found.get("params/classifier/bias")
    num_classes = 1000 if bias is None else bias.size
    table = get_spec(variant)
    fields = {
        "variant": variant,
        "num_classes": num_classes,
        "train_size": table.train_size,
        "padding": SOURCES[source].padding,
        "source": source,
        "scores": "softmax",
        **default_preprocessing(source, variant, num_classes),
        **(_imagenet1k_classes() if num_classes == 1000 else {}),
        **overrides,
    }
    return ModelSpec(**fields)


def _imagenet1k_classes() -> dict[str, Any]:
    """A thousand classes of published weights are those of ImageNet-1k, in its order."""
    space = imagenet1k_label_space()
    return {"label_space": space.name, "classes": space.synsets}


def _in_our_axes(entry: Entry, tensors: Tensors) -> np.ndarray:
    value = tensors[entry.theirs]
    # With another number of axes it is left as it is: its shape is then reported as wrong.
    has_axes = entry.axes is None or value.ndim == len(entry.axes)
    return entry.from_theirs(value) if has_axes else value


def _random(spec: ModelSpec, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        # What does not lead to these tensors, the whole network's forward pass, is not compiled.
        variables = spec.create_model().init(key, jnp.zeros((1, 32, 32, 3)))
        flat = flatten_dict(variables, sep="/")
        return {name: flat[name] for name in names}

    return {name: np.asarray(value) for name, value in init(jax.random.key(0)).items()}
