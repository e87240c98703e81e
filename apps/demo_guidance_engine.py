"""What the Guidance tab computes: a walk under a guidance rule, and what classifier A and the rule said at every step.

Every value is checked here, whatever a slider promised.

Shapes: N = images; arrays of a record (N,); images (N, C, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gensample.apps.demo_engine import DemoEngine, Progress, Settings, preview_steps, quoted, real

if TYPE_CHECKING:
    from gensample.guidance import ClassifierPosterior, Guidance
    from gensample.sampling import StepState

RULES = {
    "cfg": "CFG: against no class",
    "atg": "Autoguidance: against a weak network",
    "gfcg": "GFCG: against the rival class",
    "gfcg-atg": "GFCG and autoguidance",
}
MOST_IMAGES = 6
_MOST_GAMMA = 4.0
_MOST_THRESHOLD = 0.9


@dataclass(frozen=True)
class GuidanceSettings:
    """A checked request: ``plain`` says what to draw, with the scale of cfg, atg and gfcg-atg."""

    plain: Settings
    rule: str
    scale: float
    gamma: float
    threshold: float


@dataclass(frozen=True)
class StepRecord:
    """One step at noise level ``sigma``: A's probability of the class asked for, and the contrast taken, per image.

    references: the class contrasted with; "no class" (cfg), "weak network" (autoguidance), "" where there is none.
    scales: the weight g of the contrast; 0 leaves the image alone.
    """

    sigma: float
    confidences: tuple[float, ...]
    references: tuple[str, ...]
    scales: tuple[float, ...]


class GuidanceEngine:
    """Draws under a rule with the demo's pipeline; one object serves all users.

    ``networks`` gives (classifier, weak network) when they are first needed.
    """

    def __init__(self, engine: DemoEngine, networks: Any = None) -> None:
        """By default the shipped classifier A and weak sibling."""
        self.engine = engine
        self._load = networks or _shipped
        self._networks: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    def settings(
        self, *, label: Any, rule: Any, scale: Any, gamma: Any, threshold: Any, steps: Any, solver: Any, seed: Any,
        count: Any,
    ) -> GuidanceSettings:  # fmt: skip
        """The request, checked. Raises ValueError that names the value and what is allowed."""
        if not isinstance(rule, str) or rule not in RULES:
            raise ValueError(f"rule {quoted(rule)} is unknown; use one of {', '.join(RULES)}")
        limits = self.engine.limits
        checked = (
            real(scale, "guidance scale", 0.0, limits.scale), real(gamma, "gamma", 0.0, _MOST_GAMMA),
            real(threshold, "threshold", 0.0, _MOST_THRESHOLD),
        )  # fmt: skip
        # Every rule but cfg at scale 1 may take two rows an evaluation: that of scale 2.
        doubled = 1.0 if rule == "cfg" and checked[0] == 1.0 else 2.0
        plain = self.engine.settings(
            label=label, steps=steps, solver=solver, scale=doubled, seed=seed, count=count
        )
        if len(plain.labels) > MOST_IMAGES:
            raise ValueError(f"number of images {len(plain.labels)} must be at most {MOST_IMAGES} here")
        return GuidanceSettings(plain, rule, *checked)

    def draw(self, settings: GuidanceSettings, records: list[StepRecord]) -> Generator[Progress, None, None]:
        """Progress after every step, filling ``records``; closing the generator stops the network.

        Raises TimeoutError when the run takes longer than the engine's ``limits.seconds``.
        """
        from dataclasses import replace

        from gensample.apps.drawing import to_pixels

        posterior, rule = self._rule(settings)
        shown = preview_steps(settings.plain.steps)
        for progress, state in self.engine.timed(settings.plain, rule):
            records.append(self._record(settings, posterior, state))
            if progress.step == settings.plain.steps:
                images = state.denoiser.decode(state.latents)
                yield replace(progress, preview=to_pixels(images), images=images.cpu())
            elif progress.step in shown:
                yield replace(progress, preview=to_pixels(state.preview()))
            else:
                yield progress

    def _rule(self, settings: GuidanceSettings) -> tuple[ClassifierPosterior, Guidance]:
        from gensample.guidance import CFG, GFCG, Autoguidance, ClassifierPosterior

        with self._lock:
            if self._networks is None:
                self._networks = self._load(self.engine.pipe)
            classifier, weak = self._networks
        posterior = ClassifierPosterior(classifier, micro_batch=MOST_IMAGES)
        base = Autoguidance(settings.scale, weak=weak) if "atg" in settings.rule else None
        if settings.rule == "cfg":
            return posterior, CFG(settings.scale)
        if settings.rule == "atg":
            assert base is not None
            return posterior, base
        return posterior, GFCG(
            posterior=posterior, gamma=settings.gamma, threshold=settings.threshold, base=base
        )

    def _record(
        self, settings: GuidanceSettings, posterior: ClassifierPosterior, state: StepState
    ) -> StepRecord:
        from gensample.guidance import DenoiserCalls

        labels, info = settings.plain.labels, state.info
        (x, t), names = state.at, self.engine.class_names
        if "confidence" in info:
            confidences = info["confidence"].tolist()
        else:  # these rules ask no classifier
            log_p = posterior(x, t, state.output, DenoiserCalls(state.denoiser))
            confidences = [float(row[label].exp()) for row, label in zip(log_p, labels, strict=True)]
        scales = info["scale"].tolist() if "scale" in info else [settings.scale - 1.0] * len(labels)
        other = {"cfg": "no class", "gfcg": ""}.get(settings.rule, "weak network")
        references = [other] * len(labels)
        if "reference" in info:
            classes, confused = info["reference"].tolist(), info["confused"].tolist()
            references = [names[r] if b else other for r, b in zip(classes, confused, strict=True)]
        taken = [r if scale else "" for r, scale in zip(references, scales, strict=True)]
        return StepRecord(1.0 - t, tuple(confidences), tuple(taken), tuple(scales))


def _shipped(pipe: Any) -> tuple[Any, Any]:
    import gensample

    device = pipe.transformer.device
    return tuple(
        gensample.load(name, device=device).float().eval().requires_grad_(False)
        for name in ("fashion_classifier_a", "fashion_weak")
    )
