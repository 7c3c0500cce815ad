// csrc/cuda/device.cuh on a CPU.
#pragma once

#include "language.h"

namespace trackstar::cuda {

inline unsigned char* shared_memory() { return simt::block()->shared; }

inline void require_unit(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    throw std::runtime_error("address is not a multiple of 16");
}

// The destination is poisoned until the wait, where the bytes land: who reads without waiting reads NaN, and who
// still reads what was there before is seen by ThreadSanitizer.
inline void copy_async(void* to, const void* from, bool taken) {
  require_unit(to);
  require_unit(from);
  auto* bytes = static_cast<unsigned char*>(to);
  std::fill_n(reinterpret_cast<volatile uint64_t*>(bytes), 2, ~uint64_t{0});
  simt::block()->thread().copies.push_back({bytes, static_cast<const unsigned char*>(from), taken});
}

inline void commit_copies() {
  simt::Thread& thread = simt::block()->thread();
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

template <int kUnderWay>
void wait_for_copies() {
  auto& groups = simt::block()->thread().groups;
  while (groups.size() > kUnderWay) {
    for (const simt::Copy& copy : groups.front()) {
      if (copy.taken) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

// ---- Tensor cores ------------------------------------------------------------------------------------------

// Each lane's line, and the lines that its words are from.
struct Lines {
  const uint32_t* own;
  const uint32_t* of_words[4];
};

inline void load_matrices(uint32_t (&words)[4], const void* line) {
  require_unit(line);
  Lines lines{static_cast<const uint32_t*>(line), {}};
  simt::together<Lines>(
      [](simt::Lanes<Lines> lanes) SIMT_UNSEEN {
        for (int lane = 0; lane < 32; ++lane) {
          for (int m = 0; m < 4; ++m) lanes[lane]->of_words[m] = lanes[8 * m + lane / 4]->own;
        }
      },
      lines);
  for (int m = 0; m < 4; ++m) words[m] = lines.of_words[m][simt::block()->lane() % 4];
}

inline float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

struct Float16 {
  static constexpr int kBytes = 2;
  static float widen(uint32_t bits) { return from_float16(static_cast<uint16_t>(bits)); }
};
struct Bfloat16 {
  static constexpr int kBytes = 2;
  static float widen(uint32_t bits) { return __uint_as_float(bits << 16); }
};
struct Tf32 {
  static constexpr int kBytes = 4;
  static float widen(uint32_t bits) {
    return __uint_as_float(bits & 0xFFFFE000u);
  }  // the hardware looks no further
};

struct Product {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// Numbers of a line of 32 bytes whose two words with index t are in lane 4 · line + t.
template <typename Element>
SIMT_UNSEEN void gather(const uint32_t* first, const uint32_t* second, int t, float* numbers) {
  constexpr int kInWord = 4 / Element::kBytes, kHalf = 4 * kInWord;
  constexpr uint32_t kMask = Element::kBytes == 4 ? ~0u : 0xFFFFu;
  for (int e = 0; e < kInWord; ++e) {
    numbers[kInWord * t + e] = Element::widen(*first >> 16 * e & kMask);
    numbers[kHalf + kInWord * t + e] = Element::widen(*second >> 16 * e & kMask);
  }
}

// Tensor cores do not round: products are cut off a bit below the last place of the largest addend, and so is the
// sum at its own. This is what measurements of A100 and H100 have found, at the coarser of the two.
inline float truncated_sum(float sum, const float* a, const float* b, int depth) {
  double products[17], largest = std::fabs(sum);
  products[depth] = sum;
  for (int k = 0; k < depth; ++k) {
    products[k] = static_cast<double>(a[k]) * b[k];
    largest = std::max(largest, std::fabs(products[k]));
  }
  double exact = 0;
  for (int k = 0; k <= depth; ++k) exact += products[k];
  if (largest == 0 || !std::isfinite(exact)) return static_cast<float>(exact);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double total = 0;
  for (int k = 0; k <= depth; ++k) total += std::trunc(products[k] / unit) * unit;
  float nearest = static_cast<float>(total);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(total)) nearest = std::nextafter(nearest, 0.0f);
  return nearest;
}

template <typename Element>
SIMT_UNSEEN void multiply_lanes(simt::Lanes<Product> lanes) {
  constexpr int kDepth = 32 / Element::kBytes;
  float a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    gather<Element>(&own.a[0], &own.a[2], t, a[g]);
    gather<Element>(&own.a[1], &own.a[3], t, a[g + 8]);
    gather<Element>(&own.b[0], &own.b[1], t, b[g]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float& sum = lanes[lane]->sum[i];
      sum = truncated_sum(sum, a[lane / 4 + 8 * (i / 2)], b[2 * (lane % 4) + i % 2], kDepth);
    }
  }
}

template <typename Element>
void multiply_as(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product own{sum, a, {b0, b1}};
  simt::together<Product>(multiply_lanes<Element>, own);
}

inline void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_as<Float16>(sum, a, b0, b1);
}
inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_as<Bfloat16>(sum, a, b0, b1);
}
inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_as<Tf32>(sum, a, b0, b1);
}

// ---- Numbers -----------------------------------------------------------------------------------------------

inline float to_tf32(float x) {
  return std::isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xFFFFE000u) : x;
}

inline uint32_t widen_bytes(uint32_t bytes, int pair) {
  uint32_t widened = 0;
  for (int e = 0; e < 2; ++e) {
    const int number = static_cast<signed char>(bytes >> (16 * pair + 8 * e));
    uint32_t bits = 0;
    if (number != 0) {
      const int exponent = std::ilogb(static_cast<double>(number));
      bits = (number < 0 ? 0x8000u : 0u) | static_cast<uint32_t>(exponent + 15) << 10 |
             (static_cast<uint32_t>(std::abs(number)) << (10 - exponent) & 1023u);
    }
    widened |= bits << 16 * e;
  }
  return widened;
}

// ---- Launches ----------------------------------------------------------------------------------------------

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void*,
            const Parameters&... arguments) {
  simt::launch([&] { kernel(arguments...); }, grid, threads, shared_bytes);
}

}  // namespace trackstar::cuda
