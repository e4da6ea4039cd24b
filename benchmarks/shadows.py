"""Which files in a job's folder kill the imports of a stack, though no package of that name is installed.

    CUDA_VISIBLE_DEVICES= VENV/bin/python benchmarks/shadows.py

Notes every top-level name that the stack's packages look for, lays a file of that name that cannot be imported over
each that is not there, and takes away one after the other those that end the imports. Some minutes; prints the names
(xflux_doctor/gather/shadows.py has those of both CPU stacks).
"""

from __future__ import annotations

import importlib.util
import os
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


def imports(program: str, folder: str, hits: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": folder, "HITS": str(hits)}
    argv = [sys.executable, "-c", program]
    return subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def main() -> int:
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as folder:
        hits = Path(empty) / "hits"
        sound = imports(SEEK, empty, hits)
        if sound.returncode:
            print(sound.stderr[-2000:])
            return 1
        sought = set(sound.stdout.splitlines()[-1].split()) - NO_PACKAGES
        for name in sorted(name for name in sought if importlib.util.find_spec(name) is None):
            content = (
                f"import os\nopen(os.environ['HITS'], 'a').write('{name} ')\nraise ImportError('{name} is shadowed')\n"
            )
            Path(folder, f"{name}.py").write_text(content)
        fatal = []
        while imports(IMPORTS, folder, hits).returncode:
            fatal.append(hits.read_text().split()[-1])
            Path(folder, f"{fatal[-1]}.py").unlink()
        print(*sorted(fatal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
