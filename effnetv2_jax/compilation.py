"""Compiles a stage's programs while the stage before trains: a new image size costs no time.

An accelerator's host has idle cores for it. What is compiled here is dropped: JAX keeps the
executable and finds it when the mapped function is called, whereas a compiled object of a mapped
function cannot be called on several processes.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from absl import logging

from effnetv2_jax.memory import DoesNotFit, Fit, Fits, NoRoom, compile_within, first_that_fits
from effnetv2_jax.progressive import Stage

Result = TypeVar("Result")


class Compilation(Generic[Result]):
    """Something that is being compiled.

    Attributes:
      seconds: what it took, once it is done; tracing included.
      waited: seconds that callers of `wait` stood still for it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waited = 0.0
        self._future: Future[Result] = Future()

    def run(self, build: Callable[[], Result]) -> None:
        """Builds the result; an exception is raised by `wait`."""
        begun = time.monotonic()
        try:
            result = build()
        except BaseException as error:  # Told to whoever waits, whatever it is.
            self._future.set_exception(error)
        else:
            self.seconds = time.monotonic() - begun
            self._future.set_result(result)

    @property
    def failure(self) -> BaseException | None:
        """What `wait` raises, if that is known already."""
        return self._future.exception() if self._future.done() else None

    def wait(self) -> Result:
        """The result, as soon as there is one."""
        begun = time.monotonic()
        try:
            return self._future.result()
        finally:
            self.waited += time.monotonic() - begun


class BackgroundCompiler:
    """Compiles on a thread of its own, in the order of `submit`.

    The order is the same on every process, which compilers that talk to each other rely on.

    Attributes:
      is_closed: whether nothing more is wanted; a task that has several parts ends before the next.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.is_closed = False
        self._thread = threading.Thread(target=self._work, name="compiler", daemon=True)
        self._thread.start()

    def submit(self, build: Callable[[], Result]) -> Compilation[Result]:
        """Starts compiling as soon as what was submitted before is done."""
        compilation: Compilation[Result] = Compilation()
        self._tasks.put(lambda: compilation.run(build))
        return compilation

    def close(self) -> None:
        """Waits for what is being compiled, and drops the rest.

        XLA aborts a process that ends while it compiles.
        """
        self.is_closed = True
        self._tasks.put(lambda: None)
        self._thread.join()

    def _work(self) -> None:
        while not self.is_closed:
            self._tasks.get()()


@dataclasses.dataclass(frozen=True)
class StageStep:
    """The train step of a stage, compiled.

    Attributes:
      step: the mapped function.
      fit: how it was cut down to fit into memory.
      seconds: of compilation.
      hidden_seconds: of those, while the stage before trained.
      is_new: whether no earlier stage of this start has the same program.
    """

    step: Any
    fit: Fit
    seconds: float
    hidden_seconds: float
    is_new: bool


class StagePrograms:
    """The programs of every stage, each compiled before it is needed.

    Args:
      stages: in order.
      fits: what to try for each stage.
      mapped_step: the mapped train step in a setting; the same object for the same setting.
      evaluate: compiles the evaluation of (state, image size, shape of an example's label), or
        raises `DoesNotFit`.
      evaluation_sizes: the image sizes of the evaluations in a stage.

    Attributes:
      waited: seconds that training stood still for programs, but for the first one.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        fits: Fits,
        mapped_step: Callable[[Fit], Any],
        evaluate: Callable[[Any, int, tuple[int, ...]], None],
        evaluation_sizes: Callable[[Stage], Collection[int]],
    ):
        self.waited = 0.0
        self._stages = stages
        self._fits = fits
        self._mapped_step = mapped_step
        self._evaluate = evaluate
        self._evaluation_sizes = evaluation_sizes
        self._compiler = BackgroundCompiler()
        self._steps: dict[int, Compilation[tuple[Fit, Any]]] = {}
        self._evaluations: dict[int, Compilation[None]] = {}
        self._entered: set[int] = set()
        self._first_step_at = math.inf

    @property
    def seconds_since_first_step(self) -> float:
        """Wall time since the first program was there."""
        return time.monotonic() - self._first_step_at

    def enter(self, stage: Stage, arguments: tuple[Any, ...]) -> StageStep:
        """The step of a stage; what comes after it starts compiling.

        Args:
          stage: which one.
          arguments: state, split batch, strengths and key, as `parallel.stand_in` has them.

        Raises:
          NoRoom: no setting fits into memory.
        """
        is_first = not self._entered
        compilation = self._step_of(stage, arguments)
        fit, step = compilation.wait()
        if is_first:
            self._first_step_at = time.monotonic()
        else:
            self.waited += compilation.waited
        for size in self._evaluation_sizes(stage):
            self._compile_evaluation(size, arguments)
        following = next((s for s in self._stages[stage.index + 1 :] if s.num_steps), None)
        if following is not None:
            self._step_of(following, arguments)
        is_new = stage.image_size not in self._entered
        self._entered.add(stage.image_size)
        hidden = max(0.0, compilation.seconds - compilation.waited)
        return StageStep(step, fit, compilation.seconds, hidden, is_new)

    def wait_for_evaluation(self, stage: Stage) -> None:
        """Returns once the evaluations of a stage are compiled."""
        for size in self._evaluation_sizes(stage):
            evaluation = self._evaluations[size]
            before = evaluation.waited
            evaluation.wait()
            self.waited += evaluation.waited - before

    def raise_failures(self) -> None:
        """Raises what a program for later is known to fail with, before it is needed."""
        compilations: list[Compilation[Any]] = [*self._steps.values(), *self._evaluations.values()]
        for compilation in compilations:
            if compilation.failure is not None:
                raise compilation.failure

    def close(self) -> None:
        """Compiles nothing more."""
        self._compiler.close()

    def _step_of(self, stage: Stage, arguments: tuple[Any, ...]) -> Compilation[tuple[Fit, Any]]:
        if stage.index not in self._steps:
            self._steps[stage.index] = self._compiler.submit(
                lambda: self._compile_step(stage, arguments)
            )
        return self._steps[stage.index]

    def _compile_evaluation(self, size: int, arguments: tuple[Any, ...]) -> None:
        if size not in self._evaluations:
            state, batch, *_ = arguments
            label_shape = batch["label"].shape[2:]

            def compile_evaluation() -> None:
                try:
                    self._evaluate(state, size, label_shape)
                except DoesNotFit as error:
                    raise NoRoom(
                        f"the evaluation at {size} px does not fit into a device's memory "
                        f"({error}): use more devices or a smaller eval.batch_size."
                    ) from error

            self._evaluations[size] = self._compiler.submit(compile_evaluation)

    def _compile_step(self, stage: Stage, arguments: tuple[Any, ...]) -> tuple[Fit, Any]:
        state, batch, *rest = arguments
        size = stage.image_size
        images = np.zeros((*batch["image"].shape[:2], size, size, 3), np.uint8)
        batch = {**batch, "image": images}

        def compile_fit(fit: Fit) -> Any:
            if self._compiler.is_closed:
                raise RuntimeError("the run ends")  # Nobody waits for it.
            step = self._mapped_step(fit)
            lowered = step.lower(state, batch, *rest)
            compile_within(lowered, self._fits.limit)
            return step

        def tell(fit: Fit, reason: str) -> None:
            logging.info("At %d px a step of %s does not fit (%s).", size, fit, reason)

        try:
            found = first_that_fits(self._fits.candidates(stage), compile_fit, tell)
        except DoesNotFit as error:
            raise NoRoom(
                f"the train step for {size} px does not fit into a device's memory ({error}): use "
                "more devices, a smaller batch_size, or memory.micro_batches=auto."
            ) from error
        self._fits.remember(stage, found[0])
        return found


def keep_compilations(directory: str) -> None:
    """Keeps compiled programs in a folder, so that a restart compiles nothing again.

    `JAX_COMPILATION_CACHE_DIR` takes precedence, and so does the folder of an earlier call: JAX
    opens its cache once in a process.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", directory)
    # JAX leaves out what compiles within a second, which is most programs of a run, if not most
    # of the time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class CompilationCounts:
    """How many programs this process asked for since the start, and how many were in the cache."""

    def __init__(self) -> None:
        self.programs = 0
        self.from_cache = 0
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/compile_requests_use_cache":
            self.programs += 1
        elif event == "/jax/compilation_cache/cache_hits":
            self.from_cache += 1
