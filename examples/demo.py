"""The whole pipeline on a small made-up world, in minutes on a laptop: what `make demo` runs.

    python examples/demo.py
    python examples/demo.py --seed 1 --output_dir saved/demo_1

Trains the world's base model once (kept for the next time), then SFT, reward model, DPO, PPO and a merge with the
project's own scripts; and compares the models on held-out prompts with evaluate_model.py. Each stage's log is in its
own folder, the comparison in report/.

Watch the gold score: the quality that the world's author had in mind. No stage is shown it; SFT imitates mixed
answers, and the others see which of two answers was liked better, wrongly now and then.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file can be started by its path

from examples import demo_world  # noqa: E402

# What differs from the scripts' defaults, since the model is a thousand times smaller than those they are made for.
FLAGS = {
    "sft": "--num_train_epochs 1 --learning_rate 2e-3 --per_device_train_batch_size 16",
    "reward": "--num_train_epochs 1.5 --learning_rate 3e-3 --per_device_train_batch_size 32",
    "dpo": "--max_steps 120 --learning_rate 5e-4 --per_device_train_batch_size 16 --beta 0.5",
    "ppo": "--total_episodes 1280 --learning_rate 1e-3 --per_device_train_batch_size 64 --kl_coef 0.15"
    " --response_length 48 --temperature 1.0 --missing_eos_penalty 1.0 --num_sample_generations 4",
    "report": "--best_of 8 --response_length 48 --per_device_eval_batch_size 128",
}


def stages(base: str, folder: str, data: str) -> dict[str, list[str]]:
    """The commands, in order: what to type by hand for the same result."""

    def command(stage, script, model, extra=""):
        required = f"--model_name_or_path {model} --output_dir {folder}/{stage} --dataset_names {data}"
        return f"accelerate launch {script} {required} {FLAGS[stage]}{extra}"

    sft = f"{folder}/sft"
    models = ",".join([base, *(f"{folder}/{stage}" for stage in ("sft", "dpo", "ppo"))])
    judges = f"{folder}/reward,examples/demo_world.py:gold"
    return {
        "sft": command("sft", "sft_training.py", base),
        "reward": command("reward", "reward_modeling.py", sft),
        "dpo": command("dpo", "dpo_training.py", sft),
        "ppo": command("ppo", "ppo_training.py", sft, f" --reward_model_name_or_path {folder}/reward"),
        "merged": f"python merge_peft_adapter.py --adapter_model_name {folder}/ppo --output_name {folder}/merged",
        "report": f"python evaluate_model.py --model_name_or_path {models} --baseline {sft}"
        f" --reward_model_name_or_path {judges} --dataset_names {data} --output_dir {folder}/report {FLAGS['report']}",
    }


def run(command: str) -> None:
    """One command of the project, with this interpreter; a failure ends the demo."""
    words = command.split()
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1"] if words[0] == "accelerate" else []
    words = words[2:] if launcher else words[1:]
    if subprocess.run([sys.executable, *launcher, *words]).returncode != 0:
        raise SystemExit(f"the demo stopped at: {command}")


def main(args):
    os.chdir(ROOT)  # where the commands are typed
    start = time.time()
    folder, base = Path(args.output_dir), Path(f"{args.base_dir}_{args.seed}")
    data = f"demo@{args.seed}"
    seconds = {}
    if not base.exists():
        print(f"training the world's base model (once; kept in {base})", flush=True)
        demo_world.train_base(base, args.seed)
        seconds["base"] = time.time() - start
    for stage, command in stages(str(base), str(folder), data).items():
        if (folder / stage / "run.json").exists() or (folder / stage / "merge.json").exists():
            continue  # an interrupted demo goes on where it stopped
        began = time.time()
        print(f"\n$ {command}", flush=True)
        run(command + ("" if stage == "merged" else f" --seed {args.seed}"))
        seconds[stage] = time.time() - began
    seconds["all"] = time.time() - start
    print("\nseconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in seconds.items()))
    print(f"read the answers, and judge them yourself: open {folder}/report/report.html in a browser")
    print(f"curves: {folder}/*/learning_curves.png; samples of the world: python examples/demo_world.py --samples 10")
    print("next, on a real model: accelerate launch sft_training.py --model_name_or_path=gpt2-medium \\")
    print("    --output_dir=saved/gpt2_medium_uc_sft --dataset_names=uc")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", help="where the stages' folders go; by default saved/demo_<seed>")
    parser.add_argument(
        "--base_dir", default="saved/demo_base", help="where the base model is kept, with _<seed> added"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, of its base model and of the training")
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir or f"saved/demo_{arguments.seed}"
    main(arguments)
