"""TensorFlow kept on the host: data/ imports `tf` from here, so that JAX owns the accelerators."""

import tensorflow as tf

# Without this TensorFlow would reserve the GPU memory that JAX needs.
tf.config.set_visible_devices([], "GPU")
