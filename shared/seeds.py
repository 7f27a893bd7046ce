"""Seeds: one function of (run, purpose, number), so that no two uses of chance share a stream."""

import hashlib


def seed_of(run: int, purpose: str, number: int = 0) -> int:
    """A seed below 2^31 for one use of random numbers in the run with the seed `run`.

    Equal arguments give equal seeds; others give seeds that have nothing to do with each other,
    whatever their numbers are. `purpose` is a plain name, such as "rollout", and `number` counts
    the uses of it, such as updates.
    """
    text = f"{run} {purpose} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1
