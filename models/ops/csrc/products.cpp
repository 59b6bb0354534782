// Products of batches of float32 matrices on CPUs, at the rate of the processor's widest vectors.
//
// A tile of kRows x 2 vectors of the result stays in registers while the sum runs. The right matrix is copied block by
// block into panels of two vectors, which stay in the second-level cache; of the left one numbers are read where they
// are or, if a step of the sum is not the next number, copied as well. Threads share the result, never a sum: no result
// depends on their number.
//
// Axes: b batch, m row of the result, n column of the result, k what is summed over.

#include "scan_simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>

namespace products {
namespace {

using at::Tensor;
using Vector = scan::Vec<float>;

constexpr int64_t kLanes = scan::kLanes<float>;
constexpr int kRows = scan::kBytes == 64 ? 12 : 6;  // accumulators: 24 of 32 registers, or 12 of 16
constexpr int64_t kPanel = 2 * kLanes;              // columns of a panel
constexpr int64_t kDepth = 256, kColumns = 512;     // of a block of the right matrix: half a MiB

struct Matrix {
  const float* data;
  int64_t row, column;  // strides

  const float* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

struct Range {
  int64_t begin, end;
};

using Buffer = std::unique_ptr<float[], void (*)(float*)>;

Buffer aligned(int64_t count) {
  constexpr std::align_val_t alignment{64};
  return {static_cast<float*>(::operator new(count * sizeof(float), alignment)),
          [](float* data) { ::operator delete(data, std::align_val_t{64}); }};
}

// Rows of a block of the right matrix, (depth, columns), to panels (columns / kPanel, depth, kPanel), zeros behind.
void pack_right(const Matrix& right, int64_t depth, int64_t columns, float* panels) {
  for (int64_t first = 0; first < columns; first += kPanel, panels += depth * kPanel) {
    const int64_t count = std::min(kPanel, columns - first);
    if (count < kPanel) std::fill(panels, panels + depth * kPanel, 0.0f);
    if (right.column == 1) {
      for (int64_t k = 0; k < depth; ++k) std::copy_n(right.at(k, first), count, panels + k * kPanel);
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t n = 0; n < count; ++n) panels[k * kPanel + n] = *right.at(k, first + n);
    }
  }
}

// kRows rows of the left matrix, (rows, depth), to (depth, kRows). Rows beyond `rows` repeat the last one.
void pack_left(const Matrix& left, int64_t rows, int64_t depth, float* packed) {
  if (rows == kRows && left.row == 1) {
    for (int64_t k = 0; k < depth; ++k) std::memcpy(packed + k * kRows, left.at(0, k), kRows * sizeof(float));
    return;
  }
  for (int64_t m = 0; m < kRows; ++m) {
    const float* source = left.at(std::min(m, rows - 1), 0);
    for (int64_t k = 0; k < depth; ++k) packed[k * kRows + m] = source[k * left.column];
  }
}

// sum (kRows, kVectors) = left (kRows, depth) panel (depth, kPanel), of which the first kVectors vectors.
template <int kVectors>
void multiply_tile(const Matrix& left, const float* panel, int64_t depth, Vector (&sum)[kRows][kVectors]) {
  constexpr int kTogether = 3;  // rows that share a pointer
  const float* rows[kRows / kTogether];
  for (int i = 0; i < kRows / kTogether; ++i) rows[i] = left.at(i * kTogether, 0);
  for (auto& row : sum)
    for (Vector& value : row) value = Vector{};
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    Vector right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) std::memcpy(&right[v], panel + v * kLanes, sizeof(Vector));
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const float value = rows[m / kTogether][m % kTogether * left.row];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[m][v] += value * right[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows / kTogether; ++i) rows[i] += left.column;
  }
}

// One tile of the result, (rows, columns) of a matrix with that row stride.
template <int kVectors>
void store_tile(const Matrix& left, const float* panel, int64_t depth, float* out, int64_t stride, int64_t rows,
                int64_t columns, bool add) {
  Vector sum[kRows][kVectors];
  multiply_tile<kVectors>(left, panel, depth, sum);
  for (int64_t m = 0; m < rows; ++m) {
    float line[kVectors * kLanes];
    float* target = out + m * stride;
    const int64_t count = std::min<int64_t>(columns, kVectors * kLanes);
    if (count == kVectors * kLanes) {
      for (int v = 0; v < kVectors; ++v) {
        Vector value;
        std::memcpy(&value, target + v * kLanes, sizeof(value));
        value = add ? value + sum[m][v] : sum[m][v];
        std::memcpy(target + v * kLanes, &value, sizeof(value));
      }
      continue;
    }
    std::memcpy(line, sum[m], sizeof(line));
    for (int64_t n = 0; n < count; ++n) target[n] = add ? target[n] + line[n] : line[n];
  }
}

struct Buffers {
  Buffer panels = aligned(kDepth * (kColumns + kPanel)), left = aligned(kDepth * kRows);
};

// A block of the right matrix, in panels, for all rows of a task.
void multiply_block(const Matrix& left, Range rows, int64_t depth, const Buffers& buffers, float* out, int64_t stride,
                    int64_t columns, bool add) {
  for (int64_t m = rows.begin; m < rows.end; m += kRows) {
    const int64_t count = std::min<int64_t>(kRows, rows.end - m);
    Matrix tile{left.at(m, 0), left.row, left.column};
    if (left.column != 1 || count < kRows) {
      pack_left(tile, count, depth, buffers.left.get());
      tile = {buffers.left.get(), 1, kRows};
    }
    for (int64_t n = 0; n < columns; n += kPanel) {
      const auto store = columns - n > kLanes ? store_tile<2> : store_tile<1>;
      store(tile, buffers.panels.get() + n * depth, depth, out + m * stride + n, stride, count, columns - n, add);
    }
  }
}

// The rows and columns of the result that are one task's.
void multiply(const Matrix& left, const Matrix& right, float* out, int64_t stride, Range rows, Range columns,
              int64_t depth, bool add) {
  const Buffers buffers;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {  // an empty sum is 0, too
    const int64_t steps = std::min(kDepth, depth - k);
    for (int64_t n = columns.begin; n < columns.end; n += kColumns) {
      const int64_t width = std::min(kColumns, columns.end - n);
      pack_right({right.at(k, n), right.row, right.column}, steps, width, buffers.panels.get());
      multiply_block({left.at(0, k), left.row, left.column}, rows, steps, buffers, out + n, stride, width,
                     add || k > 0);
    }
  }
}

Range part_of(int64_t count, int64_t unit, int64_t part, int64_t parts) {
  const int64_t units = (count + unit - 1) / unit;
  return {std::min(units * part / parts * unit, count), std::min(units * (part + 1) / parts * unit, count)};
}

// out (b, m, n) = left (b, m, k) right (b, k, n), added to what is there if `add`. The rows of `out` are dense.
void batched(const Tensor& left, const Tensor& right, Tensor out, bool add) {
  const int64_t batch = out.size(0), rows = out.size(1), columns = out.size(2), depth = left.size(2);
  TORCH_CHECK(out.stride(2) == 1 && left.size(1) == rows && right.size(2) == columns && right.size(1) == depth &&
              left.size(0) == batch && right.size(0) == batch, "products: shapes do not fit");
  const int64_t threads = at::get_num_threads(), parts = threads / std::gcd(batch, threads);
  at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, part = task % parts;
      const bool by_row = rows >= columns;
      const Range all_rows{0, rows}, all_columns{0, columns};
      multiply({left.const_data_ptr<float>() + b * left.stride(0), left.stride(1), left.stride(2)},
               {right.const_data_ptr<float>() + b * right.stride(0), right.stride(1), right.stride(2)},
               out.mutable_data_ptr<float>() + b * out.stride(0), out.stride(1),
               by_row ? part_of(rows, kRows, part, parts) : all_rows,
               by_row ? all_columns : part_of(columns, kPanel, part, parts), depth, add);
    }
  });
}

}  // namespace
}  // namespace products

TORCH_LIBRARY(mtdp_products, library) {
  library.def("batched(Tensor left, Tensor right, Tensor(a!) out, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(mtdp_products, CPU, library) {
  library.impl("batched", &products::batched);
}
