"""All facts of this machine at once: what is asked for, and what is said of the rest."""

from __future__ import annotations

from xflux_doctor.gather.machine import gather


def test_what_only_a_start_depends_on_is_left_out_where_nothing_starts() -> None:
    whole, plan = gather(cards=False), gather(to_run=False, cards=False)
    assert whole.toolchain is not None and plan.toolchain is None and plan.xids is None
    assert plan.unknown["toolchain"] == "compilers were not asked for" and "toolchain" not in whole.unknown
    assert plan.unknown["xids"] == "the kernel log was not asked for"
    assert plan.unknown["gpus"] == whole.unknown["gpus"] == "the GPUs were not asked for"
    assert plan.python == whole.python and plan.packages is not None and whole.packages is not None
    assert {name: one.version for name, one in plan.packages.items()} == {
        name: one.version for name, one in whole.packages.items()
    }
