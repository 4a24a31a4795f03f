"""Files that are whole or not there, folders that one process holds, and what the disk refuses put into a sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from rehearsal.errors import CheckpointError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_ASIDE = re.compile(r"\..+\.(\d+)\.tmp")
"""Names of files that are being written, with the number of the process that does."""
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def storage_errors(path: Path, *, writing: bool = True) -> Iterator[None]:
    """Turn an :class:`OSError` inside the block into a :class:`CheckpointError` with one sentence about ``path``."""
    try:
        yield
    except OSError as error:
        verb = "written" if writing else "read"
        if error.errno in _FULL:
            message = f"{path} could not be written because the disk is full; make room, then go on with --resume."
        elif error.errno in _FORBIDDEN:
            message = f"{path} may not be {verb} (no permission); change its permissions or use another folder."
        else:
            message = f"{path} could not be {verb}: {error.strerror or error}."
        raise CheckpointError(message) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it to ``path`` when the block ends, remove it if it raises.

    So ``path`` is at any moment, power cuts included, the old file or the new one.

    Raises:
        CheckpointError: in place of any :class:`OSError`.
    """
    # The process id keeps two writers of one file (a run and somebody making its report) out of each other's way.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            yield aside
            flush(aside)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` by :func:`replacing`.

    Raises:
        CheckpointError: if it cannot be written; an earlier file is then still there.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(path) as aside:
        aside.write_bytes(data)


def flush(path: Path) -> None:
    """Have the system write a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed left aside for :func:`replacing`, in a folder and in those within it."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        match = _ASIDE.fullmatch(path.name)
        if match and not _is_another(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_another(pid: int) -> bool:
    """Whether there is another process of that number. In a container a run often gets the number of the last one."""
    if pid == os.getpid():
        return False
    if sys.platform == "win32":
        return True  # to ask would be to interrupt it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


class FolderLock:
    """A lock on ``FOLDER/.lock`` that the system itself lets go when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            CheckpointError: if somebody else holds it, or the lock file cannot be made.
        """
        self._descriptor: int | None = None
        with storage_errors(folder):
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_patiently(descriptor)
        except OSError as error:
            holder = _holder(descriptor)
            if error.errno in _BUSY:
                os.close(descriptor)
                raise CheckpointError(
                    f"{folder} is in use by another run{holder}; wait for it, stop it, or choose another name."
                ) from None
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise CheckpointError(f"{folder} could not be locked: {error.strerror or error}.") from error
            warnings.warn(
                f"the file system of {folder} has no locks, so nothing keeps a second run out of this folder",
                stacklevel=3,
            )
        with storage_errors(folder):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go. The file stays: removing it would let two processes hold two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether somebody holds the lock of ``folder``; leaves no trace."""
        try:
            descriptor = os.open(folder / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            _lock(descriptor)
        except OSError as error:
            return error.errno in _BUSY
        finally:
            os.close(descriptor)
        return False


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError, ValueError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        return f" (process {int(os.read(descriptor, 32))})"
    return ""


def _lock_patiently(descriptor: int) -> None:
    """Try for a fifth of a second: somebody who only asks whether the lock is held has it for a moment."""
    for _ in range(4):
        try:
            return _lock(descriptor)
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            time.sleep(0.05)
    return _lock(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        # One byte far behind the content, so that others can still read who holds the lock.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
