"""Prepares the text that the demo model is trained on: Jane Austen's six novels, as one file a book.

The text comes out of the Debian package `r-cran-janeaustenr`, which ships the novels as R character vectors (one
string a printed line) in a lazy-load database. Both formats are small enough to read here, so nothing has to be
installed: a .deb is an `ar` archive of tarballs, and the database is a row of zlib streams that each hold one
serialised vector.

A prepared file is UTF-8 with one line a paragraph, an empty line between paragraphs, and DOCUMENT_END on a line of
its own after every chapter.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
PACKAGE_VERSION = "1.0.0-1"
PACKAGE_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
BOOKS = {
    "EMMA": "emma",
    "MANSFIELD PARK": "mansfield_park",
    "NORTHANGER ABBEY": "northanger_abbey",
    "PERSUASION": "persuasion",
    "PRIDE AND PREJUDICE": "pride_and_prejudice",
    "SENSE AND SENSIBILITY": "sense_and_sensibility",
}
DOCUMENT_END = "<|endoftext|>"

_CHAPTER = re.compile(r"chapter ([ivxl]+|\d+)\.?", re.IGNORECASE)
_LAST_LINE = re.compile(r"THE END|FINIS|A NOTE ON THE TEXT", re.IGNORECASE)
_EDITORIAL = re.compile(r"VOLUME [IVX]+|\[(At this point|End volume).*|\*Vide .*|[* ]+")
_INDENT = "  "  # two spaces or more set off verse, addresses and signatures: their line breaks are kept
_STRSXP, _CHARSXP, _NATIVE_HEADER = 16, 9, 18


class CorpusError(Exception):
    """The text could not be had or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Book:
    """One prepared book: its chapters in order, each without the document separator."""

    name: str
    chapters: tuple[str, ...]


def prepare(folder: Path, archive: Path | None = None) -> list[Book]:
    """Write the six prepared texts into `folder` and return them.

    `archive` is the package's .deb where it is already at hand; otherwise apt-get downloads it. Raises CorpusError
    where it cannot, or where the archive's SHA-256 is not PACKAGE_SHA256.
    """
    packed = archive.read_bytes() if archive else _download()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != PACKAGE_SHA256:
        raise CorpusError(
            f"{PACKAGE} {PACKAGE_VERSION} has SHA-256 {digest}, not {PACKAGE_SHA256}; the text would not be the one "
            "the figures are about. Name the right .deb with --archive, or your own texts with --corpus-dir"
        )
    books = [_book(lines) for lines in _read_database(_member(packed, DATABASE))]
    folder.mkdir(parents=True, exist_ok=True)
    for book in books:
        text = "".join(f"{chapter}\n{DOCUMENT_END}\n" for chapter in book.chapters)
        (folder / f"{book.name}.txt").write_text(text, encoding="utf-8", newline="\n")
    return books


def load(folder: Path) -> list[Book]:
    """The prepared books in `folder` (every *.txt, by name). Raises CorpusError where there is none."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise CorpusError(f"{folder} holds no *.txt; leave --corpus-dir away to have the text downloaded")
    books = []
    for file in files:
        chapters = (part.strip("\n") for part in file.read_text(encoding="utf-8").split(DOCUMENT_END))
        books.append(Book(file.stem, tuple(chapter for chapter in chapters if chapter)))
    return books


def _download() -> bytes:
    command = ["apt-get", "download", f"{PACKAGE}={PACKAGE_VERSION}"]
    way_out = (
        "Run `apt-get update` first where the package lists are old; elsewhere fetch the .deb by hand and name it with "
        "--archive, or name prepared texts with --corpus-dir"
    )
    if shutil.which(command[0]) is None:
        raise CorpusError(f"apt-get is not on this system, so {PACKAGE} cannot be downloaded. {way_out}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
        found = list(Path(folder).glob("*.deb"))
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip() or done.stdout.strip() or "no file came").splitlines()[-1]
            raise CorpusError(f"`{' '.join(command)}` failed: {reason}. {way_out}")
        return found[0].read_bytes()


def _member(deb: bytes, path: str) -> bytes:
    """The file `path` out of a .deb: an ar archive whose member data.tar.* holds the installed files."""
    offset = len(b"!<arch>\n")
    while offset < len(deb):
        header = deb[offset : offset + 60]
        name, size = header[:16].decode().strip(), int(header[48:58])
        offset += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(deb[offset : offset + size])) as tar:
                extracted = tar.extractfile(f"./{path}")
                assert extracted is not None, path
                return extracted.read()
        offset += size + size % 2
    raise CorpusError(f"the archive of {PACKAGE} holds no data.tar")


def _read_database(database: bytes) -> list[list[str]]:
    """The character vectors of an R lazy-load database: each a 4-byte length and a zlib stream of that many bytes."""
    vectors = []
    while database:
        (length,) = struct.unpack_from(">I", database)
        stream = zlib.decompressobj()
        raw = stream.decompress(database[4:])
        assert len(raw) == length, (len(raw), length)
        vectors.append(_unserialize_strings(raw))
        database = stream.unused_data
    return vectors


def _unserialize_strings(raw: bytes) -> list[str]:
    """One character vector in R's XDR serialisation, version 3 (R Internals, section 1.8)."""
    (encoding_length,) = struct.unpack_from(">I", raw, 14)
    offset = _NATIVE_HEADER + encoding_length
    kind, count = struct.unpack_from(">II", raw, offset)
    assert kind & 0xFF == _STRSXP, hex(kind)
    offset += 8
    strings = []
    for _ in range(count):
        kind, length = struct.unpack_from(">Ii", raw, offset)
        assert kind & 0xFF == _CHARSXP and length >= 0, (hex(kind), length)
        offset += 8
        strings.append(raw[offset : offset + length].decode("utf-8"))
        offset += length
    return strings


def _book(lines: list[str]) -> Book:
    """The chapters of one novel: title page, volume headings, editorial lines and what follows the end are left out."""
    chapters: list[list[str]] = []
    for line in lines:
        text = line.strip()
        if chapters and _LAST_LINE.fullmatch(text):
            break
        if _CHAPTER.fullmatch(text):
            chapters.append([text, ""])
        elif chapters:
            chapters[-1].append("" if _EDITORIAL.fullmatch(text) else line)
    return Book(BOOKS[lines[0].strip().upper()], tuple(_reflow(chapter) for chapter in chapters))


def _reflow(lines: list[str]) -> str:
    """Printed lines as paragraphs of one line each; italics marks and doubled spaces go."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        kept = [line.replace("_", "") for line in block.split("\n") if line.strip()]
        if not kept:
            continue
        if any(line.startswith(_INDENT) for line in kept):
            paragraph = "\n".join(re.sub(r" +", " ", line.strip()) for line in kept)
        else:
            paragraph = re.sub(r" +", " ", " ".join(line.strip() for line in kept))
            paragraph = re.sub(r"(--|\w-) (?=[\w\"'])", r"\1", paragraph)  # a dash that ended a printed line
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
