"""What hands mistype, over all seven commands: exit code 2, one to three lines, nothing written, no library used."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.user_error import UserError
from tests.conftest import ROOT, run_processes

SFT, REWARD, DPO, PPO = "sft_training", "reward_modeling", "dpo_training", "ppo_training"
MERGE, EVALUATE, PREPARE = "merge_peft_adapter", "evaluate_model", "prepare_data"
GOOD = {
    SFT: "--model_name_or_path gpt2 --output_dir out --dataset_names rows.jsonl",
    EVALUATE: "--model_name_or_path gpt2 --output_dir out --dataset_names rows.jsonl",
    MERGE: "--adapter_model_name owner/adapter --output_name out",
    PREPARE: "--dataset_names rows.jsonl --task preference",
}
GOOD |= dict.fromkeys((REWARD, DPO), GOOD[SFT])
GOOD[PPO] = f"{GOOD[SFT]} --reward_model_name_or_path owner/reward"

# beside a good command: flags that spoil it, and what the message must hold
MISUSES = {
    # names
    SFT: """
        --learning_rat 1 => did you mean learning_rate?
        --lora_aplha 1 => did you mean lora_alpha?
        --datset_names uc => did you mean dataset_names?
        --Learning_Rate 1 => did you mean learning_rate?
        --rpo_alpha 1 => --loss_type sigmoid sft --loss_weights 1 0.2
        --beta 0.1 => a flag of dpo_training.py
        --kl_coef 0.1 => a flag of ppo_training.py
        --sparkle 1 => unknown flag sparkle: --help_all lists
        --zeta=1 => --help_all
        -lr 1e-4 => --learning_rate
        --warmup_ratio 0.1 => --warmup_steps 0.1
        --evaluation_strategy steps => --eval_strategy
        --no_cuda => --use_cpu
        --tokenizer_name gpt2 => the tokenizer of --model_name_or_path
        --group_by_length => --train_sampling_strategy group_by_length
        --cutoff_len 512 => --max_length
        --lora_rank 8 => --lora_r
        --lora_target all => --lora_target_modules
        --finetuning_type lora => nothing for lora
        --stage sft => each stage is a script
        --template llama3 => chat template
        --save_safetensors true => always saved as safetensors
        --freeze_layers 2 => there is none
        --max_seq_length 512 => --max_length
        --torch_dtype bfloat16 => --dtype
        --kl_coeff 0.2 => --kl_coef, a flag of ppo_training.py
        --seed 1 stray => expected one value
        --no_max_length => unknown flag
        --no_packing => unknown flag
        --logging_dir x => --report_to tensorboard
        --model_init_kwargs '{"a": 1}' => the script loads the model
        --dataset_text_field body => rows are read
        --truncation_mode keep_end => --max_prompt_length
        --do_train false => this script trains
        --do_predict => evaluate_model.py
        --assistant_only_loss => already
        --eos_token a => a model keeps its tokenizer
        --pad_token a => a model keeps its tokenizer
        --chat_template_path x.jinja => a model keeps its tokenizer
        --trust_remote_code => never run here
        --prediction_loss_only => leave it out
        --label_names a b => leave it out
        --no_remove_unused_columns => leave it out
        --shuffle_dataset => by --seed
        --lora_task_type SEQ_CLS => leave it out
        --enable_jit_checkpoint => --save_steps
        --local_rank 1 => torchrun
        --dataset_kwargs '{"skip_prepare_dataset": true}' => leave it out
        # values
        --learning_rate fast => invalid float value: 'fast'
        --learning_rate -1e-4 => --learning_rate must be above 0, not -0.0001
        --learning_rate 0 => must be above 0
        --learning_rate nan => finite
        --learning_rate inf => finite
        --learning_rate -inf => finite
        --learning_rate 1e-4 2e-4 => expected one value
        --learning_rate => expected a value
        --num_train_epochs 0 => must be above 0
        --num_train_epochs -1 => must be above 0
        --max_steps 0 => must be at least 1
        --max_steps -5 => must be at least 1
        --max_steps 1.5 => invalid int value
        --per_device_train_batch_size 0 => must be at least 1
        --per_device_train_batch_size -8 => must be at least 1
        --per_device_eval_batch_size 0 => must be at least 1
        --gradient_accumulation_steps 0 => must be at least 1
        --lora_r 0 => must be at least 1
        --lora_r -4 => must be at least 1
        --lora_alpha 0 => must be above 0
        --lora_dropout 1.5 => below 1
        --lora_dropout 1 => below 1
        --lora_dropout -0.1 => at least 0
        --seed -1 => at least 0
        --seed 4294967296 => at most 4294967295
        --data_seed -1 => at least 0
        --adam_beta1 1.5 => below 1
        --adam_beta2 1 => below 1
        --adam_epsilon 0 => above 0
        --weight_decay -1 => at least 0
        --max_grad_norm -1 => at least 0
        --warmup_steps -5 => at least 0
        --warmup_steps 1.5 => from 1 on it is whole
        --eval_strategy steps --eval_steps 2.5 => whole
        --logging_steps 0 => above 0
        --save_steps -1 => above 0
        --save_total_limit 0 => at least 1
        --max_length 0 => at least 2
        --max_length none 5 => expected one value
        --max_prompt_length 0 => at least 1
        --max_eval_samples -1 => at least 1
        --max_bad_percentage 101 => at most 100
        --validation_split_percentage 100 => below 100
        --validation_split_percentage -1 => at least 0
        --dataloader_num_workers -1 => at least 0
        --ddp_timeout 0 => at least 1
        --label_smoothing_factor 1 => below 1
        --neftune_noise_alpha -5 => at least 0
        --early_stopping_patience -1 => at least 0
        --generate_eval_samples -1 => at least 0
        --generate_eval_samples 2 --generate_eval_length 0 => at least 1
        --packing maybe => invalid bool value
        --use_cpu 2 => invalid bool value
        --dtype int3 => --dtype: invalid choice: 'int3'
        --eval_strategy never => invalid choice
        --eval_strategy step => did you mean steps?
        --optim adamw => invalid choice
        --lr_scheduler_type cosin => did you mean cosine?
        --loss_type banana => invalid choice
        --report_to wandbb => did you mean wandb?
        --report_to tensorboard => pip install tensorboard
        --optim galore_adamw --optim_target_modules all-linear => pip install galore-torch
        --optim schedule_free_adamw => pip install schedulefree
        --optim adamw_torch_4bit => pip install torchao
        --optim lomo => pip install lomo-optim
        --attn_implementation flash_attention_2 => pip install flash-attn
        --use_liger_kernel => pip install liger-kernel
        --deepspeed ds.json => ds.json: no such file
        --deepspeed typo.yaml => invalid json value
        --deepspeed good.json => pip install deepspeed
        --fsdp full_shard => this is one
        --accelerator_config nowhere.json => no such file
        --lr_scheduler_kwargs {min_lr:1} => give JSON
        --lr_scheduler_kwargs 1 => give JSON
        --lr_scheduler_kwargs '{"num_cycles": 2}' => linear takes no num_cycles
        --lr_scheduler_type cosine_with_min_lr => min_lr
        --lr_scheduler_type warmup_stable_decay => num_decay_steps
        --lr_scheduler_type reduce_lr_on_plateau => --metric_for_best_model
        # settings that contradict each other
        --save_strategy best => --metric_for_best_model
        --load_best_model_at_end --eval_strategy no => nothing is best
        --early_stopping_patience 3 => needs --metric_for_best_model
        --early_stopping_patience 3 --metric_for_best_model eval_loss --eval_strategy no => --eval_strategy no
        --eval_steps 5 => needs --eval_strategy steps
        --save_strategy epoch --save_steps 5 => needs --save_strategy steps
        --logging_strategy epoch --logging_steps 5 => needs --logging_strategy steps
        --generate_eval_length 5 => needs --generate_eval_samples
        --no_use_peft --lora_r 8 => needs --use_peft
        --bnb_4bit_quant_type fp4 => needs --load_in_4bit
        --dataloader_prefetch_factor 2 => needs --dataloader_num_workers
        --load_in_4bit --load_in_8bit => leave one out
        --load_in_4bit --no_use_peft => quantised weights
        --packing => flash_attention_2
        --gradient_checkpointing_kwargs '{"banana": 1}' => there is no banana
        --torch_compile_mode banana => invalid choice
        --ddp_backend gloo => this is one
        --model_name_or_path model --model_revision v1 => has no revisions
        --padding_free => flash_attention_2
        --optim_target_modules x => galore
        --lora_target_parameters a.b => --lora_dropout 0
        --bf16 true --fp16 true => leave one out
        --eval_on_start --eval_strategy no => leave one out
        --loss_type dft --label_smoothing_factor 0.1 => needs --loss_type nll
        # files, folders and datasets
        --model_name_or_path ./nowhere => ./nowhere: there is no such
        --model_name_or_path /no/such/model => there is no such
        --model_name_or_path '' => --model_name_or_path is missing
        --output_dir '' => --output_dir is missing
        --output_dir rows.jsonl => is a file
        --output_dir rows.jsonl/out => would lie, is a file
        --output_dir /proc/nowhere/out => cannot write
        --model_name_or_path model --output_dir model => the model to start from
        --resume_from_checkpoint out/checkpoint-9 => there is no such
        --dataset_names ucc => did you mean uc?
        --dataset_names nowhere.jsonl => nowhere.jsonl
        --dataset_names empty.jsonl => empty.jsonl
        --dataset_names '' => no dataset is named
        --dataset_names uc:2 => between 0 and 1
        --dataset_names uc# => type uc:0.1
        --dataset_names uc:nan => between 0 and 1
        --dataset_names uc ucc => did you mean uc?
        --dataset_names rows.jsonl,rows.jsonl => named twice
        --eval_dataset_names nowhere.jsonl => nowhere.jsonl
        # YAML
        --config => name one or more YAML files
        --config nowhere.yaml => --config nowhere.yaml: No such file
        --config . => --config .
        --config model.yaml => lora_rank -> --lora_r
        --config list.yaml => `flag: value` lines
        --config broken.yaml => broken.yaml:2: no YAML
        --config latin.yaml => UTF-8
        --config typo.yaml => typo.yaml:2: unknown key lora_aplha: did you mean lora_alpha?
        --config twice.yaml => twice.yaml:2: seed is there twice
        --config null.yaml => null.yaml:1: learning_rate: it has no value
        --config octal.yaml => octal.yaml:1: seed: invalid int value: '0o10'
        --config sections.yaml => base_model -> --model_name_or_path
        --config section.yaml => not a section
        --config nested.yaml => plain values in the list
        --config refused.yaml => the script loads the model
    """,
    REWARD: """
        --center_rewards_coefficient -1 => at least 0
        --label_smoothing_factor 0.1 => --use_margin
        --packing => a flag of sft_training.py
        --train_sampling_strategy batch_rebalance => group_by_length
        --train_sampling_strategy longest => invalid choice
        --dataset_names uc => uc serves
        --lora_target_modules score => trained whole
        --use_margn => did you mean use_margin?
        --num_labels 2 => --help_all
        --disable_dropout maybe => invalid bool
    """,
    DPO: """
        --loss_type banana => --loss_type: invalid choice: 'banana'
        --loss_type sigmiod => did you mean sigmoid?
        --f_divergence_type kl => invalid choice
        --f_divergence_type forward_kl --loss_type nca_pair => fits --loss_type
        --loss_type exo_pair => needs --label_smoothing
        --label_smoothing 0.1 => needs --loss_type robust
        --label_smoothing 0.1 --loss_type hinge => needs --loss_type robust
        --label_smoothing 0.5 --loss_type robust => below 0.5
        --label_smoothing -1 --loss_type robust => at least 0
        --label_smoothing_factor 0.1 => --loss_type robust --label_smoothing 0.1
        --loss_weights 1 2 => 2 weights for 1 losses
        --beta 0 => above 0
        --beta -0.1 => above 0
        --ld_alpha 2 => at most 1
        --neftune_noise_alpha 5 => policy and reference
        --sync_ref_model => --no_use_peft
        --use_weighting --loss_type aot => sorts the pairs
        --padding_free => pads all the same
        --discopop_tau 0.1 => needs --loss_type discopop
        --lora_target_modules lm_head => TRL's DPO
        --pref_beta 0.1 => --beta
        --reference_free => frozen copy
        --precompute_ref_batch_size 4 => needs --precompute_ref_log_probs
    """,
    PPO: """
        --target_kl 6 => --adaptive_kl_target
        --kl_coef -1 => at least 0
        --cliprange -0.2 => above 0
        --cliprange_value 0 => above 0
        --gamma 2 => at most 1
        --lam -1 => at least 0
        --score_clip -5 => above 0
        --target_kl nan => finite
        --target_kl 0 => above 0
        --total_episodes -5 => at least 1
        --missing_eos_penalty -1 => at least 0
        --vf_coef -1 => at least 0
        --entropy_coef -1 => at least 0
        --temperature 0 => above 0
        --response_length 0 => at least 1
        --num_ppo_epochs 0 => at least 1
        --adaptive_kl_target 0 => above 0
        --adaptive_kl_horizon 10 => needs --adaptive_kl_target
        --kl_estimator k2 => invalid choice
        --stop_token eot => invalid choice
        --eval_strategy epoch => PPO counts updates
        --torch_compile => no two batches
        --auto_find_batch_size => lower --per_device_train_batch_size
        --train_sampling_strategy sequential => at random
        --reward_model_name_or_path '' => is missing
        --reward_model_name_or_path rewards.py:short => there is no such
        --reward_model_name_or_path ./nowhere => there is no such
        --init_kl_coef 0.1 => --kl_coef
        --ppo_epochs 4 => --num_ppo_epochs
        --world_size 2 => PPO computes it
        --total_episodes 8 --max_steps 2 => leave one out
        --max_length 512 => a flag of
        --target_kl 0.1 --fp16 true => --fp16 false
    """,
    MERGE: """
        --adapter_model_name a,b --weights 0,0 => all are 0
        --adapter_modle_name x => did you mean --adapter_model_name?
        --adapter_model_name ./nowhere => there is no such
        --base_model_name /no/such/base => there is no such
        --adapter_model_name a,b => give as many --weights
        --adapter_model_name a,b --weights 0.5 => give as many --weights
        --weights half => invalid
        --weights nan => give
        --dtype int8 => invalid choice
        --output_name model => choose another --output_name
        --output_name rows.jsonl => exists
        --output_name rows.jsonl/out => would lie, is a file
        --output_name model --overwrite => not written by this script
        stray => unrecognized arguments
    """,
    EVALUATE: """
        --model_name_or_path gpt2,model/none => --model_name_or_path model/none: there is no such
        --max_eval_samples 0 => give 1 or more
        --max_eval_samples -3 => give 1 or more
        --best_of 0 => give 1 or more
        --best_of 4 => --reward_model_name_or_path that picks
        --temperature -1 => give 0
        --temperature nan => give 0
        --seed -1 => give 0
        --response_length 0 => give 1
        --max_bad_percentage 200 => give 0
        --basline x => did you mean --baseline?
        --dataset_names ucc => did you mean uc?
        --dataset_names nowhere.jsonl => nowhere.jsonl
        --eval_dataset_names rows.jsonl => not both
        --model_name_or_path ./nowhere => there is no such
        --baseline ./nowhere => there is no such
        --output_dir rows.jsonl => is a file
        --output_dir model => holds a model
        --per_device_eval_batch_size many => invalid int value
    """,
    PREPARE: """
        --task dpo => invalid choice
        --dataset_names ucc => did you mean uc?
        --dataset_names '' => no dataset is named
        --dataset_names nowhere.jsonl => nowhere.jsonl
        --dataset_names uc --task preference => uc serves
        --preview -1 => give 0 or more
        --seed 1.5 => invalid int value
        --max_eval_samples 0 => give 1 or more
        --validation_split_percentage 200 => give 0
        --output_dir rows.jsonl => is a file
        --output_dir rows.jsonl/out => would lie, is a file
        --model_name_or_path ./nowhere => there is no such
        --max_lenght 5 => did you mean --max_length?
    """,
}
YAML = {
    "list.yaml": "- a\n",
    "broken.yaml": "seed: 1\nlora_r: [",
    "typo.yaml": "seed: 1\nlora_aplha: 5\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "null.yaml": "learning_rate:\n",
    "octal.yaml": "seed: 0o10\n",
    "sections.yaml": "General:\n  base_model: gpt2\n  tokenizer_name: x\n  epochs: 3\n",
    "model.yaml": "model:\n  lora_rank: 8\n",
    "section.yaml": "seed:\n  a: 1\n",
    "nested.yaml": "lora_target_modules: [[a], b]\n",
    "refused.yaml": "model_init_kwargs: {dtype: float32}\n",
}
CASES = [
    (script, *(part.strip() for part in line.rsplit("=>", 1)))
    for script, lines in MISUSES.items()
    for line in lines.strip().splitlines()
    if not line.strip().startswith("#")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good and bad files, in which each command is typed."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "rows.jsonl").write_text('{"prompt": "Who?", "chosen": "I.", "rejected": "No."}\n')
    (folder / "empty.jsonl").touch()
    (folder / "good.json").write_text("{}")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "latin.yaml").write_bytes("run_name: é\n".encode("latin1"))
    for name, text in YAML.items():
        (folder / name).write_text(text)
    return folder


def listing(folder: Path) -> list:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def typed(script: str, flags: str) -> list[str]:
    """A good command's words, without those that the spoiling flags say anew."""
    words, new = shlex.split(GOOD[script]), shlex.split(flags)
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for flag, value in pairs if flag not in new for word in (flag, value)] + new


@pytest.mark.parametrize(("script", "flags", "says"), CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_a_misuse_is_explained_and_nothing_is_written(script, flags, says, place, monkeypatch):
    monkeypatch.chdir(place)
    before, module = listing(place), importlib.import_module(script)
    with pytest.raises(UserError) as caught:
        if script in (MERGE, EVALUATE, PREPARE):
            module.main(module.make_parser().parse_args(typed(script, flags)))
        else:
            module.make_parser().read([*typed(script, flags)])
    lines = str(caught.value).splitlines()
    assert says in str(caught.value) and 1 <= len(lines) <= 3 and max(map(len, lines)) < 300, str(caught.value)
    assert listing(place) == before


def test_all_mistakes_are_said_at_once(place, monkeypatch):
    """A file of another system has a dozen strange keys."""
    monkeypatch.chdir(place)
    with pytest.raises(UserError) as caught:
        importlib.import_module(SFT).make_parser().read(
            [*typed(SFT, "--config typo.yaml sections.yaml --max_steps x")]
        )
    says = ("did you mean lora_alpha", "General: our files are flat", "--max_steps: ")
    assert all(text in str(caught.value) for text in says)


def test_there_are_enough_of_them():
    assert len(CASES) >= 150 and set(MISUSES) == set(GOOD)


@pytest.mark.parametrize("script", GOOD)
def test_the_good_command_is_good(script, place, monkeypatch):
    """Or each of the misuses above would be one for another reason."""
    monkeypatch.chdir(place)
    parser = importlib.import_module(script).make_parser()
    assert (
        parser.parse_args(shlex.split(GOOD[script]))
        if script in (MERGE, EVALUATE, PREPARE)
        else parser.read(shlex.split(GOOD[script]))
    )


@pytest.mark.parametrize("script", GOOD)
def test_a_mistake_and_the_help_come_before_torch(script, place):
    """In a process of its own, as typed: exit code 2, the message alone, and none of the libraries imported."""
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{script!r}, '--sparkle', '1']\n"
        f"try: runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))\n"
    )
    for argument, code_at_end in (("--sparkle", "2"), ("--help", "0")):
        process = subprocess.run(
            [sys.executable, "-c", code.replace("--sparkle", argument)], capture_output=True, text=True, cwd=place
        )
        assert process.stdout.splitlines()[-1] == f"{code_at_end} []", process.stdout + process.stderr
        assert re.fullmatch(r"error: .*\n", process.stderr) if code_at_end == "2" else not process.stderr


def test_under_several_processes_a_mistake_is_said_once_a_machine():
    ended = run_processes("sft_training", [{"sparkle": 1}, {"sparkle": 1}], seconds=100)
    assert [code for code, _ in ended] == [2, 2]
    assert ended[0][1].startswith("error: unknown flag sparkle") and not ended[1][1]
