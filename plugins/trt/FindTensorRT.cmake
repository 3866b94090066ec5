# TENSORRT_INCLUDE: the folder of NvInfer.h, of TENSORRT_ROOT (a variable of CMake or of the environment), of the system,
# of the user's cache folder, or downloaded there: the headers of TensorRT's open-source repository at a tag.
# TENSORRT_MISSING: why there is none, and what to do.
#
# LRQ_DOWNLOAD_TENSORRT    OFF: never download
option(LRQ_DOWNLOAD_TENSORRT "Download TensorRT's open-source headers where there are none" ON)
set(LRQ_TENSORRT_TAG "v11.1" CACHE STRING "Tag of the headers that are downloaded")
set(LRQ_TENSORRT_REPOSITORY "https://github.com/NVIDIA/TensorRT.git" CACHE STRING "Where they come from")

set(TENSORRT_OLDEST 10.7)
unset(TENSORRT_INCLUDE CACHE)  # looked for anew: TENSORRT_ROOT may be another one than last time

if(DEFINED ENV{XDG_CACHE_HOME})
    set(cache "$ENV{XDG_CACHE_HOME}/lrq-export/tensorrt")
else()
    set(cache "$ENV{HOME}/.cache/lrq-export/tensorrt")
endif()
file(GLOB cached LIST_DIRECTORIES true "${cache}/*/include")
list(SORT cached COMPARE NATURAL ORDER DESCENDING)

find_path(TENSORRT_INCLUDE NvInfer.h PATHS "${TENSORRT_ROOT}/include" "$ENV{TENSORRT_ROOT}/include" NO_DEFAULT_PATH)
if(NOT TENSORRT_INCLUDE AND (TENSORRT_ROOT OR DEFINED ENV{TENSORRT_ROOT}))
    set(TENSORRT_MISSING "TENSORRT_ROOT has no include/NvInfer.h (correct it, or leave it out)")
    return()
endif()
find_path(TENSORRT_INCLUDE NvInfer.h)
find_path(TENSORRT_INCLUDE NvInfer.h PATHS ${cached} NO_DEFAULT_PATH)

# Only include/ of one commit; renamed when it is whole.
if(NOT TENSORRT_INCLUDE AND LRQ_DOWNLOAD_TENSORRT)
    find_program(GIT_EXECUTABLE git)
    set(part "${cache}/${LRQ_TENSORRT_TAG}.part")
    set(whole "${cache}/${LRQ_TENSORRT_TAG}")
    file(REMOVE_RECURSE "${part}")
    file(MAKE_DIRECTORY "${cache}")
    if(GIT_EXECUTABLE)
        message(STATUS "trt: downloading the headers of TensorRT ${LRQ_TENSORRT_TAG}")
        execute_process(
            COMMAND ${GIT_EXECUTABLE} -c advice.detachedHead=false clone --quiet --depth 1 --filter=blob:none --sparse
                    --branch "${LRQ_TENSORRT_TAG}" "${LRQ_TENSORRT_REPOSITORY}" "${part}"
            COMMAND_ECHO NONE RESULT_VARIABLE failed ERROR_QUIET)
        if(NOT failed)
            execute_process(COMMAND ${GIT_EXECUTABLE} -C "${part}" sparse-checkout set include
                            RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
        endif()
        if(NOT failed AND EXISTS "${part}/include/NvInfer.h")
            file(MAKE_DIRECTORY "${whole}")
            file(RENAME "${part}/include" "${whole}/include")
        endif()
        file(REMOVE_RECURSE "${part}")
    endif()
    find_path(TENSORRT_INCLUDE NvInfer.h PATHS "${whole}/include" NO_DEFAULT_PATH)
endif()

if(NOT TENSORRT_INCLUDE)
    set(tried "they could not be downloaded")
    if(NOT LRQ_DOWNLOAD_TENSORRT)
        set(tried "LRQ_DOWNLOAD_TENSORRT is off")
    endif()
    set(TENSORRT_MISSING "no TensorRT headers, and ${tried} (set TENSORRT_ROOT to an installation of TensorRT, or copy \
the folder include of its open-source repository to ${cache}/${LRQ_TENSORRT_TAG}/include)")
    return()
endif()

# Some headers spell a version through a macro of their own.
file(STRINGS "${TENSORRT_INCLUDE}/NvInferVersion.h" lines REGEX "#define")
foreach(part MAJOR MINOR)
    string(REGEX MATCH "#define NV_TENSORRT_${part} ([A-Z0-9_]+)" found "${lines}")
    set(value "${CMAKE_MATCH_1}")
    if(NOT value MATCHES "^[0-9]+$")
        string(REGEX MATCH "#define ${value} ([0-9]+)" found "${lines}")
        set(value "${CMAKE_MATCH_1}")
    endif()
    set(TENSORRT_${part} "${value}")
endforeach()
if("${TENSORRT_MAJOR}.${TENSORRT_MINOR}" VERSION_LESS TENSORRT_OLDEST)
    set(TENSORRT_MISSING "the headers in ${TENSORRT_INCLUDE} are of TensorRT ${TENSORRT_MAJOR}.${TENSORRT_MINOR}, \
needed ${TENSORRT_OLDEST} or newer (set TENSORRT_ROOT)")
endif()
