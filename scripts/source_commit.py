"""Names the commit whose package has a digest: the `source_digest` that a result file holds.

    python3 scripts/source_commit.py DIGEST      # all of it, or its first digits

Searches the history of the current commit, the newest first. Prints commit, date and subject; exits with 1 if none has it.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/clusterfusion"


def git(*arguments: str, root: Path = ROOT) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True).stdout


def digest_of(archive: bytes) -> str:
    """What `clusterfusion.bench.environment.package_digest` says of the package in a tar archive of the repository."""
    digest = hashlib.sha256()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {PurePosixPath(member.name).relative_to(PACKAGE): member for member in tar if member.isfile()}
        for name in sorted(files):
            if any(part == "__pycache__" or part.startswith(".") for part in name.parts):
                continue
            file = tar.extractfile(files[name])
            assert file is not None
            digest.update(f"{name.as_posix()}\0{hashlib.sha256(file.read()).hexdigest()}\n".encode())
    return digest.hexdigest()


def find(wanted: str, root: Path = ROOT) -> str | None:
    """The newest commit whose package's digest begins with `wanted`; None if there is none."""
    for commit in git("log", "--format=%H", "--", PACKAGE, root=root).decode().split():
        if digest_of(git("archive", commit, PACKAGE, root=root)).startswith(wanted):
            return commit
    return None


def main(root: Path = ROOT) -> None:
    if len(sys.argv) != 2 or len(sys.argv[1]) < 8:
        sys.exit("source_commit: give one digest, or at least its first 8 digits")
    try:
        commit = find(sys.argv[1].lower(), root)
        if commit is None:
            shallow = git("rev-parse", "--is-shallow-repository", root=root).strip() == b"true"
            cut = ", which is cut short: git fetch --unshallow" if shallow else ""
            sys.exit(f"source_commit: no commit in this history has sources of digest {sys.argv[1]}{cut}")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"source_commit: {root} has no history that git can read: {error}")
    print(git("log", "-1", "--format=%H %as %s", commit, root=root).decode().strip())


if __name__ == "__main__":
    main()
