r"""Any of the training scripts, as it is, on a Ray cluster: Ray Train's TorchTrainer starts it once a worker.

    python examples/launch_ray.py --num_workers 2 --cpus_per_worker 1 sft_training.py --config configs/sft.yaml
    python examples/launch_ray.py --num_workers 8 --cpus_per_worker 4 --use_gpu --max_failures 10 \
        sft_training.py --config configs/sft.yaml

Without a cluster it starts Ray on this machine (`pip install -r requirements-extra.txt`). What stands before the
script is for Ray, what follows is the script's. Coming from llm-on-ray: its `num_training_workers` is --num_workers,
its `resources_per_worker` is --cpus_per_worker, with a GPU each under --use_gpu.

A worker that is killed, a script that crashed and one that a signal stopped (exit code 85) are started again, up to
--max_failures times, and go on from the last checkpoint; a mistake in the command (exit code 2) ends all at once.

Watch where files are: paths mean the folder that this command is typed in, which every machine must have under the
same name, on a shared disk. `ray start` gives a machine's workers their environment (GLOO_SOCKET_IFNAME, HF_HOME).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that this file can be started by its path

from rlhf.user_error import ToolParser, UserError, mistake, number  # noqa: E402


def work(order: dict) -> int:
    """On each worker: run the command in a process of its own, for signals reach only a main thread; its exit code.

    Raises:
        RuntimeError: for a failure that Ray is to try again.
    """
    import ctypes
    import signal
    import socket
    import subprocess

    import ray.train
    import torch.distributed as dist

    context = ray.train.get_context()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port)  # Ray's own process group, which holds MASTER_PORT, stays the workers' line
    ranks = {"RANK": context.get_world_rank(), "WORLD_SIZE": context.get_world_size(), "MASTER_PORT": port[0]}
    ranks |= {"LOCAL_RANK": context.get_local_rank(), "LOCAL_WORLD_SIZE": context.get_local_world_size()}
    environment = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
    libc = ctypes.CDLL(None)
    try:  # a worker that is killed takes its script along (PR_SET_PDEATHSIG): the next one wants its folder
        done = subprocess.run(order["command"], cwd=order["folder"], env=environment,
                              preexec_fn=lambda: libc.prctl(1, signal.SIGKILL))  # fmt: skip
        code = done.returncode
    except FileNotFoundError as error:
        sys.stderr.write(f"error: {socket.gethostname()} has no {error.filename}: the machines need a shared disk\n")
        code = 2
    codes = [None] * context.get_world_size()
    dist.all_gather_object(codes, code)
    if 2 not in codes and any(codes):
        raise RuntimeError(f"exit codes of the workers, by rank: {codes}")
    return 2 if 2 in codes else 0


def main(args, command: list[str]) -> int:
    """Start the command on every worker; the exit code for the shell."""
    each = {"CPU": args.cpus_per_worker, **({"GPU": 1} if args.use_gpu else {})}
    os.environ.setdefault("RAY_worker_niceness", "0")  # of workers of a Ray that is started here; else 15
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UserError(f"Ray is not installed here ({error}): pip install -r requirements-extra.txt") from error
    try:
        ray.init(address="auto")
    except ConnectionError:
        ray.init()
        for kind, count in each.items():  # Ray would wait for more
            if (have := ray.cluster_resources().get(kind, 0)) < (want := args.num_workers * count):
                raise UserError(f"{want} {kind}s are asked for, {have:g} are here: see --help") from None
    trainer = TorchTrainer(
        work,
        train_loop_config={"command": [sys.executable, *command], "folder": os.getcwd()},
        # the script has the GPU; and where one crashes, the others end with it, or are ended after five minutes
        torch_config=TorchConfig(backend="gloo", timeout_s=300),
        scaling_config=ScalingConfig(num_workers=args.num_workers, use_gpu=args.use_gpu, resources_per_worker=each),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=args.max_failures)),
    )
    return trainer.fit().return_value


def make_parser():
    parser = ToolParser(__doc__)
    parser.add_argument("--num_workers", type=number(least=1), default=2, help="processes, one a worker")
    parser.add_argument("--cpus_per_worker", type=number(least=1), default=1)
    parser.add_argument("--use_gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--max_failures", type=number(least=0), default=3, help="how often to start again")
    return parser


if __name__ == "__main__":
    at = next((i for i, word in enumerate(sys.argv[1:], start=1) if word.endswith(".py")), len(sys.argv))
    try:
        parsed, command = make_parser().parse_args(sys.argv[1:at]), sys.argv[at:]
        if not command or not os.path.isfile(command[0]):
            raise UserError(f"name a script to run, as in sft_training.py: {' '.join(command[:1]) or 'none is named'}")
        sys.exit(main(parsed, command))
    except UserError as error:
        sys.exit(mistake(error))
