"""Writing a directory or a file so that others see the old one or the new one, whole, and never a mixture.

The new one is written as a hidden sibling of its target, `.<name>.<random>.partial`, flushed to disk and moved into
place by one rename. The writer holds a lock on the sibling (flock on the directory or file itself, so nothing
of it ends up inside); a sibling that nobody locks was left by a killed process and goes at the next write.
Of two writers with `force` the last rename wins; without `force` the second one is refused. Writing needs POSIX.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mscompile.errors import BundleError, UsageError

MARKER = "manifest.json"
PARTIAL = ".partial"  # being written, or left by a killed process
ASIDE = ".aside"  # the old directory, for the moment between two renames where they cannot be one
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # linux/fs.h
NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
TARGET_CHANGED = (errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
CANNOT_WRITE = (
    *(*NO_SPACE, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # how numpy reports a full disk, without errno


@contextmanager
def writing(target: Path, force: bool = False, marker: str = MARKER) -> Iterator[Path]:
    """An empty directory to fill; when the block ends without an exception it becomes `target`.

    `marker` is the file that every complete directory of this kind holds; with `force` only a directory that
    has it is replaced. Raises UsageError where `target` exists (unless `force`), is something else, or cannot
    be written. After any exception `target` is as it was.
    """
    target = Path(os.path.realpath(target))
    what = f"cannot write {target}"
    with explained(what):
        _check_target(target, force, marker)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        directory, lock = _locked_sibling(target, os.mkdir)
    try:
        with explained(what, within=directory):
            yield directory
        if not (directory / marker).is_file():
            raise BundleError(f"{what}: nothing was sealed, {marker} is missing")
        with explained(what):
            _flush(directory)
            _publish(directory, target, force, marker)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # what was written, or what it replaced
        os.close(lock)


def write_text(target: Path, text: str) -> None:
    """Make `text`, as UTF-8, the content of a file, which is replaced where it is there.

    What is there and is no plain file, such as a pipe, is written to as it is. Raises UsageError where it cannot be
    written; then `target` is as it was.
    """
    what, content = f"cannot write {target}", text.encode()
    try:
        with explained(what):
            if target.exists() and not target.is_file():
                target.write_bytes(content)
            else:
                _replace(Path(os.path.realpath(target)), content)
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror or error}") from error


def _replace(target: Path, content: bytes) -> None:
    _remove_stale(target)
    partial, lock = _locked_sibling(target, _touch)
    try:
        partial.write_bytes(content)
        os.fsync(lock)
        os.replace(partial, target)
        _flush_one(target.parent)
    finally:
        partial.unlink(missing_ok=True)
        os.close(lock)


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextmanager
def explained(what: str, within: Path | None = None) -> Iterator[None]:
    """Turn an OSError of writing (disk full, no permission) into one UsageError that starts with `what`.

    With `within`, errors that name a file outside that directory are not of this writing and pass unchanged.
    """
    try:
        yield
    except OSError as error:
        written = error.filename2 or error.filename  # of a copy, the second
        named = Path(os.path.abspath(written)) if isinstance(written, str) else None
        foreign = within is not None and named is not None and within not in (named, *named.parents)
        number = _number(error)
        if foreign or number not in CANNOT_WRITE:
            raise
        advice = "free some space or " if number in NO_SPACE else ""
        raise UsageError(f"{what}: {os.strerror(number)}; {advice}choose another place") from error


def _number(error: OSError) -> int:
    """The errno of an error, also where numpy or shutil.copytree have put it into words; 0 if there is none."""
    if error.errno is not None:
        return error.errno
    copied = re.search(r"\[Errno (\d+)\]", str(error)) if isinstance(error, shutil.Error) else None
    return int(copied[1]) if copied else errno.ENOSPC if SHORT_WRITE.search(str(error)) else 0


def is_partial(directory: Path) -> bool:
    """Whether `directory` is one that `writing` is filling, or left behind when its process was killed."""
    return re.fullmatch(rf"\..+\.[0-9a-f]{{8}}({PARTIAL}|{ASIDE})", Path(os.path.realpath(directory)).name) is not None


def _check_target(target: Path, force: bool, marker: str) -> None:
    if not target.name:
        raise UsageError(f"cannot write {target}: it is the root of the file system; name a directory in it")
    if os.path.lexists(target.parent) and not target.parent.is_dir():
        raise UsageError(f"cannot write {target}: {target.parent} is not a directory; choose another place")
    if (fault := _fault(target, force, marker)) is not None:
        raise UsageError(f"{target} {fault}")


def _fault(target: Path, force: bool, marker: str) -> str | None:
    """Why what is at `target` stays; None if nothing is there. Between two looks other writers may exchange it."""
    while (seen := _identity(target)) is not None:
        if not target.is_dir():
            fault = "exists and is not a directory; choose another place"
        elif not (target / marker).is_file():
            fault = f"exists and has no {marker}, so it will not be replaced; choose another place"
        else:
            return None if force else "exists; use --force to replace it"
        if _identity(target) == seen:
            return fault
    return None


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What no two things at one path share, nor one before and after a renaming; None if nothing is there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _siblings(target: Path, suffix: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{8}" + re.escape(suffix))
    return sorted(target.parent / name for name in os.listdir(target.parent) if pattern.fullmatch(name))


def _clean(target: Path) -> None:
    """Finish what killed writers of `target` began: put an old directory back, remove partial ones."""
    for aside in _siblings(target, ASIDE):
        if (lock := _lock(aside)) is not None:
            if os.path.lexists(target):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                _put_back(aside, target)
            os.close(lock)
    _remove_stale(target)


def _remove_stale(target: Path) -> None:
    """Remove what killed writers of `target` left half written."""
    for partial in _siblings(target, PARTIAL):
        if (lock := _lock(partial)) is not None:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
            os.close(lock)


def _lock(path: Path, wait: bool = False) -> int | None:
    """A descriptor that keeps `path` locked until closed; None if another writer has it or it is gone."""
    import fcntl  # not on every system, and readers of bundles import this module too

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except OSError as error:
        if wait and not isinstance(error, FileNotFoundError):
            return descriptor  # a file system without locks: its siblings are never taken for stale
    os.close(descriptor)
    return None


def _locked_sibling(target: Path, make: Callable[[Path], object]) -> tuple[Path, int]:
    while True:  # a writer that cleans up may take the new sibling before it is locked
        sibling = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
        make(sibling)
        if (lock := _lock(sibling, wait=True)) is not None:
            return sibling, lock


def _flush(directory: Path) -> None:
    """Put every file and directory on disk, the innermost first."""
    for folder, _, names in os.walk(directory, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            _flush_one(path)


def _flush_one(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot flush a directory
            raise
    finally:
        os.close(descriptor)


def _publish(directory: Path, target: Path, force: bool, marker: str) -> None:
    """Move `directory` to `target`; what was there, if anything, is at `directory` then."""
    moved = False
    while not moved:  # other writers may add or remove the target between these steps
        _check_target(target, force, marker)
        flag = RENAME_EXCHANGE if os.path.lexists(target) else RENAME_NOREPLACE
        try:
            moved = _rename(directory, target, flag) or _rename_aside(directory, target)
        except OSError as error:
            if error.errno not in TARGET_CHANGED or not directory.is_dir():
                raise
    _flush_one(target.parent)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Linux renameat2; False where this system or file system does not have it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_SUCH_CALL:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _rename_aside(directory: Path, target: Path) -> bool:
    """Two renames; a process killed between them leaves the old directory for `_clean` to put back."""
    if not os.path.lexists(target):
        os.rename(directory, target)
        return True
    if (lock := _lock(target, wait=True)) is None:
        return False  # another writer has moved it: look again
    aside = directory.with_suffix(ASIDE)
    try:
        os.rename(target, aside)
        try:
            os.rename(directory, target)
        except BaseException:
            _put_back(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)
    return True


def _put_back(aside: Path, target: Path) -> None:
    """Undo the first of two renames, unless another writer has filled the gap: then its directory is the newer one."""
    try:
        os.rename(aside, target)
    except OSError:
        if not os.path.lexists(target):
            raise
        shutil.rmtree(aside, ignore_errors=True)
