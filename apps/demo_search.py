"""The Search tab: a tree that grows where it pays, its best images, and its reward against evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from gensample.apps.demo_pictures import status, tiles, waiting
from gensample.apps.demo_search_engine import METHODS, TASTES, SearchEngine
from gensample.apps.demo_tree import curve_svg, tree_svg
from gensample.apps.demo_ui import Stage, clear_errors, connect, run_buttons, seed_input, session_of

if TYPE_CHECKING:
    from gensample.apps.demo_search_engine import SearchProgress


def search_tab(stage: Stage) -> None:
    """Build the tab inside the page under construction."""
    import gradio as gr

    import gensample

    search = SearchEngine(stage.engine, gensample.load("fashion_classifier_a"))
    names = stage.engine.class_names
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            target = gr.Dropdown(names, value=names[5], label="Class to find", filterable=False)
            taste = gr.Dropdown(list(TASTES), value="much ink", label="Ink", filterable=False)
            method = gr.Dropdown(list(METHODS), value=next(iter(METHODS)), label="Method", filterable=False)
            budget = gr.Slider(200, 4000, value=1000, step=100, label="Network evaluations", precision=0)
            seed = seed_input()
            buttons = run_buttons("Search")
        with gr.Column(scale=2, min_width=260):
            gr.HTML(
                '<p class="gs-intro">The model is told nothing. Branches of one tree of half-finished images are '
                "rewarded when they end in the class you chose, and the tree grows on where that paid.</p>"
            )
            line = gr.HTML(status(None, "Press Search to grow a tree."))
            best = gr.HTML(elem_id="best", label="Best images")
            picture = gr.HTML(elem_id="tree", label="Tree")

    def run_search(
        target: Any, taste: Any, method: Any, budget: Any, seed: Any, request: Any
    ) -> Iterator[tuple[Any, Any, Any]]:
        with clear_errors():
            settings = search.settings(target=target, taste=taste, method=method, budget=budget, seed=seed)
            name = names[settings.target]
            with stage.runs.started(session_of(request), lambda: search.search(settings)) as run:
                yield status(None, "Starting"), "", ""
                for ahead in stage.runs.turn(run):
                    yield waiting(ahead), gr.skip(), gr.skip()
                for progress in run:
                    yield progress_line(progress), _best(progress, name), _picture(progress)
            if run.stopped and (run.last is None or not run.last.done):
                last = run.last
                text = "Stopped" if last is None else f"Stopped after {last.evaluations} evaluations"
                yield status(None, text), gr.skip(), gr.skip()

    connect(
        stage, buttons, run_search, [target, taste, method, budget, seed], [line, best, picture], "search"
    )


def progress_line(progress: SearchProgress) -> str:
    """The line above the pictures: a bar, evaluations, finished images and seconds."""
    share = 100.0 if progress.done else min(100.0 * progress.evaluations / progress.budget, 100.0)
    lead = "Done · " if progress.done else ""
    text = (
        f"{lead}{progress.evaluations}/{progress.budget} evaluations · {progress.rollouts} images · "
        f"{progress.seconds:.1f} s"
    )
    bar = (
        '<div class="gs-bar" role="progressbar" aria-label="Searching" aria-valuemin="0" '
        f'aria-valuemax="{progress.budget}" aria-valuenow="{progress.evaluations}">'
        f'<span style="width:{share:.1f}%"></span></div>'
    )
    live = ' role="status"' if progress.done else ""
    return f'<div class="gs-status"{live}>{bar}<p>{escape(text)}</p></div>'


def _best(progress: SearchProgress, name: str) -> str:
    captions = [f"{r:.2f}" for r in progress.rewards]
    return tiles(progress.best, [name] * len(progress.best), captions, title="Best images, by reward")


def _picture(progress: SearchProgress) -> str:
    return (
        f'<p class="gs-title">The tree: from noise, on the left, to images</p>{tree_svg(progress.tree)}'
        f'<p class="gs-title">Best reward</p>{curve_svg(progress.curve, across="evaluations", up="best reward")}'
    )
