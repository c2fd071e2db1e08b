"""PPO that is killed at any moment and started again ends as if nothing had happened: `make test-slow`."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from fnmatch import fnmatch

import pytest

from rlhf.runs.folder import is_complete
from tests.conftest import run_script

# each start is a fork of a process that has imported all: only the work itself is left to be killed
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ppo_training", "tests.conftest"])
OF_ONE_PROCESS = ("runtime", "per_second", "train_loss")  # transformers logs them of the time since the last start


@pytest.fixture(scope="module")
def flags(saved, data):
    return {
        "model_name_or_path": saved["sft"],
        "reward_model_name_or_path": saved["reward"],
        "dataset_names": data,
        "validation_split_percentage": 20,
        "max_steps": 16,  # updates, each of two epochs of two mini-batches of two micro-batches
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": 8,
        "learning_rate": 1e-2,
        "adaptive_kl_target": 1.0,
        "num_sample_generations": 3,
        "save_steps": 1,
        "save_total_limit": 2,
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read by the process that is forked, which this starts
        CONTEXT.Process(target=time.sleep, args=(0,)).start()
        yield


def train(folder, flags, fatal=None):
    """A run that dies as soon as it has opened a file of that pattern to write it anew, and leaves it empty."""

    def die(event, arguments):
        if event == "open" and "w" in (arguments[1] or "") and fnmatch(str(arguments[0]), f"{folder}/{fatal}"):
            os.open(arguments[0], os.O_CREAT | os.O_TRUNC)
            os.kill(os.getpid(), signal.SIGKILL)

    if fatal:
        sys.addaudithook(die)
    run_script("ppo_training", output_dir=str(folder), **flags)


def start(*arguments):
    process = CONTEXT.Process(target=train, args=arguments)
    process.start()
    return process


def written_since(then, folder, pattern):
    with suppress(FileNotFoundError):  # an old checkpoint, deleted meanwhile: look again
        return any(path.stat().st_mtime > then for path in folder.glob(pattern))
    return False


def kill_after(process, folder, pattern, seconds, earliest=0.0):
    """Kill a run so many seconds after it wrote a file of that pattern; without a pattern, after its start.

    Args:
        earliest: seconds after the start before which written files do not count.
    """
    then = time.time() + earliest
    while pattern and process.is_alive() and not written_since(then, folder, pattern):
        time.sleep(0.001)
    process.join(seconds)
    process.kill()
    process.join()


def steady(values: dict) -> dict:
    return {key: value for key, value in values.items() if not key.endswith(OF_ONE_PROCESS)}


def outcome(folder) -> dict:
    """What must not depend on interruptions, by name."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [*folder.glob("*.safetensors"), *folder.glob("samples/*"), folder / "ppo_state.json", folder / "README.md"]
    files += [path for path in last.iterdir() if path.name not in ("training_args.bin", "trainer_state.json")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    return {
        **found,
        "training_log.jsonl": [steady(json.loads(line)) for line in lines],
        "run.json": {which: steady(values) for which, values in metrics.items()},
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def assert_same(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if ours[name] != theirs[name]]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that was not interrupted, and how long its parts took, in seconds."""
    folder = tmp_path_factory.mktemp("whole") / "ppo"
    begin, process = time.time(), start(folder, flags)
    process.join()
    assert process.exitcode == 0

    def when(name):
        return (folder / name).stat().st_mtime

    saves = [sorted(path.stat().st_mtime for path in c.iterdir()) for c in sorted(folder.glob("checkpoint-*"))]
    seconds = {
        "start-up": when("samples/update_000000.jsonl") - begin,
        "saving": saves[-1][-1] - saves[-1][0],
        "update": saves[-1][-1] - saves[-2][-1],
        "ending": when("run.json") - saves[-1][-1],
    }
    print("seconds:", {name: round(value, 3) for name, value in seconds.items()})
    return folder, seconds


def test_a_run_killed_ten_times_ends_as_one_that_was_not(whole, flags, tmp_path):
    """Catches whatever a checkpoint misses (noise, order of prompts, kl_coef, Adam's moments, starting answers), lines
    of the log that are lost or doubled, half a checkpoint that is taken for a whole, and a folder that is refused."""
    (whole, seconds), folder, rng = whole, tmp_path / "ppo", random.Random(0)
    moments = [("start-up", None, seconds["start-up"])] * 2
    moments += [("saving", "checkpoint-*/*", seconds["saving"] / 2)] * 3
    moments += [("update", "checkpoint-*/trainer_state.json", seconds["update"])] * 2
    rng.shuffle(moments)
    moments = [
        ("start-up", "training_log.jsonl", 0.1),  # and no checkpoint yet
        ("saving", "checkpoint-*/*", seconds["saving"] / 2),
        *moments,
        ("ending", "checkpoint-64/trainer_state.json", seconds["ending"] / 2),
    ]
    outcomes = []
    for name, pattern, longest in moments:
        process = start(folder, flags)
        earliest = seconds["start-up"] + rng.random() * seconds["update"] if name in ("saving", "update") else 0
        kill_after(process, folder, pattern, rng.random() * longest, earliest)
        assert process.exitcode == -9, f"not killed at {name}: exit code {process.exitcode}, after {outcomes}"
        found = {int(path.name.split("-")[1]): is_complete(path) for path in folder.glob("checkpoint-*")}
        outcomes.append((name, sorted(found.items())))
    process = start(folder, flags)
    process.join()
    print("\n".join(map(str, outcomes)))
    assert process.exitcode == 0
    assert_same(outcome(folder), outcome(whole))


FATAL = (
    "samples/update_000000.jsonl",
    "checkpoint-*/trainer_state.json",
    "checkpoint-12/ppo_state.json",  # of the third update
    "training_log.jsonl*",  # as the run starts again
    "learning_curves.png",
    "checkpoint-20/trainer_state.json",
    "training_log.jsonl*",
    "run.json*",
)


def test_a_run_killed_while_it_writes_small_files_ends_as_one_that_was_not(whole, flags, tmp_path):
    """Catches files that are trusted or replaced though a kill leaves them empty: windows too short to hit by chance,
    such as an empty trainer_state.json that counts as a checkpoint, or a log of which only its end is left."""
    folder = tmp_path / "ppo"
    for name in FATAL:
        process = start(folder, flags, name)
        process.join()
        assert process.exitcode == -9, f"not killed at {name}: exit code {process.exitcode}"
    process = start(folder, flags)
    process.join()
    assert process.exitcode == 0
    assert_same(outcome(folder), outcome(whole[0]))
