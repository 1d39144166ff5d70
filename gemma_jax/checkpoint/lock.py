"""A lock that keeps two processes from training in the same run directory."""

import errno
import fcntl
import os
import socket
from typing import BinaryIO

from etils import epath

from gemma_jax.errors import UserError

LOCK_FILE = "lock"


class RunLock:
    """The lock that a training process holds on its run directory until `release` or until the process ends.

    It is an operating system lock on the file RUN/lock, which names the holder, so it is freed however the
    process ends. Buckets and file systems without locks are not protected.
    """

    def __init__(self, run_dir: epath.Path) -> None:
        """Take the lock of an existing directory.

        Raises:
          UserError: Another process is training there.
        """
        self._file: BinaryIO | None = None
        if "://" in os.fspath(run_dir):
            return
        file = open(run_dir / LOCK_FILE, "a+b", buffering=0)  # noqa: SIM115  # it stays open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip()
            file.close()
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(
                f"{holder or 'another process'} is training in {run_dir}; wait for it, stop it, or give "
                "another --run_dir."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file

    def release(self) -> None:
        """Release the lock. The file stays: deleting it could hide the lock of another process."""
        if self._file is not None:
            self._file.close()
            self._file = None
