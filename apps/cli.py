"""The ``gensample`` command: subcommands, each in a module of its own that is imported only when it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

# subcommand: (module, help). Each module has add_arguments(parser) and run(namespace) -> exit code.
COMMANDS = {
    "align": ("gensample.apps.align", "align a model to rewards by a recipe"),
    "demo": ("gensample.apps.demo", "serve a web page that draws images"),
    "fid": ("gensample.apps.fid", "measure images against a reference: FID, KID, precision and recall"),
    "quickstart": ("gensample.apps.quickstart", "draw clothes with the shipped model and score them"),
    "sample": ("gensample.apps.sample", "draw images of given classes"),
    "search": ("gensample.apps.search", "search for images of higher reward"),
    "stats": ("gensample.apps.stats", "save reference statistics for fid"),
    "train": ("gensample.apps.train", "train a model by a recipe"),
}


def build_parser() -> ArgumentParser:
    """The parser of every subcommand."""
    parser = ArgumentParser(prog="gensample", description="Train and sample diffusion and flow models.")
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, (module, help_text) in COMMANDS.items():
        subparser = ArgumentParser(description=help_text)
        import_module(module).add_arguments(subparser)
        subcommands.add_subcommand(name, subparser, help=help_text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 done, 2 bad input, 1 failure."""
    namespace = build_parser().parse_args(argv)
    module, _ = COMMANDS[namespace.command]
    code: int = import_module(module).run(namespace[namespace.command])
    return code


if __name__ == "__main__":
    sys.exit(main())
