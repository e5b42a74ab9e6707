"""Proof that the cases of exact MAML and of learnable rates on the CPU see what they should: stages that are broken in
one way each.

All mutants are in one build of a copy of the sources, see emulated/mutants.py. It has one instruction set, which is
enough: the sources are the same for all.
"""

# ruff: noqa: E501 (a table reads better with one line per case)
from __future__ import annotations

from collections.abc import Iterator

import pytest

from emulated import mutants
from emulated.mutants import UNCHANGED, Mutation, Outcomes
from helpers.devices import emulated

STEPS, TANGENTS, FIRST = "cpu/conv_second_order.h", "cpu/isa/conv/tangents.h", "cpu/isa/conv/first_tangents.h"
GROUP, RESULTS = "cpu/isa/mlp/group.h", "cpu/isa/mlp/results.h"
RATES = "cpu/conv_rates.h"
LEFT_OUT = ""

MUTATIONS = [
    # Convolutional networks: back through the steps.
    Mutation("parameters of another step", STEPS, "std::copy_n(remembered(step) + span.row", "std::copy_n(remembered(p_.steps - 1) + span.row"),
    Mutation("steps in their order", STEPS, "take_direction(step);\n            passes_.forward(p_.support, task, /*features_stale=*/true);", "take_direction(p_.steps - 1 - step);\n            passes_.forward(p_.support, task, /*features_stale=*/true);"),
    Mutation("rates of another step", STEPS, "p_.lr + p_.how.rates.row(step) * conv_tensors(p_.shape)", "p_.lr"),
    Mutation("rate of another tensor", STEPS, "lr[span.tensor]", "lr[0]"),
    Mutation("H u is added", STEPS, "Scalar(-1), product", "Scalar(1), product"),
    Mutation("rates of elements left out", STEPS, "rates_->scale(step, rates_->adjoint());", LEFT_OUT),
    Mutation("rates of elements of another step", STEPS, "rates_->scale(step, ", "rates_->scale(0, "),
    Mutation("no gradients of rates", STEPS, "if (rate_grads_ != nullptr) rates_->gradients(step, rates_->adjoint(), rate_grads_);", LEFT_OUT),
    # The classifier alone.
    Mutation("blocks see V only", STEPS, "passes_.add_feature_grads(own(), own(), tangents_);", LEFT_OUT),
    Mutation("blocks see V. only", STEPS, "passes_.add_feature_grads(own(), tangents_, own());", LEFT_OUT),
    Mutation("the classifier's own part left out", STEPS, "if (!is_of_a_block(span)) subtract(span, tangents_.at(moved(span.gradient)));", LEFT_OUT),
    # The products of convolutions and of the classifier.
    Mutation("logits without V features.", STEPS, "stages_.dot(features_tangent + i * width, own().at(l.classifier) + way * width, width) +", LEFT_OUT),
    Mutation("logits without c.", STEPS, " +\n                    tangents_.at(moved(l.classifier_bias))[way]", LEFT_OUT),
    Mutation("V's gradient without features.", STEPS, "passes_.add_classifier_grads(tangents_, own(), tangents_);", LEFT_OUT),
    Mutation("features' gradient without V.", STEPS, "passes_.add_feature_grads(tangents_, own(), tangents_);", LEFT_OUT),
    Mutation("convolution without x.", STEPS, "stages_.convolve(with_activations_, i, first, last, /*add=*/true, scratch);", LEFT_OUT),
    Mutation("weight gradient without x.", STEPS, "stages_.weight_products(with_activations_, block, i, end_of_part, from, to, /*add=*/true, scratch);", LEFT_OUT),
    Mutation("data gradient without dz.", STEPS, "stages_.convolve_back(with_raw_, block, item, behind, /*add=*/true, scratch);", LEFT_OUT),
    Mutation("data gradient with the step's old W.", STEPS, "turn(tangents_);", LEFT_OUT),
    Mutation("block 0's gradient without dy.", STEPS, "stages_.first_weight_grad(with_activations_, item, scratch);", LEFT_OUT),
    Mutation("block 0's gradient in scratch without dy.", STEPS, "if (in_scratch) stages_.first_weight_grad(with_activations_, i, scratch + (i - item) * step);", LEFT_OUT),
    # A block after the first, forward.
    Mutation("another winner", TANGENTS, "load(z + i / 2 * row + i % 2 * channels + c)", "load(z + i % 2 * row + i / 2 * channels + c)"),
    Mutation("the first of a window wins", TANGENTS, "chosen = choice == i ?", "chosen = choice == 4 ?"),
    Mutation("z not centred", TANGENTS, "(load(z) - mean) * tangent", "load(z) * tangent"),
    Mutation("sum of z.", TANGENTS, "mean[c] /= count;", LEFT_OUT),
    Mutation("sum of xhat z.", TANGENTS, "covariance[c] /= count;", LEFT_OUT),
    Mutation("activation without scale.", TANGENTS, "load(d.vector(block, kScale) + c) * (value - load(t.vector(block, kMean) + c)) +", LEFT_OUT),
    Mutation("activation without mean.", TANGENTS, "(load(tangent + c) - load(d.vector(block, kMean) + c))", "load(tangent + c)"),
    Mutation("activation without beta.", TANGENTS, " + load(d.vector(block, kBeta) + c)", LEFT_OUT),
    Mutation("ReLU passes every activation.", TANGENTS, "passed_by_relu<Scalar>(scale * value + load(t.vector(block, kShift) + c), moved)", "moved"),
    # ... and backward.
    Mutation("ReLU passes every dy.", TANGENTS, "passed_by_relu<Scalar>(scale * value + shift, load(grad_tangent))", "load(grad_tangent)"),
    Mutation("sum of dy xhat without xhat.", TANGENTS, " + load(grad) * (load(z_tangent) - moved_mean)", LEFT_OUT),
    Mutation("dgamma without r.", TANGENTS, " + inverse_tangent / inverse * of_gamma", LEFT_OUT),
    Mutation("slope without scale.", TANGENTS, "scale_tangent * inverse * of_gamma +", LEFT_OUT),
    Mutation("slope without r.", TANGENTS, "scale * inverse_tangent * of_gamma +", LEFT_OUT),
    Mutation("offset without scale.", TANGENTS, "scale_tangent * of_beta +", LEFT_OUT),
    Mutation("offset of the sum", TANGENTS, "scale * beta[c]) / count", "scale * beta[c])"),
    Mutation("dz without xhat.", TANGENTS, " + own.slope * moved", LEFT_OUT),
    Mutation("dz without offset.", TANGENTS, " + tangent.offset", LEFT_OUT),
    Mutation("dz without scale. dy", TANGENTS, "tangent.scale * grad +", LEFT_OUT),
    Mutation("dy of another position", TANGENTS, "choice == static_cast<int>(i);", "choice == static_cast<int>(i % 2 * 2 + i / 2);"),
    # BatchNorm's vectors, and the first block.
    Mutation("mean. of the patches", FIRST, "mean[first + c] += patch_mean[i] * tangent[i * group + c];", LEFT_OUT),
    Mutation("covariance of the weights", FIRST, "product[c] * tangent[i * group + c]", "product[c] * weight[i * group + c]"),
    Mutation("r squared", FIRST, "-inverse * inverse * inverse * covariance[c]", "-inverse * inverse * covariance[c]"),
    Mutation("scale without gamma.", FIRST, "d.vector(block, kGamma)[c] * inverse +", LEFT_OUT),
    Mutation("scale without r.", FIRST, " + t.vector(block, kGamma)[c] * inverse_tangent", LEFT_OUT),
    Mutation("shift without scale.", FIRST, " - t.vector(block, kMean)[c] * scale_tangent", LEFT_OUT),
    Mutation("weights without scale.", FIRST, "load(d.vector(0, kScale) + c) * load(weight + i) +", LEFT_OUT),
    Mutation("ReLU passes every gray activation.", FIRST, "passed_by_relu<Scalar>(load(place + to_own), sum)", "sum"),
    Mutation("ReLU passes every coloured activation.", FIRST, "passed_by_relu<Scalar>(load(to + to_own + c), moved)", "moved"),
    Mutation("coloured activation without shift.", FIRST, " + load(d.vector(0, kShift) + c)", LEFT_OUT),
    Mutation("patches not centred", FIRST, "tangents[i][c] -= beta_tangent[first + c] * patch_mean[i];", LEFT_OUT),
    Mutation("sum of W P without W.", FIRST, " + weight_tangent[i * group + c] * sums[i][c]", LEFT_OUT),
    Mutation("first dgamma without r.", FIRST, "inverse_tangent * own[c] +", LEFT_OUT),
    Mutation("first slope without r.", FIRST, "inverse_tangent * gamma +", LEFT_OUT),
    Mutation("first dW without scale.", FIRST, "scale_tangent * (sums[i][c] - slope[c] * dense[c]) +", LEFT_OUT),
    Mutation("first dW without slope.", FIRST, " - slope_tangent[c] * dense[c]", LEFT_OUT),
    Mutation("first dW without covariance W.", FIRST, " - slope[c] * dense_tangent[c]", LEFT_OUT),
    # Multilayer perceptrons.
    Mutation("mlp: parameters of another step", GROUP, "const V* before = at(layout_.path + step * p_.parameters)", "const V* before = at(layout_.path)"),
    Mutation("mlp: no gradients of rates", GROUP, "if (how_.rates.learnable) rate_gradients(step, step + 1);\n            aim", "aim"),
    Mutation("mlp: rates of another step", GROUP, "const Scalar* lr = rates(step);\n        const V* from", "const Scalar* lr = rates(0);\n        const V* from"),
    Mutation("mlp: rates left out", GROUP, "to[i] = rate(lr, tensor, i) * from[i]", "to[i] = from[i]"),
    Mutation("mlp: output without c.", GROUP, "moves_bias(layer) ? at(layout_.direction + layout_.bias[layer]) : nullptr", "nullptr"),
    Mutation("mlp: output without V.", GROUP, "if (moves_weight(layer)) add(in, own, width(layer));", LEFT_OUT),
    Mutation("mlp: output without x.", GROUP, "if (has_tangent(layer)) add(at(layout_.tangent[layer]), parameters + layout_.weight[layer], width(layer));", LEFT_OUT),
    Mutation("mlp: half the squared error", GROUP, "Scalar(2) * tangent[i] / elements", "tangent[i] / elements"),
    Mutation("mlp: scores not centred", GROUP, "(tangent[i] - mean)", "tangent[i]"),
    Mutation("mlp: sum of the scores", GROUP, "(tangent[i] - mean) / static_cast<Scalar>(count)", "(tangent[i] - mean)"),
    Mutation("mlp: delta without V.", GROUP, "derive(through(above, at(layout_.direction + layout_.weight[layer]), count, layer), layer, derived, true);", LEFT_OUT),
    Mutation("mlp: V. of what does not move", GROUP, "if (!moves_weight(layer)) return;", LEFT_OUT),
    Mutation("mlp: delta of another layer", GROUP, "derive(through(at(layout_.delta_tangent[(layer + 1) % 2]), weights", "derive(through(at(layout_.delta_tangent[layer % 2]), weights"),
    Mutation("mlp: curvature overwritten", GROUP, "weights, count, layer), layer, derived, curved);", "weights, count, layer), layer, derived, false);"),
    Mutation("mlp: correction without x.", GROUP, "move_weight<Purpose::kCorrection>(at(layout_.delta[(layer + 1) % 2]), at(layout_.tangent[layer]), count,\n                                              layer, {});", LEFT_OUT),
    Mutation("mlp: correction without the bias", GROUP, "move_bias<Purpose::kCorrection>(derived, count, layer, {});", LEFT_OUT),
    Mutation("mlp: H u is added", RESULTS, "gradient = to[c] - gradient;", "gradient = to[c] + gradient;"),
    Mutation("mlp: half the curvature", RESULTS, "-2 * value * tangent[c] * sum", "-value * tangent[c] * sum"),
    Mutation("mlp: ReLU passes everything", RESULTS, "sum = at[c] <= zero ? zero : sum;", LEFT_OUT),
    Mutation("mlp: slope of tanh left out", RESULTS, "sum = sum * (1 - at[c] * at[c]);", LEFT_OUT),
    # Rates, which steps may share.
    Mutation("rates of the first step for all", RATES, "return p_.lr + p_.how.rates.row(step) * of_row();", "return p_.lr;"),
    Mutation("gradients of the first step's rates", RATES, "Scalar* to = all + p_.how.rates.row(step) * of_row();", "Scalar* to = all;"),
    Mutation("a shared rate's gradient of the last step", RATES, "to[number] -= stages_.dot", "to[number] = -stages_.dot"),
    Mutation("an element's shared rate's gradient of the last step", RATES, "to[i] -= adjoint[i] * along[i]", "to[i] = -adjoint[i] * along[i]"),
    Mutation("mlp: a rate's gradient has the other sign", GROUP, "gradients[tensor] -= product_of", "gradients[tensor] += product_of"),
    Mutation("mlp: an element's rate's gradient of the last step", GROUP, "gradients[i] -= adjoint[i] * along[i];", "gradients[i] = -(adjoint[i] * along[i]);"),
    Mutation("mlp: gradients of the first step's rates", GROUP, "at(layout_.rate_grads + step * layout_.rates_of_step)", "at(layout_.rate_grads)"),
    Mutation("mlp: rates of the first step for all", GROUP, "return p_.lr + step * layout_.rates_of_step;", "return p_.lr;"),
    Mutation("mlp: directions are not summed", GROUP, "return step > 0 && layout_.direction_rows == 1 && how_.rates.learnable;", "return false;"),
    Mutation("mlp: the first direction is summed too", GROUP, "return step > 0 && layout_.direction_rows", "return layout_.direction_rows"),
    Mutation("mlp: directions of all steps in one place", GROUP, "layout_.direction_rows > 1 ? step * p_.parameters : 0", "0"),
    Mutation("mlp: gradients kept as directions", RESULTS, "kept[c] + direction : direction;", "kept[c] + gradient : gradient;"),
    Mutation("mlp: an element moves by its row's first rate", RESULTS, "S::all(of_element[c])", "S::all(of_element[0])"),
    Mutation("mlp: rates of the first row of elements", RESULTS, "if constexpr (kByElement) of_element += columns;", LEFT_OUT),
    Mutation("mlp: directions of all rows in the first", RESULTS, "if constexpr (kKeeps) kept += columns;", LEFT_OUT),
]  # fmt: skip

NUMBERS = {mutation.name: number for number, mutation in enumerate(MUTATIONS, 1)}


def group_of(mutation: Mutation) -> str:
    return "mlp" if mutation.file in (GROUP, RESULTS) else "conv"


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Iterator[Outcomes]:
    """Outcomes of the mutants that this session's tests ask for."""
    module = mutants.build_for_cpu(tmp_path_factory.mktemp("mutations"), MUTATIONS)
    found = Outcomes(
        module, "second_order_cases", mutants.chosen_of(request.session.items, __file__, NUMBERS, group_of)
    )
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


@pytest.mark.slow
@pytest.mark.parametrize("group", ["conv", "mlp"])
def test_unchanged_sources_pass(outcomes, group):
    outcome = outcomes[UNCHANGED, group]
    assert outcome.code == 0, outcome.said[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutant_is_caught(outcomes, mutation):
    outcome = outcomes[NUMBERS[mutation.name], group_of(mutation)]
    outcome.assert_caught()
    assert outcome.report.startswith("AssertionError: "), outcome.report  # a wrong gradient, whose name follows
