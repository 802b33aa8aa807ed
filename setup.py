"""Packaging; the bounds are what the tests ran with, up to the next announced break."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="effnetv2_jax",
    version="0.1.0",
    description="EfficientNetV2 with progressive learning in JAX and Flax, for TPU pods",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["effnetv2_jax", "effnetv2_jax.*"]),
    package_data={"effnetv2_jax.data": ["*.tsv"]},
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12,<0.1",
        # Paths on a disk or in a bucket.
        "etils[epath]>=1.13,<2",
        "flax>=0.12.8,<0.13",
        # TFDS 4.9 imports it without declaring it.
        "importlib_resources>=6.0",
        # 0.10 is the last minor version for Python 3.11; 0.13 is not tested.
        "jax>=0.10.2,<0.13",
        "matplotlib>=3.9,<4",
        "ml_collections>=1.1,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        # 1.0 moves its new API to the top level.
        "orbax-checkpoint>=0.12.8,<1",
        "safetensors>=0.5,<1",
        # clu's writers import it, and TensorFlow 2.21 no longer installs it.
        "tensorboard>=2.20,<3",
        # TFDS does not install it.
        "tensorflow-cpu>=2.21,<2.22",
        "tensorflow-datasets>=4.9.10,<5",
    ],
    extras_require={
        # Prepares ImageNet-21k. 2.77 is the first that installs beside TensorFlow 2.21.
        "imagenet21k": ["apache-beam>=2.77,<3"],
        # The architecture search. 5 is what its tests ran with.
        "nas": ["optuna>=5.0,<6"],
        "digits": ["scikit-learn>=1.6,<2"],
        # `tools.predict --format=parquet`.
        "parquet": ["pyarrow>=16"],
        # `tools.export`: --format=onnx, and LiteRT's own interpreter for --format=tflite.
        "onnx": ["onnx>=1.23,<2", "onnxruntime>=1.32,<2", "tf2onnx>=1.17,<2"],
        "tflite": ["ai-edge-litert>=2.3,<3"],
        # Reads the files of Keras, and those of PyTorch that are no safetensors.
        "keras": ["h5py>=3.10,<4"],
        "torch": ["torch>=2.9"],
        # The TPU compiler, which needs no TPU: `tools.tpu_compile`.
        "tpu": ["libtpu>=0.0.50,<0.1"],
        "dev": [
            "ai-edge-litert>=2.3,<3",
            "apache-beam>=2.77,<3",
            "h5py>=3.10,<4",
            "libtpu>=0.0.50,<0.1",
            "mypy>=2.0,<3",
            "onnx>=1.23,<2",
            "onnxruntime>=1.32,<2",
            "optuna>=5.0,<6",
            "pillow>=11",
            "pyarrow>=16",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.15,<0.18",
            "scikit-learn>=1.6,<2",
            "tf2onnx>=1.17,<2",
        ],
    },
)
