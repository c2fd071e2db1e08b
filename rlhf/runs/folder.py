"""The output folder of a training run: when one may be used, who holds it, which checkpoint is resumed.

`started.json` says which run a folder belongs to (identity.py), `run.json` that it is complete (record.py).
"""

import os
import platform
import time
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf.models.adapters import check_apart
from rlhf.processes import by_first, check_common, exchange
from rlhf.runs.checkpoints import newest_whole, problem_with, read_manifest, read_whole
from rlhf.runs.identity import STARTED, check_same, identity_of, read_started, start
from rlhf.runs.log import say
from rlhf.user_error import UserError

LOCK, RUN = ".lock", "run.json"
TRACES = (LOCK, STARTED + ".tmp")  # what a run leaves that is killed before it has an identity


def find_resume(arguments, inputs: list[str]) -> str | None:
    """The checkpoint to continue from, or None to start anew.

    An interrupted run is continued from its newest whole checkpoint; one that was killed before its first starts anew.
    `--resume_from_checkpoint` names a checkpoint, or says `true`: only go on.

    Args:
        inputs: the models, adapters and rewards that the run reads, which its folder must not touch.
    Raises:
        UserError: if the folder is in use or holds something else, or if no checkpoint of the run is whole.
    """
    script_args, training_args, _ = arguments
    folder, asked = Path(training_args.output_dir), training_args.resume_from_checkpoint or "false"

    def decide():
        check_place(folder, inputs)
        go_on = asked.lower() == "true"
        if not go_on and asked.lower() != "false":
            return named_checkpoint(Path(asked))
        if script_args.overwrite_output_dir and not go_on:
            return None
        return unfinished(folder, go_on)

    checkpoint = by_first(decide)
    if checkpoint:
        here = Path(checkpoint)
        check_common({checkpoint: [problem_with(here), read_manifest(here)]})
    if checkpoint or training_args.eval_strategy == "no":
        training_args.eval_on_start = False
    return checkpoint


def check_place(folder: Path, inputs: list[str]) -> None:
    """Raises a UserError for a folder that is, holds or lies in an input's or another run's, or that is locked."""
    place = folder.resolve()
    check_apart("--output_dir", folder, inputs)
    for above in place.parents:
        if any((above / name).exists() for name in (STARTED, RUN)):
            raise UserError(f"--output_dir {folder} lies in {above}, the folder of another run: give another one")
    if inside := next(iter(sorted(folder.glob(f"*/{STARTED}"))), None):
        raise UserError(f"--output_dir {folder} holds another run's folder, {inside.parent}: give another one")
    if (folder / LOCK).exists():
        lock_folder(folder).release()


def lock_folder(folder: Path) -> FileLock:
    """Hold the folder: one run at a time. The lock of a process that is gone is free.

    Raises:
        UserError: naming who holds it.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text().strip() or "another process"
        raise UserError(f"{folder} is in use by {holder}: wait for it, or choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror or error}") from error
    path.write_text(f"process {os.getpid()} on {platform.node()}\n")
    return lock


def named_checkpoint(checkpoint: Path) -> str:
    """The checkpoint that --resume_from_checkpoint names, proven whole."""
    manifest = read_manifest(checkpoint)
    problem = problem_with(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    started = read_started(checkpoint.parent) if problem is None else None
    if problem is None and started is None:
        problem = f"there is no {STARTED} beside it, which tells what it depends on"
    elif started and started["run_id"] != manifest["run_id"]:
        problem = f"it is not of the run that {checkpoint.parent / STARTED} tells of"
    if problem:
        raise UserError(f"--resume_from_checkpoint {checkpoint}: {problem}")
    return str(checkpoint)


def unfinished(folder: Path, go_on: bool) -> str | None:
    """The checkpoint from which the run in a folder goes on; None for a folder that is free, or where none was saved.

    Raises:
        UserError: for a folder with anything else in it, or a run none of whose checkpoints is whole.
    """
    if not folder.is_dir() or all(path.name in TRACES for path in folder.iterdir()):
        return None
    started = read_started(folder)
    if started is None or (read_whole(folder / RUN) or {}).get("run_id") == started["run_id"]:
        what = "is not empty" if started is None else "holds a finished run"
        raise UserError(
            f"{folder} {what}: choose another --output_dir, or add --overwrite_output_dir to train into it anew"
        )
    checkpoint, passed = newest_whole(folder, started["run_id"])
    if checkpoint is None and passed:
        raise UserError(
            f"{folder} holds an interrupted run, and none of its checkpoints is whole: {'; '.join(passed[:3])}\n"
            "  bring one back, or add --overwrite_output_dir to start anew"
        )
    for line in passed:
        say(f"passed over {line}")
    if checkpoint is None:
        say(f"{folder}: {'nothing to go on from' if go_on else 'a run was stopped'} before its first checkpoint: anew")
        return None
    say(f"{folder} holds an interrupted run: continuing from {checkpoint.name}")
    return str(checkpoint)


def begin(trainer, arguments, checkpoint: str | None, reward=None) -> None:
    """Take the folder, and write down what the run depends on; where it is resumed, all of that must be the same.

    Raises:
        UserError: naming what changed, who holds the folder, or why it cannot be written.
    """
    training_args = arguments[1]
    folder = Path(training_args.output_dir)
    identity = identity_of(trainer, arguments, reward)
    check_common(identity)

    def decide():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trainer.lock = lock_folder(folder)
            if (folder / "adapter_config.json").exists() and not arguments[2].use_peft:
                raise UserError(f"{folder} holds an adapter, which would be taken for the whole model beside it")
            if checkpoint:
                place = Path(checkpoint).parent
                earlier = read_started(place)
                for line in check_same(place, earlier["identity"], identity):
                    say(f"not as at the start of the run: {line}")
                if place.resolve() == folder.resolve():
                    return earlier
            if (folder / RUN).exists():  # an earlier run's: this folder is not complete until this run is
                (folder / RUN).replace(folder / f"earlier_{RUN}")
            return {"run_id": start(folder, identity), "identity": identity}
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error.strerror or error}") from error
        except UserError:  # who keeps the error may keep the trainer, and with it the folder
            if trainer.lock is not None:
                trainer.lock.release()
            raise

    started = by_first(decide)
    if training_args.save_strategy != "no":
        check_shared(folder, started["run_id"])
    trainer.run_id, trainer.identity = started["run_id"], started["identity"]


def check_shared(folder: Path, run_id: str) -> None:
    """Raises a UserError that names a machine on which the folder is another: its part of a checkpoint is lost."""
    deadline = time.time() + 30  # a network's disk may be a while behind
    while not (seen := (read_started(folder) or {}).get("run_id") == run_id) and time.time() < deadline:
        time.sleep(1)
    found = exchange([platform.node(), seen])
    for host, sees in found:
        if not sees:
            raise UserError(
                f"--output_dir {folder} is not the same folder on {host} as on {found[0][0]}: checkpoints would be in "
                "pieces\n  give one on a disk that they share, or --save_strategy no (such a run is not resumed)"
            )
