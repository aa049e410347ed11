// What an inference runtime has to offer to a session. One file in src/ implements it for each runtime.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "mscompile/spec.hpp"

namespace mscompile {

/// Row-major memory of a session that a graph reads or writes; 64-byte aligned.
struct TensorView {
    std::string name;
    std::string dtype;
    Shape shape;
    void* data = nullptr;
};

/// One graph with its tensors. It keeps their addresses: the contents may change from run to run.
class BoundCall {
  public:
    BoundCall() = default;
    BoundCall(const BoundCall&) = delete;
    BoundCall& operator=(const BoundCall&) = delete;
    virtual ~BoundCall() = default;

    /// Reads the inputs and writes the outputs. Throws Error (engine) where the runtime fails.
    virtual void run() = 0;
};

/// A loaded engine: immutable, shared by its sessions, which may run in several threads at once.
class Backend {
  public:
    Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;
    virtual ~Backend() = default;

    /// A call of `graph` on these inputs and outputs, all of its GraphSpec and named as there.
    [[nodiscard]] virtual std::unique_ptr<BoundCall> bind(const std::string& graph,
                                                          const std::vector<TensorView>& inputs,
                                                          const std::vector<TensorView>& outputs) const = 0;
};

}  // namespace mscompile
