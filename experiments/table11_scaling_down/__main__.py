"""Table 11: EfficientNetV2 scaled down against EfficientNet, without progressive learning."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import counts, cpu, estimates, rank
from experiments.experiment import (
    CPU,
    EXACT,
    TPU_ESTIMATE,
    Experiment,
    Item,
    Rows,
    command,
    markdown,
    shown,
)

_PER_CORE = 128  # As many as a V100 had in Table 11.
_CPU_BATCH = 8
# Variant -> its name in Table 11, configuration, inference size in pixels, and the paper's top-1
# in %, parameters in M, FLOPs in G (both as they are printed) and images/s on a V100.
PAPER = {
    "efficientnet-b1": ("V1-B1", "configs/v1.py:b1", 240, 79.0, "7.8", "0.7", 2675),
    "efficientnetv2-b0": ("V2-B0", "configs/b0.py", 224, 78.7, "7.4", "0.7", 5739),
    "efficientnet-b2": ("V1-B2", "configs/v1.py:b2", 260, 79.8, "9.1", "1.0", 2003),
    "efficientnetv2-b1": ("V2-B1", "configs/b1.py", 240, 79.8, "8.1", "1.2", 3983),
    "efficientnet-b4": ("V1-B4", "configs/v1.py:b4", 380, 82.9, "19", "4.2", 628),
    "efficientnetv2-b3": ("V2-B3", "configs/b3.py", 300, 82.1, "14", "3.0", 1693),
    "efficientnet-b5": ("V1-B5", "configs/v1.py:b5", 456, 83.7, "30", "9.9", 291),
    "efficientnetv2-s": ("V2-S", "configs/s.py", 384, 83.6, "24", "8.8", 901),
}
_VARIANTS = tuple(PAPER)
# V2 and the V1 network that the paper sets beside it.
PAIRS = tuple(zip(_VARIANTS[1::2], _VARIANTS[::2], strict=True))
# Inference on an RTX 3090, images/s, from timm's results files (AMP, PyTorch 1.13): not the
# paper's, nor measured here.
TIMM = {
    "efficientnet-b1": 3834,
    "efficientnetv2-b0": 7614,
    "efficientnet-b2": 2920,
    "efficientnetv2-b1": 5122,
    "efficientnet-b4": 838,
    "efficientnetv2-b3": 2224,
    "efficientnet-b5": 404,
    "efficientnetv2-s": 1029,
}


def items() -> Sequence[Item]:
    """Each network at each scale."""
    found = []
    for variant, (_, _, size, *_) in PAPER.items():
        found.append(Item(EXACT, variant, functools.partial(counts.quantities, variant, size)))
    for variant, (_, config, size, *_) in PAPER.items():
        run = estimates.eval_step(config, size, _PER_CORE)
        measure = functools.partial(estimates.step_quantities, run)
        found.append(
            Item(TPU_ESTIMATE, variant, measure, estimates.POD, packages=estimates.PACKAGES)
        )
    for variant, (_, _, size, *_) in PAPER.items():
        measure = functools.partial(cpu.inference_quantities, variant, size, _CPU_BATCH)
        found.append(Item(CPU, variant, measure))
    return found


def _as_printed(value: float, paper: str) -> str:
    """With as many decimals as the paper has."""
    return shown(value, f".{len(paper.partition('.')[2])}f")


def _ratios(rows: Rows, quantity: str, scale: str) -> list[float]:
    """V2 / V1 of each pair."""
    return [rows.number(v2, quantity, scale) / rows.number(v1, quantity, scale) for v2, v1 in PAIRS]


def _paper_ratios() -> list[float]:
    return [PAPER[v2][6] / PAPER[v1][6] for v2, v1 in PAIRS]


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 11 beside the paper's, and the speed of each pair."""
    exact = []
    for variant, (name, _, size, top1, parameters, flops, _) in PAPER.items():
        exact.append(
            (
                name,
                size,
                shown(rows.number(variant, "parameters, M"), ".2f"),
                parameters,
                shown(rows.number(variant, "FLOPs, G"), ".2f"),
                flops,
                f"{top1:.1f}",
            )
        )
    speed = []
    for variant, (name, *_, images) in PAPER.items():
        tpu = shown(rows.number(variant, "images/s/core", TPU_ESTIMATE), ".0f")
        speed.append(
            (
                name,
                tpu or rows.find(variant, "images/s/core", TPU_ESTIMATE),
                shown(rows.number(variant, "images/s", CPU)),
                TIMM[variant],
                images,
            )
        )
    columns = (
        [1 / ratio for ratio in _ratios(rows, "FLOPs, G", EXACT)],
        _ratios(rows, "images/s/core", TPU_ESTIMATE),
        _ratios(rows, "images/s", CPU),
        [TIMM[v2] / TIMM[v1] for v2, v1 in PAIRS],
        _paper_ratios(),
    )
    ratios = [
        (f"{PAPER[v2][0]} / {PAPER[v1][0]}", *(shown(ratio, ".2f") for ratio in line))
        for (v2, v1), *line in zip(PAIRS, *columns, strict=True)
    ]
    devices = ("TPUv3 estimate", "CPU", "timm's RTX 3090", "the paper's V100")
    return {
        "exact": markdown(
            (
                *("network", "px", "parameters, M", "the paper's", "FLOPs, G", "the paper's"),
                "top-1 in the paper, %",
            ),
            exact,
        ),
        "speed": markdown(
            (
                *("network", "TPUv3 estimate, images/s/core", "CPU, images/s"),
                *("timm's RTX 3090, images/s", "the paper's V100, images/s"),
            ),
            speed,
        ),
        "ratios": markdown(("pair", "V1's FLOPs / V2's", *devices), ratios),
    }


def answer(rows: Rows) -> str:
    """How much faster V2 is than V1 on each device."""
    agree = [
        sum(
            _as_printed(rows.number(variant, quantity), paper[column]) == paper[column]
            for variant, paper in PAPER.items()
        )
        for quantity, column in (("parameters, M", 4), ("FLOPs, G", 5))
    ]
    parts = [
        f"parameters round to the paper's in {agree[0]} of {len(PAPER)} rows, "
        f"FLOPs in {agree[1]} of {len(PAPER)}"
    ]
    speed = []
    for what, quantity, scale, unknown in (
        ("by the TPU compiler's estimate", "images/s/core", TPU_ESTIMATE, "not compiled yet"),
        ("on this CPU", "images/s", CPU, "not measured yet"),
    ):
        ratios = _ratios(rows, quantity, scale)
        correlation = rank.correlation(ratios, _paper_ratios())
        texts = [shown(ratio, ".1f", unknown) for ratio in ratios]
        text = unknown if set(texts) == {unknown} else ", ".join(texts)
        known = "" if math.isnan(correlation) else f" (rank correlation {correlation:.2f})"
        speed.append(f"{what} {text}{known}")
    paper = ", ".join(f"{ratio:.1f}" for ratio in _paper_ratios())
    parts.append(f"V2's speed / V1's {', '.join(speed)}, on the paper's V100 {paper}")
    return "; ".join(parts)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Are small EfficientNetV2 networks faster than EfficientNets of their accuracy?",
    items=items,
    tables=tables,
    answer=answer,
    paper_runs=tuple(
        (
            name,
            f"python -m effnetv2_jax.main --config={config} --workdir=DIR"
            # Table 11 trains without progressive learning; B0 to B3 and V1 do so anyway.
            + (" --config.progressive.num_stages=1" if name == "V2-S" else ""),
        )
        for name, config, *_ in PAPER.values()
    ),
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
