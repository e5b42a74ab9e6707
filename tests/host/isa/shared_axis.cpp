// The schedules of shared products: the sums of their terms equal the convolution that they replace, in integers.

#include "cpu/isa/conv/shared_axis.h"

#include <cstdint>
#include <vector>

#include "check.h"

using namespace signmaml::cpu::SIGNMAML_ISA;

namespace {

using Numbers = std::vector<std::int64_t>;

// Reproducible, even (so that halves of sums are whole), of both signs.
std::int64_t number(std::uint64_t& state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return 2 * (static_cast<std::int64_t>(state >> 33) % 1000 - 500);
}

Numbers numbers(std::int64_t count, std::uint64_t& state) {
    Numbers found(static_cast<std::size_t>(count));
    for (std::int64_t& each : found) each = number(state);
    return found;
}

std::int64_t value(const Numbers& x, const Blend& blend, std::int64_t shift) {
    const auto at = [&](std::int64_t i) { return x.at(static_cast<std::size_t>(i + shift)); };
    return at(blend.at) + (blend.sign == 0 ? 0 : blend.sign * at(blend.other));
}

// Weights by number: the taps, half their sum and half their difference.
std::int64_t weight(const Numbers& taps, int which) {
    return which < 3 ? taps[static_cast<std::size_t>(which)] : (taps[0] + (which == 3 ? 1 : -1) * taps[2]) / 2;
}

// The outputs of an axis by its terms. A term that stores, rather than adds, must be the first to write its output.
Numbers sums(const Axis& axis, const Numbers& x, const Numbers& taps, std::int64_t count) {
    Numbers out(static_cast<std::size_t>(count));
    std::vector<bool> written(static_cast<std::size_t>(count));
    for (int i = 0; i < axis.terms; ++i) {
        const AxisTerm& term = axis.term[i];
        for (std::int64_t time = 0; time < term.count; ++time) {
            std::int64_t sum = 0;
            for (int p = 0; p < term.products; ++p) {
                sum += value(x, term.product[p].x, time * term.x_step) * weight(taps, term.product[p].weight);
            }
            for (int t = 0; t < term.targets; ++t) {
                const auto to = static_cast<std::size_t>(term.target[t].out + time * term.out_step);
                if (to >= out.size() || written[to] != term.adds) {
                    return {};  // no such output, or stored and added in the wrong order
                }
                out[to] += term.target[t].sign * sum;
            }
            for (int t = 0; t < term.targets; ++t) {
                written[static_cast<std::size_t>(term.target[t].out + time * term.out_step)] = true;
            }
        }
    }
    for (const bool each : written) {
        if (!each) return {};
    }
    return out;
}

std::int64_t products(const Axis& axis) {
    std::int64_t count = 0;
    for (int i = 0; i < axis.terms; ++i) count += axis.term[i].count * axis.term[i].products;
    return count;
}

// x with one zero before it and `behind` zeros after it; at() catches reads outside.
Numbers bordered(const Numbers& x, std::int64_t behind) {
    Numbers found{0};
    found.insert(found.end(), x.begin(), x.end());
    found.insert(found.end(), static_cast<std::size_t>(behind), 0);
    return found;
}

void strided(std::int64_t in, std::uint64_t& state) {
    const std::int64_t out = (in + 1) / 2;
    const Numbers x = bordered(numbers(in, state), 1), taps = numbers(3, state);
    for (std::int64_t first = 0; first < out; ++first) {
        for (std::int64_t last = first + 1; last <= out; ++last) {
            const Axis axis = strided_axis(first, last, in, out);
            const Numbers found = sums(axis, x, taps, last - first);
            CHECK(found.size() == static_cast<std::size_t>(last - first), "outputs %d to %d of %d inputs", int(first),
                  int(last), int(in));
            for (std::int64_t y = first; y < last; ++y) {
                std::int64_t expected = 0;
                for (std::int64_t tap = 0; tap < 3; ++tap) {
                    expected += x.at(static_cast<std::size_t>(2 * y + tap)) * taps[static_cast<std::size_t>(tap)];
                }
                CHECK(found[static_cast<std::size_t>(y - first)] == expected, "output %d of %d to %d, %d inputs",
                      int(y), int(first), int(last), int(in));
            }
            CHECK(products(axis) <= 3 * (last - first), "%d products for %d outputs", int(products(axis)),
                  int(last - first));
        }
    }
}

void gathering(std::int64_t in, std::uint64_t& state) {
    const std::int64_t out = (in + 1) / 2;
    const Numbers grads = bordered(numbers(out, state), 1), taps = numbers(3, state);
    const Numbers exchanged{taps[2], taps[1], taps[0]};
    for (std::int64_t first = 0; first < in; first += 2) {
        for (std::int64_t last = first + 1; last <= in; ++last) {
            const Numbers found = sums(gathering_axis(first, last, out), grads, exchanged, last - first);
            CHECK(found.size() == static_cast<std::size_t>(last - first), "inputs %d to %d of %d", int(first),
                  int(last), int(in));
            for (std::int64_t i = first; i < last; ++i) {
                std::int64_t expected = 0;
                for (std::int64_t y = 0; y < out; ++y) {
                    const std::int64_t tap = i + 1 - 2 * y;  // input i is position i + 1, the border's zero included
                    if (tap >= 0 && tap < 3) {
                        expected += grads[static_cast<std::size_t>(y + 1)] * taps[static_cast<std::size_t>(tap)];
                    }
                }
                CHECK(found[static_cast<std::size_t>(i - first)] == expected, "input %d of %d to %d, %d inputs", int(i),
                      int(first), int(last), int(in));
            }
        }
    }
}

// The gradients of three taps from the sums of the four matrices, combined as in weight_grad.
void outer(std::int64_t in, std::int64_t stride, std::uint64_t& state) {
    const std::int64_t out = stride == 1 ? in : (in + 1) / 2;
    const Numbers x = bordered(numbers(in, state), 1), grads = numbers(out, state);
    for (std::int64_t first = 0; first < out; ++first) {
        for (std::int64_t last = first + 1; last <= out; ++last) {
            const OuterAxis axis = outer_axis(first, last, in, out, stride);
            std::int64_t matrix[4] = {};
            for (int m = 0; m < 4; ++m) {
                for (int s = 0; s < axis.stretches[m]; ++s) {
                    const OuterAxis::Stretch& stretch = axis.stretch[m][s];
                    for (std::int64_t i = 0; i < stretch.count; ++i) {
                        matrix[m] +=
                            value(x, stretch.x, i * stretch.x_step) * value(grads, stretch.grad, i * stretch.grad_step);
                    }
                }
            }
            const std::int64_t shared = matrix[2] + matrix[1];
            const std::int64_t found[] = {matrix[0] + matrix[1], stride == 1 ? shared : matrix[3],
                                          stride == 1 ? matrix[3] : shared};
            for (std::int64_t tap = 0; tap < 3; ++tap) {
                std::int64_t expected = 0;
                for (std::int64_t y = first; y < last; ++y) {
                    expected += x.at(static_cast<std::size_t>(stride * y + tap)) * grads[static_cast<std::size_t>(y)];
                }
                CHECK(found[tap] == expected, "tap %d, outputs %d to %d of %d inputs, stride %d", int(tap), int(first),
                      int(last), int(in), int(stride));
            }
        }
    }
}

// 3 x 3 outputs take 49 products instead of 81: 7 per axis instead of 9.
void savings() {
    const Axis inner = strided_axis(1, 4, 100, 50);
    CHECK(products(inner) == 7, "%d", int(products(inner)));
    for (std::int64_t count = 1; count < 40; ++count) {
        const Grouping groups = grouping_of(count);
        CHECK(3 * groups.triples + 2 * groups.pairs + groups.rest == count, "%d outputs", int(count));
        const std::int64_t chosen = 4 * groups.triples + 3 * groups.pairs + 2 * groups.rest;
        for (std::int64_t triples = 0; 3 * triples <= count; ++triples) {
            for (std::int64_t pairs = 0; 3 * triples + 2 * pairs <= count; ++pairs) {
                const std::int64_t other = 4 * triples + 3 * pairs + 2 * (count - 3 * triples - 2 * pairs);
                CHECK(chosen <= other, "%d outputs: %d products, %d are possible", int(count), int(chosen), int(other));
            }
        }
    }
}

}  // namespace

int main() {
    std::uint64_t state = 1;
    for (std::int64_t in = 1; in <= 33; ++in) {
        strided(in, state);
        gathering(in, state);
        outer(in, 1, state);
        outer(in, 2, state);
    }
    savings();
    return failures == 0 ? 0 : 1;
}
