// libdecoquant from C++17: handles that end themselves, typed views of rows, errors as exceptions or as results.
//
// A thin coat over decoquant.h, which is the reference: structs are the C ones, every call is one C call, and nothing is
// allocated but the text of an error (and what Memory says). Each call comes twice: `codec.attend(...)` throws dq::Error,
// `codec.try_attend(...)` returns a dq::Result and throws nothing. Without exceptions (-fno-exceptions) only the second
// kind is there.
//
//     dq::Context context = dq::Context::create();
//     dq::Codec codec = dq::Codec::create(context, model);
//     if (auto done = codec.try_compress(0, tokens); !done) log(done.error().message);
#ifndef DECOQUANT_HPP
#define DECOQUANT_HPP

#include "decoquant.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#if defined(__cpp_exceptions)
#include <exception>
#include <stdexcept>
#endif

namespace dq {

// ---- errors

// Why a call failed: its status, and this thread's sentence about it.
struct Failure {
    dq_status status;
    std::string message;

    static Failure last(dq_status status) {
        std::string text(static_cast<std::size_t>(dq_last_error(nullptr, 0)) + 1, '\0');
        dq_last_error(text.data(), text.size());
        text.pop_back();
        return {status, std::move(text)};
    }
};

// A value, or why there is none: std::expected<T, Failure> as far as C++17 goes.
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : either_(std::in_place_index<0>, std::move(value)) {}
    Result(Failure failure) : either_(std::in_place_index<1>, std::move(failure)) {}

    bool has_value() const noexcept { return either_.index() == 0; }
    explicit operator bool() const noexcept { return has_value(); }
    // Only with a value.
    T &operator*() & noexcept { return *std::get_if<0>(&either_); }
    const T &operator*() const & noexcept { return *std::get_if<0>(&either_); }
    T &&operator*() && noexcept { return std::move(*std::get_if<0>(&either_)); }
    T *operator->() noexcept { return std::get_if<0>(&either_); }
    const T *operator->() const noexcept { return std::get_if<0>(&either_); }
    // Only without a value.
    Failure &error() noexcept { return *std::get_if<1>(&either_); }
    const Failure &error() const noexcept { return *std::get_if<1>(&either_); }

private:
    std::variant<T, Failure> either_;
};

// What a call without a result yields.
struct Done {};

// What a call that writes rows yields.
struct Written {
    // Rows with NaN, infinity or values beyond f16 were found: see DQ_ROWS_REPLACED.
    bool replaced;
};

#if defined(__cpp_exceptions)
class Error : public std::runtime_error {
public:
    explicit Error(const Failure &failure)
        : std::runtime_error(std::string(dq_status_name(failure.status)) + ": " + failure.message),
          status_(failure.status) {}
    dq_status status() const noexcept { return status_; }

private:
    dq_status status_;
};

// The value, or its failure thrown.
template <class T>
T unwrap(Result<T> result) {
    if (!result) throw Error(result.error());
    return std::move(*result);
}
#endif

// ---- structs and views

// A C struct of zeros with its struct_size.
template <class T>
T sized() noexcept {
    T value{};
    value.struct_size = sizeof(T);
    return value;
}

// 16-bit floats as bits. Types of your own: specialise element.
struct f16 {
    std::uint16_t bits;
};
struct bf16 {
    std::uint16_t bits;
};
template <class T>
struct element;
template <>
struct element<float> {
    static constexpr std::uint32_t dtype = DQ_F32;
};
template <>
struct element<f16> {
    static constexpr std::uint32_t dtype = DQ_F16;
};
template <>
struct element<bf16> {
    static constexpr std::uint32_t dtype = DQ_BF16;
};

// Rows [tokens][heads][dim] in host or device memory, channels next to each other. Strides in elements.
template <class T>
struct Rows {
    T *data = nullptr;
    std::uint32_t tokens = 0, heads = 0, dim = 0;
    std::uint64_t token_stride = 0, head_stride = 0;

    Rows() = default;
    // Without gaps.
    Rows(T *first, std::uint32_t n_tokens, std::uint32_t n_heads, std::uint32_t head_dim) noexcept
        : Rows(first, n_tokens, n_heads, head_dim, std::uint64_t{n_heads} * head_dim, head_dim) {}
    Rows(T *first, std::uint32_t n_tokens, std::uint32_t n_heads, std::uint32_t head_dim, std::uint64_t per_token,
         std::uint64_t per_head) noexcept
        : data(first), tokens(n_tokens), heads(n_heads), dim(head_dim), token_stride(per_token), head_stride(per_head) {}

    // Tokens [first, first + n).
    Rows slice(std::uint32_t first, std::uint32_t n) const noexcept {
        return {data + first * token_stride, n, heads, dim, token_stride, head_stride};
    }

    // C has one tensor for rows that are read and rows that are written: const rows are only ever read.
    operator dq_tensor() const noexcept {
        using Bare = std::remove_const_t<T>;
        dq_tensor tensor{};
        tensor.data = const_cast<Bare *>(data);
        tensor.dtype = element<Bare>::dtype;
        tensor.token_stride = token_stride * sizeof(T);
        tensor.head_stride = head_stride * sizeof(T);
        return tensor;
    }
};

// Host memory of its own, aligned as stores and workspaces want it. Not zeroed.
class Memory {
public:
    Memory() = default;
    explicit Memory(std::size_t bytes) : data_(::operator new(bytes ? bytes : 1, kAlign)), bytes_(bytes) {}
    void *data() const noexcept { return data_.get(); }
    std::size_t size() const noexcept { return bytes_; }

private:
    static constexpr std::align_val_t kAlign{64};
    struct Free {
        void operator()(void *data) const noexcept { ::operator delete(data, kAlign); }
    };
    std::unique_ptr<void, Free> data_;
    std::size_t bytes_ = 0;
};

// ---- handles

namespace detail {

struct Destroy {
    void operator()(dq_context *handle) const noexcept { dq_context_destroy(handle); }
    void operator()(dq_codec *handle) const noexcept { dq_codec_destroy(handle); }
};

inline Result<Done> done(dq_status status) {
    if (status != DQ_OK) return Failure::last(status);
    return Done{};
}

inline Result<Written> written(dq_status status) {
    if (status != DQ_OK && status != DQ_ROWS_REPLACED) return Failure::last(status);
    return Written{status == DQ_ROWS_REPLACED};
}

// A callable bool(pointer, bytes) as a C callback. What it throws waits here until C is left.
template <class F, class Pointer>
struct Stream {
    F &call;
#if defined(__cpp_exceptions)
    std::exception_ptr thrown{};
    void rethrow() {
        if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
    }
#else
    void rethrow() {}
#endif
    static std::int32_t run(void *user, Pointer data, std::uint64_t size) noexcept {
        auto &self = *static_cast<Stream *>(user);
#if defined(__cpp_exceptions)
        try {
            return self.call(data, static_cast<std::size_t>(size)) ? 0 : 1;
        } catch (...) {
            self.thrown = std::current_exception();
            return 1;
        }
#else
        return self.call(data, static_cast<std::size_t>(size)) ? 0 : 1;
#endif
    }
};
template <class F>
using Writer = Stream<F, const void *>;
template <class F>
using Reader = Stream<F, void *>;

}  // namespace detail

class Context {
public:
    // The CPU, or what `desc` says.
    static Result<Context> try_create(const dq_context_desc *desc = nullptr) {
        dq_context *handle = nullptr;
        if (const auto status = dq_context_create(desc, &handle); status != DQ_OK) return Failure::last(status);
        return Context(handle);
    }
#if defined(__cpp_exceptions)
    static Context create(const dq_context_desc *desc = nullptr) { return unwrap(try_create(desc)); }
#endif

    // Takes over a C handle; null for none.
    explicit Context(dq_context *handle = nullptr) noexcept : handle_(handle) {}
    dq_context *get() const noexcept { return handle_.get(); }
    dq_context *release() noexcept { return handle_.release(); }

private:
    std::unique_ptr<dq_context, detail::Destroy> handle_;
};

class Codec {
public:
    static Result<Codec> try_create(const Context &context, const dq_codec_desc &desc) {
        dq_codec *handle = nullptr;
        const auto status = dq_codec_create(context.get(), &desc, &handle);
        if (status != DQ_OK) return Failure::last(status);
        return Codec(handle);
    }

    // `read`: bool(void *data, size_t bytes), which fills `data` or returns false.
    template <class F>
    static Result<Codec> try_load(const Context &context, const dq_codec_desc &desc, F &&read) {
        detail::Reader<F> reader{read};
        dq_codec *handle = nullptr;
        const auto status = dq_codec_load(context.get(), &desc, reader.run, &reader, &handle);
        Codec codec(handle);
        reader.rethrow();
        if (status != DQ_OK) return Failure::last(status);
        return codec;
    }

    // Takes over a C handle; null for none.
    explicit Codec(dq_codec *handle = nullptr) noexcept : handle_(handle) {}
    dq_codec *get() const noexcept { return handle_.get(); }
    dq_codec *release() noexcept { return handle_.release(); }

    // `write`: bool(const void *data, size_t bytes); false stops with DQ_ERROR_IO.
    template <class F>
    Result<Done> try_save(F &&write) const {
        detail::Writer<F> writer{write};
        const auto status = dq_codec_save(get(), writer.run, &writer);
        writer.rethrow();
        return detail::done(status);
    }

    Result<dq_layout> try_layout(std::uint32_t layer, std::uint64_t n_slots = 0) const {
        auto out = sized<dq_layout>();
        const auto status = dq_codec_layout(get(), layer, n_slots, &out);
        if (status != DQ_OK) return Failure::last(status);
        return out;
    }

    Result<dq_layer_info> try_info(std::uint32_t layer) const {
        auto out = sized<dq_layer_info>();
        const auto status = dq_codec_info(get(), layer, &out);
        if (status != DQ_OK) return Failure::last(status);
        return out;
    }

    Result<std::uint64_t> try_workspace_size(std::uint32_t layer, const dq_limits &limits) const {
        std::uint64_t bytes = 0;
        const auto status = dq_workspace_size(get(), layer, &limits, &bytes);
        if (status != DQ_OK) return Failure::last(status);
        return bytes;
    }

    Result<Written> try_compress(std::uint32_t layer, const dq_tokens &tokens, void *workspace = nullptr,
                                 std::uint64_t bytes = 0, void *stream = nullptr) {
        return detail::written(dq_compress(get(), layer, &tokens, workspace, bytes, stream));
    }

    Result<Written> try_append(std::uint32_t layer, const dq_tokens &tokens, void *workspace = nullptr,
                               std::uint64_t bytes = 0, void *stream = nullptr) {
        return detail::written(dq_append(get(), layer, &tokens, workspace, bytes, stream));
    }

    Result<Done> try_refit(std::uint32_t first_layer, std::uint32_t n_layers, void *stream = nullptr) {
        return detail::done(dq_refit(get(), first_layer, n_layers, stream));
    }

    Result<Done> try_attend(std::uint32_t layer, const dq_attend_args &args, void *workspace, std::uint64_t bytes,
                            void *stream = nullptr) const {
        return detail::done(dq_attend(get(), layer, &args, workspace, bytes, stream));
    }

    Result<Done> try_attend_shard(std::uint32_t layer, const dq_attend_args &args, void *workspace, std::uint64_t bytes,
                                  std::uint32_t shard, std::uint32_t n_shards) const {
        return detail::done(dq_attend_shard(get(), layer, &args, workspace, bytes, shard, n_shards));
    }

    Result<Done> try_attend_merge_shard(std::uint32_t layer, const dq_attend_args &args, void *workspace,
                                        std::uint64_t bytes, std::uint32_t shard, std::uint32_t n_shards) const {
        return detail::done(dq_attend_merge_shard(get(), layer, &args, workspace, bytes, shard, n_shards));
    }

    // Rows back; either side may have null data.
    Result<Done> try_dequantize(std::uint32_t layer, const dq_store &store, const std::int64_t *slots,
                                std::uint32_t n_slots, const dq_tensor &k, const dq_tensor &v,
                                void *stream = nullptr) const {
        return detail::done(dq_dequantize(get(), layer, &store, slots, n_slots, &k, &v, stream));
    }

    template <class F>
    Result<Done> try_export_sets(std::uint32_t layer, F &&write) const {
        detail::Writer<F> writer{write};
        const auto status = dq_sets_export(get(), layer, writer.run, &writer);
        writer.rethrow();
        return detail::done(status);
    }

    // `map`: see dq_sets_import.
    template <class F>
    Result<Done> try_import_sets(std::uint32_t layer, F &&read, std::uint8_t *map, std::uint64_t map_bytes) {
        detail::Reader<F> reader{read};
        const auto status = dq_sets_import(get(), layer, reader.run, &reader, map, map_bytes);
        reader.rethrow();
        return detail::done(status);
    }

    Result<Done> try_remap_rows(std::uint32_t layer, const dq_store &store, const std::int64_t *slots,
                                std::uint64_t n_slots, const std::uint8_t *map, std::uint64_t map_bytes) const {
        return detail::done(dq_remap_rows(get(), layer, &store, slots, n_slots, map, map_bytes));
    }

#if defined(__cpp_exceptions)
    // The same calls; they throw Error.
    static Codec create(const Context &context, const dq_codec_desc &desc) { return unwrap(try_create(context, desc)); }
    template <class F>
    static Codec load(const Context &context, const dq_codec_desc &desc, F &&read) {
        return unwrap(try_load(context, desc, std::forward<F>(read)));
    }
    template <class F>
    void save(F &&write) const {
        unwrap(try_save(std::forward<F>(write)));
    }
    dq_layout layout(std::uint32_t layer, std::uint64_t n_slots = 0) const { return unwrap(try_layout(layer, n_slots)); }
    dq_layer_info info(std::uint32_t layer) const { return unwrap(try_info(layer)); }
    std::uint64_t workspace_size(std::uint32_t layer, const dq_limits &limits) const {
        return unwrap(try_workspace_size(layer, limits));
    }
    Written compress(std::uint32_t layer, const dq_tokens &tokens, void *workspace = nullptr, std::uint64_t bytes = 0,
                     void *stream = nullptr) {
        return unwrap(try_compress(layer, tokens, workspace, bytes, stream));
    }
    Written append(std::uint32_t layer, const dq_tokens &tokens, void *workspace = nullptr, std::uint64_t bytes = 0,
                   void *stream = nullptr) {
        return unwrap(try_append(layer, tokens, workspace, bytes, stream));
    }
    void refit(std::uint32_t first_layer, std::uint32_t n_layers, void *stream = nullptr) {
        unwrap(try_refit(first_layer, n_layers, stream));
    }
    void attend(std::uint32_t layer, const dq_attend_args &args, void *workspace, std::uint64_t bytes,
                void *stream = nullptr) const {
        unwrap(try_attend(layer, args, workspace, bytes, stream));
    }
    void attend_shard(std::uint32_t layer, const dq_attend_args &args, void *workspace, std::uint64_t bytes,
                      std::uint32_t shard, std::uint32_t n_shards) const {
        unwrap(try_attend_shard(layer, args, workspace, bytes, shard, n_shards));
    }
    void attend_merge_shard(std::uint32_t layer, const dq_attend_args &args, void *workspace, std::uint64_t bytes,
                            std::uint32_t shard, std::uint32_t n_shards) const {
        unwrap(try_attend_merge_shard(layer, args, workspace, bytes, shard, n_shards));
    }
    void dequantize(std::uint32_t layer, const dq_store &store, const std::int64_t *slots, std::uint32_t n_slots,
                    const dq_tensor &k, const dq_tensor &v, void *stream = nullptr) const {
        unwrap(try_dequantize(layer, store, slots, n_slots, k, v, stream));
    }
    template <class F>
    void export_sets(std::uint32_t layer, F &&write) const {
        unwrap(try_export_sets(layer, std::forward<F>(write)));
    }
    template <class F>
    void import_sets(std::uint32_t layer, F &&read, std::uint8_t *map, std::uint64_t map_bytes) {
        unwrap(try_import_sets(layer, std::forward<F>(read), map, map_bytes));
    }
    void remap_rows(std::uint32_t layer, const dq_store &store, const std::int64_t *slots, std::uint64_t n_slots,
                    const std::uint8_t *map, std::uint64_t map_bytes) const {
        unwrap(try_remap_rows(layer, store, slots, n_slots, map, map_bytes));
    }
#endif

private:
    std::unique_ptr<dq_codec, detail::Destroy> handle_;
};

static_assert(sizeof(Codec) == sizeof(dq_codec *) && sizeof(Context) == sizeof(dq_context *), "handles are pointers");

}  // namespace dq

#endif  // DECOQUANT_HPP
