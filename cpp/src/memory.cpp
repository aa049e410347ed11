#include "memory.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace mscompile {

namespace {

std::byte* zeroed(std::size_t size) {
    auto* bytes = static_cast<std::byte*>(::operator new[](size == 0 ? 1 : size, kAlignment));
    std::memset(bytes, 0, size);
    return bytes;
}

}  // namespace

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

double memory_size() {
    const auto machine = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE));
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return machine;
    return std::min(machine, static_cast<double>(limit.rlim_cur));
}

Memory::Memory(std::size_t size) : bytes_(zeroed(size)), size_(size) {}

void* Executor::allocate(std::size_t size) { return zeroed(size); }

void Executor::release(void* memory) noexcept { ::operator delete[](memory, kAlignment); }

void Executor::copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                    std::size_t rows) {
    for (std::size_t row = 0; row < rows; ++row)
        std::memcpy(static_cast<std::byte*>(to) + row * to_pitch,
                    static_cast<const std::byte*>(from) + row * from_pitch, width);
}

void Executor::upload(void* to, const void* from, std::size_t size) { std::memcpy(to, from, size); }

void Executor::download(void* to, const void* from, std::size_t size) { std::memcpy(to, from, size); }

}  // namespace mscompile
