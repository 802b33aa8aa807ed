"""`prepare_data`: what it checks before it starts, and what it prepares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effnetv2_jax.data.builders.imagenet21k import Imagenet21k, open_imagenet21k
from effnetv2_jax.errors import InputError
from effnetv2_jax.tools import prepare_data as tool
from effnetv2_jax.tools.prepare_data import prepare_data
from tests.data import miniature_21k as miniature

ROOT = Path(__file__).parents[2]


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.tools.prepare_data", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def manual_dir(tmp_path):
    miniature.write_archive(tmp_path / "manual")
    return str(tmp_path / "manual")


@pytest.fixture
def few_held_out(monkeypatch):
    """The release winter21 holds out as many images as the miniature can spare."""
    config = next(c for c in Imagenet21k.BUILDER_CONFIGS if c.name == "winter21")
    monkeypatch.setattr(config, "num_validation", 5)


def make_folder(root, num_corrupt=0):
    """Two classes of nine training images and one; the first ones of a class are cut short."""
    for name in ("cat", "dog"):
        for i in range(10):
            content = miniature.encode(i)
            cut = len(content) // 2 if name == "cat" and i < num_corrupt else None
            path = root / ("train" if i else "val") / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[:cut])
    return f"folder:{root}"


def test_imagenet21k_from_check_to_data_set(tmp_path, manual_dir, few_held_out, capsys):
    data_dir = str(tmp_path / "data")
    arguments = {"manual_dir": manual_dir, "data_dir": data_dir}
    says = prepare_data("imagenet21k", **arguments, dry_run=True)
    assert says.startswith("imagenet21k/winter21 can be prepared in ")
    assert "needs MANUAL_DIR/winter21_whole.tar" in capsys.readouterr().out
    assert not os.path.exists(data_dir)
    says = prepare_data("imagenet21k", **arguments)
    assert "5 classes, 26 training and 5 validation images of up to 2 labels." in says
    assert open_imagenet21k(data_dir).label_space.size == 5
    # Once it is prepared, the archive is needed no more.
    assert prepare_data("imagenet21k", manual_dir="/gone", data_dir=data_dir) == says


def test_corrupt_images_are_fatal_where_asked(tmp_path, manual_dir, few_held_out):
    with pytest.raises(InputError, match=miniature.TRUNCATED):
        prepare_data(
            "imagenet21k", manual_dir=manual_dir, data_dir=str(tmp_path), on_corrupt="raise"
        )


def test_imagenet2012_checks_names_and_sizes(tmp_path, monkeypatch):
    def check():
        return prepare_data(
            "imagenet2012", manual_dir=str(tmp_path), data_dir=str(tmp_path), dry_run=True
        )

    with pytest.raises(InputError, match=r"img_train.tar' is not there: put .* of 147,897,477,120"):
        check()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"has 3 bytes and must have 147,897,477,120"):
        check()
    monkeypatch.setitem(tool._IMAGENET2012_FILES, "ILSVRC2012_img_train.tar", 3)
    with pytest.raises(InputError, match=r"img_val.tar' is not there: put .* of 6,744,924,160"):
        check()
    monkeypatch.setitem(tool._IMAGENET2012_FILES, "ILSVRC2012_img_val.tar", 5)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"abcde")
    assert "can be prepared" in check()


@pytest.mark.parametrize(
    ("name", "needed"),
    [("imagenet21k", 94_003), ("cifar10", 510_156_513)],
)
def test_the_free_disk_space_is_checked(tmp_path, manual_dir, monkeypatch, name, needed):
    arguments = {"data_dir": str(tmp_path / "new" / "data"), "dry_run": True}
    if name == "imagenet21k":
        arguments["manual_dir"] = manual_dir
    usage = tool.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert "can be prepared" in prepare_data(name, **arguments)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=f"{needed - 1:,} free bytes and {needed:,} are needed"):
        prepare_data(name, **arguments)


@pytest.mark.parametrize("layout", [0, 1])
def test_cars_says_where_its_files_must_stand(tmp_path, layout):
    parts = tool._CARS_LAYOUTS[layout]
    for missing in reversed(parts):
        with pytest.raises(InputError, match=f"lacks .*{missing}"):
            prepare_data("cars196", manual_dir=str(tmp_path))
        path = tmp_path / missing
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert f"config.data.name='cars:{tmp_path}'" in prepare_data(
        "cars196", manual_dir=str(tmp_path)
    )


def test_a_folder_is_counted_and_its_corrupt_images_are_named(tmp_path, capsys):
    good = make_folder(tmp_path / "good")
    assert "2 classes, 18 training and 2 evaluation images (not decoded" in prepare_data(good)
    assert "(all decode)" in prepare_data(good, verify=True)
    bad = make_folder(tmp_path / "bad", num_corrupt=3)
    assert "(not decoded" in prepare_data(bad)
    with pytest.raises(InputError, match="3 of 20 images do not decode"):
        prepare_data(bad, verify=True)
    printed = capsys.readouterr().out.splitlines()
    cut = [
        f"corrupt: '{tmp_path}/bad/{i}.jpg'" for i in ("train/cat/1", "train/cat/2", "val/cat/0")
    ]
    assert sorted(line for line in printed if line.startswith("corrupt: ")) == cut


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        ("imagenet22k", {}, "did you mean imagenet21k"),
        ("folder:", {}, "unknown data set 'folder:'"),
        ("imagenet21k", {}, r"manual_dir is missing.*MANUAL_DIR/winter21_whole\.tar"),
        ("imagenet21k/fall11_ancestors", {}, r"fall11_whole\.tar.* and MANUAL_DIR/wordnet\.is_a"),
        ("imagenet21k", {"manual_dir": "/none"}, r"'/none/winter21_whole\.tar'"),
        ("imagenet21k", {"num_workers": 0}, "num_workers 0 must be 1"),
        ("imagenet21k", {"manual_dir": "/", "on_corrupt": "rise"}, "did you mean raise"),
        (
            "imagenet21k",
            {"manual_dir": "/", "beam_options": ["runer=x"]},
            "unknown Beam option 'runer'",
        ),
        ("cifar10", {"manual_dir": "/x"}, "manual_dir does not apply"),
        ("cifar10", {"num_workers": 2}, "num_workers does not apply"),
        ("cifar10", {"verify": True}, "verify does not apply"),
        ("folder:/x", {"data_dir": "/x"}, "data_dir does not apply"),
        ("folder:/x", {"beam_options": ["runner=x"]}, "beam_options does not apply"),
        ("folder:/x", {}, "'/x' is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(dataset, arguments, message):
    with pytest.raises(InputError, match=message):
        prepare_data(dataset, **arguments)


def test_options_reach_beam():
    options = tool._beam_options(["runner=FlinkRunner", "no_use_public_ips"], 3).get_all_options()
    assert options["runner"] == "FlinkRunner" and options["use_public_ips"] is False
    assert options["direct_num_workers"] == 3
    assert options["direct_running_mode"] == "multi_processing"


def test_the_command_line(tmp_path):
    folder = make_folder(tmp_path / "images", num_corrupt=1)
    result = run_tool(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{folder} has 2 classes")
    for arguments, message in (
        ([folder, "--verify"], "error: 1 of 20 images do not decode"),
        ([], "error: 0 arguments are given"),
        ([folder, "--very"], "error: Unknown command line flag 'very'"),
    ):
        result = run_tool(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_several_processes_from_the_command_line(tmp_path):
    classes = {
        s: {f"{s}_{i}.JPEG": miniature.encode(7) + f"{s}{i}".encode() for i in range(50_100)}
        for s in (miniature.DOG, miniature.CAT)
    }
    miniature.write_archive(tmp_path / "manual", classes=classes)
    result = run_tool(
        "imagenet21k",
        f"--manual_dir={tmp_path}/manual",
        f"--data_dir={tmp_path}/data",
        "--num_workers=2",
    )
    assert result.returncode == 0, result.stderr
    assert "2 classes, 200 training and 100,000 validation images" in result.stdout
    assert "[1/2] n00000020.tar: 50100 images, 0 corrupt." in result.stderr
