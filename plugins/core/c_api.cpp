#include "c_api.h"

#include "formats.h"

char const* lrqStatusText(int32_t status) {
    switch (static_cast<lrq::Status>(status)) {
        case lrq::Status::kOk:
            return "ok";
        case lrq::Status::kNullPointer:
            return "a required pointer is null";
        case lrq::Status::kBadBits:
            return "bits, fraction_bits, integer_bits or act_bits is out of range";
        case lrq::Status::kBadSize:
            return "a dimension is out of range or a buffer has the wrong size";
        case lrq::Status::kBadGroup:
            return "group_size does not divide the columns";
        case lrq::Status::kBadLevels:
            return "a step is negative or a level is outside 0..127, or a table holds -128";
        case lrq::Status::kBadFormat:
            return "a format, layout, prologue or type does not exist, or not for this function";
        case lrq::Status::kBadBlock:
            return "block has no Hadamard matrix or does not divide the channels";
        case lrq::Status::kBadValue:
            return "epsilon is negative or not finite";
    }
    return "unknown status";
}
