// How gram_loss on the CPU cuts its work: by shape alone, so that results do not depend on the number of threads.
//
// Patches are taken in blocks of 96. Similarities are computed for pairs of blocks I <= J only. A strip is a few rows
// I; its differences, for all J >= I, are the only matrix kept, and they are used up before the next strip: row I of
// the gradient is complete after the strip of I, for pairs J < I have given their share then. Patches of few blocks are
// one strip. A few images are worked on at a time, for the sake of the threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/element.h"
#include "ops/gram_loss/gram_loss.h"

namespace dinov3_ext {

inline constexpr int64_t kGramBlock = 96;      // patches; a multiple of the rows and columns of every register tile
inline constexpr int64_t kPartsColumns = 512;  // of the width, in a task of the gradient on AMX, at most

struct GramPlan {
  int64_t images, patches, width;
  int64_t blocks;           // of patches
  int64_t strip_blocks;     // rows of blocks in a strip
  int64_t chunk, rounds;    // images at a time, and how often
  int64_t columns_at_once;  // columns of blocks in a task of similarities
  int64_t parts_columns;    // of the width, in a task of the gradient on AMX
  bool gradient;            // wanted
  bool low_halves;          // a 16-bit gradient that several strips add to

  // Byte offsets into the workspace, for one image of the chunk each but for `losses`.
  int64_t norms, along, along_parts, differences, lows, losses, total;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Floats from one row of differences to the next, in row I of blocks: an odd number of cache lines.
  int64_t pitch(int64_t block) const {
    return divide_up(patches - block * kGramBlock, 16) * 16 +
           (divide_up(patches - block * kGramBlock, 16) % 2 ? 0 : 16);
  }
  // Floats from one row of sums on AMX to the next: an odd number of cache lines for common widths.
  int64_t sums_pitch() const { return parts_columns + 16; }
  // Floats before row `block` of blocks, of a strip from block `first` on.
  int64_t offset(int64_t first, int64_t block) const {
    int64_t sum = 0;
    for (int64_t i = first; i < block; ++i) sum += kGramBlock * pitch(i);
    return sum;
  }
  int64_t strips() const { return divide_up(blocks, strip_blocks); }

  explicit GramPlan(const GramLoss& args) : images(args.images), patches(args.patches), width(args.width) {
    blocks = divide_up(patches, kGramBlock);
    gradient = args.grad != nullptr;
    // A 32nd of what PyTorch holds (four matrices and two normalised features) for the differences, but 96 rows.
    const int64_t held = (16 * patches * patches + 8 * patches * width) * images;
    const int64_t budget = std::max<int64_t>(held / 32, 1 << 18);
    strip_blocks = blocks;
    while (strip_blocks > 1 && (strip_blocks > 4 || (gradient && 4 * offset(0, strip_blocks) > budget))) --strip_blocks;
    const int64_t one = gradient ? 4 * offset(0, strip_blocks) : 1;
    chunk = strips() > 1 ? 1 : std::clamp<int64_t>(budget / one, 1, std::min<int64_t>(images, 64));
    if (chunk > 1 && chunk % 2) chunk = std::min(chunk + 1, images);  // an even number for two threads
    rounds = divide_up(images, chunk);
    // Rows that are split into parts are split once for three columns; bf16 rows are not split.
    const bool split = args.student.element != Element::bfloat16 || args.teacher.element != Element::bfloat16;
    columns_at_once = split ? 3 : 1;
    parts_columns = std::min<int64_t>(divide_up(width, 16) * 16, kPartsColumns);
    low_halves = gradient && strips() > 1 && gram_grad_element(args.student.element) == Element::bfloat16;

    int64_t next = 0;
    const auto take = [&next](int64_t bytes) {
      const int64_t here = next;
      next += divide_up(bytes, 64) * 64;
      return here;
    };
    losses = take(8 * chunk * blocks);
    norms = take(chunk * 2 * patches * 8);
    along = take(gradient ? chunk * patches * 4 : 0);
    along_parts = take(gradient ? chunk * blocks * strip_blocks * kGramBlock * 4 : 0);
    differences = take(gradient ? chunk * offset(0, strip_blocks) * 4 : 0);
    lows = take(low_halves ? chunk * patches * width * 2 : 0);
    total = next + 192;  // its address is a multiple of 16 only, and the last row may be read a tile too far
  }
};

}  // namespace dinov3_ext
