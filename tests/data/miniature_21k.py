"""A miniature of ImageNet-21k's archive in its real layout, with its real troubles."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image

# Four classes with images and one without. `dog` is under `animal`, and so is `empty`; `entity`,
# between `animal` and the root, is outside the archive.
ANIMAL, DOG, CAT, EMPTY, CAR = "n00000010", "n00000020", "n00000030", "n00000040", "n00000050"
ENTITY = "n00000001"
SYNSETS = (ANIMAL, DOG, CAT, EMPTY, CAR)
IMAGES_PER_CLASS = 8
# The same bytes under dog and under cat, where they have the names (dog 0, cat 100).
SHARED = (f"{DOG}_0.JPEG", f"{CAT}_100.JPEG")
CMYK, PNG, TRUNCATED = f"{CAT}_1.JPEG", f"{CAR}_1.JPEG", f"{CAR}_2.JPEG"
NUM_IMAGES = 4 * IMAGES_PER_CLASS - 1  # The shared image counts once and the truncated one not.


def encode(seed: int, file_format: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth random picture of 40 x 30 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((40, 30), Image.Resampling.BILINEAR).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


def images() -> dict[str, dict[str, bytes]]:
    """Synset -> file name -> bytes of the file."""
    classes = {
        synset: {f"{synset}_{i}.JPEG": encode(100 * number + i) for i in range(IMAGES_PER_CLASS)}
        for number, synset in enumerate(SYNSETS)
        if synset != EMPTY
    }
    classes[EMPTY] = {}
    classes[CAT][SHARED[1]] = classes[DOG][SHARED[0]]
    classes[CAT][CMYK] = encode(1, mode="CMYK")
    classes[CAR][PNG] = encode(2, "PNG")
    classes[CAR][TRUNCATED] = classes[CAR][TRUNCATED][:-200]
    return classes


def tar_of(files: dict[str, bytes]) -> bytes:
    """The bytes of a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(manual_dir, archive="winter21_whole", classes=None, with_folder=True):
    """Writes `archive`.tar and WordNet's two files into `manual_dir`; returns the tar's path.

    `with_folder` is winter 2021's layout, a folder inside the tar, and without is fall 2011's.
    """
    classes = images() if classes is None else classes
    prefix = f"{archive}/" if with_folder else ""
    manual_dir.mkdir(parents=True, exist_ok=True)
    path = manual_dir / f"{archive}.tar"
    path.write_bytes(tar_of({f"{prefix}{s}.tar": tar_of(classes[s]) for s in sorted(classes)}))
    pairs = [(ENTITY, ANIMAL), (ANIMAL, DOG), (ANIMAL, CAT), (ANIMAL, EMPTY), (ENTITY, CAR)]
    (manual_dir / "wordnet.is_a.txt").write_text("".join(f"{p} {c}\n" for p, c in pairs))
    words = {ANIMAL: "animal, beast", DOG: "dog", CAT: "cat", EMPTY: "unicorn", CAR: "car"}
    (manual_dir / "words.txt").write_text("".join(f"{s}\t{w}\n" for s, w in words.items()))
    return path
