// Runs a harness on the files named, without libFuzzer: any compiler will do.

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) return std::fprintf(stderr, "cannot read %s\n", argv[i]), 1;
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const std::unique_ptr<uint8_t[]> block(new uint8_t[bytes.size()]);  // of its exact size, for AddressSanitizer
    std::copy(bytes.begin(), bytes.end(), block.get());
    LLVMFuzzerTestOneInput(block.get(), bytes.size());
  }
  std::printf("%d files\n", argc - 1);
}
