"""Figure 4: one photograph as the four stages of training see it."""

from __future__ import annotations

import functools
import io
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effnetv2_jax.config import Plan
from effnetv2_jax.errors import InputError
from effnetv2_jax.progressive import Stage
from effnetv2_jax.recipes import imagenet1k
from effnetv2_jax.tools.tpu_compile import plan_of
from experiments.experiment import EXACT, Experiment, Item, Rows, command, markdown, shown

if TYPE_CHECKING:
    import numpy as np

VARIANT, RECIPE = "efficientnetv2-m", "paper"
# Those that scikit-learn brings along: the one that is shown, and its partner under mixup.
PHOTOGRAPHS = ("flower.jpg", "china.jpg")
SEED = 0
NUM_DRAWS = 64  # Of each photograph, in the rows.
_SHOWN_DRAWS = 4  # In the picture.
# The figure's three pictures, which have no numbers but their epochs.
PAPER = {
    "epoch 1": "small image, weak regularisation",
    "epoch 100": "medium",
    "epoch 300": "large image, strong regularisation with mixup",
}
_DIFFERENCE = "difference by RandAugment, grey levels"
_MIXED_DIFFERENCE = "difference by RandAugment and mixup, grey levels"
_PARTNER = "partner's share, %"
_PACKAGES = ("jax", "tensorflow-cpu", "scikit-learn")


class Draws(NamedTuple):
    """Both photographs as one stage sees them.

    Attributes:
      cropped: crops and flips alone, uint8 [N, size, size, 3].
      augmented: the same with RandAugment.
      mixed: these with mixup, float32.
      photograph: which one each is, int [N].
      partner_share: of the other one in `mixed`, float32 [N].
    """

    cropped: np.ndarray
    augmented: np.ndarray
    mixed: np.ndarray
    photograph: np.ndarray
    partner_share: np.ndarray


def _plan() -> Plan:
    return plan_of(imagenet1k(VARIANT, RECIPE))


def _draws(stage: Stage, count: int) -> Draws:
    """The first draws of a stage: the same crops and operations in every stage, by their keys."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from effnetv2_jax.data.host_tf import tf
    from effnetv2_jax.data.pipeline import train_batches
    from effnetv2_jax.data.sources import IndexedSource
    from effnetv2_jax.mixing import mix

    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise InputError(
            "the photographs need scikit-learn: run `pip install effnetv2_jax[digits]`."
        ) from error

    config = imagenet1k(VARIANT, RECIPE)
    photographs = tf.constant(np.stack([load_sample_image(name) for name in PHOTOGRAPHS]))
    source = IndexedSource(
        len(PHOTOGRAPHS),
        lambda index: (photographs[index], tf.cast(index, tf.int32)),
        lambda index: PHOTOGRAPHS[index],
    )

    def batch(magnitude: float | None) -> dict[str, np.ndarray]:
        return next(
            train_batches(
                source,
                seed=SEED,
                batch_size=count * len(PHOTOGRAPHS),
                first_step=0,
                last_step=1,
                image_size=stage.image_size,
                randaug_magnitude=magnitude,
                num_classes=len(PHOTOGRAPHS),
                **config.augment,
            )
        )

    cropped, augmented = batch(None), batch(stage.randaug_magnitude)
    photograph = augmented["label"]
    # An epoch has each photograph once, so that the partners of mixup are never the same one.
    mixed, labels = mix(
        jnp.asarray(augmented["image"], jnp.float32),
        jax.nn.one_hot(photograph, len(PHOTOGRAPHS)),
        jax.random.key(SEED),
        jnp.arange(len(photograph)),
        mixup_alpha=jnp.float32(stage.mixup_alpha),
        cutmix_alpha=jnp.float32(stage.cutmix_alpha),
        form=config.mixing,
    )
    own_share = np.take_along_axis(np.asarray(labels), photograph[:, None], axis=1)[:, 0]
    return Draws(
        cropped["image"], augmented["image"], np.asarray(mixed), photograph, 1.0 - own_share
    )


def _measure(index: int) -> dict[str, float | int]:
    import numpy as np

    plan = _plan()
    stage = plan.stages[index]
    draws = _draws(stage, NUM_DRAWS)
    cropped = draws.cropped.astype(np.float64)
    return {
        "image size, px": stage.image_size,
        "RandAugment magnitude": stage.randaug_magnitude,
        "mixup alpha": stage.mixup_alpha,
        "dropout rate": stage.dropout_rate,
        "first epoch": stage.first_step / plan.steps_per_epoch,
        "last epoch": stage.last_step / plan.steps_per_epoch,
        "images": len(draws.photograph),
        _DIFFERENCE: float(np.mean(np.abs(draws.augmented - cropped))),
        _MIXED_DIFFERENCE: float(np.mean(np.abs(draws.mixed - cropped))),
        _PARTNER: 100 * float(np.mean(draws.partner_share)),
    }


def _names() -> list[str]:
    return [f"stage {stage.index + 1}" for stage in _plan().stages]


def items() -> Sequence[Item]:
    """Each stage."""
    return [
        Item(EXACT, name, functools.partial(_measure, index), seed=SEED, packages=_PACKAGES)
        for index, name in enumerate(_names())
    ]


def tables(rows: Rows) -> Mapping[str, str]:
    """Settings, and what they do to the pixels."""
    settings = {
        "image size, px": ".0f",
        "RandAugment magnitude": ".3g",
        "mixup alpha": ".3g",
        "dropout rate": ".3g",
    }
    differences = {
        "images": ".0f",
        _DIFFERENCE: ".1f",
        _MIXED_DIFFERENCE: ".1f",
        _PARTNER: ".1f",
    }
    lines = []
    for name in _names():
        epochs = [shown(rows.number(name, f"{end} epoch"), ".1f") for end in ("first", "last")]
        cells = [shown(rows.number(name, q), spec) for q, spec in (settings | differences).items()]
        lines.append((name.removeprefix("stage "), " to ".join(epochs), *cells))
    return {
        "conclusion": f"{answer(rows)}.",
        "stages": markdown(("stage", "epochs", *settings, *differences), lines),
        "figure": markdown(("the paper's", "its picture"), PAPER.items()),
    }


def answer(rows: Rows) -> str:
    """Whether size and strength rise together."""

    def values(quantity: str) -> list[float]:
        return [rows.number(name, quantity) for name in _names()]

    sizes, differences = values("image size, px"), values(_MIXED_DIFFERENCE)
    does = [
        "rises" if all(a < b for a, b in itertools.pairwise(found)) else "does not always rise"
        for found in (sizes, differences)
    ]
    return (
        f"image size {does[0]} from stage to stage ({shown(sizes[0], '.0f')} to "
        f"{shown(sizes[-1], '.0f')} px), and what augmentation changes {does[1]} with it: "
        f"{', '.join(shown(d, '.1f') for d in differences)} grey levels"
    )


def plot(rows: Rows, folder: Path) -> None:
    """A column for each stage and a line for each draw, in true relative sizes."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    stages = _plan().stages
    sizes = [stage.image_size for stage in stages]
    figure, all_axes = plt.subplots(
        *(_SHOWN_DRAWS, len(stages)),
        figsize=(6.9, 10.0),
        width_ratios=sizes,
        gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.005, "top": 0.925},
    )
    figure.subplots_adjust(wspace=0.03, hspace=0.02)
    for column, (stage, name) in enumerate(zip(stages, _names(), strict=True)):
        draws = _draws(stage, NUM_DRAWS)
        of_first = np.flatnonzero(draws.photograph == 0)[:_SHOWN_DRAWS]
        for axes, index in zip(all_axes[:, column], of_first, strict=True):
            half = stage.image_size / 2
            pixels = draws.mixed[index].round().astype(np.uint8)
            axes.imshow(pixels, extent=(-half, half, -half, half))
            axes.set(xlim=(-half, half), ylim=(-max(sizes) / 2, max(sizes) / 2), aspect="equal")
            axes.axis("off")
            share = round(100 * float(draws.partner_share[index]))
            if share:
                axes.text(
                    *(half - 6, 6 - half, f"{share} % {PHOTOGRAPHS[1].partition('.')[0]}"),
                    ha="right",
                    va="bottom",
                    fontsize=7,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
                )
        lines = (
            name,
            f"{shown(rows.number(name, 'image size, px'), '.0f')} px",
            f"RandAug {shown(rows.number(name, 'RandAugment magnitude'))}",
            f"mixup {shown(rows.number(name, 'mixup alpha'), '.2g')}",
            f"dropout {shown(rows.number(name, 'dropout rate'))}",
        )
        box = all_axes[0, column].get_position()
        figure.text((box.x0 + box.x1) / 2, 0.995, "\n".join(lines), ha="center", va="top", size=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    plt.close(figure)
    # Photographs in full colour would take a megabyte.
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(folder / "stages.png", optimize=True)


EXPERIMENT = Experiment(
    folder=Path(__file__).resolve().parent,
    question="What does progressive learning do to an image?",
    items=items,
    tables=tables,
    answer=answer,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(command(EXPERIMENT))
