"""Draws a run: `python -m effnetv2_jax.tools.plot WORKDIR` writes `WORKDIR/progress.png`."""

from __future__ import annotations

import json
import sys
from typing import Any

from etils import epath

from effnetv2_jax.errors import InputError
from effnetv2_jax.paths import absolute
from effnetv2_jax.workdir import PLAN

_STRENGTHS = {
    "dropout_rate": "dropout rate",
    "mixup_alpha": "mixup alpha",
    "cutmix_alpha": "cutmix alpha",
}


def plot_progress(workdir: epath.Path) -> epath.Path:
    """Plots accuracy, loss, image size and regularisation over epochs.

    Args:
      workdir: of a run, with `plan.json` and `metrics.jsonl`.

    Returns:
      The path of the picture.

    Raises:
      InputError: the folder holds no run or no metrics yet.
    """
    from effnetv2_jax.reporting import read_metrics

    if not (workdir / PLAN).exists():
        raise InputError(f"{workdir} holds no run: {PLAN} is missing.")
    plan = json.loads((workdir / PLAN).read_text(encoding="utf-8"))
    rows = read_metrics(workdir)
    if not rows:
        raise InputError(f"{workdir} holds no metrics yet.")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def series(name: str) -> tuple[list[float], list[float]]:
        having = [row for row in rows if row.get(name) is not None]
        epochs = [row["step"] / plan["steps_per_epoch"] for row in having]
        return epochs, [row[name] for row in having]

    figure, axes = plt.subplots(4, 1, figsize=(8, 10), sharex=True, layout="constrained")
    accuracy, loss, size, strength = axes
    curves = {
        "train/top1": "train",
        "eval/top1": "held out",
        "eval_ema/top1": "held out, average of weights",
        "eval_stage_ema/top1": "the same at the stage's size",
    }
    for name, label in curves.items():
        epochs, values = series(name)
        if values:
            accuracy.plot(epochs, [100 * v for v in values], marker=".", label=label)
    accuracy.set_ylabel("top-1 accuracy, %")
    for name in ("train/loss", "eval/loss", "eval_ema/loss"):
        epochs, values = series(name)
        if values:
            loss.plot(epochs, values, marker=".", label=name)
    loss.set_ylabel("loss")
    _draw_stages(plan, size, strength)
    axes[-1].set_xlabel("epoch")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    path = workdir / "progress.png"
    temporary = workdir / ".progress.png"
    with temporary.open("wb") as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path


def _draw_stages(plan: dict[str, Any], size: Any, strength: Any) -> None:
    """Draws what `plan` says of each stage as steps."""
    edges = [s["first_step"] / plan["steps_per_epoch"] for s in plan["stages"]]
    edges.append(plan["total_steps"] / plan["steps_per_epoch"])
    size.stairs([s["image_size"] for s in plan["stages"]], edges, baseline=None)
    size.set_ylabel("image size, px")
    magnitudes = [s["randaug_magnitude"] for s in plan["stages"]]
    strength.stairs([m / 10 for m in magnitudes], edges, baseline=None, label="RandAugment / 10")
    for name, label in _STRENGTHS.items():
        values = [s[name] for s in plan["stages"]]
        if max(values) > 0:
            strength.stairs(values, edges, baseline=None, label=label)
    strength.set_ylabel("strength")


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) != 1:
        print("usage: python -m effnetv2_jax.tools.plot WORKDIR", file=sys.stderr)
        return 2
    try:
        print(plot_progress(absolute(arguments[0])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
