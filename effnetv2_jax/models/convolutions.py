"""2-D convolutions, each lowered to what its platform runs fastest.

XLA's CPU back end runs a depthwise convolution 20 to 120 times slower than the same sum
written as shifted multiply-adds, a 1x1 convolution 2 to 3 times slower than a matrix product,
and the stem, which reads 3 channels, 4 times slower than the product of its patches. Other dense
convolutions come close to what the core can do (experiments/speed) and stay XLA's. Accelerators
want XLA's own convolution. `jax.lax.platform_dependent` chooses at lowering time, so one traced
program serves every platform and the TPU program is the plain one.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
PADDINGS = ("same", "symmetric")
Pads = tuple[tuple[int, int], ...]
# Numbers in a patch, up to which patches are cheaper than XLA's convolution on a CPU: 3x3 pixels of
# three colours. With the 7x7 pixels of ResNet's stem, inference took a tenth longer.
_SMALL_PATCH = 27


def convolution(
    images: jax.Array, kernel: jax.Array, *, stride: int, groups: int, padding: str = "same"
) -> jax.Array:
    """Convolves at every `stride`-th pixel.

    Args:
      images: [N, H, W, C].
      kernel: [kh, kw, C / groups, C_out], of the images' dtype.
      stride: the step in both directions, in pixels.
      groups: 1, or C for a depthwise convolution.
      padding: `same` is TensorFlow's, which for stride 2 puts the odd pixel behind the image;
        `symmetric` is PyTorch's, half a kernel on each side. They agree at stride 1.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), C_out].
    """
    kernel_size = kernel.shape[:2]
    pads = _pads(images, kernel, stride, padding)
    if groups == 1 and kernel_size == (1, 1) and stride == 1:
        on_cpu = _as_matrix_product
    elif groups == images.shape[-1] == kernel.shape[-1]:
        on_cpu = _as_shifted_products
    elif groups == 1 and math.prod(kernel.shape[:3]) <= _SMALL_PATCH:
        on_cpu = _as_product_of_patches
    else:
        return _by_xla(images, kernel, stride, pads, groups)
    return lax.platform_dependent(
        images,
        kernel,
        cpu=lambda x, k: on_cpu(x, k, stride, pads),
        default=lambda x, k: _by_xla(x, k, stride, pads, groups),
    )


def _pads(images: jax.Array, kernel: jax.Array, stride: int, padding: str) -> Pads:
    """The pixels before and after the image, of height and width."""
    if padding == "symmetric":
        return tuple((size // 2, size // 2) for size in kernel.shape[:2])
    return tuple(lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], (stride, stride), "SAME"))


def _by_xla(
    images: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int
) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=groups,
    )


def _as_matrix_product(images: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    del stride, pads  # Always 1 and none here.
    # Left to itself, XLA on CPU sums the gradients of a bfloat16 product in bfloat16.
    product = jnp.einsum("nhwc,cd->nhwd", images, kernel[0, 0], preferred_element_type=jnp.float32)
    return product.astype(images.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _as_product_of_patches(
    images: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> jax.Array:
    """What each output sees of the image becomes one row of a matrix.

    Its gradients are XLA's, which are fast.
    """
    padded, out_shape = _pad(images, stride, pads)
    patches = jnp.concatenate(
        [shifted for _, shifted in _shifts(padded, kernel, out_shape, stride)], axis=-1
    )
    rows = kernel.reshape(1, 1, -1, kernel.shape[-1])
    return _as_matrix_product(patches, rows, 1, ())


def _as_product_of_patches_forward(
    images: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _as_product_of_patches(images, kernel, stride, pads), (images, kernel)


def _as_product_of_patches_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pull_back = jax.vjp(lambda x, k: _by_xla(x, k, stride, pads, 1), *saved)
    image_gradient, kernel_gradient = pull_back(gradient)
    return image_gradient, kernel_gradient


_as_product_of_patches.defvjp(_as_product_of_patches_forward, _as_product_of_patches_backward)


def _as_shifted_products(
    images: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> jax.Array:
    """A depthwise convolution as one product per tap, in float32: CPUs emulate bfloat16."""
    outputs = _shifted_products(
        images.astype(jnp.float32), kernel.astype(jnp.float32), stride, pads
    )
    return outputs.astype(images.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted_products(images: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """The sum over taps.

    It brings its own gradients: those that JAX derives pad each tap's product apart and take
    half as long again. Forward-mode differentiation on CPU is the price.
    """
    padded, out_shape = _pad(images, stride, pads)
    return _sum(
        shifted * kernel[tap][0] for tap, shifted in _shifts(padded, kernel, out_shape, stride)
    )


def _shifted_products_forward(
    images: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted_products(images, kernel, stride, pads), (images, kernel)


def _shifted_products_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved
    padded, out_shape = _pad(images, stride, pads)
    kernel_gradient = jnp.stack(
        [
            jnp.sum(shifted * gradient, axis=(0, 1, 2))
            for _, shifted in _shifts(padded, kernel, out_shape, stride)
        ]
    ).reshape(kernel.shape)
    # The gradient of the images is a convolution of the spread-out gradient, kernel reversed.
    spread_padding = [
        (size - 1 - low, length + low - 1 - (out - 1) * stride, stride - 1)
        for size, (low, _), length, out in zip(
            kernel.shape[:2], pads, images.shape[1:3], out_shape, strict=True
        )
    ]
    spread = lax.pad(
        gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *spread_padding, (0, 0, 0)]
    )
    reversed_kernel = kernel[::-1, ::-1]
    image_gradient = _sum(
        shifted * reversed_kernel[tap][0]
        for tap, shifted in _shifts(spread, kernel, (images.shape[1], images.shape[2]), 1)
    )
    return image_gradient, kernel_gradient


_shifted_products.defvjp(_shifted_products_forward, _shifted_products_backward)


def _pad(images: jax.Array, stride: int, pads: Pads) -> tuple[jax.Array, tuple[int, int]]:
    """The padded images, and height and width of the convolution's output."""
    height, width = images.shape[1:3]
    return jnp.pad(images, ((0, 0), *pads, (0, 0))), (-(-height // stride), -(-width // stride))


def _shifts(
    padded: jax.Array, kernel: jax.Array, out_shape: tuple[int, int], stride: int
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """For each tap of the kernel its index, and the pixels that it meets."""
    count, _, _, filters = padded.shape
    for row, column in itertools.product(range(kernel.shape[0]), range(kernel.shape[1])):
        last_row = row + (out_shape[0] - 1) * stride
        last_column = column + (out_shape[1] - 1) * stride
        start, limit = (0, row, column, 0), (count, last_row + 1, last_column + 1, filters)
        yield (row, column), lax.slice(padded, start, limit, (1, stride, stride, 1))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)
