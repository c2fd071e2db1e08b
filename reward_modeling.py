r"""Reward modelling: learn from pairs of answers which one people prefer.

    accelerate launch reward_modeling.py --model_name_or_path=saved/gpt2_large_uc_ufb_hh_shp_sft \
        --output_dir=saved/gpt2_large_uc_ufb_hh_shp_reward --dataset_names=uc,ufb,hh,shp
    accelerate launch reward_modeling.py --config configs/reward.yaml

Reads preferences (`prompt`, `chosen`, `rejected`, and `margin` where a dataset has one) and writes a LoRA adapter with
its scalar `score` head. Starts from the SFT model's weights, with a fresh head; the score is read at the answer's EOS.

Watch `eval_<dataset>_accuracy`: 0.5 is guessing, 0.65-0.75 is usual on human preferences, 1.0 means that a giveaway
(length, a name) was found. `margin` may grow; `eval_<dataset>_loss` should not.
"""

from dataclasses import dataclass, field
from functools import partial

from prepare_data import check_names, describe, load_datasets
from rlhf.runs.command_line import ScriptArguments, StageParser, run
from rlhf.user_error import UserError


@dataclass
class RewardScriptArguments(ScriptArguments):
    use_margin: bool = field(
        default=False,
        metadata={"help": "Ask for a lead of at least the data's own margin (where all datasets have one)."},
    )


def join_prompt(row):
    """RewardTrainer wants prompt and answer as one sequence."""
    return {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}


def main(script_args, training_args, model_args):
    from rlhf.models.loading import fit_length, load_tokenizer, new_reward_model, train_in_float32
    from rlhf.models.rendering import encode_preference
    from rlhf.models.rewards import store_statistics
    from rlhf.models.tokenizing import tokenize_all
    from rlhf.runs.folder import begin, find_resume
    from rlhf.runs.log import say, watch
    from rlhf.runs.record import finish, plan
    from rlhf.runs.trainers import CheckedRewardTrainer

    arguments = script_args, training_args, model_args
    checkpoint = find_resume(arguments, [model_args.model_name_or_path])
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, script_args.system_prompt)
    options = script_args.data_options(training_args.seed)
    train, evals, data = load_datasets(script_args.dataset_names, "preference", **options)
    if script_args.use_margin and "margin" not in train.column_names:
        raise UserError(f"--use_margin: not all of {script_args.dataset_names} have margins")
    if not script_args.use_margin:
        columns = ["prompt", "chosen", "rejected", "dataset"]
        train = train.select_columns(columns)
        evals = {name: rows.select_columns(columns) for name, rows in evals.items()}
    reward_model, peft_config = new_reward_model(model_args, tokenizer, training_args.seed)
    training_args.max_length = fit_length(training_args.max_length, reward_model)
    limits = {"max_length": training_args.max_length, "max_prompt_length": script_args.max_prompt_length}
    options = script_args.token_options(training_args)
    train, evals = tokenize_all(train, evals, data, encode_preference, tokenizer, **limits, **options)
    say(describe(data))
    train = train.map(join_prompt, remove_columns="prompt_ids")
    evals = {name: rows.map(join_prompt, remove_columns="prompt_ids") for name, rows in evals.items()}

    trainer = CheckedRewardTrainer(
        model=reward_model,
        args=training_args,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=tokenizer,
        peft_config=peft_config,
        pad_rows=script_args.pad_rows,
    )
    train_in_float32(trainer.model)
    watch(trainer, script_args.early_stopping_patience)
    say(plan(trainer, data, script_args.dry_run))
    if script_args.dry_run:
        return
    begin(trainer, arguments, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    folder = training_args.output_dir
    held_out = [row for rows in evals.values() for row in rows] or train.select(range(min(len(train), 200)))
    answers = [row[side] for row in held_out for side in ("chosen_ids", "rejected_ids")]
    scores = trainer.score(answers)
    if trainer.is_world_process_zero():
        store_statistics(scores, folder)
    models = f"--model_name_or_path={model_args.model_name_or_path} --reward_model_name_or_path={folder}"
    ppo = f"ppo_training.py {models} --output_dir={folder}_ppo --dataset_names={script_args.dataset_names}"
    finish(trainer, arguments, data, then=[ppo])


def make_parser():
    names = partial(check_names, "preference")
    return StageParser("reward_modeling", RewardScriptArguments, "trl:RewardConfig", names, learning_rate=1e-4)


if __name__ == "__main__":
    run(main, make_parser)
