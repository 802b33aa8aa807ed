"""Stanford Cars in miniature, in both layouts of its archive."""

import logging

import numpy as np
import pytest
from scipy.io import savemat

from effnetv2_jax.data.datasets import load_dataset
from effnetv2_jax.errors import InputError

NAMES = [f"Maker Model {i} 2012" for i in range(196)]
# (file, class, test), in no order.
ROWS = [(3, 7, 0), (1, 196, 0), (2, 1, 1), (5, 30, 0), (4, 7, 1)]
BOXES = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def structs(rows, *names):
    """A MATLAB struct array 1xN with these fields."""
    array = np.empty((1, len(rows)), [(name, object) for name in names])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row)
    return array


def cells(strings):
    array = np.empty((1, len(strings)), object)
    array[0] = strings
    return array


@pytest.fixture
def write_image(encode, picture):
    def write(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(int(path.stem))))

    return write


@pytest.fixture
def one_folder(tmp_path, write_image):
    """car_ims/ and cars_annos.mat."""
    rows = []
    for number, label, test in ROWS:
        write_image(tmp_path / "car_ims" / f"{number:06d}.jpg")
        rows.append((f"car_ims/{number:06d}.jpg", 1, 2, 30, 20, label, test))
    annotations = structs(rows, "relative_im_path", *BOXES, "class", "test")
    savemat(tmp_path / "cars_annos.mat", {"annotations": annotations, "class_names": cells(NAMES)})
    return tmp_path


@pytest.fixture
def two_folders(tmp_path, write_image):
    """cars_train/, cars_test/, the lists in devkit/, and the test labels beside it."""
    devkit = tmp_path / "devkit"
    devkit.mkdir()
    for split, test, path in (
        ("train", 0, devkit / "cars_train_annos.mat"),
        ("test", 1, tmp_path / "cars_test_annos_withlabels.mat"),
    ):
        rows = [(1, 2, 30, 20, y, f"{n:05d}.jpg") for n, y, part in ROWS if part == test]
        for *_, name in rows:
            write_image(tmp_path / f"cars_{split}" / name)
        savemat(path, {"annotations": structs(rows, *BOXES, "class", "fname")})
    savemat(devkit / "cars_meta.mat", {"class_names": cells(NAMES)})
    return tmp_path


@pytest.fixture(params=["one_folder", "two_folders"])
def root(request):
    return request.getfixturevalue(request.param)


def numbers_and_labels(source):
    """[(the file's number, label)] of a source."""
    stream = source.eval_stream(batch_size=1, process_index=0, process_count=1)
    return [
        (int(source.describe(int(row["index"])).split("/")[-1][:-5]), int(row["label"]))
        for row in stream.as_numpy_iterator()
    ]


def test_both_layouts_give_the_same_examples(root, encode, picture, caplog):
    dataset = load_dataset(f"cars:{root}")
    assert dataset.num_classes == 196 and dataset.class_names == tuple(NAMES)
    assert numbers_and_labels(dataset.train) == [(1, 195), (3, 6), (5, 29)]
    assert numbers_and_labels(dataset.eval) == [(2, 0), (4, 6)]
    stream = dataset.train.eval_stream(batch_size=1, process_index=0, process_count=1)
    assert next(stream.as_numpy_iterator())["image"] == encode(picture(1))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "The train split of Cars has 3 images, and the published one 8144.",
        "The test split of Cars has 2 images, and the published one 8041.",
    ]


def test_a_minival_of_cars(root):
    dataset = load_dataset(f"cars:{root}", minival_examples=1)
    train, minival = numbers_and_labels(dataset.train), numbers_and_labels(dataset.minival)
    assert sorted(train + minival) == [(1, 195), (3, 6), (5, 29)] and len(minival) == 1


def test_the_test_labels_may_lie_in_the_devkit(two_folders):
    name = "cars_test_annos_withlabels.mat"
    (two_folders / name).rename(two_folders / "devkit" / name)
    assert load_dataset(f"cars:{two_folders}").eval.num_examples == 2


def test_class_names_are_optional(two_folders):
    (two_folders / "devkit" / "cars_meta.mat").unlink()
    dataset = load_dataset(f"cars:{two_folders}")
    assert dataset.class_names is None and dataset.num_classes == 196


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("cars_annos.mat", "cars_annos.mat' is missing: .* must have either car_ims/"),
        ("car_ims", "car_ims' is missing: .* must have either car_ims/"),
        ("car_ims/000004.jpg", "000004.jpg' is in the list and missing"),
    ],
)
def test_a_piece_that_is_missing_from_one_folder(one_folder, piece, message):
    (one_folder / piece).rename(one_folder / "elsewhere")
    with pytest.raises(InputError, match=message):
        load_dataset(f"cars:{one_folder}")


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("devkit/cars_train_annos.mat", "cars_train_annos.mat' is missing: .* car_ims/"),
        ("cars_test_annos_withlabels.mat", "withlabels.mat' is missing: .* car_ims/"),
        ("cars_test", "cars_test' is missing: .* car_ims/"),
        ("cars_train/00003.jpg", "cars_train/00003.jpg' is in the list and missing"),
        ("devkit", "cars_train_annos.mat' is missing"),
    ],
)
def test_a_piece_that_is_missing_from_two_folders(two_folders, piece, message):
    (two_folders / piece).rename(two_folders / "elsewhere")
    with pytest.raises(InputError, match=message):
        load_dataset(f"cars:{two_folders}")


def test_lists_that_are_no_lists(two_folders):
    path = two_folders / "devkit" / "cars_train_annos.mat"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"cars_train_annos\.mat' cannot be read"):
        load_dataset(f"cars:{two_folders}")
    # The list of the test split without labels has no classes.
    savemat(path, {"annotations": structs([(1, 2, 30, 20, "00001.jpg")], *BOXES, "fname")})
    with pytest.raises(InputError, match="has no class in its annotations"):
        load_dataset(f"cars:{two_folders}")
    savemat(path, {"something": 1})
    with pytest.raises(InputError, match="has no class and no fname"):
        load_dataset(f"cars:{two_folders}")
    row = (1, 2, 30, 20, 197, "00001.jpg")
    savemat(path, {"annotations": structs([row], *BOXES, "class", "fname")})
    with pytest.raises(InputError, match=r"class 197 of '.*00001.jpg' is outside 1 \.\. 196"):
        load_dataset(f"cars:{two_folders}")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere' is not a folder"):
        load_dataset(f"cars:{tmp_path / 'nowhere'}")
