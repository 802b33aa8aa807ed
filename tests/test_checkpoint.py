"""Checkpoints: whole or noticed, kept or dropped."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effnetv2_jax.checkpoint import CHECKSUMS, Checkpoints
from effnetv2_jax.errors import InputError
from effnetv2_jax.parallel import replicate


@flax.struct.dataclass
class State:
    step: jax.Array
    values: dict


def state_at(step):
    return State(
        step=jnp.asarray(step, jnp.int32),
        values={"kernel": jnp.arange(50_000, dtype=jnp.float32) * step, "count": jnp.int32(7)},
    )


TEMPLATE = jax.eval_shape(lambda: state_at(0))


def saved(directory, steps, keep=10):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(replicate(state_at(step)))
    checkpoints.close()
    return checkpoints


def biggest_file(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def remove(path):
    path.unlink()


def test_round_trip_is_bit_exact_and_in_numpy(tmp_path):
    saved(tmp_path, [3])
    restored = Checkpoints(tmp_path, keep=1).restore_newest(TEMPLATE)
    assert isinstance(restored.values["kernel"], np.ndarray)
    np.testing.assert_array_equal(restored.values["kernel"], state_at(3).values["kernel"])
    assert int(restored.step) == 3 and int(restored.values["count"]) == 7


def test_the_newest_are_kept_and_every_one_has_checksums(tmp_path):
    checkpoints = saved(tmp_path, [1, 2, 5, 9], keep=2)
    assert checkpoints.steps() == [5, 9]
    assert all((tmp_path / str(step) / CHECKSUMS).exists() for step in (5, 9))


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).restore_newest(TEMPLATE) is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage):
    saved(tmp_path, [1, 2])
    damage(biggest_file(tmp_path / "2"))
    checkpoints = Checkpoints(tmp_path, keep=3)
    restored = checkpoints.restore_newest(TEMPLATE)
    assert int(restored.step) == 1
    assert "damaged" in caplog.text and "Falling back to the checkpoint of step 1" in caplog.text
    # The step can be written again, and the damaged files are still there to look at.
    checkpoints.save(state_at(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert (tmp_path / "2.damaged").is_dir()
    assert int(Checkpoints(tmp_path, keep=3).restore_newest(TEMPLATE).step) == 2


def test_a_step_may_be_damaged_twice(tmp_path):
    saved(tmp_path, [1])
    for _ in range(2):
        saved(tmp_path, [2])
        flip_a_byte(biggest_file(tmp_path / "2"))
        assert int(Checkpoints(tmp_path, keep=3).restore_newest(TEMPLATE).step) == 1
    assert len(list(tmp_path.glob("2.damaged*"))) == 2


def test_orbax_alone_would_restore_a_flipped_byte(tmp_path):
    """The reason for checksums of our own; when this fails, Orbax has learned it."""
    saved(tmp_path, [1])
    flip_a_byte(biggest_file(tmp_path / "1"))
    (tmp_path / "1" / CHECKSUMS).unlink()
    try:
        restored = Checkpoints(tmp_path, keep=1).restore_newest(TEMPLATE)
    except InputError:
        pytest.skip("the flipped byte hit the compressed frame's own checks")
    assert restored is not None


def test_all_damaged_is_an_error_that_says_so(tmp_path):
    saved(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(biggest_file(tmp_path / str(step)))
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read: 2 \(.*, 1 \("):
        Checkpoints(tmp_path, keep=3).restore_newest(TEMPLATE)


def test_killed_before_the_checksums_is_still_whole(tmp_path):
    saved(tmp_path, [1])
    (tmp_path / "1" / CHECKSUMS).unlink()
    assert int(Checkpoints(tmp_path, keep=1).restore_newest(TEMPLATE).step) == 1


def test_a_write_that_was_cut_off_is_no_checkpoint(tmp_path):
    saved(tmp_path, [1])
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path, keep=1).steps() == [1]


def test_saving_a_step_again_keeps_the_first(tmp_path):
    saved(tmp_path, [4])
    before = biggest_file(tmp_path / "4").stat().st_mtime_ns
    saved(tmp_path, [4])
    assert biggest_file(tmp_path / "4").stat().st_mtime_ns == before


def test_the_saved_values_are_those_of_the_call_although_buffers_are_reused(tmp_path):
    """Training donates the state to the next step while the write goes on."""
    advance = jax.jit(
        lambda s: s.replace(step=s.step + 1, values=jax.tree.map(lambda v: v * 0 - 1, s.values)),
        donate_argnums=0,
    )
    checkpoints = Checkpoints(tmp_path, keep=3)
    state = replicate(state_at(6))
    checkpoints.save(state)
    for _ in range(3):
        state = advance(state)
    checkpoints.close()
    restored = Checkpoints(tmp_path, keep=1).restore_newest(TEMPLATE)
    np.testing.assert_array_equal(restored.values["kernel"], state_at(6).values["kernel"])


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint.keep is 0"):
        Checkpoints(tmp_path, keep=0)
