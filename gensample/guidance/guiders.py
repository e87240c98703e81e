"""Our guidance rules in Diffusers' Modular pipelines: thin ``BaseGuidance`` subclasses around the pure functions.

A denoise block calls the network once per batch that its guider prepares, then hands the predictions back.  A guider
here prepares the conditional batch alone and remembers that call; when the prediction comes back, it runs the rule,
whose further evaluations are the same call with other conditioning fields, or on another network:

    prepare_inputs -> [conditional]      network(captured) -> pred      rule(x, t, denoise, cond) -> guided pred

So a rule may look at the first answer before it chooses the second condition (GFCG), evaluate as often as it likes,
and use a second network (autoguidance), without a denoise block of its own.  Calls keep the whole batch: a call that
one row needs is made for all rows.

Configurations hold numbers and strings; networks, classifiers and encoded prompts are bound at run time.
``save_pretrained`` writes ``guider_config.json``; load it with the class that wrote it, then bind again.

Shapes: B rows; x and predictions (B, ...); fields (B, ...), their reference table (K, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from gensample.denoisers import Conditioning, Denoiser, process_of
from gensample.denoisers.vae import latent_decoder
from gensample.guidance.autoguidance import Autoguidance
from gensample.guidance.base import DenoiserCalls, Guidance
from gensample.guidance.captured import CapturedCall
from gensample.guidance.cfg import CFG
from gensample.guidance.gfcg import GFCG
from gensample.guidance.posterior import Posterior

_Unbound: Any = None  # stands for run-time objects while a configuration is checked


class RuleGuider(BaseGuidance):
    """What the guiders of this module share: capture the conditional call, then run :meth:`rule`.

    info: the rule's diagnostics of the last step, such as GFCG's confidence, reference and scale, each (B,).
    """

    _input_predictions = ["pred_cond"]  # noqa: RUF012  (the base class reads an instance of list)
    wants_null = False

    def __init__(self, enabled: bool = True) -> None:
        """Start unbound. The interval of a rule counts noise levels, so the base class's step window stays open."""
        super().__init__(0.0, 1.0, enabled)
        self.info: dict[str, Tensor] = {}
        self._pipe: Any = None
        self._posterior: Posterior | None = None
        self._weak: nn.Module | None = None
        self._references: dict[str, Tensor] = {}
        self._fields: dict[str, tuple[Any, Any]] = {}
        self._call: CapturedCall | None = None
        self._memory: object = None

    def rule(self) -> Guidance:
        """The rule of this configuration with what is bound; ValueError naming what is missing."""
        raise TypeError(f"{type(self).__name__} defines no rule; use one of its subclasses")

    def bind(
        self,
        pipe: Any,
        *,
        posterior: Posterior | None = None,
        references: Mapping[str, Tensor] | None = None,
        weak: nn.Module | None = None,
    ) -> RuleGuider:
        """Bind what no configuration can hold, and return the guider.

        pipe: the Modular pipeline; its scheduler tells the noise process, its VAE decodes for a classifier.
        posterior, references: of GFCG; the table by the fields of the denoise block, see :func:`encode_references`.
        weak: the weak network of autoguidance, called with the main network's arguments.
        """
        self._pipe, self._posterior, self._weak = pipe, posterior, weak
        self._references = dict(references or {})
        self.rule()
        return self

    @property
    def num_conditions(self) -> int:
        """2 where the rule needs negative prompts, so that the text encoder step makes them; one batch all the same."""
        return 2 if self.wants_null else 1

    @property
    def is_conditional(self) -> bool:
        """Every batch that the block itself evaluates is the conditional one."""
        return True

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The conditional batch alone; the negative fields are kept for the rule."""
        self._fields = {name: v if isinstance(v, tuple) else (v, None) for name, v in data.items()}
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As :meth:`prepare_inputs`, for blocks that name fields of their state."""
        names = {key: n if isinstance(n, tuple) else (n, None) for key, n in input_fields.items()}
        self._fields = {
            key: (getattr(data, first, None), getattr(data, second or "", None))
            for key, (first, second) in names.items()
        }
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Listen to the next call of the network; the listeners remove themselves, also when it raises."""
        super().prepare_models(denoiser)
        self._call = CapturedCall.listen(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Stop listening."""
        if self._call is not None:
            self._call.stop()

    def __call__(self, data: list[Any]) -> Any:
        """The guided prediction of the one batch; the base class would count it against ``num_conditions``."""
        if len(data) != 1 or not hasattr(data[0], "noise_pred"):
            raise ValueError(
                f"{type(self).__name__} prepares one batch and needs its noise_pred; got {len(data)} batches"
            )
        return self.forward(pred_cond=data[0].noise_pred)

    @torch.no_grad()
    def forward(self, pred_cond: Tensor) -> GuiderOutput:
        """Run the rule at the captured input.

        Raises ValueError where nothing is bound, TypeError for a block that alters the network's answer or the
        fields on their way (its guided branch could not be repeated).
        """
        if self._step == 0:
            self._memory, self.info = None, {}
        if not self._enabled:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        if self._pipe is None:
            raise ValueError(f"call {type(self).__name__}.bind(pipe, ...) before running the pipeline")
        rule, call = self.rule(), self._call
        assert call is not None
        call.check(pred_cond)
        x = call.input_like(pred_cond).float()
        denoiser = self._denoiser(call, pred_cond)
        t = float(denoiser.time(float(self._timestep)))
        guided = rule(x, t, DenoiserCalls(denoiser), denoiser.conditioning, self._memory)
        self._memory, self.info = guided.state, guided.info
        return GuiderOutput(pred=guided.output.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=None)

    def _denoiser(self, call: CapturedCall, pred_cond: Tensor) -> Denoiser:
        """The captured call as a denoiser, with the conditional answer at hand."""
        rows = len(pred_cond)
        fields = {
            name: pair
            for name, pair in self._fields.items()
            if isinstance(pair[0], Tensor) and len(pair[0]) == rows and pair[0].shape != pred_cond.shape
        }
        cond = {name: first for name, (first, _) in fields.items()}
        null = {name: second for name, (_, second) in fields.items() if isinstance(second, Tensor)}
        if not cond:
            raise ValueError(
                "this pipeline's denoise block names no conditioning field, so there is nothing to guide by"
            )
        if unknown := sorted(set(self._references) - set(cond)):
            raise ValueError(f"references {unknown} are no fields of this pipeline; it has {sorted(cond)}")
        nets = {"weak": call.network(cond, module=self._weak)} if self._weak is not None else {}
        return Denoiser(
            {"main": call.network(cond, answer=pred_cond), **nets},
            process_of(self._pipe.scheduler),
            latent_shape=pred_cond.shape[1:],
            conditioning=Conditioning(
                batched={**cond, CapturedCall.ROW: torch.arange(rows)}, null_fields=null,
                references={name: table.to(cond[name]) for name, table in self._references.items()},
            ),
            decoder=latent_decoder(self._pipe),
            device=pred_cond.device,
        )  # fmt: skip


class CFGGuider(RuleGuider):
    """:class:`~gensample.guidance.CFG`: classifier-free guidance with an interval in noise level.

    interval: [low, high] noise levels, or None; the other arguments as the rule's.
    """

    wants_null = True

    @register_to_config
    def __init__(
        self,
        scale: float = 5.0,
        interval: list[float] | None = None,
        rescale: float = 0.0,
        enabled: bool = True,
    ) -> None:
        """See the class; raises ValueError as the rule does."""
        super().__init__(enabled)
        self.rule()

    def rule(self) -> Guidance:
        """CFG of this configuration."""
        c = self.config
        return CFG(c["scale"], interval=_pair(c["interval"]), rescale=c["rescale"])


class AutoguidanceGuider(RuleGuider):
    """:class:`~gensample.guidance.Autoguidance` by a second network, bound as ``weak``."""

    @register_to_config
    def __init__(
        self,
        scale: float = 2.0,
        interval: list[float] | None = None,
        rescale: float = 0.0,
        enabled: bool = True,
    ) -> None:
        """See the class; raises ValueError as the rule does."""
        super().__init__(enabled)
        self.rule()

    def rule(self) -> Guidance:
        """Autoguidance of this configuration; once bound, ValueError without a weak network."""
        if self._pipe is not None and self._weak is None:
            raise ValueError("AutoguidanceGuider needs weak=, the weak network; give it to bind")
        c = self.config
        return Autoguidance(c["scale"], interval=_pair(c["interval"]), rescale=c["rescale"])


class GFCGGuider(RuleGuider):
    """:class:`~gensample.guidance.GFCG`: bind ``posterior`` and ``references``, one entry per class of it.

    base: None, "cfg" or "atg" (bind ``weak``), with ``base_scale``.  interval: [low, high] noise levels, or None.
    The other arguments are the rule's.
    """

    @register_to_config
    def __init__(
        self,
        gamma: float = 2.0,
        scale_function: str = "confusion",
        reference: str = "runner_up",
        num_references: int = 1,
        threshold: float = 0.05,
        max_scale: float = 4.0,
        max_entropy: float | None = 0.95,
        interval: list[float] | None = None,
        base: str | None = None,
        base_scale: float = 1.0,
        combine: str = "switch",
        lagged: bool = False,
        every: int = 1,
        seed: int = 0,
        rescale: float = 0.0,
        enabled: bool = True,
    ) -> None:
        """See the class; raises ValueError as the rule does, and for an unknown base."""
        super().__init__(enabled)
        if base not in (None, "cfg", "atg"):
            raise ValueError(f"base={base!r} is unknown; use None, 'cfg' or 'atg'")
        self.rule()

    @property
    def wants_null(self) -> bool:  # type: ignore[override]
        """The negative prompt is CFG's reference."""
        return bool(self.config["base"] == "cfg")

    def rule(self) -> Guidance:
        """GFCG of this configuration; once bound, ValueError where posterior, references or weak are missing."""
        c = {name: value for name, value in self.config.items() if name in _GFCG_OPTIONS}
        base, scale = self.config["base"], self.config["base_scale"]
        if self._pipe is not None:
            bound = {"posterior": self._posterior is not None, "references": bool(self._references)}
            bound["weak"] = base != "atg" or self._weak is not None
            if missing := [name for name, there in bound.items() if not there]:
                raise ValueError(f"GFCGGuider needs {', '.join(missing)}; give them to bind")
        bases = {None: None, "cfg": CFG(scale), "atg": Autoguidance(scale)}
        c["interval"] = _pair(c["interval"])
        return GFCG(posterior=self._posterior or _Unbound, base=bases[base], **c)


_GFCG_OPTIONS = set(inspect.signature(GFCG).parameters) - {"posterior", "base", "projection"}


def encode_references(pipe: Any, prompts: list[str], fields: Mapping[str, str]) -> dict[str, Tensor]:
    """A reference table of encoded prompts, by the text encoder step of a Modular pipeline.

    fields: the denoise block's field -> the encoder step's output; SDXL's are
    ``{"prompt_embeds": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}``.
    Raises ValueError where the pipeline has no such step or output.
    """
    step = pipe.blocks.sub_blocks.get("text_encoder")
    if step is None:
        raise ValueError(f"{type(pipe).__name__} has no text_encoder step; give bind the encoded table")
    encoder = step.init_pipeline()
    wanted = {spec.name for spec in step.expected_components}
    encoder.update_components(**{n: c for n, c in pipe.components.items() if n in wanted and c is not None})
    state = encoder(prompt=list(prompts))
    table = {field: state.get(output) for field, output in fields.items()}
    if missing := sorted(field for field, value in table.items() if not isinstance(value, Tensor)):
        raise ValueError(f"the text_encoder step made nothing for {missing}; name its outputs in fields")
    return table


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    if len(interval) != 2:
        raise ValueError(f"interval={interval} must be [low, high] noise levels")
    return float(interval[0]), float(interval[1])
