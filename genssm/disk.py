"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def previous(folder: Path) -> Path:
    """Where the old version of a folder is while the new one takes its place."""
    return folder.with_name(folder.name + ".previous")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder with files, then swap it in by two renames.

    What is in ``folder`` and ``previous(folder)`` is lost; a kill between the renames leaves the
    old one as the latter. Raises OSError when the disk is full; ``folder`` then is what it was.
    """
    old = previous(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with space_for(folder):
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(fresh)
            fresh.chmod(_permitted(0o777))
            for file in fresh.iterdir():
                file.chmod(_permitted(0o666))
                _flush(file)
            if folder.exists():
                _remove(old)
                folder.rename(old)
            fresh.rename(folder)
            _remove(old)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _permitted(mode: int) -> int:
    """What the user's umask leaves of a mode."""
    mask = os.umask(0o077)  # the only way to ask; meanwhile others can read less, not more
    os.umask(mask)
    return mode & ~mask


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, then rename it to ``path``.

    Raises OSError when the disk is full; ``path`` then is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with space_for(path):
        handle, name = tempfile.mkstemp(
            prefix=f"{_temporary(path)}-", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(_permitted(0o666))
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    """How the temporary file of ``path`` begins; tempfile adds eight characters."""
    most = 255 - len(os.fsencode(f".-????????{path.suffix}"))  # bytes that a file's name may have
    return "." + os.fsdecode(os.fsencode(path.stem)[:most])


def remove_leftovers(folder: Path, written: Callable[[str], object], idle: float = 0.0) -> None:
    """Remove the temporary files and folders of names that were ``written`` in ``folder``.

    Names of up to 240 bytes: of longer ones they hold the beginning only. Their writers were
    killed. Those that changed in the last ``idle`` seconds stay, since a writer may be at work, and
    so do hidden files of others.
    """
    for left in folder.iterdir():
        parts = re.fullmatch(r"\.(.+)-[a-z0-9_]{8}(\.[^.]+)?", left.name, re.DOTALL)
        if parts is None or not written("".join(parts.groups(""))):
            continue
        with suppress(FileNotFoundError):  # its writer was at work
            if time.time() - left.stat().st_mtime < idle:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _flush(file: Path) -> None:
    """Wait until a file is on the disk, so that a power cut does not leave its name alone."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def space_for(path: Path) -> Iterator[None]:
    """Turns a full disk, while ``path`` is written in the body, into an OSError that says so."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error)
        if not full and not isinstance(error, SafetensorError):
            raise
        reason = "the disk is full" if full else str(error)
        raise OSError(
            f"could not write {str(path)!r}: {reason}; what was there before is still whole. Make "
            "room and go on from there"
        ) from error
