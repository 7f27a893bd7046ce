"""A loop that belongs to another library, measured turn by turn.

Its trainer reads batches in a loop that returns when all is done. Here it reads them from `Paced`,
in a thread that waits at each batch until it is told to go on.
"""

from collections.abc import Callable, Iterable, Iterator
from threading import Semaphore, Thread
from time import perf_counter
from typing import Any


class Paced:
    """The batches that a loop reads; the loop runs in a thread and gets each when it is told to."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches
        self.go, self.asks, self.ended = Semaphore(0), Semaphore(0), False

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.asks.release()
            self.go.acquire()
            yield batch

    def start(self, loop: Callable[[], Any]) -> None:
        """Run `loop`, which reads these batches, until it asks for the first."""
        self.thread = Thread(target=self._run, args=(loop,), daemon=True)
        self.thread.start()
        self._wait()

    def turn(self) -> float:
        """Let the loop have a batch; the seconds until it asks for the next."""
        start = perf_counter()
        self.go.release()
        self._wait()
        return perf_counter() - start

    def _run(self, loop: Callable[[], Any]) -> None:
        try:
            loop()
        finally:  # its error, if any, is printed as the thread ends
            self.ended = True
            self.asks.release()

    def _wait(self) -> None:
        self.asks.acquire()
        if self.ended:
            self.thread.join()
            raise RuntimeError("the loop is over: it failed, or has read all batches")
