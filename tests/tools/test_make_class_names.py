"""The names of ImageNet-1k's classes: what is committed, and how it is made."""

import importlib.resources
from pathlib import Path

import pytest

from effnetv2_jax.data.label_space import IMAGENET1K_FILE, imagenet1k_label_space
from effnetv2_jax.errors import InputError
from effnetv2_jax.tools.make_class_names import class_names, imagenet1k_synsets

DEBIAN = Path("/usr/share/wordnet/data.noun")
NOTICE = "  1 Some words.  \n  2   \n  3 WordNet 3.0 Copyright 2006 by Princeton University.  \n"
LINES = (
    "01440764 05 n 02 tench 0 Tinca_tinca 0 002 @ 01439121 n 0000 | a fish  \n"
    "02123394 05 n 01 Persian_cat 0 001 @ 02121808 n 0000 | a cat  \n"
    # Ten words: their number is hexadecimal.
    "09999999 05 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 1 001 @ 02121808 n 0000 | letters  \n"
)


def committed_text():
    file = importlib.resources.files("effnetv2_jax.data") / IMAGENET1K_FILE
    return file.read_text(encoding="utf-8")


def test_the_committed_names():
    space = imagenet1k_label_space()
    assert space.name == "imagenet2012" and space.size == 1000
    first_words = {0: "tench", 281: "tabby", 283: "Persian cat", 985: "daisy", 967: "espresso"}
    first_words |= {812: "space shuttle", 134: "crane", 517: "crane", 999: "toilet tissue"}
    found = {index: space.human_names[index].split(", ")[0] for index in first_words}
    assert found == first_words
    assert space.synsets[0] == "n01440764" and space.synsets[999] == "n15075141"
    assert all(name == name.strip() and "_" not in name for name in space.human_names)
    assert imagenet1k_label_space() is space


def test_the_order_is_that_of_tfds():
    assert imagenet1k_label_space().synsets == tuple(imagenet1k_synsets())


def test_the_committed_file_has_wordnets_licence():
    head = "".join(line for line in committed_text().splitlines(True) if line.startswith("#"))
    for words in ("WordNet 3.0 Copyright 2006 by Princeton University", 'PROVIDED "AS IS"'):
        assert words in head


@pytest.mark.skipif(not DEBIAN.exists(), reason="Debian's package wordnet-base is not installed")
def test_the_committed_file_is_what_the_tool_writes():
    assert class_names(DEBIAN, imagenet1k_synsets()) == committed_text()


def test_names_in_miniature(tmp_path):
    file = tmp_path / "data.noun"
    file.write_text(NOTICE + LINES)
    text = class_names(file, ["n02123394", "n01440764", "n09999999"])
    assert text.splitlines()[3:] == [
        "# Some words.",
        "#",
        "# WordNet 3.0 Copyright 2006 by Princeton University.",
        "n02123394\tPersian cat",
        "n01440764\ttench, Tinca tinca",
        "n09999999\ta, b, c, d, e, f, g, h, i, j",
    ]


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "data.noun"
    with pytest.raises(InputError, match=r"cannot be read: name WordNet's data\.noun"):
        class_names(file, [])
    file.write_text(NOTICE + LINES)
    with pytest.raises(InputError, match=r"lacks the synset n00000001: name WordNet 3\.0's"):
        class_names(file, ["n01440764", "n00000001"])
    file.write_text(LINES)
    with pytest.raises(InputError, match=r"lacks the licence of WordNet 3\.0"):
        class_names(file, ["n01440764"])
