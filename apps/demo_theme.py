"""How the demo looks: a quiet theme of system fonts, so that no page asks another host for one."""

from __future__ import annotations

from typing import Any

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; min-width: 0; }
/* Gradio confines rules inside @media to what lies within main, so main's own margin bends by itself. */
.gradio-container .main.fillable { padding: clamp(10px, 3vw, 32px) clamp(8px, 6vw - 16px, 32px) !important; }
.gs-head { padding: 12px 2px 0; }
.gs-head h1 { font-size: 1.55rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
.gs-head p { margin: 4px 0 0; color: var(--body-text-color-subdued); max-width: 90ch; line-height: 1.5; }
.gs-foot { color: var(--body-text-color-subdued); font-size: 0.85rem; padding: 4px 2px; }
.gs-intro { color: var(--body-text-color-subdued); padding: 2px; line-height: 1.5; }

.gs-status { min-height: 38px; padding: 2px; }
.gs-status p { margin: 6px 0 0; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
.gs-bar { height: 5px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.gs-bar span { display: block; height: 100%; border-radius: 3px; background: var(--button-primary-background-fill); }

.gs-title { font-weight: 600; margin: 0 0 8px; }
.gs-new-seed { align-self: end; margin-bottom: 1px; }
.gs-tiles { display: grid; gap: 8px; grid-template-columns: repeat(6, minmax(0, 1fr)); }
.gs-tiles figure, .gs-strip figure { margin: 0; min-width: 0; }
.gs-tiles img, .gs-strip img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; border-radius: 4px; background: #000;
}
.gs-tiles figcaption, .gs-strip figcaption {
  text-align: center; font-size: 0.78rem; padding-top: 3px;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums;
}
.gs-strip { display: grid; gap: 8px; grid-template-columns: repeat(5, 1fr); }
.gs-strip img + img { margin-top: 4px; }
.gs-strip img:nth-of-type(2n + 3) { margin-top: 14px; }

.gs-table { overflow-x: auto; }
.gs-table tr, .gs-table thead, .gs-table tbody { border: 0 !important; }
.gs-table table { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.gs-table th, .gs-table td {
  text-align: right; padding: 7px 10px;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
}
.gs-table th:first-child { text-align: left; font-weight: 500; }
.gs-table p { color: var(--body-text-color-subdued); font-size: 0.85rem; margin: 8px 0 0; max-width: 80ch; }

.gs-tree, .gs-curve { display: block; width: 100%; height: auto; margin-bottom: 14px; }
.gs-tree text, .gs-curve text { fill: var(--body-text-color-subdued); font-size: 12px; }
.gs-edges { fill: none; stroke: var(--body-text-color-subdued); stroke-opacity: 0.3; stroke-width: 0.8; }
.gs-nodes, .gs-curve circle { fill: var(--button-primary-background-fill); }
.gs-best, .gs-line { fill: none; stroke: var(--button-primary-background-fill); stroke-width: 2; }
.gs-axis { fill: none; stroke: var(--border-color-primary); }
#best .gs-tiles { grid-template-columns: repeat(5, minmax(0, 1fr)); }

#gallery .caption-label { font-size: 0.7rem; padding: 1px 6px; opacity: 0.85; }
#gallery, #gallery .grid-wrap { max-height: none !important; height: auto !important; }
#gallery .grid-wrap { min-height: 0; }
#gallery .grid-container {
  grid-template-columns: repeat(5, minmax(0, 1fr)) !important;
  grid-template-rows: none; grid-auto-rows: auto;  /* Gradio's rows of at least 100 px leave bars on a telephone */
}
#preview .gs-tiles { grid-template-columns: repeat(5, minmax(0, 1fr)); }
.gallery-item img, .grid-wrap img, .gallery-container img { image-rendering: pixelated; }
button:focus-visible, input:focus-visible, [role="tab"]:focus-visible {
  outline: 2px solid var(--button-primary-background-fill); outline-offset: 2px;
}
@media (max-width: 640px) {
  .gs-head h1 { font-size: 1.3rem; }
  .tab-container button { padding: 0 6px !important; font-size: 0.8rem !important; }  /* five fit */
  .gs-tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  #gallery .caption-label { display: none; }
  #gallery .grid-container { gap: 6px; }
  #gallery .gallery-item, #gallery .gallery-item > * { min-height: 0; aspect-ratio: 1; }
  .gs-status p { font-size: 0.84rem; }
  .gs-strip { gap: 6px; }
  .gs-table th, .gs-table td { padding: 6px 6px; font-size: 0.88rem; }
}
@media (prefers-reduced-motion: no-preference) { .gs-bar span { transition: width 0.2s linear; } }
"""


def theme() -> Any:
    """A Gradio theme."""
    import gradio as gr

    colors = gr.themes.colors
    return gr.themes.Base(
        primary_hue=colors.indigo, secondary_hue=colors.slate, neutral_hue=colors.slate,
        radius_size=gr.themes.sizes.radius_md, font=_SANS, font_mono=_MONO,
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_text_color="white",
        block_border_width="1px",
        block_shadow="none",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
    )  # fmt: skip
