"""The TPU compiler on a small network: what its rows mean, and what the program must not do."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import jax
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.memory import Fit
from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.multiply_adds import count_multiply_adds
from effnetv2_jax.recipes import imagenet1k
from effnetv2_jax.tools.tpu_compile import (
    chosen_rows,
    collectives,
    compile_steps,
    estimated_hours,
    format_rows,
    read_rows,
    run_steps,
)

pytestmark = pytest.mark.slow

TOPOLOGY = "v3:2x2"  # Eight cores.
SIZE = 64


def small_config(batch_size=64):
    config = imagenet1k("efficientnetv2-b0", "paper")
    config.model.update(width_multiplier=0.25, depth_multiplier=0.1)
    config.batch_size = batch_size
    config.progressive.image_size = (SIZE, SIZE)
    config.eval.update(image_size=SIZE, batch_size=16)
    return config


@pytest.fixture(scope="module")
def rows():
    """Of the train step and the evaluation."""
    return list(compile_steps(small_config(), TOPOLOGY))


def train_step(config):
    (step,) = [step for step in run_steps(config, TOPOLOGY) if step.step == "train"]
    return step


@pytest.fixture(scope="module")
def train_program():
    """The compiled train step."""
    return train_step(small_config()).lower(Fit()).compile()


def test_a_row_for_each_step(rows):
    train, evaluation = rows
    assert (train.step, train.stage, train.batch_per_core) == ("train", 1, 8)
    assert (evaluation.step, evaluation.stage, evaluation.batch_per_core) == ("eval", 0, 2)
    for row in rows:
        assert row.run == "efficientnetv2-b0 (width x 0.25, depth x 0.1) on imagenet2012"
        assert row.fits and 0 < row.memory_gib < 1 < row.limit_gib == 16
        assert row.estimated_ms > 0 and 0 < row.utilisation < 1
        assert row.images_per_second_per_core == pytest.approx(
            1e3 * row.batch_per_core / row.estimated_ms
        )
    # Gradients, running statistics and the batch's statistics of each normalisation.
    assert train.collectives > evaluation.collectives > 0
    model = create_model("efficientnetv2-b0", width_multiplier=0.25, depth_multiplier=0.1)
    forward = 2e-9 * sum(cost.multiply_adds for cost in count_multiply_adds(model, SIZE))
    # The compiler counts other operations too, and padding.
    assert forward < evaluation.gflops_per_image < 2.5 * forward
    assert 2 * forward < train.gflops_per_image < 5 * forward


def test_what_is_known_is_not_compiled_again(rows, monkeypatch):
    def compile_nothing(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_nothing)
    assert list(compile_steps(small_config(), TOPOLOGY, known=rows)) == rows
    assert list(compile_steps(small_config(), TOPOLOGY, steps=("eval",), known=rows)) == rows[1:]
    with pytest.raises(InputError, match="unknown step 'evl': did you mean eval"):
        list(compile_steps(small_config(), TOPOLOGY, steps=("evl",)))
    older = [dataclasses.replace(row, libtpu="0.0.1") for row in rows]
    with pytest.raises(AssertionError, match="compiled"):
        list(compile_steps(small_config(), TOPOLOGY, known=older))


def test_convolutions_are_bfloat16_and_nothing_leaves_the_device(train_program):
    text = train_program.as_text()
    convolutions = re.findall(r"= (\w+)\[[\d,]*\]\S* convolution\(", text)
    assert len(convolutions) > 10
    # Sums of products may come out in float32; what goes in is bfloat16.
    assert not re.search(r"convolution\(f32\[", text)
    assert set(convolutions) <= {"bf16", "f32"} and "bf16" in convolutions
    for operation in ("infeed", "outfeed", "send", "recv"):
        assert f" {operation}(" not in text


def test_the_state_is_donated(train_program):
    memory = train_program.memory_analysis()
    # All but the images, labels and strengths go out in the buffers that they came in.
    assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes


def test_too_large_a_batch_says_how_much_it_needs():
    config = small_config(2**22)
    config.memory.update(micro_batches="1", remat_groups="0")
    (row,) = [row for row in compile_steps(config, TOPOLOGY) if row.step == "train"]
    assert not row.fits and row.memory_gib > row.limit_gib
    assert "does not fit" in format_rows([row])


def test_micro_batches_take_less_memory_and_exchange_gradients_once(rows):
    """The numbers are of the whole step, although XLA counts its loop once."""
    whole = rows[0]
    config = small_config()
    config.memory.micro_batches = "4"
    update, parts, _ = compile_steps(config, TOPOLOGY)
    assert (update.step, parts.micro_batches) == ("update", 4)
    # As much arithmetic, but for sums of gradients; statistics are exchanged by each part.
    assert parts.gflops_per_image == pytest.approx(whole.gflops_per_image, rel=0.1)
    assert update.collectives < parts.collectives - 3 * (whole.collectives - update.collectives)
    assert parts.collective_mbytes < 1.2 * whole.collective_mbytes
    assert whole.estimated_ms < parts.estimated_ms < 4 * whole.estimated_ms
    assert chosen_rows([update, parts]) == [parts]


def test_rematerialisation_takes_less_memory_and_repeats_no_collective():
    step = train_step(small_config(2048))
    kept, again = (step.lower(Fit(1, groups)).compile() for groups in (0, 6))
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (kept, again)]
    assert sizes[1] < 0.8 * sizes[0]
    assert collectives(kept.as_text())[0] == collectives(again.as_text())[0]
    assert again.cost_analysis()["flops"] > 1.1 * kept.cost_analysis()["flops"]


def test_collectives_are_counted_with_their_bytes():
    text = """
      %a = f32[8,2]{1,0} all-reduce(%x), replica_groups={}
      %b = (bf16[3]{0}, f32[]{:T(256)}) all-reduce-start(%y, %z), channel_id=1
      %c = f32[8,2]{1,0} all-reduce-done(%b)
      %d = f32[4]{0} add(%x, %all-reduce.1)
    """
    assert collectives(text) == (2, 8 * 2 * 4 + 3 * 2 + 4)
    looped = f"%body.1 (p: f32[2]) -> f32[2] {{\n{text}\n}}\nENTRY %main (p: f32[2]) -> f32[2] {{\n"
    looped += "%w = f32[2] while(%t), condition=%cond.1, body=%body.1\n"
    looped += "%d = f32[8] all-reduce(%w)\n}"
    assert collectives(looped, 5) == (11, 5 * (8 * 2 * 4 + 3 * 2 + 4) + 8 * 4)


def test_hours_are_the_sum_over_steps(rows):
    row = dataclasses.replace(rows[0], steps=3600, estimated_ms=500.0)
    assert estimated_hours([row, row]) == pytest.approx(1.0)
    assert "The whole run, by XLA's estimate: 1.0 h." in format_rows([row, row])


def test_mistakes():
    with pytest.raises(InputError, match="unknown TPU generation 'v9'"):
        next(compile_steps(small_config(), "v9:2x2"))
    with pytest.raises(InputError, match="topology 'v3:hello' is unknown to the TPU compiler"):
        next(compile_steps(small_config(), "v3:hello"))
    with pytest.raises(InputError, match="batch_size 12 cannot be split over 8 devices"):
        next(compile_steps(small_config(12), TOPOLOGY))
    config = small_config()
    config.data.name = "folder:/my/own"
    with pytest.raises(InputError, match="unknown published data set"):
        next(compile_steps(config, TOPOLOGY))


def test_the_command_line_resumes_from_its_results(tmp_path):
    command = [sys.executable, "-m", "effnetv2_jax.tools.tpu_compile"]
    flags = ["--config=configs/b0.py", f"--topology={TOPOLOGY}", f"--results={tmp_path / 'r.csv'}"]
    changes = {
        "batch_size": 64,
        "model.width_multiplier": 0.25,
        "model.depth_multiplier": 0.1,
        "progressive.image_size": "(64,64)",
        "eval.image_size": 64,
        "eval.batch_size": 16,
    }
    flags += [f"--config.{key}={value}" for key, value in changes.items()]
    for _ in range(2):
        result = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "The whole run, by XLA's estimate" in result.stdout
    assert len(read_rows(tmp_path / "r.csv")) == 2
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    result = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert result.returncode == 2 and "has other columns" in result.stderr
