"""The engine in use is the one asked for, and a run has saved what it trained: `pytest tests/runs/test_engine.py`."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file

from rlhf.models import shards
from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.runs import engine
from rlhf.user_error import UserError
from tests.conftest import ROOT, run_script
from tests.runs.test_command_line import REQUIRED, parse

CONFIGS = sorted(ROOT.glob("accelerate_config/*.yaml"))
ALL = "cpu cpu_2_processes deepspeed_zero2 deepspeed_zero3_offload fsdp2 multi_gpu multi_node single_gpu".split()


def test_there_is_a_file_for_each_kind_of_hardware():
    assert [path.stem for path in CONFIGS] == ALL


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_file_and_it_says_what_for_and_at_what_cost(path):
    config = load_config_from_file(str(path)).to_dict()
    for key, value in yaml.safe_load(path.read_text()).items():
        assert config[key] == value, key
    comment = path.read_text().split("compute_environment")[0]
    assert f"accelerate launch --config_file accelerate_config/{path.name} " in comment and "Costs" in comment


ON = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


@pytest.fixture
def bare(monkeypatch):
    """No engine of another test, and DeepSpeed as if it were installed."""
    for name in (*ON.values(), "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "LOCAL_RANK", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    return monkeypatch


def test_the_line_on_the_machine_names_processes_and_engine(bare):
    import sft_training

    parser = sft_training.make_parser()
    parser.parse_args_and_config([*REQUIRED])
    assert parser.machine.endswith("; one process")


@pytest.mark.parametrize("flags", [(), ("--use_cpu", "false")])
def test_fsdp_that_accelerate_would_pass_over_is_an_error(bare, flags):
    bare.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP is asked for and would not be in use") as error:
        parse(*REQUIRED, *flags)
    assert "leave it out" in str(error.value)


def arguments(**changed):
    plain = {"loading": {}, "fsdp": None, "deepspeed": None, "n_gpu": 0, "world_size": 2, "fsdp_plugin_args": None}
    return SimpleNamespace(**plain | {"deepspeed_plugin": SimpleNamespace(zero_stage=2)} | changed)


LOADING = {"split_batches": False, "dispatch_batches": None, "even_batches": True}
GPUS, CPUS, ZERO, ONE = (DistributedType[name] for name in ("MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "NO"))
TWO = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
FULL = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}


@pytest.mark.parametrize(
    ("kind", "changed", "environment", "says"),
    [
        (ONE, {"world_size": 1}, {}, "one process"),
        (CPUS, {}, TWO, "2 processes on 1 machine, DDP"),
        (GPUS, {}, TWO | {ON["FSDP"]: "true", "FSDP_VERSION": "2"}, "2 processes on 1 machine, FSDP2, sharded state"),
        (GPUS, {"fsdp": True, "fsdp_plugin_args": FULL}, TWO, "2 processes on 1 machine, FSDP2, full state"),
        (ZERO, {}, TWO | {ON["DeepSpeed"]: "true"}, "2 processes on 1 machine, DeepSpeed ZeRO-2"),
        (ZERO, {"response_length": 8}, TWO | {ON["DeepSpeed"]: "true"}, "2 processes on 1 machine, DeepSpeed ZeRO-2"),
    ],
)
def test_an_engine_in_use_is_named(bare, kind, changed, environment, says):
    bare.setattr(engine, "PartialState", lambda: SimpleNamespace(distributed_type=kind))
    for name, value in environment.items():
        bare.setenv(name, value)
    assert engine.check_engine(arguments(**changed)) == says


def test_machines_are_counted_by_their_names(bare):
    bare.setattr(engine, "PartialState", lambda: SimpleNamespace(distributed_type=GPUS))
    bare.setattr(engine, "exchange", lambda name: ["first", "first", "second", "third"])
    bare.setenv("WORLD_SIZE", "4")
    assert engine.check_engine(arguments(world_size=4)) == "4 processes on 3 machines, DDP"


ZERO3 = {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}


@pytest.mark.parametrize(
    ("kind", "changed", "environment", "says"),
    [
        (CPUS, {}, {ON["FSDP"]: "true"}, "on GPUs alone"),
        (ONE, {"fsdp": True, "world_size": 1}, {"WORLD_SIZE": "1"}, "on GPUs alone"),
        (GPUS, {}, {ON["FSDP"]: "1"}, "--fsdp_version 2"),
        (GPUS, {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, {}, "--fsdp_version 2"),
        (CPUS, {}, {ON["DeepSpeed"]: "true"}, "leave use_cpu out"),
        (ONE, {"deepspeed": "ds.json"}, {"LOCAL_RANK": None}, "start it with accelerate launch"),
        (ZERO, {"deepspeed": "ds.json", "world_size": 1}, {}, "2 processes were started, and accelerate connects 1"),
        (ZERO, {}, {name: "true" for name in ON.values()}, "together: leave one out"),
        (GPUS, {}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm: these scripts know DDP"),
        (GPUS, {}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config: these scripts know DDP"),
        (ONE, {"n_gpu": 2, "world_size": 1}, {"WORLD_SIZE": "1"}, "one process sees 2 GPUs"),
        (GPUS, {"response_length": 8, "fsdp": True, "fsdp_plugin_args": FULL}, {}, "OpenRLHF or verl"),
        (ZERO, {"response_length": 8, **ZERO3}, {ON["DeepSpeed"]: "true"}, "15 to 18B parameters"),
    ],
)
def test_an_engine_that_is_not_in_use_or_not_able_is_an_error(bare, kind, changed, environment, says):
    bare.setattr(engine, "PartialState", lambda: SimpleNamespace(distributed_type=kind))
    for name, value in (TWO | environment).items():
        bare.setenv(name, value) if value else bare.delenv(name, raising=False)
    with pytest.raises(UserError, match=says) as error:
        engine.check_engine(arguments(**changed))
    assert len(str(error.value).splitlines()) <= 3


def trainer(starts: str | None, mismatches=(), refuses=None) -> type:
    """A trainer whose accelerator starts this engine."""

    class Trainer:
        def __init__(self, args):
            if refuses:
                raise ValueError(refuses)
            self.is_fsdp_enabled, self.is_deepspeed_enabled = starts == "FSDP", starts == "DeepSpeed"
            self.args, loading = args, SimpleNamespace(**{**LOADING, **args.loading})
            plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(mismatches=list(mismatches)))
            state = SimpleNamespace(deepspeed_plugin=plugin)
            self.accelerator = SimpleNamespace(state=state, dataloader_config=loading)

    return type("Checked", (engine.Engine, Trainer), {})


BATCH = ["- ds gradient_accumulation_steps=1 vs hf gradient_accumulation_steps=8"]


@pytest.mark.parametrize(
    ("asks", "made", "says"),
    [
        ({"fsdp": True}, trainer(None), "FSDP is asked for and is not in use"),
        ({}, trainer("DeepSpeed"), "DDP is asked for and is not in use"),
        ({"deepspeed": "ds.json"}, trainer("FSDP"), "DeepSpeed is asked for and is not in use"),
        ({"deepspeed": "ds.json"}, trainer("DeepSpeed", BATCH), "ds gradient_accumulation_steps=1 vs hf .*\n.*auto"),
        ({"fsdp": True}, trainer("FSDP", refuses="save_only_model is not"), "FSDP: save_only_model is not"),
    ],
)
def test_a_trainer_with_another_engine_or_one_that_refuses_is_an_error(bare, asks, made, says):
    with pytest.raises(UserError, match=says):
        made(args=arguments(**asks))


def test_a_trainer_with_the_engine_asked_for_is_made(bare):
    for asks, made in (({}, None), ({"fsdp": True}, "FSDP"), ({"deepspeed": "ds.json"}, "DeepSpeed")):
        trainer(made)(args=arguments(**asks))
    with pytest.raises(ValueError, match="of its own"):
        trainer(None, refuses="of its own")(args=arguments())


@pytest.mark.parametrize("loading", [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}])
def test_loaders_that_share_rows_otherwise_are_refused(bare, loading):
    with pytest.raises(UserError, match="do not fit several processes"):
        trainer(None)(args=arguments(loading=loading))
    trainer(None)(args=arguments(loading=loading, world_size=1))


def test_deepspeed_that_is_not_installed_is_an_error(bare):
    bare.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-extra.txt"):
        engine.asked(None, "ds.json")


def nothing(folder):
    (folder / "adapter_model.safetensors").unlink()


def changed(change):
    def harm(folder):
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        name = max(weights, key=lambda key: weights[key].abs().sum())
        weights[name] = change(weights[name])
        save_file({key: value for key, value in weights.items() if value is not None}, path)

    return harm


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


HARMS = {
    "no file": nothing,
    "a file that ends early": cut,
    "a weight is missing": changed(lambda weight: None),
    "a shard": changed(lambda weight: weight[: len(weight) // 2]),
    "an empty shard": changed(lambda weight: weight[:0]),
    "not finite": changed(lambda weight: weight * float("nan")),
    "another run's": changed(lambda weight: weight * 1.001),
    "in 16 bits": changed(lambda weight: weight.bfloat16()),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_run_is_complete_only_with_the_weights_that_it_trained(harm, base, data, tmp_path, monkeypatch):
    save = engine.Engine.save_model

    def save_and_harm(self, output_dir=None, _internal_call=False):
        save(self, output_dir, _internal_call)
        if not _internal_call:
            HARMS[harm](Path(self.args.output_dir))

    monkeypatch.setattr(engine.Engine, "save_model", save_and_harm)
    flags = {"model_name_or_path": base, "dataset_names": data, "eval_strategy": "no", "learning_rate": 1e-2}
    with pytest.raises(UserError, match="does not hold what was trained: .*lora_"):
        run_script("sft_training", output_dir=tmp_path / "run", **flags)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("script", ["sft_training", "reward_modeling", "dpo_training"])
def test_a_model_that_is_trained_whole_is_found_whole(script, base, data, tmp_path):
    flags = {"model_name_or_path": base, "dataset_names": data, "eval_strategy": "no", "use_peft": False}
    folder = run_script(script, output_dir=tmp_path / "run", **flags)
    assert (folder / "run.json").exists()
    (folder / "adapter_config.json").write_text("{}")  # an earlier run's
    with pytest.raises(UserError, match="holds an adapter, which would be taken for"):
        run_script(script, output_dir=folder, overwrite_output_dir=True, **flags)


def test_a_model_in_training_scores_as_one_that_is_loaded(saved, data, base):
    """What processes read in shares, in the order of length and with padding, is what a row has by itself."""
    from rlhf.models.rewards import load_reward
    from rlhf.runs.trainers import CheckedRewardTrainer

    tokenizer = load_tokenizer(saved["reward"])
    model = load_reward_model(saved["reward"], tokenizer)
    rows = [[5, 6, 7, 0], [9] * 30 + [0], [8, 0], [5, 5, 0], [1, 2, 3, 4, 0]]
    alone = SimpleNamespace(
        args=SimpleNamespace(world_size=1, process_index=0, per_device_eval_batch_size=2, device="cpu"),
        accelerator=SimpleNamespace(gather=lambda scores: scores),
        model=model,
        model_wrapped=model,
        processing_class=tokenizer,
    )
    expected = load_reward(saved["reward"]).score_tokens(rows)
    torch.testing.assert_close(CheckedRewardTrainer.score(alone, rows), expected, rtol=0, atol=1e-6)
    shares = []
    for rank in range(2):  # of which the last row is read by both
        alone.args.world_size, alone.args.process_index = 2, rank
        alone.accelerator.gather = lambda scores: (shares.append(scores), torch.cat([scores, scores]))[1]
        CheckedRewardTrainer.score(alone, rows)
    alone.accelerator.gather = lambda scores: torch.cat(shares)
    torch.testing.assert_close(CheckedRewardTrainer.score(alone, rows), expected, rtol=0, atol=1e-6)


def zero3(rank: int, monkeypatch) -> torch.nn.Parameter:
    """A (3, 3) parameter as ZeRO-3 leaves it on one of two processes: the last share is longer than what is left."""
    parameter = torch.nn.Parameter(torch.empty(0))
    whole = torch.arange(9.0)
    parameter.ds_shape, parameter.ds_numel, parameter.ds_process_group = torch.Size([3, 3]), 9, None
    parameter.ds_tensor = torch.full((5,), float("nan"))
    part = whole[5 * rank : 5 * rank + 5]
    parameter.ds_tensor[: len(part)] = part
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    return parameter


@pytest.mark.parametrize("rank", [0, 1])
def test_a_partitioned_weight_is_read_by_its_real_shape_and_without_its_padding(rank, monkeypatch):
    parameter = zero3(rank, monkeypatch)
    assert shards.shape_of(parameter) == (3, 3)
    assert shards.part_of(parameter).tolist() == list(range(9))[5 * rank : 5 * rank + 5]
