r"""Direct preference optimization: move the policy towards the preferred answers, without a reward model.

    accelerate launch dpo_training.py --model_name_or_path=saved/gpt2_medium_uc_sft \
        --output_dir=saved/gpt2_medium_ufb_dpo --dataset_names=ufb
    accelerate launch dpo_training.py --config configs/dpo.yaml --beta 0.05
    python merge_peft_adapter.py --base_model_name=gpt2-medium \
        --adapter_model_name=saved/gpt2_medium_ufb_dpo --output_name=saved/gpt2_medium_uc_ufb_merged

Reads preferences (`prompt`, `chosen`, `rejected`). An adapter is continued and its frozen copy is the reference, so
what is written is one LoRA on the base that holds SFT and DPO together.

Watch `rewards/accuracies` rise above 0.5 and `eval_<dataset>_rewards/margins` above 0; the first loss is ln 2. When
`rewards/chosen` falls far below 0, the policy forgets the good answers too: lower the learning rate or raise `--beta`.
"""

from functools import partial

from prepare_data import check_names, describe, load_datasets
from rlhf.runs.command_line import ScriptArguments, StageParser, run


def main(script_args, training_args, model_args):
    from rlhf.models.loading import fit_length, load_policy, load_tokenizer, train_in_float32
    from rlhf.models.rendering import encode_preference
    from rlhf.models.tokenizing import tokenize_all
    from rlhf.runs.folder import begin, find_resume
    from rlhf.runs.log import say, watch
    from rlhf.runs.record import finish, plan
    from rlhf.runs.trainers import CheckedDPOTrainer

    arguments = script_args, training_args, model_args
    checkpoint = find_resume(arguments, [model_args.model_name_or_path])
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, script_args.system_prompt)
    options = script_args.data_options(training_args.seed)
    train, evals, data = load_datasets(script_args.dataset_names, "preference", **options)
    policy, peft_config = load_policy(model_args, tokenizer, training_args.seed)
    training_args.max_length = fit_length(training_args.max_length, policy)
    limits = {"max_length": training_args.max_length, "max_prompt_length": script_args.max_prompt_length}
    options = script_args.token_options(training_args)
    train, evals = tokenize_all(train, evals, data, encode_preference, tokenizer, **limits, **options)
    say(describe(data))

    trainer = CheckedDPOTrainer(
        model=policy,
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
    merge = f"python merge_peft_adapter.py --adapter_model_name={folder} --output_name={folder}_merged"
    finish(trainer, arguments, data, then=[merge] if model_args.use_peft else [])


def make_parser():
    names = partial(check_names, "preference")
    return StageParser("dpo_training", ScriptArguments, "trl:DPOConfig", names, learning_rate=5e-6)


if __name__ == "__main__":
    run(main, make_parser)
