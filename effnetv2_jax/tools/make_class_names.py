"""Names the classes of ImageNet-1k: `python -m effnetv2_jax.tools.make_class_names`.

It reads the nouns' file of WordNet 3.0, `data.noun`, as in Debian's package `wordnet-base`. The
classes are those of TFDS's imagenet2012, in its order. The result is committed, so only a change of
its form calls for this. Exit status: 0 done, 2 bad input.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from effnetv2_jax import command_line
from effnetv2_jax.data.label_space import IMAGENET1K_FILE
from effnetv2_jax.errors import InputError


def class_names(data_noun: Path, synsets: Sequence[str]) -> str:
    """A file of lines `n01440764<TAB>tench, Tinca tinca` below WordNet's licence as `#` lines.

    Args:
      data_noun: WordNet's file. It begins with the licence, each line after two blanks and its
        number; then come lines `01440764 05 n 02 tench 0 Tinca_tinca 0 ...`: the offset, two
        fields, the number of words in hexadecimal digits, and each word with a number (wndb(5)).
      synsets: the letter n and the offset of each class.

    Raises:
      InputError: the file cannot be read, is another one, or lacks a synset.
    """
    try:
        lines = data_noun.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(data_noun)!r} cannot be read: name WordNet's data.noun.") from error
    notice = [line.split(maxsplit=1)[1:] for line in lines if line.startswith("  ")]
    words = {}
    for line in lines:
        fields = line.split()
        if not line.startswith("  ") and len(fields) > 4 and fields[2] == "n":
            lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words[f"n{fields[0]}"] = ", ".join(lemmas).replace("_", " ")
    missing = [synset for synset in synsets if synset not in words]
    if missing or not any("WordNet 3.0 Copyright" in part for line in notice for part in line):
        lacks = f"the synset {missing[0]}" if missing else "the licence of WordNet 3.0"
        raise InputError(f"{str(data_noun)!r} lacks {lacks}: name WordNet 3.0's data.noun.")
    head = [
        "The words of WordNet 3.0 for each class of ImageNet-1k, in the order of the labels.",
        "Written by effnetv2_jax.tools.make_class_names; WordNet's licence:",
        "",
        *("".join(line).rstrip() for line in notice),
    ]
    rows = [f"{synset}\t{words[synset]}" for synset in synsets]
    return "\n".join([*(f"# {line}".rstrip() for line in head), *rows]) + "\n"


def imagenet1k_synsets() -> list[str]:
    """The synsets in the order of TFDS's imagenet2012."""
    folder = importlib.resources.files("tensorflow_datasets")
    file = folder / "datasets" / "imagenet2012" / "labels.txt"
    return file.read_text(encoding="utf-8").split()


def _define_flags() -> None:
    target = Path(__file__).parents[1] / "data" / IMAGENET1K_FILE
    flags.DEFINE_string("data_noun", "/usr/share/wordnet/data.noun", "WordNet 3.0's nouns.")
    flags.DEFINE_string("output", str(target), "The file to write.")


def main(arguments: list[str]) -> None:
    """The command line."""
    del arguments
    text = class_names(Path(flags.FLAGS.data_noun), imagenet1k_synsets())
    Path(flags.FLAGS.output).write_text(text, encoding="utf-8")
    print(f"Wrote {flags.FLAGS.output}.")


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        usage="python -m effnetv2_jax.tools.make_class_names --data_noun=data.noun",
    )
