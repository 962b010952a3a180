// Encode and dequantize on the emulator; one thread order per run.
#include "encode_test.cpp"

int main(int argc, char** argv) {
    int order = argc > 1 ? std::atoi(argv[1]) : 0;
    rt::how().order = order == 0 ? emu::Order::Ascending : order == 1 ? emu::Order::Descending : emu::Order::Random;
    std::mt19937_64 rng(5 + order);
    encode_cases(rng);
    return rt::report("encode and dequantize on the emulator");
}
