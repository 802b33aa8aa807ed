"""How large the published data sets are, for planning a run without having them."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from effnetv2_jax.data.datasets import MINIVAL
from effnetv2_jax.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Examples of the splits, and classes."""

    train: int
    eval: int
    classes: int
    minival: int = 0

    def used_by(self, data: ConfigDict) -> Sizes:
        """What `datasets.load_dataset` makes of a whole data set by a configuration's `data`."""
        rest = self.train - data.minival_examples
        is_tuning = data.eval_split == MINIVAL
        return Sizes(
            train=data.train_examples or rest,
            eval=data.minival_examples if is_tuning else self.eval,
            classes=data.num_classes or self.classes,
            minival=0 if is_tuning else data.minival_examples,
        )


# Table 9 of the paper, and ImageNet-21k of fall 2011: 14,197,122 images of which 100,000 are held
# out for validation (section 5.2).
_PUBLISHED = {
    "imagenet2012": Sizes(1_281_167, 50_000, 1000),
    "imagenet21k/fall11": Sizes(14_097_122, 100_000, 21_841),
    "cifar10": Sizes(50_000, 10_000, 10),
    "cifar100": Sizes(50_000, 10_000, 100),
    "oxford_flowers102": Sizes(2_040, 6_149, 102),
    "cars196": Sizes(8_144, 8_041, 196),
    "fashion_mnist": Sizes(60_000, 10_000, 10),
    # All 1,797 images, a fifth of them held out.
    "digits": Sizes(1_438, 359, 10),
}


def published_sizes(name: str) -> Sizes:
    """The sizes of a data set; `InputError` for one that is not published."""
    if name not in _PUBLISHED:
        raise unknown_name("published data set", name, _PUBLISHED)
    return _PUBLISHED[name]
