"""This project's side of a benchmark: `ours`, and the same without what makes it fast on a CPU.

`flax` has XLA's own convolutions on every platform, as one gets without `models.convolutions`;
`without-shifts`, `without-products` and `without-patches` have them for depthwise, 1x1 and stem
convolutions alone. `without-split` gives all images of a batch to one device, as `flax` does.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np

from effnetv2_jax.benchmark.protocol import WITHOUT_SPLIT, Program, Work, image_paths, serve
from effnetv2_jax.benchmark.train_step import make_step_runner
from effnetv2_jax.models import convolutions
from effnetv2_jax.models.create import create_model
from effnetv2_jax.parallel import ParallelForward, use_every_core
from effnetv2_jax.recipes import imagenet1k

# Side of the square matrices whose product stands for the best that a device can do.
_PRODUCT_SIDE = 2048
NUM_CLASSES = 1000


def prepare(name: str, work: Work) -> Program:
    """The program of that name, compiled."""
    if work.kind in ("inference", "predict") and name not in _ON_ONE_DEVICE:
        use_every_core()
    with _without(_LOWERINGS.get(name, ())):
        run = _WORK[work.kind](work)
        run(2)
    device = jax.local_devices()[0]
    has_memory = device.memory_stats() is not None
    return Program(
        versions=f"jax {jax.__version__}, flax {flax.__version__}",
        device=device.device_kind,
        run=run,
        peak_bytes=(lambda: device.memory_stats()["peak_bytes_in_use"]) if has_memory else None,
        facts={} if work.kind == "input" else {"peak_flops": product_flops(work.dtype)},
    )


# Program -> what of `models.convolutions` it does without.
_LOWERINGS = {
    "without-shifts": ("_as_shifted_products",),
    "without-products": ("_as_matrix_product",),
    "without-patches": ("_as_product_of_patches",),
    "flax": ("_as_shifted_products", "_as_matrix_product", "_as_product_of_patches"),
}
_ON_ONE_DEVICE = ("flax", WITHOUT_SPLIT)


@contextlib.contextmanager
def _without(lowerings: Sequence[str]) -> Iterator[None]:
    """Within it, networks are traced with XLA's convolutions in place of those formulations."""

    def by_xla(
        images: jax.Array, kernel: jax.Array, stride: int, pads: convolutions.Pads
    ) -> jax.Array:
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            window_strides=(stride, stride),
            padding=pads or "VALID",
            dimension_numbers=convolutions.DIMENSION_NUMBERS,
            feature_group_count=images.shape[-1] // kernel.shape[2],
        )

    with contextlib.ExitStack() as stack:
        for lowering in lowerings:
            stack.enter_context(mock.patch.object(convolutions, lowering, by_xla))
        yield


def _training(work: Work) -> Callable[[int], None]:
    """The step that `main` runs, with one batch that is on the host each time, as in training."""
    config = imagenet1k(work.variant, "paper" if "v2" in work.variant else "released")
    config.model.dtype = work.dtype
    config.model.depth_multiplier = work.depth_multiplier
    return make_step_runner(
        config,
        num_classes=NUM_CLASSES,
        image_size=work.image_size,
        batch_size=work.batch_size,
        devices=jax.local_devices()[:1],
    )


def _inference(work: Work) -> Callable[[int], None]:
    model = create_model(work.variant, dtype=work.dtype, num_classes=NUM_CLASSES)
    images = (_images(work) - 127.5) / 128
    variables = jax.jit(model.init)(jax.random.PRNGKey(0), images[:1])
    forward = ParallelForward(model.apply, variables)

    def run(repetitions: int) -> None:
        for _ in range(repetitions):
            logits = forward(images)
        logits.block_until_ready()

    return run


def _prediction(work: Work) -> Callable[[int], None]:
    from effnetv2_jax.prediction import Predictor
    from effnetv2_jax.weights.model_folder import ModelSpec

    paths = itertools.cycle(image_paths(work))
    spec = ModelSpec(work.variant, NUM_CLASSES, eval_size=work.image_size)
    model = spec.create_model(dtype=work.dtype)
    variables = jax.jit(model.init)(
        jax.random.PRNGKey(0), jnp.zeros((1, work.image_size, work.image_size, 3))
    )
    predictor = Predictor((model, variables, spec), batch_size=work.batch_size)

    def run(repetitions: int) -> None:
        for prediction in predictor.predict(
            list(itertools.islice(paths, repetitions * work.batch_size))
        ):
            assert prediction.error is None, prediction.error

    return run


def _images(work: Work) -> np.ndarray:
    """Grey levels, float32 [N, S, S, 3]."""
    shape = (work.batch_size, work.image_size, work.image_size, 3)
    return np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)


def _input(work: Work) -> Callable[[int], None]:
    from effnetv2_jax.data.datasets import load_dataset
    from effnetv2_jax.data.pipeline import train_batches

    image_paths(work)
    # Half of the files are held out, as a data set must have some of either kind.
    dataset = load_dataset(f"folder:{Path(work.folder).absolute()}", eval_fraction=0.5)
    batches = train_batches(
        dataset.train,
        seed=0,
        batch_size=work.batch_size,
        first_step=0,
        last_step=10**9,
        image_size=work.image_size,
        randaug_magnitude=work.randaug_magnitude,
        num_classes=dataset.num_classes,
    )

    def run(repetitions: int) -> None:
        for _ in itertools.islice(batches, repetitions):
            pass

    return run


_WORK = {
    "train": _training,
    "inference": _inference,
    "input": _input,
    "predict": _prediction,
}


def product_flops(dtype: str) -> float:
    """Arithmetic a second in a product of large matrices, the best of a few."""
    matrix: Any = jnp.ones((_PRODUCT_SIDE, _PRODUCT_SIDE), dtype)
    product = jax.jit(lambda a: a @ a)
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2.0 * _PRODUCT_SIDE**3 / min(seconds)


if __name__ == "__main__":
    serve(prepare)
