// Plugin fields that own what they point to.
#pragma once

#include <algorithm>
#include <deque>
#include <string>
#include <vector>

#include "cases.h"

class Fields {
public:
    Fields() = default;
    Fields(Fields const& other) {
        for (nvinfer1::PluginField const& field : other.mFields) {
            add(field.name, field.type, field.data, field.length, bytesOf(field));
        }
    }
    Fields(Fields&&) = default;
    Fields& operator=(Fields&&) = default;

    // As the parser maps the attributes of a node: those that the creator lists.
    static Fields ofNode(std::vector<Attribute> const& attributes,
                         nvinfer1::PluginFieldCollection const& listed) {
        Fields fields;
        for (Attribute const& attribute : attributes) {
            for (int32_t index = 0; index < listed.nbFields; ++index) {
                if (attribute.name == listed.fields[index].name) {
                    fields.add(attribute);
                }
            }
        }
        return fields;
    }

    // As an engine holds what a plugin serializes.
    static Fields copyOf(nvinfer1::PluginFieldCollection const& serialized) {
        Fields fields;
        for (int32_t index = 0; index < serialized.nbFields; ++index) {
            nvinfer1::PluginField const& field = serialized.fields[index];
            fields.add(field.name, field.type, field.data, field.length, bytesOf(field));
        }
        return fields;
    }

    void add(Attribute const& attribute) {
        using nvinfer1::PluginFieldType;
        if (auto const* integer = std::get_if<int32_t>(&attribute.value)) {
            add(attribute.name, PluginFieldType::kINT32, integer, 1, sizeof(*integer));
        } else if (auto const* real = std::get_if<float>(&attribute.value)) {
            add(attribute.name, PluginFieldType::kFLOAT32, real, 1, sizeof(*real));
        } else {
            std::string const& text = std::get<std::string>(attribute.value);
            int32_t const length = static_cast<int32_t>(text.size()) + 1;
            add(attribute.name, PluginFieldType::kCHAR, text.c_str(), length, length);
        }
    }

    void add(std::string const& name, nvinfer1::PluginFieldType type, void const* data,
             int32_t length, size_t bytes) {
        std::string const& kept = mNames.emplace_back(name);
        auto const* first = static_cast<uint8_t const*>(data);
        std::vector<uint8_t> const& value = mValues.emplace_back(first, first + bytes);
        mFields.emplace_back(kept.c_str(), value.data(), type, length);
    }

    nvinfer1::PluginField& at(std::string const& name) {
        return *std::find_if(mFields.begin(), mFields.end(),
                             [&](auto& f) { return name == f.name; });
    }
    void remove(std::string const& name) {
        mFields.erase(mFields.begin() + (&at(name) - &mFields[0]));
    }
    bool has(std::string const& name) const {
        return std::any_of(mFields.begin(), mFields.end(), [&](auto& f) { return name == f.name; });
    }

    nvinfer1::PluginFieldCollection const* collection() {
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

    // Everything in them, to compare.
    std::string text() const {
        std::string all;
        for (nvinfer1::PluginField const& field : mFields) {
            all += std::string(field.name) + ":" +
                   std::to_string(static_cast<int32_t>(field.type)) + "=";
            all.append(static_cast<char const*>(field.data), bytesOf(field));
            all += ";";
        }
        return all;
    }

    static size_t bytesOf(nvinfer1::PluginField const& field) {
        bool const isText = field.type == nvinfer1::PluginFieldType::kCHAR;
        return static_cast<size_t>(field.length) * (isText ? 1 : 4);
    }

private:
    std::deque<std::string> mNames;  // addresses stay
    std::deque<std::vector<uint8_t>> mValues;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};
