"""The CPU formulations against XLA's own convolution, and what each platform is given.

The references run on the CPU too, where XLA's convolution is exact but slow.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from effnetv2_jax.models.convolutions import convolution

CHANNELS = 6
COLOURS = 3
# (kernel size, stride, depthwise, height, width); the last two are smaller than their kernel. A
# sixth number is that of the image's channels, where it is not CHANNELS.
CASES = [
    (3, 1, True, 8, 8),
    (3, 1, True, 7, 10),
    (3, 2, True, 8, 8),
    (3, 2, True, 9, 8),
    (5, 1, True, 9, 6),
    (5, 2, True, 8, 7),
    (1, 1, True, 4, 5),
    (1, 1, False, 8, 8),
    (1, 1, False, 5, 7),
    (1, 2, False, 6, 5),
    (3, 1, False, 6, 7),
    (3, 2, False, 6, 7),
    (3, 2, True, 1, 1),
    (5, 2, True, 2, 3),
    (3, 2, False, 7, 8, COLOURS),
    (3, 1, False, 6, 5, COLOURS),
]
# float32 sums in another order: a few units of 2**-24 for each of at most 25 * 3 * 81 terms.
FLOAT32_TOLERANCE = 2e-6
# Eight bits: 2**-9 for rounding a result, twice that for a product that is rounded before it is
# summed in float32.
BFLOAT16_TOLERANCE = 2.0**-8


def _functions(stride: int, groups: int, symmetric_kernel: int | None = None):
    padding = "same" if symmetric_kernel is None else "symmetric"
    ours = functools.partial(convolution, stride=stride, groups=groups, padding=padding)
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding="SAME" if symmetric_kernel is None else [(symmetric_kernel // 2,) * 2] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return ours, plain


def _inputs(kernel_size, stride, depthwise, height, width, channels=CHANNELS, *, dtype="float32"):
    """Images, kernel and the outputs' cotangent, drawn at random; and the number of groups."""
    random = np.random.default_rng(0)
    groups = channels if depthwise else 1
    out_channels = channels if depthwise else CHANNELS + 2
    out_size = (-(-height // stride), -(-width // stride))
    shapes = (
        (3, height, width, channels),
        (kernel_size, kernel_size, channels // groups, out_channels),
        (3, *out_size, out_channels),
    )
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes], groups


def _with_gradients(function, images, kernel, cotangent):
    outputs, pull_back = jax.vjp(function, images, kernel)
    return (outputs, *pull_back(cotangent))


def _assert_close(actual, expected, tolerance):
    """Compares outputs, image gradient and kernel gradient, relative to the largest entry."""
    for name, got, want in zip(("outputs", "images", "kernel"), actual, expected, strict=True):
        want = np.asarray(want, np.float32)
        np.testing.assert_allclose(
            np.asarray(got, np.float32),
            want,
            rtol=0,
            atol=tolerance * np.abs(want).max(),
            err_msg=name,
        )


# --------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_both_gradients(case):
    arguments, groups = _inputs(*case)
    ours, plain = _functions(case[1], groups)
    expected = jax.jit(functools.partial(_with_gradients, plain))(*arguments)
    _assert_close(
        jax.jit(functools.partial(_with_gradients, ours))(*arguments), expected, FLOAT32_TOLERANCE
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_symmetric_padding(case):
    arguments, groups = _inputs(*case)
    ours, plain = _functions(case[1], groups, symmetric_kernel=case[0])
    expected = jax.jit(functools.partial(_with_gradients, plain))(*arguments)
    _assert_close(
        jax.jit(functools.partial(_with_gradients, ours))(*arguments), expected, FLOAT32_TOLERANCE
    )


@pytest.mark.parametrize(
    "case", [(3, 2, True, 9, 8), (1, 1, False, 5, 7), (3, 2, False, 7, 8, COLOURS)], ids=str
)
def test_under_remat(case):
    arguments, groups = _inputs(*case)
    ours, plain = _functions(case[1], groups)
    expected = jax.jit(functools.partial(_with_gradients, plain))(*arguments)
    remat = jax.jit(functools.partial(_with_gradients, jax.checkpoint(ours)))
    _assert_close(remat(*arguments), expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("case", "in_axes"),
    [
        ((3, 2, True, 5, 4), (0, None, 0)),
        ((3, 2, True, 5, 4), (None, 0, 0)),
        ((3, 1, True, 5, 4), (0, 0, 0)),
        ((1, 1, False, 5, 7), (0, 0, 0)),
        ((3, 2, False, 7, 8, COLOURS), (0, None, 0)),
    ],
    ids=str,
)
def test_under_vmap(case, in_axes):
    arguments, groups = _inputs(*case)
    # A second copy that differs from the first, where the axis is mapped.
    arguments = [
        argument if axis is None else jnp.stack([argument, 2 - argument[::-1]])
        for argument, axis in zip(arguments, in_axes, strict=True)
    ]
    ours, plain = _functions(case[1], groups)
    results = [
        jax.jit(jax.vmap(functools.partial(_with_gradients, function), in_axes))(*arguments)
        for function in (ours, plain)
    ]
    _assert_close(*results, FLOAT32_TOLERANCE)


BFLOAT16_CASES = [
    (3, 1, True, 7, 10),
    (3, 2, True, 9, 8),
    (5, 2, True, 8, 7),
    (1, 1, False, 5, 7),
    (3, 2, False, 7, 8, COLOURS),
]


@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=str)
def test_bfloat16(case):
    arguments, groups = _inputs(*case, dtype="bfloat16")
    ours, plain = _functions(case[1], groups)
    actual = jax.jit(functools.partial(_with_gradients, ours))(*arguments)
    assert {array.dtype for array in actual} == {jnp.dtype("bfloat16")}
    exact = [argument.astype(jnp.float32) for argument in arguments]
    expected = jax.jit(functools.partial(_with_gradients, plain))(*exact)
    _assert_close(actual, expected, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(
    "case",
    [
        (3, 1, True, 40, 40),
        (1, 1, False, 40, 40),
    ],
    ids=str,
)
def test_bfloat16_kernel_gradient_sums_every_pixel(case):
    """A bfloat16 sum of ones stops at 256, where 1 is half a unit in the last place."""
    arguments, groups = _inputs(*case, dtype="bfloat16")
    ours, _ = _functions(case[1], groups)
    ones = [jnp.ones_like(argument) for argument in arguments]
    gradient = jax.jit(functools.partial(_with_gradients, ours))(*ones)[2]
    middle = case[0] // 2
    np.testing.assert_allclose(
        np.asarray(gradient[middle, middle], np.float32), 3 * 40 * 40, rtol=BFLOAT16_TOLERANCE
    )


# ----------------------------------------------------------------------------------- the border


def _by_hand(images, kernel, stride, pads):
    """A depthwise or full convolution as loops over NumPy arrays, with the pads given."""
    padded = np.pad(images, ((0, 0), *pads, (0, 0)))
    size = kernel.shape[0]
    rows = range(0, padded.shape[1] - size + 1, stride)
    columns = range(0, padded.shape[2] - size + 1, stride)
    outputs = np.zeros((images.shape[0], len(rows), len(columns), kernel.shape[3]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, row : row + size, column : column + size]
            if kernel.shape[2] == 1:
                outputs[:, i, j] = np.einsum("nhwc,hwc->nc", window, kernel[:, :, 0])
            else:
                outputs[:, i, j] = np.einsum("nhwc,hwcd->nd", window, kernel)
    return outputs


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (8, 9)])
def test_stride_2_pads_as_tensorflow_does(height, width, depthwise):
    """3x3: an even side is padded by 0 before and 1 after, an odd one by 1 and 1."""
    (images, kernel, _), groups = _inputs(3, 2, depthwise, height, width)
    pads = [(0, 1) if size % 2 == 0 else (1, 1) for size in (height, width)]
    expected = _by_hand(np.asarray(images), np.asarray(kernel), 2, pads)
    actual = convolution(images, kernel, stride=2, groups=groups)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# ------------------------------------------------------------- the program that a platform gets


def _lowered(function, arguments, platform: str) -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def _operations(text: str) -> set[str]:
    return set(re.findall(r"\b(?:stablehlo|chlo|func)\.\w+", text))


def _convolutions(text: str) -> list[str]:
    """Every convolution with its attributes and types, without the names of its operands."""
    found = re.findall(r"stablehlo\.convolution\(.*", text)
    return sorted(re.sub(r"%[\w#]+", "%", line) for line in found)


PLATFORM_CASES = [
    (3, 1, True, 8, 8),
    (3, 2, True, 9, 8),
    (5, 2, True, 8, 8),
    (1, 1, False, 5, 7),
    (3, 2, False, 6, 7),
    (3, 2, False, 8, 7, COLOURS),
]
CONTROL_FLOW = {
    *("stablehlo.case", "stablehlo.constant", "stablehlo.return"),
    *("func.func", "func.return"),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("case", PLATFORM_CASES, ids=str)
def test_accelerators_get_the_plain_convolution_alone(case, platform):
    arguments, groups = _inputs(*case)
    ours, plain = _functions(case[1], groups)
    text = _lowered(ours, arguments[:2], platform)
    assert _operations(text) - CONTROL_FLOW == {"stablehlo.convolution"}
    assert len(_convolutions(text)) == 1
    assert _convolutions(text) == _convolutions(_lowered(plain, arguments[:2], platform))


def _gradient_texts(case):
    arguments, groups = _inputs(*case)
    return [
        _lowered(functools.partial(_with_gradients, function), arguments, "tpu")
        for function in _functions(case[1], groups)
    ]


@pytest.mark.parametrize("case", PLATFORM_CASES, ids=str)
def test_accelerators_get_the_plain_gradients(case):
    text, plain_text = _gradient_texts(case)
    assert len(_convolutions(text)) == 3
    assert _convolutions(text) == _convolutions(plain_text)
    zeros = {"stablehlo.broadcast_in_dim"}
    assert _operations(text) - CONTROL_FLOW - zeros <= _operations(plain_text)


@pytest.mark.parametrize(
    "case", [case for case in PLATFORM_CASES if case[2] or COLOURS in case[5:]], ids=str
)
def test_accelerators_carry_nothing_for_the_gradient_of_the_cpu_path(case):
    """Zeros in place of nine shifted copies cost nothing in one program, but memory in a scan."""
    text, plain_text = _gradient_texts(case)
    assert _operations(text) - CONTROL_FLOW <= _operations(plain_text)


@pytest.mark.parametrize("case", PLATFORM_CASES, ids=str)
def test_the_cpu_gets_no_depthwise_no_pointwise_and_no_stem_convolution(case):
    arguments, groups = _inputs(*case)
    ours, plain = _functions(case[1], groups)
    is_dense = case[0] == 3 and not case[2]
    is_stem = COLOURS in case[5:]
    expected = (
        _convolutions(_lowered(plain, arguments[:2], "cpu")) if is_dense and not is_stem else []
    )
    assert _convolutions(_lowered(ours, arguments[:2], "cpu")) == expected
    text = _lowered(functools.partial(_with_gradients, ours), arguments, "cpu")
    counts = re.findall(r"(?:batch|feature)_group_count = (\d+)", text)
    assert set(counts) <= {"1"}
    assert (len(_convolutions(text)) > 0) == is_dense


def test_one_trace_serves_both_platforms():
    (images, kernel, _), groups = _inputs(3, 2, True, 8, 8)
    ours, _ = _functions(2, groups)
    traced = jax.jit(ours).trace(images, kernel)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert {p: len(_convolutions(text)) for p, text in texts.items()} == {"cpu": 0, "tpu": 1}
