"""TensorFlow for the host's work alone: it must not take the accelerator's memory from JAX."""

import os

# TensorFlow's start-up messages speak of its own kernels and bury the run's. Errors stay.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
