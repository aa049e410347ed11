"""A validation as JUnit XML, the form that CI servers read: a suite an engine, a case a rollout and tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from validation.evidence import Baseline, Validation, faults_of, other_faults
from validation.parity import ParityReport

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(found: Validation) -> str:
    """The XML text, with its declaration."""
    root = Element("testsuites", name="mscompile")
    for report in found.reports:
        _engine(root, found, report)
    if found.faults:
        suite = _suite(root, found.bundle, {})
        for number, fault in enumerate(found.faults, 1):
            _case(suite, found.bundle, f"bundle, fault {number}", [fault])
    for engine, reason in found.skipped.items():
        suite = _suite(root, f"{found.bundle} {engine}", {})
        SubElement(_case(suite, f"{found.bundle}.{engine}", "runs here"), "skipped", message=_text(reason))
    if found.baseline:
        _baseline(root, found.bundle, found.baseline)
    for element in (*root, root):
        for count, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            element.set(count, str(len(list(element.iter(tag)))))
        element.set("errors", "0")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _engine(root: Element, found: Validation, report: ParityReport) -> None:
    facts = {"precision": report.precision, "against": found.against, "checkpoint_sha256": found.checkpoint_sha256}
    suite = _suite(root, f"{found.bundle} {report.engine}", facts)
    place = f"{found.bundle}.{report.engine}"
    for tensor in report.tensors:
        case = _case(suite, f"{place}.{tensor.rollout}", tensor.tensor, faults_of(report, tensor))
        what, value, limit = found.limit(tensor)
        SubElement(case, "system-out").text = _text(
            f"{what} {value:.3g}, limit {limit:.3g}, {tensor.tokens} tokens; largest error: {tensor.worst or 'none'}"
        )
    for check, fault in other_faults(report):
        _case(suite, place, _text(check), [fault])


def _baseline(root: Element, bundle: str, baseline: Baseline) -> None:
    suite = _suite(root, f"{bundle} against {baseline.bundle}", {"same_checkpoint": str(baseline.same_checkpoint)})
    place = f"{bundle}.baseline"
    for change in baseline.logits:
        _case(suite, f"{place}.{change.engine}", f"logits, {change.rollout}", _some(change.fault()))
    for slowdown in baseline.latencies:
        _case(suite, f"{place}.{slowdown.engine}", slowdown.workload, _some(slowdown.fault()))
    for what, reason in baseline.skipped.items():
        SubElement(_case(suite, place, _text(what)), "skipped", message=_text(reason))


def _some(fault: str | None) -> list[str]:
    return [] if fault is None else [fault]


def _suite(root: Element, name: str, facts: dict[str, str]) -> Element:
    suite = SubElement(root, "testsuite", name=_text(name))
    if facts:
        properties = SubElement(suite, "properties")
        for key, value in facts.items():
            SubElement(properties, "property", name=key, value=_text(value))
    return suite


def _case(suite: Element, classname: str, name: str, failures: Iterable[str] = ()) -> Element:
    case = SubElement(suite, "testcase", classname=_text(classname), name=_text(name))
    failures = list(failures)
    if failures:
        failure = SubElement(case, "failure", type="parity", message=_text(failures[0]))
        failure.text = _text("\n".join(failures))
    return case


def _text(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return NOT_XML.sub("�", text)
