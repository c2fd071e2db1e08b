"""The demo's gold score after PPO here and after TRL 1.12.0's, from the same models and with the same budget.

    python examples/demo.py --seed 0                     # leaves saved/demo_0; and so on
    python benchmarks/ppo_quality.py --seeds 0 1 2 3 4 5  # the Python with TRL 1.12.0 is made by `make bench-ppo`

TRL's trainer gets the merged SFT model with a new LoRA of the same rank, and the merged reward model, as which its
critic starts too, with a LoRA of its own; prompts, episodes, batch, learning rate and the rest are the demo's. Gold is
the score that no stage sees, of answers to held-out prompts sampled with the same noise.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]


def train_trl(folder: Path, seed: int) -> None:
    """In the Python with TRL 1.12.0: folder/{sft,reward,prompts.json} -> folder/trl."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"), total_episodes=1280, per_device_train_batch_size=64, learning_rate=1e-3,
            gradient_accumulation_steps=1, kl_coef=0.15, response_length=48, temperature=1.0, missing_eos_penalty=1.0,
            stop_token="eos", num_sample_generations=0, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, seed=seed, logging_steps=1, disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "sft", padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(folder / "sft"),
        ref_model=None,
        reward_model=reward,
        value_model=get_peft_model(critic, LoraConfig(task_type="SEQ_CLS", **lora)),
        train_dataset=Dataset.from_dict({"input_ids": json.loads((folder / "prompts.json").read_text())}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )  # fmt: skip
    trainer.train()
    trainer.model.policy.save_pretrained(folder / "trl")


def gold(model, seed: int, samples: int) -> float:
    """Mean gold score of a model's answers, `samples` to each of the held-out prompts of the demo's world."""
    import demo_world
    import torch

    from rlhf.models.loading import load_frozen_policy, load_tokenizer
    from rlhf.models.rendering import token_ids
    from rlhf.models.rollout import generate

    tokenizer = load_tokenizer(f"saved/demo_{seed}/sft")
    policy = load_frozen_policy(str(model), tokenizer)
    questions = [row["prompt"] for row in demo_world.rows("test", seed)] * samples
    ids = [token_ids(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True) for q in questions]
    noise = torch.rand(len(ids), 48, generator=torch.Generator().manual_seed(seed))
    options = {"stop_ids": {tokenizer.eos_token_id}, "pad_id": tokenizer.pad_token_id, "temperature": 1.0}
    scores = []
    for i in range(0, len(ids), 256):
        answers, _, _ = generate(policy, ids[i : i + 256], noise[i : i + 256], **options)
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        scores += map(demo_world.gold_score, questions[i : i + 256], texts)
    return sum(scores) / len(scores)


def main(args):
    if args.train_trl:
        return train_trl(Path(args.train_trl), args.seeds[0])
    import merge_peft_adapter
    from prepare_data import load_datasets
    from rlhf.models.loading import load_tokenizer
    from rlhf.models.rendering import encode_prompt, tokenize

    print(f"{'seed':6}{'SFT':>8}{'PPO here':>10}{'PPO of TRL':>12}")
    for seed in args.seeds:
        folder, demo = ROOT / f"saved/trl_{seed}", f"saved/demo_{seed}"
        for stage in ("sft", "reward"):
            flags = ["--adapter_model_name", f"{demo}/{stage}", "--output_name", str(folder / stage), "--overwrite"]
            merge_peft_adapter.main(merge_peft_adapter.make_parser().parse_args(flags))
        rows, _, _ = load_datasets(f"demo@{seed}", "prompt", seed=seed)
        tokenizer = load_tokenizer(f"{demo}/sft")
        prompts, _ = tokenize(rows, encode=encode_prompt, tokenizer=tokenizer, name="train", max_prompt_length=128)
        (folder / "prompts.json").write_text(json.dumps(list(prompts["prompt_ids"])))
        command = [args.trl_python, __file__, "--train_trl", str(folder), "--seeds", str(seed)]
        subprocess.run(command, check=True, capture_output=True)
        models = f"{demo}/sft", f"{demo}/ppo", folder / "trl"
        print("{:<6}{:8.3f}{:10.3f}{:12.3f}".format(seed, *(gold(model, seed, args.samples) for model in models)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=8, help="answers to each held-out prompt")
    parser.add_argument("--trl_python", default=str(ROOT / ".venv-trl/bin/python"), help="a Python with TRL 1.12.0")
    parser.add_argument("--train_trl", metavar="FOLDER", help=argparse.SUPPRESS)
    main(parser.parse_args())
