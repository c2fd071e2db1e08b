"""What can be said of flags and their values before a library is imported."""

import importlib.util
import json
import math
import re
from pathlib import Path

from rlhf.processes import launched
from rlhf.runs import flags as table
from rlhf.runs.renamed import NO_SUCH, RENAMED
from rlhf.user_error import UserError, check_folder, missing_path, nearest

TRUTH = dict.fromkeys("true yes on t y 1".split(), True) | dict.fromkeys("false no off f n 0".split(), False)


def unknown(name: str, flags: dict, others: dict) -> str:
    """What is said of a name that is no flag of this script."""
    if name in RENAMED:
        text = RENAMED[name]
        targets = re.findall(r"--(\w+)", text)
        elsewhere = not targets or any(target in flags for target in targets) or others.get(targets[0])
        return f"today's is {text}" + (f", a flag of {_scripts(elsewhere)}" if isinstance(elsewhere, list) else "")
    if name in NO_SUCH:
        return f"there is none: {NO_SUCH[name]}"
    if name in others:
        return f"it is a flag of {_scripts(others[name])}"
    near = nearest(name.lower().replace("-", "_"), flags)
    return f"did you mean {near}?" if near else "--help_all lists all flags"


def _scripts(names: list[str]) -> str:
    return " and ".join(f"{name}.py" for name in dict.fromkeys(names))


def convert(flag: dict, given, where: str):
    """The value of a flag from its texts (or a YAML file's list, dict or None).

    Raises:
        UserError: for a value of the wrong type, not among the choices, or out of range.
    """
    name, kind, many = flag["name"], flag.get("kind", "str"), flag.get("list")
    if given is None or (given == ["none"] and kind != "str" and flag.get("optional")):
        if not flag.get("optional"):
            raise UserError(f"{where}: it has no value; leave it out to take the default")
        return None
    if isinstance(given, dict):
        if kind != "json":
            raise UserError(f"{where}: expected a value, not a section; our files are flat: `flag: value` lines")
        return given
    texts = list(given) if isinstance(given, list) else [given]
    if any(not isinstance(text, str) for text in texts):
        raise UserError(f"{where}: expected plain values in the list")
    if name in table.COMMAS and texts:
        texts = [",".join(texts)]
    if many == "several":  # a file's name is no item of such a list
        texts = [part for text in texts for part in text.split(",") if part]
    if kind == "bool" and not texts:
        return True
    if not texts or ("" in texts and kind != "str"):
        raise UserError(f"{where}: expected a value")
    if len(texts) > 1 and not many:
        raise UserError(f"{where}: expected one value, not {len(texts)}: {' '.join(texts)[:80]}")
    values = [_one(flag, kind, text, where) for text in texts]
    return values if many == "several" or len(values) > 1 else values[0]


def _one(flag: dict, kind: str, text: str, where: str):
    name, choices = flag["name"], flag.get("choices") or table.CHOICES.get(flag["name"])
    try:
        if kind == "bool":
            value = TRUTH[text.lower()]
        elif kind == "json" and name in table.FILES and not text.startswith("{"):
            json.loads(Path(text).read_text())
            value = text
        elif kind == "json":
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("JSON, but no object")
        else:
            value = {"int": int, "float": float}.get(kind, str)(text)
    except OSError as error:
        raise UserError(f"{where} {text[:100]}: {error.strerror.lower()}") from error
    except (ValueError, KeyError) as error:
        wants = {"json": "give JSON, as in '{\"num_cycles\": 2}'", "bool": "give true or false"}.get(kind, "")
        raise UserError(f"{where}: invalid {kind} value: {text[:80]!r}" + (f"; {wants}" if wants else "")) from error
    if choices and value not in choices:
        near = nearest(str(value), [str(choice) for choice in choices])
        known = f"did you mean {near}?" if near else f"choose from {', '.join(map(str, choices))}"
        known = known if len(known) < 220 else known[:215] + "..."
        raise UserError(f"{where}: invalid choice: {text[:60]!r} ({known})")
    if kind in ("int", "float"):
        in_range(name, value, where)
    return value


def in_range(name: str, value: float, where: str) -> None:
    """Raises a UserError for a number that is not finite, or not within the ends that the table gives."""
    if not math.isfinite(value):
        raise UserError(f"{where} {value}: give a finite number")
    if name == "max_steps" and value == -1:  # unset
        return
    ends = table.RANGE_OF.get(name, "(-inf, inf)")
    low, high = (float(end) for end in ends[1:-1].split(", "))
    if not (low <= value <= high) or (value == low and ends[0] == "(") or (value == high and ends[-1] == ")"):
        least = f"at least {low:g}" if ends[0] == "[" else f"above {low:g}"
        most = "" if high == math.inf else f" and {'at most' if ends[-1] == ']' else 'below'} {high:.10g}"
        raise UserError(f"{where} must be {least}{most}, not {value:.10g}")
    if abs(value) >= 2**32:
        raise UserError(f"{where} {value:.3g} is too large")
    if name in table.SHARES and value > 1 and value != int(value):
        raise UserError(f"{where} {value:g}: below 1 it is a share of all steps, from 1 on it is whole")


def refused(script: str, name: str) -> str | None:
    """Why a flag does not apply in a script, or None."""
    for scripts, reason in table.REFUSED.get(name, {}).items():
        if script in scripts:
            return reason
    return None


def check(script: str, flags: dict, schedulers: dict, values: dict, typed: set) -> None:
    """What is wrong with the values of one command line together.

    Args:
        flags: what the script knows, defaults included.
        values: what was given.
        typed: which of them on the command line, not in a file.
    Raises:
        UserError: with the flag, and what to type.
    """
    now = {name: flag.get("default") for name, flag in flags.items()} | values
    for name, value in values.items():
        default = flags[name].get("default", False if flags[name].get("kind") == "bool" else None)
        if value == table.HARMLESS.get(name, default):
            continue
        if reason := refused(script, name):
            raise UserError(f"--{name}: {reason}")
        other, wanted = table.NEEDS.get(name, (None, ()))
        if name not in typed and other in values:
            continue  # a file's setting rests where what it needs was switched off
        if other in now and not (set(_list(now[other])) & set(wanted) if wanted else now[other]):
            needs = f"--{other} {' or '.join(wanted)}" if wanted else f"--{other}"
            raise UserError(f"--{name} needs {needs}, and does nothing without: add that, or leave it out")
    for name, pattern, package, install in table.PACKAGES:
        for value in filter(None, _list(values.get(name))):
            if re.match(pattern, str(value)) and importlib.util.find_spec(package) is None:
                raise UserError(f"--{name} {value} needs a package that is not installed\n  pip install {install}")
    for name, advice in table.REQUIRED.items():
        if name in now and not now[name]:
            raise UserError(f"--{name} is missing: {advice}")
    for problem in (*_training(script, now, values, schedulers), *_stage(script, now, values)):
        raise UserError(problem)
    for name in ("model_name_or_path", "reward_model_name_or_path", "resume_from_checkpoint"):
        missing_path(name, now.get(name))
    if Path(now["output_dir"]).resolve() == Path(now["model_name_or_path"]).resolve():
        raise UserError(f"--output_dir {now['output_dir']} is the model to start from: name another folder")
    inside = {path.name for path in Path(now["model_name_or_path"]).expanduser().glob("*config.json")}
    if "model_revision" in values and "config.json" in inside and "adapter_config.json" not in inside:
        raise UserError("--model_revision: the model is a folder, which has no revisions; leave it out")
    check_folder("--output_dir", now["output_dir"])


def _list(value) -> list:
    return value if isinstance(value, list) else [value]


def _training(script: str, now: dict, values: dict, schedulers: dict):
    """Yields what contradicts itself in any of the scripts."""
    schedule, more = now["lr_scheduler_type"], now["lr_scheduler_kwargs"] or {}
    evaluates, best = now["eval_strategy"] != "no", now["metric_for_best_model"]
    metric = f"--metric_for_best_model {'eval_<dataset>_scores' if script == table.PPO else 'eval_<dataset>_loss'}"
    if strange := sorted(set(more) - set(schedulers[schedule])):
        able = ", ".join(schedulers[schedule]) or "none"
        yield f"--lr_scheduler_kwargs: {schedule} takes no {strange[0]} (it takes: {able})"
    if schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not {"min_lr", "min_lr_rate"} & set(more):
        yield f"--lr_scheduler_type {schedule} needs --lr_scheduler_kwargs '{{\"min_lr\": 1e-6}}'"
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in more:
        yield f"--lr_scheduler_type {schedule} needs --lr_scheduler_kwargs '{{\"num_decay_steps\": 100}}'"
    if schedule in ("reduce_lr_on_plateau", "greedy") and not (evaluates and best):
        yield f"--lr_scheduler_type {schedule} follows an evaluation: give {metric}, and not --eval_strategy no"
    multiple = now.get("pad_to_multiple_of")
    if multiple not in (None, "auto") and not (str(multiple).isdigit() and int(multiple)):
        yield f"--pad_to_multiple_of must be auto or a whole number from 1 on, not {multiple}"
    if now["load_best_model_at_end"] and not evaluates:
        yield "--load_best_model_at_end: nothing is best with --eval_strategy no"
    if now["load_best_model_at_end"] and not best:
        yield f"--load_best_model_at_end: the best model is told by an evaluation: give {metric}"
    if now["early_stopping_patience"] and not best:
        yield f"--early_stopping_patience needs {metric}: by it better is told from worse"
    if now["early_stopping_patience"] and not evaluates:
        yield "--early_stopping_patience: nothing is better or worse with --eval_strategy no"
    if now["save_strategy"] == "best" and not (evaluates and best):
        yield f"the best model is told by an evaluation: give {metric}, and not --eval_strategy no"
    if values.get("eval_on_start") and not evaluates:
        yield "--eval_on_start with --eval_strategy no: leave one out"
    if now["load_in_4bit"] and now["load_in_8bit"]:
        yield "--load_in_4bit and --load_in_8bit: weights in 8 bit and 4 bit at once; leave one out"
    if (now["load_in_4bit"] or now["load_in_8bit"]) and not now["use_peft"]:
        yield "--no_use_peft: quantised weights cannot be trained; leave out --load_in_4bit or --load_in_8bit"
    if now["lora_target_parameters"] and (now["lora_dropout"] or now["use_dora"]):
        yield "--lora_target_parameters: PEFT's LoRA on parameters needs --lora_dropout 0, and no --use_dora"
    if now["bf16"] and now["fp16"]:
        yield "--bf16 and --fp16: leave one out"
    if now["optim_target_modules"] and not re.match("galore|apollo", now["optim"]):
        yield "--optim_target_modules: galore's and apollo's optimizers use it; leave it out"
    if re.match("galore|apollo", now["optim"]) and not now["optim_target_modules"]:
        yield f"--optim {now['optim']} needs --optim_target_modules, such as all-linear"
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if strange := sorted(set(now[name] or ()) - table.CHECKPOINTING):
            yield f"--{name}: there is no {strange[0]} (there is: {', '.join(sorted(table.CHECKPOINTING))})"
    if now["ddp_backend"] and launched() < 2:
        yield "--ddp_backend: it is how processes talk, and this is one; leave it out"
    if now["fsdp"] and launched() < 2:
        yield "--fsdp: it shares weights among processes, and this is one: accelerate launch --multi_gpu"
    if now["train_sampling_strategy"] == "batch_rebalance" and script != table.SFT:
        yield "--train_sampling_strategy batch_rebalance: SFT alone has it here; group_by_length is near"


def _stage(script: str, now: dict, values: dict):
    """Yields what contradicts itself in one of them."""
    smooth, losses = now.get("label_smoothing"), _list(now.get("loss_type"))
    if script == table.SFT:
        for name in ("packing", "eval_packing", "padding_free"):
            if now[name] and "flash" not in (now["attn_implementation"] or ""):
                yield f"--{name} keeps rows apart only with --attn_implementation flash_attention_2: leave it out"
        if now["loss_type"] == "chunked_nll":
            yield "--loss_type chunked_nll: it does not fit rows that are tokenised; nll gives the same loss"
    if script == table.REWARD and "score" in _list(now["lora_target_modules"]):
        yield "--lora_target_modules score: the head is trained whole; leave it out"
    if script == table.DPO:
        if any(weight <= 0 for weight in now["loss_weights"] or ()):
            yield f"--loss_weights must be above 0, not {min(now['loss_weights']):g}"
        if now["loss_weights"] and len(now["loss_weights"]) != len(losses):
            yield f"--loss_weights: {len(now['loss_weights'])} weights for {len(losses)} losses"
        if "exo_pair" in losses and not smooth:
            yield "--loss_type exo_pair needs --label_smoothing, such as 1e-3"
        if now["f_divergence_type"] != "reverse_kl" and not set(losses) <= set(table.OF_DIFFERENCE):
            yield f"--f_divergence_type {now['f_divergence_type']} fits --loss_type {', '.join(table.OF_DIFFERENCE)}"
        if now["use_weighting"] and {"aot", "aot_unpaired"} & set(losses):
            yield "--use_weighting does not fit --loss_type aot, which sorts the pairs"
        if "lm_head" in _list(now["lora_target_modules"]):
            yield "--lora_target_modules lm_head: TRL's DPO reads the head's weights past a LoRA on it"
        if now["sync_ref_model"] and (now["use_peft"] or now["precompute_ref_log_probs"]):
            yield "--sync_ref_model needs --no_use_peft, and no --precompute_ref_log_probs"
    if script == table.PPO:
        for name in ("eval", "save", "logging"):
            if now[f"{name}_strategy"] == "epoch":
                yield f"--{name}_strategy epoch: PPO counts updates, see --{name}_steps"
        if now["target_kl"] is not None and now["fp16"]:
            yield "--target_kl leaves out steps, which fp16's loss scaling does not allow: --fp16 false"
        if (now["target_kl"] or 0) > 1:
            yield (
                f"--target_kl {now['target_kl']:g} ends an update whose steps went that far, which is nearly never\n"
                "  to hold the policy near its start: --adaptive_kl_target; to end updates early: --target_kl 0.05"
            )
        if "total_episodes" in values and "max_steps" in values:
            yield "--total_episodes and --max_steps both say when to stop: leave one out"
