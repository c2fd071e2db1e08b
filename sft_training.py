r"""Supervised fine-tuning: teach a base model to answer, by showing it answers.

    accelerate launch sft_training.py --model_name_or_path=gpt2-medium \
        --output_dir=saved/gpt2_medium_uc_sft --dataset_names=uc
    accelerate launch sft_training.py --config configs/sft.yaml
    accelerate launch sft_training.py --config configs/sft.yaml --no_use_peft --learning_rate 2e-5
    accelerate launch sft_training.py --config configs/sft.yaml --eval_strategy steps --eval_steps 200 \
        --generate_eval_samples 100 --metric_for_best_model eval_rouge_avg --load_best_model_at_end \
        --early_stopping_patience 3

Reads demonstrations (`prompt`, `completion`; see prepare_data.py --list) and writes a LoRA adapter with tokenizer and
chat template: the policy that reward_modeling.py, dpo_training.py and ppo_training.py start from. The loss lies on the
assistant's turns of the completion, each with its EOS.

Watch `eval_<dataset>_loss`: it falls, then flattens; when it rises again while `loss` falls, stop earlier.
`eval_rouge_avg` is of answers that the model generates itself.
"""

from dataclasses import dataclass, field
from functools import partial

from prepare_data import check_names, describe, load_datasets
from rlhf.runs.command_line import ScriptArguments, StageParser, run


@dataclass
class SFTScriptArguments(ScriptArguments):
    generate_eval_samples: int = field(
        default=0, metadata={"help": "Generate so many answers at each evaluation and report their ROUGE; 0 for none."}
    )
    generate_eval_length: int = field(default=64, metadata={"help": "The longest of these answers, in tokens."})


def main(script_args, training_args, model_args):
    from rlhf.evaluation.generation_metric import GeneratedRouge
    from rlhf.models.loading import fit_length, load_policy, load_tokenizer, train_in_float32
    from rlhf.models.rendering import encode_demonstrations
    from rlhf.models.tokenizing import tokenize_all
    from rlhf.runs.folder import begin, find_resume
    from rlhf.runs.log import say, watch
    from rlhf.runs.record import finish, plan
    from rlhf.runs.trainers import CheckedSFTTrainer

    arguments = script_args, training_args, model_args
    checkpoint = find_resume(arguments, [model_args.model_name_or_path])
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, script_args.system_prompt)
    options = script_args.data_options(training_args.seed)
    train, evals, data = load_datasets(script_args.dataset_names, "sft", **options)
    policy, peft_config = load_policy(model_args, tokenizer, training_args.seed)
    training_args.max_length = fit_length(training_args.max_length, policy)
    limits = {"max_length": training_args.max_length, "max_prompt_length": script_args.max_prompt_length}
    options = script_args.token_options(training_args)
    options["completion_only"] = training_args.completion_only_loss is not False
    train, evals = tokenize_all(train, evals, data, encode_demonstrations, tokenizer, **limits, **options)
    say(describe(data))

    trainer = CheckedSFTTrainer(
        model=policy,
        args=training_args,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=tokenizer,
        peft_config=peft_config,
        pad_rows=script_args.pad_rows,
    )
    train_in_float32(trainer.model)
    if script_args.generate_eval_samples:
        samples, length = script_args.generate_eval_samples, script_args.generate_eval_length
        trainer.more_metrics = GeneratedRouge(trainer, samples, length)
    watch(trainer, script_args.early_stopping_patience)
    say(plan(trainer, data, script_args.dry_run))
    if script_args.dry_run:
        return
    begin(trainer, arguments, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    folder = training_args.output_dir
    reward = f"reward_modeling.py --model_name_or_path={folder} --output_dir={folder}_reward --dataset_names=ufb"
    dpo = f"dpo_training.py --model_name_or_path={folder} --output_dir={folder}_dpo --dataset_names=ufb"
    finish(trainer, arguments, data, then=[reward, dpo])


def make_parser():
    names = partial(check_names, "sft")
    return StageParser("sft_training", SFTScriptArguments, "trl:SFTConfig", names, learning_rate=2e-4)


if __name__ == "__main__":
    run(main, make_parser)
