"""Keras's side of a benchmark: `keras-tf` and `keras-jax`, a batch at a time."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from effnetv2_jax.benchmark.protocol import Program, Unavailable, Work, serve

_BACKENDS = {"keras-tf": "tensorflow", "keras-jax": "jax"}


def prepare(name: str, work: Work) -> Program:
    """The program of that name, compiled."""
    if work.kind in ("input", "predict"):
        raise Unavailable(f"{name} has no pipeline of its own")
    if work.depth_multiplier != 1.0:
        raise Unavailable(f"{name} has networks of one depth")
    os.environ["KERAS_BACKEND"] = _BACKENDS[name]
    import keras

    backend: Any = importlib.import_module(_BACKENDS[name])
    if name == "keras-tf":
        backend.config.threading.set_intra_op_parallelism_threads(work.threads)
        backend.config.threading.set_inter_op_parallelism_threads(1)
    if work.dtype == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    model = _create(keras, work)
    shape = (work.batch_size, work.image_size, work.image_size, 3)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    run = (_training if work.kind == "train" else _inference)(keras, work, model, images)
    run(2)
    return Program(
        versions=f"keras {keras.__version__}, {_BACKENDS[name]} {backend.__version__}",
        device="cpu",
        run=run,
    )


def _create(keras: Any, work: Work) -> Any:
    # efficientnetv2-s -> EfficientNetV2S, efficientnet-b1 -> EfficientNetB1
    family, size = work.variant.split("-")
    own = family.replace("efficientnet", "EfficientNet").replace("v2", "V2") + size.upper()
    create = getattr(keras.applications, own, None)
    if create is None:
        raise Unavailable(f"Keras has no {work.variant}")
    more = {"include_preprocessing": False} if "V2" in own else {}
    shape = (work.image_size, work.image_size, 3)
    return create(weights=None, input_shape=shape, classifier_activation=None, **more)


def _training(keras: Any, work: Work, model: Any, images: np.ndarray) -> Callable[[int], None]:
    model.compile(
        optimizer=keras.optimizers.RMSprop(
            1e-3, rho=0.9, momentum=0.9, epsilon=1e-3, weight_decay=1e-5, use_ema=True
        ),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
        jit_compile="auto",
    )
    labels = np.eye(1000, dtype=np.float32)[: work.batch_size]

    def run(repetitions: int) -> None:
        for _ in range(repetitions):
            model.train_on_batch(images, labels)

    return run


def _inference(keras: Any, work: Work, model: Any, images: np.ndarray) -> Callable[[int], None]:
    def run(repetitions: int) -> None:
        for _ in range(repetitions):
            model.predict_on_batch(images)

    return run


if __name__ == "__main__":
    serve(prepare)
