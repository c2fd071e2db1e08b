"""What the training scripts' command lines share: the flags of ours, YAML files, what the machine has, how a mistake
ends.

Flags are TRL's and transformers' own (parsed by TRL's parser); this module makes them strict, fills in what depends on
the machine, and turns a user's mistake into `error: ...` with exit code 2.
"""

import difflib
import errno
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, fields

import torch
import yaml
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, TrlParser

from rlhf.runs.signals import Stopped, listen
from rlhf.user_error import UserError, visible

TOKENIZER = ("eos_token", "pad_token", "chat_template_path")  # TRL would change it after the data is tokenised

# Flags that other versions or systems spell otherwise, and what to type today.
RENAMED = {
    "evaluation_strategy": "--eval_strategy",
    "warmup_ratio": "--warmup_steps 0.1 (below 1 it is a share of all steps)",
    "no_cuda": "--use_cpu",
    "tokenizer_name": "nothing: the tokenizer of --model_name_or_path is used",
    "optimizer_type": "--optim",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "lora_target_module": "--lora_target_modules",
    "dataset_name": "--dataset_names",
    "max_seq_length": "--max_length",
    "kl_coeff": "--kl_coef",
    "max_new_tokens": "--response_length",
    "sft_model_path": "--model_name_or_path",
    "batch_size": "per_device_train_batch_size x gradient_accumulation_steps x processes",
    "mini_batch_size": "that batch divided by --num_mini_batches",
    "rng_seed": "--seed",
    "train_file": "--dataset_names path/to/file.jsonl",
}


@dataclass
class ScriptArguments:
    """Data and run: the flags that TRL and transformers do not have."""

    dataset_names: str = field(
        default="demo",
        metadata={
            "help": "Datasets, separated by commas: uc, hh@helpful-base, uc:0.1, ufb#20000, file.jsonl.gz, hub id."
        },
    )
    eval_dataset_names: str | None = field(
        default=None, metadata={"help": "Datasets to evaluate on; by default the test part of each of dataset_names."}
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Percent of the prompts held out where a dataset has no test split of its own."}
    )
    max_eval_samples: int | None = field(
        default=1000, metadata={"help": "At most so many evaluation rows a dataset; none for all."}
    )
    max_bad_percentage: float = field(
        default=5.0, metadata={"help": "Stop when more than this percent of a dataset's rows are unusable."}
    )
    ignore_columns: str | None = field(
        default=None, metadata={"help": "Columns to do without, separated by commas: source,messages.tool_calls."}
    )
    max_pairs_per_prompt: int = field(
        default=10, metadata={"help": "At most so many pairs of one ranking, the clearest first."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; longer ones lose their oldest turns first."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in an output_dir that has files; files of the same name are replaced."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load data and model, print what would be trained, and stop before training."}
    )

    def data_options(self, seed: int) -> dict:
        """The keyword arguments of `prepare_data.load_datasets`."""
        return {
            "eval_dataset_names": self.eval_dataset_names,
            "validation_split_percentage": self.validation_split_percentage,
            "max_eval_samples": self.max_eval_samples,
            "max_bad_percentage": self.max_bad_percentage,
            "ignore_columns": self.ignore_columns,
            "max_pairs_per_prompt": self.max_pairs_per_prompt,
            "seed": seed,
        }


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig, with LoRA on all linear layers unless `--no_use_peft`."""

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; --no_use_peft trains all weights."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers that get a LoRA."}
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is missing: give a hub id, a model folder or an adapter folder")
        super().__post_init__()
        if self.dtype in ("bfloat16", "float16") and not self.use_peft:
            raise UserError(
                f"--dtype {self.dtype} with --no_use_peft: most steps of a usual size round away in 16-bit weights\n"
                "  leave --dtype out; --bf16 computes in bfloat16 on float32 weights"
            )
        # ModelConfig unpacks a list of one, and PEFT reads a string as a regular expression for the whole module path
        if self.lora_target_modules != "all-linear" and isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]


def machine_defaults() -> tuple[dict, str]:
    """Training arguments that depend on the machine, and a sentence that says what was chosen."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        precision = "bf16" if bf16 else "fp16"
        return {"bf16": bf16, "fp16": not bf16}, f"{name}, {precision}, gradient checkpointing on"
    chosen = {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    if torch.backends.mps.is_available():
        return chosen, "Apple GPU, float32"
    return {**chosen, "use_cpu": True}, f"CPU with {torch.get_num_threads()} threads, float32"


class StageParser(TrlParser):
    """TRL's parser made strict: no abbreviations, unknown names are errors that name the nearest known one.

    `--config a.yaml b.yaml` reads the files left to right; flags win over files. Keyword arguments are the stage's own
    defaults.
    """

    def __init__(self, dataclass_types, **stage_defaults):
        super().__init__(dataclass_types, allow_abbrev=False)
        chosen, self.machine = machine_defaults()
        # held-out metrics before, during and after: a run that does not show its effect cannot be trusted
        evaluation = {"eval_strategy": "epoch", "eval_on_start": True}
        unused = self.set_defaults_with_config(**{**evaluation, **chosen, **stage_defaults})
        assert not unused, unused

    def error(self, message):
        raise UserError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))

    def parse_args_and_config(self, args=None):
        """The dataclasses, in the order given to the parser.

        Raises:
            UserError: for an unknown flag or key, a value of the wrong type, or settings that contradict each other.
        """
        args = list(sys.argv[1:] if args is None else args)
        files, flags = _split_config(args)
        given = [token for file in files for token in self._read_yaml(file)] + flags
        words = [word.lower() for part in given for word in part.split("=", 1)] + ["--"]
        best = "--load_best_model_at_end" in words and words[words.index("--load_best_model_at_end") + 1] != "false"
        if best and not {"--save_strategy", "--save_steps"} & set(words):
            given += ["--save_strategy", "best"]  # or evaluations and checkpoints would have to fall on the same steps
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                given, return_remaining_strings=True, look_for_args_file=False
            )
        except (
            ValueError,
            TypeError,
        ) as error:  # from a dataclass's __post_init__: settings that contradict each other
            raise UserError(str(error).strip()) from error
        if unknown:
            raise UserError(self._unknown(unknown[0].split("=")[0], "flag"))
        for arguments in parsed:
            for name in TOKENIZER:
                if getattr(arguments, name, None):
                    raise UserError(f"--{name}: a model keeps its tokenizer; change the tokenizer's own files instead")
            if getattr(arguments, "load_best_model_at_end", False) and arguments.eval_strategy == "no":
                raise UserError("--load_best_model_at_end: nothing is best with --eval_strategy no")
            hide_secrets(arguments)
        for tracker in (name for arguments in parsed for name in getattr(arguments, "report_to", None) or ()):
            if tracker not in get_available_reporting_integrations():
                raise UserError(f"--report_to {tracker} is not installed here, or not known\n  pip install {tracker}")
        return tuple(parsed)

    def _read_yaml(self, path):
        """A YAML file as command-line tokens, so that its values are checked just as flags are."""
        try:
            with open(path, encoding="utf-8") as file:
                settings = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--config {path}: {error}") from error
        if not isinstance(settings, dict):
            raise UserError(f"--config {path}: expected `flag: value` lines")
        for key, value in settings.items():
            if f"--{key}" not in self._option_string_actions:
                raise UserError(f"{path}: " + self._unknown(str(key), "key"))
            if value is None:
                continue
            yield f"--{key}"
            for item in value if isinstance(value, list) else [value]:
                yield json.dumps(item) if isinstance(item, (dict, bool)) else str(item)

    def _unknown(self, name, kind):
        name = name.lstrip("-")
        known = [
            option[2:] for option in self._option_string_actions if option.startswith("--") and "-" not in option[2:]
        ]
        if name in RENAMED:
            return f"unknown {kind} {name}: today's is {RENAMED[name]}"
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        return f"unknown {kind} {name}" + (f": did you mean {near[0]}?" if near else "; --help lists them all")


def _split_config(args):
    """`--config a.yaml b.yaml` or `--config=a.yaml` out of the arguments: (files, the other arguments)."""
    files, flags, taking = [], [], False
    for arg in args:
        if arg == "--config" or arg.startswith("--config="):
            taking = True
            files += arg.split("=", 1)[1:]
        elif taking and not arg.startswith("--"):
            files.append(arg)
        else:
            taking = False
            flags.append(arg)
    return files, flags


# names of flags whose values are stored and shown nowhere, and the flags so called that are no secrets
SECRET, NO_SECRET = re.compile(r"(^|_)(token|key|password|secret)$"), ("eos_token", "pad_token", "stop_token")


def is_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and name not in NO_SECRET


def settings(arguments) -> dict:
    """The arguments that are not their class's own default, for run.json."""
    values = {f.name: (getattr(arguments, f.name), f.default) for f in fields(arguments) if f.init}
    plain = (str, int, float, bool, list, dict)
    return {k: v for k, (v, default) in values.items() if v != default and isinstance(v, plain) and not is_secret(k)}


def hide_secrets(arguments) -> None:
    """A hub token goes where huggingface_hub reads it; the Trainer would store it with its arguments."""
    for f in fields(arguments):
        if is_secret(f.name) and (value := getattr(arguments, f.name, None)):
            os.environ["HF_TOKEN"] = value
            setattr(arguments, f.name, None)


def as_typed(words: list[str]) -> str:
    """The command of this process, to be typed again, without what is secret in it."""
    shown, hide = [], False
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        shown.append("..." if hide else f"--{name}=..." if "=" in word and is_secret(name) else word)
        hide = word.startswith("--") and "=" not in word and is_secret(name)
    return shlex.join(shown)


def run(main, make_parser):
    """A script's guard: parse, run, and end a mistake, a full disk or a signal in a line, with its exit code."""
    first = int(os.environ.get("RANK", 0)) == 0
    listen()
    try:
        parser = make_parser()
        parsed = parser.parse_args_and_config()
        if first:
            print(f"machine: {parser.machine}")
        main(*parsed)
        return
    except UserError as error:
        message, code = f"error: {visible(str(error))}", 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message, code = f"error: the disk is full: {error}\n  make room; the same command goes on", 2
    except SystemExit as error:  # of code that the user brought, such as a reward function
        message, code = f"error: something in the run called sys.exit({error.code}) before its end", 2
    except Stopped as stopped:
        message, code = f"{stopped}; the same command goes on from there:\n  {as_typed(sys.argv)}", stopped.code
    if first:
        print(message, file=sys.stderr)
    sys.exit(code)
