import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from deadpan.config.keys import keys
from deadpan.config.ledger import Translation
from deadpan.config.loader import load_recipe
from deadpan.config.schema import Optimizer
from deadpan.config.xtuner import OPTIMIZERS, LoraFacts, import_config, lora_facts
from deadpan.errors import DeadpanError
from xtuner import CONFIG

OFFERED = get_args(Optimizer.model_fields["name"].annotation)


def translate(
    folder: Path, *changes: tuple[str, str], overrides: tuple[str, ...] = ()
) -> Translation:
    text = CONFIG
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "config.py"
    path.write_text(text)
    return import_config(path, overrides)


def refused(folder: Path, *changes: tuple[str, str]) -> DeadpanError:
    with pytest.raises(DeadpanError) as raised:
        translate(folder, *changes)
    return raised.value


def left(translation: Translation, path: str) -> list[str]:
    return [leftover.reason for leftover in translation.leftovers if leftover.path == path]


def said(translation: Translation) -> dict[str, object]:
    return {s.key: s.value for s in [*translation.settings, *translation.same]}


def test_the_recipe_says_what_differs_and_the_comments_say_the_rest(tmp_path: Path) -> None:
    translation = translate(tmp_path)
    values = yaml.safe_load(translation.text())
    values.pop("schedule", None)  # where the default is auto, what auto would choose is written out
    assert values == {
        "model": "OpenGVLab/InternVL2-2B",
        "quantization": "nf4",
        "lora": {"r": 64},
        "max_length": 4096,
        "data": {"train": "./data/ex_cn.json", "images": "./data/images", "workers": 4},
        "optimizer": {"lr": 2e-5},
        "epochs": 6,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "save_every_steps": 250,
        "keep_checkpoints": 1,
    }
    line = 1 + CONFIG[: CONFIG.index("lr = 2e-5")].count("\n")
    assert f"  lr: 2.0e-05  # line {line}: optim_wrapper.optimizer.lr\n" in translation.text()
    for report in translation.report():
        assert f"# {report}\n" in translation.text()
    (tmp_path / "recipe.yaml").write_text(translation.text(), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.schedule.name, recipe.schedule.warmup_ratio) == ("cosine", 0.03)
    assert recipe.train_projector


def test_what_has_another_meaning_is_reported(tmp_path: Path) -> None:
    translation = translate(tmp_path)
    targets = left(translation, "model.llm_lora.target_modules")
    assert any("output head got a LoRA" in reason for reason in targets)
    assert any("fused wqkv" in reason for reason in targets)
    paths = [leftover.path for leftover in translation.leftovers]
    assert [path for path in paths if path != "val_dataloader"] == [
        "model.quantization_llm",
        "model.llm_lora.target_modules",
        "model.llm_lora.target_modules",
        "train_dataloader.dataset.max_length",
        "train_dataloader.dataset.template",
        "train_dataloader.sampler.type",
        "optim_wrapper.accumulative_counts",
        "optim_wrapper.dtype",
        "default_hooks.checkpoint.save_optimizer",
    ]


def test_held_out_records_are_reported_if_deadpan_holds_some_out(tmp_path: Path) -> None:
    entry = keys().get("data.validation")
    holds_out = entry is not None and entry.default is not None
    assert bool(left(translate(tmp_path), "val_dataloader")) == holds_out


def test_every_value_of_the_config_is_accounted_for(tmp_path: Path) -> None:
    """Whatever is added anywhere turns up in the report."""
    places = [
        ("freeze_llm=True", "model.odd"),
        ("task_type='CAUSAL_LM'", "model.llm_lora.odd"),
        ("template=prompt_template", "train_dataloader.dataset.odd"),
        ("num_workers=dataloader_num_workers", "train_dataloader.odd"),
        ("length_property='modality_length'", "train_dataloader.sampler.odd"),
        ("weight_decay=weight_decay", "optim_wrapper.optimizer.odd"),
        ("max_norm=max_norm", "optim_wrapper.clip_grad.odd"),
        ("loss_scale='dynamic'", "optim_wrapper.odd"),
        ("max_epochs=max_epochs", "train_cfg.odd"),
        ("save_optimizer=False", "default_hooks.checkpoint.odd"),
        ("deterministic=False", "randomness.odd"),
    ]
    for after, path in places:
        translation = translate(tmp_path, (after, f"{after}, odd=7"))
        assert left(translation, path) == ["deadpan has nothing like it"], path
    translation = translate(tmp_path, ("visualizer = None", "visualizer = None\nodd = 7"))
    assert left(translation, "odd") == ["deadpan has nothing like it"]


@pytest.mark.parametrize(
    ("old", "new", "path", "words"),
    [
        (
            "freeze_visual_encoder=True",
            "freeze_visual_encoder=False",
            "model.freeze_visual_encoder",
            "frozen",
        ),
        (
            "quantization_vit=False",
            "quantization_vit=True, visual_encoder_lora=dict(type=LoraConfig, r=8)",
            "model.visual_encoder_lora",
            "no LoRA on the vision tower",
        ),
        ("quantization_vit=False", "pretrained_pth='a.pth'", "model.pretrained_pth", "base model"),
        ("task_type='CAUSAL_LM'", "use_dora=True", "model.llm_lora.use_dora", "nothing like it"),
        ("load_from = None", "load_from = 'a.pth'", "load_from", "import-xtuner"),
        ("resume = False", "resume = True", "resume", "--resume"),
        (
            "deterministic=False",
            "deterministic=True",
            "randomness.deterministic",
            "nothing like it",
        ),
        ("eta_min=0.0", "eta_min=1e-6", "param_scheduler.1.eta_min", "ends at zero"),
        (
            "    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),\n",
            "",
            "optim_wrapper.clip_grad.max_norm",
            "with --deepspeed",
        ),
        (
            "max_length=max_length)",
            "max_length=max_length, repeat_times=2)",
            "train_dataloader.dataset.repeat_times",
            "nothing like it",
        ),
    ],
)
def test_what_has_no_equivalent_is_reported_with_its_reason(
    tmp_path: Path, old: str, new: str, path: str, words: str
) -> None:
    (reason,) = left(translate(tmp_path, (old, new)), path)
    assert words in reason


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("quantization_llm=True", "quantization_llm=False", {"quantization": "none"}),
        (
            "r=64, lora_alpha=256, lora_dropout=0.05, ",
            "",
            {"lora.r": 8, "lora.lora_alpha": 8, "lora.lora_dropout": 0.0},
        ),
        (
            "target_modules=None",
            "target_modules=['wqkv', 'w2']",
            {"lora.target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
        ),
        (
            "target_modules=None",
            "target_modules=['attention.wo', 'output']",
            {"lora.target_modules": ["o_proj"]},
        ),
        (
            ", lr=lr, betas=betas, weight_decay=weight_decay",
            "",
            {"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.01},
        ),
        ("end=warmup_ratio * max_epochs,", "end=1.5,", {"schedule.warmup_ratio": 0.25}),
        ("seed=None", "seed=42", {"seed": 42}),
        ("dtype='float16'", "dtype='bfloat16'", {"precision": "bf16"}),
        (
            "    accumulative_counts=accumulative_counts,\n",
            "",
            {"gradient_accumulation_steps": 1, "save_every_steps": 1000},
        ),
        ("save_total_limit = 1", "save_total_limit = -1", {"keep_checkpoints": 1_000_000}),
        ("data_paths=data_path", "data_paths=[data_path]", {"data.train": "./data/ex_cn.json"}),
    ],
)
def test_settings_mean_what_they_mean_in_xtuner(
    tmp_path: Path, old: str, new: str, expected: dict[str, object]
) -> None:
    found = said(translate(tmp_path, (old, new)))
    assert {key: found[key] for key in expected} == expected


def without_schedule(new: str = "") -> tuple[str, str]:
    start, end = CONFIG.index("param_scheduler = ["), CONFIG.index("train_cfg =")
    return CONFIG[start:end], new


def test_without_schedulers_the_rate_is_level(tmp_path: Path) -> None:
    found = said(translate(tmp_path, without_schedule()))
    assert (found["schedule.name"], found["schedule.warmup_ratio"]) == ("constant", 0.0)


def test_a_warm_up_in_iterations_needs_the_length_of_the_run(tmp_path: Path) -> None:
    schedule = without_schedule(
        "param_scheduler = dict(type='LinearLR', by_epoch=False, begin=0, end=30)\n"
    )
    raised = refused(tmp_path, schedule)
    assert (
        raised.found
        == "\n    schedule.warmup_ratio: param_scheduler.0 warms up for 30 iterations of None"
    )
    found = said(translate(tmp_path, schedule, ("max_epochs=max_epochs)", "max_iters=301)")))
    assert found["schedule.name"] == "constant"
    assert found["schedule.warmup_ratio"] == pytest.approx(30 / 301)
    # 301 micro-batches are 76 steps of four; that many epochs are always enough.
    assert (found["max_steps"], found["epochs"]) == (76, 301)


def test_another_schedule_is_named(tmp_path: Path) -> None:
    raised = refused(tmp_path, without_schedule("param_scheduler = [dict(type='PolyLR')]\n"))
    assert raised.found is not None
    assert "is PolyLR; deadpan has a linear warm-up" in raised.found


@pytest.mark.parametrize(("theirs", "ours"), OPTIMIZERS.items())
def test_optimizers_are_those_of_the_schema(tmp_path: Path, theirs: str, ours: str) -> None:
    changes = [("optim_type = AdamW", f"optim_type = '{theirs}'"), ("lr = 2e-5", "lr = 1.0")]
    if ours in OFFERED:
        found = said(translate(tmp_path, *changes, without_schedule()))
        assert (found["optimizer.name"], found["optimizer.lr"]) == (ours, 1.0)
    else:
        raised = refused(tmp_path, *changes)
        assert raised.found is not None
        assert re.search(
            rf"optimizer\.name: line \d+: .* is {theirs}, and deadpan has adamw", raised.found
        )


def test_an_unknown_optimizer_is_named_and_its_rate_is_not_given_to_another(tmp_path: Path) -> None:
    change = ("optim_type = AdamW", "optim_type = 'Lion'")
    assert "is Lion, and deadpan has" in str(refused(tmp_path, change))
    with pytest.raises(DeadpanError, match=r"optimizer\.lr: the config's is a rate for Lion"):
        translate(tmp_path, change, overrides=("optimizer.name=adamw",))
    overrides = ("optimizer.name=adamw", "optimizer.lr=3e-5")
    translation = translate(tmp_path, change, overrides=overrides)
    assert said(translation)["optimizer.lr"] == 3e-5
    assert "  lr: 3.0e-05  # given on the command line\n" in translation.text()


def test_what_cannot_be_read_is_named_with_its_line_all_at_once(tmp_path: Path) -> None:
    changes = [
        ("lr = 2e-5", "import os\nlr = float(os.environ['LR'])"),
        ("batch_size = 4\n", "batch_size = 4 if lr else 8\n"),
        ("path = 'OpenGVLab/InternVL2-2B'", "from .paths import path"),
    ]
    raised = refused(tmp_path, *changes)
    assert raised.what == "The config leaves open what the recipe needs."
    assert raised.found is not None
    lines = raised.found.strip().split("\n    ")
    assert [line.partition(":")[0] for line in lines] == [
        "model",
        "micro_batch_size",
        "optimizer.lr",
    ]
    assert "model.model_path is .paths.path: it stands in another file" in lines[0]
    assert "is 4 if lr else 8: a condition is not run" in lines[1]
    assert "is float(os.environ['LR']): a call is not run" in lines[2]
    given = ("model=nano", "optimizer.lr=1e-4", "micro_batch_size=2")
    assert said(translate(tmp_path, *changes, overrides=given))["model"] == "nano"


def test_several_record_files_are_refused(tmp_path: Path) -> None:
    raised = refused(tmp_path, ("data_paths=data_path", "data_paths=['a.json', 'b.json']"))
    assert raised.found is not None
    assert "names 2, deadpan takes one: join the record files" in raised.found


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("type=InternVL_V1_5,", "type='LLaVAModel',", "not one of XTuner's for InternVL"),
        (
            CONFIG[CONFIG.index("    llm_lora=dict(") : CONFIG.index("llava_dataset")],
            ")\n",
            "without a LoRA",
        ),
        ("model = dict(", "odd = dict(", "not one of XTuner's for InternVL"),
    ],
)
def test_other_configs_are_refused(tmp_path: Path, old: str, new: str, what: str) -> None:
    assert what in refused(tmp_path, (old, new)).what


def test_values_out_of_bounds_are_the_recipes_mistakes(tmp_path: Path) -> None:
    raised = refused(tmp_path, ("lr = 2e-5", "lr = 0.0"))
    assert raised.what == "The recipe's key 'optimizer.lr' has a wrong value."
    assert raised.where == f"recipe made from {tmp_path / 'config.py'}"


def test_a_config_that_mmengine_wrote_is_read_too(tmp_path: Path) -> None:
    """Values are inlined, classes are text, and --deepspeed has moved settings to `strategy`."""
    start, end = CONFIG.index("optim_wrapper = dict("), CONFIG.index("param_scheduler = [")
    written = (
        "optim_wrapper = dict(type='DeepSpeedOptimWrapper', optimizer=dict(\n"
        "    type='torch.optim.AdamW', lr=2e-5, betas=(0.9, 0.95), weight_decay=0.05))\n"
        "strategy = dict(type='xtuner.engine.DeepSpeedStrategy', gradient_clipping=0.5,\n"
        "    gradient_accumulation_steps=5, config=dict(bf16=dict(enabled=True)))\n"
        "launcher = 'none'\n"
        "work_dir = './work_dirs/a'\n"
    )
    translation = translate(
        tmp_path,
        (CONFIG[start:end], written),
        ("type=InternVL_V1_5,", "type='xtuner.model.InternVL_V1_5',"),
    )
    found = said(translation)
    assert found["optimizer.max_grad_norm"] == 0.5
    assert found["optimizer.betas"] == [0.9, 0.95]
    assert (found["gradient_accumulation_steps"], found["save_every_steps"]) == (5, 200)
    assert len(left(translation, "work_dir")) == 1
    assert not left(translation, "strategy.config.bf16.enabled")


def test_facts_about_the_lora() -> None:
    assert lora_facts(CONFIG, "config.py") == LoraFacts(
        r=64,
        lora_alpha=256,
        lora_dropout=0.05,
        use_rslora=False,
        quantization="nf4",
        model="OpenGVLab/InternVL2-2B",
    )
    unclear = CONFIG.replace("lora_alpha=256", "lora_alpha=twice(128)")
    with pytest.raises(DeadpanError, match=r"lora\.lora_alpha: .*twice\(128\)"):
        lora_facts(unclear, "config.py")
