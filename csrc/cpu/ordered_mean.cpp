#include "cpu/ordered_mean.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/flags.h"

namespace signmaml::cpu {

template <typename Scalar>
OrderedMean<Scalar>::OrderedMean(const MeanGradient<Scalar>& wanted, std::uint8_t* nonfinite, std::int64_t tasks,
                                 std::int64_t parameters, std::int64_t group, std::int64_t slots)
    : wanted_(wanted),
      nonfinite_(nonfinite),
      tasks_(tasks),
      parameters_(parameters),
      group_(group),
      slots_(slots),
      handed_in_(static_cast<std::size_t>(slots), false) {
    if (wanted.mean != nullptr) std::fill_n(wanted.mean, parameters, Scalar(0));
}

template <typename Scalar>
std::int64_t OrderedMean<Scalar>::size(std::int64_t group) const {
    return std::min(group_, tasks_ - group * group_);
}

template <typename Scalar>
Scalar* OrderedMean<Scalar>::rows(std::int64_t group) {
    std::unique_lock<std::mutex> lock(mutex_);
    added_.wait(lock, [this, group] { return next_ + slots_ > group; });
    return at(group);
}

template <typename Scalar>
void OrderedMean<Scalar>::hand_in(std::int64_t group) {
    const auto holds_nonfinite = span_kernels<Scalar>(kernels()).holds_nonfinite;
    for (std::int64_t i = 0; i < size(group); ++i) {
        if (holds_nonfinite(at(group) + i * parameters_, parameters_)) raise_flag(nonfinite_ + group * group_ + i);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    handed_in_[static_cast<std::size_t>(group % slots_)] = true;
    if (adding_) return;  // that thread will find it
    adding_ = true;
    while (handed_in_[static_cast<std::size_t>(next_ % slots_)]) {
        lock.unlock();
        add(next_);
        lock.lock();
        handed_in_[static_cast<std::size_t>(next_ % slots_)] = false;
        ++next_;
        added_.notify_all();
    }
    adding_ = false;
}

template <typename Scalar>
void OrderedMean<Scalar>::add(std::int64_t group) {
    const SpanKernels<Scalar>& span = span_kernels<Scalar>(kernels());
    for (std::int64_t i = 0; i < size(group);) {
        const Scalar* live[kRowsAtOnce];
        int count = 0;
        for (; i < size(group) && count < kRowsAtOnce; ++i) {
            if (wanted_.skip_nonfinite && nonfinite_[group * group_ + i] != 0) continue;
            live[count++] = at(group) + i * parameters_;
        }
        span.accumulate(wanted_.mean, live, count, parameters_);  // the flags are up already
        live_ += count;
    }
}

template <typename Scalar>
void OrderedMean<Scalar>::finish() {
    if (live_ == 0) return;
    const Scalar count = static_cast<Scalar>(live_);
    for (std::int64_t j = 0; j < parameters_; ++j) wanted_.mean[j] = Scalar(0) + wanted_.mean[j] / count;
}

template class OrderedMean<float>;
template class OrderedMean<double>;

}  // namespace signmaml::cpu
