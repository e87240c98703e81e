"""Pictures and text of the demo as HTML: small PNGs inside the page, enlarged without smoothing by its style.

Shapes: pixels uint8 (N, H, W), or (N, H, W, 3) for colour.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from gensample.apps.demo_engine import Frame, Progress

_GALLERY_SIDE = 224


def enlarged(pixels: np.ndarray, side: int = _GALLERY_SIDE) -> list[Image]:
    """Each image enlarged by a whole factor, pixels repeated, to at least ``side``: viewers would smooth it."""
    from PIL import Image

    factor = max(1, -(-side // min(pixels.shape[1:3])))
    return [Image.fromarray(p) for p in pixels.repeat(factor, axis=1).repeat(factor, axis=2)]


def data_uri(pixels: np.ndarray) -> str:
    """One image (H, W) or (H, W, 3) as a PNG inside a URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def tiles(
    pixels: np.ndarray, names: Sequence[str], captions: Sequence[str] | None = None, *, title: str = ""
) -> str:
    """A wrapping grid of images; ``names`` are read to those who do not see them, ``captions`` stand below."""
    figures = []
    for index, (image, name) in enumerate(zip(pixels, names, strict=True)):
        caption = f"<figcaption>{escape(captions[index])}</figcaption>" if captions else ""
        figures.append(
            f'<figure><img src="{data_uri(image)}" alt="{escape(name)}, image {index + 1}">{caption}</figure>'
        )
    heading = f'<p class="gs-title">{escape(title)}</p>' if title else ""
    return f'{heading}<div class="gs-tiles">{"".join(figures)}</div>'


def strip(frames: Sequence[Frame], name: str) -> str:
    """Columns from noise to image, wrapping where the screen ends: latents above, the guess below."""
    columns = []
    for frame in frames:
        level = f"noise level {frame.sigma:.2f}"
        pairs = "".join(
            f'<img src="{data_uri(x)}" alt="{escape(name)}: latents at {level}">'
            f'<img src="{data_uri(guess)}" alt="{escape(name)}: guess of the image at {level}">'
            for x, guess in zip(frame.latents, frame.guess, strict=True)
        )
        columns.append(f"<figure>{pairs}<figcaption>σ {frame.sigma:.2f}</figcaption></figure>")
    return f'<div class="gs-strip">{"".join(columns)}</div>'


def status(progress: Progress | None, message: str = "", *, done: bool = False) -> str:
    """The line above the pictures: a bar, the step, images per second and seconds."""
    if progress is None:
        return f'<div class="gs-status" role="status"><p>{escape(message)}</p></div>'
    share = 100 * progress.step / progress.steps
    lead = f"{escape(message)} · " if message else ""
    text = (
        f"{lead}step {progress.step}/{progress.steps} · {progress.images_per_second:.1f} images/s · "
        f"{progress.seconds:.1f} s"
    )
    bar = (
        f'<div class="gs-bar" role="progressbar" aria-label="Sampling" aria-valuemin="0" '
        f'aria-valuemax="{progress.steps}" aria-valuenow="{progress.step}">'
        f'<span style="width:{share:.1f}%"></span></div>'
    )
    live = ' role="status"' if done else ""
    return f'<div class="gs-status"{live}>{bar}<p>{text}</p></div>'


def waiting(ahead: int) -> str:
    """The line above the pictures for a run with ``ahead`` others before it."""
    return status(None, f"Waiting for a turn · {ahead} ahead")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """A table whose first column names the rows, with a note below."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="gs-table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        f"<p>{escape(note)}</p></div>"
    )
