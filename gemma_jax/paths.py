"""From what a user writes to a path: on this machine, or in a bucket (gs://, s3://)."""

import importlib.util
import os
from typing import TYPE_CHECKING

from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath


def user_path(name: str | os.PathLike[str]) -> "epath.Path":
    """The path that a user names; `~` is the home directory.

    Raises:
      UserError: an address of another kind, or one that needs a package which is not installed.
    """
    from etils import epath  # late: help and mistakes are told without it

    scheme, separator, _ = os.fspath(name).partition("://")
    if not separator:
        return epath.Path(name).expanduser()
    if scheme not in ("gs", "s3"):
        raise UserError(f"{name} is neither a path nor the address of a bucket (gs://, s3://).")
    # epath takes TensorFlow's file systems where that is installed, and fsspec's elsewhere.
    if importlib.util.find_spec("tensorflow") is None:
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(f"{name}: {error}, as in pip install 'gemma_jax[data]'.") from error
        # What other processes and libraries write must be seen: a list of objects is not kept.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(name)
