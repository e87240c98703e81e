"""Guidance rules: functions from network answers to the output a solver integrates."""

from gensample.guidance.autoguidance import Autoguidance
from gensample.guidance.base import Denoise, DenoiserCalls, Guidance, Guided
from gensample.guidance.cfg import CFG
from gensample.guidance.classifier import ClassifierGuidance
from gensample.guidance.clip import PromptBank
from gensample.guidance.gfcg import GFCG
from gensample.guidance.guiders import AutoguidanceGuider, CFGGuider, GFCGGuider, encode_references
from gensample.guidance.icg import ICG
from gensample.guidance.posterior import (
    ClassifierPosterior,
    NoiseAwarePosterior,
    Posterior,
    check_label_map,
)
from gensample.guidance.terms import Projection

__all__ = [
    "CFG",
    "GFCG",
    "ICG",
    "Autoguidance",
    "AutoguidanceGuider",
    "CFGGuider",
    "ClassifierGuidance",
    "ClassifierPosterior",
    "Denoise",
    "DenoiserCalls",
    "GFCGGuider",
    "Guidance",
    "Guided",
    "NoiseAwarePosterior",
    "Posterior",
    "Projection",
    "PromptBank",
    "check_label_map",
    "encode_references",
]
