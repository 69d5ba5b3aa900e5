"""Files of the Hugging Face hub, from its cache or over the network, where huggingface_hub is installed."""

from __future__ import annotations

from typing import Any

ARGUMENTS = ("revision", "cache_dir", "token", "force_download", "local_files_only", "repo_type", "endpoint")


def reason_to_lack(repo_id: str, name: str, **where: Any) -> str | None:
    """Why a file cannot be had; None if it is in the cache or on the hub.

    The hub is asked once and has a few seconds: where there is no network, huggingface_hub would ask for a minute, and
    a misspelt directory looks like the name of a repository.

    Args:
        repo_id: the repository, as "owner/name".
        name: the file's path in it.
        where: those of ARGUMENTS that matter.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        return "huggingface_hub, which would look on the hub, is not installed"
    place = {key: where[key] for key in ("revision", "repo_type") if where.get(key) is not None}
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(repo_id, name, where.get("cache_dir"), **place), str):
            return None
        if where.get("local_files_only"):
            return "it is not in the hub's cache either"
        url = huggingface_hub.hf_hub_url(repo_id, name, endpoint=where.get("endpoint"), **place)
        huggingface_hub.get_hf_file_metadata(url, token=where.get("token"))
    except errors.GatedRepoError:
        return None  # there is one; downloading it says how to get access
    except errors.RepositoryNotFoundError:
        return "the hub has no such repository, or only with a token"
    except errors.HFValidationError:
        return "it is no name of a repository"
    except errors.OfflineModeIsEnabled:
        return "it is not in the hub's cache either (HF_HUB_OFFLINE is set)"
    except errors.HfHubHTTPError as error:
        return f"the hub has no {name} there ({' '.join(str(error).split())})"
    except Exception as error:  # of whichever HTTP library is below
        return f"the hub cannot be reached ({' '.join(str(error).split())})"
    return None


def download(repo_id: str, name: str, **where: Any) -> str | None:
    """The path of a file, from the cache or fetched; None where it cannot be had.

    Args:
        repo_id: the repository, as "owner/name".
        name: the file's path in it.
        where: what huggingface_hub takes; other keys than ARGUMENTS are left out.
    """
    where = {key: value for key, value in where.items() if key in ARGUMENTS}
    if reason_to_lack(repo_id, name, **where) is not None:
        return None
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repo_id, name, **where)
    except (OSError, ValueError):  # all of huggingface_hub's errors
        return None
