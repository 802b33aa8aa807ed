"""How a benchmark speaks with the programs that it times: one JSON object a line.

A program is started with the name of what it times. It reads a `Work` and the processors that it
may use, prepares it, and answers with its versions; then it runs as often as it is told and
answers with the seconds. Standard library only: it is imported by interpreters that have nothing
else in common.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

# The program of ours that gives a whole batch to one device.
WITHOUT_SPLIT = "without-split"


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
      kind: `train` (a whole step: forward, backward, RMSProp, moving average), `inference`
        (images to logits), `input` (JPEG files to augmented batches) or `predict` (JPEG files to
        classes).
      variant: the network, by our name.
      image_size: pixels.
      batch_size: images.
      dtype: of the arithmetic, float32 or bfloat16.
      threads: how many threads may compute.
      folder: of `input` and `predict`, the images: `folder/CLASS/*.jpg`.
      randaug_magnitude: of `input`, for two operations an image; None: none.
      depth_multiplier: of the network, which only this project can change.
    """

    kind: str
    variant: str
    image_size: int
    batch_size: int
    dtype: str = "float32"
    threads: int = 1
    folder: str = ""
    randaug_magnitude: float | None = None
    depth_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class Program:
    """Work that is ready to run.

    Attributes:
      versions: of the libraries, for people.
      device: likewise.
      run: does the work that many times, one batch each, and returns when all of it is done.
      peak_bytes: of the device's memory since the start; None: the device shares the host's.
      facts: more about it, for instance `peak_flops`.
    """

    versions: str
    device: str
    run: Callable[[int], None]
    peak_bytes: Callable[[], int] | None = None
    facts: dict[str, float] = dataclasses.field(default_factory=dict)


class Unavailable(Exception):
    """A program cannot do a kind of work; the message says why."""


def image_paths(work: Work) -> list[str]:
    """The JPEG files of a work's folder, sorted.

    Raises:
      Unavailable: there are none.
    """
    paths = sorted(map(str, Path(work.folder).glob("*/*.jp*g")))
    if not paths:
        raise Unavailable(f"there are no JPEG files as {work.folder}/CLASS/*.jpg")
    return paths


def serve(prepare: Callable[[str, Work], Program]) -> None:
    """The main function of a program: answers standard input on standard output until it ends.

    Args:
      prepare: from the name on the command line and the work to something that is compiled and
        has run at least once; raises `Unavailable`.
    """
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, question["cores"])  # Before a library starts its threads.
    work = Work(**question["work"])
    begun = time.perf_counter()
    try:
        program = prepare(sys.argv[1], work)
    except Unavailable as error:
        _answer(answers, refused=str(error))
        return
    except Exception as error:  # Whatever a library raises, the others are timed.
        traceback.print_exc()
        _answer(answers, refused=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    _answer(
        answers,
        versions=program.versions,
        device=program.device,
        prepare_seconds=time.perf_counter() - begun,
        facts=program.facts,
    )
    _forget_peak()
    for line in sys.stdin:
        repetitions = json.loads(line)["run"]
        program.run(1)  # What stood still has lost its caches, and its memory to the system.
        begun = time.perf_counter()
        program.run(repetitions)
        seconds = time.perf_counter() - begun
        peak = _peak_of_process() if program.peak_bytes is None else program.peak_bytes()
        _answer(answers, seconds=seconds, peak_bytes=peak)


def _answer(answers: TextIO, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _forget_peak() -> None:
    """Peak memory counts from here on: compilers and set-up need more than what they set up."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:  # proc(5): 5 resets the peak.
            file.write("5")
    except OSError:  # Not Linux: the peak is that of the whole life.
        pass


def _peak_of_process() -> int:
    """Bytes of memory that the process held at most; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            (line,) = [line for line in file if line.startswith("VmHWM:")]
    except (OSError, ValueError):
        return 0
    return int(line.split()[1]) * 1024
