"""Converted weights against the libraries they come from: the same logits, within float32.

    python experiments/parity/run.py --peers=.venv-peers/bin/python

Each row of `results.csv` is one network of one library with random weights (`peer.py`), its file
converted by `effnetv2_jax.weights.convert`, and the largest difference of logits. Rows that are
there are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec
from effnetv2_jax.weights.convert import Converted, convert, convert_back
from effnetv2_jax.weights.layout import list_layers

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
RESULTS = FOLDER / "results.csv"
# The goals. A difference counts against how much the logits of two images differ; sums of other
# order in the peer itself set the floor, which is never taken below 8 epsilon of float32.
MAX_MEASURE = 1e-3
MAX_RATIO = 10.0
LEAST_FLOOR = 8 * float(np.finfo(np.float32).eps)
MAX_GRADIENT_ERROR = 1e-3
MAX_TRAIN_ERROR = 1e-3
# Pixels. An even side pads differently in TensorFlow and in PyTorch: 96 px is even before each
# stride, and 71 px is odd, even (36, 18), then odd again (9, 5).
ODD, EVEN = 71, 96
_BN_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      peer: of `weights.convert.SOURCES`.
      variant: our name of the network.
      image_size: pixels.
      file: the name that the weights are saved under; its end decides the format.
      gradient: whether gradients with respect to the images are compared.
      train: whether logits and running statistics of a training step are compared.
    """

    peer: str
    variant: str
    image_size: int
    file: str = "weights.safetensors"
    gradient: bool = False
    train: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells rows of the table apart."""
        return self.peer, self.variant, self.file, str(self.image_size)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
      measure: largest difference between our logits and the peer's, over the standard deviation
        across classes of the difference between the logits of two images.
      floor: the same of the peer and itself with the other memory layout and other kernels.
      gradient_error: the norm of the difference of gradients over the norm of the gradient; None
        if not asked for. Not the largest difference: ReLU6 has kinks, and where rounding crosses
        one, a few gradients jump.
      train_bn_error: with batch statistics, the greater of the measure of logits and the largest
        difference of running statistics over their standard deviation; likewise.
      versions: of the peer.
    """

    measure: float
    floor: float
    gradient_error: float | None
    train_bn_error: float | None
    versions: str

    @property
    def ratio(self) -> float:
        """The measure over the floor, or over 8 epsilon where the floor is below it."""
        return self.measure / max(self.floor, LEAST_FLOOR)

    def failures(self) -> list[str]:
        """The goals that are missed."""
        failures = []
        if not self.measure <= MAX_MEASURE:
            failures.append(f"measure {self.measure:.3g} > {MAX_MEASURE}")
        if not self.ratio <= MAX_RATIO:
            failures.append(f"ratio {self.ratio:.3g} > {MAX_RATIO}")
        for name, value, limit in (
            ("gradient_error", self.gradient_error, MAX_GRADIENT_ERROR),
            ("train_bn_error", self.train_bn_error, MAX_TRAIN_ERROR),
        ):
            if value is not None and not value <= limit:
                failures.append(f"{name} {value:.3g} > {limit}")
        return failures


_V2, _V1 = "efficientnetv2", "efficientnet"
_KERAS, _BUNDLE = "model.weights.h5", "model.ckpt"


def rows() -> Iterator[Row]:
    """The table, small networks first."""
    yield from _small(ODD, checks_all=True)
    for file in ("model.h5", "model.keras"):
        yield Row("keras", f"{_V2}-b0", ODD, file)
    for index, size in ((1, EVEN), (2, ODD), (3, EVEN)):
        yield Row("timm", f"{_V2}-b{index}", size)
        yield Row("keras", f"{_V2}-b{index}", size, _KERAS)
        yield Row("timm", f"{_V1}-b{index}", size)
    yield Row("torchvision", f"{_V1}-b4", ODD)
    yield Row("torchvision", "resnet152", EVEN)
    for name, size in (("m", ODD), ("l", EVEN)):
        yield Row("torchvision", f"{_V2}-{name}", size)
        yield Row("plain_pytorch", f"{_V2}-{name}", size)
        yield Row("timm", f"{_V2}-{name}", size)
        yield Row("keras", f"{_V2}-{name}", size, _KERAS)
    for index, size in ((4, ODD), (5, EVEN), (6, ODD), (7, EVEN)):
        yield Row("timm", f"{_V1}-b{index}", size)
    yield Row("torchvision", f"{_V1}-b7", EVEN)
    yield Row("timm", f"{_V2}-xl", EVEN)
    yield from _small(EVEN, checks_all=False)


def _small(size: int, *, checks_all: bool) -> Iterator[Row]:
    """B0, Lite0, S, ResNet-50 of the libraries; `checks_all` adds gradients and a train step."""
    checks = {"gradient": checks_all, "train": checks_all}
    yield Row("timm", f"{_V2}-b0", size, **checks)
    yield Row("timm", f"{_V1}-b0", size, **checks)
    yield Row("timm", f"{_V1}-lite0", size, **checks)
    yield Row("torchvision", f"{_V1}-b0", size, **checks)
    yield Row("torchvision", "resnet50", size, **checks)
    yield Row("efficientnet_pytorch", f"{_V1}-b0", size, **checks)
    yield Row("keras", f"{_V2}-b0", size, _KERAS, **checks)
    yield Row("released", f"{_V2}-b0", size, _BUNDLE, **checks)
    yield Row("plain_pytorch", f"{_V2}-s", size, **checks)
    yield Row("torchvision", f"{_V2}-s", size, **checks)
    yield Row("timm", f"{_V2}-s", size)
    yield Row("keras", f"{_V1}-b0", size, _KERAS)
    yield Row("keras", f"{_V2}-s", size, _KERAS)
    yield Row("released", f"{_V1}-b0", size, _BUNDLE)
    yield Row("released", f"{_V2}-s", size, _BUNDLE)


def run_peer(peers: str, row: Row, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The peer's file and its numbers (see `peer.py`), both in a folder that exists."""
    # The authors' checkpoints have no package of their own: their peer's file is rewritten.
    file = "plain.safetensors" if row.peer == "released" else row.file
    command = [
        *(peers, str(FOLDER / "peer.py"), f"--peer={row.peer}", f"--variant={row.variant}"),
        *(f"--image_size={row.image_size}", f"--file={file}", f"--folder={folder}"),
        *(["--gradient"] if row.gradient else []),
        *(["--train"] if row.train else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    with np.load(folder / "numbers.npz") as numbers:
        values = dict(numbers)
    if row.peer == "released":
        from safetensors.numpy import load_file

        sys.path.insert(0, str(FOLDER))
        from released_bundle import released_names, write_bundle

        tensors = released_names(load_file(folder / file), row.variant)
        write_bundle(folder / row.file, tensors)
    return folder / row.file, values


def scaled_difference(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference over the standard deviation of the first two rows' difference.

    Args:
      ours: logits [N, classes].
      theirs: likewise.
    """
    spread = float(np.std(theirs[0].astype(np.float64) - theirs[1]))
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs))) / spread


def forward(converted: Converted, **overrides: Any) -> Callable[[Any], jax.Array]:
    """Our network with those weights: images [N, H, W, 3] -> logits [N, classes].

    Args:
      converted: weights and their description.
      **overrides: attributes of the network; the tests make mistakes with them.
    """
    model = converted.spec.create_model(**overrides)
    # As arguments, not as constants: XLA would spend its time on folding them.
    apply = jax.jit(lambda variables, images: model.apply(variables, images))
    return lambda images: apply(converted.variables, jnp.asarray(images))


def compare(converted: Converted, numbers: dict[str, np.ndarray]) -> Result:
    """Our numbers with the converted weights against the peer's."""
    images = jnp.asarray(numbers["images"])
    logits = forward(converted)(images)
    gradient_error = train_error = None
    if "gradient" in numbers:
        gradient_error = _gradient_error(converted, images, numbers)
    if "train_logits" in numbers:
        train_error = _train_error(converted, numbers)
    return Result(
        measure=scaled_difference(logits, numbers["logits"]),
        floor=scaled_difference(numbers["other_logits"], numbers["logits"]),
        gradient_error=gradient_error,
        train_bn_error=train_error,
        versions=str(numbers["versions"]),
    )


def _gradient_error(
    converted: Converted, images: jax.Array, numbers: dict[str, np.ndarray]
) -> float:
    model = converted.spec.create_model()

    def projected(x: jax.Array, variables: Any) -> jax.Array:
        return jnp.sum(model.apply(variables, x) * numbers["projection"])

    ours = np.asarray(jax.jit(jax.grad(projected))(images, converted.variables))
    theirs = numbers["gradient"]
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _train_error(converted: Converted, numbers: dict[str, np.ndarray]) -> float:
    model = converted.spec.create_model(bn_decay=_BN_DECAY, dropout_rate=0.0, drop_path_rate=0.0)

    @jax.jit
    def step(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = step(converted.variables, numbers["train_images"])
    errors = [scaled_difference(logits, numbers["train_logits"])]
    statistics = flatten_dict(updated["batch_stats"], sep="/")
    norms = [
        layer.path
        for layer in list_layers(get_spec(converted.spec.variant))
        if layer.kind == "norm"
    ]
    for end, path in (("first", norms[0]), ("last", norms[-1])):
        for leaf in ("mean", "var"):
            ours = np.asarray(statistics[f"{path}/{leaf}"], np.float64)
            theirs = numbers[f"{end}_{leaf}"]
            errors.append(float(np.max(np.abs(ours - theirs)) / np.std(theirs)))
    return max(errors)


def check_round_trip(converted: Converted, target: str, folder: Path) -> None:
    """Ours -> the layout of `target` -> ours must give the same bits.

    Raises:
      RuntimeError: it does not.
    """
    from safetensors.numpy import save_file

    path = folder / "back.safetensors"
    save_file(convert_back(target, converted.spec, converted.variables), path)
    again = convert(target, converted.spec.variant, path)
    before, after = (flatten_dict(c.variables, sep="/") for c in (converted, again))
    different = sorted(n for n in before.keys() | after.keys() if not _same(before, after, n))
    if different:
        raise RuntimeError(f"{different[0]} changed on the way to {target} and back.")


def _same(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    if name not in before or name not in after:
        return False
    return np.array_equal(before[name], after[name])


def run_row(peers: str, row: Row, folder: Path) -> Result:
    """One comparison, with its files in a folder that exists."""
    path, numbers = run_peer(peers, row, folder)
    converted = convert(row.peer, row.variant, path)
    if row.peer in ("timm", "torchvision", "plain_pytorch"):
        check_round_trip(converted, row.peer, folder)
    return compare(converted, numbers)


_COLUMNS = (
    *("peer", "variant", "file", "image_size", "measure", "floor", "ratio", "gradient_error"),
    *("train_bn_error", "peer_version", "jax_version", "commit", "seconds"),
)


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def sweep(peers: str, results: Path, only: str, limit: int | None = None) -> int:
    """Appends the rows that are not in the file; returns how many miss a goal."""
    if not Path(peers).is_file():
        raise InputError(f"--peers={peers} is no Python: `make test-parity` installs one.")
    exists = results.is_file()
    there = set()
    if exists:
        with results.open(newline="") as file:
            there = {
                (line["peer"], line["variant"], line["file"], line["image_size"])
                for line in csv.DictReader(file)
            }
    wanted = [row for row in rows() if only in "/".join(row.key)]
    todo = [row for row in wanted if row.key not in there]
    print(f"{len(wanted)} rows, {len(wanted) - len(todo)} of them are there.", flush=True)
    todo = todo[:limit]
    failed = 0
    for number, row in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {'/'.join(row.key)} ...", end=" ", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = run_row(peers, row, Path(folder))
        seconds = time.monotonic() - start
        failures = result.failures()
        failed += bool(failures)
        print(f"{result.measure:.1e}, {seconds:.0f} s {'; '.join(failures)}", flush=True)
        values = (
            *row.key,
            *(_number(v) for v in (result.measure, result.floor)),
            f"{result.ratio:.2f}",
            *(_number(v) for v in (result.gradient_error, result.train_bn_error)),
            *(result.versions, jax.__version__, _commit(), f"{seconds:.0f}"),
        )
        with results.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not exists:
                writer.writerow(_COLUMNS)
                exists = True
            writer.writerow(values)
        jax.clear_caches()
    return failed


def table(results: Path) -> str:
    """The results as Markdown: for each peer the greatest of its rows."""
    with results.open(newline="") as file:
        lines = list(csv.DictReader(file))
    head = "| peer | networks | rows | measure | floor | ratio | gradients | training step |"
    table = [head, "| --- " * 8 + "|"]
    for peer in dict.fromkeys(line["peer"] for line in lines):
        mine = [line for line in lines if line["peer"] == peer]
        networks = len({line["variant"] for line in mine})
        worst = [
            max((line[column] for line in mine if line[column]), key=float, default="")
            for column in ("measure", "floor", "ratio", "gradient_error", "train_bn_error")
        ]
        table.append(f"| {peer} | {networks} | {len(mine)} | {' | '.join(worst)} |")
    return "\n".join(table)


def main() -> int:
    """Runs the sweep; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=".venv-peers/bin/python", help="their interpreter")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="a part of peer/variant/file/image_size")
    parser.add_argument("--limit", type=int, help="stop after so many rows")
    parser.add_argument("--table", action="store_true", help="print README's table and stop")
    args = parser.parse_args()
    if args.table:
        print(table(args.results))
        return 0
    try:
        return int(bool(sweep(args.peers, args.results, args.only, args.limit)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
