"""What PPO learns in equal episodes: here with either critic, and in TRL 1.12.0, from the same models, over seeds.

    for seed in 0 1 2 3 4 5; do python examples/demo.py --seed $seed; done    # leaves saved/demo_0; and so on
    python benchmarks/ppo_quality.py demo --seeds 0 1 2 3 4 5
    python benchmarks/ppo_quality.py words --model MODEL --prompts FILE --seeds 0 1 2 3 4 5

`demo` is the demo's PPO, and what counts its gold score, which no stage sees; `words` rewards how many of a list of
words an answer of any small model has, by a function. Both are judged by answers to held-out prompts, sampled with the
same noise. The critics are a LoRA of its own (the default) and a head on the policy's states. TRL's trainer gets the
merged models, with LoRAs of the same rank; its critic starts as the reward model, or where there is none, as the
policy with a new head. The Python with TRL 1.12.0 is made by `make bench-ppo`. Seconds are an update's on one thread.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import LORA, median_seconds, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

COMMON = {"response_length": 48, "temperature": 1.0, "learning_rate": 1e-3}
TASKS = {
    "demo": {**COMMON, "total_episodes": 1280, "per_device_train_batch_size": 64, "kl_coef": 0.15,
             "missing_eos_penalty": 1.0},
    "words": {**COMMON, "total_episodes": 480, "per_device_train_batch_size": 32, "kl_coef": 0.05},
}  # fmt: skip
WORDS = set(
    "happy fun play friend love laugh smile sun kind good nice hug mom dad day little big tree dog cat park toy red"
    " blue".split()
)
CRITICS = {"lora": [], "head": ["--value_adapter", "false"]}


def words(prompts, completions, **columns) -> list[float]:
    """How many of the words an answer has."""
    return [float(len(WORDS & set(re.findall("[a-z]+", c[0]["content"].lower())))) for c in completions]


def save_seconds(folder: Path, ends: list[float], args) -> None:
    """Those of an update of a trainer with these arguments."""
    seconds = median_seconds(ends, args.total_episodes // args.batch_size)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def train_here(folder: Path, task: str, seed: int, critic: str) -> None:
    """folder/task.json -> folder/lora or folder/head."""
    import ppo_training
    from rlhf.ppo.trainer import PPOTrainer

    start, flags = PPOTrainer.train, json.loads((folder / "task.json").read_text())["ours"]
    ends = []

    def train(trainer, **kwargs):
        ends.append(timed(trainer, time.process_time))
        return start(trainer, **kwargs)

    PPOTrainer.train = train
    own = {"output_dir": folder / critic, "seed": seed, "logging_steps": 1}
    own |= {"eval_strategy": "no", "save_strategy": "no"}
    words_of = [part for name, value in (flags | TASKS[task] | own).items() for part in (f"--{name}", str(value))]
    arguments = ppo_training.make_parser().parse_args_and_config([*words_of, *CRITICS[critic], "--use_cpu"])
    ppo_training.main(*arguments)
    save_seconds(folder / critic, ends[0], arguments[1])


def train_trl(folder: Path, task: str, seed: int) -> None:
    """In the Python with TRL 1.12.0: folder/{policy,reward,task.json} -> folder/trl."""
    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    torch.manual_seed(seed)
    judge = folder / "reward" if task == "demo" else folder / "policy"
    critic, reward = (AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1) for _ in range(2))
    critic.config.pad_token_id = tokenizer.pad_token_id
    read = module.get_reward

    def get_reward(model, rows, pad_id, start):  # a reward that is a function of the text
        if model is not reward or task == "demo":
            return read(model, rows, pad_id, start)
        texts = [
            tokenizer.decode([t for t in row if t != pad_id], skip_special_tokens=True) for row in rows[:, start:]
        ]
        return None, torch.tensor(words([], [[{"content": text}] for text in texts])), None

    module.get_reward = get_reward
    given = json.loads((folder / "task.json").read_text())
    lora = {**LORA, "lora_dropout": 0.05}
    args = module.PPOConfig(
        output_dir=str(folder / "trl"), stop_token_id=given["stop_id"], num_sample_generations=0, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=seed, logging_steps=1,
        disable_tqdm=True, **TASKS[task],
    )  # fmt: skip
    trainer = module.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=None,
        reward_model=reward,
        value_model=get_peft_model(critic, LoraConfig(task_type="SEQ_CLS", **lora)),
        train_dataset=Dataset.from_dict({"input_ids": given["prompts"]}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    ends = timed(trainer, time.process_time)
    trainer.train()
    trainer.model.policy.save_pretrained(folder / "trl")
    save_seconds(folder / "trl", ends, args)


def prepare(folder: Path, args, seed: int) -> tuple[str, list]:
    """Write what both trainers start from; the model that they do, and the held-out rows."""
    import merge_peft_adapter
    from prepare_data import load_datasets
    from rlhf.models.loading import load_frozen_policy, load_tokenizer
    from rlhf.models.rendering import encode_prompt
    from rlhf.models.rollout import stop_ids
    from rlhf.models.tokenizing import tokenize

    model, data = (f"saved/demo_{seed}/sft", f"demo@{seed}") if args.task == "demo" else (args.model, args.prompts)
    judge = f"saved/demo_{seed}/reward" if args.task == "demo" else f"{Path(__file__).resolve()}:words"
    split = {"validation_split_percentage": 20, "seed": seed}
    rows, held, _ = load_datasets(data, "prompt", **split)
    tokenizer = load_tokenizer(model)
    folder.mkdir(parents=True, exist_ok=True)
    if args.task == "demo":
        for stage, name in (("sft", "policy"), ("reward", "reward")):
            flags = ["--adapter_model_name", f"saved/demo_{seed}/{stage}", "--output_name", str(folder / name)]
            merge_peft_adapter.main(merge_peft_adapter.make_parser().parse_args([*flags, "--overwrite"]))
        stop = tokenizer.eos_token_id
    else:
        policy = load_frozen_policy(model, tokenizer)
        policy.save_pretrained(folder / "policy"), tokenizer.save_pretrained(folder / "policy")
        stop = min(stop_ids(policy, tokenizer))  # TRL knows one
    prompts, _ = tokenize(rows, encode_prompt, tokenizer, max_prompt_length=128)
    ours = {"model_name_or_path": model, "reward_model_name_or_path": judge, "dataset_names": data}
    ours |= {"validation_split_percentage": 20, "max_prompt_length": 128, "overwrite_output_dir": True}
    task = {"ours": ours, "prompts": list(prompts["prompt_ids"]), "stop_id": stop}
    (folder / "task.json").write_text(json.dumps(task))
    return model, [row["prompt"] for rows in held.values() for row in rows]


def score(model: str, task: str, start: str, held: list, seed: int, samples: int) -> float:
    """The mean score of a model's answers, `samples` to each of the held-out prompts."""
    import torch
    from demo_world import gold

    from rlhf.models.loading import load_frozen_policy, load_tokenizer
    from rlhf.models.rendering import token_ids
    from rlhf.models.rollout import generate, stop_ids

    tokenizer = load_tokenizer(start)
    policy, prompts, scores = load_frozen_policy(model, tokenizer), held * samples, []
    ids = [token_ids(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    noise = torch.rand(len(ids), 48, generator=torch.Generator().manual_seed(seed))
    options = {"stop_ids": stop_ids(policy, tokenizer), "pad_id": tokenizer.pad_token_id, "temperature": 1.0}
    for i in range(0, len(ids), 256):
        answers, _, _ = generate(policy, ids[i : i + 256], noise[i : i + 256], **options)
        texts = [[{"content": tokenizer.decode(a, skip_special_tokens=True).strip()}] for a in answers]
        scores += (gold if task == "demo" else words)(prompts[i : i + 256], texts)
    return sum(scores) / len(scores)


def main(args):
    if args.train:
        given = Path(args.train), args.task, args.seeds[0]
        return train_trl(*given) if args.who == ["trl"] else train_here(*given, args.who[0])
    results, seconds = {who: [] for who in ("start", *args.who)}, {who: [] for who in args.who}
    print(f"{'seed':10}" + "".join(f"{who:>10}" for who in results))
    for seed in args.seeds:
        folder = ROOT / f"saved/quality_{args.task}_{seed}"
        start, held = prepare(folder, args, seed)
        for who in args.who:
            python = args.trl_python if who == "trl" else sys.executable
            flags = ["--seeds", str(seed), "--who", who, "--train", str(folder)]
            env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            subprocess.run([python, __file__, args.task, *flags], check=True, capture_output=True, cwd=ROOT, env=env)
            seconds[who].append(json.loads((folder / who / "seconds.json").read_text()))
        for who, scores in results.items():
            model = start if who == "start" else str(folder / who)
            scores.append(score(model, args.task, start, held, seed, args.samples))
        print(f"{seed:<10}" + "".join(f"{scores[-1]:10.3f}" for scores in results.values()), flush=True)
    if len(args.seeds) > 1:
        print(f"{'mean':10}" + "".join(f"{statistics.mean(scores):10.3f}" for scores in results.values()))
        errors = [statistics.stdev(scores) / len(scores) ** 0.5 for scores in results.values()]
        print(f"{'error':10}" + "".join(f"{error:10.3f}" for error in errors))
    print(f"{'CPU s':20}" + "".join(f"{statistics.median(some):10.2f}" for some in seconds.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--who", nargs="+", choices=[*CRITICS, "trl"], default=[*CRITICS, "trl"])
    parser.add_argument("--model", help="of `words`: a model's folder")
    parser.add_argument("--prompts", help="of `words`: a dataset's name or file, of at least 480 prompts to train on")
    parser.add_argument("--samples", type=int, default=8, help="answers to each held-out prompt")
    parser.add_argument("--trl_python", default=str(ROOT / ".venv-trl/bin/python"), help="a Python with TRL 1.12.0")
    parser.add_argument("--train", metavar="FOLDER", help=argparse.SUPPRESS)
    main(parser.parse_args())
