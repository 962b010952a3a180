// Fuzzing through the C ABI: the first byte picks a target, the rest is its input. Nothing may crash, hang, or write
// outside; what was refused must have changed nothing (guard bands stand around every buffer).
//
//   0 factor files    1 set exports    2 descriptions    3 slots, masks, sequences and tails over records of any bytes
//
// Files end in a checksum, which no fuzzer guesses: it is put right here, so that what lies behind it is reached.
#include <decoquant.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

void require(bool fine) {
    if (!fine) std::abort();
}

// Takes values from the input; zeros when it has ended.
class Input {
public:
    Input(const uint8_t *data, size_t size) : data_(data), size_(size) {}

    template <class T>
    T take() {
        T value{};
        const size_t n = size_ < sizeof value ? size_ : sizeof value;
        std::memcpy(&value, data_, n);
        data_ += n;
        size_ -= n;
        return value;
    }
    uint32_t below(uint32_t n) { return take<uint8_t>() % n; }
    // Mostly within [0, n), sometimes anything.
    int64_t near(int64_t n) {
        const auto kind = take<uint8_t>();
        if (kind < 8) return take<int64_t>();
        return kind % (n + 1) - (kind == 255);
    }
    std::vector<uint8_t> rest() { return std::vector<uint8_t>(data_, data_ + size_); }
    bool empty() const { return size_ == 0; }

private:
    const uint8_t *data_;
    size_t size_;
};

// Bytes between bands that nobody may write; ASan watches what lies beyond.
struct Fenced {
    explicit Fenced(size_t bytes)
        : n(bytes), whole(static_cast<uint8_t *>(std::aligned_alloc(64, (bytes + 128 + 63) / 64 * 64)), std::free) {
        std::memset(whole.get(), 0xA5, bytes + 128);
    }
    ~Fenced() {
        for (size_t i = 0; i < 64; i++) require(whole.get()[i] == 0xA5 && data()[n + i] == 0xA5);
    }
    uint8_t *data() const { return whole.get() + 64; }
    size_t n;
    std::unique_ptr<uint8_t, void (*)(void *)> whole;
};

struct Reader {
    const std::vector<uint8_t> &file;
    size_t at = 0;
    static int32_t read(void *user, void *data, uint64_t size) {
        auto &self = *static_cast<Reader *>(user);
        if (size > self.file.size() - self.at) return 1;
        std::memcpy(data, self.file.data() + self.at, size);
        self.at += size;
        return 0;
    }
};

int32_t append(void *user, const void *data, uint64_t size) {
    auto &file = *static_cast<std::vector<uint8_t> *>(user);
    file.insert(file.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + size);
    return 0;
}

dq_context *context() {
    static dq_context *one = [] {
        dq_context *made = nullptr;
        require(dq_context_create(nullptr, &made) == DQ_OK);
        return made;
    }();
    return one;
}

constexpr uint32_t kSlots = 24, kTokens = 24, kD = 64, kQHeads = 4, kKvHeads = 2;

dq_layer_desc layer_desc() {
    dq_layer_desc layer{};
    layer.struct_size = sizeof layer;
    layer.n_q_heads = kQHeads;
    layer.n_kv_heads = kKvHeads;
    layer.head_dim_k = layer.head_dim_v = kD;
    layer.k_plan = 104;
    layer.v_plan = 4;
    return layer;
}

dq_codec *make(const dq_layer_desc &layer) {
    dq_codec_desc desc{};
    desc.struct_size = sizeof desc;
    desc.n_layers = 1;
    desc.layers = &layer;
    dq_codec *codec = nullptr;
    require(dq_codec_create(context(), &desc, &codec) == DQ_OK);
    return codec;
}

dq_tensor rows(const float *data, uint32_t heads) {
    dq_tensor tensor{};
    tensor.data = const_cast<float *>(data);
    tensor.dtype = DQ_F32;
    tensor.head_stride = kD * 4;
    tensor.token_stride = heads * kD * 4;
    return tensor;
}

const std::vector<float> &noise() {
    static const std::vector<float> all = [] {
        std::vector<float> x(kTokens * kQHeads * kD);
        uint32_t seed = 1;
        for (float &v : x) v = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
        return x;
    }();
    return all;
}

// What a codec has learned from some rows, and their records. Made once: a fit is far dearer than what is fuzzed.
struct Learned {
    std::vector<uint8_t> factors, sets, records;

    static const Learned &once(const dq_layer_desc &layer, size_t record_bytes) {
        static const Learned all(layer, record_bytes);
        return all;
    }

private:
    Learned(const dq_layer_desc &layer, size_t record_bytes);
};

Learned::Learned(const dq_layer_desc &layer, size_t record_bytes) {
    Fenced memory(record_bytes);
    dq_codec *codec = make(layer);
    int64_t slots[kTokens];
    int32_t positions[kTokens];
    for (uint32_t i = 0; i < kTokens; i++) {
        slots[i] = i % kSlots;
        positions[i] = static_cast<int32_t>(i);
    }
    dq_tokens tokens{};
    tokens.struct_size = sizeof tokens;
    tokens.n_tokens = kTokens;
    tokens.q = rows(noise().data(), kQHeads);
    tokens.k = rows(noise().data() + 7, kKvHeads);
    tokens.v = rows(noise().data() + 99, kKvHeads);
    tokens.positions = positions;
    tokens.slots = slots;
    tokens.store = {memory.data(), kSlots, 0};
    require(dq_compress(codec, 0, &tokens, nullptr, 0, nullptr) == DQ_OK);
    require(dq_codec_save(codec, append, &factors) == DQ_OK);
    require(dq_sets_export(codec, 0, append, &sets) == DQ_OK);
    records.assign(memory.data(), memory.data() + memory.n);
    dq_codec_destroy(codec);
}

// The input as edits of a valid file: (place, byte) pairs, or a cut; the checksum and length put right.
std::vector<uint8_t> edited(std::vector<uint8_t> file, Input &in) {
    const bool mend = in.take<uint8_t>() % 8 != 0;
    if (in.below(4) == 0) file.resize(in.take<uint32_t>() % (file.size() + 1));
    while (!in.empty() && !file.empty()) {
        const auto at = in.take<uint32_t>() % file.size();
        file[at] = in.take<uint8_t>();
    }
    if (mend && file.size() >= 64) {
        const uint64_t length = file.size();
        std::memcpy(file.data() + 48, &length, 8);
        const uint64_t sum = XXH3_64bits(file.data(), file.size() - 8);
        std::memcpy(file.data() + file.size() - 8, &sum, 8);
    }
    return file;
}

void use(dq_codec *codec, const dq_store &store) {
    Fenced k(kSlots * kKvHeads * kD * 4), out(kQHeads * kD * 4);
    int64_t slots[kSlots];
    for (uint32_t i = 0; i < kSlots; i++) slots[i] = i;
    const dq_tensor to = rows(reinterpret_cast<float *>(k.data()), kKvHeads);
    require(dq_dequantize(codec, 0, &store, slots, kSlots, &to, nullptr, nullptr) == DQ_OK);
    dq_limits limits{};
    limits.struct_size = sizeof limits;
    limits.max_queries = 1;
    limits.max_kv = kSlots;
    uint64_t bytes = 0;
    require(dq_workspace_size(codec, 0, &limits, &bytes) == DQ_OK);
    Fenced workspace(bytes);
    dq_attend_args args{};
    args.struct_size = sizeof args;
    args.n_q = 1;
    args.n_kv = kSlots;
    args.store = store;
    args.q = rows(noise().data(), kQHeads);
    args.out = rows(reinterpret_cast<float *>(out.data()), kQHeads);
    require(dq_attend(codec, 0, &args, workspace.data(), bytes, nullptr) == DQ_OK);
}

dq_status load(const dq_layer_desc &layer, const std::vector<uint8_t> &file, dq_codec **codec) {
    dq_codec_desc desc{};
    desc.struct_size = sizeof desc;
    desc.n_layers = 1;
    desc.layers = &layer;
    Reader reader{file};
    return dq_codec_load(context(), &desc, Reader::read, &reader, codec);
}

// Records of learned rows.
struct Scene {
    dq_layer_desc layer = layer_desc();
    static uint64_t slot_bytes() {
        static const uint64_t bytes = [] {
            dq_codec *codec = make(layer_desc());
            dq_layout layout{};
            layout.struct_size = sizeof layout;
            require(dq_codec_layout(codec, 0, 0, &layout) == DQ_OK);
            dq_codec_destroy(codec);
            return layout.slot_bytes;
        }();
        return bytes;
    }
    Fenced records{kSlots * slot_bytes()};
    dq_store store{records.data(), kSlots, 0};
    const Learned &learned = Learned::once(layer, records.n);

    Scene() { std::memcpy(records.data(), learned.records.data(), records.n); }

    // One that holds the records' sets, and is frozen.
    dq_codec *codec() const {
        dq_codec *made = nullptr;
        require(load(layer, learned.factors, &made) == DQ_OK);
        return made;
    }
};

void factor_file(Input in) {
    Scene s;
    dq_codec *loaded = nullptr;
    const auto status = load(s.layer, edited(s.learned.factors, in), &loaded);
    require((loaded != nullptr) == (status == DQ_OK));
    if (loaded) use(loaded, s.store);
    dq_codec_destroy(loaded);
}

void set_export(Input in) {
    Scene s;
    dq_codec *codec = in.below(2) ? make(s.layer) : s.codec();
    const auto file = edited(s.learned.sets, in);
    Fenced map(2 * kKvHeads * DQ_MAX_SETS);
    Reader reader{file};
    if (dq_sets_import(codec, 0, Reader::read, &reader, map.data(), map.n) == DQ_OK) {
        int64_t slots[kSlots];
        for (uint32_t i = 0; i < kSlots; i++) slots[i] = i;
        dq_remap_rows(codec, 0, &s.store, slots, kSlots, map.data(), map.n);
    }
    use(codec, s.store);
    dq_codec_destroy(codec);
}

void descriptions(Input in) {
    auto layer = layer_desc();
    dq_codec_desc desc{};
    desc.struct_size = sizeof desc;
    desc.n_layers = 1;
    desc.layers = &layer;
    uint32_t *const fields[] = {&layer.struct_size, &layer.n_q_heads, &layer.n_kv_heads, &layer.head_dim_k, &layer.head_dim_v,
                                &layer.k_plan,      &layer.v_plan,    &layer.k_gauge,    &layer.v_gauge,    &desc.struct_size,
                                &desc.max_fits,     &desc.flags};
    constexpr uint32_t kDims[] = {64, 80, 96, 128, 192, 256}, kPlans[] = {2, 3, 4, 8, 102, 103, 104};
    layer.head_dim_k = kDims[in.below(6)];
    layer.head_dim_v = kDims[in.below(6)];
    layer.k_plan = kPlans[in.below(7)];
    layer.v_plan = kPlans[in.below(7)];
    for (uint32_t i = in.below(4); i > 0; i--) {
        uint32_t &field = *fields[in.below(12)];
        field = in.below(2) ? in.take<uint32_t>() : in.below(20);
    }
    // A size is the caller's word for how much may be read: larger than the struct would be a lie.
    if (layer.struct_size > sizeof layer) layer.struct_size = sizeof layer;
    if (desc.struct_size > sizeof desc) desc.struct_size = sizeof desc;
    dq_codec *codec = nullptr;
    const auto status = dq_codec_create(context(), &desc, &codec);
    require((codec != nullptr) == (status == DQ_OK));
    dq_limits limits{};
    limits.struct_size = sizeof limits;
    limits.max_streams = in.take<uint32_t>();
    limits.max_queries = in.take<uint32_t>();
    limits.max_kv = in.take<uint32_t>();
    limits.max_total_queries = in.take<uint32_t>();
    limits.max_tail = in.take<uint32_t>();
    uint64_t bytes = 0;
    if (codec) dq_workspace_size(codec, in.below(2), &limits, &bytes);
    dq_codec_destroy(codec);
}

void slots_and_masks(Input in) {
    Scene s;
    // One that makes sinks of new rows, or one that holds the records' sets.
    dq_codec *codec = in.below(2) ? make(s.layer) : s.codec();
    const bool garbage = in.below(2);
    if (garbage) {
        for (size_t i = 0; i < s.records.n; i += 3) s.records.data()[i] = in.take<uint8_t>();
    }
    // New rows at slots that may be wrong.
    const uint32_t n = in.below(8);
    std::vector<int64_t> slots;
    std::vector<int32_t> positions;
    for (uint32_t i = 0; i < n; i++) {
        slots.push_back(in.near(kSlots));
        positions.push_back(static_cast<int32_t>(in.near(100)));
    }
    dq_tokens tokens{};
    tokens.struct_size = sizeof tokens;
    tokens.n_tokens = n;
    tokens.k = tokens.v = rows(noise().data(), kKvHeads);
    tokens.slots = slots.data();
    tokens.positions = in.below(2) ? positions.data() : nullptr;
    tokens.store = s.store;
    dq_append(codec, 0, &tokens, nullptr, 0, nullptr);

    // Attention, even or uneven.
    const uint32_t n_streams = 1 + in.below(4), n_q = 1 + in.below(5), n_kv = in.below(kSlots + 1), n_tail = in.below(4);
    const uint32_t tokens_of_q = n_streams * n_q, columns = n_kv + n_tail;
    dq_attend_args args{};
    args.struct_size = sizeof args;
    args.n_streams = n_streams;
    args.n_q = n_q;
    args.n_kv = n_kv;
    args.store = s.store;
    args.q = rows(noise().data(), kQHeads);
    Fenced out(tokens_of_q * kQHeads * kD * 4);
    args.out = rows(reinterpret_cast<float *>(out.data()), kQHeads);
    args.scale = in.below(4) ? 0 : in.take<float>();
    args.softcap = in.below(4) ? 0 : in.take<float>();
    if (n_tail) {
        args.tail.k = args.tail.v = rows(noise().data(), kKvHeads);
        args.tail.n_rows = n_tail;
    }
    std::vector<float> mask(tokens_of_q * columns + 1);
    std::vector<int32_t> starts{0}, lengths, table, tail_starts, tail_lengths;
    if (in.below(2)) {
        for (float &x : mask) x = in.below(3) ? (in.below(2) ? 0.0f : -INFINITY) : in.take<float>();
        args.mask.data = mask.data();
        args.mask.dtype = DQ_F32;
        args.mask.query_stride = 4 * columns;
        args.mask.stream_stride = 4 * columns * n_q;
        args.first_slot = in.below(3) ? 0 : in.take<uint64_t>();
        args.stream_slots = in.below(3) ? 0 : in.take<uint64_t>();
    } else {
        const uint32_t block = 1 + in.below(8), width = (n_kv + block - 1) / block + 1;
        for (uint32_t i = 0; i < n_streams; i++) {
            starts.push_back(starts.back() + static_cast<int32_t>(in.near(n_q)));
            lengths.push_back(static_cast<int32_t>(in.near(n_kv)));
            tail_starts.push_back(static_cast<int32_t>(in.below(8)));
            tail_lengths.push_back(static_cast<int32_t>(in.near(n_tail)));
        }
        for (uint32_t i = 0; i < n_streams * width; i++) table.push_back(static_cast<int32_t>(in.near(kSlots / block - 1)));
        auto &q = args.sequences;
        if (in.below(4)) {
            q.q_starts = starts.data();
            q.n_tokens = tokens_of_q;
        }
        // The extent of what the lengths say is the caller's word.
        for (auto &length : lengths) {
            if (length > static_cast<int32_t>(n_kv)) length = static_cast<int32_t>(n_kv) + 1;
        }
        q.kv_lengths = lengths.data();
        q.visible = in.below(4);
        q.window = in.below(3) ? 0 : in.take<uint32_t>();
        q.block_table = table.data();
        q.table_stride = 4 * width;
        q.block_slots = block;
        if (n_tail && in.below(2)) {
            args.tail.starts = tail_starts.data();
            args.tail.lengths = tail_lengths.data();
            for (auto &length : tail_lengths) {
                if (length > static_cast<int32_t>(n_tail)) length = static_cast<int32_t>(n_tail) + 1;
            }
        }
    }
    dq_limits limits{};
    limits.struct_size = sizeof limits;
    limits.max_streams = n_streams;
    limits.max_queries = n_q;
    limits.max_kv = n_kv;
    limits.max_tail = n_tail;
    uint64_t bytes = 0;
    require(dq_workspace_size(codec, 0, &limits, &bytes) == DQ_OK);
    Fenced workspace(bytes);
    const auto status = dq_attend(codec, 0, &args, workspace.data(), bytes, nullptr);
    if (status != DQ_OK) {
        for (size_t i = 0; i < out.n; i++) require(out.data()[i] == 0xA5);
    }
    dq_codec_destroy(codec);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    const Input in(data + 1, size - 1);
    switch (data[0] % 4) {
        case 0: factor_file(in); break;
        case 1: set_export(in); break;
        case 2: descriptions(in); break;
        default: slots_and_masks(in);
    }
    return 0;
}
