"""How fast this project is beside others: `python -m effnetv2_jax.tools.benchmark train`.

The word says what is timed: `train` (a whole step), `inference`, `input` (JPEG files to augmented
batches), `predict` (JPEG files to classes) or `startup`.
`--against=timm,timm-compile,torchvision,keras-tf,keras-jax` runs others on the same work, and
`flax` or `without-...` this project without what makes it fast. Every program has a process of
its own, all are pinned to the same cores, and they run in turn while the others stand still, so a
machine whose speed drifts treats all alike: trust the ratios. Exit status: 0 done, 1 a program
could not run (its line says why), 2 bad input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from absl import flags

from effnetv2_jax import command_line
from effnetv2_jax.benchmark.protocol import WITHOUT_SPLIT, Unavailable, Work
from effnetv2_jax.errors import InputError, unknown_name
from effnetv2_jax.huge_pages import (
    environment_with_huge_pages,
    environment_without_choice,
    environment_without_huge_pages,
)

FLAGS = flags.FLAGS

WORKS = ("train", "inference", "input", "predict", "startup")
WITHOUT_HUGE_PAGES = "without-huge-pages"
# Program -> the module that runs it, and whether that needs the interpreter of the others.
_MODULES = {
    "ours": ("effnetv2_jax.benchmark.ours", False),
    "flax": ("effnetv2_jax.benchmark.ours", False),
    "without-shifts": ("effnetv2_jax.benchmark.ours", False),
    "without-products": ("effnetv2_jax.benchmark.ours", False),
    "without-patches": ("effnetv2_jax.benchmark.ours", False),
    WITHOUT_SPLIT: ("effnetv2_jax.benchmark.ours", False),
    WITHOUT_HUGE_PAGES: ("effnetv2_jax.benchmark.ours", False),
    "timm": ("effnetv2_jax.benchmark.peer_pytorch", True),
    "timm-compile": ("effnetv2_jax.benchmark.peer_pytorch", True),
    "torchvision": ("effnetv2_jax.benchmark.peer_pytorch", True),
    "keras-tf": ("effnetv2_jax.benchmark.peer_keras", True),
    "keras-jax": ("effnetv2_jax.benchmark.peer_keras", True),
}
PEERS = tuple(name for name in _MODULES if name != "ours")
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one program did.

    Attributes:
      program: `ours` or a peer.
      versions: of its libraries.
      device: as it names it.
      threads: cores that it was pinned to.
      runs: how often it was timed.
      images_per_second: the median.
      lowest: of the runs.
      highest: of the runs.
      ratio: how much faster this project is, the median over pairs of neighbouring runs.
      ratio_lowest: of those pairs.
      ratio_highest: of those pairs.
      gflops_per_second: arithmetic (2 a multiply-add, a training step counted three times), or 0.
      share_of_peak: of what a product of large matrices reaches there; 0 if unknown.
      peak_mib: memory that the process, or the accelerator, held at most while it ran.
      prepare_seconds: imports, building, compiling and the first runs.
    """

    program: str
    versions: str
    device: str
    threads: int
    runs: int
    images_per_second: float
    lowest: float
    highest: float
    ratio: float
    ratio_lowest: float
    ratio_highest: float
    gflops_per_second: float
    share_of_peak: float
    peak_mib: float
    prepare_seconds: float


class Runner:
    """A program in a process of its own, which stands still unless it is timed.

    Args:
      name: of `_MODULES`.
      work: what it does.
      cores: the processors that it may use.
      python: the interpreter of the peers.

    Raises:
      Unavailable: it cannot do that work.
    """

    def __init__(self, name: str, work: Work, cores: Sequence[int], python: str):
        module, is_peer = _MODULES[name]
        number = str(len(cores))
        self.name = name
        self.peak_bytes = 0
        self._process = subprocess.Popen(
            [python if is_peer else sys.executable, "-m", module, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **_environment(name),
                "PYTHONPATH": str(_PACKAGES),
                "OMP_NUM_THREADS": number,
                "MKL_NUM_THREADS": number,
                "TF_NUM_INTRAOP_THREADS": number,
                "TF_CPP_MIN_LOG_LEVEL": "2",
            },
            start_new_session=True,  # Its workers are stopped with it.
        )
        try:
            self.facts = self._ask({"cores": list(cores), "work": dataclasses.asdict(work)})
            if "refused" in self.facts:
                raise Unavailable(self.facts["refused"])
        except BaseException:
            self.close()
            raise
        self._send(signal.SIGSTOP)

    def seconds(self, repetitions: int) -> float:
        """Runs that many batches."""
        self._send(signal.SIGCONT)
        answer = self._ask({"run": repetitions})
        self._send(signal.SIGSTOP)
        self.peak_bytes = answer["peak_bytes"]
        return float(answer["seconds"])

    def close(self) -> None:
        """Ends the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            self._send(signal.SIGKILL)
        self._process.wait()

    def _send(self, signum: int) -> None:
        os.killpg(self._process.pid, signum)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # Its last words follow.
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise Unavailable(f"its process ended with status {status}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _environment(program: str) -> Mapping[str, str]:
    """As `main` starts, but for the program that shows what that gains."""
    if program == WITHOUT_HUGE_PAGES:
        return environment_without_huge_pages()
    return environment_with_huge_pages() or os.environ


def compare(
    work: Work,
    peers: Sequence[str] = (),
    *,
    python: str = sys.executable,
    runs: int = 7,
    seconds: float = 2.0,
    on_refusal: Callable[[str, str], None] = lambda name, reason: None,
    on_round: Callable[[int], None] = lambda number: None,
) -> list[Result]:
    """Times this project and others on the same work, in turn.

    Args:
      work: what all of them do.
      peers: of `PEERS`.
      python: the interpreter of those that are not this project.
      runs: timed runs of each program.
      seconds: how long a run takes, about.
      on_refusal: gets a program that cannot do it and the reason; the others go on.
      on_round: gets the number of a round that is done; 0 is not counted.

    Returns:
      The results, this project first.

    Raises:
      InputError: a peer has an unknown name or is named twice, or its interpreter is not there.
      Unavailable: this project cannot do it.
    """
    for name in peers:
        if name not in PEERS:
            raise unknown_name("peer", name, PEERS)
        if list(peers).count(name) > 1:
            raise InputError(f"peer {name!r} is named twice: name each once.")
        # Before anything takes minutes to compile.
        if _MODULES[name][1] and shutil.which(python) is None:
            raise InputError(f"the peers' Python {python!r} does not exist: give --peer_python.")
    cores = sorted(os.sched_getaffinity(0))[: work.threads]
    taken: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        runners: list[Runner] = []
        for name in ("ours", *peers):
            try:
                runners.append(stack.enter_context(Runner(name, work, cores, python)))
            except Unavailable as reason:
                if name == "ours":
                    raise
                on_refusal(name, str(reason))
        repetitions: dict[str, int] = {}

        def run(runner: Runner) -> None:
            if runner.name not in repetitions:
                repetitions[runner.name] = _repetitions(runner, seconds)
                return
            count = repetitions[runner.name]
            rate = count * work.batch_size / runner.seconds(count)
            taken.setdefault(runner.name, []).append(rate)

        for number in range(runs + 1):
            for runner in list(runners):
                try:
                    run(runner)
                except Unavailable as reason:
                    if runner.name == "ours":
                        raise
                    on_refusal(runner.name, str(reason))
                    runners.remove(runner)
            on_round(number)
        return [_result(runner, work, taken, runners[0].facts) for runner in runners]


def _repetitions(runner: Runner, seconds: float) -> int:
    """How often a program does its work in that time.

    A few batches say nothing of a pipeline, which has some in stock.
    """
    count = 2
    while (taken := runner.seconds(count)) < seconds / 4:
        count *= 4
    return max(1, round(count * seconds / taken))


def _result(
    runner: Runner, work: Work, taken: dict[str, list[float]], ours: dict[str, Any]
) -> Result:
    rates = taken[runner.name]
    ratios = [a / b for a, b in zip(taken["ours"], rates, strict=True)]
    median = statistics.median(rates)
    gflops = median * flops_per_image(work) / 1e9
    peak = ours["facts"].get("peak_flops", 0.0) / 1e9
    return Result(
        program=runner.name,
        versions=runner.facts["versions"],
        device=runner.facts["device"],
        threads=work.threads,
        runs=len(rates),
        images_per_second=median,
        lowest=min(rates),
        highest=max(rates),
        ratio=statistics.median(ratios),
        ratio_lowest=min(ratios),
        ratio_highest=max(ratios),
        gflops_per_second=gflops,
        share_of_peak=gflops / peak if peak else 0.0,
        peak_mib=runner.peak_bytes / 2**20,
        prepare_seconds=runner.facts["prepare_seconds"],
    )


def flops_per_image(work: Work) -> float:
    """Arithmetic of an image; 0 for what is no network's."""
    if work.kind == "input":
        return 0.0
    from effnetv2_jax.models.create import create_model
    from effnetv2_jax.models.multiply_adds import count_multiply_adds

    model = create_model(work.variant, depth_multiplier=work.depth_multiplier)
    costs = count_multiply_adds(model, work.image_size)
    passes = 3 if work.kind == "train" else 1
    return 2.0 * passes * sum(cost.multiply_adds for cost in costs)


@dataclasses.dataclass(frozen=True)
class Startup:
    """How long until something happens.

    Attributes:
      what: in words.
      seconds: the median.
      lowest: of the runs.
      highest: of the runs.
    """

    what: str
    seconds: float
    lowest: float
    highest: float


_IMPORT = "import effnetv2_jax, sys; assert 'tensorflow' not in sys.modules"


def startup(runs: int = 5) -> Iterator[Startup]:
    """Times what a user waits for before anything is trained."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "main --help": ["-m", "effnetv2_jax.main", "--help"],
            "import effnetv2_jax (without TensorFlow)": ["-c", _IMPORT],
        }
        for what, command in commands.items():
            # absl's --help exits with 1.
            status = int("--help" in command)
            yield _timed(what, [_seconds_of(command, status) for _ in range(runs + 1)][1:])
        config = _PACKAGES / "configs" / "digits.py"
        if not config.is_file():
            return
        for what, cache in (("empty", None), ("full", str(Path(folder) / "cache"))):
            taken = []
            for number in range(runs if cache else 1):
                workdir = str(Path(folder) / f"{what}{number}")
                if cache:
                    _first_step(config, workdir + "_before", cache)
                taken.append(_first_step(config, workdir, cache))
            yield _timed(f"first step of the digits, {what} compilation cache", taken)


def _timed(what: str, taken: Sequence[float]) -> Startup:
    return Startup(what, statistics.median(taken), min(taken), max(taken))


def _environment_of_a_user(**more: str) -> dict[str, str]:
    return {**environment_without_choice(), "PYTHONPATH": str(_PACKAGES), **more}


def _seconds_of(command: Sequence[str], status: int) -> float:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        env=_environment_of_a_user(),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != status:
        raise InputError(f"`python {' '.join(command)}` failed with status {done.returncode}.")
    return time.perf_counter() - begun


def _first_step(config: Path, workdir: str, cache: str | None) -> float:
    """Seconds until a run reports its first step; it is ended then."""
    command = [sys.executable, "-m", "effnetv2_jax.main", f"--config={config}"]
    command += [f"--workdir={workdir}", "--config.log_every_steps=1"]
    more = {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=_environment_of_a_user(**more), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "[step 1/" in line:
            seconds = time.perf_counter() - begun
            process.kill()
            process.communicate()
            return seconds
    raise InputError(f"the digits did not train: {''.join(lines[-3:]).strip()}")


def format_results(results: Sequence[Result]) -> str:
    """A table for people."""
    columns: tuple[tuple[str, Callable[[Result], str]], ...] = (
        ("program", lambda r: r.program),
        ("images/s", lambda r: f"{r.images_per_second:.4g}"),
        ("lowest", lambda r: f"{r.lowest:.4g}"),
        ("highest", lambda r: f"{r.highest:.4g}"),
        ("ours is", lambda r: f"{r.ratio:.2f} x"),
        ("GFLOP/s", lambda r: f"{r.gflops_per_second:.0f}" if r.gflops_per_second else ""),
        ("of peak", lambda r: f"{r.share_of_peak:.0%}" if r.share_of_peak else ""),
        ("peak MiB", lambda r: f"{r.peak_mib:.0f}"),
        ("prepared in s", lambda r: f"{r.prepare_seconds:.0f}"),
        ("versions", lambda r: r.versions),
    )
    cells = [[name for name, _ in columns]]
    cells += [[show(result) for _, show in columns] for result in results]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _define_flags() -> None:
    flags.DEFINE_string("variant", "efficientnetv2-s", "Network, by its name.")
    flags.DEFINE_integer("image_size", 128, "Pixels.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Images.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the arithmetic.")
    flags.DEFINE_list("against", [], f"Others: {', '.join(PEERS)}.")
    flags.DEFINE_string("peer_python", sys.executable, "The interpreter that has the others.")
    flags.DEFINE_integer("threads", 0, "Cores to use; 0: all.", lower_bound=0)
    flags.DEFINE_integer("runs", 7, "Timed runs of each program.", lower_bound=1)
    flags.DEFINE_float("seconds", 2.0, "Of a run, about.", lower_bound=0.0)
    flags.DEFINE_string("images", None, "With input, predict: folder of FOLDER/CLASS/*.jpg.")
    flags.DEFINE_float("randaug_magnitude", 15.0, "With input; a negative number for none.")
    flags.DEFINE_string("json", None, "File to write the results to.")


def main(arguments: list[str]) -> int:
    """The command line."""
    (kind,) = arguments
    if kind not in WORKS:
        raise unknown_name("kind of work", kind, WORKS)
    # What is timed stands still most of the time, and must not outlive this process.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # As under nohup.
            signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    if FLAGS.json:
        command_line.check_output_file(FLAGS.json)
    if kind == "startup":
        rows: list[Any] = []
        for row in startup(FLAGS.runs):
            print(f"{row.what}: {row.seconds:.2f} s ({row.lowest:.2f} to {row.highest:.2f})")
            rows.append(row)
        return _write(rows, {"kind": kind})
    if kind in ("input", "predict") and not (FLAGS.images and Path(FLAGS.images).is_dir()):
        raise InputError(
            f"--images {FLAGS.images!r} is no folder: name one, as FOLDER/CLASS/*.jpg."
        )
    if kind != "input":
        from effnetv2_jax.models.specs import get_spec

        get_spec(FLAGS.variant)
    available = len(os.sched_getaffinity(0))
    if FLAGS.threads > available:
        raise InputError(f"--threads {FLAGS.threads} is more than the {available} cores there are.")
    work = Work(
        kind=kind,
        variant=FLAGS.variant,
        image_size=FLAGS.image_size,
        batch_size=FLAGS.batch_size,
        dtype=FLAGS.dtype,
        threads=FLAGS.threads or available,
        folder=FLAGS.images or "",
        randaug_magnitude=None if FLAGS.randaug_magnitude < 0 else FLAGS.randaug_magnitude,
    )
    refused = []

    def refuse(name: str, reason: str) -> None:
        refused.append(name)
        print(f"{name} is left out: {reason}.", file=sys.stderr)

    try:
        results = compare(
            work,
            FLAGS.against,
            python=FLAGS.peer_python,
            runs=FLAGS.runs,
            seconds=FLAGS.seconds,
            on_refusal=refuse,
            on_round=lambda number: print(f"[{number}/{FLAGS.runs}]", file=sys.stderr),
        )
    except Unavailable as reason:
        raise InputError(f"this work cannot be done ({reason}): try a smaller one.") from reason
    print(format_results(results))
    return _write(results, dataclasses.asdict(work)) or bool(refused)


def _write(rows: Sequence[Any], work: dict[str, Any]) -> int:
    if FLAGS.json:
        found = {"work": work, "results": [dataclasses.asdict(row) for row in rows]}
        Path(FLAGS.json).expanduser().write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    command_line.run(
        main,
        _define_flags,
        usage="python -m effnetv2_jax.tools.benchmark train --against=timm",
        num_arguments=(1, 1),
    )
