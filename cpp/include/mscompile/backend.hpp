// What an inference runtime has to offer to a session. One file in src/ implements it for each runtime.
#pragma once

#include <cstddef>
#include <cstdint>
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
    bool resident = false;  ///< of Executor::allocate, for states; otherwise the host's, for what changes hands
};

/// One graph with its tensors. It keeps their addresses: the contents may change from run to run.
class BoundCall {
  public:
    BoundCall() = default;
    BoundCall(const BoundCall&) = delete;
    BoundCall& operator=(const BoundCall&) = delete;
    virtual ~BoundCall() = default;

    /// Reads the inputs and writes the outputs; those in the host's memory are there when it returns.
    /// Throws Error (engine) where the runtime fails.
    virtual void run() = 0;
};

/// What one session computes with: its calls, and the memory of its states. Everything happens in the order in which
/// it was asked for. The memory is the host's unless a runtime says otherwise; then the host never touches it.
class Executor {
  public:
    Executor() = default;
    Executor(const Executor&) = delete;
    Executor& operator=(const Executor&) = delete;
    virtual ~Executor() = default;

    /// A call of `graph` on these inputs and outputs, all of its GraphSpec and named as there.
    [[nodiscard]] virtual std::unique_ptr<BoundCall> bind(const std::string& graph,
                                                          const std::vector<TensorView>& inputs,
                                                          const std::vector<TensorView>& outputs) = 0;

    /// Zeroed memory for states. Throws std::bad_alloc where there is not so much.
    [[nodiscard]] virtual void* allocate(std::size_t size);
    virtual void release(void* memory) noexcept;

    /// Copies `rows` rows of `width` bytes within that memory; rows begin so many bytes after one another.
    virtual void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                      std::size_t rows);

    /// Copies between that memory and the host's, and waits until it is done.
    virtual void upload(void* to, const void* from, std::size_t size);
    virtual void download(void* to, const void* from, std::size_t size);
};

/// A loaded engine: immutable, shared by its sessions, which may run in several threads at once.
class Backend {
  public:
    Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;
    virtual ~Backend() = default;

    /// For a new session of `batch` streams; it does not outlive this backend.
    /// Throws Error (input) where the engine is not for so many.
    [[nodiscard]] virtual std::unique_ptr<Executor> executor(std::int64_t batch) const = 0;
};

}  // namespace mscompile
