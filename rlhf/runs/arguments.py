"""The dataclasses behind a command line, once it is known to be right: TRL's, and what the machine has."""

import copy
import re
from dataclasses import dataclass, field, fields

import torch
from trl import ModelConfig

from rlhf.runs.engine import DEEPSPEED, asked, check_engine
from rlhf.user_error import UserError


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig, with LoRA on all linear layers unless `--no_use_peft`."""

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; --no_use_peft trains all weights."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers that get a LoRA."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dtype in ("bfloat16", "float16") and not self.use_peft:
            raise UserError(
                f"--dtype {self.dtype} with --no_use_peft: most steps of a usual size round away in 16-bit weights\n"
                "  leave --dtype out; --bf16 computes in bfloat16 on float32 weights"
            )
        # ModelConfig unpacks a list of one, and PEFT reads a string as a regular expression for the whole module path
        if self.lora_target_modules != "all-linear" and isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]


BY_NEED = {"gradient_checkpointing": False}  # until memory.py finds that a step would not fit


def machine_defaults(engine: str | None) -> tuple[dict, str]:
    """Training arguments that depend on the machine, and a sentence that says what was chosen.

    Args:
        engine: the one asked for; accelerate passes over DeepSpeed under `use_cpu`.
    """
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {'bf16' if bf16 else 'fp16'}"
        chosen = {"bf16": bf16, "fp16": not bf16}
        # where each device holds a part, what a step takes is not measured
        return (chosen, f"{name}, gradient checkpointing on") if engine else ({**chosen, **BY_NEED}, name)
    chosen = {"bf16": False, "dataloader_pin_memory": False, **BY_NEED}
    if torch.backends.mps.is_available():
        return chosen, "Apple GPU, float32"
    chosen |= {"ddp_backend": "gloo"} if engine == DEEPSPEED else {"use_cpu": True}
    return chosen, f"CPU with {torch.get_num_threads()} threads, float32"


def check_machine(values: dict) -> None:
    """Refuse what this machine cannot do, before a process group is built."""
    if not values.get("use_cpu"):
        return
    for name in ("fp16", "fp16_full_eval", "tf32", "activation_offloading"):
        if values.get(name):
            raise UserError(f"--{name}: there is no GPU in use here that could do it; leave it out")


def check_optimizer(args) -> None:
    """Make the optimizer's options and the schedule, as the trainer will: a mistake in them shows before a model is
    loaded."""
    from transformers import Trainer, get_scheduler

    named = f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    try:
        if not re.match("galore|apollo|lomo|adalomo", args.optim.value):  # these look at the model
            _, options = Trainer.get_optimizer_cls_and_kwargs(args)
            plain = copy.copy(args)
            plain.optim_args = None
            if args.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
                raise ValueError("this optimizer does not use them; leave them out")
        named = f"--lr_scheduler_type {args.lr_scheduler_type.value} --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, dict(args.lr_scheduler_kwargs or {}))
        for _ in range(9 if args.lr_scheduler_type.value not in ("reduce_lr_on_plateau", "greedy") else 0):
            optimizer.step()
            schedule.step()
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{named}: {str(error).splitlines()[0][:200]}") from error


def build(classes: tuple, values: dict, defaults: dict) -> tuple[tuple, str]:
    """The dataclasses of checked values, and the sentence on the machine.

    Args:
        defaults: the stage's own: over the machine's, which are over TRL's; values are over all.
    Raises:
        UserError: for what the libraries, or this machine, refuse.
    """
    chosen, machine = machine_defaults(asked(values.get("fsdp"), values.get("deepspeed")))
    said, parsed = {**defaults, **values}, []
    values = {**chosen, **said}
    check_machine(values)
    for cls in classes:
        own = {f.name: values[f.name] for f in fields(cls) if f.init and f.name in values}
        try:
            parsed.append(cls(**own))
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(str(error).strip().splitlines()[0][:280]) from error
    check_optimizer(parsed[1])
    decided = {"gradient_checkpointing", "activation_checkpointing"} & said.keys()
    parsed[1].checkpointing_by_need = not decided and not parsed[1].activation_checkpointing
    return tuple(parsed), f"{machine}; {check_engine(parsed[1])}"
