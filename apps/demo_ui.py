"""The page of ``gensample demo``: one function per tab, all sharing one line in front of the network."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gensample.apps.demo_engine import ALL_CLASSES, MAX_SEED, DemoEngine
from gensample.apps.demo_runs import Runs

if TYPE_CHECKING:
    from gensample.apps.demo_scores import Judge

Function = TypeVar("Function", bound=Callable[..., Any])

_QUEUE_SIZE = 16  # of requests whose handler has not begun; the line itself is kept by Runs
_CACHE_SECONDS = (600, 3600)  # look every 10 minutes for files older than an hour


@dataclass(frozen=True)
class Stage:
    """What every tab is built on."""

    engine: DemoEngine
    runs: Runs
    judge: Judge | None


def build(stage: Stage) -> Any:
    """The page, as ``gr.Blocks`` with its queue set."""
    import gradio as gr

    from gensample.apps.demo_compare import compare_tab
    from gensample.apps.demo_generate import generate_tab
    from gensample.apps.demo_guidance import guidance_tab
    from gensample.apps.demo_search import search_tab
    from gensample.apps.demo_trajectory import trajectory_tab

    tabs = {"Generate": generate_tab, "Compare": compare_tab, "Trajectory": trajectory_tab}
    if stage.judge is not None:  # the shipped classifiers know this model's classes
        tabs["Guidance"] = guidance_tab
        tabs["Search"] = search_tab
    count = sum(p.numel() for p in stage.engine.pipe.transformer.parameters()) / 1e6
    with gr.Blocks(
        title="gensample", analytics_enabled=False, delete_cache=_CACHE_SECONDS, fill_width=True
    ) as page:
        gr.HTML(
            '<header class="gs-head"><h1>gensample</h1>'
            f"<p>A class-conditional flow model of {count:.1f} million parameters turns noise into images, "
            "one step at a time.</p></header>"
        )
        with gr.Tabs():
            for name, tab in tabs.items():
                with gr.Tab(name, id=name.lower()):
                    tab(stage)
        gr.HTML(
            f'<footer class="gs-foot">Model <b>{stage.engine.name}</b>. Everything is computed on this server; '
            "the page loads nothing from anywhere else.</footer>"
        )

        def leave(request: Any) -> None:
            stage.runs.stop(session_of(request))

        page.unload(wants_request(leave))
    return page.queue(max_size=_QUEUE_SIZE, default_concurrency_limit=1, api_open=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Show what the engine refuses as a message of the page and of the API, and nothing else of the inside."""
    import gradio as gr

    try:
        yield
    except (ValueError, TimeoutError, FloatingPointError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def wants_request(function: Function) -> Function:
    """Mark the parameter ``request``: Gradio passes the request by its annotation, which only exists with Gradio."""
    import gradio as gr

    function.__annotations__["request"] = gr.Request
    return function


def session_of(request: Any) -> str:
    """The browser session that asks."""
    return str(request.session_hash)


def label_input(engine: DemoEngine, value: str) -> Any:
    """The choice of a class."""
    import gradio as gr

    return gr.Dropdown([ALL_CLASSES, *engine.class_names], value=value, label="Class", filterable=False)


def steps_input(engine: DemoEngine, value: int) -> Any:
    """The number of steps."""
    import gradio as gr

    return gr.Slider(1, engine.limits.steps, value=value, step=1, label="Steps", precision=0)


def solver_input(value: str) -> Any:
    """The choice of a solver."""
    import gradio as gr

    from gensample.solvers import DETERMINISTIC_SOLVERS, SOLVERS

    choices = [(f"{s} ({'ODE' if s in DETERMINISTIC_SOLVERS else 'SDE'})", s) for s in SOLVERS]
    return gr.Dropdown(choices, value=value, label="Solver", filterable=False)


def scale_input(engine: DemoEngine, value: float) -> Any:
    """The guidance scale."""
    import gradio as gr

    return gr.Slider(0, engine.limits.scale, value=value, step=0.1, label="Guidance (1 = off)")


def count_input(engine: DemoEngine, value: int, *, fewest: int = 1, most: int | None = None) -> Any:
    """The number of images."""
    import gradio as gr

    return gr.Slider(fewest, most or engine.limits.images, value=value, step=1, label="Images", precision=0)


def seed_input() -> Any:
    """The seed, with a button that draws another."""
    import gradio as gr

    with gr.Row(equal_height=False):
        seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", scale=2, min_width=110)
        another = gr.Button("New seed", size="md", scale=1, min_width=96, elem_classes="gs-new-seed")
    another.click(
        lambda: secrets.randbelow(MAX_SEED + 1), None, seed, queue=False, api_visibility="private",
        show_progress="hidden",
    )  # fmt: skip
    return seed


def run_buttons(label: str) -> tuple[Any, Any]:
    """The button that starts a run and the one that stops it."""
    import gradio as gr

    with gr.Row():
        return gr.Button(label, variant="primary", scale=2, min_width=100), gr.Button(
            "Stop", scale=1, min_width=80
        )


def connect(
    stage: Stage,
    buttons: tuple[Any, Any],
    function: Any,
    inputs: list[Any],
    outputs: list[Any],
    api_name: str,
) -> None:
    """Let the buttons start and stop ``function``, a generator whose first output is the status line."""
    import gradio as gr

    from gensample.apps.demo_pictures import status

    start, stop = buttons
    # preprocess=False: the engine checks raw values itself and says what is wrong with them.
    # No limit: every handler begins at once and waits inside `Runs`, where Stop reaches it. Gradio's `cancels` would
    # cut the stream in which the handler tells its end, and count as a failure.
    event = start.click(
        wants_request(function), inputs, outputs, api_name=api_name, concurrency_limit=None,
        trigger_mode="once", preprocess=False, show_progress="hidden",
    )  # fmt: skip

    refused = json.dumps(status(None, "Refused: see the message."))
    event.failure(None, None, outputs[:1], js=f"() => {refused}", api_visibility="private")

    def halt(request: Any) -> Any:
        """Stop; the handler itself then says where, so that nothing it had sent before comes later."""
        if stage.runs.stop(session_of(request)):
            return gr.skip()
        # A run whose handler has not begun cannot be told from one that was never asked for.
        return status(None, "Nothing is running. If a run you have just started appears, press Stop again.")

    stop.click(
        wants_request(halt), None, outputs[:1], queue=False, api_visibility="private",
        show_progress="hidden",
    )  # fmt: skip
