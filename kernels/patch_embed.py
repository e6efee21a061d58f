"""Image to block input in one launch: normalise, gather patches, project, add positions; the prefix rows as well.

Patches go from the image straight into the product's operand. A step of the product takes whole pixel rows of one
channel, each padded to a power of two: 14 pixels read as 16 keep their row's alignment, so that two fp16 pixels come in
one load, and need no division by 14 (K = 3·14·16 = 672 instead of 588, masked). One step has one channel, whose
normalisation is two scalars. Needs tensor cores: sm_80 and newer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, uint8

from radio_fast.kernels.configs import Case, patch_embed_config, precision_of
from radio_fast.kernels.dot import dot


@triton.jit(do_not_specialize=["M", "T", "P", "GRID_W", "PREFIX_ROWS"])
def _patch_embed_kernel(
    image_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    prefix_ptr,
    mean_ptr,
    std_ptr,
    rows_ptr,
    starts_ptr,
    out_ptr,
    M,
    T,
    P,
    GRID_W,
    PREFIX_ROWS,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    D: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONDITIONER: tl.constexpr,
    IS_UINT8: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M of the M = B·T patches, or of the B·P prefix rows behind them; BLOCK_N of D channels.

    PACKED: M images of one patch each; rows (2, M) has their rows in pos and out, starts the images' first ones in out.
    """
    # Channels run fastest: programs that run together share patches, which then come from L2.
    num_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // num_n
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < D

    num_m = tl.cdiv(M, BLOCK_M)
    if tile_m >= num_m:
        offs_r = (tile_m - num_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_r < PREFIX_ROWS)[:, None] & mask_n[None, :]
        prefix = tl.load(prefix_ptr + (offs_r % P)[:, None] * D + offs_n[None, :], mask=mask)
        if PACKED:
            rows = tl.load(starts_ptr + offs_r // P, mask=offs_r < PREFIX_ROWS, other=0).to(tl.int64) + offs_r % P
        else:
            rows = (offs_r // P).to(tl.int64) * (P + T) + offs_r % P
        tl.store(out_ptr + rows[:, None] * D + offs_n[None, :], prefix, mask=mask)
        return

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    image = (offs_m // T).to(tl.int64)
    patch = offs_m % T
    y = (patch // GRID_W * PATCH).to(tl.int64)
    x = (patch % GRID_W * PATCH).to(tl.int64)
    patch_ptrs = image_ptr + (image * stride_ib + y * stride_ih + x * stride_iw)[:, None]

    # (v/unit − mean)/std as (v − mean·unit) · 1/(std·unit): with RADIO's mean and std, each of the 256 pixel values is
    # rounded to fp16 and bf16 as the reference rounds it. One fma, v · gain + shift, would round one of them otherwise.
    UNIT: tl.constexpr = 255.0 if IS_UINT8 else 1.0
    if HAS_CONDITIONER:
        mean_0, gain_0 = tl.load(mean_ptr) * UNIT, tl.div_rn(1.0, tl.load(std_ptr) * UNIT)
        mean_1, gain_1 = tl.load(mean_ptr + 1) * UNIT, tl.div_rn(1.0, tl.load(std_ptr + 1) * UNIT)
        mean_2, gain_2 = tl.load(mean_ptr + 2) * UNIT, tl.div_rn(1.0, tl.load(std_ptr + 2) * UNIT)

    BLOCK_K: tl.constexpr = BLOCK_ROWS * BLOCK_P
    STEPS: tl.constexpr = (PATCH + BLOCK_ROWS - 1) // BLOCK_ROWS  # of each channel
    offs_k = tl.arange(0, BLOCK_K)
    col = offs_k % BLOCK_P
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(3 * STEPS):
        channel = step // STEPS
        row = step % STEPS * BLOCK_ROWS + offs_k // BLOCK_P
        mask_k = (row < PATCH) & (col < PATCH)
        pixels = channel * stride_ic + row.to(tl.int64) * stride_ih + col * stride_iw
        a = tl.load(patch_ptrs + pixels[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0)
        k = channel * (PATCH * PATCH) + row * PATCH + col
        weight_ptrs = weight_ptr + offs_n[None, :] * (3 * PATCH * PATCH) + k[:, None]
        weight = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        a = a.to(tl.float32)
        if HAS_CONDITIONER:  # a masked pixel becomes −mean/std, and meets a weight of 0
            mean = tl.where(channel == 0, mean_0, tl.where(channel == 1, mean_1, mean_2))
            gain = tl.where(channel == 0, gain_0, tl.where(channel == 1, gain_1, gain_2))
            a = (a - mean) * gain
        elif IS_UINT8:
            a *= 1 / 255
        acc = dot(a.to(weight_ptr.dtype.element_ty), weight, acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if PACKED:
        patch = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
    acc += tl.load(pos_ptr + patch.to(tl.int64)[:, None] * D + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    rows = image * (P + T) + P + patch
    if PACKED:
        rows = tl.load(rows_ptr + M + offs_m, mask=mask_m, other=0).to(tl.int64)
    tl.store(out_ptr + rows[:, None] * D + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    prefix: Tensor,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    sm: int,
) -> Tensor:
    """out[:, :P] = prefix;  out[:, P:] = patches((image − mean) / std) · weightᵀ + bias + pos.

    image: (B, 3, H, W), any strides, uint8 (÷ 255), float16, bfloat16 or float32. weight (D, 3·p·p), bias (D), pos
    (T, D), prefix (P, D): float16, bfloat16 or float32. mean, std: 3 float32 values. → (B, P + T, D) in weight's dtype.
    Normalised in float32 and rounded to weight's dtype; accumulated in float32, rounded once after bias and pos.

    Packed: image (M, 3, p, p), the patches of several images; rows (2, M), int32, each patch's row in pos (any, D) and
    in the result; starts (images + 1,), int32, the images' first rows there. → (M + images·P, D).
    """
    B, width = image.shape[0], image.shape[3]
    D, T, P = weight.shape[0], pos.shape[0], prefix.shape[0]
    if rows is None:
        prefix_rows = B * P
        out = weight.new_empty((B, P + T, D))
    else:
        T, prefix_rows = 1, (starts.shape[0] - 1) * P
        rows, starts = rows.contiguous(), starts.contiguous()
        out = weight.new_empty((B + prefix_rows, D))
    if out.numel() > 0:
        sizes = weight.element_size(), image.element_size()
        config = patch_embed_config(sm, *sizes, patch_size, B * T, image.stride(3))
        tiles_m = triton.cdiv(B * T, config["BLOCK_M"]) + triton.cdiv(prefix_rows, config["BLOCK_M"])
        _patch_embed_kernel[(tiles_m * triton.cdiv(D, config["BLOCK_N"]),)](
            image,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            pos.contiguous(),
            prefix.contiguous(),
            None if mean is None else mean.contiguous(),
            None if std is None else std.contiguous(),
            rows,
            starts,
            out,
            B * T,
            T,
            P,
            width // patch_size,
            prefix_rows,
            *image.stride(),
            D=D,
            PATCH=patch_size,
            HAS_BIAS=bias is not None,
            HAS_CONDITIONER=mean is not None,
            IS_UINT8=image.dtype == uint8,
            PACKED=rows is not None,
            PRECISION=precision_of(weight.element_size()),
            **config,
        )
    return out


def compile_cases(sm: int) -> list[Case]:
    """Every tile of the table: p = 16 and 14; images in uint8, the model's dtype and float32; channels last; packed."""
    cases = []
    for dtype, size in {"fp16": 2, "bf16": 2, "fp32": 4}.items():
        images = [(16, "u8", ""), (14, "fp32", ""), (16, "u8", "packed")]
        if dtype == "fp16":
            images += [(16, "fp16", ""), (14, "fp16", ""), (16, "fp32", ""), (14, "u8", ""), (14, "fp32", "packed")]
        images = [(M, *image) for M in ((196, 16 * 1024) if size == 2 else (196,)) for image in images]
        for M, p, image_dtype, layout in [*images, (196, 16, "u8", "nhwc"), (196, 14, "fp32", "nhwc")]:
            nhwc, packed = layout == "nhwc", layout == "packed"
            image_size = {"u8": 1, "fp16": 2, "fp32": 4}[image_dtype]
            config = patch_embed_config(sm, size, image_size, p, M, 3 if nhwc else 1)
            num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
            uint8_image = image_dtype == "u8"
            D, pointer = 1280, f"*{dtype}"
            names = ("weight_ptr", "bias_ptr", "pos_ptr", "prefix_ptr", "out_ptr")
            signature = {"image_ptr": f"*{image_dtype}"} | dict.fromkeys(names, pointer)
            signature |= {"mean_ptr": "*fp32", "std_ptr": "*fp32"}
            signature |= dict.fromkeys(("M", "T", "P", "GRID_W", "PREFIX_ROWS"), "i32")
            signature |= dict.fromkeys(("stride_ib", "stride_ih", "stride_iw" if nhwc else "stride_ic"), "i32")
            flags = {"HAS_BIAS": True, "HAS_CONDITIONER": True, "IS_UINT8": uint8_image, "PACKED": packed}
            constexprs = {"D": D, "PATCH": p, "PRECISION": precision_of(size)} | config | flags
            if packed:
                signature |= dict.fromkeys(("rows_ptr", "starts_ptr"), "*i32")
            else:
                constexprs |= dict.fromkeys(("rows_ptr", "starts_ptr"))
            constexprs["stride_ic" if nhwc else "stride_iw"] = 1  # Triton makes a stride of 1 a constant
            macs = config["BLOCK_M"] * config["BLOCK_N"] * config["BLOCK_ROWS"] * config["BLOCK_P"]
            label = f"{dtype} p={p} {image_dtype}{layout and ' '}{layout} M={M}"
            case = Case("patch_embed", label, _patch_embed_kernel, signature, constexprs, num_warps, num_stages, macs)
            cases.append(case)
    return cases
