"""Requests to stop, in loops within loops."""

from __future__ import annotations

import os
import signal

import pytest

from effnetv2_jax.processes import stop_signals


def test_a_loop_within_a_loop_hears_what_came_before_and_passes_on_what_comes():
    handler = signal.getsignal(signal.SIGTERM)
    with stop_signals() as outer:
        with stop_signals() as inner:
            assert (outer.signum, inner.signum) == (0, 0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (outer.signum, inner.signum) == (signal.SIGTERM,) * 2
        with stop_signals() as late:
            assert late.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    with stop_signals() as afterwards:
        assert afterwards.signum == 0


def test_a_second_interrupt_is_pythons_own():
    # A process that was started in the background ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice():
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
