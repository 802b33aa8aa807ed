"""A foreign file has to be whole and of the variant that is named, in both directions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from effnetv2_jax.weights.convert import SOURCES, TARGETS, convert, convert_back
from effnetv2_jax.weights.model_folder import ModelSpec
from tests.weights.conftest import random_variables


@pytest.fixture
def timm_file(tmp_path, tiny_weights):
    """The spec, the variables and the file, as timm would write it."""
    spec, variables = tiny_weights()
    path = tmp_path / "timm.safetensors"
    save_file(convert_back("timm", spec, variables), path)
    return spec, variables, path


def assert_equal(variables, others):
    flat, other = flatten_dict(variables, sep="/"), flatten_dict(others, sep="/")
    assert flat.keys() == other.keys()
    for name, value in flat.items():
        assert value.dtype == other[name].dtype == np.float32
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
def test_there_and_back_with_the_same_bits(tmp_path, tiny, tiny_v1, target):
    variant = tiny_v1 if target == "efficientnet_pytorch" else tiny
    spec = ModelSpec(variant, 5, 32, padding=SOURCES[target].padding)
    variables = random_variables(spec)
    tensors = convert_back(target, spec, variables)
    # As PyTorch has it: each normalisation counts its batches.
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    assert len(counters) == len([n for n in tensors if n.endswith("running_var")]) > 5
    assert all(tensors[name].dtype == np.int64 for name in counters)
    save_file(tensors, tmp_path / "a.safetensors")
    converted = convert(target, variant, tmp_path / "a.safetensors")
    assert_equal(converted.variables, variables)
    assert converted.matched == len(tensors) - len(counters)
    assert converted.report() == f"{converted.matched} tensors matched, 0 missing, 0 unused."
    assert converted.spec.num_classes == 5
    assert converted.spec.padding == SOURCES[target].padding


def test_another_variant_is_refused(monkeypatch, timm_file):
    spec, _, path = timm_file
    table = specs.get_spec(spec.variant)
    wider = dataclasses.replace(table, width=2.0)
    deeper = dataclasses.replace(table, depth=2.0)
    shallower = dataclasses.replace(table, depth=0.5)
    for name, other, reason in (
        ("wider", wider, r"has shape .+ instead of"),
        ("deeper", deeper, "is missing"),
        ("shallower", shallower, "is unused"),
    ):
        monkeypatch.setitem(specs.SPECS, name, other)
        with pytest.raises(InputError, match=rf"is not {name} of timm \(.*{reason}"):
            convert("timm", name, path)


def test_a_missing_tensor(timm_file):
    spec, variables, path = timm_file
    tensors = load_file(path)
    del tensors["classifier.weight"], tensors["bn1.running_mean"]
    save_file(tensors, path)
    with pytest.raises(
        InputError,
        match=r"\(batch_stats/stem_bn/mean is missing, and 1 more .+--allow_mismatch",
    ):
        convert("timm", spec.variant, path)
    converted = convert("timm", spec.variant, path, allow_mismatch=True)
    assert converted.missing == ("batch_stats/stem_bn/mean", "params/classifier/kernel")
    assert "  missing: params/classifier/kernel" in converted.report().splitlines()
    # The network's own first values stand in, and what was there is kept.
    np.testing.assert_array_equal(converted.variables["batch_stats"]["stem_bn"]["mean"], 0.0)
    kernel = converted.variables["params"]["classifier"]["kernel"]
    assert kernel.shape == (32, 5) and np.std(kernel) > 0
    np.testing.assert_array_equal(
        converted.variables["params"]["classifier"]["bias"],
        variables["params"]["classifier"]["bias"],
    )


def test_a_tensor_too_many(timm_file):
    spec, variables, path = timm_file
    save_file({**load_file(path), "extra.weight": np.ones(2, np.float32)}, path)
    with pytest.raises(InputError, match=r"\(extra.weight is unused\)"):
        convert("timm", spec.variant, path)
    converted = convert("timm", spec.variant, path, allow_mismatch=True)
    assert converted.unused == ("extra.weight",)
    assert_equal(converted.variables, variables)


@pytest.mark.parametrize("shape", [(9, 3, 3, 3), (8, 27), (8, 3, 3), ()])
def test_a_wrong_shape_is_refused_even_with_allow_mismatch(timm_file, shape):
    spec, _, path = timm_file
    save_file({**load_file(path), "conv_stem.weight": np.ones(shape, np.float32)}, path)
    for allow in (False, True):
        with pytest.raises(
            InputError, match=r"params/stem_conv/kernel has shape .+ name its variant and source\."
        ):
            convert("timm", spec.variant, path, allow_mismatch=allow)


def test_the_layout_of_another_source(timm_file):
    spec, _, path = timm_file
    with pytest.raises(InputError, match="has none of the names of torchvision"):
        convert("torchvision", spec.variant, path)
    with pytest.raises(InputError, match="unknown source 'tim': did you mean timm"):
        convert("tim", spec.variant, path)


def test_what_is_known_better_than_by_default(timm_file):
    spec, _, path = timm_file
    converted = convert("timm", spec.variant, path, eval_size=40, licence="CC0")
    assert (converted.spec.eval_size, converted.spec.licence) == (40, "CC0")
    assert converted.spec.source == "timm"


def test_no_target_for_other_padding(tiny_weights):
    spec, variables = tiny_weights(padding="symmetric")
    for target in ("timm", "efficientnet_pytorch"):
        with pytest.raises(InputError, match=r"trained with symmetric padding and .+ has same"):
            convert_back(target, spec, variables)
    spec, variables = tiny_weights()
    for target in ("torchvision", "plain_pytorch"):
        with pytest.raises(InputError, match=r"trained with same padding and .+ has symmetric"):
            convert_back(target, spec, variables)
    with pytest.raises(InputError, match="unknown target 'released'"):
        convert_back("released", spec, variables)


@pytest.mark.parametrize(
    "fields", [{"width_multiplier": 2.0}, {"depth_multiplier": 0.5}, {"stem_stride": 1}]
)
def test_no_target_for_a_cut_down_network(tiny_weights, fields):
    spec, variables = tiny_weights(**fields)
    with pytest.raises(InputError, match="timm has no cut-down tiny: convert a whole one"):
        convert_back("timm", spec, variables)


@pytest.mark.parametrize(
    ("source", "variant", "expected"),
    [
        ("torchvision", "efficientnet-b0", 1e-5),
        ("torchvision", "efficientnet-b7", 1e-3),
        ("torchvision", "efficientnetv2-s", 1e-3),
        ("torchvision", "resnet50", 1e-5),
        ("timm", "efficientnet-b0", 1e-3),
        ("keras", "efficientnet-b0", 1e-3),
    ],
)
def test_epsilon_is_the_library_s(source, variant, expected):
    from effnetv2_jax.weights.preprocessing import default_preprocessing

    fields = default_preprocessing(source, variant, 1000)
    assert ModelSpec(variant, 1000, **fields).bn_epsilon == expected
