// What the CPU kernels of gram_loss share: the work at hand and rows of features.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/cpu_product.h"
#include "ops/gram_loss/gram_loss.h"
#include "ops/gram_loss/gram_loss_plan_cpu.h"

namespace dinov3_ext::gram {

constexpr int64_t kBlock = kGramBlock;

struct Work {
  const GramLoss& args;
  const GramPlan& plan;
  char* workspace;      // aligned
  int64_t round;        // number of the chunk of images
  int64_t images;       // in the chunk
  int64_t strip;        // number of the strip
  int64_t first, last;  // its blocks

  // Of the tensors, an image of the chunk. One in `rounds` is taken, so that a thread's share of every chunk is in that
  // part of the tensors which a flat loop over them gives to the same thread: it is in its core's cache.
  int64_t whole(int64_t image) const { return round + image * plan.rounds; }

  template <class T>
  T* part(int64_t offset, int64_t image, int64_t each) const {
    return reinterpret_cast<T*>(workspace + offset) + image * each;
  }
  double* inverse_norms(int64_t image, bool teacher) const {
    return part<double>(plan.norms, image, 2 * plan.patches) + (teacher ? plan.patches : 0);
  }
  float* along(int64_t image) const { return part<float>(plan.along, image, plan.patches); }
  float* along_parts(int64_t image, int64_t column) const {
    const int64_t rows = plan.strip_blocks * kBlock;
    return part<float>(plan.along_parts, image, plan.blocks * rows) + column * rows;
  }
  float* differences(int64_t image, int64_t block) const {
    return part<float>(plan.differences, image, plan.offset(0, plan.strip_blocks)) + plan.offset(first, block);
  }
  uint16_t* lows(int64_t image) const { return part<uint16_t>(plan.lows, image, plan.patches * plan.width); }
  double* loss(int64_t image, int64_t column) const { return part<double>(plan.losses, image, plan.blocks) + column; }
};

// Rows of a column of blocks: those of the strip up to block `column`; columns: the patches of that block.
struct BlockPair {
  int64_t begin, end, columns;
  BlockPair(const Work& work, int64_t column)
      : begin(work.first * kBlock),
        end(std::min({work.last * kBlock, (column + 1) * kBlock, work.plan.patches})),
        columns(std::min(kBlock, work.plan.patches - column * kBlock)) {}

  // Numbers that its similarities take: (rows, kBlock), rows up to a whole block.
  int64_t size() const { return GramPlan::divide_up(end - begin, kBlock) * kBlock * kBlock; }
};

// ---- rows of features

template <Element E, int W>
DINOV3_EXT_INLINE void read_row_of(const GramFeatures& features, int64_t image, int64_t row, int64_t begin,
                                   int64_t count, double scale, float* to) {
  const int64_t start = image * features.image_stride + row * features.row_stride + begin * features.column_stride;
  const char* from = static_cast<const char*>(features.data) + start * (E == Element::float32 ? 4 : 2);
  // In two parts, so that no error is common to a row: it would not cancel in the sums over it.
  const auto high = splat<W>(float(scale)), low = splat<W>(float(scale - float(scale)));
  if (features.column_stride == 1) {
    int64_t k = 0;
    for (; k + W <= count; k += W) {
      const auto x = load_element<E, W>(from, k);
      store<W>(to + k, x * high + x * low);
    }
    if (k < count) {
      const auto x = load_element_tail<E, W>(from, k, count - k);
      store_tail<W>(to + k, x * high + x * low, count - k);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) {
      const auto x = load_element_tail<E, W>(from, k * features.column_stride, 1);
      store_tail<W>(to + k, x * high + x * low, 1);
    }
  }
}

// `count` features of a row from `begin` on, times scale.
template <int W>
DINOV3_EXT_INLINE void read_row(const GramFeatures& features, int64_t image, int64_t row, int64_t begin, int64_t count,
                                double scale, float* to) {
  switch (features.element) {
    case Element::float32: return read_row_of<Element::float32, W>(features, image, row, begin, count, scale, to);
    case Element::bfloat16: return read_row_of<Element::bfloat16, W>(features, image, row, begin, count, scale, to);
    case Element::float16: return read_row_of<Element::float16, W>(features, image, row, begin, count, scale, to);
  }
}

// ---- products of bf16 parts on AMX tiles (gram_loss_cpu_parts.cpp)

#if defined(__x86_64__)
// Similarities of one side: columns [first, last) of blocks, one behind the other as `BlockPair` says.
void similarities_amx(const Work& work, bool teacher, int64_t image, int64_t first, int64_t last, float* result);

// d' times the normalised features: rows of blocks [first, last), columns [begin, begin + count) of the width, to sums
// (rows, plan.sums_pitch()).
void gradient_sums_amx(const Work& work, int64_t image, int64_t first, int64_t last, int64_t begin, int64_t count,
                       float* sums);
#endif

}  // namespace dinov3_ext::gram
