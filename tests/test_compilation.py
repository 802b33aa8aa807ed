"""Programs compiled ahead: in order, once, and found by the call that needs them."""

from __future__ import annotations

import functools
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

from effnetv2_jax.compilation import BackgroundCompiler, StagePrograms
from effnetv2_jax.errors import InputError
from effnetv2_jax.memory import DoesNotFit, Fit, Fits
from effnetv2_jax.parallel import parallel_train_step, replicate, split_batch, stand_in
from effnetv2_jax.progressive import Stage
from tests.test_steps import batch_of, initial_state, strengths, tiny_model, train_step

STAGES = [Stage(i, 4 * i, 4 * i + 4, size, 0.1, 0, 0, 0) for i, size in enumerate((16, 24, 24, 32))]


@pytest.fixture
def backend_compilations():
    """Sizes of what XLA compiled since the test began."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.clear_event_listeners()


def programs(stages=STAGES, evaluated=None, mapped_step=None, evaluate=None, **fits):
    @functools.cache
    def mapped(fit):
        return parallel_train_step(train_step(tiny_model(), micro_batches=fit.micro_batches))

    evaluated = [] if evaluated is None else evaluated
    return StagePrograms(
        stages,
        fits=Fits(tiny_model(), per_device=2, num_stages=len(stages), **{"limit": None} | fits),
        mapped_step=mapped_step or mapped,
        evaluate=evaluate
        or (lambda state, size, label_shape: evaluated.append((size, label_shape))),
        evaluation_sizes=lambda stage: (32, stage.image_size),
    )


def arguments(size):
    placed = replicate((initial_state(), strengths(), jax.random.PRNGKey(0)))
    state, strength, key = placed
    return state, split_batch(batch_of(16, size)), strength, key


def test_the_call_finds_what_was_compiled_ahead(backend_compilations):
    """Eight devices; three sizes in four stages."""
    ahead = programs()
    args = arguments(16)
    state = args[0]
    taken = []
    for stage in STAGES:
        _, *rest = arguments(stage.image_size)
        step = ahead.enter(stage, stand_in((state, *rest)))
        taken.append(step.is_new)
        ahead.wait_for_evaluation(stage)
        following = STAGES[stage.index + 1 :][:1]
        for later in following:
            ahead._steps[later.index].wait()
        backend_compilations.clear()
        state, metrics = step.step(state, *rest)
        jax.block_until_ready(metrics)
        assert backend_compilations == [], stage
    assert taken == [True, True, False, True]


def test_the_next_stage_and_the_evaluation_compile_while_a_stage_trains():
    evaluated, compiled = [], []
    may_go_on = threading.Event()

    class Step:
        def __init__(self, fit):
            self.fit = fit

        def lower(self, state, batch, *rest):
            size = batch["image"].shape[2]
            if size == 24:
                assert may_go_on.wait(20)
            compiled.append(size)
            return jax.jit(lambda: size).lower()

    ahead = programs(evaluated=evaluated, mapped_step=Step)
    labels = {"image": np.zeros((8, 2, 16, 16, 3), np.uint8), "label": np.zeros((8, 2, 5))}
    first = ahead.enter(STAGES[0], (None, labels, None, None))
    ahead.wait_for_evaluation(STAGES[0])
    # Each size of evaluation once, before the stage that nobody waits for yet.
    assert evaluated == [(32, (5,)), (16, (5,))]
    assert first.is_new and first.hidden_seconds < first.seconds
    assert compiled == [16]
    time.sleep(0.3)
    may_go_on.set()
    second = ahead.enter(STAGES[1], (None, labels, None, None))
    assert compiled[:2] == [16, 24]
    assert second.seconds >= 0.3 and second.hidden_seconds >= 0.2
    assert ahead.waited < second.seconds


def test_compilations_keep_their_order_and_raise_where_they_are_waited_for():
    compiler = BackgroundCompiler()
    order = []

    def task(number):
        order.append(number)
        if number == 1:
            raise ValueError("one")
        return number

    waiting = [compiler.submit(functools.partial(task, number)) for number in range(3)]
    assert waiting[2].wait() == 2 and order == [0, 1, 2]
    with pytest.raises(ValueError, match="one"):
        waiting[1].wait()


def test_what_fits_nowhere_is_one_sentence():
    class TooLarge:
        def lower(self, *_):
            raise DoesNotFit("2 of 1 bytes", 2)

    ahead = programs(mapped_step=lambda fit: TooLarge(), limit=1)
    with pytest.raises(InputError, match=r"the train step for 16 px does not fit.*2 of 1 bytes"):
        ahead.enter(STAGES[0], stand_in(arguments(16)))


def test_what_later_stages_need_fails_before_they_begin():
    """The next stage's step, and the evaluation, which is not of the batch's size."""

    class Step:
        def __init__(self, fit):
            pass

        def lower(self, state, batch, *_):
            if batch["image"].shape[2] == 24:
                raise DoesNotFit("2 of 1 bytes", 2)
            return jax.jit(lambda: 1).lower()

    ahead = programs(mapped_step=Step)
    ahead.enter(STAGES[0], stand_in(arguments(16)))
    ahead.wait_for_evaluation(STAGES[0])
    with pytest.raises(InputError, match="the train step for 24 px does not fit"):
        _raise_once_known(ahead)

    def evaluate(state, size, label_shape):
        raise DoesNotFit("4 of 3 bytes", 4)

    ahead = programs(STAGES[:1], mapped_step=Step, evaluate=evaluate)
    ahead.enter(STAGES[0], stand_in(arguments(16)))
    with pytest.raises(InputError, match=r"evaluation at 32 px does not fit.*smaller eval.batch"):
        _raise_once_known(ahead)


def _raise_once_known(ahead):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ahead.raise_failures()
        time.sleep(0.01)


def test_a_run_that_ends_tries_no_further_settings():
    tried = []
    is_tried = threading.Event()
    may_go_on = threading.Event()

    class Step:
        def __init__(self, fit):
            self.fit = fit

        def lower(self, state, batch, *_):
            if batch["image"].shape[2] == 16:
                return jax.jit(lambda: 1).lower()
            tried.append(self.fit)
            is_tried.set()
            assert may_go_on.wait(20)
            raise DoesNotFit("too large", 0)

    ahead = programs(mapped_step=Step, limit=2**30)
    ahead.enter(STAGES[0], stand_in(arguments(16)))
    assert is_tried.wait(20)
    threading.Timer(0.2, may_go_on.set).start()
    ahead.close()
    assert tried == [Fit()]


def test_settings_are_tried_until_one_fits_and_not_again_at_the_next_start(tmp_path):
    tried = []

    class Step:
        def __init__(self, fit):
            self.fit = fit

        def lower(self, *_):
            tried.append(self.fit)
            if self.fit.micro_batches == 1:
                raise DoesNotFit("too large", 0)
            return jax.jit(lambda: 1).lower()

    def start():
        tried.clear()
        file = epath.Path(tmp_path / "fits.json")
        ahead = programs(mapped_step=Step, limit=2**30, file=file)
        fit = ahead.enter(STAGES[0], stand_in(arguments(16))).fit
        ahead.close()
        return fit

    assert start() == Fit(2, 0)
    assert tried[0] == Fit()
    assert start() == Fit(2, 0)
    assert tried[0] == Fit(2, 0)
