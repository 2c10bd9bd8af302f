// Small kernels that test the emulator itself: torch.ops.dinov3_ext_probes, compiled into the emulator's library.
#include <torch/csrc/stable/library.h>

#include "binding/device.h"
#include "core/block_reduce.cuh"
#include "core/launch.cuh"
#include "core/tile.cuh"

namespace dinov3_ext {
namespace {

// ---- product of one warp: d (16 MT, 8 NT) = left (16 MT, 16 KT) right, through a tile of shared memory
// -----------------------------------------------------

struct ProductArgs {
  const uint16_t* left;
  const uint16_t* right;
  float* result;
};

// rows: right is (8 NT, 16 KT), else (16 KT, 8 NT).
template <Element E, int MT, int NT, int KT, bool Rows>
__global__ void product_probe(ProductArgs args) {
  constexpr int kLeftColumns = 16 * KT, kRightRows = Rows ? 8 * NT : 16 * KT, kRightColumns = Rows ? 16 * KT : 8 * NT;
  const Tile<kLeftColumns> left{shared_base()};
  const Tile<kRightColumns> right{shared_base() + 16 * MT * Tile<kLeftColumns>::kRowBytes};
  copy_tile_async<16 * MT, 32>(left, args.left, kLeftColumns, 16 * MT);
  copy_tile_async<kRightRows, 32>(right, args.right, kRightColumns, kRightRows);
  copy_async_commit();
  copy_async_wait<0>();
  warp_barrier();
  uint32_t a[MT][KT][4];
  load_left(a, left, 0, 0);
  float d[MT][NT][4] = {};
  if constexpr (Rows) {
    product_with_rows<E>(d, a, right, 0, 0);
  } else {
    product_with_columns<E>(d, a, right, 0, 0);
  }
  for (int m = 0; m < MT; ++m) {
    for (int n = 0; n < NT; ++n) {
      for (int q = 0; q < 4; ++q) {
        store_global(args.result + (16 * m + accumulator_row(q)) * 8 * NT + accumulator_column(n, q), d[m][n][q]);
      }
    }
  }
}

template <int MT, int NT, int KT>
int run_product(const ProductArgs& args, Element element, bool rows) {
  const Shape shape{.shared_bytes = 2 * 16 * KT * (16 * MT + 8 * NT)};
  if (element == Element::bfloat16) {
    return rows ? launch<product_probe<Element::bfloat16, MT, NT, KT, true>>(shape, nullptr, args)
                : launch<product_probe<Element::bfloat16, MT, NT, KT, false>>(shape, nullptr, args);
  }
  return rows ? launch<product_probe<Element::float16, MT, NT, KT, true>>(shape, nullptr, args)
              : launch<product_probe<Element::float16, MT, NT, KT, false>>(shape, nullptr, args);
}

// left (16 MT, 16 KT); right (8 NT, 16 KT) for rows, else (16 KT, 8 NT); both bf16 or fp16, contiguous.
Tensor product(const Tensor& left, const Tensor& right, bool rows) {
  const int64_t mt = left.size(0) / 16, kt = left.size(1) / 16, nt = right.size(rows ? 0 : 1) / 8;
  Tensor result = empty(left, {left.size(0), 8 * nt}, ScalarType::Float);
  const ProductArgs args{input<uint16_t>(left), input<uint16_t>(right), output<float>(result)};
  const Element element = left.scalar_type() == ScalarType::Half ? Element::float16 : Element::bfloat16;
  int status = -1;
  auto is = [&](int m, int n, int k) { return mt == m && nt == n && kt == k; };
  if (is(1, 4, 2)) status = run_product<1, 4, 2>(args, element, rows);
  if (is(1, 8, 4)) status = run_product<1, 8, 4>(args, element, rows);
  if (is(2, 8, 4)) status = run_product<2, 8, 4>(args, element, rows);
  if (is(1, 16, 8)) status = run_product<1, 16, 8>(args, element, rows);
  if (is(4, 8, 4)) status = run_product<4, 8, 4>(args, element, rows);
  if (is(2, 16, 4)) status = run_product<2, 16, 4>(args, element, rows);
  STD_TORCH_CHECK(status != -1, "product: no such shape");
  STD_TORCH_CHECK(status == 0, "product: ", cuda_status_text(status));
  return result;
}

// ---- speed: the products of an attention kernel's inner loop, repeated
// ---------------------------------------------------------------------------------------------------

__global__ void speed_probe(float* result, int repeats) {
  const Tile<64> tile{shared_base()};
  for (int row = lane_index(); row < 64; row += 32) {
    for (int chunk = 0; chunk < 8; ++chunk) store_shared(tile.address(row, chunk), uint4{0, 0, 0, 0});
  }
  block_barrier();
  uint32_t a[1][4][4] = {};
  float d[1][8][4] = {};
  for (int i = 0; i < repeats; ++i) {
    product_with_rows<Element::bfloat16>(d, a, tile, 0, 0);
    product_with_columns<Element::bfloat16>(d, a, tile, 0, 0);
  }
  store_global(result + thread_index(), d[0][0][0]);
}

Tensor speed(const Tensor& like, int64_t repeats) {
  Tensor result = empty(like, {128}, ScalarType::Float);
  const int status =
      launch<speed_probe>(Shape{.threads = 32, .shared_bytes = 64 * 128}, nullptr, output<float>(result), int(repeats));
  STD_TORCH_CHECK(status == 0, "speed: ", cuda_status_text(status));
  return result;
}

}  // namespace
}  // namespace dinov3_ext

STABLE_TORCH_LIBRARY(dinov3_ext_probes, m) {
  m.def("product(Tensor left, Tensor right, bool rows) -> Tensor");
  m.def("speed(Tensor like, int repeats) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dinov3_ext_probes, CPU, m) {
  m.impl("product", TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::product>::call));
  m.impl("speed", TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::speed>::call));
}
