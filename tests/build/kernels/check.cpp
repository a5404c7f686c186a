// Every kernel of every instruction set this processor has, on heap buffers that are exactly as long as they must be,
// against plain loops in double. Built with the sanitizers and run by test_sanitizers.py; needs no torch.
//
// Prints what differs and exits with 1, or prints one line for each instruction set and exits with 0.
#include "ema.h"
#include "int8.h"
#include "products.h"
#include "rows.h"

namespace check {

// exp and its relatives; test_native_math.py looks at every bit.
void check_math() {
  for (const Kernels* k : tables()) {
    isa = k->name;
    for (int64_t n = 0; n <= 49; ++n) {
      Buffer<float> x(n), out(n);
      for (int64_t i = 0; i < n; ++i)
        x[i] = static_cast<float>(normal() * (i % 7 == 0 ? 60.0 : i % 7 == 1 ? 1e-20 : 1.0));
      if (n > 40) {
        const double special[] = {kInf, -kInf, 0.0, static_cast<double>(kNan), 1e38, -1e38, 1e-45, -1e-45};
        for (int i = 0; i < 8; ++i) x[5 * i] = static_cast<float>(special[i]);
      }
      const auto compare = [&](const char* what, void (*function)(const float*, int64_t, float*),
                               double (*exact)(double)) {
        function(x.data, n, out.data);
        for (int64_t i = 0; i < n; ++i) {
          const double right = exact(static_cast<double>(x[i]));
          const double limit = format_of(Storage::kFloat32).largest;
          expect(what, i, static_cast<double>(out[i]), right > limit ? kInf : right < -limit ? -kInf : right,
                 4e-7 * std::fabs(right) + 3e-45);
        }
      };
      compare("exp", k->exp, [](double v) { return std::exp(v); });
      compare("log", k->log, [](double v) { return std::log(v); });
      compare("expm1", k->expm1, [](double v) { return std::expm1(v); });
      compare("tanh", k->tanh, [](double v) { return std::tanh(v); });
    }
  }
}

}  // namespace check

int main() {
  using namespace check;
  const int64_t all_rows[] = {1, 3, 47, 48, 49}, all_widths[] = {1, 5, 16, 33, 200};
  const int64_t all_columns[] = {1, 7, 15, 16, 17, 63, 64, 65, 1023, 1025};
  int variant = 0;
  for (const int64_t rows : all_rows) {
    for (const int64_t columns : all_columns) {
      for (const int64_t width : all_widths) {
        // Every storage with every width, rows and columns, if not with every combination of them.
        const int which = variant % 3;
        if (columns < 1000 || rows == 1 || rows == 49)
          check_products(rows, columns, width, kStorages[which], variant);
        ++variant;
      }
      ++variant;
    }
  }
  for (const int64_t rows : {1, 17, 49, 100}) {
    for (const int64_t columns : {1, 63, 65, 130}) {
      check_int8(rows, columns, all_widths[variant % 5], kStorages[variant % 3], variant);
      ++variant;
    }
  }
  check_int8(3, 2200, 5, Storage::kFloat32, 1);  // more than one segment
  check_products(100, 130, 131, Storage::kFloat32, 2);  // several panels, and more than one slice of the width
  check_products(100, 200, 300, Storage::kBFloat16, 1);
  check_streamed_logits();
  for (const int64_t columns : all_columns) {
    check_sum_rows(columns);
    for (int64_t padding = 0; padding < 3; ++padding) {
      check_softmax(columns, nullptr, padding);
      check_softmax(columns, &kCap, padding);
    }
    for (const double beta : {0.0, 1.0, 0.5, 0.05, 1e-6, 1.0 - 1e-6})
      for (variant = 0; variant < 12; ++variant) check_divergence(columns, beta, variant);
    for (const Storage storage : {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16})
      check_scale_row(columns, storage);
    for (const Storage teacher : kStorages) {
      for (const Storage student : kStorages) {
        for (const double decay : {0.0, 0.1, 0.5, 0.99, 1.0}) {
          check_ema(columns, teacher, student, false, decay);
          check_ema(columns, teacher, student, true, decay);
        }
      }
    }
  }
  for (const Storage storage : {Storage::kBFloat16, Storage::kFloat16}) {
    for (const double fraction : {0.1, 0.5, 0.75}) {
      check_stochastic_mean(storage, 1.5, fraction);
      check_stochastic_mean(storage, std::ldexp(1.0, -16), fraction);
      check_stochastic_mean(storage, std::ldexp(3.0, -24), fraction);
      check_stochastic_mean(storage, 0.0, fraction);
    }
  }
  check_math();
  if (failures != 0) {
    std::printf("%d differences\n", failures);
    return 1;
  }
  for (const Kernels* k : tables()) std::printf("%s ok\n", k->name);
  return 0;
}
