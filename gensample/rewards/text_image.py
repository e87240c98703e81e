"""How well images fit a prompt, by a text-image model of transformers: CLIP score, PickScore, SigLIP, BLIP-style.

    clip    100 cos(text, image)                          CLIPScore without its clipping at zero
    pick    logit_scale cos(text, image) = the model's own logits: PickScore (Kirstain et al., arXiv 2305.01569) and
            every other CLIP- or SigLIP-like model
    head    one number an image from a model's own head (ImageReward-style: a regressor on fused text and image), read
            from ``output`` of its answer

The model is given loaded, or as a folder or id of the user's; transformers is imported then and not before.  Images are
resized and normalised as tensors with the processor's own numbers, so that gradients reach them.

Shapes: images (B, 3 or 1, H, W) in [0, 1]; rewards (B,) float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gensample.denoisers import Conditioning

Kind = Literal["clip", "pick", "head"]


@dataclass(frozen=True, eq=False)
class TextImageReward:
    """A text-image model as a reward; see the module.

    model, processor: loaded objects of transformers; :meth:`from_pretrained` loads them.
    prompt: what images are to show; None until ``for_prompt`` binds one, as TreeSearch does.
    kind: "clip", "pick" or "head"; output: of "head", the field of the model's answer, (B,), (B, 1), or (B, 2) with
        the matching class last (BLIP's ``itm_score``), which gives its log-odds.

    Raises ValueError for an unknown kind or a model in training mode.
    """

    model: Any
    processor: Any
    prompt: str | None = None
    kind: Kind = "clip"
    output: str = "logits"
    _text: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is unknown; use one of {get_args(Kind)}")
        if isinstance(self.model, nn.Module) and self.model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        if self.prompt is not None:
            object.__setattr__(self, "_text", self._tokens(self.prompt))

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        processor: str | None = None,
        kind: Kind = "clip",
        output: str = "logits",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextImageReward:
        """From folders or ids of the Hub; PickScore's weights take their processor from another id.

        Raises ImportError where transformers is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise ImportError("this reward needs transformers; pip install transformers") from error
        # The class that was saved: AutoModel would leave a head out.
        names = transformers.AutoConfig.from_pretrained(model).architectures or ["AutoModel"]
        network = getattr(transformers, names[0]).from_pretrained(model, use_safetensors=True, dtype=dtype)
        network.to(device)
        network.eval().requires_grad_(False)
        return cls(
            network, transformers.AutoProcessor.from_pretrained(processor or model), kind=kind, output=output
        )

    @property
    def description(self) -> str:
        """The kind, the model and the prompt."""
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        return f"TextImageReward({self.kind}, {name}, {self.prompt!r})"

    def for_prompt(self, prompt: str) -> TextImageReward:
        """The reward of images of ``prompt``."""
        return replace(self, prompt=prompt, _text={})

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Rewards (B,), differentiable in the images; ValueError where no prompt is bound."""
        if self.prompt is None:
            raise ValueError("no prompt is bound; give prompt= or call for_prompt(...)")
        parameter = next(self.model.parameters())
        pixels = self.pixels(images).to(parameter.device, parameter.dtype)
        text = {name: value.to(parameter.device) for name, value in self._text.items()}
        if self.kind == "head":
            text = {name: value.expand(len(images), -1) for name, value in text.items()}
            return self._head(self.model(pixel_values=pixels, **text), len(images))
        answer = self.model(pixel_values=pixels, **text)
        if self.kind == "pick":
            return answer.logits_per_image[:, 0].float()
        return 100.0 * nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds).float()

    def pixels(self, images: Tensor) -> Tensor:
        """The model's input (B, 3, h, w) of images in [0, 1]: shorter side resized, centre cropped, normalised."""
        of = self.processor.image_processor
        size, mean, std = _sides(of.size), of.image_mean, of.image_std
        crop = _sides(getattr(of, "crop_size", None)) if getattr(of, "do_center_crop", False) else {}
        images = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        height, width = images.shape[-2:]
        if "shortest_edge" in size:
            scale = size["shortest_edge"] / min(height, width)
            target = (round(height * scale), round(width * scale))
        else:
            target = (size["height"], size["width"])
        if target != (height, width):
            images = nn.functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        if crop:
            top, left = (target[0] - crop["height"]) // 2, (target[1] - crop["width"]) // 2
            images = images[..., top : top + crop["height"], left : left + crop["width"]]
        shift, scale_by = (torch.tensor(v, device=images.device).reshape(1, 3, 1, 1) for v in (mean, std))
        return (images - shift) / scale_by

    def _tokens(self, prompt: str) -> dict[str, Tensor]:
        tokens = self.processor.tokenizer(
            [prompt], padding="max_length", truncation=True, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}

    def _head(self, answer: Any, rows: int) -> Tensor:
        scores = getattr(answer, self.output, None)
        if scores is None:
            raise ValueError(
                f"the model's answer has no field {self.output!r}; give output= one of {list(answer)}"
            )
        if scores.shape == (rows, 2):
            scores = scores[:, 1] - scores[:, 0]
        if scores.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"field {self.output!r} has shape {tuple(scores.shape)}; expected ({rows},)")
        return scores.reshape(rows).float()


def _sides(size: Any) -> dict[str, int]:
    """The given sides of a processor's size, by name; an int is the shortest edge."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    names = ("height", "width", "shortest_edge")
    found = {name: size.get(name) if isinstance(size, dict) else getattr(size, name, None) for name in names}
    return {name: int(value) for name, value in found.items() if value is not None}
