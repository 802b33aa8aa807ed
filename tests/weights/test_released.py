"""The names of the authors' checkpoints, and which of their tensors count."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from effnetv2_jax.data.host_tf import tf
from effnetv2_jax.errors import InputError
from effnetv2_jax.models.specs import get_spec
from effnetv2_jax.weights.convert import SOURCES, convert
from effnetv2_jax.weights.released import read_tf_checkpoint, released_layout

EMA = "/ExponentialMovingAverage"
STEM = "efficientnetv2-s/stem/conv2d/kernel"
HEAD = "efficientnetv2-s/head/dense/bias"


def save(path, tensors):
    """Writes a bundle with those tensors."""
    names = list(tensors)
    values = [tf.constant(tensors[name]) for name in names]
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=values,
    )
    return path


def numbers(*values):
    return np.array(values, np.float32)


def names(variant):
    spec = get_spec(variant)
    return {e.ours: e.theirs for e in released_layout(spec).entries(spec)}


def test_the_names_of_s():
    # Counted in the released model: automl efficientnetv2/effnetv2_model.py.
    theirs = names("efficientnetv2-s").values()
    assert len(theirs) == 672
    layers = Counter(
        re.sub(r"^blocks_\d+/", "", name).rpartition("/")[0]
        for name in theirs
        if name.startswith("blocks_") and name.endswith(("kernel", "gamma"))
    )
    assert layers == {
        "conv2d": 40,
        "conv2d_1": 38,
        "depthwise_conv2d": 30,
        "se/conv2d": 30,
        "se/conv2d_1": 30,
        "tpu_batch_normalization": 40,
        "tpu_batch_normalization_1": 38,
        "tpu_batch_normalization_2": 30,
    }


@pytest.mark.parametrize(
    ("variant", "count"),
    [("efficientnetv2-b0", 361), ("efficientnetv2-m", 963), ("efficientnetv2-xl", 1712)],
)
def test_counts_of_others(variant, count):
    assert len(names(variant)) == count


def test_what_the_numbers_mean_in_each_kind_of_block():
    s, b0 = names("efficientnetv2-s"), names("efficientnet-b0")
    # Fused with one convolution, fused with two, MBConv; V1's first MBConv does not expand.
    assert s["params/blocks_0/conv/kernel"] == "blocks_0/conv2d/kernel"
    assert s["params/blocks_0/bn/scale"] == "blocks_0/tpu_batch_normalization/gamma"
    assert s["params/blocks_2/expand_conv/kernel"] == "blocks_2/conv2d/kernel"
    assert s["params/blocks_2/project_conv/kernel"] == "blocks_2/conv2d_1/kernel"
    assert s["params/blocks_2/project_bn/bias"] == "blocks_2/tpu_batch_normalization_1/beta"
    assert s["params/blocks_10/expand_conv/kernel"] == "blocks_10/conv2d/kernel"
    assert (
        s["params/blocks_10/depthwise_conv/kernel"] == "blocks_10/depthwise_conv2d/depthwise_kernel"
    )
    assert (
        s["batch_stats/blocks_10/depthwise_bn/mean"]
        == "blocks_10/tpu_batch_normalization_1/moving_mean"
    )
    assert (
        s["batch_stats/blocks_10/project_bn/var"]
        == "blocks_10/tpu_batch_normalization_2/moving_variance"
    )
    assert s["params/blocks_10/se/reduce/kernel"] == "blocks_10/se/conv2d/kernel"
    assert s["params/blocks_10/se/expand/bias"] == "blocks_10/se/conv2d_1/bias"
    assert s["params/blocks_10/project_conv/kernel"] == "blocks_10/conv2d_1/kernel"
    assert b0["params/blocks_0/project_conv/kernel"] == "blocks_0/conv2d/kernel"
    assert b0["params/blocks_0/depthwise_bn/scale"] == "blocks_0/tpu_batch_normalization/gamma"
    assert b0["params/blocks_0/project_bn/scale"] == "blocks_0/tpu_batch_normalization_1/gamma"
    assert s["params/head_conv/kernel"] == "head/conv2d/kernel"
    assert s["params/classifier/kernel"] == "head/dense/kernel"


def test_averages_win_and_the_optimizer_is_left_out(tmp_path):
    save(
        tmp_path / "model.ckpt-7",
        {
            STEM: numbers(1),
            STEM + EMA: numbers(2),
            f"{STEM}/RMSProp": numbers(3),
            f"{STEM}/RMSProp_1": numbers(4),
            HEAD: numbers(5),
            f"{HEAD}/Momentum": numbers(6),
            HEAD + EMA: numbers(7),
            "global_step": np.array(8, np.int64),
        },
    )
    for path in (tmp_path, tmp_path / "model.ckpt-7", tmp_path / "model.ckpt-7.index"):
        tensors = read_tf_checkpoint(path)
        assert tensors == {"stem/conv2d/kernel": numbers(2), "head/dense/bias": numbers(7)}


def test_plain_tensors_where_nothing_is_averaged(tmp_path):
    save(tmp_path / "model.ckpt", {STEM: numbers(1), HEAD: numbers(2)})
    assert read_tf_checkpoint(tmp_path)["stem/conv2d/kernel"] == numbers(1)


def test_averages_alone(tmp_path):
    save(tmp_path / "model.ckpt", {STEM + EMA: numbers(1), HEAD + EMA: numbers(2)})
    tensors = read_tf_checkpoint(tmp_path)
    assert tensors == {"stem/conv2d/kernel": numbers(1), "head/dense/bias": numbers(2)}


def test_a_part_that_is_averaged_is_refused(tmp_path):
    save(tmp_path / "model.ckpt", {STEM: numbers(1), STEM + EMA: numbers(2), HEAD: numbers(3)})
    with pytest.raises(InputError, match=rf"no moving average of {HEAD} \(and of 0 more"):
        read_tf_checkpoint(tmp_path)


def test_a_whole_network(tmp_path, tiny_weights):
    spec, variables = tiny_weights()
    from flax.traverse_util import flatten_dict

    flat = flatten_dict(variables, sep="/")
    table = get_spec(spec.variant)
    entries = SOURCES["released"].layout(table).entries(table)
    tensors = {f"tiny/{e.theirs}": e.to_theirs(flat[e.ours]) for e in entries}
    averaged = {name + EMA: value for name, value in tensors.items()}
    plain = {name: value + 1 for name, value in tensors.items()}
    save(tmp_path / "model.ckpt", {**plain, **averaged})
    converted = convert("released", spec.variant, tmp_path)
    assert (converted.missing, converted.unused) == ((), ())
    for name, value in flatten_dict(converted.variables, sep="/").items():
        np.testing.assert_array_equal(value, flat[name])


def test_a_checkpoint_file_never_leads_out_of_its_folder(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    save(outside / "model.ckpt", {STEM: numbers(1)})
    save(outside / "secret.ckpt", {STEM: numbers(1)})
    save(inside / "model.ckpt", {STEM: numbers(2)})
    for named in ("../outside/model.ckpt", f"{outside}/model.ckpt", "../outside/secret.ckpt"):
        (inside / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\n')
        assert read_tf_checkpoint(inside)["stem/conv2d/kernel"] == numbers(2)
    (inside / "model.ckpt.index").unlink()
    with pytest.raises(InputError, match="holds 0 TensorFlow checkpoints"):
        read_tf_checkpoint(inside)


def test_the_checkpoint_file_chooses_among_several(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path / f"model.ckpt-{step}", {STEM: numbers(step)})
    with pytest.raises(InputError, match=r"holds 2 TensorFlow checkpoints \(model.ckpt-1.index"):
        read_tf_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/cns/x/model.ckpt-2"\n')
    assert read_tf_checkpoint(tmp_path)["stem/conv2d/kernel"] == numbers(2)
    monkeypatch.chdir(tmp_path)
    assert read_tf_checkpoint(".")["stem/conv2d/kernel"] == numbers(2)


@pytest.mark.parametrize("name", ["nothing", "model.ckpt", "empty"])
def test_no_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds 0 TensorFlow checkpoints"):
        read_tf_checkpoint(tmp_path / name)


def test_a_damaged_bundle(tmp_path):
    save(tmp_path / "model.ckpt", {STEM: np.ones(1000, np.float32)})
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"cannot be read \(.+\): fetch it again"):
        read_tf_checkpoint(tmp_path)
    data.write_bytes(whole[:200] + b"????" + whole[204:])
    with pytest.raises(InputError, match="cannot be read"):
        read_tf_checkpoint(tmp_path)
    data.write_bytes(whole)
    (tmp_path / "model.ckpt.index").write_bytes(b"no index")
    with pytest.raises(InputError, match="cannot be read"):
        read_tf_checkpoint(tmp_path)


def test_another_network_is_refused(tmp_path, tiny):
    save(tmp_path / "model.ckpt", {"resnet/conv1/kernel": numbers(1)})
    with pytest.raises(InputError, match=r"none of the names of released .*'resnet/conv1/kernel'"):
        convert("released", tiny, tmp_path)
