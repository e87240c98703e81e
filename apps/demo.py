"""``gensample demo``: the shipped model behind a web page on this machine, with Gradio (the extra ``demo``)."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gensample.apps.fid import report_errors

_MAX_SESSIONS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add = parser.add_argument
    add("--model", default="fashion", help="shipped name, folder or Hub id of a class-conditional pipeline")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; the default is reachable from this machine only",
    )
    add("--port", type=int, default=7860)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")


def run(namespace: Any) -> int:
    """Serve until interrupted; 0 done, 2 bad input, 1 failure."""
    from gensample.metrics.errors import InputError

    with report_errors("demo") as outcome:
        check_address(namespace.host, namespace.port)
        try:
            page, engine = load_page(namespace.model, namespace.device)
        except ValueError as error:
            raise InputError(str(error)) from error
        serve(page, engine, namespace.host, namespace.port)
    return outcome.code


def check_address(host: str, port: int) -> None:
    """Raise InputError unless this process can listen there: loading the model first would waste its user's time."""
    import socket

    from gensample.metrics.errors import InputError

    if not 1 <= port <= 65535:
        raise InputError(f"--port {port} must be from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be used ({error}); give another port"
        ) from error


def load_page(model: str = "fashion", device: str = "auto") -> tuple[Any, Any]:
    """The page (``gr.Blocks``) over a model, and its engine.

    Raises InputError where Gradio is not installed, ValueError where the model cannot be served.
    """
    from gensample.metrics.errors import InputError

    require_gradio(InputError)
    from gensample.apps.demo_engine import DemoEngine
    from gensample.apps.demo_runs import Runs
    from gensample.apps.demo_scores import Judge
    from gensample.apps.demo_ui import Stage, build
    from gensample.apps.drawing import load_quietly
    from gensample.apps.sample import class_conditional, device_of
    from gensample.metrics.distributed import World

    pipe = class_conditional(load_quietly(model), model)
    pipe.to(device_of(device, World()))
    engine = DemoEngine(pipe, name=model)
    return build(Stage(engine, Runs(), Judge() if Judge.suits(pipe) else None)), engine


def require_gradio(error: type[Exception]) -> None:
    """Raise ``error`` with the fix where Gradio is missing; keep it quiet where it is not."""
    import os

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise error("the demo needs Gradio; install it with: pip install 'gensample[demo]'") from None


def serve(page: Any, engine: Any, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Listen until interrupted. GET /health answers with the engine's state.

    Raises InputError where the address cannot be used.
    """
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from gensample.apps.demo_theme import CSS, theme
    from gensample.metrics.errors import InputError

    async def health(request: Any) -> JSONResponse:
        return JSONResponse(engine.health())

    print(f"gensample demo on http://{host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, inbrowser=False, show_error=False,
            max_file_size="1mb", state_session_capacity=_MAX_SESSIONS, run_history=False, footer_links=[],
            ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, strict_cors=True,
            allowed_paths=[], app_kwargs={"routes": [Route("/health", health)], "docs_url": None, "redoc_url": None},
            theme=theme(), css=CSS,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be used ({error}); give another port"
        ) from error
