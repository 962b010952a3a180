// Sizes, offsets and numbers that programs were compiled with. None may ever change; fields are only appended.
#include "support.hpp"

#include <cstddef>

#define FIELD(type, field, offset) static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) static_assert(sizeof(type) == (size), #type)

SIZE(dq_context_desc, 16);
FIELD(dq_context_desc, backend, 4);
FIELD(dq_context_desc, device, 8);
FIELD(dq_context_desc, reserved, 12);

SIZE(dq_layer_desc, 36);
FIELD(dq_layer_desc, n_q_heads, 4);
FIELD(dq_layer_desc, n_kv_heads, 8);
FIELD(dq_layer_desc, head_dim_k, 12);
FIELD(dq_layer_desc, head_dim_v, 16);
FIELD(dq_layer_desc, k_plan, 20);
FIELD(dq_layer_desc, v_plan, 24);
FIELD(dq_layer_desc, k_gauge, 28);
FIELD(dq_layer_desc, v_gauge, 32);

SIZE(dq_codec_desc, 56);
FIELD(dq_codec_desc, n_layers, 4);
FIELD(dq_codec_desc, layers, 8);
FIELD(dq_codec_desc, max_fits, 16);
FIELD(dq_codec_desc, flags, 20);
FIELD(dq_codec_desc, fingerprint, 24);

SIZE(dq_layout, 72);
FIELD(dq_layout, alignment, 4);
FIELD(dq_layout, slot_bytes, 8);
FIELD(dq_layout, k_codes_offset, 16);
FIELD(dq_layout, v_codes_offset, 24);
FIELD(dq_layout, k_headers_offset, 32);
FIELD(dq_layout, v_headers_offset, 40);
FIELD(dq_layout, max_factor_bytes, 48);
FIELD(dq_layout, bits_per_value, 56);
FIELD(dq_layout, bits_per_value_with_factors, 64);

SIZE(dq_layer_info, 40);
FIELD(dq_layer_info, k_sets, 4);
FIELD(dq_layer_info, v_sets, 8);
FIELD(dq_layer_info, frozen, 12);
FIELD(dq_layer_info, rows_seen, 16);
FIELD(dq_layer_info, factor_bytes, 24);
FIELD(dq_layer_info, moment_bytes, 32);

SIZE(dq_tensor, 32);
FIELD(dq_tensor, data, 0);
FIELD(dq_tensor, dtype, 8);
FIELD(dq_tensor, reserved, 12);
FIELD(dq_tensor, token_stride, 16);
FIELD(dq_tensor, head_stride, 24);

SIZE(dq_store, 24);
FIELD(dq_store, data, 0);
FIELD(dq_store, n_slots, 8);
FIELD(dq_store, slot_stride, 16);

SIZE(dq_tokens, 152);
FIELD(dq_tokens, n_tokens, 4);
FIELD(dq_tokens, q, 8);
FIELD(dq_tokens, k, 40);
FIELD(dq_tokens, v, 72);
FIELD(dq_tokens, positions, 104);
FIELD(dq_tokens, slots, 112);
FIELD(dq_tokens, store, 120);
FIELD(dq_tokens, replaced_rows, 144);

SIZE(dq_mask, 32);
FIELD(dq_mask, data, 0);
FIELD(dq_mask, dtype, 8);
FIELD(dq_mask, reserved, 12);
FIELD(dq_mask, query_stride, 16);
FIELD(dq_mask, stream_stride, 24);

SIZE(dq_attend_args, 208);
FIELD(dq_attend_args, n_streams, 4);
FIELD(dq_attend_args, n_q, 8);
FIELD(dq_attend_args, n_kv, 12);
FIELD(dq_attend_args, first_slot, 16);
FIELD(dq_attend_args, stream_slots, 24);
FIELD(dq_attend_args, store, 32);
FIELD(dq_attend_args, q, 56);
FIELD(dq_attend_args, out, 88);
FIELD(dq_attend_args, mask, 120);
FIELD(dq_attend_args, sink_logits, 152);
FIELD(dq_attend_args, scale, 160);
FIELD(dq_attend_args, softcap, 164);
FIELD(dq_attend_args, lengths, 168);
FIELD(dq_attend_args, block_table, 176);
FIELD(dq_attend_args, table_stride, 184);
FIELD(dq_attend_args, block_slots, 192);
FIELD(dq_attend_args, causal, 196);
FIELD(dq_attend_args, window, 200);
FIELD(dq_attend_args, reserved, 204);

SIZE(dq_limits, 20);
FIELD(dq_limits, max_tokens, 4);
FIELD(dq_limits, max_streams, 8);
FIELD(dq_limits, max_queries, 12);
FIELD(dq_limits, max_kv, 16);

TEST_CASE("statuses keep their numbers and have names") {
    const std::pair<dq_status, const char *> all[] = {
        {0, "DQ_OK"},
        {1, "DQ_ERROR_INVALID_ARGUMENT"},
        {2, "DQ_ERROR_UNSUPPORTED"},
        {3, "DQ_ERROR_NO_BACKEND"},
        {4, "DQ_ERROR_OUT_OF_MEMORY"},
        {5, "DQ_ERROR_WORKSPACE"},
        {6, "DQ_ERROR_BAD_FILE"},
        {7, "DQ_ERROR_IO"},
        {8, "DQ_ERROR_SETS_FULL"},
        {9, "DQ_ERROR_CUDA"},
        {10, "DQ_ERROR_CAPTURE"},
        {11, "DQ_ERROR_INTERNAL"},
        {100, "DQ_ROWS_REPLACED"},
    };
    for (const auto &[number, name] : all) CHECK(std::string(dq_status_name(number)) == name);
    for (dq_status number : {-1, 12, 99, 101, INT32_MAX, INT32_MIN}) {
        CHECK(std::string(dq_status_name(number)) == "DQ_ERROR_UNKNOWN");
    }
    static_assert(DQ_OK == 0 && DQ_ERROR_INVALID_ARGUMENT == 1 && DQ_ERROR_UNSUPPORTED == 2, "");
    static_assert(DQ_ERROR_NO_BACKEND == 3 && DQ_ERROR_OUT_OF_MEMORY == 4 && DQ_ERROR_WORKSPACE == 5, "");
    static_assert(DQ_ERROR_BAD_FILE == 6 && DQ_ERROR_IO == 7 && DQ_ERROR_SETS_FULL == 8 && DQ_ERROR_CUDA == 9, "");
    static_assert(DQ_ERROR_CAPTURE == 10 && DQ_ERROR_INTERNAL == 11 && DQ_ROWS_REPLACED == 100, "");
}

TEST_CASE("enumerations keep their numbers") {
    static_assert(DQ_BACKEND_CPU == 1 && DQ_BACKEND_CUDA == 2, "");
    static_assert(DQ_F32 == 1 && DQ_F16 == 2 && DQ_BF16 == 3, "");
    static_assert(DQ_GAUGE_ROTATION == 1 && DQ_GAUGE_CENTRED == 2 && DQ_GAUGE_ATTENTION == 3, "");
    static_assert(DQ_SIDE_K == 0 && DQ_SIDE_V == 1 && DQ_MAX_SETS == 16, "");
    CHECK((dq_backends() & 1u << DQ_BACKEND_CPU) != 0);
    CHECK((dq_backends() & ~(1u << DQ_BACKEND_CPU | 1u << DQ_BACKEND_CUDA)) == 0);
}

TEST_CASE("versions") {
    CHECK(dq_abi_version() == 0);
    CHECK(std::string(dq_version()) == "0.1.0");
}

TEST_CASE("plans have names, other numbers have none") {
    for (uint32_t plan : {2, 3, 4, 8}) CHECK(std::string(dq_plan_name(plan)) == std::to_string(plan));
    CHECK(std::string(dq_plan_name(102)) == "2t");
    CHECK(std::string(dq_plan_name(103)) == "3t");
    CHECK(std::string(dq_plan_name(104)) == "4t");
    for (uint32_t plan : {0u, 1u, 5u, 255u, UINT32_MAX}) CHECK(dq_plan_name(plan) == nullptr);
}

TEST_CASE("messages are cut to the buffer and belong to the thread") {
    REQUIRE(dq_context_create(nullptr, nullptr) == DQ_ERROR_INVALID_ARGUMENT);
    char text[8];
    std::memset(text, '#', sizeof text);
    CHECK(dq_last_error(text, 6) == std::strlen("out is null"));
    CHECK(std::memcmp(text, "out i\0##", 8) == 0);
    CHECK(dq_last_error(text, 0) == 11);
    CHECK(dq_last_error(nullptr, 0) == 11);
    CHECK(dq_last_error(nullptr, 100) == 11);
    char large[64];
    CHECK(dq_last_error(large, UINT64_MAX) == 11);
    CHECK(std::string(large) == "out is null");
}
