"""Downloads checkpoints by name from the Hugging Face Hub and from Kaggle, and finds them in the cache later.

The clients' own settings are honoured: HF_TOKEN or `hf auth login`, HF_HOME, HF_HUB_OFFLINE, and Kaggle's.
"""

import os
import re
from pathlib import Path

from gemma_jax.checkpoint.record import first_line
from gemma_jax.errors import UserError

# The files downloaded from a repository: no pickled .bin, no .gguf, no second copy of the weights.
FILES = (
    *("config.json", "generation_config.json", "tokenizer.model", "NOTICE"),
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors"),
)
# Files not downloaded with the published Flax form, which is a folder such as 2b/ beside the tokenizer.
NOT_FLAX = ("*.bin", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")
SECONDS = 20  # if the first request gets no answer within this time, the Hub counts as unreachable
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?")
_KAGGLE = re.compile(r"[\w-]+/[\w.-]+/(flax|transformers)/[\w.-]+(/\d+)?", re.IGNORECASE)


def is_hub_name(name: str) -> bool:
    """Whether a name could be on the Hub (`owner/model`, `owner/model@revision`) or on Kaggle."""
    # The path of a missing run, such as runs/demo, has the same form; but its parent folder exists here.
    owner = name.split("/")[0]
    return not os.path.exists(owner) and bool(_HUB_ID.fullmatch(name) or _KAGGLE.fullmatch(name))


def download(name: str) -> Path:
    """Returns the local directory of a checkpoint's files, after downloading those not in the cache yet.

    Args:
      name: A name for which `is_hub_name` is true.

    Raises:
      UserError: The checkpoint does not exist, may not be read, cannot be reached, or does not fit on the
        disk.
    """
    return _from_kaggle(name) if _KAGGLE.fullmatch(name) else _from_hub(name)


def _from_hub(name: str) -> Path:
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    model, _, revision = name.partition("@")
    flax = model.lower().endswith("-flax")
    problem: Exception | None = None
    try:
        # snapshot_download makes the same request, but waits for an answer forever.
        HfApi().model_info(model, revision=revision or None, timeout=SECONDS)
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled) as error:
        problem = error
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision or None,
                allow_patterns=None if flax else list(FILES),
                ignore_patterns=list(NOT_FLAX) if flax else None,
                local_files_only=problem is not None,
            )
        )
    except LocalEntryNotFoundError as error:
        raise _refusal(model, revision, problem or error) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise _refusal(model, revision, error) from error


def _refusal(model: str, revision: str, error: Exception) -> UserError:
    """The error to raise for a failed download if the cache has no copy either."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{model}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        reason = "is not in the cache, and HF_HUB_OFFLINE keeps it from being downloaded; unset it"
    elif isinstance(error, GatedRepoError):
        reason = f"is gated: accept its terms at {page}, then {log_in}"
    elif isinstance(error, RepositoryNotFoundError):
        reason = (
            "is neither a checkpoint here nor a repository of the Hub that you may read; check the name or, "
            f"if it is private or gated, {log_in}"
        )
    elif isinstance(error, RevisionNotFoundError):
        reason = f"has no revision {revision!r}; see {page}/tree/main for those it has"
    else:
        reason = (
            f"is not in the cache and could not be downloaded from the Hub ({first_line(error)[:200]}); "
            "check the connection, the disk and your access, or give a local directory"
        )
    return UserError(f"{model} {reason}.")


def _from_kaggle(name: str) -> Path:
    try:
        import kagglehub
    except ImportError as error:
        raise UserError(f"{name} is on Kaggle; install its client first: pip install kagglehub.") from error

    try:
        return Path(kagglehub.model_download(name))
    except Exception as error:  # of many kinds, mostly kagglehub's own
        owner, model, *_ = name.split("/")
        raise UserError(
            f"Kaggle refuses {name} ({first_line(error)[:200]}); accept its terms at "
            f"https://www.kaggle.com/models/{owner}/{model}, and set KAGGLE_USERNAME and KAGGLE_KEY."
        ) from error
