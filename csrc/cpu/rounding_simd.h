// Rounding floats to whole numbers of eight bits (CodedKernels). For *_kernel.cpp only.
#pragma once

#include "cpu/coded_kernel.h"
#include "cpu/fetch.h"
#include "cpu/integer_simd.h"
#include "cpu/lane_sums.h"

namespace trackstar::TRACKSTAR_ISA {
namespace {

// Calls use(values, i) for every vector of n numbers, the last one padded with zeros.
template <typename Use>
inline void for_vectors(const float* values, size_t n, Use use) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) use(load(values + i), i);
  if (i < n) {
    float tail[kLanes] = {};
    for (size_t j = 0; i + j < n; ++j) tail[j] = values[i + j];
    use(load(tail), i);
  }
}

void sizes(const float* values, size_t n, float* largest, float* square) {
  Vec most = {}, squares = {};
  for_vectors(values, n, [&](Vec value, size_t) {
    const Vec size = value < 0 ? -value : value;
    most = size <= most ? most : size;  // a NaN stays
    squares += size * size;
  });
  sum_lanes<1>(&squares, square);
  // NaN is the largest of all, as whole numbers too.
  const int32_t top = largest_of((Sums)most);
  __builtin_memcpy(largest, &top, sizeof(top));
}

float round(const float* values, size_t d, int8_t* codes, double* squares) {
  constexpr size_t kRun = 256 * kLanes;  // summed in float32
  constexpr float kMagic = 0x1.8p23f;    // of which whole numbers are the last bits
  float largest, unused;
  sizes(values, d, &largest, &unused);
  const float scale = largest / kTop;
  const Vec top = splat(kTop);
  double square = 0, lost = 0;  // in units of the scale, where nothing vanishes
  for (size_t run = 0; run < d; run += kRun) {
    const size_t end = d < run + kRun ? d : run + kRun;
    Vec squares_of_run = {}, lost_of_run = {};
    for_vectors(values + run, end - run, [&](Vec value, size_t i) {
      const Vec unit = scale == 0 ? Vec{} : value / splat(scale);
      Vec code = unit < -top ? -top : unit > top ? top : unit;
      code = (code + splat(kMagic)) - splat(kMagic);
      uint8_t bytes[kLanes];
      store_low_bytes(bytes, __builtin_convertvector(code, Sums));
      const size_t count = end - run - i < kLanes ? end - run - i : kLanes;
      copy(bytes, count, reinterpret_cast<uint8_t*>(codes) + run + i);
      squares_of_run += unit * unit;
      lost_of_run += (unit - code) * (unit - code);
    });
    square += sum_of(squares_of_run);
    lost += sum_of(lost_of_run);
  }
  // Not zero unless all values are.
  const double most = static_cast<double>(largest) * largest, unit = static_cast<double>(scale) * scale;
  squares[0] += unit * square > most ? unit * square : most;
  squares[1] += unit * lost;
  return scale;
}

void to_bytes(const float* values, const Runs& runs, const float* blocks, const FetchLines& fetch,
              uint8_t* bytes, float* scales, size_t stride, double* squares) {
  constexpr float kMagic = 0x1.8p23f + 128;  // of which whole numbers, plus 128, are the last bits
  constexpr float kSmallest = 1e-10f, kLargest = 1e10f;
  constexpr size_t kTogether = 16;  // runs, whose sizes are found first: no run waits for its own
  fetch_pages(fetch.from, fetch.lines * kLineBytes);
  SpreadNear ahead(fetch, runs.count * ((runs.size + kLanes - 1) / kLanes));
  for (size_t first = 0; first < runs.count; first += kTogether) {
    const size_t count = runs.count - first < kTogether ? runs.count - first : kTogether;
    float largest[kTogether];
    for (size_t i = 0; i < count; ++i) {
      Sums most = {};  // as whole numbers floats are in order, and NaN is the largest of all
      for_vectors(values + i * runs.size, runs.size, [&](Vec value, size_t) {
        const Sums size = (Sums)value & 0x7FFFFFFF;
        most = most > size ? most : size;
      });
      const int32_t top = largest_of(most);
      __builtin_memcpy(&largest[i], &top, sizeof(top));
    }
    Vec square = {}, lost = {};
    for (size_t i = 0; i < count; ++i, values += runs.size, bytes += runs.padded) {
      const float most = largest[i], block = blocks[(first + i) / runs.of_block];
      const bool fits = most == 0 || (most >= kSmallest && most <= kLargest);
      const float scale = fits ? most / 127 : __builtin_nanf("");
      const Vec unit = splat(most == 0 ? 0.0f : 127 / most), size = splat(scale);
      Vec square_of_run = {}, lost_of_run = {};
      for_vectors(values, runs.size, [&](Vec value, size_t k) {
        ahead.next();
        const Vec code = value * unit + splat(kMagic);
        const Vec rest = value - size * (code - splat(kMagic));
        square_of_run += value * value;
        lost_of_run += rest * rest;
        store_low_bytes(bytes + k, (Sums)code);
      });
      for (size_t k = (runs.size + kLanes - 1) / kLanes * kLanes; k < runs.padded; ++k) bytes[k] = 128;
      square += splat(block * block) * square_of_run;
      lost += splat(block * block) * lost_of_run;
      scales[(first + i) * stride] = scale * block;
    }
    squares[0] += sum_of(square);
    squares[1] += sum_of(lost);
  }
}

}  // namespace
}  // namespace trackstar::TRACKSTAR_ISA
