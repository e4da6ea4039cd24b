"""The table of causes, family by family."""

from __future__ import annotations

from xflux_doctor.explain import rules_cluster, rules_gpu, rules_hang, rules_job, rules_memory, rules_setup
from xflux_doctor.explain.rule import Rule

RULES: tuple[Rule, ...] = (
    *rules_memory.RULES,
    *rules_gpu.RULES,
    *rules_cluster.RULES,
    *rules_setup.RULES,
    *rules_job.RULES,
    *rules_hang.RULES,
)
