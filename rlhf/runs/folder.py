"""The output folder of a training run: when one may be used, and what a run leaves in it beside the model.

`started.json` (the arguments), `training_log.jsonl` (each logged step), `learning_curves.png`, `run.json` (arguments,
versions, data, parent, metrics). Nothing in a folder is ever deleted.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from rlhf.models.adapters import base_revision
from rlhf.models.fingerprints import find_weights, tokenizer_sha256, weights_sha256
from rlhf.models.loading import resolve_adapters
from rlhf.runs.command_line import settings
from rlhf.user_error import UserError

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
STARTED = "started.json"
TRACES = ("training_log.jsonl", "training_log.jsonl.tmp", "learning_curves.png", "samples", "runs", STARTED)
MAY_CHANGE = (  # how the names of arguments begin that do not bear on what is learned
    "dataloader_", "disable_tqdm", "dry_run", "early_stopping", "eval_", "generate_eval", "gradient_accumulation",
    "gradient_checkpointing", "hub_", "load_best", "local_rollout", "log", "max_eval", "metric_for", "num_sample",
    "output_dir", "overwrite", "per_device_", "push_to_hub", "report_to", "resume_from", "run_name", "save_",
)  # fmt: skip


def find_resume(training_args, overwrite: bool) -> str | None:
    """The checkpoint to continue from, or None to start anew.

    An interrupted run (checkpoints, no final `run.json`) is continued by itself; one that was killed before its first
    checkpoint starts anew. `--resume_from_checkpoint` names a checkpoint, or `true` for the last one.

    Raises:
        UserError: if the folder holds something else and `--overwrite_output_dir` was not given.
    """
    if training_args.enable_jit_checkpoint:  # it ends training early, which would look complete
        raise UserError("--enable_jit_checkpoint: a killed run goes on from its last checkpoint, see --save_steps")
    folder, asked = Path(training_args.output_dir), training_args.resume_from_checkpoint
    complete = [c for c in folder.glob("checkpoint-*") if is_complete(c)]
    last = str(max(complete, key=lambda c: int(c.name.split("-")[1]))) if complete else None
    if asked and asked.lower() not in ("true", "false"):
        if not is_complete(Path(asked)):
            raise UserError(f"--resume_from_checkpoint {asked}: no complete checkpoint there")
        checkpoint = asked
    elif asked and asked.lower() == "true":
        if last is None:
            print(f"no complete checkpoint in {folder} yet: starting from step 0")
        checkpoint = last
    elif overwrite or not folder.is_dir() or all(is_trace(path) for path in folder.iterdir()):
        checkpoint = None
    elif last is not None and not (folder / "run.json").exists():
        print(f"{folder} holds an interrupted run: continuing from {Path(last).name}")
        checkpoint = last
    else:
        raise UserError(
            f"{folder} is not empty: choose another --output_dir, or add --overwrite_output_dir to train into it anew"
        )
    if checkpoint or training_args.eval_strategy == "no":
        training_args.eval_on_start = False
    return checkpoint


def is_trace(path: Path) -> bool:
    """Whether this is all that a run leaves which is killed before its first checkpoint is complete."""
    return path.name in TRACES or path.name.startswith("checkpoint-") and not has_state(path)


def has_state(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError):  # or not to its end
        return False
    return True


def is_complete(checkpoint: Path) -> bool:
    """Whether training can continue from it exactly: transformers would resume without an optimizer state, wrongly."""
    if not has_state(checkpoint):
        return False
    sharded = (checkpoint / "latest").exists() or list(checkpoint.glob("optimizer_*"))  # DeepSpeed, FSDP
    single = all((checkpoint / name).exists() for name in ("optimizer.pt", "scheduler.pt"))
    return bool((sharded or single) and list(checkpoint.glob("rng_state*.pth")))


def begin(arguments, checkpoint: str | None) -> None:
    """Write a run's arguments down at its start; where it is resumed, they must be the same.

    Raises:
        UserError: for one that changed: the rest of the run would follow it only in part, and its record not at all.
    """
    training_args = arguments[1]
    path = Path(training_args.output_dir) / STARTED
    now = {k: v for parsed in arguments for k, v in settings(parsed).items() if not k.startswith(MAY_CHANGE)}
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    now["rows a step"] = batch * training_args.world_size
    now = json.loads(json.dumps(now, default=str))
    earlier = Path(checkpoint).parent / STARTED if checkpoint else path
    if checkpoint and earlier.exists():
        before = json.loads(earlier.read_text())
        if changed := sorted(name for name in before | now if before.get(name) != now.get(name)):
            lines = [
                f"  {name}: {before.get(name, 'left out')}, and now {now.get(name, 'left out')}" for name in changed
            ]
            raise UserError(
                f"{earlier.parent} was started with other arguments:\n" + "\n".join(lines) + "\n"
                "  resume it with the same, or add --overwrite_output_dir to train anew"
            )
    if training_args.process_index == 0 and not (checkpoint and path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n")


def plan(trainer, data) -> str:
    """What a run is about to do, in two lines."""
    args, counts = trainer.args, data["tokenized"]
    parameters = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trained, total = sum(n for n, trains in parameters if trains), sum(n for n, _ in parameters)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    work = getattr(trainer, "work", f"{epochs} of {batch} rows a step")
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in counts["dropped"].items())
    rows = f"{counts['kept']} rows"
    rows += f" in {counts['examples']} examples" if counts["examples"] != counts["kept"] else ""
    return (
        f"train: {rows}, {counts['tokens']} tokens, {counts['shortened']} shortened{dropped}\n"
        f"plan: {work}, {trained:,} of {total:,} parameters trained,"
        f" lr {args.learning_rate:g}"
    )


def model_card(name: str, run: dict, dataset_names: str) -> str:
    """A README.md for the folder: what the hub shows of it."""
    metrics = "\n".join(
        f"| {key} | {run['metrics']['first'][key]:.4g} | {value:.4g} |"
        for key, value in sorted(run["metrics"]["last"].items())  # a resumed run has them in another order
        if key.startswith("eval_") and isinstance(value, float) and not key.endswith(("runtime", "per_second"))
    )
    return f"""---
base_model: {run["base_model"]}
library_name: peft
tags: [trl, {run["script"].removesuffix(".py")}]
---

# {name}

Made by `{run["script"]}` from `{run["parent"]}` on `{dataset_names}`; `run.json` has all arguments, versions and data.

| held-out metric | first | last |
|---|---|---|
{metrics}
"""


def finish(trainer, arguments, data, then: list[str]) -> None:
    """Model card and `run.json` (its presence says that the run is complete), the hub if asked for, and what to type
    next.

    Args:
        arguments: the script's dataclasses.
        data: the report of what was trained on.
        then: arguments of `accelerate launch` for the next stage, or whole commands that start with `python`.
    """
    script_args, training_args, model_args = arguments
    if not trainer.is_world_process_zero():
        return
    folder = Path(training_args.output_dir)
    first, last = {}, {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            first.setdefault(key, value)
            last[key] = value
    parent = model_args.model_name_or_path
    base, adapters = resolve_adapters(parent)
    revision = base_revision(adapters[-1]) if adapters else model_args.model_revision
    weights = find_weights(base, revision)
    run = {
        "script": Path(sys.argv[0]).name,
        "arguments": {k: v for parsed in arguments for k, v in settings(parsed).items()},
        "parent": parent,
        "parent_sha256": weights_sha256(parent) if adapters else None,
        "base_model": base,
        "base_revision": weights.name if weights and not Path(base).is_dir() else None,  # of the hub: its commit
        "base_sha256": weights_sha256(base, revision),
        "tokenizer_sha256": tokenizer_sha256(trainer.processing_class),
        "data": data,
        "metrics": {"first": first, "last": last},
        "saved_checkpoint": trainer.state.best_model_checkpoint if training_args.load_best_model_at_end else None,
        "versions": {package: version(package) for package in PACKAGES},
    }
    (folder / "README.md").write_text(model_card(folder.name, run, script_args.dataset_names))
    path = folder / "run.json"
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(run, indent=2, default=str) + "\n")
    unfinished.replace(path)  # last: the run is complete
    shown = ("loss", "accuracy", "margins", "rouge_avg")
    for key in (key for key in first if key.startswith("eval_") and key.endswith(shown)):
        print(f"{key}: {first[key]:.4f} -> {last[key]:.4f}")
    if run["saved_checkpoint"]:
        best = f"{training_args.metric_for_best_model} {trainer.state.best_metric:.4f}"
        print(f"the best is saved: {Path(run['saved_checkpoint']).name}, {best}")
    print(f"saved in {folder}; next:")
    for command in then:
        print(f"  {command}" if command.startswith("python") else f"  accelerate launch {command}")
    if training_args.push_to_hub:
        trainer.push_to_hub()
