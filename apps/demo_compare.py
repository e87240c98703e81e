"""The Compare tab: the same seeds under two settings, side by side, with scores under classifier B."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gensample.apps.demo_engine import Settings
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

if TYPE_CHECKING:
    from gensample.apps.demo_engine import DemoEngine, Progress
    from gensample.apps.demo_scores import Judge, Scores

_FEWEST = 2  # a Fréchet distance needs a covariance
_NOTE = (
    "FD-B: Fréchet distance in the feature space of classifier B from real validation images of the same classes "
    "(not FID; lower is better). A few images read high whoever made them, so compare with as many real images. "
    "Confidence: B's mean probability of the class asked for. Accuracy: how often B says that class."
)


@dataclass(frozen=True)
class Side:
    """A finished side: its settings, last progress, and scores where B can judge the model."""

    settings: Settings
    progress: Progress
    scores: Scores | None


def compare_tab(stage: Stage) -> None:
    """Build the tab inside the page under construction."""
    import gradio as gr

    engine = stage.engine
    with gr.Row():
        label = label_input(engine, engine.class_names[-1])
        count = count_input(engine, 12, fewest=_FEWEST)
        seed = seed_input()
    options = []
    with gr.Row(equal_height=False):
        for name, scale in (("A", 1.0), ("B", 2.0)):
            with gr.Column(min_width=260), gr.Group():
                gr.HTML(f"<h3>Setting {name}</h3>", padding=True)
                options += [steps_input(engine, 16), solver_input("euler"), scale_input(engine, scale)]
    buttons = run_buttons("Compare")
    line = gr.HTML(status(None, "Both settings start from the same noise, image by image."))
    with gr.Row(equal_height=False):
        pictures = []
        for name in "AB":
            with gr.Column(min_width=260):
                pictures.append(gr.HTML(elem_id=f"side-{name.lower()}", label=f"Setting {name}"))
    result = gr.HTML(elem_id="scores")

    def compare(
        label: Any, count: Any, seed: Any, steps_a: Any, solver_a: Any, scale_a: Any,
        steps_b: Any, solver_b: Any, scale_b: Any, request: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        with clear_errors():
            sides = checked_sides(
                engine, label, count, seed, (steps_a, solver_a, scale_a), (steps_b, solver_b, scale_b)
            )
            names = [engine.class_names[i] for i in sides[0].labels]
            finished: list[Side] = []
            with stage.runs.started(
                session_of(request), lambda: both(engine, stage.judge, sides, finished)
            ) as run:
                yield status(None, "Starting"), "", "", ""
                for ahead in stage.runs.turn(run):
                    yield waiting(ahead), gr.skip(), gr.skip(), gr.skip()
                for progress in run:
                    side = len(finished) - (progress.images is not None)
                    updates: list[Any] = [gr.skip(), gr.skip()]
                    if progress.preview is not None:
                        captions = captions_of(finished[side]) if progress.images is not None else None
                        updates[side] = tiles(
                            progress.preview, names, captions, title=f"Setting {'AB'[side]}"
                        )
                    done = len(finished) == len(sides)
                    line = status(progress, "Done" if done else f"Setting {'AB'[side]}", done=done)
                    yield line, *updates, scores_table(finished, stage.judge) if done else gr.skip()
            if run.stopped and len(finished) < len(sides):
                yield status(run.last, "Stopped", done=True), gr.skip(), gr.skip(), gr.skip()

    connect(stage, buttons, compare, [label, count, seed, *options], [line, *pictures, result], "compare")


def checked_sides(
    engine: DemoEngine, label: Any, count: Any, seed: Any, *options: tuple[Any, Any, Any]
) -> tuple[Settings, ...]:
    """The settings of each side; ValueError names the side of a wrong one."""
    sides = []
    for name, (steps, solver, scale) in zip("AB", options, strict=True):
        try:
            sides.append(
                engine.settings(
                    label=label,
                    steps=steps,
                    solver=solver,
                    scale=scale,
                    seed=seed,
                    count=count,
                    fewest=_FEWEST,
                )
            )
        except ValueError as error:
            raise ValueError(f"Setting {name}: {error}") from None
    return tuple(sides)


def both(
    engine: DemoEngine, judge: Judge | None, sides: tuple[Settings, ...], finished: list[Side]
) -> Generator[Progress, None, None]:
    """Draw each side in turn; a side is in ``finished`` before its last progress is yielded."""
    for settings in sides:
        for progress in engine.draw(settings):
            if progress.images is not None:
                scores = judge.scores(progress.images, settings.labels) if judge is not None else None
                finished.append(Side(settings, progress, scores))
            yield progress


def captions_of(side: Side) -> list[str] | None:
    """B's confidence in the class asked for, one caption per image."""
    return [f"{c:.0%}" for c in side.scores.confidences] if side.scores is not None else None


def scores_table(sides: list[Side], judge: Judge | None) -> str:
    """The settings and scores of both sides, beside those of real images."""
    rows = [
        ["Steps", *(str(s.settings.steps) for s in sides)],
        ["Solver", *(s.settings.solver for s in sides)],
        ["Guidance scale", *(f"{s.settings.scale:g}" for s in sides)],
        ["Network evaluations", *(str(s.settings.evaluations) for s in sides)],
        ["Seconds", *(f"{s.progress.seconds:.1f}" for s in sides)],
    ]
    head = ["", "A", "B"]
    if judge is None:
        return table(
            head, rows, "Scores need the shipped classifier, which does not know this model's classes."
        )
    scores = [s.scores for s in sides if s.scores is not None]
    floor = judge.floor(sides[0].settings.labels)
    rows = [
        ["FD-B", *(f"{s.fd_b:.2f}" for s in scores), f"{floor:.2f}"],
        ["Confidence", *(f"{s.confidence:.1%}" for s in scores), "–"],
        ["Accuracy", *(f"{s.accuracy:.1%}" for s in scores), "–"],
        *([*row, "–"] for row in rows),
    ]
    return table([*head, f"{len(sides[0].settings.labels)} real images"], rows, _NOTE)
