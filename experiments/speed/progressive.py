"""How much sooner a run with progressive image sizes ends than one at the largest size.

    python -m experiments.speed.progressive            # what is missing of progressive.csv

EfficientNetV2-B0 on synthetic images by `main` itself: the same epochs, augmentation, evaluation
and checkpoints, at one size or in four stages with Table 6's ratios of sizes, scaled down. Each
schedule runs twice, with an empty and with a full cache of compiled programs.
"""

from __future__ import annotations

import csv
import datetime
import tempfile
from pathlib import Path

from experiments.digits.compilation import measure
from experiments.provenance import commit, host

FOLDER = Path(__file__).resolve().parent

RESULTS = FOLDER / "progressive.csv"

_LARGEST = 160
# Name -> smallest size. The paper's Table 6 goes from 128 px to 300 (S) and 380 (M and L).
SCHEDULES = {
    "fixed": _LARGEST,
    "128 to 300": round(_LARGEST * 128 / 300),
    "128 to 380": round(_LARGEST * 128 / 380),
}
# (batch, epochs). The paper's batch is 128 a core; at 32 a step's share that no size makes
# smaller, the update of the weights, is four times as large.
SETTINGS = ((128, 18), (32, 12))
CACHES = ("empty", "full")
# Shares of the paper's Table 12, progressive against fixed: 1.40 (ResNet-50, 224 px) to 2.82 (B5).
PAPER = "1.4 to 2.8"


def _flags(batch_size: int, epochs: int, smallest: int) -> list[str]:
    """Of `main`."""
    return [
        "--config=configs/s.py",
        "--config.model.variant=efficientnetv2-b0",
        "--config.model.dtype=float32",
        "--config.data.name=synthetic:classes=10,train=1600,eval=64,size=192",
        "--config.data.minival_examples=0",
        f"--config.batch_size={batch_size}",
        f"--config.num_epochs={float(epochs)}",
        f"--config.progressive.num_stages={1 if smallest == _LARGEST else 4}",
        f"--config.progressive.image_size=({smallest}, {_LARGEST})",
        f"--config.eval.image_size={_LARGEST}",
        "--config.eval.batch_size=64",
        "--config.eval.every_epochs=3.0",
        "--config.checkpoint.every_epochs=3.0",
    ]


def read() -> list[dict[str, str]]:
    """The rows so far."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run_missing() -> None:
    """Appends the rows that are not there, a schedule at a time."""
    known = {(row["batch_size"], row["epochs"], row["sizes"]) for row in read()}
    for batch_size, epochs in SETTINGS:
        for sizes, smallest in SCHEDULES.items():
            if (str(batch_size), str(epochs), sizes) in known:
                continue
            rows = []
            with tempfile.TemporaryDirectory() as folder:
                for cache in CACHES:
                    flags = _flags(batch_size, epochs, smallest)
                    row = {
                        "batch_size": str(batch_size),
                        "epochs": str(epochs),
                        "sizes": sizes,
                        "cache": cache,
                        **measure(flags, f"{folder}/cache", f"{folder}/{cache}"),
                        "host": host(),
                        "commit": commit(),
                        "date": str(datetime.date.today()),
                    }
                    print(row, flush=True)
                    rows.append(row)
            is_new = not RESULTS.exists()
            with RESULTS.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerows(rows)


# What is compared: the cache of compiled programs, and the seconds.
_COMPARED = (("empty", "total_seconds"), ("full", "seconds_after_first_step"))


def _seconds(batch_size: int, sizes: str) -> list[float]:
    """Of a schedule's runs, as `_COMPARED` has them; none if one is missing."""
    found = {(row["batch_size"], row["sizes"], row["cache"]): row for row in read()}
    keys = [(str(batch_size), sizes, cache) for cache, _ in _COMPARED]
    if any(key not in found for key in keys):
        return []
    return [float(found[key][name]) for key, (_, name) in zip(keys, _COMPARED, strict=True)]


def speed_ups() -> list[float]:
    """The fixed size's seconds over those of each progressive schedule, with the paper's batch."""
    batch_size, _ = SETTINGS[0]
    fixed = _seconds(batch_size, "fixed")
    return [
        a / b
        for sizes in SCHEDULES
        if sizes != "fixed"
        for a, b in zip(fixed, _seconds(batch_size, sizes), strict=False)
    ]


def table() -> str:
    """Seconds of each run, and how many times faster than the fixed size."""
    lines = [
        "| batch | epochs | sizes, px | whole run, empty cache, s | faster "
        "| after the first step, full cache, s | faster | the paper's Table 12 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch_size, epochs in SETTINGS:
        fixed = _seconds(batch_size, "fixed")
        for sizes, smallest in SCHEDULES.items():
            taken = _seconds(batch_size, sizes)
            if not taken or not fixed:
                continue
            faster = [
                f"{a / b:.2f} x" if sizes != "fixed" else ""
                for a, b in zip(fixed, taken, strict=True)
            ]
            what = str(_LARGEST) if sizes == "fixed" else f"{smallest} to {_LARGEST} ({sizes})"
            lines.append(
                f"| {batch_size} | {epochs} | {what} | {taken[0]:.0f} | {faster[0]} "
                f"| {taken[1]:.0f} | {faster[1]} | {PAPER if sizes != 'fixed' else ''} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_missing()
    print(table())
