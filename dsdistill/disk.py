"""Write to disk: completely or not at all, never through a link, with the modes that the umask gives.

A file or folder that takes several steps is made under a new scratch name in the same folder, and then moved to its
place. So a name that another user may have planted is never opened, and two processes never share a scratch name.
"""

import contextlib
import errno
import fnmatch
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator

from dsdistill.config.errors import RunError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space left, quota used up, file larger than allowed
LONGEST_NAME, LONGEST_PATH = 255, 3800  # bytes; the limit leaves room for the names that a run adds to a path
_SCRATCH = re.compile(r"\.partial-[0-9a-f]{8}")
_TRIAL = 2**20  # bytes written to test whether a disk is full


class Unwritable(RunError):
    """Signal that something could not be written; the message is one line that names the place and the reason."""


class Foreign(OSError):
    """Signal that something was not removed, because it holds files that this project did not write."""


def reason(error: BaseException) -> str:
    """Return why a write failed, in plain words."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full ({error.strerror})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def full(error: BaseException, folder: str) -> bool:
    """Return whether a write into `folder` failed for lack of space.

    Libraries raise errors of many types for this. If the type does not tell, a trial file is written to the folder.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    name = os.path.join(folder, f".partial-{secrets.token_hex(4)}")
    try:
        with open(name, "xb", buffering=0) as file:
            if file.write(bytes(_TRIAL)) < _TRIAL:  # the next write would have failed
                return True
            os.fsync(file.fileno())
    except OSError as trial:
        return trial.errno in FULL
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
    return False


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Raise Unwritable if a write to `path` fails inside the context; errors with another cause are not changed."""
    try:
        yield
    except (UserError, RunError, Foreign):
        raise
    except Exception as error:  # torch, safetensors and tokenizers raise their own types
        folder = os.path.dirname(os.path.abspath(path))
        if isinstance(error, OSError):
            raise Unwritable(f"{os.fspath(path)} cannot be written: {reason(error)}") from None
        if full(error, folder):
            raise Unwritable(f"{os.fspath(path)} cannot be written: the disk is full") from None
        raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yield a new name under which a file or a folder is made; at the end it replaces `path` in one step.

    A folder replaces only an empty folder. This may be a mount point, so the contents are moved into it. After an error
    `path` is as it was before.

    Raises:
        Unwritable: the disk is full, or the place cannot be written.
    """
    path = os.fspath(path)
    with explained(path):
        into = os.path.isdir(path) and not os.path.islink(path)
        home = path if into else os.path.dirname(path)
        os.makedirs(home or ".", exist_ok=True)
        scratch = _scratch(home)
        try:
            inside = os.path.join(scratch, os.path.basename(path) or "made")
            yield inside
            _finish(inside, os.stat(scratch).st_mode)
            if not into:
                os.replace(inside, path)
                sync(home or ".")
                return
            if len(os.listdir(path)) > 1:
                raise OSError(errno.ENOTEMPTY, "something else is there now")
            for name in os.listdir(inside):
                os.replace(os.path.join(inside, name), os.path.join(path, name))
        finally:
            with contextlib.suppress(OSError):  # on NFS this fails while a file is still open
                remove(scratch, ["*"])


@contextlib.contextmanager
def writing(path: str | os.PathLike, binary: bool = False):
    """Yield an open file (UTF-8 text unless `binary`) that replaces `path` at the end; see `replacing`."""
    mode, encoding = ("xb", None) if binary else ("x", "utf-8")
    with replacing(path) as name, open(name, mode, encoding=encoding) as file:
        yield file


def save_json(path: str | os.PathLike, found: object) -> None:
    """Write JSON to a file that the user named, which may be a device or a link."""
    with explained(path), open(path, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


def append(path: str, text: str) -> None:
    """Append all of a text to a file, or nothing of it; a link raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        before, data = os.fstat(descriptor).st_size, text.encode()
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            os.ftruncate(descriptor, before)  # the next line must not follow a part of this one
            raise
    finally:
        os.close(descriptor)


def remove(path: str, made: Iterable[str]) -> None:
    """Remove a file or a folder if it exists. If it is a link, the link is removed, never its target.

    made: patterns (fnmatch) of the paths that this project writes below the folder.

    Raises:
        Foreign: the folder holds something else. In this case nothing is removed.
        OSError: something could not be removed.
    """
    if not os.path.isdir(path) or os.path.islink(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    others = foreign(path, made)
    if others:
        raise Foreign(errno.ENOTEMPTY, f"it holds {', '.join(others[:3])}, which no run wrote", path)
    for base, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(base, name))
        for name in folders:
            inner = os.path.join(base, name)
            (os.unlink if os.path.islink(inner) else os.rmdir)(inner)
    os.rmdir(path)


def foreign(folder: str, made: Iterable[str]) -> list[str]:
    """Return the files below `folder` whose paths match none of the patterns `made`."""
    made, found = list(made), []
    for base, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        for name in (*files, *links):
            inner = os.path.relpath(os.path.join(base, name), folder)
            if not any(fnmatch.fnmatchcase(inner, pattern) for pattern in made):
                found.append(inner)
    return found


def sweep(folder: str, names: Iterable[str] | None = None) -> None:
    """Remove what a killed process left under scratch names in `folder`; the caller holds the folder's lock.

    names: the names that the caller makes there. A scratch folder with other contents stays, because another process
    may be writing it.
    """
    for scratch in filter(_SCRATCH.fullmatch, os.listdir(folder) if os.path.isdir(folder) else ()):
        with contextlib.suppress(OSError):
            inside = os.path.join(folder, scratch)
            if names is None or ((found := set(os.listdir(inside))) and found <= set(names)):
                remove(inside, ["*"])


def is_scratch(name: str) -> bool:
    """Return whether a file or folder has a scratch name, which only `replacing` gives."""
    return _SCRATCH.fullmatch(name) is not None


def sync(path: str) -> None:
    """Flush a file, or a folder's entries, to the disk, if its file system supports this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in FULL or error.errno == errno.EIO:
            raise
    finally:
        os.close(descriptor)


def _scratch(folder: str) -> str:
    while True:
        name = os.path.join(folder, f".partial-{secrets.token_hex(4)}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(name)
            return name


def _finish(made: str, mode: int) -> None:
    """Give a file or folder the umask's modes, which some libraries narrow to 0600, and flush it to the disk.

    mode: the mode of a folder made under the same umask.
    """
    plain = stat.S_IMODE(mode) & 0o666
    if not os.path.isdir(made):
        os.chmod(made, plain)
        sync(made)
        return
    os.chmod(made, stat.S_IMODE(mode))
    for base, folders, files in os.walk(made):
        for name in folders:
            os.chmod(os.path.join(base, name), stat.S_IMODE(mode))
        for name in files:
            os.chmod(os.path.join(base, name), plain)
            sync(os.path.join(base, name))
        sync(base)


def check_writable(folder: str, key: str = "run.dir") -> None:
    """Raise UserError unless a folder could be written there. Nothing is created, not even before a refusal."""
    wanted = "a folder that can be written"
    place = _place(folder, key, wanted)
    while True:
        try:
            there = os.stat(place)
            break
        except FileNotFoundError:
            if os.path.islink(place):
                raise UserError(key, f"{folder} ({place} is a broken link)", wanted) from None
            place = os.path.dirname(place)
        except (NotADirectoryError, PermissionError):  # for the second, the folder above tells the reason
            place = os.path.dirname(place)
        except OSError as error:
            raise UserError(key, f"{folder} ({error.strerror})", wanted) from None
    if not stat.S_ISDIR(there.st_mode):
        raise UserError(key, f"{folder} ({place} is no folder)", wanted)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(key, f"{folder} ({place} is read-only)", wanted)


def check_file(path: str | None, key: str, sources: Iterable[str] = ()) -> None:
    """Raise UserError unless a file could be written there; nothing is created.

    sources: files that the command reads, none of which may be overwritten.
    """
    if path is None:
        return
    wanted = "a file that can be written"
    folder = os.path.dirname(_place(path, key, wanted))
    if os.path.isdir(path):
        raise UserError(key, f"{path}, which is a folder", "a file to write")
    if not os.path.isdir(folder):
        raise UserError(key, f"{path} ({folder} is no folder)", "a file in a folder that exists")
    if any(os.path.exists(path) and os.path.exists(s) and os.path.samefile(path, s) for s in sources):
        raise UserError(key, f"{path}, which is also read", "another file to write")
    if os.path.lexists(path):
        try:
            there = os.stat(path)
        except OSError as error:
            raise UserError(key, f"{path} ({error.strerror})", wanted) from None
        if stat.S_ISFIFO(there.st_mode) and not path.startswith(("/dev/", "/proc/")):
            raise UserError(key, f"{path}, a pipe", "a file to write")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(key, f"{path}, which is read-only", wanted)


def _place(path: str, key: str, wanted: str) -> str:
    """Return the absolute path; raise UserError if no system would accept it."""
    if "\0" in path:
        raise UserError(key, repr(path), f"{wanted}: a path without NUL")
    place = os.path.abspath(path)
    try:
        long = len(os.fsencode(place)) > LONGEST_PATH or any(
            len(os.fsencode(part)) > LONGEST_NAME for part in place.split(os.sep)
        )
    except UnicodeEncodeError:
        raise UserError(key, ascii(path), f"{wanted}: a path that can be encoded") from None
    if long:
        raise UserError(key, f"{path[:60]}… of {len(path)} characters", f"{wanted}: a shorter path")
    return place
