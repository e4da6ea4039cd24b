"""`xflux-doctor run` with a DeepSpeed file that must be mended: the ranks get the mended copy, the user's stays."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

NEEDED = ("torch", "accelerate", "diffusers", "deepspeed")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not all(importlib.util.find_spec(n) for n in NEEDED), reason="needs a stack of the matrix"),
]
ACCELERATE = """\
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: ds.json
num_machines: 1
num_processes: 2
machine_rank: 0
"""
ZERO = """\
{
    "zero_optimization": {
        "stage": 3,
        "reduce_bucketsize": 300000
    },
    "fp16": {"enabled": true},
    "gradient_clipping": 0.5
}
"""


def test_the_ranks_get_the_mended_copy(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    subprocess.run([sys.executable, str(ROOT / "examples/demo/make_tiny_flux.py"), str(model)], check=True, timeout=300)
    train = {
        "model_name": "flux-dev", "pretrained_model": str(model), "output_dir": str(tmp_path / "out"),
        "data_config": {"img_dir": str(ROOT / "examples/demo/photos"), "img_size": 128, "train_batch_size": 1},
        "max_train_steps": 1, "rank": 4, "max_text_tokens": 32, "heldout_samples": 2, "mixed_precision": "bf16",
        "disable_sampling": True,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE)
    (tmp_path / "ds.json").write_text(ZERO)
    done = subprocess.run(
        [sys.executable, "-m", "xflux_doctor.cli", "run", "--cpu", "--yes", "--config", "train.yaml",
         "--accelerate-config", "accelerate.yaml"],
        cwd=tmp_path, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
        timeout=400, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "ds.json").read_text() == ZERO
    mended = json.loads((tmp_path / "out/deepspeed.json").read_text())
    assert mended["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 300000}
    assert mended["bf16"]["enabled"] is True and mended["fp16"]["enabled"] is False
    section = yaml.safe_load((tmp_path / "out/accelerate.yaml").read_text())["deepspeed_config"]
    assert section == {"deepspeed_config_file": str(tmp_path / "out/deepspeed.json")}
    (log,) = (tmp_path / "out/logs").glob("run-*.log")
    assert "is ignored" not in log.read_text()  # the files agree now: the trainer has nothing to note
