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

// The same by operands held in registers, the left one by its transpose: left is (16 KT, 16 MT).
template <Element E, int MT, int NT, int KT, bool Rows>
__global__ void operands_probe(ProductArgs args) {
  constexpr int kLeftColumns = 16 * MT, kRightRows = Rows ? 8 * NT : 16 * KT, kRightColumns = Rows ? 16 * KT : 8 * NT;
  const Tile<kLeftColumns> left{shared_base()};
  const Tile<kRightColumns> right{shared_base() + 16 * KT * Tile<kLeftColumns>::kRowBytes};
  copy_tile_async<16 * KT, 32>(left, args.left, kLeftColumns, 16 * KT);
  copy_tile_async<kRightRows, 32>(right, args.right, kRightColumns, kRightRows);
  copy_async_commit();
  copy_async_wait<0>();
  warp_barrier();
  uint32_t a[MT][KT][4];
  load_left_transposed(a, left, 0, 0);
  float d[MT][NT][4] = {};
  for (int k = 0; k < KT; ++k) {
    uint32_t b[NT / 2][4];
    if constexpr (Rows) {
      load_right_rows<NT>(b, right, 0, 16 * k);
    } else {
      load_right_columns<NT>(b, right, 16 * k, 0);
    }
    for (int m = 0; m < MT; ++m) product_of_operands<E>(d[m], a[m][k], b);
  }
  for (int m = 0; m < MT; ++m) {
    for (int n = 0; n < NT; ++n) {
      for (int q = 0; q < 4; ++q) {
        store_global(args.result + (16 * m + accumulator_row(q)) * 8 * NT + accumulator_column(n, q), d[m][n][q]);
      }
    }
  }
}

// left (16 KT, 16 MT), right as below: 32 or 64 wide tiles of bf16.
Tensor operands(const Tensor& left, const Tensor& right, bool rows) {
  const int64_t nt = right.size(rows ? 0 : 1) / 8;
  Tensor result = empty(left, {left.size(1), 8 * nt}, ScalarType::Float);
  const ProductArgs args{input<uint16_t>(left), input<uint16_t>(right), output<float>(result)};
  constexpr Element kElement = Element::bfloat16;
  STD_TORCH_CHECK(left.size(0) == 64 && left.size(1) == 32 && nt == 8, "operands: no such shape");
  const Shape shape{.shared_bytes = 2 * 64 * (32 + 64)};
  const int status = rows ? launch<operands_probe<kElement, 2, 8, 4, true>>(shape, nullptr, args)
                          : launch<operands_probe<kElement, 2, 8, 4, false>>(shape, nullptr, args);
  STD_TORCH_CHECK(status == 0, "operands: ", cuda_status_text(status));
  return result;
}

// ---- addresses of a tile: (rows, chunks) of 16 bytes, then those that the 32 lanes pass for the four kinds of operand
// at (row, column): (4, 32)

template <int Columns>
__global__ void addresses_probe(int32_t* result, int rows, int row, int column) {
  const Tile<Columns> tile{1024};
  const int lane = lane_index();
  for (int r = lane; r < rows; r += 32) {
    for (int c = 0; c < Columns / 8; ++c) store_global(result + r * (Columns / 8) + c, int32_t(tile.address(r, c)));
  }
  int32_t* of_lanes = result + rows * (Columns / 8) + lane;
  store_global(of_lanes, int32_t(left_address(tile, row, column, lane)));
  store_global(of_lanes + 32, int32_t(left_address_transposed(tile, row, column, lane)));
  store_global(of_lanes + 64, int32_t(right_address_rows(tile, row, column, lane)));
  store_global(of_lanes + 96, int32_t(right_address_columns(tile, row, column, lane)));
}

Tensor addresses(const Tensor& like, int64_t columns, int64_t rows, int64_t row, int64_t column) {
  Tensor result = empty(like, {rows * columns / 8 + 128}, ScalarType::Int);
  auto* to = output<int32_t>(result);
  int status = -1;
  auto run = [&]<int Columns>() {
    if (columns == Columns) {
      status = launch<addresses_probe<Columns>>(Shape{}, nullptr, to, int(rows), int(row), int(column));
    }
  };
  run.operator()<32>(), run.operator()<64>(), run.operator()<128>(), run.operator()<192>(), run.operator()<256>();
  STD_TORCH_CHECK(status == 0, "addresses: ", cuda_status_text(status));
  return result;
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
  m.def("operands(Tensor left, Tensor right, bool rows) -> Tensor");
  m.def("addresses(Tensor like, int columns, int rows, int row, int column) -> Tensor");
  m.def("speed(Tensor like, int repeats) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dinov3_ext_probes, CPU, m) {
  m.impl("product", TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::product>::call));
  m.impl("operands", TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::operands>::call));
  m.impl("addresses", TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::addresses>::call));
  m.impl("speed", TORCH_BOX(&dinov3_ext::emulator::AsOperation<&dinov3_ext::speed>::call));
}
