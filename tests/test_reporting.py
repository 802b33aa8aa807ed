"""metrics.jsonl, TensorBoard events, progress."""

from __future__ import annotations

import json
import math

import pytest

from effnetv2_jax.config import make_plan
from effnetv2_jax.errors import InputError
from effnetv2_jax.reporting import METRICS, MetricsWriter, Progress, read_metrics, rewind_metrics
from effnetv2_jax.tools import plot
from tests.tiny import get_config


def test_rows_are_json_with_step_and_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(3, {"train/loss": 0.5, "eval/num_examples": 13.0})
    assert json.loads((tmp_path / METRICS).read_text()) == {
        "step": 3,
        "train/loss": 0.5,
        "eval/num_examples": 13,
    }
    writer.write(4, {"train/loss": math.inf})
    writer.close()
    assert read_metrics(tmp_path)[1] == {"step": 4, "train/loss": None}
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tensorboard_holds_the_same_numbers(tmp_path):
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write(step, {"train/loss": 0.25 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    values = [tf.make_ndarray(e.tensor_proto).item() for e in events.Tensors("train/loss")]
    assert values == [0.25, 0.5]


def test_rewind_drops_later_rows_and_a_torn_line(tmp_path):
    lines = [json.dumps({"step": s, "x": s / 3}) for s in (1, 2, 3, 4)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 5, "x"')
    kept = rewind_metrics(tmp_path, 2)
    assert [row["step"] for row in kept] == [1, 2]
    assert (tmp_path / METRICS).read_text() == "\n".join(lines[:2]) + "\n"


def test_rewind_without_a_file(tmp_path):
    assert rewind_metrics(tmp_path, 5) == []
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_images_and_input_wait(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    plan = make_plan(get_config(), num_train_examples=72, num_eval_examples=13, num_classes=5)
    progress = Progress(plan, batch_size=16, first_step=0)
    assert progress.time_to_go(0) == "?"
    clock[0] += 10.0
    progress.waited_for_input(2.0)
    progress.paused(2.0)
    rates = progress.rates(9)
    assert rates["perf/images_per_sec"] == pytest.approx(9 * 16 / 8)
    assert rates["perf/input_wait"] == pytest.approx(0.25)
    # 9 steps at 16 px took 10 s; 9 at 24 and 9 at 32 px are left, by area 2.25 and 4 times that.
    assert progress.time_to_go(9) == "1m02s"


def test_plot_needs_a_run(tmp_path, capsys):
    with pytest.raises(InputError, match="holds no run"):
        plot.plot_progress(tmp_path)
    assert plot.main([str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
    assert plot.main([]) == 2
