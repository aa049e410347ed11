// Aligned memory, and the sizes of what lies in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "mscompile/backend.hpp"
#include "mscompile/spec.hpp"

namespace mscompile {

constexpr std::align_val_t kAlignment{64};

/// Bytes of one element of a numpy dtype that the bundle format allows.
std::size_t item_size(const std::string& dtype);

/// Bytes of a tensor. Throws std::bad_alloc where that is more than can be addressed.
std::size_t byte_size(const std::string& dtype, const Shape& shape);

/// Bytes of this machine, or fewer where the process has a limit (ulimit -v).
double memory_size();

/// Zeroed bytes of the host.
class Memory {
  public:
    Memory() = default;
    explicit Memory(std::size_t size);

    [[nodiscard]] std::byte* data() { return bytes_.get(); }
    [[nodiscard]] const std::byte* data() const { return bytes_.get(); }
    [[nodiscard]] std::size_t size() const { return size_; }

  private:
    struct Free {
        void operator()(std::byte* bytes) const { ::operator delete[](bytes, kAlignment); }
    };
    std::unique_ptr<std::byte[], Free> bytes_;
    std::size_t size_ = 0;
};

/// Zeroed bytes where an executor, which outlives them, keeps states. Only its functions may touch them.
class Resident {
  public:
    Resident() = default;
    Resident(Executor& owner, std::size_t size)
        : bytes_(static_cast<std::byte*>(owner.allocate(size)), Release{&owner}), size_(size) {}

    [[nodiscard]] std::byte* data() { return bytes_.get(); }
    [[nodiscard]] const std::byte* data() const { return bytes_.get(); }
    [[nodiscard]] std::size_t size() const { return size_; }

  private:
    struct Release {
        Executor* owner;
        void operator()(std::byte* bytes) const { owner->release(bytes); }
    };
    std::unique_ptr<std::byte, Release> bytes_;
    std::size_t size_ = 0;
};

}  // namespace mscompile
