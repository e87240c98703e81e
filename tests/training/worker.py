"""A run in a process of its own: ``python -m tests.training.worker TASK FOLDER`` (also under torch.distributed.run).

Results are files in FOLDER; the exit status of a process group says little.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gensample.training import Trainer
from tests.training.tiny_runs import tiny_dit, tiny_trainer


def parts(folder: Path) -> None:
    """Ten steps at once; and five, then five more by another trainer that starts with other weights."""
    trainer = tiny_trainer(folder / "whole", validate=True)
    trainer.run()
    tiny_trainer(folder / "parts", steps=5, validate=True).run()
    resumed = tiny_trainer(folder / "parts", model=tiny_dit(seed=99), validate=True, resume="auto", steps=10)
    resumed.run()
    if trainer.accelerator.is_main_process:
        (folder / "processes").write_text(str(trainer.accelerator.num_processes))
    trainer.close()


def slow(folder: Path) -> None:
    """A run that would take minutes, with a checkpoint every 5 steps, for somebody to kill."""

    def wait(trainer: Trainer, step: int) -> dict[str, float]:
        time.sleep(0.02)
        return {}

    tiny_trainer(folder, steps=20_000, evaluate_every=1, callbacks=[wait], resume="auto", log_every=1).run()


if __name__ == "__main__":
    {"parts": parts, "slow": slow}[sys.argv[1]](Path(sys.argv[2]))
