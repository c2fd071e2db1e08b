"""What is known of a batch of answers before training on it: sampled, read by the reference, scored, summed up."""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.models.utils import unwrap_model_for_generation

from rlhf.models.rollout import generate, last_states, length_mask, logits_of, read_answers, stop_ids
from rlhf.models.shared_base import active_adapter
from rlhf.ppo.algorithm import kl_per_token
from rlhf.user_error import UserError


class Experience:
    """Answers of a trainer's policy, and of the reference.

    Args:
        trainer: the PPOTrainer whose policy, processes and settings these are.
        reward: what `rewards.load_reward` gives.
        reference: what `policy_and_value.reference_of` gives.
    """

    def __init__(self, trainer, reward, reference):
        self.trainer, self.reward, self.reference = trainer, reward, reference
        self.ppo, self.accelerator, self.tokenizer = trainer.ppo, trainer.accelerator, trainer.processing_class
        self.starting_answers = {}  # of the reference to held-out prompts: evaluation.py
        self.device, self.pad_id = trainer.args.device, self.tokenizer.pad_token_id
        self.stop_ids = {*stop_ids(self.model.policy, self.tokenizer), self.ppo.stop_token_id} - {None}

    @property
    def model(self):
        return self.accelerator.unwrap_model(self.trainer.model)

    @property
    def exact(self) -> bool:
        """Whether all is computed in float32, so that sampling and training give the same log-probabilities."""
        return self.model.policy.dtype == torch.float32 and self.accelerator.mixed_precision == "no"

    @property
    def tolerance(self) -> float:
        """How far from exact 'the same model' may be, with the precision in use."""
        return 1e-3 if self.exact else 0.1

    def check_trunk(self):
        """Logits are made from the trunk's last state and the head alone; refuse a model that does more than that."""
        policy = self.model.policy.eval()
        ids = self.trainer.train_dataset[0]["prompt_ids"][-8:]
        with torch.no_grad():
            whole = policy(input_ids=torch.tensor([ids], device=self.device)).logits[0].float()
            states = last_states(policy, [ids, ids[:5]], self.pad_id)
            for row in (slice(len(ids)), slice(len(ids), None)):
                logits = logits_of(policy, states[row], 1.0)
                if not torch.allclose(logits, whole[: len(logits)], atol=self.tolerance, rtol=self.tolerance):
                    raise UserError(
                        f"{policy.config.model_type} changes its logits after the output layer, by scaling or "
                        "otherwise: PPO does not know how\n  dpo_training.py trains such models"
                    )

    def collect(self, rows: list[dict], update: int) -> dict:
        """This process's share of an update's batch: what `sample` gives, and `scores` (rows,), `kl` (rows, tokens).

        Args:
            rows: with `prompt_ids`, and `prompt` and `reference` where rewards read text.
        """
        ppo, first = self.ppo, self.trainer.args.process_index * self.ppo.local_batch_size
        batch = self.sample(rows, self.noise((0, update), ppo.batch_size)[first : first + ppo.local_batch_size])
        check_finite(update, **{name: batch[name] for name in ("logprobs", "values")})
        if update == 0 and batch["mask"].shape[1] == 1 and batch["ended"].all():
            raise UserError(
                "the policy ends every answer of the first batch at once: there is nothing to score\n"
                "  train it with sft_training.py first, or check that the prompts end where an answer begins"
            )
        ref_logprobs = self.reference_logprobs(batch["prompts"], batch["answers"])
        scores = self.scores(rows, batch)
        if ppo.missing_eos_penalty is not None:
            scores = scores - ppo.missing_eos_penalty * ~batch["ended"]
        kl = kl_per_token(batch["logprobs"], ref_logprobs, ppo.kl_estimator) * batch["mask"]
        check_finite(update, scores=scores, kl=kl)
        return {**batch, "scores": scores, "kl": kl}

    def summarize(self, batch: dict, kl_coef: float) -> dict[str, float]:
        """The metrics of a batch, over all processes' answers."""
        non_score = (-kl_coef * batch["kl"]).sum(1)
        metrics = {
            "objective/kl": batch["kl"].sum(1),
            "objective/entropy": -batch["logprobs"].sum(1),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": non_score + batch["scores"],
            "objective/scores": batch["scores"],
            "val/mean_length": batch["mask"].sum(1),
            "val/eos_rate": batch["ended"],
        }
        metrics = self.mean(metrics, self.ppo.batch_size)
        return metrics | {"val/num_eos_tokens": metrics["val/eos_rate"] * self.ppo.batch_size}

    @contextmanager
    def reading(self, reference: bool):
        """The policy as it is, or the reference, in eval mode, without gradients and in the precision of training."""
        model, (own_weights, adapter) = self.model, self.reference
        active = active_adapter(model.policy, adapter) if reference and own_weights is None else nullcontext()
        training = model.training
        model.eval()
        with torch.no_grad(), self.accelerator.autocast(), active:
            yield model.policy if own_weights is None or not reference else own_weights
        model.train(training)

    def sample(self, rows: list[dict], noise, reference: bool = False) -> dict:
        """Answers to prompts, of the policy or of the reference, and what is known of them before training.

        Returns:
            prompts, answers (lists of token ids), logprobs, values, mask (rows, tokens), ended (rows,).
        """
        model, prompts = self.model, [row["prompt_ids"] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # prompts of a length need little padding
        answers = [None] * len(rows)
        logprobs, values = torch.zeros(2, len(rows), self.ppo.response_length, device=self.device)
        options = {"stop_ids": self.stop_ids, "pad_id": self.pad_id, "temperature": self.ppo.temperature}
        gather = {"gather_deepspeed3_params": self.ppo.ds3_gather_for_generation}
        size = self.ppo.local_rollout_forward_batch_size
        with (
            unwrap_model_for_generation(self.trainer.model_wrapped, self.accelerator, **gather),
            self.reading(reference) as policy,
        ):
            for i in range(0, len(rows), size):
                chosen = order[i : i + size]
                some = [prompts[j] for j in chosen]
                texts, *known = generate(policy, some, noise[chosen], value_head=model.value_head, **options)
                if not reference and not self.exact:  # as training will compute them
                    known[0] = read_answers(policy, some, texts, self.pad_id, self.ppo.temperature)[0]
                if not reference and (model.value_adapter or not self.exact):
                    known[1] = model.values(some, texts, self.pad_id)
                for j, text in zip(chosen, texts, strict=True):
                    answers[j] = text
                width = known[0].shape[1]
                logprobs[chosen, :width], values[chosen, :width] = known
        mask = length_mask([len(answer) for answer in answers], self.device)
        ended = torch.tensor([answer[-1] in self.stop_ids for answer in answers], device=self.device)
        width = mask.shape[1]
        known = {"logprobs": logprobs[:, :width] * mask, "values": values[:, :width] * mask}
        return {"prompts": prompts, "answers": answers, "mask": mask, "ended": ended, **known}

    def reference_logprobs(self, prompts, answers) -> torch.Tensor:
        """What the reference policy thinks of answers, (rows, tokens)."""
        size, parts = self.ppo.local_rollout_forward_batch_size, []
        with self.reading(reference=True) as policy:
            for i in range(0, len(prompts), size):
                some = prompts[i : i + size], answers[i : i + size]
                parts += read_answers(policy, *some, self.pad_id, self.ppo.temperature)[0]
        return pad_sequence(parts, batch_first=True)[:, : max(map(len, answers))]

    def texts(self, sampled) -> list[str]:
        """Answers as a reader sees them, without the token that ends them."""
        return [
            self.tokenizer.decode(answer[: -1 if ended else None], skip_special_tokens=True).strip()
            for answer, ended in zip(sampled["answers"], sampled["ended"].tolist(), strict=True)
        ]

    def scores(self, rows: list[dict], sampled: dict) -> torch.Tensor:
        """The reward of each answer, before any penalty, (rows,)."""
        ppo, reward = self.ppo, self.reward
        with torch.no_grad(), self.accelerator.autocast():
            if reward.same_tokens:
                pairs = zip(sampled["prompts"], sampled["answers"], strict=True)
                scores = reward.score_tokens([p + a for p, a in pairs], ppo.local_rollout_forward_batch_size)
            else:
                scores = self.scores_of_texts(rows, self.texts(sampled), sampled["ended"].tolist())
            if ppo.subtract_reference_score:
                scores = scores - self.scores_of_texts(rows, [row["reference"] for row in rows], [True] * len(rows))
            elif ppo.use_score_norm:
                scores = scores - reward.mean
            if ppo.use_score_norm:
                scores = scores / reward.std
        scores = scores.to(self.device)
        return scores if ppo.score_clip is None else scores.clamp(-ppo.score_clip, ppo.score_clip)

    def scores_of_texts(self, rows, texts, ended) -> torch.Tensor:
        columns = {"reference": [row.get("reference") for row in rows]}
        return self.reward([row["prompt"] for row in rows], texts, ended, columns)

    def noise(self, key, rows: int):
        """Uniform noise of a whole batch, the same on every process and after every resume."""
        generator = torch.Generator().manual_seed(hash((self.ppo.seed, *key)) % 2**63)
        return torch.rand(rows, self.ppo.response_length, generator=generator)

    def mean(self, values: dict, rows: int) -> dict:
        """Means of (rows,) tensors over the rows of all processes."""
        sums = self.accelerator.reduce(torch.stack([v.float().sum() for v in values.values()]))
        return dict(zip(values, (sums / rows).tolist(), strict=True))


def check_finite(update: int, **values) -> None:
    """Raises a UserError that names the first tensor in which something is not finite."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            what = "reward model" if name == "scores" else "policy" if name in ("logprobs", "kl") else "critic"
            raise UserError(
                f"update {update}: the {name} of the sampled answers are not finite\n"
                f"  look at the {what}, or lower --learning_rate; what was saved before is kept"
            )
