// decay t + (1 - decay) s, in the one of two forms that loses nothing. The same on every device, bit for bit.
//
// Summed as it stands, equal numbers would drift: decay t + (1 - decay) t is not always t. Hence a form with a
// difference, which leaves t = s as it is. Both are the formula:
//
//   from the teacher   t + (1 - decay) (s - t)
//   from the student   s + decay (t - s)
//
// The rounding of the difference is up to half an ulp of the larger of |s| and |t|, and comes in with the factor
// before it. What the average is made of is (1 - decay) s and decay t. With decay >= 1/2 the first form's error is of
// (1 - decay) |t| <= decay |t|, but for a small decay it is of |t| itself, of which the average holds next to nothing:
// t = 1e8, s = 1, decay = 0 gives 1e8 + (1 - 1e8) = 0. There the second form's error is of decay |s| <= (1 - decay)
// |s|. (The factor is rounded to the arithmetic's type after it is formed in double: 1 - decay of a tiny decay would
// be 1.)
#pragma once

namespace unisd {

struct EmaAverage {
  double factor;      // of the difference
  bool from_student;  // else from the teacher
  // decay = 0: nothing of the teacher is left, not even what 0 times an infinity or a NaN would leave. (And decay = 1
  // leaves the teacher as it is: the operations return before they touch it.)
  bool is_copy;
};

static inline EmaAverage ema_average(double decay) {
  const bool from_student = decay < 0.5;
  return {from_student ? decay : 1.0 - decay, from_student, decay == 0.0};
}

}  // namespace unisd
