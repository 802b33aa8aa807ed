"""The story of a run, from a configuration to a trained and evaluated network.

One loop serves all stages: a stage is a value that says at which size and how strongly the
next steps train. A run resumes by itself from its workdir, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from effnetv2_jax.checkpoint import Checkpoints
from effnetv2_jax.compilation import (
    CompilationCounts,
    StagePrograms,
    StageStep,
    keep_compilations,
)
from effnetv2_jax.config import Plan, make_plan
from effnetv2_jax.data.datasets import Dataset, load_dataset
from effnetv2_jax.data.pipeline import check_augmentation, train_batches
from effnetv2_jax.errors import InputError
from effnetv2_jax.evaluate import Evaluator
from effnetv2_jax.initial_weights import InitialWeights, load_initial_weights
from effnetv2_jax.losses import Loss
from effnetv2_jax.memory import Fit, Fits, device_limit
from effnetv2_jax.mixing import check_mixing
from effnetv2_jax.models.create import create_model
from effnetv2_jax.models.network import Network
from effnetv2_jax.optimizers import learning_rate_schedule, make_optimizer
from effnetv2_jax.parallel import (
    AXIS,
    check_batch_size,
    check_form,
    parallel_train_step,
    replicate,
    smallest_over_processes,
    split_batch,
    stand_in,
)
from effnetv2_jax.paths import absolute
from effnetv2_jax.processes import check_connected, stop_signals
from effnetv2_jax.progressive import Stage, format_stages
from effnetv2_jax.reporting import (
    MetricsWriter,
    Progress,
    log_parameters,
    make_profiler,
    rewind_metrics,
)
from effnetv2_jax.steps import StepResults, TrainStep, make_train_step, make_update
from effnetv2_jax.tools.plot import plot_progress
from effnetv2_jax.train_state import WINDOW_METRICS, TrainState, create_train_state, initialise
from effnetv2_jax.workdir import open_workdir

# Steps before a stage ends at which the input of the next one starts. Both hold a shuffle buffer
# from then on, so not earlier than a slow pipeline needs.
_WARM_STEPS = 32


class TrainingDiverged(InputError):
    """The loss or the gradient stopped being finite."""


class Interrupted(Exception):
    """A signal ended training after a checkpoint; `signum` says which."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}")
        self.signum = signum
        self.step = step


class BestEvaluation:
    """The best evaluation so far by one metric, and whether it is too old to go on.

    Args:
      metric: the larger the better.
      patience_steps: it is too old when it is this far behind the last one; 0: never.
    """

    def __init__(self, metric: str, patience_steps: int):
        self.metric = metric
        self.step = 0
        self.value = -math.inf
        self._patience_steps = patience_steps
        self._last_step = 0

    def add(self, step: int, results: Mapping[str, float]) -> bool:
        """Takes an evaluation in; returns whether it is the best."""
        self._last_step = step
        if results[self.metric] <= self.value:
            return False
        self.value, self.step = results[self.metric], step
        return True

    @property
    def is_stale(self) -> bool:
        """Whether training should end."""
        return 0 < self._patience_steps <= self._last_step - self.step


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Trains to the end, or goes on where an earlier call in the same workdir stopped.

    Args:
      config: as `config.base_config()` has it.
      workdir: on a disk or in a bucket, as gs://bucket/run; gets checkpoints, `config.json`,
        `plan.json`, `classes.json`, `metrics.jsonl`, TensorBoard events and `progress.png`.

    Returns:
      The last evaluation: `eval/*` of the weights and `eval_ema/*` of their moving average.

    Raises:
      InputError: bad input, before anything is written.
      TrainingDiverged: the last good checkpoint stays.
      Interrupted: SIGTERM or SIGINT; a checkpoint of the last step is there.
    """
    if config.init_from == "":
        raise InputError(
            "init_from is empty: this configuration starts from trained weights, so name the "
            "workdir of their run, as --config.init_from=runs/l_21k."
        )
    check_connected()
    check_form(config.parallel)
    check_batch_size(config.batch_size, jax.device_count())
    check_augmentation(**config.augment)
    check_mixing(config.mixing)
    loss = Loss(**config.loss)
    dataset = load_dataset(**config.data)
    plan = make_plan(
        config,
        num_train_examples=dataset.train.num_examples,
        num_eval_examples=dataset.eval.num_examples,
        num_classes=dataset.num_classes,
    )
    model = create_model(**config.model, num_classes=dataset.num_classes, axis_name=AXIS)
    check_sizes(config, plan, model.total_stride)
    schedule = planned_schedule(config, plan)
    optimizer = make_optimizer(schedule, **config.optimizer)
    splits = {"eval": dataset.eval}
    if dataset.minival is not None:
        splits["minival"] = dataset.minival
    evaluator = Evaluator(
        model,
        splits,
        loss=loss,
        on_corrupt=config.on_corrupt,
        parallel=config.parallel,
        **{name: config.eval[name] for name in ("batch_size", "crop", "crop_fraction", "resize")},
        **config.normalize,
    )
    path = absolute(workdir)
    checkpoints = Checkpoints(path / "checkpoints", keep=config.checkpoint.keep)
    best = Checkpoints(path / "best", keep=1)
    key = jax.random.PRNGKey(config.seed)
    new_state = functools.partial(
        create_train_state, model, optimizer, image_size=plan.stages[0].image_size
    )
    template = jax.eval_shape(new_state, key)
    initial: InitialWeights | None = None
    if config.init_from is not None and not checkpoints.steps():
        initial = load_initial_weights(
            config.init_from,
            {"params": template.params, "batch_stats": template.batch_stats},
            model=model,
            mean=config.normalize.mean,
            std=config.normalize.std,
            init_head=config.init_head,
            class_names=dataset.class_names,
        )

    limit = smallest_over_processes(device_limit(jax.local_devices()[0]))
    fits = planned_fits(config, plan, model, jax.device_count(), limit, path / "fits.json")
    open_workdir(path, config, plan, dataset.class_names)
    keep_compilations(str(path / "compilation_cache"))
    counts = CompilationCounts()
    logging.info(
        "%s on %s: %d training and %d held-out examples, %d classes; %d device(s), %d process(es)",
        config.model.variant,
        dataset.name,
        plan.num_train_examples,
        plan.num_eval_examples,
        plan.num_classes,
        jax.device_count(),
        jax.process_count(),
    )
    logging.info("Stages of progressive learning:\n%s", format_stages(plan.stages))

    log_parameters(template.params)
    state = checkpoints.restore_newest(template)
    if state is None:
        state = _first_state(new_state, key, initial)
    else:
        logging.info("Resuming from the checkpoint of step %d.", int(state.step))
    step = int(state.step)
    history = rewind_metrics(path, step)
    # The paper stops early by minival (section 5.1); without one, the evaluation split decides.
    selection = "minival_ema/top1" if dataset.minival is not None else "eval_ema/top1"
    best_evaluation = BestEvaluation(selection, plan.patience_steps)
    for row in history:
        if selection in row:
            best_evaluation.add(row["step"], row)
    if step >= plan.total_steps or best_evaluation.is_stale:
        logging.info("The run in %s is complete: %d steps are done.", path, step)
        return _last_evaluation(history)

    @functools.cache
    def mapped_step(fit: Fit) -> Any:
        step = planned_train_step(config, plan, model, optimizer, loss, fit)
        return parallel_train_step(step, form=config.parallel)

    programs = StagePrograms(
        plan.stages,
        fits=fits,
        mapped_step=mapped_step,
        evaluate=lambda state, *of: evaluator.compile(variables_of(state), *of, limit=limit),
        evaluation_sizes=functools.partial(evaluation_sizes, config),
    )
    state, key = replicate(state), replicate(key)
    writer = MetricsWriter(path)
    progress = Progress(plan, config.batch_size, step)
    profile = make_profiler(path, config.profile_steps)
    stage: Stage | None = None
    previous: Any = None
    unreported: tuple[int, Stage, Any] | None = None

    def report(done: int, of_stage: Stage, metrics: Any) -> None:
        """Writes the metrics of the window that ended with step `done`."""
        values = jax.device_get(metrics)
        check_finite(values, checkpoints)
        means = {name: float(values[name] / values["steps"]) for name in WINDOW_METRICS}
        scalars = {
            "train/loss": means["loss"],
            "train/top1": means["top1"],
            "train/grad_norm": means["grad_norm"],
            "train/learning_rate": float(schedule(done - 1)),
            "train/epoch": done / plan.steps_per_epoch,
            "progressive/stage": of_stage.index,
            "progressive/image_size": of_stage.image_size,
            "progressive/dropout_rate": of_stage.dropout_rate,
            "progressive/randaug_magnitude": of_stage.randaug_magnitude,
            "progressive/mixup_alpha": of_stage.mixup_alpha,
            "progressive/cutmix_alpha": of_stage.cutmix_alpha,
            **progress.rates(done),
        }
        writer.write(done, scalars)
        progress.log(done, scalars, of_stage.index)

    with stop_signals() as stop, contextlib.ExitStack() as cleanup:
        for closing in (programs.close, checkpoints.close, best.close, writer.close):
            cleanup.callback(closing)
        batches = staged_batches(config, plan, dataset, step)
        while step < plan.total_steps and not best_evaluation.is_stale:
            waiting_since = time.monotonic()
            next_stage, examples = next(batches)
            progress.waited_for_input(time.monotonic() - waiting_since)
            batch = split_batch(stop.mark(examples))
            if next_stage is not stage:
                paused_at = time.monotonic()
                stage = next_stage
                strengths = replicate(stage_strengths(stage))
                stage_step = programs.enter(stage, stand_in((state, batch, strengths, key)))
                progress.paused(time.monotonic() - paused_at)
                if stage_step.is_new:
                    writer.write(step + 1, report_compilation(stage_step, stage))
            state, metrics = stage_step.step(state, batch, strengths, key)
            step += 1
            # Read what is finished only now that the next step is on its way.
            if unreported is not None:
                report(*unreported)
                unreported = None
            jax.block_until_ready(previous)
            stop_signum = stop.agreed(previous)
            previous = metrics
            profile(step)

            ends_stage = step == stage.last_step
            evaluates = ends_stage or step % plan.eval_every_steps == 0
            is_last = step == plan.total_steps
            saves = is_last or stop_signum or step % plan.checkpoint_every_steps == 0
            if step % config.log_every_steps == 0 or is_last:
                unreported = (step, stage, metrics)
                programs.raise_failures()
            if not (evaluates or saves):
                continue
            if unreported is not None:
                report(*unreported)
                unreported = None
            check_finite(jax.device_get(metrics), checkpoints)
            paused_at = time.monotonic()
            if evaluates:
                programs.wait_for_evaluation(stage)
                results = evaluate_state(evaluator, state, config, stage)
                writer.write(step, results)
                writer.flush()
                if best_evaluation.add(step, results):
                    best.save(state)
                    # The best must be safe before a newer checkpoint makes it history.
                    best.wait()
                is_last = is_last or best_evaluation.is_stale
                if (ends_stage or is_last) and jax.process_index() == 0:
                    plot_progress(path)
            if saves or is_last:
                writer.flush()
                checkpoints.save(state)
            progress.paused(time.monotonic() - paused_at)
            if stop_signum and not is_last:
                checkpoints.wait()
                logging.info("Signal %d: saved step %d, stopping.", stop_signum, step)
                raise Interrupted(stop_signum, step)
    if step < plan.total_steps:
        logging.info(
            "No gain in %s since step %d: training ends early.", selection, best_evaluation.step
        )
    logging.info(
        "After the first step training stood still for compilation %.1f s of %.1f s (%.1f %%); "
        "of %d programs %d were in the cache.",
        programs.waited,
        programs.seconds_since_first_step,
        100 * programs.waited / programs.seconds_since_first_step,
        counts.programs,
        counts.from_cache,
    )
    logging.info("The run in %s is complete: %d steps are done.", path, step)
    return results


def planned_schedule(config: ConfigDict, plan: Plan) -> optax.Schedule:
    """The learning rate of each step."""
    arguments = dict(config.learning_rate)
    del arguments["per_256_images"]  # Became the plan's peak learning rate.
    return learning_rate_schedule(
        peak=plan.peak_learning_rate,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        **arguments,
    )


def planned_train_step(
    config: ConfigDict,
    plan: Plan,
    model: Network,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    fit: Fit,
) -> TrainStep:
    """The step of one replica that a configuration describes, in a setting that fits."""
    return make_train_step(
        model.clone(remat_groups=fit.remat_groups),
        optimizer,
        **config.normalize,
        loss=loss,
        ema_decay=config.ema_decay,
        mixing=config.mixing if plan.use_mixing else None,
        window_steps=config.log_every_steps,
        micro_batches=fit.micro_batches,
        axis_name=AXIS,
    )


def planned_update(
    config: ConfigDict, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, StepResults], tuple[TrainState, dict[str, jax.Array]]]:
    """The end of that step, which all its micro-batches share."""
    return make_update(
        optimizer,
        ema_decay=config.ema_decay,
        window_steps=config.log_every_steps,
        axis_name=AXIS,
    )


def planned_fits(
    config: ConfigDict,
    plan: Plan,
    model: Network,
    num_devices: int,
    limit: int | None,
    file: epath.Path | None = None,
) -> Fits:
    """What to try so that each stage's step fits into `limit` bytes of a device (None: unknown).

    `file` keeps what fitted for the next start.
    """
    return Fits(
        model,
        per_device=config.batch_size // num_devices,
        num_stages=len(plan.stages),
        limit=limit,
        file=file,
        **config.memory,
    )


def stage_strengths(stage: Stage) -> dict[str, np.float32]:
    """What the train step is told of a stage."""
    names = ("dropout_rate", "mixup_alpha", "cutmix_alpha")
    return {name: np.float32(getattr(stage, name)) for name in names}


def evaluation_sizes(config: ConfigDict, stage: Stage) -> tuple[int, ...]:
    """The image sizes of the evaluations in a stage."""
    sizes = [config.eval.image_size]
    if config.eval.at_stage_size and stage.image_size not in sizes:
        sizes.append(stage.image_size)
    return tuple(sizes)


def report_compilation(compiled: StageStep, stage: Stage) -> dict[str, float]:
    """Logs what a stage's recompile cost; returns the same as metrics."""
    logging.info(
        "Stage %d: compiled the train step for %d px in %.1f s, %.1f s of them while the stage "
        "before trained%s.",
        stage.index + 1,
        stage.image_size,
        compiled.seconds,
        compiled.hidden_seconds,
        "" if compiled.fit == Fit() else f"; {compiled.fit}, to fit into memory",
    )
    return {
        "perf/compile_seconds": compiled.seconds,
        "perf/compile_hidden_seconds": compiled.hidden_seconds,
        "perf/micro_batches": compiled.fit.micro_batches,
        "perf/remat_groups": compiled.fit.remat_groups,
    }


def staged_batches(
    config: ConfigDict, plan: Plan, dataset: Dataset, step: int
) -> Iterator[tuple[Stage, dict[str, np.ndarray]]]:
    """This host's training batches from `step` on, each with its stage.

    The next stage's first batch is prepared while the last ones of this stage train.
    """

    def first_batch(stage: Stage) -> tuple[dict[str, np.ndarray], Iterator[dict[str, np.ndarray]]]:
        batches = train_batches(
            dataset.train,
            seed=config.seed,
            batch_size=config.batch_size,
            first_step=max(step, stage.first_step),
            last_step=stage.last_step,
            image_size=stage.image_size,
            randaug_magnitude=stage.randaug_magnitude,
            num_classes=dataset.num_classes,
            **config.augment,
            on_corrupt=config.on_corrupt,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return next(batches), batches

    stages = [stage for stage in plan.stages if stage.num_steps and stage.last_step > step]
    with ThreadPoolExecutor(1, "next stage's input") as pool:
        coming = pool.submit(first_batch, stages[0])
        for stage, following in itertools.zip_longest(stages, stages[1:]):
            first, rest = coming.result()
            begin = max(step, stage.first_step)
            warm_at = max(stage.last_step - _WARM_STEPS, begin)
            for number, batch in enumerate(itertools.chain([first], rest), begin):
                if number == warm_at and following is not None:
                    coming = pool.submit(first_batch, following)
                yield stage, batch


def variables_of(state: TrainState) -> dict[str, Any]:
    """The network's variables, not averaged."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def evaluate_state(
    evaluator: Evaluator, state: TrainState, config: ConfigDict, stage: Stage
) -> dict[str, float]:
    """Evaluates the weights and their average at the evaluation size, on every split.

    With `config.eval.at_stage_size` the stage's size follows as `eval_stage/*`: on tiny images
    a network trained at 32 px is near chance at 48.
    """
    started_at = time.monotonic()
    raw = variables_of(state)
    ema = {"params": state.ema_params, "batch_stats": state.ema_batch_stats}
    results: dict[str, float] = {}
    for split in evaluator.splits:
        variables = {split: raw, f"{split}_ema": ema}
        results.update(evaluator(split, variables, config.eval.image_size))
    if config.eval.at_stage_size:
        if stage.image_size == config.eval.image_size:
            same = {
                name.replace("eval", "eval_stage", 1): value
                for name, value in results.items()
                if name.startswith("eval")
            }
            results.update(same)
        else:
            variables = {"eval_stage": raw, "eval_stage_ema": ema}
            results.update(evaluator("eval", variables, stage.image_size))
    logging.info(
        "[step %d] top1 %.2f %%, of the average %.2f %% (%d px, all %d examples)%s",
        int(state.step),
        100 * results["eval/top1"],
        100 * results["eval_ema/top1"],
        config.eval.image_size,
        results["eval/num_examples"],
        f"; at {stage.image_size} px {100 * results['eval_stage/top1']:.2f} and "
        f"{100 * results['eval_stage_ema/top1']:.2f} %"
        if config.eval.at_stage_size
        else "",
    )
    return {**results, "perf/eval_seconds": time.monotonic() - started_at}


def check_finite(metrics: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Raises `TrainingDiverged` if a step since the start had a loss or gradient of NaN or inf."""
    step = int(metrics["nonfinite_step"])
    if step >= 0:
        checkpoints.wait()
        steps = checkpoints.steps()
        good = f"the last good checkpoint is of step {steps[-1]}" if steps else "no checkpoint yet"
        raise TrainingDiverged(
            f"the loss or gradient of step {step} is not finite ({good}): lower "
            "learning_rate.per_256_images or set optimizer.clip_norm."
        )


def check_sizes(config: ConfigDict, plan: Plan, total_stride: int) -> None:
    """Refuses images that the network or the pairs of mixing cannot take.

    Raises:
      InputError: smaller than the network's total stride, or an odd share of a batch.
    """
    sizes = {"progressive.image_size": min(s.image_size for s in plan.stages)}
    sizes["eval.image_size"] = config.eval.image_size
    for key, size in sizes.items():
        if size < total_stride:
            raise InputError(
                f"{key} gives images of {size} px, below the network's total stride of "
                f"{total_stride}: raise it, or lower model.stem_stride."
            )
    per_device = config.batch_size // jax.device_count()
    if plan.use_mixing and per_device % 2:
        raise InputError(
            f"mixup and cutmix mix pairs, and batch_size {config.batch_size} leaves {per_device} "
            f"examples to each of {jax.device_count()} devices: choose a multiple of "
            f"{2 * jax.device_count()}."
        )


def _first_state(
    new_state: Callable[[jax.Array], TrainState], key: jax.Array, initial: InitialWeights | None
) -> TrainState:
    """The state before the first step, with another run's weights in it if there are some."""
    state: Any = initialise(new_state, key)
    if initial is None:
        return state
    variables = initial.apply({"params": state.params, "batch_stats": state.batch_stats})
    return state.replace(
        **variables,
        ema_params=variables["params"],
        ema_batch_stats=variables["batch_stats"],
    )


def _last_evaluation(history: list[dict[str, Any]]) -> dict[str, float]:
    evaluations = [row for row in history if "eval/top1" in row]
    return {k: v for k, v in evaluations[-1].items() if k != "step"} if evaluations else {}
