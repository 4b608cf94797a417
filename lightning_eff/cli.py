"""The ``lightning-eff`` command: LightningCLI that knows the classes of this package by their short names.

``lightning-eff fit --config run.yaml --model.net.width 16`` trains what the YAML says with one thing changed;
``lightning-eff fit --print_config`` writes a YAML to start from.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

ROOMS = ("data", "early_exit", "glimpse", "lidar", "models", "moe", "privacy", "pruning", "synthesis")
"""Rooms whose classes the command line knows by short name, e.g. ``--model ImageClassifier``."""


class EfficiencyCLI(LightningCLI):
    """LightningCLI in subclass mode: any LightningModule, any LightningDataModule, any callback.

    A model that brings its own dataloaders needs no ``--data``.
    """

    def init_parser(self, **kwargs: object) -> LightningArgumentParser:
        """Name the program as it was called, whichever door it was called through."""
        return super().init_parser(**{"prog": "lightning-eff", **kwargs})


def main(args: Sequence[str] | None = None) -> EfficiencyCLI:
    """Run the command line.

    Args:
        args: What stands behind ``lightning-eff``, e.g. ``["fit", "--config", "run.yaml"]``; ``None`` reads it from
            the shell, where a class_path may name modules of the folder it is called in.

    Returns:
        The finished command, with ``.trainer``, ``.model`` and ``.datamodule``.
    """
    if args is None and os.getcwd() not in sys.path:  # the shell's command, unlike python -m, does not look there
        sys.path.insert(0, os.getcwd())
    for name in ROOMS:
        room = import_module(f"lightning_eff.{name}")
        for public in getattr(room, "__all__", ()):
            getattr(room, public)  # a room may import its classes on first use
    return EfficiencyCLI(save_config_kwargs={"overwrite": True}, args=None if args is None else list(args))


def command() -> None:
    """Run the command line from the shell; returns nothing, so that the shell sees success."""
    main()
