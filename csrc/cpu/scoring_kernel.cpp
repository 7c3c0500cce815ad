#include "cpu/scoring_kernel.h"

#include "cpu/fetch.h"
#include "cpu/lane_sums.h"

namespace trackstar {
namespace TRACKSTAR_ISA {
namespace {

// A panel's kernel loads a group for so many vectors of sums: on Ice Lake, which loads hardly more than one vector a cycle,
// eight queries take half as long with groups of four as of two where rows are in cache.
#if defined(__AVX512F__)
constexpr int kPanelRows = 12;
constexpr int kPanelSums = 24;  // of 32 registers
constexpr int kDotSums = 24;
constexpr int kGroup = 4;
#elif defined(__AVX__)
constexpr int kPanelRows = 6;
constexpr int kPanelSums = 12;  // of 16 registers
constexpr int kDotSums = 12;
constexpr int kGroup = 2;
#else
constexpr int kPanelRows = 6;
constexpr int kPanelSums = 12;
constexpr int kDotSums = 8;
constexpr int kGroup = 1;
#endif

// ---- One query: row after row, at the speed of memory -----------------------------------------------------

template <typename T>
struct DotOne {
  static constexpr size_t kStep = kTurns * kLineBytes / sizeof(T);

  static __attribute__((noinline)) void run(const void* const* rows, const FetchLines& fetch,
                                            const float* query, const Blocks& blocks,
                                            const float* const* scales, float* scores, size_t) {
    const T* row = static_cast<const T*>(rows[0]);
    for (size_t b = 0; b < blocks.count; ++b, row += blocks.stride, query += blocks.depth) {
      const Vec sum = block(row, query, blocks.depth, fetch);
      float total;
      sum_lanes<1>(&sum, &total);
      scores[0] += scales[0][b] * total;
    }
  }

  static inline Vec block(const T* row, const float* query, size_t depth, const FetchLines& fetch) {
    Vec sum[kTurns] = {};
    size_t k = 0;
    for (const size_t steps = depth / kStep * kStep; k < steps; k += kStep) {
      if (fetch.lines > 0) fetch_stream(row + k, kStep * sizeof(T), fetch.woven);
#pragma GCC unroll 16
      for (size_t i = 0; i < kStep / kLanes; ++i) {
        sum[i % kTurns] += load(row + k + i * kLanes) * load(query + k + i * kLanes);
      }
    }
    if (k == depth) return add_turns(sum);
    Vec late[kTurns];  // not in registers, as its places are chosen at run time
    for (int i = 0; i < kTurns; ++i) late[i] = sum[i];
    for (int i = 0; k < depth; ++i, k += kLanes) {
      // The last numbers are padded with zeros to a vector.
      T row_tail[kLanes] = {};
      float query_tail[kLanes] = {};
      for (size_t j = 0; j < kLanes && k + j < depth; ++j) {
        row_tail[j] = row[k + j];
        query_tail[j] = query[k + j];
      }
      late[i % kTurns] += load(row_tail) * load(query_tail);
    }
    return add_turns(late);
  }
};

// ---- Few queries: vectors along the row -------------------------------------------------------------------

// At once: enough for additions not to wait for one another, and few, as memory likes rows one by one.
constexpr int kDotRows = 3;

// Adds the products of one vector of each row with one of each of kCount queries.
template <int kCount, int kRows, typename T>
inline void add_products(const T* const* row, size_t k, const float* queries, Vec sum[][kCount]) {
  Vec values[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) values[r] = load(row[r] + k);
#pragma GCC unroll 8
  for (int q = 0; q < kCount; ++q) {
    const Vec query = load(queries + q * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][q] += values[r] * query;
  }
}

// Queries whose sums are in registers at a time: if not all, a block is gone over again for the next ones.
constexpr int dot_part(int queries, int rows) {
  const int most = kDotSums / rows, parts = (queries + most - 1) / most;
  return (queries + parts - 1) / parts;
}

template <int kQueries, int kRows, typename T>
struct Dot {
  static constexpr size_t kStep = kLineBytes / sizeof(T);
  static constexpr int kPart = dot_part(kQueries, kRows), kParts = (kQueries + kPart - 1) / kPart;

  static __attribute__((noinline)) void run(const void* const* rows, const FetchLines& fetch,
                                            const float* queries, const Blocks& blocks,
                                            const float* const* scales, float* scores, size_t score_stride) {
    const size_t depth = blocks.depth;
    Spread ahead(fetch, blocks.count * ((depth + kStep - 1) / kStep) * kParts);
    const T* row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = static_cast<const T*>(rows[r]);
    for (size_t b = 0; b < blocks.count; ++b, queries += depth * kQueries) {
      float scale[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) scale[r] = scales[r][b];
      from_query<0>(row, ahead, queries, depth, scale, scores, score_stride);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) row[r] += blocks.stride;
    }
  }

  // One block of the rows, with query kFirst and those behind it.
  template <int kFirst>
  static inline void from_query(const T* const* row, Spread& ahead, const float* queries, size_t depth,
                                const float* scale, float* scores, size_t score_stride) {
    constexpr int kCount = kQueries - kFirst < kPart ? kQueries - kFirst : kPart;
    const float* first = queries + kFirst * kLanes;
    const size_t steps = depth / kStep * kStep, whole = depth / kLanes * kLanes;
    Vec sum[kRows][kCount] = {};
    size_t k = 0;
    for (; k < steps; k += kStep) {
      ahead.next();
#pragma GCC unroll 8
      for (size_t i = k; i < k + kStep; i += kLanes)
        add_products<kCount, kRows>(row, i, first + i * kQueries, sum);
    }
    for (; k < whole; k += kLanes) add_products<kCount, kRows>(row, k, first + k * kQueries, sum);
    if (k < depth) {
      // The last numbers, padded with zeros to a vector.
      const size_t rest = depth - k;
      T row_tail[kRows][kLanes] = {};
      const T* tails[kRows];
      float query_tail[kCount * kLanes] = {};
      for (int r = 0; r < kRows; ++r) tails[r] = row_tail[r];
      for (size_t j = 0; j < rest; ++j) {
        for (int r = 0; r < kRows; ++r) row_tail[r][j] = row[r][k + j];
        for (int q = 0; q < kCount; ++q) {
          query_tail[q * kLanes + j] = queries[k * kQueries + (kFirst + q) * rest + j];
        }
      }
      add_products<kCount, kRows>(tails, 0, query_tail, sum);
    }
    float sums[kRows * kCount];
    sum_lanes<kRows * kCount>(sum[0], sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < kCount; ++q) {
        scores[r * score_stride + kFirst + q] += scale[r] * sums[r * kCount + q];
      }
    }
    if constexpr (kFirst + kCount < kQueries) {
      from_query<kFirst + kCount>(row, ahead, queries, depth, scale, scores, score_stride);
    }
  }
};

// ---- Many queries: vectors along the queries, so that rows need no transposition --------------------------

// kGroup numbers of a row, again and again.
inline Vec repeat(const float* from) {
#if defined(__AVX512F__)
  static_assert(kGroup == 4);
  return _mm512_maskz_broadcast_f32x4(
      0xFFFF, _mm_loadu_ps(from));  // the plain form draws a false warning from gcc 12
#elif defined(__AVX__)
  static_assert(kGroup == 2);
  typedef double Doubles __attribute__((vector_size(kLanes * sizeof(float))));
  typedef double Double __attribute__((aligned(4), may_alias));
  return (Vec)(*reinterpret_cast<const Double*>(from) - Doubles{});
#else
  static_assert(kGroup == 1);
  return splat(*from);
#endif
}

// The sums over groups of lanes of kGroup vectors.
inline Vec fold_groups(const Vec* sums) {
  if constexpr (kGroup == 1) {
    return sums[0];
  } else if constexpr (kGroup == 2) {
    return fold(sums[0], sums[1]);
  } else {
    return fold(fold(sums[0], sums[1]), fold(sums[2], sums[3]));
  }
}

typedef float HalfVec __attribute__((vector_size(kLanes / 2 * sizeof(float))));
typedef float UnalignedHalfVec
    __attribute__((vector_size(kLanes / 2 * sizeof(float)), aligned(4), may_alias));

template <int kVecs>
struct Panel {
  static constexpr int kWidth = kVecs * int{kLanes} / kGroup;
  static constexpr int kRows = kPanelSums / kVecs < kPanelRows ? kPanelSums / kVecs : kPanelRows;  // at once
  static constexpr size_t kStep = 16;

  static __attribute__((noinline)) void run(const float* const* rows, const float* panel, size_t depth,
                                            const FetchLines& fetch, const float* scale, float* scores,
                                            size_t score_stride) {
    Spread ahead(fetch, kPanelRows / kRows * ((depth + kStep - 1) / kStep));
    for (int r = 0; r < kPanelRows; r += kRows) {
      Vec sum[kRows * kVecs] = {};
      multiply(rows + r, panel, depth, ahead, sum);
      add_scores(sum, scale + r, scores + r * score_stride, score_stride);
    }
  }

  static inline void multiply(const float* const* rows, const float* panel, size_t depth, Spread& ahead,
                              Vec* sum) {
    const float* row[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) row[r] = rows[r];
    const size_t whole = depth / kGroup * kGroup;
    for (size_t step = 0; step < whole; step += kStep) {
      ahead.next();
      const size_t end = step + kStep < whole ? step + kStep : whole;
      for (size_t k = step; k < end; k += kGroup) add_group(row, k, panel + k * kWidth, sum);
    }
    if (whole == depth) return;
    // The numbers that are left, padded with zeros to a group.
    float rest[kRows][kGroup] = {};
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      for (size_t k = whole; k < depth; ++k) rest[r][k - whole] = row[r][k];
      row[r] = rest[r];
    }
    add_group(row, 0, panel + whole * kWidth, sum);
  }

  static inline void add_group(const float* const* row, size_t k, const float* panel, Vec* sum) {
    Vec query[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) query[v] = load(panel + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vec group = repeat(row[r] + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r * kVecs + v] += group * query[v];
    }
  }

  static inline void add_scores(const Vec* sum, const float* scale, float* scores, size_t score_stride) {
    if constexpr (kVecs >= kGroup) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; v += kGroup) {
          float* to = scores + r * score_stride + v / kGroup * kLanes;
          store(to, load(to) + scale[r] * fold_groups(sum + r * kVecs + v));
        }
      }
    } else {
      static_assert(2 * kVecs == kGroup);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; r += 2) {
        // Each half of the folded vector is a row's.
        HalfVec both[2];
        store(reinterpret_cast<float*>(both), fold_groups(sum + r * kVecs));
        for (int i = 0; i < 2; ++i) {
          auto* score = reinterpret_cast<UnalignedHalfVec*>(scores + (r + i) * score_stride);
          *score += scale[r + i] * both[i];
        }
      }
    }
  }
};

// ---- One row and one query: vectors along chunks, each summed in the order of a panel ----------------------

constexpr int kAcross = kLanes / kGroup;  // chunks of a vector
constexpr int kBeside = 4;  // such vectors side by side, for additions not to wait for one another

// Two chunks' vectors by halves of groups: those of the lower half of both, in turn, and of the upper half.
#if defined(__AVX512F__)
typedef double Unit;
#define TRACKSTAR_LOW 0, 1, 8, 9, 2, 3, 10, 11
#define TRACKSTAR_HIGH 4, 5, 12, 13, 6, 7, 14, 15
#elif defined(__AVX__)
typedef double Unit;
#define TRACKSTAR_LOW 0, 4, 1, 5
#define TRACKSTAR_HIGH 2, 6, 3, 7
#else
typedef float Unit;
#define TRACKSTAR_LOW 0, 4, 1, 5
#define TRACKSTAR_HIGH 2, 6, 3, 7
#endif
typedef Unit Units __attribute__((vector_size(kLanes * sizeof(float))));

inline void transpose(Units* chunks) {
#pragma GCC unroll 2
  for (int width = 1; width < kAcross; width *= 2) {
    Units next[kAcross];
#pragma GCC unroll 2
    for (int i = 0; i < kAcross / 2; ++i) {
      const Units first = chunks[i], second = chunks[i + kAcross / 2];
      next[2 * i] = __builtin_shufflevector(first, second, TRACKSTAR_LOW);
      next[2 * i + 1] = __builtin_shufflevector(first, second, TRACKSTAR_HIGH);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAcross; ++i) chunks[i] = next[i];
  }
}

// Adds the products of a vector of each chunk with what the query has for them.
inline void add_across(const float* const* chunks, size_t k, const float* query, Vec& sum) {
  Units groups[kAcross];
#pragma GCC unroll 4
  for (int c = 0; c < kAcross; ++c) groups[c] = (Units)load(chunks[c] + k);
  transpose(groups);
#pragma GCC unroll 4
  for (int g = 0; g < kAcross; ++g) sum += (Vec)groups[g] * load(query + g * kLanes);
}

// The sums of kCount · kAcross chunks, of which `padded` numbers each are in the query.
template <int kCount>
inline void sum_across(const float* const* chunks, const float* query, size_t depth, size_t padded,
                       float* sums) {
  const size_t whole = depth / kLanes * kLanes;
  Vec sum[kBeside] = {};
  for (size_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      add_across(chunks + i * kAcross, k, query + (i * padded + k) * kAcross, sum[i]);
    }
  }
  if (whole < depth) {
    // The last numbers, padded with zeros to a vector.
    float tail[kCount * kAcross][kLanes] = {};
    const float* tails[kCount * kAcross];
    for (int c = 0; c < kCount * kAcross; ++c) {
      for (size_t j = whole; j < depth; ++j) tail[c][j - whole] = chunks[c][j];
      tails[c] = tail[c];
    }
    for (int i = 0; i < kCount; ++i) {
      add_across(tails + i * kAcross, 0, query + (i * padded + whole) * kAcross, sum[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBeside; i += kGroup) store(sums + i * kAcross, fold_groups(sum + i));
}

float score_row(const float* row, const float* query, size_t L, size_t d, const float* scales, float* sums) {
  const size_t full = d / kChunkDepth, rest = d % kChunkDepth, of_block = full + (rest > 0);
  // First all whole chunks, then what is left of each block.
  for (int last = 0; last < 2; ++last) {
    const size_t count = last ? (rest > 0 ? L : 0) : L * full, depth = last ? rest : kChunkDepth;
    const size_t padded = (depth + kLanes - 1) / kLanes * kLanes;
    for (size_t first = 0; first < count; first += kBeside * kAcross) {
      const size_t left = (count - first + kAcross - 1) / kAcross, vectors = left < kBeside ? left : kBeside;
      const float* chunks[kBeside * kAcross];
      size_t at[kBeside * kAcross];
      for (size_t c = 0; c < vectors * kAcross; ++c) {
        const size_t n = first + c < count ? first + c : count - 1;
        const size_t b = last ? n : n / full, i = last ? full : n % full;
        chunks[c] = row + b * d + i * kChunkDepth;
        at[c] = b * of_block + i;
      }
      float found[kBeside * kAcross];
      switch (vectors) {
        case 4:
          sum_across<4>(chunks, query, depth, padded, found);
          break;
        case 3:
          sum_across<3>(chunks, query, depth, padded, found);
          break;
        case 2:
          sum_across<2>(chunks, query, depth, padded, found);
          break;
        default:
          sum_across<1>(chunks, query, depth, padded, found);
      }
      for (size_t c = 0; c < vectors * kAcross && first + c < count; ++c) sums[at[c]] = found[c];
      query += vectors * kAcross * padded;
    }
  }
  float score = 0;
  for (size_t b = 0; b < L; ++b) {
    for (size_t i = 0; i < of_block; ++i) score += scales[b] * sums[b * of_block + i];
  }
  return score;
}

// ---- The rest ---------------------------------------------------------------------------------------------

template <typename T>
void widen_row(const void* in, size_t n, float* out) {
  constexpr size_t kTogether = 8;
  const T* from = static_cast<const T*>(in);
  size_t i = 0;
  for (; i + kTogether * kLanes <= n; i += kTogether * kLanes) {
    Vec wide[kTogether];
#pragma GCC unroll 8
    for (size_t j = 0; j < kTogether; ++j) wide[j] = load(from + i + j * kLanes);
#pragma GCC unroll 8
    for (size_t j = 0; j < kTogether; ++j) store(out + i + j * kLanes, wide[j]);
  }
  widen(from + i, n - i, out + i);
}

float sum_of_squares(const float* in, size_t n) {
  Vec sum = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(in + i) * load(in + i);
  float total;
  sum_lanes<1>(&sum, &total);
  for (; i < n; ++i) total += in[i] * in[i];
  return total;
}

// Bit i: whether lane i is outside.
inline unsigned lanes_outside(Vec score, Vec above, Vec below) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(score, above, _CMP_NLE_UQ) | _mm512_cmp_ps_mask(score, below, _CMP_NGE_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(
      _mm256_or_ps(_mm256_cmp_ps(score, above, _CMP_NLE_UQ), _mm256_cmp_ps(score, below, _CMP_NGE_UQ)));
#else
  unsigned lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= (!(score[i] <= above[i]) | !(score[i] >= below[i])) << i;
  return lanes;
#endif
}

size_t outside(const float* scores, const float* above, const float* below, size_t n, uint32_t* which) {
  size_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (unsigned lanes = lanes_outside(load(scores + i), load(above + i), load(below + i)); lanes != 0;
         lanes &= lanes - 1) {
      which[count++] = i + __builtin_ctz(lanes);
    }
  }
  for (; i < n; ++i) {
    if (!(scores[i] <= above[i]) || !(scores[i] >= below[i])) which[count++] = i;
  }
  return count;
}

template <int kQueries, typename T>
constexpr DotKernel dot_kernel() {
  if constexpr (kQueries == 1) {
    return {1, DotOne<T>::run};
  } else {
    return {kDotRows, Dot<kQueries, kDotRows, T>::run};
  }
}

template <typename T>
constexpr RowKernels row_kernels() {
  return {{dot_kernel<1, T>(), dot_kernel<2, T>(), dot_kernel<3, T>(), dot_kernel<4, T>(), dot_kernel<5, T>(),
           dot_kernel<6, T>(), dot_kernel<7, T>(), dot_kernel<8, T>()},
          widen_row<T>};
}

template <int kVecs>
constexpr PanelKernel panel_kernel() {
  return {kPanelRows, Panel<kVecs>::kWidth, Panel<kVecs>::run};
}

}  // namespace

const ScoringKernels scoring_kernels = {
    kLanes,
    kGroup,
    row_kernels<float>(),
    row_kernels<Half>(),
    row_kernels<Bfloat16>(),
    panel_kernel<kGroup == 4 ? 2 : 1>(),
    panel_kernel<kGroup == 4 ? 4 : 2>(),
    score_row,
    sum_of_squares,
    outside,
};

}  // namespace TRACKSTAR_ISA
}  // namespace trackstar
