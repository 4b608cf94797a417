"""``python -m lightning_eff.moe.sweep``: make, run, fit and plan."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_eff.moe.sweep import fit_sweep, make_sweep, plan_budget, run_sweep, sweep_table

#: Function of a command, and whether what it needs stands behind it without a name.
_COMMANDS: dict[str, tuple[Callable[..., Any], bool]] = {
    "make": (make_sweep, False),
    "run": (run_sweep, True),
    "fit": (fit_sweep, True),
    "plan": (plan_budget, False),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what is wrong with the input is told in a line.

    Args:
        args: What stands behind ``python -m lightning_eff.moe.sweep``; None reads it from the shell.
    """
    parser = ArgumentParser(prog="python -m lightning_eff.moe.sweep", description=__doc__)
    commands = parser.add_subcommands()
    for name, (function, positional) in _COMMANDS.items():
        told = (function.__doc__ or "").partition("\n")[0]
        command = ArgumentParser(description=told)
        command.add_function_arguments(function, as_positional=positional)
        commands.add_subcommand(name, command, help=told)
    given = parser.parse_args(None if args is None else list(args))
    name = given[commands.dest]
    try:
        result = _COMMANDS[name][0](**given[name].as_dict())
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if name == "make":
        sweep_table(result).print()


if __name__ == "__main__":
    main()
