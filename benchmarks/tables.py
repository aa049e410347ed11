"""The measured tables of README.md and docs/performance.md, written from the result files: python benchmarks/tables.py

Each block between `<!-- measured: NAME -->` and `<!-- end -->` is replaced; a test checks that the document holds what
this would write, so that a figure there is always a figure of a result file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from targets import DECODE, HOURGLASS, PREFILL, TXL, VANILLA

HERE = Path(__file__).parent
DOCUMENTS = (
    HERE.parent / "README.md",
    HERE.parent / "docs" / "performance.md",
    HERE.parent / "docs" / "reliability.md",
)
BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING = "Not measured yet.\n"

Results = Mapping[str, Mapping[str, Any]]


def results(directory: Path = HERE / "results") -> dict[str, Any]:
    """Every result file, by its name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}


def written(document: str, found: Results) -> str:
    """The document with every block made again."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]](found) + match[3], document)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(found: Results) -> str:
    if "targets" not in found:
        return MISSING
    facts = next(iter(found["targets"]["sections"].values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rates = found["targets"]["sections"].get("speed", {}).get("rates")
    text = f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, {facts['system']}; "
    text += f"Python {facts['python']}, {versions}.\n"
    if rates:
        text += f"Ceilings in this run: {rates['bytes_per_second'] / 1e9:.1f} GB/s read by all threads, "
        text += f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s of ONNX Runtime's MatMul.\n"
    return text


def targets(found: Results) -> str:
    if "targets" not in found:
        return MISSING
    words = {True: "yes", False: "**no**", None: "-"}
    before = {row["what"]: figure(row) for row in found.get("targets-before", {"rows": ()})["rows"]}
    rows = [
        (
            str(row["target"]),
            row["what"],
            figure(row),
            before.get(row["what"], "-"),
            f"{row['spread'][0]:.3g} to {row['spread'][1]:.3g}" if row["spread"] else "",
            "" if row["limit"] is None else f"{row['sense']} {row['limit']:g}{row['unit']}",
            words[row["met"]],
            row["note"],
        )
        for row in found["targets"]["rows"]
    ]
    return table(("", "what", "measured", "run before", "80 % of rounds", "target", "met", "note"), rows)


def figure(row: Mapping[str, Any]) -> str:
    return "-" if row["measured"] is None else f"{row['measured']:.3g}{row['unit']}"


def timings(workload: str, *models: str) -> Callable[[Results], str]:
    """Everything measured on a workload of some models, batch 1."""

    def block(found: Results) -> str:
        speed = found.get("targets", {}).get("sections", {}).get("speed", {})
        rows = [
            (
                row["engine"],
                f"{row['ms_per_step']:.2f}",
                f"{row['p95_ms']:.2f}",
                f"{row['min_ms']:.2f}",
                f"{row['of_ceiling']['median']:.2f}x" if row["of_ceiling"] else "",
                str(row["samples"]),
            )
            for row in speed.get("timings", ())
            if row["workload"] == workload and row["batch"] == 1 and row["engine"].split()[0] in models
        ]
        return table(("engine", "ms a step", "p95", "least", "of its ceiling", "samples"), rows) if rows else MISSING

    return block


def soak(found: Results) -> str:
    if "soak" not in found:
        return MISSING
    result = found["soak"]
    megabytes = [f"{size / 1e6:.0f}" for size in result["block_resident_bytes"]]
    blocks = zip(range(1, len(megabytes) + 1), result["block_ms"], megabytes, strict=True)
    text = table(("block", "ms a step, median", "MB resident"), ((str(n), f"{ms:.3f}", mb) for n, ms, mb in blocks))
    return (
        text
        + f"\n{result['steps']:,} steps; the last logits differ from the original's by {result['final_error']:.1e}.\n"
    )


def serving(found: Results) -> str:
    """Many streams on one plan: what each way of serving gives, and the memory of a stream."""
    if "serving" not in found:
        return MISSING
    measured: Mapping[str, Mapping[str, Any]] = found["serving"]["models"]
    times = ("token_ms_p50", "token_ms_p99", "first_ms_p50", "first_ms_p99")
    ways = [
        (model, way, f"{row['tokens_per_second']:,.0f}", *(f"{row[name]:,.2f}" for name in times))
        for model, result in measured.items()
        for way, row in result["ways"].items()
    ]
    columns = ("model", "served by", "tokens/s", "ms a token, p50", "p99", "ms to the first, p50", "p99")
    told = [
        (model, *(f"{memory[name] / 1e6:.2f}" for name in ("predicted_bytes", "session_bytes", "row_bytes")))
        for model, memory in ((model, result["memory"]) for model, result in measured.items())
    ]
    text = table(columns, ways)
    for model, result in measured.items():
        asked, rows, streams = (result[name] for name in ("asked_tokens_per_second", "rows", "streams"))
        text += f"\n{model}: {streams} streams, {rows} at a time, {asked:,.0f} tokens/s asked for.\n"
    return text + "\n" + table(("model", "MB a stream, as `inspect` says", "of a session", "of a row"), told)


def hosts(found: Results) -> str:
    """A step of each host beside the bare runtime call, and what the host adds to that call."""
    if "cpp-overhead" not in found:
        return MISSING
    result = found["cpp-overhead"]
    titles = {"bare": "bare ONNX Runtime call", "cpp": "C++ session", "python": "Python session"}
    rows = []
    for side, title in titles.items():
        added = result["added"].get(side)
        more = (f"{added['ms']:.3f}", f"{added['percent']:.1f} %") if added else ("", "")
        rows.append((title, f"{result['step_ms'][side]:.2f}", *more))
    ratio = result["cpp_to_bare"]
    text = table(("host", "ms a step", "ms outside the runtime", "of the call"), rows)
    spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
    return (
        f"{text}\nC++ to bare, by round: {spread}, of {result['rounds']} rounds of {result['steps_a_round']} steps.\n"
    )


def families(found: Results) -> str:
    """A row for each family: where it is from, on what it was verified, how exact and how fast its engine is."""
    from mscompile.models.families import FAMILIES

    measured = found.get("families", {}).get("families", {})
    rows = [
        (
            family.title,
            family.source,
            f"{row['weights']}, {row['parameters'] / 1e6:.1f} M",
            f"{row['max_logit_error']:.1e}",
            f"{row['speedup']['median']:.1f}x",
        )
        for family in FAMILIES
        if (row := measured.get(family.name))
    ]
    columns = ("family", "source", "weights", "largest error of a logit", "decode to the original's")
    return table(columns, rows) if rows else MISSING


def mutation(found: Results) -> str:
    """Faults planted and caught, by kind and family, and those that change nothing."""
    if "mutation" not in found:
        return MISSING
    verdicts: Sequence[Mapping[str, Any]] = found["mutation"]["verdicts"]
    families = list(dict.fromkeys(each["family"] for each in verdicts))

    def cell(rows: Sequence[Mapping[str, Any]]) -> str:
        same = [each for each in rows if each["equivalent"] and not each["caught"]]
        return f"{sum(each['caught'] for each in rows)} of {len(rows) - len(same)}" if rows else "-"

    rows = []
    for kind in dict.fromkeys(each["kind"] for each in verdicts):
        of_kind = [each for each in verdicts if each["kind"] == kind]
        rows.append([kind, *(cell([each for each in of_kind if each["family"] == family]) for family in families)])
    rows.append(["all", *(cell([each for each in verdicts if each["family"] == family]) for family in families)])
    same = sorted({each["fault"] for each in verdicts if each["equivalent"] and not each["caught"]})
    text = table(["kind", *(f"{family}: caught" for family in families)], rows)
    return text + f"\nNot counted, because they change nothing: {', '.join(same) or 'none'}.\n"


def readers(found: Results) -> str:
    """What became of spoiled inputs, reader by reader, and of the attacks."""
    rows = found.get("reliability", {}).get("readers", {}).get("rows", ())
    if not rows:
        return MISSING
    hostile = found["reliability"].get("attacks")
    columns = ("reader", "inputs", "opened", "refused", "anything else", "slowest", "most memory")
    cells = [
        (
            row["reader"],
            *(f"{row[name]:,}" for name in ("inputs", "opened", "refused", "findings")),
            f"{row['slowest_seconds']:.2f} s",
            f"{row['largest_bytes'] / 2**20:.0f} MiB",
        )
        for row in (
            *rows,
            *([{**hostile, "reader": "hostile by design", "findings": len(hostile["findings"])}] if hostile else []),
        )
    ]
    return table(columns, cells)


def attacks(found: Results) -> str:
    """The attacks, by what became of them."""
    rows = found.get("reliability", {}).get("attacks", {}).get("rows", ())
    by_outcome = {outcome: [row["attack"] for row in rows if row["outcome"] == outcome] for outcome in OUTCOMES}
    return "".join(f"{outcome.capitalize()}: {'; '.join(names)}.\n\n" for outcome, names in by_outcome.items() if names)


def writers(found: Results) -> str:
    """What was there after a writing command was ended, or could not write."""
    rows = found.get("reliability", {}).get("writers", {}).get("rows", ())
    if not rows:
        return MISSING
    columns = (
        "command",
        "what happens",
        "trials",
        "ended",
        "left nothing",
        "left the old",
        "new, whole",
        "anything else",
    )
    names = ("trials", "ended", "nothing", "old", "new", "findings")
    return table(columns, [(row["command"], row["what"], *(str(row[name]) for name in names)) for row in rows])


def sessions(found: Results) -> str:
    """Threads, memory, and the bytes of two exports."""
    told = found.get("reliability", {})
    if not {"sessions", "bytes"} <= told.keys():
        return MISSING
    threads, memory, exports = told["sessions"]["threads"], told["sessions"]["memory"], told["bytes"]
    rows = (
        (
            f"{threads['threads']} threads on one plan, {threads['tokens']:,} tokens, resets and snapshots",
            f"{threads['equal']} of {threads['threads']} streams equal those of a single thread, bit for bit",
        ),
        (
            f"{memory['steps']:,} steps on one session",
            f"{max(0, memory['growth_bytes']) / 1024:.0f} KiB more memory in their second half than in their first",
        ),
        (
            "two exports: other processes, hash seeds, directories, time zones, locales",
            f"{len(exports['differing'])} of {exports['files']} files differ",
        ),
    )
    return table(("what", "found"), rows)


OUTCOMES = ("refused", "opened")
BLOCKS: dict[str, Callable[[Results], str]] = {
    "families": families,
    "hosts": hosts,
    "machine": machine,
    "attacks": attacks,
    "mutation": mutation,
    "readers": readers,
    "serving": serving,
    "sessions": sessions,
    "writers": writers,
    "targets": targets,
    "decode": timings(DECODE, TXL),
    "prefill": timings(PREFILL, TXL),
    "multi-rate": timings(DECODE, HOURGLASS, VANILLA),
    "soak": soak,
}


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8"), results()), encoding="utf-8")
