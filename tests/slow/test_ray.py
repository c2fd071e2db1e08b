"""Training on Ray, with workers killed: `python -m pytest tests/slow/test_ray.py`, minutes; needs Ray."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.conftest import QUICK, ROOT

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-extra.txt")

ADAPTER = "adapter_model.safetensors"
STEPS = "--max_steps 40 --save_steps 5 --eval_strategy no --learning_rate 1e-2 --per_device_train_batch_size 2"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
RECORD = """
import os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
with open("attempts.txt", "a") as file:
    print(sys.argv[1:], __name__, *(os.environ[name] for name in names), file=file)
"""


def command(script, base, data, folder):
    words = f"{QUICK} {STEPS} --model_name_or_path {base} --dataset_names {data} --output_dir {folder}"
    return [str(script), *words.split()]


def launch(folder, words, out=None):
    """The launcher under way, in this folder, of two workers; what it prints is in out.txt."""
    launcher = [sys.executable, ROOT / "examples" / "launch_ray.py"]
    with open(out or folder / "out.txt", "w") as file:
        return subprocess.Popen([*launcher, *words], cwd=folder, env=ENVIRONMENT, stdout=file, stderr=file)


def scripts(launcher) -> dict:
    """The scripts' processes of a launcher, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if "sft_training.py" in "".join(process.cmdline()[1:2]):
                found[process.environ()["RANK"]] = process
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


@pytest.fixture(scope="module")
def expected(base, data, tmp_path_factory):
    """The weights of two processes that torchrun starts."""
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *command(ROOT / "sft_training.py", base, data, "sft")], cwd=folder, env=ENVIRONMENT,
                   check=True)  # fmt: skip
    return (folder / "sft" / ADAPTER).read_bytes()


@pytest.mark.parametrize("kill", [None, "script", "worker", "notice"])
def test_two_workers_are_two_processes_of_torchrun_also_when_one_is_killed(kill, base, data, expected, tmp_path):
    """The script alone, with its worker, or by a notice that it answers with exit code 85."""
    launcher = launch(tmp_path, command(ROOT / "sft_training.py", base, data, "sft"))
    while kill and launcher.poll() is None and not (tmp_path / "sft" / "checkpoint-5" / "manifest.json").exists():
        time.sleep(0.02)
    if kill:
        process = scripts(launcher)["1"]
        process = process.parent() if kill == "worker" else process
        process.send_signal(signal.SIGTERM if kill == "notice" else signal.SIGKILL)
    assert launcher.wait(timeout=300) == 0, (tmp_path / "out.txt").read_text()
    printed = (tmp_path / "out.txt").read_text()
    assert ("continuing from checkpoint-" in printed) == bool(kill)
    assert "exit codes of the workers, by rank: [85, 85]" in printed or kill != "notice"
    assert (tmp_path / "sft" / ADAPTER).read_bytes() == expected


@pytest.mark.parametrize("ends, code, attempts", [("0", 0, 1), ("2", 2, 1), ("2 if rank == '1' else 1", 2, 1)])
def test_a_script_runs_once_a_worker_in_the_users_folder_with_its_rank(ends, code, attempts, tmp_path):
    """A mistake is not tried again, also where one worker alone knows of it."""
    (tmp_path / "script.py").write_text(f"{RECORD}\nrank = os.environ['RANK']\nsys.exit({ends})")
    assert launch(tmp_path, ["script.py", "--flag", "a b"]).wait(timeout=200) == code
    lines = sorted((tmp_path / "attempts.txt").read_text().splitlines())
    assert lines == [f"['--flag', 'a b'] __main__ {rank} {rank} 2 2" for rank in (0, 1)] * attempts


def test_what_crashes_is_tried_as_often_as_was_said(tmp_path):
    (tmp_path / "script.py").write_text(RECORD + "\nsys.exit(1)")
    assert launch(tmp_path, ["--num_workers", "1", "--max_failures", "1", "script.py"]).wait(timeout=200) == 1
    assert len((tmp_path / "attempts.txt").read_text().splitlines()) == 2


def test_a_mistake_ends_once_with_one_line(base, tmp_path):
    launcher = launch(tmp_path, command(ROOT / "sft_training.py", base, "nosuch.jsonl", "sft"))
    assert launcher.wait(timeout=200) == 2
    printed = (tmp_path / "out.txt").read_text()
    assert printed.count("error:") == 1 and "nosuch.jsonl" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "flags, said", [("--num_workers 1000", "1000 CPUs are"), ("--num_workers 1 --use_gpu", "1 GPUs are asked for, 0")]
)
def test_more_than_the_machine_has_is_refused(flags, said, tmp_path):
    if "gpu" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "script.py").write_text(RECORD)
    assert launch(tmp_path, [*flags.split(), "script.py"]).wait(timeout=200) == 2
    assert said in (tmp_path / "out.txt").read_text()


def test_a_machine_without_the_users_folder_ends_the_run(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "script.py").write_text(RECORD)
    launcher = launch(folder, ["script.py"], out=tmp_path / "out.txt")
    while "Requesting resources" not in (tmp_path / "out.txt").read_text():
        assert launcher.poll() is None
        time.sleep(0.02)
    folder.rename(tmp_path / "gone")
    assert launcher.wait(timeout=200) == 2
    assert f"has no {folder}: the machines need a shared disk" in (tmp_path / "out.txt").read_text()
