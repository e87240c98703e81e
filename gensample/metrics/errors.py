"""Errors of the metrics package."""

from __future__ import annotations


class InputError(ValueError):
    """The input cannot be evaluated as asked; the message names it and the fix. The command line exits 2."""


class ImageRefused(ValueError):
    """One image is corrupt or falls under a policy; the message is the reason, without the name."""
