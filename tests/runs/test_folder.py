"""Which folder a run may use, and what it goes on from: `pytest tests/runs/test_folder.py`.

Runs that are killed at any moment are in tests/slow/test_resume.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from rlhf.models.rendering import PLAIN_TEMPLATE
from rlhf.runs.checkpoints import MANIFEST, newest_whole, problem_with
from rlhf.runs.folder import lock_folder
from rlhf.user_error import UserError
from tests.conftest import run_script

FLAGS = {"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}


def killed(script, step, **flags):
    """A run that ends abruptly before its `step`-th optimizer step."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise ConnectionResetError("killed")
        return real(self, *args, **kwargs)

    real = Trainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(ConnectionResetError):
            run_script(script, **flags)
    return Path(flags["output_dir"])


def steps(folder) -> list[int]:
    log = (Path(folder) / "training_log.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, log) if "loss" in entry]


@pytest.fixture(scope="module")
def inputs(base, data, tmp_path_factory):
    """The base and the data in a folder of their own, and a run on them that was killed after its first checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    shutil.copytree(base, root / "base")
    shutil.copy(data, root / "pairs.jsonl")
    grow(root / "held.jsonl")
    flags = FLAGS | {"model_name_or_path": root / "base", "dataset_names": root / "pairs.jsonl"}
    killed("sft_training", 4, output_dir=root / "run", **flags)
    return root


def copied(inputs, tmp_path):
    """A copy of those inputs, at the place that the run's record names."""
    saved = shutil.copytree(inputs, tmp_path / "saved")
    return saved, {"model_name_or_path": inputs / "base", "dataset_names": inputs / "pairs.jsonl"} | FLAGS


def put_back(inputs, saved):
    shutil.rmtree(inputs)
    shutil.copytree(saved, inputs)


def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_alone(inputs, tmp_path):
    saved, flags = copied(inputs, tmp_path)
    run_script("sft_training", output_dir=inputs / "run", **flags)
    whole = run_script("sft_training", output_dir=tmp_path / "whole", **flags)
    ours, theirs = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (inputs / "run", whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and steps(whole) == steps(inputs / "run")
    with pytest.raises(UserError, match="holds a finished run.*--overwrite_output_dir"):
        run_script("sft_training", output_dir=whole, **flags)
    put_back(inputs, saved)


def grow(path):
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "Who sings?", "chosen": "The gulls do.", "rejected": "No."}) + "\n")


def shrink(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-4]))


def change_a_byte(path):
    path.write_text(path.read_text().replace("number 7?", "number x?"))


def change_a_weight(path):
    weights = load_file(path)
    weights["transformer.wte.weight"][7, 3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def change_the_template(path):
    path.write_text(PLAIN_TEMPLATE.replace("Human", "User"))


@pytest.mark.parametrize(
    ("flags", "change", "says"),
    [
        ({}, lambda root: grow(root / "pairs.jsonl"), "training rows changed"),
        ({}, lambda root: shrink(root / "pairs.jsonl"), "training rows changed"),
        ({}, lambda root: change_a_byte(root / "pairs.jsonl"), "rows changed"),
        ({}, lambda root: change_a_weight(root / "base" / "model.safetensors"), "base weights changed"),
        ({}, lambda root: change_the_template(root / "base" / "chat_template.jinja"), "template changed"),
        ({"eval_dataset_names": "held.jsonl"}, None, "held-out rows changed"),
        ({"seed": 7}, None, "seed: left out, and now 7"),
        ({"learning_rate": 1e-3}, None, "learning_rate: 0.01, and now 0.001"),
        ({"per_device_train_batch_size": 4}, None, "rows a step: 2, and now 4"),
        ({"lora_r": 4}, None, "lora_r: left out, and now 4"),
        ({"dataloader_drop_last": True}, None, "dataloader_drop_last: left out, and now True"),
    ],
)  # fmt: skip
def test_a_run_is_resumed_with_the_same_inputs_or_refused_by_name(inputs, tmp_path, flags, change, says):
    saved, plain = copied(inputs, tmp_path)
    if "eval_dataset_names" in flags:
        flags = {"eval_dataset_names": inputs / "held.jsonl"}
    if change:
        change(inputs)
    with pytest.raises(UserError, match=says) as error:
        run_script("sft_training", output_dir=inputs / "run", **plain | flags)
    assert "--overwrite_output_dir" in str(error.value) and len(str(error.value).splitlines()) == 3
    put_back(inputs, saved)


def test_logging_saving_evaluating_and_memory_may_change(inputs, tmp_path):
    saved, flags = copied(inputs, tmp_path)
    flags |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    flags |= {"logging_steps": 2, "save_steps": 1, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1}
    flags |= {"project": "another", "torch_empty_cache_steps": 9}
    run_script("sft_training", output_dir=inputs / "run", **flags)
    assert (inputs / "run" / "run.json").exists()
    put_back(inputs, saved)


def test_what_an_adapter_makes_of_its_weights_counts_too(saved, data, tmp_path):
    adapter = shutil.copytree(saved["sft"], tmp_path / "sft")
    flags = {"model_name_or_path": adapter, "dataset_names": data, "output_dir": tmp_path / "dpo", "save_steps": 1}
    killed("dpo_training", 2, **flags)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(UserError, match="adapter config changed"):
        run_script("dpo_training", **flags)


def test_the_precision_that_a_launcher_sets_is_part_of_a_run(inputs, tmp_path, monkeypatch):
    saved, flags = copied(inputs, tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="precision: no, and now bf16"):
        run_script("sft_training", output_dir=inputs / "run", **flags)
    put_back(inputs, saved)


def test_a_changed_reward_function_is_another_run(saved, data, tmp_path):
    (tmp_path / "r.py").write_text(
        "def r(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    flags = {"model_name_or_path": saved["sft"], "reward_model_name_or_path": f"{tmp_path}/r.py:r", "save_steps": 1}
    flags |= {"dataset_names": data, "response_length": 8, "output_dir": tmp_path / "ppo"}
    killed("ppo_training", 5, **flags)  # in the second update
    (tmp_path / "r.py").write_text((tmp_path / "r.py").read_text().replace("len(c)", "-len(c)"))
    with pytest.raises(UserError, match="reward changed"):
        run_script("ppo_training", **flags)


def test_another_runs_checkpoints_are_neither_taken_nor_touched(base, data, tmp_path):
    flags = FLAGS | {"model_name_or_path": base, "dataset_names": data, "output_dir": tmp_path / "run"}
    run_script("sft_training", **flags | {"max_steps": 8})
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoint-8").iterdir()}
    anew = flags | {"seed": 3, "save_total_limit": 1}
    killed("sft_training", 4, overwrite_output_dir=True, **anew)  # its only checkpoint is number 2
    assert not (tmp_path / "run" / "run.json").exists()
    run_script("sft_training", **anew)
    whole = run_script("sft_training", **anew | {"output_dir": tmp_path / "whole"})
    ours, theirs = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoint-8").iterdir()}
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(base, data, tmp_path):
    flags = FLAGS | {"model_name_or_path": base, "dataset_names": data, "output_dir": tmp_path / "run"}
    killed("sft_training", 2, **flags)
    (tmp_path / "run" / "checkpoint-2").mkdir()  # half of one
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-best").mkdir()
    (tmp_path / "run" / "README.md").write_text("TRL writes one at the first save")
    run_script("sft_training", **flags)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(inputs, tmp_path, capsys):
    saved, flags = copied(inputs, tmp_path)
    weights = inputs / "run" / "checkpoint-2" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match="none of its checkpoints is whole: checkpoint-2: adapter_model.safetensors is not"
    ):
        run_script("sft_training", output_dir=inputs / "run", **flags)
    put_back(inputs, saved)


@pytest.mark.parametrize("name", ["started.json", "manifest.json"])
def test_a_damaged_record_is_named(inputs, tmp_path, name):
    saved, flags = copied(inputs, tmp_path)
    path = next((inputs / "run").rglob(name))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="damaged"):
        run_script("sft_training", output_dir=inputs / "run", **flags)
    put_back(inputs, saved)


def test_what_makes_a_checkpoint_whole(inputs, tmp_path):
    run = shutil.copytree(inputs / "run", tmp_path / "run")
    run_id, checkpoint = json.loads((run / "started.json").read_text())["run_id"], run / "checkpoint-2"
    assert newest_whole(run, run_id) == (checkpoint, []) and newest_whole(run, "another") == (None, [])
    (checkpoint / "model.safetensors").touch()  # what transformers would load instead of the adapter
    assert problem_with(checkpoint) == "model.safetensors is not what was written"
    (checkpoint / "model.safetensors").unlink()
    checkpoint.rename(run / "checkpoint-9")
    assert problem_with(run / "checkpoint-9") == f"its {MANIFEST} is damaged"


def test_a_named_checkpoint_is_proven_too(inputs, base, data, tmp_path):
    _, flags = copied(inputs, tmp_path)
    named = {"resume_from_checkpoint": inputs / "run" / "checkpoint-2"}
    run_script("sft_training", output_dir=tmp_path / "other", **flags, **named)
    assert steps(tmp_path / "other") == [3, 4]
    with pytest.raises(UserError, match="seed: left out, and now 7"):
        run_script("sft_training", output_dir=tmp_path / "third", **flags, **named, seed=7)
    lone = shutil.copytree(inputs / "run" / "checkpoint-2", tmp_path / "lone" / "checkpoint-2")
    with pytest.raises(UserError, match="there is no started.json beside it"):
        run_script("sft_training", output_dir=tmp_path / "x", **flags, resume_from_checkpoint=lone)
    with pytest.raises(UserError, match="there is no such"):
        run_script("sft_training", output_dir=tmp_path / "x", **flags, resume_from_checkpoint=tmp_path / "nowhere")


def test_one_run_a_folder(base, data, tmp_path):
    (tmp_path / "run").mkdir()
    lock = lock_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"is in use by process \d+ on "):
        run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path / "run")
    lock.release()  # as when its process ends, however
    run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("BASE", "is the model to start from"),
        ("BASE/inside", "which is read"),
        ("BASE/..", "which is read"),
        ("SFT/dpo", "which is read"),
        ("REWARD/ppo", "the folder of another run"),
        ("FILE", "is a file"),
        ("FILE/below", "cannot write"),
        ("NOTES", "is not empty"),
    ],
)
def test_folders_of_others_are_left_alone(saved, base, data, tmp_path, place, says):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "file").touch(), (tmp_path / "notes").mkdir(), (tmp_path / "notes" / "notes.txt").touch()
    names = {"BASE": tmp_path / "base", "FILE": tmp_path / "file", "NOTES": tmp_path / "notes"}
    names |= {"SFT": saved["sft"], "REWARD": saved["reward"]}
    first, slash, rest = place.partition("/")
    model = saved["sft"] if first in ("SFT", "REWARD") else names["BASE"]
    overwrite = {} if first == "NOTES" else {"overwrite_output_dir": True}
    before = {path: path.stat().st_mtime_ns for path in Path(model).rglob("*")}
    with pytest.raises(UserError, match=says):
        run_script("dpo_training", model_name_or_path=model, dataset_names=data,
                   output_dir=f"{names[first]}{slash}{rest}", **overwrite)  # fmt: skip
    assert before == {path: path.stat().st_mtime_ns for path in Path(model).rglob("*")}


def test_a_run_without_evaluation_does_not_evaluate_at_its_start(base, data, tmp_path):
    flags = {"model_name_or_path": base, "dataset_names": data, "output_dir": tmp_path, "eval_strategy": "no"}
    run_script("sft_training", **flags)
    assert "eval_" not in (tmp_path / "training_log.jsonl").read_text()


def test_a_run_that_would_end_early_and_look_complete_is_refused(base, data, tmp_path):
    with pytest.raises(UserError, match="enable_jit_checkpoint"):
        run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path / "x",
                   enable_jit_checkpoint=True)  # fmt: skip


def test_no_secret_and_no_path_of_the_machine_is_stored(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    flags = {"model_name_or_path": base, "dataset_names": data, "hub_token": "hf_secret", "save_steps": 1}
    folder = Path(run_script("sft_training", output_dir=tmp_path / "run", **flags))
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path
    assert str(Path(base).parent) not in (folder / "README.md").read_text()


def test_a_full_disk_keeps_the_last_whole_checkpoint(base, data, tmp_path, monkeypatch):
    flags = FLAGS | {"model_name_or_path": base, "dataset_names": data, "output_dir": tmp_path / "run"}
    real = torch.save

    def full(what, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return real(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="the disk is full\n  checkpoint-2 is whole: the same command goes on"):
        run_script("sft_training", **flags)
    monkeypatch.undo()
    run_script("sft_training", **flags)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
