// Arguments of one meta-step of a multilayer perceptron: linear layers with an activation between them.
#pragma once

#include <cstdint>

#include "params/method.h"
#include "params/step_options.h"

namespace signmaml {

inline constexpr int kMlpLayers = 5;   // linear layers at most: 1 to 4 hidden ones and the output
inline constexpr int kMlpWidth = 256;  // of a hidden layer at most

enum class Activation : std::int32_t { kRelu = 0, kTanh = 1 };
enum class MlpLoss : std::int32_t { kMse = 0, kCrossEntropy = 1 };

struct MlpShape {
    std::int32_t layers;                  // linear layers, 2 to kMlpLayers
    std::int32_t widths[kMlpLayers + 1];  // input, hidden ..., output
    Activation activation;
    MlpLoss loss;
};

// One set of examples of all tasks.
template <typename Scalar>
struct MlpSet {
    const Scalar* x;             // [T, count, widths[0]] Scalar
    const Scalar* target;        // [T, count, widths[layers]] Scalar for kMse, else null
    const std::int64_t* labels;  // [T, count] int64 for kCrossEntropy, else null
    std::int32_t count;          // S or Q; 0: there is no such set
};

template <typename Scalar>
struct MlpMetaStepParams {
    const Scalar* theta;  // [P] Scalar: layer by layer weight [out, in], then bias [out]
    MlpSet<Scalar> support;
    MlpSet<Scalar> query;
    const Scalar* lr;           // [K, 2 * layers] Scalar: of weight and bias of each layer; else as `how` says
    const std::uint8_t* adapt;  // [2 * layers] bool as bytes: which of them the inner loop moves
    Scalar* support_loss;       // [K, T] Scalar
    Scalar* query_loss;         // [T] Scalar; null without a query set
    Scalar* query_accuracy;     // [T] Scalar; null unless kCrossEntropy with a query set
    Scalar* predictions;        // [T, Q, out] Scalar; may be null
    Scalar* adapted;            // [T, P] Scalar; may be null
    Scalar* grads;              // [T, P] Scalar, meta-gradients; may be null
    Scalar* rate_grads;         // [T, K, 2 * layers or P] Scalar, if the rates are learnable; on CUDA
    std::int8_t* counts;        // [T, P] int8, of steps that are counted, -128 for NaN; may be null
    std::uint8_t* nonfinite;    // [T] bool as bytes, or-ed
    Scalar* workspace;          // [teams, memory of one] Scalar; null where shared memory is enough
    std::int64_t tasks;         // T
    std::int64_t parameters;    // P
    std::int32_t steps;         // K
    Method method;
    StepOptions how;
    Scalar rho;  // of `how` on CUDA, whose kernels in float take no double
    MlpShape shape;
};

// Places in a task's own memory, in scalars.
struct MlpLayout {
    std::int64_t row[kMlpLayers + 1];         // a row as wide as each layer, the examples first, with its padding
    std::int64_t weight[kMlpLayers];          // [out, row of the layer below]
    std::int64_t bias[kMlpLayers];            // [out]
    std::int64_t activation[kMlpLayers + 1];  // [count, row]; [0]: the examples
    std::int64_t delta[2];                    // [count, row], gradients of two neighbouring layers
    std::int64_t losses;                      // [count] of the examples, then [count] 1 where the answer is right
    std::int64_t size;
    std::int32_t warps_log2;  // of a team
};

// Places in what a team has beside the task's memory, in scalars. There everything has the rows and the order that it
// has in the task's memory. No place is in a table: nvcc would copy that to the stack.
struct MlpSecondOrderLayout {
    std::int64_t tangents;    // derivatives of the activations; the examples have none
    std::int64_t deltas;      // derivatives of the deltas
    std::int64_t direction;   // [parameters], in which the support gradient is differentiated
    std::int64_t gradient;    // [parameters], what becomes the meta-gradient
    std::int64_t path;        // [steps, parameters], before each step
    std::int64_t kept;        // [steps, parameters], directions of the steps, for the gradients of their rates
    std::int64_t ascent;      // [parameters], the gradient of a step that is kept before anything moves
    std::int64_t start;       // [parameters], from which a sharpness-aware step climbs
    std::int64_t counts;      // [parameters], of steps that are counted
    std::int64_t squares;     // [kMlpBlock], sums for the norm of the gradient
    std::int64_t parameters;  // from the first weight to the last bias
    std::int64_t size;
};

// Threads of the largest team.
inline constexpr int kMlpBlock = 256;

}  // namespace signmaml
