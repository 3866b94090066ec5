#include "attributes.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "log.h"

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace lrq::trt {
namespace {

PluginFieldType fieldType(ops::Kind kind) {
    switch (kind) {
        case ops::Kind::kInteger:
            return PluginFieldType::kINT32;
        case ops::Kind::kReal:
            return PluginFieldType::kFLOAT32;
        case ops::Kind::kText:
            return PluginFieldType::kCHAR;
    }
    throw PluginError("an attribute of unknown kind");
}

[[noreturn]] void refuse(char const* name, std::string const& got, std::string const& needed) {
    throw PluginError("attribute '" + std::string(name) + "': got " + got + ", needed " + needed);
}

std::string described(PluginField const& field) {
    return std::to_string(field.length) + " value(s) of field type " +
           std::to_string(static_cast<int32_t>(field.type));
}

// An ONNX INT is 64 bits wide; the parser of today narrows it to kINT32.
int32_t readInteger(char const* name, PluginField const& field) {
    if (field.length == 1 && field.type == PluginFieldType::kINT32) {
        int32_t value;
        std::memcpy(&value, field.data, sizeof(value));
        return value;
    }
    if (field.length == 1 && field.type == PluginFieldType::kINT64) {
        int64_t value;
        std::memcpy(&value, field.data, sizeof(value));
        if (value < std::numeric_limits<int32_t>::min() ||
            value > std::numeric_limits<int32_t>::max()) {
            refuse(name, std::to_string(value), "a number of 32 bits");
        }
        return static_cast<int32_t>(value);
    }
    refuse(name, described(field), "one integer");
}

float readReal(char const* name, PluginField const& field) {
    if (field.length != 1 || field.type != PluginFieldType::kFLOAT32) {
        refuse(name, described(field), "one float");
    }
    float value;
    std::memcpy(&value, field.data, sizeof(value));
    if (!std::isfinite(value)) {
        refuse(name, std::to_string(value), "a finite number");
    }
    return value;
}

// The length counts a NUL at the end, where there is one; nothing behind it is read.
std::string readText(char const* name, PluginField const& field) {
    if (field.length < 0 || field.type != PluginFieldType::kCHAR) {
        refuse(name, described(field), "a string");
    }
    auto const* text = static_cast<char const*>(field.data);
    return std::string(text, strnlen(text, static_cast<size_t>(field.length)));
}

template <typename Value, typename Choice>
void checkChosen(char const* name, Value const& got, std::string const& shown,
                 Choice const* choices, int32_t count) {
    std::string listed;
    for (int32_t choice = 0; choice < count; ++choice) {
        if (got == choices[choice]) {
            return;
        }
        if constexpr (std::is_same_v<Value, int32_t>) {
            listed += (choice == 0 ? "" : ", ") + std::to_string(choices[choice]);
        } else {
            listed += (choice == 0 ? "" : ", ") + std::string(choices[choice]);
        }
    }
    refuse(name, shown, "one of: " + listed);
}

}  // namespace

Attributes::Attributes(ops::Op const& op, nvinfer1::PluginFieldCollection const* fields,
                       bool allRequired)
    : mOp(&op), mValues(static_cast<size_t>(op.attributeCount)) {
    std::vector<bool> given(mValues.size(), false);
    int32_t const count = fields == nullptr ? 0 : fields->nbFields;
    for (int32_t position = 0; position < count; ++position) {
        PluginField const& field = fields->fields[position];
        int32_t const index = field.name == nullptr ? -1 : ops::attributeIndex(op, field.name);
        if (index < 0) {
            throw PluginError("no attribute '" +
                              std::string(field.name == nullptr ? "" : field.name) +
                              "' in this op");
        }
        if (given[index]) {
            refuse(field.name, "it twice", "it once");
        }
        if (field.data == nullptr) {
            refuse(field.name, "no data", "a value");
        }
        given[index] = true;
        read(index, field);
    }
    for (int32_t index = 0; index < op.attributeCount; ++index) {
        ops::Attribute const& attribute = op.attributes[index];
        if (!given[index] && (attribute.required || allRequired)) {
            refuse(attribute.name, "none", "it: the op requires it");
        }
        if (!given[index]) {
            mValues[index] = {attribute.integer, 0.0f,
                              attribute.text == nullptr ? "" : attribute.text};
        }
        checkChoices(index);
    }
}

void Attributes::read(int32_t index, PluginField const& field) {
    Value& value = mValues[index];
    switch (mOp->attributes[index].kind) {
        case ops::Kind::kInteger:
            value.integer = readInteger(field.name, field);
            break;
        case ops::Kind::kReal:
            value.real = readReal(field.name, field);
            break;
        case ops::Kind::kText:
            value.text = readText(field.name, field);
            break;
    }
}

void Attributes::checkChoices(int32_t index) const {
    ops::Attribute const& attribute = mOp->attributes[index];
    Value const& value = mValues[index];
    if (attribute.integerChoices != nullptr) {
        checkChosen(attribute.name, value.integer, std::to_string(value.integer),
                    attribute.integerChoices, attribute.choiceCount);
    }
    if (attribute.textChoices != nullptr) {
        checkChosen(attribute.name, value.text, "'" + value.text + "'", attribute.textChoices,
                    attribute.choiceCount);
    }
}

Attributes::Value const& Attributes::value(char const* name, ops::Kind kind) const {
    int32_t const index = ops::attributeIndex(*mOp, name);
    if (index < 0 || mOp->attributes[index].kind != kind) {
        throw std::logic_error("op " + std::string(mOp->name) + " has no attribute '" + name +
                               "' of that kind");
    }
    return mValues[index];
}

int32_t Attributes::integer(char const* name) const {
    return value(name, ops::Kind::kInteger).integer;
}

float Attributes::real(char const* name) const {
    return value(name, ops::Kind::kReal).real;
}

std::string const& Attributes::text(char const* name) const {
    return value(name, ops::Kind::kText).text;
}

int32_t Attributes::integerOr(char const* name, int32_t fallback) const {
    return ops::attributeIndex(*mOp, name) < 0 ? fallback : integer(name);
}

std::string Attributes::textOr(char const* name, char const* fallback) const {
    return ops::attributeIndex(*mOp, name) < 0 ? fallback : text(name);
}

std::vector<PluginField> Attributes::serialized() const {
    std::vector<PluginField> fields;
    for (int32_t index = 0; index < mOp->attributeCount; ++index) {
        ops::Attribute const& attribute = mOp->attributes[index];
        Value const& value = mValues[index];
        void const* data = &value.integer;
        int32_t length = 1;
        if (attribute.kind == ops::Kind::kReal) {
            data = &value.real;
        } else if (attribute.kind == ops::Kind::kText) {
            data = value.text.c_str();
            length = static_cast<int32_t>(value.text.size()) + 1;
        }
        fields.emplace_back(attribute.name, data, fieldType(attribute.kind), length);
    }
    return fields;
}

std::string Attributes::description() const {
    std::string text;
    for (int32_t index = 0; index < mOp->attributeCount; ++index) {
        ops::Attribute const& attribute = mOp->attributes[index];
        Value const& value = mValues[index];
        text += (index == 0 ? "" : " ") + std::string(attribute.name) + "=";
        switch (attribute.kind) {
            case ops::Kind::kInteger:
                text += std::to_string(value.integer);
                break;
            case ops::Kind::kReal: {
                char digits[32];
                std::snprintf(digits, sizeof(digits), "%.9g", static_cast<double>(value.real));
                text += digits;
                break;
            }
            case ops::Kind::kText:
                text += value.text;
                break;
        }
    }
    return text;
}

std::vector<PluginField> listedFields(ops::Op const& op) {
    std::vector<PluginField> fields;
    for (int32_t index = 0; index < op.attributeCount; ++index) {
        fields.emplace_back(op.attributes[index].name, nullptr,
                            fieldType(op.attributes[index].kind), 1);
    }
    return fields;
}

}  // namespace lrq::trt
