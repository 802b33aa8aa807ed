"""`predict`: which images, every format, pictures and features, and what it refuses."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from effnetv2_jax.data.label_space import LabelSpace
from effnetv2_jax.errors import InputError
from effnetv2_jax.prediction import Predictor, overlay
from effnetv2_jax.tools import predict as tool
from effnetv2_jax.tools.predict import COLUMNS, cam_files, find_images, predict, printable
from tests.tiny_model import EVAL_SIZE, save_tiny_model

ROOT = Path(__file__).parents[2]
NAMES = ("tench, Tinca tinca", "goldfish", "crane", "crane", "Größe", "猫", 'a "b", c')
SYNSETS = tuple(f"n0000000{number}" for number in range(7))
DAMAGED = "is no JPEG, PNG, BMP or GIF image, or is damaged"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    return str(save_tiny_model(path, classes=SYNSETS, class_names=NAMES))


@pytest.fixture
def images(tmp_path):
    """Four images, two of one name, and one broken file among them; in the tool's order."""
    folder = tmp_path / "my images"
    for number, name in enumerate(("a/Größe 猫.png", "a/x,y.bmp", "b/z.PNG", "c/z.gif")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "b" / "y.jpg").write_bytes(b"\xff\xd8\xff cut short")
    (folder / "notes.txt").write_text("no image")
    names = ("a/Größe 猫.png", "a/x,y.bmp", "b/y.jpg", "b/z.PNG", "c/z.gif")
    return [str(folder / name) for name in names]


def without_tensorflow(stderr):
    """What TensorFlow says as it starts cannot be switched off."""
    lines = stderr.splitlines()
    return [line for line in lines if "absl::InitializeLog" not in line and "oneDNN" not in line]


def folder_of(images):
    return str(Path(images[0]).parents[1])


def run_tool(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.tools.predict", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def test_files_folders_and_patterns(images, tmp_path):
    folder = folder_of(images)
    assert find_images([folder]) == images
    assert find_images([f"{folder}/**/*"]) == images
    assert find_images([f"{folder}/b/*.jpg", images[0]]) == [images[2], images[0]]
    # Each once, at its first place.
    assert find_images([images[3], folder]) == [images[3], *images[:3], images[4]]
    # A file that is named is tried whatever its name, and is no pattern.
    odd = tmp_path / "odd[1]"
    odd.write_bytes(b"")
    assert find_images([str(odd)]) == [str(odd)]


def test_hidden_files_of_a_folder_are_passed_over(tmp_path):
    for name in (".hidden.png", ".cache/a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([str(tmp_path)]) == [str(tmp_path / "b.png")]


def test_arguments_without_an_image_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds no image \(\.jpg, .*\): name images, a folder"):
        find_images([str(tmp_path)])
    for argument in (f"{tmp_path}/*", f"{tmp_path}/gone.jpg", ""):
        with pytest.raises(InputError, match="is no file or folder, and no pattern that matches"):
            find_images([argument])


def test_all_formats_say_the_same(images, model, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "parquet")}
    for name, file in files.items():
        assert predict([folder_of(images)], model=model, output_format=name, output=str(file)) == 1
    assert capsys.readouterr().out == ""
    parsed = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [image["path"] for image in parsed] == images
    assert [image["error"] for image in parsed] == [None, None, DAMAGED, None, None]
    assert [len(image["classes"]) for image in parsed] == [5, 5, 0, 5, 5]
    flat = []
    for image in parsed:
        for rank, scored in enumerate(image["classes"], 1):
            flat.append({"path": image["path"], "rank": rank, **scored, "error": None})
        if image["error"]:
            nothing = dict.fromkeys(COLUMNS[1:])
            flat.append({"path": image["path"], **nothing, "error": image["error"]})
    assert pyarrow.parquet.read_table(files["parquet"]).to_pylist() == flat
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in flat]
    with files["csv"].open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == as_text
    # They say what the library does.
    for image, prediction in zip(parsed, Predictor(model).predict(images), strict=True):
        for scored, expected in zip(image["classes"], prediction.classes, strict=True):
            assert scored["class_index"] == expected.index
            assert scored["class_id"] == SYNSETS[expected.index]
            assert scored["name"] == NAMES[expected.index]
            assert scored["probability"] == pytest.approx(expected.probability, abs=1e-6)
    # No temporary file is left.
    assert {path.name for path in tmp_path.iterdir()} == {
        "my images",
        *(file.name for file in files.values()),
    }


def test_the_table(images, model, capsys):
    assert predict(images[1:3], model=model, top_k=2) == 1
    out, err = capsys.readouterr()
    best = next(Predictor(model).predict(images[1:2])).classes[:2]
    assert out.splitlines() == [
        images[1],
        *(
            f"   {rank}  {100 * scored.probability:6.2f} %  {scored.class_id}  "
            f"{scored.name.partition(', ')[0]}"
            for rank, scored in enumerate(best, 1)
        ),
        images[2],
        f"      {DAMAGED}",
    ]
    assert err == f"broken: {images[2]} {DAMAGED}\n"


def test_parquet_in_pieces_is_the_same(images, model, tmp_path, monkeypatch):
    tables = []
    for number, size in enumerate((50_000, 4)):
        monkeypatch.setattr(tool, "_ROW_GROUP", size)
        file = tmp_path / f"{number}.parquet"
        predict(images, model=model, output_format="parquet", output=str(file))
        tables.append(pyarrow.parquet.read_table(file))
        assert pyarrow.parquet.ParquetFile(file).num_row_groups == (1 if number == 0 else 4)
    assert tables[0].equals(tables[1])


def test_a_label_space_renames_the_classes(images, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = tuple(f"new {number}" for number in range(7))
    LabelSpace("new", SYNSETS, names).save(tmp_path / "space.json")
    arguments = {"model": model, "label_space": "~/space.json", "top_k": 7}
    predict(images[:1], **arguments, output_format="csv", output="~/new/out.csv")
    with (tmp_path / "new" / "out.csv").open(encoding="utf-8", newline="") as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(names)
    LabelSpace("few", SYNSETS[:2]).save(tmp_path / "space.json")
    with pytest.raises(InputError, match="'few' has 2 classes and the model 7"):
        predict(images[:1], **arguments)


def test_pictures_and_features(images, model, tmp_path, capsys):
    cam, features = tmp_path / "new" / "cams", tmp_path / "features.npz"
    arguments = {
        "model": model,
        "batch_size": 2,
        "cam": str(cam),
        "features": str(features),
        "endpoints": ["pooled", "reduction_2"],
    }
    assert predict(images, **arguments) == 1
    whole = [path for path in images if not path.endswith("y.jpg")]
    # Of as many images at once: rounding decides between two neighbouring colours of the map.
    predictor = Predictor(model, batch_size=2)
    predictions = list(predictor.predict(whole, endpoints=["pooled"], cam=True))
    # Two images are named z: the second one's picture has a number. The broken one has none.
    names = ["Größe 猫.png", "x,y.png", "z.png", "z-2.png"]
    assert sorted(path.name for path in cam.iterdir()) == sorted(names)
    for name, prediction in zip(names, predictions, strict=True):
        picture = np.asarray(Image.open(cam / name).convert("RGB"))
        assert picture.shape == (EVAL_SIZE, EVAL_SIZE, 3)
        expected = overlay(prediction.image, prediction.cam)
        assert np.abs(picture.astype(int) - expected).max() <= 1
    with np.load(features) as arrays:
        assert set(arrays) == {"paths", "pooled", "reduction_2"}
        assert arrays["paths"].tolist() == whole
        expected = [prediction.endpoints["pooled"] for prediction in predictions]
        np.testing.assert_allclose(arrays["pooled"], expected, atol=1e-5)
        assert arrays["reduction_2"].shape[0] == 4
    # What is there is not replaced unless asked for.
    before = features.read_bytes()
    with pytest.raises(InputError, match=r"features\.npz' exists: name another, or give --force"):
        predict(images, **arguments)
    features.unlink()
    with pytest.raises(InputError, match=r"Größe 猫\.png' exists: name another, or give --force"):
        predict(images, **arguments)
    assert not features.exists()
    (cam / "z.png").write_bytes(b"old")
    assert predict(images, **arguments, force=True) == 1
    assert features.read_bytes() == before
    assert Image.open(cam / "z.png").size == (EVAL_SIZE, EVAL_SIZE)


def test_pictures_of_equal_names_are_told_apart():
    paths = ["a/x.jpg", "b/x.png", "b/x-2.png", "c/X.jpg", "d/y.tar.jpg", "Z.gif", "z.jpg"]
    names = [file.name for file in cam_files(Path("cams"), paths).values()]
    assert names == ["x.png", "x-2.png", "x-2-2.png", "X-3.png", "y.tar.png", "Z.png", "z-2.png"]


def test_a_name_that_is_not_utf8(images, model, tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    try:
        os.link(images[0], path)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert printable(path) == f"{tmp_path}/caf\\xe9.png"
    features, cam = tmp_path / "f.npz", tmp_path / "cam"
    for name in ("table", "csv", "json", "parquet"):
        output = str(tmp_path / f"out.{name}")
        predict(
            [path],
            model=model,
            output_format=name,
            output=output,
            features=str(features),
            cam=str(cam),
            force=True,
        )
    assert json.loads((tmp_path / "out.json").read_text())[0]["path"] == printable(path)
    assert len(os.listdir(cam)) == 1
    with np.load(features) as arrays:
        assert arrays["paths"].tolist() == [printable(path)]


def test_what_is_refused_writes_nothing(images, model, tmp_path):
    def refused(match, **arguments):
        with pytest.raises(InputError, match=match):
            predict(images, **{"model": model, **arguments})

    before = sorted(tmp_path.rglob("*"))
    new = str(tmp_path / "new" / "file")
    refused("unknown format 'jsn': did you mean json", output_format="jsn")
    refused("parquet is no text for the screen: give --output=FILE", output_format="parquet")
    refused("endpoints are given and features is not", endpoints=["pooled"])
    refused("unknown endpoint 'poled': did you mean pooled", endpoints=["poled"], features=new)
    refused("top_k 0 must be", top_k=0, output=new)
    refused("batch_size 0 must be", batch_size=0, output=new)
    refused("holds no model.json", model=str(tmp_path), output=new)
    refused("cannot be read: save a label space there", label_space=new, output=new)
    refused("is a folder: name a file", output=str(tmp_path))
    refused("cannot be written: .* takes no files", output=f"{images[0]}/below")
    refused("exists: name another, or give --force", output=f"{folder_of(images)}/notes.txt")
    refused("is one of the images: write elsewhere", output=images[0], force=True)
    refused("is one of the images: write elsewhere", cam=os.path.dirname(images[0]), force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_pyarrow(images, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"run `pip install effnetv2_jax\[parquet\]`"):
        predict(images, model=model, output_format="parquet", output=str(tmp_path / "out"))


def test_an_interrupted_file_does_not_appear(images, model, tmp_path, monkeypatch):
    def fail(prediction):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "rows", fail)
    for name in ("csv", "parquet"):
        with pytest.raises(KeyboardInterrupt):
            predict(images, model=model, output_format=name, output=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["my images"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal(images, model, tmp_path, monkeypatch):
    def shown(batch_size):
        monkeypatch.setattr(sys, "stderr", Terminal())
        output = str(tmp_path / "out")
        predict(images, model=model, batch_size=batch_size, output=output, force=True)
        return sys.stderr.getvalue()

    monkeypatch.setattr(tool, "_SHOW_EVERY", 0.0)
    progress, broken = shown(2).split("\n", 1)
    assert [part.split(",")[0] for part in progress.split("\r")[1:]] == [
        *(f"{number}/5 images" for number in range(1, 6)),
        "5/5 images",
    ]
    assert "images/s" in progress and broken.startswith("broken: ")
    # One batch is over before anyone looks.
    assert shown(5) == broken


def test_progress_is_logged_elsewhere(images, model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tool.logging, "info", lambda form, *parts: said.append(form % parts))
    monkeypatch.setattr(tool, "_LOG_EVERY", 0.0)
    predict(images, model=model, output=str(tmp_path / "out"))
    assert [message.split(",")[0] for message in said] == [
        f"{number}/5 images" for number in range(1, 6)
    ]


def test_exit_status_0(images, model):
    done = run_tool(f"--model={model}", "--top_k=1", "--format=json", images[0])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["path"] == images[0]
    assert without_tensorflow(done.stderr) == []


def test_exit_status_1_where_an_image_is_broken(images, model):
    done = run_tool(f"--model={model}", "--format=csv", folder_of(images))
    assert done.returncode == 1
    # The decoder has its say before.
    assert done.stderr.splitlines()[-1] == f"broken: {images[2]} {DAMAGED}"
    errors = [row["error"] for row in csv.DictReader(io.StringIO(done.stdout))]
    assert errors.count(DAMAGED) == 1 and errors.count("") == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "0 arguments are given: write for instance `python -m effnetv2_jax.tools.predict"),
        (["image.jpg"], "model is missing: give --model=DIR, a model folder."),
        (["--model=gone", "gone.jpg"], "'gone.jpg' is no file or folder, and no pattern"),
        (["--model=gone", str(ROOT / "docs")], "holds no image"),
        (["--model=gone", "--topk=3", "gone.jpg"], "Unknown command line flag 'topk'"),
    ],
)
def test_exit_status_2_on_bad_input(arguments, says):
    done = run_tool(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_reader_that_has_enough(images, model):
    command = [sys.executable, "-m", "effnetv2_jax.tools.predict", f"--model={model}", images[0]]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()  # Before anything is written.
        assert without_tensorflow(process.stderr.read().decode()) == []
    assert process.returncode == 141
