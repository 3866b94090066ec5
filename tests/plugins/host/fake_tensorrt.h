// The little of TensorRT that a plugin sees: a logger, expressions of sizes, a resource context.
#pragma once

#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "NvInfer.h"

// Keeps what it is told.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override {
        if (severity <= Severity::kERROR) {
            errors.emplace_back(message);
        }
    }
    std::vector<std::string> errors;
};

class LoggerFinder : public nvinfer1::ILoggerFinder {
public:
    explicit LoggerFinder(Logger& logger) : mLogger(&logger) {}
    nvinfer1::ILogger* findLogger() override { return mLogger; }

private:
    Logger* mLogger;
};

// A size: known, or one that the host names by a number of its own.
class Expression : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
public:
    Expression(int64_t given, bool known) : value(given), mKnown(known) { mImpl = this; }
    bool isConstant() const override { return mKnown; }
    int64_t getConstantValue() const override {
        return mKnown ? value : throw std::logic_error("the size is not known yet");
    }
    bool isSizeTensor() const override { return false; }

    int64_t const value;

private:
    bool mKnown;
};

class ExpressionBuilder : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
public:
    ExpressionBuilder() { mImpl = this; }

    nvinfer1::IDimensionExpr const* constant(int64_t value) override { return make(value, true); }
    nvinfer1::IDimensionExpr const* unknown(int64_t value) { return make(value, false); }

    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation,
                                              nvinfer1::IDimensionExpr const&,
                                              nvinfer1::IDimensionExpr const&) override {
        throw std::logic_error("no plugin computes with sizes");
    }
    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                      nvinfer1::IDimensionExpr const&) override {
        throw std::logic_error("no plugin declares a size tensor");
    }

private:
    nvinfer1::IDimensionExpr const* make(int64_t value, bool known) {
        return &mMade.emplace_back(value, known);
    }

    std::deque<Expression> mMade;  // addresses stay
};

class ResourceContext : public nvinfer1::IPluginResourceContext {
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};
