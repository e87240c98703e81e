"""The attention kernel of a call: chosen for its length, refused where it cannot run, never left behind."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from gensample.denoisers import Denoiser, denoiser_from_pipeline
from gensample.models.dit import DiT
from tests.tiny_pipelines import tiny_dit


def our_denoiser() -> tuple[Denoiser, torch.Tensor]:
    model = DiT(sample_size=8, patch_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8).eval()
    denoiser = Denoiser.from_model(
        lambda x, timestep: model(x, timestep, torch.zeros(len(x), dtype=torch.long)).sample,
        latent_shape=(1, 8, 8), prediction_type="flow_prediction", num_samples=2,
    )  # fmt: skip
    return denoiser, torch.ones(2, 1, 8, 8)


def test_a_chosen_backend_holds_during_the_call_only() -> None:
    seen: list[AttentionBackendName] = []
    before = _AttentionBackendRegistry._active_backend

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(_AttentionBackendRegistry._active_backend)
        return x

    denoiser = Denoiser.from_model(
        network, latent_shape=(1, 8, 8), prediction_type="flow_prediction", num_samples=2
    )
    x = torch.ones(2, 1, 8, 8)
    denoiser.denoise(x, 0.5)
    denoiser.attention_backend = "_native_math"
    denoiser.denoise(x, 0.5)
    assert seen == [before, AttentionBackendName._NATIVE_MATH]
    assert _AttentionBackendRegistry._active_backend == before


def test_another_backend_gives_the_same_answer() -> None:
    pipe = tiny_dit()
    denoiser = denoiser_from_pipeline(pipe, class_labels=[1, 2])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *denoiser.latent_shape, generator=generator)
    usual = denoiser.denoise(x, 0.4).output
    denoiser.attention_backend = "_native_math"
    torch.testing.assert_close(denoiser.denoise(x, 0.4).output, usual, atol=1e-5, rtol=0)


def test_a_backend_that_cannot_run_here_is_refused_by_name() -> None:
    denoiser, x = our_denoiser()
    denoiser.attention_backend = "xformers"
    if torch.cuda.is_available():
        pytest.skip("xformers may well run on this device")
    with pytest.raises(ValueError, match="'xformers' cannot run attention on cpu"):
        denoiser.denoise(x, 0.5)
    denoiser.attention_backend = None
    assert denoiser.denoise(x, 0.5).output.shape == x.shape
