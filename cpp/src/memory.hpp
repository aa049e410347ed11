// Aligned memory, and the sizes of what lies in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "mscompile/spec.hpp"

namespace mscompile {

constexpr std::align_val_t kAlignment{64};

/// Bytes of one element of a numpy dtype that the bundle format allows.
std::size_t item_size(const std::string& dtype);

/// Bytes of a tensor. Throws std::bad_alloc where that is more than can be addressed.
std::size_t byte_size(const std::string& dtype, const Shape& shape);

/// Zeroed bytes.
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

}  // namespace mscompile
