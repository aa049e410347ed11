// Memory and a stream of work on one NVIDIA GPU, by the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "mscompile/backend.hpp"

namespace mscompile {

/// Throws Error (engine) where a CUDA call failed; `what` was being done.
void check_cuda(cudaError_t status, const std::string& what);

/// Why no GPU can be used here; empty where one can.
std::string no_gpu();

/// The compute capability of the current device, such as "SM89".
std::string compute_capability();

/// An executor whose states lie on the current device: copies and calls go into one stream, in order. Threads that
/// use it need the same current device, which is the first one unless they choose.
class CudaExecutor : public Executor {
  public:
    CudaExecutor();

    [[nodiscard]] cudaStream_t stream() const { return stream_.get(); }
    void wait() const;

    [[nodiscard]] void* allocate(std::size_t size) override;
    void release(void* memory) noexcept override;
    void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
              std::size_t rows) override;
    void upload(void* to, const void* from, std::size_t size) override;
    void download(void* to, const void* from, std::size_t size) override;

    /// Between the host's memory and the device's, in either direction, in the stream.
    void transfer(void* to, const void* from, std::size_t size, cudaMemcpyKind kind) const;

  private:
    struct Destroy {
        void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    };
    std::unique_ptr<CUstream_st, Destroy> stream_;
};

}  // namespace mscompile
