"""Which variables become facts, and which never do."""

from __future__ import annotations

from pathlib import Path

from xflux_doctor.gather.environment import environment_facts, loaded_instead


def test_what_changes_a_job_is_kept_and_the_rest_is_not() -> None:
    kept = {"NCCL_DEBUG": "INFO", "PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4", "RANK": "0"}
    assert environment_facts({**kept, "PATH": "/bin", "EDITOR": "vi", "http_proxy": "http://proxy"}) == kept


def test_no_secret_and_no_login() -> None:
    secrets = {"HF_TOKEN": "hf_x", "NCCL_AUTH": "x", "TORCH_SECRET_KEY": "x", "ACCELERATE_PASSWORD": "x"}
    found = environment_facts({**secrets, "HF_HOME": "https://me:word@example.org/cache"})
    assert found == {"HF_HOME": "https://***@example.org/cache"}


def test_a_value_that_is_no_text_is_written_out() -> None:
    assert environment_facts({"NCCL_DEBUG": "IN\udcffFO"}) == {"NCCL_DEBUG": "IN\\udcffFO"}


def test_of_the_library_path_only_what_comes_before_torch(tmp_path: Path) -> None:
    compat, plain, later = tmp_path / "compat", tmp_path / "lib", tmp_path / "later"
    for folder in (compat, plain, later):
        folder.mkdir()
    (compat / "libcuda.so.530.30.02").touch()
    (compat / "libcuda.so.1").symlink_to("libcuda.so.530.30.02")
    (plain / "libnccl.so.2").touch()
    (later / "libcuda.so.1").touch()
    found = environment_facts({"LD_LIBRARY_PATH": f"{plain}::{compat}:/not/there:{later}"})
    assert found == {"LD_LIBRARY_PATH": str(compat / "libcuda.so.530.30.02")}
    assert loaded_instead({"LD_LIBRARY_PATH": str(plain)}) == {}


def test_of_the_preloaded_only_cuda_libraries() -> None:
    found = loaded_instead({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2 /opt/nccl/libnccl.so.2.19.3:/x/libtcmalloc.so"})
    assert found == {"LD_PRELOAD": "/opt/nccl/libnccl.so.2.19.3"}
    assert loaded_instead({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}) == {}
