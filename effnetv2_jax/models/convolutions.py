"""2-D convolutions, each lowered to what its platform runs fastest.

XLA's CPU back end runs a depthwise convolution 20 to 120 times slower than the same sum
written as shifted multiply-adds, and a 1x1 convolution 2 to 3 times slower than a matrix
product. Accelerators want XLA's own convolution. `jax.lax.platform_dependent` chooses at
lowering time, so one traced program serves every platform and the TPU program is the plain one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolution(images: jax.Array, kernel: jax.Array, *, stride: int, groups: int) -> jax.Array:
    """Convolves with TensorFlow's SAME padding.

    Args:
      images: [N, H, W, C].
      kernel: [kh, kw, C / groups, C_out], of the images' dtype.
      stride: the step in both directions, in pixels.
      groups: 1, or C for a depthwise convolution.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), C_out].
    """
    kernel_size = kernel.shape[:2]
    if groups == 1 and kernel_size == (1, 1) and stride == 1:
        on_cpu = _as_matrix_product
    elif groups == images.shape[-1] == kernel.shape[-1]:
        on_cpu = _as_shifted_products
    else:
        return _by_xla(images, kernel, stride, groups)
    return lax.platform_dependent(
        images,
        kernel,
        cpu=lambda x, k: on_cpu(x, k, stride),
        default=lambda x, k: _by_xla(x, k, stride, groups),
    )


def _by_xla(images: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=groups,
    )


def _as_matrix_product(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    del stride  # Always 1 here.
    return jnp.einsum("nhwc,cd->nhwd", images, kernel[0, 0])


def _as_shifted_products(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    height, width = images.shape[1:3]
    pads = lax.padtype_to_pads((height, width), kernel.shape[:2], (stride, stride), "SAME")
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    out_height, out_width = -(-height // stride), -(-width // stride)
    total = None
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            shifted = lax.slice(
                padded,
                (0, row, column, 0),
                (
                    padded.shape[0],
                    row + (out_height - 1) * stride + 1,
                    column + (out_width - 1) * stride + 1,
                    padded.shape[3],
                ),
                (1, stride, stride, 1),
            )
            term = shifted * kernel[row, column, 0]
            total = term if total is None else total + term
    return total
