"""``--guidance cfg|atg|gfcg|gfcg-atg``: the command line's guidance rules, with the networks they need."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gensample.guidance import ClassifierPosterior, Guidance

RULES = ("cfg", "atg", "gfcg", "gfcg-atg")


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """The rule, its scales and its networks."""
    add = parser.add_argument
    add("--guidance", choices=RULES, default="cfg", help="guidance rule; atg: autoguidance, gfcg: GFCG-style")
    add("--scale", type=float, default=1.0, help="scale of cfg, atg and gfcg-atg; 1 is the conditional model")
    add("--gamma", type=float, default=2.0, help="of gfcg and gfcg-atg: scale gamma (1 - p_c); 0 is off")
    add("--threshold", type=float, default=0.05, help="of gfcg and gfcg-atg: confident below this 1 - p_c")
    add("--weak", help="weak network of atg and gfcg-atg; default: the one that ships with the model")
    add("--classifier", help="classifier of gfcg and gfcg-atg; default: the one that ships with the model")


def check_guidance(ns: Any) -> None:
    """Raise ValueError for scales that the rule cannot use, before anything is loaded."""
    from gensample.guidance import CFG, GFCG, NoiseAwarePosterior

    CFG(ns.scale)
    GFCG(posterior=NoiseAwarePosterior(lambda x, t: x), gamma=ns.gamma, threshold=ns.threshold)
    if ns.guidance == "gfcg" and ns.scale != 1.0:
        raise ValueError(f"--scale {ns.scale:g} does not apply to --guidance gfcg; its scale is --gamma")
    for option, rule in (("weak", "atg"), ("classifier", "gfcg")):
        if rule in ns.guidance and getattr(ns, option) is None and ns.model != "fashion":
            raise ValueError(f"--guidance {ns.guidance} needs --{option}: none ships with {ns.model}")


def guidance_rule(ns: Any, pipe: Any, device: str) -> Guidance:
    """The rule asked for, its networks loaded to ``device`` and the classifier's label map checked."""
    from gensample.guidance import CFG, GFCG, Autoguidance

    if ns.guidance == "cfg":
        return CFG(ns.scale)
    base = None
    if "atg" in ns.guidance:
        base = Autoguidance(ns.scale, weak=load_network(ns.weak or "fashion_weak", device, "--weak"))
    if ns.guidance == "atg":
        assert base is not None
        return base
    posterior = _posterior(ns.classifier or "fashion_classifier_a", pipe, device)
    return GFCG(posterior=posterior, gamma=ns.gamma, threshold=ns.threshold, base=base)


def _posterior(name: str, pipe: Any, device: str) -> ClassifierPosterior:
    """The classifier, refused unless it agrees with the labels of unguided samples; no data set is at hand."""
    import torch

    from gensample.guidance import ClassifierPosterior, check_label_map
    from gensample.sampling import sample

    classifier = load_network(name, device, "--classifier")
    labels = torch.arange(pipe.transformer.config.num_classes).repeat_interleave(2)
    images = sample(
        pipe, class_labels=labels, num_inference_steps=6, generator=0, output_type="pt", progress=False
    ).images
    try:
        check_label_map(classifier, images, labels)
    except ValueError as error:
        raise ValueError(f"--classifier {name}: {error}") from error
    return ClassifierPosterior(classifier, micro_batch=64)


def load_network(name: str, device: str, option: str) -> Any:
    """The network called ``name`` in float32 on ``device``, frozen; ValueError that names ``option`` for a pipeline."""
    import gensample

    try:
        network = gensample.load(name, device=device)
    except ValueError as error:
        raise ValueError(f"{option} {name}: {error}") from error
    if hasattr(network, "components"):
        raise ValueError(f"{option} {name} is a pipeline; give a folder with config.json")
    return network.float().eval().requires_grad_(False)
