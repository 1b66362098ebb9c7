"""Names that users give to files, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

LONGEST = 200  # bytes of a name: file systems take 255, endings and the temporary file's mark included
_FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE
)  # on Windows, with any ending
_FULL, _FORBID = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)


def printable(text: str) -> str:
    """``text`` as it can be shown and stored: half a character (a lone surrogate) becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def file_name(name: str) -> str:
    """``name`` as the name of a file on every system.

    Raises:
        ValueError: for a name that is empty, a path, too long, or one that some system keeps for itself.
    """
    name = name.strip()
    letters = "".join(c if c.isprintable() else "?" for c in name[:60])
    shown = f"“{letters}{'…' if len(name) > 60 else ''}” cannot be a file's name"
    use = "use letters, digits, spaces, - and _."
    if not name or name.startswith(".") or name.endswith(".") or _FORBIDDEN.search(name) or printable(name) != name:
        raise ValueError(f"{shown}; {use}")
    if len(name) > 100 or len(name.encode()) > LONGEST:
        raise ValueError(f"{shown}, it is too long; take at most 100 letters, or {LONGEST} bytes of other characters.")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"{shown}: Windows keeps it for a device; choose another.")
    return name


def file_error(who: str, path: Path, error: OSError) -> ValueError:
    """What to do about a file that cannot be read or written, in a sentence."""
    if error.errno in _FULL:
        do = "the disk is full. Make room and run again"
    elif error.errno in _FORBID:
        do = f"ComfyUI may not use it. Give its user the right to read and write in {path.parent}"
    else:
        do = f"{error.strerror or error}. Look at what is in {path.parent}"
    return ValueError(f"{who}: {path}: {do}.")


def write_whole(who: str, path: Path, data: bytes) -> None:
    """Write a file, in place of one that is there: a reader meets the old or the new one, whatever happens meanwhile.

    Args:
        who: whose error it is, if it fails.

    Raises:
        ValueError: when it cannot be written, with what to do.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")  # nobody else's: neither another thread's nor a link laid out for us
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(part, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise file_error(who, path, error) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
