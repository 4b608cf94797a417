"""``python -m lightning_eff`` is the ``lightning-eff`` command."""

from lightning_eff.cli import main

if __name__ == "__main__":
    main()
