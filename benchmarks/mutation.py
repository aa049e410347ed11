"""Do our own gates catch faults? Plants those of benchmarks/faults.py, one at a time: python benchmarks/mutation.py

Each is planted in a copy of a tiny bundle of each family of `examples/`, and held to what `mscompile validate
--reference` holds a bundle to by default. Writes benchmarks/results/mutation.json, from which the table in
docs/reliability.md is made. Exits with 1 if a fault survives that is not known to change nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from faults import FAULTS, Fault, planted

from mscompile import compile_checkpoint, gate
from mscompile.contracts import Plan, Profile, Session, Sources
from mscompile.errors import MsCompileError
from mscompile.pipeline import Options
from mscompile.runtime import Bundle, open_bundle

HERE = Path(__file__).parent
RESULT = HERE / "results" / "mutation.json"
STEPS = 64  # tokens a row in the long rollouts
FAMILIES = ("transformer-xl", "hourglass")


@dataclass(frozen=True)
class Verdict:
    """What became of one fault in one bundle."""

    family: str
    kind: str
    fault: str
    caught: bool
    by: str  # the sentence that the gate said
    equivalent: str  # why it may survive


class _Altered:
    """A plan whose sessions have a fault."""

    def __init__(self, plan: Plan, alter: Any) -> None:
        self.spec, self._plan, self._alter = plan.spec, plan, alter

    def session(self, batch: int = 1, sources: Sources | None = None) -> Session:
        altered: Session = self._alter(self._plan.session(batch, sources))
        return altered


class _AlteredBundle(Bundle):
    alter: Any = staticmethod(lambda session: session)

    def plan(self, engine: str | None = None) -> Plan:
        return _Altered(super().plan(engine), self.alter)


def verdict(family: str, fault: Fault, bundle: Path, checkpoint: Path, directory: Path) -> Verdict:
    """Plant one fault below `directory` and run the default gate on it."""
    try:
        copy = planted(bundle, directory / "planted.msc", fault)
        opened = open_bundle(copy.path)
        altered = _AlteredBundle(opened.path, opened.manifest)
        altered.alter = copy.session
        found = gate.validate(altered, ["ort"], gate.Original(checkpoint, steps=STEPS))
        said = "" if found.passed else found.failures[0]
    except MsCompileError as error:
        said = f"refused: {error}".replace(str(directory), "").replace("/planted.msc", "the bundle", 1)
    return Verdict(family, fault.kind, fault.name, bool(said), said, fault.equivalent)


def run(family: str, bundle: Path, checkpoint: Path, faults: Sequence[Fault] = FAULTS) -> list[Verdict]:
    """A verdict for each of the faults that can be planted in this family."""
    found = []
    for fault in faults:
        if family in fault.families:
            with tempfile.TemporaryDirectory() as directory:
                found.append(verdict(family, fault, bundle, checkpoint, Path(directory)))
                state = "caught" if found[-1].caught else "equivalent" if fault.equivalent else "SURVIVED"
                print(f"{family:15} {fault.kind:9} {fault.name:50} {state:10} {found[-1].by[:110]}", flush=True)
    return found


def survivors(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that no gate caught and nothing excuses."""
    return [each for each in verdicts if not each.caught and not each.equivalent]


def main(
    only: Annotated[str, typer.Option(help="Faults whose name contains this; the others keep their results.")] = "",
) -> None:
    """Plant every fault in a bundle of each family."""
    sys.path.append(str(HERE.parent / "tests"))
    import bundles

    faults = [fault for fault in FAULTS if only in fault.name]
    found: list[Verdict] = []
    with tempfile.TemporaryDirectory() as directory:
        for family in FAMILIES:
            checkpoint, bundle = Path(directory, f"{family}.pt"), Path(directory, f"{family}.msc")
            bundles.save(family, checkpoint)
            compile_checkpoint(checkpoint, ["ort"], bundle, Options(profile=Profile(1, 3, 16), steps=STEPS))
            found += run(family, bundle, checkpoint, faults)
    kept = {(each["family"], each["fault"]): each for each in stored()} if only else {}
    kept |= {(each.family, each.fault): asdict(each) for each in found}
    order = [(family, fault.name) for family in FAMILIES for fault in FAULTS]
    verdicts = [kept[key] for key in order if key in kept]
    caught = sum(each["caught"] for each in verdicts)
    same = sum(bool(each["equivalent"]) and not each["caught"] for each in verdicts)
    result = {"planted": len(verdicts), "caught": caught, "equivalent": same, "verdicts": verdicts}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{caught} of {len(verdicts) - same} faults caught; {same} change nothing")
    raise SystemExit(1 if survivors(found) else 0)


def stored() -> list[dict[str, Any]]:
    """The verdicts of the last run."""
    verdicts: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["verdicts"]
    return verdicts


if __name__ == "__main__":
    typer.run(main)
