"""The table of causes, family by family."""

from __future__ import annotations

import msgspec

from xflux_doctor.explain import (
    rules_cluster,
    rules_config,
    rules_gpu,
    rules_hang,
    rules_job,
    rules_memory,
    rules_setup,
    rules_start,
)
from xflux_doctor.explain.rule import Rule


def _with_sentences(rule: Rule) -> Rule:
    """The rule with the bundled trainer's own sentences for its cause."""
    more = rules_start.SIGNS.get(rule.id, ())
    return msgspec.structs.replace(rule, signs=(*rule.signs, *more)) if more else rule


RULES: tuple[Rule, ...] = tuple(
    map(
        _with_sentences,
        (
            *rules_memory.RULES,
            *rules_gpu.RULES,
            *rules_cluster.RULES,
            *rules_setup.RULES,
            *rules_config.RULES,
            *rules_job.RULES,
            *rules_hang.RULES,
            *rules_start.RULES,
        ),
    )
)
