// Messages to the logger of whoever loaded the library, and the wall that no exception passes.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace lrq::trt {

// What is wrong with a node, its tensors or this machine, said so that a user can act on it. Thrown
// inside the library only.
class PluginError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// As nvinfer1::ILogger::Severity numbers them.
enum class Severity : int32_t { kError = 1, kWarning = 2 };

// An nvinfer1::ILoggerFinder, which TensorRT gives us through setLoggerFinder. Null, or one of a
// library that does not say which version it is: messages go to standard error.
void setFinder(void* finder) noexcept;

void log(Severity severity, std::string const& message) noexcept;

// What `body` returns, or `failed` if it throws: the message is logged with `where` in front. Every
// function that TensorRT calls is wrapped in this.
template <typename Result, typename Body>
Result guarded(char const* where, Result failed, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        try {
            log(Severity::kError, std::string(where) + ": " + error.what());
        } catch (...) {  // no memory for the message
        }
    } catch (...) {
        log(Severity::kError, where);
    }
    return failed;
}

}  // namespace lrq::trt
