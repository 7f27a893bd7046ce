"""Seeds of the random streams of a run: none shares its numbers with another."""

import hashlib


def seed_of(run: int, purpose: str, number: int = 0) -> int:
    """The seed, in [0, 2**31), of one stream: `purpose` says what it draws, `number` which round.

    Sums and products of small integers meet (run 1 round 0 is run 0 round 1000); a hash does not.
    """
    digest = hashlib.sha256(f"{run} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
