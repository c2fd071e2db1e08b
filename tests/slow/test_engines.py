"""Engines of several processes, as far as a CPU has them: `make test-engines`, a quarter of an hour, with a table.

Two processes train by FSDP2 and by DeepSpeed what two train by DDP, to the same weights; killed, they go on from
checkpoints of their own as if nothing had happened; and what they leave is merged like any other.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from rlhf.runs.command_line import run
from tests.conftest import QUICK, run_script

STAGES = {"sft": "sft_training", "reward": "reward_modeling", "dpo": "dpo_training", "ppo": "ppo_training"}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ENGINES = {  # what accelerate launch puts into the environment
    "ddp": {},
    "fsdp2_full": FSDP | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "fsdp2_sharded": FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
CASES = [(s, m, e) for s in ("sft", "reward", "dpo") for m in ("lora", "full") for e in list(ENGINES)[1:]]
CASES += [("ppo", "lora", "zero2"), ("ppo", "full", "zero2")]
FLAGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,  # or the first steps are the gradients' signs, also of those that are 0 but for rounding
    "validation_split_percentage": 20,
    "eval_on_start": False,
}
PPO = {"max_steps": 2, "save_steps": 1, "response_length": 8, "num_mini_batches": 2, "adaptive_kl_target": 1.0}
# each process is a fork of one that has imported all: only the work itself takes time
pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*STAGES.values(), "rlhf.runs.trainers", "rlhf.ppo.trainer", "tests.conftest"])


def tell_accelerate() -> None:
    """It starts FSDP on accelerators alone, though torch's FSDP2 runs on a CPU: told that ours is one."""
    from accelerate import DistributedType, PartialState

    init = PartialState.__init__

    def start(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start


def kill_at(step: int) -> None:
    from transformers import Trainer

    train = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, *args, **kwargs)

    Trainer.training_step = training_step


def process(rank, port, engine, stage, folder, flags, killed):
    """One of a run's processes, as its command starts it."""
    sys.stdout = sys.stderr = open(f"{folder}.{rank}.out", "a", buffering=1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= ENGINES[engine]
    if engine.startswith("fsdp"):
        tell_accelerate()
    if killed is not None:
        kill_at(killed)
    module = importlib.import_module(STAGES[stage])
    given = {**FLAGS, **flags, "output_dir": folder}
    words = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    sys.argv = [f"{STAGES[stage]}.py", *QUICK.split(), *words]
    run(module.main, module.make_parser)


def launch(engine, stage, folder, flags, killed=None) -> list[int]:
    """The exit codes of a run of two processes; what they print is in <folder>.0.out and .1.out."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's, as torchrun has it
    both = [
        CONTEXT.Process(target=process, args=(rank, store.port, engine, stage, folder, flags, killed))
        for rank in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join(300)
        one.kill()
    return [one.exitcode for one in both]


def train(engine, stage, folder, flags) -> Path:
    codes = launch(engine, stage, folder, flags)
    assert codes == [0, 0], Path(f"{folder}.0.out").read_text()[-3000:] + Path(f"{folder}.1.out").read_text()[-3000:]
    return folder


def apart(ours, theirs) -> float:
    """The largest difference of two folders' weights."""
    ours, theirs = ({k: v for p in f.glob("*.safetensors") for k, v in load_file(p).items()} for f in (ours, theirs))
    assert ours.keys() == theirs.keys()
    return max((ours[key] - value).abs().max().item() for key, value in theirs.items())


@pytest.fixture(scope="module")
def starts(base, data, tmp_path_factory) -> dict:
    """What the stages start from: a base, and adapters that are continued."""
    root = tmp_path_factory.mktemp("starts")
    flags = {"dataset_names": data, "learning_rate": 1e-2, "eval_strategy": "no"}
    run_script("sft_training", model_name_or_path=base, output_dir=str(root / "sft"), **flags)
    run_script("reward_modeling", model_name_or_path=root / "sft", output_dir=str(root / "reward"), **flags)
    return {"base": base, "sft": str(root / "sft"), "reward": str(root / "reward")}


@pytest.fixture(scope="module")
def ddp(starts, data, tmp_path_factory):
    """By stage and mode: the flags, and the folder of the run by DDP."""
    made, root = {}, tmp_path_factory.mktemp("ddp")

    def get(stage, mode):
        if (stage, mode) not in made:
            model = starts["base" if stage == "sft" or mode == "full" else "sft"]
            flags = {"model_name_or_path": model, "dataset_names": data, "use_peft": mode == "lora"}
            flags |= {"reward_model_name_or_path": starts["reward"], **PPO} if stage == "ppo" else {}
            padded = {**flags, "pad_rows": True}  # as the engines pad, or dropout would be drawn otherwise
            made[stage, mode] = flags, train("ddp", stage, root / f"{stage}_{mode}", padded)
        return made[stage, mode]

    return get


@pytest.mark.parametrize(("stage", "mode", "engine"), CASES)
def test_an_engine_trains_what_ddp_trains_killed_or_not(stage, mode, engine, ddp, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="`make test-engines` installs DeepSpeed")
    flags, other = ddp(stage, mode)
    whole, killed = train(engine, stage, tmp_path / "whole", flags), tmp_path / "killed"
    at = 3 if stage != "ppo" else 10  # after the first checkpoint, and a step or two
    assert launch(engine, stage, killed, flags, at) == [-9, -9] and not (killed / "run.json").exists()
    train(engine, stage, killed, flags)
    assert "continuing from checkpoint-" in Path(f"{killed}.0.out").read_text()
    off, again = apart(whole, other), apart(killed, whole)
    print(f"{stage} {mode} {engine}: off DDP's weights by {off:.1e}, killed and resumed by {again:.1e}")
    assert off < 1e-5 and again == 0.0
    if stage == "reward":
        ours, theirs = (json.loads((f / "score_statistics.json").read_text()) for f in (whole, other))
        assert ours == pytest.approx(theirs, rel=1e-5)
    if mode == "lora":
        merge = importlib.import_module("merge_peft_adapter")
        words = ["--adapter_model_name", str(whole), "--output_name", str(tmp_path / "merged")]
        merge.main(merge.make_parser().parse_args(words))
        assert (tmp_path / "merged" / "model.safetensors").exists()
    shutil.rmtree(tmp_path)
