"""What is tried so that a step fits, and what is done when it does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from effnetv2_jax.errors import InputError
from effnetv2_jax.memory import (
    DoesNotFit,
    Fit,
    Fits,
    compile_within,
    device_limit,
    first_that_fits,
    parse_setting,
    used_memory,
)
from effnetv2_jax.models.create import create_model
from effnetv2_jax.progressive import Stage

GIB = 2**30


def stage(image_size, index=0):
    return Stage(index, 0, 10, image_size, 0.0, 0.0, 0.0, 0.0)


def fits(variant="efficientnetv2-s", *, per_device=128, limit=16 * GIB, num_classes=1000, **more):
    model = create_model(variant, dtype="bfloat16", num_classes=num_classes)
    return Fits(model, per_device=per_device, num_stages=2, limit=limit, **more)


def test_nothing_is_cut_down_where_it_fits_or_where_nobody_knows():
    assert fits().candidates(stage(128))[0] == Fit()
    assert fits(limit=None).candidates(stage(4096)) == [Fit()]


def test_the_cheaper_settings_come_first_and_all_of_them_may_fit():
    candidates = fits("efficientnetv2-l").candidates(stage(380))
    first = candidates[0]
    assert first.micro_batches in (4, 8) and first.remat_groups == 0
    # Micro-batches of a few images leave matrix units idle: rematerialisation comes before.
    assert candidates.index(Fit(first.micro_batches, 2)) < candidates.index(Fit(128, 0))
    small = fits("efficientnetv2-l", limit=6 * GIB).candidates(stage(380))
    assert len(small) < len(candidates) and small[0] != first


@pytest.mark.parametrize(
    ("variant", "size", "num_classes", "gib"),
    [
        # What the compiler says (experiments/tpu_compile/results.csv), 32 images a core.
        ("efficientnetv2-s", 300, 1000, 2.95),
        ("efficientnetv2-l", 384, 21843, 12.2),
    ],
)
def test_the_prediction_is_near_what_the_compiler_says(variant, size, num_classes, gib):
    """A limit a third above the need is predicted to suffice, one a third below it is not."""
    settings = {"per_device": 32, "num_classes": num_classes}
    assert fits(variant, limit=int(1.3 * gib * GIB), **settings).candidates(stage(size))[0] == Fit()
    assert Fit() not in fits(variant, limit=int(0.7 * gib * GIB), **settings).candidates(
        stage(size)
    )


def test_a_setting_of_the_configuration_is_taken_as_it_is():
    chosen = fits(micro_batches="2,4", remat_groups="1")
    assert chosen.candidates(stage(300, 0)) == [Fit(2, 1)]
    assert chosen.candidates(stage(300, 1)) == [Fit(4, 1)]
    half = fits("efficientnetv2-l", micro_batches="4").candidates(stage(380))
    assert {fit.micro_batches for fit in half} == {4} and len(half) > 1
    assert fits(limit=None, remat_groups="3").candidates(stage(300)) == [Fit(1, 3)]


def test_what_was_found_to_fit_is_tried_first_at_the_next_start(tmp_path):
    file = epath.Path(tmp_path / "fits.json")
    start = fits("efficientnetv2-l", file=file)
    tried = start.candidates(stage(380))
    start.remember(stage(300), start.candidates(stage(300))[0])
    assert not file.exists()  # Nothing was refused.
    start.remember(stage(380), tried[2])
    assert start.candidates(stage(380)) == tried[2:]

    again = fits("efficientnetv2-l", file=file)
    assert again.candidates(stage(380)) == tried[2:]
    assert again.candidates(stage(300)) == fits("efficientnetv2-l").candidates(stage(300))
    # Fewer images, or another memory, are another case; so is a setting that somebody asks for.
    for change in ({"per_device": 64}, {"limit": 15 * GIB}, {"micro_batches": "1"}):
        changed = fits("efficientnetv2-l", **change).candidates(stage(380))
        assert fits("efficientnetv2-l", **change, file=file).candidates(stage(380)) == changed


@pytest.mark.parametrize("damage", ["", "[]", '{"a": 1}', '{"a": {"parts": 1}}', "\x00"])
def test_a_damaged_file_of_settings_holds_none(tmp_path, damage):
    file = epath.Path(tmp_path / "fits.json")
    file.write_text(damage)
    assert fits(file=file).candidates(stage(380)) == fits().candidates(stage(380))


def test_settings_are_one_for_all_stages_or_one_for_each():
    assert parse_setting("micro_batches", "auto", 3) == [None, None, None]
    assert parse_setting("micro_batches", "1, auto,4", 3) == [1, None, 4]


def test_mistakes():
    with pytest.raises(InputError, match=r"memory.micro_batches '1,2,4' names 3 stages of 2"):
        fits(micro_batches="1,2,4")
    with pytest.raises(InputError, match=r"memory.remat_groups is 'all': give auto, a number"):
        fits(remat_groups="all")
    with pytest.raises(
        InputError, match=r"micro_batches 3 does not divide the 128 images.*1, 2, 4"
    ):
        fits(micro_batches="3")
    with pytest.raises(InputError, match=r"micro_batches 0 does not divide"):
        fits(micro_batches="0")
    with pytest.raises(InputError, match=r"remat_groups 7 is more than the network's 6"):
        fits(remat_groups="7")


def test_a_program_that_needs_more_than_the_limit_is_refused():
    lowered = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.zeros((100, 100)))
    needed = used_memory(lowered.compile())
    assert needed >= 2 * 100 * 100 * 4
    compile_within(lowered, needed)
    compile_within(lowered, None)
    with pytest.raises(DoesNotFit, match=f"{needed} of {needed - 1} bytes") as refusal:
        compile_within(lowered, needed - 1)
    assert refusal.value.needed == needed


class Refusing:
    """A lowered program whose compiler raises."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise RuntimeError(self.message)


def test_a_compiler_that_refuses_is_understood():
    message = "RESOURCE_EXHAUSTED: Used 58.02G of 15.48G hbm. (58.02G) exceeds available HBM"
    with pytest.raises(DoesNotFit) as refusal:
        compile_within(Refusing(message), None)
    assert refusal.value.needed == 58.02 * GIB
    with pytest.raises(RuntimeError, match="INTERNAL"):
        compile_within(Refusing("INTERNAL: (2.0G) exceeds available"), None)


def test_the_first_that_fits_is_taken_and_the_others_are_told():
    refused = []

    def compile_fit(fit):
        if fit.micro_batches < 4:
            raise DoesNotFit(f"{fit.micro_batches} is too few", 0)
        return fit.micro_batches * 10

    settings = [Fit(1), Fit(2), Fit(4), Fit(8)]
    assert first_that_fits(settings, compile_fit, lambda *told: refused.append(told)) == (
        Fit(4),
        40,
    )
    assert refused == [(Fit(1), "1 is too few"), (Fit(2), "2 is too few")]
    with pytest.raises(DoesNotFit, match="2 is too few"):
        first_that_fits(settings[:2], compile_fit, lambda *_: None)


def test_a_cpu_does_not_say_how_much_memory_it_has():
    assert device_limit(jax.devices()[0]) is None
