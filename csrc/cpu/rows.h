// Softmax and log-probability gradient of one complete row of logits, the online sum under them; scaling of a row.
#pragma once

#include <cmath>

#include "half.h"
#include "kernels.h"
#include "vec_math.h"

namespace unisd {
namespace UNISD_ISA {

// Columns whose float partial sums are added up before they go into a double.
constexpr int64_t kSumColumns = Vec::width == 1 ? 128 : 1024;

// sum_j e^(z_j - max) under a maximum that moves.
struct OnlineSum {
  float max = -kInfinity, min = kInfinity;
  double sum = 0.0;

  // Merge a sum taken under another maximum.
  void merge(float other_max, double other_sum) {
    if (other_max > max) {
      sum = sum * std::exp(static_cast<double>(max) - other_max) + other_sum;
      max = other_max;
    } else {
      // Also where both are -infinity: then other_sum is 0, or NaN.
      sum += other_sum * std::exp(other_max == max ? 0.0 : static_cast<double>(other_max) - max);
    }
  }
};

// At most kSumColumns logits. `value(i, Vec())` or Vec2(), and `value_part(i, n, fill)`, give the vectors, with `fill` beyond
// the end.
template <class Value, class ValuePart>
inline UNISD_INLINE void add_block(int64_t columns, const Value& value, const ValuePart& value_part, OnlineSum* total) {
  Vec highest = Vec::set(-kInfinity), least = Vec::set(kInfinity);
  for_each_vector(
      columns,
      [&](int64_t i) UNISD_INLINE {
        const Vec z = value(i, Vec());
        highest = max(z, highest);
        least = min(z, least);
      },
      [&](int64_t i, int n) UNISD_INLINE {
        highest = max(value_part(i, n, -kInfinity), highest);
        least = min(value_part(i, n, kInfinity), least);
      });
  // A NaN is lost here and comes back with the sum. All -inf: any shift will do.
  const float block_max = max_of_lanes(highest);
  const Vec shift = Vec::set(block_max == -kInfinity ? 0.0f : block_max);
  Vec sum = Vec::set(0.0f);
  const auto add = [&](auto z) UNISD_INLINE { sum = add_to(sum, exp(z - shift)); };
  for_each_wide(
      columns, [&](int64_t i, auto like) UNISD_INLINE { add(value(i, like)); },
      [&](int64_t i, int n) UNISD_INLINE { add(value_part(i, n, -kInfinity)); });
  const float block_min = -max_of_lanes(Vec::set(0.0f) - least);
  total->min = block_min < total->min ? block_min : total->min;
  total->merge(block_max, sum_of_lanes(sum));
}

// A logit that is not finite makes NaN of all that its row gives. NaN and infinity do so in the sum by themselves;
// minus infinity would pass for a probability of zero.
inline void refuse_minus_infinity(OnlineSum* total) {
  if (total->min == -kInfinity) total->sum = std::numeric_limits<double>::quiet_NaN();
}

// Over a row of finished logits.
inline OnlineSum online_sum(const float* row, int64_t columns) {
  OnlineSum total;
  for (int64_t start = 0; start < columns; start += kSumColumns) {
    const float* block = row + start;
    add_block(
        at_most(kSumColumns, columns - start),
        [&](int64_t i, auto like) UNISD_INLINE { return decltype(like)::load(block + i); },
        [&](int64_t i, int n, float fill) UNISD_INLINE { return Vec::load_part(block + i, n, fill); }, &total);
  }
  refuse_minus_infinity(&total);
  return total;
}

inline float log_of_sum(double sum) { return static_cast<float>(std::log(sum)); }

inline float logsumexp_of(const OnlineSum& total) {
  return static_cast<float>(static_cast<double>(total.max == -kInfinity ? 0.0f : total.max) + std::log(total.sum));
}

// row = tanh_scale * tanh(row). The tanh of an infinity is a number like any other: it becomes NaN, and so does then
// all that the row gives.
inline void apply_softcap(float* row, int64_t columns, float tanh_scale) {
  const Vec scale = Vec::set(tanh_scale), zero = Vec::set(0.0f);
  const auto capped_or_nan = [&](Vec x) UNISD_INLINE { return fma(x, zero, scale * tanh(x)); };
  for_each_vector(
      columns, [&](int64_t i) UNISD_INLINE { capped_or_nan(Vec::load(row + i)).store(row + i); },
      [&](int64_t i, int n) UNISD_INLINE { capped_or_nan(Vec::load_part(row + i, n, 0.0f)).store_part(row + i, n); });
}

// d logit / d (a x / tau): of a soft cap, else one.
class CapSlope {
 public:
  explicit CapSlope(const float* tanh_scale)
      : tanh_scale_(tanh_scale), inverse_(Vec::set(tanh_scale == nullptr ? 0.0f : 1.0f / *tanh_scale)) {}
  template <class V>
  V of(V z) const {
    // Instead of -inf, whose product with 0 is NaN.
    const V t = max(V::set(-1e30f), z) * inverse_;
    return V::set(1.0f) - t * t;
  }
  float of(float z) const {
    const float t = tanh_scale_ == nullptr ? 0.0f : z / *tanh_scale_;
    return 1.0f - t * t;
  }

 private:
  const float* tanh_scale_;
  Vec inverse_;
};

inline void tile_softmax(float* row, int64_t columns, const float* tanh_scale, int64_t target_id, float* logsumexp,
                         float* target_logit) {
  if (tanh_scale != nullptr) apply_softcap(row, columns, *tanh_scale);
  const OnlineSum total = online_sum(row, columns);
  *logsumexp = logsumexp_of(total);
  *target_logit = row[target_id];
  const Vec shift = Vec::set(total.max), log_sum = Vec::set(log_of_sum(total.sum));
  const CapSlope slope(tanh_scale);
  const auto gradient = [&](auto z) UNISD_INLINE { return exp((z - shift) - log_sum) * slope.of(z); };
  for_each_wide(
      columns, [&](int64_t i, auto like) UNISD_INLINE { gradient(decltype(like)::load(row + i)).store(row + i); },
      [&](int64_t i, int n) UNISD_INLINE { gradient(Vec::load_part(row + i, n, 0.0f)).store_part(row + i, n); });
}

inline void tile_logprob_gradient(const LogprobTile& tile, int64_t n) {
  float* row = tile.tile + n * tile.stride;
  const int64_t columns = tile.columns;
  if (tile.tanh_scale != nullptr) apply_softcap(row, columns, *tile.tanh_scale);
  // d logp_y / dz = 1[y] - p,   d lse / dz = p,   d entropy / dz = -p (log p + entropy)
  const float logprob_weight = tile.logprob_weight == nullptr ? 0.0f : tile.logprob_weight[n];
  const float on_probs = (tile.logsumexp_weight == nullptr ? 0.0f : tile.logsumexp_weight[n]) - logprob_weight;
  const float entropy_weight = tile.entropy_weight == nullptr ? 0.0f : tile.entropy_weight[n];
  const float entropy = tile.entropy_weight == nullptr ? 0.0f : tile.entropy[n];
  const Vec logsumexp = Vec::set(tile.logsumexp[n]), lowest = Vec::set(-1e30f);
  const Vec constant = Vec::set(on_probs - entropy_weight * entropy), entropy_slope = Vec::set(-entropy_weight);
  const CapSlope slope(tile.tanh_scale);
  const int64_t target = tile.target_ids[n];
  const float target_z = row[target];
  const auto gradient = [&](auto z) UNISD_INLINE {
    const auto a = z - logsumexp;
    return exp(a) * fma(entropy_slope, max(lowest, a), constant) * slope.of(z);
  };
  for_each_wide(
      columns, [&](int64_t i, auto like) UNISD_INLINE { gradient(decltype(like)::load(row + i)).store(row + i); },
      [&](int64_t i, int k) UNISD_INLINE { gradient(Vec::load_part(row + i, k, 0.0f)).store_part(row + i, k); });
  if (tile.logprob_weight != nullptr) row[target] += logprob_weight * slope.of(target_z);
}

inline void scale_row(const float* row, float scale, int64_t width, void* out, Storage storage) {
  for (int64_t i = 0; i < width; ++i) {
    const float value = row[i] * scale;
    if (storage == Storage::kFloat32) {
      static_cast<float*>(out)[i] = value;
    } else if (storage == Storage::kBFloat16) {
      static_cast<BFloat16*>(out)[i] = BFloat16::nearest(value);
    } else {
      static_cast<Float16*>(out)[i] = Float16::nearest(value);
    }
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
