"""What it costs that a run is whole and sound: seconds added to a checkpoint and to a step, side by side.

    python benchmarks/run_cost.py

Writes a checkpoint of a model of 500 MB with Adam's moments, then its manifest; and trains a small GPT-2 with TRL's
SFTTrainer and with the checked one in turn, step by step the same.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def checkpoint_seconds(folder: Path) -> tuple[float, float]:
    """Seconds to write a checkpoint's weights and moments, and to write its manifest."""
    import torch
    from safetensors.torch import save_file

    from rlhf.runs.checkpoints import write_manifest

    weights = torch.randn(125_000_000)
    folder.mkdir()
    start = time.perf_counter()
    save_file({"weights": weights}, folder / "model.safetensors")
    torch.save({"exp_avg": weights, "exp_avg_sq": weights.clone()}, folder / "optimizer.pt")
    written = time.perf_counter()
    write_manifest(folder, "run")
    return written - start, time.perf_counter() - written


def step_seconds(trainer_class, folder: Path, steps: int) -> float:
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=128, n_embd=256, n_layer=4, n_head=4))
    rows = Dataset.from_dict({"input_ids": torch.randint(0, 2048, (8 * steps, 64)).tolist()})
    rows = rows.add_column("labels", rows["input_ids"])
    args = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=steps, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, logging_steps=10,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=args, train_dataset=rows, processing_class=tokenizer())
    start = time.perf_counter()
    trainer.train()
    return (time.perf_counter() - start) / steps


def tokenizer():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a b c"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", pad_token="Ċ")


def main():
    from rlhf.runs.trainers import CheckedSFTTrainer, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        pairs = [checkpoint_seconds(Path(folder, f"checkpoint-{i}")) for i in range(3)]
        writing, hashing = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"checkpoint of 1.5 GB: written in {writing:.2f} s, manifest in {hashing:.2f} s: {hashing / writing:.2f}"
        )
        times = [[step_seconds(c, Path(folder, "run"), 60) for c in (SFTTrainer, CheckedSFTTrainer)] for _ in range(5)]
        plain, checked = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in times)
        print(f"step: plain {1000 * plain:.1f} ms, checked {1000 * checked:.1f} ms: {ratio:.3f}")


if __name__ == "__main__":
    main()
