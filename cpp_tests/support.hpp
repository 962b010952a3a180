// What the tests have in common: handles that end themselves, memory with guard bands, rows of any type and stride, and
// the check that a refused call has changed nothing.
#pragma once

#include <decoquant.h>

#include <catch2/catch.hpp>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace test {

using Bytes = std::vector<uint8_t>;

inline std::string last_error() {
    std::string text(dq_last_error(nullptr, 0) + 1, '\0');
    dq_last_error(text.data(), text.size());
    text.pop_back();
    return text;
}

inline void ok(dq_status status) {
    INFO(dq_status_name(status) << ": " << last_error());
    REQUIRE(status == DQ_OK);
}

template <class T>
T sized() {
    T value{};
    value.struct_size = sizeof(T);
    return value;
}

// ---- handles

struct Destroy {
    void operator()(dq_context *context) const { dq_context_destroy(context); }
    void operator()(dq_codec *codec) const { dq_codec_destroy(codec); }
};
using Context = std::unique_ptr<dq_context, Destroy>;
using Codec = std::unique_ptr<dq_codec, Destroy>;

inline Context make_context() {
    dq_context *context = nullptr;
    ok(dq_context_create(nullptr, &context));
    return Context(context);
}

inline dq_layer_desc layer_desc(uint32_t d_k = 64, uint32_t d_v = 64, uint32_t k_plan = 4, uint32_t v_plan = 4) {
    auto layer = sized<dq_layer_desc>();
    layer.n_q_heads = 4;
    layer.n_kv_heads = 2;
    layer.head_dim_k = d_k;
    layer.head_dim_v = d_v;
    layer.k_plan = k_plan;
    layer.v_plan = v_plan;
    return layer;
}

inline dq_codec_desc codec_desc(const std::vector<dq_layer_desc> &layers, uint8_t model = 0) {
    auto desc = sized<dq_codec_desc>();
    desc.n_layers = static_cast<uint32_t>(layers.size());
    desc.layers = layers.data();
    desc.fingerprint[0] = model;
    return desc;
}

inline Codec make_codec(const std::vector<dq_layer_desc> &layers) {
    auto desc = codec_desc(layers);
    dq_codec *codec = nullptr;
    ok(dq_codec_create(make_context().get(), &desc, &codec));
    return Codec(codec);
}

inline dq_layer_info info(const dq_codec *codec, uint32_t layer = 0) {
    auto result = sized<dq_layer_info>();
    ok(dq_codec_info(codec, layer, &result));
    return result;
}

inline dq_layout layout(const dq_codec *codec, uint32_t layer = 0) {
    auto result = sized<dq_layout>();
    ok(dq_codec_layout(codec, layer, 1, &result));
    return result;
}

// ---- files in memory

inline int32_t append_bytes(void *user, const void *data, uint64_t size) {
    auto &file = *static_cast<Bytes *>(user);
    const auto *bytes = static_cast<const uint8_t *>(data);
    file.insert(file.end(), bytes, bytes + size);
    return 0;
}

struct Reader {
    const Bytes *file;
    size_t at = 0;
};

inline int32_t take_bytes(void *user, void *data, uint64_t size) {
    auto &reader = *static_cast<Reader *>(user);
    if (size > reader.file->size() - reader.at) return -7;
    std::memcpy(data, reader.file->data() + reader.at, size);
    reader.at += size;
    return 0;
}

inline Bytes save(const dq_codec *codec) {
    Bytes file;
    ok(dq_codec_save(codec, append_bytes, &file));
    return file;
}

inline dq_status load(const Bytes &file, const std::vector<dq_layer_desc> &layers, Codec &out, uint8_t model = 0) {
    Reader reader{&file};
    auto desc = codec_desc(layers, model);
    dq_codec *codec = nullptr;
    const dq_status status = dq_codec_load(make_context().get(), &desc, take_bytes, &reader, &codec);
    out.reset(codec);
    return status;
}

inline Bytes export_sets(const dq_codec *codec, uint32_t layer = 0) {
    Bytes file;
    ok(dq_sets_export(codec, layer, append_bytes, &file));
    return file;
}

// ---- memory

// Bytes between two bands that nobody may write.
class Fenced {
public:
    explicit Fenced(size_t bytes, uint8_t fill = 0)
        : bytes_(bytes),
          whole_(static_cast<uint8_t *>(std::aligned_alloc(64, (bytes + 2 * kBand + 63) / 64 * 64)), std::free) {
        std::memset(whole_.get(), kMark, bytes + 2 * kBand);
        std::memset(data(), fill, bytes);
    }

    uint8_t *data() const { return whole_.get() + kBand; }
    size_t size() const { return bytes_; }

    bool intact() const {
        for (size_t i = 0; i < kBand; i++) {
            if (whole_.get()[i] != kMark || data()[bytes_ + i] != kMark) return false;
        }
        return true;
    }

private:
    static constexpr size_t kBand = 128;
    static constexpr uint8_t kMark = 0xA5;
    size_t bytes_;
    std::unique_ptr<uint8_t, void (*)(void *)> whole_;
};

// SplitMix64; sums of integers scaled by powers of two, so that all machines see the same rows.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t bits() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }

    uint32_t below(uint32_t n) { return static_cast<uint32_t>((bits() >> 32) * n >> 32); }

    // About normal, of unit variance within 1%.
    float normal() {
        const uint64_t b = bits();
        const int64_t sum = static_cast<int64_t>((b & 0xFFFF) + (b >> 16 & 0xFFFF) + (b >> 32 & 0xFFFF) + (b >> 48));
        return static_cast<float>(sum - 2 * 65535) * (1.734375f / 65536.0f);
    }

private:
    uint64_t state_;
};

inline uint16_t half_from(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
    if (magnitude < 0x38800000) {
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f)));
    }
    const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float half_to(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const float fraction = static_cast<float>(bits & 1023);
    float value;
    if (exponent == 0) {
        value = std::ldexp(fraction, -24);
    } else if (exponent == 31) {
        value = bits & 1023 ? std::nanf("") : INFINITY;
    } else {
        value = std::ldexp(1024.0f + fraction, exponent - 25);
    }
    return bits & 0x8000 ? -value : value;
}

// [tokens][heads][dim] rows of one element type, with gaps between rows that nobody may write.
class Rows {
public:
    Rows(uint32_t tokens, uint32_t heads, uint32_t dim, uint32_t dtype = DQ_F32, uint32_t gap = 0)
        : tokens_(tokens),
          heads_(heads),
          dim_(dim),
          dtype_(dtype),
          head_stride_((dim + gap) * size()),
          memory_(size_t{tokens} * heads * head_stride_, 0xCC) {}

    uint32_t tokens() const { return tokens_; }
    uint32_t heads() const { return heads_; }
    uint32_t dim() const { return dim_; }
    const Fenced &memory() const { return memory_; }

    dq_tensor tensor() const {
        dq_tensor t{};
        t.data = memory_.data();
        t.dtype = dtype_;
        t.head_stride = head_stride_;
        t.token_stride = heads_ * head_stride_;
        return t;
    }

    void set(uint32_t token, uint32_t head, uint32_t channel, float value) {
        uint8_t *to = element(token, head, channel);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t half =
            dtype_ == DQ_F16 ? half_from(value) : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
        std::memcpy(to, size() == 4 ? static_cast<void *>(&bits) : const_cast<uint16_t *>(&half), size());
    }

    float get(uint32_t token, uint32_t head, uint32_t channel) const {
        const uint8_t *from = element(token, head, channel);
        if (size() == 4) {
            float value;
            std::memcpy(&value, from, 4);
            return value;
        }
        uint16_t half;
        std::memcpy(&half, from, 2);
        if (dtype_ == DQ_F16) return half_to(half);
        const uint32_t bits = uint32_t{half} << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    // Channels of uneven spread about an offset, with a direction that all tokens share: rows that a fit is good for.
    void fill(uint64_t seed, float offset = 2.0f) {
        Random shape(99), random(seed);
        std::vector<float> spread(dim_), mean(dim_), direction(dim_);
        for (uint32_t c = 0; c < dim_; c++) {
            spread[c] = 0.25f + static_cast<float>(shape.below(8)) * 0.125f;
            mean[c] = shape.normal() * offset;
            direction[c] = shape.normal();
        }
        for (uint32_t t = 0; t < tokens_; t++) {
            for (uint32_t h = 0; h < heads_; h++) {
                const float along = random.normal();
                for (uint32_t c = 0; c < dim_; c++) {
                    set(t, h, c, mean[c] + along * direction[c] + random.normal() * spread[c]);
                }
            }
        }
    }

    void fill_row(uint32_t token, uint32_t head, float value) {
        for (uint32_t c = 0; c < dim_; c++) set(token, head, c, value);
    }

    bool operator==(const Rows &other) const {
        return memory_.size() == other.memory_.size() &&
               std::memcmp(memory_.data(), other.memory_.data(), memory_.size()) == 0;
    }

private:
    uint32_t size() const { return dtype_ == DQ_F32 ? 4 : 2; }
    uint8_t *element(uint32_t token, uint32_t head, uint32_t channel) const {
        return memory_.data() + (size_t{token} * heads_ + head) * head_stride_ + size_t{channel} * size();
    }

    uint32_t tokens_, heads_, dim_, dtype_;
    size_t head_stride_;
    Fenced memory_;
};

// Records of one layer.
class Store {
public:
    Store(const dq_codec *codec, uint32_t layer, uint64_t n_slots, uint64_t gap = 0)
        : slot_bytes_(layout(codec, layer).slot_bytes),
          stride_(slot_bytes_ + gap),
          n_slots_(n_slots),
          memory_(n_slots * stride_, 0x3C) {}

    dq_store view() const {
        dq_store store{};
        store.data = memory_.data();
        store.n_slots = n_slots_;
        store.slot_stride = stride_;
        return store;
    }

    uint8_t *record(uint64_t slot) const { return memory_.data() + slot * stride_; }
    Bytes bytes(uint64_t slot) const { return Bytes(record(slot), record(slot) + slot_bytes_); }
    Bytes bytes() const { return Bytes(memory_.data(), memory_.data() + memory_.size()); }
    uint64_t n_slots() const { return n_slots_; }
    uint64_t slot_bytes() const { return slot_bytes_; }
    const Fenced &memory() const { return memory_; }

private:
    uint64_t slot_bytes_, stride_, n_slots_;
    Fenced memory_;
};

// Tokens of one layer with their rows, positions and slots.
struct Batch {
    Rows q, k, v;
    std::vector<int32_t> positions;
    std::vector<int64_t> slots;

    Batch(const dq_layer_desc &layer, uint32_t n, uint64_t seed = 1, int32_t first = 0, uint32_t dtype = DQ_F32,
          uint32_t gap = 0)
        : q(n, layer.n_q_heads, layer.head_dim_k, dtype, gap),
          k(n, layer.n_kv_heads, layer.head_dim_k, dtype, gap),
          v(n, layer.n_kv_heads, layer.head_dim_v, dtype, gap) {
        q.fill(3 * seed, 0.5f);
        k.fill(3 * seed + 1);
        v.fill(3 * seed + 2, 0.5f);
        for (uint32_t i = 0; i < n; i++) {
            positions.push_back(first + static_cast<int32_t>(i));
            slots.push_back(first + i);
        }
    }

    dq_tokens tokens(const Store &store) const {
        auto t = sized<dq_tokens>();
        t.n_tokens = k.tokens();
        t.q = q.tensor();
        t.k = k.tensor();
        t.v = v.tensor();
        t.positions = positions.data();
        t.slots = slots.data();
        t.store = store.view();
        return t;
    }
};

inline uint64_t workspace_size(const dq_codec *codec, uint32_t layer, uint32_t n_q, uint32_t n_kv, uint32_t streams = 1) {
    auto limits = sized<dq_limits>();
    limits.max_streams = streams;
    limits.max_queries = n_q;
    limits.max_kv = n_kv;
    uint64_t bytes = ~uint64_t{0};
    ok(dq_workspace_size(codec, layer, &limits, &bytes));
    return bytes;
}

inline dq_attend_args attend_args(const Store &store, const Rows &q, const Rows &out, uint32_t n_kv) {
    auto args = sized<dq_attend_args>();
    args.n_q = q.tokens();
    args.n_kv = n_kv;
    args.store = store.view();
    args.q = q.tensor();
    args.out = out.tensor();
    return args;
}

// ---- refusals

// Everything that a refused call must leave as it was.
class Watch {
public:
    Watch &memory(const Fenced &fenced) {
        memories_.push_back({&fenced, Bytes(fenced.data(), fenced.data() + fenced.size())});
        return *this;
    }

    Watch &codec(const dq_codec *codec) {
        codecs_.push_back({codec, save(codec)});
        return *this;
    }

    // The call returns `want`, says why in a sentence with all of `words`, and changes nothing.
    void refuses(dq_status want, std::initializer_list<std::string> words, const std::function<dq_status()> &call) const {
        REQUIRE(dq_context_create(nullptr, reinterpret_cast<dq_context **>(1)) == DQ_ERROR_INVALID_ARGUMENT);
        const std::string before = last_error();
        const dq_status got = call();
        const std::string message = last_error();
        INFO("message: " << message);
        CHECK(std::string(dq_status_name(got)) == dq_status_name(want));
        for (const auto &word : words) {
            INFO("missing: " << word);
            CHECK(message.find(word) != std::string::npos);
        }
        CHECK(message != before);
        unchanged();
    }

    void unchanged() const {
        for (const auto &m : memories_) {
            CHECK(m.first->intact());
            CHECK(std::memcmp(m.first->data(), m.second.data(), m.second.size()) == 0);
        }
        for (const auto &c : codecs_) {
            CHECK(save(c.first) == c.second);
        }
    }

private:
    std::vector<std::pair<const Fenced *, Bytes>> memories_;
    std::vector<std::pair<const dq_codec *, Bytes>> codecs_;
};

// A struct of a later version of the header: the same with more behind it.
template <class T>
struct Newer {
    T known;
    uint8_t tail[16];

    explicit Newer(const T &value) : known(value), tail{} { known.struct_size = sizeof *this; }
    T *get() { return &known; }
};

}  // namespace test
