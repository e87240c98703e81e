"""Denoisers: every network behind one call, and the conditioning that follows its samples."""

from __future__ import annotations

from gensample.denoisers.base import Denoiser
from gensample.denoisers.conditioning import Conditioning
from gensample.denoisers.from_pipeline import denoiser_from_pipeline
from gensample.denoisers.native import NativeOutput
from gensample.denoisers.process import FlowTimes, Process, TableTimes, TimeMap, flow_process, process_of

__all__ = [
    "Conditioning",
    "Denoiser",
    "FlowTimes",
    "NativeOutput",
    "Process",
    "TableTimes",
    "TimeMap",
    "denoiser_from_pipeline",
    "flow_process",
    "process_of",
]
