"""Which files in a job's folder kill the imports of a stack, though no package of that name is installed.

    CUDA_VISIBLE_DEVICES= VENV/bin/python benchmarks/shadows.py

Notes every top-level name that the stack's packages look for, lays a file of that name that cannot be imported over
each that is not there, takes away one after the other those that end the imports, and tries each alone. Prints the
names after some minutes (xflux_doctor/gather/shadows.py has those of both CPU stacks).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = """
import torch, accelerate, transformers, diffusers, peft, deepspeed, optimum.quanto
from transformers import CLIPTextModel, T5EncoderModel, CLIPTokenizer, T5TokenizerFast
from diffusers import FluxTransformer2DModel, AutoencoderKL, FluxPipeline
from torch.utils.tensorboard import SummaryWriter
import xflux_trainer.train, xflux_trainer.encoders, xflux_trainer.model
"""
SEEK = f"""
import sys
sought = set()
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        sought.add(name.partition(".")[0])
sys.meta_path.insert(0, Finder)
{IMPORTS}
print(*sorted(sought - sys.stdlib_module_names))
"""
NO_PACKAGES = {"libtorchsplit", "_remote_module_non_scriptable"}
"""What torch makes or looks for itself."""


def imports(program: str, folder: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": folder}
    argv = [sys.executable, "-c", program]
    return subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def lay(folder: str, name: str) -> Path:
    file = Path(folder, f"{name}.py")
    file.write_text(f"raise ImportError('{name} is shadowed')\n")
    return file


def main() -> int:
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as folder:
        sound = imports(SEEK, alone)
        if sound.returncode:
            print(sound.stderr[-2000:])
            return 1
        sought = set(sound.stdout.splitlines()[-1].split()) - NO_PACKAGES
        for name in sorted(name for name in sought if importlib.util.find_spec(name) is None):
            lay(folder, name)
        suspects = []
        while (done := imports(IMPORTS, folder)).returncode:
            # The last that speaks: what a library has caught stands above.
            said = [name for name in re.findall(r"ImportError: (\w+) is shadowed", done.stderr) if name not in suspects]
            if not said:
                print(done.stderr[-2000:])
                return 1
            suspects.append(said[-1])
            Path(folder, f"{said[-1]}.py").unlink()
        fatal = []
        for name in sorted(suspects):
            file = lay(alone, name)
            if imports(IMPORTS, alone).returncode:
                fatal.append(name)
            file.unlink()
        print(*fatal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
