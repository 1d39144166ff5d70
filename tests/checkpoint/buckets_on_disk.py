"""Emulates buckets in a local folder, for epath and tensorstore; writes may fail after some changes."""

import errno
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.serialization import tensorstore_utils

from gemma_jax.checkpoint.s3 import FUNCTION, orbax_context


class BucketsOnDisk(LocalFileSystem):
    """Behaves as a bucket: folders exist only while they hold an object, and cannot be renamed.

    If `changes_left` is set, so many changes succeed and all later ones fail.
    """

    protocol = ("s3", "s3a")
    cachable = False
    root = ""  # the folder that holds all buckets
    changes_left: int | None = None  # later changes fail, as if the process was killed

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        path = os.fspath(path).removeprefix("s3://").removeprefix("gs://").rstrip("/")
        return path if path.startswith(cls.root) else f"{cls.root}/{path}"

    def change(self) -> None:
        if self.changes_left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.changes_left is not None:
            self.changes_left -= 1

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            self.change()
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return super()._open(path, mode, **options)

    def glob(self, path: str, **options: Any) -> list[str]:
        return [found.removeprefix(f"{self.root}/") for found in super().glob(path, **options)]

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        self.change()
        path1, path2 = self._strip_protocol([path1, path2])
        os.makedirs(os.path.dirname(path2), exist_ok=True)
        super().cp_file(path1, path2, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        if self.isdir(path1):
            raise FileNotFoundError(f"The specified key does not exist: {path1}")
        self.cp_file(path1, path2)
        self.rm(path1)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = self._strip_protocol(path)
        for file in self.find(path) if recursive else [path]:
            self.change()
            os.remove(file)
            parent = os.path.dirname(file)
            while parent != self.root and not os.listdir(parent):
                os.rmdir(parent)
                parent = os.path.dirname(parent)


def buckets_on_disk(root: Path, patch: pytest.MonkeyPatch) -> BucketsOnDisk:
    """Redirects s3:// and gs:// addresses to the folder `root` until `patch` is undone."""
    patch.setattr(BucketsOnDisk, "root", str(root))
    filesystem = BucketsOnDisk()
    patch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: filesystem)
    patch.setattr(fsspec, "get_filesystem_class", lambda scheme: BucketsOnDisk)
    patch.setattr(fsspec, "url_to_fs", lambda url: (filesystem, filesystem._strip_protocol(url)))
    patch.setattr(tensorstore_utils, FUNCTION, getattr(tensorstore_utils, FUNCTION))  # as it is now
    orbax_context("s3://bucket")
    build = getattr(tensorstore_utils, FUNCTION)

    def on_disk(spec: Any) -> Any:
        if isinstance(spec, list):
            return [on_disk(part) for part in spec]
        if not isinstance(spec, dict):
            return spec
        if spec.get("driver") in ("s3", "gcs"):
            return {"driver": "file", "path": f"{root}/{spec['bucket']}/{spec['path']}"}
        return {name: on_disk(part) for name, part in spec.items()}

    patch.setattr(tensorstore_utils, FUNCTION, lambda *args, **options: on_disk(build(*args, **options)))
    return filesystem
