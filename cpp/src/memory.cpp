#include "memory.hpp"

#include <cstring>
#include <limits>

namespace mscompile {

std::size_t item_size(const std::string& dtype) {
    if (dtype == "bool" || dtype == "int8" || dtype == "uint8") return 1;
    if (dtype == "int16" || dtype == "float16") return 2;
    return dtype == "int32" || dtype == "float32" ? 4 : 8;
}

std::size_t byte_size(const std::string& dtype, const Shape& shape) {
    auto size = static_cast<std::int64_t>(item_size(dtype));
    for (const auto dim : shape)
        if (__builtin_mul_overflow(size, dim, &size)) throw std::bad_alloc();
    return static_cast<std::size_t>(size);
}

Memory::Memory(std::size_t size)
    : bytes_(static_cast<std::byte*>(::operator new[](size == 0 ? 1 : size, kAlignment))), size_(size) {
    std::memset(bytes_.get(), 0, size);
}

}  // namespace mscompile
