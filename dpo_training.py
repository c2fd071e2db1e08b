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

import math
from functools import partial

from command_line import ModelArguments, ScriptArguments, StageParser, run
from modeling import fit_length, load_policy, load_tokenizer, train_in_float32
from named_evaluation import NamedEvaluation
from prepare_data import describe, load_datasets
from rendering import encode_preference, tokenize
from run_folder import begin, find_resume, finish, plan
from run_log import watch
from user_error import UserError

from accelerate import PartialState
from peft import PeftModel
from transformers import set_seed
from trl import DPOConfig, DPOTrainer


class CheckedDPOTrainer(NamedEvaluation, DPOTrainer):
    """TRL's trainer on rows that are tokenised already, with its first step checked."""

    checked = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):  # without TRL's frozen copy of the start, which a next run makes anew
            self.model.save_pretrained = partial(self.model.save_pretrained, selected_adapters=["default"])

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.checked and self.model.training and self.state.global_step == 0:
            self.checked = True
            # before the first update policy and reference are the same, every implicit reward 0 and the loss ln 2
            tolerance = 1e-3 if self.model.dtype.itemsize == 4 and not (self.args.bf16 or self.args.fp16) else 0.05
            margin = self._metrics["train"]["rewards/margins"][-1]
            assert abs(margin) < tolerance, f"policy and reference differ before the first step: margin {margin}"
            if self.args.loss_type == ["sigmoid"] and not (
                self.args.label_smoothing or self.args.use_weighting or self.aux_loss_enabled
            ):
                loss = (result[0] if return_outputs else result).item()
                assert abs(loss - math.log(2)) < tolerance, f"the first DPO loss is {loss}, not ln 2"
        return result


def main(script_args, training_args, model_args):
    checkpoint = find_resume(training_args, script_args.overwrite_output_dir)
    if training_args.beta <= 0:
        raise UserError(f"--beta {training_args.beta:g}: the preferences' weight is above 0")
    if training_args.neftune_noise_alpha:
        raise UserError("--neftune_noise_alpha: its noise would make policy and reference differ from the start")
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    options = script_args.data_options(training_args.seed)
    train, evals, data = load_datasets(script_args.dataset_names, "preference", **options)
    set_seed(training_args.seed)
    policy, peft_config = load_policy(model_args, tokenizer)
    training_args.max_length = fit_length(training_args.max_length, policy)

    encode = partial(
        tokenize,
        encode=encode_preference,
        tokenizer=tokenizer,
        num_proc=training_args.dataset_num_proc,
        max_length=training_args.max_length,
        max_prompt_length=script_args.max_prompt_length,
    )
    train, data["tokenized"] = encode(train, name="train")
    PartialState().print(describe(data))
    evals = {name: encode(rows, name=name)[0] for name, rows in evals.items()}

    trainer = CheckedDPOTrainer(
        model=policy,
        args=training_args,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    train_in_float32(trainer.model)
    watch(trainer)
    PartialState().print(plan(trainer, data))
    if script_args.dry_run:
        return
    begin((script_args, training_args, model_args), checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    folder = training_args.output_dir
    finish(
        trainer,
        (script_args, training_args, model_args),
        data,
        then=[f"python merge_peft_adapter.py --adapter_model_name={folder} --output_name={folder}_merged"],
    )


def make_parser():
    return StageParser((ScriptArguments, DPOConfig, ModelArguments), learning_rate=5e-6)


if __name__ == "__main__":
    run(main, make_parser)
