# mypy: disable-error-code="no-untyped-def"
"""The Triton code of `deadpan.models.kernels`, which gives it its tensors.

A program reads a row and keeps it in registers, `width` numbers wide, of which `columns` are the row's.
"""

import triton
import triton.language as tl


@triton.jit
def _keeps(place, seed, threshold):
    """Whether dropout keeps an element: the hash of `elementwise.dropped`."""
    bits = (place.to(tl.uint32) ^ tl.load(seed).to(tl.uint32)) * 2654435761
    bits = (bits ^ (bits >> 16)) * 2246822507
    bits = (bits ^ (bits >> 13)) * 3266489909
    bits = (bits ^ (bits >> 16)) & 0x7FFFFFFF
    return bits >= threshold


@triton.jit
def _dropped(value, row, columns, at, seed, threshold, factor):
    place = (row * columns + at).to(tl.int32)
    return tl.where(_keeps(place, seed, threshold), value * factor, 0.0)


@triton.jit
def _store_fp8(value, largest, to, at, inside, scales, row, limit):
    scale = tl.maximum(largest, 1e-12) / limit
    tl.store(scales + row, scale)
    tl.store(to + at, (value / scale).to(to.dtype.element_ty), inside)


@triton.jit
def _store_outputs(
    value,
    kept,
    quantised,
    scales,
    row,
    columns,
    at,
    inside,
    seed,
    threshold,
    factor,
    limit,
    drop: tl.constexpr,
    fp8: tl.constexpr,
):
    """What products read of a row beside itself: it after dropout, and in FP8."""
    start = row * columns
    if drop:
        masked = _dropped(value, row, columns, at, seed, threshold, factor)
        tl.store(kept + start + at, masked.to(kept.dtype.element_ty), inside)
    if fp8:
        largest = tl.max(tl.abs(value))
        _store_fp8(value, largest, quantised + start, at, inside, scales, row, limit)


@triton.jit
def norm_kernel(
    x,
    y,
    weight,
    total,
    out,
    kept,
    quantised,
    scales,
    seed,
    columns,
    eps,
    threshold,
    factor,
    limit,
    add: tl.constexpr,
    normalise: tl.constexpr,
    drop: tl.constexpr,
    fp8: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    start = row * columns
    value = tl.load(x + start + at, inside, 0.0).to(tl.float32)
    if add:
        value += tl.load(y + start + at, inside, 0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + at, rounded, inside)
        value = rounded.to(tl.float32)
    if normalise:
        value *= tl.rsqrt(tl.sum(value * value) / columns + eps)
        value = value.to(out.dtype.element_ty).to(tl.float32)
        value *= tl.load(weight + at, inside, 0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        tl.store(out + start + at, rounded, inside)
        value = rounded.to(tl.float32)
    _store_outputs(
        value,
        kept,
        quantised,
        scales,
        row,
        columns,
        at,
        inside,
        seed,
        threshold,
        factor,
        limit,
        drop,
        fp8,
    )


@triton.jit
def add_layer_norm_kernel(x, y, scale, weight, bias, total, out, columns, eps, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    start = row * columns
    value = tl.load(y + start + at, inside, 0.0).to(tl.float32)
    value *= tl.load(scale + at, inside, 0.0).to(tl.float32)
    value += tl.load(x + start + at, inside, 0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + start + at, rounded, inside)
    value = rounded.to(tl.float32)
    value = tl.where(inside, value - tl.sum(value) / columns, 0.0)
    value *= tl.rsqrt(tl.sum(value * value) / columns + eps)
    value *= tl.load(weight + at, inside, 0.0).to(tl.float32)
    value += tl.load(bias + at, inside, 0.0).to(tl.float32)
    tl.store(out + start + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def norm_backward_kernel(
    x,
    weight,
    grad,
    low,
    residual,
    total,
    quantised,
    scales,
    seed,
    columns,
    eps,
    threshold,
    factor,
    limit,
    masked: tl.constexpr,
    fp8: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    start = row * columns
    value = tl.load(x + start + at, inside, 0.0).to(tl.float32)
    g = tl.load(grad + start + at, inside, 0.0).to(tl.float32)
    if masked:
        part = tl.load(low + start + at, inside, 0.0).to(tl.float32)
        g += _dropped(part, row, columns, at, seed, threshold, factor)
    g *= tl.load(weight + at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / columns + eps)
    through = scale * (g - value * scale * scale * (tl.sum(g * value) / columns))
    through += tl.load(residual + start + at, inside, 0.0).to(tl.float32)
    rounded = through.to(total.dtype.element_ty)
    tl.store(total + start + at, rounded, inside)
    if fp8:
        value = rounded.to(tl.float32)
        largest = tl.max(tl.abs(value))
        _store_fp8(value, largest, quantised + start, at, inside, scales, row, limit)


@triton.jit
def add_dropped_kernel(x, y, out, seed, columns, threshold, factor, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    start = row * columns
    part = tl.load(y + start + at, inside, 0.0).to(tl.float32)
    value = tl.load(x + start + at, inside, 0.0).to(tl.float32)
    value += _dropped(part, row, columns, at, seed, threshold, factor)
    tl.store(out + start + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def rotate_kernel(
    qkv,
    cos,
    sin,
    slots,
    cache,
    stride,
    pairs,
    half,
    q_columns,
    k_columns,
    keep: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < pairs
    d = at % half
    place = (at // half) * 2 * half + d
    first = qkv + row * stride + place
    angle = row * 2 * half + d
    one = tl.load(first, inside, 0.0).to(tl.float32)
    two = tl.load(first + half, inside, 0.0).to(tl.float32)
    turned_one = one * tl.load(cos + angle).to(tl.float32)
    turned_one -= two * tl.load(sin + angle).to(tl.float32)
    turned_two = two * tl.load(cos + angle + half).to(tl.float32)
    turned_two += one * tl.load(sin + angle + half).to(tl.float32)
    tl.store(first, turned_one.to(qkv.dtype.element_ty), inside)
    tl.store(first + half, turned_two.to(qkv.dtype.element_ty), inside)
    if keep:
        keys = cache + tl.load(slots + row) * 2 * k_columns
        of_keys = inside & (place >= q_columns)
        to = keys + place - q_columns
        tl.store(to, turned_one.to(cache.dtype.element_ty), of_keys)
        tl.store(to + half, turned_two.to(cache.dtype.element_ty), of_keys)
        of_values = at < k_columns
        value = tl.load(qkv + row * stride + q_columns + k_columns + at, of_values, 0.0)
        tl.store(keys + k_columns + at, value.to(cache.dtype.element_ty), of_values)


@triton.jit
def _from_three(dq, dk, dv, row, at, in_q, in_k, in_v, q_columns, k_columns):
    """Numbers of a row of q, k and v side by side; in_q, in_k and in_v say whose each is."""
    q = tl.load(dq + row * q_columns + at, in_q, 0.0).to(tl.float32)
    k = tl.load(dk + row * k_columns + at - q_columns, in_k, 0.0).to(tl.float32)
    v = tl.load(dv + row * k_columns + at - q_columns - k_columns, in_v, 0.0).to(tl.float32)
    return q + k + v


@triton.jit
def rotate_back_kernel(
    dq,
    dk,
    dv,
    cos,
    sin,
    out,
    quantised,
    scales,
    q_columns,
    k_columns,
    half,
    limit,
    fp8: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    rotated = q_columns + k_columns
    columns = rotated + k_columns
    in_q, in_k = at < q_columns, (at >= q_columns) & (at < rotated)
    in_v = (at >= rotated) & (at < columns)
    d = at % (2 * half)
    other = tl.where(d < half, half, -half)
    angle = row * 2 * half + d
    own = _from_three(dq, dk, dv, row, at, in_q, in_k, in_v, q_columns, k_columns)
    theirs = _from_three(dq, dk, dv, row, at + other, in_q, in_k, in_v, q_columns, k_columns)
    turned = own * tl.load(cos + angle).to(tl.float32)
    across = theirs * tl.load(sin + angle + other).to(tl.float32)
    turned += tl.where(d < half, across, -across)
    rounded = tl.where(at < rotated, turned, own).to(out.dtype.element_ty)
    inside = at < columns
    start = row * columns
    tl.store(out + start + at, rounded, inside)
    if fp8:
        value = rounded.to(tl.float32)
        largest = tl.max(tl.abs(value))
        _store_fp8(value, largest, quantised + start, at, inside, scales, row, limit)


@triton.jit
def swiglu_kernel(
    gate_up,
    out,
    kept,
    quantised,
    scales,
    seed,
    columns,
    threshold,
    factor,
    limit,
    drop: tl.constexpr,
    fp8: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    wide = row * columns * 2 + at
    gate = tl.load(gate_up + wide, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + wide + columns, inside, 0.0).to(tl.float32)
    rounded = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row * columns + at, rounded, inside)
    _store_outputs(
        rounded.to(tl.float32),
        kept,
        quantised,
        scales,
        row,
        columns,
        at,
        inside,
        seed,
        threshold,
        factor,
        limit,
        drop,
        fp8,
    )


@triton.jit
def swiglu_backward_kernel(
    gate_up,
    grad,
    low,
    seed,
    both,
    product,
    quantised,
    scales,
    columns,
    threshold,
    factor,
    limit,
    masked: tl.constexpr,
    fp8: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    narrow = row * columns + at
    wide = row * columns * 2 + at
    gate = tl.load(gate_up + wide, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + wide + columns, inside, 0.0).to(tl.float32)
    g = tl.load(grad + narrow, inside, 0.0).to(tl.float32)
    if masked:
        part = tl.load(low + narrow, inside, 0.0).to(tl.float32)
        g += _dropped(part, row, columns, at, seed, threshold, factor)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    to_gate = (g * up * (sigmoid + silu * (1 - sigmoid))).to(both.dtype.element_ty)
    to_up = (g * silu).to(both.dtype.element_ty)
    tl.store(both + wide, to_gate, inside)
    tl.store(both + wide + columns, to_up, inside)
    out = silu * up
    if masked:
        out = _dropped(out, row, columns, at, seed, threshold, factor)
    tl.store(product + narrow, out.to(product.dtype.element_ty), inside)
    if fp8:
        one, two = to_gate.to(tl.float32), to_up.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(one)), tl.max(tl.abs(two)))
        start = quantised + row * columns * 2
        _store_fp8(one, largest, start, at, inside, scales, row, limit)
        _store_fp8(two, largest, start + columns, at, inside, scales, row, limit)
