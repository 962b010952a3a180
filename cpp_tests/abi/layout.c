/* The same sizes and offsets, as C11 sees them. */
#include <decoquant.h>

#include <stddef.h>

#define FIELD(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#include "layout.inc"

int main(void) {
    return dq_abi_version() == DQ_ABI_VERSION ? 0 : 1;
}
