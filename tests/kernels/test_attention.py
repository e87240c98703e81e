"""The choice of an attention backend: probed for real, local to a block, refused with a reason."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from gensample.kernels import attention
from gensample.kernels.attention import attention_backend_for, select_attention_backend


def active() -> str:
    return str(_AttentionBackendRegistry.get_active_backend()[0].value)


def test_cpu_stays_native_and_never_imports_xformers() -> None:
    loaded = "xformers" in sys.modules
    assert select_attention_backend("cpu", torch.float32, 32) is None
    with attention_backend_for("cpu", torch.float32, 32) as name:
        assert name is None
        assert active() == "native"
    assert ("xformers" in sys.modules) == loaded


def test_preferred_backend_is_local_nests_and_survives_errors() -> None:
    default = active()
    with attention_backend_for(torch.device("cpu"), torch.float32, 32, preferred="_native_math") as name:
        assert name == "_native_math" == active()
        with attention_backend_for("cpu", torch.float32, 32, preferred="_native_flash"):
            assert active() == "_native_flash"
        with attention_backend_for("cpu", torch.float32, 32):  # no preference overrides nothing
            assert active() == "_native_math"
        with (
            pytest.raises(RuntimeError, match="inside"),
            attention_backend_for("cpu", torch.float32, 32, preferred="native"),
        ):
            raise RuntimeError("inside")
        assert active() == "_native_math"
    assert active() == default


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"preferred='warp_drive' is not an attention backend.*native"),
        attention_backend_for("cpu", torch.float32, 32, preferred="warp_drive"),
    ):
        pass


@pytest.mark.parametrize("name", ["xformers", "_native_cudnn", "flash", "flash_hub"])
def test_backend_that_cannot_run_here(name: str) -> None:
    default = active()
    with (
        pytest.raises(ValueError, match=rf"preferred='{name}' cannot run attention on cpu.*preferred=None"),
        attention_backend_for("cpu", torch.float32, 32, preferred=name),
    ):
        pass
    assert active() == default


def test_backend_with_wrong_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that runs but forgets the scale: a real function in a real registry, wrong on purpose."""

    def unscaled(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return (torch.softmax(q @ k.mT, dim=-1) @ v).transpose(1, 2)

    name = attention.AttentionBackendName._NATIVE_XLA
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, unscaled)
    monkeypatch.setitem(
        _AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "scale"}
    )
    attention._problem.cache_clear()
    try:
        with (
            pytest.raises(ValueError, match="differs from the reference"),
            attention_backend_for("cpu", torch.float32, 32, preferred=name.value),
        ):
            pass
    finally:
        attention._problem.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 32, 72])
def test_native_backends_agree_with_the_written_reference(dtype: torch.dtype, head_dim: int) -> None:
    for name in ("native", "_native_math"):
        assert attention._problem(name, torch.device("cpu"), dtype, head_dim) is None


def test_reference_is_softmax_attention() -> None:
    query, key, value = attention._probe_tensors(torch.device("cpu"), torch.float64, 8)
    out = attention._reference(query, key, value)
    assert out.dtype == torch.float32
    scores = torch.einsum("bshd,bthd->bhst", query, key) / 8**0.5
    expected = torch.einsum("bhst,bthd->bshd", torch.softmax(scores, -1), value)
    assert torch.allclose(out.double(), expected, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_selection_runs(dtype: torch.dtype) -> None:
    default = active()
    with attention_backend_for("cuda", dtype, 32) as name:
        assert name in (None, "xformers")
    assert active() == default
