"""Proximal policy optimization for language models: the successor of the PPOTrainer that TRL removed in 1.13.

One update: sample an answer to each prompt of a batch, score the answers, subtract a penalty for leaving the reference
policy, estimate advantages, and take `num_ppo_epochs * num_mini_batches` optimizer steps on them. Flags
(ppo_config.py) and metric names are TRL's. The mathematics are in ppo_algorithm.py; the trainer around them is a
`transformers.Trainer`, so that checkpoints, resuming, callbacks, trackers and distributed training are its own.
"""

import copy
import json
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path

from fast_linear import use_fast_linear
from flat_rows import use_flat_rows
from policy_and_value import PolicyAndValue
from ppo_algorithm import (
    adapted_kl_coef,
    advantages_and_returns,
    kl_per_token,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from ppo_config import PPOConfig
from ppo_evaluation import LastEvaluation, evaluate, show_samples
from rollout import generate, last_states, length_mask, logits_of, read_answers
from shared_base import active_adapter, copy_adapter, is_new, parameters_of
from user_error import UserError

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from trl.models.utils import unwrap_model_for_generation

VALUE_HEAD = "value_head.safetensors"  # with the critic's own LoRA, where it has one
STATE = "ppo_state.json"
__all__ = ["PPOConfig", "PPOTrainer"]


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
        model: the policy: a causal model, all weights of which are trained, or a PeftModel, whose adapter is.
        reward_model: what `rewards.load_reward` gives.
        train_dataset: rows with `prompt_ids`; and `prompt` (messages) and `reference` where rewards read text.
        eval_dataset: the same, {name: rows}.
    """

    loss_is_scaled_for_ga = True  # the loss is normalised by the mini-batch's tokens, not the micro-batch's

    def __init__(
        self, model, args, reward_model, train_dataset, eval_dataset, processing_class, callbacks=None, **kwargs
    ):
        if len(train_dataset) < args.batch_size:
            raise UserError(
                f"{len(train_dataset)} prompts are fewer than one batch of {args.batch_size}: "
                "lower --per_device_train_batch_size or --gradient_accumulation_steps"
            )
        if args.subtract_reference_score and not all(train_dataset["reference"]):
            raise UserError("--subtract_reference_score: not all prompts come with an answer of the data")
        if args.use_score_norm and reward_model.std is None:
            raise UserError("--use_score_norm: the reward model's folder has no score_statistics.json")
        self.reward, self.processing_class = reward_model, processing_class
        self.adapter = args.model_adapter_name or "default"
        self.prepare_models(model, args)
        self.pad_id = processing_class.pad_token_id
        own = model.generation_config.eos_token_id
        self.stop_ids = {processing_class.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self.stop_ids |= {args.stop_token_id} - {None}
        if args.stop_token_id is not None and not 0 <= args.stop_token_id < len(processing_class):
            raise UserError(f"--stop_token_id {args.stop_token_id}: the tokenizer has {len(processing_class)} tokens")
        head = reward_model.head.weight if reward_model.same_tokens else None

        self.ppo, args = args, copy.copy(args)  # in the Trainer's terms
        args.gradient_accumulation_steps = args.local_mini_batch_size // args.micro_batch_size
        self.micro_steps = args.gradient_accumulation_steps * args.num_mini_batches * args.num_ppo_epochs
        self.steps_per_update = args.num_mini_batches * args.num_ppo_epochs
        episodes = args.total_episodes or int(args.num_train_epochs * len(train_dataset))
        self.num_updates = args.max_steps if args.max_steps > 0 else -(-episodes // args.batch_size)
        args.max_steps = self.num_updates * self.steps_per_update
        for name in ("logging_steps", "save_steps", "eval_steps", "eval_delay", "warmup_steps"):
            steps = getattr(args, name)
            if steps is not None:  # below 1: a share of all updates
                steps = -int(-steps * self.num_updates // 1) if steps < 1 else int(steps)
                setattr(args, name, steps * self.steps_per_update)
        self.work = f"{self.num_updates} updates of {args.batch_size} answers, {self.steps_per_update} steps each"
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # each trained parameter has a gradient at each step
        super().__init__(
            model=PolicyAndValue(model, self.adapter, args.value_adapter, head),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[LastEvaluation(), *(callbacks or [])],
            **kwargs,
        )
        if self.is_fsdp_enabled:  # sampling and scoring call parts of the model, each of which holds a shard
            raise UserError(
                "PPO needs whole weights on each device, which FSDP does not keep:\n"
                "  accelerate launch --config_file accelerate_config/multi_gpu.yaml ppo_training.py ..."
            )
        for other in (self.reference_model, *(getattr(self.reward, name, None) for name in ("model", "head"))):
            if other is not None:
                other.to(self.args.device)
        self.kl_coef = args.kl_coef
        self._rollout = self._micro_step = None
        self._stopped, self.starting_answers = False, {}
        self._metrics = defaultdict(list)
        self._check_trunk()

    def prepare_models(self, model, args):
        """Dropout off, the reference policy and the critic's adapter on the policy's base, rows without padding."""
        self.reference_model, self.reference_adapter = None, args.ref_adapter_name
        known = model.peft_config if isinstance(model, PeftModel) else {}
        for flag in ("model_adapter_name", "ref_adapter_name"):
            if (name := getattr(args, flag)) and name not in known:
                raise UserError(f"--{flag} {name}: the policy has {' and '.join(known) or 'no adapters'}")
        if known and model.active_adapters != [self.adapter]:
            raise UserError(
                f"the policy's active adapter is {model.active_adapters}, not {self.adapter}: set_adapter()"
            )
        if not isinstance(model, PeftModel):
            if args.value_adapter:
                raise UserError("--value_adapter needs a LoRA policy: leave out --no_use_peft")
            self.reference_model = copy.deepcopy(model).eval().requires_grad_(False)
        elif not args.ref_adapter_name and not is_new(model, self.adapter):
            copy_adapter(model, self.adapter, "ref")
            self.reference_adapter = "ref"
        if args.value_adapter:
            copy_adapter(model, "reward" if "reward" in model.peft_config else self.adapter, "value")
            for parameter in parameters_of(model, "value").values():
                parameter.requires_grad_(True)
        for other in filter(None, (model, self.reference_model, getattr(self.reward, "model", None))):
            for module in other.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # or the ratio would not be 1 before the first step
            if args.device.type == "cpu" and args.mixed_precision == "no":
                use_flat_rows(other)
                use_fast_linear(other)

    def _check_trunk(self):
        """Logits are made from the trunk's last state and the head alone; refuse a model that does more than that."""
        policy = self.accelerator.unwrap_model(self.model).policy.eval()
        ids = self.train_dataset[0]["prompt_ids"][-8:]
        with torch.no_grad():
            whole = policy(input_ids=torch.tensor([ids], device=self.args.device)).logits[0].float()
            states = last_states(policy, [ids, ids[:5]], self.pad_id)
            for row in (slice(len(ids)), slice(len(ids), None)):
                logits = logits_of(policy, states[row], 1.0)
                if not torch.allclose(logits, whole[: len(logits)], atol=self.tolerance, rtol=self.tolerance):
                    raise UserError(
                        f"{self.model.config.model_type} changes its logits after the output layer, by scaling or "
                        "otherwise: PPO does not know how\n  dpo_training.py trains such models"
                    )

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        learning_rate = self.ppo.value_learning_rate
        if learning_rate is None:  # a head alone has to follow the states of a policy that changes under it
            learning_rate = self.args.learning_rate * (1 if self.ppo.value_adapter else 10)
        critics = {id(p) for p in self.accelerator.unwrap_model(self.model).value_parameters().values()}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in critics]
            group["params"] = [p for p in group["params"] if id(p) not in critics]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        return optimizer

    def get_train_dataloader(self):
        # a process's share of the batch, again at each micro-step
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = BatchSampler(len(self.train_dataset), self.ppo.batch_size, self.num_updates, self.micro_steps, seed)
        size = self.ppo.local_batch_size
        loader = DataLoader(self.train_dataset, batch_size=size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._micro_step is None:
            self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
            assert self._micro_step % self.micro_steps == 0, "a checkpoint within an update cannot be resumed"
        update, step = divmod(self._micro_step, self.micro_steps)
        if step == 0:
            self._rollout, self._stopped = self.rollout(inputs, update), False
        self._micro_step += 1
        if self._stopped:  # no gradients: the optimizer passes over parameters without one
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, self.micro_batch(update, step), num_items_in_batch)
        if update < self.ppo.value_warmup_updates:  # without gradients: a zero would let weight decay move the policy
            self.accelerator.unwrap_model(model).drop_policy_gradients()
        per_mini_batch = self.args.gradient_accumulation_steps
        if self.ppo.target_kl is not None and self._micro_step % per_mini_batch == 0:
            self._stopped = sum(self._metrics["policy/approxkl_avg"][-per_mini_batch:]) > self.ppo.target_kl
            if self._stopped:
                model.zero_grad()
        return loss

    def micro_batch(self, update: int, step: int) -> dict:
        """The rows of the current rollout that one micro-step of an update trains on."""
        epoch, step = divmod(step, self.micro_steps // self.ppo.num_ppo_epochs)
        mini_batch, micro_batch = divmod(step, self.args.gradient_accumulation_steps)
        rows = self.mini_batch_rows(update, epoch, mini_batch)
        size = self.ppo.micro_batch_size
        chosen = rows[micro_batch * size : (micro_batch + 1) * size]
        tokens = self.accelerator.reduce(self._rollout["mask"][rows].sum())
        micro = {k: v[chosen] if torch.is_tensor(v) else [v[i] for i in chosen] for k, v in self._rollout.items()}
        policy_trains = update >= self.ppo.value_warmup_updates
        return {**micro, "tokens": tokens, "on_policy": epoch == mini_batch == 0, "policy_trains": policy_trains}

    def _prepare_inputs(self, inputs):
        return inputs  # where they belong already

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
    def reading(self, reference: bool):
        """The policy as it is, or the reference, in eval mode, without gradients and in the precision of training."""
        model = self.accelerator.unwrap_model(self.model)
        own_weights = reference and self.reference_model is not None
        active = (
            active_adapter(model.policy, self.reference_adapter) if reference and not own_weights else nullcontext()
        )
        training = model.training
        model.eval()
        with torch.no_grad(), self.accelerator.autocast(), active:
            yield self.reference_model if own_weights else model.policy
        model.train(training)

    def sample(self, rows: list[dict], noise, reference: bool = False) -> dict:
        """Answers to prompts, of the policy or of the reference, and what is known of them before training.

        Returns:
            prompts, answers (lists of token ids), logprobs, values, mask (rows, tokens), ended (rows,).
        """
        model, device = self.accelerator.unwrap_model(self.model), self.args.device
        prompts = [row["prompt_ids"] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # prompts of a length need little padding
        answers = [None] * len(rows)
        logprobs, values = torch.zeros(2, len(rows), self.ppo.response_length, device=device)
        options = {"stop_ids": self.stop_ids, "pad_id": self.pad_id, "temperature": self.ppo.temperature}
        gather = {"gather_deepspeed3_params": self.ppo.ds3_gather_for_generation}
        size = self.ppo.local_rollout_forward_batch_size
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, **gather),
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
        mask = length_mask([len(answer) for answer in answers], device)
        ended = torch.tensor([answer[-1] in self.stop_ids for answer in answers], device=device)
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
            self.processing_class.decode(answer[: -1 if ended else None], skip_special_tokens=True).strip()
            for answer, ended in zip(sampled["answers"], sampled["ended"].tolist(), strict=True)
        ]

    def scores(self, rows: list[dict], sampled: dict) -> torch.Tensor:
        """The reward of each answer, before any penalty, (rows,)."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.reward.same_tokens:
                pairs = zip(sampled["prompts"], sampled["answers"], strict=True)
                scores = self.reward.score_tokens([p + a for p, a in pairs], self.ppo.local_rollout_forward_batch_size)
            else:
                scores = self.scores_of_texts(rows, self.texts(sampled), sampled["ended"].tolist())
            if self.ppo.subtract_reference_score:
                scores = scores - self.scores_of_texts(rows, [row["reference"] for row in rows], [True] * len(rows))
            elif self.ppo.use_score_norm:
                scores = scores - self.reward.mean
            if self.ppo.use_score_norm:
                scores = scores / self.reward.std
        clip = self.ppo.score_clip
        return scores.to(self.args.device) if clip is None else scores.to(self.args.device).clamp(-clip, clip)

    def scores_of_texts(self, rows, texts, ended) -> torch.Tensor:
        columns = {"reference": [row.get("reference") for row in rows]}
        return self.reward([row["prompt"] for row in rows], texts, ended, columns)

    def noise(self, key, rows: int):
        """Uniform noise of a whole batch, the same on every process and after every resume."""
        generator = torch.Generator().manual_seed(hash((self.args.seed, *key)) % 2**63)
        return torch.rand(rows, self.ppo.response_length, generator=generator)

    def mean(self, values: dict, rows: int) -> dict:
        """Means of (rows,) tensors over the rows of all processes."""
        sums = self.accelerator.reduce(torch.stack([v.float().sum() for v in values.values()]))
        return dict(zip(values, (sums / rows).tolist(), strict=True))

    def rollout(self, rows: list[dict], update: int) -> dict:
        """Sample, score and estimate advantages for this process's share of an update's batch."""
        ppo = self.ppo
        first = self.args.process_index * ppo.local_batch_size
        batch = self.sample(rows, self.noise((0, update), ppo.batch_size)[first : first + ppo.local_batch_size])
        mask, ended = batch["mask"], batch["ended"]
        if update == 0 and mask.shape[1] == 1 and ended.all():
            raise UserError(
                "the policy ends every answer of the first batch at once: there is nothing to score\n"
                "  train it with sft_training.py first, or check that the prompts end where an answer begins"
            )
        ref_logprobs = self.reference_logprobs(batch["prompts"], batch["answers"])
        scores = self.scores(rows, batch)
        if ppo.missing_eos_penalty is not None:
            scores = scores - ppo.missing_eos_penalty * ~ended
        kl = kl_per_token(batch["logprobs"], ref_logprobs, ppo.kl_estimator) * mask
        rewards = token_rewards(scores, kl, mask, self.kl_coef)
        if ppo.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self.accelerator.reduce)
        advantages, batch["returns"] = advantages_and_returns(rewards, batch["values"], mask, ppo.gamma, ppo.lam)
        batch["advantages"] = whiten(advantages, mask, reduce=self.accelerator.reduce)

        non_score = (-self.kl_coef * kl).sum(1)
        metrics = {
            "objective/kl": kl.sum(1),
            "objective/entropy": -batch["logprobs"].sum(1),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": non_score + scores,
            "objective/scores": scores,
            "val/mean_length": mask.sum(1),
            "val/eos_rate": ended,
        }
        metrics = self.mean(metrics, ppo.batch_size)
        metrics["val/num_eos_tokens"] = metrics["val/eos_rate"] * ppo.batch_size
        if update == 0 and not ppo.ref_adapter_name:
            assert abs(metrics["objective/kl"]) < self.tolerance, "policy and reference differ at the start"
        if ppo.adaptive_kl_target is not None:
            metrics["objective/kl_coef"] = self.kl_coef
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, metrics["objective/kl"], ppo.adaptive_kl_target, ppo.adaptive_kl_horizon, ppo.batch_size
            )
        for name, value in metrics.items():
            self._metrics[name].append(value)
        return batch

    @property
    def exact(self) -> bool:
        """Whether all is computed in float32, so that sampling and training give the same log-probabilities."""
        policy = self.accelerator.unwrap_model(self.model).policy
        return policy.dtype == torch.float32 and self.accelerator.mixed_precision == "no"

    @property
    def tolerance(self) -> float:
        """How far from exact 'the same model' may be, with the precision in use."""
        return 1e-3 if self.exact else 0.1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ppo = self.ppo
        logprobs, entropy, mask, values = model(
            inputs["prompts"],
            inputs["answers"],
            self.pad_id,
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
            assert off < self.tolerance, f"the ratio is off 1 by {off} before the update's first step"

        def share(values):  # of the mean over the mini-batch's tokens on all processes
            return (values * mask).sum() / inputs["tokens"]

        pg_loss, vf_loss, mean_entropy = share(pg_losses), share(vf_losses), share(entropy)
        with torch.no_grad():
            parts = {
                "policy/approxkl_avg": share(0.5 * (logprobs - old_logprobs) ** 2),
                "policy/clipfrac_avg": share(pg_clipped.float()),
                "policy/entropy_avg": mean_entropy,
                "loss/policy_avg": pg_loss,
                "loss/value_avg": vf_loss,
                "val/clipfrac_avg": share(vf_clipped.float()),
                "val/ratio": share(ratio),
                "val/ratio_var": share((ratio - 1) ** 2),
            }
            sums = self.accelerator.reduce(torch.stack(list(parts.values())))
            for name, value in zip(parts, sums.tolist(), strict=True):
                self._metrics[name].append(value)
        # DDP averages gradients over processes; the loss is a share of the whole
        return (pg_loss - ppo.entropy_coef * mean_entropy + ppo.vf_coef * vf_loss) * self.args.world_size

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
        """Answers held-out prompts, logs and returns `eval_<dataset>_scores` and others: ppo_evaluation.py."""
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics, samples = evaluate(self, datasets, metric_key_prefix)
        if self.is_world_process_zero():
            show_samples(samples, self.state.global_step // self.steps_per_update, self.args.output_dir)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        output_dir = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        lora = isinstance(model.policy, PeftModel)
        model.policy.save_pretrained(output_dir, **({"selected_adapters": [self.adapter]} if lora else {}))
        critic = {name: p.detach().cpu().contiguous() for name, p in model.value_parameters().items()}
        save_file(critic, output_dir / VALUE_HEAD)
        state = {"kl_coef": self.kl_coef, "metrics": self._metrics}  # of updates that are not logged yet
        (output_dir / STATE).write_text(json.dumps(state) + "\n")
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.ppo, output_dir / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder, model = Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model)
        state = json.loads((folder / STATE).read_text())
        if isinstance(model.policy, PeftModel):
            weights = load_peft_weights(folder, device="cpu")
            set_peft_model_state_dict(model.policy, weights, adapter_name=self.adapter)
        else:
            load_model(model.policy, folder / "model.safetensors")
        critic = load_file(folder / VALUE_HEAD)
        for name, parameter in model.value_parameters().items():
            parameter.data.copy_(critic[name])
        self.kl_coef = state["kl_coef"]
        self._metrics.update(state.get("metrics", {}))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._metrics.clear()
