"""The memory that a dry run tells beside what the run then takes, for every stage; and docs/machines.md's table.

    python benchmarks/memory.py
    python benchmarks/memory.py --shapes 4M --stages sft_training --processes 2
    python benchmarks/memory.py --table

Batches of 8 rows of 256 tokens through random GPT-2s, each in a process of its own that estimates and then trains.
`tensors` is the most that was held at once in tensors, `process` the peak of the process over what it had before the
model was loaded. glibc is left to give back what is freed; with --keep_freed it is told what our runs tell it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from bench import GPT2, SMALL, make_base_and_reward

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

SHAPES = {"4M": SMALL, "124M": GPT2}
# parameters, layers, width, width of the MLP, width of keys and values: gpt2's, Llama's
MODELS = {
    "0.1B": (0.124e9, 12, 768, 3072, 768),
    "1B": (1.24e9, 16, 2048, 8192, 512),
    "7B": (6.74e9, 32, 4096, 11008, 4096),
    "70B": (70.6e9, 80, 8192, 28672, 1024),
}
STAGES = ("sft_training", "reward_modeling", "dpo_training", "ppo_training")


def make(folder: Path, config: dict) -> None:
    """A random base, a reward adapter on it, and rows of 256 tokens and more."""
    make_base_and_reward(folder, config)
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(64):
            row = {"prompt": f"{i:03d}" + "xyz" * 100, "chosen": "abcd" * 30, "rejected": "dcba" * 30}
            file.write(json.dumps(row) + "\n")


def flags_of(folder: Path, stage: str, full: bool, checkpointing: bool) -> list[str]:
    flags = f"--model_name_or_path {folder / 'base'} --dataset_names {folder / 'rows.jsonl'} --use_cpu"
    flags += f" --output_dir {folder / 'out'} --overwrite_output_dir --gradient_checkpointing {checkpointing}"
    flags += " --per_device_train_batch_size 8 --save_strategy no --eval_strategy no --report_to none"
    flags += " --max_prompt_length 192 --validation_split_percentage 1"
    if stage == "ppo_training":
        flags += f" --reward_model_name_or_path {folder / 'reward'} --response_length 64 --num_ppo_epochs 1"
        flags += " --num_sample_generations 0"
    else:
        flags += " --max_length 256"
    # Adam's state is there from the second step on; a LoRA's is small
    return (flags + (" --no_use_peft --max_steps 2" if full else " --max_steps 1")).split()


def measure(stage: str, flags: list[str]) -> None:
    """Bytes of a process as estimated, and at the peak of two optimizer steps: of tensors, and of all that it has."""
    import importlib

    import psutil
    from transformers import Trainer

    import rlhf.ppo.trainer
    import rlhf.runs.trainers  # noqa: F401  what a script imports
    from rlhf.runs.measured_memory import Allocated, room_of, tensors_held
    from rlhf.runs.memory import estimate

    script = importlib.import_module(stage)
    parsed = script.make_parser().parse_args_and_config(flags)
    start, train, found = psutil.Process().memory_info().rss, Trainer.train, {}

    def watched(trainer, *args, **kwargs):
        found["estimate"] = estimate(trainer, room_of(trainer))(8)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        weights = tensors_held()
        with Allocated() as allocated:
            result = train(trainer, *args, **kwargs)
        found["tensors"] = weights + allocated.peak
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        found["process"] = int(status["VmHWM"].split()[0]) * 1024 - start
        return result

    Trainer.train = watched
    script.main(*parsed)
    if int(os.environ.get("RANK", 0)) == 0:
        print("FOUND", json.dumps(found), flush=True)


def table() -> None:
    """GB that a process holds before activations, by size and way of training; a LoRA of rank 16 on all layers."""
    from rlhf.runs.memory import held

    print(
        "| parameters | LoRA | two GPUs or more | bfloat16 base | 4-bit base | all weights | two or more | FSDP on 8 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (base, layers, width, mlp, keys) in MODELS.items():
        trained = 4 * 16 * layers * (4 * width + 2 * (width + keys) + (2 if name == "0.1B" else 3) * (width + mlp))
        ways = [held(4 * base + trained, trained), held(4 * base + trained, trained, processes=2)]
        ways += [held(each * base + trained, trained) for each in (2, 0.5625)]
        ways += [held(4 * base, 4 * base), held(4 * base, 4 * base, processes=2)]
        ways += [held(4 * base, 4 * base, processes=8, engine="full")]
        print(f"| {name} | {' | '.join(f'{way.total / 1e9:.1f}' for way in ways)} |")


def main(args):
    if args.table:
        return table()
    print(f"{'':32}{'estimate MB':>12}{'tensors':>10}{'process':>10}{'estimate / tensors':>20}{'/ process':>12}")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), SHAPES[shape])
            for stage, full, checkpointing in product(args.stages, args.training, args.checkpointing):
                flags = flags_of(Path(folder), stage, full == "full", checkpointing == "true")
                start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes)]
                command = [*(start if args.processes > 1 else start[:1]), __file__, "--measure", stage, *flags]
                # as the allocator comes: ours keeps what is freed
                env = os.environ | ({} if args.keep_freed else {"MALLOC_MMAP_MAX_": "65536"})
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND ")]
                if not lines:
                    print(stage, full, checkpointing, done.stderr[-1000:], flush=True)
                    continue
                found = json.loads(lines[0])
                total, tensors, process = sum(found["estimate"]), found["tensors"], found["process"]
                name = f"{shape} {stage.split('_')[0]} {full}{' checkpointing' * (checkpointing == 'true')}"
                name += f" x {args.processes}" * (args.processes > 1)
                print(
                    f"{name:32}{total / 1e6:12.0f}{tensors / 1e6:10.0f}{process / 1e6:10.0f}"
                    f"{total / tensors:20.2f}{total / process:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--training", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--checkpointing", nargs="+", choices=["false", "true"], default=["false", "true"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep_freed", action="store_true", help="with the allocator as our runs set it")
    parser.add_argument("--table", action="store_true", help="only print the table of docs/machines.md")
    main(parser.parse_args())
