// How threads share the elements of a table.
#pragma once

#include "kernels/platform.cuh"

namespace signmaml {

__device__ inline int smaller_of(int a, int b) { return a < b ? a : b; }

// Calls `visit(row, column)` for every `stride`-th element, row by row, of a table with rows of this many columns,
// from element `first`; without a division for each.
template <typename Visit>
__device__ inline void walk(int first, int stride, int rows, int columns, const Visit& visit) {
    const int more_rows = stride / columns, more_columns = stride - more_rows * columns;
    int row = first / columns, column = first - row * columns;
    while (row < rows) {
        visit(row, column);
        row += more_rows;
        column += more_columns;
        if (column >= columns) {
            column -= columns;
            ++row;
        }
    }
}

}  // namespace signmaml
