# CUTLASS_INCLUDE: the folder that holds cutlass/cutlass.h, of CUTLASS_ROOT (a variable of CMake or of
# the environment) or of the Python package nvidia-cutlass, whose wheel brings the headers.

set(candidates "${CUTLASS_ROOT}" "${CUTLASS_ROOT}/include" "$ENV{CUTLASS_ROOT}" "$ENV{CUTLASS_ROOT}/include")
if(Python3_Interpreter_FOUND)
    execute_process(
        COMMAND ${Python3_EXECUTABLE} -c
                "from importlib.util import find_spec; print(*find_spec('cutlass_library').submodule_search_locations)"
        OUTPUT_VARIABLE cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND candidates "${cutlass_package}/source/include")
endif()
foreach(candidate IN LISTS candidates)
    if(NOT CUTLASS_INCLUDE AND EXISTS "${candidate}/cutlass/cutlass.h")
        set(CUTLASS_INCLUDE "${candidate}")
    endif()
endforeach()
