"""Runs the main job and kills itself at a chosen moment: `killable_run.py MOMENT FLAGS...`.

Moments: `step:N` before step N is launched, `saving:N` while the checkpoint of the first save
at or after step N is being written, `sealing:N` between Orbax's commit and the checksums,
`never`.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def install(moment: str) -> None:
    from effnetv2_jax import checkpoint, train

    kind, _, step_text = moment.partition(":")
    if kind == "never":
        return
    step = int(step_text)
    if kind == "step":
        original = train.staged_batches

        def dying(config, plan, dataset, first_step):
            batches = original(config, plan, dataset, first_step)
            for number, batch in enumerate(batches, first_step):
                if number == step:
                    die()
                yield batch

        train.staged_batches = dying
    elif kind == "saving":
        save = checkpoint.Checkpoints.save

        def save_and_die(self, state):
            save(self, state)
            if int(state.step) >= step and self.directory.name == "checkpoints":
                die()

        checkpoint.Checkpoints.save = save_and_die
    elif kind == "sealing":
        write = checkpoint.write_checksums

        def die_or_write(folder):
            if int(folder.name) >= step and folder.parent.name == "checkpoints":
                die()
            write(folder)

        checkpoint.write_checksums = die_or_write
    else:
        raise SystemExit(f"unknown moment {moment!r}")


if __name__ == "__main__":
    from effnetv2_jax import command_line, main

    chosen = sys.argv.pop(1)

    def run(arguments):
        install(chosen)
        return main.main(arguments)

    command_line.run(
        run, main.define_flags, required=("config", "workdir"), usage="killable_run.py MOMENT FLAGS"
    )
