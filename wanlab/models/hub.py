"""Downloads from the Hugging Face hub; every network failure becomes a one-line error."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from wanlab.core.errors import WanlabError

_TIMEOUT_S = 10
_CONFIGS = ["model_index.json", "*/config.json", "*/scheduler_config.json"]


def fetch_configs(hub_id: str) -> Path:
    """A local folder with the configuration files of a repository, without weights.

    Raises:
        WanlabError: no such repository, or the hub cannot be reached.
    """
    return _fetch(hub_id, _CONFIGS)


def fetch_folder(hub_id: str, parts: list[str]) -> Path:
    """A local folder with these parts (sub-folders) of a repository; downloads missing files.

    Without a network it returns the folder with the files that were downloaded before.

    Raises:
        WanlabError: no such repository, or the hub cannot be reached.
    """
    files = [f"{part}/*{kind}" for part in parts for kind in (".json", ".safetensors")]
    files += [f"{part}/*.model" for part in parts if part.startswith("tokenizer")]
    return _fetch(hub_id, [*_CONFIGS, *files])


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=_TIMEOUT_S))
    except GatedRepoError as error:
        raise WanlabError(
            f"{hub_id} asks for permission; accept its terms on the hub and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise WanlabError(
            f"the hub has no repository {hub_id}; check the spelling, or log in: hf auth login"
        ) from error
    except Exception as error:  # the client passes on errors of several HTTP libraries
        raise WanlabError(
            f"cannot fetch {hub_id} from the hub ({_cause(error)}); check the network, give a local folder,"
            ' or use weights="random" with a registry name'
        ) from error


def _cause(error: BaseException) -> str:
    """One line of the innermost cause, which describes the network failure."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
