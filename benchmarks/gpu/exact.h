// The ops in double precision, as their headers in csrc/ops define them: plain loops, nothing clever.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace driver {

using Numbers = std::vector<double>;

// ---- rope: qkv (tokens, 3, H, E), rope (rows, 2, E/4), sequences (S, 6) ----

struct Packed {
  int64_t tokens;
  int heads, width;
  std::vector<int> sequences;  // rows of six
};

// Angles of one token of one sequence: cosines and sines of E/2 components.
inline void angles_of(const Packed& p, const Numbers& rope, size_t sequence, int64_t token, Numbers& cosine,
                      Numbers& sine) {
  const int* s = &p.sequences[sequence * 6];
  const int quarter = p.width / 4;
  const int64_t patch = token - s[2];
  for (int e = 0; e < p.width / 2; ++e) {
    if (patch < 0) {
      cosine[size_t(e)] = 1, sine[size_t(e)] = 0;
      continue;
    }
    const int64_t row = e < quarter ? s[3] + patch / s[5] : s[4] + patch % s[5];
    cosine[size_t(e)] = rope[size_t((row * 2) * quarter + e % quarter)];
    sine[size_t(e)] = rope[size_t((row * 2 + 1) * quarter + e % quarter)];
  }
}

// Turns parts 0 .. parts - 1 of x (tokens, stride_parts, H, E) in place; direction 1, or -1: back.
inline void turn(const Packed& p, const Numbers& rope, Numbers& x, int stride_parts, int parts, int direction) {
  Numbers cosine(size_t(p.width / 2)), sine(size_t(p.width / 2));
  for (size_t sequence = 0; sequence * 6 < p.sequences.size(); ++sequence) {
    const int* s = &p.sequences[sequence * 6];
    for (int64_t token = 0; token < s[1]; ++token) {
      angles_of(p, rope, sequence, token, cosine, sine);
      for (int part = 0; part < parts; ++part) {
        for (int head = 0; head < p.heads; ++head) {
          double* row = &x[size_t((((s[0] + token) * stride_parts + part) * p.heads + head) * p.width)];
          for (int e = 0; e < p.width / 2; ++e) {
            const double a = row[e], b = row[e + p.width / 2], c = cosine[size_t(e)], d = direction * sine[size_t(e)];
            row[e] = a * c - b * d, row[e + p.width / 2] = b * c + a * d;
          }
        }
      }
    }
  }
}

struct Attention {
  Numbers out, gradient;  // (tokens, H, E), (tokens, 3, H, E)
};

inline Attention attention(const Packed& p, Numbers qkv, const Numbers& rope, const Numbers& grad, double scale) {
  turn(p, rope, qkv, 3, 2, 1);
  Attention result{Numbers(size_t(p.tokens * p.heads * p.width)), Numbers(qkv.size(), 0.0)};
  const int64_t width = p.width, heads = p.heads;
  for (size_t sequence = 0; sequence * 6 < p.sequences.size(); ++sequence) {
    const int64_t first = p.sequences[sequence * 6], tokens = p.sequences[sequence * 6 + 1];
    for (int64_t head = 0; head < heads; ++head) {
      auto row = [&](Numbers& x, int part, int64_t token) {
        return &x[size_t((((first + token) * 3 + part) * heads + head) * width)];
      };
      Numbers weight(static_cast<size_t>(tokens));
      for (int64_t n = 0; n < tokens; ++n) {
        const double* q = row(qkv, 0, n);
        double largest = -INFINITY, sum = 0;
        for (int64_t j = 0; j < tokens; ++j) {
          const double* k = row(qkv, 1, j);
          double dot = 0;
          for (int64_t e = 0; e < width; ++e) dot += q[e] * k[e];
          weight[size_t(j)] = scale * dot;
          largest = std::max(largest, scale * dot);
        }
        for (double& w : weight) sum += w = std::exp(w - largest);
        double* out = &result.out[size_t(((first + n) * heads + head) * width)];
        const double* g = &grad[size_t(((first + n) * heads + head) * width)];
        double delta = 0;
        for (int64_t j = 0; j < tokens; ++j) {
          const double w = weight[size_t(j)] /= sum;
          for (int64_t e = 0; e < width; ++e) out[e] += w * row(qkv, 2, j)[e];
        }
        for (int64_t e = 0; e < width; ++e) delta += g[e] * out[e];
        for (int64_t j = 0; j < tokens; ++j) {
          const double *k = row(qkv, 1, j), *v = row(qkv, 2, j), w = weight[size_t(j)];
          double dot = 0;
          for (int64_t e = 0; e < width; ++e) dot += g[e] * v[e];
          const double ds = scale * w * (dot - delta);
          for (int64_t e = 0; e < width; ++e) {
            row(result.gradient, 0, n)[e] += ds * k[e];
            row(result.gradient, 1, j)[e] += ds * q[e];
            row(result.gradient, 2, j)[e] += w * g[e];
          }
        }
      }
    }
  }
  turn(p, rope, result.gradient, 3, 2, -1);
  return result;
}

// ---- sinkhorn_knopp: potentials rows[b] + columns[k] as one (rows, K) matrix ----

inline Numbers sinkhorn(const Numbers& logits, int64_t rows, int64_t prototypes, double temperature, int iterations) {
  Numbers a(size_t(rows), 0.0), c(static_cast<size_t>(prototypes)), sum(size_t(rows * prototypes));
  auto score = [&](int64_t b, int64_t k) { return logits[size_t(b * prototypes + k)] / temperature; };
  for (int iteration = 0; iteration < iterations; ++iteration) {
    for (int64_t k = 0; k < prototypes; ++k) {
      double largest = -INFINITY, total = 0;
      for (int64_t b = 0; b < rows; ++b) largest = std::max(largest, score(b, k) + a[size_t(b)]);
      for (int64_t b = 0; b < rows; ++b) total += std::exp(score(b, k) + a[size_t(b)] - largest);
      c[size_t(k)] = -largest - std::log(total);
    }
    for (int64_t b = 0; b < rows; ++b) {
      double largest = -INFINITY, total = 0;
      for (int64_t k = 0; k < prototypes; ++k) largest = std::max(largest, score(b, k) + c[size_t(k)]);
      for (int64_t k = 0; k < prototypes; ++k) total += std::exp(score(b, k) + c[size_t(k)] - largest);
      a[size_t(b)] = -largest - std::log(total);
    }
  }
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t k = 0; k < prototypes; ++k) sum[size_t(b * prototypes + k)] = a[size_t(b)] + c[size_t(k)];
  }
  return sum;
}

// ---- assignment_cross_entropy ----

struct CrossEntropy {
  Numbers losses, gradient;  // (C, A), (C, B, K)
};

inline CrossEntropy cross_entropy(const Numbers& student, const Numbers& teacher, const Numbers& rows,
                                  const Numbers& columns, const Numbers& weight, const Numbers& grad, int64_t crops,
                                  int64_t views, int64_t images, int64_t prototypes, double student_temperature,
                                  double teacher_temperature) {
  CrossEntropy result{Numbers(size_t(crops * views), 0.0), Numbers(student.size(), 0.0)};
  for (int64_t c = 0; c < crops; ++c) {
    for (int64_t b = 0; b < images; ++b) {
      const int64_t at = (c * images + b) * prototypes;
      double largest = -INFINITY, sum = 0;
      for (int64_t k = 0; k < prototypes; ++k) largest = std::max(largest, student[size_t(at + k)]);
      for (int64_t k = 0; k < prototypes; ++k) {
        sum += std::exp((student[size_t(at + k)] - largest) / student_temperature);
      }
      const double log_sum = largest / student_temperature + std::log(sum);
      for (int64_t a = 0; a < views; ++a) {
        double dot = 0;
        for (int64_t k = 0; k < prototypes; ++k) {
          const double s = student[size_t(at + k)] / student_temperature;
          const double p = std::exp(teacher[size_t((a * images + b) * prototypes + k)] / teacher_temperature +
                                    rows[size_t(a * images + b)] + columns[size_t(k)]);
          dot += p * s;
          result.gradient[size_t(at + k)] +=
              weight[size_t(b)] / student_temperature * grad[size_t(c * views + a)] * (std::exp(s - log_sum) - p);
        }
        result.losses[size_t(c * views + a)] += weight[size_t(b)] * (log_sum - dot);
      }
    }
  }
  return result;
}

// ---- gram_loss without clips; no row as short as 1e-12 ----

struct Gram {
  double loss = 0;
  Numbers gradient;  // (images, patches, width)
};

inline Gram gram(Numbers x, Numbers y, int64_t images, int64_t patches, int64_t width) {
  Gram result{0, Numbers(x.size(), 0.0)};
  const double entries = double(images) * double(patches) * double(patches);
  auto normalise = [&](Numbers& all, Numbers& inverse) {
    for (int64_t row = 0; row < images * patches; ++row) {
      double square = 0;
      for (int64_t e = 0; e < width; ++e) square += all[size_t(row * width + e)] * all[size_t(row * width + e)];
      inverse[size_t(row)] = 1 / std::sqrt(square);
      for (int64_t e = 0; e < width; ++e) all[size_t(row * width + e)] *= inverse[size_t(row)];
    }
  };
  Numbers inverse(size_t(images * patches)), unused(size_t(images * patches));
  normalise(x, inverse), normalise(y, unused);
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t i = 0; i < patches; ++i) {
      const int64_t row = image * patches + i;
      double along = 0;
      double* gradient = &result.gradient[size_t(row * width)];
      for (int64_t j = 0; j < patches; ++j) {
        const int64_t other = image * patches + j;
        double s = 0, t = 0;
        for (int64_t e = 0; e < width; ++e) {
          s += x[size_t(row * width + e)] * x[size_t(other * width + e)];
          t += y[size_t(row * width + e)] * y[size_t(other * width + e)];
        }
        const double d = i == j ? 0 : s - t;  // both are 1 there, which doubles miss by 1e-16
        result.loss += d * d / entries;
        along += d * s;
        for (int64_t e = 0; e < width; ++e) gradient[e] += d * x[size_t(other * width + e)];
      }
      for (int64_t e = 0; e < width; ++e) {
        gradient[e] = 4 / entries * inverse[size_t(row)] * (gradient[e] - along * x[size_t(row * width + e)]);
      }
    }
  }
  return result;
}

}  // namespace driver
