"""In a stack's venv: import every pinned package, run every toy, write what was seen.

Arguments: the stack's name, torch's build, the requirements file, the result file, the report that pip wrote.
"""

import datetime
import importlib
import json
import platform
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import stack_room
import torch
import toys

MODULES = {
    "huggingface-hub": "huggingface_hub",
    "optimum-quanto": "optimum.quanto",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "py-cpuinfo": "cpuinfo",
}
TOYS = ("encoders", "tokenizer", "lora_steps", "quanto", "tensorboard", "zero2")


def pinned(requirements):
    """Names of the lines `name==version`; the exported file has comments and index lines too."""
    lines = Path(requirements).read_text().splitlines()
    return [line.partition("==")[0].strip() for line in lines if "==" in line and line[:1].isalnum()]


def step(title, act, *arguments):
    """What one step said, whether it passed, and its time in seconds."""
    begin = time.perf_counter()
    try:
        said, ok = act(*arguments), True
    except Exception as error:  # noqa: BLE001 - whatever a package raises is the result
        said, ok = f"{type(error).__name__}: {str(error)[-600:]}", False
    seconds = round(time.perf_counter() - begin, 1)
    said = said if isinstance(said, str) else ""
    print(f"{'ok  ' if ok else 'FAIL'} {seconds:6.1f} s  {title:<28} {said}", flush=True)
    return {"ok": ok, "seconds": seconds, "said": said}


def is_build(build):
    assert torch.__version__.endswith(f"+{build}"), f"torch {torch.__version__}; the stack has {build}"
    return torch.__version__


def main(name, build, requirements, result, report):
    steps = {}
    for package in pinned(requirements):
        title = f"import {package}"
        steps[title] = step(title, importlib.import_module, MODULES.get(package, package))
    steps["torch's build"] = step("torch's build", is_build, build)
    for toy in TOYS:
        steps[toy] = step(toy, getattr(toys, toy))
    sizes = {"installed_bytes": stack_room.filled(Path(sys.prefix))}
    title = "what pip fetched"
    steps[title] = step(title, lambda: sizes.update(download_bytes=stack_room.downloads(Path(report))))
    cuda = torch.version.cuda
    nccl = torch.distributed.is_nccl_available()
    seen = {
        "stack": name,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": cuda,
        "gpu_archs": (torch._C._cuda_getArchFlags() or "").split() if cuda else [],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **sizes,
        "steps": steps,
        "requirements": Path(requirements).read_text().splitlines(),
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
    }
    Path(result).write_text(json.dumps(seen, indent=1) + "\n")
    archs = " ".join(seen["gpu_archs"]) or "no cubins"
    room = ", ".join(f"{key.removesuffix('_bytes')} {size / 2**30:.2f} GiB" for key, size in sizes.items())
    versions = f"Python {seen['python']}, torch {seen['torch']}, NCCL {seen['nccl']}, cuDNN {seen['cudnn']}"
    print(f"{name}: {room}, {versions}, {archs}")
    return not all(step["ok"] for step in steps.values())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
