// Sizes, offsets and numbers that programs were compiled with. None may ever change.
#include "support.hpp"

#include <cstddef>

#define FIELD(type, field, offset) static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) static_assert(sizeof(type) == (size), #type)
#include "abi/layout.inc"

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
    static_assert(DQ_VISIBLE_CAUSAL == 1 && DQ_VISIBLE_ALL == 2, "");
    static_assert(DQ_SIDE_K == 0 && DQ_SIDE_V == 1 && DQ_MAX_SETS == 16, "");
    CHECK((dq_backends() & 1u << DQ_BACKEND_CPU) != 0);
    CHECK((dq_backends() & ~(1u << DQ_BACKEND_CPU | 1u << DQ_BACKEND_CUDA)) == 0);
}

TEST_CASE("versions") {
    CHECK(dq_abi_version() == DQ_ABI_VERSION);
    CHECK(std::string(dq_version()) == std::to_string(DQ_VERSION_MAJOR) + "." + std::to_string(DQ_VERSION_MINOR) + "." +
                                           std::to_string(DQ_VERSION_PATCH));
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
