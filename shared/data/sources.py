"""Files, folders and datasets of the hub -> raw rows, one after the other, each with its place.

A file is read as it is asked for: lines of JSON, columns in batches, an array from its text. What
cannot be decoded comes as a `Raw` with its `fault`; what leaves the rest of a file unreadable is an
`InputError`.
"""

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shared.config import InputError
from shared.data.rows import ANSWERS, RATINGS, DataConfig, Place
from shared.data.strict_json import BLANKS, DECODER, check_text, explained, parse

BATCH = 1000  # rows of a column file that are read at once
SPACE = b" \t\r\n"


class Raw(NamedTuple):
    """What stands at a place: an object, or why it could not be read."""

    where: Place
    value: dict[str, Any]
    fault: str = ""


def iterate_raw(sources: Sequence[str], beside: Path, data: DataConfig) -> Iterator[Raw]:
    """All raw rows of `sources`, in order; paths are relative to the folder `beside`.

    Raises InputError for a source that is not there or cannot be read on.
    """
    if not sources:
        raise InputError("no data: name a file, a folder or a dataset of the hub")
    for source in sources:
        path = beside / Path(source).expanduser()
        if os.path.isdir(path):  # False for what can be no path; Path.is_dir raises
            yield from _folder(path, data)
        elif os.path.exists(path):
            yield from _file(path, data)
        elif reader_of(path) is not None or not _HUB_NAME.fullmatch(source):
            raise InputError(f"{path}: no such file")
        else:
            yield from _hub(source, source, data)


def _file(path: Path, data: DataConfig) -> Iterator[Raw]:
    if (data.subset or data.split) is not None:
        key = "split" if data.split else "subset"
        raise InputError(
            f"{path}: a file has no `{key}`; only a dataset of the hub or a folder has"
        )
    read = reader_of(path)
    if read is None:
        raise InputError(f"{path}: unknown kind of file (known: {', '.join(READERS)}, .gz, .zst)")
    with readable(path):
        yield from read(path)


def _folder(path: Path, data: DataConfig) -> Iterator[Raw]:
    """A folder that `save_to_disk` wrote, one laid out like a dataset of the hub, or any files."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _saved(path, data)
        return
    if data.subset is not None or data.split is not None:
        yield from _hub(str(path), path.name, data)
        return
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and reader_of(file) is not None
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json")
    )
    if not files:
        raise InputError(f"{path}: no data files here (known: {', '.join(READERS)}, .gz, .zst)")
    for file in files:
        yield from _file(file, data)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system or a library cannot read is the user's file, not our fault."""
    from pyarrow import ArrowException

    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error
    except (EOFError, zlib.error, ArrowException, csv.Error) as error:
        raise InputError(f"{path}: cannot read it: {error}") from error


# --- JSON --------------------------------------------------------------------------------------


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # pyright: ignore[reportReturnType]
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # pyright: ignore
    return path.open("rb")


def read_json(path: Path) -> Iterator[Raw]:
    """An array, or an object a line, whichever the file begins with."""
    with open_binary(path) as file:
        first = _first_bytes(file)
    with open_binary(path) as file:  # again: a packed stream does not go back
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path}: its text is UTF-16; save it as UTF-8")
        if not first:
            return
        if first[:1] == b"[":
            yield from _array(path, file)
        elif first.rstrip(SPACE) == b"{":
            raise InputError(
                f"{path}, line 1: an object over several lines; one object a line is expected, or "
                "an array of objects [{...}, {...}]"
            )
        else:
            yield from _lines(path, file)


def _first_bytes(file: BinaryIO) -> bytes:
    """The first line that holds something, without a byte order mark and leading blanks."""
    for line in file:
        if text := line.removeprefix(b"\xef\xbb\xbf").lstrip(SPACE):
            return text
    return b""


def _lines(path: Path, file: BinaryIO) -> Iterator[Raw]:
    name = str(path)
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip(SPACE):
            continue
        where = Place(name, number)
        try:
            value = parse(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield Raw(where, {}, f"not JSON: {explained(error)}")
            continue
        if isinstance(value, dict):
            yield Raw(where, value)
        else:
            yield Raw(where, {}, f"not an object {{...}} but {type(value).__name__}")


def _array(path: Path, file: BinaryIO) -> Iterator[Raw]:
    """One object after the other out of the text of an array."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot read it: {explained(error)}") from error
    at, number = text.index("[") + 1, 0
    while True:
        at = BLANKS.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[at : at + 1] == "]":
            break
        number += 1
        where = Place(str(path), number, "row")
        try:
            begin = at
            value, at = DECODER.raw_decode(text, at)
            check_text(text[begin:at], value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {explained(error)}") from error
        fault = "" if isinstance(value, dict) else f"not an object but {type(value).__name__}"
        yield Raw(where, {} if fault else value, fault)
        at = BLANKS.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[at : at + 1] not in (",", "]"):
            raise InputError(f"{where}: not JSON: the array has no , or ] after it; is it cut off?")
        at += text[at] == ","
    if text[at + 1 :].strip():
        raise InputError(f"{path}: not JSON: something follows the array's end")


# --- columns -----------------------------------------------------------------------------------


def read_csv(path: Path) -> Iterator[Raw]:
    """Rows of a CSV or TSV file with a header; a cell that is a JSON list or object becomes it."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 kB
    with open_binary(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        tabs = path.with_suffix("").suffix == ".tsv" or path.suffix == ".tsv"
        reader = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if twice := {name for name in header if header.count(name) > 1}:
                raise InputError(f"{path}: the column `{min(twice)}` is there twice")
            for number, cells in enumerate(reader, 1):
                where = Place(str(path), number, "row")
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield Raw(where, {}, f"{len(cells)} cells under {len(header)} columns")
                    continue
                yield Raw(where, dict(zip(header, map(_cell, header, cells), strict=True)))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: cannot read it: {explained(error)}") from error


STRUCTURED = ("info", "summaries", "tools", "chat_template_kwargs", *ANSWERS, *RATINGS)  # columns


def _cell(column: str, text: str) -> Any:
    """A message or a list of them, and what else a format has as an object; else the text: an
    answer may be JSON as well.
    """
    if text[:1] not in ("[", "{"):
        return text
    try:
        value = parse(text)
    except ValueError:
        return text
    messages = value if isinstance(value, list) else [value]
    are_messages = bool(messages) and all(
        isinstance(one, dict) and ("role" in one or {"from", "value"} <= one.keys())
        for one in messages
    )
    return value if are_messages or column in STRUCTURED else text


def read_parquet(path: Path) -> Iterator[Raw]:
    """Rows of a Parquet file, a batch in memory."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from _of_batches(str(path), file.iter_batches(BATCH))


def read_arrow(path: Path) -> Iterator[Raw]:
    """Rows of an Arrow file, of either of its two forms."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            reader = pyarrow.ipc.open_stream(file)
            yield from _of_batches(str(path), reader)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            whole = pyarrow.ipc.open_file(file)
            batches = (whole.get_batch(n) for n in range(whole.num_record_batches))
            yield from _of_batches(str(path), batches)


def _of_batches(name: str, batches: Any) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Raw(Place(name, number, "row"), row)


def _saved(path: Path, data: DataConfig) -> Iterator[Raw]:
    """A folder that `Dataset.save_to_disk` wrote."""
    from datasets import load_from_disk

    with readable(path):
        found = load_from_disk(str(path))
        yield from _of_dataset(found, path.name, data)


def _hub(source: str, name: str, data: DataConfig) -> Iterator[Raw]:
    """A dataset of the hub, or a folder laid out like one."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = load_dataset(source, data.subset)
    except (DatasetGenerationError, DatasetsError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{source}: no such file, and no dataset: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no such file, and the hub gave none: {error}") from error
    yield from _of_dataset(found, name, data)


def _of_dataset(found: Any, name: str, data: DataConfig) -> Iterator[Raw]:
    """Rows of a dataset, or of the split of a dict of them that is named or alone."""
    if isinstance(found, dict):
        split = data.split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            said = f"no split `{split}`" if split else "several splits; set `split` to one"
            raise InputError(f"{name}: {said} (there are {', '.join(found)})")
        found, name = found[split], f"{name}:{split}"
    elif data.split is not None:
        raise InputError(f"{name}: it has no splits; leave `split` out")
    number = 0
    for batch in found.iter(BATCH):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Raw(Place(name, number, "row"), dict(zip(columns, values, strict=True)))


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_PACKED = (".gz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def reader_of(path: Path) -> Callable[[Path], Iterator[Raw]] | None:
    """What reads files of this name, None if nothing does."""
    packed = path.suffix in _PACKED
    read = READERS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and read in (read_parquet, read_arrow) else read
