"""A run's folder in a bucket.

There is no bucket here: `Bucket` stands for the file system that reaches one. Orbax and
TensorBoard have their own ways to a bucket, which these tests do not enter.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from clu import metric_writers
from etils import epath
from etils.epath import backend

from effnetv2_jax.checkpoint import Checkpoints, verify_checksums, write_checksums
from effnetv2_jax.config import make_plan
from effnetv2_jax.errors import InputError
from effnetv2_jax.paths import absolute
from effnetv2_jax.reporting import METRICS, MetricsWriter, read_metrics, rewind_metrics
from effnetv2_jax.tools.plot import plot_progress
from effnetv2_jax.workdir import open_workdir, read_class_names
from tests.tiny import get_config


class Bucket(type(backend.os_backend)):
    """Objects are written as a whole; folders are but the beginning of names."""

    def __init__(self, root):
        self.root = root
        self.num_writes = 0

    def local(self, path):
        assert os.fspath(path).startswith("gs://"), path
        return str(self.root / os.fspath(path).removeprefix("gs://"))

    def open(self, path, mode):
        assert "a" not in mode, "nothing can be added to an object"
        if "w" in mode:
            self.num_writes += 1
            Path(self.local(path)).parent.mkdir(parents=True, exist_ok=True)
        return super().open(self.local(path), mode)

    def exists(self, path):
        return super().exists(self.local(path))

    def isdir(self, path):
        return super().isdir(self.local(path))

    def listdir(self, path):
        return super().listdir(self.local(path))

    def makedirs(self, path, **_):
        pass

    def replace(self, path, dst):
        os.replace(self.local(path), self.local(dst))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    double = Bucket(tmp_path)
    monkeypatch.setattr(backend, "tf_backend", double)
    # TensorBoard's own way to a bucket.
    monkeypatch.setattr(
        metric_writers, "SummaryWriter", lambda folder: metric_writers.MultiWriter([])
    )
    return double


def plan():
    return make_plan(get_config(), num_train_examples=72, num_eval_examples=13, num_classes=5)


def test_only_local_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("run") == epath.Path(tmp_path / "run")
    assert absolute("~/run") == epath.Path(Path.home() / "run")
    assert os.fspath(absolute("gs://bucket/run")) == "gs://bucket/run"


def test_a_workdir_in_a_bucket_is_opened_and_told_from_another(bucket, tmp_path):
    config = get_config()
    workdir = open_workdir("gs://bucket/run", config, plan(), ["a", "b"])
    assert (tmp_path / "bucket" / "run" / "config.json").is_file()
    assert read_class_names(workdir) == ["a", "b"]
    open_workdir("gs://bucket/run", config, plan(), None)
    config.seed = 1
    with pytest.raises(InputError, match=r"workdir gs://bucket/run holds a run .*seed: 0 -> 1"):
        open_workdir("gs://bucket/run", config, plan(), None)


def test_a_bucket_that_refuses_is_told_in_one_sentence(bucket, monkeypatch):
    def refuse(path, mode):
        raise RuntimeError("no such bucket")  # TensorFlow's errors are no OSError.

    monkeypatch.setattr(bucket, "open", refuse)
    with pytest.raises(InputError, match=r"workdir gs://bucket/run .*\(no such bucket\)"):
        open_workdir("gs://bucket/run", get_config(), plan(), None)


def test_metrics_are_whole_at_each_flush_and_seldom_written(bucket):
    workdir = open_workdir("gs://bucket/run", get_config(), plan(), None)
    before = bucket.num_writes
    writer = MetricsWriter(workdir)
    for step in range(1, 21):
        writer.write(step, {"train/loss": step / 2})
    assert bucket.num_writes == before
    writer.flush()
    assert bucket.num_writes == before + 1
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 21))
    writer.close()
    assert len(rewind_metrics(workdir, 10)) == 10
    writer = MetricsWriter(workdir)
    writer.write(11, {"train/loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 12))
    assert (workdir / METRICS).read_text().count("\n") == 11
    assert plot_progress(workdir).read_bytes().startswith(b"\x89PNG")


def test_metrics_reach_a_bucket_once_a_minute(bucket, monkeypatch):
    workdir = absolute("gs://bucket/run")
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    writer = MetricsWriter(workdir)
    writer.write(1, {"train/loss": 1.0})
    clock[0] += 61
    writer.write(2, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]


def test_checksums_of_a_checkpoint_in_a_bucket(bucket):
    folder = absolute("gs://bucket/run/checkpoints/7")
    (folder / "default" / "array").write_text("content")
    assert Checkpoints(folder.parent, keep=1).steps() == [7]
    write_checksums(folder)
    verify_checksums(folder)
    (folder / "default" / "array").write_text("contant")
    with pytest.raises(ValueError, match="the checksum of file default/array differs"):
        verify_checksums(folder)
