"""Estimated and measured memory of a process, side by side, for every stage."""

import json
import os
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

SHAPES = {
    "4M": {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 8192, "n_positions": 256},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}
STAGES = ("sft_training", "reward_modeling", "dpo_training", "ppo_training")


def make(folder: Path, config: dict) -> None:
    """A random base, a reward adapter on it, and rows of 256 tokens and more."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    from rlhf.models.loading import load_tokenizer

    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a b c"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    GPT2TokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder / "base")
    GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "base")
    load_tokenizer(str(folder / "base")).save_pretrained(folder / "reward")
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    get_peft_model(judge, LoraConfig(task_type="SEQ_CLS", r=16, target_modules="all-linear")).save_pretrained(
        folder / "reward"
    )
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(64):
            row = {"prompt": f"{i:03d}" + "xyz" * 100, "chosen": "abcd" * 30, "rejected": "dcba" * 30}
            file.write(json.dumps(row) + "\n")


def flags_of(folder: Path, stage: str, full: bool, checkpointing: bool) -> list[str]:
    flags = (
        f"--model_name_or_path {folder / 'base'} --dataset_names {folder / 'rows.jsonl'} --output_dir {folder / 'out'}"
    )
    flags += (
        " --overwrite_output_dir --per_device_train_batch_size 8 --max_steps 2 --save_strategy no --report_to none"
    )
    flags += f" --eval_strategy no --max_prompt_length 192 --gradient_checkpointing {checkpointing}"
    flags += " --validation_split_percentage 1 --use_cpu"
    if stage == "ppo_training":
        flags += f" --reward_model_name_or_path {folder / 'reward'} --response_length 64 --num_ppo_epochs 2"
        flags += " --num_sample_generations 0"
    else:
        flags += " --max_length 256"
    return (flags + " --no_use_peft" * full).split()


def measure(stage: str, flags: list[str], tracked: bool) -> None:
    import importlib

    import psutil
    from transformers import Trainer

    import rlhf.ppo.trainer
    import rlhf.runs.trainers  # noqa: F401
    from rlhf.runs import memory

    script = importlib.import_module(stage)
    parsed = script.make_parser().parse_args_and_config(flags)
    start, train, found = psutil.Process().memory_info().rss, Trainer.train, {}

    def watched(trainer, *args, **kwargs):
        found["held"] = memory.tensors_held()
        found["rss_loaded"] = psutil.Process().memory_info().rss - start
        allocated = memory.Allocated()
        if tracked:
            with allocated:
                result = train(trainer, *args, **kwargs)
        else:
            result = train(trainer, *args, **kwargs)
        found["tracked"] = found["held"] + allocated.peak
        found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
        return result

    Trainer.train = watched
    script.main(*parsed)
    print(json.dumps(found))


if __name__ == "__main__":
    measure(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "1")
