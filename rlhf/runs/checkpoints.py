"""A checkpoint is whole or not there: the last file written into one is a manifest, which every resume verifies."""

import json
import re
import shutil
from pathlib import Path

from rlhf.models.fingerprints import sha256_of

MANIFEST = "manifest.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing, whenever the writer is killed."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_whole(path: Path, *keys: str) -> dict | None:
    """A file of JSON with at least these keys; None where there is none, {} where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= {*keys} else {}


def step_of(folder: Path) -> int | None:
    """The step of a folder named as the Trainer names checkpoints; None for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found and folder.is_dir() else None


def files_of(checkpoint: Path) -> dict[str, dict]:
    """Size and sha256 of every file but the manifest."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / MANIFEST:
            about = {"size": path.stat().st_size, "sha256": sha256_of(path)}
            found[str(path.relative_to(checkpoint))] = about
    return found


def write_manifest(checkpoint: Path, run_id: str) -> None:
    manifest = {"run_id": run_id, "step": step_of(checkpoint), "files": files_of(checkpoint)}
    write_whole(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict | None:
    """The manifest; None where the checkpoint was never finished, {} where the manifest itself is damaged."""
    manifest = read_whole(checkpoint / MANIFEST, "run_id", "step", "files")
    return {} if manifest and not isinstance(manifest["files"], dict) else manifest


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint with a manifest cannot be trusted, or None."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return f"it has no {MANIFEST}: it was not written to its end"
    if not manifest or manifest["step"] != step_of(checkpoint):
        return f"its {MANIFEST} is damaged"
    found, written = files_of(checkpoint), manifest["files"]
    for name in sorted(found.keys() | written):
        if found.get(name) != written.get(name):
            return f"{name} is {'missing' if name not in found else 'not what was written'}"
    if not any("optim" in name for name in found):
        return "it has no optimizer state (--save_only_model)"
    return None


def checkpoints_of(folder: Path, run_id: str) -> list[Path]:
    """The checkpoints of a run that have a manifest, damaged or not, the newest first."""
    steps = {path: step_of(path) for path in folder.glob("checkpoint-*")}
    own = [path for path, step in steps.items() if step is not None and of_run(path, run_id)]
    return sorted(own, key=steps.get, reverse=True)


def of_run(checkpoint: Path, run_id: str) -> bool:
    manifest = read_manifest(checkpoint)
    # a damaged manifest says nothing of its run: it is passed over by name rather than taken for another run's
    return manifest is not None and manifest.get("run_id", run_id) == run_id


def newest_whole(folder: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line for each newer one that is passed over, with the reason."""
    passed = []
    for checkpoint in checkpoints_of(folder, run_id):
        if (problem := problem_with(checkpoint)) is None:
            return checkpoint, passed
        passed.append(f"{checkpoint.name}: {problem}")
    return None, passed


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: what a kill leaves of it is no checkpoint."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: Path, run_id: str, limit: int | None, best: str | None) -> None:
    """Keep a run's newest checkpoints, at most `limit`, and its best one; other runs' are left alone."""
    own = checkpoints_of(folder, run_id)
    kept = [path for path in own if best and path.name == Path(best).name or path == own[0]]
    room = max((limit or len(own)) - len(kept), 0)
    for checkpoint in [path for path in own if path not in kept][room:]:
        remove(checkpoint)
