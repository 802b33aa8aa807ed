"""Programs are timed in turn, on the same work, and one that fails does not end the others."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from effnetv2_jax.benchmark.protocol import Work
from effnetv2_jax.errors import InputError
from effnetv2_jax.tools import benchmark
from effnetv2_jax.tools.benchmark import PEERS, Runner, compare, flops_per_image, format_results

ROOT = Path(__file__).parents[2]
WORK = Work("train", "efficientnetv2-b0", image_size=32, batch_size=4, threads=1)
PEER_PYTHON = os.environ.get("PEERS", sys.executable)


@pytest.fixture
def sleeping(monkeypatch):
    """Every program is `tests/benchmarked.py`."""
    modules = dict.fromkeys(("ours", *PEERS), ("tests.benchmarked", False))
    monkeypatch.setattr(benchmark, "_MODULES", modules)


def test_ratios_are_those_of_the_times(sleeping):
    rounds = []
    ours, timm = compare(WORK, ["timm"], runs=3, seconds=0.2, on_round=rounds.append)
    assert rounds == [0, 1, 2, 3]
    assert (ours.program, ours.ratio, ours.ratio_lowest, ours.ratio_highest) == ("ours", 1, 1, 1)
    # 4 images in 20 ms and in 60 ms; a sleep may be late, never early.
    assert ours.images_per_second <= 200
    assert 1.5 < timm.ratio < 6
    assert timm.lowest <= timm.images_per_second <= timm.highest <= 4 / 0.06
    assert (timm.runs, timm.threads, timm.versions) == (3, 1, "timm 1.0")
    assert timm.peak_mib - ours.peak_mib == pytest.approx(32, abs=4)
    assert ours.gflops_per_second == pytest.approx(
        ours.images_per_second * flops_per_image(WORK) / 1e9
    )
    table = format_results([ours, timm])
    assert "1.00 x" in table and "timm 1.0" in table


def test_what_a_pipeline_has_in_stock_is_not_its_speed():
    class Pipeline:
        def seconds(self, count):
            return 0.01 * max(0, count - 20)

    assert benchmark._repetitions(Pipeline(), 1.0) == pytest.approx(100, rel=0.25)


def test_who_cannot_is_left_out_and_told(sleeping):
    told = {}
    peers = ["torchvision", "keras-tf", "flax", "timm"]
    results = compare(WORK, peers, runs=2, seconds=0.05, on_refusal=told.__setitem__)
    assert [result.program for result in results] == ["ours", "timm"]
    assert told == {
        "torchvision": "torchvision has no efficientnetv2-b0",
        "keras-tf": "its process ended with status 3",
        "flax": "KeyError: 'flax'",
    }


def test_who_is_not_timed_stands_still(sleeping):
    with Runner("ours", WORK, [min(os.sched_getaffinity(0))], sys.executable) as runner:
        for _ in range(100):
            state = Path(f"/proc/{runner._process.pid}/stat").read_text().rpartition(")")[2].split()
            if state[0] == "T":
                break
            time.sleep(0.01)
        assert state[0] == "T"
        assert runner.seconds(3) >= 0.06
        pid = runner._process.pid
    assert not Path(f"/proc/{pid}").exists()


def test_arithmetic_of_a_step_is_three_times_that_of_a_pass():
    inference = flops_per_image(dataclasses.replace(WORK, kind="inference", image_size=192))
    training = flops_per_image(dataclasses.replace(WORK, image_size=192))
    assert training == 3 * inference == pytest.approx(3 * 2 * 0.535e9, rel=0.02)
    assert flops_per_image(dataclasses.replace(WORK, kind="input")) == 0


def test_mistakes():
    with pytest.raises(InputError, match="unknown peer 'tim': did you mean timm"):
        compare(WORK, ["tim"])
    with pytest.raises(InputError, match="peer 'timm' is named twice"):
        compare(WORK, ["timm", "flax", "timm"])


@pytest.fixture
def images(tmp_path):
    """JPEG files of two classes."""
    from effnetv2_jax.data.host_tf import tf

    random = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40, 50, 3), np.uint8)
        (folder / f"{number}.jpg").write_bytes(tf.io.encode_jpeg(pixels).numpy())
    return tmp_path / "images"


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "effnetv2_jax.tools.benchmark", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_line(images, tmp_path):
    """Files to batches, which needs no compiler."""
    file = tmp_path / "found.json"
    small = ["--image_size=24", "--batch_size=2", "--runs=2", "--seconds=0.05", "--threads=1"]
    done = run("input", f"--images={images}", f"--json={file}", *small)
    assert done.returncode == 0, done.stderr
    assert "program" in done.stdout and "ours" in done.stdout and "[2/2]" in done.stderr
    found = json.loads(file.read_text())
    assert found["work"]["kind"] == "input" and found["work"]["randaug_magnitude"] == 15
    assert found["results"][0]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["training"], "unknown kind of work 'training'"),
        (["input", "--images=nowhere"], "--images 'nowhere' is no folder"),
        (["train", "--variant=efficientnet-s"], "'efficientnet-s'"),
        (["train", "--threads=4096"], "--threads 4096 is more than the"),
        (["train", "--json=nowhere/a.json"], "the folder of 'nowhere/a.json' does not exist"),
        (["train", "--json=tests"], "'tests' is a folder: name a file"),
        (["predict", "--images=tests"], "there are no JPEG files as tests/CLASS/*.jpg"),
        (["train", "--against=timm", "--peer_python=nowhere"], "'nowhere' does not exist"),
        ([], "0 arguments are given"),
    ],
)
def test_mistakes_on_the_command_line(arguments, says):
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_what_is_timed_ends_with_the_command():
    """It stands still between its runs, and a signal alone would not end it."""
    program = (
        "import sys; from effnetv2_jax.tools import benchmark; "
        "benchmark._MODULES = {'ours': ('tests.benchmarked', False)}; "
        "from absl import flags; benchmark._define_flags(); "
        "flags.FLAGS(['benchmark', '--runs=1000', '--seconds=0.1']); benchmark.main(['train'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not process.stderr.readline().startswith("[1/"):
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    process.stderr.close()
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "inference"])
def test_this_project_and_its_plain_form(kind):
    ours, plain = compare(dataclasses.replace(WORK, kind=kind), ["flax"], runs=2, seconds=0.1)
    assert plain.program == "flax" and plain.images_per_second > 0
    assert 0 < ours.share_of_peak < 1
    assert "jax" in ours.versions and ours.peak_mib > 100


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "peers"),
    [("train", ["timm", "torchvision"]), ("inference", ["timm", "torchvision", "keras-jax"])],
)
def test_other_libraries(kind, peers):
    """They run; nothing is said of speed."""
    work = dataclasses.replace(WORK, kind=kind, variant="efficientnet-b0")
    told = {}
    results = compare(
        work, peers, python=PEER_PYTHON, runs=1, seconds=0.1, on_refusal=told.__setitem__
    )
    assert told == {} and [result.program for result in results] == ["ours", *peers]
    assert all(result.images_per_second > 0 for result in results)
