"""Probe: import torch and say what it sees. Runs in the job's interpreter and environment; JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> int:
    started = time.perf_counter()
    try:
        import torch
    except BaseException as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    seen: dict[str, Any] = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "devices": [],
        "capabilities": [],
        "nccl": "",
        "seconds": time.perf_counter() - started,
    }
    try:
        count = torch.cuda.device_count() if torch.version.cuda else 0
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            seen["devices"].append(properties.name)
            seen["capabilities"].append([properties.major, properties.minor])
        if count:
            seen["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
