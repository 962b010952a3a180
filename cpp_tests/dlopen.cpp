// A host that loads the library at run time, uses it on threads, closes it and loads it again.
#include <catch2/catch.hpp>

#include <decoquant.h>

#include <dlfcn.h>

#include <cstring>
#include <thread>

namespace {

template <class F>
F symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    INFO(name);
    REQUIRE(found != nullptr);
    F function;
    static_assert(sizeof function == sizeof found, "POSIX: the same size");
    std::memcpy(&function, &found, sizeof function);
    return function;
}

void use(void *library) {
    const auto create = symbol<decltype(&dq_context_create)>(library, "dq_context_create");
    const auto destroy = symbol<decltype(&dq_context_destroy)>(library, "dq_context_destroy");
    const auto error = symbol<decltype(&dq_last_error)>(library, "dq_last_error");
    const auto abi = symbol<decltype(&dq_abi_version)>(library, "dq_abi_version");
    REQUIRE(abi() == 0);
    bool fine = false;
    // The thread's message, and whatever else it keeps, outlives the library's handle.
    std::thread thread([&] {
        dq_context *context = nullptr;
        char text[64];
        fine = create(nullptr, &context) == DQ_OK && create(nullptr, nullptr) == DQ_ERROR_INVALID_ARGUMENT &&
               error(text, sizeof text) == std::strlen("out is null");
        destroy(context);
    });
    thread.join();
    CHECK(fine);
}

}  // namespace

TEST_CASE("open, use, close, twice") {
    for (int round = 0; round < 2; round++) {
        void *library = dlopen(DQ_TEST_LIBRARY, RTLD_NOW | RTLD_LOCAL);
        INFO((library ? "" : dlerror()));
        REQUIRE(library != nullptr);
        use(library);
        REQUIRE(dlclose(library) == 0);
    }
}

TEST_CASE("a thread that ends after the library was closed") {
    void *library = dlopen(DQ_TEST_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    REQUIRE(library != nullptr);
    const auto create = symbol<decltype(&dq_context_create)>(library, "dq_context_create");
    std::thread thread([=] {
        create(nullptr, nullptr);
        dlclose(library);
    });
    thread.join();
    SUCCEED();
}

TEST_CASE("two threads open it at once") {
    int opened[2] = {};
    std::thread threads[2];
    for (int i = 0; i < 2; i++) {
        threads[i] = std::thread([&, i] {
            for (int round = 0; round < 50; round++) {
                void *library = dlopen(DQ_TEST_LIBRARY, RTLD_NOW | RTLD_LOCAL);
                if (!library) continue;
                opened[i]++;
                dlclose(library);
            }
        });
    }
    for (auto &thread : threads) thread.join();
    CHECK((opened[0] == 50 && opened[1] == 50));
}
