"""How many CPU devices a command has, and how they share a batch."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effnetv2_jax.parallel import ParallelForward

_COUNT = """
from effnetv2_jax.parallel import use_every_core
use_every_core()
import jax
print(jax.local_device_count())
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, min(len(os.sched_getaffinity(0)), 8)),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_each_core_is_a_device_unless_the_user_says_otherwise(chosen, expected):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    count = subprocess.run(
        [sys.executable, "-c", _COUNT],
        env={**environment, **chosen, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(count.stdout) == expected


def test_devices_share_what_they_divide_and_one_takes_the_rest():
    traced = []

    def forward(scale, images, *, power=1):
        traced.append((len(images), power))
        return {"scaled": scale * images**power}

    shared = ParallelForward(forward, jnp.float32(2), options=("power",))
    assert shared.num_devices == jax.device_count() == 8
    for count in (16, 5, 1):
        images = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
        for power in (1, 2, 2):
            found = shared(images, power=power)["scaled"]
            np.testing.assert_array_equal(found, 2 * images**power)
            assert len(found.sharding.device_set) == (8 if count == 16 else 1)
    assert traced == [(2, 1), (2, 2), (5, 1), (5, 2), (1, 1), (1, 2)]
