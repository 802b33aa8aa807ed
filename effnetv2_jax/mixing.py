"""Mixup and cutmix on the device, inside the training step.

Neighbours in the global batch are partners: positions 2k and 2k + 1. Batches are shuffled, so
that is as good as a random pairing, and it never crosses a device. Every draw is keyed by the
position in the global batch, so one device and eight mix the same way. The strengths are
traced, so a new stage compiles nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from effnetv2_jax.errors import unknown_name
from effnetv2_jax.models.layers import example_keys

FORMS = ("per_example", "released")


def check_mixing(form: str) -> None:
    """Raises `InputError` unless `form` is one of `FORMS`."""
    if form not in FORMS:
        raise unknown_name("mixing", form, FORMS)


def mix(
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    *,
    mixup_alpha: jax.Array,
    cutmix_alpha: jax.Array,
    form: str = "per_example",
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its partner.

    With both strengths above 0 every other pair is mixed by cutmix and the rest by mixup (the
    released code gives each one half of the batch); with one of them, all examples get that one.

    Args:
      images: [N, H, W, C] with N even.
      labels: float32 [N, classes].
      key: the step's key.
      positions: [N], of the examples in the global batch.
      mixup_alpha: both parameters of the Beta distribution, float32 scalar; 0 is off.
      cutmix_alpha: likewise.
      form: `per_example`: under cutmix each label weighs what its own pixels do (Yun et al.
        2019); `released`: all labels of a batch weigh the same, by the mean area over the
        examples that cutmix takes, and the box has whole pixels around an integer centre
        (measured on automl efficientnetv2/datasets.py, which averages over a host's half
        batch; here it is the global one).
      axis_name: the replica axis.

    Returns:
      Mixed images and labels. Each example keeps at least half of its own label under mixup;
      under cutmix it keeps the share of its own pixels.
    """
    check_mixing(form)
    in_cutmix_half = (positions // 2) % 2 == 1
    cutmix = (cutmix_alpha > 0) & ((mixup_alpha <= 0) | in_cutmix_half)
    alpha = jnp.where(cutmix, cutmix_alpha, mixup_alpha)
    # Beta(0, 0) is NaN, and so is its gradient: draw with a harmless alpha where mixing is off.
    keys = example_keys(key, positions)
    beta_keys, centre_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    safe_alpha = jnp.where(alpha > 0, alpha, 1.0)
    share = jax.vmap(jax.random.beta)(beta_keys, safe_alpha, safe_alpha)

    height, width = images.shape[1:3]
    box = _box if form == "per_example" else _released_box
    own_pixel = ~jax.vmap(lambda k, s: box(k, s, height, width))(centre_keys, share)
    own_area = jnp.mean(own_pixel, axis=(1, 2), dtype=jnp.float32)
    if form == "released":
        area, count = jnp.sum(own_area * cutmix), jnp.sum(cutmix, dtype=jnp.float32)
        if axis_name is not None:
            area, count = lax.psum((area, count), axis_name)
        own_area = jnp.broadcast_to(area / jnp.maximum(count, 1.0), own_area.shape)

    mixup_share = jnp.maximum(share, 1.0 - share)
    active = alpha > 0
    own_weight = jnp.where(cutmix, own_area, mixup_share)
    own_weight = jnp.where(active, own_weight, 1.0)
    pixel_weight = jnp.where(
        cutmix[:, None, None], own_pixel.astype(jnp.float32), mixup_share[:, None, None]
    )
    pixel_weight = jnp.where(active[:, None, None], pixel_weight, 1.0)[..., None]

    pixel_weight = pixel_weight.astype(images.dtype)
    images = images * pixel_weight + _partner(images) * (1 - pixel_weight)
    labels = labels * own_weight[:, None] + _partner(labels) * (1.0 - own_weight[:, None])
    return images, labels


def _partner(values: jax.Array) -> jax.Array:
    pairs = values.reshape(values.shape[0] // 2, 2, *values.shape[1:])
    return pairs[:, ::-1].reshape(values.shape)


def _box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Bool [height, width]: the pixels that the partner gives, an area of 1 - share.

    The centre is uniform over the image and the box is clipped at the borders (Yun et al. 2019).
    """
    side = jnp.sqrt(1.0 - share)
    row, column = jax.random.uniform(key, (2,)) * jnp.array([height, width], jnp.float32)
    rows = jnp.abs(jnp.arange(height) + 0.5 - row) < side * height / 2
    columns = jnp.abs(jnp.arange(width) + 0.5 - column) < side * width / 2
    return rows[:, None] & columns[None, :]


def _released_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """As `_box`, in whole pixels: side int(sqrt(1 - share) * size), centre a whole pixel."""
    size = jnp.array([height, width], jnp.float32)
    side = jnp.floor(jnp.sqrt(1.0 - share) * size)
    centre = jnp.floor(jax.random.uniform(key, (2,)) * size)
    first = centre - side // 2
    last = first + side
    row, column = jnp.arange(height), jnp.arange(width)
    rows = (row >= first[0]) & (row < last[0])
    columns = (column >= first[1]) & (column < last[1])
    return rows[:, None] & columns[None, :]
