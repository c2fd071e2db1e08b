"""What a run's result depends on: written down at its start, compared when it is resumed."""

import hashlib
import json
import uuid
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa

from rlhf.models.fingerprints import configs_sha256, tokenizer_sha256, weights_sha256
from rlhf.models.loading import base_revision, resolve_adapters
from rlhf.runs.checkpoints import read_whole, write_whole
from rlhf.runs.command_line import settings
from rlhf.runs.engine import deepspeed_config, engine_name
from rlhf.runs.flags import LOOKS
from rlhf.user_error import UserError

STARTED, PROCESSES = "started.json", "number of processes"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
OF_DEEPSPEED = ("optimizer", "scheduler", "gradient_clipping", "bf16.enabled", "fp16.enabled")  # decide the numbers
MAY_CHANGE = (  # how the names of arguments begin that do not bear on what is learned
    *LOOKS, "activation_", "ddp_", "do_eval", "dry_run", "early_stopping", "eval_", "generate_eval",
    "gradient_accumulation", "gradient_checkpointing", "load_best", "local_rollout", "max_eval", "metric_for",
    "num_sample", "output_dir", "overwrite", "per_device_", "resume_from", "use_cpu",
)  # fmt: skip


def rows_sha256(rows) -> str:
    """The hash of a dataset's rows in their order, however they lie in memory."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        table = table.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def sources_of(model_args) -> tuple[str, list[str], str]:
    """The base of the model that a run starts from, the adapters on it, and the base's revision."""
    base, adapters = resolve_adapters(model_args.model_name_or_path)
    return base, adapters, base_revision(adapters[-1]) if adapters else model_args.model_revision


def identity_of(trainer, arguments, reward=None) -> dict:
    """All that decides a run's result: {name of the part: what it is, JSON-able}."""
    _, training_args, model_args = arguments
    base, adapters, revision = sources_of(model_args)
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    held_out, config = trainer.eval_dataset or {}, deepspeed_config(trainer)
    parts = {k: v for parsed in arguments for k, v in settings(parsed).items() if not k.startswith(MAY_CHANGE)}
    parts |= {
        "rows a step": batch * training_args.world_size,
        PROCESSES: training_args.world_size,
        "training rows": rows_sha256(trainer.train_dataset),
        "held-out rows": {name: rows_sha256(rows) for name, rows in held_out.items()},
        "base model": base,
        "base weights": weights_sha256(base, revision),
        "base config": configs_sha256(base, revision),
        "adapter it starts from": weights_sha256(adapters[0]) if adapters else None,
        "adapter config": configs_sha256(adapters[0]) if adapters else None,
        "precision": trainer.accelerator.mixed_precision,  # also where the launcher alone sets it
        "engine": engine_name(training_args),
        "settings of DeepSpeed": {name: config.get_value(name) for name in OF_DEEPSPEED} if config else None,
        "tokenizer and template": tokenizer_sha256(trainer.processing_class),
        "reward": reward.fingerprint() if reward else None,
        "critic": getattr(trainer, "critic", None),
        "versions": {package: version(package) for package in PACKAGES},
    }
    return json.loads(json.dumps(parts, default=str))


def read_started(folder: Path) -> dict | None:
    """What `start` wrote: {"run_id", "identity"}; None where there is nothing.

    Raises:
        UserError: for a file that is damaged, or an earlier version's.
    """
    started = read_whole(folder / STARTED, "run_id", "identity")
    if started == {}:
        raise UserError(
            f"{folder / STARTED} is damaged, or of an earlier version: which run this is cannot be told\n"
            "  choose another --output_dir, or add --overwrite_output_dir to start anew"
        )
    return started


def start(folder: Path, identity: dict) -> str:
    """Give a new run its id and write down what it depends on."""
    run_id = uuid.uuid4().hex
    write_whole(folder / STARTED, json.dumps({"run_id": run_id, "identity": identity}, indent=2) + "\n")
    return run_id


def check_same(folder: Path, before: dict, now: dict) -> list[str]:
    """What may have changed since a run was started, a line each: libraries, and processes that share the same rows.

    Raises:
        UserError: naming all else that changed: the rest of the run would follow it only in part.
    """
    then = before.get("versions", {})
    others = [f"{name} was {then.get(name)}, is {v}" for name, v in now["versions"].items() if then.get(name) != v]
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name) and name != "versions"]
    changed = [name for name in changed if not name.startswith(MAY_CHANGE)]  # an earlier version wrote more down
    if changed == [PROCESSES]:
        others.append(difference(PROCESSES, before[PROCESSES], now[PROCESSES]))
        changed = []
    if changed:
        raise UserError(
            f"{folder} was started with other arguments or inputs:\n  "
            + "; ".join(difference(name, before.get(name), now.get(name)) for name in changed)
            + "\n  resume it with the same, or add --overwrite_output_dir to train anew"
        )
    return others


def difference(name: str, before, now) -> str:
    """`learning_rate: 0.1, and now 0.2`; of what is known by its hash alone, that it changed."""
    shown = [str(value) if value is not None else "left out" for value in (before, now)]
    if any(len(text) > 60 for text in shown) or " " in name and name not in ("rows a step", PROCESSES):
        return f"{name} changed"
    return f"{name}: {shown[0]}, and now {shown[1]}"
