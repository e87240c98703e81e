"""What a run says: a JSONL file to compute with, tensorboard if it is installed, a progress bar on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm


class MetricsFile:
    """``metrics.jsonl``: one record a line, flushed at once; records after a resumed step are cut off."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(path) if r["step"] <= resumed_step] if path.exists() else []
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(part, path)
        self._stream = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record; a figure that is not finite becomes null, as JSON has no NaN."""
        record = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a killed run is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        records.append(record)
    return records


class Recorder:
    """The main process's record of a run; on the others every method does nothing."""

    def __init__(
        self, folder: Path, *, active: bool, steps: int, resumed_step: int, tensorboard: bool
    ) -> None:
        self._file = MetricsFile(folder / "metrics.jsonl", resumed_step=resumed_step) if active else None
        self._board = _summary_writer(folder, resumed_step) if active and tensorboard else None
        # disable=None: silent where stderr is no terminal
        self._bar = tqdm(total=steps, initial=resumed_step, disable=None if active else True, unit="step")

    def advance(self) -> None:
        """One step done."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of a step."""
        if self._file is None:
            return
        self._file.write(step, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def say(self, message: str) -> None:
        """A line on stderr, above the bar."""
        if self._file is not None:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, resumed_step: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
