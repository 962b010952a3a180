// A host that loads the library at run time, uses it on threads, closes it and loads it again.
#include <catch2/catch.hpp>

#include <decoquant.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
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

TEST_CASE("two copies of the library in one process") {
    // A copy under another name is another library to the loader: two engines in one host each bring their own.
    const std::string copy = std::string(DQ_TEST_LIBRARY) + ".copy";
    {
        std::ifstream from(DQ_TEST_LIBRARY, std::ios::binary);
        std::ofstream to(copy, std::ios::binary);
        to << from.rdbuf();
        REQUIRE((from && to));
    }
    void *first = dlopen(DQ_TEST_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    void *second = dlopen(copy.c_str(), RTLD_NOW | RTLD_LOCAL);
    INFO((second ? "" : dlerror()));
    REQUIRE((first && second && first != second));
    use(first);
    use(second);
    // Each has a thread's message of its own.
    const auto create = symbol<decltype(&dq_context_create)>(first, "dq_context_create");
    const auto other = symbol<decltype(&dq_context_create)>(second, "dq_context_create");
    REQUIRE(create != other);
    REQUIRE(create(nullptr, nullptr) == DQ_ERROR_INVALID_ARGUMENT);
    CHECK(symbol<decltype(&dq_last_error)>(first, "dq_last_error")(nullptr, 0) == std::strlen("out is null"));
    CHECK(symbol<decltype(&dq_last_error)>(second, "dq_last_error")(nullptr, 0) == 0);
    dlclose(second);
    use(first);
    dlclose(first);
    std::remove(copy.c_str());
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
