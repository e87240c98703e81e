"""The Generate tab: images of a class, with live previews and a gallery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gensample.apps.demo_engine import ALL_CLASSES
from gensample.apps.demo_pictures import enlarged, status, tiles, waiting
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


def generate_tab(stage: Stage) -> None:
    """Build the tab inside the page under construction."""
    import gradio as gr

    engine = stage.engine
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            label = label_input(engine, ALL_CLASSES)
            steps = steps_input(engine, 16)
            solver = solver_input("exp2m")
            scale = scale_input(engine, 1.1)
            seed = seed_input()
            count = count_input(engine, 20)
            buttons = run_buttons("Generate")
        with gr.Column(scale=2, min_width=260):
            line = gr.HTML(status(None, "Choose a class and press Generate."))
            preview = gr.HTML(elem_id="preview", label="Live preview", visible=False)
            gallery = gr.Gallery(
                label="Images", show_label=False, elem_id="gallery", columns=5, object_fit="contain", format="png",
                height=None, interactive=False, buttons=["download", "fullscreen"],
            )  # fmt: skip

    def generate(
        label: Any, steps: Any, solver: Any, scale: Any, seed: Any, count: Any, request: Any
    ) -> Iterator[tuple[Any, Any, Any]]:
        with clear_errors():
            settings = engine.settings(
                label=label, steps=steps, solver=solver, scale=scale, seed=seed, count=count
            )
            names = [engine.class_names[i] for i in settings.labels]
            with stage.runs.started(session_of(request), lambda: engine.draw(settings)) as run:
                yield status(None, "Starting"), gr.skip(), gr.skip()
                for ahead in stage.runs.turn(run):
                    yield waiting(ahead), gr.skip(), gr.skip()
                for progress in run:
                    if progress.images is not None and progress.preview is not None:
                        pictures = list(zip(enlarged(progress.preview), names, strict=True))
                        yield (
                            status(progress, "Done", done=True),
                            gr.update(value="", visible=False),
                            gr.update(value=pictures, visible=True),
                        )
                    elif progress.preview is not None:
                        picture = tiles(progress.preview, names)
                        yield (
                            status(progress),
                            gr.update(value=picture, visible=True),
                            gr.update(visible=False),
                        )
                    else:
                        yield status(progress), gr.skip(), gr.skip()
            if run.stopped and (run.last is None or run.last.images is None):
                yield status(run.last, "Stopped", done=True), gr.skip(), gr.skip()

    inputs = [label, steps, solver, scale, seed, count]
    connect(stage, buttons, generate, inputs, [line, preview, gallery], "generate")
