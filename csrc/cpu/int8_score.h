// Scores of rows from int8 codes (unisd_kernels/reference/certified.py has the formulas): sums over all columns of
// approximate logits, and exact logits where the probability is.
//
// Lanes are rows, as in score_of: a block of the head's codes stays in the second-level cache while all panels pass, and
// no logit leaves the first-level one. Whose logit is above the row's floor is put on the row's list; the floor follows
// the sum so far, and what has fallen under it goes back into the sums.
#pragma once

#include "gemm.h"
#include "rows.h"

namespace unisd {
namespace UNISD_ISA {

// Columns whose sums are taken in float before they go into a double.
constexpr int64_t kCodeSegment = 2048;
// Columns on a row's list at most. Where more are above the floor, none are added any more.
constexpr int64_t kListed = 4096;

// The sums of one row, in units of exp(base); all but `listed` without the columns on its list.
struct RowTotals {
  double base, rest, squares, listed;
};

// Everything of the rows of one piece while the columns pass.
class CodeScores {
 public:
  CodeScores(const CodedRows& rows, const CodedHead& head, float log_threshold)
      : rows_(rows),
        head_(head),
        log_threshold_(log_threshold),
        padded_(packed_size(rows.count, 1)),
        lanes_(kLaneArrays * padded_),
        room_(at_most(kListed, head.columns) + kBlock),
        counts_(new (std::align_val_t(64)) int64_t[static_cast<size_t>(padded_)]),
        columns_(room_ * rows.count),
        logits_(room_ * rows.count),
        totals_(new (std::align_val_t(64)) RowTotals[static_cast<size_t>(padded_)]) {
    for (int64_t n = 0; n < padded_; ++n) {
      highest()[n] = -kInfinity;
      rest()[n] = squares()[n] = listed()[n] = carried()[n] = 0.0f;
      // No number exceeds that of a lane without a row.
      floor()[n] = n < rows.count ? rows.floor[n] : kInfinity;
      scales()[n] = n < rows.count ? rows.scales[n] : 0.0f;
      counts_[n] = 0;
      totals_[n] = {0.0, 0.0, 0.0, 0.0};
    }
  }
  ~CodeScores() {
    ::operator delete[](counts_, std::align_val_t(64));
    ::operator delete[](totals_, std::align_val_t(64));
  }
  CodeScores(const CodeScores&) = delete;
  CodeScores& operator=(const CodeScores&) = delete;

  const float* scales_from(int64_t row) { return scales() + row; }

  // Approximate products [columns][height] of one vector of rows and the columns from `first`; overwritten.
  void add(float* products, int64_t height, int64_t lane_row, int64_t first, int64_t columns) {
    const Vec zero = Vec::set(0.0f), minus_infinity = Vec::set(-kInfinity), scale = Vec::set(head_.scale);
    const bool plain = head_.bias == nullptr && head_.tanh_scale == nullptr && head_.scale == 1.0f;
    Vec block_max = minus_infinity;
    for (int64_t i = 0; i < columns; ++i) {
      Vec z = Vec::load(products + i * height);
      if (!plain) {
        z = fma(z, scale, Vec::set(head_.bias == nullptr ? 0.0f : head_.scale * head_.bias[first + i]));
        if (head_.tanh_scale != nullptr) z = Vec::set(*head_.tanh_scale) * tanh(z);
        z.store(products + i * height);
      }
      block_max = max(z, block_max);
    }
    const Vec before = Vec::load(highest() + lane_row), after = max(block_max, before);
    after.store(highest() + lane_row);
    const Vec shift = where_equal(after, minus_infinity, zero, after);
    const Vec factor = exp(before - shift);
    Vec rest_sum = Vec::load(rest() + lane_row) * factor;
    Vec square_sum = Vec::load(squares() + lane_row) * (factor * factor);
    const Vec listed_sum = Vec::load(listed() + lane_row) * factor;
    const Vec carried_sum = Vec::load(carried() + lane_row) * factor;
    rest_sum.store(rest() + lane_row);
    square_sum.store(squares() + lane_row);
    listed_sum.store(listed() + lane_row);
    carried_sum.store(carried() + lane_row);
    const Vec total = rest_sum + listed_sum + carried_sum;
    // -inf for a total of zero.
    Vec bar = max(shift + log(total) + Vec::set(log_threshold_), Vec::load(floor() + lane_row));
    bar.store(floor() + lane_row);
    if (make_room(lane_row)) {
      bar = Vec::load(floor() + lane_row);
      rest_sum = Vec::load(rest() + lane_row);
      square_sum = Vec::load(squares() + lane_row);
    }
    Vec fresh = zero, fresh_squares = zero, fresh_listed = zero;
    for (int64_t i = 0; i < columns; ++i) {
      const Vec z = Vec::load(products + i * height);
      Vec e = exp(z - shift);
      const uint32_t above = lanes_less(bar, z);
      if (__builtin_expect(above != 0, 0)) {
        put_on_lists(above, products + i * height, lane_row, first + i);
        const Vec kept = where_less(bar, z, zero, e);
        fresh_listed = fresh_listed + (e - kept);
        e = kept;
      }
      fresh = fresh + e;
      fresh_squares = fma(e, e, fresh_squares);
    }
    (rest_sum + fresh).store(rest() + lane_row);
    (square_sum + fresh_squares).store(squares() + lane_row);
    (Vec::load(listed() + lane_row) + fresh_listed).store(listed() + lane_row);
  }

  // The float sums so far into the doubles.
  void end_segment() {
    for (int64_t n = 0; n < rows_.count; ++n) {
      RowTotals& t = totals_[n];
      const double top = static_cast<double>(highest()[n]), scale = std::exp(t.base - top);
      t.rest = t.rest * scale + static_cast<double>(rest()[n]);
      t.squares = t.squares * scale * scale + static_cast<double>(squares()[n]);
      t.listed = t.listed * scale + static_cast<double>(listed()[n]);
      t.base = top;
      carried()[n] = static_cast<float>(t.rest + t.listed);
      rest()[n] = squares()[n] = listed()[n] = 0.0f;
    }
  }

  // After the last segment: lists by the final floor, exact logits of what is left on them, and the results.
  void finish(const CodeSums& out) {
    Integers starts(head_.columns + 1);
    for (int64_t j = 0; j <= head_.columns; ++j) starts[j] = 0;
    int64_t entries = 0;
    for (int64_t n = 0; n < rows_.count; ++n) {
      const double top = static_cast<double>(highest()[n]);
      const RowTotals& t = totals_[n];
      const float last =
          static_cast<float>(top + std::log(t.rest + t.listed) + static_cast<double>(log_threshold_));
      if (last > floor()[n]) floor()[n] = last;
      drop_under_floor(n);
      end_row(n);
      for (int64_t i = 0; i < counts_[n]; ++i) ++starts[columns_[n * room_ + i] + 1];
      entries += counts_[n];
    }
    // Column by column, so that each row of the weight is read once; and each row's columns in their order.
    for (int64_t j = 0; j < head_.columns; ++j) starts[j + 1] += starts[j];
    Integers sorted_rows(entries), sorted_columns(entries);
    for (int64_t n = 0; n < rows_.count; ++n) {
      for (int64_t i = 0; i < counts_[n]; ++i) {
        const int32_t column = columns_[n * room_ + i];
        const int32_t place = starts[column]++;
        sorted_rows[place] = static_cast<int32_t>(n);
        sorted_columns[place] = column;
      }
    }
    for (int64_t n = 0; n < rows_.count; ++n) {
      const RowTotals& t = totals_[n];
      out.highest[n] = highest()[n];
      out.total[n] = static_cast<float>(t.rest + t.listed);
      out.rest[n] = static_cast<float>(t.rest);
      out.squares[n] = static_cast<float>(t.squares);
      out.floor[n] = floor()[n];
      totals_[n].listed = 0.0;  // from here the exact ones
    }
    add_exact(entries, sorted_rows.data(), sorted_columns.data());
    for (int64_t n = 0; n < rows_.count; ++n) out.sure[n] = static_cast<float>(totals_[n].listed);
  }

 private:
  // A Buffer of integers.
  class Integers {
   public:
    explicit Integers(int64_t size) : bits_(size) {}
    int32_t* data() { return reinterpret_cast<int32_t*>(bits_.data()); }
    int32_t& operator[](int64_t i) { return data()[i]; }

   private:
    Buffer bits_;
  };
  enum { kHighest, kRest, kSquares, kSumListed, kCarried, kFloor, kScales, kLaneArrays };
  float* highest() { return lanes_.data() + kHighest * padded_; }
  float* rest() { return lanes_.data() + kRest * padded_; }
  float* squares() { return lanes_.data() + kSquares * padded_; }
  float* listed() { return lanes_.data() + kSumListed * padded_; }
  float* carried() { return lanes_.data() + kCarried * padded_; }  // the total of the segments before
  float* floor() { return lanes_.data() + kFloor * padded_; }
  float* scales() { return lanes_.data() + kScales * padded_; }

  void put_on_lists(uint32_t lanes, const float* logits, int64_t lane_row, int64_t column) {
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const int64_t row = lane_row + lane, place = row * room_ + counts_[row]++;
      columns_[place] = static_cast<int32_t>(column);
      logits_[place] = logits[lane];
    }
  }

  // Room for a block's columns on each list. True: sums or floors of these rows have changed.
  bool make_room(int64_t lane_row) {
    bool changed = false;
    for (int64_t n = lane_row; n < lane_row + Vec::width && n < rows_.count; ++n) {
      if (counts_[n] + kBlock <= room_ || is_closed(n)) continue;
      changed = true;
      drop_under_floor(n);
      // Half of the room, so that this is not for each block anew. Without it the list is closed.
      if (counts_[n] > room_ / 2) floor()[n] = kInfinity;
    }
    return changed;
  }

  bool is_closed(int64_t n) { return floor()[n] == kInfinity; }

  // What is no longer above the floor goes from the list into the sums.
  void drop_under_floor(int64_t n) {
    if (is_closed(n)) return;
    int64_t kept = 0;
    double rest_sum = 0.0, square_sum = 0.0;
    for (int64_t i = 0; i < counts_[n]; ++i) {
      const int64_t from = n * room_ + i, to = n * room_ + kept;
      if (logits_[from] > floor()[n]) {
        columns_[to] = columns_[from];
        logits_[to] = logits_[from];
        ++kept;
      } else {
        const double e = std::exp(static_cast<double>(logits_[from]) - static_cast<double>(highest()[n]));
        rest_sum += e;
        square_sum += e * e;
      }
    }
    counts_[n] = kept;
    rest()[n] += static_cast<float>(rest_sum);
    squares()[n] += static_cast<float>(square_sum);
    listed()[n] -= static_cast<float>(rest_sum);
  }
  void end_row(int64_t n) {
    RowTotals& t = totals_[n];
    t.rest += static_cast<double>(rest()[n]);
    t.squares += static_cast<double>(squares()[n]);
    t.listed += static_cast<double>(listed()[n]);
  }

  void add_exact(int64_t entries, const int32_t* of_rows, const int32_t* of_columns) {
    const int64_t width = head_.width;
    Buffer hidden(rows_.hidden.storage == Storage::kFloat32 ? 0 : rows_.count * width);
    Buffer wide(head_.weight.storage == Storage::kFloat32 ? 0 : width);
    for (int64_t n = 0; n < rows_.count && hidden.data() != nullptr; ++n)
      widen(row_of(rows_.hidden, n), rows_.hidden.storage, 0, width, hidden.data() + n * width);
    const float* weight_row = nullptr;
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t column = of_columns[i], n = of_rows[i];
      if (i == 0 || of_columns[i - 1] != column) {
        const void* given = row_of(head_.weight, column);
        if (wide.data() != nullptr) widen(given, head_.weight.storage, 0, width, wide.data());
        weight_row = wide.data() != nullptr ? wide.data() : static_cast<const float*>(given);
      }
      if (i + kAhead < entries) fetch(of_columns[i + kAhead]);
      const float* row =
          hidden.data() != nullptr ? hidden.data() + n * width : static_cast<const float*>(row_of(rows_.hidden, n));
      float z = dot(row, weight_row, width);
      if (head_.bias != nullptr) z += head_.bias[column];
      z *= head_.scale;
      if (head_.tanh_scale != nullptr) z = *head_.tanh_scale * std::tanh(z);
      totals_[n].listed += std::exp(static_cast<double>(z) - static_cast<double>(highest()[n]));
    }
  }

  static constexpr int64_t kAhead = 4;
  void fetch(int64_t column) {
    const char* row = static_cast<const char*>(row_of(head_.weight, column));
    for (int64_t byte = 0; byte < head_.width * bytes_of(head_.weight.storage); byte += 64)
      __builtin_prefetch(row + byte, 0, 3);
  }

  // Like that of float32 scoring, a sum in float32.
  static float dot(const float* a, const float* b, int64_t width) {
    constexpr int kSums = 4;
    Vec sum[kSums];
    UNISD_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] = Vec::set(0.0f);
    int64_t k = 0;
    for (; k + kSums * Vec::width <= width; k += kSums * Vec::width) {
      UNISD_UNROLL
      for (int j = 0; j < kSums; ++j)
        sum[j] = fma(Vec::load(a + k + j * Vec::width), Vec::load(b + k + j * Vec::width), sum[j]);
    }
    for (; k < width; k += Vec::width) {
      const int lanes = static_cast<int>(at_most(Vec::width, width - k));
      sum[0] = fma(Vec::load_part(a + k, lanes, 0.0f), Vec::load_part(b + k, lanes, 0.0f), sum[0]);
    }
    return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  const CodedRows& rows_;
  const CodedHead& head_;
  const float log_threshold_;
  const int64_t padded_;
  Buffer lanes_;
  const int64_t room_;
  int64_t* counts_;
  Integers columns_;
  Buffer logits_;
  RowTotals* totals_;
};

// Approximate products of `count` columns from the first one with a panel, into out [count][height]. The int32 sums never
// leave the registers. `ahead` is how many codes further the next block lies, or 0.
template <int vectors, int count>
inline UNISD_INLINE void multiply_codes(const float* panel, const float* along, const float* scales,
                                        const CodedHead& head, int64_t column, int64_t ahead, float* out) {
  constexpr int64_t height = vectors * Vec::width;
  const int64_t stride = head.quads * Quads::elements;
  const int8_t* codes = head.codes + column * stride;
  Vec sum[count][vectors];
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vec::set(0.0f);
  }
  for (int64_t k = 0; k < head.quads;) {
    const int64_t stop = at_most(head.quads, k + 16);  // a cache line of codes
    if (ahead != 0) {
      UNISD_UNROLL
      for (int i = 0; i < count; ++i) __builtin_prefetch(codes + i * stride + k * Quads::elements + ahead, 0, 2);
    }
    for (; k < stop; ++k) {
      Vec rows[vectors];
      UNISD_UNROLL
      for (int j = 0; j < vectors; ++j) rows[j] = Vec::load(panel + k * height + j * Vec::width);
      UNISD_UNROLL
      for (int i = 0; i < count; ++i) {
        const Vec quad = Quads::broadcast(codes + i * stride + k * Quads::elements);
        UNISD_UNROLL
        for (int j = 0; j < vectors; ++j) sum[i][j] = Quads::add_product(rows[j], quad, sum[i][j]);
      }
    }
  }
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    const Vec scale = Vec::set(head.scales[column + i]);
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = Quads::value(sum[i][j], head.offsets[column + i]) * (Vec::load(scales + j * Vec::width) * scale);
  }
  const float* lead = head.lead + column * head.directions;
  for (int64_t k = 0; k < head.directions; ++k) {
    Vec rows[vectors];
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j) rows[j] = Vec::load(along + k * height + j * Vec::width);
    UNISD_UNROLL
    for (int i = 0; i < count; ++i) {
      const Vec element = Vec::set(lead[i * head.directions + k]);
      UNISD_UNROLL
      for (int j = 0; j < vectors; ++j) sum[i][j] = fma(rows[j], element, sum[i][j]);
    }
  }
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j) sum[i][j].store(out + i * height + j * Vec::width);
  }
}

template <int vectors>
inline void multiply_codes_of_block(const float* panel, const float* along, const float* scales, const CodedHead& head,
                                    int64_t column, int64_t columns, int64_t ahead, float* out) {
  constexpr int64_t height = vectors * Vec::width;
  int64_t i = 0;
  for (; i + kBroadcast <= columns; i += kBroadcast)
    multiply_codes<vectors, kBroadcast>(panel, along, scales, head, column + i, ahead, out + i * height);
  for (; i < columns; ++i) multiply_codes<vectors, 1>(panel, along, scales, head, column + i, 0, out + i * height);
}

inline void score_codes(const CodedRows& rows, const CodedHead& head, float log_threshold, const CodeSums& out) {
  const int64_t quads = head.quads, directions = head.directions;
  Buffer codes(packed_size(rows.count, quads)), along(packed_size(rows.count, directions));
  pack_quads(rows.codes, rows.count, quads, codes.data());
  if (directions != 0)
    pack_rows({rows.along, directions, Storage::kFloat32}, rows.count, directions, along.data());
  Buffer product(kBlock * Quads::panel);
  CodeScores scores(rows, head, log_threshold);
  for (int64_t v = 0; v < head.columns; v += kBlock) {
    if (v != 0 && v % kCodeSegment == 0) scores.end_segment();
    const int64_t columns = at_most(kBlock, head.columns - v);
    const int64_t next = v + 2 * kBlock <= head.columns ? kBlock * quads * Quads::elements : 0;
    const float *panel = codes.data(), *along_panel = along.data();
    for (int64_t start = 0; start < rows.count; start += Quads::panel) {
      const int vectors = vectors_for<Quads>(rows.count - start);
      const int64_t height = vectors * Vec::width;
      with_vectors<Quads>(vectors, [&](auto count) UNISD_INLINE {
        multiply_codes_of_block<count.value>(panel, along_panel, scores.scales_from(start), head, v, columns,
                                             start == 0 ? next : 0, product.data());
      });
      panel += height * quads;
      along_panel += height * directions;
      for (int64_t lane = 0; lane < height; lane += Vec::width)
        scores.add(product.data() + lane, height, start + lane, v, columns);
    }
  }
  scores.end_segment();
  scores.finish(out);
}

}  // namespace UNISD_ISA
}  // namespace unisd
