"""The training scripts' command lines: flags and YAML files, read and checked before a library is imported.

What flags there are is in flags.json (description.py makes it of the libraries), what each does here in flags.py. A
user's mistake ends as `error: ...` with exit code 2.
"""

import errno
import os
import pkgutil
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass, field, fields

from rlhf import processes
from rlhf.runs import description
from rlhf.runs.checks import check, convert, refused, unknown
from rlhf.runs.flags import COMMON
from rlhf.runs.renamed import NO_SUCH, RENAMED
from rlhf.runs.signals import Stopped, ended, listen
from rlhf.runs.yaml_files import read_yaml
from rlhf.user_error import UserError, end_quietly

NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)")


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
    max_pairs_per_prompt: int | None = field(
        default=None,
        metadata={"help": "At most so many pairs of one prompt, drawn by --seed (all, but 10 of one ranking)."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; longer ones lose their oldest turns first."}
    )
    pad_rows: bool = field(
        default=False,
        metadata={"help": "Pad rows to a batch's longest and compute as plain TRL does, to the last digit; slower."},
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System turn of rows that have none; the model keeps it for all later stages."},
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after so many evaluations without a better --metric_for_best_model; 0 for never."},
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

    def token_options(self, training_args) -> dict:
        """The keyword arguments of `tokenize_all` that every stage has, but for its limits."""
        return {
            "max_bad_percentage": self.max_bad_percentage,
            "evaluate": training_args.eval_strategy != "no",
            "num_proc": training_args.dataset_num_proc,
        }


class StageParser:
    """The flags of one training script: TRL's own, unabridged, and ours beside them.

    `--config a.yaml b.yaml` reads the files left to right; flags win over files.

    Args:
        script: its name in flags.json.
        script_class: the dataclass of the script's own flags.
        training: where the training arguments' class is, as in `trl:SFTConfig`; imported when all flags are right.
        check_names: given --dataset_names, --eval_dataset_names and --ignore_columns, says what is wrong with them.
        stage_defaults: the stage's own defaults.
    """

    machine = ""

    def __init__(self, script: str, script_class, training: str, check_names, **stage_defaults):
        self.script, self.script_class, self.training, self.check_names = script, script_class, training, check_names
        # held-out metrics before, during and after: a run that does not show its effect cannot be trusted
        self.stage_defaults = {"eval_strategy": "epoch", "eval_on_start": True, **stage_defaults}

    def classes(self) -> tuple:
        """The script's, the training arguments' and the model's."""
        from rlhf.runs.arguments import ModelArguments

        return self.script_class, pkgutil.resolve_name(self.training), ModelArguments

    def parse_args_and_config(self, args=None) -> tuple:
        """The dataclasses, in the order of `classes`.

        Raises:
            UserError: for an unknown flag or key, a value of the wrong type or out of range, settings that contradict
                each other, a file or dataset that is not there.
        """
        values = self.read(list(sys.argv[1:] if args is None else args))
        processes.join(values.get("ddp_timeout", processes.TIMEOUT))
        processes.check_common(values)
        from rlhf.runs.arguments import build

        parsed, self.machine = build(self.classes(), values, self.stage_defaults)
        for arguments in parsed:
            hide_secrets(arguments)
        return parsed

    def read(self, args: list[str]) -> dict:
        """{flag: value} of what was given; no library is imported for it."""
        self.flags, self.others, self.schedulers = description.read(self.script)
        self.flags |= {name: {**self.flags[name], "default": value} for name, value in self.stage_defaults.items()}
        self.aliases = {alias: name for name, flag in self.flags.items() for alias in flag.get("aliases", ())}
        given, values, typed, mistakes = split(args), {}, set(), []

        def take(*flag) -> dict:
            try:
                return self.one(*flag)
            except UserError as mistake:  # all of them are said at once: another system's file has a dozen
                mistakes.append(str(mistake))
                return {}

        if {"help", "help_all", "h"} & {name for name, _ in given}:
            end_quietly()
            print(self.help(everything=any(name == "help_all" for name, _ in given)))
            sys.exit(0)
        for name, paths in given:
            if name == "config" and not paths:
                raise UserError("--config: name one or more YAML files")
            for path in paths if name == "config" else ():
                for key, value, where in read_yaml(path):
                    values |= take(key, value, f"{where}: {key}", f"{where}: unknown key")
        for name, texts in given:
            if name != "config":
                values |= (found := take(name, texts, f"--{name}", "unknown flag"))
                typed |= found.keys()
        if mistakes:
            more = [f"and {len(mistakes) - 20} more"] if len(mistakes) > 20 else []
            raise UserError("\n".join([*mistakes[:20], *more]))
        if (folder := values.get("output_dir")) and folder.strip("/"):
            values["output_dir"] = folder.rstrip("/")  # or the next stage's folder, named after it, would lie inside
        if values.get("load_best_model_at_end") and not {"save_strategy", "save_steps"} & set(values):
            values["save_strategy"] = "best"  # or evaluations and checkpoints would have to fall on the same steps
        check(self.script, self.flags, self.schedulers, values, typed)
        names = values.get("dataset_names", self.flags["dataset_names"]["default"])
        self.check_names(names, values.get("eval_dataset_names"), values.get("ignore_columns"))
        return values

    def one(self, name: str, given, where: str, strange: str) -> dict:
        """{flag: value} of one flag or key."""
        key = name.replace("-", "_")
        key = self.aliases.get(key, key)
        positive = key.removeprefix("no_")
        if key not in self.flags and self.flags.get(positive, {}).get("no"):
            return {positive: not convert({**self.flags[positive], "name": key}, given, where)}
        if key not in self.flags:
            section, known = isinstance(given, dict), key in RENAMED or key in NO_SUCH
            flat = "our files are flat, without sections"
            says = flat if section and not known else unknown(key, self.flags, self.others)
            raise UserError(f"{strange} {name[:60]}: {says}{self.inside(given) if section else ''}")
        return {key: convert(self.flags[key], given, where)}

    def inside(self, section: dict) -> str:
        """What of the keys in a section a flat file would have."""
        names = [f"{key} -> {RENAMED.get(key, key)}" for key in section if key in RENAMED or key in self.flags]
        names += [f"{key} -> none" for key in section if key in NO_SUCH]
        return "".join(f"\n  {line}" for line in textwrap.wrap("; ".join(names), 78))

    def help(self, everything: bool) -> str:
        """Ours first, then what people use, then, if asked for, all the others and those that are refused."""
        shown = {name: flag for name, flag in self.flags.items() if refused(self.script, name) is None}
        ours = {name: flag for name, flag in shown.items() if flag.get("ours") and name not in COMMON}
        common = {name: shown[name] for name in COMMON if name in shown}
        rest = {name: flag for name, flag in shown.items() if name not in ours and name not in common}
        lines = [f"accelerate launch {self.script}.py [--config FILE.yaml ...] [--flag value ...]", ""]
        for title, group in (("flags of ours", ours), ("flags that most runs use", common), ("all others", rest)):
            if group is not rest or everything:
                lines += [f"{title}:", *(line for name in group for line in entry(group[name])), ""]
        if not everything:
            return "\n".join([*lines, f"--help_all shows {len(rest)} more: TRL's and transformers' own."])
        lines.append("known to TRL or transformers, but refused here:")
        for name in (name for name in self.flags if name not in shown):
            lines += textwrap.wrap(f"--{name}: {refused(self.script, name)}", 80, initial_indent="  ",
                                   subsequent_indent="      ")  # fmt: skip
        return "\n".join(lines)


def entry(flag: dict) -> list[str]:
    """A flag's lines in the help: its name and kind, then what it does and its default."""
    choices, kind = flag.get("choices", ()), flag.get("kind", "text")
    kind = "|".join(choices) if 1 <= len(choices) <= 6 else kind
    default = flag.get("default", False if kind == "bool" and not flag.get("optional") else None)
    default = " ".join(map(str, default)) if isinstance(default, list) else default
    text = f"{flag.get('help', '')} ({default})" if default not in (None, "") else flag.get("help", "")
    head = f"  --{flag['name']} {kind}" + (" ..." if flag.get("list") == "several" else "")
    return [head, *textwrap.wrap(text, 80, initial_indent="      ", subsequent_indent="      ")]


def split(args: list[str]) -> list[tuple[str, list[str]]]:
    """[(flag, its words)] of a command line, in its order; a negative number is a word."""
    given = []
    for arg in args:
        if arg.startswith("-") and len(arg) > 1 and not NEGATIVE.match(arg):
            name, equals, value = arg.partition("=")
            given.append((name.lstrip("-"), [value] if equals else []))
        elif not given:
            raise UserError(f"{arg[:100]}: a value follows its flag, as in --output_dir saved/first")
        else:
            given[-1][1].append(arg)
    return given


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
    listen()
    try:
        parser = make_parser()
        parsed = parser.parse_args_and_config()
        if processes.local_rank() == 0:
            print(f"machine: {parser.machine}")
        try:
            main(*parsed)
        except SystemExit as error:  # of code that the user brought, such as a reward function
            raise UserError(f"something in the run called sys.exit({error.code}) before its end") from error
    except UserError as error:
        ended()
        sys.exit(processes.tell(error))
    except Stopped as stopped:
        ended()
        if problem := processes.elsewhere():  # for which the launcher ends this process too
            sys.exit(processes.tell(problem))
        if processes.local_rank() == 0:
            print(f"{stopped}; the same command goes on from there:\n  {as_typed(sys.argv)}", file=sys.stderr)
        processes.announce(str(stopped), stopped.code)
        processes.leave()
        sys.exit(stopped.code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(processes.tell(UserError(f"the disk is full: {error}\n  make room; the same command goes on")))
        processes.end_if_lost(error)  # else it is a crash, which is raised; the others need not wait for this process
        processes.announce(f"{type(error).__name__}: {error}", code=1)
        raise
