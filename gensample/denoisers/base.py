"""One interface over every network: its answer at (x, t) under a conditioning, in float32, on its own process.

Shapes: B = rows, ... = the latent shape (C, H, W) or, for packed latents, (tokens, width).
x and output: (B, ...) float32; t: a float, or (B,) for rows at different noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gensample.denoisers.adapters import adapters_disabled
from gensample.denoisers.attention import attention_of
from gensample.denoisers.conditioning import Conditioning
from gensample.denoisers.native import NativeOutput, field_of, native_output
from gensample.denoisers.process import (
    FlowTimes,
    Process,
    TimeMap,
    copy_of_scheduler,
    process_of,
    scheduler_times,
)
from gensample.interpolants import Coefficients, Float64, Interpolant, affine, make_interpolant

Network = nn.Module | Callable[..., Any]
Time = float | Float64 | Tensor


class Denoiser:
    """Networks that share one noise process, called through :meth:`denoise`.

    Build one with :meth:`from_model`, or from a live pipeline with ``denoiser_from_pipeline``. A family's
    subclass overrides :meth:`forward`, and :meth:`set_timesteps` where its pipeline passes more than N.

    Attributes:
        nets: the networks by name: "main", and any of "weak", "reference", "old", "teacher" ... Without an
            entry of its own, "reference" is the main network with its PEFT adapters switched off.
        path, prediction_type, time_map: the process; see ``gensample.denoisers.process``.
        latent_shape: the shape of one sample.
        conditioning: the bound conditioning, one row per sample.
        scheduler: the pipeline's own scheduler, never changed; or None.
        device: where x and the conditioning go.
        evaluations: rows evaluated so far, over all nets; a batch of 8 counts 8.
        attention_backend: a Diffusers attention backend to insist on; None probes the device once and stays with
            PyTorch's own attention wherever that has a fused kernel.
    """

    def __init__(
        self,
        nets: Mapping[str, Network],
        process: Process,
        *,
        latent_shape: Sequence[int],
        conditioning: Conditioning,
        scheduler: Any = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See the class and :meth:`from_model` for the arguments."""
        if "main" not in nets:
            raise ValueError(f"nets must have an entry 'main'; got {sorted(nets)}")
        self.nets = dict(nets)
        self.path = process.path
        self.prediction_type = process.prediction_type
        self.time_map: TimeMap = process.time_map
        self.latent_shape = tuple(int(size) for size in latent_shape)
        self.scheduler = scheduler
        self.device = torch.device(device) if device is not None else _device(self.nets["main"])
        self.conditioning = conditioning.to(self.device)
        self.evaluations = 0
        self.attention_backend: str | None = None
        self._decoder = decoder
        self._dtypes: dict[int, tuple[torch.dtype, torch.dtype]] = {}

    @classmethod
    def from_model(
        cls,
        model: Network,
        *,
        latent_shape: Sequence[int],
        path: str | Interpolant | None = None,
        prediction_type: str | None = None,
        time_map: TimeMap | None = None,
        scheduler: Any = None,
        conditioning: Conditioning | None = None,
        num_samples: int = 1,
        nets: Mapping[str, Network] | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Denoiser:
        """Wrap a module or callable ``model(x, timestep, **fields)``.

        ``timestep`` is (B,) float32; ``fields`` are the conditioning's batched and shared fields by name. The
        answer is a tensor, a tuple that starts with one, or an object with ``.sample``.

        Args:
            model: the main network.
            latent_shape: the shape of one sample.
            path: "linear", "gvp", "vp" or an interpolant; default the scheduler's, else linear.
            prediction_type: default the scheduler's; required without one.
            time_map: default the scheduler's, else ``FlowTimes(1000)``: timestep = 1000 (1 - t).
            scheduler: a Diffusers scheduler that supplies the process and the time grid.
            conditioning: bound to the denoiser, one row per sample.
            num_samples: the rows of an unconditional model.
            nets: further networks by name, such as ``{"weak": ...}``.
            decoder: maps samples (B, ...) to images (B, C, H, W) in [0, 1]; without it :meth:`decode` raises.
            device: default that of the model's parameters.
        """
        if scheduler is not None:
            inferred = process_of(scheduler)
        elif prediction_type is not None:
            inferred = Process(make_interpolant("linear"), prediction_type, FlowTimes())
        else:
            raise ValueError("prediction_type must be given where no scheduler supplies it")
        process = Process(
            make_interpolant(path) if isinstance(path, str) else path or inferred.path,
            prediction_type or inferred.prediction_type,
            time_map or inferred.time_map,
        )
        return cls(
            {"main": model, **(nets or {})},
            process,
            latent_shape=latent_shape,
            conditioning=conditioning or Conditioning(num_rows=num_samples),
            scheduler=scheduler,
            decoder=decoder,
            device=device,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the main network computes."""
        return self._compute_dtype(self.nets["main"]) or torch.float32

    def timestep(self, t: Time) -> Any:
        """The network's timestep at canonical time ``t``: a float for a scalar, else float64 (B,)."""
        return self.time_map.timestep(_host(t))

    def time(self, timestep: Time) -> Any:
        """The canonical time of a network timestep; inverse of :meth:`timestep`."""
        return self.time_map.time(_host(timestep))

    def denoise(
        self, x: Tensor, t: Time, cond: Conditioning | None = None, *, net: str = "main", grad: bool = False
    ) -> NativeOutput:
        """Evaluate a network at x (B, ...), time ``t`` (a float or (B,)), under ``cond`` or the bound one.

        The state is cast to the network's dtype and the answer back to float32 (float64 if x is).
        ``grad=True`` keeps the graph even under an outer ``no_grad``; the default builds none.

        Raises ValueError for an unknown net, a time outside [0, 1], or where rows of x, t and cond disagree.
        """
        cond = self._checked(x, cond)
        module, context = self._network(net, grad)
        # x of a float64 oracle stays float64; the parameters of a real network decide.
        dtype = self._compute_dtype(module) or x.dtype
        timestep = self._timestep_rows(t, x)
        attention = attention_of(module, self.device, dtype, self.attention_backend)
        with torch.set_grad_enabled(grad), context, attention:
            state = self.network_state(x.to(self.device), t).to(dtype)
            answer = self.forward(module, state, timestep, self._fields(cond, dtype))
            wide = answer.to(torch.promote_types(x.dtype, torch.float32))
            native = native_output(wide, x, self.path, self.prediction_type)
            native = NativeOutput(self.meaning(native.output, x, t), native.variance)
        self.evaluations += x.shape[0]
        return native

    def x0(
        self, x: Tensor, t: Time, cond: Conditioning | None = None, *, net: str = "main", grad: bool = False
    ) -> Tensor:
        """The posterior mean E[x0 | x_t = x] (B, ...) that the network's answer means.

        Raises ValueError for an epsilon or score model at zero signal-to-noise ratio, where x0 is undetermined;
        no evaluation is spent on it.
        """
        coefficients = self.path.coefficients(_host(t))
        if isinstance(coefficients, Coefficients):
            affine(coefficients, self.prediction_type, "x0")
        output = self.denoise(x, t, cond, net=net, grad=grad).output
        with torch.set_grad_enabled(grad):
            return self.field(output, x, t, "x0")

    def field(self, output: Tensor, x: Tensor, t: Time, field: str) -> Tensor:
        """What an answer of :meth:`denoise` at (x, t) says of a field: "x0", "velocity" ...; see ``interpolants``."""
        return field_of(output, x, self.path.coefficients(_host(t)), self.prediction_type, field)

    def decode(self, x: Tensor, *, micro_batch: int = 8, grad: bool = False) -> Tensor:
        """Samples (B, ...) to images (B, C, H, W), float32 in [0, 1], ``micro_batch`` at a time."""
        decode = self._decoder
        if decode is None:
            raise ValueError("this denoiser has no decoder; pass decoder= to Denoiser.from_model")
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be at least 1")
        with torch.set_grad_enabled(grad):
            return torch.cat([decode(part.to(self.device)).float() for part in x.split(micro_batch)])

    def times(self, num_inference_steps: int) -> list[float]:
        """The ascending grid t_0 < ... < t_N that the pipeline's own scheduler would walk in N steps.

        Without a scheduler, N uniform steps in t.
        """
        if self.scheduler is None:
            grid = np.linspace(self.time_map.start, 1.0, _checked_steps(num_inference_steps) + 1)
            return [float(t) for t in grid]
        prepared = self.prepared_scheduler(num_inference_steps)
        return scheduler_times(prepared, self.time_map, num_inference_steps)

    def prepared_scheduler(self, num_inference_steps: int) -> Any:
        """A copy of the pipeline's scheduler, made from its configuration, with N timesteps set.

        Raises ValueError without a scheduler.
        """
        if self.scheduler is None:
            raise ValueError("this denoiser has no scheduler; pass scheduler= to Denoiser.from_model")
        scheduler = copy_of_scheduler(self.scheduler)
        self.set_timesteps(scheduler, _checked_steps(num_inference_steps))
        return scheduler

    def forward(self, module: Any, x: Tensor, timestep: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """One call of a network: x (B, ...) in its dtype, timestep (B,) float32, the conditioning's fields."""
        answer = module(x, timestep, **fields)
        answer = getattr(answer, "sample", answer)
        output = answer[0] if isinstance(answer, tuple) else answer
        if not isinstance(output, Tensor):
            raise TypeError(f"the model returned {type(answer).__name__}, not a tensor, tuple or .sample")
        return output

    def network_state(self, x: Tensor, t: Time) -> Tensor:
        """What the network sees of the state x (B, ...), before its dtype: x itself, unless a family overrides it."""
        return x

    def meaning(self, output: Tensor, x: Tensor, t: Time) -> Tensor:
        """The network's output in the denoiser's ``prediction_type``: itself, unless a family overrides it."""
        return output

    def set_timesteps(self, scheduler: Any, num_inference_steps: int) -> None:
        """``scheduler.set_timesteps`` with whatever else the pipeline passes."""
        scheduler.set_timesteps(num_inference_steps, device=self.device)

    def _network(self, net: str, grad: bool) -> tuple[Any, Any]:
        """The module called ``net``, and the context to run it in."""
        if net in self.nets:
            return self.nets[net], nullcontext()
        if net != "reference":
            raise ValueError(f"net={net!r} is unknown; this denoiser has {sorted(self.nets)}; add it to nets")
        module = self.nets["main"]
        if grad and getattr(module, "is_gradient_checkpointing", False):
            raise ValueError(
                "net='reference' with grad=True would be recomputed with its adapters on under gradient "
                "checkpointing; call disable_gradient_checkpointing(), or put a frozen copy in nets['reference']"
            )
        return module, adapters_disabled(module)

    def _checked(self, x: Tensor, cond: Conditioning | None) -> Conditioning:
        cond = self.conditioning if cond is None else cond
        if tuple(x.shape[1:]) != self.latent_shape:
            expected = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, {expected})")
        if cond.batch_size != x.shape[0]:
            raise ValueError(
                f"x has {x.shape[0]} rows and the conditioning {cond.batch_size}; "
                "use cond.rows(...) or cond.repeat(k)"
            )
        return cond

    def _compute_dtype(self, network: Network) -> torch.dtype | None:
        """The dtype a module computes in; None for a callable or a module without parameters.

        A Diffusers model's own answer minds quantisation and layerwise casting, but walks all its modules: it is
        kept until the first parameter changes its dtype.
        """
        parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
        stored = next((p.dtype for p in parameters if p.is_floating_point()), None)
        if stored is None:
            return None
        known = self._dtypes.get(id(network))
        if known is None or known[0] != stored:
            own = getattr(network, "dtype", None)
            known = (stored, own if isinstance(own, torch.dtype) else stored)
            self._dtypes[id(network)] = known
        return known[1]

    def _fields(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """Batched fields in the network's dtype beside the shared ones."""
        fields = {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in cond.batched.items()
        }
        return {**fields, **cond.shared}

    def _timestep_rows(self, t: Time, x: Tensor) -> Tensor:
        t = _host(t)
        if not np.all((t >= 0.0) & (t <= 1.0)):
            raise ValueError(f"t={t} must lie in [0, 1] (0 is noise, 1 is data)")
        timestep = self.timestep(t)
        if isinstance(timestep, float):
            return torch.full((x.shape[0],), timestep, dtype=torch.float32, device=self.device)
        if timestep.shape != (x.shape[0],):
            raise ValueError(
                f"t has shape {timestep.shape}; give a float, or one time per row: ({x.shape[0]},)"
            )
        return torch.from_numpy(timestep.astype(np.float32)).to(self.device)


def _checked_steps(num_inference_steps: Any) -> int:
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int | np.integer):
        raise ValueError(f"num_inference_steps={num_inference_steps!r} must be a whole number")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
    return int(num_inference_steps)


def _host(t: Time) -> Any:
    """A scalar time as a float, rows of times as float64 on the host."""
    if isinstance(t, float):
        return t
    if isinstance(t, Tensor):
        t = t.detach().cpu().numpy()
    rows = np.asarray(t, dtype=np.float64)
    return float(rows) if rows.ndim == 0 else rows


def _device(network: Any) -> torch.device:
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))
