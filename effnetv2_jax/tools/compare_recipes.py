"""Writes docs/paper_vs_released.md: `python -m effnetv2_jax.tools.compare_recipes`.

The values come from the configurations; only the reasons are written here. A difference without
a reason, or a reason without a difference, is an error, so the page cannot fall behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from effnetv2_jax.config import to_plain
from effnetv2_jax.recipes import (
    RECIPES,
    baseline_imagenet1k,
    finetune1k,
    imagenet1k,
    imagenet21k,
    transfer,
)

PAGE = Path("docs/paper_vs_released.md")

# Title -> recipe -> configuration.
RUNS: dict[str, Callable[[str], ConfigDict]] = {
    "ImageNet-1k, S": lambda recipe: imagenet1k("efficientnetv2-s", recipe),
    "ImageNet-1k, M": lambda recipe: imagenet1k("efficientnetv2-m", recipe),
    "ImageNet-1k, L": lambda recipe: imagenet1k("efficientnetv2-l", recipe),
    "ImageNet-1k, B0": lambda recipe: imagenet1k("efficientnetv2-b0", recipe),
    "ImageNet-1k, B3": lambda recipe: imagenet1k("efficientnetv2-b3", recipe),
    "ImageNet-1k, V1 B4": lambda recipe: baseline_imagenet1k("efficientnet-b4", recipe, False),
    "ImageNet-21k, L": lambda recipe: imagenet21k("efficientnetv2-l", recipe),
    "ImageNet-21k to 1k, L": lambda recipe: finetune1k("efficientnetv2-l", recipe),
    "Transfer to CIFAR-10, L": lambda recipe: transfer("efficientnetv2-l", "cifar10", recipe),
}

# Key -> where each side is read. Files are those of automl efficientnetv2.
REASONS = {
    "augment.crop": "preprocess_legacy.py for B0 to B3 and V1; the paper describes one path",
    "augment.crop_area": "8 % at least in preprocess_legacy.py, 5 % in preprocessing.py",
    "augment.crop_aspect_ratio": "preprocess_legacy.py has 3/4 to 4/3, TensorFlow's default is "
    "0.75 to 1.33",
    "augment.policy": "section 4 has RandAugment; autoaugment.py has its own operations, see "
    "data/randaugment.py, B0 to B3 and V1 have AutoAugment v0, and ImageNet-21k has none",
    "augment.resize": "preprocess_legacy.py: TF1's bicubic",
    "data.minival_examples": "section 5.1: 25,000; datasets.py: the first 20 training files",
    "data.num_classes": "section 5.2: 21,841, those of the data; datasets.py: 21,843 outputs",
    "eval.crop": "preprocess_legacy.py crops at every size; preprocessing.py squashes from 320 px",
    "eval.image_size": "datasets.py evaluates ImageNet-21k at 224 px",
    "eval.resize": "preprocess_legacy.py: TF1's bicubic",
    "learning_rate.schedule": "sections 5.2 and 5.3: cosine; datasets.py: constant",
    "mixing": "datasets.py weighs all cutmix labels of a batch by their mean area",
    "model.bn_decay": "section 5.1: 0.99; hparams.py: 0.9",
    "model.drop_path_rate": "section 5.1: survival 0.8; datasets.py: 1 for ImageNet-21k",
    "normalize.mean": "preprocess_legacy.py: ImageNet's mean",
    "normalize.std": "preprocess_legacy.py: ImageNet's standard deviation",
    "optimizer.weight_decay": "section 5.3: no weight decay; datasets.py keeps 1e-5",
    "progressive.cutmix_alpha": "the paper has no cutmix; effnetv2_configs.py: as mixup",
    "progressive.dropout_rate": "Table 6 raises it; main.py computes that and deletes it",
    "progressive.form": "Algorithm 1 starts at the smallest size; main.py one stage above it",
    "progressive.image_size": "Table 6: up to 300 or 380; effnetv2_configs.py: 300 or 384. "
    "Table 11 has B0 to B3 in one stage, datasets.py has ImageNet-21k at 224 px, and the paper's "
    "V1 baselines train at the inference size",
    "progressive.mixup_alpha": "Table 6: 0.4 for L; effnetv2_configs.py: 0.5. None on ImageNet-21k",
    "progressive.num_stages": "B0 to B3: none in Table 11, 4 in effnetv2_configs.py; ImageNet-21k: "
    "Table 7's caption against datasets.py",
    "progressive.randaug_magnitude": "Table 6: up to 15, 20, 25; effnetv2_configs.py: 10, 15, 20",
}


def differences(make: Callable[[str], ConfigDict]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value of `paper`, value of `released`) where they differ."""
    paper, released = (flatten_dict(to_plain(make(recipe)), sep=".") for recipe in RECIPES)
    return {key: (paper[key], released[key]) for key in paper if paper[key] != released[key]}


def page() -> str:
    """The page in Markdown.

    Raises:
      KeyError: a difference has no reason here.
    """
    lines = [
        "# The paper against its released code",
        "",
        "`recipe=paper` is the text, `recipe=released` the official code (google/automl, "
        "efficientnetv2). Written by",
        "`python -m effnetv2_jax.tools.compare_recipes` from the configurations; a key is set by "
        "`--config.KEY=VALUE`.",
        "What the paper leaves open has the released value in both.",
        "",
        "## Why",
        "",
        "| key | sources |",
        "| --- | --- |",
        *(f"| `{key}` | {reason} |" for key, reason in REASONS.items()),
    ]
    for title, make in RUNS.items():
        lines += ["", f"## {title}", "", "| key | paper | released |", "| --- | --- | --- |"]
        for key, values in sorted(differences(make).items()):
            if key not in REASONS:
                raise KeyError(f"{title}: the difference in {key} has no reason")
            lines.append(f"| `{key}` | " + " | ".join(_show(value) for value in values) + " |")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{v:.5g}" for v in value) if len(value) == 2 else str(value)
    return "from the data" if value is None else str(value)


def main() -> None:
    """Writes the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
