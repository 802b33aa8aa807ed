"""Where a step's time goes on the CPU: by kind of operation, and single layers on their own.

    python -m experiments.speed.operations

`operations.csv` has the milliseconds that XLA's operations of each kind take in a step, by JAX's
profiler; operations that run at the same time count twice. `layers.csv` has convolutions forward
and backward, by XLA and as `models/convolutions.py` lowers them: time on the clock and time of
all cores, which are equal where one core works alone.
"""

from __future__ import annotations

import csv
import functools
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from effnetv2_jax.benchmark import ours
from effnetv2_jax.benchmark.protocol import Work
from effnetv2_jax.models.convolutions import DIMENSION_NUMBERS, convolution
from experiments.provenance import commit, host

FOLDER = Path(__file__).resolve().parent
OPERATIONS = FOLDER / "operations.csv"
LAYERS = FOLDER / "layers.csv"

_WORKS = (
    Work("train", "efficientnetv2-s", 128, 8),
    Work("inference", "efficientnetv2-b0", 224, 16),
)
_STEPS = 3
# Images, side, input and output channels, kernel, stride, whether depthwise.
_LAYERS = (
    (8, 128, 3, 24, 3, 2, False),
    (8, 64, 24, 24, 3, 1, False),
    (8, 32, 48, 192, 3, 1, False),
    (8, 16, 64, 256, 3, 1, False),
    (16, 56, 32, 128, 3, 1, False),
    (8, 32, 192, 48, 1, 1, False),
    (8, 8, 960, 960, 3, 1, True),
)


def operations(work: Work) -> dict[str, float]:
    """Milliseconds of a step by kind of operation, and of the whole step as `step`."""
    texts: list[str] = []

    class Recorded:
        """A mapped or jitted function whose compiled program is kept as text."""

        def __init__(self, function: Any):
            self._function = function
            self._is_new = True

        def __call__(self, *arguments: Any) -> Any:
            if self._is_new:
                texts.append(self._function.lower(*arguments).compile().as_text())
                self._is_new = False
            return self._function(*arguments)

    map_step, jit = ours.parallel_train_step, jax.jit
    with (
        mock.patch.object(ours, "parallel_train_step", lambda *a, **k: Recorded(map_step(*a, **k))),
        mock.patch.object(ours.jax, "jit", lambda *a, **k: Recorded(jit(*a, **k))),
    ):
        run = {"train": ours._training, "inference": ours._inference}[work.kind](work)
        run(2)
    begun = time.perf_counter()
    run(_STEPS)
    total = (time.perf_counter() - begun) / _STEPS * 1e3
    kinds = _kinds(texts[-1])
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(_STEPS)
        (file,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        for event in (e for plane in data.planes for line in plane.lines for e in line.events):
            name = dict(event.stats).get("hlo_op")
            if name is not None:
                found[kinds.get(str(name), "elementwise")] += event.duration_ns / 1e6 / _STEPS
    return {"step": total, **dict(found.most_common())}


def _kinds(text: str) -> dict[str, str]:
    """Operation -> kind, from a compiled program: what the computation that it calls holds."""
    bodies: dict[str, list[str]] = {}
    calls: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        begins = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if begins:
            name = begins[1]
        bodies.setdefault(name, []).append(line)
        operation = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if operation:
            called = re.search(r"calls=%?([\w.\-]+)", line)
            calls[operation[1]] = called[1] if called else ""
            if not called:
                bodies[operation[1]] = [line]
    kinds = {
        " convolution(": "convolutions",
        " dot(": "matrix products",
        " all-reduce(": "exchange",
        " reduce(": "sums",
    }
    found = {}
    for operation, called in calls.items():
        body = "\n".join(bodies.get(called or operation, []))
        kind = next((kind for sign, kind in kinds.items() if sign in body), None)
        if kind is not None:
            found[operation] = kind
    return found


def layers() -> Iterator[dict[str, Any]]:
    """One row for a layer, direction and lowering."""
    for count, side, channels, filters, size, stride, depthwise in _LAYERS:
        groups = channels if depthwise else 1
        random = np.random.default_rng(0)
        images = jnp.asarray(random.normal(size=(count, side, side, channels)), jnp.float32)
        kernel = jnp.asarray(
            random.normal(size=(size, size, channels // groups, filters)), jnp.float32
        )
        lowerings = {
            "xla": functools.partial(
                jax.lax.conv_general_dilated,
                window_strides=(stride, stride),
                padding="SAME",
                dimension_numbers=DIMENSION_NUMBERS,
                feature_group_count=groups,
            ),
            "ours": functools.partial(convolution, stride=stride, groups=groups),
        }
        for lowering, forward in lowerings.items():
            outputs = forward(images, kernel)
            gflop = 2e-9 * outputs.size * size**2 * (channels // groups)

            def backward(
                images: jax.Array,
                kernel: jax.Array,
                gradient: jax.Array,
                forward: Callable[..., jax.Array] = forward,
            ) -> Any:
                return jax.vjp(forward, images, kernel)[1](gradient)

            for direction, function, arguments, times in (
                ("forward", forward, (images, kernel), 1),
                ("backward", backward, (images, kernel, outputs), 2),
            ):
                clock, cores = _milliseconds(jax.jit(function), arguments)
                yield {
                    "layer": f"{'depthwise ' if depthwise else ''}{size}x{size} {channels}->"
                    f"{filters} /{stride}, {count} x {side} px",
                    "direction": direction,
                    "lowering": lowering,
                    "ms": f"{clock:.2f}",
                    "ms_of_all_cores": f"{cores:.2f}",
                    "gflops_per_second": f"{times * gflop / clock * 1e3:.0f}",
                }


def _milliseconds(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[float, float]:
    """On the clock and of all cores, the best of several runs."""
    jax.block_until_ready(function(*arguments))
    best = (float("inf"), 0.0)
    for _ in range(10):
        repetitions = 5
        clock, cores = time.perf_counter(), time.process_time()
        for _ in range(repetitions):
            jax.block_until_ready(function(*arguments))
        taken = (time.perf_counter() - clock, time.process_time() - cores)
        best = min(best, (taken[0] / repetitions * 1e3, taken[1] / repetitions * 1e3))
    return best


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Writes both files."""
    origin = {"jax": jax.__version__, "host": host(), "commit": commit()}
    _write(LAYERS, [{**row, **origin} for row in layers()])
    rows = []
    for work in _WORKS:
        what = f"{work.kind} {work.variant}, {work.image_size} px, {work.batch_size}"
        for kind, ms in operations(work).items():
            rows.append({"work": what, "kind": kind, "ms": f"{ms:.1f}", **origin})
            print(rows[-1], flush=True)
    _write(OPERATIONS, rows)


if __name__ == "__main__":
    main()
