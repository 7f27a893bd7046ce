"""Scores as they are made, chunk by chunk, so that a pass over rows that was stopped goes on.

Beside the output lies a hidden folder: `origin.json` says with which models and options the scores
were made, `scores.jsonl` holds a line a chunk. A line counts if its rows are the same rows.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.config import InputError
from shared.stages import read_json, write_json


def chunk_key(number: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """What a chunk's scores belong to: its place and what its rows say."""
    text = json.dumps([number, *rows], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ScoreLog:
    """The scores of all chunks, in order; `say` hears why what was there is not taken up.

    InputError while another process writes here.
    """

    def __init__(self, out: Path, origin: dict[str, Any], say: Callable[[str], object] = print):
        self.folder = out.with_name(f".{out.name}.part")
        self.say = say
        self.folder.mkdir(exist_ok=True)
        self.file = (self.folder / "scores.jsonl").open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise InputError(f"{out}: another process is at work on it") from error
        self._check_origin(json.loads(json.dumps(origin)))
        self.file.seek(0, os.SEEK_END)
        self.replaying = self.file.tell() > 0
        self.file.seek(0)

    def _check_origin(self, origin: dict[str, Any]) -> None:
        path = self.folder / "origin.json"
        before = read_json(path) if path.is_file() else None
        if before is not None and before != origin:
            names = sorted({*before, *origin})
            other = [name for name in names if before.get(name) != origin.get(name)]
            self.say(f"what was begun here had another {', '.join(other)}: starting over")
        if before != origin:
            self.file.truncate(0)
        write_json(path, origin)

    def take(self, key: str) -> list[dict[str, Any]] | None:
        """The scores of the next chunk, if they are there; else what follows is forgotten."""
        if not self.replaying:
            return None
        start = self.file.tell()
        line = self.file.readline()
        if line.endswith(b"\n"):
            entry = json.loads(line)
            if entry["chunk"] == key:
                return entry["rows"]
            self.say("the rows are others than before from here on: these are scored again")
        self.file.truncate(start)
        self.replaying = False
        return None

    def add(self, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """Put a chunk's scores on disk."""
        line = json.dumps({"chunk": key, "rows": rows}, ensure_ascii=False, allow_nan=False)
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def end(self) -> None:
        """All rows have been seen: what a longer file left behind them is forgotten."""
        if self.replaying and self.file.tell() < os.fstat(self.file.fileno()).st_size:
            self.file.truncate(self.file.tell())
        self.replaying = False

    def all(self) -> Iterator[list[dict[str, Any]]]:
        """The chunks' scores, from the first on."""
        self.file.seek(0)
        for line in self.file:
            yield json.loads(line)["rows"]

    def finish(self) -> None:
        """What was scored has been used: the folder goes."""
        self.file.close()
        shutil.rmtree(self.folder)

    def __enter__(self) -> "ScoreLog":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Let another process go on; a folder without a score goes."""
        if self.file.closed:
            return
        if self.file.seek(0, os.SEEK_END) == 0:
            self.finish()
        self.file.close()
