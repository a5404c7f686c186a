// Work over threads, in pieces that do not depend on their number. A thread that is done takes the next piece, so that a
// slow core (a busy neighbour, an efficiency core) holds up no other; who computes a piece does not change its result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

namespace unisd {

// body(i, state) for each i in [0, pieces); make() gives each thread that has a piece a state of its own. What they throw
// does not pass through torch (boxed.h): the first is thrown again here, when every thread is done.
template <class Make, class Body>
void for_each_piece_with(int64_t pieces, const Make& make, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    try {
      int64_t i = next++;
      if (i >= pieces) return;
      const auto state = make();
      for (; i < pieces && !failed; i = next++) body(i, state);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// body(i) for each i in [0, pieces).
template <class Body>
void for_each_piece(int64_t pieces, const Body& body) {
  for_each_piece_with(pieces, [] { return 0; }, [&](int64_t i, int) { body(i); });
}

// body(i, begin, end) for the spans of `step` that cover [0, total).
template <class Body>
void for_each_span(int64_t total, int64_t step, const Body& body) {
  for_each_piece((total + step - 1) / step,
                 [&](int64_t i) { body(i, i * step, (i + 1) * step < total ? (i + 1) * step : total); });
}

}  // namespace unisd
