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
CACHES = ("empty", "full")
# Shares of the paper's Table 12, progressive against fixed: 1.40 (ResNet-50, 224 px) to 2.82 (B5).
PAPER = "1.4 to 2.8"

_CONFIG = (
    "--config=configs/s.py",
    "--config.model.variant=efficientnetv2-b0",
    "--config.model.dtype=float32",
    "--config.data.name=synthetic:classes=10,train=1600,eval=64,size=192",
    "--config.data.minival_examples=0",
    "--config.batch_size=32",
    "--config.num_epochs=12.0",
    f"--config.eval.image_size={_LARGEST}",
    "--config.eval.batch_size=64",
    "--config.eval.every_epochs=3.0",
    "--config.checkpoint.every_epochs=3.0",
)


def read() -> list[dict[str, str]]:
    """The rows so far."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run_missing() -> None:
    """Appends the rows that are not there, a schedule at a time."""
    known = {row["sizes"] for row in read()}
    for sizes, smallest in SCHEDULES.items():
        if sizes in known:
            continue
        stages = 1 if smallest == _LARGEST else 4
        flags = [
            *_CONFIG,
            f"--config.progressive.num_stages={stages}",
            f"--config.progressive.image_size=({smallest}, {_LARGEST})",
        ]
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for cache in CACHES:
                found = measure(flags, f"{folder}/cache", f"{folder}/{cache}")
                row = {"sizes": sizes, "cache": cache, **found}
                rows.append(
                    {**row, "host": host(), "commit": commit(), "date": str(datetime.date.today())}
                )
                print(rows[-1], flush=True)
        is_new = not RESULTS.exists()
        with RESULTS.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            if is_new:
                writer.writeheader()
            writer.writerows(rows)


# What is compared: the cache of compiled programs, and the seconds.
_COMPARED = (("empty", "total_seconds"), ("full", "seconds_after_first_step"))


def _seconds(sizes: str) -> list[float]:
    """Of a schedule's runs, as `_COMPARED` has them; none if one is missing."""
    found = {(row["sizes"], row["cache"]): row for row in read()}
    if any((sizes, cache) not in found for cache in CACHES):
        return []
    return [float(found[sizes, cache][name]) for cache, name in _COMPARED]


def speed_ups() -> list[float]:
    """The fixed size's seconds over those of each progressive schedule."""
    fixed = _seconds("fixed")
    return [
        a / b
        for sizes in SCHEDULES
        if sizes != "fixed"
        for a, b in zip(fixed, _seconds(sizes), strict=False)
    ]


def table() -> str:
    """Seconds of each run, and how many times faster than the fixed size."""
    lines = [
        "| sizes, px | whole run, empty cache, s | faster | after the first step, full cache, s "
        "| faster | the paper's Table 12 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    fixed = _seconds("fixed")
    for sizes, smallest in SCHEDULES.items():
        taken = _seconds(sizes)
        if not taken or not fixed:
            continue
        faster = [
            f"{a / b:.2f} x" if sizes != "fixed" else "" for a, b in zip(fixed, taken, strict=True)
        ]
        what = str(_LARGEST) if sizes == "fixed" else f"{smallest} to {_LARGEST} ({sizes})"
        lines.append(
            f"| {what} | {taken[0]:.0f} | {faster[0]} | {taken[1]:.0f} | {faster[1]} | "
            f"{PAPER if sizes != 'fixed' else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_missing()
    print(table())
