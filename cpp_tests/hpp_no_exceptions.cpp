// decoquant.hpp without exceptions and run-time types: only calls that return results.
#include <decoquant.hpp>

int main() {
    auto context = dq::Context::try_create();
    if (!context) return 1;
    auto bad = dq::sized<dq_codec_desc>();
    const auto codec = dq::Codec::try_create(*context, bad);
    return !codec && codec.error().status == DQ_ERROR_INVALID_ARGUMENT && !codec.error().message.empty() ? 0 : 2;
}
