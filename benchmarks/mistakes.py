"""From typing to the message: seconds until each of twenty commands has ended, cold process, warm disk.

    python benchmarks/mistakes.py --repeats 7

Then the same mistake and `--help` at TRL's own command line, in turn with ours.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import record

ROOT = Path(__file__).resolve().parent.parent
GOOD = "--model_name_or_path gpt2 --output_dir saved/never --dataset_names demo"
PPO = f"{GOOD} --reward_model_name_or_path owner/reward"
COMMANDS = [  # script, flags, the most seconds it may take
    ("sft_training", f"{GOOD} --learning_rat 1", 0.3),
    ("sft_training", f"{GOOD} --learning_rate fast", 0.3),
    ("sft_training", f"{GOOD} --learning_rate -1e-4", 0.3),
    ("sft_training", f"{GOOD} --optim galore_adamw", 0.3),
    ("sft_training", f"{GOOD} --config nowhere.yaml", 0.3),
    ("sft_training", "--model_name_or_path gpt2 --output_dir saved/never --dataset_names ucc", 0.3),
    ("sft_training", "--model_name_or_path gpt2 --output_dir README.md/out --dataset_names demo", 0.3),
    ("sft_training", "--model_name_or_path ./nowhere --output_dir saved/never", 0.3),
    ("reward_modeling", f"{GOOD} --label_smoothing_factor 0.1", 0.3),
    ("dpo_training", f"{GOOD} --loss_type banana", 0.3),
    ("dpo_training", f"{GOOD} --label_smoothing 0.1", 0.3),
    ("ppo_training", f"{PPO} --kl_coef -1", 0.3),
    ("ppo_training", f"{PPO} --init_kl_coef 0.1", 0.3),
    ("sft_training", "--help", 1.0),
    ("ppo_training", "--help_all", 1.0),
    ("merge_peft_adapter", "--adapter_modle_name x --output_name y", 0.2),
    ("merge_peft_adapter", "--adapter_model_name ./nowhere --output_name saved/never", 0.2),
    ("evaluate_model", "--output_dir saved/never --best_of 0", 0.2),
    ("prepare_data", "--dataset_names ucc", 0.2),
    ("prepare_data", "--help", 0.2),
]


TRL = str(Path(sys.executable).with_name("trl"))
BESIDE = {  # what is typed here and there
    "an unknown flag": (f"{GOOD} --learning_rat 1", "--model_name_or_path gpt2 --dataset_name x --learning_rat 1"),
    "--help": ("--help", "--help"),
}


def ended(words: list[str]) -> tuple[float, subprocess.CompletedProcess]:
    """Seconds until a command has ended, and what it said."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    return time.perf_counter() - start, process


def beside_trl(args):
    for name, (ours, theirs) in BESIDE.items():
        sides = {"ours": [sys.executable, "sft_training.py", *ours.split()], "trl": [TRL, "sft", *theirs.split()]}
        seconds = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side, words in sides.items():
                took, process = ended(words)
                assert (process.returncode == 0) == (name == "--help"), process.stderr
                seconds[side].append(took)
        medians = {side: statistics.median(all_of) for side, all_of in seconds.items()}
        print(f"{name}: ours {medians['ours']:.2f} s, trl sft {medians['trl']:.2f} s")
        for side, median in medians.items():
            record(args.record, f"{name}: {side}", ratio=median / medians["ours"], seconds=median)


def main(args):
    late = 0
    print("| median s | at most | command | says |\n|---|---|---|---|")
    for script, flags, limit in COMMANDS:
        seconds = []
        for _ in range(args.repeats):
            took, process = ended([sys.executable, f"{script}.py", *flags.split()])
            seconds.append(took)
        assert process.returncode == (0 if "--help" in flags else 2), process.stderr
        says = (process.stderr or process.stdout).splitlines()[0]
        median, shown = statistics.median(seconds), flags.removeprefix(GOOD)[:50]
        late += median > limit
        print(f"| {median:.2f} | {limit} | {script}.py {shown} | {says[:80]} |")
    print(f"{late} of {len(COMMANDS)} later than they may")
    beside_trl(args)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each command; the median is shown (7)")
    parser.add_argument("--record", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
