# percov2_add_cuda(<name> <mode>): the CUDA kernels as a static library. `mode` is ON (fail without
# nvcc), AUTO (build if a recent nvcc is found) or OFF (do not search). A macro, because
# enable_language belongs to the scope of the caller.
include_guard(GLOBAL)
include(CheckLanguage)
set(PERCOV2_CUDA_FOLDER ${CMAKE_CURRENT_LIST_DIR})

# Sets percov2_nvcc to the release of nvcc, or to "" and percov2_without to the missing part.
macro(percov2_find_nvcc)
  set(percov2_nvcc "")
  set(percov2_without "no CUDA compiler was found")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE percov2_said ERROR_QUIET)
    if(percov2_said MATCHES "release ([0-9]+\\.[0-9]+)" AND NOT CMAKE_MATCH_1 VERSION_LESS 11.8)
      set(percov2_nvcc ${CMAKE_MATCH_1})
    endif()
    set(percov2_without "${CMAKE_CUDA_COMPILER} is no nvcc of release 11.8 or later")
  endif()
endmacro()

# A wheel of version 0.2.0+cu130 (docs/how-to/release.md) must hold kernels of nvcc 13.0: its name promises
# their driver.
function(percov2_check_label nvcc)
  if("${SKBUILD_PROJECT_VERSION_FULL}" MATCHES "\\+cu([0-9]+)$")
    set(label ${CMAKE_MATCH_1})
    string(REPLACE "." "" release "${nvcc}")
    if(NOT release STREQUAL label)
      message(FATAL_ERROR "the version ${SKBUILD_PROJECT_VERSION_FULL} promises CUDA kernels of "
        "nvcc's release ${label}, but this build has '${nvcc}'; put that nvcc on PATH, set CUDACXX "
        "to it, leave PERCOV2_CUDA alone, or unset PERCOV2_WHEEL")
    endif()
  endif()
endfunction()

macro(percov2_add_cuda name mode)
  if(NOT "${mode}" MATCHES "^(ON|OFF|AUTO)$")
    message(FATAL_ERROR "PERCOV2_CUDA is '${mode}'; it must be ON, OFF or AUTO")
  endif()
  set(percov2_nvcc "")
  if(NOT "${mode}" STREQUAL "OFF")
    percov2_find_nvcc()
    if(percov2_nvcc)
      # Set before enable_language, which would else take nvcc's own default; -D and CUDAARCHS win.
      if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
        if(percov2_nvcc VERSION_LESS 12.8)
          set(CMAKE_CUDA_ARCHITECTURES "80-real;90-real;90-virtual")
        else()
          set(CMAKE_CUDA_ARCHITECTURES "80-real;90-real;100-real;100-virtual")
        endif()
      endif()
      enable_language(CUDA)
      file(GLOB percov2_cuda_units CONFIGURE_DEPENDS ${PERCOV2_CUDA_FOLDER}/*.cu)
      add_library(${name} STATIC ${percov2_cuda_units})
      set_target_properties(${name} PROPERTIES
        CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
        CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
      target_include_directories(${name} PUBLIC ${PERCOV2_CUDA_FOLDER}/..)
      target_compile_definitions(${name} PUBLIC PERCOV2_CUDA)
      message(STATUS "CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES}")
    elseif("${mode}" STREQUAL "ON")
      message(FATAL_ERROR "PERCOV2_CUDA is ON, but ${percov2_without}; put nvcc on PATH, set "
        "CUDACXX to it, or build with PERCOV2_CUDA=OFF")
    else()
      message(STATUS "built without CUDA kernels: ${percov2_without}")
    endif()
  endif()
  percov2_check_label("${percov2_nvcc}")
endmacro()
