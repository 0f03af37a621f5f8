"""Files as they are named by a user or by one another."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def regular(path: Path) -> Path:
    """The path itself, if a file lies there that has an end: opening a pipe waits for ever.

    Raises:
        OSError: nothing is there, or a folder, a pipe or a device.

    >>> regular(Path("/dev/null"))
    Traceback (most recent call last):
    OSError: [Errno 22] neither a file nor a folder: '/dev/null'
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))
    return path
