"""The launchers for clusters, without a cluster: `pytest tests/test_launchers.py`. With Ray: slow/test_ray.py."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# Slurm's commands, as far as the job uses them: tasks on this machine; what is queued again is written down
SRUN = """
import os, signal, subprocess, sys
ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(int(os.environ["SLURM_NTASKS"]))]
tasks = [subprocess.Popen(sys.argv[sys.argv.index("bash"):], env=os.environ | rank) for rank in ranks]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys
print("localhost" if sys.argv[1] == "show" else open("queued.txt", "a").write(" ".join(sys.argv[1:])))
"""
# a training script: says who it is, and ends with this code, after a notice if it is to wait for one
SCRIPT = """
import os, signal, sys, time
names, code, notice = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split(), *map(int, sys.argv[1:])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(code))
open(f"rank{os.environ['RANK']}.tmp", "w").write(" ".join(os.environ[name] for name in names))
os.rename(f"rank{os.environ['RANK']}.tmp", f"rank{os.environ['RANK']}.txt")
time.sleep(60 * notice)
sys.exit(code)
"""


@pytest.mark.parametrize("code, notice, again", [(0, 0, False), (2, 0, False), (85, 0, False), (85, 1, True),
                                                 (1, 1, False), (0, 1, False)])  # fmt: skip
def test_a_slurm_job_queues_itself_again_when_its_time_was_up_and_it_was_saved(code, notice, again, tmp_path):
    """Not so when it was ended otherwise: whoever cancels a job does not want it back."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("script.py", SCRIPT)):
        (tmp_path / name).write_text(f"#!{sys.executable}{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    words = ["bash", ROOT / "examples" / "slurm.sbatch", "script.py", str(code), str(notice)]
    job = subprocess.Popen(words, cwd=tmp_path, env=environment)
    until = time.monotonic() + 30
    while notice and len(list(tmp_path.glob("rank*.txt"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    if notice:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == code
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == [
        "0 0 2 2 localhost",
        "1 1 2 2 localhost",
    ]
    assert (tmp_path / "queued.txt").exists() == again
    assert not again or (tmp_path / "queued.txt").read_text() == "requeue 7"


def test_the_slurm_job_asks_for_the_notice_that_it_waits_for():
    asked = re.findall(r"^#SBATCH (.*)$", (ROOT / "examples" / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue"} <= set(asked)


@pytest.mark.parametrize("words, said", [
    ("", "name a script to run"),
    ("--num_workers 2", "name a script to run"),
    ("nosuch.py", "name a script to run, as in sft_training.py: nosuch.py"),
    ("--num_worker 2 sft_training.py", "did you mean --num_workers?"),
    ("--num_workers 0 sft_training.py", "give 1 or more"),
    ("sft_training.py --config configs/sft.yaml", "Ray is not installed here"),
])  # fmt: skip
def test_a_mistake_in_what_stands_before_the_script(words, said):
    if said.startswith("Ray") and importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed here")
    command = [sys.executable, "examples/launch_ray.py", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.splitlines()) <= 3
