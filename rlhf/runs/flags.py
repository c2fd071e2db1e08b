"""One table of flags: what each does here, which values it takes, what others call it.

A flag of the libraries that nobody has read is an error of tests/runs/test_flags.py: a new version's is read first.
"""

SFT, REWARD, DPO, PPO = "sft_training", "reward_modeling", "dpo_training", "ppo_training"
ALL = (SFT, REWARD, DPO, PPO)

# Flags about logging, saving, the hub, memory and processes: the same is learned without them.
LOOKS = """
    activation_offloading dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc debug
    disable_tqdm ds3_gather_for_generation hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy project push_to_hub report_to run_name
    save_only_model save_steps save_strategy save_total_limit skip_memory_metrics torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id use_cache
""".split()

_KEEPS = "a model keeps its tokenizer; change the tokenizer's own files instead"
_LOSS = "evaluation keeps losses and metrics here, no predictions; leave it out"
_ROWS = "rows are read and tokenised before the trainer sees them; leave it out"
_LOADS = "the script loads the model: see --dtype, --attn_implementation and --model_revision"
_DOES = "this script trains, and evaluates unless --eval_strategy no; evaluate_model.py evaluates alone"
_PRECISION = "held-out rows are read in the precision of training: see --bf16; leave it out"
_NO_LABELS = "pairs have no labels to smooth"
_UNFIT = "does not fit PPO: "
_SHAPES = f"{_UNFIT}no two batches have the same shape; leave it out"

# Flags that would do nothing here, or harm: refused with a value that is not their default, with the reason.
REFUSED = {
    "bf16_full_eval": {ALL: _PRECISION},
    "fp16_full_eval": {ALL: _PRECISION},
    "ignore_data_skip": {ALL: "a run that goes on would see other rows; leave it out"},
    "chat_template_path": {ALL: _KEEPS},
    "eos_token": {ALL: _KEEPS},
    "pad_token": {ALL: _KEEPS},
    "assistant_only_loss": {ALL: "the loss lies on the assistant's turns of the completion already; leave it out"},
    "auto_find_batch_size": {(PPO,): f"{_UNFIT}lower --per_device_train_batch_size instead"},
    "batch_eval_metrics": {ALL: _LOSS},
    "dataset_kwargs": {ALL: _ROWS},
    "dataset_text_field": {ALL: f"a file's columns are found by their names (docs/data.md); {_ROWS}"},
    "disable_dropout": {(DPO,): "with dropout policy and reference would differ from the start; leave it out"},
    "do_eval": {ALL: _DOES},
    "do_predict": {ALL: _DOES},
    "do_train": {ALL: f"{_DOES}; --dry_run stops before training"},
    "enable_jit_checkpoint": {ALL: "a killed run goes on from its last checkpoint, see --save_steps"},
    "eval_accumulation_steps": {ALL: _LOSS},
    "eval_do_concat_batches": {ALL: _LOSS},
    "eval_use_gather_object": {ALL: _LOSS},
    "include_for_metrics": {ALL: _LOSS},
    "label_names": {ALL: _ROWS},
    "label_smoothing_factor": {
        (REWARD,): f"{_NO_LABELS}; --use_margin and --center_rewards_coefficient are what rewards have",
        (DPO,): f"{_NO_LABELS}; --loss_type robust --label_smoothing 0.1 says that a tenth of the pairs are wrong",
        (PPO,): f"{_UNFIT}there are no labels",
    },
    "length_column_name": {ALL: "lengths are counted from the tokens; leave it out"},
    "local_rank": {ALL: "torchrun and accelerate launch tell it by the environment; leave it out"},
    "logging_first_step": {(PPO,): f"{_UNFIT}see --logging_steps, which counts updates"},
    "lora_task_type": {ALL: "each script knows its own; leave it out"},
    "model_init_kwargs": {ALL: _LOADS},
    "neftune_noise_alpha": {
        (DPO,): "its noise would make policy and reference differ from the start; leave it out",
        (PPO,): f"{_UNFIT}noise would make the policy differ from the one that answered; leave it out",
    },
    "padding_free": {(DPO,): "TRL's DPO pads all the same; leave it out"},
    "parallelism_config": {ALL: "accelerate's own file says it: accelerate launch --config_file"},
    "prediction_loss_only": {ALL: _LOSS},
    "remove_unused_columns": {ALL: "the rows have no unused columns; leave it out"},
    "save_on_each_node": {ALL: "the processes of a run share one --output_dir; leave it out"},
    "shuffle_dataset": {ALL: "rows are mixed and shuffled already, by --seed; leave it out"},
    "torch_compile": {(PPO,): _SHAPES},
    "torch_compile_backend": {(PPO,): _SHAPES},
    "torch_compile_mode": {(PPO,): _SHAPES},
    "train_sampling_strategy": {(PPO,): "each update draws its prompts at random; leave it out"},
    "truncation_mode": {ALL: "the prompt's oldest turns go first, never the answer: see --max_prompt_length"},
    "trust_remote_code": {ALL: "code of a model's folder is never run here; give a model that transformers knows"},
}
HARMLESS = {"do_train": True, "do_eval": True}  # what is so anyway, though it is not the default

# Numbers: the ends of what each flag takes, [ and ] included. A number in no line may be any finite one.
RANGES = {
    "(0, inf)": "adam_epsilon adaptive_kl_horizon adaptive_kl_target beta cliprange cliprange_value discopop_tau"
    " learning_rate logging_steps eval_steps save_steps lora_alpha num_train_epochs score_clip target_kl temperature"
    " value_learning_rate",
    "[0, inf)": "center_rewards_coefficient dataloader_num_workers early_stopping_patience entropy_coef eval_delay"
    " generate_eval_samples kl_coef missing_eos_penalty neftune_noise_alpha num_sample_generations"
    " max_grad_norm router_aux_loss_coef stop_token_id value_warmup_updates vf_coef warmup_steps weight_decay",
    "[1, inf)": "dataloader_prefetch_factor dataset_num_proc ddp_bucket_cap_mb ddp_timeout eval_accumulation_steps"
    " max_pairs_per_prompt max_steps"
    " generate_eval_length gradient_accumulation_steps local_rollout_forward_batch_size lora_r max_eval_prompts"
    " max_eval_samples max_prompt_length num_mini_batches num_ppo_epochs per_device_eval_batch_size"
    " per_device_train_batch_size precompute_ref_batch_size ref_model_sync_steps response_length save_total_limit"
    " torch_empty_cache_steps total_episodes",
    "[2, inf)": "max_length",
    "[0, 1)": "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout",
    "[0, 0.5)": "label_smoothing",
    "[0, 1]": "gamma lam ld_alpha ref_model_mixup_alpha f_alpha_divergence_coef",
    "[0, 100]": "max_bad_percentage",
    "[0, 100)": "validation_split_percentage",
    "[0, 4294967295]": "seed data_seed",  # what numpy takes
}
RANGE_OF = {name: ends for ends, names in RANGES.items() for name in names.split()}
SHARES = ("eval_steps", "logging_steps", "save_steps", "warmup_steps")  # below 1 a share of all steps, else whole

CHOICES = {  # where the libraries' parsers know none
    "debug": ["underflow_overflow", "tpu_metrics_debug"],
    "f_divergence_type": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    "torch_compile_mode": ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    "report_to": "none all azure_ml clearml codecarbon comet_ml dagshub dvclive flyte mlflow neptune swanlab"
    " tensorboard trackio wandb".split(),
    "loss_type": "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down"
    " discopop sft sigmoid_norm".split(),  # DPO's
}
CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "every_n_layers"}
CHECKPOINTING |= {"selective"}  # the keys of --gradient_checkpointing_kwargs: torch's, transformers' and TRL's
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")

# Flags that do something only beside another: (the other, its values; () for any that is on).
NEEDS = {
    "adaptive_kl_horizon": ("adaptive_kl_target", ()),
    "bnb_4bit_quant_storage": ("load_in_4bit", ()),
    "bnb_4bit_quant_type": ("load_in_4bit", ()),
    "use_bnb_nested_quant": ("load_in_4bit", ()),
    "dataloader_persistent_workers": ("dataloader_num_workers", ()),
    "dataloader_prefetch_factor": ("dataloader_num_workers", ()),
    "discopop_tau": ("loss_type", ("discopop",)),
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
    "label_smoothing": ("loss_type", SMOOTHED),
    "label_smoothing_factor": ("loss_type", ("nll",)),
    "eval_packing": ("packing", ()),
    "packing_strategy": ("packing", ()),
    "generate_eval_length": ("generate_eval_samples", ()),
    "liger_kernel_config": ("use_liger_kernel", ()),
    "precompute_ref_batch_size": ("precompute_ref_log_probs", ()),
    "ref_model_mixup_alpha": ("sync_ref_model", ()),
    "ref_model_sync_steps": ("sync_ref_model", ()),
    "eval_steps": ("eval_strategy", ("steps",)),
    "save_steps": ("save_strategy", ("steps",)),
    "logging_steps": ("logging_strategy", ("steps",)),
    "fsdp_config": ("fsdp", ()),
    **dict.fromkeys(
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora"
        " use_dora".split(),
        ("use_peft", ()),
    ),
}

# The packages behind values of flags: (flag, how its value begins or a whole value, package, what to install).
PACKAGES = [
    ("optim", r"galore_", "galore_torch", "galore-torch"),
    ("optim", r"(ada)?lomo$", "lomo_optim", "lomo-optim"),
    ("optim", r"grokadamw", "grokadamw", "grokadamw"),
    ("optim", r"schedule_free", "schedulefree", "schedulefree"),
    ("optim", r"apollo", "apollo_torch", "apollo-torch"),
    ("optim", r"stable_adamw", "optimi", "torch-optimi"),
    ("optim", r"adamw_torch_[48]bit", "torchao", "torchao"),
    ("optim", r"adamw_torch_xla", "torch_xla", "torch_xla"),
    ("optim", r"adamw_torch_npu", "torch_npu", "torch_npu"),
    ("optim", r"adamw_anyprecision", "torchdistx", "torchdistx"),
    ("optim", r"(paged_|lion_|ademamix|rmsprop_bnb|adamw_(bnb_)?8bit)", "bitsandbytes", "bitsandbytes"),
    ("load_in_4bit", r"True", "bitsandbytes", "bitsandbytes"),
    ("load_in_8bit", r"True", "bitsandbytes", "bitsandbytes"),
    ("use_liger_kernel", r"True", "liger_kernel", "liger-kernel"),
    ("attn_implementation", r"flash_attention_2", "flash_attn", "flash-attn"),
    ("attn_implementation", r"flash_attention_3", "flash_attn_interface", "flash-attn-3"),
    ("attn_implementation", r".*/", "kernels", "kernels"),
    ("deepspeed", r".", "deepspeed", "deepspeed"),
    *(("report_to", f"{name}$", name, name) for name in
      "clearml codecarbon dagshub dvclive mlflow neptune swanlab tensorboard trackio wandb".split()),
    ("report_to", r"comet_ml$", "comet_ml", "comet-ml"),
    ("report_to", r"azure_ml$", "azureml", "azureml-mlflow"),
    ("report_to", r"flyte$", "flytekit", "flytekit"),
]  # fmt: skip
FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # JSON, or a file of it

# What --help shows of the libraries' flags; --help_all shows all.
COMMON = """model_name_or_path output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size
    gradient_accumulation_steps per_device_eval_batch_size max_length lr_scheduler_type warmup_steps weight_decay
    optim beta loss_type lora_r lora_alpha lora_dropout lora_target_modules load_in_4bit attn_implementation dtype
    bf16 gradient_checkpointing seed eval_strategy eval_steps logging_steps save_steps save_total_limit
    load_best_model_at_end metric_for_best_model resume_from_checkpoint report_to push_to_hub""".split()
COMMAS = ("dataset_names", "eval_dataset_names", "ignore_columns")  # a YAML list of them is joined
REQUIRED = {
    "model_name_or_path": "give a hub id, a model folder or an adapter folder",
    "output_dir": "name the folder of this run, such as --output_dir saved/first",
    "reward_model_name_or_path": "give the folder that reward_modeling.py wrote",
}
