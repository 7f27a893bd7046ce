"""What a check says."""

from typing import NamedTuple


class Finding(NamedTuple):
    """`fix` is empty where the check passes; else it says what to change."""

    check: str
    seen: str  # the number, or what was found
    fix: str = ""


def verdict(check: str, passes: bool, seen: str, fix: str) -> Finding:
    """A finding with `fix` only where it is needed."""
    return Finding(check, seen, "" if passes else fix)
