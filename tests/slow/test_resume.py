"""Runs that are killed, damaged or stopped, and started again: `make test-resume`, a quarter of an hour, with tables.

A run is killed with SIGKILL as it touches its folder for the n-th time (opens a file to write, renames, deletes), so
that every moment can be hit again: the first checkpoint, rotation, the last save, between a checkpoint and run.json.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from rlhf.runs.checkpoints import newest_whole, step_of
from tests.conftest import run_script

STAGES = {"sft": "sft_training", "reward": "reward_modeling", "dpo": "dpo_training", "ppo": "ppo_training"}
# each start is a fork of a process that has imported all: only the work itself is left to be killed
pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*STAGES.values(), "tests.conftest"])
OF_TIME = ("runtime", "per_second")
TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}

COMMON = {"validation_split_percentage": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": -1}
SHAPES = {  # whole epochs at a constant rate, saved where an epoch ends; and neither
    "whole": {"num_train_epochs": 2, "lr_scheduler_type": "constant", "eval_strategy": "epoch", "save_steps": 5,
              "save_total_limit": 2, "logging_steps": 3},
    "parts": {"num_train_epochs": 1.5, "lr_scheduler_type": "cosine", "eval_strategy": "steps", "eval_steps": 4,
              "save_steps": 3, "save_total_limit": 1, "logging_steps": 2},
}  # fmt: skip
PPO = {"max_steps": 6, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 2,
       "response_length": 8, "adaptive_kl_target": 1.0, "num_sample_generations": 3}  # fmt: skip


def flags_of(stage, shape, saved, data) -> dict:
    model = saved["sft"] if stage == "ppo" else saved["base"]
    flags = {**COMMON, **SHAPES[shape], "model_name_or_path": model, "dataset_names": data}
    if stage == "ppo":
        rate = {
            "lr_scheduler_type": SHAPES[shape]["lr_scheduler_type"],
            "logging_steps": SHAPES[shape]["logging_steps"],
        }
        flags = {**COMMON, **PPO, **rate, "model_name_or_path": model, "dataset_names": data}
        flags |= {"reward_model_name_or_path": saved["reward"], "save_steps": 2, "save_total_limit": 2}
    return flags


def train(stage, folder, flags, fatal=None, number=signal.SIGKILL):
    """A run to which a signal is sent as it touches its folder for the `fatal`-th time; <folder>.count counts them."""
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event not in TOUCHES or not str(arguments[0]).startswith(f"{folder}/"):
            return
        if event == "open" and not set(str(arguments[1] or "")) & set("wa+"):
            return
        count += 1
        if count == fatal:
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    if number != signal.SIGKILL:
        return as_command(stage, folder, flags)
    run_script(STAGES[stage], output_dir=str(folder), **flags)
    Path(f"{folder}.count").write_text(str(count))


def as_command(stage, folder, flags):
    """The script under its guard, as it is started from a shell."""
    import importlib

    from rlhf.runs.command_line import run
    from tests.conftest import QUICK

    module = importlib.import_module(STAGES[stage])
    words = [part for key, value in {**flags, "output_dir": folder}.items() for part in (f"--{key}", str(value))]
    sys.argv = [f"{STAGES[stage]}.py", *QUICK.split(), *words]
    sys.stderr = sys.stdout = open(f"{folder}.out", "w", buffering=1)
    run(module.main, module.make_parser)


def finish(*arguments) -> int:
    process = CONTEXT.Process(target=train, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def steady(values: dict) -> dict:
    return {key: value for key, value in values.items() if not key.endswith(OF_TIME)}


def outcome(folder) -> dict:
    """What must not depend on interruptions, by name."""
    last = max(folder.glob("checkpoint-*"), key=step_of)
    files = [*folder.glob("*.safetensors"), *folder.glob("samples/*"), *last.glob("*.safetensors")]
    files += [last / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    return {
        **{str(path.relative_to(folder)): path.read_bytes() for path in files},
        "training_log.jsonl": [steady(json.loads(line)) for line in lines],
        "run.json": {which: steady(values) for which, values in metrics.items()},
    }


def differing(ours: dict, theirs: dict) -> list[str]:
    for name in ("training_log.jsonl", "run.json"):
        if ours.get(name) != theirs.get(name):
            print(f"{name}:\n  {ours.get(name)}\n  {theirs.get(name)}")
    return [name for name in ours.keys() | theirs if ours.get(name) != theirs.get(name)]


@pytest.fixture(scope="module")
def whole(saved, base, data, tmp_path_factory):
    """By stage and shape: flags, the folder of a run that was not interrupted, and how often it touched it."""
    made, root = {}, tmp_path_factory.mktemp("whole")

    def get(stage, shape):
        if (stage, shape) not in made:
            flags, folder = flags_of(stage, shape, saved | {"base": base}, data), root / f"{stage}_{shape}"
            assert finish(stage, folder, flags) == 0
            made[stage, shape] = flags, folder, int(Path(f"{folder}.count").read_text())
        return made[stage, shape]

    return get


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(stage, shape, whole, tmp_path):
    """Ten moments for each shape, evenly over all that the run does with its folder, the last one among them."""
    flags, other, touches = whole(stage, shape)
    expected, wrong = outcome(other), {}
    for moment in sorted({max(1, round(touches * i / 9)) for i in range(10)}):
        folder = tmp_path / str(moment)
        assert finish(stage, folder, flags, moment) == -9, moment
        left = sorted(path.name for path in folder.glob("checkpoint-*"))
        code = finish(stage, folder, flags)
        wrong[moment] = f"exit code {code}" if code else differing(outcome(folder), expected)
        print(f"{stage} {shape}: killed at touch {moment} of {touches} ({', '.join(left)}): {wrong[moment] or 'same'}")
        shutil.rmtree(folder)
    assert not any(wrong.values()), wrong


def damage(path: Path, kind: str, older: Path) -> None:
    content = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "older":
        shutil.copy(older, path)
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b""
        path.write_bytes(
            {"emptied": b"", "halved": content[:middle], "zeroed": bytes(len(content)), "bit": flipped}[kind]
        )


KINDS = ("removed", "emptied", "halved", "zeroed", "bit", "older")


@pytest.mark.parametrize("stage", STAGES)
def test_damage_to_the_newest_checkpoint_is_passed_over(stage, whole, tmp_path):
    """Every file in six ways is not trained on; and run to the end after each way once, nothing differs."""
    flags, other, _ = whole(stage, "whole")
    broken = shutil.copytree(other, tmp_path / "broken")
    (broken / "run.json").unlink()
    run_id = json.loads((broken / "started.json").read_text())["run_id"]
    old, new = sorted(broken.glob("checkpoint-*"), key=step_of)[-2:]
    assert newest_whole(broken, run_id) == (new, [])
    cases = 0
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        for kind in KINDS:
            before, theirs = path.read_bytes(), old / path.relative_to(new)
            if kind == "older" and (not theirs.exists() or theirs.read_bytes() == before):
                continue
            damage(path, kind, theirs)
            found, passed = newest_whole(broken, run_id)
            never_finished = path.name == "manifest.json" and kind == "removed"
            assert found == old and (never_finished or new.name in passed[0]), (path.name, kind)
            path.write_bytes(before)
            cases += 1
    results = {}
    for kind, name in zip(KINDS, ("optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth",
                                  "adapter_model.safetensors", "optimizer.pt"), strict=True):  # fmt: skip
        folder = shutil.copytree(broken, tmp_path / kind)
        damage(folder / new.name / name, kind, folder / old.name / name)
        code = finish(stage, folder, flags)
        results[kind] = f"exit code {code}" if code else differing(outcome(folder), outcome(other))
    print(f"{stage}: {cases} damages, none trained on; run to the end: {results}")
    assert not any(results.values()), results


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_stops_a_run_which_goes_on_to_the_same_end(stage, name, whole, tmp_path):
    """At several moments: exit code 85 or 130, one line, no traceback; 0 where the work was done already."""
    flags, other, touches = whole(stage, "parts")
    expected, code = outcome(other), 130 if name == "SIGINT" else 85
    for moment in (2, touches // 4, touches // 2, touches - 2):
        folder = tmp_path / str(moment)
        found = finish(stage, folder, flags, moment, getattr(signal, name))
        text = Path(f"{folder}.out").read_text()
        done = (folder / "run.json").exists()
        assert found == (0 if done else code) and "Traceback" not in text, text[-2000:]
        assert done or "the same command goes on" in text
        if not done:
            assert finish(stage, folder, flags) == 0
        assert not differing(without_extra(outcome(folder)), without_extra(expected)), moment
        print(f"{stage}: {name} at touch {moment} of {touches}: exit code {found}, then the same")


def without_extra(found: dict) -> dict:
    """But for the last checkpoint's own files: one more was saved on the way, so another may be the last kept."""
    return {name: value for name, value in found.items() if not name.startswith("checkpoint-")}
