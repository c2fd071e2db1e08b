"""Two network namespaces as machines, and the link between them cut: `python -m pytest tests/slow/test_machines.py`.

Each machine has an address, a name and, where a test says so, files of its own; it takes root. Minutes.
"""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import QUICK, ROOT

ADAPTER, TIMEOUT = "adapter_model.safetensors", 20
STEPS = "--max_steps 40 --save_steps 5 --eval_strategy no --learning_rate 1e-2 --per_device_train_batch_size 2"
SETUP = """
ip netns add {0} && ip netns add {1} && ip link add eth0 netns {0} type veth peer name eth0 netns {1} || exit 1
for name in {0} {1}; do ip -n $name link set lo up; ip -n $name link set eth0 up; done
ip -n {0} address add 10.99.0.1/24 dev eth0 && ip -n {1} address add 10.99.0.2/24 dev eth0
"""
# a name, and a mount for each pair of folders; then the command
ENTER = 'hostname "$1"; shift; while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; shift; exec "$@"'


class Machines:
    def __init__(self, names):
        self.names = names

    def link(self, state):
        subprocess.run(["ip", "-n", self.names[1], "link", "set", "eth0", state], check=True)

    def start(self, folder, words, own=(), more=()):
        """torchrun on both; the second has `own` files, pairs of (its folder, where it sees it), and `more` flags."""
        running = []
        for i, name in enumerate(self.names):
            torchrun = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id t"
            torchrun += f" --rdzv-endpoint 10.99.0.1:29400"
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 first\n10.99.0.2 second\n")
            files = [folder / "hosts", "/etc/hosts", *(path for pair in own if i for path in pair)]
            inside = [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "--mount",
                "sh",
                "-c",
                ENTER,
                "-",
                ("first", "second")[i],
                *files,
            ]
            with open(folder / f"out{i}.txt", "w") as out:
                running.append(
                    subprocess.Popen(
                        [*inside, "--", sys.executable, *torchrun.split(), *words, *(more if i else ())],
                        cwd=folder,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        stdout=out,
                        stderr=out,
                        start_new_session=True,
                    )
                )
        return running


def ends(running, folder, timeout) -> list[tuple[int, str]]:
    """(exit code, output) of both machines, which must end within so many seconds."""
    until = time.monotonic() + timeout
    try:
        codes = [process.wait(timeout=max(0.1, until - time.monotonic())) for process in running]
    except subprocess.TimeoutExpired:
        for process in running:
            os.killpg(process.pid, 9)
        pytest.fail("\n".join((folder / f"out{i}.txt").read_text() for i in (0, 1)))
    return [(code, (folder / f"out{i}.txt").read_text()) for i, code in enumerate(codes)]


@pytest.fixture(scope="module")
def machines():
    names = [f"{which}{os.getpid()}" for which in ("first", "second")]
    made = subprocess.run(["sh", "-c", SETUP.format(*names)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    yield Machines(names)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def command(base, data, folder="sft"):
    words = f"{QUICK} {STEPS} --model_name_or_path {base} --dataset_names {data} --output_dir {folder}"
    return [str(ROOT / "sft_training.py"), *words.split()]


@pytest.fixture(scope="module")
def expected(machines, base, data, tmp_path_factory):
    """The weights of a run whose link holds."""
    folder = tmp_path_factory.mktemp("whole")
    found = ends(machines.start(folder, command(base, data)), folder, 300)
    assert [code for code, _ in found] == [0, 0], found
    return (folder / "sft" / ADAPTER).read_bytes()


def test_a_cut_link_ends_both_in_a_line_within_the_timeout_and_the_run_goes_on(
    machines, base, data, expected, tmp_path
):
    running = machines.start(tmp_path, command(base, data))
    while not (tmp_path / "sft" / "checkpoint-5" / "manifest.json").exists():
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)
    machines.link("down")
    cut = time.monotonic()
    try:
        found = ends(running, tmp_path, 3 * TIMEOUT)
    finally:
        machines.link("up")
    print(f"both ended {time.monotonic() - cut:.0f} s after the cut, with --ddp_timeout {TIMEOUT}")
    for code, printed in found:
        assert code != 0 and printed.count("error: ") == 1, printed
    found = ends(machines.start(tmp_path, command(base, data)), tmp_path, 300)
    assert [code for code, _ in found] == [0, 0] and "continuing from checkpoint-" in found[0][1], found
    assert (tmp_path / "sft" / ADAPTER).read_bytes() == expected


def differing(what, base, data, tmp_path):
    """(files of its own, more flags) of the second machine, and what its error names."""
    import shutil

    folder = tmp_path / "own"
    if what == "a file is missing":
        folder.mkdir()
        return [(folder, os.path.dirname(data))], (), "pairs.jsonl"
    if what == "rows differ":
        folder.mkdir()
        (folder / "pairs.jsonl").write_text("".join(open(data).readlines()[1:]))
        return [(folder, os.path.dirname(data))], (), ""
    if what == "no base":
        folder.mkdir()
        return [(folder, base)], (), ""
    if what == "another base":
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(base, folder)
        weights = load_file(folder / "model.safetensors")
        save_file({k: v + torch.eye(*v.shape) if v.ndim == 2 else v for k, v in weights.items()},
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        return [(folder, base)], (), ""
    return [], what.split(), what.split()[0].strip("-")


DIFFERENT = ("a file is missing", "rows differ", "no base", "another base", "--learning_rate -1", "--nosuch 1",
             "--learning_rate 2e-2", "--eval_dataset_names nosuch.jsonl")  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_mistake_on_the_second_machine_alone_ends_both(what, machines, base, data, tmp_path):
    own, more, named = differing(what, base, data, tmp_path)
    running = machines.start(tmp_path, command(base, data), own, more)
    first, second = ends(running, tmp_path, 120)
    for code, printed in (first, second):
        assert code != 0 and "saved in" not in printed
    assert second[1].count("error: ") == 1 and "exitcode  : 2 " in second[1] and named in second[1], second[1]
    assert not (tmp_path / "sft" / "run.json").exists()
