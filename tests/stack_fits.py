"""Says why a stack does not fit this machine's CPU and Python; exit 3 then, so that a crash is not taken for it."""

from __future__ import annotations

import sys

from xflux_doctor import choose, matrix
from xflux_doctor.gather.machine import gather

why = choose.why_not(matrix.load().stack(sys.argv[1]), gather(), cpu=True)
print(why)
sys.exit(3 if why else 0)
