"""Compiles a run's steps for TPUs on a machine that has none, and says what they will cost.

    pip install effnetv2_jax[tpu]
    python -m effnetv2_jax.tools.tpu_compile --config=configs/l_21k.py --topology=v3:4x4

One row for each image size of the train step and one for the evaluation: how the step was cut
down to fit, seconds of compilation, memory per core against its limit, arithmetic and traffic per
image, collectives, XLA's own estimate of the step's time and the roofline's. Exit status: 0 all
fit, 1 a step does not fit, 2 bad input.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from effnetv2_jax import command_line
from effnetv2_jax.config import Plan, make_plan
from effnetv2_jax.data.sizes import published_sizes
from effnetv2_jax.errors import InputError, unknown_name

if TYPE_CHECKING:  # JAX takes seconds to import, and must not before main has told it not to
    from effnetv2_jax.memory import Fit  # take a TPU.

FLAGS = flags.FLAGS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """What one JAX device of a TPU generation can do, by cloud.google.com/tpu/docs.

    Attributes:
      peak_flops: of bfloat16 products a second.
      bandwidth: of its memory, bytes a second.
      memory: bytes.
    """

    peak_flops: float
    bandwidth: float
    memory: float


# Of v2 and v3 a device is one of the two cores of a chip, from v4 on a chip ("System architecture",
# pages v2, v3, v4, v5e, v5p and v6e: peak compute, HBM bandwidth and HBM capacity per chip).
DEVICE_KINDS = {
    "v2": DeviceKind(45e12 / 2, 700e9 / 2, 8 * GIB),
    "v3": DeviceKind(123e12 / 2, 900e9 / 2, 16 * GIB),
    "v4": DeviceKind(275e12, 1228e9, 32 * GIB),
    "v5e": DeviceKind(197e12, 819e9, 16 * GIB),
    "v5p": DeviceKind(459e12, 2765e9, 95 * GIB),
    "v6e": DeviceKind(918e12, 1640e9, 32 * GIB),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What the compiler says of one step.

    Attributes:
      step: `train`, `eval`, or `update`: the end of a train step, which micro-batches share.
      stage: its number, from 1; 0 for the other two.
      image_size: pixels.
      batch_per_core: images.
      micro_batches: see `memory.Fit`.
      remat_groups: see `memory.Fit`.
      steps: how often the run takes this step.
      fits: whether the compiler found room for it.
      compile_seconds: on this machine.
      memory_gib: that the program needs on a core.
      limit_gib: that a core has.
      gflops_per_image: arithmetic, as XLA counts it.
      mbytes_per_image: traffic to and from a core's memory, likewise.
      collectives: operations in which cores exchange data.
      collective_mbytes: what a core puts into them in a step.
      estimated_ms: the step by XLA's own estimate.
      roofline_ms: the larger of arithmetic / peak and traffic / bandwidth.
      images_per_second_per_core: by the estimate.
      utilisation: share of the peak arithmetic, by the estimate.
      error: what the compiler said if it does not fit.
      topology: for which it was compiled.
      run: see `title`.
      program: the first digits of a checksum of the step before the compiler saw it.
      jax: version.
      libtpu: version.
    """

    step: str
    stage: int
    image_size: int
    batch_per_core: int
    micro_batches: int
    remat_groups: int
    steps: int
    fits: bool
    compile_seconds: float
    memory_gib: float = 0.0
    limit_gib: float = 0.0
    gflops_per_image: float = 0.0
    mbytes_per_image: float = 0.0
    collectives: int = 0
    collective_mbytes: float = 0.0
    estimated_ms: float = 0.0
    roofline_ms: float = 0.0
    images_per_second_per_core: float = 0.0
    utilisation: float = 0.0
    error: str = ""
    topology: str = ""
    run: str = ""
    program: str = ""
    jax: str = ""
    libtpu: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What two rows share that need one compilation."""
        return self.program, self.topology, self.jax, self.libtpu


def title(config: ConfigDict) -> str:
    """A run's network and data set in words."""
    model = config.model
    scaled = [
        f"{name} x {value:g}"
        for name, value in (("width", model.width_multiplier), ("depth", model.depth_multiplier))
        if value != 1.0
    ]
    network = f"{model.variant} ({', '.join(scaled)})" if scaled else model.variant
    return f"{network} on {config.data.name}"


def plan_of(config: ConfigDict) -> Plan:
    """The plan of a configuration on the published size of its data set."""
    sizes = published_sizes(config.data.name).used_by(config.data)
    return make_plan(
        config,
        num_train_examples=sizes.train,
        num_eval_examples=sizes.eval,
        num_classes=sizes.classes,
    )


def num_eval_steps(config: ConfigDict, plan: Plan, batch_size: int) -> int:
    """Of a whole run, on every split, of the weights and of their average.

    The evaluations that the ends of stages add are not among them.
    """
    sizes = published_sizes(config.data.name).used_by(config.data)
    batches = sum(-(-examples // batch_size) for examples in (sizes.eval, sizes.minival))
    return 2 * batches * (plan.total_steps // plan.eval_every_steps)


@dataclasses.dataclass(frozen=True, eq=False)
class RunStep:
    """One step of a run, before the compiler sees it; the first fields are those of `Row`.

    Attributes:
      candidates: settings, cheapest first; the first that fits is the run's.
      lower: what the compiler gets, in a setting.
    """

    step: str
    stage: int
    image_size: int
    batch_per_core: int
    steps: int
    candidates: Sequence[Fit]
    lower: Callable[[Fit], Any]


STEPS = ("train", "eval")


def compile_steps(
    config: ConfigDict,
    topology: str,
    *,
    steps: Collection[str] = STEPS,
    known: Collection[Row] = (),
) -> Iterator[Row]:
    """Compiles every distinct step of a run for a TPU topology, one after the other.

    Args:
      config: of the run.
      topology: generation and shape, as `v3:4x4` (32 cores).
      steps: those that are compiled, of `STEPS`.
      known: rows of the same program and compiler are returned instead of compiled again.

    Yields:
      Every row: of a step that does not fit, one for each setting that was tried; before the
      first step of several micro-batches the `update` that they share. `chosen_rows` tells
      which ones the run takes.

    Raises:
      InputError: an unknown topology or step, or a batch that the cores do not divide.
    """
    import jax

    from effnetv2_jax.memory import Fit

    for name in steps:
        if name not in STEPS:
            raise unknown_name("step", name, STEPS)

    topology_devices(topology)  # Raises before anything of libtpu is asked for.
    kind = DEVICE_KINDS[topology.partition(":")[0]]
    provenance = {
        "topology": topology,
        "run": title(config),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    compile_row = functools.partial(_row, kind=kind, provenance=provenance, known=known)
    update, *all_steps = run_steps(config, topology)
    update_row: Row | None = None
    for step in (step for step in all_steps if step.step in steps):
        for fit in step.candidates:
            if fit.micro_batches > 1 and update_row is None:
                update_row = compile_row(update, Fit())
                yield update_row
            row = compile_row(step, fit, update=update_row)
            # What was compiled is of no further use, and a large network's takes gigabytes.
            jax.clear_caches()
            yield row
            if row.fits:
                break


def chosen_rows(rows: Collection[Row]) -> list[Row]:
    """Of each step the last row, in order: the setting that fits, or the last that does not."""
    return list({(row.step, row.stage): row for row in rows if row.step != "update"}.values())


def run_steps(config: ConfigDict, topology: str) -> list[RunStep]:
    """The steps of a run as `main` would run them: update, every stage's train step, evaluation.

    Args:
      config: of the run.
      topology: generation and shape.

    Raises:
      InputError: as `compile_steps`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from effnetv2_jax.losses import Loss
    from effnetv2_jax.memory import Fit
    from effnetv2_jax.models.create import create_model
    from effnetv2_jax.optimizers import make_optimizer
    from effnetv2_jax.parallel import (
        AXIS,
        check_batch_size,
        parallel_eval_step,
        parallel_train_step,
    )
    from effnetv2_jax.steps import StepResults, make_eval_step
    from effnetv2_jax.train import (
        planned_fits,
        planned_schedule,
        planned_train_step,
        planned_update,
    )
    from effnetv2_jax.train_state import create_train_state

    devices = topology_devices(topology)
    num_devices = len(devices)
    check_batch_size(config.batch_size, num_devices)
    plan = plan_of(config)
    model = create_model(**config.model, num_classes=plan.num_classes, axis_name=AXIS)
    loss = Loss(**config.loss)
    optimizer = make_optimizer(planned_schedule(config, plan), **config.optimizer)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    state = jax.eval_shape(
        lambda key: create_train_state(model, optimizer, key, image_size=32), key
    )
    limit = int(DEVICE_KINDS[topology.partition(":")[0]].memory)
    fits = planned_fits(config, plan, model, num_devices, limit)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    strengths = dict.fromkeys(("dropout_rate", "mixup_alpha", "cutmix_alpha"), scalar)

    def batch(per_core: int, size: int, **more: Any) -> dict[str, Any]:
        shape = (num_devices, per_core)
        return {
            "image": jax.ShapeDtypeStruct((*shape, size, size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct(shape, jnp.int32),
            **{name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in more.items()},
        }

    def lower_update(_: Fit) -> Any:
        update = planned_update(config, optimizer)
        step = parallel_train_step(
            lambda state, batch, *_: update(state, batch["results"]),
            devices=devices,
            form=config.parallel,
        )
        means: Any = (state.params, state.batch_stats, scalar, scalar)
        results = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((num_devices, *a.shape), a.dtype), StepResults(*means)
        )
        return step.lower(state, {"results": results}, strengths, key)

    def lower_train(size: int, fit: Fit) -> Any:
        step = planned_train_step(config, plan, model, optimizer, loss, fit)
        mapped = parallel_train_step(step, devices=devices, form=config.parallel)
        return mapped.lower(state, batch(per_core, size), strengths, key)

    def lower_eval(_: Fit) -> Any:
        step = make_eval_step(model, **config.normalize, loss=loss, axis_name=AXIS)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        mapped = parallel_eval_step(step, devices=devices, form=config.parallel)
        return mapped.lower(variables, batch(eval_per_core, eval_size, mask=np.float32))

    per_core = config.batch_size // num_devices
    eval_per_core, eval_size = -(-config.eval.batch_size // num_devices), config.eval.image_size
    eval_steps = num_eval_steps(config, plan, eval_per_core * num_devices)
    return [
        # Its numbers are of a step, not of an image.
        RunStep("update", 0, 0, 1, 0, [Fit()], lower_update),
        *(
            RunStep(
                "train",
                stage.index + 1,
                stage.image_size,
                per_core,
                stage.num_steps,
                fits.candidates(stage),
                functools.partial(lower_train, stage.image_size),
            )
            for stage in plan.stages
            if stage.num_steps
        ),
        RunStep("eval", 0, eval_size, eval_per_core, eval_steps, [Fit()], lower_eval),
    ]


def topology_devices(topology: str) -> list[Any]:
    """The devices of a topology, which nobody has to own: libtpu compiles for them.

    Raises:
      InputError: libtpu is missing, or knows no such topology.
    """
    generation = topology.partition(":")[0]
    if generation not in DEVICE_KINDS:
        raise unknown_name("TPU generation", generation, DEVICE_KINDS)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is missing: run `pip install effnetv2_jax[tpu]`.")
    # Off the cloud there is no server to ask what machine this is; and several compilations may
    # run side by side, as none of them holds a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # JAX raises whatever libtpu says.
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"topology {topology!r} is unknown to the TPU compiler ({reason}): give generation and "
            "shape, as v3:4x4 or v4:2x2x4."
        ) from error


def _row(
    step: RunStep,
    fit: Fit,
    *,
    kind: DeviceKind,
    provenance: dict[str, str],
    known: Collection[Row],
    update: Row | None = None,
) -> Row:
    """Compiles a step in a setting, unless its row is known."""
    from effnetv2_jax.memory import DoesNotFit, compile_within

    lowered = step.lower(fit)
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]
    for row in known:
        if row.identity == (program, *(provenance[n] for n in ("topology", "jax", "libtpu"))):
            return dataclasses.replace(row, stage=step.stage, steps=step.steps)
    fields: dict[str, Any] = {
        **{name: getattr(step, name) for name in ("step", "stage", "image_size", "steps")},
        "batch_per_core": step.batch_per_core,
        **dataclasses.asdict(fit),
        "limit_gib": kind.memory / GIB,
        "program": program,
        **provenance,
    }
    begun = time.monotonic()
    try:
        with warnings.catch_warnings():
            # A cache of compiled programs cannot be read without the device.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = compile_within(lowered, int(kind.memory))
    except DoesNotFit as refusal:
        return Row(
            **fields,
            fits=False,
            compile_seconds=time.monotonic() - begun,
            memory_gib=refusal.needed / GIB,
            error=str(refusal),
        )
    seconds = time.monotonic() - begun
    update_costs = None if update is None else dataclasses.asdict(update)
    values = costs(compiled, kind, step.batch_per_core, fit.micro_batches, update_costs)
    return Row(**fields, fits=True, compile_seconds=seconds, **values)


def costs(
    compiled: Any,
    kind: DeviceKind,
    batch_per_core: int,
    micro_batches: int = 1,
    update: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the compiler says of a program that fits, by the names of `Row`.

    XLA counts the body of a loop once. The body of the loop over micro-batches is what a step
    has without its update.

    Args:
      compiled: for a TPU.
      kind: of TPU.
      batch_per_core: images.
      micro_batches: that the program loops over.
      update: what this function says of the update alone; needed for several micro-batches.
    """
    from effnetv2_jax.memory import used_memory

    cost = compiled.cost_analysis()
    flops, traffic, seconds = cost["flops"], cost["bytes accessed"], cost["optimal_seconds"]
    if micro_batches > 1:
        assert update is not None
        flops += (micro_batches - 1) * (flops - 1e9 * update["gflops_per_image"])
        traffic += (micro_batches - 1) * (traffic - 1e6 * update["mbytes_per_image"])
        seconds += (micro_batches - 1) * (seconds - 1e-3 * update["estimated_ms"])
    count, exchanged = collectives(compiled.as_text(), micro_batches)
    return {
        "memory_gib": used_memory(compiled) / GIB,
        "gflops_per_image": flops / batch_per_core / 1e9,
        "mbytes_per_image": traffic / batch_per_core / 1e6,
        "collectives": count,
        "collective_mbytes": exchanged / 1e6,
        "estimated_ms": 1e3 * seconds,
        "roofline_ms": 1e3 * max(flops / kind.peak_flops, traffic / kind.bandwidth),
        "images_per_second_per_core": batch_per_core / seconds,
        "utilisation": flops / seconds / kind.peak_flops,
    }


_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(program: str, loop_count: int = 1) -> tuple[int, int]:
    """Counts the operations of a compiled program in which devices exchange data, and their bytes.

    Args:
      program: XLA's text of it.
      loop_count: how often its loops run.
    """
    bodies = set(re.findall(r"\bbody=%?([\w.-]+)", program))
    count = num_bytes = 0
    repeats = 1
    for line in program.splitlines():
        if line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
            repeats = loop_count if name in bodies else 1
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        count += repeats
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            sides = [int(side) for side in shape.split(",") if side]
            num_bytes += repeats * _DTYPE_BYTES.get(dtype, 4) * math.prod(sides)
    return count, num_bytes


# Hours on 32 cores of TPUv3 that the paper measured (Table 7).
PAPER_HOURS = {
    "efficientnetv2-s on imagenet2012": 7.1,
    "efficientnetv2-m on imagenet2012": 13.0,
    "efficientnetv2-l on imagenet2012": 24.0,
    "efficientnetv2-s on imagenet21k/fall11": 9.0,
    "efficientnetv2-m on imagenet21k/fall11": 15.0,
    "efficientnetv2-l on imagenet21k/fall11": 26.0,
    "efficientnetv2-xl on imagenet21k/fall11": 45.0,
}


def format_rows(rows: Collection[Row], *, is_whole_run: bool = True) -> str:
    """A table for people, and the hours of the run if these are all steps and every one fits."""
    columns = (
        ("step", lambda r: f"{r.step} {r.stage}" if r.stage else r.step),
        ("px", lambda r: str(r.image_size)),
        ("batch/core", lambda r: str(r.batch_per_core)),
        ("parts", lambda r: str(r.micro_batches)),
        ("remat", lambda r: str(r.remat_groups)),
        ("compile s", lambda r: f"{r.compile_seconds:.0f}"),
        ("GiB", lambda r: f"{r.memory_gib:.1f} of {r.limit_gib:.0f}"),
        ("GFLOP/image", lambda r: f"{r.gflops_per_image:.1f}"),
        ("MB/image", lambda r: f"{r.mbytes_per_image:.0f}"),
        ("collectives", lambda r: f"{r.collectives} ({r.collective_mbytes:.0f} MB)"),
        ("estimate ms", lambda r: f"{r.estimated_ms:.1f}"),
        ("roofline ms", lambda r: f"{r.roofline_ms:.1f}"),
        ("images/s/core", lambda r: f"{r.images_per_second_per_core:.0f}"),
        ("MXU", lambda r: f"{r.utilisation:.0%}"),
    )
    cells = [[name for name, _ in columns]]
    for row in rows:
        shown = [show(row) for _, show in columns]
        cells.append(shown if row.fits else [*shown[:7], "does not fit", *[""] * 6])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    if is_whole_run and all(row.fits for row in rows):
        run = next(iter(rows)).run
        lines.append(f"The whole run, by XLA's estimate: {estimated_hours(rows):.1f} h.")
        if run in PAPER_HOURS and next(iter(rows)).topology == "v3:4x4":
            lines[-1] += f" The paper measured {PAPER_HOURS[run]:g} h (Table 7)."
    return "\n".join(lines)


def estimated_hours(rows: Collection[Row]) -> float:
    """Of all steps, training and evaluation, without input and compilation."""
    return sum(row.steps * row.estimated_ms for row in rows) / 3.6e6


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a CSV file that `--results` wrote; none if there is no file.

    Raises:
      InputError: the file is of another form.
    """
    file = Path(path)
    if not file.is_file():
        return []
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    convert: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda text: text == "True",
    }
    rows = []
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != list(kinds):
            raise InputError(
                f"{str(file)!r} has other columns than this tool writes: name another file."
            )
        for line in reader:
            rows.append(Row(**{name: convert[kinds[name]](line[name]) for name in kinds}))
    return rows


def _append(path: Path, row: Row) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(Row)])
        if is_new:
            writer.writeheader()
        values = dataclasses.asdict(row)
        writer.writerow(
            {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in values.items()}
        )


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration, as configs/l_21k.py.")
    flags.DEFINE_string("topology", "v3:4x4", "TPU generation and shape, as v3:4x4 or v4:2x2x4.")
    flags.DEFINE_list("steps", list(STEPS), "Which steps to compile.")
    flags.DEFINE_string("json", None, "File to write the rows to, as JSON.")
    flags.DEFINE_string("results", None, "CSV file that rows are added to; it saves compiling.")


def main(arguments: list[str]) -> int:
    """The command line."""
    del arguments
    # On a TPU machine the devices stay free for a run.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for path in filter(None, (FLAGS.results, FLAGS.json)):
        command_line.check_output_file(path)
    results = Path(FLAGS.results).expanduser() if FLAGS.results else None
    known = read_rows(results) if results else []
    rows: list[Row] = []
    for row in compile_steps(FLAGS.config, FLAGS.topology, steps=FLAGS.steps, known=known):
        rows.append(row)
        fit = f"{row.micro_batches} part(s), {row.remat_groups} group(s) rematerialised"
        print(
            f"{row.step} {row.image_size} px, {fit}: "
            + (f"{row.estimated_ms:.1f} ms" if row.fits else "does not fit")
            + f", compiled in {row.compile_seconds:.0f} s",
            file=sys.stderr,
        )
        if results and row.identity not in {old.identity for old in known}:
            _append(results, row)
    rows = chosen_rows(rows)
    print(format_rows(rows, is_whole_run=set(FLAGS.steps) == set(STEPS)))
    if FLAGS.json:
        Path(FLAGS.json).expanduser().write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
        )
    too_large = [row for row in rows if not row.fits]
    if too_large:
        first = too_large[0]
        remedy = (
            "eval.batch_size"
            if first.step == "eval"
            else "batch_size, or memory.micro_batches=auto"
        )
        print(
            f"error: the {first.step} step at {first.image_size} px needs {first.memory_gib:.1f} "
            f"GiB of a core's {first.limit_gib:.0f}: use more cores, or a smaller {remedy}.",
            file=sys.stderr,
        )
    return 1 if too_large else 0


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        required=("config",),
        usage="python -m effnetv2_jax.tools.tpu_compile --config=configs/l_21k.py",
    )
