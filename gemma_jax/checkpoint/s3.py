"""orbax's way to s3://.

Below orbax, tensorstore reads and writes S3. orbax 0.12.8 does not let an address through: of `s3://a` it
makes the path `s3:/a`. No option of orbax's changes that, so the one function that makes tensorstore's
specs of paths is wrapped, once an address of S3 comes up: it is asked for the same path in Google's storage,
about which it knows the same things (no renames, smaller files), and the driver is changed in the answer.
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
MANGLED = {"driver": "file", "path": "s3:/bucket/folder"}  # what that function makes of s3://bucket/folder


def orbax_context(path: epath.PathLike) -> ocp.Context:
    """With which orbax is to be called for this path, on a disk or in any bucket.

    Several processes need nothing more on S3 than on gs://. Each writes objects of its own, whose names hold
    its number; the first joins them by one more object, after a barrier, and neither S3 nor we (see
    `user_path`) give it an outdated list of objects. What orbax makes sure of by a rename on a disk, it
    does by an object that it writes last, as on gs://.

    Raises:
      UserError: this orbax is another, and how it writes to S3 is not known.
    """
    context = ocp.Context()
    if os.fspath(path).startswith("s3://"):
        _let_s3_through(path)
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def _let_s3_through(path: epath.PathLike) -> None:
    try:
        # Here, because what is private may go, and disks do not need it.
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
    """`spec` with S3 in the place of Google's storage, however deep: stores contain stores."""
    if isinstance(spec, list):
        return [_in_s3(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return {**spec, "driver": "s3", **_service()}
    return {name: _in_s3(part) for name, part in spec.items()}


def _service() -> Spec:
    """What s3fs reads from the environment itself, and tensorstore does not.

    The region of Amazon's buckets is left out: tensorstore asks for it, and would refuse another.
    """
    service: Spec = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        service |= {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it says of each array that there is no ~/.aws
        service["aws_credentials"] = {"type": "environment"}
    return service
