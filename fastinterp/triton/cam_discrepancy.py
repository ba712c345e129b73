"""The distance between class activation maps as Triton kernels; no (N, K, P) map is ever stored.

    M[n,k,p] = sum_c head[k,c] (features[n,c,p] - features_adv[n,c,p]),  d[n,k] = ||M[n,k,:]||
    S[n,k,p] = e[n,k] sign(M) for l1, e[n,k] M / d[n,k] for l2           e: d loss / d distances

A tile of M lives in registers for as long as it takes to reduce it (forward) or to multiply S with
the head or the features (backward); the backward kernels compute their tiles of M anew. Features
are addressed as base + n * stride_n + c * stride_c + p * stride_p, which covers NCHW and
channels_last. Nothing is accumulated with atomics, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

# Tiles fit the register file: `python -m benchmarks.resources` shows no spills. One pipeline stage,
# because prefetched tiles of 64-bit addresses spill first; an explicit register limit, because
# ptxas otherwise spills a few bytes to fit one more block on a multiprocessor.
_OPTIONS = {"num_stages": 1, "maxnreg": 255}
_HEAD_PROGRAMS = 256  # enough for the device; fixed, so that results do not depend on it


# Below, sizes is (C, K, P), and strides those of features' channels and pixels, then of adv's.


@triton.jit
def _difference(features, adv, c, p, sizes, strides, acc: tl.constexpr):
    """features - adv at channels c and pixels p of one example, zero outside."""
    inside = (c < sizes[0])[:, None] & (p < sizes[2])[None, :]
    c = c.to(tl.int64)[:, None]
    p = p.to(tl.int64)[None, :]
    clean = tl.load(features + c * strides[0] + p * strides[1], inside, 0.0)
    return clean.to(acc) - tl.load(adv + c * strides[2] + p * strides[3], inside, 0.0).to(acc)


@triton.jit
def _head_tile(head, k, c, sizes):
    inside = (k < sizes[1])[:, None] & (c < sizes[0])[None, :]
    return tl.load(head + k.to(tl.int64)[:, None] * sizes[0] + c[None, :], inside, 0.0)


@triton.jit
def _class_maps(
    features, adv, head, k, p, sizes, strides, BLOCK_I: tl.constexpr, acc: tl.constexpr
):
    """M at classes k and pixels p of one example, zero outside."""
    if head is None:
        maps = _difference(features, adv, k, p, sizes, strides, acc)
    else:
        maps = tl.zeros([k.shape[0], p.shape[0]], acc)
        # M[k,p] += sum_i head[k,i] (features - features_adv)[i,p]
        for start in range(0, sizes[0], BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            w = _head_tile(head, k, i, sizes)
            x = _difference(features, adv, i, p, sizes, strides, acc)
            maps = tl.dot(w, x, maps, input_precision="ieee", out_dtype=acc)
    return maps


@triton.jit
def _slopes(maps, e, distances, k, classes, L1: tl.constexpr):
    """S from M; zero where the distance is zero. distances points at one example."""
    if L1:
        slopes = tl.where(maps > 0, e[:, None], tl.where(maps < 0, -e[:, None], 0.0))
    else:
        d = tl.load(distances + k, k < classes, 0.0)
        slopes = tl.where(d > 0, e / tl.where(d > 0, d, 1.0), 0.0)[:, None] * maps
    return slopes


@triton.jit
def _forward_kernel(
    features,  # (N, C, P), as adv
    adv,
    head,  # (K, C) or None; accumulation type, as all below
    class_weights,  # (N, K)
    discrepancy,  # (N,)
    distances,  # (N, K)
    channels,
    classes,
    pixels,
    f_n,
    f_c,
    f_p,
    a_n,
    a_c,
    a_p,
    L1: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # all classes are in this program: it also writes the discrepancy
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    acc: tl.constexpr = distances.dtype.element_ty
    sizes, strides = (channels, classes, pixels), (f_c, f_p, a_c, a_p)
    blocks = tl.cdiv(classes, BLOCK_K)
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    k = pid % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    features += n * f_n
    adv += n * a_n
    sums = tl.zeros([BLOCK_K], acc)
    # d[k] = sum_p |M[k,p]|, or sqrt(sum_p M[k,p]^2)
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        maps = _class_maps(features, adv, head, k, p, sizes, strides, BLOCK_I, acc)
        sums += tl.sum(tl.abs(maps) if L1 else maps * maps, 1)
    d = sums if L1 else tl.sqrt(sums)
    tl.store(distances + n * classes + k, d, k < classes)
    if ONE_BLOCK:
        q = tl.load(class_weights + n * classes + k, k < classes, 0.0)
        tl.store(discrepancy + n, tl.sum(tl.where(k < classes, q * d, 0.0), 0))


@triton.jit
def _total_kernel(class_weights, distances, discrepancy, classes, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], distances.dtype.element_ty)
    # D = sum_k class_weights[k] d[k]
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        q = tl.load(class_weights + n * classes + k, k < classes, 0.0)
        sums += q * tl.load(distances + n * classes + k, k < classes, 0.0)
    tl.store(discrepancy + n, tl.sum(sums, 0))


@triton.jit
def _features_kernel(
    class_grad,  # (N, K), accumulation type, as head and distances
    features,  # (N, C, P), as adv and out
    adv,
    head,  # (K, C) or None
    distances,  # (N, K)
    out,
    channels,
    classes,
    pixels,
    f_n,
    f_c,
    f_p,
    a_n,
    a_c,
    a_p,
    o_n,
    o_c,
    o_p,
    L1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    acc: tl.constexpr = distances.dtype.element_ty
    sizes, strides = (channels, classes, pixels), (f_c, f_p, a_c, a_p)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    p_blocks = tl.cdiv(pixels, BLOCK_P)
    pid = tl.program_id(0)
    n = (pid // (c_blocks * p_blocks)).to(tl.int64)
    c = pid // p_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pid % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    class_grad += n * classes
    distances += n * classes
    features += n * f_n
    adv += n * a_n
    if head is None:
        e = tl.load(class_grad + c, c < classes, 0.0)
        maps = _difference(features, adv, c, p, sizes, strides, acc)
        grad = _slopes(maps, e, distances, c, classes, L1)
    else:
        grad = tl.zeros([BLOCK_C, BLOCK_P], acc)
        # grad[c,p] = sum_k head[k,c] S[k,p], over the classes that have a gradient
        for start in range(0, classes, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            e = tl.load(class_grad + k, k < classes, 0.0)
            if tl.max((e != 0).to(tl.int32), 0) > 0:
                maps = _class_maps(features, adv, head, k, p, sizes, strides, BLOCK_I, acc)
                slopes = _slopes(maps, e, distances, k, classes, L1)
                w = tl.trans(_head_tile(head, k, c, sizes))
                grad = tl.dot(w, slopes, grad, input_precision="ieee", out_dtype=acc)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    out += n * o_n + c.to(tl.int64)[:, None] * o_c + p.to(tl.int64)[None, :] * o_p
    tl.store(out, (-grad).to(out.dtype.element_ty), inside)


@triton.jit
def _head_kernel(
    class_grad,  # (N, K), accumulation type, as head, distances and out
    features,  # (N, C, P), as adv
    adv,
    head,  # (K, C)
    distances,  # (N, K)
    out,  # (splits, K, C), partial sums over a range of examples and pixels each
    channels,
    classes,
    pixels,
    f_n,
    f_c,
    f_p,
    a_n,
    a_c,
    a_p,
    examples,
    splits,
    L1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    acc: tl.constexpr = distances.dtype.element_ty
    sizes, strides = (channels, classes, pixels), (f_c, f_p, a_c, a_p)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_blocks = tl.cdiv(classes, BLOCK_K)
    p_blocks = tl.cdiv(pixels, BLOCK_P)
    pid = tl.program_id(0)
    split = (pid // (c_blocks * k_blocks)).to(tl.int64)
    k = pid // c_blocks % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = pid % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    grad = tl.zeros([BLOCK_K, BLOCK_C], acc)
    # grad[k,c] = sum_{n,p} S[k,p] (features - features_adv)[c,p], one tile of (n, p) at a time;
    # a single loop over both keeps fewer addresses in registers than two nested ones.
    steps = examples * p_blocks
    begin = (split * steps // splits).to(tl.int32)
    end = ((split + 1) * steps // splits).to(tl.int32)
    for step in range(begin, end):
        n = (step // p_blocks).to(tl.int64)
        p = step % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        e = tl.load(class_grad + n * classes + k, k < classes, 0.0)
        if tl.max((e != 0).to(tl.int32), 0) > 0:
            f = features + n * f_n
            a = adv + n * a_n
            maps = _class_maps(f, a, head, k, p, sizes, strides, BLOCK_I, acc)
            slopes = _slopes(maps, e, distances + n * classes, k, classes, L1)
            x = tl.trans(_difference(f, a, c, p, sizes, strides, acc))
            grad = tl.dot(slopes, x, grad, input_precision="ieee", out_dtype=acc)
    inside = (k < classes)[:, None] & (c < channels)[None, :]
    row = split * classes + k.to(tl.int64)
    tl.store(out + row[:, None] * channels + c[None, :], grad, inside)


def _sizes(features, distances):
    """C, K, P."""
    height, width = features.shape[2:]
    return features.shape[1], distances.shape[1], height * width


def _strides(t):
    """Of examples, channels and pixels h * width + w."""
    return t.stride(0), t.stride(1), t.stride(3) if t.shape[3] > 1 else t.stride(2)


def _class_block(classes, large):
    return 16 if classes <= 16 else large


def _channel_block(channels, dtype):
    # M is computed once per block of channels, so large blocks save work.
    return 128 if channels <= 128 or dtype == torch.float64 else 256


def cam_discrepancy_forward(
    features, features_adv, head, class_weights, norm, discrepancy, distances
):
    """Fills D[n] = sum_k class_weights[n,k] d[n,k] and d.

    Args:
        features, features_adv: (N, C, h, w), same dtype, constant stride over the pixels.
        head: (K, C) or None (then K = C); contiguous float32 (float64 for float64 features), as
            all the tensors below.
        class_weights: (N, K).
        norm: "l1" or "l2".
        discrepancy: (N,), written.
        distances: (N, K), written.
    """
    examples, sizes = len(features), _sizes(features, distances)
    if 0 in (examples, *sizes):
        discrepancy.zero_()
        distances.zero_()
        return
    classes = sizes[1]
    block = _class_block(classes, large=64)
    blocks = triton.cdiv(classes, block)
    tensors = features, features_adv, head, class_weights, discrepancy, distances
    strides = *_strides(features), *_strides(features_adv)
    meta = {"L1": norm == "l1", "ONE_BLOCK": blocks == 1, "BLOCK_K": block}
    meta |= {"BLOCK_P": 64, "BLOCK_I": 16, "num_warps": 4, **_OPTIONS}
    with torch.cuda.device_of(features):  # Triton launches on the current device
        _forward_kernel[(examples * blocks,)](*tensors, *sizes, *strides, **meta)
        if blocks > 1:
            _total_kernel[(examples,)](class_weights, distances, discrepancy, classes, BLOCK=1024)


def cam_discrepancy_backward(
    class_grad, features, features_adv, head, distances, norm, grad_features_adv, grad_head
):
    """Fills the gradients of features_adv and of the head, either of which may be None.

    Args:
        class_grad: (N, K), d loss / d distances; contiguous float32 (float64 for float64
            features), as head, distances and grad_head.
        features, features_adv, head, norm: as in the forward pass.
        distances: (N, K), as the forward pass left them.
        grad_features_adv: like features in shape and dtype, written; that of features is its
            negative.
        grad_head: (K, C), written.
    """
    examples, sizes = len(features), _sizes(features, distances)
    if 0 in (examples, *sizes):
        for grad in (grad_features_adv, grad_head):
            if grad is not None:
                grad.zero_()
        return
    channels, classes, pixels = sizes
    block_k = _class_block(classes, large=32)
    block_c = _channel_block(channels, distances.dtype)
    c_blocks = triton.cdiv(channels, block_c)
    inputs = class_grad, features, features_adv, head, distances
    strides = *_strides(features), *_strides(features_adv)
    meta = {"L1": norm == "l1", "BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 8, **_OPTIONS}
    with torch.cuda.device_of(features):  # Triton launches on the current device
        if grad_features_adv is not None:
            block_p = 4096 // block_c
            grid = (examples * c_blocks * triton.cdiv(pixels, block_p),)
            strides_out = _strides(grad_features_adv)
            meta_out = {"BLOCK_P": block_p, "BLOCK_I": 32, **meta}
            _features_kernel[grid](
                *inputs, grad_features_adv, *sizes, *strides, *strides_out, **meta_out
            )
        if grad_head is not None:
            tiles = c_blocks * triton.cdiv(classes, block_k)
            steps = examples * triton.cdiv(pixels, 16)
            splits = min(steps, triton.cdiv(_HEAD_PROGRAMS, tiles))
            partial = grad_head if splits == 1 else grad_head.new_empty(splits, classes, channels)
            meta_out = {"BLOCK_P": 16, "BLOCK_I": 16, **meta}
            _head_kernel[(splits * tiles,)](
                *inputs, partial, *sizes, *strides, examples, splits, **meta_out
            )
            if splits > 1:
                torch.sum(partial, 0, out=grad_head)
