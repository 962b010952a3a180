// The header needs nothing before it and may come twice.
#include <decoquant.h>
#include <decoquant.h>

#include <type_traits>

static_assert(std::is_standard_layout<dq_attend_args>::value && std::is_trivial<dq_attend_args>::value,
              "structs can be zeroed and copied as bytes");
