"""Two network namespaces as machines, and the link between them cut: `python -m pytest tests/slow/test_machines.py`.

Each machine has an address, a name and, where a test says so, files of its own; it takes root, and minutes. Processes
start as examples/slurm.sbatch starts them; and once by torchrun.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.models.templates import PLAIN_TEMPLATE
from tests.conftest import QUICK, ROOT

ADAPTER = "adapter_model.safetensors"
TIMEOUT, LIMIT = 20, 300  # seconds: --ddp_timeout; how long a test waits
STEPS = "--max_steps 40 --save_steps 5 --eval_strategy no --learning_rate 1e-2 --per_device_train_batch_size 2"
HOSTS = "127.0.0.1 localhost\n10.99.0.1 first\n10.99.0.2 second\n"
SETUP = """
ip netns add {0} && ip netns add {1} && ip link add eth0 netns {0} type veth peer name eth0 netns {1} || exit 1
for name in {0} {1}; do ip -n $name link set lo up; ip -n $name link set eth0 up; done
ip -n {0} address add 10.99.0.1/24 dev eth0 && ip -n {1} address add 10.99.0.2/24 dev eth0
"""
# a name, and pairs of what is mounted and where; then the command
ENTER = 'hostname "$1"; shift; while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; shift; exec "$@"'
TORCHRUN = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint first:29400"


class Machines:
    def __init__(self, names):
        self.namespaces = names

    def link(self, state):
        subprocess.run(["ip", "-n", self.namespaces[1], "link", "set", "eth0", state], check=True)

    def off(self):
        """End whatever still runs on them."""
        for name in self.namespaces:
            for process in subprocess.check_output(["ip", "netns", "pids", name], text=True).split():
                os.kill(int(process), signal.SIGKILL)

    def start(self, folder, words, own=(), more=(), launcher=()):
        """A process on each; the second has files of its `own`, pairs of a path and its place, and `more` flags."""
        (folder / "hosts").write_text(HOSTS)
        running = []
        for i, (namespace, name) in enumerate(zip(self.namespaces, ("first", "second"), strict=True)):
            mounts = [folder / "hosts", "/etc/hosts", *(path for pair in own if i for path in pair)]
            inside = ["ip", "netns", "exec", namespace, "unshare", "--uts", "--mount", "sh", "-c", ENTER, "-", name]
            ranks = {} if launcher else {"RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            with open(folder / f"out{i}.txt", "w") as out:
                running.append(
                    subprocess.Popen(
                        [*inside, *mounts, "--", sys.executable, *launcher, *words, *(more if i else ())],
                        env={**os.environ, **ranks, "MASTER_ADDR": "first", "MASTER_PORT": "29400",
                             "OMP_NUM_THREADS": "1"},
                        cwd=folder, stdout=out, stderr=out,
                    )
                )  # fmt: skip
        return running

    def ends(self, running, folder, timeout) -> list[tuple[int, str]]:
        """(exit code, output) of both, which must end within so many seconds."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and any(process.poll() is None for process in running):
            time.sleep(0.1)
        codes = [process.poll() for process in running]
        self.off()
        found = [(code, (folder / f"out{i}.txt").read_text()) for i, code in enumerate(codes)]
        assert None not in codes, found
        return found


@pytest.fixture(scope="module")
def machines():
    names = [f"{which}{os.getpid()}" for which in ("first", "second")]
    made = subprocess.run(["sh", "-c", SETUP.format(*names)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    pair = Machines(names)
    yield pair
    pair.off()
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def command(base, data):
    words = f"{QUICK} {STEPS} --model_name_or_path {base} --dataset_names {data} --output_dir sft"
    return [str(ROOT / "sft_training.py"), *words.split(), "--ddp_timeout", str(TIMEOUT)]


@pytest.fixture(scope="module")
def expected(machines, base, data, tmp_path_factory):
    """The weights of a run whose link holds, started by torchrun."""
    folder = tmp_path_factory.mktemp("whole")
    found = machines.ends(machines.start(folder, command(base, data), launcher=TORCHRUN.split()), folder, LIMIT)
    assert [code for code, _ in found] == [0, 0], found
    return (folder / "sft" / ADAPTER).read_bytes()


def test_a_link_that_is_cut_before_training_ends_both_within_the_timeout(machines, base, data, tmp_path):
    running = machines.start(tmp_path, command(base, data))
    while "machine:" not in (tmp_path / "out0.txt").read_text():
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)
    machines.link("down")
    try:
        found = machines.ends(running, tmp_path, 3 * TIMEOUT)
    finally:
        machines.link("up")
    assert [code for code, _ in found] == [1, 1], found
    for _, text in found:
        assert "is gone: no " in text and "Traceback" not in text, text


def test_a_cut_link_ends_both_within_the_timeout_and_the_run_goes_on(machines, base, data, expected, tmp_path):
    running = machines.start(tmp_path, command(base, data))
    while not (tmp_path / "sft" / "checkpoint-5" / "manifest.json").exists():
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)
    machines.link("down")
    cut = time.monotonic()
    try:
        found = machines.ends(running, tmp_path, 3 * TIMEOUT)  # some more, where others share the processors
    finally:
        machines.link("up")
    print(f"both ended {time.monotonic() - cut:.0f} s after the cut, with --ddp_timeout {TIMEOUT}")
    for code, printed in found:
        assert code != 0 and printed.count("error: ") == 1 and "Traceback" not in printed, printed
    found = machines.ends(machines.start(tmp_path, command(base, data)), tmp_path, LIMIT)
    assert [code for code, _ in found] == [0, 0] and "continuing from checkpoint-" in found[0][1], found
    assert (tmp_path / "sft" / ADAPTER).read_bytes() == expected


def other_rows(folder, base, data):
    (folder / "pairs.jsonl").write_text("".join(Path(data).read_text().splitlines(keepends=True)[1:]))
    return [(folder, Path(data).parent)]


def no_rows(folder, base, data):
    return [(folder, Path(data).parent)]


def no_base(folder, base, data):
    return [(folder, base)]


def other_base(folder, base, data):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).add_(torch.tensor(1e-3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return [(folder, base)]


def other_template(folder, base, data):
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE.replace("Human", "Person"))
    return [(folder, base)]


@pytest.mark.parametrize("what, named", [
    (no_rows, "pairs.jsonl"),
    (other_rows, "second"),
    (no_base, "base"),
    (other_base, "second"),
    (other_template, "second"),
    ("--learning_rate -1", "learning_rate"),
    ("--nosuch 1", "nosuch"),
    ("--learning_rate 2e-2", "second"),
    ("--max_steps 41", "second"),
    ("--eval_strategy steps", "second"),
])  # fmt: skip
def test_a_mistake_on_the_second_machine_alone_ends_both(what, named, machines, base, data, tmp_path):
    (tmp_path / "own").mkdir()
    own, more = ([], what.split()) if isinstance(what, str) else (what(tmp_path / "own", base, data), [])
    found = machines.ends(machines.start(tmp_path, command(base, data), own, more), tmp_path, LIMIT)
    assert [code for code, _ in found] == [2, 2], found
    for _, printed in found:  # once on each machine
        assert printed.count("error: ") == 1 and "Traceback" not in printed and named in printed, printed
    assert not (tmp_path / "sft" / "run.json").exists()


@pytest.mark.parametrize("what", [no_rows, other_base])
def test_torchrun_ends_so_too_though_with_its_own_exit_code(what, machines, base, data, tmp_path):
    (tmp_path / "own").mkdir()
    own = what(tmp_path / "own", base, data)
    running = machines.start(tmp_path, command(base, data), own, launcher=TORCHRUN.split())
    found = machines.ends(running, tmp_path, LIMIT)
    assert [code for code, _ in found] == [1, 1] and "exitcode  : 2 " in found[0][1] + found[1][1], found
    assert sum(printed.count("error: ") for _, printed in found) in (1, 2), found


@pytest.mark.parametrize("lost", ["its newest checkpoint", "all"])
def test_machines_whose_output_folders_differ_do_not_go_on(lost, machines, base, data, tmp_path):
    """Disks of their own, where the second has an older state of the run, or nothing."""
    flags = [*command(base, data), "--max_steps", "10"]
    found = machines.ends(machines.start(tmp_path, flags), tmp_path, LIMIT)
    assert [code for code, _ in found] == [0, 0], found
    (tmp_path / "sft" / "run.json").unlink()  # as if killed before
    own = shutil.copytree(tmp_path / "sft", tmp_path / "own")
    for path in own.glob("checkpoint-10" if lost != "all" else "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = machines.ends(machines.start(tmp_path, flags, [(own, tmp_path / "sft")]), tmp_path, LIMIT)
    assert [code for code, _ in found] == [2, 2] and "second" in found[0][1] + found[1][1], found
    assert not (tmp_path / "sft" / "run.json").exists()
