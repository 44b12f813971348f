"""The hub: timm's published weights, from its local cache where they are there, and a quick word where they cannot be had."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.errors

from cyclebnn_dist.timm_import import timm

TIMEOUT_SECONDS = 5.0
"""How long the hub may take to answer the first time."""
FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> Path | None:
    """The file of a timm model's published weights in the hub's cache on this machine, if it is there."""
    repository = _repository(name)
    if repository is None:
        return None
    repo_id, revision, files = repository
    for file in files:
        found = huggingface_hub.try_to_load_from_cache(repo_id, file, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def why_unreachable(name: str) -> str:
    """Why the hub cannot be asked for a timm model's published weights; empty if it can, or if they lie elsewhere.

    One request, while a download tries six times over half a minute before it gives up.
    """
    repository = _repository(name)
    if repository is None:
        return ""
    repo_id, revision, files = repository
    url = huggingface_hub.hf_hub_url(repo_id, files[0], revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
    except huggingface_hub.errors.HfHubHTTPError:
        return ""  # it answers; what it says comes again with the download
    except huggingface_hub.errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:
        return f"the hub does not answer ({str(error).strip() or type(error).__name__})"
    return ""


def fetch_command(name: str) -> str:
    """The command that puts a timm model's published weights into the hub's cache; empty if they lie elsewhere."""
    repository = _repository(name)
    if repository is None:
        return ""
    repo_id, revision, files = repository
    return f"hf download {repo_id} {files[0]}" + (f" --revision {revision}" if revision else "")


def _repository(name: str) -> tuple[str, str | None, tuple[str, ...]] | None:
    """Repository, revision and files on the hub; None for a model whose weights timm has from elsewhere, or nowhere."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
    if cfg is None or not cfg.hf_hub_id or cfg.custom_load:
        return None
    repo_id, _, revision = cfg.hf_hub_id.partition("@")
    return repo_id, revision or None, (cfg.hf_hub_filename,) if cfg.hf_hub_filename else FILES
