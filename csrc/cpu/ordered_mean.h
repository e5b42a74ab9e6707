// The mean of the tasks' meta-gradients, added up in the order of tasks while other tasks are still at work: the same
// bits for any number of threads, those of meta_accumulate, with a few rows in memory instead of one a task.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/ops.h"

namespace signmaml::cpu {

// Tasks come in groups, numbered in their order. A thread asks for a group's rows, fills them and hands them in. It
// must have begun with the group after all groups before it: then whoever waits for rows waits for a thread that does
// not.
template <typename Scalar>
class OrderedMean {
  public:
    // `nonfinite` [tasks]: flags, read and raised. `group`: tasks of a group; the last may have fewer.
    OrderedMean(const MeanGradient<Scalar>& wanted, std::uint8_t* nonfinite, std::int64_t tasks,
                std::int64_t parameters, std::int64_t group, std::int64_t slots);

    bool wanted() const { return wanted_.mean != nullptr; }

    // [tasks of the group, parameters]; waits until the group that had the rows before has been added.
    Scalar* rows(std::int64_t group);

    // The rows are filled and the tasks' flags raised, but for what the rows themselves give reason for. Adds them, and
    // groups that others handed in, as far as their order allows.
    void hand_in(std::int64_t group);

    // After all groups: the mean is what was wanted.
    void finish();

  private:
    std::int64_t size(std::int64_t group) const;
    void add(std::int64_t group);
    Scalar* at(std::int64_t group) const { return wanted_.rows + group % slots_ * group_ * parameters_; }

    const MeanGradient<Scalar> wanted_;
    std::uint8_t* const nonfinite_;
    const std::int64_t tasks_, parameters_, group_, slots_;
    std::int64_t live_ = 0;  // tasks in the sum; whoever adds has it
    std::mutex mutex_;       // guards everything below
    std::condition_variable added_;
    std::vector<bool> handed_in_;  // by slot
    std::int64_t next_ = 0;        // the group to add next
    bool adding_ = false;          // a thread is at it
};

extern template class OrderedMean<float>;
extern template class OrderedMean<double>;

}  // namespace signmaml::cpu
