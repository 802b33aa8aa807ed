"""Table 6: image size and regularisation of every stage, in both recipes."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from effnetv2_jax.recipes import RECIPES, imagenet1k
from effnetv2_jax.tools.tpu_compile import plan_of
from experiments.experiment import EXACT, Experiment, Item, Rows, command, markdown

VARIANTS = ("efficientnetv2-s", "efficientnetv2-m", "efficientnetv2-l", "efficientnetv2-xl")
_SIZE, _RANDAUG, _DROPOUT = "image size, px", "RandAugment magnitude", "dropout rate"
_MIXUP, _CUTMIX, _STEPS = "mixup alpha", "cutmix alpha", "steps"
# What a row says -> the field of `progressive.Stage`.
SETTINGS = {
    _SIZE: "image_size",
    _RANDAUG: "randaug_magnitude",
    _MIXUP: "mixup_alpha",
    _CUTMIX: "cutmix_alpha",
    _DROPOUT: "dropout_rate",
}
NUM_STAGES = 4
# Table 6: minimum and maximum. It has no XL and no cutmix.
PAPER = {
    "efficientnetv2-s": {
        _SIZE: (128, 300),
        _RANDAUG: (5, 15),
        _MIXUP: (0, 0),
        _DROPOUT: (0.1, 0.3),
    },
    "efficientnetv2-m": {
        _SIZE: (128, 380),
        _RANDAUG: (5, 20),
        _MIXUP: (0, 0.2),
        _DROPOUT: (0.1, 0.4),
    },
    "efficientnetv2-l": {
        _SIZE: (128, 380),
        _RANDAUG: (5, 25),
        _MIXUP: (0, 0.4),
        _DROPOUT: (0.1, 0.5),
    },
}
# automl efficientnetv2/main.py and effnetv2_configs.py, run: each stage, to the digits shown.
_RELEASED_STEPS = (26_834,) * NUM_STAGES
_RELEASED_L = {
    _SIZE: (192, 256, 320, 384),
    _RANDAUG: (5, 10, 15, 20),
    _MIXUP: (0, 0.1667, 0.3333, 0.5),
    _CUTMIX: (0, 0.1667, 0.3333, 0.5),
    _DROPOUT: (0.4,) * NUM_STAGES,
    _STEPS: _RELEASED_STEPS,
}
RELEASED = {
    "efficientnetv2-s": {
        _SIZE: (171, 214, 257, 300),
        _RANDAUG: (5, 6.667, 8.333, 10),
        _MIXUP: (0,) * NUM_STAGES,
        _CUTMIX: (0,) * NUM_STAGES,
        _DROPOUT: (0.2,) * NUM_STAGES,
        _STEPS: _RELEASED_STEPS,
    },
    "efficientnetv2-m": {
        _SIZE: (192, 256, 320, 384),
        _RANDAUG: (5, 8.333, 11.667, 15),
        _MIXUP: (0, 0.0667, 0.1333, 0.2),
        _CUTMIX: (0, 0.0667, 0.1333, 0.2),
        _DROPOUT: (0.3,) * NUM_STAGES,
        _STEPS: _RELEASED_STEPS,
    },
    "efficientnetv2-l": _RELEASED_L,
    "efficientnetv2-xl": _RELEASED_L,
}


def _short(variant: str) -> str:
    return variant.removeprefix("efficientnetv2-").upper()


def _item(variant: str, recipe: str) -> str:
    return f"{variant}, recipe={recipe}"


def _stages(variant: str, recipe: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for number, stage in enumerate(plan_of(imagenet1k(variant, recipe)).stages, 1):
        found[f"stage {number}, {_STEPS}"] = stage.num_steps
        for setting, field in SETTINGS.items():
            found[f"stage {number}, {setting}"] = getattr(stage, field)
    return found


def items() -> Sequence[Item]:
    """Each variant with each recipe."""
    return [
        Item(EXACT, _item(v, r), functools.partial(_stages, v, r))
        for v in VARIANTS
        for r in RECIPES
    ]


def _values(rows: Rows, variant: str, recipe: str, setting: str) -> tuple[float, ...]:
    item = _item(variant, recipe)
    return tuple(rows.number(item, f"stage {n}, {setting}") for n in range(1, NUM_STAGES + 1))


def _listed(values: Sequence[float]) -> str:
    """All of them, or one if they are the same."""
    texts = [f"{value:.4g}" if value < 1000 else f"{value:.0f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _are_close(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether they agree in the digits that the sources give."""
    pairs = zip(first, second, strict=True)
    return all(math.isclose(a, b, abs_tol=5e-4) for a, b in pairs)


def _is_as_published(rows: Rows, variant: str, setting: str) -> bool:
    """Whether the first and the last stage of the paper's recipe are Table 6's."""
    values = _values(rows, variant, "paper", setting)
    return _are_close((values[0], values[-1]), PAPER[variant][setting])


def _is_as_released(rows: Rows, variant: str, setting: str) -> bool:
    """Whether all stages of the released recipe are the released code's."""
    values = _values(rows, variant, "released", setting)
    return _are_close(values, RELEASED[variant][setting])


def _differs(rows: Rows, variant: str, setting: str) -> bool:
    paper, released = (_values(rows, variant, recipe, setting) for recipe in RECIPES)
    return not _are_close(paper, released)


def tables(rows: Rows) -> Mapping[str, str]:
    """Table 6 beside the paper's recipe, all stages, and where the recipes differ."""
    ends = []
    for variant, settings in PAPER.items():
        for setting, (low, high) in settings.items():
            values = _values(rows, variant, "paper", setting)
            is_equal = _is_as_published(rows, variant, setting)
            cells = (values[0], low, values[-1], high)
            texts = [f"{cell:.4g}" for cell in cells]
            ends.append((_short(variant), setting, *texts, "yes" if is_equal else "no"))
    stages = []
    for variant in VARIANTS:
        for recipe in RECIPES:
            cells = [_listed(_values(rows, variant, recipe, s)) for s in (*SETTINGS, _STEPS)]
            if recipe == "paper":
                known = [_is_as_published(rows, variant, s) for s in PAPER.get(variant, {})]
            else:
                known = [_is_as_released(rows, variant, s) for s in RELEASED[variant]]
            is_equal = ("yes" if all(known) else "no") if known else "no source"
            stages.append((_short(variant), recipe, *cells, is_equal))
    differences = []
    for setting in (*SETTINGS, _STEPS):
        cells = [
            "; ".join(f"{r}: {_listed(_values(rows, v, r, setting))}" for r in RECIPES)
            if _differs(rows, v, setting)
            else "the same"
            for v in VARIANTS
        ]
        differences.append((setting, *cells))
    first, last = "stage 1", f"stage {NUM_STAGES}"
    header = ("variant", "setting", first, "Table 6, minimum", last, "Table 6, maximum", "equal")
    return {
        "conclusion": f"{answer(rows)}.",
        "ends": markdown(header, ends),
        "stages": markdown(
            ("variant", "recipe", *SETTINGS, f"{_STEPS} of a stage", "equal to its source"), stages
        ),
        "differences": markdown(("setting", *map(_short, VARIANTS)), differences),
    }


def answer(rows: Rows) -> str:
    """How many settings agree and how many differ."""
    published = [_is_as_published(rows, v, s) for v, settings in PAPER.items() for s in settings]
    released = [_is_as_released(rows, v, s) for v, settings in RELEASED.items() for s in settings]
    differ = [_differs(rows, v, s) for v in VARIANTS for s in SETTINGS]
    return (
        f"{sum(published)} of {len(published)} ranges of recipe=paper are Table 6's, "
        f"{sum(released)} of {len(released)} schedules of recipe=released are the released code's; "
        f"the two differ in {sum(differ)} of {len(differ)}"
    )


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="Are the settings of progressive learning those of Table 6?",
    items=items,
    tables=tables,
    answer=answer,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
