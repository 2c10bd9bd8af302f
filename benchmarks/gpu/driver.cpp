// Runs every launcher on prepared cases and compares with double precision by the accuracy rule, the CPU kernels in the
// place of plain PyTorch: at most twice what they lose, plus two spacings. Needs no torch and no Python.
//
//   driver [part of a case's name]      built with nvcc's kernels: on the GPU 0
//   emulated_driver [...]               built with the emulator: the same cases without a GPU
//
// Prints a line per result and exits with 1 where one loses more than allowed.
#include <string>

#include "arrays.h"
#include "core/architecture.h"
#include "core/cuda_status.h"
#include "exact.h"
#include "ops/assignment_cross_entropy/assignment_cross_entropy.h"
#include "ops/gram_loss/gram_loss.h"
#include "ops/rope_attention/rope_attention.h"
#include "ops/rope_attention/rope_attention_plan.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp.h"
#include "ops/sinkhorn_knopp/sinkhorn_knopp_plan.h"

namespace driver {

using namespace dinov3_ext;

constexpr float kLog2E = 1.4426950408889634f;

inline void check(int status, const char* what) {
  if (status == 0) return;
  std::fprintf(stderr, "%s: %s\n", what, cuda_status_text(status));
  std::exit(2);
}

// One thread, all of the range at once: what the CPU kernels are given to run on.
void serial(int64_t begin, int64_t end, ParallelBody body, void* context) {
  if (begin < end) body(begin, end, context);
}

std::string wanted;  // part of the names of the cases to run
int failed = 0, compared = 0;

bool skipped(const std::string& name) { return name.find(wanted) == std::string::npos; }

double furthest(const Numbers& x, const Numbers& exact) {
  double most = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (!std::isfinite(x[i])) return INFINITY;
    most = std::max(most, std::abs(x[i] - exact[i]));
  }
  return most;
}

// One result of a case: lost by ours, lost by the CPU kernel, allowed.
void compare(const std::string& name, const char* result, Element element, const Numbers& ours, const Numbers& cpu,
             const Numbers& exact) {
  double largest = 0;
  for (double value : exact) largest = std::max(largest, std::abs(value));
  const double lost = furthest(ours, exact), of_cpu = furthest(cpu, exact);
  const double allowed = 2 * of_cpu + 2 * spacing(element, largest);
  const bool good = std::isfinite(allowed) && lost <= allowed;
  std::printf("%s  %-64s %-9s lost %.2e, CPU %.2e, allowed %.2e\n", good ? "ok  " : "FAIL", name.c_str(), result, lost,
              of_cpu, allowed);
  std::fflush(stdout);
  failed += !good, ++compared;
}

// ---- rope ----

struct Group {
  int count, tokens;
};

struct Rope {
  Packed packed;           // for the double-precision results
  RopePacked args;         // without pointers
  std::vector<int> table;  // sequences
  int rows = 0;            // of the rotary table
};

Rope pack(Element element, int heads, int width, const std::vector<Group>& groups) {
  Rope rope{{0, heads, width, {}}, {}, {}, 0};
  rope.args.element = element, rope.args.heads = heads, rope.args.head_width = width;
#if defined(DINOV3_EXT_EMULATOR)
  rope.args.architecture = device_architecture(0);
#else
  check(cudaSetDevice(0), "device 0");
  rope.args.architecture = device_architecture(0);
#endif
  int token = 0, sequence = 0;
  for (const Group& group : groups) {
    rope.args.groups[rope.args.group_count++] = {sequence, token, group.count, group.tokens};
    for (int i = 0; i < group.count; ++i) {
      const int prefix = std::min(5, group.tokens - 1), patches = group.tokens - prefix;
      const int lines = patches % 2 == 0 ? 2 : 1;
      rope.table.insert(rope.table.end(), {token, group.tokens, prefix, rope.rows, rope.rows + lines, patches / lines});
      rope.rows += lines + patches / lines;
      token += group.tokens, ++sequence;
    }
  }
  rope.packed.tokens = rope.args.tokens = token;
  rope.packed.sequences = rope.table;
  return rope;
}

// int32 numbers travel as the bits of fp32 ones.
Array integers(const std::vector<int>& numbers) {
  return Array(Element::float32, int64_t(numbers.size()), [&](int64_t i) {
    float bits;
    std::memcpy(&bits, &numbers[size_t(i)], 4);
    return double(bits);
  });
}

Array rotary_table(int rows, int width) {
  Normal numbers(7);
  Numbers angle(size_t(rows * width / 4));
  for (double& a : angle) a = 6.3 * numbers.uniform();
  const int quarter = width / 4;
  return Array(Element::float32, int64_t(rows) * 2 * quarter, [&](int64_t i) {
    const double a = angle[size_t(i / (2 * quarter) * quarter + i % quarter)];
    return i / quarter % 2 ? std::sin(a) : std::cos(a);
  });
}

RopePacked with_pointers(const Rope& rope, void* table, void* sequences) {
  RopePacked args = rope.args;
  args.rope = static_cast<const float*>(table), args.sequences = static_cast<const int32_t*>(sequences);
  return args;
}

std::string title(const char* op, Element element, int width, const std::vector<Group>& groups) {
  std::string text = std::string(op) + " " + name_of(element) + " " + std::to_string(width);
  for (const Group& group : groups) text += " " + std::to_string(group.count) + "x" + std::to_string(group.tokens);
  return text;
}

void rope_rotate_case(Element element, int width, const std::vector<Group>& groups) {
  const std::string name = title("rope_rotate", element, width, groups);
  if (skipped(name)) return;
  const int heads = 3;
  const Rope rope = pack(element, heads, width, groups);
  const int64_t row = int64_t(heads) * width;
  Array qkv(element, rope.args.tokens * 3 * row, Normal(1)), table = rotary_table(rope.rows, width);
  Array sequences = integers(rope.table);
  const Numbers input = qkv.host_values();
  for (const bool inverse : {false, true}) {
    Array output(element, rope.args.tokens * 2 * row);
    RopeRotate args{
        with_pointers(rope, table.host(), sequences.host()), qkv.host(), {3 * row, row, width}, output.host(), inverse};
    rope_rotate_cpu(args, serial);
    args.packed = with_pointers(rope, table.device(), sequences.device());
    args.input = qkv.device(), args.output = output.device();
    Array::launch("rope_rotate", [&](void* stream) { return rope_rotate_cuda(args, stream); });
    Numbers turned = input, exact;
    turn(rope.packed, table.host_values(), turned, 3, 2, inverse ? -1 : 1);
    for (int64_t token = 0; token < rope.args.tokens; ++token) {
      const auto from = turned.begin() + token * 3 * row;
      exact.insert(exact.end(), from, from + 2 * row);
    }
    compare(name, inverse ? "back" : "turned", element, output.device_values(), output.host_values(), exact);
  }
}

void rope_attention_case(Element element, int width, const std::vector<Group>& groups) {
  const std::string name = title("rope_attention", element, width, groups);
  if (skipped(name)) return;
  const int heads = 2;
  const Rope rope = pack(element, heads, width, groups);
  const int64_t row = int64_t(heads) * width, tokens = rope.args.tokens;
  const float scale = 1 / std::sqrt(float(width));
  Array qkv(element, tokens * 3 * row, Normal(1)), grad(element, tokens * row, Normal(2));
  Array table = rotary_table(rope.rows, width), sequences = integers(rope.table);
  Array out(element, tokens * row), lse(Element::float32, heads * tokens), delta(Element::float32, heads * tokens);
  Array rotated(element, tokens * 2 * row), gradient(element, tokens * 3 * row);
  const RopeStrides stride{3 * row, row, width}, out_stride{row, 0, width};

  RopeAttention forward{with_pointers(rope, table.host(), sequences.host()),
                        qkv.host(),
                        stride,
                        nullptr,
                        out.host(),
                        lse.host<float>(),
                        scale};
  RopeAttentionBackward backward{forward.packed, grad.host(),       out_stride,          qkv.host(), stride,
                                 out.host(),     lse.host<float>(), delta.host<float>(), nullptr,    gradient.host(),
                                 scale};
  rope_attention_cpu(forward, serial);
  rope_attention_backward_cpu(backward, serial);

  forward.packed = backward.packed = with_pointers(rope, table.device(), sequences.device());
  forward.qkv = backward.qkv = qkv.device();
  forward.rotated = rope_attention_needs_rotated(forward.packed) ? rotated.device() : nullptr;
  forward.out = out.device(), forward.lse = lse.device<float>();
  Array::launch("rope_attention", [&](void* stream) { return rope_attention_cuda(forward, stream); });
  backward.grad = grad.device(), backward.out = out.device(), backward.lse = lse.device<float>();
  backward.delta = delta.device<float>(), backward.qkv_grad = gradient.device();
  backward.rotated = rope_attention_backward_needs_rotated(backward.packed) ? rotated.device() : nullptr;
  Array::launch("rope_attention_backward",
                [&](void* stream) { return rope_attention_backward_cuda(backward, stream); });

  const Attention exact =
      attention(rope.packed, qkv.host_values(), table.host_values(), grad.host_values(), double(scale));
  compare(name, "out", element, out.device_values(), out.host_values(), exact.out);
  compare(name, "gradient", element, gradient.device_values(), gradient.host_values(), exact.gradient);
}

// ---- losses ----

void sinkhorn_case(Element element, int64_t rows, int64_t prototypes) {
  const std::string name =
      std::string("sinkhorn_knopp ") + name_of(element) + " " + std::to_string(rows) + "x" + std::to_string(prototypes);
  if (skipped(name)) return;
  constexpr int kIterations = 3;
  const double temperature = 0.07;
  Array logits(element, rows * prototypes, Normal(3));
  const SinkhornPlan plan = sinkhorn_plan(rows, prototypes, element, 1);
  const int64_t splits = std::max(plan.splits, sinkhorn_splits_cpu(rows)), ranges = plan.ranges;
  const auto fp32 = Element::float32;
  Array partial(fp32, 2 * splits * prototypes + 1), row_partial(fp32, 2 * ranges * rows), shift(fp32, prototypes);
  Array sums(fp32, prototypes), next_columns(fp32, prototypes), columns(fp32, prototypes);
  Array zero(fp32, rows, [](int64_t) { return 0.0; }), row(fp32, rows), next_row(fp32, rows);
  auto potentials = [&](const Numbers& a, const Numbers& c) {
    Numbers sum;
    for (double one : a) {
      for (double other : c) sum.push_back(one + other);
    }
    return sum;
  };

  const Numbers exact = sinkhorn(logits.host_values(), rows, prototypes, temperature, kIterations);
  auto given = [&](const void* data) {
    return SinkhornLogits{
        data, element, rows, prototypes, prototypes, float(kLog2E / temperature), Inverse::of(temperature)};
  };

  // One rank alone: one step a round.
  Array shares(fp32, std::max(sinkhorn_shares_cpu(given(logits.host())), sinkhorn_shares_cuda(given(logits.device()))));
  auto iterate = [&](auto side, auto iteration) {
    SinkhornIteration args{given(side(logits)), true, static_cast<float*>(side(shares)),
                           static_cast<float*>(side(row)), static_cast<float*>(side(columns))};
    for (int i = 0; i < kIterations; ++i, args.first = false) iteration(args);
  };
  iterate([](Array& array) { return array.host(); },
          [](const SinkhornIteration& args) { sinkhorn_iteration_cpu(args, serial); });
  iterate([](Array& array) { return array.device(); },
          [](const SinkhornIteration& args) {
            Array::launch("sinkhorn_iteration", [&](void* stream) { return sinkhorn_iteration_cuda(args, stream); });
          });
  compare(name, "alone", fp32, potentials(row.device_values(), columns.device_values()),
          potentials(row.host_values(), columns.host_values()), exact);

  // Several ranks: three steps a round; `side` picks host or device memory, `step` runs one op there.
  auto run = [&](auto side, auto column_sums, auto finish, auto row_sums) {
    const SinkhornLogits in = given(side(logits));
    auto floats = [&](Array& array) { return static_cast<float*>(side(array)); };
    column_sums(SinkhornColumnSums{in, floats(partial), floats(shift), floats(sums)});
    float *before = floats(zero), *after = floats(row), *spare = floats(next_row);
    float *offset = floats(shift), *found = floats(columns), *other = floats(next_columns);
    for (int iteration = 0; iteration < kIterations; ++iteration) {
      finish(SinkhornFinish{floats(sums), offset, found, prototypes}, iteration == 0);
      const bool more = iteration + 1 < kIterations;
      row_sums(SinkhornRowSums{in, before, found, floats(row_partial), more ? floats(partial) : nullptr, after,
                               more ? floats(sums) : nullptr});
      before = after, std::swap(after, spare);
      offset = found, std::swap(found, other);
    }
  };
  // The first shift is minus the maxima: negated on the host, as Python does between the ops.
  run([](Array& array) { return array.host(); },
      [&](const SinkhornColumnSums& args) {
        sinkhorn_column_sums_cpu(args, serial);
        for (int64_t k = 0; k < prototypes; ++k) args.maxima[k] = -args.maxima[k];
      },
      [&](const SinkhornFinish& args, bool) { sinkhorn_finish_cpu(args, serial); },
      [&](const SinkhornRowSums& args) { sinkhorn_row_sums_cpu(args, serial); });
  Array minus_maxima(fp32, prototypes);
  run([](Array& array) { return array.device(); },
      [&](const SinkhornColumnSums& args) {
        Array::launch("sinkhorn_column_sums", [&](void* stream) { return sinkhorn_column_sums_cuda(args, stream); });
        const Numbers maxima = shift.device_values();
        minus_maxima.overwrite([&](int64_t k) { return -maxima[size_t(k)]; });
      },
      [&](SinkhornFinish args, bool first) {
        if (first) args.shift = minus_maxima.device<float>();
        Array::launch("sinkhorn_finish", [&](void* stream) { return sinkhorn_finish_cuda(args, stream); });
      },
      [&](const SinkhornRowSums& args) {
        Array::launch("sinkhorn_row_sums", [&](void* stream) { return sinkhorn_row_sums_cuda(args, stream); });
      });
  // After three rounds the results lie in `row` and `columns` (the first and the third were written there).
  compare(name, "sums", fp32, potentials(row.device_values(), columns.device_values()),
          potentials(row.host_values(), columns.host_values()), exact);
}

void cross_entropy_case(Element element, int64_t crops, int64_t views, int64_t images, int64_t prototypes) {
  std::string name = std::string("assignment_cross_entropy ") + name_of(element);
  for (int64_t size : {crops, views, images, prototypes}) name += " " + std::to_string(size);
  if (skipped(name)) return;
  const double student_temperature = 0.1, teacher_temperature = 0.07;
  const auto fp32 = Element::float32;
  Array student(element, crops * images * prototypes, Normal(4)),
      teacher(element, views * images * prototypes, Normal(5));
  const Numbers balanced = sinkhorn(teacher.host_values(), views * images, prototypes, teacher_temperature, 3);
  // rows[b] + columns[k] in two parts, columns[0] = 0.
  Array rows(fp32, views * images, [&](int64_t b) { return balanced[size_t(b * prototypes)]; });
  Array columns(fp32, prototypes, [&](int64_t k) { return balanced[size_t(k)] - balanced[0]; });
  Array weight(fp32, images, [](int64_t b) { return 0.25 + 0.125 * double(b % 5); });
  Array grad(fp32, crops * views, Normal(6));
  Array workspace(fp32, assignment_cross_entropy_workspace_cuda(crops, views, images, prototypes) + 1);
  // log_sums: doubles.
  Array losses(fp32, crops * views), log_sums(fp32, 2 * crops * images), gradient(element, crops * images * prototypes);

  auto problem = [&](auto side) {
    auto floats = [&](Array& array) { return static_cast<const float*>(side(array)); };
    const int64_t crop_stride = images * prototypes;
    return AssignmentProblem{{side(student), crops, crop_stride, prototypes},
                             {side(teacher), views, crop_stride, prototypes},
                             element,
                             images,
                             prototypes,
                             floats(rows),
                             floats(columns),
                             floats(weight),
                             float(kLog2E / student_temperature),
                             float(kLog2E / teacher_temperature),
                             teacher_temperature,
                             Inverse::of(student_temperature),
                             Inverse::of(teacher_temperature)};
  };
  const AssignmentProblem here = problem([](Array& array) { return array.host(); });
  const AssignmentProblem there = problem([](Array& array) { return array.device(); });
  assignment_cross_entropy_cpu({here, nullptr, losses.host<float>(), log_sums.host<double>()}, serial);
  assignment_cross_entropy_backward_cpu(
      {here, log_sums.host<double>(), grad.host<float>(), gradient.host(), images * prototypes, prototypes}, serial);
  Array::launch("assignment_cross_entropy", [&](void* stream) {
    return assignment_cross_entropy_cuda(
        {there, workspace.device<float>(), losses.device<float>(), log_sums.device<double>()}, stream);
  });
  Array::launch("assignment_cross_entropy_backward", [&](void* stream) {
    return assignment_cross_entropy_backward_cuda(
        {there, log_sums.device<double>(), grad.device<float>(), gradient.device(), images * prototypes, prototypes},
        stream);
  });
  const CrossEntropy exact = cross_entropy(student.host_values(), teacher.host_values(), rows.host_values(),
                                           columns.host_values(), weight.host_values(), grad.host_values(), crops,
                                           views, images, prototypes, student_temperature, teacher_temperature);
  compare(name, "losses", fp32, losses.device_values(), losses.host_values(), exact.losses);
  compare(name, "gradient", element, gradient.device_values(), gradient.host_values(), exact.gradient);
}

void gram_case(Element element, int64_t images, int64_t patches, int64_t width) {
  std::string name = std::string("gram_loss ") + name_of(element);
  for (int64_t size : {images, patches, width}) name += " " + std::to_string(size);
  if (skipped(name)) return;
  const int64_t count = images * patches * width;
  const auto fp32 = Element::float32;
  Array teacher(element, count, Normal(8));
  Normal noise(9, 0.2);
  Array student(element, count, [&](int64_t i) { return teacher[i] + noise(); });
  Array loss(fp32, 1), gradient(gram_grad_element(element), count);
  const GramFeatures here_student{student.host(), element, patches * width, width, 1};
  const GramFeatures here_teacher{teacher.host(), element, patches * width, width, 1};
  GramLoss args{here_student,   here_teacher,       images,          patches, width,
                GramClip::none, loss.host<float>(), gradient.host(), nullptr};
  const int64_t bytes = std::max(gram_loss_workspace_cpu(args), gram_loss_workspace_cuda(args));
  Array workspace(fp32, bytes / 4 + 1);
  args.workspace = workspace.host();
  gram_loss_cpu(args, serial);
  args.student.data = student.device(), args.teacher.data = teacher.device(), args.loss = loss.device<float>();
  args.grad = gradient.device(), args.workspace = workspace.device();
  Array::launch("gram_loss", [&](void* stream) { return gram_loss_cuda(args, stream); });
  const Gram exact = gram(student.host_values(), teacher.host_values(), images, patches, width);
  compare(name, "loss", fp32, loss.device_values(), loss.host_values(), {exact.loss});
  // For an fp16 student the gradient waits in fp32 and is rounded to fp16 behind its upstream factor.
  compare(name, "gradient", element, gradient.device_values(), gradient.host_values(), exact.gradient);
}

void all_cases() {
  const std::vector<Element> halves{Element::bfloat16, Element::float16};
  const std::vector<Element> floats{Element::bfloat16, Element::float16, Element::float32};
  for (const Element element : halves) {
    for (const int width : {64, 128}) {
      for (const int tokens : {1, 6, 16, 54, 65, 201, 273}) rope_attention_case(element, width, {{2, tokens}});
      rope_attention_case(element, width, {{1, 261}, {3, 54}, {1, 330}});
    }
  }
  for (const Element element : floats) {
    for (const int width : {64, 128}) rope_rotate_case(element, width, {{2, 21}, {1, 7}});
    for (const auto& [rows, prototypes] : {std::pair<int64_t, int64_t>{3, 7}, {128, 2048}, {40, 5001}}) {
      sinkhorn_case(element, rows, prototypes);
    }
    cross_entropy_case(element, 1, 1, 70, 2048);
    cross_entropy_case(element, 5, 2, 4, 1003);
    cross_entropy_case(element, 2, 3, 2, 64);
    gram_case(element, 2, 49, 384);
    gram_case(element, 1, 200, 129);
    gram_case(element, 3, 1, 8);
  }
}

}  // namespace driver

int main(int count, char** words) {
  if (count > 1) driver::wanted = words[1];
  driver::all_cases();
  std::printf("%d of %d results lose more than allowed\n", driver::failed, driver::compared);
  return driver::failed || !driver::compared ? 1 : 0;
}
