"""Proximal policy optimization for language models: the successor of the PPOTrainer that TRL removed in 1.13.

One update: sample an answer to each prompt of a batch, score the answers with the reward model, subtract a penalty for
leaving the reference policy, estimate advantages, and take `num_ppo_epochs * num_mini_batches` optimizer steps on
them. Flags and metric names are TRL's. The algorithm is the pure functions below (Schulman et al., arXiv 1707.06347;
details of its use on language models: arXiv 2403.17031); the trainer around them is a `transformers.Trainer`, so that
checkpoints, resuming, callbacks, trackers and distributed training are its own.

Tensors of answers are right-padded, (rows, response tokens); `mask` is 1.0 on an answer's tokens, EOS included.
Whatever is "masked" here is masked by length, never by token id.
"""

import copy
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rollout import PolicyAndValue, generate, read_answers, score, trunk_of
from user_error import UserError

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments

VALUE_HEAD = "value_head.safetensors"


@dataclass
class PPOConfig(TrainingArguments):
    """Training arguments of PPO. `per_device_train_batch_size` only bounds memory: a micro-batch.

    A batch (one update) is per_device_train_batch_size x gradient_accumulation_steps x processes prompts.
    `max_steps`, `logging_steps`, `save_steps` and `eval_steps` count updates.
    """

    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each batch of answers."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps a pass; divides a process's batch."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Answers to sample in all; by default num_train_epochs times the prompts."}
    )
    response_length: int = field(default=53, metadata={"help": "Longest answer, in tokens."})
    stop_token_id: int | None = field(
        default=None, metadata={"help": "A token that ends an answer, beside the generation config's own."}
    )
    temperature: float = field(
        default=0.7, metadata={"help": "Sampling temperature; also that of the trained policy."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of an answer that does not end within its length."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the token rewards to unit variance."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the penalty for leaving the reference policy."})
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Estimator of that KL: k1 unbiased, k3 never negative.", "choices": ["k1", "k3"]},
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value update."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Rows generated and scored at a time on a device: memory only."}
    )
    max_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts answered at each evaluation."})

    def __post_init__(self):
        super().__post_init__()
        self.local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.batch_size = self.local_batch_size * self.world_size
        if self.local_batch_size % self.num_mini_batches:
            raise ValueError(
                f"--num_mini_batches {self.num_mini_batches} does not divide a process's batch of "
                f"{self.local_batch_size} (per_device_train_batch_size x gradient_accumulation_steps)"
            )
        self.local_mini_batch_size = self.local_batch_size // self.num_mini_batches
        self.micro_batch_size = min(self.per_device_train_batch_size, self.local_mini_batch_size)
        if self.local_mini_batch_size % self.micro_batch_size:
            raise ValueError(
                f"a mini-batch of {self.local_mini_batch_size} prompts is not a multiple of "
                f"--per_device_train_batch_size {self.per_device_train_batch_size}"
            )
        if self.response_length < 1 or self.temperature <= 0:
            raise ValueError("--response_length must be at least 1 and --temperature above 0")


# The algorithm -------------------------------------------------------------------------------------------------------


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def whiten(values, mask, shift_mean: bool = True, reduce=lambda sums: sums):
    """Values scaled to unit variance over the masked entries (and to mean 0 with `shift_mean`), 0 elsewhere.

    Args:
        reduce: sums a tensor over all processes, so that the statistics are those of the whole batch.
    """
    count, total = reduce(torch.stack([mask.sum(), (values * mask).sum()]))
    mean = total / count
    variance = reduce(((values - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def kl_per_token(logprobs, ref_logprobs, estimator: str):
    """Estimates of KL(policy || reference) from the sampled tokens: k1 or k3 of joschu.net/blog/kl-approx.html."""
    logratio = ref_logprobs - logprobs
    return -logratio if estimator == "k1" else torch.expm1(logratio) - logratio


def token_rewards(scores, kl, mask, kl_coef: float):
    """A reward for each token: the KL penalty, and on an answer's last token also its score.

    Args:
        scores: (rows,), one for each answer.
        kl, mask: (rows, tokens).
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def advantages_and_returns(rewards, values, mask, gamma: float, lam: float):
    """Generalized advantage estimation (arXiv 1506.02438, equation 16); after an answer's last token the value is 0.

    Args:
        rewards, values, mask: (rows, tokens); values[:, t] is the value of the state before token t.
    Returns:
        advantages and returns = advantages + values, both (rows, tokens).
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t], next_value = following, values[:, t]
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, cliprange: float):
    """The clipped surrogate, a token at a time (arXiv 1707.06347, equation 7): (losses, ratio, clipped), unmasked."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), ratio, clipped > unclipped


def value_loss(values, old_values, returns, cliprange_value: float):
    """Half the squared error of the new value or of the value clipped near the old one, whichever is larger."""
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


# The trainer ---------------------------------------------------------------------------------------------------------


class BatchSampler(Sampler):
    """Indices of one batch of prompts after another, each batch `repeats` times in a row (once a micro-step).

    The prompts are shuffled anew each time all have been used; the order depends on the seed alone.
    """

    def __init__(self, num_prompts: int, batch_size: int, num_batches: int, repeats: int, seed: int):
        self.num_prompts, self.batch_size, self.num_batches = num_prompts, batch_size, num_batches
        self.repeats, self.seed = repeats, seed

    def __len__(self):
        return self.num_batches * self.batch_size * self.repeats

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        order = []
        for _ in range(self.num_batches):
            while len(order) < self.batch_size:
                order += torch.randperm(self.num_prompts, generator=generator).tolist()
            batch, order = order[: self.batch_size], order[self.batch_size :]
            for _ in range(self.repeats):
                yield from batch


class PPOTrainer(Trainer):
    """PPO on a `transformers.Trainer`: one of its steps is one mini-batch, one of its micro-steps a micro-batch.

    Args:
        policy: the causal model, or a trainable PeftModel whose adapter is continued.
        reward_model: a frozen sequence classifier with one label and the policy's tokenizer.
        train_dataset: rows with `prompt_ids`.
        eval_dataset: the same, {name: rows}.
        peft_config: the LoRA to put on a plain policy; None trains all weights.
    """

    loss_is_scaled_for_ga = True  # the loss is normalised by the mini-batch's tokens, not the micro-batch's

    def __init__(
        self,
        policy,
        args,
        reward_model,
        train_dataset,
        eval_dataset,
        processing_class,
        peft_config=None,
        callbacks=None,
    ):
        if len(train_dataset) < args.batch_size:
            raise UserError(
                f"{len(train_dataset)} prompts are fewer than one batch of {args.batch_size}: "
                "lower --per_device_train_batch_size or --gradient_accumulation_steps"
            )
        self.reference_model = None
        if peft_config is not None:
            policy = get_peft_model(policy, peft_config)
        elif isinstance(policy, PeftModel):  # the reference is a frozen copy of the adapter that is continued
            policy.add_adapter("ref", policy.peft_config["default"])
            for name, parameter in policy.named_parameters():
                if ".default." in name:
                    policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
                if ".ref." in name:
                    parameter.requires_grad_(False)
        else:
            self.reference_model = copy.deepcopy(policy).eval().requires_grad_(False)
        for module in [*policy.modules(), *reward_model.modules()]:
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # or the ratio would not be 1 before the first step
        head = reward_model.get_base_model() if isinstance(reward_model, PeftModel) else reward_model
        model = PolicyAndValue(policy, head.score.weight)
        self.reward_model, self.processing_class = reward_model, processing_class
        self.pad_id = processing_class.pad_token_id
        own = policy.generation_config.eos_token_id
        self.stop_ids = {processing_class.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self.stop_ids |= {args.stop_token_id} - {None}

        self.ppo = args
        args = copy.copy(args)  # in the Trainer's terms
        args.gradient_accumulation_steps = args.local_mini_batch_size // args.micro_batch_size
        self.micro_steps = args.gradient_accumulation_steps * args.num_mini_batches * args.num_ppo_epochs
        self.steps_per_update = args.num_mini_batches * args.num_ppo_epochs
        episodes = args.total_episodes or int(args.num_train_epochs * len(train_dataset))
        updates = args.max_steps if args.max_steps > 0 else -(-episodes // args.batch_size)
        args.max_steps = updates * self.steps_per_update
        for name in ("logging_steps", "save_steps", "eval_steps"):
            steps = getattr(args, name)
            if steps is not None:  # below 1: a share of all updates
                steps = max(1, round(steps * updates)) if steps < 1 else int(steps)
                setattr(args, name, steps * self.steps_per_update)
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: [row["prompt_ids"] for row in rows],
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.num_updates = updates
        self.reward_model.to(self.args.device)
        if self.reference_model is not None:
            self.reference_model.to(self.args.device)
        self._rollout, self._micro_step = None, None
        self._metrics = defaultdict(list)
        self._check_trunk()

    def _check_trunk(self):
        """Logits are made from the trunk's last state and the head alone; refuse a model that does more than that."""
        ids = torch.tensor([self.train_dataset[0]["prompt_ids"][-8:]], device=self.args.device)
        policy = self.model.policy
        with torch.no_grad():
            apart = policy.get_output_embeddings()(trunk_of(policy)(input_ids=ids).last_hidden_state)
            if not torch.allclose(policy(input_ids=ids).logits, apart, atol=1e-3, rtol=1e-3):
                raise UserError(
                    f"{type(policy).__name__} rescales its logits after the head: not supported by PPO yet"
                )

    def get_train_dataloader(self):
        # a process's share of the batch, again at each micro-step
        sampler = BatchSampler(
            len(self.train_dataset), self.ppo.batch_size, self.num_updates, self.micro_steps, self.args.seed
        )
        size = self.ppo.local_batch_size
        loader = DataLoader(self.train_dataset, batch_size=size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def _prepare_inputs(self, prompts):
        """A micro-batch of the current rollout; at the start of an update, a new rollout."""
        if self._micro_step is None:
            self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
            assert self._micro_step % self.micro_steps == 0, "a checkpoint within an update cannot be resumed"
        update, step = divmod(self._micro_step, self.micro_steps)
        if step == 0:
            self._rollout = self.rollout(prompts, update)
        self._micro_step += 1
        epoch, step = divmod(step, self.micro_steps // self.ppo.num_ppo_epochs)
        mini_batch, micro_batch = divmod(step, self.args.gradient_accumulation_steps)
        rows = self.mini_batch_rows(update, epoch, mini_batch)
        size = self.ppo.micro_batch_size
        micro_rows = rows[micro_batch * size : (micro_batch + 1) * size]
        tokens = self.accelerator.reduce(self._rollout["mask"][rows].sum())
        micro = {
            k: v[micro_rows] if torch.is_tensor(v) else [v[i] for i in micro_rows] for k, v in self._rollout.items()
        }
        return {**micro, "tokens": tokens, "on_policy": epoch == mini_batch == 0}

    def mini_batch_rows(self, update: int, epoch: int, mini_batch: int) -> torch.Tensor:
        """Rows of this process's batch that belong to a mini-batch.

        Of each `num_mini_batches` rows in a row, one goes to each mini-batch, drawn by (seed, update, epoch): so the
        mini-batches are the same however many processes share the batch.
        """
        count = self.ppo.num_mini_batches
        generator = torch.Generator().manual_seed(hash((self.args.seed, update, epoch)) % 2**63)
        chosen = torch.rand(self.ppo.batch_size // count, count, generator=generator).argsort(1)[:, mini_batch]
        rows = torch.arange(0, self.ppo.batch_size, count) + chosen
        first = self.args.process_index * self.ppo.local_batch_size
        return rows[(rows >= first) & (rows < first + self.ppo.local_batch_size)] - first

    @contextmanager
    def reference(self):
        """The reference policy, as a module with the policy's interface."""
        policy = self.model.policy
        if self.reference_model is not None:
            yield self.reference_model
        elif "ref" not in policy.peft_config:
            with policy.disable_adapter():
                yield policy
        else:
            # set_adapter also switches requires_grad of whatever it activates or leaves
            trained = [p for p in policy.parameters() if p.requires_grad]
            policy.set_adapter("ref", inference_mode=True)
            try:
                yield policy
            finally:
                policy.set_adapter("default")
                for parameter in trained:
                    parameter.requires_grad_(True)

    def sample(self, prompts: list[list[int]], noise) -> dict:
        """Answers to prompts, with everything that is known about them before training; tensors (rows, tokens)."""
        model, chunks = self.accelerator.unwrap_model(self.model), []
        training = model.training
        model.eval()
        size = self.ppo.local_rollout_forward_batch_size
        temperature = self.ppo.temperature
        answers = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for i in range(0, len(prompts), size):
                answers += generate(
                    model.policy,
                    prompts[i : i + size],
                    noise[i : i + size],
                    stop_ids=self.stop_ids,
                    pad_id=self.pad_id,
                    temperature=temperature,
                )
            width = max(map(len, answers))
            for i in range(0, len(prompts), size):
                rows = prompts[i : i + size], answers[i : i + size]
                logprobs, _, mask, values = model(*rows, self.pad_id, temperature)
                with self.reference() as reference:
                    ref_logprobs = read_answers(reference, *rows, self.pad_id, temperature)[0]
                scores = score(self.reward_model, [p + a for p, a in zip(*rows, strict=True)], self.pad_id)
                tensors = (F.pad(t, (0, width - t.shape[1])) for t in (logprobs, ref_logprobs, values, mask))
                chunks.append((*tensors, scores))
        model.train(training)
        logprobs, ref_logprobs, values, mask, scores = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ended = torch.tensor([a[-1] in self.stop_ids for a in answers], device=scores.device)
        if self.ppo.missing_eos_penalty is not None:
            scores = scores - self.ppo.missing_eos_penalty * ~ended
        kl = kl_per_token(logprobs, ref_logprobs, self.ppo.kl_estimator) * mask
        return {
            "prompts": prompts,
            "answers": answers,
            "logprobs": logprobs,
            "values": values,
            "mask": mask,
            "kl": kl,
            "scores": scores,
            "ended": ended,
        }

    def noise(self, key, rows: int):
        """Uniform noise of a whole batch, the same on every process and after every resume."""
        generator = torch.Generator().manual_seed(hash((self.args.seed, *key)) % 2**63)
        return torch.rand(rows, self.ppo.response_length, generator=generator)

    def rollout(self, prompts: list[list[int]], update: int) -> dict:
        """Sample, score and estimate advantages for this process's share of an update's batch."""
        ppo = self.ppo
        first = self.args.process_index * ppo.local_batch_size
        noise = self.noise((0, update), ppo.batch_size)[first : first + ppo.local_batch_size]
        batch = self.sample(prompts, noise)
        mask, kl, scores = batch["mask"], batch["kl"], batch["scores"]
        rewards = token_rewards(scores, kl, mask, ppo.kl_coef)
        if ppo.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self.accelerator.reduce)
        advantages, batch["returns"] = advantages_and_returns(rewards, batch["values"], mask, ppo.gamma, ppo.lam)
        batch["advantages"] = whiten(advantages, mask, reduce=self.accelerator.reduce)

        non_score = (-ppo.kl_coef * kl).sum(1)
        per_row = {
            "objective/kl": kl.sum(1),
            "objective/entropy": -batch["logprobs"].sum(1),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": non_score + scores,
            "objective/scores": scores,
            "val/mean_length": mask.sum(1),
            "val/eos_rate": batch["ended"].float(),
        }
        for name, values in per_row.items():
            self._metrics[name].append(self.accelerator.reduce(values.sum()).item() / ppo.batch_size)
        self._metrics["val/num_eos_tokens"].append(self._metrics["val/eos_rate"][-1] * ppo.batch_size)
        if update == 0:
            assert abs(self._metrics["objective/kl"][-1]) < self.tolerance, "policy and reference differ at the start"
        return batch

    @property
    def tolerance(self) -> float:
        """How far from exact 'the same model' may be, with the precision in use."""
        exact = self.model.value_head.weight.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        return 1e-3 if exact and self.model.policy.dtype == torch.float32 else 0.1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ppo, mask, tokens = self.ppo, inputs["mask"], inputs["tokens"]
        logprobs, entropy, _, values = model(inputs["prompts"], inputs["answers"], self.pad_id, ppo.temperature)
        width = logprobs.shape[1]
        mask, old_logprobs, old_values, advantages, returns = (
            t[:, :width] for t in (mask, inputs["logprobs"], inputs["values"], inputs["advantages"], inputs["returns"])
        )
        pg_losses, ratio, pg_clipped = policy_loss(logprobs, old_logprobs, advantages, ppo.cliprange)
        vf_losses, vf_clipped = value_loss(values, old_values, returns, ppo.cliprange_value)
        if inputs["on_policy"]:
            off = ((ratio - 1).abs() * mask).max().item()
            assert off < self.tolerance, f"the ratio is off 1 by {off} before the update's first step"

        def share(values):  # of the mean over the mini-batch's tokens on all processes
            return (values * mask).sum() / tokens

        pg_loss, vf_loss = share(pg_losses), share(vf_losses)
        with torch.no_grad():
            ratio_mean = share(ratio)
            parts = {
                "policy/approxkl_avg": share(0.5 * (logprobs - old_logprobs) ** 2),
                "policy/clipfrac_avg": share(pg_clipped.float()),
                "policy/entropy_avg": share(entropy),
                "loss/policy_avg": pg_loss,
                "loss/value_avg": vf_loss,
                "val/clipfrac_avg": share(vf_clipped.float()),
                "val/ratio": ratio_mean,
            }
            sums = self.accelerator.reduce(torch.stack(list(parts.values())))
            for name, value in zip(parts, sums.tolist(), strict=True):
                self._metrics[name].append(value)
        # DDP averages gradients over processes; the loss is a share of the whole
        return (pg_loss + ppo.vf_coef * vf_loss) * self.args.world_size

    def log(self, logs, start_time=None):
        if self._metrics and not any(key.startswith("eval_") for key in logs):
            steps = self.args.gradient_accumulation_steps  # shares of a mini-batch add up; rows are averaged
            for name, values in self._metrics.items():
                summed = name.startswith(("policy/", "loss/", "val/clipfrac", "val/ratio"))
                logs[name] = sum(values) / len(values) * (steps if summed else 1)
            self._metrics.clear()
            logs["episode"] = self.state.global_step // self.steps_per_update * self.ppo.batch_size
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Answers held-out prompts and logs mean score, KL, length and EOS rate: `eval_<dataset>_scores`, ..."""
        metrics = {}
        for name, rows in (self.eval_dataset if eval_dataset is None else eval_dataset).items():
            prompts = rows[: self.ppo.max_eval_prompts]["prompt_ids"]
            mine = slice(self.args.process_index, None, self.args.world_size)
            batch = self.sample(prompts[mine], self.noise((1,), len(prompts))[mine])
            per_row = {
                "scores": batch["scores"],
                "kl": batch["kl"].sum(1),
                "mean_length": batch["mask"].sum(1),
                "eos_rate": batch["ended"].float(),
            }
            sums = self.accelerator.reduce(torch.stack([values.sum() for values in per_row.values()]))
            for key, value in zip(per_row, (sums / len(prompts)).tolist(), strict=True):
                metrics[f"{metric_key_prefix}_{name}_{key}"] = value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        output_dir = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        policy, only = self.model.policy, {}
        if isinstance(policy, PeftModel):
            only["selected_adapters"] = ["default"]  # not the frozen copy
        policy.save_pretrained(output_dir, **only)
        save_file({"weight": self.model.value_head.weight.detach().cpu().contiguous()}, output_dir / VALUE_HEAD)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.ppo, output_dir / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder, policy = Path(resume_from_checkpoint), self.model.policy
        if isinstance(policy, PeftModel):
            set_peft_model_state_dict(policy, load_peft_weights(folder, device="cpu"), adapter_name="default")
        else:
            load_model(policy, folder / "model.safetensors")
        self.model.value_head.weight.data.copy_(load_file(folder / VALUE_HEAD)["weight"])

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
