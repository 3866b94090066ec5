// Messages to the logger of whoever loaded the library, and the wall that no exception passes.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

#include "NvInfer.h"

namespace lrq::trt {

// What is wrong with a node, its tensors or this machine, said so that a user can act on it. Thrown
// inside the library only.
class PluginError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Called by TensorRT through setLoggerFinder; null: messages go to standard error.
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void log(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept;

// What `body` returns, or `failed` if it throws: the message is logged with `where` in front. Every
// function that TensorRT calls is wrapped in this.
template <typename Result, typename Body>
Result guarded(char const* where, Result failed, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        try {
            log(nvinfer1::ILogger::Severity::kERROR, std::string(where) + ": " + error.what());
        } catch (...) {
        }
    } catch (...) {
        log(nvinfer1::ILogger::Severity::kERROR, where);
    }
    return failed;
}

}  // namespace lrq::trt
