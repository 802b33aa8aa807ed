"""Fine-tuning pretrained weights on images of your own, a folder of class folders.

    python -m effnetv2_jax.main --config=configs/finetune.py:model=DIR,data=FOLDER --workdir=DIR

`model` is a folder of `effnetv2_jax.tools.convert` or the workdir of another run; it says which
network this is and how images are prepared. `data` has FOLDER/train/CLASS/*.jpg and
FOLDER/val/CLASS/*.jpg, or FOLDER/CLASS/*.jpg, of which a tenth is held out; a data set by name,
as oxford_flowers102, will do too.

Not a run of the paper. It is sized for some thousand images on one GPU or a few hundred on a CPU,
where float32 is the safe type: `--config.model.dtype=bfloat16` on TPUs and GPUs. With
`weights=no` the same network starts from random weights, to see what the pretraining is worth.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import is_yes, parse_argument
from effnetv2_jax.recipes import finetune


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `model=` a model folder or a workdir; `data=` a folder or a name; `weights=yes`
        to start from the model's weights or `no`.
    """
    values = parse_argument(argument, model="", data="folder:data", weights="yes")
    config = finetune(values["model"] or None, values["data"])
    if not is_yes(values, "weights"):
        config.init_from = None
    return config
