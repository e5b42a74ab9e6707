// What a convolutional network's logits give: the loss, its gradient and the accuracy.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace signmaml::cpu {

// The logits of one task's set, and their labels.
template <typename Scalar>
struct ConvHead {
    const Scalar* logits;        // [count, ways]
    Scalar* grads;               // [count, ways]
    const std::int64_t* labels;  // [count]
    std::int64_t count, ways;

    // The mean cross-entropy; leaves the softmax in `grads`. A label out of range makes the loss NaN:
    // reference.cross_entropy has the rule.
    Scalar loss() const {
        Scalar sum = 0;
        for (std::int64_t i = 0; i < count; ++i) sum += loss_of(i);
        return sum / static_cast<Scalar>(count);
    }

    // grads <- the gradient of the mean loss, from the softmax
    void to_gradient() const {
        const Scalar each = share();
        for (std::int64_t i = 0; i < count; ++i) {
            Scalar* grad = grads + i * ways;
            if (has_label(i)) grad[labels[i]] -= Scalar(1);
            for (std::int64_t way = 0; way < ways; ++way) grad[way] *= each;
        }
    }

    // `to` [count, ways] <- the derivative of the mean loss's gradient, from the softmax and the derivative of the
    // logits
    void gradient_tangent(const Scalar* logits_tangent, Scalar* to) const {
        const Scalar each = share();
        for (std::int64_t i = 0; i < count * ways; i += ways) {
            Scalar mean = 0;
            for (std::int64_t way = 0; way < ways; ++way) mean += grads[i + way] * logits_tangent[i + way];
            for (std::int64_t way = 0; way < ways; ++way) {
                to[i + way] = each * grads[i + way] * (logits_tangent[i + way] - mean);
            }
        }
    }

    Scalar accuracy() const {
        std::int64_t correct = 0;
        for (std::int64_t i = 0; i < count; ++i) correct += prediction(logits + i * ways) == labels[i] ? 1 : 0;
        return static_cast<Scalar>(correct) / static_cast<Scalar>(count);
    }

  private:
    // Of an example in the mean; NaN if a label is out of range.
    Scalar share() const {
        bool in_range = true;
        for (std::int64_t i = 0; i < count; ++i) in_range &= has_label(i);
        return in_range ? Scalar(1) / static_cast<Scalar>(count) : std::numeric_limits<Scalar>::quiet_NaN();
    }

    bool has_label(std::int64_t i) const { return labels[i] >= 0 && labels[i] < ways; }

    Scalar loss_of(std::int64_t i) const {
        const Scalar* row = logits + i * ways;
        Scalar* softmax = grads + i * ways;
        Scalar largest = row[0], sum = 0;
        for (std::int64_t way = 1; way < ways; ++way) largest = row[way] > largest ? row[way] : largest;
        for (std::int64_t way = 0; way < ways; ++way) {
            softmax[way] = std::exp(row[way] - largest);
            sum += softmax[way];
        }
        for (std::int64_t way = 0; way < ways; ++way) softmax[way] /= sum;
        if (!has_label(i)) return std::numeric_limits<Scalar>::quiet_NaN();
        return std::log(sum) - (row[labels[i]] - largest);
    }

    // The first of the largest logits. A NaN is the largest, as in torch's argmax.
    std::int64_t prediction(const Scalar* row) const {
        std::int64_t best = 0;
        for (std::int64_t way = 1; way < ways; ++way) {
            const bool first_nan = std::isnan(row[way]) && !std::isnan(row[best]);
            if (row[way] > row[best] || first_nan) best = way;
        }
        return best;
    }
};

}  // namespace signmaml::cpu
