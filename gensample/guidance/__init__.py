"""Guidance rules: functions from network answers to the output a solver integrates."""

from gensample.guidance.base import Denoise, Guidance, Guided
from gensample.guidance.cfg import CFG

__all__ = ["CFG", "Denoise", "Guidance", "Guided"]
