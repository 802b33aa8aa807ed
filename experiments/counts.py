"""Exact numbers of a network: trainable parameters and multiply-adds."""

from __future__ import annotations

from effnetv2_jax.models.create import count_parameters, create_model
from effnetv2_jax.models.multiply_adds import count_multiply_adds
from effnetv2_jax.models.network import Network


def quantities(variant: str, image_size: int) -> dict[str, float | int]:
    """What an experiment's rows say of a variant of 1,000 classes at an image size (pixels)."""
    return quantities_of(create_model(variant), image_size)


def quantities_of(network: Network, image_size: int) -> dict[str, float | int]:
    """Likewise of any network."""
    parameters = count_parameters(network)
    multiply_adds = sum(cost.multiply_adds for cost in count_multiply_adds(network, image_size))
    return {
        "parameters": parameters,
        "parameters, M": parameters / 1e6,
        # The paper's word for multiply-adds.
        "FLOPs, G": multiply_adds / 1e9,
        "image size, px": image_size,
    }
