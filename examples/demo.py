"""The whole pipeline on a small made-up world, in minutes on a laptop: what `make demo` runs.

    python examples/demo.py
    python examples/demo.py --seed 1 --output_dir saved/demo_1

Trains the world's base model once (kept for the next time), then SFT, reward model, DPO, PPO and a merge with the
project's own scripts; and compares the models on held-out prompts. Each stage's log is in its own folder.

Watch the gold score: the quality that the world's author had in mind. No stage is shown it; SFT imitates mixed
answers, and the others see which of two answers was liked better, wrongly now and then.
"""

import argparse
import json
import subprocess
import sys
import textwrap
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
    " --response_length 48 --temperature 1.0 --missing_eos_penalty 1.0",
}


def stages(base: str, folder: str, data: str) -> dict[str, list[str]]:
    """The commands, in order: what to type by hand for the same result."""

    def command(stage, script, model, extra=""):
        required = f"--model_name_or_path {model} --output_dir {folder}/{stage} --dataset_names {data}"
        return f"accelerate launch {script} {required} {FLAGS[stage]}{extra}"

    sft = f"{folder}/sft"
    return {
        "sft": command("sft", "sft_training.py", base),
        "reward": command("reward", "reward_modeling.py", sft),
        "dpo": command("dpo", "dpo_training.py", sft),
        "ppo": command("ppo", "ppo_training.py", sft, f" --reward_model_name_or_path {folder}/reward"),
        "merged": f"python merge_peft_adapter.py --adapter_model_name {folder}/ppo --output_name {folder}/merged",
    }


def run(command: str) -> None:
    """One command of the project, with this interpreter; a failure ends the demo."""
    words = command.split()
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1"] if words[0] == "accelerate" else []
    words = words[2:] if launcher else words[1:]
    if subprocess.run([sys.executable, *launcher, *words], cwd=ROOT).returncode != 0:
        raise SystemExit(f"the demo stopped at: {command}")


def compare(base: str, folder: Path, seed: int, prompts: int, world: int) -> tuple[list[dict], list[str], dict]:
    """A row of figures for each model, the first prompts, and each model's answers to them."""
    from modeling import load_frozen_policy, load_reward_model, load_tokenizer
    from rendering import token_ids
    from rollout import generate, read_answers, score

    import torch
    from tqdm import tqdm

    tokenizer = load_tokenizer(f"{folder}/sft")
    reward_model = load_reward_model(f"{folder}/reward", tokenizer)
    questions = [row["prompt"] for _, row in zip(range(prompts), demo_world.rows("test", world), strict=False)]
    ids = [token_ids(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True) for q in questions]
    noise = torch.rand(len(ids), 48, generator=torch.Generator().manual_seed(seed))
    sft = load_frozen_policy(f"{folder}/sft", tokenizer)
    names = {
        "base": base,
        "SFT": f"{folder}/sft",
        "DPO": f"{folder}/dpo",
        "PPO": f"{folder}/ppo",
        "merged": f"{folder}/merged",
    }
    rows, answers = [], {}
    for name, path in tqdm(names.items(), desc="compare", leave=False):
        policy = load_frozen_policy(path, tokenizer)
        options = {"pad_id": tokenizer.pad_token_id, "temperature": 1.0}
        tokens, _, _ = generate(policy, ids, noise, stop_ids={tokenizer.eos_token_id}, **options)
        answers[name] = [tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
        with torch.no_grad():
            logprobs = read_answers(policy, ids, tokens, **options)[0].sum(1)
            sft_logprobs = read_answers(sft, ids, tokens, **options)[0].sum(1)
        rows.append(
            {
                "model": name,
                "gold score": mean(demo_world.gold_score(q, a) for q, a in zip(questions, answers[name], strict=True)),
                "reward": score(reward_model, [p + t for p, t in zip(ids, tokens, strict=True)], options["pad_id"])
                .mean()
                .item(),
                "KL to SFT": (logprobs - sft_logprobs).mean().item(),
                "tokens": mean(map(len, tokens)),
                "ends": mean(t[-1] == tokenizer.eos_token_id for t in tokens),
            }
        )
    return rows, questions, answers


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def report(rows, questions, answers) -> str:
    """The table and three answers side by side, 80 columns wide."""
    columns = [key for key in rows[0] if key != "model"]
    lines = ["", f"{'model':8}" + "".join(f"{column:>12}" for column in columns)]
    for row in rows:
        lines.append(f"{row['model']:8}" + "".join(f"{row[column]:12.3f}" for column in columns))
    shown = [name for name in ("base", "SFT", "DPO", "PPO")]
    for i in range(3):
        lines += ["", *textwrap.wrap(f"Q: {questions[i]}", 80)]
        for name in shown:
            gold = demo_world.gold_score(questions[i], answers[name][i])
            text = " ".join(answers[name][i].split())
            lines += textwrap.wrap(f"{name:5}{gold:.1f}  {text}", 80, subsequent_indent=" " * 10)
    return "\n".join(lines)


def main(args):
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
    rows, questions, answers = compare(str(base), folder, args.seed, args.prompts, args.seed)
    print(report(rows, questions, answers))
    seconds["all"] = time.time() - start
    (folder / "demo.json").write_text(json.dumps({"rows": rows, "seconds": seconds}, indent=2) + "\n")
    print("\nseconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in seconds.items()))
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
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts to compare the models on")
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir or f"saved/demo_{arguments.seed}"
    main(arguments)
