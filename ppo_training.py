r"""Proximal policy optimization: let the policy answer, have the reward model judge, and reinforce what it likes.

    accelerate launch ppo_training.py --model_name_or_path=saved/gpt2_large_uc_ufb_hh_shp_sft \
        --reward_model_name_or_path=saved/gpt2_large_uc_ufb_hh_shp_reward \
        --output_dir=saved/gpt2_large_uc_ufb_hh_shp_ppo --dataset_names=uc,ufb,hh,shp
    accelerate launch ppo_training.py --config configs/ppo.yaml --kl_coef 0.1

Reads prompts and writes a LoRA adapter on the base (SFT and PPO together) with the critic beside it. The algorithm
is in rlhf/ppo.

Watch `objective/scores` rise while `objective/kl` stays bounded (tens at most); `val/ratio` near 1; `val/eos_rate`
high. Scores that rise with the KL running away mean that the reward model is being fooled: read samples, raise
`--kl_coef`.
"""

from dataclasses import dataclass, field
from functools import partial

from prepare_data import check_names, describe, load_datasets
from rlhf.runs.command_line import ScriptArguments, StageParser, run
from rlhf.user_error import UserError


@dataclass
class PPOScriptArguments(ScriptArguments):
    reward_model_name_or_path: str = field(
        default="",
        metadata={
            "help": "The reward model: hub id, model folder, adapter folder; or a function, file.py:function.",
            "aliases": ["--reward_model_path"],
        },
    )


def main(script_args, training_args, model_args):
    from rlhf.models.loading import load_policy, load_tokenizer, max_positions
    from rlhf.models.rendering import encode_prompt
    from rlhf.models.rewards import load_reward
    from rlhf.models.tokenizing import tokenize_all
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.runs.folder import begin, find_resume
    from rlhf.runs.log import say, watch
    from rlhf.runs.record import finish, plan
    from rlhf.runs.trainers import checked

    arguments = script_args, training_args, model_args
    checkpoint = find_resume(arguments, [model_args.model_name_or_path, script_args.reward_model_name_or_path])
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, script_args.system_prompt)
    options = script_args.data_options(training_args.seed)
    train, evals, data = load_datasets(script_args.dataset_names, "prompt", **options)
    policy, peft_config = load_policy(model_args, tokenizer, training_args.seed)
    if peft_config is not None:
        from peft import get_peft_model

        policy = get_peft_model(policy, peft_config)
    reward_model = load_reward(script_args.reward_model_name_or_path, tokenizer, model_args, policy)

    positions = max_positions(policy)
    if reward_model.same_tokens:
        positions = min(positions, reward_model.max_length)
    room = positions - training_args.response_length
    if room < 8:
        raise UserError(f"--response_length {training_args.response_length} leaves no room for a prompt in the model")
    limits = {"max_prompt_length": min(room, script_args.max_prompt_length or room)}
    options = script_args.token_options(training_args)
    train, evals = tokenize_all(train, evals, data, encode_prompt, tokenizer, **limits, **options)
    say(describe(data))

    trainer = checked(PPOTrainer)(
        model=policy,
        args=training_args,
        reward_model=reward_model,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=tokenizer,
        pad_rows=script_args.pad_rows,
    )
    watch(trainer, script_args.early_stopping_patience)
    say(plan(trainer, data, script_args.dry_run))
    if script_args.dry_run:
        return
    begin(trainer, arguments, checkpoint, reward_model)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    folder = training_args.output_dir
    merge = f"python merge_peft_adapter.py --adapter_model_name={folder} --output_name={folder}_merged"
    finish(trainer, arguments, data, then=[merge] if model_args.use_peft else [])


def make_parser():
    names, training = partial(check_names, "prompt"), "rlhf.ppo.config:PPOConfig"
    defaults = {"learning_rate": 1e-5, "logging_steps": 1, "eval_strategy": "steps"}
    return StageParser("ppo_training", PPOScriptArguments, training, names, **defaults)


if __name__ == "__main__":
    run(main, make_parser)
