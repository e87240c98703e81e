"""The Trajectory tab: what the network saw on the way from noise to image, and what it guessed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gensample.apps.demo_pictures import status, strip, waiting
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

if TYPE_CHECKING:
    from gensample.apps.demo_engine import Frame

_MOST_IMAGES = 3


def trajectory_tab(stage: Stage) -> None:
    """Build the tab inside the page under construction."""
    import gradio as gr

    engine = stage.engine
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            label = label_input(engine, engine.class_names[-1])
            steps = steps_input(engine, 16)
            solver = solver_input("euler")
            scale = scale_input(engine, 1.5)
            seed = seed_input()
            count = count_input(engine, 1, most=_MOST_IMAGES)
            buttons = run_buttons("Trace")
        with gr.Column(scale=2, min_width=260):
            gr.HTML(
                '<p class="gs-intro">Each column is one moment, from pure noise (σ 1) to the image (σ 0). Above: '
                "the latents that the network saw. Below: the image that it guessed from them.</p>"
            )
            line = gr.HTML(status(None, "Press Trace to follow one image from noise."))
            picture = gr.HTML(elem_id="strip", label="Trajectory")

    def trajectory(
        label: Any, steps: Any, solver: Any, scale: Any, seed: Any, count: Any, request: Any
    ) -> Iterator[tuple[Any, Any]]:
        with clear_errors():
            settings = engine.settings(
                label=label, steps=steps, solver=solver, scale=scale, seed=seed, count=count
            )
            if len(settings.labels) > _MOST_IMAGES:
                raise ValueError(
                    f"number of images {len(settings.labels)} must be at most {_MOST_IMAGES} here"
                )
            name = engine.class_names[settings.labels[0]]
            frames: list[Frame] = []
            shown = 0
            with stage.runs.started(session_of(request), lambda: engine.trajectory(settings, frames)) as run:
                yield status(None, "Starting"), ""
                for ahead in stage.runs.turn(run):
                    yield waiting(ahead), gr.skip()
                for progress in run:
                    done = progress.images is not None
                    changed = len(frames) > shown
                    shown = len(frames)
                    yield (
                        status(progress, "Done" if done else "", done=done),
                        strip(frames, name) if changed else gr.skip(),
                    )
            if run.stopped and (run.last is None or run.last.images is None):
                yield status(run.last, "Stopped", done=True), gr.skip()

    inputs = [label, steps, solver, scale, seed, count]
    connect(stage, buttons, trajectory, inputs, [line, picture], "trajectory")
