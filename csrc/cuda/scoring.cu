#include <stdexcept>

#include "cuda/scoring.cuh"

namespace trackstar::cuda {
namespace {

bool units(size_t bytes) { return bytes % kUnit == 0; }

// Whether rows can be copied by units.
template <RowType type>
bool aligned(const Rows& rows) {
  constexpr size_t kBytes = sizeof(typename Format<type>::Number);
  return units(reinterpret_cast<uintptr_t>(rows.values)) && units(rows.stride * kBytes) &&
         units(rows.d * kBytes);
}

dim3 grid(const Rows& rows, int columns, const Survivors& survivors) {
  if (rows.N >= UINT32_MAX) throw std::invalid_argument("N must be less than 2^32 - 1");
  if (!fits(survivors, rows.N)) throw std::invalid_argument("survivors have not enough room");
  return {static_cast<unsigned>((survivors.Q + columns - 1) / columns),
          static_cast<unsigned>(survivors.slices), 1};
}

template <RowType type, int kColumns>
void score(const Rows& rows, const float* queries, Operand operand, const float* query_scales,
           const Survivors& survivors, void* stream) {
  launch<Rows, bool, const float*, const unsigned char*, const float*, Survivors>(
      score_kernel<type, kColumns>, grid(rows, kColumns, survivors), kThreads, sizeof(Shared<type, kColumns>),
      stream, rows, aligned<type>(rows), queries, static_cast<const unsigned char*>(operand), query_scales,
      survivors);
}

template <RowType type, int kColumns>
void mixed(const Rows& rows, const Mixing& mixing, const Survivors& survivors, void* stream) {
  launch<Rows, bool, Mixing, Survivors>(mixed_kernel<type, kColumns>, grid(rows, kColumns, survivors),
                                        kThreads, sizeof(Shared<type, kColumns>), stream, rows,
                                        aligned<type>(rows), mixing, survivors);
}

// Calls run(type, columns) with both as types' constants.
template <typename Run>
void dispatch(RowType type, int columns, Run run) {
  const auto with_columns = [&](auto row_type) {
    if (columns == 16) return run(row_type, std::integral_constant<int, 16>());
    if (columns == 64) return run(row_type, std::integral_constant<int, 64>());
    throw std::invalid_argument("columns must be 16 or 64");
  };
  switch (type) {
    case RowType::float32:
      return with_columns(std::integral_constant<RowType, RowType::float32>());
    case RowType::float16:
      return with_columns(std::integral_constant<RowType, RowType::float16>());
    case RowType::bfloat16:
      return with_columns(std::integral_constant<RowType, RowType::bfloat16>());
    case RowType::int8:
      return with_columns(std::integral_constant<RowType, RowType::int8>());
  }
  throw std::invalid_argument("unknown type of rows");
}

}  // namespace

void score_topk(const Rows& rows, const float* queries, Operand operand, const float* query_scales,
                int columns, const Survivors& survivors, void* stream) {
  dispatch(rows.type, columns, [&](auto type, auto width) {
    score<type.value, width.value>(rows, queries, operand, query_scales, survivors, stream);
  });
}

void mixed_topk(const Rows& rows, const Mixing& mixing, int columns, const Survivors& survivors,
                void* stream) {
  dispatch(rows.type, columns,
           [&](auto type, auto width) { mixed<type.value, width.value>(rows, mixing, survivors, stream); });
}

}  // namespace trackstar::cuda
