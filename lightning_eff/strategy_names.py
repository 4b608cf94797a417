"""Names of strategies that a Trainer knows once this package is imported: ``Trainer(strategy="dp_gradient_drop")``.

Lightning has no entry point for strategies, so that somebody must write into its registry; and importing this package
must import neither Lightning nor torch. Hence only names are written, when Lightning is there or as soon as it is,
and a strategy's class is imported when a Trainer asks for it.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dp_gradient_drop": ("DPGradientDropStrategy", {}),
    "dp_gradient_drop_ddp": ("DPGradientDropDDPStrategy", {}),
    "dp_gradient_drop_ddp_spawn": ("DPGradientDropDDPStrategy", {"start_method": "spawn"}),
    "dp_gradient_drop_ddp_fork": ("DPGradientDropDDPStrategy", {"start_method": "fork"}),
}
"""Class, as a public name of this package, and the arguments it is made with, by registered name."""

_REGISTRY = "lightning.pytorch.strategies"


def register_strategies() -> None:
    """Make Lightning know the names, now or when it is imported."""
    module = sys.modules.get(_REGISTRY)
    if module is not None and hasattr(module, "StrategyRegistry"):
        _register(module)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Waits for the module that holds the registry, lets it be imported as ever, and then writes the names."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    for name, (strategy, arguments) in STRATEGIES.items():
        description = f"lightning_eff.{strategy}: private training on fewer coordinates"
        module.StrategyRegistry.register(
            name, partial(_make, strategy), description=description, override=True, **arguments
        )


def _make(strategy: str, **arguments: Any) -> Any:
    return getattr(import_module("lightning_eff"), strategy)(**arguments)
