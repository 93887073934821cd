"""Build transformers' InternVL without weights, and fill in its parameters one at a time.

A model is built on the meta device and each parameter is put in place as it is read: peak memory is the model plus one
tensor, whatever the type on disk, and quantised layers never exist in full precision on the device.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel

from deadpan.models.attention import implementation


def build_empty(config: InternVLConfig, attention: str) -> InternVLForConditionalGeneration:
    """Build the model with its parameters on the meta device and its buffers real.

    Args:
        config: The configuration.
        attention: auto, eager, sdpa, flash or varlen.
    """
    config._attn_implementation = implementation(attention)
    with init_empty_weights(include_buffers=False):
        model = InternVLForConditionalGeneration(config)
    if model.model.language_model.rotary_emb.rope_type == "dynamic":
        model.model.language_model.register_forward_pre_hook(_forget_long_prompts, with_kwargs=True)
    return model.eval()


def _forget_long_prompts(
    language_model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Begin each new prompt with the rotation of a fresh model.

    Dynamic NTK scaling stretches the rotation for a prompt beyond max_position_embeddings, and
    transformers keeps it stretched for the next prompt unless that is shorter than the limit.
    """
    cache = kwargs.get("past_key_values")
    if cache is None or cache.get_seq_length() == 0:
        rotary = language_model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def put_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in place of a parameter, frozen; a layer that quantises itself does so here."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old = module._parameters[leaf]
    if type(old) is nn.Parameter:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        from deadpan.models.nf4 import quantised

        module._parameters[leaf] = quantised(tensor)


def checkpoint_layers(language_model: PreTrainedModel) -> None:
    """Recompute decoder layers in the backward pass instead of keeping their activations."""
    # transformers renamed the method in 5.2x and deprecated the old name.
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
