"""Classes, features and class activation maps of image files, by a model folder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effnetv2_jax.data.label_space import LabelSpace, imagenet1k_label_space
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.parallel import ParallelForward
from effnetv2_jax.steps import normalize
from effnetv2_jax.weights.model_folder import ModelSpec, load_model

if TYPE_CHECKING:
    from effnetv2_jax.data.image_files import ImageBatch

_SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """What the network gives one class.

    Attributes:
      index: position in the logits.
      class_id: the class's identifier, for instance its synset, or else the index.
      name: its words, or else the identifier.
      probability: 0 .. 1; over the classes they add up to 1 unless `ModelSpec.scores` is sigmoid.
    """

    index: int
    class_id: str
    name: str
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What is said of one image.

    Attributes:
      path: of the file.
      classes: the likeliest ones, best first; none where there is an error.
      error: what is wrong with the file, as a predicate (`is empty`), or None.
      endpoints: of those asked for, without the batch's axis, for instance `pooled` [C].
      image: uint8 [S, S, 3], as the network saw it before normalisation; with `cam` only.
      cam: float32 [S, S], Grad-CAM of the likeliest class, 0 or more; if asked for.
    """

    path: str
    classes: tuple[ClassScore, ...]
    error: str | None = None
    endpoints: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    image: np.ndarray | None = None
    cam: np.ndarray | None = None


class Predictor:
    """Predicts on this process's devices; all about the images comes from the `ModelSpec`.

    Attributes:
      spec: of the model.
      batch_size: images that are computed at once, at most.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | tuple[Any, Mapping[str, Any], ModelSpec],
        *,
        batch_size: int = 32,
        label_space: LabelSpace | None = None,
    ):
        """Loads a model.

        Args:
          model: a model folder, or what `load_model` returns.
          batch_size: images that are computed at once, at most.
          label_space: names the classes instead of the model's own names.

        Raises:
          InputError: no model is there, or the label space is of another number of classes.
        """
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} must be 1 or more.")
        if isinstance(model, (str, os.PathLike)):
            model = load_model(model)
        self._model, variables, self.spec = model
        self.batch_size = batch_size
        self._class_ids, self._names = class_labels(self.spec, label_space)
        self._variable_shapes = jax.eval_shape(lambda: dict(variables))
        self._forward = ParallelForward(
            self._compute, dict(variables), options=("top_k", "endpoints", "cam")
        )

    def endpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each endpoint of one image, `reduction_1` ... `pooled`, `logits`."""
        size = self.spec.eval_size
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        apply = functools.partial(self._model.apply, return_features=True)
        shapes = jax.eval_shape(apply, self._variable_shapes, image)
        return {name: leaf.shape[1:] for name, leaf in shapes.items()}

    def predict(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        top_k: int = 5,
        endpoints: Sequence[str] = (),
        cam: bool = False,
    ) -> Iterator[Prediction]:
        """Predicts image files while later ones are decoded.

        Args:
          paths: of JPEG, PNG, BMP or GIF files.
          top_k: how many classes to name, at most.
          endpoints: names of `endpoint_shapes` to return.
          cam: whether to compute the class activation map of the likeliest class.

        Returns:
          A prediction for each path in their order. A file that cannot be read or decoded has an
          `error`, and the others go on.

        Raises:
          InputError: an argument is out of range, or the model's crop or resize is unknown.
        """
        from effnetv2_jax.data.image_files import image_file_batches

        if top_k < 1:
            raise InputError(f"top_k {top_k} must be 1 or more classes.")
        if endpoints:
            known = self.endpoint_shapes()
            for name in endpoints:
                if name not in known:
                    raise unknown_name("endpoint", name, known)
        names = [os.fspath(path) for path in paths]
        # A few images are not padded to a whole batch. Powers of two, so that calls with many
        # different numbers of images compile a few programs.
        batch_size = min(self.batch_size, 1 << max(len(names) - 1, 0).bit_length())
        if batch_size > self._forward.num_devices:
            batch_size -= batch_size % self._forward.num_devices
        batches = image_file_batches(
            names,
            batch_size=batch_size,
            image_size=self.spec.eval_size,
            crop=self.spec.crop,
            crop_fraction=self.spec.crop_fraction,
            resize=self.spec.resize,
        )
        options = {
            "top_k": min(top_k, self.spec.num_classes),
            "endpoints": tuple(endpoints),
            "cam": cam,
        }

        def predictions() -> Iterator[Prediction]:
            previous: tuple[ImageBatch, Any] | None = None
            for batch in batches:
                results = self._forward(batch.images, **options)
                # The device works on this batch while the host reads the one before.
                if previous is not None:
                    yield from self._rows(*previous)
                previous = batch, results
            if previous is not None:
                yield from self._rows(*previous)

        return predictions()

    def _compute(
        self,
        variables: dict[str, Any],
        images: jax.Array,
        *,
        top_k: int,
        endpoints: tuple[str, ...],
        cam: bool,
    ) -> dict[str, Any]:
        """The numbers of a batch of uint8 images [N, S, S, 3]."""
        normalized = normalize(images, self.spec.mean, self.spec.std)
        found = self._model.apply(variables, normalized, return_features=True)
        scores = _SCORES[self.spec.scores](found["logits"])
        # By the logits: sigmoids of several classes may round to 1.
        _, indices = lax.top_k(found["logits"], top_k)
        results = {
            "probabilities": jnp.take_along_axis(scores, indices, axis=-1),
            "indices": indices,
            # float32, as NumPy's files know no bfloat16.
            "endpoints": {name: found[name].astype(jnp.float32) for name in endpoints},
        }
        if cam:
            kernel = variables["params"]["classifier"]["kernel"]
            maps = grad_cam(found["features"], kernel, indices[:, 0])
            results["cam"] = jax.image.resize(maps, images.shape[:3], "bilinear")
        return results

    def _rows(self, batch: ImageBatch, results: dict[str, Any]) -> Iterator[Prediction]:
        numbers = jax.device_get(results)
        for row, (path, error) in enumerate(zip(batch.paths, batch.errors, strict=True)):
            if error is not None:
                yield Prediction(path, (), error)
                continue
            scores = zip(numbers["indices"][row], numbers["probabilities"][row], strict=True)
            classes = tuple(
                ClassScore(int(i), self._class_ids[i], self._names[i], float(p)) for i, p in scores
            )
            # Copies: a row that is kept must not keep its batch.
            arrays = {name: value[row].copy() for name, value in numbers["endpoints"].items()}
            if "cam" in numbers:
                image, cam = batch.images[row].copy(), numbers["cam"][row].copy()
                yield Prediction(path, classes, None, arrays, image, cam)
            else:
                yield Prediction(path, classes, None, arrays)


def grad_cam(features: jax.Array, kernel: jax.Array, classes: jax.Array) -> jax.Array:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) on the head's feature map.

    The head averages the map over its positions and multiplies by the classifier's kernel, so
    the gradient of a class's logit is known: its column of the kernel / (h * w), everywhere.

    Args:
      features: [N, h, w, C], the endpoint of this name.
      kernel: [C, num_classes], of the classifier.
      classes: int [N], whose logits are explained.

    Returns:
      float32 [N, h, w], 0 or more.
    """
    _, height, width, _ = features.shape
    weights = jnp.take(kernel, classes, axis=1) / (height * width)
    return jax.nn.relu(jnp.einsum("nhwc,cn->nhw", features.astype(jnp.float32), weights))


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Paints a class activation map over its image, half and half.

    Args:
      image: uint8 [S, S, 3].
      cam: [S, S], 0 or more; its largest value becomes the brightest colour.

    Returns:
      uint8 [S, S, 3].
    """
    import matplotlib

    heat = cam / max(float(cam.max()), np.finfo(np.float32).tiny)
    colours = matplotlib.colormaps["inferno"](heat)[..., :3]
    return np.rint(0.5 * image + 0.5 * 255 * colours).astype(np.uint8)


def class_labels(
    spec: ModelSpec, label_space: LabelSpace | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The identifier and the words of each class.

    Synsets of ImageNet-1k have WordNet's words unless the model has its own. A model of 1000
    classes without identifiers is taken for one of ImageNet-1k, in the order of the sorted
    synsets as all published ones are, unless it names another data set.

    Args:
      spec: of the model.
      label_space: takes the place of what the model says.

    Raises:
      InputError: `label_space` has another number of classes than the model.
    """
    if label_space is not None:
        if label_space.size != spec.num_classes:
            raise InputError(
                f"the label space {label_space.name!r} has {label_space.size} classes and the "
                f"model {spec.num_classes}: give the one that it was trained with."
            )
        return label_space.synsets, label_space.human_names or label_space.synsets
    known = imagenet1k_label_space()
    # `tfrecord:/path` are ImageNet's official files.
    is_imagenet = spec.label_space in (known.name, ModelSpec.label_space) or (
        spec.label_space.startswith("tfrecord:")
    )
    ids = spec.classes
    if ids is None and spec.class_names is None and spec.num_classes == known.size and is_imagenet:
        ids = known.synsets
    if ids is None:
        ids = tuple(str(index) for index in range(spec.num_classes))
    words = dict(zip(known.synsets, known.human_names, strict=True))
    names = spec.class_names or tuple(words.get(name, name) for name in ids)
    return _for_each_output(ids, spec), _for_each_output(names, spec)


def _for_each_output(labels: tuple[str, ...], spec: ModelSpec) -> tuple[str, ...]:
    """Outputs beyond the classes, which stand for none, are called by their number."""
    return (*labels, *(str(index) for index in range(len(labels), spec.num_classes)))


def stack_endpoints(
    predictions: Iterable[Prediction], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The endpoints of all images that are not broken.

    Args:
      predictions: of `Predictor.predict` with these endpoints.
      shapes: of each endpoint of one image, for the case that no image is left.

    Returns:
      `paths` [N] strings, and each endpoint, float32 [N, ...].
    """
    whole = [p for p in predictions if p.error is None]
    paths = np.array([p.path for p in whole], dtype=np.str_)
    arrays: dict[str, np.ndarray] = {"paths": paths}
    for name, shape in shapes.items():
        rows = [p.endpoints[name] for p in whole]
        arrays[name] = np.stack(rows) if rows else np.zeros((0, *shape), np.float32)
    return arrays
