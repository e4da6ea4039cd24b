"""The command line as a program of its own, from before its modules load to after its last word."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import threading
from typing import NoReturn


def entry(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, and end at once with its exit code.

    Two things that Python does of its own accord took a tenth of the time of `plan`, for nothing: looking through
    thousands of new modules and functions for cycles while they load (commands that live long have that again, see
    `cli._command`), and taking the same objects down one by one at the end.
    """
    gc.disable()
    code = int(importlib.import_module("xflux_doctor.cli").main(arguments))
    if _awaited():
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:  # None: the caller closed it before the start
                stream.flush()
    except BrokenPipeError:  # the reader left
        code = 141
    except OSError:
        sys.exit(code)  # Python's own end says what could not be written
    os._exit(code)


def _awaited() -> bool:
    """Whether Python's own end has something to do: a thread to wait for, a debugger, profiler or prompt to serve."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12 on
    tools = monitoring is not None and any(monitoring.get_tool(number) for number in range(6))
    main = threading.main_thread()
    threads = any(one is not main and not one.daemon for one in threading.enumerate())
    return bool(threads or tools or sys.gettrace() or sys.getprofile() or sys.flags.inspect)
