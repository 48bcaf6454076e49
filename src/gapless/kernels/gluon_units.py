"""Units of decode attention in Gluon, for programs of one warp: which one a program does, and the merge of the parts.

Entries are cut as by paged_decode's count_units. Letters as in attention/base.py; P heads of a group, L lanes, X
entries of a lane.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _plus(left, right):
    return left + right


@gluon.jit
def _sum(value_XL):
    return gl.sum(gl.sum(value_XL, axis=0), axis=0)


@gluon.jit
def find_unit(work, span, ENTRIES_TILE: gl.constexpr):
    """The span's (entry, table row, length, units of the entry, which of them), and how many spans there are.

    Lane L has every 32nd entry. Spans go through all entries of a lane, then through those of the next.
    """
    rows_E, kv_len_E, entries, wanted, min_span = work
    X: gl.constexpr = ENTRIES_TILE // 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([X, 1], [1, 32], [1, 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane_L = gl.arange(0, 32, layout=gl.SliceLayout(0, LAYOUT))
    entry_XL = gl.arange(0, X, layout=gl.SliceLayout(1, LAYOUT))[:, None] * 32 + lane_L[None, :]
    inside_XL = entry_XL < entries
    length_XL = gl.load(kv_len_E + entry_XL, mask=inside_XL, other=0)
    row_XL = gl.load(rows_E + entry_XL, mask=inside_XL, other=0)
    size = gl.maximum(gl.cdiv(_sum(length_XL), wanted), min_span)
    step = gl.maximum(gl.exp2(gl.floor(gl.log2(size.to(gl.float32))) - 3.0).to(gl.int32), 1)
    size = gl.cdiv(size, step) * step
    share = 1.0 / size.to(gl.float32)  # to divide every length would take most of the time
    units_XL = ((length_XL + size // 2).to(gl.float32) * share).to(gl.int32)
    units_XL = gl.where(inside_XL, gl.maximum(units_XL, 1), 0)
    units_L = gl.convert_layout(gl.sum(units_XL, axis=0), LANES)
    stop_L = gl.associative_scan(units_L, 0, _plus)
    before_L = gl.convert_layout(stop_L - units_L, gl.SliceLayout(0, LAYOUT))
    start_XL = before_L[None, :] + gl.associative_scan(units_XL, 0, _plus) - units_XL
    here_XL = (start_XL <= span) & (span < start_XL + units_XL)
    entry = _sum(gl.where(here_XL, entry_XL, 0))
    row = _sum(gl.where(here_XL, row_XL, 0))
    length = _sum(gl.where(here_XL, length_XL, 0))
    units = _sum(gl.where(here_XL, units_XL, 0))
    return entry, row, length, units, span - _sum(gl.where(here_XL, start_XL, 0)), gl.max(stop_L, axis=0)


@gluon.jit
def merge_parts(
    partial_UGD,
    partial_lse_UG,
    out_at,
    unit,
    units,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEADS: gl.constexpr,
    MERGE: gl.constexpr,
):
    """Write a group's heads. Units, each KV_HEADS after the one before, are taken in order, MERGE at a time."""
    LANES: gl.constexpr = HEAD_DIM // 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [1, 1], [1, 0])
    head_P = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LAYOUT))
    dim_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    at_PD = head_P[:, None] * HEAD_DIM + dim_D[None, :]
    inside_P = head_P < GROUP
    inside_PD = inside_P[:, None] & (dim_D >= 0)[None, :]
    largest_P = gl.full((HEADS,), -1.0e30, gl.float32, gl.SliceLayout(1, LAYOUT))
    total_P = gl.zeros((HEADS,), gl.float32, gl.SliceLayout(1, LAYOUT))
    sum_PD = gl.zeros((HEADS, HEAD_DIM), gl.float32, LAYOUT)
    for start in range(0, units, MERGE):
        parts, lses = (), ()
        for n in gl.static_range(MERGE):  # past L1: other multiprocessors wrote these
            used = start + n < units
            at = (unit + (start + n) * KV_HEADS).to(gl.int64) * GROUP
            lse_at = partial_lse_UG + at + head_P
            lses += (gl.load(lse_at, mask=used & inside_P, other=float("-inf"), cache_modifier=".cg"),)
            part_at = partial_UGD + at * HEAD_DIM + at_PD
            parts += (gl.load(part_at, mask=used & inside_PD, other=0.0, cache_modifier=".cg"),)
        new_P = largest_P
        for n in gl.static_range(MERGE):
            new_P = gl.maximum(new_P, lses[n])
        shrink_P = gl.exp2(largest_P - new_P)
        total_P *= shrink_P
        sum_PD *= shrink_P[:, None]
        for n in gl.static_range(MERGE):
            weight_P = gl.exp2(lses[n] - new_P)
            total_P += weight_P
            sum_PD += parts[n] * weight_P[:, None]
        largest_P = new_P
    mean_PD = sum_PD / gl.maximum(total_P, 1.0)[:, None]  # heads past GROUP weigh nothing
    gl.store(out_at + at_PD, mean_PD.to(out_at.dtype.element_ty), mask=inside_PD)
