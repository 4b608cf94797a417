"""PyTorch Lightning plug-ins that make models cheaper.

Every public name can be imported from here; ``__init__.pyi`` lists them. The rooms behind them are imported on first
use (PEP 562), so that ``import lightning_eff`` costs next to nothing and pulls in none of the heavy dependencies.
"""

import lazy_loader

from lightning_eff.strategy_names import register_strategies

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_strategies()
