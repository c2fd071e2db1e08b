"""Flags and keys of other systems: what to type here, or why there is nothing.

Of the five ancestors (docs/coming-from.md), older TRL and transformers, LLaMA-Factory, and what hands type.
"""

# What to type: {today's: other names of it}
TODAY = {
    # rows
    "--dataset_names": "dataset dataset_name hf_dataset_name datasets datasets_extra data",
    "--dataset_names path/to/file.jsonl": "train_file train_data data_path input_file_path",
    "--dataset_names name#1000": "max_train_samples max_samples size train_subset",
    "--dataset_names name:0.1": "fraction",
    "--dataset_names name@config": "dataset_config",
    "--dataset_names oasst1@en": "lang",
    "--dataset_names a:0.5,b#1000": "interleave_probs",
    "--dataset_num_proc": "preprocessing_num_workers",
    "--eval_dataset_names": "eval_dataset",
    "--eval_dataset_names path/to/file.jsonl": "validation_file valid_data valid_file",
    "--eval_dataset_names, or --validation_split_percentage": "dataset_test_split",
    "--validation_split_percentage (0.1 there is 10 here)": "test_split_size val_size val_split test_data_ratio",
    "--max_eval_samples": "eval_subset eval_size max_val_set",
    "--max_pairs_per_prompt": "max_comparison_per_sample",
    "--max_pairs_per_prompt (of 5 replies there are 10 pairs)": "max_replies",
    "--max_length": "max_seq_length max_seq_len seq_length block_size cutoff_len",
    "--max_prompt_length": "max_source_length",
    "--system_prompt": "default_system",
    "--completion_only_loss false": "train_on_prompt",
    "--packing": "group neat_packing",
    "--train_sampling_strategy group_by_length": "group_by_length sort_by_length",
    "--dry_run, or prepare_data.py --count": "show_dataset_stats",
    # models and adapters
    "--model_name_or_path": "model model_name model_path base_model sft_model sft_model_path model_pretrain",
    "--model_name_or_path (an adapter folder is continued)": "lora_model_name_or_path adapter_name_or_path",
    "merge_peft_adapter.py first: a new adapter is put on the result": "create_new_adapter",
    "merge_peft_adapter.py --output_name": "export_dir",
    "--lora_r, --lora_alpha, --lora_dropout and --lora_target_modules": "lora_config peft_config",
    "--lora_r": "lora_rank rank",
    "--lora_target_modules": "lora_target lora_target_module",
    "--lora_modules_to_save": "additional_target",
    "nothing: LoRA is on unless --no_use_peft": "peft_model",
    "nothing for lora, --no_use_peft for full": "finetuning_type",
    "nothing: the plain libraries are used": "use_unsloth",
    "--dtype": "torch_dtype",
    "--load_in_8bit": "load_8bit int8_training",
    "--load_in_4bit or --load_in_8bit": "quantization_bit",
    "--attn_implementation": "flash_attn",
    "--attn_implementation flash_attention_2": "use_flash_attention",
    # training
    "--num_train_epochs": "epochs num_epochs train_epochs",
    "--max_steps": "max_train_steps total_steps training_iteration",
    "--learning_rate": "lr",
    "--lr_scheduler_type": "lr_scheduler",
    "--warmup_steps 0.1 (below 1 it is a share of all steps)": "warmup_ratio",
    "--optim": "optimizer optimizer_type",
    "--optim adafactor": "adafactor",
    "--optim adamw_bnb_8bit (or --load_in_8bit for the weights)": "quantization",
    "--seed": "rng_seed",
    "--per_device_train_batch_size": "per_gpu_train_batch_size train_batch_size",
    "--per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size",
    "per_device_train_batch_size x gradient_accumulation_steps x processes": "batch_size num_rollouts",
    "that batch divided by --num_mini_batches": "mini_batch_size",
    "--gradient_accumulation_steps": "ppo_buffer_size",
    "--gradient_checkpointing": "enable_gradient_checkpointing",
    "--no_gradient_checkpointing": "disable_gradient_checkpointing",
    "--gradient_checkpointing_kwargs '{\"use_reentrant\": true}'": "gradient_checkpointing_use_reentrant",
    "--bf16 or --fp16": "mixed_precision precision",
    "--use_cpu": "no_cuda",
    "--use_liger_kernel": "enable_liger_kernel",
    "--torch_compile_backend": "torchdynamo",
    "--deepspeed": "deepspeed_config deepspeed_config_file",
    "--fsdp_config": "fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params",
    "--accelerator_config '{\"dispatch_batches\": true}'": "dispatch_batches",
    "--accelerator_config '{\"split_batches\": true}'": "split_batches",
    # what a run says and saves
    "--config": "config_file config_path configs",
    "--output_dir": "output output_path checkpoint_dir",
    "--save_steps": "save_freq",
    "--resume_from_checkpoint": "resume",
    "--eval_strategy": "evaluation_strategy",
    "--early_stopping_patience": "early_stopping_steps",
    "--include_num_input_tokens_seen": "include_tokens_per_second",
    "--run_name": "exp_name",
    "--report_to": "log_with",
    "--report_to wandb": "log_wandb",
    "--hub_model_id": "push_to_hub_model_id",
    "--hub_model_id owner/name": "push_to_hub_organization",
    "--hub_token": "push_to_hub_token",
    # rewards, DPO, PPO
    "--reward_model_name_or_path": "reward_model reward_model_path rm_name rm_pretrain rank_model",
    "--center_rewards_coefficient (another form: see RewardConfig)": "score_l2_reg",
    "--beta": "pref_beta dpo_beta",
    "--loss_type": "pref_loss",
    "--loss_type robust --label_smoothing": "dpo_label_smoothing",
    "--loss_type sigmoid sft --loss_weights 1 0.2 (the second is rpo_alpha)": "rpo_alpha",
    "--loss_type sigmoid sft --loss_weights 1 0.2 (the second is pref_ftx)": "pref_ftx",
    "--kl_coef": "kl_beta kl_coeff init_kl_coef",
    "--kl_estimator k1 or k3": "kl_penalty",
    "--adaptive_kl_target": "target ppo_target",
    "--adaptive_kl_target 6 (its presence says so)": "adap_kl_ctrl",
    "--adaptive_kl_horizon": "horizon",
    "--num_ppo_epochs": "ppo_epochs",
    "--total_episodes": "steps",
    "--local_rollout_forward_batch_size": "forward_batch_size experience_batch_size chunk_size",
    "--response_length": "max_new_tokens max_completion_length output_max_length max_generation_length",
    "--score_clip": "cliprange_reward",
    "--use_score_norm": "use_score_scaling ppo_score_norm",
    "--whiten_rewards": "ppo_whiten_rewards",
    "--max_eval_prompts": "num_eval_prompts",
}
RENAMED = {name: today for today, names in TODAY.items() for name in names.split()}

# Why there is none: {reason: names}
NONE = {
    "the tokenizer of --model_name_or_path is used": "tokenizer tokenizer_name use_fast_tokenizer resize_vocab"
    " add_special_tokens per_digit_tokens end_of_conversation_token",
    "the tokenizer's own chat template is used": "template system_prefix use_system_prefix use_system_tag"
    " tool_format system_property_dropout system_add_length enable_thinking",
    "each stage is a script of its own, and says what it does": "stage task_type is_reward_model mode train_phase",
    "weights are always saved as safetensors": "save_safetensors",
    "--report_to tensorboard decides where it writes": "logging_dir log_dir",
    "HF_HOME and HF_TOKEN in the environment say it": "cache_dir use_auth_token token env",
    "WANDB_PROJECT and WANDB_ENTITY in the environment say it": "project_name wandb_project wandb_entity",
    "the loss is the stage's own": "loss_fn poly_eps",
    "curves are always drawn: learning_curves.png": "plot_loss",
    "prepared rows are cached, and made anew when they change": "overwrite_cache tokenized_path dataset_dir",
    "accelerate launch says it: --num_processes, --mixed_precision, --config_file": "device num_training_workers"
    " resources_per_worker accelerate_mode half_precision_backend fp16_backend fp16_opt_level use_ipex use_mps_device"
    " xpu_backend tpu_num_cores tpu_metrics_debug ray_scope ray_num_workers master_port devices num_processes gpus"
    " accelerate_config",
    "PPO computes it of its other flags": "local_batch_size micro_batch_size local_mini_batch_size num_total_batches"
    " world_size backward_batch_size",
    "the reference is a frozen copy of the starting point": "ref_model ref_model_name_or_path force_use_ref_model"
    " ref_model_init_kwargs reference_free ref_model_adapters",
    "prompts are shortened, answers never": "truncation truncation_side max_target_length label_pad_token_id"
    " padding_value padding padding_side",
    "the loss lies on the assistant's turns (see --completion_only_loss)": "mask_input mask_response label_masking"
    " mask_history",
    "rows are shuffled, by --seed": "shuffle samples_mixing use_custom_sampler mix_strategy dataset_batch_size"
    " num_of_sequences chars_per_token streaming dataset_streaming dataset_train_split shuffle_buffer_size",
    "it does not exist here (all layers or a LoRA are trained)": "freeze_layer freeze_layers freeze_trainable_layers"
    " freeze_trainable_modules residual_dropout residual_dropout_lima pooling superhot superhot_config rope_scaling"
    " use_badam use_galore pissa_init loraplus_lr_ratio shift_attn simpo_gamma use_llama_pro",
    "transformers has dropped it": "past_index jit_mode_eval mp_parameters include_inputs_for_metrics"
    " ignore_bias_buffers",
    "answers of held-out prompts: evaluate_model.py": "predict_with_generate generate_during_eval do_sample num_beams",
    "answers are drawn by PPO alone, from the whole distribution, as its ratio of probabilities needs": "top_p top_k",
    "a trained value head is continued by itself": "reward_model_type value_model_path",
    "accuracies are always computed": "compute_accuracy metrics",
}
NO_SUCH = {name: reason for reason, names in NONE.items() for name in names.split()}
