"""PyTorch's side of a benchmark: `timm`, `timm-compile` (torch.compile) and `torchvision`.

Each in the form that its users are told is the fastest: channels last, and bfloat16 by autocast.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import timm
import timm.data
import timm.optim
import timm.utils
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from effnetv2_jax.benchmark.protocol import Program, Unavailable, Work, image_paths, serve

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(name: str, work: Work) -> Program:
    """The program of that name, ready."""
    torch.set_num_threads(work.threads)
    if work.kind == "input":
        run = _input(name, work)
    else:
        if work.depth_multiplier != 1.0:
            raise Unavailable(f"{name} has networks of one depth")
        model = _create(name, work).to(_DEVICE, memory_format=torch.channels_last)
        images = torch.rand(work.batch_size, 3, work.image_size, work.image_size)
        images = images.to(_DEVICE, memory_format=torch.channels_last)
        forward: Any = torch.compile(model) if name == "timm-compile" else model
        if work.kind == "predict":
            run = _prediction(name, work, forward.eval())
        else:
            run = (_training if work.kind == "train" else _inference)(work, model, forward, images)
    run(3)
    on_gpu = _DEVICE.type == "cuda"
    library = torchvision if name == "torchvision" else timm
    return Program(
        versions=f"{library.__name__} {library.__version__}, torch {torch.__version__}",
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        run=run,
        peak_bytes=torch.cuda.max_memory_allocated if on_gpu else None,
    )


def _create(name: str, work: Work) -> Any:
    own = work.variant.replace("-", "_")
    if name == "torchvision":
        own = own.replace("efficientnetv2", "efficientnet_v2")
        if own not in torchvision.models.list_models():
            raise Unavailable(f"torchvision has no {work.variant}")
        return torchvision.models.get_model(own, dropout=0.2)
    # The padding of the variants without `tf_` is the cheaper one.
    for candidate in (own, f"tf_{own}"):
        if timm.is_model(candidate):
            return timm.create_model(candidate, drop_rate=0.2, drop_path_rate=0.2)
    raise Unavailable(f"timm has no {work.variant}")


def _precision(work: Work) -> Any:
    if work.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(_DEVICE.type, dtype=getattr(torch, work.dtype))


def _training(
    work: Work, model: Any, forward: Callable[[Any], Any], images: Any
) -> Callable[[int], None]:
    """What the other programs do too: smoothed cross-entropy, RMSProp as in TF1, an average."""
    model.train()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="rmsproptf", lr=1e-3, weight_decay=1e-5, momentum=0.9, alpha=0.9, eps=1e-3
    )
    average = timm.utils.ModelEmaV3(model, decay=0.9999)
    loss_function = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    labels = torch.arange(work.batch_size, device=_DEVICE)

    def run(repetitions: int) -> None:
        for _ in range(repetitions):
            optimizer.zero_grad(set_to_none=True)
            with _precision(work):
                loss = loss_function(forward(images), labels)
            loss.backward()
            optimizer.step()
            average.update(model)
        loss.item()

    return run


def _inference(
    work: Work, model: Any, forward: Callable[[Any], Any], images: Any
) -> Callable[[int], None]:
    model.eval()

    def run(repetitions: int) -> None:
        with torch.inference_mode(), _precision(work):
            for _ in range(repetitions):
                logits = forward(images)
            logits[0, 0].item()

    return run


class _Files(torch.utils.data.IterableDataset):
    """Images without end, each worker of a loader with its own share."""

    def __init__(self, paths: list[str], load: Callable[[str], Any]):
        self._paths = paths
        self._load = load

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = torch.utils.data.get_worker_info()
        own = self._paths[worker.id :: worker.num_workers] if worker else self._paths
        for path in itertools.cycle(own):
            yield self._load(path), 0


def _input(name: str, work: Work) -> Callable[[int], None]:
    """Each library's loader: as many workers as threads, uint8 batches without normalisation."""
    if name == "timm-compile":
        raise Unavailable("timm-compile reads files as timm does")
    magnitude = work.randaug_magnitude
    load = (_load_torchvision if name == "torchvision" else _load_timm)(work.image_size, magnitude)
    batches = _batches(work, load)

    def run(repetitions: int) -> None:
        for _ in itertools.islice(batches, repetitions):
            pass

    return run


def _batches(work: Work, load: Callable[[str], Any]) -> Iterator[tuple[Any, Any]]:
    """Batches of (images, labels) without end, by as many workers as threads."""
    loader = torch.utils.data.DataLoader(
        _Files(image_paths(work), load),
        batch_size=work.batch_size,
        num_workers=work.threads,
        prefetch_factor=2,
    )
    return iter(loader)


def _prediction(name: str, work: Work, forward: Callable[[Any], Any]) -> Callable[[int], None]:
    """Files to the five likeliest classes, with each library's transforms for evaluation."""
    size = work.image_size
    of_timm: Any = timm.data.create_transform(size, is_training=False)
    of_torchvision = v2.Compose(
        [
            v2.Resize(size, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )

    def load(path: str) -> Any:
        if name == "torchvision":
            return of_torchvision(torchvision.io.decode_image(path, mode="RGB"))
        with Image.open(path) as image:
            return of_timm(image.convert("RGB"))

    batches = _batches(work, load)

    def run(repetitions: int) -> None:
        with torch.inference_mode(), _precision(work):
            for images, _ in itertools.islice(batches, repetitions):
                images = images.to(_DEVICE, memory_format=torch.channels_last)
                forward(images).topk(5)[1].tolist()

    return run


def _load_timm(image_size: int, magnitude: float | None) -> Callable[[str], Any]:
    # By itself timm leaves out half of the drawn operations.
    policy = None if magnitude is None else f"rand-m{magnitude:g}-n2-p1.0"
    # A loader of timm normalises on the device: the first two of its three transforms.
    transform = timm.data.create_transform(
        image_size, is_training=True, auto_augment=policy, color_jitter=None, use_prefetcher=True
    )

    def load(path: str) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(transform(image.convert("RGB")))

    return load


def _load_torchvision(image_size: int, magnitude: float | None) -> Callable[[str], Any]:
    steps: list[Any] = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
    if magnitude is not None:
        # Its scale ends at 30, where ours and timm's reach the same strengths at 10.
        steps.append(v2.RandAugment(num_ops=2, magnitude=int(min(3 * magnitude, 30))))
    transform = v2.Compose(steps)

    def load(path: str) -> Any:
        return transform(torchvision.io.decode_image(path, mode="RGB"))

    return load


if __name__ == "__main__":
    serve(prepare)
