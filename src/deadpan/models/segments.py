"""Attention over samples laid end to end in one row, as a forward and a backward pass of their own.

The position ids of the row say all there is to know. Where they start again at 0, another sample
starts. Where they fall back to p > 0, a further answer to the same picture starts: it continues the
first p tokens of its sample, the *prefix*, and sees these and itself, not the answers between. Five
answers to a picture so cost the picture's tokens once:

    token     <img> ... </img> Q  A1 A1 A1  A2 A2 A2
    position    0   ...   9    10 11 12 13  11 12 13

Attention to the prefix and to itself are computed apart and merged by their log-sum-exps:
out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i). The backward kernels need only the
merged `out` and `lse` to give each part's share of the gradients, as in ring attention (Liu et al.
2023, arXiv 2310.01889).
"""

import importlib.util
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Segments:
    """Where the samples of a row lie, and which of them continue another's prefix.

    Attributes:
        starts: Where stretches of consecutive positions begin, and the end: int32 of shape (stretch + 1).
        longest: The longest stretch.
        readers: The tokens of further answers, int64 of shape (reader), or None if there are none.
        reader_starts: Where each prefix's readers begin among `readers`, and their end: int32.
        most_readers: The most readers of a prefix.
        read: The tokens of the prefixes that are read, one prefix after the other, int64.
        read_starts: Where each prefix begins among `read`, and their end: int32.
        most_read: The longest prefix that is read.
        before: The token that each token continues, int64 of shape (token), on the CPU; -1 for a first one.
        samples: For each sample its first token and the token after its last, on the CPU.
    """

    starts: torch.Tensor
    longest: int
    readers: torch.Tensor | None
    reader_starts: torch.Tensor | None
    most_readers: int
    read: torch.Tensor | None
    read_starts: torch.Tensor | None
    most_read: int
    before: torch.Tensor
    samples: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, position_ids: torch.Tensor) -> "Segments":
        """Read a row's position ids.

        Args:
            position_ids: int64 of shape (token), on the CPU: reading them elsewhere would wait for the device.
        """
        jumps = position_ids.diff(prepend=position_ids[:1] - 2) != 1
        jumps |= position_ids == 0
        begins = jumps.nonzero().flatten().tolist()
        continued = position_ids[begins].tolist()
        count = len(position_ids)
        ends = [*begins[1:], count]
        # Of each sample: its first token, the length of its prefix, the tokens of further answers.
        samples: list[tuple[int, list[tuple[int, range]]]] = []
        for begin, end, length in zip(begins, ends, continued, strict=True):
            if length == 0:
                samples.append((begin, []))
            else:
                samples[-1][1].append((length, range(begin, end)))
        before = torch.arange(-1, count - 1)
        for first, answers in samples:
            before[first] = -1
            for length, tokens in answers:
                before[tokens.start] = first + length - 1
        readers: list[int] = []
        read: list[int] = []
        reader_starts, read_starts = [0], [0]
        for first, answers in samples:
            for length in sorted({length for length, _ in answers}):
                readers += [t for n, tokens in answers if n == length for t in tokens]
                read += range(first, first + length)
                reader_starts.append(len(readers))
                read_starts.append(len(read))
        firsts = [first for first, _ in samples]

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        def longest(starts: list[int]) -> int:
            return max((b - a for a, b in pairwise(starts)), default=0)

        return cls(
            starts=int32([*begins, count]),
            longest=longest([*begins, count]),
            readers=torch.tensor(readers) if readers else None,
            reader_starts=int32(reader_starts) if readers else None,
            most_readers=longest(reader_starts),
            read=torch.tensor(read) if readers else None,
            read_starts=int32(read_starts) if readers else None,
            most_read=longest(read_starts),
            before=before,
            samples=tuple(zip(firsts, [*firsts[1:], count], strict=True)),
        )

    def to(self, device: torch.device) -> "Segments":
        """The same with its tensors on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "before"
            and isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)


def has_flash(query: torch.Tensor) -> bool:
    """Whether PyTorch's flash kernels take this tensor's device and type."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


_FLASH_4_DIM = 128
"""The heads that FlashAttention 4 is trusted with. Its gradients for a small model's narrower ones were
wrong on an H100 (4.0.0b36: a cosine of 0.73 to 0.84 with the right ones), without a word."""


def _newer(query: torch.Tensor) -> Any:
    """FlashAttention 4 for a query (token, head, dim), or None where PyTorch's flash kernels are to be taken."""
    return _flash_4(query.device) if query.shape[-1] == _FLASH_4_DIM else None


@cache
def _flash_4(device: torch.device) -> Any:
    """FlashAttention 4, where it is installed and the GPU is one that it is written for, else None."""
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return None
    if not (importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")):
        return None
    from flash_attn.cute import interface

    return interface


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention within each sample.

    Args:
        q: Of shape (token, head, dim).
        k: Of shape (token, key head, dim); the number of heads is a multiple of its heads.
        v: The same.
        segments: Where the samples lie.
        positions: Their position ids, int64 of shape (token).

    Returns:
        The output, of shape (token, head, dim), and what the backward pass wants beside it: log-sum-exps,
        float32 of shape (head, token), where there is a flash kernel, else None.
    """
    if not has_flash(q):
        return _reference(q, k, v, segments, positions), None
    s, n = segments.starts, segments.longest
    out, lse = _flash(q, k, v, s, s, n, n, causal=True)
    if segments.readers is None:
        return out, lse
    readers, read = segments.readers, segments.read
    assert read is not None
    out_p, lse_p = _flash(
        q[readers],
        k[read],
        v[read],
        segments.reader_starts,
        segments.read_starts,
        segments.most_readers,
        segments.most_read,
        causal=False,
    )
    own = lse[:, readers]  # (head, reader)
    merged = torch.logaddexp(own, lse_p)
    weight = (lse_p - merged).exp().T[..., None]  # (reader, head, 1)
    mixed = torch.lerp(out[readers].float(), out_p.float(), weight)
    out[readers] = mixed.to(out.dtype)
    lse[:, readers] = merged
    return out, lse


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    segments: Segments,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients with respect to q, k and v; arguments as `attend` takes and gives them."""
    if lse is None:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            again = _reference(q, k, v, segments, positions)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), grad)
        return dq, dk, dv
    s, n = segments.starts, segments.longest
    dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, s, s, n, n, causal=True)
    if segments.readers is None:
        return dq, dk, dv
    readers, read = segments.readers, segments.read
    assert read is not None
    dq_p, dk_p, dv_p = _flash_backward(
        grad[readers],
        q[readers],
        k[read],
        v[read],
        out[readers],
        lse[:, readers].contiguous(),
        segments.reader_starts,
        segments.read_starts,
        segments.most_readers,
        segments.most_read,
        causal=False,
    )
    # A prefix's tokens are read once in each row, but for prefixes of different length of one sample.
    dq.index_add_(0, readers, dq_p)
    dk.index_add_(0, read, dk_p)
    dv.index_add_(0, read, dv_p)
    return dq, dk, dv


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if newer := _newer(q):
        out, lse, *_ = newer._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            causal=causal,
            return_lse=True,
        )
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, longest_q, longest_k, 0.0, causal, False
    )
    return out, lse


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if newer := _newer(q):
        dq, dk, dv, *_ = newer._flash_attn_bwd(
            q,
            k,
            v,
            out,
            grad,
            lse,
            causal=causal,
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
        )
        return dq, dk, dv
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the dropout's random state
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        0.0,
        causal,
        unused,
        unused,
    )


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, positions: torch.Tensor
) -> torch.Tensor:
    """The same, sample by sample, by PyTorch's scaled_dot_product_attention."""
    outs = []
    shared = segments.readers is not None
    for begin, end in segments.samples:
        one_q, one_k, one_v = (t[begin:end].transpose(0, 1)[None] for t in (q, k, v))
        mask = _visible(positions[begin:end]) if shared else None
        out = functional.scaled_dot_product_attention(
            one_q, one_k, one_v, attn_mask=mask, is_causal=not shared, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _visible(positions: torch.Tensor) -> torch.Tensor:
    """Which token (row) sees which (column) in a sample whose answers share a prefix; bool."""
    count = len(positions)
    at = torch.arange(count, device=positions.device)
    jumps = positions.diff(prepend=positions[:1] - 1) != 1
    stretch = jumps.cumsum(0)  # 0 for the first answer, which the prefix runs into
    # The prefix that a token continues is as long as the position at which its stretch begins.
    begin = torch.where(jumps | (at == 0), at, 0).cummax(0).values
    prefix = positions[begin]
    own = (stretch[:, None] == stretch[None]) & (at[:, None] >= at[None])
    of_prefix = (stretch[None] == 0) & (at[None] < prefix[:, None])
    return own | of_prefix
