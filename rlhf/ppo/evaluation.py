"""What PPO shows of held-out prompts while it trains: who wins, and the answers themselves."""

import json
import textwrap
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback

from rlhf.ppo.algorithm import kl_per_token
from rlhf.user_error import visible


def compare(scores: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 where an answer scores higher than the other, 0 where lower, a half for ties: its mean is the win rate."""
    return (scores > others).float() + 0.5 * (scores == others)


def evaluate(experience, datasets: dict, prefix: str) -> tuple[dict, list[dict]]:
    """The policy's answers to held-out prompts, against the starting policy's with the same noise.

    Returns:
        `<prefix>_<dataset>_scores`, `_kl`, `_mean_length`, `_eos_rate`, `_win_rate`; and the samples of all processes.
    """
    args, ppo, metrics, samples = experience.trainer.args, experience.ppo, {}, []
    for name, dataset in datasets.items():
        dataset = dataset.select(range(min(len(dataset), ppo.max_eval_prompts)))
        own = list(range(args.process_index, len(dataset), args.world_size))
        mine = own or [0]  # fewer prompts than processes: answered, and not counted
        rows, noise = [dataset[i] for i in mine], experience.noise((1,), len(dataset))[mine]
        if name not in experience.starting_answers:
            started = experience.sample(rows, noise, reference=True)
            experience.starting_answers[name] = experience.scores(rows, started), experience.texts(started)
        starting_scores, starting_texts = experience.starting_answers[name]
        sampled = experience.sample(rows, noise)
        scores = experience.scores(rows, sampled)
        ref_logprobs = experience.reference_logprobs(sampled["prompts"], sampled["answers"])
        kl = kl_per_token(sampled["logprobs"], ref_logprobs, ppo.kl_estimator) * sampled["mask"]
        means = {
            "scores": scores,
            "kl": kl.sum(1),
            "mean_length": sampled["mask"].sum(1),
            "eos_rate": sampled["ended"],
            "win_rate": compare(scores, starting_scores),
        }
        means = {key: value[: len(own)] for key, value in means.items()}
        for key, value in experience.mean(means, len(dataset)).items():
            metrics[f"{prefix}_{name}_{key}"] = value
        judged = experience.texts(sampled), scores.tolist(), starting_texts, starting_scores.tolist()
        for i, row, answer, score, start, start_score in zip(own, rows, *judged, strict=False):
            prompt = experience.tokenizer.decode(row["prompt_ids"])
            sample = {"dataset": name, "prompt": prompt, "answer": answer, "score": score}
            samples.append((len(metrics), i, {**sample, "starting_answer": start, "starting_score": start_score}))
    return metrics, [sample for *_, sample in sorted(gather_object(samples), key=lambda sample: sample[:2])]


def show_samples(samples: list[dict], update: int, output_dir: str, shown: int = 2) -> None:
    """Write all samples to `samples/update_<n>.jsonl`, and the first ones to the terminal, 80 columns wide."""
    path = Path(output_dir) / "samples" / f"update_{update:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for sample in samples[:shown]:
        sample = {key: visible(value) if isinstance(value, str) else value for key, value in sample.items()}
        tqdm.write(textwrap.shorten(f"  prompt ... {' '.join(sample['prompt'].split())[-100:]}", 80))
        for who, answer, score in (("start", "starting_answer", "starting_score"), ("now", "answer", "score")):
            tqdm.write(textwrap.shorten(f"  {who:5} {sample[score]:6.2f}  {sample[answer] or '(empty)'}", 80))


class LastEvaluation(TrainerCallback):
    """Evaluate also at the end, wherever the interval falls."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True


class Collapse(TrainerCallback):
    """Says once that a policy has collapsed, when so many logged updates in a row show it."""

    ROWS, LEAST_ENTROPY, MOST_KL = 10, 0.01, 200  # nats a token, nats an answer

    def __init__(self):
        self.seen = {"entropy": 0, "kl": 0}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "objective/kl" not in logs:
            return
        entropy, kl = logs["policy/entropy_avg"], logs["objective/kl"]
        for name, value, bad, turn in (
            ("entropy", entropy, entropy < self.LEAST_ENTROPY, "raise --kl_coef or --entropy_coef"),
            ("kl", kl, kl > self.MOST_KL, "raise --kl_coef, or try --adaptive_kl_target 6"),
        ):
            self.seen[name] = self.seen[name] + 1 if bad else 0
            if self.seen[name] == self.ROWS and state.is_world_process_zero:
                tqdm.write(f"the policy has collapsed ({name} {value:.3g}): stop, {turn}, lower --learning_rate")
