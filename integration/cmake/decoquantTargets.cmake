# The library's targets, for the installed package and for a subproject alike. Expects decoquant_INCLUDE_DIR,
# decoquant_LIB_DIR and DECOQUANT_STATIC.
if(TARGET decoquant::decoquant)
    return()
endif()

add_library(decoquant::shared SHARED IMPORTED GLOBAL)
set_target_properties(decoquant::shared PROPERTIES
    IMPORTED_LOCATION "${decoquant_LIB_DIR}/libdecoquant.so"
    IMPORTED_SONAME "libdecoquant.so.${decoquant_abi}"
    INTERFACE_INCLUDE_DIRECTORIES "${decoquant_INCLUDE_DIR}")

# What Rust's standard library needs besides: rustc --print native-static-libs.
add_library(decoquant::static STATIC IMPORTED GLOBAL)
set_target_properties(decoquant::static PROPERTIES
    IMPORTED_LOCATION "${decoquant_LIB_DIR}/libdecoquant.a"
    INTERFACE_INCLUDE_DIRECTORIES "${decoquant_INCLUDE_DIR}"
    INTERFACE_LINK_LIBRARIES "gcc_s;util;rt;pthread;m;dl;c")

add_library(decoquant::decoquant INTERFACE IMPORTED GLOBAL)
if(DECOQUANT_STATIC)
    set_property(TARGET decoquant::decoquant PROPERTY INTERFACE_LINK_LIBRARIES decoquant::static)
else()
    set_property(TARGET decoquant::decoquant PROPERTY INTERFACE_LINK_LIBRARIES decoquant::shared)
endif()
