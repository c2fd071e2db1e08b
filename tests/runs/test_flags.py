"""One table of flags: each has one class, and does what its class says: `pytest tests/runs/test_flags.py`."""

import importlib
import json
import re

import pytest
import torch
from transformers import Trainer

from rlhf.data.names import Name, parse_names
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.ppo.config import trainer_arguments
from rlhf.runs import description, flags, trainers
from rlhf.runs.arguments import ModelArguments
from rlhf.runs.checks import refused
from rlhf.runs.renamed import NO_SUCH, RENAMED, TODAY
from rlhf.user_error import UserError, nearest
from tests.conftest import run_script
from tests.runs.test_command_line import STAGES, parse

REQUIRED = ["--model_name_or_path=m", "--output_dir=o"]
FLAGS = {script: description.read(script)[0] for script in STAGES}
ALL_FLAGS = {name: flag for known in FLAGS.values() for name, flag in known.items()}

# Flags that have been read, and bear on what is trained or on how it is measured.
WORKS = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    attn_implementation auto_find_batch_size average_tokens_across_devices beta bf16
    bnb_4bit_quant_storage bnb_4bit_quant_type center_rewards_coefficient completion_only_loss data_seed
    dataloader_drop_last ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout deepspeed disable_dropout discopop_tau dtype eval_delay eval_on_start eval_packing
    eval_steps eval_strategy f_alpha_divergence_coef f_divergence_type fp16 fsdp fsdp_config
    full_determinism gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    greater_is_better label_smoothing label_smoothing_factor ld_alpha learning_rate
    liger_kernel_config load_best_model_at_end load_in_4bit load_in_8bit lora_alpha lora_dropout
    lora_modules_to_save lora_r lora_target_modules lora_target_parameters loss_type loss_weights
    lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length max_steps metric_for_best_model
    model_name_or_path model_revision neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules
    output_dir packing packing_strategy pad_to_multiple_of padding_free per_device_eval_batch_size
    per_device_train_batch_size precompute_ref_batch_size precompute_ref_log_probs ref_model_mixup_alpha
    ref_model_sync_steps restore_callback_states_from_checkpoint resume_from_checkpoint router_aux_loss_coef seed
    sync_ref_model tf32 torch_compile torch_compile_backend torch_compile_mode train_sampling_strategy
    use_bnb_nested_quant use_cpu use_dora use_liger_kernel use_peft use_rslora use_weighting warmup_steps
    weight_decay
""".split()


def good(script):
    return REQUIRED + (["--reward_model_name_or_path=r"] if script == "ppo_training" else [])


def test_flags_json_says_what_the_installed_libraries_say():
    """Stale after a change of our flags or a bump of the libraries: `make flags` writes it anew."""
    assert description.text(list(STAGES)) == description.PATH.read_text()


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_has_one_class(script):
    """A flag that a new version of a library brings is in none until somebody has read what it does here."""
    for name, flag in FLAGS[script].items():
        classes = [name in WORKS, name in flags.LOOKS, refused(script, name) is not None, bool(flag.get("ours"))]
        known = classes[0] or classes[1] or classes[2] or classes[3]
        assert known and sum(classes[:2]) <= 1, (
            f"{name}: read what it does, and put it in a class of flags.py or WORKS"
        )
        if flag.get("kind") in ("int", "float") and refused(script, name) is None:
            assert name in flags.RANGE_OF or name == "loss_weights", f"{name} has no range"


def test_the_tables_name_no_flag_that_is_not_there():
    tables = [*WORKS, *flags.LOOKS, *flags.REFUSED, *flags.RANGE_OF, *flags.NEEDS, *flags.COMMON]
    tables += [other for other, _ in flags.NEEDS.values()] + [name for name, *_ in flags.PACKAGES]
    assert not set(tables) - set(ALL_FLAGS)


def test_what_others_call_a_flag_is_named_as_it_is_here():
    tools = {"config", "output_name", "no_use_peft", "no_gradient_checkpointing"}
    for name, text in RENAMED.items():
        assert name not in ALL_FLAGS or ALL_FLAGS[name].get("aliases"), f"{name} is a flag of ours"
        assert not set(re.findall(r"--(\w+)", text)) - set(ALL_FLAGS) - tools - {"count"}, f"{name}: {text}"
    assert not set(NO_SUCH) & (set(ALL_FLAGS) | set(RENAMED))
    assert len(RENAMED) == len(" ".join(TODAY.values()).split()), "a name stands twice"
    for name in ("test_split_size", "val_size", "val_split", "test_data_ratio"):  # shares, where ours is in percent
        assert "0.1 there is 10 here" in RENAMED[name]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("laerning_rate", "learning_rate"),
        ("bta", "beta"),
        ("lora_aplha", "lora_alpha"),
        ("rpo_alpha", None),
        ("per_device_batch_size", None),
        ("temp", None),
        ("x", None),
    ],
)
def test_only_a_likely_typo_is_guessed(typed, meant):
    assert nearest(typed, ALL_FLAGS) == meant


OTHER = {"bool": "true", "int": "3", "float": "0.25", "json": '{"a": 1}', "str": "x"}


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script in STAGES for name in FLAGS[script] if refused(script, name)]
)
def test_what_does_not_apply_is_refused_with_its_reason(script, name):
    flag = FLAGS[script][name]
    value = next(
        (choice for choice in flags.CHOICES.get(name, flag.get("choices", ())) if choice != flag.get("default")), None
    )
    value = value or OTHER[flag.get("kind", "str")]
    if flag.get("kind") == "bool" and (flag.get("default") is True or name in flags.HARMLESS):
        value = "false"
    with pytest.raises(UserError, match=re.escape(f"--{name}: {refused(script, name)}")):
        importlib.import_module(script).make_parser().read([*good(script), f"--{name}", value])


@pytest.mark.parametrize("script", STAGES)
def test_plain_numbers_reach_the_trainers_arguments(script):
    """Each number of the libraries that needs no other flag, all at once; transformers' trainer reads them there."""
    plain = {
        name: {"int": 3, "float": 0.25}[flag["kind"]]
        for name, flag in FLAGS[script].items()
        if flag.get("kind") in ("int", "float") and not flag.get("list") and refused(script, name) is None
        if name not in flags.NEEDS and name not in ("router_aux_loss_coef", "early_stopping_patience")
        if name not in ("max_steps" if script == "ppo_training" else "", "num_mini_batches")
    }
    words = [word for name, value in plain.items() for word in (f"--{name}", str(value))]
    parsed = {}
    for arguments in parse(*good(script), *words, script=script):
        parsed |= vars(arguments)
    assert {name: parsed[name] for name in plain} == plain and len(plain) > 20
    options = Trainer.get_optimizer_cls_and_kwargs(parse(*good(script), *words, script=script)[1])[1]
    assert options["betas"] == (0.25, 0.25) and options["eps"] == 0.25 and options["lr"] == 0.25


# YAML is as typed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),
        ("seed: 010", "seed", 10),
        ("no_use_peft: true", "use_peft", False),
        ("no_use_peft: false", "use_peft", True),
        ("use_peft: no", "use_peft", False),
        ("bf16: off", "bf16", False),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("max_eval_samples: null", "max_eval_samples", None),
        ("max_length: ~", "max_length", None),
        ("report_to: [none]", "report_to", []),
        ("dataset_names: [demo:0.5, 'uc#10']", "dataset_names", "demo:0.5,uc#10"),
        ("dataset_names:\n- demo\n- uc", "dataset_names", "demo,uc"),
        ("lora_target_modules: [c_attn, c_proj]", "lora_target_modules", ["c_attn", "c_proj"]),
        ("lora_target_modules: c_attn,c_proj", "lora_target_modules", ["c_attn", "c_proj"]),
        ("lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 1e-1}", "lr_scheduler_kwargs", {"num_cycles": 0.1}),  # noqa: E501
        ("run_name: 1:30", "run_name", "1:30"),
        ("learning-rate: 1e-4", "learning_rate", 1e-4),
        ("do_train: true", "do_train", True),
    ],
)  # fmt: skip
def test_yaml_is_as_typed(tmp_path, text, name, value):
    (tmp_path / "run.yaml").write_text(text + "\n")
    parsed = parse(*REQUIRED, "--config", str(tmp_path / "run.yaml"))
    found = next(vars(arguments)[name] for arguments in parsed if name in vars(arguments))
    assert found == value and isinstance(found, type(value))


def test_a_files_setting_rests_where_what_it_needs_is_switched_off(tmp_path):
    (tmp_path / "run.yaml").write_text("eval_strategy: steps\neval_steps: 50\nlora_r: 8\n")
    config = ("--config", str(tmp_path / "run.yaml"))
    assert parse(*REQUIRED, *config, "--eval_strategy", "no", "--eval_on_start", "false")[1].eval_steps == 50
    assert not parse(*REQUIRED, *config, "--no_use_peft")[2].use_peft


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{0}/a,b.jsonl,uc:0.1", [("{0}/a,b.jsonl",), ("uc", "", 0.1)]),
        ("{0}/me@home.jsonl#7", [("{0}/me@home.jsonl", "", None, 7)]),
        ("{0}/10:30.jsonl:0.5", [("{0}/10:30.jsonl", "", 0.5)]),
        ("hh@helpful-base,{0}/no#1.jsonl", [("hh", "helpful-base"), ("{0}/no#1.jsonl",)]),
        ("uc,{0}/missing,file.jsonl", [("uc",), ("{0}/missing",), ("file.jsonl",)]),
    ],
)
def test_a_files_name_may_hold_the_grammars_marks(tmp_path, text, names):
    for name in ("a,b.jsonl", "me@home.jsonl", "10:30.jsonl", "no#1.jsonl"):
        (tmp_path / name).touch()
    wanted = [Name(first.format(tmp_path), *rest) for first, *rest in names]
    assert parse_names(text.format(tmp_path)) == wanted


# What was ignored once, and is honoured --------------------------------------------------------------------------


def test_all_tokens_are_learned_without_completion_only_loss(base, data, tmp_path, monkeypatch):
    shares, compute_loss = {}, trainers.CheckedSFTTrainer.compute_loss

    def measured(self, model, inputs, *args, **kwargs):
        learned = (inputs["labels"] != -100).sum() / inputs["attention_mask"].sum()
        shares[self.args.completion_only_loss] = learned.item()
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainers.CheckedSFTTrainer, "compute_loss", measured)
    quick = {"model_name_or_path": base, "dataset_names": data, "eval_strategy": "no"}
    for value in (True, False):
        run_script("sft_training", completion_only_loss=value, output_dir=tmp_path / str(value), **quick)
    assert shares[False] == 1.0 and shares[True] < 0.9


@pytest.mark.parametrize("script", ["reward_modeling", "dpo_training"])
def test_pairs_are_grouped_by_their_length(script, base, data, tmp_path, monkeypatch):
    made = []

    class Recorded(trainers.GroupedByLength):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(trainers, "GroupedByLength", Recorded)
    quick = {"model_name_or_path": base, "dataset_names": data, "eval_strategy": "no", "max_steps": 1}
    run_script(script, train_sampling_strategy="group_by_length", output_dir=tmp_path / "out", **quick)
    lengths = made[0].lengths
    assert len(set(lengths)) > 1 and min(lengths) > 10
    made[0].set_epoch(0)
    order = list(made[0])
    torch.rand(1)  # as dropout draws, on each process as often as its rows are long
    assert list(made[0]) == order, "processes would part ways"
    made[0].set_epoch(1)
    assert list(made[0]) != order
    batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, len(order), 4)]
    spread = sum(max(batch) - min(batch) for batch in batches)
    in_rows = sum(max(lengths[at : at + 4]) - min(lengths[at : at + 4]) for at in range(0, len(lengths), 4))
    assert spread < in_rows


def test_a_margin_is_asked_for_with_use_margin_alone(base, tmp_path):
    rows = [{"prompt": f"Who {i}?", "chosen": "I do.", "rejected": "No.", "margin": 3.0} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for value in (True, False):
        quick = {"dataset_names": tmp_path / "rows.jsonl", "eval_strategy": "no", "max_steps": 1, "use_margin": value}
        folder = run_script("reward_modeling", model_name_or_path=base, output_dir=tmp_path / str(value), **quick)
        losses[value] = json.loads((folder / "training_log.jsonl").read_text().splitlines()[0])["loss"]
    assert losses[True] > losses[False] + 1


def test_total_episodes_count_the_answers_of_a_run():
    words = [*good("ppo_training"), "--per_device_train_batch_size", "4", "--total_episodes", "9"]
    assert trainer_arguments(parse(*words, script="ppo_training")[1], 100)[1].updates == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lora_target_modules": ["c_attn", "nosuch"]}, "--lora_target_modules nosuch: the model has no such one\n"),
        ({"lora_target_modules": ["ln_1"]}, "it has c_attn, c_fc, c_proj"),
        ({"lora_modules_to_save": ["nosuch"]}, "--lora_modules_to_save nosuch"),
        ({"lora_target_parameters": ["nosuch"], "lora_dropout": 0.0}, "--lora_target_parameters nosuch"),
        ({"lora_target_parameters": ["c_attn.weight"], "lora_dropout": 0.0}, "--lora_target_parameters c_attn.weight"),
    ],
)
def test_each_layer_that_a_flag_names_is_in_the_model(base, given, says):
    with pytest.raises(UserError, match=re.escape(says)):
        load_policy(ModelArguments(model_name_or_path=base, **given), load_tokenizer(base), 0)


def test_layers_that_are_there_get_a_lora(base):
    named = ModelArguments(model_name_or_path=base, lora_target_modules=["attn.c_attn"], lora_modules_to_save=["wte"])
    assert load_policy(named, load_tokenizer(base), 0)[1].target_modules == {"attn.c_attn"}


@pytest.mark.parametrize(
    "given",
    [{"lora_r": 4}, {"lora_target_modules": ["c_attn"]}, {"lora_modules_to_save": ["wte"]}, {"use_dora": True}],
)
def test_a_continued_adapter_refuses_flags_that_disagree_with_it(saved, given):
    arguments = ModelArguments(model_name_or_path=saved["sft"], **given)
    with pytest.raises(UserError, match=f"--{list(given)[0]} .*: the adapter .* has"):
        load_policy(arguments, load_tokenizer(saved["sft"]), 0)


def test_a_continued_adapter_takes_flags_that_agree_with_it(saved):
    same = ModelArguments(model_name_or_path=saved["sft"], lora_r=16, lora_target_modules=["c_attn", "c_proj", "c_fc"])
    assert load_policy(same, load_tokenizer(saved["sft"]), 0)[1] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--fp16 true", "--fp16: there is no GPU"),
        ("--optim_args momentum=0.9", "does not use them"),
        ("--optim sgd --optim_args banana", "--optim sgd --optim_args banana"),
        ('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":"x"}', "--lr_scheduler_type polynomial"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do some of it")
def test_what_this_machine_or_the_optimizer_cannot_do_is_refused_before_a_model(words, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(*REQUIRED, *words.split())


@pytest.mark.parametrize("script", STAGES)
def test_the_help_is_80_columns_wide_and_names_ours_first(script, capsys):
    texts = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            importlib.import_module(script).make_parser().read([flag])
        texts[flag] = capsys.readouterr().out
    assert max(map(len, "".join(texts.values()).splitlines())) <= 80
    assert texts["--help"].index("--dataset_names") < texts["--help"].index("--learning_rate")
    assert "--adam_beta1" not in texts["--help"]
    assert all(f"--{name}" in texts["--help_all"] for name in FLAGS[script])
