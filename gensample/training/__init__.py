"""Training: one accelerate loop, its data, its losses and its checkpoints."""

from gensample.training.batches import BatchSource, Draws, FixedBatches, ShuffledImages
from gensample.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from gensample.training.config import ExportConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.couplings import CoupledLoss
from gensample.training.data import DataError, FashionMNIST, ImageData, LabelledImages
from gensample.training.ema import ExponentialAverage
from gensample.training.exponentiated import ExponentiatedGradient
from gensample.training.folders import ImageFolder, NpzImages
from gensample.training.loop import Trainer, TrainingDiverged, TrainingResult
from gensample.training.losses import ClassificationLoss, InterpolantLoss, LossOutput, LossStep
from gensample.training.multiplicative import LogSpaceLoss, MultiplicativeScoreLoss
from gensample.training.pairs import FashionPairs
from gensample.training.validation import Callback, Validation

__all__ = [
    "BatchSource",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "ClassificationLoss",
    "CoupledLoss",
    "DataError",
    "Draws",
    "ExponentialAverage",
    "ExponentiatedGradient",
    "ExportConfig",
    "FashionMNIST",
    "FashionPairs",
    "FixedBatches",
    "ImageData",
    "ImageFolder",
    "InterpolantLoss",
    "LabelledImages",
    "LogSpaceLoss",
    "LossOutput",
    "LossStep",
    "MultiplicativeScoreLoss",
    "NpzImages",
    "OptimizerConfig",
    "ScheduleConfig",
    "ShuffledImages",
    "Trainer",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingResult",
    "Validation",
    "load_checkpoint",
]
