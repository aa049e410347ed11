"""Limits of a project's own, from a checked-in TOML file. They may only be stricter than the defaults, or say why not.

    checkpoint_sha256 = "9f86..."   # optional: the checkpoint that a bundle must have been made from

    [fp32]                          # names of `parity.Tolerance`, for bundles of one precision
    logit_max_abs = 1e-4
    min_argmax_agreement = 1.0

    [int4]
    max_perplexity_loss = 0.03      # looser than the default, which takes a reason
    override = "accepted for the 2.1 release: the model is used for ranking only"

    [[state]]                       # states whose names match a pattern of shell style; later tables win
    name = "layer00.*"
    precision = "fp32"              # optional: all precisions
    max_abs = 1e-5
    relative = 1e-5

A limit is stricter where it allows less: lower, or higher where its name begins with `min_`. A table with a looser one
needs `override = "the reason"`, which every report repeats. Unknown names, patterns that match no state and values that
are no limits are refused by name. `logit_outlier_above` cannot be set, since errors are counted by it as they are met.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mscompile.errors import UsageError
from validation.parity import TOLERANCES, ParityReport, Tolerance, faults, perplexity_faults, tolerance_of

PIN, STATE, OVERRIDE, PATTERN, PRECISION = "checkpoint_sha256", "state", "override", "name", "precision"
COUNTED = "logit_outlier_above"
LIMITS = tuple(field.name for field in fields(Tolerance) if field.name != COUNTED)
STATE_LIMITS = {"max_abs": "state_max_abs", "relative": "state_relative"}  # in [[state]] -> of a Tolerance
SHARES = ("logit_outlier_share", "min_argmax_agreement")


@dataclass(frozen=True)
class Table:
    """One table of the file: limits under names of `Tolerance`, and why they may be looser."""

    place: str  # "[fp32]" or "[[state]] 'layer00.*'"
    limits: Mapping[str, float]
    override: str | None = None
    pattern: str = ""
    precision: str | None = None


@dataclass(frozen=True)
class Limits:
    """What holds for one bundle: a tolerance, and for some of its states another one."""

    tolerance: Tolerance
    states: Mapping[str, Tolerance]
    overrides: tuple[str, ...] = ()  # a sentence for each limit that is looser than the default

    def of(self, tensor: str) -> Tolerance:
        return self.states.get(tensor, self.tolerance)

    def gate(self, report: ParityReport) -> ParityReport:
        """`report` judged by these limits: what it failed by its own is dropped, what has no limit stays."""
        by_its_own = {fault for tensor in report.tensors for fault in faults(tensor, report.tolerance)}
        by_its_own.update(perplexity_faults(report.perplexity, report.tolerance))
        found = [fault for tensor in report.tensors for fault in faults(tensor, self.of(tensor.tensor))]
        found += perplexity_faults(report.perplexity, self.tolerance)
        found += [fault for fault in report.failures if fault not in by_its_own]
        return replace(report, tolerance=self.tolerance, failures=tuple(found))


def defaults(precision: str) -> Limits:
    """The limits where no file gives any."""
    return Limits(tolerance_of(precision), {})


@dataclass(frozen=True)
class Thresholds:
    """A file of limits."""

    path: Path
    checkpoint_sha256: str | None
    tables: tuple[Table, ...]  # of precisions
    states: tuple[Table, ...]

    def limits(self, precision: str, states: Sequence[str]) -> Limits:
        """Those for a bundle of that precision with those states.

        Raises UsageError for a limit looser than the default without a reason, and for a pattern without a match.
        """
        default, overrides = tolerance_of(precision), []
        tolerance = default
        for table in self.tables:
            if table.precision == precision:
                overrides += self._looser(table, default)
                tolerance = replace(tolerance, **table.limits)
        own: dict[str, Tolerance] = {}
        for table in self.states:
            if table.precision not in (None, precision):
                continue
            matched = [name for name in states if fnmatchcase(name, table.pattern)]
            if not matched:
                raise UsageError(
                    f"{self.path}: {table.place} matches no state of the bundle; it has {', '.join(states) or 'none'}"
                )
            overrides += self._looser(table, default)
            own |= {name: replace(own.get(name, tolerance), **table.limits) for name in matched}
        return Limits(tolerance, own, tuple(overrides))

    def _looser(self, table: Table, default: Tolerance) -> list[str]:
        """A sentence for each limit of `table` that allows more than the default; UsageError without a reason."""
        sentences = []
        for name, limit in table.limits.items():
            usual: float = getattr(default, name)
            if limit < usual if name.startswith("min_") else limit > usual:
                words = f"{table.place} {name} = {limit:g} is looser than the default {usual:g}"
                if table.override is None:
                    raise UsageError(f'{self.path}: {words}; tighten it, or add {OVERRIDE} = "the reason" to the table')
                sentences.append(f"{words}: {table.override}")
        return sentences


def load(path: Path) -> Thresholds:
    """Read a file of limits; UsageError naming the key that is not right."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the thresholds {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        _known(found, (PIN, STATE, *TOLERANCES), "the file")
        precisions = tuple(_precision(name, found[name]) for name in TOLERANCES if name in found)
        states = found.get(STATE, [])
        if not isinstance(states, list):
            raise ValueError(f"[{STATE}] must be a list of tables, each begun by [[{STATE}]]")
        return Thresholds(path, _pin(found.get(PIN)), precisions, tuple(_state(table) for table in states))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _pin(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
        raise ValueError(f"{PIN} must be 64 hexadecimal digits in lower case, not {value!r}")
    return value


def _precision(name: str, table: Any) -> Table:
    place = f"[{name}]"
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table, {place}")
    if COUNTED in table:
        raise ValueError(f"{place} {COUNTED} cannot be set, since errors are counted by it as they are met")
    _known(table, (*LIMITS, OVERRIDE), place)
    limits = {key: _limit(key, table[key], place) for key in table if key != OVERRIDE}
    return Table(place, limits, _reason(table, place), precision=name)


def _state(table: Any) -> Table:
    place = f"[[{STATE}]]"
    if not isinstance(table, dict) or not isinstance(table.get(PATTERN), str):
        raise ValueError(f'{place} needs {PATTERN} = "a pattern", for example "layer00.*"')
    place = f"{place} {table[PATTERN]!r}"
    _known(table, (*STATE_LIMITS, PATTERN, PRECISION, OVERRIDE), place)
    precision = table.get(PRECISION)
    if precision is not None and precision not in TOLERANCES:
        raise ValueError(f"{place} has precision {precision!r}; known: {', '.join(TOLERANCES)}")
    limits = {STATE_LIMITS[key]: _limit(key, table[key], place) for key in table if key in STATE_LIMITS}
    if not limits:
        raise ValueError(f"{place} limits nothing; give {' or '.join(STATE_LIMITS)}")
    return Table(place, limits, _reason(table, place), table[PATTERN], precision)


def _known(table: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    for key in table:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{place} has an unknown key {key!r}; {hint}")


def _limit(key: str, value: Any, place: str) -> float:
    if type(value) not in (int, float) or math.isnan(value) or value < 0:
        raise ValueError(f"{place} {key} must be a number of 0 or more, not {value!r}")
    if key in SHARES and value > 1:
        raise ValueError(f"{place} {key} is a share, from 0 to 1, not {value!r}")
    return float(value)


def _reason(table: Mapping[str, Any], place: str) -> str | None:
    reason = table.get(OVERRIDE)
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise ValueError(f"{place} {OVERRIDE} must be a sentence that gives the reason, not {reason!r}")
    return reason
