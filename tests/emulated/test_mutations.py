"""Proof that the emulator works: kernels that are broken in one way each, and every one of them is caught.

All mutants are in one build of a copy of the sources, see emulated/mutants.py. The cases run on each mutant in its own
process.
"""

# ruff: noqa: E501 (a table reads better with one line per case)
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulated import mutants
from emulated.mutants import UNCHANGED, Mutation, Outcomes
from helpers.devices import emulated

SIGN, META, PLATFORM, SELF = (
    "kernels/sign_step.cuh",
    "kernels/meta_accumulate.cuh",
    "kernels/platform.cuh",
    "emulation/selftest.cuh",
)
CORES = "emulation/tensor_cores.cpp"
COMPACT = "kernels/compact_sign_step.cuh"
VECTORS, TABLES, MLP = "kernels/vectors.cuh", "kernels/tables.cuh", "kernels/mlp_meta_step.cuh"
SECOND = "kernels/mlp_second_order.cuh"
COMMON, FORWARD, BACK, WEIGHT, FIRST, HEAD, UPDATE = (
    f"kernels/conv_{name}.cuh" for name in ("common", "forward", "data_grad", "weight_grad", "first", "head", "update")
)
FRAGMENTS = "kernels/conv_fragments.cuh"
TANGENTS, BACKWARDS, RATES, SHARP = (
    f"kernels/conv_{name}.cuh" for name in ("tangents", "second_order", "rates", "sharpness")
)
CONV_PLAN, CONV_LAUNCH = "plan/conv_meta_step.h", "launch/conv_meta_step.cu"
BARRIER = "block_barrier();"

MUTATIONS = [
    # Each barrier deleted.
    Mutation("first barrier of block_sum", PLATFORM, f"    {BARRIER}  // every warp's", "    // every warp's", "race: |uninitialised: "),
    Mutation("last barrier of block_sum", PLATFORM, f"    {BARRIER}  // everyone has read", "    // everyone has read", "race: "),
    Mutation("barrier after the wait", SELF, f"{BARRIER}  // the slab of both", "// the slab of both", "race: |uninitialised: "),
    Mutation("barrier before the refill", SELF, f"{BARRIER}  // both warps have read", "// both warps have read", "race: "),
    Mutation("warp barrier after the wait", SELF, "warp_barrier();  // the copies", "// the copies", "race: |uninitialised: "),
    Mutation("warp barrier before the refill", SELF, "warp_barrier();  // all lanes", "// all lanes", "race: "),
    # A wait that does not cover the copy.
    Mutation("wait too short", SELF, "cp_async_wait<1>();", "cp_async_wait<2>();"),
    Mutation("no wait at the end", SELF, "cp_async_wait<0>();\n        }", "}"),
    Mutation("copy not committed", SELF, "        cp_async_commit();\n        cp_async_wait<0>();", "        cp_async_wait<0>();"),
    # A barrier or a warp operation that not all threads reach.
    Mutation("barrier for some", PLATFORM, f"    {BARRIER}  // every warp's", f"    if (threadIdx.x != 5) {BARRIER}  // every warp's", "divergence: |uninitialised: |race: "),
    Mutation("warp sum for some", SELF, "sum = block_sum(sum, scratch);", "if (threadIdx.x != 3) sum = block_sum(sum, scratch);", "divergence: "),
    Mutation("mma for some", SELF, "        mma_m16n8k8_tf32(", "        if (lane() < 31) mma_m16n8k8_tf32(", "divergence: "),
    # Shared memory.
    Mutation("scratch too small", SELF, "scratch(0, blockDim.x / 32)", "scratch(0, blockDim.x / 32 - 1)", "out of bounds: "),
    Mutation("stage index shifted", SELF, "const int stage = slab % 2;", "const int stage = slab % 2 + 1;", "out of bounds: |uninitialised: "),
    Mutation("all threads write the sum", PLATFORM, "if (lane() == 0) scratch.set", "scratch.set", "race: "),
    # Fragments.
    Mutation("tf32 a1 and a2 swapped", SELF, "(group + 8) * kTf32Depth + member)),\n            tf32_operand(a.get(of_a + group * kTf32Depth + member + 4)", "group * kTf32Depth + member + 4)),\n            tf32_operand(a.get(of_a + (group + 8) * kTf32Depth + member)"),
    Mutation("tf32 b0 and b1 swapped", SELF, "{\n            tf32_operand(b.get(of_b + member * kTf32Columns + first_column + group)),\n            tf32_operand(b.get(of_b + (member + 4)", "{\n            tf32_operand(b.get(of_b + (member + 4) * kTf32Columns + first_column + group)),\n            tf32_operand(b.get(of_b + (member)"),
    Mutation("d1 and d2 swapped", SELF, "store(c + member * 2 + 1, d[1]);\n    store(c + 8 * p.n + member * 2, d[2]);", "store(c + member * 2 + 1, d[2]);\n    store(c + 8 * p.n + member * 2, d[1]);"),
    Mutation("group and member swapped", SELF, "group = lane() / 4, member = lane() % 4;\n    const int first", "group = lane() % 8, member = lane() / 8;\n    const int first"),
    Mutation("ldmatrix rows shifted", SELF, "(lane() % 16) * 16 + lane() / 16 * 8", "(lane() % 8) * 16 + lane() / 16 * 8"),
    Mutation("ldmatrix halves swapped", SELF, "lane() / 16 * 8)", "(1 - lane() / 16) * 8)"),
    Mutation("bf16 pair swapped", SELF, "b.get(group * 16 + k)) |", "b.get(group * 16 + k + 1)) |"),
    Mutation("bf16 b0 and b1 swapped", SELF, "{pair(member * 2), pair(member * 2 + 8)}", "{pair(member * 2 + 8), pair(member * 2)}"),
    Mutation("shuffle level dropped", PLATFORM, "int distance = 16;", "int distance = 8;"),
    # How tensor cores sum.
    Mutation("terms not cut off", CORES, "return shift > -64 ? digits >> -shift : 0;", "return shift > -64 ? (digits + (std::uint64_t{1} << (-shift - 1))) >> -shift : 0;"),
    Mutation("sums rounded to nearest", CORES, "static_cast<double>(magnitude >> extra)", "static_cast<double>((magnitude + (extra > 0 ? std::uint64_t{1} << (extra - 1) : 0)) >> extra)"),
    Mutation("no extra bits", CORES, "largest - kMantissa - extra_bits", "largest - kMantissa"),
    Mutation("one extra bit too many", CORES, "largest - kMantissa - extra_bits", "largest - kMantissa - extra_bits - 1"),
    Mutation("all products at once", CORES, "k += products) sum = add_at_once(sum, a + k, b + k, products,", "k += depth) sum = add_at_once(sum, a + k, b + k, depth,"),
    Mutation("products one by one", CORES, "k += products) sum = add_at_once(sum, a + k, b + k, products,", "k += 1) sum = add_at_once(sum, a + k, b + k, 1,"),
    Mutation("the running sum not aligned with", CORES, "for (int k = 0; k <= count; ++k) {\n        if", "for (int k = 0; k < count; ++k) {\n        if"),
    Mutation("products normalised before", CORES, "x.exponent + y.exponent, 2 * kMantissa,", "x.exponent + y.exponent + (x.digits * y.digits >> (2 * kMantissa + 1) != 0 ? 1 : 0), 2 * kMantissa + (x.digits * y.digits >> (2 * kMantissa + 1) != 0 ? 1 : 0),"),
    # Indices and tails of the flat-buffer kernels.
    Mutation("head of a row dropped", SIGN, "if (threadIdx.x < span.head)", "if (false && threadIdx.x < span.head)"),
    Mutation("tail of a row dropped", SIGN, "if (tail < p.parameters)", "if (false && tail < p.parameters)"),
    Mutation("tail one too far", SIGN, "if (tail < p.parameters)", "if (tail <= p.parameters)"),
    Mutation("body one too far", SIGN, "if (body < span.bodies) {\n                    const std::int64_t at", "if (body <= span.bodies) {\n                    const std::int64_t at"),
    Mutation("last body dropped", SIGN, "if (body < span.bodies) {\n                    const std::int64_t column", "if (body + 1 < span.bodies) {\n                    const std::int64_t column"),
    Mutation("only the first tile", SIGN, "first += gridDim.x * kTile", "first += span.bodies"),
    Mutation("tiles of a block overlap", SIGN, "first + u * kBlock + threadIdx.x;\n                if (body < span.bodies) {\n                    const std::int64_t column", "first + u * (kBlock - 1) + threadIdx.x;\n                if (body < span.bodies) {\n                    const std::int64_t column"),
    Mutation("only one task a block", SIGN, "task += gridDim.y", "task += p.tasks"),
    Mutation("row of another task", SIGN, "const std::int64_t row = task * p.parameters;", "const std::int64_t row = task * (p.parameters - 1);"),
    Mutation("alignment ignored", VECTORS, "const std::int64_t to_boundary = (kVector - past) % kVector;", "const std::int64_t to_boundary = past * 0;", "misaligned"),
    Mutation("one body too many", VECTORS, "(length - head) / kVector", "(length - head + kVector - 1) / kVector"),
    Mutation("sign of zero", PLATFORM, "x + Scalar(0);", "Scalar(1);"),
    Mutation("sign of nan", PLATFORM, "std::abs(x) > Scalar(0) ?", "!(std::abs(x) <= Scalar(0)) ?"),
    Mutation("sign bit", PLATFORM, "x + Scalar(0);", "std::copysign(Scalar(1), x);"),
    Mutation("Inf not flagged", PLATFORM, "return !(x - x == Scalar(0));", "return x != x;"),
    Mutation("flag of another task", SIGN, "raise_flag(p.nonfinite + task)", "raise_flag(p.nonfinite + task / 2)"),
    Mutation("mask not looked at", SIGN, "if (!tables.looks_at(column + i)) continue;", ""),
    Mutation("segment search off by one", SIGN, "if (load(offsets + middle) <= column)", "if (load(offsets + middle) < column)"),
    Mutation("rate of the wrong column", SIGN, "rate = tables.lr(column + i);", "rate = tables.lr(column);"),
    Mutation("task of a sum dropped", META, "first += kUnroll) {\n        Vector", "first += kUnroll + 1) {\n        Vector"),
    Mutation("load past the last task", META, "counts[u] = task < p.tasks &&", "counts[u] = task <= p.tasks &&"),
    Mutation("flagged tasks count", META, "if (!counts[u]) continue;\n            ++live;", "++live;\n            if (!counts[u]) continue;"),
    Mutation("out replaced", META, "out.at[i] += sums", "out.at[i] = sums"),
    Mutation("last column dropped", META, "const std::int64_t singles = p.parameters - bodies * kVector;", "const std::int64_t singles = p.parameters - bodies * kVector - 1;"),
    Mutation("head counted twice", META, "single < head ? single : single + bodies * kVector", "single"),
    Mutation("flags of the last columns lost", META, "if (tail < p.parameters) nonfinite |=", "if (false) nonfinite |="),
    # Counts of sign steps.
    Mutation("head of a row of counts dropped", COMPACT, "if (threadIdx.x < span.head) {", "if (false && threadIdx.x < span.head) {"),
    Mutation("tail of a row of counts dropped", COMPACT, "if (tail < p.parameters)", "if (false && tail < p.parameters)"),
    Mutation("tail of counts one too far", COMPACT, "if (tail < p.parameters)", "if (tail <= p.parameters)"),
    Mutation("last body of counts dropped", COMPACT, "if (body < span.bodies) {\n                    nonfinite", "if (body + 1 < span.bodies) {\n                    nonfinite"),
    Mutation("only the first tile of counts", COMPACT, "first += gridDim.x * kTile", "first += span.bodies"),
    Mutation("counts of one task a block", COMPACT, "task += gridDim.y", "task += p.tasks"),
    Mutation("theta of the row", COMPACT, "load(p.theta + column + i)", "load(p.theta + column)"),
    Mutation("rate of a count's wrong column", COMPACT, "column + i : segments.low", "column : segments.low"),
    Mutation("segment of a count not sought", COMPACT, "segments.seek(p.segment_offsets, column + i);", ""),
    Mutation("count goes the wrong way", COMPACT, "(grad > Scalar(0) ? 1 : 0) - (grad < Scalar(0) ? 1 : 0)", "(grad < Scalar(0) ? 1 : 0) - (grad > Scalar(0) ? 1 : 0)"),
    Mutation("count of zero moves", COMPACT, "(grad > Scalar(0) ? 1 : 0)", "(grad >= Scalar(0) ? 1 : 0)"),
    Mutation("NaN gradient not counted", COMPACT, "&& grad == grad", ""),
    Mutation("NaN count forgotten", COMPACT, "count != kNanCount && grad == grad", "grad == grad"),
    Mutation("count ends early", COMPACT, "next <= 127", "next <= 126"),
    Mutation("NaN count taken for a number", COMPACT, "return count == kNanCount ? kNan<Scalar> : stepped", "return stepped"),
    Mutation("counts alone not flagged", COMPACT, "is_nonfinite(grads.at[i]) || counts.at[i] == kNanCount", "is_nonfinite(grads.at[i])"),
    Mutation("infinite gradient of a count not flagged", COMPACT, "is_nonfinite(grads.at[i]) || counts.at[i] == kNanCount", "counts.at[i] == kNanCount"),
    Mutation("counts not kept", COMPACT, "    store<std::int8_t, kVector>(p.counts + row + column, counts);\n", ""),
    # The multilayer perceptron.
    Mutation("barrier after the weights", MLP, "team.barrier();  // weights and", "// weights and", "race: |uninitialised: "),
    Mutation("barrier after a layer", MLP, "team.barrier();  // the layer is complete", "// the layer is complete", "race: |uninitialised: "),
    Mutation("barrier after the deltas", MLP, "team.barrier();  // all deltas", "// all deltas", "race: |uninitialised: "),
    Mutation("barrier before the weights move", MLP, "team.barrier();  // all have read", "// all have read", "race: |uninitialised: "),
    Mutation("barrier after the weights moved", MLP, "team.barrier();  // the delta above", "// the delta above", "race: |uninitialised: "),
    Mutation("barrier after the zeros", MLP, "team.barrier();  // the padding", "// the padding", "race: |uninitialised: "),
    Mutation("barrier after the examples", MLP, "team.barrier();  // the examples", "// the examples", "race: |uninitialised: "),
    Mutation("last inputs dropped", MLP, "for (int k = 0; k < inputs; k += kVector)", "for (int k = 0; k + kVector < inputs; k += kVector)"),
    Mutation("one vector too many", MLP, "for (int k = 0; k < inputs; k += kVector)", "for (int k = 0; k <= inputs + kVector; k += kVector)"),
    Mutation("last output dropped", MLP, "if (first_output + o * across < outputs)", "if (first_output + o * across + 1 < outputs)"),
    Mutation("rows beyond the last example", MLP, "                if (example >= count) break;\n", ""),
    Mutation("odd outputs left out of the delta", MLP, "for (; o < outputs; ++o) {", "for (; o + 1 < outputs; ++o) {"),
    Mutation("delta of the same example", MLP, "delta(layer + 1) + smaller_of(first_example + e * down, count - 1)", "delta(layer + 1) + smaller_of(first_example, count - 1)"),
    Mutation("last example left out of the gradient", MLP, "for (int example = 0; example < count; ++example) {\n                const Values right", "for (int example = 0; example + 1 < count; ++example) {\n                const Values right"),
    Mutation("rows of weights beyond the last output", MLP, "if (first + o >= outputs) break;", ""),
    Mutation("padding is not zero", MLP, "i < layout.size;", "i < layout.size / 2;"),
    Mutation("a lane's losses left out", MLP, "for (int i = lane(); i < count; i += 32)", "for (int i = lane(); i < smaller_of(count, 31); i += 32)"),
    Mutation("columns of the next row", TABLES, "column -= columns;", "column = 0;"),
    Mutation("ReLU at zero", MLP, "return value <= Scalar(0) ? Scalar(0) : gradient;", "return gradient;"),
    Mutation("activation after the last layer", MLP, "if (!last) activate(sums);", "activate(sums);"),
    Mutation("rate of the bias", MLP, "store(bias(layer) + o, taken<kStep>(load(bias(layer) + o), gradient, rate));", "store(bias(layer) + o, taken<kStep>(load(bias(layer) + o), gradient, rate * Scalar(1.001)));"),
    Mutation("loss not averaged", MLP, "sum(losses, set.count) / count;", "sum(losses, set.count);"),
    Mutation("task of another team", MLP, "task += gridDim.x", "task += 1"),
    Mutation("bias forgotten", MLP, "sums[e][o] = start;", "sums[e][o] = Scalar(0);"),
    Mutation("deltas swapped", MLP, "layout.delta[layer % 2]", "layout.delta[0]"),
    Mutation("share of the label", MLP, "o == label ? share - Scalar(1) : share", "share"),
    Mutation("padding of rows ignored", MLP, "store(weight(layer) + std::int64_t{o} * row(layer) + i, load(mine));", "store(weight(layer) + std::int64_t{o} * inputs + i, load(mine));"),
    # Steps that are differentiated.
    *(
        Mutation(f"barrier: {comment}", SECOND, f"team.barrier();  // {comment}", f"// {comment}", "race: |uninitialised: ")
        for comment in (
            "the padding of all rows",
            "weights and examples are there before they are copied",
            "the gradient is copied",
            "weights, examples and u are there",
            "the layer's tangents",
            "the output's tangents",
            "the deltas below are complete",
            "the meta-gradient is there",
        )
    ),
    Mutation("second order not cleared", SECOND, "clear(of_team + of_task, places.direction);", ""),
    Mutation("second order in the task's memory", SECOND, "places, of_team + of_task, of_maml};", "places, of_team, of_maml};"),
    Mutation("last parameters not copied", SECOND, "i < places.parameters;", "i < places.parameters - kVector;"),
    Mutation("parameters not kept", SECOND, "copy(path(step), parameters());", ""),
    Mutation("parameters of the first step", SECOND, "copy(parameters(), path(step));", "copy(parameters(), path(0));"),
    Mutation("steps in their order", SECOND, "differentiate_step(step);", "differentiate_step(p.steps - 1 - step);"),
    Mutation("query gradient given", SECOND, "copy(parameters(), gradient());", ""),
    Mutation("query examples in the sweep", SECOND, "        this->take_examples(p.support);\n        team.barrier();  // the gradient", "        team.barrier();  // the gradient"),
    Mutation("rates of the first step", SECOND, "return p.lr + step * rates_of_step();", "return p.lr;"),
    Mutation("bias aims at the weight's rate", SECOND, "this->rates_of_bias(layer, rates(step)), p.adapt", "this->rates_of_weight(layer, rates(step)), p.adapt"),
    Mutation("u is not scaled", SECOND, "load(rate + (p.how.rates.by_element ? std::int64_t{r} * columns + c : 0)) * load(gradient() + at)", "load(gradient() + at)"),
    Mutation("u of the bias left out", SECOND, "load(direction() + of_bias(layer) + output);", "Scalar(0);"),
    Mutation("tangents of the inputs left out", SECOND, "if (layer > 0) add_products(", "if (layer > 1) add_products("),
    Mutation("last inputs' tangents dropped", SECOND, "k < depth;", "k + kVector < depth;"),
    Mutation("last example's tangents dropped", SECOND, "if (example >= count || output", "if (example + 1 >= count || output"),
    Mutation("last output's tangents dropped", SECOND, "|| output >= outputs) continue;", "|| output + 1 >= outputs) continue;"),
    Mutation("tangents not through the activation", SECOND, "last ? sum : through_activation(sum, load(activation(layer + 1) + at))", "sum"),
    Mutation("output's tangents through an activation", SECOND, "last ? sum : through_activation(", "through_activation("),
    Mutation("tangent of the squared error", SECOND, "Scalar(2) * load(of_scores + o) / elements", "load(of_scores + o) / elements"),
    Mutation("mean tangent of the scores", SECOND, "(load(of_scores + o) - mean)", "load(of_scores + o)"),
    Mutation("last output's tangent left out", SECOND, "for (int o = 0; o < outputs; ++o) {\n                const Values of_weights", "for (int o = 0; o + 1 < outputs; ++o) {\n                const Values of_weights"),
    Mutation("u of the weights left out of the delta", SECOND, "Base::add_product(tangents[e], of_delta, of_directions);", ""),
    Mutation("delta's tangents of the same example", SECOND, "above[e] = smaller_of(first_example + e * down, count - 1)", "above[e] = smaller_of(first_example, count - 1)"),
    Mutation("delta's tangents beyond the last example", SECOND, "if (example >= count) continue;", ""),
    Mutation("half the curvature", SECOND, "Scalar(2) * value * of_values", "value * of_values"),
    Mutation("tangents of deltas swapped", SECOND, "places.deltas + layout.delta[layer % 2]", "places.deltas + layout.delta[0]"),
    Mutation("last example left out of H u", SECOND, "for (int example = 0; example < count; ++example) {\n                const std::int64_t above", "for (int example = 0; example + 1 < count; ++example) {\n                const std::int64_t above"),
    Mutation("tangents of the first layer left out of H u", SECOND, "if (layer == 0) continue;", "if (layer <= 1) continue;"),
    Mutation("H u beyond the last output", SECOND, "if (first + o >= outputs) break;", ""),
    Mutation("padding takes what is not finite", SECOND, "if (vector * kVector + v < inputs) values.at[v]", "values.at[v]"),
    Mutation("last example left out of the bias", SECOND, "for (int example = 0; example < count; ++example) {\n                sum +=", "for (int example = 0; example + 1 < count; ++example) {\n                sum +="),
    Mutation("overflow of a weight not seen", SECOND, "this->notice(values.at[v]);", ""),
    Mutation("overflow of a bias not seen", SECOND, "this->notice(corrected);", ""),
    # The convolutional networks: every barrier.
    *(
        Mutation(f"{Path(file).stem}: barrier where {comment[:40].strip()}", file, f"{BARRIER}  // {comment}", f"// {comment}", "race: |uninitialised: ")
        for file, comment in (
            (FORWARD, "all parts of the statistics are there"),
            (FORWARD, "BatchNorm's constants are there; all"),
            (FORWARD, "the tile and this tap's slab"),
            (FORWARD, "all warps' sums are there"),
            (FORWARD, "all warps' squares are there"),
            (BACK, "all parts of the layer's sums are there"),
            (BACK, "all have read the parts of the layer's sums"),
            (BACK, "all parts of the statistics below"),
            (BACK, "BatchNorm's constants are there; all"),
            (BACK, "the tile and this tap's slab"),
            (BACK, "all warps' sums are there"),
            (WEIGHT, "all have read the tile before"),
            (WEIGHT, "the tile is there"),
            (WEIGHT, "all have read the last tile"),
            (WEIGHT, "the other shares of the depth"),
            (FIRST, "the tile is there\n    const int warp"),
            (FIRST, "the shift is there; all"),
            (FIRST, "the tile is there\n        count +="),
            (FIRST, "weights and constants are there"),
            (FIRST, "the tile is there\n        // Neighbouring"),
            (FIRST, "the sums of all splits"),
            (FIRST, "all have read the tile before\n        stage"),
            (FIRST, "the tile is there\n        if (filter"),
            (FIRST, "the other warps' sums are there"),
            (FIRST, "the constants are there"),
            (HEAD, "all groups' sums are there"),
            (HEAD, "BatchNorm's constants are there"),
            (HEAD, "all features are there"),
            (UPDATE, "the means are there"),
            (UPDATE, "the covariance is there"),
            (UPDATE, "w_i (G w)_i are there"),
            (UPDATE, "sum dy and sum dy"),
            (UPDATE, "dgamma is there"),
            (UPDATE, "all gradients are there"),
            (UPDATE, "the weights have moved"),
        )
    ),
    Mutation("conv: weights of the tap before", FORWARD, "slab.load(tap + 1);", "slab.load(tap);"),
    Mutation("conv: slab of the tap before", BACK, "columns_at = at % 2 * Slab::kSize", "columns_at = (at + 1) % 2 * Slab::kSize"),
    Mutation("conv: a part of the slices", COMMON, "const int at = own.part * 3", "const int at = own.part % 2 * 3", "race: |uninitialised: "),
    Mutation("conv: slices of another part", COMMON, "own.channel, own.part, own.parts);", "own.channel, 0, own.parts);"),
    Mutation("conv: gradient sums of a part lost", BACK, "int part = 0; part < own.parts", "int part = 1; part < own.parts"),
    # Fragments.
    Mutation("conv: a1 and a2 swapped", FRAGMENTS, "get(e % 2, member + e / 2 * 4)", "get(e / 2, member + e % 2 * 4)"),
    Mutation("conv: b0 and b1 swapped", FRAGMENTS, "get(member + e * 4)", "get(member + (1 - e) * 4)"),
    Mutation("conv: halves of a row swapped", FORWARD, "rows[i] = lane() / 16 * 4;", "rows[i] = 4 - lane() / 16 * 4;"),
    Mutation("conv: halves of a column swapped", FRAGMENTS, "lane() / 8 % 2 * 4 +", "(1 - lane() / 8 % 2) * 4 +"),
    Mutation("conv: the next columns", FRAGMENTS, "kN > 1 ? 8 * kRow", "kN > 1 ? 0"),
    Mutation("conv: low halves of the rows dropped", FRAGMENTS, "mma_m16n8k8_tf32(of_step, rows.low, columns.high);\n", "\n"),
    Mutation("conv: low halves of the columns dropped", FRAGMENTS, "words.address(at + plane));\n#pragma", "words.address(at));\n#pragma"),
    Mutation("conv: words of a quad in bf16", FRAGMENTS, "pack_bf16(values.at[2], values.at[3])", "pack_bf16(values.at[3], values.at[2])"),
    Mutation("conv: weights of a word in bf16", FORWARD, "+ i * filters_", ""),
    Mutation("conv: low bits of a TF32 number", FRAGMENTS, "(bits_of(value) + kHalf) & kKept;", "bits_of(value) + kHalf;"),
    Mutation("conv: large sums in the tensor cores", FRAGMENTS, "mma_m16n8k8_tf32(of_step, rows.high, columns.high);", "mma_m16n8k8_tf32(sums, rows.high, columns.high);"),
    Mutation("conv: rows summed by half", FRAGMENTS, "distance = 4; distance < 32;", "distance = 4; distance < 16;"),
    Mutation("conv: d1 and d2 swapped", WEIGHT, "= sums[tap][j][half * 2 + e];", "= sums[tap][j][half + e * 2];"),
    # Indices and tails.
    Mutation("conv: last slice short", COMMON, "(slice + 1) * tiles.tiles_per_slice);", "(slice + 1) * tiles.tiles_per_slice - slice % 2);"),
    Mutation("conv: last row of a tile", COMMON, "y < place.height && x < place.width", "y + 1 < place.height && x < place.width"),
    Mutation("conv: last column too many", COMMON, "y < place.height && x < place.width", "y < place.height && x <= place.width"),
    Mutation("conv: window one to the right", COMMON, "place / 2 * block.width + place % 2", "place % 2 * block.width + place / 2"),
    Mutation("conv: last one wins a tie", COMMON, "return value > best || value != value;", "return value >= best || value != value;"),
    Mutation("conv: variance without the means' spread", COMMON, "all.squares += one.count * distance * distance;", "all.squares += 0.0f * distance;"),
    Mutation("conv: dropped row gets a gradient", COMMON, "window_y < block.act_height && window_x", "window_y <= block.act_height && window_x"),
    Mutation("conv: dense part forgotten", COMMON, "- xhat * norm.get(4 * filters + c)", ""),
    Mutation("conv: halo one too far", FORWARD, "- 1 + row, x = place.x * block.stride - 1 + column;\n        Vector<float, 4> values{};\n        if (image", "+ row, x = place.x * block.stride - 1 + column;\n        Vector<float, 4> values{};\n        if (image"),
    Mutation("conv: tail of channels", FORWARD, "chunk < products * chunks;", "chunk < products;"),
    Mutation("conv: activation not kept", FORWARD, "row <= tiles.tile_height * block.stride", "row < tiles.tile_height * block.stride"),
    Mutation("conv: tiles joined without weights", FORWARD, "mean += distance * of_tile / both;", "mean += distance / 2;"),
    Mutation("conv: tap flipped", BACK, "kStride == 1 ? 2 - tap_row :", "kStride == 1 ? tap_row :"),
    Mutation("conv: a tap of the other parity", BACK, "0x862071534ll", "0x862701534ll"),
    Mutation("conv: outputs of a stride", BACK, "tap / 3 == 0 ? 1 : 0", "tap / 3 == 2 ? 1 : 0"),
    Mutation("conv: columns of other warps", BACK, "first_own = share * kN * 8", "first_own = (kShares - 1 - share) * kN * 8"),
    Mutation("conv: sums of half the warps", BACK, "w < first + kTeam;", "w < first + kTeam / 2;"),
    Mutation("conv: part of dz not stored", BACK, "row < own_height", "row < own_height - 1"),
    Mutation("conv: shares of the depth", WEIGHT, "int k0 = warp / 2 * kDepth", "int k0 = kDepth"),
    Mutation("conv: a share of the depth lost", WEIGHT, "int share = 0; share + 1 < kConvDepthShares", "int share = 1; share + 1 < kConvDepthShares"),
    Mutation("conv: last positions dropped", WEIGHT, "k0 < used;", "k0 + kDepth <= used;"),
    Mutation("conv: second chunk of channels", WEIGHT, "blockIdx.z) / 3 % chunks * kConvChunk", "blockIdx.z) / 3 % chunks * 0"),
    Mutation("conv: shift not taken off", FIRST, "value - shift(channel)", "value"),
    Mutation("conv: last pair of values", FIRST, "work >= kTapPairs + kConvTaps;", "work + 1 >= kTapPairs + kConvTaps;"),
    Mutation("conv: a row of positions left out", FIRST, "y += kMomentSplits, carry()", "y += kMomentSplits + 1, carry()"),
    Mutation("conv: sums of a split lost", FIRST, "other + 1 < kMomentSplits", "other + 2 < kMomentSplits"),
    Mutation("conv: every other position", FIRST, "pair * 2 + item % 2", "pair * 2"),
    Mutation("conv: quotient too small", COMMON, "static_cast<std::uint32_t>(n), divisor.magic)", "static_cast<std::uint32_t>(n), divisor.magic - 1)"),
    Mutation("conv: NaN lost in the split", FRAGMENTS, "return {high, bits_of(value - float_of(high))};", "return {high, value == value ? bits_of(value - float_of(high)) : 0u};"),
    Mutation("conv: neighbours of a stride", WEIGHT, "column * block.stride * p.memory.row", "column * p.memory.row"),
    Mutation("conv: loser's patch", FIRST, "y = at.y * 2 + choice / 2 % 2", "y = at.y * 2"),
    Mutation("conv: sums of a warp lost", FIRST, "for (int w = 0; w + 1 < kWarps; ++w)", "for (int w = 1; w + 1 < kWarps; ++w)"),
    Mutation("conv: features in torch's order", HEAD, "i % filters * pixels() + i / filters : i", "i : i"),
    Mutation("conv: a wrong label unseen", HEAD, "label < 0 || label >= p.ways", "label < 0 || label > p.ways"),
    Mutation("conv: loss of the sum", HEAD, "block_sum(loss, scratch) / count", "block_sum(loss, scratch)"),
    Mutation("conv: rate of the bias", HEAD, "way, gradient, p.tensor + 1);", "way, gradient, p.tensor);"),
    Mutation("conv: centre not the mean", UPDATE, "sums.get(filter) * static_cast<float>(load(&moments->mean[i]));\n        const float inner", "0.0f;\n        const float inner"),
    Mutation("conv: constants of the weights before", UPDATE, "if (kTake == ConvTake::kMove && p.next_moments.base != nullptr)", "if (false && p.next_moments.base != nullptr)"),
    Mutation("conv: mask not looked at", UPDATE, "if (load(p.rule.adapt + tensor) == 0) return false;", ""),
    Mutation("conv: beta takes gamma's rate", UPDATE, "places.theta_beta + filter, tensor + 1, dbeta", "places.theta_beta + filter, tensor, dbeta"),
    Mutation("conv: a slice left out", COMMON, "for (int slice = 0; slice < slices; ++slice) sum +=", "for (int slice = 0; slice + (slices > 1) < slices; ++slice) sum +="),
    Mutation("conv: workspace of one task", CONV_PLAN, "at += tasks * array.stride;", "at += array.stride;"),
    # Their second order: every barrier, every term of the product rule, every place.
    *(
        Mutation(f"second: barrier where {comment[:40].strip()}", file, f"{BARRIER}  // {comment}", f"// {comment}", "race: |uninitialised: ")
        for file, comment in (
            (TANGENTS, "all have read the tile before"),
            (TANGENTS, "the tile is there"),
            (TANGENTS, "the constants are there\n}"),
            (TANGENTS, "the constants are there\n    const Stored"),
            (TANGENTS, "all threads' sums are there"),
            (BACKWARDS, "w._i (G w)_i are there"),
            (BACKWARDS, "the direction and the constants"),
            (BACKWARDS, "sum dy, sum dy (patch"),
            (BACKWARDS, "they are centred"),
            (BACKWARDS, "dgamma and dgamma. are there"),
            (BACKWARDS, "f. is there"),
            (BACKWARDS, "l. is there"),
            (BACKWARDS, "q. is there"),
        )
    ),
    Mutation("second: input of the first product", FORWARD, "Stored* input = second ?", "Stored* input = !second ?"),
    Mutation("second: weights of the first product", FORWARD, "row_of(p.second_weights, task)", "row_of(p.weights, task)"),
    Mutation("second: dz of the first product", BACK, "row_of(p.second_raw_grad, task)", "row_of(p.raw_grad, task)"),
    Mutation("second: dz and the first weights", BACK, "row_of(p.second_weights, task)", "row_of(p.weights, task)"),
    Mutation("second: patch of the first product", WEIGHT, "row_of(p.second_input, task)", "row_of(p.input, task)"),
    Mutation("second: patch and the first dz", WEIGHT, "second ? row_of(p.second_raw_grad, task)", "false ? row_of(p.second_raw_grad, task)"),
    Mutation("second: one product", BACK, "p.second_raw_grad.base == nullptr ? 1 : 2", "1"),
    Mutation("second: a step that moves again", HEAD, "p.pass == ConvPass::kStep || p.pass == ConvPass::kGradient", "p.pass != ConvPass::kForward"),
    Mutation("second: shares without the largest", HEAD, "image) * p.ways + way, share);", "image) * p.ways + way, share * sum);"),
    Mutation("second: the result is added to", UPDATE, "load(result) - gradient", "load(result) + gradient"),
    Mutation("second: block 1, the loser's patch", TANGENTS, "at.y * 2 + choice / 2 % 2", "at.y * 2 + choice % 2"),
    Mutation("second: block 1, mean.", TANGENTS, "(raw_tangent - mean_tangent)", "raw_tangent"),
    Mutation("second: block 1, r.", TANGENTS, "gamma * load(&tangent->stretch[filter])", "0.0f"),
    Mutation("second: block 1, beta.", TANGENTS, "(raw - mean) + beta_tangent", "(raw - mean)"),
    Mutation("second: block 1, ReLU", TANGENTS, "choice >= kConvActive ? value : 0.0f", "value"),
    Mutation("second: positions of all slices", TANGENTS, "std::int64_t{gridDim.x} * groups;", "groups;"),
    Mutation("second: row of a window", TANGENTS, "image * block.height + y * block.window", "image * block.height + y"),
    Mutation("second: winner's column", TANGENTS, "place / 2} * block.width + place % 2", "place / 2} * block.width"),
    Mutation("second: xhat. without r.", TANGENTS, " - xhat * stretch(channel)", ""),
    Mutation("second: mean of z.", TANGENTS, "sum_of_slices(sums, slices, 2 * filters) / count", "0.0f"),
    Mutation("second: sum of xhat z.", TANGENTS, "xhat * tangent.at[i];", "tangent.at[i];"),
    Mutation("second: sums of a group lost", TANGENTS, "for (int g = 0; g < groups; ++g) sum +=", "for (int g = 1; g < groups; ++g) sum +="),
    Mutation("second: y. without gamma.", TANGENTS, "xhat * norm.own(1, c) + ", ""),
    Mutation("second: y. without r.", TANGENTS, "gamma_tangent - gamma * stretch);\n        norm.memory.set(6", "gamma_tangent);\n        norm.memory.set(6"),
    Mutation("second: dgamma. without xhat.", TANGENTS, " + dy.at[i] * moved", ""),
    Mutation("second: dz. without gamma. r + gamma r.", TANGENTS, "norm.own(1, c) * inner + ", ""),
    Mutation("second: dz. without r.", TANGENTS, "inverse * (gamma_tangent - gamma * stretch)", "inverse * gamma_tangent"),
    Mutation("second: e. without dbeta.", TANGENTS, "dy_tangent.at[i] - norm.own(4, c)", "dy_tangent.at[i]"),
    Mutation("second: e. without xhat.", TANGENTS, "xhat_tangent * norm.own(3, c) + ", ""),
    Mutation("second: e. without dgamma.", TANGENTS, " + xhat * norm.own(5, c)", ""),
    Mutation("second: dropped row gets a gradient", TANGENTS, "window_y < block.act_height && window_x", "window_y <= block.act_height && window_x"),
    Mutation("second: a weight not kept", BACKWARDS, "store(kept + i, load(weights + i));", "if (i > 0) store(kept + i, load(weights + i));"),
    Mutation("second: weights of the first step", CONV_LAUNCH, "kept.base += one.step * conv_packed(plan_.network);", ""),
    Mutation("second: steps in their order", CONV_PLAN, "for (int step = request.steps - 1; step >= 0; --step) {", "for (int step = 0; step < request.steps; ++step) {"),
    Mutation("second: beta has gamma's rate", UPDATE, "(place >= block.beta ? 1 : 0)", "0"),
    Mutation("second: the classifier has its bias's rate", UPDATE, "return net.tensors - 2;", "return net.tensors - 1;"),
    Mutation("second: direction without rates", BACKWARDS, "rate * load(p.grads", "load(p.grads"),
    Mutation("second: what does not adapt has a direction", BACKWARDS, "if (load(p.rule.adapt + tensor) != 0) {", "if (true) {"),
    Mutation("second: r. of one r", BACKWARDS, "inverse * inverse * covariance", "inverse * covariance"),
    Mutation("second: mean. of the weights", BACKWARDS, "static_cast<double>(load(direction + i * filters + filter))", "static_cast<double>(load(weights + i * filters + filter))"),
    Mutation("second: block 1, sums not centred", BACKWARDS, " - tangents.get(filter) * mean", ""),
    Mutation("second: block 1, dgamma. without r.", BACKWARDS, "moved - own * load(&of_norm->stretch[filter])", "moved"),
    Mutation("second: block 1, dgamma. without B.", BACKWARDS, " + weight * tangents.get(at)", ""),
    Mutation("second: block 1, dW. without G W.", BACKWARDS, " * dense + dgamma * dense_tangent", " * dense"),
    Mutation("second: block 1, dW. without gamma.", BACKWARDS, "(gamma_tangent - gamma * stretch) * inner + ", ""),
    Mutation("second: block 1, dgamma. without its r.", BACKWARDS, "dgamma_tangent - dgamma * stretch", "dgamma_tangent"),
    Mutation("second: l. without V f.", BACKWARDS, "sum += load(features_tangent + row + i) * load(weights + way + i);", ""),
    Mutation("second: l. without c.", BACKWARDS, "sum + load(row_of(p.direction, task) + p.bias + item % p.ways)", "sum"),
    Mutation("second: q. of the sum", BACKWARDS, "* sum / count", "* sum"),
    Mutation("second: softmax without shares", BACKWARDS, "load(shares + first + way) * (", "("),
    Mutation("second: df. without V.", BACKWARDS, " + load(scores + score) * load(direction + at)", ""),
    Mutation("second: df. of the sum", BACKWARDS, "if (!flat) gradient /= pixels;", ""),
    Mutation("second: f. of the sum", BACKWARDS, "flat ? value : value / pixels", "value"),
    Mutation("second: dV. without f.", BACKWARDS, "product += load(scores + score) * load(features_tangent + feature);", ""),
    Mutation("second: classifier in the features' order", BACKWARDS, "i % p.filters * p.pixels + i / p.filters : i", "i : i"),
    Mutation("second: classifier not looked at", BACKWARDS, "nonfinite |= is_nonfinite(value);", ""),
    Mutation("second: blocks not looked at", BACKWARDS, "if (nonfinite) raise_flag(p.update.nonfinite + task);", ""),
    # Rates that learn or vary within a tensor.
    Mutation("steps: an element's rate of the first row", MLP, "load(lr + std::int64_t{first + o} * inputs + input)", "load(lr + input)"),
    Mutation("steps: a bias's element moves by the first one's rate", MLP, "(by_element ? o : 0)", "0"),
    Mutation("steps: a layer's rates are the first layer's", MLP, "for (int below = 0; below < layer; ++below) place +=", "for (int below = 0; below < 0; ++below) place +="),
    Mutation("steps: a bias's elements have the weight's rates", MLP, "rates_of_weight(layer, lr) + weights", "rates_of_weight(layer, lr)"),
    Mutation("steps: gradients kept as directions", MLP, "directions.at[v] = to_keep(gradient)", "directions.at[v] = gradient"),
    Mutation("steps: a bias's gradient kept as its direction", MLP, "(bias(layer) - weight(0)) + o, to_keep(gradient));", "(bias(layer) - weight(0)) + o, gradient);"),
    Mutation("steps: directions of one step kept", SECOND, "places.kept + step * places.parameters", "places.kept"),
    Mutation("steps: directions of the query pass kept", SECOND, "this->kept = nullptr;", ""),
    Mutation("steps: rates of the team's first task", SECOND, "(task * p.steps + step) * rates_of_step()", "step * rates_of_step()"),
    Mutation("steps: barrier behind the rates' gradients", SECOND, "team.barrier();  // all have read the gradient", "// all have read the gradient", "race: "),
    Mutation("steps: a rate's sign", SECOND, "store(to + tensor, -sum)", "store(to + tensor, sum)"),
    Mutation("steps: an element's rate's sign", SECOND, "moves ? -(load(v + at)", "moves ? (load(v + at)"),
    Mutation("steps: rates beside a bias", SECOND, "to += std::int64_t{outputs} * inputs;", "to += inputs;"),
    Mutation("steps: half of the warps make sums", SECOND, "if (tensor % warps != warp) return;", "if (tensor % warps != warp || warp > 0) return;"),
    Mutation("steps: an element's u by its row's first rate", SECOND, "std::int64_t{r} * columns + c : 0", "std::int64_t{r} * columns : 0"),
    Mutation("steps: conv, one warp of the rates' sums", RATES, "block_sum(sum, Shared<float>(0, kConvUpdateThreads / 32))", "warp_sum(sum)"),
    Mutation("steps: conv, a rate's sign", RATES, "tensor, -sum)", "tensor, sum)"),
    Mutation("steps: conv, an element's rate's sign", RATES, "moves ? -(load", "moves ? (load"),
    Mutation("steps: conv, rates of the first task", RATES, "p.rate_grads + task * p.row + step * net.tensors", "p.rate_grads + step * net.tensors"),
    Mutation("steps: conv, directions of the first step", RATES, "row_of(p.kept, task) + step * p.packed", "row_of(p.kept, task)"),
    Mutation("steps: conv, rates in the weights' order", RATES, "load(grads + theta_place(net, place)) * load", "load(grads + place) * load"),
    Mutation("steps: conv, an element's rate in the weights' order", RATES, "store(result + theta, moves", "store(result + place, moves"),
    Mutation("steps: conv, a bias has a gradient of its rate", RATES, "    return {0, 0};", "    return {block.gamma, block.beta};"),
    Mutation("steps: conv, gamma's rate has beta's gradient", RATES, "return {block.gamma, block.beta};\n    if", "return {block.beta, block.beta + net.filters};\n    if"),
    Mutation("steps: conv, an element moves by its tensor's rate", COMMON, "rule.by_element ? theta : tensor", "tensor"),
    Mutation("steps: conv, an element goes back by its tensor's rate", BACKWARDS, "p.rule.by_element ? theta : tensor", "tensor"),
    Mutation("steps: conv, gradients kept as directions", COMMON, "row_of(rule.kept, task) + place, direction", "row_of(rule.kept, task) + place, gradient"),
    Mutation("steps: conv, directions of a step overwritten", CONV_LAUNCH, "kept.base += step * conv_packed(plan_.network);", ""),
    Mutation("steps: conv, the classifier's elements in the features' order", HEAD, "(p.pass == ConvPass::kGradient || reads_theta_place(p.rule))", "p.pass == ConvPass::kGradient"),
    Mutation("steps: conv, rates' gradients from before the step", CONV_PLAN, "if (request.learns_rates()) add_rate_grads(step, 1);\n                add_differentiated(step);", "add_differentiated(step);\n                if (request.learns_rates()) add_rate_grads(step, 1);"),
    # Sharpness-aware steps, and steps that are counted.
    Mutation("steps: gradients not kept but directions", MLP, "kSteps == MlpSteps::kKept ? gradient : direction(gradient)", "direction(gradient)"),
    Mutation("steps: parameters move while gradients are kept", MLP, "if (kSteps == MlpSteps::kKept) return value;", ""),
    Mutation("steps: a step from the raised parameters", SECOND, "stepped(load(start() + place), rate, along)", "stepped(load(parameters() + place), rate, along)"),
    Mutation("steps: no start of a step", SECOND, "store(start() + place, value);", ""),
    Mutation("steps: barrier of the norm's sums", SECOND, "team.barrier();  // the sums are there; all", "// the sums are there; all", "race: |uninitialised: "),
    Mutation("steps: barrier of the raised parameters", SECOND, "team.barrier();  // the parameters have moved before", "// the parameters have moved before", "race: "),
    Mutation("steps: barrier of the moved parameters", SECOND, "team.barrier();  // the parameters have moved\n", "\n", "race: "),
    Mutation("steps: half of the norm's sums", SECOND, "sum < kMlpBlock; sum += team.size()", "sum < kMlpBlock / 2; sum += team.size()"),
    Mutation("steps: eps scaled once", SECOND, "sign(gradient) : scale * gradient)", "sign(gradient) : gradient)"),
    Mutation("steps: eps by the gradient", SECOND, "by_sign ? sign(gradient)", "by_sign ? gradient"),
    Mutation("steps: eps downwards", SECOND, "value + factor * (scale", "value - factor * (scale"),
    Mutation("steps: squares of the gradient", SECOND, "ascent_scale(load(parameters() + place)) * load(ascent() + place)", "load(ascent() + place)"),
    Mutation("steps: gradients of what does not adapt", SECOND, "clear(of_team + of_task + places.kept, places.start - places.kept);", "clear(of_team + of_task + places.kept, places.ascent - places.kept);"),
    Mutation("steps: one gradient a step", SECOND, "bool looks = kKeeps && climbs();\n#", "bool looks = false;\n#"),
    Mutation("steps: counts go on with the next task", SECOND, "store(counts() + place, Scalar(0));", ""),
    Mutation("steps: the last step alone counts", SECOND, "stepped(load(p.theta + theta), rate, counted)", "stepped(load(p.theta + theta), rate, along)"),
    Mutation("steps: a count is not kept", SECOND, "store(counts() + place, counted);", ""),
    Mutation("steps: counts in padded rows", SECOND, "p.counts + task * p.parameters + theta,", "p.counts + task * p.parameters + place,"),
    Mutation("steps: an element moves by its tensor's rate", SECOND, "p.how.rates.by_element ? theta : tensor", "tensor"),
    Mutation("steps: directions of such a step not kept", SECOND, "if (p.how.rates.learnable) store(directions(step) + place, along);", ""),
    Mutation("steps: conv, one warp of the norm's sums", SHARP, "block_sum(sum, Shared<double>(0, kConvUpdateThreads / 32))", "warp_sum(sum)"),
    Mutation("steps: conv, norm of what does not adapt", SHARP, "if (load(p.adapt + theta_tensor(p.network, place)) == 0) continue;", ""),
    Mutation("steps: conv, norm of one slice", SHARP, "slice < p.slices;", "slice < 1;"),
    Mutation("steps: conv, norm of the first task", SHARP, "load(row_of(p.squares, task) + slice)", "load(row_of(p.squares, 0) + slice)"),
    Mutation("steps: conv, squares of the gradient", SHARP, "const double scaled = scale * static_cast", "const double scaled = static_cast"),
    Mutation("steps: conv, eps scaled once", SHARP, "sign(of_gradient) : scale * of_gradient", "sign(of_gradient) : of_gradient"),
    Mutation("steps: conv, eps by the gradient", SHARP, "by_sign ? sign(of_gradient)", "by_sign ? of_gradient"),
    Mutation("steps: conv, eps downwards", SHARP, "weight + eps);", "weight - eps);"),
    Mutation("steps: conv, eps of what does not adapt", SHARP, "if (load(p.adapt + theta_tensor(net, place)) != 0) {", "if (true) {"),
    Mutation("steps: conv, barrier of the raised weights", SHARP, f"{BARRIER}  // the raised weights", "// the raised weights", "race: |uninitialised: "),
    Mutation("steps: conv, constants where the step starts", SHARP, "raised + first.weight, net.channels", "weights + first.weight, net.channels"),
    Mutation("steps: conv, passes where the step starts", CONV_LAUNCH, "if (one.part == ConvPart::kRaised) return array<float>(plan_.workspace.raised);", ""),
    Mutation("steps: conv, loss at the raised weights", CONV_LAUNCH, "if (one.part == ConvPart::kRaised) params.loss = nullptr;", ""),
    Mutation("steps: conv, climbs by signs", CONV_LAUNCH, "rule.by_element = p_.how.rates.by_element;", "rule.by_element = p_.how.rates.by_element; rule.by_sign = p_.method == Method::kSignMaml;"),
    Mutation("steps: conv, no climb", CONV_PLAN, "                add_climb(step);", ""),
    Mutation("steps: conv, counts downwards", COMMON, "load(count) + direction", "load(count) - direction"),
    Mutation("steps: conv, a count is not kept", COMMON, "store(count, counted);", ""),
    Mutation("steps: conv, the last step alone counts", COMMON, "stepped(load(rule.theta + theta), rate, counted)", "stepped(load(rule.theta + theta), rate, direction)"),
    Mutation("steps: conv, theta in the weights' order", COMMON, "load(rule.theta + theta)", "load(rule.theta + place)"),
    Mutation("steps: conv, the classifier counts in the features' order", COMMON, "return rule.by_element || rule.counts.base != nullptr;", "return rule.by_element;"),
    Mutation("steps: conv, counts not cleared", UPDATE, "if (p.counts.base != nullptr) store(row_of(p.counts, task) + i, 0.0f);", ""),
]  # fmt: skip


NUMBERS = {mutation.name: number for number, mutation in enumerate(MUTATIONS, 1)}


def group_of(mutation: Mutation) -> str:
    if mutation.file == CORES:
        return "sums"
    if mutation.name.startswith(("second: ", "steps: ")):
        return mutation.name.partition(":")[0]
    return "conv" if "conv_" in mutation.file else "flat"


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Iterator[Outcomes]:
    """Outcomes of the mutants that this session's tests ask for."""
    folder = tmp_path_factory.mktemp("mutations")
    emulated.copy_sources(folder / "source")
    mutants.write(folder / "source", MUTATIONS)
    emulated.configure(folder / "source", folder / "build", "SIGNMAML_EMULATED_COUNTS=OFF", flags="-O0")
    module = emulated.compile_module(folder / "build")
    chosen = mutants.chosen_of(request.session.items, __file__, NUMBERS, group_of)
    found = Outcomes(module, "emulated_cases", chosen)
    yield found
    found.close()


def test_names_are_unique():
    assert len(NUMBERS) == len(MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}))
def test_every_variant_is_the_mutant(file):
    text = (emulated.ROOT / "csrc" / file).read_text()
    of_file = {NUMBERS[mutation.name]: mutation for mutation in MUTATIONS if mutation.file == file}
    mutants.assert_every_variant_is_the_mutant(text, of_file)


def test_a_place_that_no_switch_fits_is_refused():
    declaration = "int f() {\n    int one = 1;\n    return one;\n}\n"
    whole = Mutation("a type", "", "int one", "long one")
    switch = mutants.combine(declaration, {1: whole})
    assert "{ if (mutant(1)) { long one = 1; } else { int one = 1; } }" in switch, "which the compiler refuses"
    with pytest.raises(AssertionError, match="neither an expression nor statements"):
        mutants.combine("int f() { return g(1); }\n", {1: Mutation("a bracket", "", "g(1);", "g(1); }")})
    with pytest.raises(AssertionError, match="holds 2 of"):
        mutants.combine("int a = 1; int b = 1;", {1: Mutation("twice", "", "= 1", "= 2")})


@pytest.mark.slow
@pytest.mark.parametrize("group", ["flat", "conv", "second", "steps", "sums"])
def test_unchanged_sources_pass(outcomes, group):
    outcome = outcomes[UNCHANGED, group]
    assert outcome.code == 0, outcome.said[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutant_is_caught(outcomes, mutation):
    outcome = outcomes[NUMBERS[mutation.name], group_of(mutation)]
    outcome.assert_caught()
    assert re.search(mutation.message, outcome.report), outcome.report
    if mutation.message:
        assert re.search(r"block \d+, thread \d+", outcome.report), outcome.report
