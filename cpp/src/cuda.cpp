#include "cuda.hpp"

#include <dlfcn.h>

#include <new>

#include "mscompile/error.hpp"

namespace mscompile {

void check_cuda(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report this one
    throw Error(Fault::engine, what + ": CUDA says: " + cudaGetErrorString(status));
}

std::string no_gpu() {
    constexpr const char* kDriver = "libcuda.so.1";
    if (dlopen(kDriver, RTLD_NOW | RTLD_LOCAL) == nullptr)
        return std::string("no NVIDIA driver is installed (") + kDriver + " was not found)";
    int count = 0;
    const auto status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) return "the NVIDIA driver sees no GPU";
    if (status != cudaSuccess) return std::string("the NVIDIA driver does not start: ") + cudaGetErrorString(status);
    return {};
}

std::string compute_capability() {
    const std::string what = "asking for the GPU's compute capability";
    int device = 0;
    int major = 0;
    int minor = 0;
    check_cuda(cudaGetDevice(&device), what);
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), what);
    return "SM" + std::to_string(major) + std::to_string(minor);
}

CudaExecutor::CudaExecutor() {
    cudaStream_t created = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), "opening a session");
    stream_.reset(created);
}

void CudaExecutor::wait() const { check_cuda(cudaStreamSynchronize(stream()), "waiting for a call"); }

void* CudaExecutor::allocate(std::size_t size) {
    void* memory = nullptr;
    const auto status = cudaMallocAsync(&memory, size == 0 ? 1 : size, stream());
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        throw std::bad_alloc();
    }
    check_cuda(status, "allocating memory");
    try {
        check_cuda(cudaMemsetAsync(memory, 0, size, stream()), "clearing memory");
    } catch (...) {
        release(memory);
        throw;
    }
    return memory;
}

void CudaExecutor::release(void* memory) noexcept { cudaFreeAsync(memory, stream()); }

void CudaExecutor::copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                        std::size_t rows) {
    if (width == 0 || rows == 0) return;
    const bool whole = rows == 1 || (to_pitch == width && from_pitch == width);
    const auto status =
        whole ? cudaMemcpyAsync(to, from, width * rows, cudaMemcpyDeviceToDevice, stream())
              : cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDeviceToDevice, stream());
    check_cuda(status, "copying states");
}

void CudaExecutor::upload(void* to, const void* from, std::size_t size) {
    transfer(to, from, size, cudaMemcpyHostToDevice);
    wait();
}

void CudaExecutor::download(void* to, const void* from, std::size_t size) {
    transfer(to, from, size, cudaMemcpyDeviceToHost);
    wait();
}

void CudaExecutor::transfer(void* to, const void* from, std::size_t size, cudaMemcpyKind kind) const {
    check_cuda(cudaMemcpyAsync(to, from, size, kind, stream()), "copying between host and GPU");
}

}  // namespace mscompile
