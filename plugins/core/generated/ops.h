// Made by tools/gen_ops_header.py from graphs/ops. Do not edit: change the op, then run the script.
#pragma once

#include "../op_info.h"

namespace lrq::ops {

inline constexpr char const* kPluginVersion = "1";
inline constexpr char const* kPluginNamespace = "";

namespace hadamard_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "HadamardRotate", kInputs, 2,
    {"y", Element::kActivation}, kAttributes, 3};
}  // namespace hadamard_rotate

namespace layer_norm_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"scale", Element::kActivation},
    {"shift", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"epsilon", Kind::kReal, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "LayerNormRotate", kInputs, 4,
    {"y", Element::kActivation}, kAttributes, 4};
}  // namespace layer_norm_rotate

namespace rms_norm_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"scale", Element::kActivation},
    {"shift", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"epsilon", Kind::kReal, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "RMSNormRotate", kInputs, 4,
    {"y", Element::kActivation}, kAttributes, 4};
}  // namespace rms_norm_rotate

namespace gelu_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "GeluRotate", kInputs, 2,
    {"y", Element::kActivation}, kAttributes, 3};
}  // namespace gelu_rotate

namespace gelu_tanh_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "GeluTanhRotate", kInputs, 2,
    {"y", Element::kActivation}, kAttributes, 3};
}  // namespace gelu_tanh_rotate

namespace silu_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "SiluRotate", kInputs, 2,
    {"y", Element::kActivation}, kAttributes, 3};
}  // namespace silu_rotate

namespace geglu_rotate {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"signs", Element::kActivation},
};
inline constexpr Attribute kAttributes[] = {
    {"block", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"base", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"order", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "GegluRotate", kInputs, 2,
    {"y", Element::kActivation}, kAttributes, 3};
}  // namespace geglu_rotate

namespace twin_log_dequant {
inline constexpr Tensor kInputs[] = {
    {"codes", Element::kCodes},
    {"exponents", Element::kInt8},
    {"scale", Element::kFloat},
};
inline constexpr int32_t kChoicesOfBits[] = {2, 3, 4};
inline constexpr Attribute kAttributes[] = {
    {"bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfBits, nullptr, 3},
    {"group_size", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"fraction_bits", Kind::kInteger, false, 4, nullptr,
     nullptr, nullptr, 0},
    {"integer_bits", Kind::kInteger, false, 6, nullptr,
     nullptr, nullptr, 0},
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "TwinLogDequant", kInputs, 3,
    {"w", Element::kFloat}, kAttributes, 6};
}  // namespace twin_log_dequant

namespace codebook_dequant {
inline constexpr Tensor kInputs[] = {
    {"codes", Element::kCodes},
    {"table", Element::kInt8},
    {"scale", Element::kFloat},
};
inline constexpr int32_t kChoicesOfBits[] = {2, 3, 4};
inline constexpr Attribute kAttributes[] = {
    {"bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfBits, nullptr, 3},
    {"group_size", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "CodebookDequant", kInputs, 3,
    {"w", Element::kFloat}, kAttributes, 4};
}  // namespace codebook_dequant

namespace int8_dequant {
inline constexpr Tensor kInputs[] = {
    {"codes", Element::kInt8},
    {"scale", Element::kFloat},
};
inline constexpr Attribute kAttributes[] = {
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "Int8Dequant", kInputs, 2,
    {"w", Element::kFloat}, kAttributes, 2};
}  // namespace int8_dequant

namespace twin_log_linear {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"codes", Element::kCodes},
    {"exponents", Element::kInt8},
    {"scale", Element::kFloat},
    {"bias", Element::kFloat},
};
inline constexpr int32_t kChoicesOfBits[] = {2, 3, 4};
inline constexpr int32_t kChoicesOfActBits[] = {8, 6, 4};
inline constexpr char const* const kChoicesOfRotation[] = {"none", "hadamard"};
inline constexpr char const* const kChoicesOfLayout[] = {"storage", "words"};
inline constexpr Attribute kAttributes[] = {
    {"bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfBits, nullptr, 3},
    {"group_size", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"fraction_bits", Kind::kInteger, false, 4, nullptr,
     nullptr, nullptr, 0},
    {"integer_bits", Kind::kInteger, false, 6, nullptr,
     nullptr, nullptr, 0},
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"act_bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfActBits, nullptr, 3},
    {"rotation", Kind::kText, false, 0, "none",
     nullptr, kChoicesOfRotation, 2},
    {"block", Kind::kInteger, false, 0, nullptr,
     nullptr, nullptr, 0},
    {"layout", Kind::kText, false, 0, "storage",
     nullptr, kChoicesOfLayout, 2},
};
inline constexpr Op kOp = {
    "TwinLogLinear", kInputs, 5,
    {"y", Element::kActivation}, kAttributes, 10};
}  // namespace twin_log_linear

namespace codebook_linear {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"codes", Element::kCodes},
    {"table", Element::kInt8},
    {"scale", Element::kFloat},
    {"bias", Element::kFloat},
};
inline constexpr int32_t kChoicesOfBits[] = {2, 3, 4};
inline constexpr int32_t kChoicesOfActBits[] = {8, 6, 4};
inline constexpr char const* const kChoicesOfRotation[] = {"none", "hadamard"};
inline constexpr char const* const kChoicesOfLayout[] = {"storage", "words"};
inline constexpr Attribute kAttributes[] = {
    {"bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfBits, nullptr, 3},
    {"group_size", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"act_bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfActBits, nullptr, 3},
    {"rotation", Kind::kText, false, 0, "none",
     nullptr, kChoicesOfRotation, 2},
    {"block", Kind::kInteger, false, 0, nullptr,
     nullptr, nullptr, 0},
    {"layout", Kind::kText, false, 0, "storage",
     nullptr, kChoicesOfLayout, 2},
};
inline constexpr Op kOp = {
    "CodebookLinear", kInputs, 5,
    {"y", Element::kActivation}, kAttributes, 8};
}  // namespace codebook_linear

namespace int8_linear {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"codes", Element::kInt8},
    {"scale", Element::kFloat},
    {"bias", Element::kFloat},
};
inline constexpr int32_t kChoicesOfActBits[] = {8, 6, 4};
inline constexpr char const* const kChoicesOfRotation[] = {"none", "hadamard"};
inline constexpr Attribute kAttributes[] = {
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"act_bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfActBits, nullptr, 3},
    {"rotation", Kind::kText, false, 0, "none",
     nullptr, kChoicesOfRotation, 2},
    {"block", Kind::kInteger, false, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "Int8Linear", kInputs, 4,
    {"y", Element::kActivation}, kAttributes, 5};
}  // namespace int8_linear

namespace twin_log_linear_residual {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"codes", Element::kCodes},
    {"exponents", Element::kInt8},
    {"scale", Element::kFloat},
    {"bias", Element::kFloat},
    {"gate", Element::kActivation},
    {"residual", Element::kActivation},
};
inline constexpr int32_t kChoicesOfBits[] = {2, 3, 4};
inline constexpr int32_t kChoicesOfActBits[] = {8, 6, 4};
inline constexpr char const* const kChoicesOfRotation[] = {"none", "hadamard"};
inline constexpr char const* const kChoicesOfLayout[] = {"storage", "words"};
inline constexpr Attribute kAttributes[] = {
    {"bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfBits, nullptr, 3},
    {"group_size", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"fraction_bits", Kind::kInteger, false, 4, nullptr,
     nullptr, nullptr, 0},
    {"integer_bits", Kind::kInteger, false, 6, nullptr,
     nullptr, nullptr, 0},
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"act_bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfActBits, nullptr, 3},
    {"rotation", Kind::kText, false, 0, "none",
     nullptr, kChoicesOfRotation, 2},
    {"block", Kind::kInteger, false, 0, nullptr,
     nullptr, nullptr, 0},
    {"layout", Kind::kText, false, 0, "storage",
     nullptr, kChoicesOfLayout, 2},
};
inline constexpr Op kOp = {
    "TwinLogLinearResidual", kInputs, 7,
    {"y", Element::kActivation}, kAttributes, 10};
}  // namespace twin_log_linear_residual

namespace codebook_linear_residual {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"codes", Element::kCodes},
    {"table", Element::kInt8},
    {"scale", Element::kFloat},
    {"bias", Element::kFloat},
    {"gate", Element::kActivation},
    {"residual", Element::kActivation},
};
inline constexpr int32_t kChoicesOfBits[] = {2, 3, 4};
inline constexpr int32_t kChoicesOfActBits[] = {8, 6, 4};
inline constexpr char const* const kChoicesOfRotation[] = {"none", "hadamard"};
inline constexpr char const* const kChoicesOfLayout[] = {"storage", "words"};
inline constexpr Attribute kAttributes[] = {
    {"bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfBits, nullptr, 3},
    {"group_size", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"act_bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfActBits, nullptr, 3},
    {"rotation", Kind::kText, false, 0, "none",
     nullptr, kChoicesOfRotation, 2},
    {"block", Kind::kInteger, false, 0, nullptr,
     nullptr, nullptr, 0},
    {"layout", Kind::kText, false, 0, "storage",
     nullptr, kChoicesOfLayout, 2},
};
inline constexpr Op kOp = {
    "CodebookLinearResidual", kInputs, 7,
    {"y", Element::kActivation}, kAttributes, 8};
}  // namespace codebook_linear_residual

namespace int8_linear_residual {
inline constexpr Tensor kInputs[] = {
    {"x", Element::kActivation},
    {"codes", Element::kInt8},
    {"scale", Element::kFloat},
    {"bias", Element::kFloat},
    {"gate", Element::kActivation},
    {"residual", Element::kActivation},
};
inline constexpr int32_t kChoicesOfActBits[] = {8, 6, 4};
inline constexpr char const* const kChoicesOfRotation[] = {"none", "hadamard"};
inline constexpr Attribute kAttributes[] = {
    {"rows", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"cols", Kind::kInteger, true, 0, nullptr,
     nullptr, nullptr, 0},
    {"act_bits", Kind::kInteger, true, 0, nullptr,
     kChoicesOfActBits, nullptr, 3},
    {"rotation", Kind::kText, false, 0, "none",
     nullptr, kChoicesOfRotation, 2},
    {"block", Kind::kInteger, false, 0, nullptr,
     nullptr, nullptr, 0},
};
inline constexpr Op kOp = {
    "Int8LinearResidual", kInputs, 6,
    {"y", Element::kActivation}, kAttributes, 5};
}  // namespace int8_linear_residual

inline constexpr Op const* kOps[] = {
    &hadamard_rotate::kOp,
    &layer_norm_rotate::kOp,
    &rms_norm_rotate::kOp,
    &gelu_rotate::kOp,
    &gelu_tanh_rotate::kOp,
    &silu_rotate::kOp,
    &geglu_rotate::kOp,
    &twin_log_dequant::kOp,
    &codebook_dequant::kOp,
    &int8_dequant::kOp,
    &twin_log_linear::kOp,
    &codebook_linear::kOp,
    &int8_linear::kOp,
    &twin_log_linear_residual::kOp,
    &codebook_linear_residual::kOp,
    &int8_linear_residual::kOp,
};

}  // namespace lrq::ops
