"""One network of another library with random weights: its file and its numbers.

It runs in the interpreter that has the other libraries, and imports nothing of ours. Into a
folder it writes the weights in the library's own format and `numbers.npz`:

    images            [2, H, W, 3]   what the network saw
    logits            [2, classes]
    other_logits      [2, classes]   the same network with its other memory layout, without oneDNN
                                     (which would rearrange both layouts into its own)
    projection        [2, classes]   random; with --gradient
    gradient          [2, H, W, 3]   of sum(projection * logits)
    train_images      [N, H, W, 3]   with --train
    train_logits      [N, classes]   with batch statistics, without dropout and stochastic depth
    first_mean, first_var, last_mean, last_var    [C]    running statistics after that batch of
                                     the stem's and of the head's batch normalisation, with 0.9
                                     of the old value, and the variance divided by the count
    versions, file                   text

Weights are random, but the network must be as well conditioned as a trained one, or float32
rounding alone differs by more than any sensible limit: the running statistics are those of a
batch of images, moved at random.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

_BATCH = 8
_BN_DECAY = 0.9

# The deepest of each family, 55 blocks and more: a damping of 0.2 leaves a floor of 1e-2 there, ten
# times the goal.
_DEEPEST = ("efficientnetv2-l", "efficientnetv2-xl", "efficientnet-b7")


class RandomWeights:
    """Draws well-conditioned tensors.

    Args:
      seed: of the generator; the order of the calls decides the rest.
      variant: of the network.
    """

    def __init__(self, seed: int, variant: str):
        self._generator = np.random.default_rng(seed)
        self._damping = 0.1 if variant in _DEEPEST else 0.2

    def kernel(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """Normal with variance 1 / fan_in."""
        return self._float32(self._generator.normal(0.0, fan_in**-0.5, shape))

    def shift(self, size: int) -> np.ndarray:
        """Biases and BN shifts, all of them other than 0."""
        return self._float32(self._generator.normal(0.0, 0.1, size))

    def scale(self, size: int, *, damped: bool) -> np.ndarray:
        """BN scales, damped at the end of a residual branch: sums must not grow."""
        scale = self._generator.uniform(0.7, 1.3, size)
        return self._float32(scale * (self._damping if damped else 1.0))

    def move(self, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A batch's mean by about a third of its deviation, and its variance by -50 to 50 %."""
        deviation = np.sqrt(variance)
        mean = mean + deviation * self._generator.normal(0.0, 0.3, mean.shape)
        variance = variance * self._generator.uniform(0.5, 1.5, variance.shape)
        return self._float32(mean), self._float32(variance)

    def projection(self, shape: tuple[int, ...]) -> np.ndarray:
        """A direction in logits, for gradients."""
        return self._float32(self._generator.normal(size=shape))

    def images(self, count: int, size: int) -> np.ndarray:
        """[count, size, size, 3]: 5 x 5 coloured patches and noise, as photographs have both."""
        coarse = self._generator.normal(size=(count, 5, 5, 3))
        place = np.minimum(np.arange(size) * 5 // size, 4)
        noise = self._generator.normal(size=(count, size, size, 3))
        return self._float32(coarse[:, place][:, :, place] + 0.3 * noise)

    @staticmethod
    def _float32(values: Any) -> np.ndarray:
        return np.asarray(values, np.float32)


def _torch_model(peer: str, variant: str, image_size: int) -> tuple[Any, str]:
    """The network without pretrained weights, and the versions of what it comes from."""
    import torch

    name = variant.replace("-", "_")
    if peer == "timm":
        import timm

        model = timm.create_model(f"tf_{name}", pretrained=False, num_classes=1000)
        version = f"timm {timm.__version__}"
    elif peer == "torchvision":
        import torchvision

        name = name.replace("efficientnetv2", "efficientnet_v2")
        model = torchvision.models.get_model(name, weights=None)
        version = f"torchvision {torchvision.__version__}"
    elif peer == "efficientnet_pytorch":
        import efficientnet_pytorch

        # This library fixes the padding when it is told the image size.
        model = efficientnet_pytorch.EfficientNet.from_name(variant, image_size=image_size)
        version = f"efficientnet_pytorch {efficientnet_pytorch.__version__}"
    else:
        from plain_pytorch import PlainEfficientNet

        pad = "same" if peer == "released" else "symmetric"
        model = PlainEfficientNet(variant, pad)
        version = "plain_pytorch.py"
    return model.float(), f"{version}, torch {torch.__version__}"


def _is_residual(module: Any) -> bool:
    if type(module).__name__ == "MBConvBlock":  # efficientnet_pytorch
        block = module._block_args
        stride = block.stride if isinstance(block.stride, int) else max(block.stride)
        return block.id_skip and stride == 1 and block.input_filters == block.output_filters
    # timm and plain_pytorch; torchvision.
    return bool(getattr(module, "has_skip", False) or getattr(module, "use_res_connect", False))


def _fill_torch(model: Any, weights: RandomWeights, images: np.ndarray) -> None:
    import torch
    from torch import nn

    damped = set()
    for module in model.modules():
        if type(module).__name__ == "Bottleneck":  # torchvision's ResNet
            damped.add(module.bn3)
        elif _is_residual(module):
            damped.add([m for m in module.modules() if isinstance(m, nn.BatchNorm2d)][-1])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                shape = tuple(module.weight.shape)
                fan_in = int(np.prod(shape[1:]))
                module.weight.copy_(torch.from_numpy(weights.kernel(shape, fan_in)))
                if module.bias is not None:
                    module.bias.copy_(torch.from_numpy(weights.shift(shape[0])))
            elif isinstance(module, nn.BatchNorm2d):
                size = module.num_features
                module.weight.copy_(torch.from_numpy(weights.scale(size, damped=module in damped)))
                module.bias.copy_(torch.from_numpy(weights.shift(size)))

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    _silence_torch(model)
    model.train()
    for norm in norms:
        norm.momentum = 1.0  # PyTorch's is the weight of the new value.
    with torch.no_grad():
        model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        for norm in norms:
            mean, variance = weights.move(norm.running_mean.numpy(), norm.running_var.numpy())
            norm.running_mean.copy_(torch.from_numpy(mean))
            norm.running_var.copy_(torch.from_numpy(variance))
            norm.momentum = 1.0 - _BN_DECAY
    model.eval()


def _silence_torch(model: Any) -> None:
    """Switches dropout and stochastic depth off."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    if hasattr(model, "drop_rate"):  # timm
        model.drop_rate = 0.0
    if hasattr(model, "_global_params"):  # efficientnet_pytorch
        model._global_params = model._global_params._replace(drop_connect_rate=None)


def run_torch(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """timm, torchvision, efficientnet_pytorch, and the plain network."""
    import torch
    from safetensors.torch import save_file

    weights = RandomWeights(args.seed, args.variant)
    model, versions = _torch_model(args.peer, args.variant, args.image_size)
    _fill_torch(model, weights, weights.images(_BATCH, args.image_size))
    state = model.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / args.file)

    images = weights.images(2, args.image_size)
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    numbers: dict[str, Any] = {"images": images, "versions": versions}
    with torch.no_grad():
        numbers["logits"] = model(inputs).numpy()
        model.to(memory_format=torch.channels_last)
        with torch.backends.mkldnn.flags(enabled=False):
            other = model(inputs.contiguous(memory_format=torch.channels_last))
        numbers["other_logits"] = other.numpy()
        model.to(memory_format=torch.contiguous_format)
    if args.gradient:
        numbers["projection"] = weights.projection(numbers["logits"].shape)
        inputs.requires_grad_(True)
        torch.sum(model(inputs) * torch.from_numpy(numbers["projection"])).backward()
        numbers["gradient"] = inputs.grad.permute(0, 2, 3, 1).numpy()
    if args.train:
        numbers |= _train_torch(model, weights.images(_BATCH, args.image_size))
    return numbers


def _train_torch(model: Any, images: np.ndarray) -> dict[str, Any]:
    import torch
    from torch import nn

    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    ends = {"first": norms[0], "last": norms[-1]}
    counts: dict[str, int] = {}
    old = {end: norm.running_var.clone() for end, norm in ends.items()}
    for end, norm in ends.items():
        norm.register_forward_pre_hook(
            lambda _, inputs, end=end: counts.update({end: inputs[0].numel() // inputs[0].shape[1]})
        )
    with torch.no_grad():
        logits = model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()
    numbers = {"train_images": images, "train_logits": logits}
    for end, norm in ends.items():
        numbers[f"{end}_mean"] = norm.running_mean.numpy()
        # PyTorch divides the variance that it keeps by one less than the count.
        fresh = norm.running_var - _BN_DECAY * old[end]
        fresh *= (counts[end] - 1) / counts[end]
        numbers[f"{end}_var"] = (_BN_DECAY * old[end] + fresh).numpy()
    return numbers


def run_keras(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """keras.applications, on its PyTorch back end."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    import torch

    weights = RandomWeights(args.seed, args.variant)
    model = _build_keras(args.variant, args.image_size)
    _fill_keras(model, weights, weights.images(_BATCH, args.image_size))
    if args.file.endswith(".weights.h5"):
        model.save_weights(folder / args.file)
    else:
        model.save(folder / args.file)

    images = weights.images(2, args.image_size)
    # V1 normalises inside: our network gets what comes out of that.
    front = _keras_front(model)
    numbers: dict[str, Any] = {
        "images": np.asarray(front(torch.from_numpy(images)).detach()) if front else images,
        "versions": f"keras {keras.__version__}, torch {torch.__version__}",
    }
    with torch.no_grad():
        numbers["logits"] = model(torch.from_numpy(images), training=False).numpy()
    keras.config.set_image_data_format("channels_first")
    other = _build_keras(args.variant, args.image_size)
    for layer, from_layer in zip(other.layers, model.layers, strict=True):
        if not _is_front(from_layer):
            layer.set_weights(from_layer.get_weights())
    keras.config.set_image_data_format("channels_last")
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        turned = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        numbers["other_logits"] = other(turned, training=False).numpy()
    if args.gradient:
        numbers["projection"] = weights.projection(numbers["logits"].shape)
        inputs = torch.from_numpy(images).requires_grad_(True)
        logits = model(inputs, training=False)
        torch.sum(logits * torch.from_numpy(numbers["projection"])).backward()
        numbers["gradient"] = inputs.grad.numpy()
    if args.train:
        images = weights.images(_BATCH, args.image_size)
        with torch.no_grad():
            logits = model(torch.from_numpy(images), training=True).numpy()
        numbers |= {"train_images": images, "train_logits": logits}
        for end, name in (("first", "stem_bn"), ("last", "top_bn")):
            _, _, mean, variance = model.get_layer(name).get_weights()
            numbers |= {f"{end}_mean": mean, f"{end}_var": variance}
    return numbers


def _build_keras(variant: str, image_size: int) -> Any:
    import keras

    version, _, size = variant.removeprefix("efficientnet").partition("-")
    build = getattr(keras.applications, f"EfficientNet{version.upper()}{size.upper()}")
    options = {} if version == "" else {"include_preprocessing": False}
    shape = (image_size, image_size, 3)
    if keras.config.image_data_format() == "channels_first":
        shape = (3, image_size, image_size)
    return build(weights=None, classifier_activation=None, input_shape=shape, **options)


def _is_front(layer: Any) -> bool:
    return type(layer).__name__ in ("Normalization", "Rescaling")


def _keras_front(model: Any) -> Any:
    """The part of the network that normalises images; None where there is none."""
    import keras

    fronts = [layer for layer in model.layers if _is_front(layer)]
    return keras.Model(model.input, fronts[-1].output) if fronts else None


def _fill_keras(model: Any, weights: RandomWeights, images: np.ndarray) -> None:
    import torch

    names = {layer.name for layer in model.layers}
    for layer in model.layers:
        kind = type(layer).__name__
        if kind in ("Conv2D", "DepthwiseConv2D", "Dense"):
            shape = tuple(layer.get_weights()[0].shape)
            fan_in = int(np.prod(shape[:2] if kind == "DepthwiseConv2D" else shape[:-1]))
            values = [weights.kernel(shape, fan_in)]
            if layer.use_bias:
                values.append(weights.shift(shape[-1]))
            layer.set_weights(values)
        elif kind == "BatchNormalization":
            size = len(layer.get_weights()[0])
            block, _, role = layer.name.partition("_")
            damped = f"{block}_add" in names and role == "project_bn"
            scale, shift = weights.scale(size, damped=damped), weights.shift(size)
            layer.set_weights([scale, shift, np.zeros(size), np.ones(size)])
            layer.momentum = 0.0
        elif kind == "Dropout":
            layer.rate = 0.0
    with torch.no_grad():
        model(torch.from_numpy(images), training=True)
    for layer in model.layers:
        if type(layer).__name__ == "BatchNormalization":
            scale, shift, mean, variance = layer.get_weights()
            layer.set_weights([scale, shift, *weights.move(mean, variance)])
            layer.momentum = _BN_DECAY


def main() -> None:
    """Writes the file and the numbers of one network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True)
    parser.add_argument("--variant", required=True, help="our name of it")
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--file", required=True, help="name of the file of weights")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    folder = Path(args.folder)
    numbers = (run_keras if args.peer == "keras" else run_torch)(args, folder)
    np.savez(folder / "numbers.npz", **numbers)


if __name__ == "__main__":
    main()
