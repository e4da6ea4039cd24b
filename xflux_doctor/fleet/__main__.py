"""`torchrun … -m xflux_doctor.fleet` and `srun python -m xflux_doctor.fleet`: the command line's `fleet`."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    # The command line stands above this package and is loaded by name, as it loads its own commands.
    importlib.import_module("xflux_doctor.program").entry(["fleet", *sys.argv[1:]])
