// Tiles of rows times matrices: 128 rows by 16 or 64 columns, a step of the depth after the other.
//
// Each of eight warps has 16 rows and all columns, so that what it knows of a row never leaves it. While a step is
// multiplied, the next ones are on their way to shared memory.
#pragma once

#include "cuda/device.cuh"
#include "cuda/scoring.h"

namespace trackstar::cuda {

constexpr int kWarps = kTileRows / 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnit = 16;   // bytes that are copied and loaded as one
constexpr int kLine = 128;  // bytes of one step of a column, in each plane

// How rows are stored, and what a number that they are multiplied with is split into: two float16 or tf32 have
// 23 bits, three bfloat16 have all 24. Rows of bytes are widened to float16, which is exact; float32 rows are
// split like their columns, and the product of both low parts is left out.
template <RowType type>
struct Format;
template <>
struct Format<RowType::float16> {
  using Number = uint16_t;
  static constexpr int kDepth = 64, kPlanes = 2;
};
template <>
struct Format<RowType::bfloat16> {
  using Number = uint16_t;
  static constexpr int kDepth = 64, kPlanes = 3;
};
template <>
struct Format<RowType::int8> {
  using Number = uint8_t;
  static constexpr int kDepth = 64, kPlanes = 2;
};
template <>
struct Format<RowType::float32> {
  using Number = uint32_t;
  static constexpr int kDepth = 32, kPlanes = 2;
};

// A stored number as float32.
template <RowType type>
__device__ float number(typename Format<type>::Number bits) {
  if constexpr (type == RowType::float32) return __uint_as_float(bits);
  if constexpr (type == RowType::bfloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  if constexpr (type == RowType::int8) return static_cast<signed char>(bits);
  return from_float16(bits);
}

// Units of a line change places with the line's number: eight lines are loaded at one unit, and shared memory
// serves 128 bytes at once if they are all different ones modulo 128.
template <int kLineBytes>
__device__ constexpr int place(int line, int unit) {
  static_assert(kLineBytes == 128 || kLineBytes == 64);
  return kLineBytes == 128 ? unit ^ (line & 7) : unit ^ (line >> 1 & 3);
}

// One step in shared memory.
template <RowType type, int kColumns>
struct Stage {
  static constexpr int kRowBytes = Format<type>::kDepth * sizeof(typename Format<type>::Number);
  static constexpr int kOperandBytes = Format<type>::kPlanes * kColumns * kLine;
  static constexpr int kCombineBytes = 2 * kColumns * kLine;

  unsigned char rows[kTileRows * kRowBytes];
  unsigned char operand[kOperandBytes];

  __device__ unsigned char* row_unit(int row, int unit) {
    return rows + row * kRowBytes + kUnit * place<kRowBytes>(row, unit);
  }
  __device__ const unsigned char* operand_unit(int plane, int column, int unit) const {
    return operand + (plane * kColumns + column) * kLine + kUnit * place<kLine>(column, unit);
  }
};

// As many stages as fit the 99 KB of every part, beside some 2 KB of other things.
template <RowType type, int kColumns>
constexpr int kFitting = 96 * 1024 / static_cast<int>(sizeof(Stage<type, kColumns>));
template <RowType type, int kColumns>
constexpr int kStages = kFitting<type, kColumns> < 4 ? kFitting<type, kColumns> : 4;

// ---- Copying -----------------------------------------------------------------------------------------------

// The numbers of rows first … first + 127 from `begin` on, `depth` of them and zeros to the end of the step; zeros
// for rows that there are none of. `aligned`: all addresses and sizes are multiples of a unit.
template <RowType type, int kColumns>
__device__ void copy_rows(Stage<type, kColumns>& stage, const Rows& rows, bool aligned, size_t first,
                          size_t begin, int depth) {
  using Number = typename Format<type>::Number;
  constexpr int kUnits = Stage<type, kColumns>::kRowBytes / kUnit, kNumbers = kUnit / sizeof(Number);
  const auto* values = static_cast<const Number*>(rows.values);
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileRows * kUnits; i += kThreads) {
    const int row = i / kUnits, unit = i % kUnits, skipped = unit * kNumbers;
    const size_t n = first + row;
    const int count = n < rows.N ? depth - skipped : 0;
    const Number* from = values + static_cast<ptrdiff_t>(n) * rows.stride + begin + skipped;
    unsigned char* to = stage.row_unit(row, unit);
    if (aligned) {
      copy_async(to, count > 0 ? from : values, count > 0);
    } else {
      for (int j = 0; j < kNumbers; ++j) {
        reinterpret_cast<Number*>(to)[j] = j < count ? from[j] : Number{0};
      }
    }
  }
}

template <RowType type, int kColumns>
__device__ void copy_operand(Stage<type, kColumns>& stage, const unsigned char* from, int bytes) {
  for (int i = threadIdx.x * kUnit; i < bytes; i += kThreads * kUnit) {
    copy_async(stage.operand + i, from + i, true);
  }
}

// ---- Multiplying -------------------------------------------------------------------------------------------

// A warp's sums, 16 rows by kColumns: [c][i] is of row lane / 4 + 8·(i / 2) and column_of(c, i).
template <int kColumns>
using Sums = float[kColumns / 8][4];

__device__ inline int column_of(int c, int i) { return 8 * c + 2 * (threadIdx.x % 4) + i % 2; }

// Splits float32 numbers for multiply_tf32.
__device__ inline void split(const float (&numbers)[4], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float nearest = to_tf32(numbers[i]);
    high[i] = __float_as_uint(nearest);
    low[i] = __float_as_uint(to_tf32(numbers[i] - nearest));
  }
}

// Words of 16 columns from `first` on, at unit 2·k and 2·k + 1.
template <RowType type, int kColumns>
__device__ void load_columns(const Stage<type, kColumns>& stage, int plane, int first, int k,
                             uint32_t (&words)[4]) {
  const int lane = threadIdx.x % 32;
  load_matrices(words, stage.operand_unit(plane, first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

// sum += numbers · columns, 8 numbers deep, all in float32.
template <RowType type, int kColumns>
__device__ void multiply_singles(const Stage<type, kColumns>& stage, const float (&numbers)[4], int k,
                                 Sums<kColumns>& sum) {
  uint32_t high[4], low[4];
  split(numbers, high, low);
#pragma unroll
  for (int first = 0; first < kColumns; first += 16) {
    uint32_t high_columns[4], low_columns[4];
    load_columns(stage, 0, first, k, high_columns);
    load_columns(stage, 1, first, k, low_columns);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      auto& out = sum[first / 8 + c];
      multiply_tf32(out, low, high_columns[2 * c], high_columns[2 * c + 1]);
      multiply_tf32(out, high, low_columns[2 * c], low_columns[2 * c + 1]);
      multiply_tf32(out, high, high_columns[2 * c], high_columns[2 * c + 1]);
    }
  }
}

// sum += numbers · columns, 16 numbers deep, all of two bytes.
template <RowType type, int kColumns>
__device__ void multiply_halves(const Stage<type, kColumns>& stage, const uint32_t (&numbers)[4], int k,
                                Sums<kColumns>& sum) {
#pragma unroll
  for (int plane = Format<type>::kPlanes - 1; plane >= 0; --plane) {
#pragma unroll
    for (int first = 0; first < kColumns; first += 16) {
      uint32_t columns[4];
      load_columns(stage, plane, first, k, columns);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        auto& out = sum[first / 8 + c];
        if constexpr (type == RowType::bfloat16) {
          multiply_bfloat16(out, numbers, columns[2 * c], columns[2 * c + 1]);
        } else {
          multiply_float16(out, numbers, columns[2 * c], columns[2 * c + 1]);
        }
      }
    }
  }
}

// sum += the warp's rows of a stage times its operand.
template <RowType type, int kColumns>
__device__ void multiply(Stage<type, kColumns>& stage, Sums<kColumns>& sum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 2  // all at once, loads run ahead of the products and out of registers
  for (int k = 0; k < Stage<type, kColumns>::kRowBytes / (2 * kUnit); ++k) {
    uint32_t words[4];
    load_matrices(words, stage.row_unit(16 * warp + lane % 16, 2 * k + lane / 16));
    if constexpr (type == RowType::float32) {
      float numbers[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[i] = __uint_as_float(words[i]);
      multiply_singles(stage, numbers, k, sum);
    } else if constexpr (type == RowType::int8) {
      // A word has four numbers, half of them for each product; the operand's are in that order.
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t halves[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) halves[i] = widen_bytes(words[i], pair);
        multiply_halves(stage, halves, 2 * k + pair, sum);
      }
    } else {
      multiply_halves(stage, words, k, sum);
    }
  }
}

// sum += values · operand, columns 32·part … of the values, which lie as sums do. Of 8 columns a lane has two, and
// as numbers of a product they would be t and t + 4: so the operand's even ones come first.
template <RowType type, int kColumns>
__device__ void multiply_sums(const Stage<type, kColumns>& stage, const Sums<kColumns>& values, int part,
                              Sums<kColumns>& sum) {
#pragma unroll
  for (int k = 0; k < 4 && k < kColumns / 8; ++k) {
    const auto& own = values[4 * part + k];
    const float numbers[4] = {own[0], own[2], own[1], own[3]};
    multiply_singles(stage, numbers, k, sum);
  }
}

}  // namespace trackstar::cuda
