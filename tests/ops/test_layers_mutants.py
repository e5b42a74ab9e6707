"""Proof that the cases of programs of layers see what they should: stages that are broken in one way each.

All mutants are in one build of a copy of the sources, see emulated/mutants.py. It has one instruction set, which is
enough: the sources are the same for all.
"""

# ruff: noqa: E501 (a table reads better with one line per case)
from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulated import mutants
from emulated.mutants import UNCHANGED, Mutation, Outcomes
from helpers.cases.layers_cases import GROUPS
from helpers.devices import emulated
from signmaml_ext._loader import C

FOLDER = "cpu/isa/layers"
ACTIVATIONS, CONVOLUTION, LINEAR, TAIL, TANGENTS, PASSES, HESSIAN = (
    f"{FOLDER}/{name}.h"
    for name in ("activations", "convolution", "linear", "tail", "tail_tangents", "passes", "hessian")
)
COURSE, WINOGRAD = "cpu/layers_pass.cpp", "cpu/isa/conv/winograd.h"
PLACES = f"{FOLDER}/places.h"
LEFT_OUT = ""

MUTATIONS = [
    # The loss.
    Mutation("a gradient of the sum", COURSE, "grads[label] = share_ * (", "grads[label] = ("),
    Mutation("no label", COURSE, "/ sum - Scalar(1)", "/ sum"),
    Mutation("squares of one output", COURSE, "static_cast<Scalar>(labels_ != nullptr ? count_ : count_ * outputs_)", "static_cast<Scalar>(count_)"),
    Mutation("half of the squares' gradient", COURSE, "Scalar(2) * difference", "difference"),
    Mutation("examples of the first task", COURSE, "            t_.x = p_.x + (task * p_.count + first) * features;", "            t_.x = p_.x + first * features;"),
    Mutation("parameters of the first task", COURSE, "return first == nullptr ? nullptr : first + task * apart;", "return first;"),
    Mutation("the first examples again", COURSE, "            t_.x = p_.x + (task * p_.count + first) * features;", "            t_.x = p_.x + task * p_.count * features;"),
    # Activations.
    Mutation("LeakyReLU's slope", ACTIVATIONS, "return x > 0 ? x : slope * x;", "return x > 0 ? x : x;"),
    Mutation("LeakyReLU's gradient", ACTIVATIONS, "return x > 0 ? grad : slope * grad;", "return grad;"),
    Mutation("ELU's slope", ACTIVATIONS, "x > 0 ? x : slope * expm1_of<Scalar>(x)", "x > 0 ? x : expm1_of<Scalar>(x)"),
    Mutation("ELU's gradient", ACTIVATIONS, "grad * slope * exp_of<Simd<Scalar>>(x)", "grad * slope"),
    Mutation("SiLU's gradient", ACTIVATIONS, "grad * share * (Scalar(1) + x * (Scalar(1) - share))", "grad * share"),
    Mutation("tanh's gradient", ACTIVATIONS, "grad * (Scalar(1) - y * y)", "grad * (Scalar(1) - y)"),
    Mutation("the sigmoid's gradient", ACTIVATIONS, "grad * y * (Scalar(1) - y)", "grad * y"),
    Mutation("GELU without its density", ACTIVATIONS, "(gelu_share<kKind, Scalar>(x) + x * density)", "gelu_share<kKind, Scalar>(x)"),
    Mutation("GELU's cubic", ACTIVATIONS, "Scalar(3 * kGeluCubic) * x * x", "Scalar(kGeluCubic) * x * x"),
    # Convolutions.
    Mutation("weights of the window turned", CONVOLUTION, "((out / group * window + q % window) * inputs + q / window)", "((out / group * window + window - 1 - q % window) * inputs + q / window)"),
    Mutation("the last values of an output", CONVOLUTION, "row[i] = out + i < outputs ? from[i * length + q] : Scalar(0);", "row[i] = Scalar(0);"),
    Mutation("the last weight gradients", CONVOLUTION, "for (int i = 0; i < kL && out + i < outputs; ++i) to[i * length + q] = row[i];", LEFT_OUT),
    Mutation("padding from the task before", CONVOLUTION, "if (block.in.channels < places.inputs) fill_zero(to, places.window * places.inputs * plan.made.lanes);", LEFT_OUT),
    Mutation("weights back not turned", CONVOLUTION, "((in / group * window + window - 1 - tap) * lanes + out) * group", "((in / group * window + tap) * lanes + out) * group"),
    Mutation("rows of the window together", CONVOLUTION, "runs.run[r] = {r * in.row, r * runs.length * group};", "runs.run[r] = {0, r * runs.length * group};"),
    Mutation("strides of the weight gradient", CONVOLUTION, "products.x_step = window.stride_w * in.lanes;", "products.x_step = in.lanes;"),
    Mutation("rows of the weight gradient", CONVOLUTION, "products.rows = least(rows, block.made.height - top);", "products.rows = 1;"),
    Mutation("a phase's first tap", CONVOLUTION, "phase.from = (phase.first + pad - tap) / stride;", "phase.from = phase.first / stride;"),
    Mutation("a phase's positions", CONVOLUTION, "phase.first = ((tap - pad) % stride + stride) % stride;", "phase.first = tap % stride;"),
    Mutation("phases without taps keep what was there", CONVOLUTION, "if (!meets_all && !add) fill_zero(to, block.in.height * row);", LEFT_OUT),
    Mutation("taps of a row apart", CONVOLUTION, "{-j * made.row - n * made.lanes,", "{-j * made.row,"),
    Mutation("unmet taps keep rounding", CONVOLUTION, "meets > 0 ? taps[y] : Vector<Scalar>{}", "taps[y]"),
    Mutation("the last row is not met", CONVOLUTION, "part_y < (y == 0 ? 2 : 3)", "part_y < 2"),
    Mutation("what is met is forgotten", CONVOLUTION, "store(of_part, live ? all(Scalar(1)) : load(of_part));", LEFT_OUT),
    Mutation("tiles of every other row", CONVOLUTION, "y < block.made.height; y += 2) {", "y < block.made.height; y += 4) {"),
    Mutation("gradients of the first of a few images", CONVOLUTION, "tiles.take(image, y, x,", "tiles.take(0, y, x,"),
    Mutation("images of the first example", WINOGRAD, "conv.x + image * conv.x_image", "conv.x"),
    Mutation("outputs of the first example", WINOGRAD, "conv.out + image * conv.out_image", "conv.out"),
    # Linear layers.
    Mutation("the last features", LINEAR, "total[i][o] += x[i * s.x_row + f] * weight[o * s.features + f];", LEFT_OUT),
    Mutation("the last outputs", LINEAR, "for (; o < last; ++o) single(out + i * s.out_row + o, x + i * s.x_row, weight + o * s.features, s);", LEFT_OUT),
    Mutation("outputs after the first rows in the cache", LINEAR, "std::int64_t o = first;", "std::int64_t o = 0;"),
    Mutation("gradients not added", LINEAR, "p.add ? load_loose(at) + sum[i][v] : sum[i][v]", "sum[i][v]"),
    Mutation("the last gradients not added", LINEAR, "*at = p.add ? *at + sum : sum;", "*at = sum;"),
    Mutation("rows beyond the tiles", LINEAR, "for (; a < p.as; ++a) outer_rows<Scalar, 1>(part, a);", LEFT_OUT),
    Mutation("sums of the last rows in the cache", LINEAR, "part.add = p.add || first > 0;", "part.add = p.add;"),
    Mutation("factors of the first rows in the cache", LINEAR, "part.factor = p.factor + first * p.b_step;", "part.factor = p.factor;"),
    # Norms.
    Mutation("variance of the items alone", TAIL, "squares += of_squares + difference * difference * (count * share);", "squares += of_squares;"),
    Mutation("scale without the deviation", TAIL, "scale = affine[c] * inverse;", "scale = affine[c];"),
    Mutation("no bias", TAIL, "mean - t.memory[plan.bias + c]", "mean"),
    Mutation("no eps", TAIL, "all.squares / all.count + eps", "all.squares / all.count"),
    Mutation("groups' mean without the bias", TAIL, "double{moment(t, i, e, 0)[c]} + bias[c]", "double{moment(t, i, e, 0)[c]}"),
    Mutation("no slope of a batch", TAIL, "static_cast<Scalar>(-inverse * inverse * inverse * gamma[c] * product / count);", "0;"),
    Mutation("no offset of a batch", TAIL, "static_cast<Scalar>(-inverse * gamma[c] * sum / count);", "0;"),
    Mutation("no slope of a group", TAIL, "slope = -inverse * inverse * inverse * product / count;", LEFT_OUT),
    Mutation("no offset of a group", TAIL, "offset = -inverse * sum / count;", LEFT_OUT),
    Mutation("groups without their scale", TAIL, "sum += double{gamma[c]} * grad_sum(t, i, e, 0)[c];", "sum += grad_sum(t, i, e, 0)[c];"),
    Mutation("scale's gradient not normalised", TAIL, "scales[c] += inverse * product;", "scales[c] += product;"),
    Mutation("a group's scale's gradient not normalised", TAIL, "scales[c] += inverse * grad_sum(t, i, e, 1)[c];", "scales[c] += grad_sum(t, i, e, 1)[c];"),
    Mutation("a bias only by itself", TAIL, "if (!alone) biases[c] += positions * (slope * from_mean + offset);", LEFT_OUT),
    Mutation("gradients not scaled", TAIL, "store(z, scale * own + slope", "store(z, own + slope"),
    Mutation("products not centred", TAIL, "own * (value - mean)", "own * value"),
    # Pooling.
    Mutation("the smallest", TAIL, "(other > value) | (other != other)", "(other < value) | (other != other)"),
    Mutation("an average by all", TAIL, "block.counts_padding ? (bottom - top)", "true ? (bottom - top)"),
    Mutation("an average by those inside", TAIL, "block.counts_padding ? (bottom - top)", "false ? (bottom - top)"),
    Mutation("the mean's share", TAIL, "load(out + c) + share * sum", "load(out + c) + sum"),
    Mutation("the mean's gradient's share", TAIL, "share * load(from + c)", "load(from + c)"),
    Mutation("an average's gradient not divided", TAIL, "grad /= static_cast<Scalar>(under.divisor);", LEFT_OUT),
    Mutation("all of a window get the gradient", TAIL, "(number == own ? grad : Vector<Scalar>{})", "grad"),
    Mutation("gradients of other windows lost", TAIL, "store(at, apart ? taken : load(at) + taken);", "store(at, taken);"),
    Mutation("gradients of bands added up", TAIL, "fill_zero(grads, (last - first) * width * lanes);", LEFT_OUT),
    # The passes.
    Mutation("a block's own gradients stop it", PASSES, "return wants(t, block.weight) || wants_input_grad(t, i) ||", "return wants(t, block.weight) ||"),
    Mutation("sums of the task before", PASSES, "fill_zero(affine_grad(t, i, 0), 3 * lanes);", LEFT_OUT),
    Mutation("weights' sums of the task before", COURSE, "            t_.adds = first > 0;", "            t_.adds = true;"),
    Mutation("weights' sums of the last examples", COURSE, "            t_.adds = first > 0;", "            t_.adds = false;"),
    Mutation("columns of an image first", PASSES, "const Scalar* from = x + (c * size.height + y) * size.width;", "const Scalar* from = x + (y * size.channels + c) * size.width;"),
    Mutation("scale and shift exchanged", PASSES, "const std::int32_t tensors[] = {block.scale, block.shift, block.bias};", "const std::int32_t tensors[] = {block.shift, block.scale, block.bias};"),
    Mutation("no border", PASSES, "fill_zero(at, border.top * images.row);", LEFT_OUT),
    # Dropouts.
    Mutation("nothing is dropped", PASSES, "at[c] *= from[c * step];", LEFT_OUT),
    Mutation("gradients are not dropped", PASSES, "        drop_output_grads(t, i);", LEFT_OUT),
    Mutation("noise of the first example", PASSES, "t.noise[i] + example * size.channels * (of_channels ? 1 : positions);", "t.noise[i];"),
    Mutation("noise of the first task", COURSE, "noise[i] + example * each", "noise[i]"),
    Mutation("noise of columns first", PASSES, "noise + y * size.width + x;", "noise + x * size.height + y;"),
    # Branches.
    Mutation("gradients of sources are not added up", PLACES, "if (later.source == other || (", "if (("),
    Mutation("gradients of summands are not added up", PLACES, "(later.product == LayersProduct::kSum && later.added == other)) return true;", "false) return true;"),
    Mutation("the first source without a gradient", PLACES, "return other >= t.lowest;", "return other > t.lowest;"),
    Mutation("no second summand", PASSES, "if (block.product == LayersProduct::kSum) add_second(t, i, e);", LEFT_OUT),
    Mutation("no gradient of the second summand", PASSES, "    copy_grads(t, i, block.added, block.added == block.source || adds_to_grad(t, i, block.added));", LEFT_OUT),
    Mutation("twice the same is once", PASSES, "block.added == block.source || adds_to_grad(", "adds_to_grad("),
    Mutation("the second summand stops a sum", PASSES, "(block.product == LayersProduct::kSum && wants_output_grad(t, block.added));", "false;"),
    Mutation("other readers get nothing", PASSES, "        hand_on(t, i);", LEFT_OUT),
    Mutation("linear gradients are not added up", PASSES, "linear_input_grad(t, i, grads, t.values[weight], adds_to_input_grad(t, i));", "linear_input_grad(t, i, grads, t.values[weight], false);"),
    Mutation("gradients of images are not added up", PASSES, "input_grad(t, i) + first * image,\n                          adds_to_input_grad(t, i));", "input_grad(t, i) + first * image, false);"),
    Mutation("the examples are read by the first block alone", PASSES, "for (std::int64_t e = 0; block.source < 0 && e < t.count; ++e) {", "for (std::int64_t e = 0; i == 0 && e < t.count; ++e) {"),
]  # fmt: skip

# Of the Hessian's products.
SECOND_ORDER = [
    # The loss.
    Mutation("scores not centred", COURSE, "(tangents[o] - mean)", "tangents[o]"),
    Mutation("tangents of the sum", COURSE, "tangents[o] = share_ * (", "tangents[o] = ("),
    Mutation("half of the squares' tangent", COURSE, "Scalar(2) * tangents[o]", "tangents[o]"),
    Mutation("products of the first task", COURSE, "products_[i] = of_task(tensor.grads, tensor.grads_apart, task);", "products_[i] = tensor.grads;"),
    Mutation("changes of the task before", COURSE, "d_.along.adds = first > 0;", "d_.along.adds = true;"),
    Mutation("changes of the last examples", COURSE, "d_.along.adds = first > 0;", "d_.along.adds = false;"),
    Mutation("directions of the first task", COURSE, "directions_[i] = of_task(tensor.direction, tensor.direction_apart, task);", "directions_[i] = tensor.direction;"),
    Mutation("the last block moves alone", COURSE, "d_.first_moved = first_block(network, p.tensors, has_direction<Scalar>);", "d_.first_moved = network.blocks - 1;"),
    # Activations.
    Mutation("ELU does not bend", ACTIVATIONS, "return x > 0 ? Vector<Scalar>{} : slope * exp_of<Simd<Scalar>>(x);", "return Vector<Scalar>{};"),
    Mutation("SiLU's bend", ACTIVATIONS, "(Scalar(2) + x * (Scalar(1) - Scalar(2) * share))", "Scalar(2)"),
    Mutation("tanh's bend", ACTIVATIONS, "Scalar(-2) * y * (Scalar(1) - y * y)", "Scalar(2) * y * (Scalar(1) - y * y)"),
    Mutation("the sigmoid's bend", ACTIVATIONS, "y * (Scalar(1) - y) * (Scalar(1) - Scalar(2) * y)", "y * (Scalar(1) - y)"),
    Mutation("GELU's bend", ACTIVATIONS, "density * (Scalar(2) - x * x)", "density * (Scalar(1) - x * x)"),
    Mutation("GELU by tanh without its cubic's bend", ACTIVATIONS, "Scalar(12 * kRootTwoOverPi * kGeluCubic)", "Scalar(0 * kGeluCubic)"),
    # Norms.
    Mutation("squared deviations' tangent not centred", TANGENTS, "product_of_row += (load(z) - mean) * load(tangent);", "product_of_row += load(z) * load(tangent);"),
    Mutation("the mean's tangent keeps the bias", TANGENTS, "static_cast<Scalar>(mean - d.along.memory[plan.bias + c])", "static_cast<Scalar>(mean)"),
    Mutation("a scale that does not move", TANGENTS, "static_cast<Scalar>(of_gamma * cell(d.value, i, example, kLayersInverse)[c] + gamma * inverse)", "static_cast<Scalar>(gamma * inverse)"),
    Mutation("a deviation that does not move", TANGENTS, "static_cast<Scalar>(of_gamma * cell(d.value, i, example, kLayersInverse)[c] + gamma * inverse)", "static_cast<Scalar>(of_gamma * cell(d.value, i, example, kLayersInverse)[c])"),
    Mutation("a shift that does not move", TANGENTS, "d.along.memory[plan.affine + plan.made.lanes + c];", "0;"),
    Mutation("deviations of the items alone", TANGENTS, "products += of_products + n * deviation * of_mean;", "products += of_products;"),
    Mutation("the deviation's tangent", TANGENTS, "-inverse * inverse * inverse * products / count", "-inverse * inverse * products / count"),
    Mutation("groups' mean moves without the bias", TANGENTS, "double{moment(along, i, e, 0)[c]} + of_bias[c]", "double{moment(along, i, e, 0)[c]}"),
    Mutation("z alone moves", TANGENTS, "scale * (of_z - of_mean) + of_scale * (z - mean) + of_shift", "scale * (of_z - of_mean)"),
    Mutation("the mean does not move", TANGENTS, "scale * (of_z - of_mean) + of_scale", "scale * of_z + of_scale"),
    Mutation("sums do not move with z", TANGENTS, "own.tangent * (value - cells.mean) + own.grad * (moves - cells.of_mean)", "own.tangent * (value - cells.mean)"),
    Mutation("scales do not move", TANGENTS, "cells.scale * own.tangent + cells.of_scale * own.grad +", "cells.scale * own.tangent +"),
    Mutation("slopes do not move", TANGENTS, "of_slope * deviation + of_offset", "of_offset"),
    Mutation("offsets do not move", TANGENTS, "of_slope * deviation + of_offset", "of_slope * deviation"),
    Mutation("deviations do not move", TANGENTS, "slope * (moves - cells.of_mean) + of_slope", "of_slope"),
    Mutation("products of the values alone", TANGENTS, "a.tangent * b.value + a.value * b.tangent", "a.tangent * b.value"),
    Mutation("a group's slope without its scale", TANGENTS, "product = product + dual(gammas, c) * dual(grad_sum(value, i, e, 1), c);", "product = product + dual(grad_sum(value, i, e, 1), c);"),
    Mutation("a batch's offset without its scale", TANGENTS, "share * (inverse * gamma * sum)", "share * (inverse * sum)"),
    Mutation("a batch's scale's change", TANGENTS, "scales[c] += (inverse * product).tangent;", "scales[c] += product.tangent;"),
    Mutation("a group's scale's change", TANGENTS, "scales[c] += (inverse * dual(grad_sum(value, i, e, 1), c)).tangent;", "scales[c] += dual(grad_sum(value, i, e, 1), c).tangent;"),
    Mutation("a bias's change only by itself", TANGENTS, "if (!alone) biases[c] += positions * (slope * from_mean + offset).tangent;", LEFT_OUT),
    Mutation("sums of another channel", TANGENTS, "const Dual sum = dual(grad_sum(value, i, e, 0), c);", "const Dual sum = dual(grad_sum(value, i, e, 0), first);"),
    # Activation and pooling.
    Mutation("the activation's tangent is that of its input", TANGENTS, "passed<kKind, Scalar>(cells.normalised(value), moves, slope)", "moves"),
    Mutation("nothing bends", TANGENTS, "straight + bend * grad * cells.tangent(z, of_z)", "straight"),
    Mutation("the last of a window moves", TANGENTS, "taken = number == own ? load(from) : taken;", "taken = load(from);"),
    Mutation("gradients for their tangents", TANGENTS, "spread_grads(d.along, i, example, first, last, tangents, grads + plan.band * row);", "spread_grads(d.value, i, example, first, last, tangents, grads + plan.band * row);"),
    Mutation("the first example's tangents", TANGENTS, "output_grad(d.along, i) + example * block.made.height * row", "output_grad(d.along, i)"),
    Mutation("means of the example before", TANGENTS, "if (block.pool == LayersPool::kMean) fill_zero(out, lanes);", LEFT_OUT),
    # The pass.
    Mutation("second summands do not move", HESSIAN, "if (second_moves) add_second(along, i, e);", LEFT_OUT),
    Mutation("nothing moves behind the first that does", HESSIAN, "return other >= d.first_moved;", "return other > d.first_moved;"),
    Mutation("other readers' inputs do not move", HESSIAN, "        hand_on(d.along, i);", LEFT_OUT),
    Mutation("images' tangents are not added up", HESSIAN, "convolve_back(value, i, {nullptr, value.memory, along.memory}, first, last, to, adds);", "convolve_back(value, i, {nullptr, value.memory, along.memory}, first, last, to, false);"),
    Mutation("features' tangents are not added up", HESSIAN, "linear_input_grad(along, i, tangents, value.values[block.weight], adds);", "linear_input_grad(along, i, tangents, value.values[block.weight], false);"),
    Mutation("copied changes stop", HESSIAN, "            copy_back(along, i);", LEFT_OUT),
    Mutation("tangents start with scale 1", HESSIAN, "start_with(d.along, Scalar(0));", "start_with(d.along, Scalar(1));"),
    Mutation("what stood still before", HESSIAN, "fill_zero(image_of(t, made, e) + y * made.row, size.width * made.lanes);", LEFT_OUT),
    Mutation("outputs that moved before", HESSIAN, "fill_zero(along.memory + out.place, along.count * out.image);", LEFT_OUT),
    Mutation("cells that moved before", HESSIAN, "fill_zero(along.memory + along.layout->block[i].cells, rows * kLayersVectors * made.lanes);", LEFT_OUT),
    Mutation("moments that moved before", HESSIAN, "fill_zero(moment(along, i, e, 0), 2 * made.lanes);", LEFT_OUT),
    Mutation("images do not move", HESSIAN, "convolve_examples(value, i, {along.memory, value.memory, along.memory}", "convolve_examples(value, i, {value.memory, value.memory, along.memory}"),
    Mutation("the weight's tangent alone", HESSIAN, "value.count, moves);", "value.count, false);"),
    Mutation("features do not move", HESSIAN, "add_linear(along, i, features_of(along, i), value.values[block.weight]);", LEFT_OUT),
    Mutation("features of images not taken", HESSIAN, "flatten_examples(along, i);", LEFT_OUT),
    Mutation("a linear weight does not move", HESSIAN, "if (turns) add_linear(along, i, features_of(value, i), along.values[block.weight]);", LEFT_OUT),
    Mutation("copied inputs do not move", HESSIAN, "if (moves) copy_input(along, i, e);", LEFT_OUT),
    Mutation("weight's change without the images'", HESSIAN, "add_weight_grad(value, i, {along.memory, along.memory, value.memory}, first, last);", ";"),
    Mutation("weight's change without the gradients'", HESSIAN, "add_weight_grad(value, i, {value.memory, along.memory, along.memory}, first, last);", LEFT_OUT),
    Mutation("input's change without the weight's", HESSIAN, "convolve_back(value, i, {nullptr, along.memory, value.memory}, first, last, to, /*add=*/true);", LEFT_OUT),
    Mutation("input's change without the gradients'", HESSIAN, "convolve_back(value, i, {nullptr, value.memory, along.memory}, first, last, to, adds);", LEFT_OUT),
    Mutation("input's change of the first examples", HESSIAN, "input_grad(along, i) + at;", "input_grad(along, i);"),
    Mutation("a linear weight's change without the features'", HESSIAN, "if (input_moves(d, i)) linear_weight_grad(along, i, grads, features_of(along, i), /*add=*/true);", LEFT_OUT),
    Mutation("a linear weight's change without the gradients'", HESSIAN, "linear_weight_grad(along, i, tangents, features_of(value, i), along.adds);", LEFT_OUT),
    Mutation("features' change without the weight's", HESSIAN, "if (weight_moves(d, i)) linear_input_grad(along, i, grads, along.values[block.weight], /*add=*/true);", LEFT_OUT),
    Mutation("features' gradients not given on", HESSIAN, "give_linear_input_grad(value, i);", LEFT_OUT),
    Mutation("features' change not given on", HESSIAN, "give_linear_input_grad(along, i);", LEFT_OUT),
    # Dropouts.
    Mutation("tangents are not dropped", HESSIAN, "drop_outputs(d.along, i);", LEFT_OUT),
    Mutation("gradients' tangents are not dropped", HESSIAN, "drop_output_grads(along, i);", LEFT_OUT),
    Mutation("gradients beside them are not dropped", HESSIAN, "drop_output_grads(value, i);", LEFT_OUT),
]  # fmt: skip

ALL = MUTATIONS + SECOND_ORDER
NUMBERS = {mutation.name: number for number, mutation in enumerate(ALL, 1)}


def group_of(mutation: Mutation) -> str:
    """The cases that must see it."""
    return "layers, second order" if mutation in SECOND_ORDER else "layers"


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Iterator[Outcomes]:
    """Outcomes of the mutants that this session's tests ask for."""
    module = mutants.build_for_cpu(tmp_path_factory.mktemp("mutations"), ALL)
    chosen = mutants.chosen_of(request.session.items, __file__, NUMBERS, group_of)
    found = Outcomes(module, "layers_cases", chosen)
    yield found
    found.close()


def test_names_are_unique():
    assert len(NUMBERS) == len(ALL)


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in GROUPS for case in GROUPS[kind]])
def test_the_packages_own_module_passes(kind, case):
    GROUPS[kind][case](C)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({mutation.file for mutation in ALL}))
def test_every_variant_is_the_mutant(file):
    text = (emulated.ROOT / "csrc" / file).read_text()
    of_file = {NUMBERS[mutation.name]: mutation for mutation in ALL if mutation.file == file}
    mutants.assert_every_variant_is_the_mutant(text, of_file)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_unchanged_sources_pass(outcomes, group):
    outcome = outcomes[UNCHANGED, group]
    assert outcome.code == 0, outcome.said[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ALL, ids=lambda m: m.name)
def test_mutant_is_caught(outcomes, mutation):
    outcome = outcomes[NUMBERS[mutation.name], group_of(mutation)]
    outcome.assert_caught()
    assert outcome.report.startswith("AssertionError: "), outcome.report
