# percov2_add_core(<name>): the core as a static library without Python and CUDA: coder/,
# transformer/ and support/. Each instruction set and subject has a unit with its own flags;
# support/isa.h chooses the one that runs.
include_guard(GLOBAL)

function(percov2_add_core name)
  set(folder ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  file(GLOB units CONFIGURE_DEPENDS ${folder}/coder/*.cpp ${folder}/transformer/*.cpp ${folder}/support/*.cpp)
  set(generic ${units})
  list(FILTER generic EXCLUDE REGEX "_(avx2|avx512|neon)\\.cpp$")
  add_library(${name} STATIC ${generic})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    set(avx2_units ${units})
    list(FILTER avx2_units INCLUDE REGEX "_avx2\\.cpp$")
    set(avx512_units ${units})
    list(FILTER avx512_units INCLUDE REGEX "_avx512\\.cpp$")
    target_sources(${name} PRIVATE ${avx2_units} ${avx512_units})
    # Exactly the features that isa.cpp checks; a level like x86-64-v3 would add others.
    set_source_files_properties(${avx2_units} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mbmi2")
    set_source_files_properties(${avx512_units} PROPERTIES COMPILE_OPTIONS
      "-mavx2;-mfma;-mbmi2;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vbmi;-mavx512vnni;-mprefer-vector-width=512")
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC's own AVX-512 headers trigger these warnings (GCC bug 105593).
      set_property(SOURCE ${avx512_units} APPEND PROPERTY COMPILE_OPTIONS
        "-Wno-uninitialized;-Wno-maybe-uninitialized")
    endif()
    target_compile_definitions(${name} PUBLIC PERCOV2_X86_KERNELS)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    set(neon_units ${units})
    list(FILTER neon_units INCLUDE REGEX "_neon\\.cpp$")
    target_sources(${name} PRIVATE ${neon_units})
    target_compile_definitions(${name} PUBLIC PERCOV2_NEON_KERNELS)
  endif()
  if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    # Every rounding of a float is part of the result, so operations must not be fused.
    target_compile_options(${name} PRIVATE -Wall -Wextra -Werror -ffp-contract=off)
  endif()
  target_include_directories(${name} PUBLIC ${folder})
  find_package(Threads REQUIRED)
  target_link_libraries(${name} PUBLIC Threads::Threads)
endfunction()
