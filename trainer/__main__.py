"""`python -m xflux_trainer`."""

from __future__ import annotations

from xflux_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
