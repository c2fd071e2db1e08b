"""Hashes of models and tokenizers: by them a moved copy is known, and a changed one too."""

import hashlib
import json
from pathlib import Path


def find_weights(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model on this machine: itself, or its snapshot in the hub's cache, named by its commit."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns="*.safetensors"))
    except (OSError, ValueError):  # not in the cache; no valid hub id
        return None


def weights_sha256(name: str, revision: str | None = None) -> str | None:
    """The hash of a model's (or adapter's) weights, all bytes; None if it has no safetensors on this machine."""
    folder = find_weights(name, revision)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    return sha256_of(*files) if files else None


def configs_sha256(name: str, revision: str | None = None) -> str | None:
    """The hash of what says how a model's or an adapter's weights are used; None if it is not on this machine."""
    folder = find_weights(name, revision)
    files = [folder / file for file in ("config.json", "adapter_config.json")] if folder else []
    files = [path for path in files if path.is_file()]
    return sha256_of(*files) if files else None


def sha256_of(*paths: Path) -> str:
    """The hash of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def token_parts(tokenizer) -> dict:
    """What decides how messages become tokens."""
    return {
        "vocabulary": tokenizer.get_vocab(),
        "chat template": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
    }


def tokenizer_sha256(tokenizer) -> str:
    parts = list(token_parts(tokenizer).values())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def differing_tokens(theirs, ours) -> list[str]:
    """What of two tokenizers makes other tokens of the same messages; empty if nothing does."""
    parts = token_parts(ours)
    return [name for name, part in token_parts(theirs).items() if part != parts[name]]
