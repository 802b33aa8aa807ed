"""Milliseconds of a gradient of configs/fashion_mnist.py's network, by image size.

    python -m experiments.fashion_mnist.step_time --append=experiments/fashion_mnist/step_times.csv

Run it with and without GLIBC_TUNABLES=glibc.malloc.hugetlb=1; a row says which. The best of eight
gradients in train mode, batch 128, float32, on whatever JAX runs on.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effnetv2_jax import create_model

BATCH_SIZE = 128
IMAGE_SIZES = (18, 23, 28)
COLUMNS = ("image_size", "milliseconds", "glibc_tunables", "device", "cores", "jax")


def gradient_milliseconds(image_size: int) -> float:
    """The best of eight runs, after one that compiles."""
    # configs/fashion_mnist.py.
    model = create_model(
        "efficientnetv2-b0",
        num_classes=10,
        width_multiplier=0.5,
        depth_multiplier=0.5,
        stem_stride=1,
        drop_path_rate=0.1,
    )
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(BATCH_SIZE, image_size, image_size, 3)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 10, BATCH_SIZE))
    variables = model.init(jax.random.key(0), images[:1])
    keys = {"dropout": jax.random.key(1), "drop_path": jax.random.key(2)}

    @jax.jit
    def gradient(params: dict, batch_stats: dict) -> dict:
        def loss(params: dict) -> tuple[jax.Array, dict]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=keys,
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), updated

        return jax.grad(loss, has_aux=True)(params)

    seconds = []
    for _ in range(9):
        begun = time.perf_counter()
        jax.block_until_ready(gradient(variables["params"], variables["batch_stats"]))
        seconds.append(time.perf_counter() - begun)
    return 1e3 * min(seconds[1:])


def main() -> None:
    """Measures each size and adds a row for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--append", type=Path, required=True, help="CSV file")
    path = parser.parse_args().append
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for size in IMAGE_SIZES:
            milliseconds = gradient_milliseconds(size)
            print(f"{size} px: {milliseconds:.1f} ms")
            tunables = os.environ.get("GLIBC_TUNABLES", "")
            device = jax.devices()[0].device_kind
            row = (size, f"{milliseconds:.1f}", tunables, device, os.cpu_count(), jax.__version__)
            writer.writerow(row)


if __name__ == "__main__":
    main()
