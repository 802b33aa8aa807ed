"""What makes the train step of S faster, smaller or quicker to compile for a TPU: one by one.

    python -m experiments.tpu_compile.levers              # what is missing in levers.csv
    python -m experiments.tpu_compile.levers NAME...      # these, again

Each lever changes the program of EfficientNetV2-S at 300 px, 32 images on each of 32 TPUv3 cores,
in one way and compiles it in a process of its own. Most of them do not help, and are kept here
because the next one who wonders need not try again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from effnetv2_jax import memory, recipes, steps
from effnetv2_jax.models import efficientnet, layers, specs
from effnetv2_jax.tools import tpu_compile

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
RESULTS = FOLDER / "levers.csv"
TOPOLOGY = "v3:4x4"
# Of a v3 core: what XLA counts `estimated_cycles` in. Twice the products of a 128 x 128 unit, of
# which a core has two, give the 61.5 TFLOP/s of cloud.google.com/tpu/docs/v3.
CLOCK_HZ = 940e6


PLAIN = memory.Fit()


@dataclasses.dataclass(frozen=True)
class Lever:
    """One change.

    Attributes:
      what: for the table.
      config: overrides.
      patch: changes the code before it is used.
      fit: how the step is cut down.
      compiler_options: XLA's.
    """

    what: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    patch: Callable[[], None] = lambda: None
    fit: memory.Fit = PLAIN
    compiler_options: dict[str, Any] | None = None


class _FlaxBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` under the names of ours."""

    decay: float = 0.99

    def __post_init__(self) -> None:
        object.__setattr__(self, "momentum", self.decay)
        super().__post_init__()


def _use_flax_batch_norm(**attributes: Any) -> None:
    efficientnet.BatchNorm = functools.partial(  # type: ignore[misc, assignment]
        _FlaxBatchNorm, name=None, **attributes
    )


class _DenseSqueezeExcite(nn.Module):
    """Squeeze-excitation by matrix products instead of 1x1 convolutions."""

    squeeze_filters: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        gate = jnp.mean(images, axis=(1, 2))
        gate = nn.silu(nn.Dense(self.squeeze_filters, dtype=self.dtype, name="reduce")(gate))
        gate = nn.Dense(images.shape[-1], dtype=self.dtype, name="expand")(gate)
        return images * nn.sigmoid(gate)[:, None, None, :]


def _use_dense_squeeze_excite() -> None:
    efficientnet.SqueezeExcite = _DenseSqueezeExcite  # type: ignore[misc, assignment]


def _normalise_in_bfloat16() -> None:
    class HalfBatchNorm(layers.BatchNorm):
        """Statistics in float32, the multiply-add in bfloat16."""

        def normalise(self, values: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
            return values.astype(self.dtype) * factor.astype(self.dtype) + offset.astype(self.dtype)

    efficientnet.BatchNorm = HalfBatchNorm  # type: ignore[misc]


def _keep_momentum_in_bfloat16() -> None:
    def rmsprop(
        learning_rate: Any, *, momentum: float, **arguments: Any
    ) -> optax.GradientTransformation:
        arguments.pop("centered", None)
        return optax.chain(
            optax.scale_by_rms(**arguments),
            optax.scale_by_learning_rate(learning_rate),
            optax.trace(momentum, accumulator_dtype=jnp.bfloat16),
        )

    optax.rmsprop = rmsprop


def _average_no_weights() -> None:
    steps.update_ema = lambda averages, *_: averages  # type: ignore[assignment]


def _pad_channels_to_32() -> None:
    spec = specs.SPECS["efficientnetv2-s"]
    rows = tuple(dataclasses.replace(r, filters=-(-r.filters // 32) * 32) for r in spec.rows)
    specs.SPECS["efficientnetv2-s"] = dataclasses.replace(spec, rows=rows, stem_filters=32)


LEVERS = {
    "ours": Lever("the step as it is"),
    "flax_batch_norm": Lever(
        "`nn.BatchNorm`, which subtracts the mean before it scales", patch=_use_flax_batch_norm
    ),
    "bf16_statistics": Lever(
        "`nn.BatchNorm` with bfloat16 statistics",
        patch=functools.partial(_use_flax_batch_norm, force_float32_reductions=False),
    ),
    "bf16_normalise": Lever("normalising in bfloat16", patch=_normalise_in_bfloat16),
    "local_statistics": Lever(
        "batch statistics of one core instead of 8", {"model.bn_group_size": 1}
    ),
    "global_statistics": Lever("batch statistics of all 32 cores", {"model.bn_group_size": 32}),
    "dense_squeeze_excite": Lever(
        "squeeze-excitation as matrix products", patch=_use_dense_squeeze_excite
    ),
    "padded_channels": Lever(
        "channels padded to multiples of 32: 24 to 32, 48 to 64", patch=_pad_channels_to_32
    ),
    "bf16_momentum": Lever("momentum kept in bfloat16", patch=_keep_momentum_in_bfloat16),
    "no_average": Lever("no moving average of the weights", patch=_average_no_weights),
    "two_parts": Lever("2 micro-batches of 16", fit=memory.Fit(2)),
    "remat_3": Lever("3 of 6 block groups rematerialised", fit=memory.Fit(1, 3)),
    "remat_all": Lever("all block groups rematerialised", fit=memory.Fit(1, 6)),
    "least_effort": Lever(
        "XLA's least optimization effort", compiler_options={"exec_time_optimization_effort": -1.0}
    ),
    "new_fusion_model": Lever(
        "XLA's experimental cost model of fusions",
        compiler_options={"xla_tpu_enable_experimental_fusion_cost_model": True},
    ),
    "shared_conv_inputs": Lever(
        "convolution inputs of several users fused",
        compiler_options={"xla_tpu_input_conv_multi_users": True},
    ),
    "no_rwb_fusion": Lever(
        "no reduce-with-broadcast fusion", compiler_options={"xla_tpu_rwb_fusion": False}
    ),
}


def measure(name: str) -> dict[str, Any]:
    """The row of a lever."""
    lever = LEVERS[name]
    lever.patch()
    config: ConfigDict = recipes.imagenet1k("efficientnetv2-s", "paper")
    config.batch_size = 1024
    config.progressive.update(num_stages=1, image_size=(300, 300))
    config.update_from_flattened_dict(lever.config)
    kind = tpu_compile.DEVICE_KINDS["v3"]
    update, train, _ = tpu_compile.run_steps(config, TOPOLOGY)
    update_costs = None
    if lever.fit.micro_batches > 1:
        update_costs = tpu_compile.costs(update.lower(memory.Fit()).compile(), kind, 1)
    lowered = train.lower(lever.fit)
    begun = time.monotonic()
    compiled = lowered.compile(compiler_options=lever.compiler_options)
    seconds = time.monotonic() - begun
    costs = tpu_compile.costs(
        compiled, kind, train.batch_per_core, lever.fit.micro_batches, update_costs
    )
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', _entry(compiled.as_text()))))
    return {
        "lever": name,
        "what": lever.what,
        "estimated_ms": f"{costs['estimated_ms']:.2f}",
        "gb_moved": f"{costs['mbytes_per_image'] * train.batch_per_core / 1e3:.2f}",
        "tflop": f"{costs['gflops_per_image'] * train.batch_per_core / 1e3:.3f}",
        "memory_gib": f"{costs['memory_gib']:.2f}",
        "cycles_ms": f"{1e3 * cycles / CLOCK_HZ:.1f}" if lever.fit.micro_batches == 1 else "",
        "compile_seconds": f"{seconds:.0f}",
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }


def _entry(program: str) -> str:
    """The computation that a program begins with, whose fusions carry the cycles."""
    return program[program.index("\nENTRY ") :]


def read_levers() -> dict[str, dict[str, str]]:
    """The rows of `levers.csv` by name."""
    if not RESULTS.is_file():
        return {}
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        return {row["lever"]: row for row in csv.DictReader(stream)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("levers", nargs="*", metavar="NAME", choices=[[], *LEVERS])
    parser.add_argument("--measure", choices=LEVERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        row = measure(arguments.measure)
        rows = {**read_levers(), arguments.measure: row}
        with RESULTS.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, row)
            writer.writeheader()
            writer.writerows(rows[name] for name in LEVERS if name in rows)
        print(row)
        return 0
    failed = 0
    for name in arguments.levers or [name for name in LEVERS if name not in read_levers()]:
        print(f"{name}: {LEVERS[name].what}", flush=True)
        command = [sys.executable, __file__, f"--measure={name}"]
        failed += subprocess.run(command, cwd=REPOSITORY).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
