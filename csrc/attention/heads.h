// The walk over key heads, query heads and query blocks, for any kernel that processes a block.
#pragma once

#include "../common/gemm.h"
#include "cpu.h"

namespace dsd {
namespace DSD_ISA {

// One task: a key head of one sequence, or a share of its query blocks. `Kernel` packs operands and processes blocks.
template <class Kernel>
void run_task(const AttentionArguments& a, Kernel& kernel, int64_t task) {
  const int64_t share = task % a.shares, key_head = task / a.shares % a.student_kv_heads;
  const int64_t b = task / a.shares / a.student_kv_heads;
  const int64_t* positions = a.positions + b * a.tokens;
  const int64_t count = a.counts[b], rows = a.row_counts[b], group = a.heads / a.student_kv_heads;
  kernel.begin(task, b, key_head, positions, count);
  double value = 0;
  int64_t packed_teacher = -1;
  for (int64_t h = key_head * group; rows > 0 && h < (key_head + 1) * group; ++h) {
    const int64_t teacher_head = h / (a.heads / a.teacher_kv_heads);
    if (teacher_head != packed_teacher) kernel.pack_teacher_key(b, teacher_head, positions, count);
    packed_teacher = teacher_head;
    // A share takes one block in every `shares` blocks, because with causal order later blocks cost more.
    for (int64_t start = share * BLOCK_ROWS; start < rows; start += a.shares * BLOCK_ROWS)
      value += kernel.block(b, h, positions, count, start, smaller(start + BLOCK_ROWS, rows));
  }
  a.values[task] = value;
  if (a.d_key && a.shares == 1) kernel.write_key(b, key_head, positions, count);
}

// Writes the gradients of one key head, kept as columns, as rows of the valid tokens, multiplied by `factor`.
template <class T>
void write_key_gradient(const AttentionArguments& a, const T* columns, int64_t column_height, T factor, int64_t b,
                        int64_t key_head, const int64_t* positions, int64_t count, T* scratch) {
  const int64_t panel = TILE_COLUMNS<T>;
  for (int64_t j = 0; j < count; ++j) {
    const T* column = columns + (j / panel) * panel * column_height + j % panel;
    for (int64_t d = 0; d < a.student_width; ++d) scratch[d] = column[d * panel];
    const int64_t row = (b * a.student_kv_heads + key_head) * a.tokens + positions[j];
    write_run<T>(a.d_key, a.d_key_type, row * a.student_width, a.student_width, factor, scratch);
  }
}

}  // namespace DSD_ISA
}  // namespace dsd
