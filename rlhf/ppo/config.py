"""The flags of PPO: those of TRL 1.12's PPOConfig with their meaning, and a few beside them."""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """Training arguments of PPO. `per_device_train_batch_size` only bounds memory: a micro-batch.

    A batch (one update) is per_device_train_batch_size x gradient_accumulation_steps x processes prompts.
    `max_steps`, `logging_steps`, `save_steps`, `eval_steps`, `eval_delay` and `warmup_steps` count updates.
    """

    gradient_checkpointing: bool = field(default=True, metadata={"help": "Compute activations twice to save memory."})

    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the prompts."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each batch of answers."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps a pass; divides a process's batch."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Answers to sample in all; by default num_train_epochs times the prompts."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Rows generated and scored at a time on a device: memory only."}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Gather a DeepSpeed ZeRO-3 policy for sampling: faster, if it fits."}
    )

    # answers
    response_length: int = field(default=53, metadata={"help": "Longest answer, in tokens."})
    stop_token: str | None = field(
        default=None,
        metadata={"help": "`eos` ends answers with the EOS token, which it always does here.", "choices": ["eos"]},
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "A token that ends an answer, beside the generation config's own."}
    )
    temperature: float = field(
        default=0.7, metadata={"help": "Sampling temperature; also that of the trained policy."}
    )

    # rewards
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of an answer that does not end within its length."}
    )
    use_score_norm: bool = field(
        default=False,
        metadata={"help": "Scale scores by the mean and standard deviation in the reward model's folder."},
    )
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to +- this, after scaling."})
    subtract_reference_score: bool = field(
        default=False, metadata={"help": "Reward what an answer scores above the data's own answer to the prompt."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the token rewards to unit variance."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the penalty for leaving the reference policy."})
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Estimator of that KL: k1 unbiased, k3 never negative.", "choices": ["k1", "k3"]},
    )
    adaptive_kl_target: float | None = field(
        default=None, metadata={"help": "Change kl_coef from update to update so that objective/kl tends to this."}
    )
    adaptive_kl_horizon: float = field(
        default=10000, metadata={"help": "Episodes in which kl_coef changes by up to 20 percent to get there."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})

    # losses
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Skip the rest of an update once policy/approxkl of a mini-batch is above this."},
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the policy's entropy, which is rewarded."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value update."})
    value_adapter: bool | None = field(
        default=None,
        metadata={"help": "Give the critic a LoRA of its own, beside its head; by default where the policy has one."},
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the critic; by default learning_rate, and ten times that for its head."},
    )
    value_warmup_updates: int = field(
        default=0, metadata={"help": "First updates in which only the critic is trained (its head, or its LoRA too)."}
    )

    # adapters of a PeftModel that holds several
    model_adapter_name: str | None = field(default=None, metadata={"help": "The adapter to train, if not `default`."})
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "The adapter of the reference policy, if not where training started."}
    )

    # evaluation
    num_sample_generations: int = field(
        default=10,
        metadata={
            "help": "How often held-out prompts are answered in a run, where eval_steps is not given; 0: never."
        },
    )
    max_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts of a dataset answered each time."})

    def __post_init__(self):
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_strategy = "steps" if self.num_sample_generations else "no"
            self.eval_steps = 1 / max(self.num_sample_generations, 2)  # of all updates
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


class Schedule(NamedTuple):
    """How PPO's updates lie in the steps of a `transformers.Trainer`."""

    updates: int
    steps: int  # optimizer steps an update: one a mini-batch, num_ppo_epochs times
    micro_steps: int  # passes an update: one a micro-batch


def trainer_arguments(ppo: PPOConfig, num_prompts: int) -> tuple[PPOConfig, Schedule]:
    """The configuration in the Trainer's terms, where all that PPO counts in updates is counted in optimizer steps."""
    args = copy.copy(ppo)
    args.gradient_accumulation_steps = ppo.local_mini_batch_size // ppo.micro_batch_size
    steps = ppo.num_mini_batches * ppo.num_ppo_epochs
    episodes = ppo.total_episodes or int(ppo.num_train_epochs * num_prompts)
    updates = ppo.max_steps if ppo.max_steps > 0 else -(-episodes // ppo.batch_size)
    args.max_steps = updates * steps
    for name in ("logging_steps", "save_steps", "eval_steps", "eval_delay", "warmup_steps"):
        every = getattr(ppo, name)
        if every is not None:  # below 1: a share of all updates
            every = -int(-every * updates // 1) if every < 1 else int(every)
            setattr(args, name, every * steps)
    args.remove_unused_columns = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # each trained parameter has a gradient at each step
    return args, Schedule(updates, steps, steps * args.gradient_accumulation_steps)
