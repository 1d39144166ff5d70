"""Makes orbax read and write s3:// addresses.

tensorstore, on which orbax is built, supports S3. But orbax 0.12.8 does not pass such an address on: it turns
`s3://a` into the path `s3:/a`, and no option of orbax changes that. So the one function that makes
tensorstore's specs from paths is wrapped, when the first address of S3 is used. The wrapper requests the spec
of the same path in Google's storage, for which orbax makes the same choices (no renames, smaller files), and
replaces the driver in the result.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import orbax.checkpoint
from etils import epath
from orbax.checkpoint import v1 as ocp

from gemma_jax.errors import UserError

Spec = dict[str, Any]

FUNCTION = "build_kvstore_tspec"
MANGLED = {"driver": "file", "path": "s3:/bucket/folder"}  # its result for s3://bucket/folder


def orbax_context(path: epath.PathLike) -> ocp.Context:
    """The context in which orbax must be called for this path, on a disk or in any bucket.

    On S3, several processes need nothing beyond what they need on gs://. Each writes its own objects, whose
    names contain its process index. After a barrier, the first process joins them with one more object; the
    list of objects that it reads is never outdated, because S3 lists consistently and we cache no lists (see
    `user_path`). Where orbax commits with a rename on a disk, it writes a last object here, as on gs://.

    Raises:
      UserError: This version of orbax works differently, so that it cannot be made to write to S3.
    """
    context = ocp.Context()
    if os.fspath(path).startswith("s3://"):
        _let_s3_through(path)
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def _let_s3_through(path: epath.PathLike) -> None:
    try:
        # Imported here because the module is private, so it may disappear, and disks do not need it.
        from orbax.checkpoint._src.serialization import tensorstore_utils

        build = getattr(tensorstore_utils, FUNCTION)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"orbax-checkpoint {orbax.checkpoint.__version__} has another way to its files than gemma_jax "
            f"knows, so {path} cannot hold checkpoints; install orbax-checkpoint 0.12.8, or mount the bucket."
        ) from error
    if build("s3://bucket/folder", use_ocdbt=False) == MANGLED:
        setattr(tensorstore_utils, FUNCTION, _with_s3(build))


def _with_s3(build: Callable[..., Spec]) -> Callable[..., Spec]:
    @functools.wraps(build)
    def build_with_s3(directory: str, *args: Any, **options: Any) -> Spec:
        if not directory.startswith("s3://"):
            return build(directory, *args, **options)
        spec: Spec = _in_s3(build(f"gs://{directory.removeprefix('s3://')}", *args, **options))
        return spec

    return build_with_s3


def _in_s3(spec: Any) -> Any:
    """Returns `spec` with S3 in place of Google's storage at every depth; the specs of stores are nested."""
    if isinstance(spec, list):
        return [_in_s3(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return {**spec, "driver": "s3", **_service()}
    return {name: _in_s3(part) for name, part in spec.items()}


def _service() -> Spec:
    """The settings that s3fs reads from the environment but tensorstore does not.

    The region is left out for Amazon's own buckets: tensorstore looks it up and would reject a wrong one.
    """
    service: Spec = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        service |= {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # otherwise it reports for each array that ~/.aws is missing
        service["aws_credentials"] = {"type": "environment"}
    return service
