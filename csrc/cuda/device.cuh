// What the kernels ask of the hardware beyond CUDA C++: instructions that the language has no word for, and how a
// kernel is launched. tests/simt/cuda/device.cuh does the same on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace trackstar::cuda {

// The block's shared memory, of the size that the launch asks for.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---- Copies to shared memory that the thread does not wait for --------------------------------------------

// 16 bytes, of which the source's are taken or zeros; both addresses are multiples of 16.
__device__ inline void copy_async(void* to, const void* from, bool taken) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(taken ? 16 : 0)
               : "memory");
}

// Makes a group of the copies since the last one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kUnderWay` of this thread's groups are not finished.
template <int kUnderWay>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}

// ---- Tensor cores, a warp at a time ------------------------------------------------------------------------
// In lane 4·g + t: of a matrix of 8 lines of 16 bytes, word t of line g; of a 16 × 8 matrix of sums, those at
// (g, 2t), (g, 2t + 1), (g + 8, 2t) and (g + 8, 2t + 1).

// Four matrices from shared memory; lane 8·m + i gives the address of line i of matrix m.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* line) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(line))
               : "memory");
}

#define TRACKSTAR_MULTIPLY(name, shape, element)                                                   \
  __device__ inline void name(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." element "." element                     \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                  \
  }
// sum += a · bᵀ: a of 16 lines (8 in a[0] and a[2], then 8), b of 8, each line 32 bytes long in two matrices.
TRACKSTAR_MULTIPLY(multiply_float16, "m16n8k16", "f16")
TRACKSTAR_MULTIPLY(multiply_bfloat16, "m16n8k16", "bf16")
TRACKSTAR_MULTIPLY(multiply_tf32, "m16n8k8", "tf32")
#undef TRACKSTAR_MULTIPLY

// ---- Numbers -----------------------------------------------------------------------------------------------

// The nearest number of 11 significant bits.
__device__ inline float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// Bytes 2·pair and 2·pair + 1 of four signed ones, as two float16: 1024 + 128 + b is the number whose last bits
// are those of b, the sign flipped.
__device__ inline uint32_t widen_bytes(uint32_t bytes, int pair) {
  uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, pair == 0 ? 0x4140 : 0x4342), widened;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(widened) : "r"(biased), "r"(0x64806480u));
  return widened;
}

__device__ inline float from_float16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// ---- Launches ----------------------------------------------------------------------------------------------

inline void check(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) {
    throw std::runtime_error(
        "CUDA: there is no NVIDIA driver, or one that is older than the CUDA runtime built in");
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
            const Parameters&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace trackstar::cuda
