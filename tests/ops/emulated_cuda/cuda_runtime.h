// A GPU's execution model on a CPU, so that a .cu file runs in the tests: enough of CUDA for csrc/*/cuda.cu.
//
// Each thread of a block is a fiber with a stack of its own. It runs until a warp shuffle, where it waits until its
// whole warp has come. Blocks run one after the other. What a GPU would leave undefined is counted as an error, which
// cudaGetLastError returns: a shuffle that not all lanes of a warp reach, an address of 16 bytes that is not aligned.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define threadIdx (emulation::lane().thread)
#define blockIdx (emulation::lane().block)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

enum Error : int { none, diverged, misaligned, unfinished };

inline int& error() {
  static int first = none;
  return first;
}

inline void fail(Error kind) {
  if (!error()) error() = kind;
}

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  dim3 thread, block;
  float value[2];  // of the shuffle under way, and of the one before it, which slower lanes may still read
  int64_t shuffles;
  bool done;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  size_t now;
};

inline Block& state() {
  static Block block;
  return block;
}

inline Fiber& lane() { return state().fibers[state().now]; }

inline void enter() {
  state().kernel();
  lane().done = true;
}

inline float shuffle_xor(unsigned mask, float x, int offset) {
  Block& block = state();
  Fiber& own = lane();
  const size_t first = block.now / WARP * WARP;
  if (mask != 0xffffffffu || block.fibers.size() < first + WARP) fail(diverged);
  const int64_t turn = own.shuffles++;
  own.value[turn % 2] = x;
  swapcontext(&own.context, &block.scheduler);
  const Fiber& other = block.fibers[first + (block.now - first) % WARP ^ size_t(offset)];
  if (other.shuffles < turn + 1) fail(diverged);  // it has ended, or waits at an earlier shuffle
  return other.value[turn % 2];
}

inline void run_block(dim3 index, dim3 threads) {
  Block& block = state();
  block.fibers.resize(threads.x);
  for (unsigned i = 0; i < threads.x; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = dim3(i, 0, 0), fiber.block = index, fiber.shuffles = 0, fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  // In each round every thread goes on to its next shuffle, or to its end.
  for (bool some = true; some;) {
    some = false;
    for (block.now = 0; block.now < block.fibers.size(); ++block.now) {
      if (lane().done) continue;
      swapcontext(&block.scheduler, &lane().context);
      some = true;
    }
  }
  for (const Fiber& fiber : block.fibers)
    if (fiber.shuffles != block.fibers[size_t(&fiber - block.fibers.data()) / WARP * WARP].shuffles) fail(diverged);
}

// A launch line `kernel<<<blocks, threads, shared, stream>>>(arguments)` becomes a call of this.
template <class Kernel>
void launch(dim3 blocks, dim3 threads, size_t, cudaStream_t, Kernel kernel) {
  state().kernel = kernel;
  for (unsigned i = 0; i < blocks.x; ++i) run_block(dim3(i, 0, 0), threads);
}

template <class T>
const T* checked(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail(misaligned);
  return address;
}

}  // namespace emulation

// 16 bytes that one instruction moves.
struct uint4 {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(const uint4& other) = default;
  uint4& operator=(const uint4& other) {
    emulation::checked(this);
    x = other.x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
};

template <class T>
T __ldg(const T* from) {
  return *emulation::checked(from);
}

inline float __shfl_xor_sync(unsigned mask, float x, int offset) { return emulation::shuffle_xor(mask, x, offset); }

inline int cudaGetLastError() {
  const int found = emulation::error();
  emulation::error() = emulation::none;
  return found;
}
