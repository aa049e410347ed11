"""The rules, in the order they are tried: whole models, then their parts; a special case before the general one."""

from __future__ import annotations

from exporters import attention, language_model, memory, pooling, scales, upsampling
from exporters.stream import Rule

RULES: tuple[Rule, ...] = (
    *language_model.RULES,
    *scales.RULES,
    memory.ROLLING,
    memory.SEGMENT,
    attention.RULE,
    pooling.RULE,
    upsampling.RULE,
)
