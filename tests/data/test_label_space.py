"""Label spaces: order, hierarchy, maps between spaces, and files."""

import numpy as np
import pytest

from effnetv2_jax.data.label_space import LabelSpace
from effnetv2_jax.errors import InputError

ENTITY, ANIMAL, DOG, PUPPY, CAR = (f"n0000000{i}" for i in range(5))


@pytest.fixture
def files(tmp_path):
    """WordNet's two files: entity > animal > dog > puppy, and entity > car."""
    is_a = tmp_path / "wordnet.is_a.txt"
    pairs = [(ENTITY, ANIMAL), (ANIMAL, DOG), (DOG, PUPPY), (ENTITY, CAR)]
    is_a.write_text("".join(f"{parent} {child}\n" for parent, child in pairs))
    words = tmp_path / "words.txt"
    words.write_text(f"{DOG}\tdog, domestic dog\n{CAR}\tcar\n")
    return {"words": words, "is_a": is_a}


def test_synsets_are_sorted_and_looked_up(files):
    space = LabelSpace.from_wordnet("pets", [PUPPY, CAR, DOG], **files)
    assert space.synsets == (DOG, PUPPY, CAR)
    assert space.size == 3
    assert [space.index(s) for s in (CAR, DOG, PUPPY)] == [2, 0, 1]
    assert space.human_names == ("dog, domestic dog", PUPPY, "car")
    with pytest.raises(InputError, match=f"unknown synset of pets '{ANIMAL}'"):
        space.index(ANIMAL)


def test_ancestors_are_found_across_synsets_outside_the_space(files):
    space = LabelSpace.from_wordnet("all", [ENTITY, DOG, PUPPY, CAR], **files)
    assert [space.ancestors(i) for i in range(4)] == [(), (0,), (0, 1), (0,)]


def test_a_cycle_in_the_hierarchy_ends(tmp_path):
    (tmp_path / "is_a").write_text(f"{ANIMAL} {DOG}\n{DOG} {ANIMAL}\n")
    space = LabelSpace.from_wordnet("loop", [ANIMAL, DOG], is_a=tmp_path / "is_a")
    assert [space.ancestors(i) for i in range(2)] == [(1,), (0,)]


def test_without_a_hierarchy_nothing_has_ancestors():
    assert LabelSpace("flat", (DOG, PUPPY)).ancestors(1) == ()


def test_rows_in_another_space():
    small, large = LabelSpace("small", (ENTITY, DOG, CAR)), LabelSpace("large", (ANIMAL, DOG, CAR))
    rows = small.rows_in(large)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, [-1, 1, 2])
    np.testing.assert_array_equal(large.rows_in(small), [-1, 1, 2])


def test_a_saved_space_is_the_same_again(files, tmp_path):
    space = LabelSpace.from_wordnet("pets", [DOG, CAR], **files)
    space.save(tmp_path / "space.json")
    loaded = LabelSpace.load(tmp_path / "space.json")
    assert loaded == space
    assert loaded.parents == {ANIMAL: (ENTITY,), DOG: (ANIMAL,), CAR: (ENTITY,)}


@pytest.mark.parametrize(
    ("synsets", "names", "message"),
    [
        ((), (), "has no synsets"),
        (("dog",), (), "'dog' in the label space 'x' is not a synset"),
        ((DOG, ANIMAL), (), f"'{ANIMAL}' follows '{DOG}'"),
        ((DOG, DOG), (), "without repetition"),
        ((DOG, CAR), ("dog",), "1 names for 2 synsets"),
    ],
)
def test_a_malformed_space_is_refused(synsets, names, message):
    with pytest.raises(InputError, match=message):
        LabelSpace("x", synsets, names)


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}', '{"name": "x", "synsets": 3}'])
def test_a_file_that_holds_no_space_is_refused(tmp_path, content):
    (tmp_path / "space.json").write_text(content)
    with pytest.raises(InputError, match="holds no label space"):
        LabelSpace.load(tmp_path / "space.json")


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json' cannot be read"):
        LabelSpace.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="words' cannot be read"):
        LabelSpace.from_wordnet("x", [DOG], words=tmp_path / "words")
    (tmp_path / "is_a").write_text(f"{ENTITY} {DOG}\n\n{DOG}\n")
    with pytest.raises(InputError, match=r"line 3 of .*is_a.*a second field after a space"):
        LabelSpace.from_wordnet("x", [DOG], is_a=tmp_path / "is_a")
    (tmp_path / "words").write_text("dog\n")
    with pytest.raises(InputError, match=r"line 1 of .*after a tab"):
        LabelSpace.from_wordnet("x", [DOG], words=tmp_path / "words")
