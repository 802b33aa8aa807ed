"""Label spaces: which synset of WordNet each class of a data set stands for.

A head of 21,841 outputs and one of 1,000 are compared by their synsets, never by position: the
releases of ImageNet-21k differ in size (fall 2011 has 21,841 classes, winter 2021 has 19,167).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from effnetv2_jax.errors import InputError, unknown_name

# A noun of WordNet 3.0: the letter n and its offset in the data base, eight digits.
SYNSET = re.compile(r"n\d{8}")
# The names under which image-net.org publishes WordNet's words and its hierarchy.
WORDS_FILE = "words.txt"
IS_A_FILE = "wordnet.is_a.txt"
# Beside this file; `tools.make_class_names` wrote it.
IMAGENET1K_FILE = "imagenet1k_classes.tsv"


@dataclasses.dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set in label order.

    Attributes:
      name: of the data set, for instance `imagenet21k/winter21`.
      synsets: the WordNet id of each class, sorted, for instance `n01440764`.
      human_names: the words for each class in the same order, or nothing.
      parents: the parents of each synset and of its ancestors, in this space or outside it;
        empty where the hierarchy is not known.

    Raises:
      InputError: the synsets are none, malformed, repeated or unsorted, or the names are of
        another number.
    """

    name: str
    synsets: tuple[str, ...]
    human_names: tuple[str, ...] = ()
    parents: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.synsets:
            raise InputError(f"the label space {self.name!r} has no synsets: give one or more.")
        for synset in self.synsets:
            if not SYNSET.fullmatch(synset):
                raise InputError(
                    f"{synset!r} in the label space {self.name!r} is not a synset: write the "
                    "letter n and eight digits, as n01440764."
                )
        for first, second in zip(self.synsets, self.synsets[1:], strict=False):
            if first >= second:
                raise InputError(
                    f"{second!r} follows {first!r} in the label space {self.name!r}: synsets must "
                    "be sorted and without repetition."
                )
        if self.human_names and len(self.human_names) != self.size:
            raise InputError(
                f"the label space {self.name!r} has {len(self.human_names)} names for {self.size} "
                "synsets: give one for each, or none."
            )

    @property
    def size(self) -> int:
        """The number of classes."""
        return len(self.synsets)

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        return {synset: index for index, synset in enumerate(self.synsets)}

    def index(self, synset: str) -> int:
        """The label of a synset.

        Raises:
          InputError: it is not in this space.
        """
        if synset not in self._indices:
            raise unknown_name(f"synset of {self.name}", synset, self.synsets)
        return self._indices[synset]

    def ancestors(self, index: int) -> tuple[int, ...]:
        """The labels above the class `index`, sorted; the way there may lead outside the space."""
        found: set[str] = set()
        frontier = [self.synsets[index]]
        while frontier:
            new = set(self.parents.get(frontier.pop(), ())) - found
            found |= new
            frontier.extend(new)
        found.discard(self.synsets[index])
        return tuple(sorted(self._indices[s] for s in found if s in self._indices))

    def rows_in(self, other: LabelSpace) -> np.ndarray:
        """Where the classes of this space are in another one.

        With `space_1k.rows_in(space_21k)` the outputs of a head for 21k are read as one for 1k.

        Returns:
          int32 [self.size]: the label in `other` of each class here, or -1 if it has none.
        """
        return np.array([other._indices.get(synset, -1) for synset in self.synsets], np.int32)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the space as JSON."""
        epath.Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LabelSpace:
        """Reads what `save` wrote.

        Raises:
          InputError: the file is missing or holds no label space.
        """
        try:
            fields = json.loads(_read_text(path, "save a label space there"))
            return cls(
                name=str(fields["name"]),
                synsets=tuple(fields["synsets"]),
                human_names=tuple(fields["human_names"]),
                parents={child: tuple(above) for child, above in fields["parents"].items()},
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{os.fspath(path)!r} holds no label space ({error!r}): write it with "
                "LabelSpace.save."
            ) from error

    @classmethod
    def from_wordnet(
        cls,
        name: str,
        synsets: Iterable[str],
        *,
        words: str | os.PathLike[str] | None = None,
        is_a: str | os.PathLike[str] | None = None,
    ) -> LabelSpace:
        """Makes a space of synsets in any order, with what WordNet says of them.

        Args:
          name: of the data set.
          synsets: the WordNet ids of the classes.
          words: a file of lines `n01440764<TAB>tench, Tinca tinca`; a synset that it lacks is
            called by its id.
          is_a: a file of lines `parent child`.

        Raises:
          InputError: a file is missing or a line of it is not of that form.
        """
        ordered = tuple(sorted(synsets))
        human_names: tuple[str, ...] = ()
        if words is not None:
            known = dict(_pairs(words, "\t"))
            human_names = tuple(known.get(synset, synset) for synset in ordered)
        parents = {} if is_a is None else _parents(ordered, _pairs(is_a, None))
        return cls(name, ordered, human_names, parents)


@functools.cache
def imagenet1k_label_space() -> LabelSpace:
    """The 1000 classes of ImageNet-1k with WordNet's words, as TFDS's imagenet2012 orders them."""
    file = importlib.resources.files(__package__) / IMAGENET1K_FILE
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    synsets, names = zip(*pairs, strict=True)
    return LabelSpace("imagenet2012", synsets, names)


def _parents(
    synsets: Iterable[str], pairs: Iterable[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    """The parents of the synsets and of all their ancestors."""
    above: dict[str, set[str]] = {}
    for parent, child in pairs:
        above.setdefault(child, set()).add(parent)
    kept: dict[str, tuple[str, ...]] = {}
    frontier = list(synsets)
    while frontier:
        synset = frontier.pop()
        if synset in above and synset not in kept:
            kept[synset] = tuple(sorted(above[synset]))
            frontier.extend(kept[synset])
    return dict(sorted(kept.items()))


def _pairs(path: str | os.PathLike[str], separator: str | None) -> list[tuple[str, str]]:
    """The two fields of every line that is not blank."""
    pairs = []
    text = _read_text(path, "get it from image-net.org or leave it out")
    for number, line in enumerate(text.splitlines(), 1):
        fields: list[Any] = line.strip().split(separator, 1)
        if fields == [""] or not fields:
            continue
        if len(fields) != 2 or not SYNSET.fullmatch(fields[0]):
            raise InputError(
                f"line {number} of {os.fspath(path)!r}, {line[:60]!r}, must be a synset and a "
                f"second field after {'a tab' if separator else 'a space'}."
            )
        pairs.append((fields[0], fields[1].strip()))
    return pairs


def _read_text(path: str | os.PathLike[str], remedy: str) -> str:
    try:
        return epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)!r} cannot be read: {remedy}.") from error
