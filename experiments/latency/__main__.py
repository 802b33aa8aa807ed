"""Inference time of Table 7 and Figure 5: every network of the paper that timm has, on a CPU."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import cpu, rank
from experiments.experiment import CPU, Experiment, Item, Rows, command, markdown, shown

# Name in the paper -> timm's name, inference size in pixels, and milliseconds of 16 images on a
# V100 in 16-bit floats (Table 7). Sizes: Tan & Le 2019 for V1; for the others the one at which
# timm counts the FLOPs of Table 7's column.
PAPER = {
    "EfficientNetV2-S": ("efficientnetv2_s", 384, 24),
    "EfficientNetV2-M": ("efficientnetv2_m", 480, 57),
    "EfficientNetV2-L": ("efficientnetv2_l", 480, 98),
    "EfficientNet-B3": ("efficientnet_b3", 300, 19),
    "EfficientNet-B4": ("efficientnet_b4", 380, 30),
    "EfficientNet-B5": ("efficientnet_b5", 456, 60),
    "EfficientNet-B6": ("efficientnet_b6", 528, 97),
    "EfficientNet-B7": ("efficientnet_b7", 600, 170),
    "RegNetY-8GF": ("regnety_080", 224, 21),
    "RegNetY-16GF": ("regnety_160", 224, 32),
    "ResNeSt-101": ("resnest101e", 256, 31),
    "ResNeSt-200": ("resnest200e", 320, 76),
    "ResNeSt-269": ("resnest269e", 416, 160),
    "TResNet-L": ("tresnet_l", 448, 45),
    "TResNet-XL": ("tresnet_xl", 448, 66),
    "NFNet-F0": ("dm_nfnet_f0", 256, 30),
    "NFNet-F1": ("dm_nfnet_f1", 320, 70),
    "NFNet-F2": ("dm_nfnet_f2", 352, 124),
    "DeiT-B": ("deit_base_patch16_224", 224, 19),
    "DeiT-B-384": ("deit_base_patch16_384", 384, 68),
    "ViT-B/32": ("vit_base_patch32_384", 384, 13),
    "ViT-B/16": ("vit_base_patch16_384", 384, 68),
    "ViT-L/16": ("vit_large_patch16_384", 384, 195),
    "BiT-M-R152x2": ("resnetv2_152x2_bit", 384, 500),
}
# In the paper -> this project's name.
OURS = {
    "EfficientNetV2-S": "efficientnetv2-s",
    "EfficientNetV2-M": "efficientnetv2-m",
    "EfficientNetV2-L": "efficientnetv2-l",
    **{f"EfficientNet-B{number}": f"efficientnet-b{number}" for number in range(3, 8)},
}
_REFERENCE = PAPER["EfficientNetV2-S"]


def items() -> Sequence[Item]:
    """This project's networks, then timm's."""

    def item(program: str, model: str, size: int, *packages: str) -> Item:
        measure = functools.partial(
            cpu.latency_quantities, program, model, size, (_REFERENCE[0], _REFERENCE[1])
        )
        return Item(CPU, model, measure, packages=packages)

    found = [item("ours", model, PAPER[name][1], "jax") for name, model in OURS.items()]
    timm = ("timm", "torch")
    return [*found, *(item("timm", model, size, *timm) for model, size, _ in PAPER.values())]


def tables(rows: Rows) -> Mapping[str, str]:
    """Milliseconds and ratios beside the paper's."""
    lines = []
    for name, (model, size, paper) in PAPER.items():
        own = OURS.get(name, "")
        lines.append(
            (
                name,
                size,
                shown(rows.number(own, "ms"), ".0f"),
                shown(rows.number(model, "ms"), ".0f"),
                shown(rows.number(own, "time / V2-S"), ".2f"),
                shown(rows.number(model, "time / V2-S"), ".2f"),
                f"{paper / _REFERENCE[2]:.2f}",
            )
        )
    header = (
        *("network", "px", "this project, ms", "timm, ms"),
        *("this project / timm's V2-S", "timm / timm's V2-S", "the paper / its V2-S"),
    )
    return {"latency": markdown(header, lines), "answer": f"{answer(rows)}."}


def answer(rows: Rows) -> str:
    """How the ranking compares with the V100's."""
    measured = [rows.number(model, "time / V2-S") for model, _, _ in PAPER.values()]
    correlation = rank.correlation(measured, [paper for _, _, paper in PAPER.values()])
    known = sum(not math.isnan(ratio) for ratio in measured)
    return (
        f"{known} of {len(PAPER)} networks timed on a CPU; rank correlation with the paper's V100: "
        f"{shown(correlation, '.2f', 'none yet')}"
    )


def plot(rows: Rows, folder: Path) -> None:
    """Writes `latency.png`: our CPU against the paper's V100."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5.5), layout="constrained")
    ends = [1.0, 1.0]
    for name, (model, _, paper) in PAPER.items():
        ratio = rows.number(model, "time / V2-S")
        if math.isnan(ratio):
            continue
        x = paper / _REFERENCE[2]
        ends = [min(ends[0], x, ratio), max(ends[1], x, ratio)]
        is_ours = name in OURS
        axes.plot(x, ratio, "o", color="tab:blue" if is_ours else "tab:gray", label=None)
        axes.annotate(name, (x, ratio), textcoords="offset points", xytext=(5, -3), fontsize=7)
        own = rows.number(OURS.get(name, ""), "time / V2-S")
        if not math.isnan(own):
            axes.plot(x, own, "s", color="tab:red", fillstyle="none")
    if ends[0] == ends[1]:
        pyplot.close(figure)
        return
    axes.plot(ends, ends, "--", color="black", linewidth=0.8)
    axes.plot([], [], "o", color="tab:blue", label="EfficientNets of timm")
    axes.plot([], [], "o", color="tab:gray", label="others of timm")
    axes.plot([], [], "s", color="tab:red", fillstyle="none", label="this project")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("the paper's V100, time / time of V2-S")
    axes.set_ylabel("this CPU, time / time of timm's V2-S")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(folder / "latency.png", dpi=90)
    pyplot.close(figure)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Is the order of Table 7's inference times that of another machine?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
