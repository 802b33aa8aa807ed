"""Every variant of the network as a table of block rows.

The rows of EfficientNetV2 are the released ones (automl efficientnetv2/effnetv2_configs.py); S
agrees with Table 4 of the paper, the others are printed nowhere else. B1 to B3 scale B0's rows
by a width and a depth coefficient; S to XL are written out and have both coefficients at 1.

EfficientNet (V1, the paper's baseline) is Tan & Le 2019, "EfficientNet: Rethinking model scaling
for convolutional neural networks", Table 1, scaled by width and depth likewise. EfficientNet-Lite
is the same table for phones: no squeeze-excitation, ReLU6, stem and head of one size
(tensorflow/tpu models/official/efficientnet/lite/efficientnet_lite_builder.py).

ResNet is He et al. 2015, "Deep residual learning for image recognition", Table 1; a bottleneck's
filters are those of its output, of which the other two convolutions have a quarter.

A network that architecture search found is written `BACKBONE@ROWS`: channels, strides, stem and
head of the backbone, and for each of its rows what was searched (section 3.3), as in
`efficientnetv2-b0@f3e1x1.f3e4x2.f3e4x2.m3e4x3.m3e6x5.m3e6x8`: Fused-MBConv or MBConv, kernel size,
expansion, and number of layers, which no depth coefficient scales.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

from effnetv2_jax.errors import InputError, unknown_name

Family = Literal["efficientnet", "resnet"]
Operation = Literal["fused", "mbconv", "bottleneck"]
Activation = Literal["silu", "relu", "relu6"]
Rate = Any  # A float, or a traced scalar.


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """One row of an architecture table: `repeats` equal blocks, the first of them strided."""

    operation: Operation
    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    filters: int
    squeeze_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """A variant: its rows, coefficients, and the released per-model settings.

    Attributes:
      rows: the block rows before scaling.
      stem_filters: output channels of the stem before scaling.
      head_filters: output channels of the last 1x1 convolution before scaling.
      width: multiplies every number of channels.
      depth: multiplies every number of repeats.
      keep_filters: whether scaling rounds up rather than lose more than 10 % of the channels:
        EfficientNet V1's rule, which V2's code dropped.
      activation: after every convolution but the projections.
      family: whose topology the rows are in, see `create.FAMILIES`.
      scale_ends: whether the coefficients also apply to the filters of stem and head and to the
        repeats of the first and the last row.
      train_size: largest training image size of the released recipe, pixels.
      eval_size: evaluation image size, pixels.
      dropout_rate: head dropout of the released recipe.
    """

    rows: tuple[BlockRow, ...]
    stem_filters: int
    head_filters: int
    train_size: int
    eval_size: int
    dropout_rate: float
    width: float = 1.0
    depth: float = 1.0
    keep_filters: bool = False
    activation: Activation = "silu"
    family: Family = "efficientnet"
    scale_ends: bool = True

    def scaled(self, filters: int) -> int:
        """Scales a number of channels by the width coefficient."""
        return scale_filters(filters, self.width, keep_filters=self.keep_filters)

    def scaled_end(self, filters: int) -> int:
        """Scales the channels of the stem or the head."""
        return self.scaled(filters) if self.scale_ends else filters

    def scaled_repeats(self, row: int) -> int:
        """The number of blocks of the row with that index."""
        is_end = row in (0, len(self.rows) - 1)
        depth = 1.0 if is_end and not self.scale_ends else self.depth
        return scale_repeats(self.rows[row].repeats, depth)


def _fused(repeats: int, stride: int, expansion: int, filters: int) -> BlockRow:
    # Released Fused-MBConv blocks carry no squeeze-excitation (effnetv2_configs.py).
    return BlockRow("fused", repeats, 3, stride, expansion, filters)


def _mbconv(
    repeats: int, stride: int, expansion: int, filters: int, kernel_size: int = 3
) -> BlockRow:
    return BlockRow("mbconv", repeats, kernel_size, stride, expansion, filters, squeeze_ratio=0.25)


_BASE_ROWS = (
    _fused(1, 1, 1, 16),
    _fused(2, 2, 4, 32),
    _fused(2, 2, 4, 48),
    _mbconv(3, 2, 4, 96),
    _mbconv(5, 1, 6, 112),
    _mbconv(8, 2, 6, 192),
)


def _base(train_size: int, eval_size: int, dropout_rate: float, width: float, depth: float) -> Spec:
    return Spec(_BASE_ROWS, 32, 1280, train_size, eval_size, dropout_rate, width, depth)


_V1_ROWS = (
    _mbconv(1, 1, 1, 16),
    _mbconv(2, 2, 6, 24),
    _mbconv(2, 2, 6, 40, kernel_size=5),
    _mbconv(3, 2, 6, 80),
    _mbconv(3, 1, 6, 112, kernel_size=5),
    _mbconv(4, 2, 6, 192, kernel_size=5),
    _mbconv(1, 1, 6, 320),
)


def _v1(eval_size: int, dropout_rate: float, width: float, depth: float) -> Spec:
    # effnetv2_configs.py: V1 trains at 0.8 of the evaluation size, floored to a multiple of 16.
    train_size = int(0.8 * eval_size) // 16 * 16
    return Spec(
        _V1_ROWS,
        32,
        1280,
        train_size,
        eval_size,
        dropout_rate,
        width,
        depth,
        keep_filters=True,
    )


_LITE_ROWS = tuple(dataclasses.replace(row, squeeze_ratio=None) for row in _V1_ROWS)


def _lite(eval_size: int, dropout_rate: float, width: float, depth: float) -> Spec:
    # efficientnet_lite_builder.py trains at the size that it evaluates.
    return dataclasses.replace(
        _v1(eval_size, dropout_rate, width, depth),
        rows=_LITE_ROWS,
        train_size=eval_size,
        activation="relu6",
        scale_ends=False,
    )


# Table 3: B4 with Fused-MBConv in place of MBConv, without squeeze-excitation. The paper does not
# say which kernels. 3x3 for its "stage 1-3", and for the other two V1's own with the first two
# rows left alone, come nearest: 19.94M and 7.34G, 43.36M and 21.09G, 131.95M and 34.14G, where it
# has 20.0M and 7.5G, 43.4M and 21.3G, 132.0M and 34.4G (and 4.5G for B4 itself, which has 4.39G).
def _v1_fused(rows: tuple[int, ...], kernel_size: int | None) -> Spec:
    fused = [
        dataclasses.replace(
            row,
            operation="fused",
            squeeze_ratio=None,
            kernel_size=kernel_size or row.kernel_size,
        )
        if index in rows
        else row
        for index, row in enumerate(_V1_ROWS)
    ]
    return dataclasses.replace(_v1(380, 0.4, 1.4, 1.8), rows=tuple(fused))


def _resnet(*repeats: int) -> Spec:
    rows = tuple(
        BlockRow("bottleneck", count, 3, 1 if index == 0 else 2, 4, 256 * 2**index)
        for index, count in enumerate(repeats)
    )
    return Spec(
        rows,
        stem_filters=64,
        head_filters=0,
        train_size=224,
        eval_size=224,
        dropout_rate=0.0,
        activation="relu",
        family="resnet",
    )


# Sizes and dropout: the per-model tuples of effnetv2_configs.py.
SPECS: dict[str, Spec] = {
    "efficientnetv2-b0": _base(192, 224, 0.2, 1.0, 1.0),
    "efficientnetv2-b1": _base(192, 240, 0.2, 1.0, 1.1),
    "efficientnetv2-b2": _base(208, 260, 0.3, 1.1, 1.2),
    "efficientnetv2-b3": _base(240, 300, 0.3, 1.2, 1.4),
    "efficientnetv2-s": Spec(
        (
            _fused(2, 1, 1, 24),
            _fused(4, 2, 4, 48),
            _fused(4, 2, 4, 64),
            _mbconv(6, 2, 4, 128),
            _mbconv(9, 1, 6, 160),
            _mbconv(15, 2, 6, 256),
        ),
        stem_filters=24,
        head_filters=1280,
        train_size=300,
        eval_size=384,
        dropout_rate=0.2,
    ),
    "efficientnetv2-m": Spec(
        (
            _fused(3, 1, 1, 24),
            _fused(5, 2, 4, 48),
            _fused(5, 2, 4, 80),
            _mbconv(7, 2, 4, 160),
            _mbconv(14, 1, 6, 176),
            _mbconv(18, 2, 6, 304),
            _mbconv(5, 1, 6, 512),
        ),
        stem_filters=24,
        head_filters=1280,
        train_size=384,
        eval_size=480,
        dropout_rate=0.3,
    ),
    "efficientnetv2-l": Spec(
        (
            _fused(4, 1, 1, 32),
            _fused(7, 2, 4, 64),
            _fused(7, 2, 4, 96),
            _mbconv(10, 2, 4, 192),
            _mbconv(19, 1, 6, 224),
            _mbconv(25, 2, 6, 384),
            _mbconv(7, 1, 6, 640),
        ),
        stem_filters=32,
        head_filters=1280,
        train_size=384,
        eval_size=480,
        dropout_rate=0.4,
    ),
    "efficientnetv2-xl": Spec(
        (
            _fused(4, 1, 1, 32),
            _fused(8, 2, 4, 64),
            _fused(8, 2, 4, 96),
            _mbconv(16, 2, 4, 192),
            _mbconv(24, 1, 6, 256),
            _mbconv(32, 2, 6, 512),
            _mbconv(8, 1, 6, 640),
        ),
        stem_filters=32,
        head_filters=1280,
        train_size=384,
        eval_size=512,
        dropout_rate=0.4,
    ),
    "efficientnet-b0": _v1(224, 0.2, 1.0, 1.0),
    "efficientnet-b1": _v1(240, 0.2, 1.0, 1.1),
    "efficientnet-b2": _v1(260, 0.3, 1.1, 1.2),
    "efficientnet-b3": _v1(300, 0.3, 1.2, 1.4),
    "efficientnet-b4": _v1(380, 0.4, 1.4, 1.8),
    "efficientnet-b5": _v1(456, 0.4, 1.6, 2.2),
    "efficientnet-b6": _v1(528, 0.5, 1.8, 2.6),
    "efficientnet-b7": _v1(600, 0.5, 2.0, 3.1),
    "efficientnet-b4-fused-1-3": _v1_fused((0, 1, 2), kernel_size=3),
    "efficientnet-b4-fused-1-5": _v1_fused((2, 3, 4), kernel_size=None),
    "efficientnet-b4-fused-1-7": _v1_fused((2, 3, 4, 5, 6), kernel_size=None),
    # efficientnet_lite_builder.py, efficientnet_lite_params.
    "efficientnet-lite0": _lite(224, 0.2, 1.0, 1.0),
    "efficientnet-lite1": _lite(240, 0.2, 1.0, 1.1),
    "efficientnet-lite2": _lite(260, 0.3, 1.1, 1.2),
    "efficientnet-lite3": _lite(280, 0.3, 1.2, 1.4),
    "efficientnet-lite4": _lite(300, 0.3, 1.4, 1.8),
    "resnet50": _resnet(3, 4, 6, 3),
    "resnet152": _resnet(3, 8, 36, 3),
}


def list_variants() -> tuple[str, ...]:
    """The names that `create_model` takes."""
    return tuple(SPECS)


_LETTERS: dict[Operation, str] = {"fused": "f", "mbconv": "m"}
_ROW = re.compile(r"([fm])([1-9]\d?)e([1-9]\d?)x([1-9]\d{0,2})")


def get_spec(variant: str) -> Spec:
    """The table of one variant, or of a network that was searched, `BACKBONE@ROWS`.

    Raises:
      InputError: an unknown name, or rows that do not fit the backbone.
    """
    backbone, at, rows = variant.partition("@")
    if backbone not in SPECS:
        raise unknown_name("variant", backbone, SPECS)
    spec = SPECS[backbone]
    return _with_rows(backbone, spec, rows) if at else spec


def encode_rows(rows: Iterable[BlockRow]) -> str:
    """What `BACKBONE@ROWS` says of rows."""
    return ".".join(
        f"{_LETTERS[row.operation]}{row.kernel_size}e{row.expansion}x{row.repeats}" for row in rows
    )


def _with_rows(backbone: str, spec: Spec, text: str) -> Spec:
    if spec.family != "efficientnet":
        raise InputError(
            f"{backbone}@{text}: only an EfficientNet can be the backbone of a search."
        )
    parts = text.split(".")
    if len(parts) != len(spec.rows):
        raise InputError(
            f"{backbone}@{text} has {len(parts)} rows: the backbone has {len(spec.rows)}, give as "
            "many."
        )
    # That of the backbone's MBConv; none for those of phones.
    squeeze_ratio = next((row.squeeze_ratio for row in spec.rows if row.squeeze_ratio), None)
    rows = []
    for part, row in zip(parts, spec.rows, strict=True):
        match = _ROW.fullmatch(part)
        if match is None or int(match[2]) % 2 == 0:
            raise InputError(
                f"row {part!r} of {backbone}@{text} must be an operation (f: Fused-MBConv, m: "
                "MBConv), an odd kernel size, e and the expansion, x and the layers, as f3e4x2."
            )
        is_fused = match[1] == _LETTERS["fused"]
        rows.append(
            dataclasses.replace(
                row,
                operation="fused" if is_fused else "mbconv",
                kernel_size=int(match[2]),
                expansion=int(match[3]),
                repeats=int(match[4]),
                squeeze_ratio=None if is_fused else squeeze_ratio,
            )
        )
    return dataclasses.replace(spec, rows=tuple(rows), depth=1.0)


def scale_filters(filters: int, width: float, *, keep_filters: bool = False) -> int:
    """Scales a number of channels to the nearest multiple of 8, at least 8.

    With `keep_filters` a result that lost more than 10 % goes up by 8 (EfficientNet V1). The
    released V2 code has no such rule (automl efficientnetv2/effnetv2_model.py, round_filters);
    it decides B3's first row.
    """
    scaled = max(8, int(filters * width + 4) // 8 * 8)
    return scaled + 8 if keep_filters and scaled < 0.9 * filters * width else scaled


def scale_repeats(repeats: int, depth: float) -> int:
    """Scales a number of blocks, rounded up."""
    return math.ceil(depth * repeats)


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of the unrolled network; `row` and `repeat` say where in the table it stands."""

    row: int
    repeat: int
    operation: Operation
    kernel_size: int
    stride: int
    expansion: int
    in_filters: int
    out_filters: int
    squeeze_ratio: float | None

    @property
    def has_skip(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.in_filters == self.out_filters

    @property
    def squeeze_filters(self) -> int | None:
        """Channels between the two squeeze-excitation layers, from the block's *input*."""
        if self.squeeze_ratio is None:
            return None
        return max(1, int(self.squeeze_ratio * self.in_filters))


def unroll(spec: Spec) -> tuple[Block, ...]:
    """The blocks of a variant in order, with the coefficients applied."""
    blocks = []
    in_filters = spec.scaled_end(spec.stem_filters)
    for index, row in enumerate(spec.rows):
        out_filters = spec.scaled(row.filters)
        for repeat in range(spec.scaled_repeats(index)):
            stride = row.stride if repeat == 0 else 1
            blocks.append(
                Block(
                    index,
                    repeat,
                    row.operation,
                    row.kernel_size,
                    stride,
                    row.expansion,
                    in_filters,
                    out_filters,
                    row.squeeze_ratio,
                )
            )
            in_filters = out_filters
    return tuple(blocks)


def drop_path_rates(num_blocks: int, drop_path_rate: Rate) -> tuple[Rate, ...]:
    """Probability of dropping each block's branch: linear in the block's index.

    The divisor is the number of blocks, not one less, and blocks without a skip connection
    count too (automl efficientnetv2/effnetv2_model.py), so the last rate is just below
    `drop_path_rate`.
    """
    return tuple(drop_path_rate * index / num_blocks for index in range(num_blocks))
