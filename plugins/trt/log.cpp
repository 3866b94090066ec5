#include "log.h"

#include <atomic>
#include <cstdio>

namespace lrq::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

}  // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    loggerFinder = finder;
}

void log(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept {
    try {
        std::string const text = "lrq: " + message;
        nvinfer1::ILoggerFinder* finder = loggerFinder;
        nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr) {
            logger->log(severity, text.c_str());
        } else if (severity <= nvinfer1::ILogger::Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    } catch (...) {  // a message that cannot be delivered must not end the process
    }
}

}  // namespace lrq::trt
