"""The Guidance tab: which class an image is confused with on its way, and how strongly the rule pushes it away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gensample.apps.demo_engine import ALL_CLASSES
from gensample.apps.demo_guidance_engine import MOST_IMAGES, RULES, GuidanceEngine, StepRecord
from gensample.apps.demo_pictures import status, table, tiles, waiting
from gensample.apps.demo_ui import (
    Stage,
    clear_errors,
    connect,
    count_input,
    label_input,
    run_buttons,
    scale_input,
    seed_input,
    session_of,
    solver_input,
    steps_input,
)

_NOTE = (
    "Each cell: classifier A's confidence in the class asked for, seen in the model's guess of the image at that "
    "noise level σ; then what the rule contrasts with, and the weight of that contrast. A dash: left alone. A both "
    "guides and is shown here, so high confidence is no proof; classifier B judges in the Compare tab."
)


def guidance_tab(stage: Stage) -> None:
    """Build the tab inside the page under construction."""
    import gradio as gr

    engine = GuidanceEngine(stage.engine)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            label = label_input(stage.engine, "shirt" if "shirt" in stage.engine.class_names else ALL_CLASSES)
            rule = gr.Dropdown(
                [(text, name) for name, text in RULES.items()], value="gfcg", label="Rule", filterable=False
            )
            scale = scale_input(stage.engine, 1.5)
            gamma = gr.Slider(0, 4, value=1, step=0.1, label="Gamma (GFCG, 0 = off)")
            threshold = gr.Slider(0, 0.9, value=0.05, step=0.05, label="Confident below this doubt (GFCG)")
            steps = steps_input(stage.engine, 16)
            solver = solver_input("euler")
            seed = seed_input()
            count = count_input(stage.engine, 4, most=MOST_IMAGES)
            buttons = run_buttons("Guide")
        with gr.Column(scale=2, min_width=260):
            line = gr.HTML(status(None, "Press Guide to see what the classifier says at every step."))
            picture = gr.HTML(elem_id="guided", label="Images")
            result = gr.HTML(elem_id="guidance-steps", label="Steps")

    def guide(
        label: Any, rule: Any, scale: Any, gamma: Any, threshold: Any, steps: Any, solver: Any, seed: Any, count: Any,
        request: Any,
    ) -> Iterator[tuple[Any, Any, Any]]:  # fmt: skip
        with clear_errors():
            settings = engine.settings(
                label=label, rule=rule, scale=scale, gamma=gamma, threshold=threshold, steps=steps,
                solver=solver, seed=seed, count=count,
            )  # fmt: skip
            names = [stage.engine.class_names[i] for i in settings.plain.labels]
            records: list[StepRecord] = []
            with stage.runs.started(session_of(request), lambda: engine.draw(settings, records)) as run:
                yield status(None, "Starting"), "", ""
                for ahead in stage.runs.turn(run):
                    yield waiting(ahead), gr.skip(), gr.skip()
                for progress in run:
                    done = progress.images is not None
                    pictures = gr.skip() if progress.preview is None else tiles(progress.preview, names)
                    yield (
                        status(progress, "Done" if done else "", done=done), pictures,
                        steps_table(names, records) if progress.preview is not None else gr.skip(),
                    )  # fmt: skip
            if run.stopped and (run.last is None or run.last.images is None):
                yield status(run.last, "Stopped", done=True), gr.skip(), gr.skip()

    inputs = [label, rule, scale, gamma, threshold, steps, solver, seed, count]
    connect(stage, buttons, guide, inputs, [line, picture, result], "guidance")


def steps_table(names: Sequence[str], records: Sequence[StepRecord]) -> str:
    """Steps as rows, images as columns."""
    head = ["σ", *(f"{i + 1} · {name}" for i, name in enumerate(names))]
    rows = []
    for record in records:
        cells = [
            f"{confidence:.0%} · {reference} × {scale:.2f}" if scale else f"{confidence:.0%} · –"
            for confidence, reference, scale in zip(
                record.confidences, record.references, record.scales, strict=True
            )
        ]
        rows.append([f"{record.sigma:.2f}", *cells])
    return table(head, rows, _NOTE)
