"""What runs the processes of a training: the engine asked for is the one in use, and what it saves is whole.

accelerate passes over an engine that it cannot start: FSDP where there is no accelerator, DeepSpeed under `use_cpu`.
A run that asked for one and would go on without it ends here, and so does one that asks for what is not tried.
"""

import os
import platform
from importlib.util import find_spec

from accelerate import DistributedType, PartialState
from peft import PeftModel

from rlhf.processes import exchange, launched
from rlhf.user_error import UserError

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"
LARGEST = "15 to 18B parameters in --dtype float32, 30 to 35B in bfloat16 (LoRA, 80 GB)"


def asked(fsdp, deepspeed) -> str | None:
    """The engine that the launcher's file or a flag (--fsdp, --deepspeed) asks for.

    Raises:
        UserError: for one that these scripts do not train with.
    """

    def is_on(name):
        return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes", "on", "t", "y")

    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if is_on(name):
            raise UserError(f"accelerate is asked for {name.lower()}: these scripts know DDP, FSDP2 and DeepSpeed")
    engines = [FSDP] * bool(fsdp or is_on("FSDP")) + [DEEPSPEED] * bool(deepspeed or is_on("DEEPSPEED"))
    if len(engines) == 2:
        raise UserError("FSDP and DeepSpeed are asked for together: leave one out")
    if DEEPSPEED in engines and find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is asked for and not installed\n  pip install -r requirements-extra.txt")
    return engines[0] if engines else None


def check_engine(args) -> str:
    """How the processes train together, as the line on the machine says it; asked once they are connected.

    Args:
        args: the training arguments.
    Raises:
        UserError: if that is not what was asked for, or cannot do what is to be done.
    """
    kind, engine = PartialState().distributed_type, asked(args.fsdp, args.deepspeed)
    if engine == DEEPSPEED and kind != DistributedType.DEEPSPEED:
        by_launcher = "LOCAL_RANK" in os.environ
        what = "leave use_cpu out: it takes a CPU by itself" if by_launcher else "start it with accelerate launch"
        raise UserError(f"DeepSpeed is asked for and would not be in use: {what}")
    if args.world_size != launched():
        raise UserError(
            f"{launched()} processes were started, and accelerate connects {args.world_size}\n"
            "  DeepSpeed on a CPU: accelerate launch --use_deepspeed --deepspeed_config_file FILE, without --deepspeed"
        )
    if engine == FSDP and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise UserError(
            "FSDP is asked for and would not be in use: accelerate starts it on GPUs alone, by accelerate launch\n"
            "  leave it out (--use_fsdp, --fsdp) to train by DDP; DeepSpeed shards on CPUs too"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs and would cut each batch in pieces for them\n"
            "  start it with accelerate launch, which gives each GPU a process, or show it one: CUDA_VISIBLE_DEVICES=0"
        )
    if engine == FSDP and fsdp_version(args) != 2:
        raise UserError("FSDP is asked for in its first version: add --fsdp_version 2 to accelerate launch")
    name = engine_name(args)
    if (engine == FSDP or name == "DeepSpeed ZeRO-3") and hasattr(args, "response_length"):
        raise UserError(
            f"PPO needs whole weights on each device, and {name.split(',')[0]} keeps parts: by DDP or ZeRO-2 it goes "
            f"up to {LARGEST}; beyond that, OpenRLHF or verl"
        )
    if args.world_size == 1:
        return ", ".join(filter(None, ("one process", name)))
    machines = len(set(exchange(platform.node())))
    return f"{args.world_size} processes on {machines} machine{'s' * (machines > 1)}, {name or 'DDP'}"


def fsdp_version(args) -> int:
    return (args.fsdp_plugin_args or {}).get("fsdp_version") or int(os.environ.get("FSDP_VERSION", 1))


def engine_name(args) -> str | None:
    """What tells one engine's checkpoints from another's; None for DDP and for a process alone."""
    engine = asked(args.fsdp, args.deepspeed)
    if engine == FSDP:
        kind = (args.fsdp_plugin_args or {}).get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", "")
        return f"FSDP2, {'full' if 'FULL' in str(kind) else 'sharded'} state"
    return f"DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}" if engine else None


def deepspeed_config(trainer):
    """Its settings, those that are `auto` with the flags' values; None without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin and plugin.hf_ds_config


class Engine:
    """Mixin for a `transformers.Trainer`: what was asked for is in use, and what is saved is whole.

    Its own checkpoints are the engine's; the weights that it saves beside them, and at the end, any tool loads.
    """

    def __init__(self, *args, **kwargs):
        engine = asked(kwargs["args"].fsdp, kwargs["args"].deepspeed)
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:  # what transformers refuses to do by an engine
            if engine is None:
                raise
            raise UserError(f"{engine}: {str(error).splitlines()[0][:250]}") from error
        in_use = {FSDP: self.is_fsdp_enabled, DEEPSPEED: self.is_deepspeed_enabled}
        if any(active != (name == engine) for name, active in in_use.items()):
            raise UserError(f"{engine or 'DDP'} is asked for and is not in use: accelerate started another engine")
        loading = self.accelerator.dataloader_config
        otherwise = loading.split_batches or loading.dispatch_batches or not loading.even_batches
        if self.args.world_size > 1 and otherwise:
            raise UserError("--accelerator_config: split_, dispatch_ and even_batches do not fit several processes")
        if wrong := self.is_deepspeed_enabled and deepspeed_config(self).mismatches:
            raise UserError(f"DeepSpeed's file and the flags differ: {wrong[0].strip('- ')}\n  write auto in the file")

    def save_model(self, output_dir=None, _internal_call=False):
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        if _internal_call and "sharded" in (engine_name(self.args) or "") and not isinstance(self.model, PeftModel):
            return  # a checkpoint in shards is asked for where a whole one is too large to be gathered often
        state = self.whole_state()
        self._save(output_dir or self.args.output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def whole_state(self) -> dict:
        """The trained weights, whole, and the buffers that are saved with them; on the process that saves."""
        model = self.accelerator.unwrap_model(self.model)
        stored = model.state_dict().keys()
        state = {name: buffer for name, buffer in model.named_buffers() if name in stored}
        for name, weight in self.weights():  # all processes: each holds a part
            if self.args.should_save:
                state[name] = weight.cpu()
        return state
