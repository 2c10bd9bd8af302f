// rope_attention and rope_rotate for torch: checks, allocation, launch.
//
// Any strides are accepted; where the rows are not 16-byte aligned, or the last dimension is not contiguous, the
// kernels get a contiguous copy. A layout of more than kMaxGroups groups is several launches.
#include <vector>

#include "binding/checks.h"
#include "binding/device.h"
#include "binding/ops.h"
#include "core/architecture.h"
#include "ops/rope_attention/rope_attention_plan.h"

namespace dinov3_ext {

#if !defined(DINOV3_EXT_WITH_CUDA)
int rope_rotate_cuda(const RopeRotate&, void*) { return kBuiltWithoutCuda; }
int rope_attention_cuda(const RopeAttention&, void*) { return kBuiltWithoutCuda; }
bool rope_attention_backward_needs_rotated(const RopePacked&) { return false; }
int rope_attention_backward_cuda(const RopeAttentionBackward&, void*) { return kBuiltWithoutCuda; }
#endif

namespace {

constexpr int64_t kAlignment = 16;  // bytes of the kernels' accesses

int64_t stride_of(const Tensor& tensor, int dimension) {
  return tensor.size(dimension) > 1 ? tensor.stride(dimension) : 0;
}

// `tensor`, or a copy whose rows of the last dimension are contiguous and aligned.
Tensor with_aligned_rows(const Tensor& tensor) {
  const int last = int(tensor.dim()) - 1;
  const int64_t size = tensor.element_size();
  bool fits = tensor.size(last) == 1 || tensor.stride(last) == 1;
  if (tensor.numel() > 0) fits = fits && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
  for (int i = 0; i < last; ++i) fits = fits && stride_of(tensor, i) * size % kAlignment == 0;
  if (fits) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

RopeStrides strides_of(const Tensor& tensor) {
  if (tensor.dim() == 3) return {stride_of(tensor, 0), 0, stride_of(tensor, 1)};
  return {stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2)};
}

// A layout's groups, at most kMaxGroups at a time.
struct Packed {
  RopePacked shared;
  std::vector<SequenceGroup> groups;

  // Calls visit(packed) for each part.
  template <class Visit>
  void for_each_part(Visit visit) const {
    for (size_t first = 0; first < groups.size(); first += kMaxGroups) {
      RopePacked part = shared;
      for (size_t i = first; i < groups.size() && i < first + kMaxGroups; ++i)
        part.groups[part.group_count++] = groups[i];
      visit(part);
    }
  }
  template <class Condition>
  bool any_part(Condition condition) const {
    bool any = false;
    for_each_part([&](const RopePacked& part) { any = any || condition(part); });
    return any;
  }
};

// tensor: (tokens, parts, H, E), any other number of parts than `parts` is refused.
Packed check_packed(const char* op, const char* argument, const Tensor& tensor, int64_t parts, const Tensor& rope,
                    const Tensor& sequences, const std::vector<int64_t>& groups) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(1) == parts && tensor.size(2) >= 1 && tensor.size(3) >= 4 &&
                      tensor.size(3) % 4 == 0,
                  op, ": ", argument, " must be (tokens, ", parts, ", H, E) with H >= 1, E a multiple of 4; got ",
                  tensor.dim(), " dimensions, ", tensor.numel(), " elements");
  const int64_t tokens = tensor.size(0), heads = tensor.size(2), width = tensor.size(3);
  STD_TORCH_CHECK(rope.scalar_type() == ScalarType::Float && rope.dim() == 3 && rope.size(1) == 2 &&
                      rope.size(2) == width / 4 && rope.is_contiguous(),
                  op, ": rope must be contiguous float32 (rows, 2, ", width / 4, "); got ", rope.dim(), " dimensions, ",
                  rope.numel(), " elements of ", torch::headeronly::toString(rope.scalar_type()));
  STD_TORCH_CHECK(sequences.scalar_type() == ScalarType::Int && sequences.dim() == 2 &&
                      sequences.size(1) == kSequenceColumns && sequences.is_contiguous(),
                  op, ": sequences must be contiguous int32 (S, ", kSequenceColumns, "); got ", sequences.dim(),
                  " dimensions, ", sequences.numel(), " elements of ",
                  torch::headeronly::toString(sequences.scalar_type()));
  STD_TORCH_CHECK(rope.device() == tensor.device() && sequences.device() == tensor.device(), op,
                  ": rope and sequences must be on the device of ", argument);
  STD_TORCH_CHECK(groups.size() % 2 == 0, op, ": groups must be pairs (count, tokens); got ", groups.size(),
                  " numbers");
  Packed packed{};
  packed.shared.element = element_of(op, argument, tensor);
  packed.shared.heads = int32_t(heads);
  packed.shared.head_width = int32_t(width);
  packed.shared.architecture = device_architecture(tensor.is_cpu() ? 0 : tensor.get_device_index());
  packed.shared.tokens = tokens;
  packed.shared.rope = input<float>(rope);
  packed.shared.sequences = input<int32_t>(sequences);
  int64_t sequence = 0, token = 0;
  for (size_t i = 0; i < groups.size(); i += 2) {
    const int64_t count = groups[i], length = groups[i + 1];
    STD_TORCH_CHECK(count >= 0 && length >= 0 && length <= kMaxTokens, op,
                    ": groups must have count >= 0 and tokens within 0 .. ", kMaxTokens, "; got (", count, ", ", length,
                    ")");
    if (count > 0 && length > 0) packed.groups.push_back({sequence, token, count, int32_t(length)});
    sequence += count, token += count * length;
  }
  STD_TORCH_CHECK(sequence == sequences.size(0) && token == tokens, op, ": groups must add up to ", sequences.size(0),
                  " sequences and ", tokens, " tokens; got ", sequence, " and ", token);
  return packed;
}

void check_kernel(const char* op, const Tensor& qkv, const RopePacked& packed, double scale) {
  if (runs_on_cpu(qkv)) {
    STD_TORCH_CHECK(packed.head_width % 16 == 0, op, ": E must be a multiple of 16 on a CPU; got ", packed.head_width);
  } else {
    STD_TORCH_CHECK(attention_has_kernel(packed.element, packed.head_width), op,
                    ": qkv must be bfloat16 or float16 with E = 64 or 128; got ",
                    torch::headeronly::toString(qkv.scalar_type()), " with E = ", packed.head_width);
  }
  STD_TORCH_CHECK(scale > 0, op, ": scale must be > 0; got ", scale);
}

void check_result(const char* op, const char* argument, const Tensor& tensor, ScalarType type,
                  std::initializer_list<int64_t> sizes) {
  bool fits = tensor.scalar_type() == type && tensor.dim() == int64_t(sizes.size()) && tensor.is_contiguous();
  int dimension = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, op, ": ", argument, " must be as the forward returned it; got ", tensor.dim(), " dimensions, ",
                  tensor.numel(), " elements of ", torch::headeronly::toString(tensor.scalar_type()));
}

Tensor rotate(const char* op, const char* argument, const Tensor& given, int64_t parts, const Tensor& rope,
              const Tensor& sequences, const std::vector<int64_t>& groups, bool inverse) {
  const Packed packed = check_packed(op, argument, given, parts, rope, sequences, groups);
  const Tensor from = with_aligned_rows(given);
  Tensor rotated = empty(from, {from.size(0), 2, from.size(2), from.size(3)}, from.scalar_type());
  RopeRotate args{{}, input(from), strides_of(from), output(rotated), inverse};
  packed.for_each_part([&](const RopePacked& part) {
    args.packed = part;
    launch(op, from, args, rope_rotate_cpu, rope_rotate_cuda);
  });
  return rotated;
}

}  // namespace

Tensor rope_rotate(const Tensor& qkv, const Tensor& rope, const Tensor& sequences, std::vector<int64_t> groups) {
  return rotate("rope_rotate", "qkv", qkv, 3, rope, sequences, groups, false);
}

Tensor rope_rotate_backward(const Tensor& grad, const Tensor& rope, const Tensor& sequences,
                            std::vector<int64_t> groups) {
  return rotate("rope_rotate_backward", "grad", grad, 2, rope, sequences, groups, true);
}

std::tuple<Tensor, Tensor> rope_attention(const Tensor& qkv, const Tensor& rope, const Tensor& sequences,
                                          std::vector<int64_t> groups, double scale) {
  const char* op = "rope_attention";
  const Packed packed = check_packed(op, "qkv", qkv, 3, rope, sequences, groups);
  check_kernel(op, qkv, packed.shared, scale);
  const int64_t tokens = qkv.size(0), heads = qkv.size(2), width = qkv.size(3);
  const Tensor from = with_aligned_rows(qkv);
  const bool needs_rotated = !runs_on_cpu(qkv) && packed.any_part(rope_attention_needs_rotated);
  Tensor rotated = empty(qkv, {needs_rotated ? tokens : 0, 2, heads, width}, qkv.scalar_type());
  Tensor out = empty(qkv, {tokens, heads, width}, qkv.scalar_type());
  Tensor lse = empty(qkv, {heads, tokens}, ScalarType::Float);
  RopeAttention args{{},          input(from),        strides_of(from), needs_rotated ? output(rotated) : nullptr,
                     output(out), output<float>(lse), float(scale)};
  packed.for_each_part([&](const RopePacked& part) {
    args.packed = part;
    launch(op, qkv, args, rope_attention_cpu, rope_attention_cuda);
  });
  return {out, lse};
}

Tensor rope_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& rope, const Tensor& sequences,
                               std::vector<int64_t> groups, const Tensor& out, const Tensor& lse, double scale) {
  const char* op = "rope_attention_backward";
  const Packed packed = check_packed(op, "qkv", qkv, 3, rope, sequences, groups);
  check_kernel(op, qkv, packed.shared, scale);
  const int64_t tokens = qkv.size(0), heads = qkv.size(2), width = qkv.size(3);
  STD_TORCH_CHECK(grad.scalar_type() == qkv.scalar_type() && grad.dim() == 3 && grad.size(0) == tokens &&
                      grad.size(1) == heads && grad.size(2) == width && grad.device() == qkv.device(),
                  op, ": grad must be (", tokens, ", ", heads, ", ", width, ") in the type of qkv; got ", grad.dim(),
                  " dimensions, ", grad.numel(), " elements of ", torch::headeronly::toString(grad.scalar_type()));
  check_result(op, "out", out, qkv.scalar_type(), {tokens, heads, width});
  check_result(op, "lse", lse, ScalarType::Float, {heads, tokens});
  const Tensor from = with_aligned_rows(qkv), grad_from = with_aligned_rows(grad);
  const bool needs_rotated = !runs_on_cpu(qkv) && packed.any_part(rope_attention_backward_needs_rotated);
  Tensor delta = empty(qkv, {heads, tokens}, ScalarType::Float);
  Tensor rotated = empty(qkv, {needs_rotated ? tokens : 0, 2, heads, width}, qkv.scalar_type());
  Tensor qkv_grad = empty(qkv, {tokens, 3, heads, width}, qkv.scalar_type());
  RopeAttentionBackward args{{},
                             input(grad_from),
                             strides_of(grad_from),
                             input(from),
                             strides_of(from),
                             input(out),
                             input<float>(lse),
                             output<float>(delta),
                             needs_rotated ? output(rotated) : nullptr,
                             output(qkv_grad),
                             float(scale)};
  packed.for_each_part([&](const RopePacked& part) {
    args.packed = part;
    launch(op, qkv, args, rope_attention_backward_cpu, rope_attention_backward_cuda);
  });
  return qkv_grad;
}

}  // namespace dinov3_ext
