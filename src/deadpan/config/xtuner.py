"""Translate an XTuner 0.1 config for InternVL into a recipe.

What the settings mean is read off XTuner 0.1 and mmengine, which it runs on:
`xtuner/model/internvl.py`, `xtuner/model/utils.py`, `xtuner/dataset/internvl_dataset.py` (InternLM/xtuner at
030db27b) and mmengine's runner, optimizer wrapper and schedulers (open-mmlab/mmengine at 8593691c). In short:

- An iteration is one micro-batch. Intervals and `max_iters` count iterations, so a step of the optimizer is
  `accumulative_counts` of them.
- `lr` is the peak rate as it stands: nothing scales it with the batch or the number of GPUs.
- The warm-up is given in epochs and turned into iterations: only its share of the run matters.
- The projector (`mlp1`) is always trained.
- The tile limit is the checkpoint's own `max_dynamic_patch`.
- `--deepspeed` clips gradients at 1 where the config does not clip, and moves what it uses into `strategy`
  (`xtuner/tools/train.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from deadpan.config.keys import keys
from deadpan.config.ledger import Ledger, Setting, Translation, in_words, within
from deadpan.config.loader import parse_overrides, parse_recipe
from deadpan.config.schema import Optimizer
from deadpan.config.static_python import read_file, read_text
from deadpan.errors import DeadpanError

OPTIMIZERS = {
    "AdamW": "adamw",
    "DAdaptAdam": "dadapt_adam",
    "Prodigy": "prodigy",
    "AdamWScheduleFree": "schedulefree_adamw",
}
"""XTuner takes any optimizer class; these are the ones that deadpan has, or may come to have."""

_OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    "dadapt_adam": {"lr": 1.0, "weight_decay": 0.0},
    "prodigy": {"lr": 1.0, "weight_decay": 0.0},
    "schedulefree_adamw": {"lr": 0.0025, "weight_decay": 0.0},
}
"""What the classes do where a config says nothing (torch 2.13, dadaptation 3.2, prodigyopt 1.1, schedulefree 1.4)."""

_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
"""What PEFT's LoraConfig does where a config says nothing."""

_TARGETS = {
    "wqkv": ["q_proj", "k_proj", "v_proj"],
    "wo": ["o_proj"],
    "w1": ["gate_proj"],
    "w2": ["down_proj"],
    "w3": ["up_proj"],
}
_HEADS = ("output", "lm_head")
_NEVER = 1_000_000
"""For a limit that XTuner does not have and that deadpan cannot leave out."""

_HELPERS = frozenset(
    "path data_root data_path image_folder prompt_template max_length batch_size accumulative_counts "
    "dataloader_num_workers max_epochs optim_type lr betas weight_decay max_norm warmup_ratio save_steps "
    "save_total_limit evaluation_freq evaluation_images evaluation_inputs SYSTEM llava_dataset "
    "sequence_parallel_size".split()
)
"""Names that XTuner's own configs give to values used further down. A config that mmengine wrote has the values
in both places."""

_NOTHING_NEEDED = (
    "model.llm_lora.task_type",
    "train_dataloader.collate_fn",
    "train_dataloader.pin_memory",
    "train_dataloader.persistent_workers",
    "train_dataloader.sampler.length_property",
    "train_dataloader.sampler.per_device_batch_size",
    "optim_wrapper.clip_grad.error_if_nonfinite",
    "optim_wrapper.loss_scale",
    "train_cfg.type",
    "train_cfg.val_interval",
    "default_hooks.timer",
    "default_hooks.logger",
    "default_hooks.param_scheduler",
    "default_hooks.sampler_seed",
    "default_hooks.checkpoint.type",
    "default_hooks.checkpoint.by_epoch",
    "custom_imports",
    "default_scope",
    "env_cfg",
    "launcher",
    "log_level",
    "log_processor",
    "runner_type",
    "strategy",
    "tokenizer",
)
"""What has no bearing on the result, or what deadpan does by itself."""


@dataclass(frozen=True)
class LoraFacts:
    """What a config says about the LoRA that a checkpoint of it holds; None where it says nothing.

    Attributes:
        r: The rank.
        lora_alpha: The numerator of the scale.
        lora_dropout: Dropout in training.
        use_rslora: Whether the scale is lora_alpha / sqrt(r).
        quantization: none or nf4: how the language model was held in training.
        model: The base model.
    """

    r: int
    lora_alpha: int
    lora_dropout: float
    use_rslora: bool
    quantization: str
    model: str | None


def import_config(path: Path, overrides: Sequence[str] = ()) -> Translation:
    """Translate a config file.

    Args:
        path: The Python file; it is parsed, never run.
        overrides: `key=value` of the recipe, which replace what the config says or leaves unclear.

    Raises:
        DeadpanError: If it is no InternVL config with LoRA, or a value that the recipe needs can neither be read
            nor expressed; all such values are in one message.
    """
    return _Translator(read_file(path), path.name, parse_overrides(overrides)).translate()


def lora_facts(source: Path | str, where: str) -> LoraFacts:
    """What a config, a file or its text, says about its LoRA.

    Raises:
        DeadpanError: If it says nothing, or its values cannot be read.
    """
    config = read_file(source) if isinstance(source, Path) else read_text(source, where)
    translator = _Translator(config, where, {})
    translator.model()
    translator.lora()
    translator.stop_if_unclear(
        ["lora.r", "lora.lora_alpha", "lora.lora_dropout", "quantization"],
        "write the values into the config",
    )
    said = translator.said
    model = said.get("model")
    rslora = config.find("model.llm_lora.use_rslora")
    return LoraFacts(
        r=said["lora.r"].value,
        lora_alpha=said["lora.lora_alpha"].value,
        lora_dropout=said["lora.lora_dropout"].value,
        use_rslora=rslora is not None and rslora.value is True,
        quantization=said["quantization"].value,
        model=model.value if model else None,
    )


_ROOTS = frozenset(
    "model train_dataloader optim_wrapper param_scheduler train_cfg default_hooks custom_hooks randomness load_from "
    "resume visualizer work_dir strategy".split()
)
_REASONS = {
    "work_dir": "XTuner's files are there; run says where deadpan's go",
    "visualizer": "deadpan plot draws the curves of any run",
    "load_from": "import the checkpoint with deadpan import-xtuner; training starts from a base model",
    "resume": "deadpan train --resume goes on with a run of its own",
    "val_": "deadpan evaluate measures a trained model",
    "test_": "deadpan evaluate measures a trained model",
    "auto_scale_lr": "deadpan uses lr as it stands",
}


class _Translator(Ledger):
    """Goes through a config, section by section."""

    def translate(self) -> Translation:
        self.model()
        self.lora()
        self._dataset()
        self._optimizer()
        self._length()
        self._schedule()
        self._saving()
        self._runtime()
        for key, value in self.given.items():
            self.said[key] = Setting(key, value, "given on the command line")
            self.unclear.pop(key, None)
        self.stop_if_unclear(
            list(self.unclear), f"give what is meant: deadpan recipe import {self.name} KEY=VALUE"
        )
        needless = self._leave_the_rest()
        known = keys()
        order = sorted(
            self.said.values(), key=lambda setting: [*known, setting.key].index(setting.key)
        )
        settings: list[Setting] = []
        same: list[Setting] = []
        for setting in order:
            entry = known.get(setting.key)
            as_default = entry and not entry.required and setting.value == entry.default
            (same if as_default else settings).append(setting)
        translation = Translation(self.name, settings, same, self.left, needless)
        parse_recipe(translation.text(), f"recipe made from {self.config.where}")
        return translation

    def model(self) -> None:
        """The base model, what of it is trained, and how it is held."""
        kind = self.kind("model.type")
        if kind != "InternVL_V1_5":
            raise DeadpanError(
                "The config is not one of XTuner's for InternVL.",
                where=self.config.where,
                expected="model = dict(type=InternVL_V1_5, ...)",
                found=f"model.type {kind}" if kind else "no model.type",
            )
        self.carry("model.model_path", "model", str)
        quantized = self.plain("model.quantization_llm", False)
        node = self.config.find("model.quantization_llm")
        if isinstance(quantized, bool):
            source = (
                self.source("model.quantization_llm")
                if node
                else "model.quantization_llm is not set"
            )
            self.say("quantization", "nf4" if quantized else "none", source)
            if quantized:
                self.leave(
                    "model.quantization_llm",
                    "the output head was held in NF4 too, and computed in float16; deadpan leaves the head as it is",
                )
        else:
            self.doubt("quantization", "model.quantization_llm")
        self.say("train_projector", True, "XTuner always trains mlp1")
        self.seen |= {"model.type", "model.freeze_llm", "model.freeze_visual_encoder"}
        if self.plain("model.freeze_visual_encoder", False) is not True:
            self.leave(
                "model.freeze_visual_encoder",
                "the vision tower was trained; deadpan keeps it frozen",
            )
        for path, reason in (
            ("model.visual_encoder_lora", "deadpan trains no LoRA on the vision tower"),
            (
                "model.pretrained_pth",
                "training starts from a base model; deadpan import-xtuner reads checkpoints",
            ),
        ):
            if self.plain(path, None) is not None:
                self.leave(path, reason)
        self.seen.add("model.quantization_vit")
        if self.plain("model.quantization_vit", False) is not False:
            self.leave("model.quantization_vit", "deadpan does not quantise the vision tower")

    def lora(self) -> None:
        """The adapter of the language model."""
        top = "model.llm_lora"
        if not isinstance(self.plain(top, None), dict) or self.kind(f"{top}.type") != "LoraConfig":
            found = self.plain(top, None)
            raise DeadpanError(
                "The config trains without a LoRA on the language model, and deadpan trains one.",
                where=self.config.where,
                expected="model.llm_lora = dict(type=LoraConfig, ...)",
                found=in_words(found) if found is not None else "no model.llm_lora",
                fix="start from a recipe with LoRA: deadpan recipe copy internvl2-2b-lora .",
            )
        self.seen.add(f"{top}.type")
        self.carry(f"{top}.r", "lora.r", int, _PEFT_DEFAULTS["r"])
        self.carry(f"{top}.lora_alpha", "lora.lora_alpha", int, _PEFT_DEFAULTS["lora_alpha"])
        self.carry(
            f"{top}.lora_dropout", "lora.lora_dropout", float, _PEFT_DEFAULTS["lora_dropout"]
        )
        for name, harmless in (
            ("bias", "none"),
            ("init_lora_weights", True),
            ("inference_mode", False),
        ):
            if self.plain(f"{top}.{name}", harmless) == harmless:
                self.seen.add(f"{top}.{name}")
        for name in ("use_rslora", "use_dora"):
            if self.plain(f"{top}.{name}", False) is False:
                self.seen.add(f"{top}.{name}")
        self._targets(f"{top}.target_modules")

    def _targets(self, path: str) -> None:
        targets = self.plain(path, None)
        self.seen.add(path)
        if targets is None or targets == "all-linear":
            self.say("lora.target_modules", "all-linear", self.source(path))
            names, head = ["wqkv"], targets is None and not self._template_names("phi3")
        elif isinstance(targets, list) and all(isinstance(t, str) for t in targets):
            names = [target.rpartition(".")[2] for target in targets]
            head = any(name in _HEADS for name in names)
            ours = [
                our for name in names if name not in _HEADS for our in _TARGETS.get(name, [name])
            ]
            self.say("lora.target_modules", ours, self.source(path))
        else:
            self.doubt("lora.target_modules", path)
            return
        if head:
            self.leave(
                path,
                "with InternLM2, the output head got a LoRA too; deadpan's goes on decoder layers only",
            )
        if "wqkv" in names and not self._template_names("phi3"):
            self.leave(
                path,
                "InternLM2's fused wqkv had one LoRA of rank r; here q_proj, k_proj and v_proj have one each",
            )

    def _template_names(self, family: str) -> bool:
        template = str(self.plain("train_dataloader.dataset.template", ""))
        return template.rpartition(".")[2].startswith(family)

    def _dataset(self) -> None:
        top = "train_dataloader.dataset"
        kind = self.kind(f"{top}.type")
        if kind != "InternVL_V1_5_Dataset":
            self.unclear["data.train"] = (
                f"{top}.type is {kind or 'not set'}, which deadpan does not know"
            )
        else:
            self.seen.add(f"{top}.type")
            self._one_file(f"{top}.data_paths", "data.train", "join the record files into one")
            self._one_file(
                f"{top}.image_folders", "data.images", "join the picture folders into one"
            )
            self.carry(f"{top}.max_length", "max_length", int, 8192)
            self.leave(
                f"{top}.max_length",
                "longer samples were cut, answers included; deadpan refuses them, or skips them on data.overlong=skip",
            )
            if self.plain(f"{top}.repeat_times", 1) in (1, [1]):
                self.seen.add(f"{top}.repeat_times")
            self.leave(
                f"{top}.template",
                "XTuner put a system sentence of its own before each conversation; deadpan takes sentence and template "
                "from the checkpoint, in training as in serving",
            )
        held_out = keys().get("data.validation")
        if held_out and held_out.default is not None and "data.validation" not in self.given:
            self.leave(
                "val_dataloader",
                f"nothing was held out; data.validation is {held_out.default} by default",
            )
        other = self.plain(f"{top}.model_path", None)
        if other is None or other == self.plain("model.model_path", None):
            self.seen.add(f"{top}.model_path")
        self.carry("train_dataloader.batch_size", "micro_batch_size", int, 1)
        self.carry("train_dataloader.num_workers", "data.workers", int, 0)
        sampler = self.kind("train_dataloader.sampler.type")
        self.seen |= {"train_dataloader.sampler.type", "train_dataloader.sampler.shuffle"}
        if sampler == "LengthGroupedSampler":
            self.leave(
                "train_dataloader.sampler.type",
                "samples of like length were put together; deadpan's epochs are plain permutations",
            )
        elif (
            sampler != "DefaultSampler"
            or self.plain("train_dataloader.sampler.shuffle", True) is not True
        ):
            self.leave("train_dataloader.sampler", "deadpan shuffles every epoch")

    def _one_file(self, path: str, key: str, fix: str) -> None:
        value = self.plain(path, None)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, list) and len(set(map(str, value))) > 1:
            self.seen.add(path)
            self.unclear[key] = f"{path} names {len(value)}, deadpan takes one: {fix}"
        elif value is None and key == "data.images":
            self.seen.add(path)
        elif isinstance(value, str):
            self.seen.add(path)
            self.say(key, value, self.source(path))
        else:
            self.doubt(key, path)

    def _optimizer(self) -> None:
        top = "optim_wrapper.optimizer"
        kind = self.kind(f"{top}.type")
        name = OPTIMIZERS.get(kind or "")
        offered = get_args(Optimizer.model_fields["name"].annotation)
        self.seen.add(f"{top}.type")
        if name in offered:
            self.say("optimizer.name", name, self.source(f"{top}.type"))
        else:
            self.unclear["optimizer.name"] = (
                f"{self.source(f'{top}.type')} is {kind or 'not set'}, and deadpan has {', '.join(offered)}"
            )
        defaults = _OPTIMIZER_DEFAULTS[name or "adamw"]
        self.carry(f"{top}.lr", "optimizer.lr", float, defaults["lr"])
        self.carry(f"{top}.betas", "optimizer.betas", list, [0.9, 0.999])
        self.carry(f"{top}.weight_decay", "optimizer.weight_decay", float, defaults["weight_decay"])
        self.carry(f"{top}.eps", "optimizer.eps", float, 1e-8)
        for option in ("d0", "d_coef", "growth_rate"):
            if f"optimizer.{option}" in keys() and self.config.find(f"{top}.{option}"):
                self.carry(f"{top}.{option}", f"optimizer.{option}", float)
        if self.given.get("optimizer.name", name) != name:
            self.unclear["optimizer.lr"] = f"the config's is a rate for {kind}"
        decays = self.plain(f"{top}.weight_decay", 0) != 0
        if name == "dadapt_adam" and decays and self.plain(f"{top}.decouple", False) is not True:
            self.leave(
                f"{top}.type", "its weight decay was added to the gradient; deadpan's is decoupled"
            )
        self.seen.add(f"{top}.decouple")
        clip = self.first("optim_wrapper.clip_grad.max_norm", "strategy.gradient_clipping")
        self.carry(clip, "optimizer.max_grad_norm", float, 1.0)
        if self.config.find(clip) is None:
            self.leave(
                clip,
                "XTuner clips at 1 with --deepspeed, as this recipe does; without it, nothing was clipped",
            )
        steps = self.first(
            "optim_wrapper.accumulative_counts", "strategy.gradient_accumulation_steps"
        )
        self.carry(steps, "gradient_accumulation_steps", int, 1)
        if self._accumulation() > 1:
            self.leave(
                steps,
                "each micro-batch weighed the same; deadpan takes the mean over a step's supervised tokens",
            )
        self._precision()

    def _precision(self) -> None:
        self.seen |= {"optim_wrapper.type", "optim_wrapper.dtype"}
        if self.kind("optim_wrapper.type") != "AmpOptimWrapper":
            return
        dtype = str(self.plain("optim_wrapper.dtype", "float16")).rpartition(".")[2]
        if dtype == "bfloat16":
            self.say("precision", "bf16", self.source("optim_wrapper.dtype"))
        else:
            self.leave(
                "optim_wrapper.dtype",
                "precision is auto, bf16 where the device has it, as with XTuner's --deepspeed; there is no float16",
            )

    def _length(self) -> None:
        iterations = self.plain("train_cfg.max_iters", None)
        if iterations is None:
            self.carry("train_cfg.max_epochs", "epochs", int)
        elif type(iterations) is int:
            source = self.source("train_cfg.max_iters")
            steps = math.ceil(iterations / self._accumulation())
            self.say("max_steps", steps, f"{source}, counted in micro-batches")
            self.say("epochs", max(1, iterations), f"{source}: never fewer epochs than it takes")
        else:
            self.doubt("max_steps", "train_cfg.max_iters")
        self.seen |= {"train_cfg.max_iters", "train_cfg.max_epochs"}

    def _schedule(self) -> None:
        path = "param_scheduler"
        self.seen.add(path)
        value = self.plain(path, None)
        items = [value] if isinstance(value, dict) else value or []
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            self.doubt("schedule.name", path)
            return
        kinds = [str(item.get("type")).rpartition(".")[2] for item in items]
        warm = (
            items[0]
            if kinds[:1] == ["LinearLR"] and items[0].get("end_factor", 1.0) == 1.0
            else None
        )
        rest, rest_kinds = items[warm is not None :], kinds[warm is not None :]
        if rest_kinds not in ([], ["CosineAnnealingLR"]):
            self.unclear["schedule.name"] = (
                f"{self.source(path)} is {' + '.join(kinds)}; deadpan has a linear warm-up, then cosine or constant"
            )
            return
        source = self.source(path) if items else "param_scheduler is not set"
        self.say("schedule.name", "cosine" if rest else "constant", source)
        self._warm_up(warm, source)
        for number, cosine in enumerate(rest, start=len(items) - 1):
            begin, end = cosine.get("begin", 0), cosine.get("end", self._total(cosine))
            if cosine.get("eta_min") or cosine.get("eta_min_ratio"):
                self.leave(f"{path}.{number}.eta_min", "deadpan's cosine ends at zero")
            if (
                end != self._total(cosine)
                or begin != (warm or {}).get("end", 0)
                or "T_max" in cosine
            ):
                self.leave(
                    f"{path}.{number}", "deadpan's cosine spans all that follows the warm-up"
                )

    def _warm_up(self, warm: dict[str, Any] | None, source: str) -> None:
        if warm is None:
            self.say("schedule.warmup_ratio", 0.0, f"{source}: no LinearLR")
            return
        end, total = warm.get("end"), self._total(warm)
        if type(end) not in (int, float) or type(total) not in (int, float) or not total:
            unit = "epochs" if warm.get("by_epoch", True) else "iterations"
            self.unclear["schedule.warmup_ratio"] = (
                f"param_scheduler.0 warms up for {in_words(end)} {unit} of {in_words(total)}"
            )
            return
        ratio = float(f"{end / total:.12g}")  # 0.03 x 8 / 8 in floating point
        self.say(
            "schedule.warmup_ratio", ratio, f"{self.source('param_scheduler.0.end')}, of {total}"
        )

    def _total(self, scheduler: dict[str, Any]) -> Any:
        """The length of the run in the scheduler's unit, as far as the config says it."""
        by_epoch = scheduler.get("by_epoch", True)
        return self.plain("train_cfg.max_epochs" if by_epoch else "train_cfg.max_iters", None)

    def _saving(self) -> None:
        top = "default_hooks.checkpoint"
        interval, keep = (
            self.plain(f"{top}.interval", -1),
            self.plain(f"{top}.max_keep_ckpts", -1),
        )
        self.seen |= {f"{top}.interval", f"{top}.max_keep_ckpts", f"{top}.save_optimizer"}
        if type(interval) is not int:
            self.doubt("save_every_steps", f"{top}.interval")
        elif interval > 0 and self.plain(f"{top}.by_epoch", True) is False:
            steps = max(1, interval // self._accumulation())
            self.say(
                "save_every_steps",
                steps,
                f"{self.source(f'{top}.interval')}, counted in micro-batches",
            )
        elif interval > 0:
            self.leave(f"{top}.interval", "epochs; deadpan saves every save_every_steps steps")
        if type(keep) is not int:
            self.doubt("keep_checkpoints", f"{top}.max_keep_ckpts")
        elif self.config.find(top) is not None:
            source = self.source(f"{top}.max_keep_ckpts")
            note = "" if keep > 0 else ": all are kept"
            self.say("keep_checkpoints", keep if keep > 0 else _NEVER, source + note)
        if self.plain(f"{top}.save_optimizer", True) is False:
            self.leave(f"{top}.save_optimizer", "deadpan always saves what resuming needs")

    def _runtime(self) -> None:
        seed = self.plain("randomness.seed", None)
        self.seen.add("randomness.seed")
        if seed is None:
            self.say(
                "seed", keys()["seed"].default, "randomness.seed is None: another one each time"
            )
        else:
            self.carry("randomness.seed", "seed", int)
        for path in ("randomness.deterministic", "resume"):
            if self.plain(path, False) is False:
                self.seen.add(path)
        hooks = self.plain("custom_hooks", None)
        for number in range(len(hooks) if isinstance(hooks, list) else 0):
            kind = self.kind(f"custom_hooks.{number}.type")
            if kind == "EvaluateChatHook":
                self.leave(
                    f"custom_hooks.{number}",
                    "deadpan tell and deadpan evaluate ask a trained model",
                )
            elif kind in ("DatasetInfoHook", "ThroughputHook"):
                self.seen.add(f"custom_hooks.{number}")

    def _leave_the_rest(self) -> list[str]:
        """Report what nothing above has looked at; return what need not be looked at."""
        needless: dict[str, None] = {}
        for name in self.config.names:
            if name in _HELPERS or (name in self.config.used and name not in _ROOTS):
                continue
            for path, node in self.config.leaves(name):
                if node.value in (None, [], {}) or within(path, self.seen):
                    continue
                if plain := within(path, _NOTHING_NEEDED):
                    needless[plain] = None
                    continue
                reason = next((r for start, r in _REASONS.items() if path.startswith(start)), None)
                self.leave(path, reason or "deadpan has nothing like it")
        return list(needless)

    def _accumulation(self) -> int:
        setting = self.said.get("gradient_accumulation_steps")
        return setting.value if setting and type(setting.value) is int else 1
