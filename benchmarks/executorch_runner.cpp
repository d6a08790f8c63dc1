// Runs a model of ExecuTorch, to have its instructions counted beside those of a bundle (benchmarks/bundle.py):
//
//   executorch_runner MODEL.pte INPUT REFERENCE REPEATS    for an input of 1×3×224×224 and 1000 results
//
// ExecuTorch's wheel for 64-bit Arm has headers and shared libraries, and its Python part is not needed:
//
//   pip download --no-deps --platform manylinux_2_28_aarch64 --python-version 311 executorch==1.5.1  and unzip it
//   aarch64-linux-gnu-g++ -std=c++17 -O1 -I$W/include -I$W/include/executorch/runtime/core/portable_type/c10 \
//     -DC10_USING_CUSTOM_GENERATED_MACROS executorch_runner.cpp -o runner -L$W/lib -Wl,--no-as-needed -lexecutorch \
//     -lexecutorch_backend_xnnpack -lexecutorch_kernels_optimized -lexecutorch_threadpool -Wl,--allow-shlib-undefined
//   qemu-aarch64 -cpu cortex-a72 -L ROOT -E LD_LIBRARY_PATH=… -plugin file=plugin.so runner … 0   and once more with 1
//
// where $W is the wheel's directory `executorch`, and plugin.so is count_instructions.c. The file .pte is what
// benchmarks/peers.py hands to XNNPACK. Without -cpu QEMU has SME, and XNNPACK uses it.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace executorch::extension::threadpool {
class ThreadPool {  // The wheel has no header for it.
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

static std::vector<float> read(const char* path, size_t count) {
  std::vector<float> values(count);
  FILE* file = std::fopen(path, "rb");
  if (!file || std::fread(values.data(), sizeof(float), count, file) != count) std::exit(2);
  std::fclose(file);
  return values;
}

int main(int count, char** arguments) {
  if (count != 5) return 2;
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(1);
  executorch::extension::Module module(arguments[1]);
  std::vector<float> input = read(arguments[2], 3 * 224 * 224), reference = read(arguments[3], 1000);
  auto tensor = executorch::extension::from_blob(input.data(), {1, 3, 224, 224});
  float error = 0, largest = 0;
  for (int run = 0; run <= std::atoi(arguments[4]); ++run) {
    auto results = module.forward(tensor);
    if (!results.ok()) return 3;
    const float* found = (*results)[0].toTensor().const_data_ptr<float>();
    for (size_t i = 0; i < reference.size(); ++i) {
      error = std::fmax(error, std::fabs(found[i] - reference[i]));
      largest = std::fmax(largest, std::fabs(reference[i]));
    }
  }
  std::printf("difference %g of %g\n", error, largest);
}
