// Launcher of gram_loss: chunk after chunk of images through pack, tiles and gradient, then one sum of the losses.
#include <algorithm>
#include <cmath>
#include <utility>

#include "ops/gram_loss/gram_loss_gradient.cuh"
#include "ops/gram_loss/gram_loss_pack.cuh"
#include "ops/gram_loss/gram_loss_tiles.cuh"

namespace dinov3_ext {
namespace {

inline constexpr int kSumThreads = 512;

// One block: losses in the order of their index. Multiplied by 1 / (images patches^2) in two floats.
__global__ void __launch_bounds__(kSumThreads)
    gram_sum(const float* losses, int64_t count, float factor, float factor_rest, float* loss) {
  float sum = 0.f;
#pragma unroll 4
  for (int64_t i = thread_index(); i < count; i += kSumThreads) sum += load_global(losses + i);
  sum = warp_reduce<Add>(sum);
  if (lane_index() == 0) store_shared(shared_base() + uint32_t(4 * warp_index()), sum);
  block_barrier();
  if (thread_index() != 0) return;
  sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kSumThreads / 32; ++warp) sum += load_shared<float>(shared_base() + uint32_t(4 * warp));
  store_global(loss, fmaf(sum, factor_rest, sum * factor));
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_bytes(Element element) { return element == Element::float32 ? 4 : 2; }

// 16-byte loads: every row of these features begins at a multiple of 16 bytes and holds a whole number of them.
bool is_wide(const GramFeatures& features, int64_t width) {
  const int64_t vector = 16 / element_bytes(features.element);
  return features.column_stride == 1 && width % vector == 0 && reinterpret_cast<uintptr_t>(features.data) % 16 == 0 &&
         features.row_stride % vector == 0 && features.image_stride % vector == 0;
}

GramFeatures from_image(GramFeatures features, int64_t image) {
  features.data =
      static_cast<const char*>(features.data) + image * features.image_stride * element_bytes(features.element);
  return features;
}

template <Element E, int Parts>
int launch_pack_of(const GramPack& args, bool wide, void* stream) {
  const Shape shape{.x = divide_up(args.rows, kGramPackThreads / 32), .threads = kGramPackThreads};
  return wide ? launch<gram_pack<E, Parts, true>>(shape, stream, args)
              : launch<gram_pack<E, Parts, false>>(shape, stream, args);
}

int launch_pack(const GramPack& args, int parts, bool wide, void* stream) {
  switch (args.features.element) {
    case Element::float32: return launch_pack_of<Element::float32, 2>(args, wide, stream);
    case Element::bfloat16:
      return parts == 1 ? launch_pack_of<Element::bfloat16, 1>(args, wide, stream)
                        : launch_pack_of<Element::bfloat16, 2>(args, wide, stream);
    default:
      return parts == 1 ? launch_pack_of<Element::float16, 1>(args, wide, stream)
                        : launch_pack_of<Element::float16, 2>(args, wide, stream);
  }
}

template <int Tile, int Parts>
int launch_products(const GramWork& work, int64_t images, void* stream) {
  constexpr int kThreads = GramTile<Tile>::kThreads;
  const int status = launch<gram_tiles<Tile, Parts>>(
      {.x = work.tiles, .y = images, .threads = kThreads, .shared_bytes = GramTiles<Tile, Parts>::kSharedBytes}, stream,
      work);
  if (status != 0 || !work.grad) return status;
  return launch<gram_gradient<Tile, Parts>>({.x = work.blocks,
                                             .y = divide_up(work.width, Tile),
                                             .z = images,
                                             .threads = kThreads,
                                             .shared_bytes = GramGradient<Tile, Parts>::kSharedBytes},
                                            stream, work);
}

int launch_products(const GramPlan& plan, const GramWork& work, int64_t images, void* stream) {
  if (plan.tile == 64) {
    return plan.parts == 1 ? launch_products<64, 1>(work, images, stream)
                           : launch_products<64, 2>(work, images, stream);
  }
  return plan.parts == 1 ? launch_products<128, 1>(work, images, stream)
                         : launch_products<128, 2>(work, images, stream);
}

}  // namespace

int64_t gram_loss_workspace_cuda(const GramLoss& args) { return gram_plan(args).workspace_bytes(); }

int gram_loss_cuda(const GramLoss& args, void* stream) {
  const GramPlan plan = gram_plan(args);
  const double entries = double(args.images) * double(args.patches) * double(args.patches);
  char* free = static_cast<char*>(args.workspace);
  const auto take = [&](int64_t bytes) { return std::exchange(free, free + bytes); };
  GramWork work{.patches = int(args.patches),
                .width = int(args.width),
                .packed_width = int(plan.packed_width),
                .blocks = int(plan.blocks),
                .tiles = int(plan.tiles)};
  work.student = reinterpret_cast<uint16_t*>(take(plan.packed_bytes));
  work.teacher = work.student + plan.chunk * plan.parts * args.patches * plan.packed_width;
  work.rows = reinterpret_cast<float*>(take(plan.rows_bytes));
  float* const losses = reinterpret_cast<float*>(take(plan.losses_bytes));
  work.along = reinterpret_cast<float*>(take(plan.along_bytes));
  work.entries = args.grad ? reinterpret_cast<uint16_t*>(take(plan.entries_bytes)) : nullptr;
  work.lowest_student = args.clip == GramClip::both ? 0.f : -INFINITY;
  work.lowest_teacher = args.clip == GramClip::none ? -INFINITY : 0.f;
  work.coefficient = float(4 / entries);
  const Element grad_element = gram_grad_element(args.student.element);
  work.grad_is_bfloat16 = grad_element == Element::bfloat16;

  for (int64_t image = 0; image < args.images; image += plan.chunk) {
    const int64_t images = std::min(plan.chunk, args.images - image);
    for (const bool teacher : {false, true}) {
      const GramFeatures& features = teacher ? args.teacher : args.student;
      const GramPack pack{.features = from_image(features, image),
                          .rows = images * args.patches,
                          .patches = args.patches,
                          .width = args.width,
                          .packed_width = plan.packed_width,
                          .packed = teacher ? work.teacher : work.student,
                          .numbers = work.rows,
                          .teacher = teacher};
      const int status = launch_pack(pack, plan.parts, is_wide(features, args.width), stream);
      if (status != 0) return status;
    }
    work.losses = losses + image * plan.tiles;
    if (args.grad) {
      work.grad = static_cast<char*>(args.grad) + image * args.patches * args.width * element_bytes(grad_element);
    }
    const int status = launch_products(plan, work, images, stream);
    if (status != 0) return status;
  }
  const float factor = float(1 / entries), factor_rest = float(1 / entries - double(factor));
  return launch<gram_sum>({.x = 1, .threads = kSumThreads, .shared_bytes = kSumThreads / 8}, stream, losses,
                          args.images * plan.tiles, factor, factor_rest, args.loss);
}

}  // namespace dinov3_ext
