"""Turn a LoRA checkpoint of XTuner's into an adapter folder.

XTuner 0.1 puts PEFT's LoRA on the official remote code's language model and saves, through mmengine or DeepSpeed, the
LoRA and the projector (`InternVL_V1_5.state_dict` in xtuner/model/internvl.py, InternLM/xtuner at 030db27b):

    model.language_model.base_model.model.model.layers.0.attention.wqkv.lora_A.default.weight   (r, in)
    model.language_model.base_model.model.model.layers.0.attention.wqkv.lora_B.default.weight   (out, r)
    model.mlp1.0.weight ...

A LoRA on the fused `wqkv` is one on each of q, k and v with the same A: the rows of B A belong to q, k or v as the rows
of `wqkv` do, so B is split as `wqkv` is and A copied. With `target_modules=None`, XTuner's `find_all_linear_names`
leaves out heads called `lm_head` or `output_layer`; InternLM2's is called `output`, and has a LoRA too.
"""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from deadpan import nano
from deadpan.checkpoints import keys
from deadpan.checkpoints.files import WeightFiles, temporary_beside
from deadpan.checkpoints.load import read_config
from deadpan.checkpoints.processor_files import save_processor
from deadpan.checkpoints.source import Layout, detect, resolve
from deadpan.config.xtuner import LoraFacts, lora_facts
from deadpan.errors import DeadpanError
from deadpan.models import lora
from deadpan.models.build import build_empty
from deadpan.processing.processor import load_processor

_DEEPSPEED = "mp_rank_00_model_states.pt"
_KEY = re.compile(
    r"(?:module\.)?(?:model\.)?(?P<part>language_model|mlp1|vision_model)\.(?P<rest>.+)"
)
_LORA = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.(?:default\.)?weight")
_JOIN = (
    'where XTuner runs, write the weights into one file: python -c "import torch; '
    "from xtuner.model.utils import guess_load_checkpoint as load; torch.save(load('{0}'), '{0}.joined')\""
)


@dataclass(frozen=True)
class Imported:
    """What an import has made.

    Attributes:
        r: The rank.
        lora_alpha: The numerator of the scale.
        source: Where r and lora_alpha were said.
        layers: The number of the checkpoint's layers with a LoRA.
        targets: The names of the layers that have one in the adapter.
        base: The base model that the adapter points to.
        quantization: How the base was held in training; None if nothing says so.
    """

    r: int
    lora_alpha: int
    source: str
    layers: int
    targets: tuple[str, ...]
    base: str
    quantization: str | None


@dataclass(frozen=True)
class _Pair:
    """The LoRA of one layer: y = W x + scale B A x, with A of shape (r, in) and B of shape (out, r)."""

    a: torch.Tensor
    b: torch.Tensor


class _Placeholder:
    """Stands for an object of another library in a checkpoint; does nothing, whatever the file asks of it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def import_xtuner(
    checkpoint: Path,
    out: Path,
    *,
    base: str | None = None,
    config: Path | None = None,
    r: int | None = None,
    lora_alpha: int | None = None,
) -> Imported:
    """Write an adapter folder from a LoRA checkpoint of XTuner's.

    Args:
        checkpoint: `iter_N.pth`: a file, or the folder that DeepSpeed wrote.
        out: The folder to write; it must not exist.
        base: The model it was trained from, a folder or a Hub id; None: what the config says.
        config: The config it was trained with; None: the one that mmengine put into the checkpoint.
        r: The rank, to be compared with the weights'.
        lora_alpha: The numerator of the scale, if no config says it.

    Raises:
        DeadpanError: If the checkpoint cannot be read without running code, does not fit the base model, holds what
            an adapter cannot hold, or if nothing says what its lora_alpha is.
    """
    if out.exists():
        raise DeadpanError(
            "The folder to write exists already.", where=out, fix="choose another name"
        )
    state, text = read_checkpoint(checkpoint)
    pairs, projector = _sort(state, checkpoint)
    facts, source = _facts(config, text, checkpoint)
    told = {"--lora-alpha": lora_alpha, source: facts.lora_alpha if facts else None}
    alpha = _agreed("lora_alpha", checkpoint, told)
    if alpha is None:
        raise DeadpanError(
            "Nothing says what the LoRA's lora_alpha is; its scale is lora_alpha / r.",
            where=checkpoint,
            fix="pass --config with the config it was trained with, or --lora-alpha",
        )
    ranks = {name: pair.a.shape[0] for name, pair in pairs.items()}
    rank = _agreed("r", checkpoint, {"--r": r, source: facts.r if facts else None, **ranks})
    folder, recorded = _base(base or (facts.model if facts else None), checkpoint)
    processor = load_processor(folder)
    tensors, targets = _on_base(folder, pairs, projector, checkpoint)
    peft_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=facts.lora_dropout if facts else 0.0,
        use_rslora=facts.use_rslora if facts else False,
        target_modules=lora.target_pattern(
            [name for name in targets if name != lora.HEAD], lora.HEAD in targets
        ),
        modules_to_save=[lora.PROJECTOR],
        base_model_name_or_path=recorded,
    )
    quantization = facts.quantization if facts else None
    with temporary_beside(out, "adapter") as temporary:
        lora.write(peft_config, tensors, temporary)
        save_processor(
            processor, temporary, **({"trained_on": quantization} if quantization else {})
        )
        temporary.rename(out)
    told_by = source if facts else "--lora-alpha"
    return Imported(peft_config.r, alpha, told_by, len(pairs), targets, recorded, quantization)


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Read the weights of a checkpoint, and the text of the config that mmengine has put beside them.

    Objects of other libraries in the file, such as mmengine's history of the loss, become placeholders: nothing of
    theirs is imported or run.

    Raises:
        DeadpanError: If it is missing, damaged, of another kind, or split over several files.
    """
    file = _deepspeed_file(path) if path.is_dir() else path
    content = _load(file)
    state = content
    for name in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            state = content[name]
            break
    if not isinstance(state, dict) or not state:
        raise DeadpanError("The checkpoint holds no weights.", where=file)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise DeadpanError(
                "The checkpoint is not one of XTuner's.",
                where=file,
                expected="a state_dict of tensors by name",
                found=f"{name!r}, which is no tensor",
            )
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return dict(state), text if isinstance(text, str) else None


def _deepspeed_file(folder: Path) -> Path:
    """The one file of a DeepSpeed folder that holds all that was trained."""
    states = sorted(path.name for path in folder.glob("*model_states.pt"))
    if states == [_DEEPSPEED]:
        return folder / _DEEPSPEED
    if states:
        raise DeadpanError(
            "DeepSpeed has split the weights over several files.",
            where=folder,
            expected=f"{_DEEPSPEED} alone, as ZeRO 1 and 2 write it",
            found=", ".join(states[:3]) + (" ..." if len(states) > 3 else ""),
            fix=_JOIN.format(folder.name),
        )
    inside = sorted(path.name for path in folder.glob("*.pth"))
    raise DeadpanError(
        "The folder is no checkpoint of XTuner's.",
        where=folder,
        expected=_DEEPSPEED,
        fix=f"give one of those in it: {', '.join(inside)}" if inside else None,
    )


def _load(file: Path) -> Any:
    try:
        file.open("rb").close()
    except OSError as error:
        raise DeadpanError(
            f"The checkpoint cannot be read: {error.strerror}.", where=file
        ) from None
    try:
        stand_ins: list[Any] = [
            (type(name.rpartition(".")[2], (_Placeholder,), {}), name)
            for name in get_unsafe_globals_in_checkpoint(str(file))
        ]
        with safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DeadpanError(
            "The checkpoint cannot be read without running code from it, so it was not.",
            where=file,
            found=str(error).splitlines()[0],
            fix=_JOIN.format(file.name),
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise DeadpanError(
            "The checkpoint is damaged, or not one that PyTorch has saved.",
            where=file,
            found=str(error).splitlines()[0] if str(error) else "the end of the file",
        ) from None


def _facts(config: Path | None, text: str | None, checkpoint: Path) -> tuple[LoraFacts | None, str]:
    """What the config says, and what to call it; the given one before the checkpoint's own."""
    if config is not None:
        return lora_facts(config, str(config)), str(config)
    if text is not None:
        source = f"the config in {checkpoint.name}"
        return lora_facts(text, source), source
    return None, "no config"


def _agreed(what: str, checkpoint: Path, told: Mapping[str, int | None]) -> int | None:
    """The one value that all who know it agree on; None if nobody knows it."""
    known = {who: value for who, value in told.items() if value is not None}
    if len(set(known.values())) > 1:
        (first, value), *_ = known.items()
        other = next(who for who in known if known[who] != value)
        raise DeadpanError(
            f"There are two values of the LoRA's {what}.",
            where=checkpoint,
            found=f"{value} in {first}, {known[other]} in {other}",
            fix="give the config that this checkpoint was trained with",
        )
    return next(iter(known.values()), None)


def _base(model: str | None, checkpoint: Path) -> tuple[Path, str]:
    """The folder of the base model, and what the adapter records of it."""
    if model is None:
        raise DeadpanError(
            "Nothing says what the base model is.", where=checkpoint, fix="pass --base MODEL"
        )
    folder = resolve(model)
    if detect(folder) is Layout.ADAPTER:
        raise DeadpanError(
            "The base must be a whole model.", where=folder, found="an adapter", fix="pass its base"
        )
    local = model != nano.MODEL and Path(model).expanduser().is_dir()
    return folder, str(folder.resolve()) if local else model


def _sort(
    state: Mapping[str, torch.Tensor], checkpoint: Path
) -> tuple[dict[str, _Pair], dict[str, torch.Tensor]]:
    """Part a checkpoint into LoRA pairs by the official name of their layer, and the projector's tensors."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    projector: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        match = _KEY.fullmatch(name)
        part, rest = (match["part"], match["rest"]) if match else ("", name)
        low_rank = _LORA.fullmatch(rest)
        if part == "vision_model":
            raise DeadpanError(
                "The checkpoint changes the vision tower, and deadpan's adapters cannot.",
                where=checkpoint,
                found=name,
                fix="convert it with XTuner's convert_to_official.py; deadpan reads the whole model that gives",
            )
        if part == "mlp1":
            projector[f"mlp1.{rest}"] = tensor
        elif part == "language_model" and low_rank:
            layer = f"language_model.{low_rank['layer']}.weight"
            sides.setdefault(layer, {})[low_rank["side"]] = tensor
        else:
            unknown.append(name)
    if unknown or not sides:
        raise DeadpanError(
            "The checkpoint is not a LoRA of XTuner's for InternVL.",
            where=checkpoint,
            expected="...language_model.base_model.model.LAYER.lora_A.default.weight, lora_B, and mlp1",
            found=_some(unknown) if unknown else "no LoRA",
        )
    _insist(
        "lacks half of a LoRA",
        [n for n, ab in sides.items() if ab.keys() != {"A", "B"}],
        checkpoint,
    )
    return {name: _Pair(ab["A"].float(), ab["B"].float()) for name, ab in sides.items()}, projector


def _on_base(
    folder: Path,
    pairs: Mapping[str, _Pair],
    projector: Mapping[str, torch.Tensor],
    checkpoint: Path,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The adapter's tensors by PEFT's names, and the names of the layers that have a LoRA.

    Raises:
        DeadpanError: If anything is missing, surplus or misshapen.
    """
    layout, files = detect(folder), WeightFiles(folder)
    model = build_empty(read_config(folder, layout, load_processor(folder), files), "eager")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # The checkpoint has official names even if the base in use does not.
    internlm2 = any(".attention.w" in name or ".feed_forward.w" in name for name in pairs)
    family = "InternLM2ForCausalLM" if internlm2 else "Qwen2ForCausalLM"
    entries = {e.source: e for e in keys.official_entries(model.config, shapes, family)}
    _insist(
        "has LoRAs on layers that its base lacks",
        [n for n in pairs if n not in entries],
        checkpoint,
    )
    expected = [name for name in entries if name.startswith("mlp1.")]
    _insist("lacks parts of the projector", [n for n in expected if n not in projector], checkpoint)
    _insist(
        "has parts of a projector that its base lacks",
        [n for n in projector if n not in expected],
        checkpoint,
    )
    if model.config.tie_word_embeddings and any(
        lora.HEAD in e for n in pairs for e in entries[n].targets
    ):
        raise DeadpanError(
            "The checkpoint has a LoRA on the output head, and its base shares the head with the embeddings.",
            where=checkpoint,
            fix="pass the base that it was trained from",
        )
    tensors = {}
    targets: dict[str, set[str]] = {}
    for name, pair in pairs.items():
        entry = entries[name]
        for target, a, b in _split(pair, entry, [shapes[t] for t in entry.targets], checkpoint):
            layer = target.removesuffix(".weight")
            tensors[f"base_model.model.{layer}.lora_A.weight"] = a
            tensors[f"base_model.model.{layer}.lora_B.weight"] = b
            targets.setdefault(layer.rpartition(".")[2], set()).add(layer)
    for kind, layers in targets.items():
        # An adapter's configuration names kinds of layers, not single ones.
        every = {
            layer
            for layer in (name.removesuffix(".weight") for name in shapes)
            if layer.rpartition(".")[2] == kind and not layer.startswith("model.vision_tower.")
        }
        _insist(f"lacks the LoRA of some {kind}", sorted(every - layers), checkpoint)
    for name, tensor in projector.items():
        (target,) = entries[name].targets
        _check_shape(name, tensor, shapes[target], checkpoint)
        tensors[f"base_model.model.{target}"] = tensor.float().contiguous()
    return tensors, tuple(targets)


def _split(
    pair: _Pair, entry: keys.Entry, shapes: Sequence[torch.Size], checkpoint: Path
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The LoRA of each parameter that lies in a tensor of the official layout."""
    whole = entry.shape(list(shapes))  # (out, in)
    rank = pair.a.shape[0]
    _check_shape(f"{entry.source} lora_A", pair.a, torch.Size((rank, whole[1])), checkpoint)
    _check_shape(f"{entry.source} lora_B", pair.b, torch.Size((whole[0], rank)), checkpoint)
    parts = entry.split(pair.b, list(shapes))
    for target, part in zip(entry.targets, parts, strict=True):
        yield target, pair.a.clone(), part.contiguous()


def _check_shape(name: str, tensor: torch.Tensor, shape: torch.Size, checkpoint: Path) -> None:
    if tensor.shape != shape:
        raise DeadpanError(
            f"The checkpoint's {name} has the wrong shape.",
            where=checkpoint,
            expected=str(tuple(shape)),
            found=str(tuple(tensor.shape)),
            fix="pass the base that it was trained from",
        )


def _insist(what: str, names: Sequence[str], checkpoint: Path) -> None:
    """Stop if there are any of these names."""
    if names:
        raise DeadpanError(
            f"The checkpoint {what}.",
            where=checkpoint,
            found=_some(names),
            fix="pass the base and the checkpoint that belong together",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
