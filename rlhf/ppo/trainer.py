"""Proximal policy optimization for language models: the successor of the PPOTrainer that TRL removed in 1.13.

One update: sample an answer to each prompt of a batch and score it (experience.py), estimate advantages, and take
`num_ppo_epochs * num_mini_batches` optimizer steps on them. Flags (config.py) and metric names are TRL's, the
mathematics are in algorithm.py. The trainer around them is a `transformers.Trainer`, so that checkpoints, resuming,
callbacks, trackers and distributed training are its own.
"""

import copy
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from rlhf.ppo import checkpoint
from rlhf.ppo.algorithm import (
    adapted_kl_coef,
    advantages_and_returns,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from rlhf.ppo.batches import BatchSampler, mini_batch_rows
from rlhf.ppo.config import PPOConfig, trainer_arguments
from rlhf.ppo.evaluation import Collapse, LastEvaluation, evaluate, show_samples
from rlhf.ppo.experience import Experience
from rlhf.ppo.policy_and_value import PolicyAndValue, prepare, reference_of
from rlhf.user_error import UserError


class PPOTrainer(Trainer):
    """PPO on a `transformers.Trainer`: one of its steps is one mini-batch, one of its micro-steps a micro-batch.

    Args:
        model: the policy: a causal model, all weights of which are trained, or a PeftModel, whose adapter is.
        args: a PPOConfig.
        reward_model: what `rewards.load_reward` gives.
        train_dataset: rows with `prompt_ids`; and `prompt` (messages) and `reference` where rewards read text.
        eval_dataset: the same, {name: rows}.
        pad_rows: whether rows are padded, and products are torch's usual ones.
    """

    loss_is_scaled_for_ga = True  # the loss is normalised by the mini-batch's tokens, not the micro-batch's

    def __init__(
        self,
        model,
        args,
        reward_model,
        train_dataset,
        eval_dataset,
        processing_class,
        callbacks=None,
        pad_rows: bool = False,
        **kwargs,
    ):
        check(args, reward_model, train_dataset, processing_class)
        self.ppo, (args, self.schedule) = args, trainer_arguments(args, len(train_dataset))
        self.work = (
            f"{self.schedule.updates} updates of {self.ppo.batch_size} answers, {self.schedule.steps} steps each"
        )
        self.adapter = self.ppo.model_adapter_name or "default"
        reference = reference_of(model, self.ppo)
        prepare(model, reference.model, reward_model, self.ppo, pad_rows)
        head = reward_model.head.weight if reward_model.same_tokens else None
        super().__init__(
            model=PolicyAndValue(model, self.adapter, head),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[LastEvaluation(), Collapse(), *(callbacks or [])],
            **kwargs,
        )
        if self.is_fsdp_enabled:  # sampling and scoring call parts of the model, each of which holds a shard
            raise UserError("PPO needs whole weights on each device, which FSDP does not keep: train by DDP or ZeRO-2")
        if self.is_deepspeed_enabled and (self.ppo.target_kl is not None or self.ppo.value_warmup_updates):
            raise UserError(
                "--target_kl and --value_warmup_updates hold steps back, and DeepSpeed steps within backward\n"
                "  leave them out, or train by DDP: accelerate launch --config_file accelerate_config/multi_gpu.yaml"
            )
        for other in (reference.model, *(getattr(reward_model, name, None) for name in ("model", "head"))):
            if other is not None:
                other.to(self.args.device)
        self.critic = "a LoRA" if self.model.value_adapter else None  # for what a resumed run must have
        self.kl_coef = args.kl_coef
        self.rollout = self._micro_step = None
        self._stopped, self.metrics = False, defaultdict(list)
        self.experience = Experience(self, reward_model, reference)
        self.experience.check_trunk()

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        given, rate = self.ppo.value_learning_rate, self.args.learning_rate
        adapter, head = (rate, 10 * rate) if given is None else (given, given)  # a head has a scale to find
        critic = self.accelerator.unwrap_model(self.model).value_parameters()
        rates = {id(p): head if name == "value_head.weight" else adapter for name, p in critic.items()}
        for group in list(optimizer.param_groups):
            params, group["params"] = group["params"], [p for p in group["params"] if id(p) not in rates]
            for learning_rate in sorted({*rates.values()}):
                own = [p for p in params if rates.get(id(p)) == learning_rate]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        return optimizer

    def get_train_dataloader(self):
        # a process's share of the batch, again at each micro-step
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        updates, _, micro_steps = self.schedule
        sampler = BatchSampler(len(self.train_dataset), self.ppo.batch_size, updates, micro_steps, seed)
        size = self.ppo.local_batch_size
        loader = DataLoader(self.train_dataset, batch_size=size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    @property
    def can_stop(self) -> bool:
        """Whether an update is complete: a checkpoint within one could not be resumed."""
        return self.state.global_step % self.schedule.steps == 0

    def _prepare_inputs(self, inputs):
        return inputs  # where they belong already

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._micro_step is None:
            self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
            assert self._micro_step % self.schedule.micro_steps == 0, "a checkpoint within an update: not resumable"
        update, step = divmod(self._micro_step, self.schedule.micro_steps)
        if step == 0:
            self.rollout, self._stopped = self.roll_out(inputs, update), False
        self._micro_step += 1
        if self._stopped:  # no gradients: the optimizer passes over parameters without one
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, self.micro_batch(update, step), num_items_in_batch)
        if update < self.ppo.value_warmup_updates:  # without gradients: a zero would let weight decay move the policy
            self.accelerator.unwrap_model(model).drop_policy_gradients()
        per_mini_batch = self.args.gradient_accumulation_steps
        if self.ppo.target_kl is not None and self._micro_step % per_mini_batch == 0:
            self._stopped = sum(self.metrics["policy/approxkl_avg"][-per_mini_batch:]) > self.ppo.target_kl
            if self._stopped:
                model.zero_grad()
        return loss

    def roll_out(self, rows: list[dict], update: int) -> dict:
        """The experience of this process's share of an update's batch, with its advantages and returns."""
        ppo, reduce = self.ppo, self.accelerator.reduce
        batch = self.experience.collect(rows, update)
        mask = batch["mask"]
        rewards = token_rewards(batch["scores"], batch["kl"], mask, self.kl_coef)
        if ppo.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=reduce)
        advantages, batch["returns"] = advantages_and_returns(rewards, batch["values"], mask, ppo.gamma, ppo.lam)
        batch["advantages"] = whiten(advantages, mask, reduce=reduce)

        metrics = self.experience.summarize(batch, self.kl_coef)
        if update == 0 and not ppo.ref_adapter_name:
            assert abs(metrics["objective/kl"]) < self.experience.tolerance, "policy and reference differ at the start"
        if ppo.adaptive_kl_target is not None:
            metrics["objective/kl_coef"] = self.kl_coef
            target, horizon = ppo.adaptive_kl_target, ppo.adaptive_kl_horizon
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, metrics["objective/kl"], target, horizon, episodes=ppo.batch_size
            )
        for name, value in metrics.items():
            self.metrics[name].append(value)
        return batch

    def micro_batch(self, update: int, step: int) -> dict:
        """The rows of the current rollout that one micro-step of an update trains on."""
        epoch, step = divmod(step, self.schedule.micro_steps // self.ppo.num_ppo_epochs)
        mini_batch, micro_batch = divmod(step, self.args.gradient_accumulation_steps)
        rows = mini_batch_rows(self.ppo, self.args.process_index, update, epoch, mini_batch)
        size = self.ppo.micro_batch_size
        chosen = rows[micro_batch * size : (micro_batch + 1) * size]
        tokens = self.accelerator.reduce(self.rollout["mask"][rows].sum())
        micro = {k: v[chosen] if torch.is_tensor(v) else [v[i] for i in chosen] for k, v in self.rollout.items()}
        policy_trains = update >= self.ppo.value_warmup_updates
        return {**micro, "tokens": tokens, "on_policy": epoch == mini_batch == 0, "policy_trains": policy_trains}

    def rehearse(self, rows: list[dict]):
        """The loss of a micro-batch of rows, after the rollout of its batch with answers of full length: for the
        memory that they take. The caller puts the trainer back as it was. A function that judges is not called.
        """
        self.experience = copy.copy(self.experience)
        self.experience.stop_ids = {-1}
        if getattr(self.experience.reward, "model", None) is None:
            self.experience.scores = lambda rows, sampled: torch.zeros(len(rows), device=self.args.device)
        self.metrics = defaultdict(list)
        batch = self.roll_out(rows * (self.ppo.local_batch_size // self.ppo.per_device_train_batch_size), update=0)
        micro = {name: value[: min(len(rows), self.ppo.micro_batch_size)] for name, value in batch.items()}
        micro |= {"tokens": micro["mask"].sum(), "on_policy": True, "policy_trains": True}
        return self.compute_loss(self.model, micro)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ppo = self.ppo
        logprobs, entropy, mask, values = model(
            inputs["prompts"],
            inputs["answers"],
            self.experience.pad_id,
            ppo.temperature,
            inputs["policy_trains"],
            entropy_grad=ppo.entropy_coef != 0,
        )
        old_logprobs, old_values, advantages, returns = (
            inputs[name][:, : mask.shape[1]] for name in ("logprobs", "values", "advantages", "returns")
        )
        old_logprobs = old_logprobs * inputs["policy_trains"]
        pg_losses, ratio, pg_clipped = policy_loss(logprobs, old_logprobs, advantages, ppo.cliprange)
        vf_losses, vf_clipped = value_loss(values, old_values, returns, ppo.cliprange_value)
        if inputs["on_policy"]:
            off = ((ratio - 1).abs() * mask).max().item()
            assert off < self.experience.tolerance, f"the ratio is off 1 by {off} before the update's first step"

        def share(values):  # of the mean over the mini-batch's tokens on all processes
            return (values * mask).sum() / inputs["tokens"]

        pg_loss, vf_loss, mean_entropy = share(pg_losses), share(vf_losses), share(entropy)
        with torch.no_grad():
            self.record(
                {
                    "policy/approxkl_avg": share(0.5 * (logprobs - old_logprobs) ** 2),
                    "policy/clipfrac_avg": share(pg_clipped.float()),
                    "policy/entropy_avg": mean_entropy,
                    "loss/policy_avg": pg_loss,
                    "loss/value_avg": vf_loss,
                    "val/clipfrac_avg": share(vf_clipped.float()),
                    "val/ratio": share(ratio),
                    "val/ratio_var": share((ratio - 1) ** 2),
                }
            )
        # DDP averages gradients over processes; the loss is a share of the whole
        return (pg_loss - ppo.entropy_coef * mean_entropy + ppo.vf_coef * vf_loss) * self.args.world_size

    def record(self, shares: dict) -> None:
        """Keep a micro-batch's shares of the mini-batch's metrics, summed over processes, for the next log line."""
        sums = self.accelerator.reduce(torch.stack(list(shares.values())))
        for name, value in zip(shares, sums.tolist(), strict=True):
            self.metrics[name].append(value)

    def log(self, logs, start_time=None):
        if self.metrics and not any(key.startswith("eval_") for key in logs):
            steps = self.args.gradient_accumulation_steps  # shares of a mini-batch add up; rows are averaged
            for name, values in self.metrics.items():
                summed = name.startswith(("policy/", "loss/", "val/clipfrac", "val/ratio"))
                logs[name] = sum(values) / len(values) * (steps if summed else 1)
            self.metrics.clear()
            logs["episode"] = self.state.global_step // self.schedule.steps * self.ppo.batch_size
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Answers held-out prompts, logs and returns `eval_<dataset>_scores` and others: evaluation.py."""
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics, samples = evaluate(self.experience, datasets, metric_key_prefix)
        if self.is_world_process_zero():
            show_samples(samples, self.state.global_step // self.schedule.steps, self.args.output_dir)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            checkpoint.save(self, Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoint.load(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, folder):  # after the weights, which DeepSpeed loads by itself
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            checkpoint.load_state(self, Path(folder))

    def _load_best_model(self):
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            checkpoint.load(self, Path(self.state.best_model_checkpoint))
        self.metrics.clear()


def check(ppo: PPOConfig, reward, prompts, tokenizer) -> None:
    """What a run needs of its data, its reward and its tokenizer.

    Raises:
        UserError: naming the flag, for what is not there.
    """
    if len(prompts) < ppo.batch_size:
        raise UserError(
            f"{len(prompts)} prompts are fewer than one batch of {ppo.batch_size}: "
            "lower --per_device_train_batch_size or --gradient_accumulation_steps"
        )
    if ppo.subtract_reference_score and not all(prompts["reference"]):
        raise UserError("--subtract_reference_score: not all prompts come with an answer of the data")
    if ppo.use_score_norm and reward.std is None:
        raise UserError("--use_score_norm: the reward model's folder has no score_statistics.json")
    if ppo.stop_token_id is not None and not 0 <= ppo.stop_token_id < len(tokenizer):
        raise UserError(f"--stop_token_id {ppo.stop_token_id}: the tokenizer has {len(tokenizer)} tokens")
