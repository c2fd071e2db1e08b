"""What PPO shows of held-out prompts while it trains: who wins, and the answers themselves."""

import json
import textwrap
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback


def compare(scores: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 where an answer scores higher than the other, 0 where lower, a half for ties: its mean is the win rate."""
    return (scores > others).float() + 0.5 * (scores == others)


def show_samples(samples: list[dict], update: int, output_dir: str, shown: int = 2) -> None:
    """Write all samples to `samples/update_<n>.jsonl`, and the first ones to the terminal, 80 columns wide."""
    path = Path(output_dir) / "samples" / f"update_{update:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for sample in samples[:shown]:
        tqdm.write(textwrap.shorten(f"  prompt ... {' '.join(sample['prompt'].split())[-100:]}", 80))
        for who, answer, score in (("start", "starting_answer", "starting_score"), ("now", "answer", "score")):
            tqdm.write(textwrap.shorten(f"  {who:5} {sample[score]:6.2f}  {sample[answer] or '(empty)'}", 80))


class LastEvaluation(TrainerCallback):
    """Evaluate also at the end, wherever the interval falls."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True
