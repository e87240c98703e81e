"""A bank of prompts as the classes of a zero-shot classifier: CLIP (Radford et al., arXiv 2103.00020).

    logits_k = exp(s) cos(E_image(x), E_text(prompt_k)),        p = softmax(logits)

Text-to-image models have no classes, so GFCG is undefined without a finite set of candidates.  The bank is that set:
its prompts are scored by CLIP on the decoded x0, and the same prompts, encoded by the pipeline's own text encoders,
are the reference table:

    bank = PromptBank.from_pretrained("openai/clip-vit-base-patch32", ["a photo of a cat", "a photo of a dog"])
    gensample.sample(sd3, prompt=bank.prompts[0], reference_prompts=list(bank.prompts),
                     guidance=GFCG(posterior=ClassifierPosterior(bank)))

CLIP's confidence on a blurred x0 of early steps is not p(k | x_t); see the guards of GFCG.  transformers is imported
only here, when a bank is made.

Shapes: B images, K prompts, D the joint space; images (B, C, H, W) in [0, 1], C = 3 or 1; logits (B, K) float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What CLIP's own image processor subtracts and divides by.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class PromptBank:
    """Images (B, C, H, W) to logits (B, K); differentiable in the images.  Make one with :meth:`from_model`.

    prompts: K texts, in the order of the logits.  model: a CLIPModel in eval mode.  text: (K, D), of length 1.
    mean, std: per colour channel, of the model's own preprocessing.
    """

    prompts: tuple[str, ...]
    model: nn.Module
    text: Tensor
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD

    @classmethod
    @torch.no_grad()
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        mean: Sequence[float] = IMAGE_MEAN,
        std: Sequence[float] = IMAGE_STD,
    ) -> PromptBank:
        """A bank over a live ``transformers.CLIPModel`` and its tokenizer; the prompts are encoded here, once.

        Raises ValueError for fewer than two prompts, a repeated one, one too long for the model, or training mode.
        """
        texts = tuple(prompts)
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise ValueError(f"prompts={list(texts)} must be at least two different texts")
        if model.training:
            raise ValueError("the CLIP model is in training mode; call model.eval() first")
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        longest = model.config.text_config.max_position_embeddings
        if tokens["input_ids"].shape[1] > longest:
            lengths = tokens["attention_mask"].sum(1)
            raise ValueError(
                f"the prompt {texts[int(lengths.argmax())]!r} has {int(lengths.max())} tokens; CLIP takes {longest}"
            )
        device = next(model.parameters()).device
        tokens = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        text = F.normalize(_features(model.get_text_features(**tokens)).float(), dim=1)
        return cls(texts, model, text, tuple(mean), tuple(std))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        prompts: Sequence[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PromptBank:
        """A bank over a CLIP folder or Hub id, safetensors only.

        Raises ImportError with the fix where transformers is absent, and as :meth:`from_model`.
        """
        try:
            import transformers
        except ImportError:
            raise ImportError("a prompt bank needs transformers: pip install 'gensample[text]'") from None
        source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        model = transformers.CLIPModel.from_pretrained(
            name_or_path, use_safetensors=True, dtype=dtype, **source
        )
        tokenizer = transformers.CLIPTokenizerFast.from_pretrained(name_or_path, **source)
        scaling = _scaling(name_or_path, source)
        return cls.from_model(model.eval().to(device), tokenizer, prompts, **scaling)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K).

        Raises ValueError for images of neither one nor three channels.
        """
        weights = next(self.model.parameters())
        pixels = self.prepare(images.to(weights.device)).to(weights.dtype)
        features = _features(self.model.get_image_features(pixel_values=pixels))  # type: ignore[operator]
        embedded = F.normalize(features.float(), dim=1)
        scale: Any = self.model.logit_scale
        return scale.detach().float().exp() * embedded @ self.text.T

    def prepare(self, images: Tensor) -> Tensor:
        """Images as CLIP sees them, (B, 3, S, S): the shorter side to S (bicubic), the middle square, normalised."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, 3, H, W) or (B, 1, H, W)"
            )
        config: Any = self.model.config
        side = int(config.vision_config.image_size)
        pixels = images.float().expand(-1, 3, -1, -1)
        height, width = pixels.shape[2:]
        if min(height, width) != side:
            size = [max(side, round(n * side / min(height, width))) for n in (height, width)]
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
        pixels = pixels[:, :, top : top + side, left : left + side]
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std


def _features(answer: Any) -> Tensor:
    """The joint-space features: transformers 4 answers the tensor, 5 an object that holds it."""
    features = answer if isinstance(answer, Tensor) else answer.pooler_output
    assert isinstance(features, Tensor)
    return features


def _scaling(name_or_path: str | Path, source: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation of the model's own image processor; CLIP's where the folder has none."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        config, _ = BaseImageProcessor.get_image_processor_dict(name_or_path, **source)
    except OSError:
        return {}
    return {"mean": config.get("image_mean", IMAGE_MEAN), "std": config.get("image_std", IMAGE_STD)}
