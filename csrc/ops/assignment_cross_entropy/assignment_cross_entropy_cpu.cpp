// Cross-entropy against assignments on the CPU. Forward and backward read each logit from memory once and hold a few
// thousand assignments at a time: a block of columns of one image, its probabilities in the first-level cache, then
// every student crop against them.
//
// Two exponentials an element (the student's and the assignment's) are the work; no maximum is searched for the
// student's: the largest of a row's first columns is nearly always good enough as the shift, and a sum that shows
// otherwise is taken again. Work is cut by shape, never by the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/cpu_logits.h"
#include "core/cpu_variant.h"
#include "ops/assignment_cross_entropy/assignment_cross_entropy.h"

namespace dinov3_ext {
namespace {

constexpr int64_t kColumnsAtOnce = 1024;                   // of the assignments held at a time
constexpr double kSmallest = 0x1p-60, kLargest = 0x1p100;  // row sums outside: the guess of the shift was not good

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

const void* row_of(const AssignmentLogits& logits, Element element, int64_t crop, int64_t image) {
  const int64_t index = crop * logits.crop_stride + image * logits.row_stride;
  return static_cast<const char*>(logits.data) + index * size_of(element);
}

// ---- pieces of a row ------------------------------------------------------------------------------------------------

// Exponents in base 2: stretch (scale x + base (rows + columns)). scale / base is 1 / temperature to some 1e-8 where
// log2(e) and log2(e) / temperature, each rounded, miss it by up to 1e-7: times the logits' size of 50 or more, an
// error of all assignments in one direction. `base` is up to four steps off log2(e), and `stretch` makes that good.
struct Exponents {
  float scale, base, stretch;

  explicit Exponents(double temperature) {
    double least = 1;
    for (int step = -4; step <= 4; ++step) {
      const float near = bits_as<float>(bits_as<uint32_t>(kLog2E) + step), its_scale = float(near / temperature);
      const float its_stretch = float(M_LOG2E / near);
      const double error =
          64 * std::abs(its_scale * temperature / near - 1) + 16 * std::abs(its_stretch * near / M_LOG2E - 1);
      if (error < least) least = error, scale = its_scale, base = near, stretch = its_stretch;
    }
  }
};

// What assignments of a view and image are computed with: exp2(scale x + base columns + shift) is the assignment but
// for the factor `rest`, whose place is where sums have been taken.
struct Assignments {
  const void* row;
  const float* columns;
  float scale, base, stretch, shift;

  Assignments(const AssignmentProblem& problem, const Exponents& exponents, int64_t view, int64_t image)
      : row(row_of(problem.teacher, problem.element, view, image)),
        columns(problem.columns),
        scale(exponents.scale),
        base(exponents.base),
        stretch(exponents.stretch),
        shift(float(exact_shift(problem, exponents, view, image))) {}

  static double exact_shift(const AssignmentProblem& problem, const Exponents& exponents, int64_t view, int64_t image) {
    return double(exponents.base) * problem.rows[view * problem.images + image];
  }
  static double rest(const AssignmentProblem& problem, const Exponents& exponents, int64_t view, int64_t image) {
    const double exact = exact_shift(problem, exponents, view, image), rest = exact - float(exact);
    return std::isfinite(rest) ? std::exp2(rest) : 1;
  }
};

// Assignments / rest for columns [begin, end), in the order of load_two; zeros fill the last two vectors. Their sum is
// returned.
template <Element E, int W>
DINOV3_EXT_INLINE float assignments(const Assignments& of, int64_t begin, int64_t end, float* p) {
  using Float = typename Vector<W>::Float;
  const Float stretch = splat<W>(of.stretch);
  Two<W> sum{splat<W>(0.f), splat<W>(0.f)};
  for (int64_t k = begin; k < end; k += 2 * W) {
    float padded[2 * W];
    Two<W> x, columns;
    if (end - k >= 2 * W) {
      x = load_two<E, W>(of.row, k);
      prefetch_two<E, W>(of.row, k + kColumnsAtOnce);
      columns = load_two_of<E, W>(of.columns + k);
    } else {
      x = load_two_tail<E, W>(of.row, k, end - k);
      std::fill(padded, padded + 2 * W, -std::numeric_limits<float>::infinity());
      std::copy(of.columns + k, of.columns + end, padded);
      columns = load_two_of<E, W>(padded);
    }
    x.first = exp2_stretched<W>(exponent<W>(of.scale, x.first, of.base, columns.first, of.shift), stretch);
    x.second = exp2_stretched<W>(exponent<W>(of.scale, x.second, of.base, columns.second, of.shift), stretch);
    store<W>(p + (k - begin), x.first);
    store<W>(p + (k - begin) + W, x.second);
    sum.first += x.first, sum.second += x.second;
  }
  return sum_lanes<W>(sum.first + sum.second);
}

// The largest of columns [begin, end) of a row in units of log2, as a shift: 0 where there is none.
template <Element E, int W>
DINOV3_EXT_INLINE float largest(const void* row, float scale, int64_t begin, int64_t end) {
  using Float = typename Vector<W>::Float;
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t whole = begin + (end - begin) / W * W;
  Float maximum = splat<W>(-infinity);
  for (int64_t k = begin; k < whole; k += W) maximum = larger<W>(maximum, load_element<E, W>(row, k));
  if (const int64_t rest = end - whole) {
    const Float x = load_element_tail<E, W>(row, whole, rest);
    maximum = larger<W>(maximum, keep_first<W>(x, rest, splat<W>(-infinity)));
  }
  float highest = -infinity;
  for (int lane = 0; lane < W; ++lane) highest = maximum[lane] > highest ? maximum[lane] : highest;
  return std::isfinite(highest) ? highest * scale : 0.f;
}

// What a segment of a student row gives, with t = scale x - shift: the sum of exp2(t) and, for each view, the sums of
// p t and of p. The last is nearly one over a whole row; with it the loss is the sum of p (log_sum - s) exactly.
struct Share {
  double sum;
  double* dots;    // (views,)
  double* masses;  // (views,), behind the dots
};

// Adds columns [begin, end) to `share`: the sum of the exponentials, and the dots of `Views` views whose assignments
// are kColumnsAtOnce apart.
template <Element E, int W, int Views, bool Sum>
DINOV3_EXT_INLINE void add_block(const void* row, float scale, float shift, int64_t begin, int64_t end, const float* p,
                                 Share& share, double* dots) {
  using Float = typename Vector<W>::Float;
  const Float zero = splat<W>(0.f);
  Two<W> sum{zero, zero}, dot[Views + 1];
  for (int v = 0; v < Views; ++v) dot[v] = {zero, zero};
  const int64_t whole = begin + (end - begin) / (2 * W) * (2 * W);
  for (int64_t k = begin; k < whole; k += 2 * W) {
    const Two<W> x = load_two<E, W>(row, k);
    if constexpr (Sum) prefetch_two<E, W>(row, k + kColumnsAtOnce);
    const Two<W> t{exponent<W>(scale, x.first, -shift), exponent<W>(scale, x.second, -shift)};
    if constexpr (Sum) sum.first += exp2_flushed<W>(t.first), sum.second += exp2_flushed<W>(t.second);
    for (int v = 0; v < Views; ++v) {
      const float* one = p + v * kColumnsAtOnce + (k - begin);
      dot[v].first += load<W>(one) * t.first;
      dot[v].second += load<W>(one + W) * t.second;
    }
  }
  if (whole < end) {
    typename Vector<W>::Int first, second;
    first_of_two<E, W>(end - whole, first, second);
    const Two<W> x = load_two_tail<E, W>(row, whole, end - whole);
    const Two<W> t{exponent<W>(scale, x.first, -shift), exponent<W>(scale, x.second, -shift)};
    if constexpr (Sum) {
      sum.first += first ? exp2_flushed<W>(t.first) : zero;
      sum.second += second ? exp2_flushed<W>(t.second) : zero;
    }
    for (int v = 0; v < Views; ++v) {
      const float* one = p + v * kColumnsAtOnce + (whole - begin);
      dot[v].first += first ? load<W>(one) * t.first : zero;
      dot[v].second += second ? load<W>(one + W) * t.second : zero;
    }
  }
  if constexpr (Sum) share.sum += sum_lanes<W>(sum.first + sum.second);
  for (int v = 0; v < Views; ++v) dots[v] += sum_lanes<W>(dot[v].first + dot[v].second);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// One image, columns [begin, end), student crops [first, last) with the shifts of those crops; `p`: space for
// (views, kColumnsAtOnce).
template <Element E, int W>
DINOV3_EXT_INLINE void forward_segment(const AssignmentProblem& problem, const Exponents& exponents, int64_t image,
                                       int64_t begin, int64_t end, int64_t first, int64_t last, const float* shifts,
                                       Share* shares, float* p) {
  const int64_t views = problem.teacher.crops;
  for (int64_t c = first; c < last; ++c) {
    shares[c].sum = 0;
    std::fill(shares[c].dots, shares[c].dots + 2 * views, 0.);
  }
  for (int64_t k = begin; k < end; k += kColumnsAtOnce) {
    const int64_t behind = std::min(k + kColumnsAtOnce, end);
    for (int64_t v = 0; v < views; ++v) {
      const float mass =
          assignments<E, W>(Assignments(problem, exponents, v, image), k, behind, p + v * kColumnsAtOnce);
      for (int64_t c = first; c < last; ++c) shares[c].masses[v] += mass;
    }
    for (int64_t c = first; c < last; ++c) {
      const void* row = row_of(problem.student, E, c, image);
      const float scale = problem.student_scale;
      double* dots = shares[c].dots;
      if (views == 0) add_block<E, W, 0, true>(row, scale, shifts[c], k, behind, p, shares[c], dots);
      if (views == 1) add_block<E, W, 1, true>(row, scale, shifts[c], k, behind, p, shares[c], dots);
      if (views >= 2) add_block<E, W, 2, true>(row, scale, shifts[c], k, behind, p, shares[c], dots);
      for (int64_t v = 2; v < views; ++v) {
        const float* one = p + v * kColumnsAtOnce;
        add_block<E, W, 1, false>(row, scale, shifts[c], k, behind, one, shares[c], dots + v);
      }
    }
  }
}

template <Element E, int W>
DINOV3_EXT_INLINE float first_shift(const AssignmentProblem& problem, int64_t crop, int64_t image, bool whole_row) {
  const int64_t columns = whole_row ? problem.prototypes : std::min(kColumnsAtOnce, problem.prototypes);
  return largest<E, W>(row_of(problem.student, E, crop, image), problem.student_scale, 0, columns);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// gradient = factor exp2(scale x - shift) - sum over views of shares[v] p[v] in columns [begin, end) of one student
// row.
template <Element E, int W, int Views>
DINOV3_EXT_INLINE void gradient_block(const void* row, float scale, float shift, float factor, const float* shares,
                                      int64_t views, int64_t begin, int64_t end, const float* p, void* gradient) {
  for (int64_t k = begin; k < end; k += 2 * W) {
    const int64_t rest = end - k;
    const Two<W> x = rest >= 2 * W ? load_two<E, W>(row, k) : load_two_tail<E, W>(row, k, rest);
    prefetch_two<E, W>(row, k + kColumnsAtOnce);
    Two<W> g{exp2_flushed<W>(exponent<W>(scale, x.first, -shift)) * factor,
             exp2_flushed<W>(exponent<W>(scale, x.second, -shift)) * factor};
    const int64_t count = Views ? Views : views;
    for (int64_t v = 0; v < count; ++v) {
      const float* one = p + v * kColumnsAtOnce + (k - begin);
      g.first -= load<W>(one) * shares[v];
      g.second -= load<W>(one + W) * shares[v];
    }
    if (rest >= 2 * W) {
      store_two<E, W>(gradient, k, g);
    } else {
      store_two_tail<E, W>(gradient, k, g, rest);
    }
  }
}

// The logarithm of a student row's sum in base 2. It is used rounded; what rounding has taken is made good in the row's
// factor.
double student_log2_sum(const AssignmentCrossEntropyBackward& args, int64_t crop, int64_t image) {
  const int64_t index = crop * args.problem.images + image;
  return args.log_sums[index] * M_LOG2E;
}

// One image, columns [begin, end). `factors` (crops,), `shares` (crops, views): weights of this image.
template <Element E, int W>
DINOV3_EXT_INLINE void backward_segment(const AssignmentCrossEntropyBackward& args, const Exponents& exponents,
                                        int64_t image, int64_t begin, int64_t end, const float* factors,
                                        const float* shares, float* p) {
  const AssignmentProblem& problem = args.problem;
  const int64_t views = problem.teacher.crops;
  for (int64_t k = begin; k < end; k += kColumnsAtOnce) {
    const int64_t behind = std::min(k + kColumnsAtOnce, end);
    for (int64_t v = 0; v < views; ++v) {
      assignments<E, W>(Assignments(problem, exponents, v, image), k, behind, p + v * kColumnsAtOnce);
    }
    for (int64_t c = 0; c < problem.student.crops; ++c) {
      const void* row = row_of(problem.student, E, c, image);
      const float shift = float(student_log2_sum(args, c, image)), scale = problem.student_scale;
      void* gradient = static_cast<char*>(args.gradient) +
                       (c * args.gradient_crop_stride + image * args.gradient_row_stride) * size_of(E);
      const float *share = shares + c * views, factor = factors[c];
      if (views == 1) {
        gradient_block<E, W, 1>(row, scale, shift, factor, share, views, k, behind, p, gradient);
      } else if (views == 2) {
        gradient_block<E, W, 2>(row, scale, shift, factor, share, views, k, behind, p, gradient);
      } else {
        gradient_block<E, W, 0>(row, scale, shift, factor, share, views, k, behind, p, gradient);
      }
    }
  }
}

// ---- one set of functions per instruction set ----

struct Kernels {
  void (*forward)(const AssignmentProblem&, const Exponents&, int64_t image, int64_t begin, int64_t end, int64_t first,
                  int64_t last, const float* shifts, Share*, float* p);
  float (*shift)(const AssignmentProblem&, int64_t crop, int64_t image, bool whole_row);
  void (*backward)(const AssignmentCrossEntropyBackward&, const Exponents&, int64_t image, int64_t begin, int64_t end,
                   const float* factors, const float* shares, float* p);
};

#define KERNELS_OF(TARGET, NAME, W)                                                                                  \
  template <Element E>                                                                                               \
  TARGET void forward_##NAME(const AssignmentProblem& problem, const Exponents& exponents, int64_t image,            \
                             int64_t begin, int64_t end, int64_t first, int64_t last, const float* shifts,           \
                             Share* shares, float* p) {                                                              \
    forward_segment<E, W>(problem, exponents, image, begin, end, first, last, shifts, shares, p);                    \
  }                                                                                                                  \
  template <Element E>                                                                                               \
  TARGET float shift_##NAME(const AssignmentProblem& problem, int64_t crop, int64_t image, bool whole_row) {         \
    return first_shift<E, W>(problem, crop, image, whole_row);                                                       \
  }                                                                                                                  \
  template <Element E>                                                                                               \
  TARGET void backward_##NAME(const AssignmentCrossEntropyBackward& args, const Exponents& exponents, int64_t image, \
                              int64_t begin, int64_t end, const float* factors, const float* shares, float* p) {     \
    backward_segment<E, W>(args, exponents, image, begin, end, factors, shares, p);                                  \
  }                                                                                                                  \
  template <Element E>                                                                                               \
  constexpr Kernels kernels_##NAME{forward_##NAME<E>, shift_##NAME<E>, backward_##NAME<E>};

KERNELS_OF(, portable, 4)
#if defined(__x86_64__)
KERNELS_OF(DINOV3_EXT_AVX2, avx2, 8)
KERNELS_OF(DINOV3_EXT_AVX512, avx512, 16)
#endif

const Kernels& kernels_of(Element element) {
  return with_element(element, []<Element E>() -> const Kernels& {
#if defined(__x86_64__)
    return choose_by_variant(kernels_portable<E>, kernels_avx2<E>, kernels_avx512<E>);
#else
    return kernels_portable<E>;
#endif
  });
}

// A row is cut where there are few images, into segments of whole blocks.
struct Cut {
  int64_t columns, segments;  // of a segment, of a row

  explicit Cut(const AssignmentProblem& problem) {
    const int64_t blocks = divide_up(problem.prototypes, kColumnsAtOnce);
    const int64_t wanted = std::clamp<int64_t>(divide_up(64, std::max<int64_t>(problem.images, 1)), 1, blocks);
    columns = divide_up(blocks, wanted) * kColumnsAtOnce;
    segments = divide_up(problem.prototypes, columns);
  }
};

double weight_of(const AssignmentProblem& problem, int64_t image) {
  return problem.weight ? problem.weight[image] : 1. / double(problem.images);
}

}  // namespace

void assignment_cross_entropy_cpu(const AssignmentCrossEntropy& args, ParallelFor parallel_for) {
  const AssignmentProblem& problem = args.problem;
  const int64_t crops = problem.student.crops, views = problem.teacher.crops, images = problem.images;
  const Cut cut(problem);
  // Shares of (image, segment, crop); the first segment's hold the sum over the segments in the end.
  std::vector<Share> shares(images * cut.segments * crops);
  std::vector<double> dots(shares.size() * 2 * views);
  std::vector<float> shifts(images * crops);
  for (size_t i = 0; i < shares.size(); ++i) {
    shares[i].dots = dots.data() + i * 2 * views;
    shares[i].masses = shares[i].dots + views;
  }
  struct Task {
    const AssignmentCrossEntropy& args;
    const Kernels& kernels;
    Exponents exponents;
    Cut cut;
    Share* shares;
    float* shifts;
  } task{args, kernels_of(problem.element), Exponents(problem.teacher_temperature), cut, shares.data(), shifts.data()};

  parallel_for(
      0, images * crops,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const int64_t crops = task.args.problem.student.crops;
        for (int64_t i = begin; i < end; ++i) {
          task.shifts[i] = task.kernels.shift(task.args.problem, i % crops, i / crops, false);
        }
      },
      &task);
  parallel_for(
      0, images * cut.segments,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const FlushDenormals flush;
        const AssignmentProblem& problem = task.args.problem;
        const int64_t crops = problem.student.crops;
        std::vector<float> p(problem.teacher.crops * kColumnsAtOnce);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / task.cut.segments, first = i % task.cut.segments * task.cut.columns;
          task.kernels.forward(problem, task.exponents, image, first,
                               std::min(first + task.cut.columns, problem.prototypes), 0, crops,
                               task.shifts + image * crops, task.shares + i * crops, p.data());
        }
      },
      &task);
  parallel_for(
      0, images * crops,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const FlushDenormals flush;
        const AssignmentProblem& problem = task.args.problem;
        const int64_t crops = problem.student.crops, views = problem.teacher.crops;
        std::vector<float> p;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / crops, c = i % crops;
          Share* shares = task.shares + image * task.cut.segments * crops;
          for (int64_t segment = 1; segment < task.cut.segments; ++segment) {
            const Share& more = shares[segment * crops + c];
            shares[c].sum += more.sum;
            for (int64_t v = 0; v < 2 * views; ++v) shares[c].dots[v] += more.dots[v];  // and masses
          }
          if (!(shares[c].sum >= kSmallest && shares[c].sum <= kLargest)) {
            p.resize(views * kColumnsAtOnce);
            task.shifts[i] = task.kernels.shift(problem, c, image, true);
            task.kernels.forward(problem, task.exponents, image, 0, problem.prototypes, c, c + 1,
                                 task.shifts + image * crops, shares, p.data());
          }
          const double logarithm = std::log2(shares[c].sum);
          task.args.log_sums[c * problem.images + image] = (task.shifts[i] + logarithm) * M_LN2;
          for (int64_t v = 0; v < views; ++v) {
            const double rest = Assignments::rest(problem, task.exponents, v, image);
            shares[c].dots[v] = (logarithm * shares[c].masses[v] - shares[c].dots[v]) * rest * M_LN2;
          }
        }
      },
      &task);
  for (int64_t c = 0; c < crops; ++c) {
    for (int64_t v = 0; v < views; ++v) {
      double loss = 0;
      for (int64_t image = 0; image < images; ++image) {
        loss += weight_of(problem, image) * shares[image * cut.segments * crops + c].dots[v];
      }
      args.losses[c * views + v] = float(loss);
    }
  }
}

void assignment_cross_entropy_backward_cpu(const AssignmentCrossEntropyBackward& args, ParallelFor parallel_for) {
  struct Task {
    const AssignmentCrossEntropyBackward& args;
    const Kernels& kernels;
    Exponents exponents;
    Cut cut;
  } task{args, kernels_of(args.problem.element), Exponents(args.problem.teacher_temperature), Cut(args.problem)};
  parallel_for(
      0, args.problem.images * task.cut.segments,
      [](int64_t begin, int64_t end, void* context) {
        const Task& task = *static_cast<const Task*>(context);
        const FlushDenormals flush;
        const AssignmentProblem& problem = task.args.problem;
        const int64_t crops = problem.student.crops, views = problem.teacher.crops;
        std::vector<float> p(views * kColumnsAtOnce), factors(crops), shares(crops * views);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / task.cut.segments, first = i % task.cut.segments * task.cut.columns;
          const double scale = weight_of(problem, image) * problem.student_scale * M_LN2;
          for (int64_t c = 0; c < crops; ++c) {
            double total = 0;
            for (int64_t v = 0; v < views; ++v) {
              total += task.args.grad[c * views + v];
              const double rest = Assignments::rest(problem, task.exponents, v, image);
              shares[c * views + v] = float(scale * rest * task.args.grad[c * views + v]);
            }
            const double log_sum = student_log2_sum(task.args, c, image), rest = float(log_sum) - log_sum;
            factors[c] = float(scale * total * (std::isfinite(rest) ? std::exp2(rest) : 1));
          }
          task.kernels.backward(task.args, task.exponents, image, first,
                                std::min(first + task.cut.columns, problem.prototypes), factors.data(), shares.data(),
                                p.data());
        }
      },
      &task);
}

}  // namespace dinov3_ext
