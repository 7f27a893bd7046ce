"""The result of one check."""

from typing import NamedTuple


class Finding(NamedTuple):
    """`fix` is empty where the check passes; else it says what to change."""

    check: str
    observed: str  # the number measured, or what was found
    fix: str = ""


def make_finding(check: str, passed: bool, observed: str, fix: str) -> Finding:
    """A finding with `fix` only where it is needed."""
    return Finding(check, observed, "" if passed else fix)


def finding_text(finding: Finding) -> str:
    """One check as the user reads it."""
    state = "FAIL" if finding.fix else "pass"
    text = f"{state}  {finding.check}: {finding.observed}"
    return f"{text}\n      fix: {finding.fix}" if finding.fix else text
