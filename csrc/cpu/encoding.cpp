#include "encoding.h"

#include <algorithm>
#include <cstdint>

#include "cpu/code_layout.h"
#include "cpu/isa.h"
#include "cpu/trellis_kernel.h"

namespace trackstar {
namespace {

const TrellisKernel& kernel_in_force() {
  switch (isa()) {
#ifdef TRACKSTAR_HAS_v3
    case Isa::v3_vnni:
    case Isa::v3:
      return v3::trellis_kernel;
#endif
#ifdef TRACKSTAR_HAS_v4
    case Isa::amx:
    case Isa::v4_bf16:
    case Isa::v4_vnni:
    case Isa::v4:
      return v4::trellis_kernel;
#endif
    default:
      return baseline::trellis_kernel;
  }
}

// Groups of blocks of d numbers, as many at once as the kernel takes.
class Packer {
 public:
  Packer(const float* unit, size_t d, uint8_t* codes)
      : unit_(unit),
        d_(d),
        codes_(codes),
        of_block_((d + kInt4Group - 1) / kInt4Group),
        bytes_(int4_bytes(d)) {}

  // Whole blocks.
  void pack(size_t begin, size_t end) {
    std::fill(codes_ + begin * bytes_, codes_ + end * bytes_, uint8_t{0});
    const size_t last = end * of_block_;
    for (size_t group = begin * of_block_; group < last; group += kernel_.lanes) {
      const size_t count = std::min(kernel_.lanes, last - group);
      for (size_t lane = 0; lane < kernel_.lanes; ++lane) gather(group + std::min(lane, count - 1), lane);
      kernel_.run(values_, used_, chosen_, multipliers_);
      for (size_t lane = 0; lane < count; ++lane) write(group + lane, lane);
    }
  }

 private:
  void gather(size_t group, size_t lane) {
    const size_t start = group % of_block_ * kInt4Group, used = std::min(kInt4Group, d_ - start);
    const float* from = unit_ + group / of_block_ * d_ + start;
    used_[lane] = static_cast<int32_t>(used);
    for (size_t i = 0; i < kInt4Group; ++i) values_[i * kernel_.lanes + lane] = i < used ? from[i] : 0;
  }

  void write(size_t group, size_t lane) {
    const size_t of_cell = group % of_block_ % 2;
    uint8_t* cell = codes_ + group / of_block_ * bytes_ + group % of_block_ / 2 * kInt4Cell;
    cell[0] |= static_cast<uint8_t>((multipliers_[lane] - 1) << 4 * of_cell);
    uint8_t* pairs = cell + 1 + of_cell * kInt4Group / 2;
    for (int32_t i = 0; i < used_[lane]; ++i) {
      pairs[i / 2] |= static_cast<uint8_t>(chosen_[i * kernel_.lanes + lane] << 4 * (i % 2));
    }
  }

  const TrellisKernel& kernel_ = kernel_in_force();
  const float* unit_;
  const size_t d_;
  uint8_t* codes_;
  const size_t of_block_, bytes_;
  float values_[kInt4Group * kMostLanes];
  int32_t used_[kMostLanes], chosen_[kInt4Group * kMostLanes], multipliers_[kMostLanes];
};

}  // namespace

void pack_best_codes(const float* unit, size_t N, size_t d, uint8_t* codes, int threads) {
  constexpr size_t kPart = 2048;  // numbers that are worth a thread
  const size_t blocks = std::max<size_t>(1, kPart / d);
  const auto parts = static_cast<int64_t>((N + blocks - 1) / blocks);
#pragma omp parallel num_threads(threads)
  {
    Packer packer(unit, d, codes);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      const size_t first = static_cast<size_t>(part) * blocks;
      packer.pack(first, std::min(N, first + blocks));
    }
  }
}

}  // namespace trackstar
