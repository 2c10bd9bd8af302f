// The reciprocal of a temperature, exact enough to multiply large logits with.
#pragma once

#include <cmath>

namespace dinov3_ext {

// 1 / x in two floats whose sum it is to 48 bits. One float alone errs by up to 2^-24, the same way for every logit:
// exponents of 60 then lose 4e-6, more than all other roundings of a loss together. Both parts are positive, so that a
// logit of -inf times either is -inf, never NaN.
struct Inverse {
  float large;
  float small;

  static Inverse of(double x) {
    const double inverse = 1 / x;
    float large = static_cast<float>(inverse);
    if (double(large) >= inverse) large = std::nextafter(large, 0.f);
    return {large, static_cast<float>(inverse - double(large))};
  }
};

}  // namespace dinov3_ext
