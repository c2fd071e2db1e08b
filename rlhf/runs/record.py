"""What a run says before it starts and leaves when it is complete: the plan, `run.json`, the model card."""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from rlhf.models.fingerprints import find_weights
from rlhf.models.shards import shape_of
from rlhf.models.templates import split_template
from rlhf.processes import by_first, exchange, leave
from rlhf.runs.checkpoints import write_whole
from rlhf.runs.command_line import settings
from rlhf.runs.folder import RUN
from rlhf.runs.identity import PACKAGES, sources_of
from rlhf.runs.log import error_of
from rlhf.runs.memory import checkpointing_by_need, fitted
from rlhf.runs.soundness import check_saved


def plan(trainer, data, dry_run: bool) -> str:
    """What a run is about to do, in two lines, and whether it has to save memory; for a dry run, how much it needs."""
    args, counts = trainer.args, data["tokenized"]
    parameters = [(math.prod(shape_of(p)), p.requires_grad) for p in trainer.model.parameters()]
    trained, total = sum(n for n, trains in parameters if trains), sum(n for n, _ in parameters)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    work = getattr(trainer, "work", f"{epochs} of {batch} rows a step")
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in counts["dropped"].items())
    system = split_template(trainer.processing_class.chat_template)[0]
    rows = f"{counts['kept']} rows"
    rows += f" in {counts['examples']} examples" if counts["examples"] != counts["kept"] else ""
    lines = [
        f"train: {rows}, {counts['tokens']} tokens, {counts['shortened']} shortened{dropped}",
        f"plan: {work}, {trained:,} of {total:,} parameters trained, lr {args.learning_rate:g}",
        f"system prompt of rows without one: {system[:200]!r}" if system else "",
        checkpointing_by_need(trainer),
        fitted(trainer) if dry_run else "",
    ]
    return "\n".join(filter(None, lines))


def model_card(name: str, run: dict, dataset_names: str) -> str:
    """A README.md for the folder: what the hub shows of it."""
    metrics = "\n".join(
        f"| {key} | {run['metrics']['first'][key]:.4g} | {value:.4g} |"
        for key, value in sorted(run["metrics"]["last"].items())  # a resumed run has them in another order
        if key.startswith("eval_") and isinstance(value, float) and not key.endswith(("runtime", "per_second"))
    )
    return f"""---
base_model: {shown(run["base_model"])}
library_name: {"peft" if run["arguments"].get("use_peft", True) else "transformers"}
tags: [trl, {run["script"].removesuffix(".py")}]
---

# {name}

Made by `{run["script"]}` from `{shown(run["parent"])}` on `{dataset_names}`.
All arguments, versions and data are in `run.json`.

| held-out metric | first | last |
|---|---|---|
{metrics}
"""


def shown(name: str) -> str:
    """A model's name as the card has it: no path of the machine that it was made on."""
    return Path(name).name if Path(name).is_absolute() else name


def finish(trainer, arguments, data, then: list[str]) -> None:
    """Model card and `run.json` (its presence says that the run is complete), the hub if asked for, and what to type
    next.

    Args:
        arguments: the script's dataclasses.
        data: the report of what was trained on.
        then: arguments of `accelerate launch` for the next stage, or whole commands that start with `python`.
    Raises:
        UserError: if the folder does not hold what was trained.
    """
    sums, folder = trainer.sums(), Path(arguments[1].output_dir)  # each process holds a part of what is summed
    by_first(lambda: check_saved(trainer, sums, folder))
    if trainer.is_world_process_zero():
        leave_record(trainer, arguments, data, then)
    exchange("finished")  # a process that ends while others still talk to it may abort, with its own exit code
    leave()
    PartialState().destroy_process_group()


def leave_record(trainer, arguments, data, then: list[str]) -> None:
    """What `finish` promises, by the first process."""
    script_args, training_args, model_args = arguments
    folder = Path(training_args.output_dir)
    first, last = {}, {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            first.setdefault(key, value)
            last[key] = value
    base, _, revision = sources_of(model_args)
    weights = find_weights(base, revision)
    run = {
        "script": Path(sys.argv[0]).name,
        "arguments": {k: v for parsed in arguments for k, v in settings(parsed).items()},
        "parent": model_args.model_name_or_path,
        "run_id": trainer.run_id,
        "parent_sha256": trainer.identity["adapter it starts from"],
        "base_model": base,
        "base_revision": weights.name if weights and not Path(base).is_dir() else None,  # of the hub: its commit
        "base_sha256": trainer.identity["base weights"],
        "tokenizer_sha256": trainer.identity["tokenizer and template"],
        "system_prompt": split_template(trainer.processing_class.chat_template)[0],
        "data": data,
        "metrics": {"first": first, "last": last},
        "saved_checkpoint": trainer.state.best_model_checkpoint if training_args.load_best_model_at_end else None,
        "versions": {package: version(package) for package in PACKAGES},
    }
    (folder / "README.md").write_text(model_card(folder.name, run, script_args.dataset_names))
    write_whole(folder / RUN, json.dumps(run, indent=2, default=str) + "\n")  # last: the run is complete
    trainer.lock.release()
    curves = ("loss", "accuracy", "margins", "rouge_avg")
    for key in (key for key in first if key.startswith("eval_") and key.endswith(curves)):
        print(f"{key}: {first[key]:.4f} -> {last[key]:.4f}{error_of(last, key)}")
    if run["saved_checkpoint"]:
        metric, best = training_args.metric_for_best_model, trainer.state.best_metric
        print(f"the best is saved: {Path(run['saved_checkpoint']).name}, {metric} {best:.4f}")
        start = first.get(f"eval_{metric.removeprefix('eval_')}", best)
        if start > best if training_args.greater_is_better else start < best:
            print(f"but the model that it started from was better: {start:.4f}; a lower --learning_rate may help")
    print(f"saved in {folder}{'; next:' if then else ''}")
    for command in then:
        print(f"  {command}" if command.startswith("python") else f"  accelerate launch {command}")
    if training_args.push_to_hub:
        trainer.push_to_hub()
