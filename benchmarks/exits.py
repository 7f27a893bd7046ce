"""How every command ends: 0 done, 1 a check failed or a guard stopped it, 2 the input is wrong."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shared.config import InputError
from shared.fit import Diverged
from shared.generation.engine import EngineLost, StaleEngine


@contextmanager
def exit_codes(command: str) -> Iterator[None]:
    """What the user can mend or a guard stopped is one line on standard error, not a traceback."""
    try:
        yield
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except (Diverged, EngineLost, StaleEngine) as error:
        print(f"{command}: stopped: {error}", file=sys.stderr)
        sys.exit(1)
