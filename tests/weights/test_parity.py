"""Small networks against the libraries that their weights come from (`make test-parity`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import efficientnet, specs
from effnetv2_jax.weights.convert import convert

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
# The interpreter that has PyTorch, timm, torchvision and Keras.
PEERS = os.environ.get("PEERS", str(ROOT / ".venv-peers/bin/python"))


def _load_run():
    """`experiments/parity/run.py`; experiments are no package."""
    spec = importlib.util.spec_from_file_location("parity_run", ROOT / "experiments/parity/run.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules["parity_run"] = module
    spec.loader.exec_module(module)
    return module


run = _load_run()
SMALL = {
    ("timm", "efficientnetv2-b0"),
    ("timm", "efficientnetv2-s"),
    ("timm", "efficientnet-b0"),
    ("timm", "efficientnet-lite0"),
    ("torchvision", "efficientnetv2-s"),
    ("torchvision", "efficientnet-b0"),
    ("torchvision", "resnet50"),
    ("keras", "efficientnetv2-b0"),
    ("plain_pytorch", "efficientnetv2-s"),
    ("efficientnet_pytorch", "efficientnet-b0"),
    ("released", "efficientnetv2-b0"),
}
ROWS = [
    row for row in run.rows() if (row.peer, row.variant) in SMALL and (row.image_size == run.ODD)
]


@pytest.fixture(scope="module", autouse=True)
def _peers():
    if not Path(PEERS).is_file():
        pytest.fail(f"there is no {PEERS}: `make test-parity` installs the libraries.")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.key))
def test_converted_weights_give_the_same_numbers(row, tmp_path):
    result = run.run_row(PEERS, row, tmp_path)
    assert result.failures() == [], result
    assert (result.gradient_error is not None) == row.gradient
    assert (result.train_bn_error is not None) == row.train


def test_the_rows_are_all_of_them():
    assert {(row.peer, row.variant) for row in ROWS} == SMALL


# B1 is the smallest with a Fused-MBConv of one convolution that has a skip.
MISTAKEN = "efficientnetv2-b1"


@pytest.fixture(scope="module")
def b1(tmp_path_factory):
    """A network of timm at an even size: path, numbers of the peer, our weights."""
    path, numbers = run.run_peer(
        PEERS, run.Row("timm", MISTAKEN, run.EVEN), tmp_path_factory.mktemp("b1")
    )
    return path, numbers, convert("timm", MISTAKEN, path)


def measure(converted, numbers, **overrides):
    logits = run.forward(converted, **overrides)(numbers["images"])
    return run.scaled_difference(logits, numbers["logits"])


def test_without_a_mistake(b1):
    _, numbers, converted = b1
    assert measure(converted, numbers) < run.MAX_MEASURE


@pytest.mark.parametrize("mistake", [{"padding": "symmetric"}, {"bn_epsilon": 1e-5}])
def test_wrong_padding_and_wrong_epsilon_are_noticed(b1, mistake):
    _, numbers, converted = b1
    assert measure(converted, numbers, **mistake) > 2 * run.MAX_MEASURE


class ActivatesLate(efficientnet.FusedMBConv):
    """Its activation comes after the skip is added."""

    @nn.compact
    def __call__(self, images):
        block = self.block
        x = self.conv(block.out_filters, block.kernel_size, block.stride, name="conv")(images)
        x = self.norm(name="bn")(x)
        # The network adds `images` to what is returned.
        return self.act(x + images) - images if block.has_skip else self.act(x)


def test_an_activation_after_the_sum_is_noticed(b1, monkeypatch):
    _, numbers, converted = b1

    def fused(block, *args, **kwargs):
        kind = ActivatesLate if block.expansion == 1 else efficientnet.FusedMBConv
        return kind(block, *args, **kwargs)

    monkeypatch.setitem(efficientnet.EfficientNet.OPERATIONS, "fused", fused)
    assert measure(converted, numbers) > 2 * run.MAX_MEASURE


def test_swapped_squeeze_channels_are_noticed(b1):
    _, numbers, converted = b1
    se = converted.variables["params"]["blocks_8"]["se"]
    kernel = se["reduce"]["kernel"]
    se["reduce"]["kernel"] = kernel[..., ::-1]
    try:
        assert measure(converted, numbers) > 2 * run.MAX_MEASURE
    finally:
        se["reduce"]["kernel"] = kernel


def test_a_wrong_squeeze_width_is_refused(b1, monkeypatch):
    # A quarter of the block's output in place of its input: other in each row's first block.
    monkeypatch.setattr(
        specs.Block, "squeeze_filters", property(lambda b: b.squeeze_ratio and b.out_filters // 4)
    )
    path, _, _ = b1
    with pytest.raises(InputError, match=r"se/.* has shape .* instead of"):
        convert("timm", MISTAKEN, path)


def in_peers(code, *args):
    """Runs code where PyTorch is; the package itself needs neither JAX nor TensorFlow there."""
    return subprocess.run(
        [PEERS, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


READ = """
import sys
from effnetv2_jax.weights.pytorch import read_state_dict
from effnetv2_jax.errors import InputError
try:
    tensors = read_state_dict(sys.argv[1])
except InputError as error:
    print("InputError:", error)
else:
    print({name: (str(value.dtype), value.tolist()) for name, value in tensors.items()})
"""


def test_a_malicious_pickle_is_never_run(tmp_path):
    code = """
import os, sys, torch
class Malicious:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)
torch.save({"state_dict": {"a": torch.ones(1)}, "args": Malicious()}, sys.argv[1])
"""
    file, ran = tmp_path / "a.pth", tmp_path / "it_ran"
    done = in_peers(code, file, ran)
    assert done.returncode == 0, done.stderr
    done = in_peers(READ, file)
    assert "is not a file of plain tensors and was not run" in done.stdout, done
    assert "weights_only" not in done.stdout
    assert not ran.exists()
    # It would have run in a careless reader.
    done = in_peers("import sys, torch; torch.load(sys.argv[1], weights_only=False)", file)
    assert ran.exists(), done


def test_the_files_of_pytorch(tmp_path):
    code = """
import sys, torch
folder = sys.argv[1]
a = torch.tensor([1.5, -2.0])
torch.save({"a": a.half()}, f"{folder}/plain.pth")
torch.save({"epoch": 1, "model": {"a": a + 1}, "model_ema": {"module.a": a}}, f"{folder}/ema.pth")
torch.save({"a": a.bfloat16()}, f"{folder}/bfloat16.pth")
torch.save({"a": torch.tensor([1, 2])}, f"{folder}/quantised.pth")
torch.save({"epoch": 1}, f"{folder}/empty.pth")
with open(f"{folder}/plain.pth", "rb") as file:
    content = file.read()
with open(f"{folder}/short.pth", "wb") as file:
    file.write(content[:200])
"""
    done = in_peers(code, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("plain", "ema", "bfloat16"):
        output = in_peers(READ, tmp_path / f"{name}.pth").stdout
        assert output.strip() == "{'a': ('float32', [1.5, -2.0])}", name
    for name, reason in (
        ("quantised", "is of type torch.int64, and weights are fractions"),
        ("empty", "holds no state dict"),
        ("short", "cannot be read"),
    ):
        assert reason in in_peers(READ, tmp_path / f"{name}.pth").stdout, name


def test_bfloat16_in_safetensors(tmp_path):
    code = """
import sys, torch
from safetensors.torch import save_file
save_file({"a": torch.tensor([1.5, -2.0]).bfloat16()}, sys.argv[1])
"""
    file = tmp_path / "a.safetensors"
    done = in_peers(code, file)
    assert done.returncode == 0, done.stderr
    from effnetv2_jax.weights.pytorch import read_safetensors

    np.testing.assert_array_equal(read_safetensors(file)["a"], [1.5, -2.0])
