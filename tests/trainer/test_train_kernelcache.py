"""Where compiled kernels are kept between runs."""

from __future__ import annotations

from pathlib import Path

from xflux_trainer import kernelcache

NAMES = ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "TORCHINDUCTOR_CACHE_DIR")


def test_folders_of_the_users_cache(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    kernelcache.persist(environ)
    base = tmp_path / ".cache" / "xflux-doctor" / "kernels"
    values = (str(base / "flash-attn"), "1", str(base / "inductor"))
    assert environ == {"HOME": str(tmp_path), **dict(zip(NAMES, values, strict=True))}
    assert (base / "flash-attn").is_dir()
    again = dict(environ)
    kernelcache.persist(again)
    assert again == environ
    other = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "x")}
    kernelcache.persist(other)
    assert other[NAMES[2]] == str(tmp_path / "x" / "xflux-doctor" / "kernels" / "inductor")


def test_the_users_own_settings_stay(tmp_path: Path) -> None:
    own = {
        "HOME": str(tmp_path), NAMES[0]: "/own", NAMES[2]: "/other", "TRITON_CACHE_DIR": "/triton",
    }  # fmt: skip
    environ = dict(own)
    kernelcache.persist(environ)
    assert environ == {**own, NAMES[1]: "1"}
    off = {"HOME": str(tmp_path), NAMES[1]: "0"}
    kernelcache.persist(off)
    assert off[NAMES[1]] == "0" and NAMES[0] not in off


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """flash-attn-4 would fall over a folder that it cannot make: it keeps nothing then. Triton's goes elsewhere."""
    environ = {"HOME": "/proc/self"}  # not even root can make folders there
    kernelcache.persist(environ)
    assert environ == {"HOME": "/proc/self"}
    environ = {"HOME": "/proc/self", "XDG_CACHE_HOME": str(tmp_path)}
    kernelcache.persist(environ)
    assert environ["TRITON_CACHE_DIR"] == str(tmp_path / "xflux-doctor" / "kernels" / "triton")
