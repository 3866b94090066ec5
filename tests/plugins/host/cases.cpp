#include "cases.h"

#include <fstream>
#include <stdexcept>

namespace {

class Reader {
public:
    explicit Reader(std::string const& path) : mFile(path, std::ios::binary) {}

    void bytes(void* data, size_t count) {
        mFile.read(static_cast<char*>(data), static_cast<std::streamsize>(count));
        if (!mFile) {
            throw std::runtime_error("the file of cases ends too early");
        }
    }

    template <typename Value>
    Value number() {
        Value value;
        bytes(&value, sizeof(value));
        return value;
    }

    std::string text() {
        std::string read(number<uint32_t>(), '\0');
        bytes(read.data(), read.size());
        return read;
    }

    Attribute attribute() {
        Attribute read{text(), {}};
        switch (number<uint8_t>()) {
            case 0:
                read.value = number<int32_t>();
                break;
            case 1:
                read.value = number<float>();
                break;
            default:
                read.value = text();
        }
        return read;
    }

    Tensor tensor() {
        Tensor read{};
        read.name = text();
        read.type = static_cast<nvinfer1::DataType>(number<int32_t>());
        read.dims.nbDims = number<int32_t>();
        if (read.dims.nbDims < 0 || read.dims.nbDims > nvinfer1::Dims::MAX_DIMS) {
            throw std::runtime_error("a tensor has too many axes");
        }
        bytes(read.dims.d, sizeof(int64_t) * static_cast<size_t>(read.dims.nbDims));
        read.bytes.resize(number<uint64_t>());
        bytes(read.bytes.data(), read.bytes.size());
        return read;
    }

private:
    std::ifstream mFile;
};

}  // namespace

std::vector<Case> readCases(std::string const& path) {
    Reader reader(path);
    std::vector<Case> cases(reader.number<uint32_t>());
    for (Case& each : cases) {
        each.label = reader.text();
        each.op = reader.text();
        each.attributes.resize(reader.number<uint32_t>());
        for (Attribute& attribute : each.attributes) {
            attribute = reader.attribute();
        }
        each.inputs.resize(reader.number<uint32_t>());
        for (Tensor& input : each.inputs) {
            input = reader.tensor();
        }
        each.output = reader.tensor();
        each.nmse = reader.number<double>();
    }
    return cases;
}
