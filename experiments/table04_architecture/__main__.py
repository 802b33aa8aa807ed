"""Table 4: EfficientNetV2-S row by row, and the block lists that only the released code has."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.multiply_adds import count_multiply_adds
from effnetv2_jax.models.network import Network
from effnetv2_jax.models.specs import Block, get_spec, unroll
from experiments.experiment import EXACT, Experiment, Item, Rows, command, markdown, shown

_SIZE = 64  # Of the traced images, pixels; no number here depends on it.
S = "efficientnetv2-s"
FIRST_VERSION = f"{S}, first arXiv version"


def _line(operator: str, stride: int | str, channels: int, layers: int) -> str:
    """A stage as Table 4 prints it: operator; stride; channels; layers."""
    return f"{operator}; {stride}; {channels}; {layers}"


def _stem(channels: int) -> str:
    return _line("Conv3x3", 2, channels, 1)


def _fused(layers: int, stride: int, expansion: int, channels: int) -> str:
    return _line(f"Fused-MBConv{expansion}, k3x3", stride, channels, layers)


def _mbconv(layers: int, stride: int, expansion: int, channels: int) -> str:
    return _line(f"MBConv{expansion}, k3x3, SE0.25", stride, channels, layers)


def _head(channels: int) -> str:
    return _line("Conv1x1 & pooling & FC", "-", channels, 1)


# Table 4, of the later arXiv version.
PAPER = {
    S: (
        _stem(24),
        _fused(2, 1, 1, 24),
        _fused(4, 2, 4, 48),
        _fused(4, 2, 4, 64),
        _mbconv(6, 2, 4, 128),
        _mbconv(9, 1, 6, 160),
        _mbconv(15, 2, 6, 256),
        _head(1280),
    )
}
# Version -> Table 4's channels of stages 6 and 7, and Table 7's parameters in M.
PAPER_VERSIONS = {S: (256, 1280, 22), FIRST_VERSION: (272, 1792, 24)}
# automl efficientnetv2/effnetv2_configs.py; the paper prints none of these.
RELEASED = {
    "efficientnetv2-m": (
        _stem(24),
        _fused(3, 1, 1, 24),
        _fused(5, 2, 4, 48),
        _fused(5, 2, 4, 80),
        _mbconv(7, 2, 4, 160),
        _mbconv(14, 1, 6, 176),
        _mbconv(18, 2, 6, 304),
        _mbconv(5, 1, 6, 512),
        _head(1280),
    ),
    "efficientnetv2-l": (
        _stem(32),
        _fused(4, 1, 1, 32),
        _fused(7, 2, 4, 64),
        _fused(7, 2, 4, 96),
        _mbconv(10, 2, 4, 192),
        _mbconv(19, 1, 6, 224),
        _mbconv(25, 2, 6, 384),
        _mbconv(7, 1, 6, 640),
        _head(1280),
    ),
    "efficientnetv2-xl": (
        _stem(32),
        _fused(4, 1, 1, 32),
        _fused(8, 2, 4, 64),
        _fused(8, 2, 4, 96),
        _mbconv(16, 2, 4, 192),
        _mbconv(24, 1, 6, 256),
        _mbconv(32, 2, 6, 512),
        _mbconv(8, 1, 6, 640),
        _head(1280),
    ),
    "efficientnetv2-b0": (
        _stem(32),
        _fused(1, 1, 1, 16),
        _fused(2, 2, 4, 32),
        _fused(2, 2, 4, 48),
        _mbconv(3, 2, 4, 96),
        _mbconv(5, 1, 6, 112),
        _mbconv(8, 2, 6, 192),
        _head(1280),
    ),
}
_EQUAL_TO_PAPER, _EQUAL_TO_RELEASED = "equal to Table 4", "equal to the released code"
_STAGE_6, _STAGE_7 = "stage 6, channels", "stage 7, channels"


def _operator(block: Block) -> str:
    kernel = f"k{block.kernel_size}x{block.kernel_size}"
    kind = {"fused": "Fused-MBConv", "mbconv": "MBConv"}[block.operation]
    squeeze = "" if block.squeeze_ratio is None else f", SE{block.squeeze_ratio:g}"
    return f"{kind}{block.expansion}, {kernel}{squeeze}"


def _lines(model: Network) -> tuple[str, ...]:
    """A network's stages: the blocks from its table, stem and head as it runs them."""
    layers = {cost.name: cost for cost in count_multiply_adds(model, _SIZE)}
    stem, head = layers["stem_conv"], layers["head_conv"]
    kernel = f"Conv{stem.kernel_size}x{stem.kernel_size}"
    lines = [_line(kernel, stem.stride, stem.out_channels, 1)]
    for _, group in itertools.groupby(unroll(model.spec), key=lambda block: block.row):
        first, *others = group
        lines.append(_line(_operator(first), first.stride, first.out_filters, 1 + len(others)))
    kernel = f"Conv{head.kernel_size}x{head.kernel_size}"
    lines.append(_line(f"{kernel} & pooling & FC", "-", head.out_channels, 1))
    return tuple(lines)


def _parameters(model: Network) -> float:
    """Trainable ones, M."""
    images = jax.ShapeDtypeStruct((1, _SIZE, _SIZE, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) / 1e6


def _stages(variant: str) -> dict[str, str]:
    lines = _lines(create_model(variant))
    found = {f"stage {number}": line for number, line in enumerate(lines)}
    if variant in PAPER:
        found[_EQUAL_TO_PAPER] = "yes" if lines == PAPER[variant] else "no"
    else:
        found[_EQUAL_TO_RELEASED] = "yes" if lines == RELEASED[variant] else "no"
    return found


def _version(channels: int, head_channels: int) -> dict[str, float | int]:
    """S with other channels in stages 6 and 7."""
    spec = get_spec(S)
    last = dataclasses.replace(spec.rows[-1], filters=channels)
    spec = dataclasses.replace(spec, rows=(*spec.rows[:-1], last), head_filters=head_channels)
    model = create_model(S).clone(spec=spec)
    return {
        _STAGE_6: unroll(spec)[-1].out_filters,
        _STAGE_7: spec.scaled_end(spec.head_filters),
        "parameters, M": _parameters(model),
    }


def items() -> Sequence[Item]:
    """Each variant, and what the two versions of Table 4 change."""
    found = [Item(EXACT, v, functools.partial(_stages, v)) for v in (*PAPER, *RELEASED)]
    for version, (channels, head_channels, _) in PAPER_VERSIONS.items():
        name = f"{version}: parameters"
        found.append(Item(EXACT, name, functools.partial(_version, channels, head_channels)))
    return found


def tables(rows: Rows) -> Mapping[str, str]:
    """S beside Table 4, both versions of it, and the other variants."""
    small = []
    for number, paper in enumerate(PAPER[S]):
        line = rows.find(S, f"stage {number}")
        small.append((number, *line.split("; "), paper, "yes" if line == paper else "no"))
    versions = []
    for version, (channels, head_channels, parameters) in PAPER_VERSIONS.items():
        name = f"{version}: parameters"
        is_ours = rows.find(S, "stage 6").split("; ")[2:3] == [str(channels)]
        versions.append(
            (
                "first" if version == FIRST_VERSION else "later",
                channels,
                head_channels,
                shown(rows.number(name, "parameters, M"), ".2f"),
                parameters,
                "yes" if is_ours else "no",
            )
        )
    others = [
        (number, *(rows.find(variant, f"stage {number}") for variant in RELEASED))
        for number in range(max(map(len, RELEASED.values())))
    ]
    others.append((_EQUAL_TO_RELEASED, *(rows.find(v, _EQUAL_TO_RELEASED) for v in RELEASED)))
    return {
        "conclusion": f"{answer(rows)}.",
        "s": markdown(
            ("stage", "operator", "stride", "channels", "layers", "Table 4", "equal"), small
        ),
        "versions": markdown(
            (
                *("arXiv version", _STAGE_6, _STAGE_7, "parameters, M", "Table 7's, M"),
                "this project's S",
            ),
            versions,
        ),
        "others": markdown(
            ("stage", *(v.removeprefix("efficientnetv2-").upper() for v in RELEASED)), others
        ),
    }


def answer(rows: Rows) -> str:
    """How many rows agree."""
    lines = [rows.find(S, f"stage {number}") == line for number, line in enumerate(PAPER[S])]
    equal = [v for v in RELEASED if rows.find(v, _EQUAL_TO_RELEASED) == "yes"]
    names = ", ".join(v.removeprefix("efficientnetv2-").upper() for v in equal) or "none"
    later, first = (rows.number(f"{v}: parameters", "parameters, M") for v in PAPER_VERSIONS)
    return (
        f"{sum(lines)} of {len(lines)} rows of S are Table 4's, with {shown(later, '.2f')}M "
        f"parameters ({shown(first, '.2f')}M with the channels of the first arXiv version); "
        f"as in the released code: {names}"
    )


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Is the network that of Table 4, row by row?",
    items=items,
    tables=tables,
    answer=answer,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
