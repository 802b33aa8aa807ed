"""Figure 2: MBConv and Fused-MBConv, drawn from a trace of the network's own blocks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.efficientnet import EfficientNet
from effnetv2_jax.models.layers import BatchNorm, Conv, SqueezeExcite
from experiments.experiment import EXACT, Experiment, Item, Rows, command, markdown

VARIANT = "efficientnetv2-s"
EXPANSION = 4  # Of the blocks that the figure shows.
_SIZE = 64  # Of the traced images, pixels; no row depends on it.
SQUEEZE, SKIP = "squeeze-excitation", "skip"
# Block -> the operation that makes it, and the boxes of Figure 2 with the skip at the end. The
# figure leaves out normalisation and activations.
OPERATIONS = {"MBConv": "mbconv", "Fused-MBConv": "fused"}
PAPER = {
    "MBConv": (
        *("conv 1x1, C -> 4C", "depthwise conv 3x3, 4C -> 4C"),
        *(SQUEEZE, "conv 1x1, 4C -> C", SKIP),
    ),
    "Fused-MBConv": ("conv 3x3, C -> 4C", SQUEEZE, "conv 1x1, 4C -> C", SKIP),
}
_INNER = f"{SQUEEZE}, inner channels"
_NORMS_AND_ACTIVATIONS = ("BN", "SiLU")

Interceptor = Callable[..., Any]


class _Call(NamedTuple):
    """A block that the network ran."""

    module: Any
    inputs: jax.Array
    outputs: jax.Array


def _network_calls() -> list[_Call]:
    """Every block of the network in the order they run."""
    calls: list[_Call] = []

    def record(
        next_call: Interceptor, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        outputs = next_call(*args, **kwargs)
        is_block = isinstance(context.module, tuple(EfficientNet.OPERATIONS.values()))
        if is_block and context.method_name == "__call__":
            calls.append(_Call(context.module, args[0], outputs))
        return outputs

    images = jax.ShapeDtypeStruct((1, _SIZE, _SIZE, 3), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(create_model(VARIANT).init, jax.random.key(0), images)
    return calls


def _channels(count: int, unit: int) -> str:
    """A number of channels in terms of the block's C."""
    if count % unit == 0:
        return "C" if count == unit else f"{count // unit}C"
    return f"C/{unit // count}" if unit % count == 0 else str(count)


def _layers(block: Any, inputs: jax.Array) -> dict[str, str]:
    """The layers of one block in the order they run.

    Args:
      block: with the network's own makers of convolutions, normalisations and activations.
      inputs: of the block; only its shape matters.
    """
    unit = inputs.shape[-1]
    layers: list[str] = []
    found: dict[str, str] = {}

    def record(
        next_call: Interceptor, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        outputs = next_call(*args, **kwargs)
        layer = context.module
        # The block's own layers; squeeze-excitation has some in turn.
        if context.method_name != "__call__" or len(layer.path) != 1:
            return outputs
        if isinstance(layer, Conv):
            kind = "depthwise conv" if layer.depthwise else "conv"
            kernel = f"{layer.kernel_size}x{layer.kernel_size}"
            ends = [_channels(array.shape[-1], unit) for array in (args[0], outputs)]
            layers.append(f"{kind} {kernel}, {' -> '.join(ends)}")
        elif isinstance(layer, BatchNorm):
            layers.append("BN")
        elif isinstance(layer, SqueezeExcite):
            layers.append(SQUEEZE)
            found[_INNER] = _channels(layer.squeeze_filters, unit)
        else:
            raise TypeError(f"{type(layer).__name__} has no name here.")
        return outputs

    def act(values: jax.Array) -> jax.Array:
        layers.append({"silu": "SiLU"}.get(block.act.__name__, block.act.__name__))
        return block.act(values)

    # A function is no module and cannot be intercepted, so the block gets one that tells.
    traced = type(block)(block.block, block.conv, block.norm, act)
    shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    with nn.intercept_methods(record):
        jax.eval_shape(traced.init, jax.random.key(0), shape)
    return {f"layer {number}": layer for number, layer in enumerate(layers, 1)} | found


def _measure(operation: str) -> dict[str, str | int]:
    """The first block of a kind that keeps its shape."""
    calls = _network_calls()
    index = next(
        index
        for index, call in enumerate(calls)
        if isinstance(call.module, EfficientNet.OPERATIONS[operation])
        and call.module.block.expansion == EXPANSION
        and call.inputs.shape == call.outputs.shape
    )
    module, inputs, outputs = calls[index]
    # Without a skip the next block is given what this one returned, and not a sum.
    has_skip = calls[index + 1].inputs is not outputs
    return {
        "block": module.name,
        "C": inputs.shape[-1],
        **_layers(module, inputs),
        SKIP: "yes" if has_skip else "no",
    }


def items() -> Sequence[Item]:
    """Both blocks."""
    return [Item(EXACT, n, functools.partial(_measure, o)) for n, o in OPERATIONS.items()]


def _sequence(rows: Rows, name: str) -> list[str]:
    """The layers of a block in order."""
    layers: list[str] = []
    while layer := rows.find(name, f"layer {len(layers) + 1}"):
        layers.append(layer)
    return layers


def _boxes(rows: Rows, name: str) -> tuple[str, ...]:
    """What the paper's figure would show of a block."""
    boxes = [layer for layer in _sequence(rows, name) if layer not in _NORMS_AND_ACTIVATIONS]
    return (*boxes, SKIP) if rows.find(name, SKIP) == "yes" else tuple(boxes)


def tables(rows: Rows) -> Mapping[str, str]:
    """Every layer, and the boxes beside the paper's."""
    sequences = {name: _sequence(rows, name) for name in PAPER}
    lines: list[tuple[int | str, ...]] = [
        (number + 1, *(s[number] if number < len(s) else "" for s in sequences.values()))
        for number in range(max(map(len, sequences.values())))
    ]
    for quantity in (SKIP, _INNER, "C", "block"):
        lines.append((quantity, *(rows.find(name, quantity) or "none" for name in PAPER)))
    figure = []
    for name, paper in PAPER.items():
        boxes = _boxes(rows, name)
        is_equal = "yes" if boxes == paper else "no"
        figure.append((name, "; ".join(boxes), "; ".join(paper), is_equal))
    return {
        "conclusion": f"{answer(rows)}.",
        "layers": markdown(("layer", *PAPER), lines),
        "figure": markdown(("block", "the network's", "the paper's figure", "equal"), figure),
    }


def answer(rows: Rows) -> str:
    """Which boxes differ from the figure's."""
    parts = []
    for name, paper in PAPER.items():
        boxes = _boxes(rows, name)
        without = [box for box in paper if box not in boxes]
        added = [box for box in boxes if box not in paper]
        words = [f"without {', '.join(without)}"] if without else []
        words += [f"with {', '.join(added)} as well"] if added else []
        parts.append(f"{name}: {' and '.join(words) or 'as drawn in the paper'}")
    return "; ".join(parts)


def plot(rows: Rows, folder: Path) -> None:
    """Both blocks side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = {name: _grouped(_sequence(rows, name)) for name in PAPER}
    height = max(map(len, columns.values()))
    figure, all_axes = plt.subplots(
        1, len(columns), figsize=(7.2, 0.86 * height + 1.8), layout="constrained"
    )
    for axes, (name, boxes) in zip(all_axes, columns.items(), strict=True):
        axes.set_title(f"{name}{EXPANSION}", fontsize=13)
        _draw(axes, boxes, rows.find(name, SKIP) == "yes", rows.find(name, _INNER), height)
        axes.set(xlim=(-2.1, 2.1), ylim=(-height - 0.65, 1), aspect="equal")
        axes.axis("off")
    figure.savefig(folder / "blocks.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def _grouped(layers: Sequence[str]) -> list[list[str]]:
    """A box for each convolution and gate, with what normalises and activates its result."""
    boxes: list[list[str]] = []
    for layer in layers:
        if layer in _NORMS_AND_ACTIVATIONS:
            boxes[-1].append(layer)
        else:
            boxes.append([layer])
    return boxes


def _draw(
    axes: Any, boxes: Sequence[Sequence[str]], has_skip: bool, inner: str, height: int
) -> None:
    """One block from top to bottom, into axes of one unit a box."""
    from matplotlib.patches import FancyBboxPatch

    arrow = {"arrowstyle": "-|>", "color": "0.2", "shrinkA": 0, "shrinkB": 0}
    # A shorter block is stretched to the height of the longer one.
    step = height / len(boxes)
    ends = "C"
    last_y = 0.75
    axes.text(0, last_y + 0.02, ends, ha="center", va="bottom", fontsize=10)
    for index, (title, *others) in enumerate(boxes):
        y = -step * (index + 0.5) + 0.3
        kind, _, channels = title.partition(", ")
        colour = {"conv": "#cfe2f3", "depthwise conv": "#d9ead3"}.get(
            kind.rpartition(" ")[0], "#fce5cd"
        )
        axes.add_patch(
            FancyBboxPatch(
                *((-1.15, y - 0.26), 2.3, 0.52), boxstyle="round,pad=0.02", fc=colour, ec="0.3"
            )
        )
        detail = ", ".join(others) if title != SQUEEZE else f"inner channels {inner}"
        axes.text(0, y + 0.1, kind, ha="center", va="center", fontsize=10, weight="bold")
        axes.text(0, y - 0.13, detail, ha="center", va="center", fontsize=9)
        axes.annotate("", (0, y + 0.28), (0, last_y), arrowprops=arrow)
        if index:
            middle = (y + 0.28 + last_y) / 2
            axes.text(0.1, middle, ends, ha="left", va="center", fontsize=10)
        ends = channels.rpartition(" -> ")[2] or ends
        last_y = y - 0.28
    sum_y = -height + 0.05
    target = sum_y + 0.14 if has_skip else -height - 0.4
    axes.annotate("", (0, target), (0, last_y), arrowprops=arrow)
    axes.text(0.1, (target + last_y) / 2, ends, ha="left", va="center", fontsize=10)
    if has_skip:
        axes.text(
            *(0, sum_y, "+"),
            ha="center",
            va="center",
            fontsize=11,
            bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "0.2"},
        )
        side = 1.75
        axes.plot((0, side, side), (0.62, 0.62, sum_y), color="0.2", lw=1)
        axes.annotate("", (0.16, sum_y), (side, sum_y), arrowprops=arrow)
        axes.annotate("", (0, -height - 0.4), (0, sum_y - 0.14), arrowprops=arrow)
        axes.text(side + 0.08, -height / 2, SKIP, rotation=90, va="center", fontsize=10)
    axes.text(0, -height - 0.42, "C", ha="center", va="top", fontsize=10)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="What are the layers of MBConv and Fused-MBConv?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
