"""Other schedules of image sizes: Table 13, and Table 14 of the appendix.

    Table 13, top-1 in %                   regularisation fixed    adaptive
    sizes rise (progressive resize)        84.3 +- 0.14 %          85.1 +- 0.07 %
    a random size every 8 epochs           83.5 +- 0.11 %          84.2 +- 0.10 %

    Table 14      from 128 px                               from 256 px
    4 stages      83.24 %, 6.2 h on 32 TPUv3 cores          83.15 %, 8.1 h
    8 stages      83.11 %, 6.3 h                            83.07 %, 8.5 h
    16 stages     83.20 %, 7.0 h                            83.23 %, 9.4 h

    python -m effnetv2_jax.main --config=configs/schedules.py:order=random,adaptive=no --workdir=DIR
    python -m effnetv2_jax.main --config=configs/schedules.py:s,start=256,stages=8 --workdir=DIR

Not run at this scale by this project.
"""

from ml_collections import ConfigDict

from effnetv2_jax.config import is_yes, parse_argument
from effnetv2_jax.errors import InputError
from effnetv2_jax.recipes import schedule_ablation


def get_config(argument: str | None = None) -> ConfigDict:
    """The configuration.

    Args:
      argument: `model=` s, m, l or xl; `order=` rising or random; `adaptive=` yes or no;
        `start=` the smallest size, pixels; `stages=` their number.
    """
    values = parse_argument(
        argument, model="m", order="rising", adaptive="yes", start="128", stages="4"
    )
    for name in ("start", "stages"):
        if not values[name].isdecimal():
            raise InputError(f"{name}={values[name]}: it must be a number.")
    return schedule_ablation(
        f"efficientnetv2-{values['model']}",
        order=values["order"],
        adaptive=is_yes(values, "adaptive"),
        start_size=int(values["start"]),
        num_stages=int(values["stages"]),
    )
