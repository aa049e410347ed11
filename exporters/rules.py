"""The rules, in the order they are tried: whole models, then their parts; a special case before the general one."""

from __future__ import annotations

from exporters import attention, kv_cache, memory, pooling, scales, upsampling
from exporters.families import hourglass, transformer_xl
from exporters.stream import Rule

RULES: tuple[Rule, ...] = (
    *transformer_xl.RULES,
    *hourglass.RULES,
    *scales.RULES,
    memory.ROLLING,
    memory.SEGMENT,
    attention.RULE,
    pooling.RULE,
    upsampling.RULE,
    *kv_cache.RULES,
)
